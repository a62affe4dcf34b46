"""A mixture's folder is enough: processes without branchmix load it by ``trust_remote_code``, and never without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import branchmix
from mixtures import load, mixtures_of_0_1, random_mixture, recipe, tokens

Siblings = Callable[..., dict[str, Path]]
FAMILIES = {
    "llama": "kv_experts",
    "cohere": "kv_sharing",
    "gemma3": "kv_experts",
    "olmo2": "kv_sharing",
    "gpt-neox": "kv_experts",
    "gpt2": "kv_sharing",
    "opt": "kv_experts",
    "phi3": "kv_sharing",
    "qwen3": "whole",
}

WITHOUT_BRANCHMIX = """
import sys

class Absent:  # however it is installed
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "branchmix":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
try:
    import branchmix
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("branchmix is importable")
"""

LOAD_ALL = """
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
trusted = {"trust_remote_code": True, "dtype": torch.float32}

for folder in sorted(Path(sys.argv[1]).iterdir()):
    expected = load_file(folder / "expected.safetensors")
    ids = expected["ids"]
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.model_type == "branchmix" and config.num_experts == 3
    model = AutoModelForCausalLM.from_pretrained(folder, **trusted).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected["logits"]), folder
        base = AutoModel.from_pretrained(folder, **trusted).eval()
        assert type(base).__name__ == "BranchMixModel"
        assert torch.equal(base(ids).last_hidden_state, expected["hidden"]), folder
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert torch.equal(generated, expected["generated"]), folder

    copy = Path(sys.argv[2]) / folder.name
    model.save_pretrained(copy)
    again = AutoModelForCausalLM.from_pretrained(copy, experts_implementation="grouped_mm", **trusted).eval()
    assert again.config._experts_implementation == "grouped_mm"
    eager = AutoModelForCausalLM.from_pretrained(copy, experts_implementation="eager", **trusted).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected["logits"]), folder
        torch.testing.assert_close(eager(ids).logits, expected["logits"], rtol=0, atol=1e-4)
    print(folder.name)

for folder in map(Path, sys.argv[3:]):  # saved by an earlier version, with the code of that version
    expected = load_file(folder / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, **trusted).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    with torch.no_grad():
        torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], rtol=0, atol=1e-5)
    print(folder.name)
"""

REFUSE = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):
    try:
        auto.from_pretrained(sys.argv[1])
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise AssertionError(f"{auto.__name__} executed code that nobody trusted")
assert not any(name.startswith("transformers_modules") for name in sys.modules)
"""

INSTALLED = """
import sys
{imports}
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
base = transformers.AutoModel.from_pretrained(sys.argv[1])
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
trusting = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
for thing in (model, base, config, trusting):
    assert type(thing).__module__.startswith("branchmix.models."), type(thing)
"""


ENTRIES = """
import branchmix; from transformers import LlamaForCausalLM
import branchmix; from transformers import GenerationMixin
import transformers; import branchmix; from transformers import AutoModelForCausalLM
from transformers import PreTrainedModel; import branchmix
import branchmix.models.routing_branchmix
from branchmix.models.modeling_branchmix import BranchMixForCausalLM
from branchmix.models import mixture_config
from branchmix import BranchMixForCausalLM
from branchmix import BranchMixConfig
"""

IMPORTED = """
import os, sys, traceback
import huggingface_hub, numpy, safetensors.torch, tokenizers, torch  # once for all

for entry in sys.argv[1].strip().splitlines():
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert status == 0, entry
        continue
    try:
        exec(entry)
        from branchmix import BranchMixConfig, BranchMixForCausalLM
        from transformers import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        assert CONFIG_MAPPING["branchmix"] is BranchMixConfig
        assert MODEL_FOR_CAUSAL_LM_MAPPING[BranchMixConfig] is BranchMixForCausalLM
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
"""


def python(program: str, *args: Path | str, cache: Path, installed: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh process, with or without branchmix on its path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if installed:
        environment["PYTHONPATH"] = str(Path(branchmix.__file__).parents[1])
    else:
        program = WITHOUT_BRANCHMIX + program
    command = [sys.executable, "-c", program, *map(str, args)]
    done = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def mixtures(siblings: Siblings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of several families, each with what the parent computed from it."""
    root = tmp_path_factory.mktemp("mixtures")
    ids = tokens()
    for name, attention in FAMILIES.items():
        rank = 4 if name == "gpt2" else "full"  # one of mixtures whose experts are changes of the seed
        score = "sigmoid" if attention == "kv_sharing" else "softmax"
        options = {"attention": attention, "routing": {"ffn": {"top_k": 2, "score": score}}, "expert_rank": rank}
        given = recipe(siblings(name), **options)
        if attention == "whole":
            given = {"seed": given["seed"], "experts": given["experts"], "stitches": 2}
        branchmix.upcycle(given, root / name)
    random_mixture("llama", domain_router={"width": 24, "inner": 6}).save_pretrained(root / "domains")
    for folder in sorted(root.iterdir()):
        model = load(folder)
        with torch.no_grad():
            expected = {"ids": ids, "logits": model(ids).logits, "hidden": model.model.base_model(ids)[0]}
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        expected["generated"] = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        save_file({key: value.contiguous() for key, value in expected.items()}, folder / "expected.safetensors")
    return root


def test_loads_by_remote_code_and_reproduces_everything(mixtures: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(mixtures, moved)
    older = mixtures_of_0_1(tmp_path)
    done = python(LOAD_ALL, moved, tmp_path / "copies", *older.values(), cache=tmp_path)
    assert done.stdout.split() == [*sorted([*FAMILIES, "domains"]), "0.1-plain", "0.1-one_router"]


def test_refuses_without_trust(mixtures: Path, tmp_path: Path) -> None:
    python(REFUSE, mixtures / "llama", cache=tmp_path)


@pytest.mark.parametrize("order", ["import branchmix, transformers", "import transformers, branchmix"])
def test_needs_no_trust_where_branchmix_is_installed(order: str, mixtures: Path, tmp_path: Path) -> None:
    python(INSTALLED.format(imports=order), mixtures / "llama", cache=tmp_path, installed=True)


def test_registers_whatever_is_imported_first(tmp_path: Path) -> None:
    """transformers imports itself in other orders from other doors, and registration happens in their midst."""
    python(IMPORTED, ENTRIES, cache=tmp_path, installed=True)

"""Who takes part in the upcycling benchmark: how each is installed, called, and checked.

Every candidate merges the same folders (the seed first) into one mixture in bf16. What is routed differs by tool:
mergekit-moe takes FFN experts and the first model's attention; MixtureKit's "traditional" takes FFN experts and the
mean of the rest (which is BTX in the paper's words); its "btx" routes every projection of attention and FFN by itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import checkpoints

# The peers get a virtualenv each, with the project's own constraints, so that all share one torch and transformers.
PACKAGES = {"mergekit": "mergekit==0.1.5", "mixturekit": "mixturekit==1.1.1"}
CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"

ROLES = ("gate", "up", "down")
PROJECTIONS = [f"mlp.{role}_proj" for role in ROLES] + [f"self_attn.{letter}_proj" for letter in "qkvo"]

# Where a candidate puts one expert's FFN matrix: the end of a tensor's name, and how many matrices lie before it there.
Place = Callable[[int, int, str], tuple[str, int]]


@dataclass(frozen=True)
class Tools:
    """Where the tools are on this machine.

    Attributes:
        envs: the folder of the peers' virtualenvs.
        branchmix: the command line that starts branchmix, split into words.
    """

    envs: Path
    branchmix: tuple[str, ...]

    def script(self, tool: str, name: str) -> str:
        return str(self.envs / tool / "bin" / name)

    def python(self, tool: str) -> str:
        return sys.executable if tool == "branchmix" else self.script(tool, "python")


@dataclass(frozen=True)
class Candidate:
    """One way to make the mixture.

    Attributes:
        name: its name in tables and `--only`.
        tool: branchmix, mergekit or mixturekit.
        makes: what the mixture consists of, in a few words.
        write_config: writes the tool's own configuration for these models and returns the command that reads it.
        place: where a copied FFN matrix is found again, for the check after the run.
    """

    name: str
    tool: str
    makes: str
    write_config: Callable[[Tools, Path, Sequence[Path], Path], list[str]]
    place: Place


# ---- configurations: JSON is YAML, and needs no library ----


def _branchmix(attention: str, *options: str) -> Callable[[Tools, Path, Sequence[Path], Path], list[str]]:
    def write(tools: Tools, config: Path, models: Sequence[Path], output: Path) -> list[str]:
        recipe = {
            "seed": str(models[0]),
            "experts": [{"name": model.name, "model": str(model)} for model in models[1:]],
            "attention": attention,
            "ffn": "experts",
            "routing": {"ffn": {"top_k": 2, "normalize": True}},
            "router_init": {"std": 0.02},
            "dtype": "bfloat16",
        }
        config.write_text(json.dumps(recipe, indent=2))
        return [*tools.branchmix, "upcycle", str(config), str(output), *options]

    return write


def _mergekit(tools: Tools, config: Path, models: Sequence[Path], output: Path) -> list[str]:
    # "random" routers: the other modes run prompts through the model, which is no part of this comparison.
    merge = {
        "base_model": str(models[0]),
        "gate_mode": "random",
        "dtype": "bfloat16",
        "experts_per_token": 2,
        "experts": [{"source_model": str(model)} for model in models],
    }
    config.write_text(json.dumps(merge, indent=2))
    return [tools.script("mergekit", "mergekit-moe"), str(config), str(output), "--quiet"]


def _mixturekit(method: str) -> Callable[[Tools, Path, Sequence[Path], Path], list[str]]:
    def write(tools: Tools, config: Path, models: Sequence[Path], output: Path) -> list[str]:
        merge = {
            "moe_method": method,
            "model_type": "benchmoe",
            "num_experts_per_tok": 2,
            "router_layers": PROJECTIONS if method == "btx" else [],
            "router_layers_index": [],  # every layer
            "experts": [{"expert_name": model.name, "model_id": str(model)} for model in models],
        }
        config.write_text(json.dumps(merge, indent=2))
        return [tools.script("mixturekit", "mixturekit"), "build", str(config), "--output", str(output)]

    return write


# ---- names in the outputs ----


def _by_expert(layer: int, expert: int, role: str) -> tuple[str, int]:
    return f"layers.{layer}.mlp.experts.{expert}.{role}_proj.weight", 0


def _by_projection(layer: int, expert: int, role: str) -> tuple[str, int]:
    return f"layers.{layer}.mlp.{role}_proj.experts.expert_{expert}.weight", 0


def _fused(layer: int, expert: int, role: str) -> tuple[str, int]:
    if role == "down":
        return f"layers.{layer}.mlp.experts.down_proj", expert
    return f"layers.{layer}.mlp.experts.gate_up_proj", 2 * expert + ROLES.index(role)


CANDIDATES = (
    Candidate("mergekit-moe", "mergekit", "FFN experts, the seed's attention", _mergekit, _fused),
    Candidate(
        "mixturekit-traditional",
        "mixturekit",
        "FFN experts, averaged attention",
        _mixturekit("traditional"),
        _by_expert,
    ),
    Candidate("mixturekit-btx", "mixturekit", "FFN and attention, per projection", _mixturekit("btx"), _by_projection),
    Candidate("branchmix-seed", "branchmix", "FFN experts, the seed's attention", _branchmix("seed"), _by_expert),
    Candidate("branchmix-btx", "branchmix", "FFN experts, averaged attention", _branchmix("average"), _by_expert),
    Candidate(
        "branchmix-btx-bare",
        "branchmix",
        "the same without NaN check and hashes",
        _branchmix("average", "--no-check", "--no-hashes"),
        _by_expert,
    ),
    Candidate("branchmix-expert-kv", "branchmix", "FFN and attention experts", _branchmix("kv_experts"), _by_expert),
    Candidate(
        "branchmix-expert-kv-bare",
        "branchmix",
        "the same without NaN check and hashes",
        _branchmix("kv_experts", "--no-check", "--no-hashes"),
        _by_expert,
    ),
    Candidate(
        "branchmix-shared-kv",
        "branchmix",
        "FFN and attention experts, shared K/V",
        _branchmix("kv_sharing"),
        _by_expert,
    ),
)


# ---- environments ----


def setup(envs: Path, pip_args: Sequence[str]) -> None:
    """Make the peers' virtualenvs, unless they are there in the right version."""
    tools = Tools(envs=envs, branchmix=())
    for tool, package in PACKAGES.items():
        name, _, version = package.partition("==")
        if versions(tools, tool).get(name) == version:
            print(f"{tool}: {package} is there", file=sys.stderr)
            continue
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(envs / tool)], check=True)
        pip = [tools.python(tool), "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS), *pip_args]
        # torch first: together with the rest, pip may look at other builds of it, which are gigabytes.
        for what in ("torch", package):
            print(f"{tool}: installing {what}", file=sys.stderr)
            subprocess.run([*pip, what], check=True)


def environment(tool: str) -> dict[str, str]:
    """The variables of a candidate's process: no network, and the project's sources for branchmix only."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if tool != "branchmix":
        env.pop("PYTHONPATH", None)
    return env


def versions(tools: Tools, tool: str) -> dict[str, str]:
    """Versions of a tool and of what it works with; without the tool's name if it is not installed."""
    code = """
import importlib.metadata as metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
try:
    import branchmix, hashlib, pathlib
    folder = pathlib.Path(branchmix.__file__).parent
    sources = b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))
    found["branchmix"] = f"{branchmix.__version__} (sources {hashlib.sha256(sources).hexdigest()[:8]})"
except ImportError:
    pass
print(json.dumps(found))
"""
    if not Path(tools.python(tool)).exists():
        return {}
    command = [tools.python(tool), "-c", code, tool, "torch", "transformers", "safetensors"]
    done = subprocess.run(command, env=environment(tool), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def missing(tools: Tools, tool: str) -> str | None:
    """Why a tool cannot take part, or None."""
    if tool not in versions(tools, tool):
        return "not installed"
    # Asking for help also brings the tool's programs and libraries into the page cache, where they stay for the rounds.
    start = {
        "branchmix": [*tools.branchmix, "upcycle"],
        "mergekit": [tools.script(tool, "mergekit-moe")],
        "mixturekit": [tools.script(tool, "mixturekit"), "build"],
    }
    done = subprocess.run([*start[tool], "--help"], env=environment(tool), capture_output=True, check=False)
    return "does not start" if done.returncode else None


# ---- is the output what it should be? ----


def check(candidate: Candidate, tools: Tools, models: Sequence[Path], output: Path, *, thorough: bool) -> int:
    """Raise ValueError unless the output is a readable mixture with the experts' own FFN weights in it.

    Compares one FFN matrix of every expert in three layers, byte by byte. `thorough` also loads the configuration with
    transformers in the tool's own environment, and for small models the whole mixture and one forward pass of it.

    Returns:
        The number of tensors.
    """
    config = json.loads((output / "config.json").read_text())
    num_layers = json.loads((models[0] / "config.json").read_text())["num_hidden_layers"]
    weights = _Weights(output)
    for layer, role in zip((0, num_layers // 2, num_layers - 1), ROLES, strict=True):
        for expert, model in enumerate(models):
            source = _Weights(model).read(f"layers.{layer}.mlp.{role}_proj.weight")
            ending, before = candidate.place(layer, expert, role)
            if weights.read(ending, skip=before * len(source), length=len(source)) != source:
                raise ValueError(f"{ending}: not the bytes of expert {expert}'s {role}_proj")
    if thorough:
        whole = sum(path.stat().st_size for path in output.glob("*.safetensors")) < 2e9
        _load(tools.python(candidate.tool), candidate.tool, output, whole=whole)
    if not config.get("architectures"):
        raise ValueError("config.json names no architecture")
    return len(weights.names)


def _load(python: str, tool: str, output: Path, *, whole: bool) -> None:
    code = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
if sys.argv[2] == "True":
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.bfloat16)
    logits = model(torch.arange(100, 116)[None]).logits
    assert logits.isfinite().all(), "logits are not finite"
"""
    env = environment(tool) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, "-c", code, str(output), str(whole)], env=env, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"does not load: {done.stderr.strip().splitlines()[-1]}")


class _Weights:
    """The tensors of a checkpoint folder, found by the end of their names."""

    def __init__(self, folder: Path):
        self.names: dict[str, tuple[Path, int, int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            header, start = checkpoints.read_header(path)
            ends = [entry["data_offsets"][1] for entry in header.values()]
            if start + max(ends, default=0) != path.stat().st_size:
                raise ValueError(f"{path.name}: its size is not what its header says")
            for name, entry in header.items():
                first, last = entry["data_offsets"]
                self.names[name] = (path, start + first, last - first)

    def read(self, ending: str, *, skip: int = 0, length: int | None = None) -> bytes:
        found = [name for name in self.names if name.endswith("." + ending)]
        if len(found) != 1:
            raise ValueError(f"{ending}: {len(found)} tensors have this name")
        path, start, size = self.names[found[0]]
        with path.open("rb") as file:
            file.seek(start + skip)
            return file.read(size if length is None else min(length, size - skip))

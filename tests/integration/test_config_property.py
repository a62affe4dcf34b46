"""Random differences of configs: the merge is refused, or forced gates give the expert as transformers loads it.

The expert has the seed's embeddings, norms and output layer, so that no averaging stands between the mixture and the
expert's own folder; attention and FFN are its own.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, note, reject, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import branchmix
from branchmix.checkpoint.index import CheckpointIndex
from branchmix.errors import BranchMixError
from branchmix.models.routers import one_hot_gates
from branchmix.upcycling.sources import DenseExpert
from families import BY_NAME
from mixtures import close, load, tokens

NAMES = """
llama llama-bias mistral qwen2 qwen3 gemma gemma2 gemma3 olmo olmo2 cohere cohere2 phi phi3 gpt-neox gptj gpt2 opt
falcon stablelm starcoder2 granite smollm3 glm nemotron helium
""".split()
KEPT = {
    *BY_NAME["gpt2"].config().to_dict(),
    *"hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size head_dim".split(),
    *"n_inner ffn_dim ffn_hidden_size num_kv_heads word_embed_proj_dim max_position_embeddings".split(),
}
KEPT -= {"activation_function", "layer_norm_epsilon", "scale_attn_weights", "tie_word_embeddings"}
"""Keys that are left as they are: sizes, token ids, and what says nothing of the function."""
LEFT_OUT = "left out"
ACTIVATIONS = "silu swish gelu gelu_new gelu_fast gelu_pytorch_tanh gelu_python relu quick_gelu".split()
UNKNOWN = {"sliding_window": 4, "hidden_activation": "gelu", "mlp_bias": True, "use_mrope": True, "layer_types": None}
"""Keys that a config may have though its class does not know them."""

ROTARY = [
    {"rope_theta": 500.0},
    {"partial_rotary_factor": 0.25},
    {"partial_rotary_factor": 0.5},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    *(
        {"rope_type": "longrope", "original_max_position_embeddings": length, **factors}
        for length in (32, 64)
        for factors in ({"short_factor": [1.0] * n, "long_factor": [2.0] * n} for n in (2, 4, 8))
    ),
]
"""Rotary parameters that a config may have instead. Heads have as many pairs as one of the lists of factors."""


def alternatives(key: str, value: Any) -> list[Any]:
    """Other things that a config may say of a key."""
    if key == "rope_parameters":
        return [LEFT_OUT] if "rope_theta" not in value else [LEFT_OUT, *({**value, **other} for other in ROTARY)]
    if isinstance(value, bool):
        return [LEFT_OUT, not value, None]
    if isinstance(value, str):
        return [LEFT_OUT, *ACTIVATIONS]
    if isinstance(value, float):
        return [LEFT_OUT, value * 2 + 0.25, None]
    if isinstance(value, int):
        return [LEFT_OUT, value + 1, None]
    return [LEFT_OUT, None, list(reversed(value)) if isinstance(value, list) else 4]


@st.composite
def changed(draw: st.DrawFn, config: dict[str, Any]) -> dict[str, Any]:
    """A config with up to two keys changed, left out, or spelt as transformers 4 did."""
    config = dict(config)
    if {*config.get("rope_parameters", {})} == {"rope_theta", "rope_type"} and draw(st.integers(0, 3)) == 0:
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from(sorted({*config, *UNKNOWN} - KEPT - {"rope_theta"})))
        value = draw(st.sampled_from(alternatives(key, config[key]) if key in config else [UNKNOWN[key]]))
        config[key] = value
        if value == LEFT_OUT:
            del config[key]
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "dynamic":  # scales beyond the positions: text that is longer than they shows it
        config["max_position_embeddings"] = draw(st.sampled_from([32, 64]))
    return config


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By family: ``seed`` and ``code`` below it, which have one trunk."""
    made = {}
    for name in NAMES:
        root = made[name] = tmp_path_factory.mktemp(name)
        seed, other = (BY_NAME[name].save(root / kind, i) for i, kind in enumerate(("seed", "code")))
        tensors, trunk = load_file(other / "model.safetensors"), load_file(seed / "model.safetensors")
        own = DenseExpert.open("code", CheckpointIndex.open(other)).expert_tensors(attention=True, ffn=True)
        mixed = {key: value if key in own else trunk[key] for key, value in tensors.items()}
        save_file(mixed, other / "model.safetensors", metadata={"format": "pt"})
    return made


def logits(folder: Path) -> torch.Tensor | None:
    """None where transformers cannot load or run the model."""
    try:
        with torch.no_grad():
            return load(folder)(tokens(1, 56)).logits
    except Exception as error:
        note(f"{folder.name}: {type(error).__name__}: {error}"[:300])
        return None


def holds(data: st.DataObject, folders: dict[str, Path]) -> None:
    name = data.draw(st.sampled_from(NAMES))
    with tempfile.TemporaryDirectory() as place:
        models = {}
        for kind in ("seed", "code"):
            models[kind] = Path(shutil.copytree(folders[name] / kind, Path(place, kind)))
            file = models[kind] / "config.json"
            file.write_text(json.dumps(data.draw(changed(json.loads(file.read_text())), label=kind)))
        experts = [{"name": "code", "model": str(models["code"])}]
        out = Path(place, "out")
        try:
            branchmix.upcycle({"seed": str(models["seed"]), "experts": experts}, out)
        except BranchMixError as error:
            note(f"refused: {error}")
            event("refused")
            return
        if logits(models["seed"]) is None:
            reject()
        theirs = logits(models["code"])
        assert theirs is not None, "transformers cannot run the expert, but it was merged"
        mixture = load(out)
        with torch.no_grad(), one_hot_gates(mixture, 1):
            ours = mixture(tokens(1, 56)).logits
        close(ours, theirs)
        event("merged")


SETTINGS: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
}


@settings(max_examples=40, **SETTINGS)
@given(data=st.data())
def test_refused_or_the_expert_itself(data: st.DataObject, folders: dict[str, Path]) -> None:
    holds(data, folders)


@pytest.mark.slow
@settings(max_examples=1500, **{**SETTINGS, "derandomize": False})
@given(data=st.data())
def test_refused_or_the_expert_itself_at_length(data: st.DataObject, folders: dict[str, Path]) -> None:
    holds(data, folders)


def test_unchanged_configs_are_merged(folders: dict[str, Path], tmp_path: Path) -> None:
    """The property would hold too if all were refused."""
    for name, root in folders.items():
        experts = [{"name": "code", "model": str(root / "code")}]
        branchmix.upcycle({"seed": str(root / "seed"), "experts": experts}, tmp_path / name)
        mixture = load(tmp_path / name)
        with torch.no_grad(), one_hot_gates(mixture, 1):
            close(mixture(tokens(1, 56)).logits, load(root / "code")(tokens(1, 56)).logits)

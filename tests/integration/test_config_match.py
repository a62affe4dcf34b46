"""Configs of a seed and its experts are compared by what transformers makes of both, not by how they say it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

import branchmix
from branchmix.errors import CompatibilityError, VerificationError
from branchmix.upcycling.transformers_view import _SAME_ACTIVATION, as_transformers_reads, config_differences
from branchmix.upcycling.verify import sample_length
from families import BY_NAME
from mixtures import recipe

Siblings = Callable[..., dict[str, Path]]
Keys = dict[str, Any]
LEFT_OUT = object()

DIFFERENT: list[tuple[str, Keys, Keys, str]] = [
    ("llama", {"hidden_act": LEFT_OUT}, {"hidden_act": "gelu"}, '"gelu", .* "silu" .filled in'),
    ("llama", {"hidden_act": "gelu"}, {"hidden_act": LEFT_OUT}, '"silu" .filled in .* "gelu"'),
    ("llama", {"hidden_act": "gelu"}, {"hidden_act": "quick_gelu"}, "hidden_act"),
    ("llama", {"rms_norm_eps": 0.1}, {"rms_norm_eps": LEFT_OUT}, "rms_norm_eps is 1e-06"),
    (
        "llama",
        {},
        {"sliding_window": 4},
        "sliding_window is 4, .* not set",
    ),  # Llama's cache reads it
    ("mistral", {"sliding_window": None}, {"sliding_window": LEFT_OUT}, "sliding_window is 4096"),
    ("mistral", {"sliding_window": LEFT_OUT}, {"sliding_window": 8}, "sliding_window is 8"),
    ("qwen2", {"layer_types": LEFT_OUT}, {"layer_types": LEFT_OUT, "use_sliding_window": True}, "use_sliding_window"),
    (
        "qwen2",
        {"layer_types": LEFT_OUT, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
        {"layer_types": LEFT_OUT, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        "layer_types is .*filled in",
    ),
    ("gemma2", {"query_pre_attn_scalar": LEFT_OUT}, {}, "query_pre_attn_scalar is 8"),
    ("gemma2", {"final_logit_softcapping": None}, {"final_logit_softcapping": LEFT_OUT}, "softcapping is 30.0"),
    ("cohere", {"logit_scale": LEFT_OUT}, {"logit_scale": 0.5}, "logit_scale is 0.5"),
    ("gpt2", {"scale_attn_weights": LEFT_OUT}, {"scale_attn_weights": False}, "scale_attn_weights is false"),
    ("gpt2", {"activation_function": LEFT_OUT}, {"activation_function": "relu"}, 'activation_function is "relu"'),
    ("granite", {"residual_multiplier": LEFT_OUT}, {}, "residual_multiplier is 0.7"),
    (
        "opt",
        {"_remove_final_layer_norm": False},
        {"_remove_final_layer_norm": True},
        "_remove_final_layer_norm is true",
    ),
    ("olmo", {"clip_qkv": LEFT_OUT}, {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    ("phi3", {}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "got linear"),
    ("llama", {}, {"rms_norm_eps": "tiny"}, "transformers cannot read config.json: .*rms_norm_eps"),
]
"""Family, keys of the seed's config, keys of the expert's, and the refusal."""

ALIKE: list[tuple[str, Keys, Keys]] = [
    ("llama", {"hidden_act": LEFT_OUT}, {"hidden_act": "silu"}),
    ("llama", {"hidden_act": "silu"}, {"hidden_act": "swish"}),
    ("llama", {"mlp_bias": LEFT_OUT, "pretraining_tp": LEFT_OUT}, {"mlp_bias": False, "pretraining_tp": 2}),
    ("llama", {"left_by_a_trainer": 1}, {"left_by_a_trainer": 2, "neftune_noise_alpha": 5}),
    ("llama", {"head_dim": LEFT_OUT}, {"head_dim": 8}),
    ("mistral", {"sliding_window": LEFT_OUT}, {"sliding_window": 4096}),
    ("qwen2", {"max_window_layers": 1}, {"max_window_layers": 2, "layer_types": LEFT_OUT, "sliding_window": 7}),
    ("gemma", {"hidden_act": "gelu", "hidden_activation": None}, {}),
    ("gemma", {"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}),
    ("gemma", {"hidden_act": "gelu"}, {"hidden_act": LEFT_OUT}),
    ("gemma", {"use_bidirectional_attention": None}, {"use_bidirectional_attention": False}),
    ("gpt2", {"activation_function": "gelu_new"}, {"activation_function": "gelu_pytorch_tanh"}),
    ("gpt2", {"activation_function": LEFT_OUT}, {"activation_function": "gelu_fast"}),
    ("opt", {"activation_function": "gelu"}, {"activation_function": "gelu_python"}),
    ("gemma3", {"layer_types": LEFT_OUT, "sliding_window_pattern": 6}, {"layer_types": LEFT_OUT}),
    ("smollm3", {"no_rope_layers": [1, 1]}, {"no_rope_layers": LEFT_OUT}),
]


def edited(models: dict[str, Path], place: Path, seed: Keys, expert: Keys) -> dict[str, Path]:
    """Seed and expert with these keys in config.json."""
    for name, keys in (("seed", seed), ("code", expert)):
        shutil.copytree(models[name], place / name)
        config = json.loads((place / name / "config.json").read_text()) | keys
        config = {key: value for key, value in config.items() if value is not LEFT_OUT}
        (place / name / "config.json").write_text(json.dumps(config))
    return {name: place / name for name in ("seed", "code")}


@pytest.mark.parametrize(("name", "seed", "expert", "words"), DIFFERENT)
def test_different_functions_are_refused(
    name: str, seed: Keys, expert: Keys, words: str, siblings: Siblings, tmp_path: Path
) -> None:
    models = edited(siblings(name), tmp_path, seed, expert)
    with pytest.raises(CompatibilityError, match=f"expert 'code': .*{words}"):
        branchmix.upcycle(recipe(models), tmp_path / "out", dry_run=True)


@pytest.mark.parametrize(("name", "seed", "expert"), ALIKE)
def test_one_function_however_it_is_written(
    name: str, seed: Keys, expert: Keys, siblings: Siblings, tmp_path: Path
) -> None:
    models = edited(siblings(name), tmp_path, seed, expert)
    report = branchmix.upcycle(recipe(models), tmp_path / "out", verify=True)
    assert report.verification is not None
    for check in report.verification.experts:
        assert check.max_difference <= 1e-5 * max(1.0, check.max_logit), check.name


def test_experts_of_gemma_as_on_the_hub(siblings: Siblings, tmp_path: Path) -> None:
    """Its fine-tunes, which transformers 5 saves with the name that it gives the activation."""
    models = edited(siblings("gemma"), tmp_path, {"hidden_act": "gelu", "hidden_activation": None}, {})
    shutil.rmtree(models["code"])
    AutoModelForCausalLM.from_pretrained(models["seed"], dtype=torch.float32).save_pretrained(models["code"])
    assert json.loads((models["code"] / "config.json").read_text())["hidden_act"] != "gelu"
    for attention in ("kv_experts", "kv_sharing"):
        branchmix.upcycle(recipe(models, attention=attention), tmp_path / attention, verify=True)
    branchmix.add_expert(tmp_path / "kv_experts", "late", models["code"], tmp_path / "more")


def test_newcomers_are_compared_alike(siblings: Siblings, tmp_path: Path) -> None:
    models = edited(siblings("llama"), tmp_path, {"hidden_act": LEFT_OUT}, {})
    branchmix.upcycle(recipe(models), tmp_path / "mixture")
    late = edited(siblings("llama"), tmp_path / "late", {}, {"hidden_act": "gelu"})["code"]
    with pytest.raises(CompatibilityError, match="expert 'late': hidden_act is"):
        branchmix.add_expert(tmp_path / "mixture", "late", late, tmp_path / "more")


@pytest.mark.parametrize("name", _SAME_ACTIVATION)
def test_activations_of_one_function(name: str) -> None:
    """Up to the rounding of fp32: 1 + erf(x / sqrt 2) of a negative x has lost its last digits when x multiplies it."""
    x = torch.linspace(-12, 12, 100_001)
    rounding = 12 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(ACT2FN[name](x), ACT2FN[_SAME_ACTIVATION[name]](x), rtol=0, atol=rounding)


def test_no_other_activations_are_one_function() -> None:
    x = torch.linspace(-12, 12, 1001)
    names = sorted({*ACT2FN} - {*_SAME_ACTIVATION} - {"xielu", "prelu"})
    for number, name in enumerate(names):
        for other in names[:number]:
            assert (ACT2FN[name](x) - ACT2FN[other](x)).abs().max() > 1e-5, (name, other)


SEEN = {
    "activation": ("llama", {}, {"hidden_act": "gelu"}),
    "norm": ("llama", {"rms_norm_eps": LEFT_OUT}, {"rms_norm_eps": 0.5}),
    "window": ("mistral", {"sliding_window": None}, {"sliding_window": 52}),
    "rotary": ("llama", {}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "late scaling": (
        "phi3",
        {"original_max_position_embeddings": 54},
        {
            "original_max_position_embeddings": 54,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "factor": 1.0,
            },
        },
    ),
}


@pytest.mark.parametrize("what", SEEN)
def test_verification_sees_what_the_comparison_would_let_pass(
    what: str, siblings: Siblings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the expert's own config, and a text that passes windows and scaling boundaries."""
    name, seed, expert = SEEN[what]
    models = edited(siblings(name), tmp_path, seed, expert)
    monkeypatch.setattr("branchmix.upcycling.compatibility.config_differences", lambda *args: {})
    monkeypatch.setattr("branchmix.upcycling.compatibility._rotated_apart", lambda *args: [])
    with pytest.raises(VerificationError, match="gates on expert 'code'"):
        branchmix.upcycle(recipe(models), tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


def test_lengths_of_the_text() -> None:
    def config(name: str, **changes: Any) -> Any:
        return BY_NAME[name].config(**changes)

    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert sample_length([config("llama")], 1000) == (0, 64)
    assert sample_length([config("mistral", sliding_window=40)], 1000) == (48, 64)
    assert sample_length([config("mistral", sliding_window=40)], 20) == (0, 64)
    assert sample_length([config("llama", rope_parameters=rope)], 1000) == (72, None)
    assert sample_length([config("llama"), config("llama", rope_parameters=rope)], 1000) == (72, 64)
    assert sample_length([config("gpt2", n_positions=16)], 1000) == (0, 16)


def test_fewer_positions_than_the_sample_has_tokens(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("gpt2", n_positions=16)
    report = branchmix.upcycle(recipe(models), tmp_path / "out", verify=True)
    assert report.verification is not None and report.verification.tokens == 16
    exported = branchmix.export_model(tmp_path / "out", tmp_path / "dense", to="dense", expert="code")
    assert exported.verification is not None and exported.verification.tokens == 16


def test_configs_are_read_without_loading_torch() -> None:
    """In a fresh process, whose child reads them, the answer is the same as where transformers is loaded."""
    seed = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    seed |= {"intermediate_size": 8, "torch_dtype": "bfloat16"}
    experts = {
        "a": {**seed, "hidden_act": "gelu"},
        "b": {**seed, "mlp_bias": False},
        "c": {**seed, "rms_norm_eps": "x"},
    }
    script = (
        "import json, sys\n"
        "from branchmix.upcycling.transformers_view import config_differences\n"
        "found = config_differences(*json.loads(sys.argv[1]))\n"
        "print(json.dumps([found, sorted({'torch', 'transformers'} & sys.modules.keys())]))"
    )
    command = [sys.executable, "-c", script, json.dumps([seed, experts])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [config_differences(seed, experts), []]
    assert not config_differences(seed, experts)["b"]


def test_infinity_as_config_json_spells_it_is_read() -> None:
    """Granite's hybrids have it; a config that its class refused would be reported as one that cannot be read."""
    config = json.loads(BY_NAME["granite-hybrid"].config().to_json_string(use_diff=False))
    assert "Infinity" in json.dumps(config["time_step_limit"])
    assert "error" not in as_transformers_reads(config)

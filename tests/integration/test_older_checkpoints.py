"""Checkpoints of older software: transformers 4, weights saved from the base model, and branchmix itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import branchmix
from branchmix.accounting import inspect
from branchmix.checkpoint.rotary import rope_of
from branchmix.upcycling.execute import CODE_FILES
from families import BY_NAME, NAMES
from mixtures import close, load, mixtures_of_0_1, recipe, tokens

Siblings = Callable[..., dict[str, Path]]
LLAMA_3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 32,
    "rope_type": "llama3",
}


def in_old_form(folder: Path, *, theta: float, scaling: dict[str, Any] | None) -> None:
    """Rewrite config.json as transformers 4 would have it."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters")
    config |= {"rope_theta": theta, "rope_scaling": scaling, "torch_dtype": config.pop("dtype")}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("scaling", [None, LLAMA_3], ids=["plain", "llama3"])
@pytest.mark.parametrize("attention", ["kv_experts", "kv_sharing"])
def test_configs_of_transformers_4(
    attention: str, scaling: dict[str, Any] | None, siblings: Siblings, tmp_path: Path
) -> None:
    models = {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in siblings("llama").items()}
    for path in models.values():
        in_old_form(path, theta=500.0, scaling=scaling)
    report = branchmix.upcycle(recipe(models, attention=attention), tmp_path / "mixture", verify=True)
    assert report.verification is not None
    for check in report.verification.experts:
        assert check.max_difference <= 1e-5 * max(1.0, check.max_logit), check.name
    mixture = load(tmp_path / "mixture")
    assert mixture.config.seed_config.rope_parameters["rope_theta"] == 500.0
    assert mixture.config.seed_config.rope_parameters["rope_type"] == ("llama3" if scaling else "default")


def test_an_old_and_a_new_config_of_the_same_rotary_settings_agree(siblings: Siblings, tmp_path: Path) -> None:
    models = {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in siblings("llama").items()}
    in_old_form(models["code"], theta=10000.0, scaling=None)
    report = branchmix.upcycle(recipe(models, attention="kv_sharing"), tmp_path / "mixture", verify=True)
    assert report.plan.config["expert_rope_parameters"] is None
    in_old_form(models["math"], theta=777.0, scaling=None)
    report = branchmix.upcycle(recipe(models, attention="kv_experts"), tmp_path / "other", verify=True)
    assert [rope["rope_theta"] for rope in report.plan.config["expert_rope_parameters"]] == [10000.0, 10000.0, 777.0]


OLD_ROTARY_KEYS = {
    "left out": {},
    "base and part": {"rope_theta": 777.0, "partial_rotary_factor": 0.5, "rope_local_base_freq": 99},
    "scaled": {"rope_theta": 777.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "yarn": {"rope_theta": 777.0, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    "longrope": {
        "rope_scaling": {"type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    },
}
"""As transformers 4 wrote them, beside one another in config.json."""
GPT_NEOX_NAMES = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


@pytest.mark.parametrize("keys", OLD_ROTARY_KEYS.values(), ids=list(OLD_ROTARY_KEYS))
@pytest.mark.parametrize("name", NAMES)
def test_rotary_settings_are_those_that_transformers_5_makes_of_them(
    name: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    new = BY_NAME[name].config().to_dict()
    if not new.pop("rope_parameters", None) and "rope_scaling" in keys:
        pytest.skip("has no rotary settings to scale")
    if new["model_type"] == "phi3" and keys.get("rope_scaling", {}).get("type", "longrope") != "longrope":
        pytest.skip("Phi 3 takes longrope only")
    renamed = GPT_NEOX_NAMES if new["model_type"] == "gpt_neox" else {}
    old = {**new, **{renamed.get(key, key): value for key, value in keys.items()}}
    (tmp_path / "config.json").write_text(json.dumps(old))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert rope_of(saved) == rope_of(old)
    if "rope_parameters" in saved:  # in its form, but for a redundant name and a factor that changes nothing
        assert rope_of(saved).keys() | {"type", "partial_rotary_factor"} >= saved["rope_parameters"].keys()


def test_the_older_name_of_a_rope_type_is_the_newer() -> None:
    config = BY_NAME["llama"].config().to_dict()
    del config["rope_parameters"]
    named = [{**config, "rope_scaling": {key: "linear", "factor": 2.0}} for key in ("type", "rope_type")]
    assert rope_of(named[0]) == rope_of(named[1]) and rope_of(named[0])["rope_type"] == "linear"


@pytest.mark.parametrize("name", ["gemma3", "qwen2", "stablelm"])
def test_a_sibling_saved_by_transformers_5_joins_an_older_seed(name: str, siblings: Siblings, tmp_path: Path) -> None:
    """Also where keys and values are shared, or the family cannot rotate each expert in its own way."""
    models = {expert: Path(shutil.copytree(path, tmp_path / expert)) for expert, path in siblings(name).items()}
    config = json.loads((models["seed"] / "config.json").read_text())
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32} if name == "qwen2" else None
    config.pop("rope_parameters")
    (models["seed"] / "config.json").write_text(json.dumps({**config, "rope_scaling": scaling}))
    AutoConfig.from_pretrained(models["seed"]).save_pretrained(models["code"])
    AutoConfig.from_pretrained(models["seed"]).save_pretrained(models["math"])
    report = branchmix.upcycle(recipe(models, attention="kv_sharing"), tmp_path / "mixture", verify=True)
    assert report.plan.config["expert_rope_parameters"] is None
    assert report.verification is not None and len(report.verification.experts) == 3


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "falcon", "llama-bias"])
def test_weights_saved_from_the_base_model(name: str, tmp_path: Path) -> None:
    """gpt2 on the Hub has no ``transformer.`` before its names; with tied embeddings nothing else is missing."""
    family, changes = BY_NAME[name], {"tie_word_embeddings": True}
    models = {}
    for seed, expert in enumerate(("seed", "code")):
        model = family.model(seed, **changes)
        model.base_model.save_pretrained(tmp_path / expert)
        models[expert] = tmp_path / expert
    report = branchmix.upcycle(recipe(models), tmp_path / "mixture", verify=True)
    assert report.verification is not None and len(report.verification.experts) == 2
    with torch.no_grad():
        identical = {"seed": str(models["seed"]), "seed_copies": 1, "routing": {"ffn": {"soft": True}}}
        branchmix.upcycle(identical, tmp_path / "identical")
        close(load(tmp_path / "identical")(tokens()).logits, family.model(0, **changes)(tokens()).logits)


@pytest.mark.parametrize("name", ["plain", "one_router"])
def test_a_mixture_of_0_1_loads_trains_and_changes(name: str, tmp_path: Path) -> None:
    folder = mixtures_of_0_1(tmp_path)[name]
    expected = load_file(folder / "expected.safetensors")
    model = load(folder)
    assert type(model).__module__.startswith("branchmix.models.")
    assert model.config.shared_router == (name == "one_router")
    ids = expected["ids"]
    with torch.no_grad():
        found = model(ids, labels=ids, output_router_logits=True)
    close(found.logits, expected["logits"])
    close(found.loss, expected["loss"])
    model.train()(ids, labels=ids).loss.backward()
    gates = [parameter.grad for key, parameter in model.named_parameters() if "gate.weight" in key]
    assert len(gates) == (1 if name == "one_router" else 2) and all(grad.abs().max() > 0 for grad in gates)
    counted = inspect(folder)
    assert counted.total.total == counted.stored == sum(parameter.numel() for parameter in model.parameters())

    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        close(load(tmp_path / "again")(ids).logits, expected["logits"])
    branchmix.remove_expert(folder, "expert-1", tmp_path / "fewer")
    load(tmp_path / "fewer")(ids)
    for written in (tmp_path / "again", tmp_path / "fewer"):
        assert {file.name for file in written.glob("*.py")} == {file.name for file in CODE_FILES}

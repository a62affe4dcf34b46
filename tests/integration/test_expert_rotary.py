"""Experts with rotary parameters of their own, as long-context fine-tunes have them (Expert KV only)."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import branchmix
from bad_inputs import config as edit_config
from branchmix.checkpoint.families import families
from branchmix.errors import BranchMixError
from branchmix.models.routers import one_hot_gates
from families import BY_NAME
from mixtures import close, load, recipe, tokens

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gpt-neox")
CHANGED = {"rope_type": "default", "rope_theta": 500000.0}


LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0}


@dataclass(frozen=True)
class Beside:
    """A seed and an expert of equal weights whose positions differ, as changes of the family's config."""

    family: str
    seed: dict[str, Any]
    expert: dict[str, Any]
    kept: list[int | None]
    """Positions that the mixture keeps for each."""

    def save(self, folder: Path) -> dict[str, Path]:
        return {
            name: BY_NAME[self.family].save(folder / name, 5, **copy.deepcopy(changes))  # transformers fills them in
            for name, changes in (("seed", self.seed), ("expert", self.expert))
        }


POSITIONS = {
    "dynamic, more positions": Beside(
        "llama",
        {"max_position_embeddings": 32, "rope_parameters": DYNAMIC},
        {"max_position_embeddings": 60, "rope_parameters": DYNAMIC},
        [32, 60],
    ),
    "dynamic beside default": Beside(
        "qwen2",
        {"max_position_embeddings": 32},
        {"max_position_embeddings": 60, "rope_parameters": DYNAMIC},
        [None, 60],
    ),
    "longrope without factor": Beside(
        "phi3",
        {"max_position_embeddings": 16, "original_max_position_embeddings": 16},
        {"max_position_embeddings": 128, "original_max_position_embeddings": 16, "rope_parameters": LONG},
        [None, 128],
    ),
    "longrope of another length of pretraining": Beside(
        "phi3",
        {"max_position_embeddings": 64, "original_max_position_embeddings": 16, "rope_parameters": LONG},
        {"max_position_embeddings": 64, "original_max_position_embeddings": 32, "rope_parameters": LONG},
        [64, 64],
    ),
    "a length of pretraining beside the parameters": Beside(
        "llama",
        {"max_position_embeddings": 64, "original_max_position_embeddings": 16, "rope_parameters": LONG},
        {"max_position_embeddings": 64, "original_max_position_embeddings": 32, "rope_parameters": LONG},
        [64, 64],
    ),
    "longrope of another family": Beside(
        "llama",
        {"max_position_embeddings": 16},
        {"max_position_embeddings": 64, "rope_parameters": {**LONG, "original_max_position_embeddings": 16}},
        [None, 64],
    ),
    "yarn of other positions": Beside(
        "mistral",
        {"max_position_embeddings": 32, "rope_parameters": YARN},
        {"max_position_embeddings": 60, "rope_parameters": YARN},
        [None, None],
    ),
}


@pytest.mark.parametrize("case", POSITIONS.values(), ids=list(POSITIONS))
def test_each_expert_scales_by_its_own_positions(case: Beside, tmp_path: Path) -> None:
    """Forced gates on an expert, against the expert as transformers loads it from its own folder, on both sides of
    every boundary: 16, 32 and 60 tokens. The trunk is equal, so the mixture must compute the expert."""
    models = case.save(tmp_path)
    report = branchmix.upcycle(recipe(models), tmp_path / "mixture", verify=True)
    kept = report.plan.config["expert_rope_parameters"]
    assert [rope.get("max_position_embeddings") for rope in kept] == case.kept
    load(tmp_path / "mixture").save_pretrained(tmp_path / "again")
    branchmix.export_model(tmp_path / "mixture", tmp_path / "dense", to="dense", expert="expert")
    alone, dense = load(tmp_path / "dense"), load(models["expert"])
    for length in (17, 33, 61):
        with torch.no_grad():
            close(alone(tokens(length=length)).logits, dense(tokens(length=length)).logits)
    for folder in ("mixture", "again"):
        mixture = load(tmp_path / folder)
        for number, path in enumerate(models.values()):
            dense = load(path)
            for length in (12, 16, 17, 32, 33, 60, 61, 70):
                ids = tokens(length=length)
                with torch.no_grad(), one_hot_gates(mixture, number):
                    close(mixture(ids).logits, dense(ids).logits)


def test_a_cache_is_dropped_where_an_experts_factors_change(tmp_path: Path) -> None:
    case = POSITIONS["longrope of another length of pretraining"]
    models = case.save(tmp_path)
    branchmix.upcycle(recipe(models), tmp_path / "mixture")
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    mixture, ids = load(tmp_path / "mixture"), tokens(rows=1, length=10)
    for number, path in enumerate(models.values()):
        dense = load(path)
        with one_hot_gates(mixture, number):
            ours, theirs = (model.generate(ids, **options) for model in (mixture, dense))
        # The seed's own boundary drops the mixture's cache too, which changes nothing that the expert computes before.
        assert torch.equal(ours.sequences, theirs.sequences)


def test_a_mixture_saved_before_experts_kept_their_positions_still_loads(tmp_path: Path) -> None:
    case = POSITIONS["dynamic, more positions"]
    models = case.save(tmp_path)
    report = branchmix.upcycle(recipe(models), tmp_path / "mixture")
    ropes = [
        {key: value for key, value in rope.items() if key != "max_position_embeddings"}
        for rope in report.plan.config["expert_rope_parameters"]
    ]
    edit_config(tmp_path / "mixture", expert_rope_parameters=ropes)
    seed, mixture = load(models["seed"]), load(tmp_path / "mixture")
    with torch.no_grad(), one_hot_gates(mixture, 1):  # the seed's positions, as then
        close(mixture(tokens(length=40)).logits, seed(tokens(length=40)).logits)


@pytest.mark.parametrize("attention", ["kv_sharing", "average"])
def test_positions_that_differ_need_keys_of_their_own(attention: str, tmp_path: Path) -> None:
    case = POSITIONS["dynamic, more positions"]
    models = case.save(tmp_path)
    with pytest.raises(BranchMixError, match=r'"max_position_embeddings": 60.*the seed.s are.*": 32'):
        branchmix.upcycle(recipe(models, attention=attention), tmp_path / "mixture")


def test_another_rotated_part_is_refused(tmp_path: Path) -> None:
    models = {
        name: BY_NAME["phi3"].save(tmp_path / name, 5, partial_rotary_factor=part)
        for name, part in (("seed", 1.0), ("expert", 0.5))
    }
    with pytest.raises(BranchMixError, match=r"'expert': partial_rotary_factor is 0\.5, but the seed's is 1\.0"):
        branchmix.upcycle(recipe(models), tmp_path / "mixture")
    branchmix.upcycle(recipe({"seed": models["seed"], "twin": models["seed"]}), tmp_path / "mixture")
    with pytest.raises(BranchMixError, match=r"'expert': partial_rotary_factor is 0\.5, but the seed's is 1\.0"):
        branchmix.add_expert(tmp_path / "mixture", "expert", models["expert"], tmp_path / "more")


def test_an_expert_that_joins_later_keeps_its_positions(tmp_path: Path) -> None:
    case = POSITIONS["dynamic, more positions"]
    models = case.save(tmp_path)
    branchmix.upcycle(recipe({"seed": models["seed"], "twin": models["seed"]}), tmp_path / "mixture")
    branchmix.add_expert(tmp_path / "mixture", "long", models["expert"], tmp_path / "more")
    mixture, dense = load(tmp_path / "more"), load(models["expert"])
    with torch.no_grad(), one_hot_gates(mixture, 2):
        close(mixture(tokens(length=61)).logits, dense(tokens(length=61)).logits)


def test_positions_that_a_config_leaves_out_are_those_of_the_familys_class() -> None:
    positions = {name: family.defaults.get("max_position_embeddings") for name, family in families().items()}
    assert len([number for number in positions.values() if number]) > 20
    for model_type, number in positions.items():
        assert number in (None, CONFIG_MAPPING[model_type]().max_position_embeddings), model_type


def test_su_is_longrope(tmp_path: Path) -> None:
    """As Phi-3 was first published; transformers 5 calls the type longrope and cannot load the older name."""
    case = POSITIONS["longrope without factor"]
    models = replace(case, seed=case.expert).save(tmp_path)
    models["older"] = Path(shutil.copytree(models["seed"], tmp_path / "older"))
    older = {"type": "su", **{key: value for key, value in LONG.items() if key != "rope_type"}}
    edit_config(models["older"], remove="rope_parameters", rope_scaling=older)
    new_beside_old = recipe({"seed": models["seed"], "older": models["older"]})
    assert branchmix.upcycle(new_beside_old, tmp_path / "a").plan.config["expert_rope_parameters"] is None
    branchmix.upcycle(recipe({"seed": models["older"], "older": models["older"]}), tmp_path / "b", verify=True)
    dense = load(models["expert"])
    for length in (12, 40):
        with torch.no_grad():
            mixture = load(tmp_path / "b")
            with one_hot_gates(mixture, 0):
                close(mixture(tokens(length=length)).logits, dense(tokens(length=length)).logits)


@pytest.fixture
def models(request: pytest.FixtureRequest, siblings: Callable[..., dict[str, Path]], tmp_path: Path) -> dict[str, Path]:
    """Siblings of a family, of which the last has another rotary base."""
    name = request.param
    partial = {"partial_rotary_factor": 0.5} if name == "gpt-neox" else {}
    folder = BY_NAME[name].save(tmp_path / "long", 5, rope_parameters={**CHANGED, **partial})
    return {**siblings(name), "long": folder}


@pytest.mark.parametrize("models", FAMILIES, indirect=True)
def test_each_expert_rotates_by_its_own_base(models: dict[str, Path], tmp_path: Path) -> None:
    report = branchmix.upcycle(recipe(models), tmp_path / "mixture", verify=True)
    assert report.verification is not None and len(report.verification.experts) == 4
    for check in report.verification.experts:
        assert check.skipped is None and check.max_difference <= 1e-5 * max(1.0, check.max_logit), check.name
    mixture = load(tmp_path / "mixture")
    bases = [parameters["rope_theta"] for parameters in mixture.config.expert_rope_parameters]
    assert bases[:3] == [10000.0] * 3 and bases[3] == 500000.0


@pytest.mark.parametrize("models", FAMILIES, indirect=True)
def test_cached_equals_uncached(models: dict[str, Path], tmp_path: Path) -> None:
    branchmix.upcycle(recipe(models), tmp_path / "mixture")
    mixture = load(tmp_path / "mixture")
    ids = tokens(length=12)
    with torch.no_grad():
        full = mixture(ids, use_cache=False).logits
        out = mixture(ids[:, :5], use_cache=True)
        steps = [out.logits]
        for position in range(5, 12):
            out = mixture(ids[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
    close(torch.cat(steps, dim=1), full)


@pytest.mark.parametrize("models", FAMILIES, indirect=True)
def test_saved_and_reloaded_is_the_same(models: dict[str, Path], tmp_path: Path) -> None:
    branchmix.upcycle(recipe(models), tmp_path / "mixture")
    first = load(tmp_path / "mixture")
    first.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again")(tokens()).logits, first(tokens()).logits)


@pytest.mark.parametrize("models", ["llama"], indirect=True)
def test_one_base_for_all_is_another_function(models: dict[str, Path], tmp_path: Path) -> None:
    """The oracle above would notice: the same weights under the seed's base give other logits."""
    branchmix.upcycle(recipe(models), tmp_path / "mixture")
    mixture = load(tmp_path / "mixture")
    ids = tokens(length=24)
    with torch.no_grad():
        logits = mixture(ids).logits
        rotary = mixture.model.model.rotary_emb
        mixture.model.model.rotary_emb = rotary[0]
        assert (mixture(ids).logits - logits).abs().max() > 1e-3


@pytest.mark.parametrize("models", ["llama"], indirect=True)
def test_shared_keys_cannot_rotate_two_ways(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BranchMixError, match="rope"):
        branchmix.upcycle(recipe(models, attention="kv_sharing"), tmp_path / "mixture")

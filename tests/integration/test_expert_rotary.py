"""Experts with rotary parameters of their own, as long-context fine-tunes have them (Expert KV only)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import branchmix
from branchmix.errors import BranchMixError
from families import BY_NAME
from mixtures import close, load, recipe, tokens

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gpt-neox")
CHANGED = {"rope_type": "default", "rope_theta": 500000.0}


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
        assert check.skipped is None and check.difference <= 1e-5 * max(1.0, check.greatest_logit), check.name
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

"""Biases of routers in what other commands make of a mixture: fewer or more experts, exports, counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import branchmix
from branchmix.errors import CheckpointError, CompatibilityError
from branchmix.models.routing_branchmix import BranchMixRouter
from checkpoints import weights
from mixtures import close, load, recipe, tokens

Siblings = Callable[..., dict[str, Path]]
HARD = {"routing": {"ffn": {"top_k": 1}, "attention": {"top_k": 2}}}


def biased(models: dict[str, Path], folder: Path, name: str = "biased", **options: Any) -> Path:
    """A mixture of seed, code and math, with random biases."""
    branchmix.upcycle(recipe(models, **{**HARD, **options}), folder / f"{name}-plain")
    model, generator = load(folder / f"{name}-plain"), torch.Generator().manual_seed(0)
    model.config.expert_bias = True
    for module in model.modules():
        if isinstance(module, BranchMixRouter):
            module.add_bias()
            module.expert_bias.copy_(torch.randn(3, generator=generator) * 0.3)
    model.save_pretrained(folder / name)
    return folder / name


def biases(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights(folder).items() if name.endswith("expert_bias")}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_experts_that_leave_take_their_biases_along(name: str, siblings: Siblings, tmp_path: Path) -> None:
    """In memory and on disk alike. A router that is left with as many experts as it chooses has no bias."""
    mixture, ids = biased(siblings(name), tmp_path), tokens()
    branchmix.remove_expert(mixture, "code", tmp_path / "two")
    before, after = biases(mixture), biases(tmp_path / "two")
    assert len(before) == 4 and len(after) == 2, "attention chooses both"
    for key, bias in after.items():
        assert torch.equal(bias, before[key][[0, 2]])
    model = load(mixture)
    ours = load(tmp_path / "two")(ids).logits
    close(model.keep_experts(["seed", "math"])(ids).logits, ours)
    alone = model.keep_experts(["math"])
    assert alone(ids).logits.isfinite().all()
    plain = load(tmp_path / "biased-plain").keep_experts(["seed", "math"])(ids).logits
    assert not torch.allclose(plain, ours, atol=1e-4)


def test_experts_that_join_start_at_the_mean(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("llama")
    mixture = biased(models, tmp_path)
    branchmix.remove_expert(mixture, "code", tmp_path / "two")
    branchmix.add_expert(tmp_path / "two", "code", models["code"], tmp_path / "three")
    two, three = biases(tmp_path / "two"), biases(tmp_path / "three")
    assert len(three) == 4
    for key, bias in three.items():
        expected = torch.cat((two[key], two[key].mean()[None])) if key in two else torch.zeros(3)
        close(bias, expected, 1e-6)
    assert load(tmp_path / "three")(tokens()).logits.isfinite().all()


def test_what_cannot_keep_them_refuses(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("llama")
    mixture = biased(models, tmp_path, attention="average", routing={"ffn": {"top_k": 2, "normalize": True}})
    assert branchmix.inspect(mixture).total == branchmix.inspect(tmp_path / "biased-plain").total
    branchmix.export_model(tmp_path / "biased-plain", tmp_path / "native", to="mixtral")
    with pytest.raises(CompatibilityError, match="its routers choose experts by a bias, and those of mixtral by their"):
        branchmix.export_model(mixture, tmp_path / "biased-native", to="mixtral")


def test_lost_biases_are_noticed(siblings: Siblings, tmp_path: Path) -> None:
    mixture = biased(siblings("llama"), tmp_path)
    kept = {name: tensor for name, tensor in load_file(mixture / "model.safetensors").items() if "bias" not in name}
    save_file(kept, mixture / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the weights lack .*expert_bias"):
        branchmix.remove_expert(mixture, "code", tmp_path / "two")

"""The shared expert: the seed's FFN for every token, beside the routed experts, against the seed's own class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import branchmix
from branchmix.accounting import inspect
from branchmix.errors import CompatibilityError, RecipeError
from branchmix.models.experts_branchmix import BranchMixSparseMoeBlock
from branchmix.models.routers import one_hot_gates
from branchmix.train.trained_parts import freeze
from families import NAMES
from mixtures import BOTH, close, load, random_mixture, recipe, tokens

Siblings = Callable[..., dict[str, Path]]
SHARED: dict[str, Any] = {"shared_expert": "auto", "start": "even", "include_seed": False}


def ffns(model: Any) -> list[BranchMixSparseMoeBlock]:
    return [module for module in model.modules() if isinstance(module, BranchMixSparseMoeBlock)]


@pytest.mark.of_every_family
@pytest.mark.parametrize("name", NAMES)
def test_copies_of_the_seed_are_the_seed(name: str, siblings: Siblings, tmp_path: Path) -> None:
    seed = siblings(name)["seed"]
    report = branchmix.upcycle(recipe({"seed": seed}, seed_copies=2, **SHARED), tmp_path / "mixture")
    model, ids = load(tmp_path / "mixture"), tokens()
    assert model.config.shared_expert_weight == pytest.approx(1 / 3) and report.plan.lossless is False
    assert model.config.num_experts == 2 and all(ffn.shared_expert is not None for ffn in ffns(model))
    close(model(ids).logits, load(seed)(ids).logits)


@pytest.mark.of_every_family
@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_seeds_ffn_and_the_rest_is_routed(name: str, siblings: Siblings, tmp_path: Path) -> None:
    """``w S(x) + (1 - w) sum_i g_i E_i(x)``; and each expert alone is proved by ``--verify``."""
    models = siblings(name)
    report = branchmix.upcycle(recipe(models, **SHARED | {"shared_expert": 0.25}), tmp_path / "mixture", verify=True)
    assert report.verification is not None and len(report.verification.experts) == 2
    model, seed, ids = load(tmp_path / "mixture"), load(models["seed"]), tokens()
    layout = model.config.layout
    hidden, found, alone = [], [], []
    for ffn in ffns(model):
        ffn.register_forward_hook(lambda module, args, out: hidden.append(args[0]))
        ffn.register_forward_hook(lambda module, args, out: found.append(out.clone()))  # Falcon adds to it in place
    with torch.no_grad():
        model(ids)
    activation = layout["activation"]
    for number, (ffn, x, out) in enumerate(zip(ffns(model), hidden, found, strict=True)):
        block = seed.get_submodule(layout["layers"])[number]
        if any(True for _ in block.get_submodule(activation).parameters()):  # Apertus: one, averaged, for all experts
            learned = model.model.get_submodule(layout["layers"])[number].get_submodule(activation).state_dict()
            block.get_submodule(activation).load_state_dict(learned)
        if layout["up"] == layout["ffn"]:  # OPT has no module of the whole FFN
            dense = block.fc2(block.activation_fn(block.fc1(x)))
        else:
            dense = block.get_submodule(layout["ffn"]).eval()(x)
            dense = dense[0] if isinstance(dense, tuple) else dense
        ffn._forward_hooks.clear()
        ffn.shared_weight = 0.0
        with torch.no_grad():
            alone.append(ffn(x))
        close(out, 0.25 * dense + 0.75 * alone[-1])
        assert not torch.allclose(out, alone[-1], atol=1e-4)


def test_forced_gates_silence_it_and_give_it_back() -> None:
    model, ids = random_mixture("llama", shared_expert_weight=0.5), tokens()
    before = model(ids).logits
    with one_hot_gates(model, 1):
        forced = model(ids).logits
    plain = random_mixture("llama")
    plain.load_state_dict(model.state_dict(), strict=False)
    with one_hot_gates(plain, 1):
        close(forced, plain(ids).logits)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fewer_and_more_experts_leave_it_alone(name: str, attention: str, siblings: Siblings, tmp_path: Path) -> None:
    models = siblings(name)
    options = {**SHARED, "include_seed": True, "attention": attention}
    branchmix.upcycle(recipe(models, **options), tmp_path / "three")
    branchmix.remove_expert(tmp_path / "three", "code", tmp_path / "two")
    branchmix.add_expert(tmp_path / "two", "code", models["code"], tmp_path / "again")
    stored = [load_file(tmp_path / folder / "model.safetensors") for folder in ("three", "two", "again")]
    shared = [{key: tensor for key, tensor in tensors.items() if ".shared_expert." in key} for tensors in stored]
    assert shared[0] and all(one.keys() == shared[0].keys() for one in shared)
    assert all(torch.equal(one[key], tensor) for one in shared for key, tensor in shared[0].items())
    ids, whole = tokens(), load(tmp_path / "three")
    close(whole.keep_experts(["seed", "math"])(ids).logits, load(tmp_path / "two")(ids).logits)
    one, ffn = whole.keep_experts(["math"]), ffns(whole)[0]
    x = torch.randn(2, 3, whole.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with one_hot_gates(whole, 2), torch.no_grad():
        of_math = ffn(x)
    w = whole.config.shared_expert_weight
    close(ffns(one)[0](x), w * ffn.shared_expert(x) + (1 - w) * of_math)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_flops_count_it(name: str, siblings: Siblings, tmp_path: Path) -> None:
    models = siblings(name)
    branchmix.upcycle(recipe(models, **SHARED), tmp_path / "shared")
    branchmix.upcycle(recipe(models, **{**SHARED, "shared_expert": None}), tmp_path / "plain")
    model, (ours, plain) = load(tmp_path / "shared"), (inspect(tmp_path / name) for name in ("shared", "plain"))
    extra = sum(p.numel() for ffn in ffns(model) for p in ffn.shared_expert.parameters())
    assert ours.total.total == sum(p.numel() for p in model.parameters()) == plain.total.total + extra
    assert ours.active.total == plain.active.total + extra
    assert ours.flops is not None and plain.flops is not None
    assert ours.flops.layer.ffn * 2 == plain.flops.layer.ffn * 3, "top-2 and one more"


def test_it_is_trained_frozen_and_saved(tmp_path: Path) -> None:
    model, ids = random_mixture("cohere", shared_expert_weight=0.4).train(), tokens()
    model(ids, labels=ids).loss.backward()
    for ffn in ffns(model):
        assert all(parameter.grad.abs().max() > 0 for parameter in ffn.shared_expert.parameters())
    model.eval().save_pretrained(tmp_path)
    close(load(tmp_path)(ids).logits, model(ids).logits, 1e-6)
    freeze(model, ["experts"])
    assert not any(parameter.requires_grad for ffn in ffns(model) for parameter in ffn.shared_expert.parameters())


def test_what_has_no_such_form_is_refused(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("llama")
    with pytest.raises(RecipeError, match="shared_expert: needs FFN experts beside it"):
        branchmix.upcycle(recipe(models, ffn="average", shared_expert=0.5), tmp_path / "none")
    report = branchmix.upcycle(recipe(models, attention="average", **SHARED), tmp_path / "shared")
    assert not any("the seed is the shared expert" in note for note in report.plan.notes)
    for target in ("mixtral", "qwen2_moe"):
        with pytest.raises(CompatibilityError, match=f"its shared expert has a fixed weight, which {target} does not"):
            branchmix.export_model(tmp_path / "shared", tmp_path / "native", to=target)
    branchmix.export_model(tmp_path / "shared", tmp_path / "dense", to="dense", expert="code")
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "the seed's FFN as a shared expert" in card and "the shared expert adds the seed's FFN" in card

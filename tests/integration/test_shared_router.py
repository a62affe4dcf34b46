"""One router a block for attention and FFN experts: the mixture of two routers that hold the same weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import branchmix
from branchmix.accounting import inspect
from branchmix.checkpoint.index import CheckpointIndex
from branchmix.models.modeling_branchmix import BranchMixForCausalLM
from checkpoints import weights
from families import NAMES
from mixtures import BOTH, close, load, offloaded, random_mixture, recipe, tokens

Siblings = Callable[..., dict[str, Path]]
SHARED = {"shared": True, "ffn": {"top_k": 2}}


def two_routers(shared: BranchMixForCausalLM) -> BranchMixForCausalLM:
    """The same mixture with two routers a block, equal ones."""
    config = copy.deepcopy(shared.config)
    config.shared_router = False
    model = BranchMixForCausalLM(config).eval()
    state, layout = shared.state_dict(), config.layout
    for name in list(state):
        if name.endswith(f".{layout['ffn']}.gate.weight"):
            block = name.removesuffix(f"{layout['ffn']}.gate.weight")
            state[f"{block}{layout['attention']}.expert_gate.weight"] = state[name].clone()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", NAMES)
def test_is_two_equal_routers(name: str, attention: str) -> None:
    """Logits, loss and gradients; the router's own is the sum of both."""
    shared = random_mixture(name, attention, shared_router=True)
    both = two_routers(shared)
    ids = tokens()
    ours, theirs = (model(ids, labels=ids, use_cache=False, output_router_logits=True) for model in (shared, both))
    close(ours.logits, theirs.logits)
    close(ours.loss, theirs.loss)
    assert len(ours.attention_router_logits) == len(ours.router_logits) == shared.config.num_hidden_layers
    ours.loss.backward()
    theirs.loss.backward()
    layout = shared.config.layout
    blocks, references = (model.model.get_submodule(layout["layers"]) for model in (shared, both))
    for block, reference in zip(blocks, references, strict=True):
        second = getattr(reference, layout["attention"]).expert_gate.weight.grad
        assert second.abs().max() > 0
        close(
            getattr(block, layout["ffn"]).gate.weight.grad, getattr(reference, layout["ffn"]).gate.weight.grad + second
        )
    close(shared.get_input_embeddings().weight.grad, both.get_input_embeddings().weight.grad)


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", ["llama", "cohere", "gpt2", "falcon-new", "opt"])
def test_upcycled_saved_counted_grown_and_shrunk(name: str, attention: str, siblings: Siblings, tmp_path: Path) -> None:
    models = siblings(name)
    options: dict[str, Any] = {"attention": attention, "routing": SHARED}
    report = branchmix.upcycle(recipe(models, **options), tmp_path / "mixture", verify=True)
    assert report.verification is not None and all(not check.skipped for check in report.verification.experts)
    stored = CheckpointIndex.open(tmp_path / "mixture").tensors
    assert not any("expert_gate" in tensor for tensor in stored)
    model = load(tmp_path / "mixture")
    counted = inspect(tmp_path / "mixture")
    assert counted.total.total == counted.stored == sum(parameter.numel() for parameter in model.parameters())
    rows = [math.prod(ref.shape) for tensor, ref in stored.items() if tensor.endswith(".gate.weight")]
    assert counted.total.routers == sum(rows) > 0
    ids = tokens()
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.config.shared_router and torch.equal(again(ids).logits, model(ids).logits)

    two = {key: path for key, path in models.items() if key != "math"}
    branchmix.upcycle(recipe(two, **options), tmp_path / "two")
    branchmix.add_expert(tmp_path / "two", "math", models["math"], tmp_path / "grown")
    assert set(weights(tmp_path / "grown")) == set(weights(tmp_path / "mixture"))
    branchmix.remove_expert(tmp_path / "mixture", "math", tmp_path / "shrunk")
    assert set(weights(tmp_path / "shrunk")) == set(weights(tmp_path / "two"))
    load(tmp_path / "shrunk")(ids)


def test_copied_and_cast_keep_one_router() -> None:
    """A copy's attention routes by the copy's router, not by the original's."""
    model = random_mixture("llama", shared_router=True)
    ids = tokens()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        before = model(ids).logits
        close(copied(ids).logits, before)
        for parameter in model.parameters():
            parameter.zero_()
        close(copied(ids).logits, before)
        assert copied.to(torch.bfloat16)(ids).logits.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("attention", BOTH)
def test_compiled_in_one_graph_is_the_same(attention: str) -> None:
    model = random_mixture("cohere", attention, shared_router=True)
    ids = tokens()
    with torch.no_grad():
        eager = model(ids, use_cache=False).logits
        torch._dynamo.reset()
        close(torch.compile(model, fullgraph=True)(ids, use_cache=False).logits, eager)


@pytest.mark.parametrize("kinds", [{"attention": "average"}, {"ffn": "average"}])
def test_needs_both_kinds_of_experts(kinds: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="shared_router needs attention experts and FFN experts"):
        random_mixture("llama", **{"attention": "kv_experts", "shared_router": True, **kinds})


def test_a_router_of_another_module_cannot_be_offloaded(tmp_path: Path) -> None:
    loaded = offloaded(random_mixture("cohere", shared_router=True), tmp_path)
    with pytest.raises(ValueError, match="shared_router cannot be offloaded"):
        loaded(tokens())

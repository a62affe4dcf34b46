"""Packed documents don't see each other, in any family, dense or mixture; models that cannot do it are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from branchmix.data.sequences import Packing, isolates_documents, packed_inputs, packing_method
from branchmix.errors import CompatibilityError
from families import BY_NAME, NAMES
from mixtures import BOTH, random_mixture, tokens

BY_MASK = {"opt", "falcon", "falcon-multi-head", "falcon-new", "granite-hybrid", "biogpt", "xglm"}
"""Their code makes the causal mask without looking at position ids."""
NO_SDPA = {"gemma2", "gptj", "codegen", "xglm"}
LENGTHS = (5, 9, 6)


def models(name: str, kind: str) -> Iterator[Any]:
    """With each attention implementation that the family has."""
    for implementation in ("eager", "sdpa"):
        if implementation == "sdpa" and name in NO_SDPA:
            continue
        if kind == "dense":
            yield BY_NAME[name].model(0, attn_implementation=implementation)
        else:
            yield random_mixture(name, kind, attn_implementation=implementation)


def packed(*documents: torch.Tensor) -> dict[str, torch.Tensor]:
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])
    return {"input_ids": torch.cat(documents, dim=1), "position_ids": positions[None]}


def losses(model: Any, inputs: dict[str, Any], start: int, length: int) -> torch.Tensor:
    """Of the document that begins at ``start``, token by token."""
    logits = model(**inputs).logits[0, start : start + length - 1]
    return F.cross_entropy(logits, inputs["input_ids"][0, start + 1 : start + length], reduction="none")


@pytest.mark.parametrize("kind", ["dense", *BOTH])
@pytest.mark.parametrize("name", NAMES)
def test_losses_do_not_depend_on_neighbours(name: str, kind: str) -> None:
    for model in models(name, kind):
        how = packing_method(model)
        assert how == ("mask" if name in BY_MASK else "position_ids")
        own = tokens(1, LENGTHS[1], seed=7)
        found = []
        for seed in (1, 2):  # different neighbours of different lengths, so at another place too
            before, after = tokens(1, LENGTHS[0] + seed, seed), tokens(1, LENGTHS[2], 10 + seed)
            with torch.no_grad():
                found.append(losses(model, packed_inputs(packed(before, own, after), how), LENGTHS[0] + seed, 9))
        with torch.no_grad():
            alone = losses(model, {"input_ids": own, "use_cache": False}, 0, 9)
        for among in found:
            torch.testing.assert_close(among, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["cohere", "opt"])
def test_gradients_do_not_depend_on_neighbours(name: str) -> None:
    """Those of a document's loss; in training mode, where masks are made in the same way."""
    model = random_mixture(name, router_aux_loss_coef=0.0).train()
    how = packing_method(model)
    own = tokens(1, 9, seed=7)
    gradients = []
    for batch, start in ((packed(own), 0), (packed(tokens(1, 5, 1), own, tokens(1, 6, 2)), 5)):
        model.zero_grad()
        losses(model, packed_inputs(batch, how), start, 9).mean().backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    for key, alone in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], alone, rtol=0, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


def test_what_keeps_documents_apart_is_needed() -> None:
    """A cache or a mask of ones makes transformers take positions for something else: the probe sees that."""
    model = BY_NAME["llama"].model(0)
    own = tokens(1, 9, seed=7)
    leaky = []
    for seed in (1, 2):
        inputs = packed_inputs(packed(tokens(1, 5, seed), own), "position_ids")
        for change in ({"use_cache": True}, {"attention_mask": torch.ones(1, 14)}):
            with torch.no_grad():
                leaky.append(losses(model, {**inputs, **change}, 5, 9))
    assert (leaky[0] - leaky[2]).abs().max() > 1e-3 and (leaky[1] - leaky[3]).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["position_ids", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_sees_models_that_ignore_it(how: Packing, dtype: torch.dtype) -> None:
    model = BY_NAME["llama"].model(0).to(dtype)
    assert isolates_documents(model, how)
    real = model.forward

    def deaf(**inputs: Any) -> Any:
        return real(input_ids=inputs["input_ids"], use_cache=False)

    def unmasked(**inputs: Any) -> Any:  # right places, open doors
        inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
        return real(**inputs)

    def displaced(**inputs: Any) -> Any:  # isolated, but at places further on
        return real(**{**inputs, "position_ids": inputs["position_ids"] * 2} if "position_ids" in inputs else inputs)

    for wrong in (deaf, unmasked, displaced):
        model.forward = wrong
        assert not isolates_documents(model, how), wrong.__name__


def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = BY_NAME["llama"].model(0, attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert isolates_documents(model), "dropout is off while it is tried"
    assert torch.equal(torch.get_rng_state(), state) and modes == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_mask_is_not_used_where_it_would_open_windows() -> None:
    """One 4-D mask stands for all layers, so a layer with a window would see everything."""
    for name in ("mistral", "gemma3", "cohere2"):
        model = BY_NAME[name].model(0, sliding_window=32)  # longer than the probe's documents
        assert isolates_documents(model) and not isolates_documents(model, "mask")


SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
CANNOT: dict[str, dict[str, Any]] = {
    "mamba": SMALL,
    "mamba2": {**SMALL, "num_heads": 8, "head_dim": 8},
    "rwkv": SMALL,
    "recurrent_gemma": {**SMALL, "num_hidden_layers": 3, "num_attention_heads": 4, "lru_width": 32},
    "bloom": {**SMALL, "n_layer": 2, "n_head": 4},
    "falcon": {**SMALL, "num_attention_heads": 4, "alibi": True},
}


@pytest.mark.parametrize("model_type", CANNOT)
def test_models_that_cannot_are_refused(model_type: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **CANNOT[model_type])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    message = f"^{model_type}: packed documents would see each other .*: train a family that has softmax attention"
    with pytest.raises(CompatibilityError, match=message) as error:
        packing_method(model)
    assert "\n" not in str(error.value)

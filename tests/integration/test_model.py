"""The model in use: generation with every cache, attention implementations, compilation, checkpointing, routing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import branchmix
from branchmix.models.attention_branchmix import BranchMixAttention
from branchmix.models.routing_branchmix import BranchMixAttentionRouter, BranchMixRouter
from families import BY_NAME
from mixtures import BOTH, close, load, random_mixture, tokens

Siblings = Callable[..., dict[str, Path]]
FAMILIES = ("llama", "cohere", "gemma3", "gpt-neox", "gpt2", "opt", "olmo2", "phi3")


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
    return model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", FAMILIES)
def test_static_cache_generates_what_the_dynamic_does(name: str, attention: str) -> None:
    model = random_mixture(name, attention)
    dynamic = generate(model, tokens())
    assert torch.equal(generate(model, tokens(), cache_implementation="static"), dynamic)
    assert torch.equal(generate(model, tokens(), use_cache=False), dynamic)


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", FAMILIES)
def test_left_padding_changes_no_continuation(name: str, attention: str) -> None:
    model = random_mixture(name, attention)
    prompts = [tokens(1, 9, seed=1), tokens(1, 5, seed=2)]
    alone = torch.cat([generate(model, prompt) for prompt in prompts])
    pad = torch.zeros(1, 4, dtype=torch.long)
    batch = torch.cat([prompts[0], torch.cat([pad, prompts[1]], dim=1)])
    assert torch.equal(generate(model, batch, (batch != 0).long()), alone)


@pytest.mark.parametrize("name", FAMILIES)
def test_cache_of_shared_kv_is_the_dense_one_and_of_expert_kv_n_times(name: str) -> None:
    dense = BY_NAME[name].model(0)
    with torch.no_grad():
        caches = {attention: random_mixture(name, attention)(tokens()).past_key_values for attention in BOTH}
        layers = dense(tokens()).past_key_values.layers
    for number, layer in enumerate(layers):
        batch, heads, length, width = layer.keys.shape
        for kind in ("keys", "values"):
            assert getattr(caches["kv_sharing"].layers[number], kind).shape == getattr(layer, kind).shape
            assert getattr(caches["kv_experts"].layers[number], kind).shape == (batch, 3 * heads, length, width)
    assert len(caches["kv_sharing"].layers) == len(layers)


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", FAMILIES)
def test_beam_search_of_identical_experts_is_the_seeds(
    name: str, attention: str, siblings: Siblings, tmp_path: Path
) -> None:
    seed = siblings(name)["seed"]
    options = {"attention": attention, "routing": {"ffn": {"soft": True}}, "router_init": {"std": 0.5}}
    branchmix.upcycle({"seed": str(seed), "seed_copies": 2, **options}, tmp_path / "mixture")
    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(generate(load(tmp_path / "mixture"), tokens(), **beams), generate(load(seed), tokens(), **beams))


def logits_of(model: Any, implementation: str) -> torch.Tensor:
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits[mask.bool()]


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", FAMILIES)
def test_eager_and_sdpa_attention_agree(name: str, attention: str) -> None:
    model = random_mixture(name, attention)
    close(logits_of(model, "sdpa"), logits_of(model, "eager"))


@pytest.mark.slow  # compiles its kernel
@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", FAMILIES)
def test_eager_and_flex_attention_agree(name: str, attention: str) -> None:
    model = random_mixture(name, attention)
    if name == "gpt2":  # its dense class refuses flex attention too
        with pytest.raises(ValueError, match="does not support"):
            model.set_attn_implementation("flex_attention")
    else:
        close(logits_of(model, "flex_attention"), logits_of(model, "eager"))


def test_unknown_implementations_are_refused(tmp_path: Path) -> None:
    random_mixture("llama").save_pretrained(tmp_path)
    with pytest.raises((ValueError, ImportError), match="attn_implementation"):
        load(tmp_path, attn_implementation="fastest")
    with pytest.raises(ValueError, match="experts_implementation"):
        load(tmp_path, experts_implementation="fastest")


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(name: str, attention: str) -> None:
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    results = []
    for checkpointing in (False, True):
        model = random_mixture(name, attention, attention_num_experts_per_tok=2).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        out = model(ids, attention_mask=mask, labels=labels, use_cache=False)
        assert out.aux_loss > 0 and out.z_loss > 0
        calls: list[Any] = []
        for module in model.modules():
            if isinstance(module, BranchMixRouter):
                module.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        out.loss.backward()
        assert len(calls) == (4 if checkpointing else 0)  # two routers in each of two layers, computed again
        results.append((out, {n: p.grad for n, p in model.named_parameters()}))
    (plain, grads), (checkpointed, checkpointed_grads) = results
    for value in ("loss", "aux_loss", "z_loss"):
        close(getattr(checkpointed, value), getattr(plain, value), 1e-6)
    for parameter, grad in grads.items():
        assert grad is not None, parameter
        close(checkpointed_grads[parameter], grad, 1e-6)


def test_reentrant_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match="reentrant"):
        random_mixture("llama", "kv_sharing").gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("name", FAMILIES)
def test_router_logits_come_for_each_layer_and_only_on_request(name: str) -> None:
    model = random_mixture(name)
    ids = tokens(2, 7)
    with torch.no_grad():
        out = model(ids, output_router_logits=True)
        assert model(ids).router_logits is None and model(ids).attention_router_logits is None
        inner = model(ids, output_hidden_states=True, output_router_logits=True).router_logits
    for logits in (out.router_logits, out.attention_router_logits, inner):
        assert [tuple(layer.shape) for layer in logits] == [(14, 3), (14, 3)]
        assert all(layer.dtype == torch.float32 for layer in logits)
    assert out.aux_loss is not None and out.loss is None


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_router_logits_while_generating(cache: str) -> None:
    """Static caches come with 4-D masks, for families with windows in a dictionary."""
    model = random_mixture("gemma3", output_router_logits=True)
    implementation = {} if cache == "dynamic" else {"cache_implementation": cache}
    plain = generate(random_mixture("gemma3"), tokens())
    assert torch.equal(generate(model, tokens(), **implementation), plain)


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", FAMILIES)
def test_top_k_attention_is_soft_attention_with_the_other_gates_masked(name: str, attention: str) -> None:
    ids = tokens()
    soft = random_mixture(name, attention)

    def mask_gates(module: Any, args: Any, output: Any) -> Any:
        kept = output[1].topk(1, dim=-1).indices
        return output[0], output[1] * torch.zeros_like(output[1]).scatter(-1, kept, 1.0)

    with torch.no_grad():
        close(random_mixture(name, attention, attention_num_experts_per_tok=3)(ids).logits, soft(ids).logits, 1e-6)
        top_1 = random_mixture(name, attention, attention_num_experts_per_tok=1)(ids).logits
        assert not torch.allclose(top_1, soft(ids).logits, atol=1e-3)
        for module in soft.modules():
            if isinstance(module, BranchMixAttentionRouter):
                module.register_forward_hook(mask_gates)
        close(top_1, soft(ids).logits, 1e-6)


def test_normalised_top_1_attention_gates_are_one() -> None:
    options = {"attention_num_experts_per_tok": 1, "attention_norm_topk_prob": True}
    model = random_mixture("llama", **options)
    gate = next(module for module in model.modules() if isinstance(module, BranchMixAttentionRouter))
    _, gates_BTE = gate(torch.randn(2, 5, 32))
    assert torch.equal(gates_BTE.sort(-1).values, torch.tensor([0.0, 0.0, 1.0]).expand(2, 5, 3))


def test_heads_of_another_width_are_refused() -> None:
    """What tensor parallelism by someone else's plan would hand back."""
    model = random_mixture("llama")
    attention = next(module for module in model.modules() if isinstance(module, BranchMixAttention))
    attention.heads.register_forward_hook(lambda module, args, output: (output[0][..., :48], output[1]))
    with pytest.raises(RuntimeError, match="48 values a token where the experts' heads have 96"):
        model(tokens())


@pytest.mark.slow
@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_in_one_graph_is_the_same(name: str, attention: str) -> None:
    model = random_mixture(name, attention)
    ids = tokens()
    with torch.no_grad():
        eager = model(ids, use_cache=False).logits
        torch._dynamo.reset()
        close(torch.compile(model, fullgraph=True)(ids, use_cache=False).logits, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", BOTH)
def test_wide_attention_on_flash_attention(attention: str) -> None:
    """torch's own FlashAttention kernel, forced, against the mathematical one."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = random_mixture("llama", attention, attn_implementation="sdpa").cuda().half()
    with torch.no_grad():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            found = model(tokens().cuda(), use_cache=False).logits
        with sdpa_kernel(SDPBackend.MATH):
            expected = model(tokens().cuda(), use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)

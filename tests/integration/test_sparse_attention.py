"""Top-k attention that computes only the chosen experts' heads does what computing all of them does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from branchmix.accounting import flops_per_token
from branchmix.models import attention_branchmix
from branchmix.models.attention_branchmix import BranchMixAttention
from branchmix.models.chosen_branchmix import Chosen
from branchmix.models.chunked_branchmix import (
    AUTOMATIC,
    CHUNKED,
    automatic_attention_forward,
    chunked_attention_forward,
)
from families import NAMES
from mixtures import BOTH, close, gated, random_mixture, tokens

FEW = ("llama", "gemma3", "gpt-neox", "olmo2")


@pytest.fixture
def sparse(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool | None], Any]:
    """``with sparse(True) as layers:`` computes chosen experts only where it can, with False all of them; ``layers``
    counts the attention layers that did."""

    @contextmanager
    def switched(value: bool | None) -> Iterator[list[int]]:
        layers: list[int] = []

        def counted(*args: Any) -> Chosen:
            layers.append(1)
            return Chosen(*args)

        with monkeypatch.context() as patch:
            patch.setattr(BranchMixAttention, "sparse", value)
            patch.setattr(attention_branchmix, "Chosen", counted)
            yield layers

    return switched


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids, mask


def trained(model: Any, **inputs: Any) -> dict[str, torch.Tensor]:
    """Logits and gradients of a step."""
    model.zero_grad()
    out = model(**inputs, use_cache=False)
    noise = torch.randn(out.logits.shape, generator=torch.Generator().manual_seed(1))
    mask = inputs.get("attention_mask")
    (out.logits.float() * noise * (1.0 if mask is None else mask[..., None])).sum().backward()
    logits = out.logits.detach() if mask is None else out.logits.detach()[mask.bool()]
    return {"logits": logits} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Gradients of normalised queries amplify the rounding of both ways to compute them."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        close(ours[name], tensor, 1e-5 if name == "logits" else 3e-5)


@pytest.mark.of_every_family(top_k=2)
@pytest.mark.parametrize(("attention", "top_k"), [("kv_experts", 2), ("kv_sharing", 2), ("kv_sharing", 1)])
@pytest.mark.parametrize("name", NAMES)
def test_chosen_experts_alone_give_the_same_logits_and_gradients(
    name: str, attention: str, top_k: int, sparse: Any
) -> None:
    # Some families' default is eager, which computes all experts' heads.
    own = {"attn_implementation": AUTOMATIC} if attention == "kv_experts" else {}
    model = random_mixture(name, attention, attention_num_experts_per_tok=top_k, **own)
    ids, mask = padded()
    with sparse(False) as layers:
        expected = trained(model, input_ids=ids, attention_mask=mask)
        assert not layers
    with sparse(True) as layers:
        same(trained(model, input_ids=ids, attention_mask=mask), expected)
        assert len(layers) == model.config.num_hidden_layers


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", FEW)
def test_generation_through_caches_of_padded_prompts(name: str, attention: str, cache: str, sparse: Any) -> None:
    model = random_mixture(name, attention, attention_num_experts_per_tok=1)
    ids, mask = padded()
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True}
    settings |= {"return_dict_in_generate": True, **({"cache_implementation": cache} if cache == "static" else {})}
    found = {}
    for value in (False, True):
        with sparse(value) as layers:
            found[value] = model.generate(ids.masked_fill(mask == 0, 0), attention_mask=mask, **settings)
            assert len(layers) == (10 if value else 0)  # two layers, a prompt and four tokens
    assert torch.equal(found[True].sequences, found[False].sequences)
    close(torch.stack(found[True].logits), torch.stack(found[False].logits))


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_packed_documents_and_document_gates(name: str, attention: str, sparse: Any) -> None:
    model = gated(name, attention, attention_num_experts_per_tok=1)
    inputs = {"input_ids": tokens(), "position_ids": torch.tensor([[*range(4), *range(7)], [*range(8), *range(3)]])}
    with sparse(False):
        expected = trained(model, **inputs)
    with sparse(True) as layers:
        same(trained(model, **inputs), expected)
        assert len(layers) == 2


@pytest.mark.parametrize("attention", BOTH)
def test_gradient_checkpointing_and_kept_experts(attention: str, sparse: Any) -> None:
    ids, mask = padded()
    model = random_mixture("qwen3", attention, attention_num_experts_per_tok=1).train()
    with sparse(False):
        expected = trained(model, input_ids=ids, attention_mask=mask)
        kept = model.keep_experts([0, 2])(ids).logits
    with sparse(True) as layers:
        close(model.keep_experts([0, 2])(ids).logits, kept)
        assert len(layers) == 2
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        same(trained(model, input_ids=ids, attention_mask=mask), expected)
        assert len(layers) == 2 + 4


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", BOTH)
def test_bf16_by_autocast_or_in_the_weights(attention: str, weights: torch.dtype, sparse: Any) -> None:
    """The error against fp32 is at most twice that of computing all experts."""
    ids = tokens(1, 80)
    model = random_mixture(
        "llama-bias", attention, attention_num_experts_per_tok=1, seed_changes={"num_hidden_layers": 1}
    )
    results = {}
    with sparse(False):
        exact = trained(model, input_ids=ids)
    model = model.to(weights)
    for value in (False, True):
        with sparse(value), torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
            results[value] = trained(model, input_ids=ids)
    for name, tensor in exact.items():
        errors = {value: float((found[name].float() - tensor).norm()) for value, found in results.items()}
        assert errors[True] <= 2 * errors[False] + 1e-3 * float(tensor.norm()), name
        assert results[True][name].dtype == results[False][name].dtype


def test_experts_with_rotary_positions_of_their_own(sparse: Any) -> None:
    ropes = [{"rope_type": "default", "rope_theta": theta} for theta in (1e4, 1e2, 1e5)]
    model = random_mixture("qwen3", attention_num_experts_per_tok=2, expert_rope_parameters=ropes)
    ids, mask = padded()
    with sparse(False):
        expected = trained(model, input_ids=ids, attention_mask=mask)
    with sparse(True) as layers:
        same(trained(model, input_ids=ids, attention_mask=mask), expected)
        assert len(layers) == 2


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", ["llama-bias", "qwen3", "stablelm-parallel"])
def test_an_expert_that_no_token_chooses_has_gradients(name: str, attention: str, sparse: Any) -> None:
    """They are zero, as in the full computation, and not missing: FSDP waits for each parameter's gradient."""
    model = random_mixture(name, attention, attention_num_experts_per_tok=1, expert_bias=True)
    for module in model.modules():
        if isinstance(module, BranchMixAttention):
            module.expert_gate.expert_bias.copy_(torch.tensor([0.0, -9.0, 0.0]))
    ids, mask = padded()
    with sparse(False):
        expected = trained(model, input_ids=ids, attention_mask=mask)
    with sparse(True) as layers:
        found = trained(model, input_ids=ids, attention_mask=mask)
        assert len(layers) == 2
    same(found, expected)
    assert found.keys() == {"logits", *(parameter for parameter, _ in model.named_parameters())}


# ---- the keys of a token's own experts ----


@pytest.mark.parametrize("implementation", [AUTOMATIC, CHUNKED])
@pytest.mark.parametrize("mask", ["causal", "boolean", "added"])
@pytest.mark.parametrize(("batch", "top_k", "choice"), [(1, 1, "even"), (3, 2, "even"), (2, 1, "one"), (4, 1, "own")])
def test_attention_to_the_keys_of_the_chosen_experts(
    batch: int, top_k: int, choice: str, mask: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against attention of every token to every expert's keys, in groups of every kind: alone, alike, of no queries."""
    monkeypatch.setattr("branchmix.models.chunked_branchmix._ALONE", 40)
    experts, heads, kv_heads, length, width = 3, 4, 2, 70, 8
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, n, length, width, generator=generator, requires_grad=True)
        for n in (experts * heads, experts * kv_heads, experts * kv_heads)
    )
    scores = torch.rand(batch, length, experts, generator=generator)
    scores[..., 1] += {"even": 0, "one": 2, "own": 0}[choice]
    if choice == "own":  # a sequence an expert, nearly
        scores += 0.9 * F.one_hot(torch.arange(batch) % experts, experts)[:, None]
    index_BTk = scores.topk(top_k, -1).indices
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    if mask != "causal":
        allowed = (allowed & (torch.rand(batch, 1, length, length, generator=generator) > 0.2)) | torch.eye(
            length
        ).bool()
    given = None if mask == "causal" else allowed
    if mask == "added":
        given = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
    everything = F.scaled_dot_product_attention(q, k, v, allowed, enable_gqa=True).transpose(1, 2)
    by_expert = everything.unflatten(2, (experts, heads))
    expected = by_expert.take_along_dim(index_BTk[..., None, None], 2).flatten(2, 3)
    chosen_q = q.transpose(1, 2).unflatten(2, (experts, heads)).take_along_dim(index_BTk[..., None, None], 2)

    class Attention:
        chosen = Chosen(index_BTk, experts)
        training = False

    attend = automatic_attention_forward if implementation == AUTOMATIC else chunked_attention_forward
    found, _ = attend(Attention(), chosen_q.flatten(2, 3).transpose(1, 2), k, v, given)  # type: ignore[arg-type]
    close(found, expected)
    noise = torch.randn(expected.shape, generator=generator)
    for ours, theirs in zip(
        torch.autograd.grad(found, (q, k, v), noise), torch.autograd.grad(expected, (q, k, v), noise), strict=True
    ):
        close(ours, theirs)


# ---- when all are computed after all ----


def test_all_experts_are_computed_where_heads_must_be_all_or_chosen_ones_would_not_pay(sparse: Any) -> None:
    ids, _ = padded()
    small = random_mixture("llama", "kv_sharing", attention_num_experts_per_tok=1)
    with torch.no_grad(), sparse(None) as layers:
        small(ids)
        assert not layers
        sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
        large = random_mixture("llama", "kv_sharing", attention_num_experts_per_tok=1, seed_changes=sizes)
        large(ids)
        assert len(layers) == 2
    with torch.no_grad(), sparse(True) as layers:
        random_mixture("llama", "kv_sharing", attention_num_experts_per_tok=3)(ids)
        random_mixture("llama", "kv_sharing")(ids)
        small(ids, attention_mask=torch.ones(2, 12, 11, 11, dtype=torch.bool).tril())  # a mask for each head
        with sparse(False):
            expected = small(ids).logits
        torch._dynamo.reset()
        close(torch.compile(small, backend="eager")(ids).logits, expected)
        assert not layers
        small(ids)
        assert len(layers) == 2


def test_lora_on_an_experts_projections_computes_all(sparse: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = random_mixture("llama", "kv_sharing", attention_num_experts_per_tok=1)
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with torch.no_grad():
        with sparse(False):
            expected = lora(tokens()).logits
        with sparse(True) as layers:
            close(lora(tokens()).logits, expected)
            assert not layers


def test_a_failed_forward_pass_leaves_nothing_behind(sparse: Any) -> None:
    model = random_mixture("stablelm", "kv_sharing", attention_num_experts_per_tok=1)
    heads = next(module for module in model.modules() if isinstance(module, BranchMixAttention)).heads
    with torch.no_grad():
        expected = model(tokens()).logits
        hook = heads.v_proj.register_forward_hook(lambda *_: 1 / 0)
        with sparse(True), pytest.raises(ZeroDivisionError):
            model(tokens())
        hook.remove()
        close(model(tokens()).logits, expected, 0.0)


# ---- what it costs ----


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("attention", BOTH)
def test_flops_are_those_of_torchs_counter(
    attention: str, top_k: int, rank: int | None, sparse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the digit, with kernels that the counter knows, for a sequence whose tokens see all keys: it would count the
    upper half of a causal sequence too. No queries are padded to be as many as another expert's."""
    monkeypatch.setattr("branchmix.models.chunked_branchmix._LEAST_FILLED", 1.0)
    length = 24
    matrices = "q k v o gate up down" if attention == "kv_experts" else "q o gate up down"
    ranks = rank and [{name: [rank] * 3 for name in matrices.split()}]
    model = random_mixture("qwen3", attention, attention_num_experts_per_tok=top_k, expert_ranks=ranks)
    model.set_attn_implementation(CHUNKED)
    model.set_experts_implementation("eager")
    with torch.no_grad(), sparse(True) as layers, FlopCounterMode(display=False) as counter:
        model(tokens(1, length), attention_mask=torch.ones(1, 1, length, length, dtype=torch.bool), use_cache=False)
    flops = flops_per_token(model.config.to_dict(), length)
    assert len(layers) == 2
    assert counter.get_total_flops() == length * (flops.total + flops.model("context"))

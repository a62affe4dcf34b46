"""Attention in chunks of queries on CPUs: all query heads of a K/V head in one product, and a backward that recomputes.

In bf16 torch's fused attention runs its products well below the rate of plain matrix products, and its backward far
below. Here a chunk of queries meets all its keys at once: the query heads that share a K/V head (for Shared KV all
experts' heads of a group) are stacked as rows of one ``bmm``. Registered with transformers under two names:

- ``branchmix``: chunks where they were measured to be faster, else torch's fused attention. The default of mixtures.
- ``branchmix_chunked``: chunks for every call of more than one query, in any dtype; refuses what it cannot compute.

Saved with every checkpoint, so it imports only torch and transformers.
Shapes: B batch, T queries, S keys, H query heads, K key/value heads, R = H / K, C head dimension; m queries of a chunk,
w keys that they may see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .chosen_branchmix import Chosen, in_autocast_dtype
from .linear_branchmix import fastest_on_cpu

AUTOMATIC, CHUNKED = "branchmix", "branchmix_chunked"

_ROWS = 1024
"""Rows of one product to aim at: more fall out of the cache, fewer leave the matrix units idle."""
_CHUNKS = (32, 128)
"""Bounds on the queries of a chunk. Causal attention wastes half a chunk of keys on each."""
_SCORES_BYTES, _SCORES_BYTES_FP32 = 8 << 20, 2 << 20
"""Scores held at once, over all rows of a product; in fp32 they have to stay in a core's own cache."""
_LEAST_FILLED, _ALONE = 0.75, 256
"""Least share of real queries, the rest is padding, where several experts' queries are computed in one call; and the
number of queries from which an expert gets a call of its own, whose keys need no copy."""
SHORTEST, SHORTEST_FORWARD = 64, 256
"""Fewer queries than this are not worth the chunks' overhead, in the backward and in the forward pass."""


def automatic_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    always: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' ``sdpa``, but in chunks where that is faster: see ``_faster_in_chunks``.

    Arguments as for transformers' attention functions: query [B, H, T, C], key and value [B, K, S, C]. Returns [B,
    T, H, C] and None.

    With ``always``, chunks for any dtype, length and device; single queries and compiled graphs use ``sdpa``.

    Raises:
        ValueError: there are attention sinks, which neither of the two computes; or, with ``always``, dropout, position
            biases or a paged cache.
    """
    unsupported = _unsupported(dropout, attention_mask, kwargs)
    if always and unsupported:
        raise ValueError(f'attn_implementation="{CHUNKED}" has no {unsupported}: use "{AUTOMATIC}", "sdpa" or "eager"')
    if kwargs.get("s_aux") is not None:  # transformers' sdpa would leave them out without a word
        raise ValueError(f'attn_implementation="{AUTOMATIC}" has no sinks: use "eager"')
    length = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and length > 1
    if (chosen := getattr(module, "chosen", None)) is not None:
        attend = partial(automatic_attention_forward, dropout=dropout, scaling=scaling, always=always, **kwargs)
        return _by_expert(module, chosen, query, key, value, attention_mask, causal, attend), None
    q, k, v = in_autocast_dtype(query, key, value)  # rotary angles may have made queries fp32 again
    soft_cap = kwargs.get("softcap")  # torch's fused attention has none
    forward = backward = False
    if always:
        forward = soft_cap is not None or not (length == 1 or torch.compiler.is_compiling())
    elif not (unsupported or torch.compiler.is_compiling()):
        forward, backward = _faster_in_chunks(q, k, v)
        forward = forward or soft_cap is not None
    if not (forward or backward):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    settings = _ScoreOptions(q.shape[-1] ** -0.5 if scaling is None else scaling, causal, soft_cap)
    if causal:  # a static cache has more
        k, v = k[:, :, :length], v[:, :, :length]
    with torch.autocast(q.device.type, enabled=False):
        return _ChunkedAttention.apply(q, k, v, attention_mask, settings, forward), None


chunked_attention_forward = partial(automatic_attention_forward, always=True)
AttentionInterface.register(AUTOMATIC, automatic_attention_forward)
AttentionInterface.register(CHUNKED, chunked_attention_forward)
# Masks come as transformers makes them for SDPA: True where a key may be seen, or None for what is just causal.
AttentionMaskInterface.register(AUTOMATIC, sdpa_mask)
AttentionMaskInterface.register(CHUNKED, sdpa_mask)


# ---- What is computed how ----


@dataclass(frozen=True)
class _ScoreOptions:
    scale: float
    causal: bool
    soft_cap: float | None


def _faster_in_chunks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[bool, bool]:
    """Whether chunks gain in the forward and in the backward pass, as measured: bf16 on CPUs, and not for few queries.

    The backward gains on every processor tried. The forward gains on those without AMX (1.67 at 512 tokens, 1.37 at
    2048, on a Zen 4; 1.5 and 1.4 on a Xeon whose bf16 products are slower than fp32's, so that chunks are computed in
    fp32 there). With AMX, torch's fused forward uses it and is faster. Of fp32 tensors torch's own is left alone.
    """
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or query.shape[2] < SHORTEST:
        return False, False
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    return query.shape[2] >= SHORTEST_FORWARD and not has_amx(), needs_grad


def has_amx() -> bool:
    """Whether the processor multiplies bf16 matrices in tiles (Intel's AMX)."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported is not None and supported())


def faster_in_bf16(device: torch.device) -> bool:
    """Whether matrix products take less time in bf16 than in fp32.

    On GPUs that have it, and on CPUs with AMX. With AVX512-BF16 alone both are timed, which takes some milliseconds: on
    one core a Zen 4 reached 2.3 times fp32's rate, a Xeon half of it.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type != "cpu":
        return False
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return has_amx() or bool(supported is not None and supported() and _measured_faster_in_bf16())


@cache
def _measured_faster_in_bf16() -> bool:
    single, half = torch.ones(512, 512), torch.ones(512, 512, dtype=torch.bfloat16)
    calls = {"fp32": lambda: torch.mm(single, single), "bf16": lambda: torch.mm(half, half)}
    return fastest_on_cpu(calls) == "bf16"


def _unsupported(dropout: float, mask: Any, kwargs: dict[str, Any]) -> str | None:
    if dropout:
        return "attention dropout"
    if mask is not None and (mask.dim() != 4 or mask.requires_grad):
        return "masks with gradients, or of other than 4 dimensions"
    for name, what in (("s_aux", "sinks"), ("position_bias", "position biases"), ("cache", "paged caches")):
        if kwargs.get(name) is not None:
            return what
    return None


# ---- Experts with keys of their own, each for the tokens that chose it ----


def _by_expert(
    module: Any,
    chosen: Chosen,
    q_BHTC: torch.Tensor,
    k_BKSC: torch.Tensor,
    v_BKSC: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    attend: Callable[..., tuple[torch.Tensor, None]],
) -> torch.Tensor:
    """Attention of each token to its experts' own keys and values, [B, T, H, C].

    All tokens of a sequence that chose an expert are the queries of one attention to this expert's keys, whose mask
    says where in the sequence they are. Sequences and experts with about as many queries are computed at once.

    Args:
        module: the attention.
        chosen: k experts of each token.
        q_BHTC: heads are ordered (slot, head of an expert).
        k_BKSC, v_BKSC: heads are ordered (expert, head of an expert).
        mask: [B or 1, 1, T, S], as for all of this file.
        causal: whether a token sees the keys up to its own, for want of a mask.
        attend: attention of (module, q, k, v, mask, is_causal=).
    """
    (batch, _, length, width), num_experts = q_BHTC.shape, chosen.num_experts
    if causal:  # a static cache has more
        k_BKSC, v_BKSC = k_BKSC[:, :, :length], v_BKSC[:, :, :length]
    q_PHC = chosen.sorted(q_BHTC.transpose(1, 2).reshape(batch * length * chosen.top_k, -1, width))
    counts = torch.bincount(
        chosen.experts_P * batch + chosen.tokens_P // length, minlength=num_experts * batch
    ).tolist()
    queries, times = q_PHC.split(counts), (chosen.tokens_P % length).split(counts)
    # One [K, S, C] for each expert and sequence, as the queries are sorted.
    keys, values = (
        [row for expert in x.unflatten(1, (num_experts, -1)).unbind(1) for row in expert.unbind(0)]
        for x in (k_BKSC, v_BKSC)
    )
    like = SimpleNamespace(
        num_key_value_groups=q_PHC.shape[1] // len(keys[0]), is_causal=False, training=module.training
    )
    heads = list(queries)
    for places in _alike(counts):
        q_RMHC, times_RM = _padded([queries[place] for place in places]), _padded([times[place] for place in places])
        k_RKSC, v_RKSC = (_padded([x[place] for place in places]) for x in (keys, values))
        seen = None
        if causal:
            seen = (torch.arange(length, device=times_RM.device) <= times_RM[..., None])[:, None]
        elif mask is not None:
            rows_R1 = torch.tensor([place % batch for place in places], device=times_RM.device)[:, None]
            seen = mask.expand(batch, -1, -1, -1)[rows_R1, 0, times_RM][:, None]
        out_RMHC, _ = attend(like, q_RMHC.transpose(1, 2), k_RKSC, v_RKSC, seen, is_causal=False)
        for place, out_MHC in zip(places, out_RMHC.unbind(0), strict=True):
            heads[place] = out_MHC[: counts[place]]
    return chosen.unsorted(torch.cat(heads)).view(batch, length, -1, heads[0].shape[-1])


def _alike(counts: list[int]) -> Iterator[list[int]]:
    """Places of positive counts, in groups in which none is less than ``_LEAST_FILLED`` of another."""
    places = sorted((place for place, count in enumerate(counts) if count), key=lambda place: -counts[place])
    while places:
        alike = [place for place in places if counts[place] >= _LEAST_FILLED * counts[places[0]]]
        if counts[places[0]] >= _ALONE:
            alike = alike[:1]
        yield alike
        places = places[len(alike) :]


def _padded(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0][None] if len(parts) == 1 else pad_sequence(parts, batch_first=True)


# ---- The chunks ----


class _Queries(NamedTuple):
    """Some queries of some K/V heads, and the keys that any of them may see."""

    rows: slice
    heads: slice
    queries: slice
    keys: slice
    blocked: torch.Tensor | None
    """True where a key may not be seen, broadcast to [rows, heads, m, R, blocked_keys]; or what is added to scores."""
    blocked_keys: slice
    """The part of ``keys`` that ``blocked`` covers."""
    blind: torch.Tensor | None
    """True for queries that may see no key at all, broadcast to [rows, heads, m, R, 1]."""


class _ChunkedAttention(torch.autograd.Function):
    """softmax(scale * Q K^T + mask) V, and its gradients from probabilities that are computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BHTC: torch.Tensor,
        k_BKSC: torch.Tensor,
        v_BKSC: torch.Tensor,
        mask: torch.Tensor | None,
        settings: _ScoreOptions,
        forward_in_chunks: bool,
    ) -> torch.Tensor:
        ctx.settings = settings
        ctx.save_for_backward(q_BHTC, k_BKSC, v_BKSC, mask)
        dtype, num_kv_heads = q_BHTC.dtype, k_BKSC.shape[1]
        if not forward_in_chunks:  # a forward pass is the same with and without gradients
            like: Any = SimpleNamespace(num_key_value_groups=q_BHTC.shape[1] // num_kv_heads)
            options = (mask, 0.0, settings.scale, settings.causal)
            return sdpa_attention_forward(like, q_BHTC, k_BKSC, v_BKSC, *options)[0]
        q_BHTC, k_BKSC, v_BKSC = _to_compute(q_BHTC, k_BKSC, v_BKSC)
        q_BTKRC = _grouped(q_BHTC.transpose(1, 2), num_kv_heads)
        out_BTHC = q_BHTC.new_zeros(*q_BHTC.shape[:1], q_BHTC.shape[2], q_BHTC.shape[1], v_BKSC.shape[-1])
        out_BTKRC = _grouped(out_BTHC, num_kv_heads)
        for chunk in _chunks(q_BHTC, k_BKSC, mask, settings.causal):
            q, k, v = _rows_of(q_BTKRC, chunk), _keys_of(k_BKSC, chunk), _keys_of(v_BKSC, chunk)
            weights, _ = _weights(q, k, q_BTKRC.shape[3], chunk, settings)
            _put(out_BTKRC, chunk, torch.bmm(weights, v))
        return out_BTHC.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHC: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (q_BHTC, k_BKSC, v_BKSC, mask), settings = ctx.saved_tensors, ctx.settings
        dtype, num_kv_heads = q_BHTC.dtype, k_BKSC.shape[1]
        grad_BTHC, q_BHTC, k_BKSC, v_BKSC = _to_compute(grad_BTHC, q_BHTC, k_BKSC, v_BKSC)
        q_BTKRC, grad_BTKRC = _grouped(q_BHTC.transpose(1, 2), num_kv_heads), _grouped(grad_BTHC, num_kv_heads)
        dq_BTHC = q_BHTC.new_zeros(q_BHTC.shape[0], q_BHTC.shape[2], q_BHTC.shape[1], q_BHTC.shape[3])
        dq_BTKRC = _grouped(dq_BTHC, num_kv_heads)
        # Sums over chunks of queries, at least in fp32: bf16 would lose a bit with each.
        wide = torch.promote_types(k_BKSC.dtype, torch.float32)
        dk_BKSC, dv_BKSC = torch.zeros_like(k_BKSC, dtype=wide), torch.zeros_like(v_BKSC, dtype=wide)
        for chunk in _chunks(q_BHTC, k_BKSC, mask, settings.causal):
            q, k, v = _rows_of(q_BTKRC, chunk), _keys_of(k_BKSC, chunk), _keys_of(v_BKSC, chunk)
            grad = _rows_of(grad_BTKRC, chunk)
            weights, slope = _weights(q, k, q_BTKRC.shape[3], chunk, settings)
            _add(dv_BKSC, chunk, torch.bmm(weights.transpose(1, 2), grad))
            d_weights = torch.bmm(grad, v.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            if slope is not None:
                d_scores = d_scores * slope
            _put(dq_BTKRC, chunk, torch.bmm(d_scores, k).mul_(settings.scale))
            _add(dk_BKSC, chunk, torch.bmm(d_scores.transpose(1, 2), q))
        dk_BKSC.mul_(settings.scale)
        return dq_BTHC.transpose(1, 2).to(dtype), dk_BKSC.to(dtype), dv_BKSC.to(dtype), None, None, None


def _to_compute(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """bf16 becomes fp32 on a CPU that multiplies faster in it."""
    device, dtype = tensors[0].device, tensors[0].dtype
    if dtype != torch.bfloat16 or device.type != "cpu" or faster_in_bf16(device):
        return tensors
    return tuple(tensor.float() for tensor in tensors)


def _weights(
    q: torch.Tensor, k: torch.Tensor, group: int, chunk: _Queries, settings: _ScoreOptions
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights [N, m * R, w] of a chunk with N = rows * heads, and the slope of the soft cap at each score, if any.

    q is [N, m * R, C], k is [N, w, C], ``group`` is R.
    """
    scores = torch.bmm(q, (k * settings.scale).transpose(1, 2))
    slope = None
    if settings.soft_cap is not None:
        scores.div_(settings.soft_cap).tanh_()
        slope = 1 - scores.square()
        scores.mul_(settings.soft_cap)
    num_rows, num_heads = chunk.rows.stop - chunk.rows.start, chunk.heads.stop - chunk.heads.start
    by_query = scores.view(num_rows, num_heads, -1, group, k.shape[1])
    if chunk.blocked is not None:
        part = by_query[..., chunk.blocked_keys]
        if chunk.blocked.dtype == torch.bool:
            part.masked_fill_(chunk.blocked, float("-inf"))
        else:
            part.add_(chunk.blocked)
    weights = torch.softmax(scores, -1)
    if chunk.blind is not None:  # not a number so far; torch's fused attention says zero
        weights.view(by_query.shape).masked_fill_(chunk.blind, 0.0)
    return weights, slope


def _chunks(q_BHTC: torch.Tensor, k_BKSC: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> Iterator[_Queries]:
    """All pairs of queries and keys that may meet, chunk by chunk."""
    (batch, num_heads, length, _), (num_kv_heads, num_keys) = q_BHTC.shape, k_BKSC.shape[1:3]
    group = num_heads // num_kv_heads
    size = max(_CHUNKS[0], min(_CHUNKS[1], _ROWS // group))
    nbytes = _SCORES_BYTES_FP32 if q_BHTC.dtype == torch.float32 else _SCORES_BYTES
    scores = nbytes // q_BHTC.element_size()
    heads_at_once = max(1, min(num_kv_heads, scores // (group * size * num_keys)))
    rows_at_once = max(1, min(batch, scores // (num_kv_heads * group * size * num_keys)))
    upper = torch.ones(size, size, dtype=torch.bool, device=q_BHTC.device).triu(1)[:, None]
    for queries in _slices(length, size):
        m = queries.stop - queries.start
        for rows in _slices(batch, rows_at_once):
            keys, blocked, blocked_keys, blind = slice(0, num_keys), None, slice(0, 0), None
            if causal:
                keys, blocked, blocked_keys = slice(0, queries.stop), upper[:m, :, :m], queries
            elif mask is not None:
                seen = mask[rows if mask.shape[0] > 1 else slice(None), :, queries]
                keys, blocked, blocked_keys, blind = _masked(seen)
            if keys.stop == keys.start:
                continue
            for heads in _slices(num_kv_heads, heads_at_once):
                by_head = [_of_heads(x, num_kv_heads, heads) if mask is not None else x for x in (blocked, blind)]
                yield _Queries(rows, heads, queries, keys, by_head[0], blocked_keys, by_head[1])


def _masked(mask_XYmS: torch.Tensor) -> tuple[slice, torch.Tensor | None, slice, torch.Tensor | None]:
    """Which keys a chunk's queries may see at all, what is blocked among those keys, and who sees nothing.

    Windows and packed documents leave whole stretches of keys out; they are not computed.
    """
    seen_XYmS = mask_XYmS if mask_XYmS.dtype == torch.bool else mask_XYmS > float("-inf")
    touched = seen_XYmS.flatten(0, 2).any(0).nonzero()
    if not len(touched):
        return slice(0, 0), None, slice(0, 0), None
    keys = slice(int(touched[0]), int(touched[-1]) + 1)
    seen_XYmw, mask_XYmw = seen_XYmS[..., keys], mask_XYmS[..., keys]
    blind_XYm1 = ~seen_XYmw.any(-1, keepdim=True)
    blind = blind_XYm1 if blind_XYm1.any() else None
    if mask_XYmS.dtype != torch.bool:
        return keys, mask_XYmw, slice(0, keys.stop - keys.start), blind
    partly = (~seen_XYmw.flatten(0, 2).all(0)).nonzero()
    if not len(partly):
        return keys, None, slice(0, 0), None
    blocked_keys = slice(int(partly[0]), int(partly[-1]) + 1)
    return keys, ~seen_XYmw[..., blocked_keys], blocked_keys, blind


def _of_heads(mask_XYmw: torch.Tensor | None, num_kv_heads: int, heads: slice) -> torch.Tensor | None:
    """A mask [X, 1 or H, m, w] as [X, 1 or heads, m, 1 or R, w]."""
    if mask_XYmw is None:
        return None
    if mask_XYmw.shape[1] == 1:
        return mask_XYmw.unsqueeze(3)
    return mask_XYmw.unflatten(1, (num_kv_heads, -1))[:, heads].transpose(2, 3)


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _grouped(x_BTHC: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """A view [B, T, K, R, C]."""
    return x_BTHC.unflatten(2, (num_kv_heads, -1))


def _rows_of(x_BTKRC: torch.Tensor, chunk: _Queries) -> torch.Tensor:
    """A chunk's queries [rows * heads, m * R, C], packed: ``bmm`` would copy anything else, and slowly."""
    part = x_BTKRC[chunk.rows, chunk.queries, chunk.heads].transpose(1, 2)
    return part.reshape(part.shape[0] * part.shape[1], -1, part.shape[-1])


def _put(x_BTKRC: torch.Tensor, chunk: _Queries, rows: torch.Tensor) -> None:
    part = x_BTKRC[chunk.rows, chunk.queries, chunk.heads].transpose(1, 2)
    part.copy_(rows.view(part.shape))


def _keys_of(x_BKSC: torch.Tensor, chunk: _Queries) -> torch.Tensor:
    """A chunk's keys or values [rows * heads, w, C], packed."""
    return x_BKSC[chunk.rows, chunk.heads, chunk.keys].flatten(0, 1).contiguous()


def _add(x_BKSC: torch.Tensor, chunk: _Queries, keys: torch.Tensor) -> None:
    part = x_BKSC[chunk.rows, chunk.heads, chunk.keys]
    part.add_(keys.view(part.shape))

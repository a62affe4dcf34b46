"""Memory of a training step from a config alone: weights, gradients, moments, activations, logits.

Activations are what autograd keeps between the two passes, counted tensor by tensor as torch keeps them on CPUs.
"""

from __future__ import annotations

from typing import Any

from branchmix.accounting import Config, Shape, parameters, shape_of
from branchmix.train.models import EAGER_LENGTH

_FP32 = 4
_NORM = 3
"""Values of the width that a norm keeps: less the mean (twice) and normed, as Cohere's; others keep one or two. What it
hands on is kept by the matrices."""
_HOLES = 1.6
"""What malloc takes for what comes and goes, which leaves holes where ``keep_freed_memory`` maps nothing afresh."""


def training_bytes(config: Config, run: dict[str, Any], *, bf16: bool) -> int:
    """Bytes of a training step on a CPU at its peak, when the backward pass begins, without Python and its libraries.

    Weights, gradients and two moments are in fp32, and all parameters are taken to be trained, but of stitched models
    only the stitches; logits come with their softmax and gradient.

    For the models of recipes/study-a.yaml, dense, BTX and Expert KV with 8 and 32 sequences, it is 0.87 to 0.98 of the
    measured growth of the process in fp32, 0.8 with gradient checkpointing; without the holes 0.98 to 0.99 of it where
    malloc maps all larger blocks afresh. In bf16, on a CPU without AMX, Expert KV took 0.25 GB more than is counted,
    whatever the micro-batch.

    ``bf16`` says whether matrix products are in bf16, for which weights are copied; of the run's settings the batch,
    ``sequence_length``, ``gradient_checkpointing`` and ``attn_implementation`` count.

    Raises:
        CheckpointError: the config is not that of a model, or its family has no formula.
    """
    counts = parameters(config)
    weights = counts.total * (_FP32 + 2 * bf16) + (counts.stitches or counts.total) * 3 * _FP32
    logits = 3 * _FP32 * _tokens(run) * shape_of(config).sizes.vocab_size
    return weights + round(_HOLES * (logits + activation_bytes(config, run, bf16=bf16)))


def activation_bytes(config: Config, run: dict[str, Any], *, bf16: bool) -> int:
    """Bytes of a micro-batch's activations without logits; arguments and errors as of ``training_bytes``.

    With gradient checkpointing they are the inputs of all layers, and the activations of one. Within 10 % of what torch
    keeps for Cohere and Llama, dense and as mixtures, 12 % where top-k attention computes the chosen experts' heads
    only; activation functions in several pieces (GPT-2's) keep more. Of stitched models it is 0.98 to 1.22 of that:
    nothing is kept ahead of the first stitch, nor what frozen matrices read.
    """
    shape, half = shape_of(config), 2 if bf16 else _FP32
    width, num_layers = shape.streams * shape.sizes.hidden_size, shape.sizes.num_layers
    layer = _norms(shape, run, half) + _attention(shape, run, half) + _ffn(shape, half)
    stitched = [number for number, into in enumerate(shape.stitches) if into is not None]
    kept_layers = num_layers - stitched[0] - 1 if stitched else num_layers
    layers = num_layers * _FP32 * width + layer if run.get("gradient_checkpointing") else kept_layers * layer
    stitches = len(stitched) * 3 * _FP32 * width  # gates, differences and what the projections make of these
    final_norm = _FP32 * _NORM * width + half * width
    return _tokens(run) * (layers + stitches + final_norm)


def _tokens(run: dict[str, Any]) -> int:
    """Tokens of a micro-batch."""
    return int((run.get("micro_batch_size") or run["batch_size"]) * run["sequence_length"])


# ---- Bytes of one token in one layer; ``half`` is a matrix product's bytes of a value ----


def _norms(shape: Shape, run: dict[str, Any], half: int) -> int:
    """Norms of the block, of queries and keys; and what those before attention and FFN hand to the matrices."""
    sizes, family = shape.sizes, shape.family
    names = {family.attention_input_norm, family.ffn_input_norm} - {None}
    width = shape.streams * sizes.hidden_size
    kept = _FP32 * _NORM * (len(names) + shape.facts.post_norms) * width
    if shape.has(shape.facts.qk_norm):
        heads = _experts_computed(shape, run, half) * sizes.num_heads + shape.kv_experts * sizes.num_kv_heads
        kept += _FP32 * _NORM * heads * sizes.head_dim
    if shape.stitches:  # frozen gains and matrices need not what they read
        return kept * (_NORM - 1) // _NORM
    if half == _FP32:  # one tensor for all matrices behind a norm
        return kept + _FP32 * max(1, len(names)) * width
    # Autocast casts it anew for each matrix; experts take it at once.
    matrices = 3 + (1 if shape.ffn == "experts" else 2 if family.gate else 1)
    return kept + half * matrices * width


def _attention(shape: Shape, run: dict[str, Any], half: int) -> int:
    """Queries, keys, values, heads, gated heads; and what the kernel keeps of probabilities and mask.

    Where only the chosen experts' heads are computed, with keys of their own, each expert and sequence is a call: its
    queries have a mask for each time they are there, and their heads are joined again.
    """
    sizes, length = shape.sizes, run["sequence_length"]
    experts = _experts_computed(shape, run, half)
    num_heads = experts * sizes.num_heads
    wide, kv_wide = num_heads * sizes.head_dim, shape.kv_experts * sizes.num_kv_heads * sizes.head_dim
    heads = half * wide * (3 if shape.has_attention_experts else 2)
    if experts < shape.kv_experts:
        all_wide = shape.kv_experts * sizes.num_heads * sizes.head_dim
        if _kernel(shape, run, half, queries=length * experts // shape.kv_experts) == "chunks":
            return heads + half * 2 * kv_wide + experts * length
        return heads + half * (wide + 2 * all_wide) + _FP32 * (experts * length + num_heads)
    kernel = _kernel(shape, run, half, queries=length)
    if kernel == "chunks":
        return heads + half * 2 * kv_wide
    heads += half * 2 * wide  # keys and values, repeated for each query head
    if kernel == "eager":
        return heads + num_heads * length * (_FP32 if half == _FP32 else _FP32 + half)
    return heads + _FP32 * (length + num_heads)


def _experts_computed(shape: Shape, run: dict[str, Any], half: int) -> int:
    """Experts whose heads are computed for a token: all, or those that it chooses, as mixtures decide on CPUs."""
    from branchmix.models.attention_branchmix import ANY_HEADS, OF_CHOSEN_KEYS, HeadOrder, choosing_pays

    sizes, top_k, shared = shape.sizes, shape.active_attention_experts, shape.attention == "kv_sharing"
    if top_k == shape.attention_experts:
        return top_k
    order = HeadOrder(shape.num_experts, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, shared)
    precision = "fp32" if half == _FP32 else "bf16"
    can = run.get("attn_implementation") in (None, *(ANY_HEADS if shared else OF_CHOSEN_KEYS))
    pays = choosing_pays(order, top_k, rows=_tokens(run), hidden_size=sizes.hidden_size, precision=precision)
    return top_k if can and pays else shape.attention_experts


def _kernel(shape: Shape, run: dict[str, Any], half: int, *, queries: int) -> str:
    """``eager``, ``sdpa`` or ``chunks``, as dense models and mixtures choose on CPUs for so many queries."""
    from branchmix.models.chunked_branchmix import SHORTEST

    given, length = run.get("attn_implementation"), run["sequence_length"]
    if given == "branchmix_chunked":
        return "chunks"
    if given == "branchmix" or (given is None and shape.attention != "dense"):
        return "chunks" if half != _FP32 and queries >= SHORTEST else "sdpa"
    return "eager" if given == "eager" or (given is None and half != _FP32 and length <= EAGER_LENGTH) else "sdpa"


def _ffn(shape: Shape, half: int) -> int:
    """What goes into the activation, comes out and is multiplied; of experts also what each is handed and gives."""
    inner = ((4 if shape.family.gate else 2) - bool(shape.stitches)) * shape.sizes.intermediate_size
    if shape.ffn != "experts":
        return half * inner * shape.ffn_experts
    shared = half * shape.shared_experts * (inner + shape.sizes.hidden_size)
    return half * shape.num_experts_per_tok * (inner + 2 * shape.sizes.hidden_size) + shared

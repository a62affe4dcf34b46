"""The number of steps in a budget, the cost of a step, and the learning rate of each step. Does not import torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from branchmix.accounting import Config, flops_per_token
from branchmix.errors import CheckpointError, RecipeError
from branchmix.train.config import Balance, Budget, LearningRate, RunConfig


def micro_batches(config: RunConfig, num_processes: int) -> tuple[int, int]:
    """Size and number of each process's micro-batches; raises RecipeError if the batch cannot be shared equally."""
    if config.batch_size % num_processes:
        raise RecipeError(
            f"batch_size is {config.batch_size}, which {num_processes} processes cannot share equally: make it a "
            f"multiple of {num_processes}"
        )
    share = config.batch_size // num_processes
    micro = config.micro_batch_size or share
    if share % micro:
        raise RecipeError(
            f"micro_batch_size is {micro}, which does not divide the {share} sequences of each of "
            f"{num_processes} processes: choose a divisor of {share}"
        )
    return micro, share // micro


def counts_ahead(settings: Balance | None, accumulation: int) -> bool:
    """Whether the forward passes of a step run twice: the load of the last one is not known when the first is done."""
    whole_step = settings is not None and settings.scope == "global_batch"
    return whole_step and accumulation > 1


def warmup_steps(warmup: float, num_steps: int) -> int:
    """Number of steps below the peak, fewer than all; ``warmup`` is a share of all steps if below 1."""
    wanted = round(warmup * num_steps) if warmup < 1 else round(warmup)
    return min(wanted, num_steps - 1)


def rate_at(step: int, num_steps: int, rate: LearningRate) -> float:
    """Share of the peak at a step, counted from 0: linear up to 1, then a cosine down to ``rate.final`` at the last.

    The first step's rate is not zero: with n warm-up steps it is 1 / (n + 1) of the peak.
    """
    warmup = warmup_steps(rate.warmup, num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, num_steps - 1 - warmup))
    return rate.final + (1 - rate.final) * 0.5 * (1 + math.cos(math.pi * progress))


def steps_of(budget: Budget, tokens_per_step: int, flops_per_step: int | None) -> int | None:
    """Number of whole steps in a budget, at least one; None for a budget of time, whose steps must be measured.

    Raises:
        RecipeError: the budget is in FLOPs and the model's FLOPs are unknown, or it is too small for a step.
    """
    if budget.is_time or budget.steps is not None:
        return budget.steps
    unit, given, price = "tokens", budget.tokens, tokens_per_step
    if given is None:
        if flops_per_step is None:
            raise RecipeError("budget.flops: no formula for this family's FLOPs: give tokens, steps or minutes")
        unit, given, price = "flops", budget.flops, flops_per_step
    assert given is not None
    if given < price:
        raise RecipeError(f"budget.{unit} is {given:,}, but one step takes {price:,}: raise it, or lower batch_size")
    return given // price


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of one token, as ``branchmix.accounting`` counts them: a multiply-add is 2."""

    forward: int
    training: int
    """Forward; as much again for the gradients of activations; as much for the gradients of the weights that are
    trained; the products with LoRA's matrices; and the pass of ``counts_ahead``. Recomputation by gradient
    checkpointing is not counted, nor are the weight products of adapters, which do not depend on the number of
    tokens."""


def token_flops(
    config: Config,
    context: int,
    trained: dict[str, float] | None = None,
    lora_parameters: int = 0,
    *,
    ahead: bool = False,
) -> TokenFlops | None:
    """FLOPs of one token in training, or None for a family without a formula.

    Args:
        config: of the model, as in config.json.
        context: tokens of a sequence. Documents packed into one are shorter, so this is an upper bound.
        trained: trained share of the parameters of ``attention``, ``ffn``, ``routers``, ``stitches`` and ``lm_head``;
            all if None.
        lora_parameters: number of parameters in LoRA's matrices.
        ahead: whether the load is counted ahead (``counts_ahead``): a forward pass more, with the head on the last
            token of each sequence.
    """
    try:
        flops = flops_per_token(config, context)
    except CheckpointError:
        return None
    weights = {
        "attention": flops.model("qkv") + flops.model("output"),
        "ffn": flops.model("ffn"),
        "routers": flops.model("routers"),
        "stitches": flops.model("stitch"),
        "lm_head": flops.lm_head,
    }
    frozen = sum(round(weights[part] * (1 - share)) for part, share in (trained or {}).items())
    if stitched := [number for number, layer in enumerate(flops.layers) if layer.stitch]:
        # Of the frozen layers ahead of the first stitch no gradient is computed.
        frozen += sum(
            layer.qkv + 2 * layer.context + layer.output + layer.ffn for layer in flops.layers[: stitched[0] + 1]
        )
    counting = flops.non_embedding + flops.lm_head // context + 2 * lora_parameters if ahead else 0
    return TokenFlops(flops.total, 3 * flops.total - frozen + 6 * lora_parameters + counting)


def part_of(name: str) -> str:
    """The part of a model that a parameter belongs to, by its name, for counting FLOPs."""
    if ".stitch." in name:
        return "stitches"
    if re.search(r"expert_gate|mlp\.gate\.weight$|router|document_gate", name):
        return "routers"
    if "norm" in name or ".ln_" in name:
        return "norms"
    if re.search(r"attn|attention", name):
        return "attention"
    if re.search(r"mlp|feed_forward|ffn|experts|\.(fc1|fc2)\.", name):
        return "ffn"
    return "embeddings"


def shares_trained(model: Any) -> tuple[dict[str, float], int]:
    """The trained share of each part's parameters, for ``token_flops``, and the number of LoRA's parameters."""
    counts = {part: [0, 0] for part in ("attention", "ffn", "routers", "stitches", "lm_head")}
    lora = 0
    head = model.get_output_embeddings()
    heads = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            lora += parameter.numel()
            continue
        part = "lm_head" if id(parameter) in heads else part_of(name)
        if part in counts:
            counts[part][0] += parameter.numel() * parameter.requires_grad
            counts[part][1] += parameter.numel()
    return {part: trained / total for part, (trained, total) in counts.items() if total}, lora


def optimizer_flops(num_trained: int, *, clips: bool = True) -> int:
    """FLOPs of one AdamW step on ``num_trained`` parameters, whose gradients may be clipped (``max_grad_norm``)."""
    # 1 for weight decay, 3 and 4 for the two moments, 3 for the root of the second with its correction and epsilon, 3
    # for the step; of clipping 2 for the norm, 1 to scale the gradient.
    adamw, clipping = 14, 3
    return num_trained * (adamw + (clipping if clips else 0))

"""Forward passes for log-probabilities: the head on the wanted positions only, the softmax in fp32, no dropout.

Shapes: B rows, T tokens of the longest, N wanted positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_LOGITS_AT_ONCE = 1 << 22
"""Of the softmax in fp32: 16 MB, about what a cache holds; in one piece it takes twice the time."""
_LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Rotary embeddings that look at the longest row of a batch: padding would change the shorter ones."""


def log_probs(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """``log_softmax`` in fp32 at the targets, without a second tensor of the logits' size."""
    step = max(1, _LOGITS_AT_ONCE // logits_NV.shape[-1])
    parts = []
    for start in range(0, len(logits_NV), step):
        part_NV = logits_NV[start : start + step].float()
        parts.append(-nn.functional.cross_entropy(part_NV, targets_N[start : start + step], reduction="none"))
    return torch.cat(parts)


@contextmanager
def head_at(model: Any, rows_N: torch.Tensor, places_N: torch.Tensor) -> Iterator[list[bool]]:
    """Lets the head see ``hidden[rows, places]`` as [1, N, D] only; the list is filled when it did.

    The head is a large part of a small model, and what the family does to its logits (scaling, soft caps) stays its
    own. transformers' ``logits_to_keep`` takes the same places of every row only.
    """
    done: list[bool] = []

    def narrow(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_BTD = args[0]
        done.append(True)
        return hidden_BTD[rows_N.to(hidden_BTD.device), places_N.to(hidden_BTD.device)][None], *args[1:]

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(narrow) if isinstance(head, nn.Module) else None
    try:
        yield done
    finally:
        if hook is not None:
            hook.remove()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model without dropout inside the block, and as it was after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def max_positions(config: Any) -> int | None:
    """Tokens that a model takes at most, by its config; None where the config does not say."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(positions) if isinstance(positions, int) and positions > 0 else None


def length_dependent(config: Any) -> bool:
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return any(kind.get("rope_type") in _LENGTH_DEPENDENT for kind in kinds)

"""Forward passes for log-probabilities: the head on the wanted positions only, the softmax in fp32, no dropout.

Shapes: B rows, T tokens of the longest, N wanted positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from branchmix.errors import CheckpointError

_LOGITS_AT_ONCE = 1 << 22
"""Logits of a softmax in fp32: 16 MB, about what a cache holds; in one piece it takes twice the time."""
_LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Rotary embeddings that look at the longest row of a batch: padding would change the shorter ones."""


@torch.inference_mode()
def logits_at(
    model: Any, inputs: Sequence[np.ndarray], rows_N: np.ndarray, places_N: np.ndarray, targets_N: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's logits [N, V] at ``places_N`` of the inputs ``rows_N``, and the targets on its device."""
    logits_NV, _ = forward(model, inputs, torch.from_numpy(rows_N), torch.from_numpy(places_N), use_cache=False)
    return logits_NV, torch.from_numpy(targets_N).to(logits_NV.device)


def forward(
    model: Any,
    inputs: Sequence[Sequence[int] | np.ndarray],
    rows_N: torch.Tensor,
    places_N: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, Any]:
    """The logits [N, V] at ``places_N`` of the inputs ``rows_N``, where alone the head runs, and the model's output.

    Attention takes its fastest way, without a mask (see ``padded``).
    """
    with head_at(model, rows_N, places_N) as narrowed:
        output = model(input_ids=padded(inputs).to(model.device), **options)
    return output.logits.squeeze(0) if narrowed else output.logits[rows_N, places_N], output


def padded(inputs: Sequence[Sequence[int] | np.ndarray]) -> torch.Tensor:
    """Rows of tokens as [B, T], padded on the right: causal attention never sees that, so no mask is needed."""
    inputs_BT = np.empty((len(inputs), max(map(len, inputs))), dtype=np.int64)
    for row, tokens in enumerate(inputs):
        inputs_BT[row, : len(tokens)] = tokens
        inputs_BT[row, len(tokens) :] = tokens[-1]
    return torch.from_numpy(inputs_BT)


def log_probs(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> np.ndarray:
    """``log_softmax`` in fp32 at the targets, without a second tensor of the logits' size.

    Raises:
        CheckpointError: they are not finite.
    """
    step = max(1, _LOGITS_AT_ONCE // logits_NV.shape[-1])
    parts = []
    for start in range(0, len(logits_NV), step):
        part_NV = logits_NV[start : start + step].float()
        parts.append(-nn.functional.cross_entropy(part_NV, targets_N[start : start + step], reduction="none"))
    logp_N: np.ndarray = torch.cat(parts).cpu().numpy()
    if not np.isfinite(logp_N).all():
        raise CheckpointError("the model's logits are not finite: its weights are broken, or too large for its dtype")
    return logp_N


@contextmanager
def head_at(model: Any, rows_N: torch.Tensor, places_N: torch.Tensor) -> Iterator[list[bool]]:
    """Lets the head see ``hidden[rows, places]`` as [1, N, D] only; the list is filled when it did.

    The head is a large part of a small model, and what the family does to its logits (scaling, soft caps) stays its
    own. transformers' ``logits_to_keep`` takes the same places of every row only.
    """
    done: list[bool] = []

    def narrow(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_BTD = args[0]
        done.append(True)
        if hasattr(module, "see_only"):  # a trunk of experts
            module.see_only(rows_N, places_N)
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


def check_tokens(model: Any, rows: Iterable[Sequence[int] | np.ndarray]) -> None:
    """Refuse tokens that the model has no embedding for; raises CheckpointError."""
    known = model.get_input_embeddings().weight.shape[0]
    greatest = max((int(np.max(row)) for row in rows if len(row)), default=0)
    if greatest >= known:
        raise CheckpointError(
            f"the tokenizer gives token {greatest}, but the model knows {known}: it is not the model's"
        )


def max_positions(config: Any) -> int | None:
    """Tokens that a model takes at most, by its config; None where the config does not say."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(positions) if isinstance(positions, int) and positions > 0 else None


def length_dependent(config: Any) -> bool:
    """Whether padding would change the shorter rows of a batch."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return any(kind.get("rope_type") in _LENGTH_DEPENDENT for kind in kinds)

"""Packed sequences as a model's inputs, so that the documents in them do not see each other.

transformers recognises packed documents by position ids that start again, if there is no attention mask and no cache.
Models that don't take the hint get a 4-D mask instead. Which of the two works is found out on the model itself.
Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from branchmix.errors import CompatibilityError

Packing = Literal["position_ids", "mask"]
_LENGTHS = (6, 9, 8)
"""Tokens of the documents of the probe."""


def collate(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Items of ``Sequences`` as one batch: [B, T] each, and ``domain`` [B]."""
    return {
        name: torch.stack([item[name] for item in items])
        if isinstance(items[0][name], torch.Tensor)
        else torch.tensor([item[name] for item in items])
        for name in items[0]
    }


def packed_inputs(batch: dict[str, torch.Tensor], how: Packing) -> dict[str, Any]:
    """Keyword arguments for the model's forward pass, without labels, from ``input_ids`` and ``position_ids`` [B, T].

    ``how`` is the model's ``packing_method``.
    """
    inputs: dict[str, Any] = {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "use_cache": False,  # with a cache, transformers takes the positions for those of a continuation
    }
    if how == "mask":
        inputs["attention_mask"] = block_mask(batch["position_ids"])
    return inputs


def block_mask(position_ids: torch.Tensor) -> torch.Tensor:
    """[B, 1, T, T] to add to attention scores: 0 where a token sees another, an earlier one of its piece or itself.

    In float32, which eager attention and SDPA take in every precision (a boolean one eager attention would add).
    """
    piece_BT = (position_ids == 0).cumsum(-1)
    seen_BTT = (piece_BT.unsqueeze(-1) == piece_BT.unsqueeze(-2)).tril()
    hidden = torch.finfo(torch.float32).min
    return torch.zeros(seen_BTT.shape, device=seen_BTT.device).masked_fill(~seen_BTT, hidden).unsqueeze(1)


def packing_method(model: Any) -> Packing:
    """How documents are kept apart in this model, found by trying; raises CompatibilityError if neither way works."""
    if isolates_documents(model):
        return "position_ids"
    if isolates_documents(model, "mask"):
        return "mask"
    raise CompatibilityError(
        [
            f"{model.config.model_type}: packed documents would see each other in this model (attention: "
            f"{model.config._attn_implementation}), with position ids and with a mask alike: train a family that has "
            "softmax attention alone and takes position ids"
        ]
    )


def isolates_documents(model: Any, how: Packing = "position_ids") -> bool:
    """Whether a document among others in a sequence gives the logits that it gives alone, whatever its neighbours are.

    Works for causal LMs on any device, in any floating-point type; leaves model and random numbers unchanged.
    """
    if how == "mask" and _has_windows(model.config):
        return False  # one mask for all layers would open the windows
    embeddings = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    documents = [
        torch.randint(0, embeddings.shape[0], (2, length), generator=generator).to(embeddings.device)
        for length in _LENGTHS
    ]
    documents[-1] = own_BT = documents[-1][:1].expand(2, -1)
    positions_T = torch.cat([torch.arange(length, device=embeddings.device) for length in _LENGTHS])
    batch = {"input_ids": torch.cat(documents, dim=1), "position_ids": positions_T.expand(2, -1)}
    with _undisturbed(model), torch.no_grad():
        try:
            packed_BTV = model(**packed_inputs(batch, how)).logits[:, -_LENGTHS[-1] :].float()
        except (TypeError, ValueError, IndexError, RuntimeError):
            return False  # it takes no positions, or no such mask
        alone_BTV = model(input_ids=own_BT[:1], use_cache=False).logits.float()
    # By the mean and not by the worst, which is a choice between two equally good experts. Neighbours leave no trace
    # at all, while one and the same document at another place is rounded differently.
    scale = alone_BTV.abs().mean()
    by_neighbours = (packed_BTV[0] - packed_BTV[1]).abs().mean() / scale
    by_place = (packed_BTV[0] - alone_BTV[0]).abs().mean() / scale
    half = embeddings.dtype in (torch.bfloat16, torch.float16)
    return bool(by_neighbours < (1e-3 if half else 1e-5)) and bool(by_place < (5e-2 if half else 1e-4))


def _has_windows(config: Any) -> bool:
    """Whether some layers see only the last so many tokens."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or []
    return bool(getattr(config, "sliding_window", None)) or any("full" not in k and "global" not in k for k in kinds)


@contextmanager
def _undisturbed(model: Any) -> Any:
    """Evaluation mode within the block; the modules' modes and the random numbers are restored after it."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode

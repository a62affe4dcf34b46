"""Checkpoint folders as tests look at them: all tensors, the config, and copies in another dtype."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

Tensors = dict[str, torch.Tensor]


def weights(folder: Path) -> Tensors:
    """The tensors of all shards."""
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def config(folder: Path) -> dict[str, Any]:
    """config.json."""
    return dict(json.loads((folder / "config.json").read_text()))


def same_bytes(ours: Tensors, theirs: Tensors) -> None:
    """Asserts the same names, dtypes, shapes and bits (so -0.0 is not 0.0)."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


def mean(tensors: list[torch.Tensor], shares: list[float] | None = None) -> torch.Tensor:
    """In fp64, rounded once: the correctly rounded mean."""
    weight = torch.tensor(shares or [1.0] * len(tensors), dtype=torch.float64)
    stacked = torch.stack([tensor.double() for tensor in tensors])
    total = (stacked * weight.view(-1, *[1] * tensors[0].dim())).sum(0) / weight.sum()
    return total.to(tensors[0].dtype)


def in_dtype(models: dict[str, Path], folder: Path, dtype: torch.dtype) -> dict[str, Path]:
    """The same models, stored in another dtype below ``folder``."""
    for name, path in models.items():
        AutoModelForCausalLM.from_pretrained(path, dtype=dtype).save_pretrained(folder / name)
    return {name: folder / name for name in models}


def ffn_expert(tensors: Tensors, number: int) -> Tensors:
    """FFN matrices of one expert in layer 0 by short name (families whose FFN is called ``mlp``)."""
    marker = f".0.mlp.experts.{number}."
    return {name.split(marker)[1]: value for name, value in tensors.items() if marker in name}

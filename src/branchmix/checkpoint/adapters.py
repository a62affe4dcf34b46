"""PEFT adapters: which folders are one, and which are a whole model with an adapter's files left in it.

One rule for every command: where there are a whole model's weights, they count and the adapter is not applied, for it
usually has been merged into them; where there are none, the folder is an adapter, also if it holds a config.json.
"""

from __future__ import annotations

from pathlib import Path

from branchmix.errors import CheckpointError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WHOLE = ("model.safetensors", "pytorch_model.bin")
"""Weights of a whole model, in one file; shards have an index beside them."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter instead of a model."""
    return (folder / ADAPTER_CONFIG).is_file() and not _has_weights(folder)


def left_over_adapter(folder: Path) -> str | None:
    """A note on a whole model's folder with an adapter's files in it."""
    if not (folder / ADAPTER_CONFIG).is_file() or not _has_weights(folder):
        return None
    return f"{folder}: an adapter's files ({ADAPTER_CONFIG}) lie beside the model's weights: they are ignored"


def refuse_adapter(folder: Path) -> None:
    """For commands that take whole models only: raises CheckpointError if the folder is an adapter."""
    if is_adapter(folder):
        raise CheckpointError(adapter_message(folder))


def adapter_message(folder: Path) -> str:
    """Why an adapter is refused where a whole model is wanted."""
    return f"{folder}: is a LoRA adapter folder, not a full checkpoint: merge it into its base model first"


def _has_weights(folder: Path) -> bool:
    return any((folder / f"{name}{kind}").is_file() for name in _WHOLE for kind in ("", ".index.json"))

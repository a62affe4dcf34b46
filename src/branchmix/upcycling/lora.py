"""PEFT LoRA adapters as experts: merged into their base model, by peft itself, before anything else happens."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from branchmix.checkpoint.folder import ADAPTER, beside
from branchmix.checkpoint.hub import ResolvedModel
from branchmix.checkpoint.index import CheckpointIndex, read_header
from branchmix.checkpoint.json_text import read_json
from branchmix.errors import CheckpointError
from branchmix.upcycling.sources import is_head


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter instead of a model."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def check_adapter(adapter: Path, seed: CheckpointIndex) -> None:
    """Refuse, from headers alone, an adapter that cannot be merged into the seed.

    Raises:
        CheckpointError: no LoRA, pickled weights, or trained on a model of other modules or sizes.
    """
    file = adapter / "adapter_config.json"
    try:
        settings = read_json(file)
        kind = settings.get("peft_type")
    except (ValueError, AttributeError):
        raise CheckpointError(f"{file}: not valid JSON: download the adapter again") from None
    if kind != "LORA":
        what = f"peft_type {kind}" if kind else "no peft_type"
        raise CheckpointError(f"{file}: has {what}, only LORA can be merged: merge the adapter yourself first")
    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        raise CheckpointError(f"{adapter}: has no {weights.name} (pickles are never loaded): save it as such")
    for ref in read_header(weights):
        module, lora, which = ref.name.removeprefix("base_model.model.").partition(".lora_")
        # Of a checkpoint of the base model alone, names lack the first part.
        target = seed.tensors.get(f"{module}.weight") or seed.tensors.get(f"{module.partition('.')[2]}.weight")
        if not lora or is_head(module):
            continue
        if target is None:
            raise CheckpointError(f"{weights}: adapts {module}, which the seed lacks: give the seed it was trained on")
        wide = {"A": ref.shape[-1], "B": ref.shape[0]}.get(which.split(".")[0])
        if wide is not None and wide not in target.shape:
            raise CheckpointError(
                f"{weights}: {ref.name} has shape {list(ref.shape)}, but the seed's {target.name} has "
                f"{list(target.shape)}: give the seed it was trained on"
            )


def merged_adapter(adapter: Path, seed: ResolvedModel, out: Path) -> Path:
    """Merge an adapter into the seed and save the result beside ``out``; the caller removes it.

    Args:
        adapter: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        seed: the model it was trained on.
        out: the output of the whole merge; the temporary folder lies on the same disk.

    Raises:
        CheckpointError: peft is not installed, or cannot merge it.
    """
    try:
        import peft
    except ImportError:
        raise CheckpointError(f"{adapter}: merging a LoRA adapter needs peft: pip install 'branchmix[lora]'") from None
    import torch

    from branchmix.likelihood.loading import load_language_model

    target = beside(Path(os.path.realpath(out)), ADAPTER)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # fp32, so that the low-rank update is added before anything is rounded.
        base = load_language_model(seed.folder, given=seed.given, dtype=torch.float32)
        merged = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload(safe_merge=True)
        merged.save_pretrained(target)
    except BaseException as error:
        shutil.rmtree(target, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"{adapter}: cannot be merged into the seed: {reason}") from error
    return target

"""PEFT LoRA adapters as experts: merged into their base model, by peft itself, before anything else happens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from branchmix.checkpoint.hub import ResolvedModel
from branchmix.errors import CheckpointError


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter instead of a model."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def merged_adapter(adapter: Path, seed: ResolvedModel, out: Path, *, dry_run: bool) -> Path:
    """Merge an adapter into the seed and save the result beside ``out``; the caller removes it.

    Args:
        adapter: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        seed: the model it was trained on.
        out: the output of the whole merge; the temporary folder lies on the same disk.
        dry_run: merge nothing and return the seed's folder, whose shapes are the merged model's.

    Raises:
        CheckpointError: no LoRA, pickled weights, or peft is not installed.
    """
    try:
        settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError:
        raise CheckpointError(f"{adapter / 'adapter_config.json'}: not valid JSON: download the adapter again") from None
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{adapter}: is a {settings.get('peft_type')} adapter, only LORA can be merged: merge it yourself first"
        )
    if not (adapter / "adapter_model.safetensors").is_file():
        raise CheckpointError(f"{adapter}: has no adapter_model.safetensors (pickles are never loaded): save it as such")
    if dry_run:
        return seed.folder
    try:
        import peft
    except ImportError:
        raise CheckpointError(f"{adapter}: merging a LoRA adapter needs peft: pip install 'branchmix[lora]'") from None
    import torch
    from transformers import AutoModelForCausalLM

    target = out.absolute().parent / f".{out.name}.merged-{adapter.name}"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    try:
        # fp32, so that the low-rank update is added before anything is rounded.
        base = AutoModelForCausalLM.from_pretrained(seed.folder, dtype=torch.float32)
        merged = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload(safe_merge=True)
        merged.save_pretrained(target)
    except (ValueError, RuntimeError, KeyError) as error:
        shutil.rmtree(target, ignore_errors=True)
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{adapter}: cannot be merged into the seed: {reason}") from None
    return target

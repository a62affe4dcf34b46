"""Dense models that are LoRA adapters: the model they were trained on, with PEFT's modules in it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from branchmix.checkpoint.companions import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_message, is_adapter
from branchmix.checkpoint.hub import ResolvedModel, resolve
from branchmix.checkpoint.index import read_header, read_json_object
from branchmix.errors import CheckpointError


def lora_settings(adapter: Path) -> dict[str, Any]:
    """What adapter_config.json says.

    Raises:
        CheckpointError: it is not a LoRA adapter, or its weights are pickled.
    """
    file = adapter / ADAPTER_CONFIG
    settings = read_json_object(file)
    kind = settings.get("peft_type")
    if kind != "LORA":
        what = f"peft_type {kind}" if kind else "no peft_type"
        raise CheckpointError(f"{file}: has {what}, only LORA is supported: merge the adapter yourself first")
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(f"{adapter}: has no {ADAPTER_WEIGHTS} (pickles are never loaded): save it as such")
    return settings


def require_peft(adapter: Path) -> None:
    """Raises CheckpointError if PEFT, which an adapter needs, is not installed."""
    if find_spec("peft") is None:
        raise CheckpointError(f"{adapter}: a LoRA adapter needs peft: pip install 'branchmix[lora]'")


def base_of(adapter: Path) -> ResolvedModel:
    """The model that a LoRA adapter was trained on, as the adapter names it.

    Raises:
        CheckpointError: it is not a LoRA adapter, or its base model is not there, or is an adapter too.
    """
    settings, key = lora_settings(adapter), f"{adapter / ADAPTER_CONFIG}: base_model_name_or_path"
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{key} is missing: write the model there that the adapter was trained on")
    try:
        base = resolve(name if revision is None or Path(name).exists() else f"{name}@{revision}")
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from error
    if is_adapter(base.folder):
        raise CheckpointError(f"{key}: {adapter_message(base.folder)}")
    return base


def put_on(base: Any, adapter: Path) -> Any:
    """The adapter's PEFT model, whose modules take their places in ``base``: from then on, that computes with them.

    Raises:
        CheckpointError: PEFT leaves some of the adapter's matrices out, of which it would only warn.
    """
    import peft

    names = {ref.name for ref in read_header(adapter / ADAPTER_WEIGHTS) if ".lora_" in ref.name}
    adapted = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names}
    has_all = adapted <= {name for name, _ in base.named_modules()}
    tuned = peft.PeftModel.from_pretrained(base if has_all else base.base_model, adapter)  # trained without the head
    if left_out := sorted(names - peft.get_peft_model_state_dict(tuned, save_embedding_layers=False).keys()):
        raise CheckpointError(f"PEFT finds no place for {left_out[0]}: give the model it was trained on")
    return tuned

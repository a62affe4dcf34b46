"""What lies beside a checkpoint's weights: tokenizer, configs as they may be shared, licence, left-over adapters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from branchmix.checkpoint.json_text import json_document, read_json
from branchmix.errors import CheckpointError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a tokenizer may be made of, in the Hugging Face layout."""
TEMPLATES = "additional_chat_templates"
"""The folder of further chat templates (``*.jinja``), which belongs to a tokenizer too."""


def tokenizer_files(folder: Path) -> list[str]:
    """Files of a folder's tokenizer, as paths below the folder."""
    templates = sorted(file.name for file in (folder / TEMPLATES).glob("*.jinja") if file.is_file())
    present = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return [*present, *(f"{TEMPLATES}/{name}" for name in templates)]


# ---- Configs that can be shared: without local paths, and without names of other people's code ----

CODE = "auto_map"
"""Key of configs that names the Python classes to load a model or its tokenizer with."""
AUTO_MAP = {
    "AutoConfig": "configuration_branchmix.BranchMixConfig",
    "AutoModel": "modeling_branchmix.BranchMixModel",
    "AutoModelForCausalLM": "modeling_branchmix.BranchMixForCausalLM",
}
"""The ``auto_map`` of mixtures, as in ``configuration_branchmix``, which needs torch."""
_PRIVATE = frozenset({"_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file", CODE})


def shareable(config: Any) -> Any:
    """The content of a config.json or tokenizer_config.json as it may be published.

    It loses the paths it was loaded from, nested ones too, and names all Python code but our own, saved with mixtures:
    files of a source are never copied, so that nobody publishes other people's code under their own name.
    """
    kept = _published(config)
    is_mixture = isinstance(kept, dict) and kept.get("model_type") == "branchmix"
    return {**kept, CODE: AUTO_MAP} if is_mixture else kept


def _published(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _published(inner) for key, inner in value.items() if key not in _PRIVATE}
    return [_published(inner) for inner in value] if isinstance(value, list) else value


def rewritten(file: Path) -> bytes | None:
    """The shareable content of a checkpoint's file; None if that is no different, and the file may be copied."""
    if file.name not in ("config.json", "tokenizer_config.json") or not file.is_file():
        return None
    try:
        content = read_json(file)
    except ValueError:  # not JSON, which its readers will report
        return None
    kept = shareable(content)
    return None if kept == content else json_document(kept, allow_nan=True).encode()


# ---- The licence, by the model card's metadata or else a LICENSE file ----

_FIRST_LINES = {
    "apache license": "apache-2.0",
    "mit license": "mit",
    "bsd 3-clause": "bsd-3-clause",
    "creative commons attribution 4.0": "cc-by-4.0",
    "gnu general public license": "gpl-3.0",
    "llama 2 community": "llama2",
    "llama 3 community": "llama3",
    "gemma terms of use": "gemma",
}


def licence_of_folder(folder: Path) -> str | None:
    """The Hub's name of a checkpoint's licence; ``see its FILE`` for an unknown text; None if no file names one."""
    licence = metadata_of(_text(folder / "README.md")).get("license")
    if isinstance(licence, str):
        return licence
    for file in sorted(folder.glob("LICENSE*")):
        if file.is_file():  # LICENSES may be a folder of texts, none of which is said to be the model's
            start = _text(file)[:2000].lower()
            return next((name for line, name in _FIRST_LINES.items() if line in start), f"see its {file.name}")
    return None


def metadata_of(readme: str) -> dict[str, Any]:
    """The YAML between the first two lines of dashes of a model card."""
    import yaml

    front = re.match(r"---\s*\n(.*?)\n---", readme, re.DOTALL)
    try:
        metadata = yaml.safe_load(front.group(1)) if front else None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError):
        return {}  # PyYAML raises all of these for text that is not what its tags or its form say
    return metadata if isinstance(metadata, dict) else {}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# ---- PEFT adapters. One rule for every command: where there are a whole model's weights, they count and the adapter is
# not applied, for it usually has been merged into them; where there are none, the folder is an adapter, even with a
# config.json. ----

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

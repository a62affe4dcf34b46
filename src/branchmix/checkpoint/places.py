"""Where the files once lay: transformers notes it in what it saves, and nobody who gets a model needs to know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from branchmix.checkpoint.json_text import read_json

_KEYS = frozenset({"_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file"})
_NOTED_IN = ("config.json", "tokenizer_config.json")


def without_places(config: Any) -> Any:
    """A config without the paths it was loaded from; nested ones lose theirs too.

    Args:
        config: content of a config.json or a tokenizer_config.json.
    """
    if isinstance(config, dict):
        return {key: without_places(value) for key, value in config.items() if key not in _KEYS}
    if isinstance(config, list):
        return [without_places(value) for value in config]
    return config


def rewritten(file: Path) -> bytes | None:
    """The file without those paths; None where it holds none, so that it may be copied as it is.

    Args:
        file: any file of a checkpoint.
    """
    if file.name not in _NOTED_IN:
        return None
    try:
        content = read_json(file)
    except ValueError:  # no JSON: whoever reads it for its content tells that
        return None
    kept = without_places(content)
    return None if kept == content else (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()

"""Configs that can be shared: without local paths, and without names of other people's code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from branchmix.checkpoint.json_text import json_document, read_json

_PATH_KEYS = frozenset({"_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file"})
_NOTED_IN = ("config.json", "tokenizer_config.json")
CODE = "auto_map"
"""Key of configs that names the Python classes to load a model or its tokenizer with."""
AUTO_MAP = {
    "AutoConfig": "configuration_branchmix.BranchMixConfig",
    "AutoModel": "modeling_branchmix.BranchMixModel",
    "AutoModelForCausalLM": "modeling_branchmix.BranchMixForCausalLM",
}
"""The ``auto_map`` of mixtures, as in ``configuration_branchmix``, which needs torch."""


def without_local_paths(config: Any) -> Any:
    """The content of a config.json or tokenizer_config.json without the paths it was loaded from, nested ones too."""
    return _without(_PATH_KEYS, config)


def _without(keys: frozenset[str], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(keys, inner) for key, inner in value.items() if key not in keys}
    if isinstance(value, list):
        return [_without(keys, inner) for inner in value]
    return value


def with_own_code(config: Any) -> Any:
    """The content of a config.json or tokenizer_config.json that names only our own Python code, saved with mixtures.

    Python files of a source are never copied, so that nobody publishes other people's code under their own name; names
    of such code, in the folder or on the Hub, are removed too.
    """
    kept = _without(frozenset({CODE}), config)
    is_mixture = isinstance(kept, dict) and kept.get("model_type") == "branchmix"
    return {**kept, CODE: AUTO_MAP} if is_mixture else kept


def rewritten(file: Path) -> bytes | None:
    """The content of a checkpoint's file without paths and names of code; None if it has none and may be copied."""
    if file.name not in _NOTED_IN or not file.is_file():
        return None
    try:
        content = read_json(file)
    except ValueError:  # not JSON, which its readers will report
        return None
    kept = with_own_code(without_local_paths(content))
    return None if kept == content else json_document(kept, allow_nan=True).encode()

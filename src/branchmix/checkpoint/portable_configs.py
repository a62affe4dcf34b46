"""What model files note and what does not travel with them: where they lay, and whose code they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from branchmix.checkpoint.json_text import read_json

_KEYS = frozenset({"_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file"})
_NOTED_IN = ("config.json", "tokenizer_config.json")
CODE = "auto_map"
"""Key of configs that names the Python classes to load a model or its tokenizer with."""
AUTO_MAP = {
    "AutoConfig": "configuration_branchmix.BranchMixConfig",
    "AutoModel": "modeling_branchmix.BranchMixModel",
    "AutoModelForCausalLM": "modeling_branchmix.BranchMixForCausalLM",
}
"""Of mixtures, as in ``configuration_branchmix``, which only torch users import."""


def without_places(config: Any) -> Any:
    """A config without the paths it was loaded from; nested ones lose theirs too.

    Args:
        config: content of a config.json or a tokenizer_config.json.
    """
    return _without(_KEYS, config)


def _without(keys: frozenset[str], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(keys, inner) for key, inner in value.items() if key not in keys}
    if isinstance(value, list):
        return [_without(keys, inner) for inner in value]
    return value


def with_own_code(config: Any) -> Any:
    """A config that names no Python code but ours, which comes along with mixtures.

    Python files of a source are never copied, so that nobody spreads code of others under a name of their own; a name
    of such code, in the folder or on the Hub, stays behind with it.

    Args:
        config: content of a config.json or a tokenizer_config.json.
    """
    kept = _without(frozenset({CODE}), config)
    is_mixture = isinstance(kept, dict) and kept.get("model_type") == "branchmix"
    return {**kept, CODE: AUTO_MAP} if is_mixture else kept


def rewritten(file: Path) -> bytes | None:
    """The file without those paths and without names of code; None where it holds none: then it may be copied.

    Args:
        file: any file of a checkpoint.
    """
    if file.name not in _NOTED_IN or not file.is_file():
        return None
    try:
        content = read_json(file)
    except ValueError:  # no JSON: whoever reads it for its content tells that
        return None
    kept = with_own_code(without_places(content))
    return None if kept == content else (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()

"""A checkpoint's licence according to its own files: the model card's metadata, or else a LICENSE file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

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

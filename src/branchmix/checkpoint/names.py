"""Names that files bring along and that become names on a disk: one rule, so that none leaves its folder."""

from __future__ import annotations

import os
import re

_PLAIN = re.compile(r"\w[\w.+-]*")
_MOST_BYTES = 100
"""File systems take 255; endings, numbers and names of temporary files come on top."""
PLAIN = "letters, digits, -, _, . and +, at most 100"
EXPERT = "letters, digits, -, _ and ., at most 100"


def is_file_name(name: str) -> bool:
    """Whether a name may become that of a new file or folder: letters, digits, ``-``, ``_``, ``.`` and ``+``."""
    return _PLAIN.fullmatch(name) is not None and len(name.encode()) <= _MOST_BYTES


def is_expert_name(name: str) -> bool:
    """The same for experts, whose names other programs read too: ASCII without ``+``, a letter or digit first."""
    return is_file_name(name) and name.isascii() and "+" not in name and name[0] != "_"


def is_entry(name: str) -> bool:
    """Whether a name can be that of a file which somebody else put directly into a folder, whatever its letters."""
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return 0 < len(encoded) <= 255 and not set(name) & {"/", "\\", "\0"} and name not in (".", "..")

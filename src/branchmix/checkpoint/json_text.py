"""The one reader of JSON that others wrote, and the one form of JSON that we write.

Python's own reader accepts numbers of 4,300 digits, half surrogates and lists a thousand deep, all of which fail later
and elsewhere: in a conversion to float, in writing, in whatever walks through the value. Here they are not JSON.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MAX_BYTES = 100_000_000
"""Largest file; the largest tokenizers have a third of it."""
MAX_DEPTH = 100
MAX_DIGITS = 100
"""Digits of the longest whole number: it can still be converted to a float."""

_LONG_NUMBER = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(raw: bytes | str) -> Any:
    """The value of a JSON text, or of bytes in UTF-8, UTF-16 or UTF-32.

    Raises ValueError if it is not JSON, is nested deeper than ``MAX_DEPTH``, or has a number or character of no use.
    """
    if isinstance(raw, bytes):
        raw = raw.decode(json.detect_encoding(raw))
    try:
        value = json.loads(raw, parse_int=_whole_number if _LONG_NUMBER.search(raw) else None)
        too_deep = raw.count("[") + raw.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH
    except RecursionError:
        too_deep = True
    if too_deep:
        raise ValueError(f"lists or objects are nested more than {MAX_DEPTH} deep")
    if _SURROGATE.search(raw):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_json(file: Path) -> Any:
    """The value of a JSON file.

    Raises OSError if it cannot be read, and ValueError as ``parse_json`` or if it is larger than ``MAX_BYTES``.
    """
    with file.open("rb") as stream:
        raw = stream.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
    return parse_json(raw)


def read_object(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no such file, or something else in it."""
    try:
        content = read_json(file)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def json_document(content: Any, *, allow_nan: bool = False) -> str:
    """The text of a JSON file, for programs and people."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n"


def key_of(content: Any) -> str:
    """A short name for JSON that a result depends on."""
    from xxhash import xxh3_128_hexdigest

    return str(xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode()))


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"there is a whole number of {len(digits):,} digits")
    return int(digits)


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(_depth, inner), default=0) if isinstance(value, dict | list) else 0

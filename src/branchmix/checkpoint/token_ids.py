"""The id of every token, read from a tokenizer's files without loading the tokenizer.

A vocabulary (tokenizer.json, vocab.json or a sentencepiece tokenizer.model), then tokens added to it, which may be
noted in tokenizer.json itself, in tokenizer_config.json (``added_tokens_decoder``), in added_tokens.json, or only as a
special token's name. A token that the vocabulary lacks gets the next free id, whatever id its note says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from branchmix.checkpoint.json_text import read_json
from branchmix.errors import CheckpointError

VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")
"""Where the vocabulary is, the first that is there."""
FILES = (*VOCABULARIES, "merges.txt", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
"""All that ids depend on."""

_NO_TOKENIZER = (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError)
"""What reading the parts of a tokenizer's file raises where it is something else."""
_BROKEN = "is not a tokenizer file: download it again"


@dataclass(frozen=True)
class TokenIds:
    """A tokenizer's tokens."""

    ids: dict[str, int]
    merges: list[str] | None
    """Rules of a BPE, if the files list them."""
    agreed: bool
    """All notes give a token the same id, so that this is the id by any loader's rules."""


def vocabulary_of(folder: Path) -> Path | None:
    """The file with a tokenizer's vocabulary."""
    return next((folder / name for name in VOCABULARIES if (folder / name).is_file()), None)


def token_ids(folder: Path) -> TokenIds | None:
    """All tokens of a folder's tokenizer; None for a vocabulary of unknown form, CheckpointError for a damaged file."""
    file = vocabulary_of(folder)
    if file is None:
        return None
    own: dict[str, int] = {}
    merges: list[str] | None = None
    try:
        if file.name == "tokenizer.json":
            content = read_json(file)
            entries, rules = content["model"].get("vocab", {}), content["model"].get("merges") or []
            if isinstance(entries, list):  # unigram: [token, score] by id
                entries = {entry[0]: number for number, entry in enumerate(entries)}
            vocabulary = {str(token): int(number) for token, number in entries.items()}
            merges = [rule if isinstance(rule, str) else " ".join(rule) for rule in rules]
            own = {str(token["content"]): int(token["id"]) for token in content.get("added_tokens", [])}
        elif file.name == "vocab.json":
            vocabulary = {str(token): int(number) for token, number in read_json(file).items()}
            text = folder / "merges.txt"
            lines = text.read_text(encoding="utf-8").splitlines() if text.is_file() else []
            merges = [line for line in lines if line and not line.startswith("#version")]
        else:
            pieces = sentencepieces(file.read_bytes())
            if pieces is None:
                return None
            vocabulary = {piece: number for number, piece in enumerate(pieces)}
    except _NO_TOKENIZER:
        raise CheckpointError(f"{file}: {_BROKEN}") from None
    ids, agreed = {**vocabulary, **own}, True
    free = max(len(vocabulary), *(number + 1 for number in own.values()), 0)
    for token, noted in added_tokens(folder):
        if token not in ids:
            ids[token], free = free, free + 1
            agreed &= noted is not None  # by its name alone: some loaders add it, some do not
        agreed &= noted in (None, ids[token])
    return TokenIds(ids, merges, agreed)


def added_tokens(folder: Path) -> list[tuple[str, int | None]]:
    """Tokens noted outside the vocabulary's file, in the order in which they are added, with the ids noted.

    Raises CheckpointError for a damaged file.
    """
    settings = _read(folder / "tokenizer_config.json")
    try:
        noted = {int(number): _text(token) for number, token in (settings.get("added_tokens_decoder") or {}).items()}
        named = list(_named(settings))
        if "added_tokens_decoder" not in settings:  # else these two files are not read
            noted = {int(number): str(token) for token, number in _read(folder / "added_tokens.json").items()}
            named += _named(_read(folder / "special_tokens_map.json"))
    except _NO_TOKENIZER:
        raise CheckpointError(
            f"{folder}: the added tokens of its tokenizer cannot be read: download it again"
        ) from None
    return [*((noted[number], number) for number in sorted(noted)), *((token, None) for token in named)]


def _named(settings: dict[str, Any]) -> Iterator[str]:
    """Special tokens, by their names in a tokenizer's settings."""
    for key, value in settings.items():
        if key.endswith("_token") and value is not None and not isinstance(value, bool):
            yield _text(value)
    for key in ("extra_special_tokens", "additional_special_tokens"):
        listed = settings.get(key) or []
        yield from map(_text, listed.values() if isinstance(listed, dict) else listed)


def _text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return dict(read_json(file))
    except _NO_TOKENIZER:
        raise CheckpointError(f"{file}: {_BROKEN}") from None


def sentencepieces(model: bytes) -> list[str] | None:
    """The pieces of a sentencepiece model in the order of their ids; None if it is something else.

    The model is a serialised ``ModelProto``: its field 1 is a piece, whose field 1 is the text.
    """
    try:
        pieces = [dict(_fields(piece)) for field, piece in _fields(model) if field == 1 and isinstance(piece, bytes)]
        return [str(piece[1], "utf-8") for piece in pieces] or None  # type: ignore[arg-type]
    except (ValueError, LookupError, TypeError, OverflowError):
        return None


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Number and value of each field of a protocol buffer message; ValueError or LookupError if it is not one."""
    stream = BytesIO(message)
    while stream.tell() < len(message):
        tag = _varint(stream)
        if tag & 7 == 0:
            yield tag >> 3, _varint(stream)
            continue
        size = _varint(stream) if tag & 7 == 2 else {1: 8, 5: 4}[tag & 7]
        value = stream.read(size)
        if len(value) < size:
            raise ValueError("cut off")
        yield tag >> 3, value


def _varint(stream: BytesIO) -> int:
    value = 0
    for shift in range(0, 64, 7):
        byte = stream.read(1)[0]
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError("not a varint")

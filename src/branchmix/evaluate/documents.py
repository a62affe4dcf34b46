"""The documents of an evaluation: those that training holds out, chosen by the same rule, each known by its content."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from branchmix.checkpoint.text import whole_characters
from branchmix.data.evaluation import EvalData, Selection
from branchmix.data.sources import documents as documents_of
from branchmix.data.sources import hash_of, is_held_out
from branchmix.errors import DataError
from branchmix.likelihood.models import encode


@dataclass(frozen=True)
class Document:
    """A text and the hash that its results are kept under."""

    text: str
    hash: str
    """XXH3 of 128 bits."""
    replaced: bool = False
    """Whether something in it was not a character (see ``whole_characters``)."""

    @classmethod
    def of(cls, given: str, *, replaced: bool = False) -> Document:
        from xxhash import xxh3_128_hexdigest

        text = whole_characters(given)
        return cls(text, xxh3_128_hexdigest(text.encode()), replaced or text is not given)


def select(config: EvalData, tokenizer: Any, *, limit: int | None = None) -> dict[str, list[Document]]:
    """The documents of each domain, each text once.

    Training takes held-out documents in the order of their hashes until there are ``tokens`` of them, and so does this:
    for local files they are the same ones. Of a stream, the first ones that are held out are taken, instead of reading
    all of it; training never sees them either.

    Args:
        config: sources and selection.
        tokenizer: counts tokens as training does, for ``held_out.tokens``.
        limit: documents of a domain at most.

    Raises:
        DataError: a source cannot be read or has no document that counts.
    """
    found: dict[str, list[Document]] = {}
    for name, source in config.data.items():
        replaced: set[int] = set()
        texts = documents_of(source, folder=config.folder, replaced=replaced)
        if config.held_out == "all":
            chosen = _distinct(texts)
        else:
            streamed = source.hub is not None and source.streaming
            chosen = _held_out(texts, config.held_out, tokenizer, in_order=streamed)
        found[name] = []
        for text in chosen:
            if limit is not None and len(found[name]) >= limit:
                break
            found[name].append(Document.of(text, replaced=bool(replaced) and hash_of(text) in replaced))
        if not found[name]:
            raise DataError(
                f"data.{name}: has no document to evaluate on: is there any text, or held_out.share too small?"
            )
    return found


def _distinct(texts: Iterable[str]) -> Iterator[str]:
    seen: set[int] = set()
    for text in texts:
        if (key := hash_of(text)) not in seen:
            seen.add(key)
            yield text


def _held_out(texts: Iterable[str], selection: Selection, tokenizer: Any, *, in_order: bool) -> Iterator[str]:
    """Held-out documents up to what is selected, but at least one."""
    held_out = _distinct_held_out(texts, selection.share) if in_order else _by_hash(texts, selection.share)
    total = 0
    for count, text in enumerate(held_out):
        if selection.tokens is not None:
            tokens = _training_tokens(tokenizer, text)
            if total and total + tokens > selection.tokens:
                return
            total += tokens
        if count == selection.documents:
            return
        yield text


def _distinct_held_out(texts: Iterable[str], share: float) -> Iterator[str]:
    return _distinct(text for text in texts if is_held_out(text, share))


def _by_hash(texts: Iterable[str], share: float) -> list[str]:
    """All held-out texts in the order of their hashes; if there is none, the one that training holds out then."""
    held: dict[int, str] = {}
    lowest: tuple[int, str] | None = None
    several = False
    for text in texts:
        key = hash_of(text)
        if is_held_out(text, share):
            held[key] = text
        elif not held:
            several |= lowest is not None and key != lowest[0]
            if lowest is None or key < lowest[0]:
                lowest = (key, text)
    if not held and lowest is not None and several and share > 0:
        return [lowest[1]]
    return [held[key] for key in sorted(held)]


def _training_tokens(tokenizer: Any, text: str) -> int:
    """Tokens of a document in training: with the tokenizer's special ones, and EOS at the end."""
    (tokens,) = encode(tokenizer, [text], special=True)
    eos = tokenizer.eos_token_id
    return len(tokens) + (eos is not None and tokens[-1:].tolist() != [eos])

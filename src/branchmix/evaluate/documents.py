"""The documents of an evaluation: the YAML file of ``--data``, and the documents that it selects, by content."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from xxhash import xxh3_128_hexdigest

from branchmix.checkpoint.text import replaced_note, whole_characters
from branchmix.data.config import EvalData, Selection
from branchmix.data.corpus import up_to
from branchmix.data.sources import documents as documents_of
from branchmix.data.sources import hash_of, held_out_among, is_held_out, naming_domain
from branchmix.errors import DataError
from branchmix.likelihood.models import encode


@dataclass(frozen=True)
class HashedDocument:
    """A text and the hash that its results are kept under."""

    text: str
    hash: str
    """XXH3 of 128 bits."""
    replaced: bool = False
    """Whether something in it was not a character (see ``whole_characters``)."""

    @classmethod
    def of(cls, given: str, *, replaced: bool = False) -> HashedDocument:
        text = whole_characters(given)
        return cls(text, xxh3_128_hexdigest(text.encode()), replaced or text is not given)


def select(config: EvalData, tokenizer: Any, *, limit: int | None = None) -> dict[str, list[HashedDocument]]:
    """The documents of each domain, each text once.

    Training takes held-out documents in the order of their hashes until there are ``tokens`` of them, and so does this:
    for local files they are the same ones. Of a stream, the first ones that are held out are taken, instead of reading
    all of it; training never sees them either. The tokenizer counts tokens as training does, for ``held_out.tokens``;
    a domain has at most ``limit`` documents.

    Raises:
        DataError: a source cannot be read or has no document that counts.
    """
    chosen: dict[str, list[HashedDocument]] = {}
    for name, source in config.data.items():
        replaced: set[int] = set()
        texts = documents_of(source, folder=config.folder, replaced=replaced)
        with naming_domain(name):
            if config.held_out == "all":
                texts = _distinct(texts)
            else:
                streamed = source.hub is not None and source.streaming
                texts = _held_out(texts, config.held_out, tokenizer, in_order=streamed)
            chosen[name] = [
                HashedDocument.of(text, replaced=bool(replaced) and hash_of(text) in replaced)
                for text in islice(texts, limit)
            ]
        if not chosen[name]:
            raise DataError(
                f"data.{name}: has no document to evaluate on: is there any text, or held_out.share too small?"
            )
    return chosen


def replaced_notes(documents: dict[str, list[HashedDocument]]) -> list[str]:
    """What to tell users of the domains in which something was not a character."""
    counts = {name: sum(document.replaced for document in chosen) for name, chosen in documents.items()}
    return [f"{name}: {replaced_note(count)}" for name, count in counts.items() if count]


def _distinct(texts: Iterable[str]) -> Iterator[str]:
    seen: set[int] = set()
    for text in texts:
        if (key := hash_of(text)) not in seen:
            seen.add(key)
            yield text


def _held_out(texts: Iterable[str], selection: Selection, tokenizer: Any, *, in_order: bool) -> Iterator[str]:
    """Held-out documents up to what is selected."""
    share = selection.share
    held_out = _distinct(t for t in texts if is_held_out(t, share)) if in_order else _by_hash(texts, share)
    if selection.tokens is not None:
        held_out = up_to(selection.tokens, ((_training_tokens(tokenizer, text), text) for text in held_out))
    return islice(held_out, selection.documents)


def _by_hash(texts: Iterable[str], share: float) -> Iterator[str]:
    """All held-out texts in the order of their hashes."""
    hashes: set[int] = set()
    kept: dict[int, str] = {}
    lowest = 2**64
    for text in texts:
        key = hash_of(text)
        hashes.add(key)
        lowest = min(lowest, key)
        if key == lowest or is_held_out(text, share):
            kept[key] = text
    return (kept[key] for key in sorted(held_out_among(hashes, share)))


def _training_tokens(tokenizer: Any, text: str) -> int:
    """Tokens of a document in training: with the tokenizer's special ones, and EOS at the end."""
    (tokens,) = encode(tokenizer, [text], special=True)
    eos = tokenizer.eos_token_id
    return len(tokens) + (eos is not None and tokens[-1:].tolist() != [eos])

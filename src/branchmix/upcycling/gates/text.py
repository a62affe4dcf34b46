"""Documents to fit gates on: of every domain some, chosen by the hash of their text, and none that is held out.

Held-out documents are those of lowest hashes; the fit reads those of highest hashes, so it is also a random choice.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from branchmix.data.config import EvalData
from branchmix.data.sources import documents as documents_of
from branchmix.data.sources import hash_of, held_out_among, is_held_out, naming_domain
from branchmix.errors import CheckpointError, DataError, RecipeError
from branchmix.likelihood.models import encode
from branchmix.upcycling.plan import Progress

COUNTED_TOKENS = 1_000_000
"""Tokens of a domain that are counted, at most: counting takes seconds, and similar domains differ in rare tokens."""
CHECKED_TOKENS = 10_000
"""About as many of them are counted last: on these, the posterior's parameters are chosen."""
MEASURED_TOKENS = 2_000
"""Further tokens of a domain, on which the experts' losses are measured, what the time goes to; checked as well."""
MEASURED_PIECE = 256
"""Tokens of a document that are measured, so that there are about ten documents."""
LEAST_TOKENS = 200
"""A domain with less text is refused."""
PIECE = 512
"""Tokens of a document that are used while there are enough documents."""
STREAMED_DOCUMENTS = 500
"""Documents of a stream that are read, or more if they are short."""
_MOST_TOKENS = COUNTED_TOKENS + MEASURED_TOKENS
_CHARACTERS = 8
"""Characters that a token has at most, as a rule: so much text is kept for each token that is wanted."""


@dataclass(frozen=True)
class DomainText:
    """Token ids of one domain."""

    counted: list[np.ndarray]
    """Documents whose tokens are counted."""
    checked: list[np.ndarray]
    """Those of them that are not counted yet when the posterior's parameters are chosen."""
    measured: list[np.ndarray]
    """The beginnings of other documents, of at most ``MEASURED_PIECE`` tokens each."""
    around: frozenset[int] = frozenset()
    """Tokens that the tokenizer puts around every text. They are not counted, or they would speak for the domain with
    the shortest documents."""


def read(config: EvalData, tokenizer: Any, progress: Progress | None = None) -> dict[str, DomainText]:
    """The text of each domain, in tokens of the mixture's tokenizer.

    Raises:
        RecipeError: every document is held out.
        DataError: a source cannot be read, or a domain has too little text.
    """
    if config.held_out == "all":
        raise RecipeError(
            "held_out: all leaves no document to fit gates on: leave it out, or give held_out: {share: 0.1}"
        )
    share, around = config.held_out.share, frozenset(encode(tokenizer, [""], special=True)[0].tolist())
    found = {}
    for number, (name, source) in enumerate(config.data.items()):
        if progress is not None:
            progress("reading text", number, len(config.data))
        texts = documents_of(source, folder=config.folder)
        streamed = source.hub is not None and source.streaming
        with naming_domain(name):
            chosen = _chosen(texts, share, streamed=streamed)
        found[name] = replace(_split(_tokens(chosen, tokenizer)), around=around)
        if (count := sum(map(len, found[name].counted))) < LEAST_TOKENS:
            raise DataError(
                f"data.{name}: has only {count} tokens that are not held out, and gates need {LEAST_TOKENS} or more: "
                "give more text, or a smaller held_out.share"
            )
        if not found[name].measured:
            raise DataError(
                f"data.{name}: its documents have a single token each, and a token is predicted from those before it: "
                "give longer documents"
            )
    return found


def require_known_tokens(text: Mapping[str, DomainText], vocab_size: int, given: str) -> None:
    """Raises CheckpointError where the tokenizer of the model ``given`` gives tokens that have no embedding."""
    largest = max(int(tokens.max()) for found in text.values() for tokens in (*found.counted, *found.measured))
    if largest >= vocab_size:
        raise CheckpointError(
            f"{given}: the tokenizer gives token {largest:,}, but the model has only {vocab_size:,} "
            "embeddings: give the folder its own tokenizer"
        )


def _chosen(texts: Iterable[str], share: float, *, streamed: bool) -> list[str]:
    """Distinct documents that are not held out, cut to a length at which there are enough characters but not twice as
    many: down to that of a piece, and then those of lowest hashes are left out. Of a stream, the first ones."""
    wanted, least = _MOST_TOKENS * _CHARACTERS, PIECE * _CHARACTERS
    limit, characters = wanted, 0  # of a document, and of all that are kept
    kept: list[tuple[int, str]] = []  # a heap
    seen: set[int] = set()
    for text in texts:
        key = hash_of(text)
        if key in seen:
            continue
        seen.add(key)
        if is_held_out(text, share):
            continue
        heapq.heappush(kept, (key, text[:limit]))
        characters += min(len(text), limit)
        while characters >= 2 * wanted and limit > least:
            limit = max(limit // 2, least)
            kept = [(key, text[:limit]) for key, text in kept]
            characters = sum(len(text) for _, text in kept)
        while limit == least and characters - len(kept[0][1]) >= wanted:
            characters -= len(heapq.heappop(kept)[1])
        if streamed and len(kept) >= STREAMED_DOCUMENTS and characters >= wanted:
            break
    held_out = held_out_among(seen, share)
    return [text for key, text in sorted(kept, reverse=True) if key not in held_out]


def _tokens(texts: list[str], tokenizer: Any) -> list[np.ndarray]:
    """The beginnings of all documents, so long that there are enough tokens if the documents have them."""
    encoded = [tokens for tokens in encode(tokenizer, texts, special=True) if len(tokens)]
    length = PIECE
    while sum(min(len(tokens), length) for tokens in encoded) < _MOST_TOKENS and any(len(t) > length for t in encoded):
        length *= 2
    return [tokens[:length] for tokens in encoded]


def _split(documents: list[np.ndarray]) -> DomainText:
    """One of four is measured and one checked, until that is enough; few long documents are cut into pieces first, be
    they among many tiny ones."""
    predicted = sum(len(tokens) - 1 for tokens in documents[1::4])
    if len(documents) < 8 or predicted < LEAST_TOKENS // 4:
        sizes = [min(PIECE, max(16, len(tokens) // 8)) for tokens in documents]
        whole = zip(documents, sizes, strict=True)
        documents = [tokens[start : start + n] for tokens, n in whole for start in range(0, len(tokens), n)]
    text = DomainText([], [], [])
    counted = checked = measured = 0
    for number, tokens in enumerate(documents):
        if number % 4 == 1 and measured < MEASURED_TOKENS:
            piece = tokens[: min(MEASURED_PIECE, MEASURED_TOKENS - measured)]
            if len(piece) > 1:  # a single token predicts nothing
                text.measured.append(piece)
                measured += len(piece)
        elif counted < COUNTED_TOKENS:
            text.counted.append(tokens[: COUNTED_TOKENS - counted])
            counted += len(text.counted[-1])
            if number % 4 == 3 and checked < CHECKED_TOKENS:
                text.checked.append(text.counted[-1])
                checked += len(text.checked[-1])
    return text

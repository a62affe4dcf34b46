"""Sequences of T tokens as a map-style data set: item n depends on n alone, so order survives resuming and sharding.

Two steps lead from n to tokens. ``MixOrder`` says which domain sequence n is of, and the how-manieth of it, so that the
shares of the mix are met at every n. ``DomainOrder`` finds the k-th sequence of a domain: its documents end to end, in
another order each epoch. A document that does not fit continues in the next sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from branchmix.data.build import permutation
from branchmix.data.domain import Domain
from branchmix.data.mix import MixOrder
from branchmix.data.sources import hash_of
from branchmix.errors import DataError

IGNORED = -100
"""Label of tokens that are not predicted."""


class Sequences(Dataset[dict[str, Any]]):
    """Training sequences of several domains.

    Items are ``input_ids``, ``position_ids`` (from 0 for each piece of a document) and ``labels`` (-100 at the first
    token of each piece), all [T], and ``domain``, the index in ``domains``.
    """

    def __init__(
        self,
        domains: dict[str, Domain],
        shares: list[float],
        *,
        sequence_length: int,
        num_sequences: int,
        random_seed: int,
    ):
        self.domains = list(domains)
        self.sequence_length = sequence_length
        self.num_sequences = num_sequences
        self._orders = [DomainOrder(domain, sequence_length, random_seed) for domain in domains.values()]
        self._mix = MixOrder(shares, random_seed)

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, n: int) -> dict[str, Any]:
        if not 0 <= n < self.num_sequences:
            raise IndexError(f"sequence {n} of {self.num_sequences}")
        domain, k = self._mix[n]
        return {**packed(self._orders[domain].pieces(k), self.sequence_length), "domain": domain}

    def counts(self) -> dict[str, int]:
        """Number of sequences of each domain."""
        return dict(zip(self.domains, self._mix.counts(self.num_sequences), strict=True))

    @property
    def seconds_waited(self) -> float:
        """Time spent waiting for text that was not read and tokenised yet, in this process."""
        return sum(order.domain.seconds_waited for order in self._orders)

    def epochs(self) -> dict[str, float | None]:
        """How often all sequences go through each domain; None where its size is not known yet."""
        passes: dict[str, float | None] = {}
        for order, count in zip(self._orders, self.counts().values(), strict=True):
            passes[order.domain.name] = count / order.per_epoch() if order.domain.complete else None
        return passes


class HeldOutSequences(Dataset[dict[str, Any]]):
    """Held-out documents of one domain end to end; the last sequence is padded, and predicts nothing there."""

    def __init__(self, domain: str, documents: Sequence[np.ndarray], sequence_length: int, pad_token_id: int):
        self.domains = [domain]
        self.num_tokens = sum(len(document) for document in documents)
        self.sequence_length = sequence_length
        self._items = []
        pieces: list[np.ndarray] = []
        room = sequence_length
        for document in documents:
            while len(document):
                pieces.append(document[:room])
                room -= len(pieces[-1])
                document = document[len(pieces[-1]) :]
                if not room:
                    self._items.append(packed(pieces, sequence_length))
                    pieces, room = [], sequence_length
        if pieces:
            padding = np.full(room, pad_token_id, dtype=np.int64)
            item = packed([*pieces, padding], sequence_length)
            item["labels"][sequence_length - room :] = IGNORED
            self._items.append(item)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, n: int) -> dict[str, Any]:
        return {**self._items[n], "domain": 0}


def packed(pieces: Sequence[np.ndarray], sequence_length: int) -> dict[str, torch.Tensor]:
    """One sequence of pieces of documents that together have its length."""
    ids_T = np.concatenate(pieces).astype(np.int64)
    assert len(ids_T) == sequence_length
    lengths = np.array([len(piece) for piece in pieces])
    starts = np.cumsum(lengths) - lengths
    labels_T = ids_T.copy()
    labels_T[starts] = IGNORED
    positions_T = np.arange(sequence_length) - np.repeat(starts, lengths)
    return {
        "input_ids": torch.from_numpy(ids_T),
        "position_ids": torch.from_numpy(positions_T),
        "labels": torch.from_numpy(labels_T),
    }


class DomainOrder:
    """The k-th sequence of a domain, as pieces of documents.

    Each epoch has its own order of chunks and of the documents in each chunk; but the chunks of a stream come as they
    are read the first time. What is left at an epoch's end, shorter than a sequence, is dropped.
    """

    def __init__(self, domain: Domain, sequence_length: int, random_seed: int):
        self.domain = domain
        self.sequence_length = sequence_length
        self.random_seed = random_seed
        self.seed = (random_seed, hash_of(domain.name))
        self._layout = lru_cache(maxsize=4)(self._lay_out)
        self._epoch = lru_cache(maxsize=4)(self._order_chunks)
        if domain.complete:
            self.per_epoch()

    def __reduce__(self) -> tuple[Any, ...]:
        return DomainOrder, (self.domain, self.sequence_length, self.random_seed)  # what is cached stays behind

    def per_epoch(self) -> int:
        """Sequences of an epoch of a domain that is complete; raises DataError if there is not one."""
        _, ends = self._epoch(0, len(self.domain.chunks))
        count = int(ends[-1]) // self.sequence_length
        if not count:
            raise DataError(
                f"{self.domain.name}: there are {int(ends[-1])} tokens to train on, less than one sequence of "
                f"{self.sequence_length}: give more text, or a shorter sequence_length"
            )
        return count

    def pieces(self, k: int) -> list[np.ndarray]:
        epoch, k = self._locate(k)
        chunks, ends = self._epoch(epoch, len(self.domain.chunks))
        place, stop = k * self.sequence_length, (k + 1) * self.sequence_length
        pieces: list[np.ndarray] = []
        index = int(np.searchsorted(ends, place, side="right"))
        while place < stop:
            chunk_start = int(ends[index - 1]) if index else 0
            pieces += self._pieces_of(int(chunks[index]), epoch, place - chunk_start, stop - chunk_start)
            place = min(stop, int(ends[index]))
            index += 1
        return pieces

    def _locate(self, k: int) -> tuple[int, int]:
        """Epoch, and number in it, waiting for as much of a stream as that takes."""
        while not self.domain.complete:
            _, ends = self._epoch(0, len(self.domain.chunks))
            if ends[-1] >= (k + 1) * self.sequence_length:
                return 0, k
            self.domain.chunk(len(self.domain.chunks))
        return divmod(k, self.per_epoch())

    def _order_chunks(self, epoch: int, num_chunks: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the chunks in an epoch, and the tokens up to the end of each."""
        if self.domain.streamed and not epoch:
            order = np.arange(num_chunks)
        else:
            order = permutation(num_chunks, *self.seed, epoch)
        return order, np.cumsum([self.domain.num_tokens(int(number)) for number in order])

    def _lay_out(self, number: int, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Starts and lengths of a chunk's documents in the order of an epoch, and the tokens up to the end of each."""
        lengths = self.domain.lengths(number)
        order = permutation(len(lengths), *self.seed, epoch, number)
        ends = self.domain.chunks[number].arrays["ends"]
        starts = ends - np.diff(ends, prepend=0)
        return starts[order], lengths[order], np.cumsum(lengths[order])

    def _pieces_of(self, number: int, epoch: int, start: int, stop: int) -> Iterator[np.ndarray]:
        """The pieces of a chunk between two places of its epoch's order, as far as it reaches."""
        starts, lengths, ends = self._layout(number, epoch)
        tokens = self.domain.chunks[number].arrays["tokens"]
        stop = min(stop, int(ends[-1]))
        document = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            end = int(ends[document])
            offset = int(starts[document]) + int(lengths[document]) - end
            if end > start:  # not a document of length 0
                yield tokens[offset + start : offset + min(end, stop)]
                start = min(end, stop)
            document += 1

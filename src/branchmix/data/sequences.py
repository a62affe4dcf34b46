"""Sequences of T tokens as a map-style data set: item n depends on n alone, so order survives resuming and sharding.

Two steps lead from n to tokens. ``MixOrder`` says which domain sequence n is of, and the how-manieth of it, so that the
shares of the mix are met at every n. ``DomainOrder`` finds the k-th sequence of a domain: its documents end to end, in
another order each epoch. A document that does not fit continues in the next sequence.

In a model, the documents of a sequence must not see each other. transformers recognises packed documents by position
ids that start again, if there is no attention mask and no cache. Models that don't take the hint get a 4-D mask
instead. Which of the two works is found out on the model itself.
Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from branchmix.data.build import permutation
from branchmix.data.domain import Domain
from branchmix.data.sources import hash_of
from branchmix.errors import CompatibilityError, DataError

IGNORED = -100
"""Label of tokens that are not predicted."""
Packing = Literal["position_ids", "mask"]
_LENGTHS = (6, 9, 8)
"""Tokens of the documents of the probe."""
_BLOCK = 1024
"""Sequences that are ordered at once."""
_SWEEPS = 64
"""Rounds of swaps; a sequence moves by about the square root of that, if the mix allows it."""


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
        self.sequence_length, self.num_sequences = sequence_length, num_sequences
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

    def epochs(self) -> dict[str, float | None]:
        """How often all sequences go through each domain; None where its size is not known yet."""
        return {
            order.domain.name: count / order.per_epoch() if order.domain.complete else None
            for order, count in zip(self._orders, self.counts().values(), strict=True)
        }


def held_out_sequences(
    documents: Iterable[np.ndarray], sequence_length: int, pad_token_id: int
) -> list[dict[str, torch.Tensor]]:
    """Documents end to end, as items like those of ``Sequences``; the last is padded, and predicts nothing there."""
    items = []
    pieces: list[np.ndarray] = []
    room = sequence_length
    for document in documents:
        while len(document):
            pieces.append(document[:room])
            room -= len(pieces[-1])
            document = document[len(pieces[-1]) :]
            if not room:
                items.append(packed(pieces, sequence_length))
                pieces, room = [], sequence_length
    if pieces:
        items.append(packed([*pieces, np.full(room, pad_token_id, dtype=np.int64)], sequence_length))
        items[-1]["labels"][sequence_length - room :] = IGNORED
    return items


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
        self.seed = (random_seed, hash_of(domain.name))
        self._layout = lru_cache(maxsize=4)(self._lay_out)
        self._epoch = lru_cache(maxsize=4)(self._order_chunks)
        if domain.complete:
            self.per_epoch()

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
            self.domain.wait_for_more()
        return divmod(k, self.per_epoch())

    def _order_chunks(self, epoch: int, num_chunks: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the chunks in an epoch, and the tokens up to the end of each."""
        as_read = self.domain.streamed and not epoch
        order = np.arange(num_chunks) if as_read else permutation(num_chunks, *self.seed, epoch)
        return order, np.cumsum([self.domain.lengths(int(number)).sum() for number in order])

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


class MixOrder:
    """Which domain sequence n is of, and how many of that domain came before it.

    After any n sequences, every domain has had its share of n to within less than one (``shares`` sum to 1).
    Earliest deadline first keeps to that (jobs whose windows are given by that very bound); in blocks, its order is
    then shuffled as far as the bound allows, since it would otherwise be periodic, and in step with batches or
    processes.
    """

    def __init__(self, shares: Sequence[float], random_seed: int):
        self.weights = [max(1, round(share * 2**30)) for share in shares]  # whole numbers: the bound is exact
        self.total = sum(self.weights)
        self.random_seed = random_seed
        self._starts = [[0] * len(self.weights)]
        self._block = lru_cache(maxsize=4)(self._order_block)

    def __getitem__(self, n: int) -> tuple[int, int]:
        block, place = divmod(n, _BLOCK)
        order, before = self._block(block)
        return int(order[place]), int(before[place])

    def counts(self, n: int) -> list[int]:
        """Sequences of each domain among the first ``n``."""
        block, place = divmod(n, _BLOCK)
        order, _ = self._block(block)
        return [start + int((order[:place] == domain).sum()) for domain, start in enumerate(self._starts[block])]

    def _order_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        while len(self._starts) <= block:
            self._starts.append(self._earliest_deadlines(len(self._starts) - 1)[1])
        order = np.array(self._earliest_deadlines(block)[0])
        self._shuffle(order, block)
        before = np.empty(_BLOCK, dtype=np.int64)
        for domain, start in enumerate(self._starts[block]):
            mine = order == domain
            before[mine] = start + np.arange(mine.sum())
        return order, before

    def _earliest_deadlines(self, block: int) -> tuple[list[int], list[int]]:
        """Domains of a block, and each domain's number of sequences after it."""
        weights, total = self.weights, self.total
        counts, order = list(self._starts[block]), []
        for n in range(block * _BLOCK, (block + 1) * _BLOCK):
            released = [domain for domain, weight in enumerate(weights) if counts[domain] * total // weight <= n]
            chosen = min(released, key=lambda domain: -(-(counts[domain] + 1) * total // weights[domain]))
            counts[chosen] += 1
            order.append(chosen)
        return order, counts

    def _shuffle(self, order: np.ndarray, block: int) -> None:
        """Swap neighbours at random, all even or all odd pairs at once, wherever the bound still holds between them."""
        weights = np.array(self.weights, dtype=np.int64)
        n = block * _BLOCK + 1 + np.arange(_BLOCK - 1)
        bits = np.random.PCG64(np.random.SeedSequence((self.random_seed, block)))
        for sweep in range(_SWEEPS):
            counts = np.zeros((_BLOCK, len(weights)), dtype=np.int64)
            counts[np.arange(_BLOCK), order] = 1
            counts = np.array(self._starts[block]) + np.cumsum(counts, axis=0)
            first = np.arange(sweep % 2, _BLOCK - 1, 2)
            left, right = order[first], order[first + 1]
            lag_left = (counts[first, left] - 1) * self.total - n[first] * weights[left]
            lag_right = (counts[first, right] + 1) * self.total - n[first] * weights[right]
            swap = (lag_left > -self.total) & (lag_right < self.total) & (bits.random_raw(len(first)) % 2 == 1)
            order[first[swap]], order[first[swap] + 1] = right[swap], left[swap]


# ---- As a model's inputs ----


def packed_inputs(batch: dict[str, torch.Tensor], how: Packing) -> dict[str, Any]:
    """Keyword arguments for the model's forward pass, without labels, from ``input_ids`` and ``position_ids`` [B, T].

    ``how`` is the model's ``packing_method``.
    """
    inputs: dict[str, Any] = {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "use_cache": False,  # with a cache, transformers takes the positions for those of a continuation
    }
    if how == "mask":
        inputs["attention_mask"] = block_mask(batch["position_ids"])
    return inputs


def block_mask(position_ids: torch.Tensor) -> torch.Tensor:
    """[B, 1, T, T] to add to attention scores: 0 where a token sees another, an earlier one of its piece or itself.

    In float32, which eager attention and SDPA take in every precision (a boolean one eager attention would add).
    """
    piece_BT = (position_ids == 0).cumsum(-1)
    seen_BTT = (piece_BT.unsqueeze(-1) == piece_BT.unsqueeze(-2)).tril()
    hidden = torch.finfo(torch.float32).min
    return torch.zeros(seen_BTT.shape, device=seen_BTT.device).masked_fill(~seen_BTT, hidden).unsqueeze(1)


def packing_method(model: Any) -> Packing:
    """How documents are kept apart in this model, found by trying; raises CompatibilityError if neither way works."""

    for how in ("position_ids", "mask"):
        if isolates_documents(model, how):
            return how
    raise CompatibilityError(
        [
            f"{model.config.model_type}: packed documents would see each other in this model (attention: "
            f"{model.config._attn_implementation}), with position ids and with a mask alike: train a family that has "
            "softmax attention alone and takes position ids"
        ]
    )


def isolates_documents(model: Any, how: Packing = "position_ids") -> bool:
    """Whether a document among others in a sequence gives the logits that it gives alone, whatever its neighbours are.

    Works for causal LMs on any device, in any floating-point type; leaves model and random numbers unchanged.
    """
    if how == "mask" and _has_windows(model.config):
        return False  # one mask for all layers would open the windows
    embeddings = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    documents = [
        torch.randint(0, embeddings.shape[0], (2, length), generator=generator).to(embeddings.device)
        for length in _LENGTHS
    ]
    documents[-1] = own_BT = documents[-1][:1].expand(2, -1)
    positions_T = torch.cat([torch.arange(length, device=embeddings.device) for length in _LENGTHS])
    batch = {"input_ids": torch.cat(documents, dim=1), "position_ids": positions_T.expand(2, -1)}
    with _undisturbed(model), torch.no_grad():
        try:
            packed_BTV = model(**packed_inputs(batch, how)).logits[:, -_LENGTHS[-1] :].float()
        except (TypeError, ValueError, IndexError, RuntimeError):
            return False  # it takes no positions, or no such mask
        alone_BTV = model(input_ids=own_BT[:1], use_cache=False).logits.float()
    # By the mean and not by the worst, which is a choice between two equally good experts. Neighbours leave no trace
    # at all, while one and the same document at another place is rounded differently.
    scale = alone_BTV.abs().mean()
    by_neighbours = (packed_BTV[0] - packed_BTV[1]).abs().mean() / scale
    by_place = (packed_BTV[0] - alone_BTV[0]).abs().mean() / scale
    half = embeddings.dtype in (torch.bfloat16, torch.float16)
    return bool(by_neighbours < (1e-3 if half else 1e-5)) and bool(by_place < (5e-2 if half else 1e-4))


def _has_windows(config: Any) -> bool:
    """Whether some layers see only the last so many tokens."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or []
    return bool(getattr(config, "sliding_window", None)) or any("full" not in k and "global" not in k for k in kinds)


@contextmanager
def _undisturbed(model: Any) -> Any:
    """Evaluation mode within the block; the modules' modes and the random numbers are restored after it."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode

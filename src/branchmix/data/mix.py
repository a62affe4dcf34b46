"""The order of domains in a run: the mix holds at every point of the run, without any regularity in the order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

_BLOCK = 1024
"""Sequences that are ordered at once."""
_SWEEPS = 64
"""Rounds of swaps; a sequence moves by about the square root of that, if the mix allows it."""


class MixOrder:
    """Which domain sequence n is of, and how many of that domain came before it.

    After any n sequences, every domain has had its share of n to within less than one (``shares`` sum to 1).
    Earliest deadline first keeps to that (jobs whose windows are given by that very bound); in blocks, its order is
    then shuffled as far as the bound allows, since it would otherwise be periodic, and in step with batches or
    processes.
    """

    def __init__(self, shares: Sequence[float], random_seed: int):
        self.shares = shares
        self.weights = [max(1, round(share * 2**30)) for share in shares]  # whole numbers: the bound is exact
        self.total = sum(self.weights)
        self.random_seed = random_seed
        self._starts = [[0] * len(self.weights)]
        self._block = lru_cache(maxsize=4)(self._order_block)

    def __reduce__(self) -> tuple[Any, ...]:
        return MixOrder, (self.shares, self.random_seed)  # what is cached stays behind

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
        counts = list(self._starts[block])
        releases = [c * total // w for c, w in zip(counts, weights, strict=True)]
        deadlines = [-(-(c + 1) * total // w) for c, w in zip(counts, weights, strict=True)]
        order = []
        for n in range(block * _BLOCK, (block + 1) * _BLOCK):
            chosen = -1
            for domain, release in enumerate(releases):
                if release <= n and (chosen < 0 or deadlines[domain] < deadlines[chosen]):
                    chosen = domain
            counts[chosen] += 1
            count, weight = counts[chosen], weights[chosen]
            releases[chosen] = count * total // weight
            deadlines[chosen] = -(-(count + 1) * total // weight)
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

"""Experts as changes of the seed of low rank: a LoRA's own factors, or the best ones of a rank for a full fine-tune.

Planned from headers, unless ranks are to be found (``expert_rank: auto``). A change is decomposed when its factors are
written: what is held is one matrix and the factors of a few.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from branchmix.checkpoint.expressions import (
    Cast,
    Expression,
    Span,
    same_values,
)
from branchmix.checkpoint.families import Dimensions, Family
from branchmix.checkpoint.numbers import Array, from_float32, widened
from branchmix.errors import CheckpointError
from branchmix.upcycling.layers import cast
from branchmix.upcycling.sources import (
    MATRICES,
    ROLES,
    Change,
    DenseExpert,
    ExpertSource,
    Kind,
    Role,
    ffn_name,
    who,
)

if TYPE_CHECKING:
    import torch

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LowRankExpert(ExpertSource):
    """An expert whose matrices are the seed's and a change of low rank; everything else is the expert's own."""

    own: DenseExpert
    """The expert, with matrices that are not read for its ``changes``."""
    seed: ExpertSource
    """Whose matrices are changed: the seed, or an expert of the mixture that this one joins."""
    factors: Mapping[tuple[int, str], tuple[Expression, Expression]]
    """A [r, I] and B [r, O] by layer and matrix."""
    matrices: Sequence[str]
    """Those that are the seed's where there are no factors. Others are the expert's own, unless there are factors."""
    adapter: Path | None = None
    """The LoRA adapter that the factors are from, unless it is merged in ``own``."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.own.name

    @property
    def family(self) -> Family:  # type: ignore[override]
        return self.own.family

    @property
    def dims(self) -> Dimensions:  # type: ignore[override]
        return self.own.dims

    def change(self, layer: int, matrix: str) -> Change:
        of_seed = self.seed.change(layer, matrix)
        base = self.seed.matrix(layer, matrix) if of_seed is None else of_seed.base
        return Change(base, *self.factors.get((layer, matrix), ()))

    def attention(self, layer: int, role: Role, kind: Kind) -> Expression | None:
        if kind == "bias" or (role not in self.matrices and (layer, role) not in self.factors):
            return self.own.attention(layer, role, kind)
        return self.change(layer, role).whole

    def attention_norm(self, layer: int, role: Literal["q", "k"]) -> dict[str, Expression]:
        return self.own.attention_norm(layer, role)

    def ffn(self, layer: int) -> dict[str, Expression]:
        tensors = self.own.ffn(layer)
        for matrix in MATRICES[4:]:
            name = f"{ffn_name(self.family, matrix)}.weight"
            if matrix in self.matrices and name in tensors:
                tensors[name] = self.change(layer, matrix).whole
        return tensors

    def trunk(self, name: str) -> Expression:
        return self.own.trunk(name)


def matrices_of(family: Family, attention: str, ffn: str) -> list[str]:
    """The matrices of a layer that are experts' own, with these choices of a recipe or a config."""
    roles = {"kv_experts": ROLES, "kv_sharing": ("q", "o")}.get(attention, ())
    gate = ["gate"] if family.gate is not None else []
    return [*roles, *([*gate, "up", "down"] if ffn == "experts" else [])]


# ---- Full fine-tunes: the change of each matrix, decomposed ----


@dataclass(frozen=True)
class Truncation:
    """One matrix's change, cut to a rank."""

    expert: str
    layer: int
    matrix: str
    rank: int
    error: float
    """Norm of what is lost, relative to the norm of the change (Frobenius)."""
    seconds: float


@dataclass
class Decomposed:
    """Factors of changes, decomposed one at a time (recent ones are kept), and a record of what each lost."""

    truncations: dict[tuple[str, int, str], Truncation] = field(default_factory=dict)
    most_bytes: int = 1 << 28
    """Memory for factors that are kept until they are written; those of the last matrix always are."""
    _held: dict[Any, tuple[Array, Array]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def notes(self) -> list[str]:
        """One line for each expert that was cut: how much of its changes is lost."""
        lines = []
        for name in dict.fromkeys(cut.expert for cut in self.truncations.values()):
            cuts = [cut for cut in self.truncations.values() if cut.expert == name]
            worst, ranks = max(cuts, key=lambda cut: cut.error), {cut.rank for cut in cuts}
            words = str(min(ranks)) if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"
            mean = sum(cut.error for cut in cuts) / len(cuts)
            lines.append(
                f"{who(name)} is cut to rank {words}: its changes lose {mean:.0%} of their norm on average, at most "
                f"{worst.error:.0%} ({worst.matrix} in layer {worst.layer})"
            )
        return lines

    def factors(self, change: _Decomposable, rank: int) -> tuple[Array, Array]:
        """A [r, I] and B [r, O] in fp32."""
        with self._lock:
            if change.key not in self._held:
                start = time.perf_counter()
                A, B, error = _decompose(change.difference(), rank)
                seconds = time.perf_counter() - start
                self.truncations[change.key] = Truncation(*change.key, rank, error, seconds)
                self._held[change.key] = (A, B)
                while (
                    len(self._held) > 1 and sum(A.nbytes + B.nbytes for A, B in self._held.values()) > self.most_bytes
                ):
                    del self._held[next(iter(self._held))]
            return self._held[change.key]


@dataclass(frozen=True)
class _Decomposable:
    """A matrix of a full fine-tune, and the seed's."""

    key: tuple[str, int, str]
    whole: Expression
    base: Expression

    def difference(self) -> torch.Tensor:
        """[O, I], fp32."""
        import torch

        rows = self.whole.num_rows
        change = widened(self.whole.rows(0, rows), self.whole.dtype) - widened(self.base.rows(0, rows), self.base.dtype)
        if not np.isfinite(change).all():
            name, layer, matrix = self.key
            raise CheckpointError(f"{who(name)}: {matrix} in layer {layer} holds NaN or Inf: use an earlier checkpoint")
        return torch.from_numpy(np.ascontiguousarray(change, np.float32))


@dataclass(frozen=True, eq=False)
class SingularFactor(Expression):
    """A or B of the best approximation of a change by a given rank. Both carry the root of the singular values."""

    change: _Decomposable
    rank: int
    decomposed: Decomposed
    number: int
    """0 for A, 1 for B."""

    def __post_init__(self) -> None:
        self._become("F32", (self.rank, self.change.whole.shape[1 - self.number]))

    def parts_read(self) -> tuple[Expression, ...]:
        return (self.change.whole, self.change.base)

    def rows(self, start: int, stop: int, columns: Span | None = None) -> Array:
        block = self.decomposed.factors(self.change, self.rank)[self.number][start:stop]
        return from_float32(block if columns is None else block[:, slice(*columns)], "F32")


def _decompose(change: torch.Tensor, rank: int) -> tuple[Array, Array, float]:
    """A [r, I], B [r, O] and the relative error of B^T A as the nearest matrix of a rank.

    Randomised (Halko et al., arXiv 0909.4061) where that is cheaper than all singular vectors.
    """
    import torch

    u, s, v = _singular(change, rank)
    root = s.sqrt()
    A, B = (v * root).T.contiguous(), (u * root).T.contiguous()
    lost, norm = torch.linalg.norm(change - B.T @ A), torch.linalg.norm(change)
    return A.numpy(), B.numpy(), float(lost / norm) if norm else 0.0


def _singular(change: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The greatest singular values [r] of a matrix [O, I], and their vectors [O, r] and [I, r]."""
    import torch

    if 4 * rank >= min(change.shape):
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank].T
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(change, q=rank + 8, niter=4)
    return u[:, :rank], s[:rank], v[:, :rank]


def rank_for(change: torch.Tensor, energy: float) -> int:
    """The smallest rank whose part of a matrix keeps this share of the sum of squares; 0 for a matrix of zeros.

    At most as many as would take the place of the whole matrix.
    """
    import torch

    rows, columns = change.shape
    most = max(1, rows * columns // (rows + columns))
    total, rank = float(change.double().square().sum()), 16
    if total == 0.0:
        return 0
    while True:
        if 4 * rank >= min(change.shape):
            rank = most
        s = torch.linalg.svdvals(change)[:most] if rank == most else _singular(change, rank)[1]
        kept = s.double().square().cumsum(0) / total
        enough = (kept >= energy).nonzero()
        if len(enough) or rank == most:
            return int(enough[0]) + 1 if len(enough) else most
        rank *= 2


def singular_factors(
    expert: DenseExpert,
    seed: ExpertSource,
    matrices: Sequence[str],
    wanted: int | Literal["auto"],
    energy: float,
    decomposed: Decomposed,
    progress: Progress | None = None,
) -> dict[tuple[int, str], tuple[Expression, Expression]]:
    """Factors of a full fine-tune's changes, decomposed when they are read.

    Args:
        expert: with the same norms folded as ``seed`` has.
        seed: whose matrices change.
        wanted: the rank, or ``auto``: by ``energy``, which reads and decomposes all matrices at once.
        energy: share of a change's sum of squares that is kept.
        decomposed: holds factors for a while.
        progress: called with matrices done and in all, for ``auto``.
    """
    found: dict[tuple[int, str], tuple[Expression, Expression]] = {}
    total = expert.dims.num_layers * len(matrices)
    for done, (layer, matrix) in enumerate((a, b) for a in range(expert.dims.num_layers) for b in matrices):
        of_seed = seed.change(layer, matrix)
        base = seed.matrix(layer, matrix) if of_seed is None else of_seed.base
        change = _Decomposable((expert.name, layer, matrix), expert.matrix(layer, matrix), base)
        if wanted == "auto":
            if progress is not None:
                progress(f"finding the ranks of {expert.name}", done, total)
            rank = rank_for(change.difference(), energy)
        else:
            same = same_values(Cast(change.whole, "F32"), Cast(change.base, "F32"))
            rank = 0 if same else min(wanted, *base.shape)
        if rank:
            factors = (SingularFactor(change, rank, decomposed, number) for number in (0, 1))
            found[layer, matrix] = tuple(factors)  # type: ignore[assignment]
    return found


def changed_seed(mixture: ExpertSource, seed: DenseExpert, matrices: Sequence[str], dtype: str) -> str | None:
    """The first matrix of a mixture's seed that is not that of a dense model, as it was trained since; None if none.

    Args:
        mixture: one of its experts.
        seed: with the same norms folded.
        dtype: the mixture's.
    """
    for layer in range(seed.dims.num_layers):
        for matrix in matrices:
            change = mixture.change(layer, matrix)
            assert change is not None, "every expert of such a mixture is a change of the seed"
            if not same_values(change.base, cast(seed.matrix(layer, matrix), dtype)):
                return f"{matrix} in layer {layer}"
    return None


def ranks_of(experts: Sequence[ExpertSource], matrices: Sequence[str]) -> list[dict[str, list[int]]]:
    """``expert_ranks`` of a config: one dictionary if all layers have the same."""

    def rank(expert: ExpertSource, layer: int, matrix: str) -> int:
        change = expert.change(layer, matrix)
        assert change is not None, "every expert of such a mixture is a change of the seed"
        return change.rank

    layers = range(experts[0].dims.num_layers)
    of_layers = [{name: [rank(e, layer, name) for e in experts] for name in matrices} for layer in layers]
    return of_layers[:1] if all(layer == of_layers[0] for layer in of_layers) else of_layers

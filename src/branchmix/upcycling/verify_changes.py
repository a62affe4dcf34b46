"""Proof that written factors are the experts' changes of the seed: an adapter's own, or as good as was reported."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from branchmix.checkpoint.expressions import Expression
from branchmix.checkpoint.index import CheckpointIndex
from branchmix.checkpoint.numbers import to_float32
from branchmix.errors import VerificationError
from branchmix.upcycling.layers import cast
from branchmix.upcycling.low_rank import LowRankExpert, SingularFactor
from branchmix.upcycling.plan import Plan, Progress
from branchmix.upcycling.sources import Change, ExpertSource, Kind, MixtureExpert, Role


def check_changes(plan: Plan, index: CheckpointIndex, progress: Progress | None) -> tuple[int, float]:
    """Number of the matrices that are changes of the seed, and the greatest relative error of a change.

    Raises:
        VerificationError: written factors are not a LoRA's, or lose more of a full fine-tune than was reported.
    """
    experts = [expert for expert in plan.sources if isinstance(expert, LowRankExpert)]
    checked, greatest = 0, 0.0
    for number, expert in enumerate(experts):
        written = as_written(plan, index, expert, number)
        for layer in range(expert.dims.num_layers):
            if progress is not None:
                layers = expert.dims.num_layers
                progress("comparing changes", number * layers + layer, len(experts) * layers)
            for matrix in expert.matrices:
                truth, change = expert.change(layer, matrix), written.change(layer, matrix)
                assert change is not None, "the written mixture is of such experts"
                if truth.rank != change.rank:
                    raise VerificationError(
                        f"expert {expert.name!r}: {matrix} in layer {layer} was written with another rank"
                    )
                if truth.A is None or truth.B is None or change.A is None or change.B is None:
                    continue
                reported = 0.0
                if isinstance(truth.A, SingularFactor) and plan.decomposed is not None:
                    exact = truth.A.change.difference().numpy()
                    reported = plan.decomposed.truncations[truth.A.change.key].error
                else:
                    exact = _float32(truth.B).T @ _float32(truth.A)
                error = _relative(exact - _float32(change.B).T @ _float32(change.A), exact)
                rounding = {"BF16": 2.0**-7, "F16": 2.0**-9, "F32": 2.0**-20}[change.A.dtype]
                if not error <= reported + rounding:
                    raise VerificationError(
                        f"expert {expert.name!r}: its change of {matrix} in layer {layer} was written with an error of "
                        f"{error:.2g} of its norm, not {reported:.2g}: write the output again"
                    )
                checked, greatest = checked + 1, max(greatest, error)
    return checked, greatest


def _relative(difference: Any, of: Any) -> float:
    norm = float(np.linalg.norm(of))
    return float(np.linalg.norm(difference)) / norm if norm else 0.0


def _float32(part: Expression) -> Any:
    return to_float32(part.rows(0, part.num_rows), part.dtype)


@dataclass(frozen=True)
class _Written(MixtureExpert):
    """An expert of the written mixture, whose matrices are not rounded once more where they are put together."""

    def _change(self, module: str, ranks: list[int]) -> Change:
        change = super()._change(module, ranks)
        return change._replace(base=cast(change.base, "F32"))

    def attention(self, layer: int, role: Role, kind: Kind) -> Expression | None:
        part = super().attention(layer, role, kind)
        return None if part is None else cast(part, "F32")


def as_written(plan: Plan, index: CheckpointIndex, expert: ExpertSource, number: int) -> _Written:
    return _Written(expert.name, replace(index, config=plan.config), expert.family, expert.dims, number)

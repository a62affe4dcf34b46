"""The total training cost of a model: every training it is based on, each counted once.

A run leaves ``training.json`` in its folder, with what its own start grew from; a merge leaves ``branchmix.json``, with
the same of every source. So a trained mixture has its own run, those of all experts, and that of the seed, which
all of them share and which counts once. A model that neither of them made is a root without a record.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from branchmix.checkpoint.json_text import key_of, read_object
from branchmix.errors import BranchMixError

RUN, MERGE = "training.json", "branchmix.json"
_SAMPLE = 1 << 16
"""Bytes at each end of a weights file that distinguish models."""
_COST = (int, float, NoneType)
_TYPES = {"key": (str,), "name": (str,), "tokens": (int, NoneType), "flops": _COST, "flops_per_token": _COST}


@dataclass(frozen=True)
class Phase:
    """One training, or a root model whose training is not on record."""

    key: str
    """Equal for the same training, independent of its folder."""
    name: str
    tokens: int | None
    """Tokens trained on; None if not on record."""
    flops: float | None
    """FLOPs of forward and backward passes; None if not on record."""
    flops_per_token: float | None = None
    """For a root: training FLOPs per token, at its whole context of at most 4096 tokens."""

    @property
    def is_known(self) -> bool:
        return self.tokens is not None


def lineage(folder: Path, name: str | None = None, *, within: tuple[Path, ...] = ()) -> list[Phase]:
    """All trainings behind the model in ``folder``, the oldest first.

    Args:
        name: of the model, if no training of it is on record.
        within: folders whose records name this one; a record that names itself is not followed.
    """
    within = (*within, folder.resolve())
    record = read_object(folder / RUN)
    if record is not None and isinstance(record.get("config"), dict) and "tokens" in record and _fits(record, "tokens"):
        own = Phase(
            key_of({key: record.get(key) for key in ("config", "started", "ended", "tokens")}),
            folder.name,
            record["tokens"],
            record.get("flops") if _fits(record, "flops") else None,
        )
        start = record["config"].get("model")
        if isinstance(start, dict):  # made from nothing
            return [own]
        return [*phases_of(record, "ancestors", str(start), within), own]
    merge = read_object(folder / MERGE)
    if merge is not None and isinstance(merge.get("sources"), list):
        added = [
            step.get("expert") for step in _objects(change.get("added") for change in _objects(merge.get("changes")))
        ]
        sources = _objects([*merge["sources"], *added])
        return once(phase for one in sources for phase in phases_of(one, "training", str(one.get("model")), within))
    return [Phase(_root_key(folder), _called(name or folder.name), None, None, _root_cost(folder))]


def as_records(phases: Iterable[Phase]) -> list[dict[str, Any]]:
    """For ``training.json`` and ``branchmix.json``."""
    return [asdict(phase) for phase in phases]


def once(phases: Iterable[Phase]) -> list[Phase]:
    """Each training once, in the order of their first appearance."""
    by_key: dict[str, Phase] = {}
    for phase in phases:
        by_key.setdefault(phase.key, phase)
    return list(by_key.values())


def total(phases: Sequence[Phase], what: Literal["tokens", "flops"]) -> Any:
    """Sum of all trainings' tokens or FLOPs; None if one is not on record."""
    values = [getattr(phase, what) for phase in phases]
    return None if None in values else sum(values)


def phases_of(holder: dict[str, Any], key: str, model: str, within: tuple[Path, ...] = ()) -> list[Phase]:
    """The phases that a record holds; older records do not, so then those of the model it names, if that is there."""
    recorded = holder.get(key)
    if isinstance(recorded, list) and all(isinstance(phase, dict) and _fits(phase, *_TYPES) for phase in recorded):
        return once(Phase(**{field.name: phase.get(field.name) for field in fields(Phase)}) for phase in recorded)
    path = Path(model)
    if path.is_absolute() and os.path.isdir(path) and path.resolve() not in within:  # noqa: PTH112 (any name will do)
        return lineage(path, within=within)
    return [Phase(key_of({"model": model}), _called(model), None, None)]


def _fits(record: dict[str, Any], *keys: str) -> bool:
    """Whether a record has values of their types for these fields of a phase; others may have edited it."""
    return all(type(record.get(key)) in _TYPES[key] for key in keys)


def _objects(values: Any) -> list[dict[str, Any]]:
    """The JSON objects in what should be a list of them."""
    return [value for value in values if isinstance(value, dict)] if isinstance(values, Iterable) else []


def _called(given: str) -> str:
    """A Hub id unchanged, or the last part of a path: records are shared, and should not reveal local paths."""
    return Path(given).name if Path(given).is_absolute() else given


def _root_key(folder: Path) -> str:
    """Hash of config and the ends of the weights; reading all of them would take as long as loading the model."""
    from xxhash import xxh3_128_hexdigest

    parts: dict[str, Any] = {}
    for file in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]):
        with file.open("rb") as opened:
            first = opened.read(_SAMPLE)
            opened.seek(max(0, file.stat().st_size - _SAMPLE))
            parts[file.name] = [file.stat().st_size, xxh3_128_hexdigest(first + opened.read())]
    return key_of(parts)


def _root_cost(folder: Path) -> float | None:
    from branchmix.accounting.inspection import inspect

    try:
        flops = inspect(folder).flops
    except BranchMixError:
        return None
    return 3.0 * flops.total if flops is not None else None

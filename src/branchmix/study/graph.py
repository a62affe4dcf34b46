"""The steps of a study: what each does, what it needs, what it costs, and the key that says whether it is done.

A key is a hash of a step's options and of the keys of what it needs, so a changed option changes the keys of just those
steps that depend on it. ``build`` makes the graph of a study's settings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from branchmix.checkpoint.families import nearest
from branchmix.errors import RecipeError

Kind = Literal["text", "train", "upcycle", "scores", "ensemble", "inference"]
FORMAT = 1
"""Of keys and results: another one makes every step a new one."""
CURVE_POINTS = 60
"""Of a training run."""
NEGLIGIBLE = 0.005
"""Where as many tokens cost as many FLOPs to within this share, equal data and equal compute are one run."""


@dataclass(frozen=True)
class Cost:
    """What a training run takes, exactly."""

    steps: int = 0
    tokens: int = 0
    flops: int = 0
    """Forward and backward."""
    optimizer: int = 0
    """FLOPs of AdamW and clipping."""

    @property
    def total(self) -> int:
        """All FLOPs."""
        return self.flops + self.optimizer


@dataclass(frozen=True)
class Step:
    """A node of the graph."""

    name: str
    kind: Kind
    options: dict[str, Any]
    """JSON: everything that its result depends on, but for what it needs."""
    needs: dict[str, str]
    """Names of other steps, by the part they play."""
    key: str
    order: tuple[int, ...]
    """Steps begin in this order, where they can."""
    config: dict[str, Any] | None = None
    """Of the model that it makes or measures."""
    cost: Cost = Cost()
    about: dict[str, Any] = field(default_factory=dict)
    """For reports: method, label, match, repetition, group. No part of the key."""

    @property
    def folder(self) -> str:
        """Below ``OUT/steps``."""
        return f"{self.name}-{self.key[:10]}"


@dataclass(frozen=True)
class Graph:
    """All steps, in the order in which they begin."""

    steps: dict[str, Step]

    def dependents(self, name: str) -> list[Step]:
        """Steps that need this one."""
        return [step for step in self.steps.values() if name in step.needs.values()]

    def with_needs(self, names: Iterable[str]) -> list[Step]:
        """These steps and all that they need."""
        wanted: set[str] = set()

        def take(name: str) -> None:
            if name not in wanted:
                wanted.add(name)
                for needed in self.steps[name].needs.values():
                    take(needed)

        for name in names:
            take(name)
        return [step for step in self.steps.values() if step.name in wanted]


def key_of(content: Any) -> str:
    """A short name for what a result depends on."""
    from xxhash import xxh3_128_hexdigest

    return str(xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode()))


def chosen(graph: Graph, only: list[str]) -> list[Step]:
    """Steps whose name, or a part of it between dots, is or fits one of ``only``; all if there are none; and needs.

    Raises:
        RecipeError: nothing fits.
    """
    if not only:
        return list(graph.steps.values())
    names: list[str] = []
    for wanted in only:
        fitting = [
            name
            for name in graph.steps
            if fnmatchcase(name, wanted) or any(fnmatchcase(part, wanted) for part in name.split("."))
        ]
        if not fitting:
            parts = sorted({part for name in graph.steps for part in (name, *name.split("."))})
            raise RecipeError(f"--only: no step is called {wanted!r}{nearest(wanted, parts)}; --dry-run lists them all")
        names += fitting
    return graph.with_needs(names)


def relative(path: Path, start: Path) -> str:
    """For files that go on meaning the same when the whole study is moved."""
    return os.path.relpath(path, start)

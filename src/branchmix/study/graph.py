"""The steps of a study: what each does, what it needs, what it costs, and the key that says whether it is done.

A key is a hash of a step's options and of the keys of what it needs, so a changed option changes the keys of just those
steps that depend on it. ``build`` makes the graph of a study's settings.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from branchmix.checkpoint.families import nearest
from branchmix.errors import RecipeError

Kind = Literal["text", "train", "upcycle", "scores", "ensemble", "routes", "inference"]
Group = Literal["dense", "methods", "ablations"]
Role = Literal["seed", "expert", "upcycle", "merge", "step 0", "ensemble", "reference", "trained"]
TRAINED: tuple[Role, ...] = ("trained", "reference")
UNTRAINED: tuple[Role, ...] = ("merge", "step 0", "ensemble")
"""Roles of models that methods make."""
FORMAT = 1
"""Of keys and results: another one makes every step a new one."""
AFTER_A_MODEL = ("scores", "routes")
"""Kinds of steps that the process which makes their model does too."""
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
class About:
    """What a step is about, for reports. It is not part of the step's key."""

    group: Group
    repetition: int
    role: Role
    label: str
    """In tables and pictures."""
    title: str = ""
    """Name of the model, the same in all repetitions."""
    method: str = ""
    """Name of the method in the study's file; empty for the dense models."""
    preset: str = ""
    """The method that it is an instance of: a key of ``METHODS``."""
    what: str = ""
    """What the method is."""
    warning: str = ""
    match: tuple[str, ...] = ()
    """Budgets of the reference that the run has: ``dm``, ``cm``, ``time``."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without what is empty."""
        return {
            key: list(value) if key == "match" else value
            for key, value in asdict(self).items()
            if value not in ("", ())
        }

    @classmethod
    def of(cls, content: dict[str, Any]) -> About:
        """From JSON, also that of older versions."""
        known = {field.name for field in fields(cls)}
        given = {key: value for key, value in content.items() if key in known}
        return cls(**{**given, "match": tuple(given.get("match", ()))})


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
    about: About | None = None
    """Of steps that make or measure a model."""

    @property
    def folder(self) -> str:
        """Below ``OUT/steps``."""
        return f"{self.name}-{self.key[:10]}"


def has_routers(config: dict[str, Any] | None) -> bool:
    """Whether a model has losses of its own, which look at one micro-batch at a time."""
    return config is not None and bool(config["model_type"] == "branchmix")


def may_go(step: Step) -> bool:
    """Whether ``keep: results`` removes the weights that a step makes."""
    return step.kind in ("train", "upcycle") and step.about is not None and step.about.role not in ("seed", "expert")


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

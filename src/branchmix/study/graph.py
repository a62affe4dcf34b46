"""The steps of a study: what each does, what it needs, what it costs, and the key that says whether it is done.

A key is a hash of a step's options and of the keys of what it needs, so a changed option changes the keys of just those
steps that depend on it. ``build`` makes the graph of a study's settings.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, Literal

from branchmix.checkpoint.families import nearest
from branchmix.errors import RecipeError

StepKind = Literal["text", "train", "upcycle", "scores", "ensemble", "forced", "routes", "inference"]
SCORES: tuple[StepKind, ...] = ("scores", "ensemble", "forced")
"""Kinds of steps that measure a model on held-out text; all are called ``scores``."""
Group = Literal["dense", "methods", "ablations"]
Role = Literal["seed", "expert", "upcycle", "merge", "step 0", "ensemble", "forced", "reference", "trained"]
TRAINED: tuple[Role, ...] = ("trained", "reference")
UNTRAINED: tuple[Role, ...] = ("merge", "step 0", "ensemble", "forced")
"""Roles of models that methods make."""
AFTER_A_MODEL = ("scores", "forced", "routes")
"""Kinds of steps that the process which makes their model does too."""
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
        return self.flops + self.optimizer


@dataclass(frozen=True)
class About:
    """The model that a step makes or measures, for reports; empty if it does neither. It is not part of the key."""

    group: Group | Literal[""] = ""
    repetition: int = 0
    role: Role | Literal[""] = ""
    label: str = ""
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
    """Budgets of the reference that the run has: ``dm``, ``cm``."""

    @property
    def full_label(self) -> str:
        """As the paper's rows are called: BAM DM Expert KV."""
        if self.role == "step 0":
            return f"{self.label}, step 0"
        if self.role != "trained":
            return self.label
        match = "/".join(self.match).upper()
        family, _, rest = self.label.partition(" ")
        return f"{family} {match} {rest}" if family == "BAM" else f"{self.label} ({match})"


@dataclass(frozen=True)
class Needs:
    """Names of the steps whose results a step reads; a seed that is given comes from no step."""

    text: str | None = None
    """The step that extracts the text, if the study makes its text."""
    model: str | None = None
    """The model that is trained or measured."""
    members: dict[str, str] = field(default_factory=dict)
    """Several models by name: ``seed`` and experts to merge or to average, methods to time."""

    def by_role(self) -> dict[str, str]:
        """All of them, by the part they play."""
        single = {"text": self.text, "model": self.model}
        return self.members | {role: name for role, name in single.items() if name is not None}

    @property
    def names(self) -> list[str]:
        return list(self.by_role().values())


@dataclass(frozen=True)
class Step:
    """A node of the graph."""

    name: str
    kind: StepKind
    needs: Needs
    key: str
    run: dict[str, Any] = field(default_factory=dict)
    """Settings of the training run, without those that name files."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Recipe of the merge, without the models."""
    config: dict[str, Any] = field(default_factory=dict)
    """Config of the model that the step makes or measures; empty if there is none."""
    cost: Cost = Cost()
    about: About = About()

    @property
    def folder(self) -> str:
        """Below ``OUT/steps``."""
        return f"{self.name}-{self.key[:10]}"

    @property
    def may_go(self) -> bool:
        """Whether ``keep: results`` removes the weights that the step makes."""
        return self.kind in ("train", "upcycle") and self.about.role not in ("seed", "expert")

    def summary(self) -> dict[str, Any]:
        """What records say of it, as JSON; of the model only what is not empty."""
        about = {key: value for key, value in asdict(self.about).items() if self.about.title and value not in ("", ())}
        return {"kind": self.kind, "key": self.key, "about": about}


def has_routers(config: dict[str, Any]) -> bool:
    """Whether a model has losses of its own, which look at one micro-batch at a time."""
    return config.get("model_type") == "branchmix"


@dataclass(frozen=True)
class Graph:
    """All steps, in the order in which they begin where they can."""

    steps: dict[str, Step]

    def with_needs(self, names: Iterable[str]) -> list[Step]:
        """These steps and all that they need."""
        wanted = set(names)
        for step in reversed(self.steps.values()):  # each comes after all that it needs
            if step.name in wanted:
                wanted.update(step.needs.names)
        return [step for step in self.steps.values() if step.name in wanted]

    def chosen(self, only: Iterable[str]) -> list[Step]:
        """Steps whose name, or a part of it between dots, is or fits one of ``only``, and what they need; all for none.

        What nothing fits is a RecipeError.
        """
        names: list[str] = []
        parts = {name: [name, *name.split(".")] for name in self.steps}
        for wanted in only:
            fitting = [name for name in parts if any(fnmatchcase(part, wanted) for part in parts[name])]
            if not fitting:
                near = nearest(wanted, sorted({*chain(*parts.values())}))
                raise RecipeError(f"--only: no step is called {wanted!r}{near}; --dry-run lists them all")
            names += fitting
        return self.with_needs(names) if names else list(self.steps.values())

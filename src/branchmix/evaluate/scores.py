"""What an evaluation found, model by model, and the form in which programs read it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from branchmix.evaluate.perplexity import TextScore


@dataclass(frozen=True)
class Measured:
    """A metric with its standard error."""

    value: float
    stderr: float | None
    """None where lm-eval knows none, and for a single example."""


@dataclass(frozen=True)
class TaskScore:
    """What a model makes of a downstream task, or of a group of them as lm-eval averages it."""

    metrics: dict[str, Measured]
    """By lm-eval's names, ``acc`` or ``exact_match,strict-match``: metric and filter, if there is one."""
    higher_is_better: dict[str, bool]
    num_fewshot: int | None
    """Examples in the prompt; None for a group whose tasks differ."""
    examples: int
    version: str
    """Version of the task's definition in lm-eval."""
    subtasks: tuple[str, ...] = ()
    """Members of a group."""

    def as_dict(self) -> dict[str, Any]:
        metrics = {
            name: {**asdict(measured), "higher_is_better": self.higher_is_better.get(name.split(",")[0])}
            for name, measured in self.metrics.items()
        }
        subtasks = {"subtasks": list(self.subtasks)} if self.subtasks else {}
        facts = {"num_fewshot": self.num_fewshot, "examples": self.examples, "version": self.version}
        return {"metrics": metrics, **facts, **subtasks}


@dataclass(frozen=True)
class SuiteScore:
    """The mean of a suite's tasks, all of the same weight; of suites in the mean of all."""

    title: str
    score: Measured
    members: dict[str, str]
    """The metric of each task that counts; empty for the mean of suites."""

    def as_dict(self) -> dict[str, Any]:
        return {"title": self.title, **asdict(self.score), **({"metrics": self.members} if self.members else {})}


@dataclass
class ModelReport:
    """What one model, or ensemble, makes of every domain and task."""

    model: str
    dtype: str
    prefix: str | None = None
    """The token that a document's first one is predicted from; None if that one is not predicted."""
    max_length: int | None = None
    """Tokens of the window on documents; None without any."""
    stride: int | None = None
    domains: dict[str, TextScore] | None = None
    ensemble: dict[str, Any] | None = None
    """Members with their prior, and how they are weighted."""
    tasks: dict[str, TaskScore] | None = None
    """Tasks and groups of them; None for an ensemble, and if there are none."""
    suites: dict[str, SuiteScore] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        content: dict[str, Any] = {"model": self.model, "dtype": self.dtype}
        if self.domains is not None:
            content |= {"prefix": self.prefix, "max_length": self.max_length, "stride": self.stride}
            content |= {"ensemble": self.ensemble} if self.ensemble else {}
            content["domains"] = {name: score.as_dict() for name, score in self.domains.items()}
        if self.tasks is not None:
            content["tasks"] = {name: score.as_dict() for name, score in self.tasks.items()}
            if self.suites:
                content["suites"] = {name: suite.as_dict() for name, suite in self.suites.items()}
        return content


@dataclass
class EvalReport:
    """All models, in the order they were given; ensembles come last."""

    models: list[ModelReport]
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {"models": [model.as_dict() for model in self.models]}

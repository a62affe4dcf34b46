"""What models make of text and tasks, as numbers, and the form in which programs read them. No torch.

Shapes: N documents, X any further axes, T predicted tokens of one document, E members of an ensemble.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from branchmix.errors import RecipeError
from branchmix.statistics import PairedDifference, ratio

# ---- documents ----


@dataclass(frozen=True)
class ScoredDocument:
    """What a model makes of one document."""

    log_probs: np.ndarray
    """Log-probability of each predicted token, [T], in nats."""
    bytes: int
    """Size of what is predicted, in UTF-8."""

    @property
    def nll(self) -> float:
        """Negative log-likelihood of all predicted tokens, in nats."""
        return -float(self.log_probs.sum(dtype=np.float64))

    @property
    def tokens(self) -> int:
        return len(self.log_probs)

    def as_record(self) -> dict[str, Any]:
        """Fields of a line of JSON."""
        coded = base64.b64encode(self.log_probs.astype("<f4").tobytes()).decode()
        return {"nll": self.nll, "tokens": self.tokens, "bytes": self.bytes, "log_probs": coded}

    @classmethod
    def from_record(cls, line: dict[str, Any]) -> ScoredDocument:
        """The document of such a line."""
        return cls(np.frombuffer(base64.b64decode(line["log_probs"]), dtype="<f4"), line["bytes"])


@dataclass(frozen=True)
class TextScore:
    """What a model makes of a set of documents."""

    bits_per_byte: float
    stderr: float | None
    """Standard error of ``bits_per_byte`` over documents (see ``ratio``); None for a single document."""
    perplexity: float
    """Per token."""
    tokens: int
    bytes: int
    documents: int


def aggregate(documents: Iterable[ScoredDocument]) -> TextScore:
    """One number for many documents: all their nats over all their bytes."""
    documents = [document for document in documents if document.tokens]
    num_bytes, tokens = sum(document.bytes for document in documents), sum(document.tokens for document in documents)
    if not num_bytes or not tokens:
        raise RecipeError("there is no text to evaluate: all documents are empty")
    nats = [document.nll for document in documents]
    rate, error = ratio([nll / math.log(2) for nll in nats], [document.bytes for document in documents])
    perplexity = math.exp(min(math.fsum(nats) / tokens, 700.0))
    return TextScore(
        float(rate), None if error is None else float(error), perplexity, tokens, num_bytes, len(documents)
    )


# ---- ensembles ----


def mixed(members: Sequence[ScoredDocument], **options: Any) -> ScoredDocument:
    """A document under an ensemble; options as for ``ensemble_log_probs``."""
    return ScoredDocument(ensemble_log_probs([member.log_probs for member in members], **options), members[0].bytes)


def ensemble_log_probs(logp_ET: Any, *, prior_E: Sequence[float] | None = None, posterior: bool = True) -> np.ndarray:
    """Log-probabilities [T] (nats) of a document's tokens under an ensemble of experts by their outputs.

    ``p(x_t | x_<t) = sum_i w_i,t p_i(x_t | x_<t)``, where ``w_i,t`` is the posterior of the domain of expert i after
    the text before t: proportional to ``prior_i * prod_(s<t) p_i(x_s | x_<s)`` (Branch-Train-Merge, arXiv 2208.03306,
    section 2.2). It needs no more than each member's probabilities of the text's own tokens.

    Args:
        logp_ET: of each member, for the same tokens.
        prior_E: weights before the first token, which sum to 1; equal ones if not given.
        posterior: learn from the text so far which member to trust; otherwise the prior stays.
    """
    logp_ET = np.asarray(logp_ET, dtype=np.float64)
    prior = np.full(len(logp_ET), 1 / len(logp_ET)) if prior_E is None else np.asarray(prior_E, dtype=np.float64)
    with np.errstate(divide="ignore"):
        logw_ET = np.repeat(np.log(prior)[:, None], logp_ET.shape[1], axis=1)
    if posterior:
        logw_ET[:, 1:] += np.cumsum(logp_ET, axis=1)[:, :-1]
        logw_ET -= np.logaddexp.reduce(logw_ET, axis=0)
    mixed_T: np.ndarray = np.logaddexp.reduce(logw_ET + logp_ET, axis=0)
    return mixed_T


# ---- tasks ----


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
        facts = {"num_fewshot": self.num_fewshot, "examples": self.examples, "version": self.version}
        return {"metrics": metrics, **facts, **({"subtasks": list(self.subtasks)} if self.subtasks else {})}


@dataclass(frozen=True)
class SuiteScore:
    """The mean of a suite's tasks, all of the same weight; of suites in the mean of all."""

    title: str
    score: Measured
    members: dict[str, str]
    """The metric of each task that counts; empty for the mean of suites."""

    def as_dict(self) -> dict[str, Any]:
        return {"title": self.title, **asdict(self.score), **({"metrics": self.members} if self.members else {})}


# ---- two models on the same questions ----

ALPHA = 0.05
"""Significance level of differences between models."""


@dataclass(frozen=True)
class TaskDifference:
    """A metric of a task, second model minus first."""

    task: str
    metric: str
    found: PairedDifference
    p_adjusted: float | None
    """After Benjamini and Hochberg: over tasks and groups that are in no group, or over the tasks within groups."""
    is_within: bool
    """Whether the task is part of a group that is compared."""

    @property
    def differs(self) -> bool:
        return self.p_adjusted is not None and self.p_adjusted < ALPHA

    def as_dict(self) -> dict[str, Any]:
        return {**self.found.as_dict(), "p_adjusted": self.p_adjusted, "differs": self.differs}


@dataclass(frozen=True)
class Comparison:
    """A model against the first one, on all tasks."""

    first: str
    second: str
    differences: list[TaskDifference]

    def as_dict(self) -> dict[str, Any]:
        tasks: dict[str, dict[str, Any]] = {}
        for one in self.differences:
            tasks.setdefault(one.task, {})[one.metric] = one.as_dict()
        return {"models": [self.first, self.second], "alpha": ALPHA, "correction": "bh", "tasks": tasks}


# ---- reports ----


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
    questions: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """By task and metric, the score of each question; only of several models, to compare them question by question."""

    def as_dict(self) -> dict[str, Any]:
        content: dict[str, Any] = {"model": self.model, "dtype": self.dtype}
        if self.domains is not None:
            content |= {"prefix": self.prefix, "max_length": self.max_length, "stride": self.stride}
            content |= {"ensemble": self.ensemble} if self.ensemble else {}
            content["domains"] = {name: asdict(score) for name, score in self.domains.items()}
        if self.tasks is not None:
            content["tasks"] = {name: score.as_dict() for name, score in self.tasks.items()}
        if self.suites:
            content["suites"] = {name: score.as_dict() for name, score in self.suites.items()}
        return content


@dataclass
class EvalReport:
    """All models, in the order they were given; ensembles come last."""

    models: list[ModelReport]
    notes: list[str] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    """Each other model against the first one, on the same questions of tasks."""

    def as_dict(self) -> dict[str, Any]:
        content: dict[str, Any] = {"models": [model.as_dict() for model in self.models]}
        return content | ({"comparisons": [one.as_dict() for one in self.comparisons]} if self.comparisons else {})

"""What the log-probabilities of an example's options say: the official formulas (arXiv 2306.09479 and its evaluation).

The summed log-probability of class j is ``lp_j`` (nats). Per example, ``score`` computes what is averaged;
``summarise`` averages, and says what a model that ignores the prompt would have got.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from branchmix.scaling.examples import Example, Metric

CONSTANT_SHARE = 0.95
"""A model that predicts one class more often than this answers without reading."""
LOW_COVERAGE = 0.01
"""Below this mean probability of all classes together, the model would say something else entirely."""


@dataclass(frozen=True)
class Score:
    """One example's numbers; what its metric does not have is None."""

    loss: float
    """Classification: ``-log softmax(lp)[answer]``, normalised over the classes. Sequence probability: the summed
    ``-log p`` of the completion. Logodds: the difference of the odds itself, which the prize plots as a loss."""
    correct: bool | None = None
    predicted: int | None = None
    coverage: float | None = None
    """Probability of all classes together."""


@dataclass(frozen=True)
class Mean:
    """An average over examples."""

    value: float
    stderr: float | None
    """Sample standard deviation / sqrt(n); sqrt(a (1 - a) / (n - 1)) for an accuracy a; None for one example."""
    n: int


@dataclass(frozen=True)
class Summary:
    """A model's result on a task."""

    means: dict[str, Mean]
    """``accuracy``, ``loss`` and ``coverage``; ``loss`` only for sequence probability; ``logodds`` or
    ``absolute_logodds`` and ``accuracy`` for those."""
    baselines: dict[str, float] = field(default_factory=dict)
    """Accuracy of a model that always predicts the same class, by class."""
    predictions: dict[str, float] = field(default_factory=dict)
    """Share of examples for which the model predicts a class, by class."""
    chance: dict[str, float] = field(default_factory=dict)
    """Accuracy and loss of equal probabilities for all classes."""

    @property
    def flags(self) -> tuple[str, ...]:
        """Signs that a number says less than it seems to."""
        return tuple(_flags(self)) if self.predictions else ()


def classification(logprobs: Sequence[float], answer_index: int) -> Score:
    """Accuracy, loss and coverage of one example; of equal classes the first is predicted."""
    top = max(logprobs)
    total = top if math.isinf(top) else top + math.log(math.fsum(math.exp(value - top) for value in logprobs))
    predicted = logprobs.index(top)
    return Score(total - logprobs[answer_index], predicted == answer_index, predicted, math.exp(total))


def logodds(
    logprobs: Sequence[float], other_logprobs: Sequence[float], answer_index: int, *, absolute: bool = False
) -> Score:
    """How far ``prompt`` moves the odds of two classes away from those after ``other_prompt``.

    ``(lp_0 - lp_1) - (lp'_0 - lp'_1)``, its sign turned if the answer is class 1; ``absolute`` takes its size. Whether
    the model is right is judged on ``other_prompt``, as officially.
    """
    difference = (logprobs[0] - logprobs[1]) - (other_logprobs[0] - other_logprobs[1])
    difference = abs(difference) if absolute else difference if answer_index == 0 else -difference
    predicted = 0 if other_logprobs[0] >= other_logprobs[1] else 1
    return Score(difference, predicted == answer_index, predicted)


def score(
    metric: Metric, example: Example, logprobs: Sequence[float], other_logprobs: Sequence[float] | None = None
) -> Score:
    """One example's numbers, by the task's metric; logodds needs both prompts' log-probabilities."""
    if metric == "classification":
        return classification(logprobs, example.answer_index)
    if metric == "sequence_prob":
        return Score(-logprobs[0])  # not divided by the completion's length
    assert other_logprobs is not None
    return logodds(logprobs, other_logprobs, example.answer_index, absolute=metric == "absolute_logodds")


def loss_name(metric: Metric) -> str:
    """What results call the loss of an example: ``loss``, or the metric itself for log-odds."""
    return metric if metric in ("logodds", "absolute_logodds") else "loss"


def summarise(metric: Metric, examples: Sequence[Example], scores: Sequence[Score]) -> Summary:
    """Averages of a task's examples, with baselines."""
    means = {loss_name(metric): mean([score.loss for score in scores])}
    if metric == "sequence_prob":
        return Summary(means)
    means = {"accuracy": mean([float(bool(score.correct)) for score in scores]), **means}
    chance = {"accuracy": math.fsum(1 / len(example.classes) for example in examples) / len(examples)}
    if metric == "classification":
        means["coverage"] = mean([score.coverage or 0.0 for score in scores])
        chance["loss"] = math.fsum(math.log(len(example.classes)) for example in examples) / len(examples)
    baselines = class_shares(examples, [example.answer_index for example in examples])
    predictions = class_shares(examples, [score.predicted or 0 for score in scores])
    return Summary(means, baselines, predictions, chance)


def mean(values: Sequence[float]) -> Mean:
    """Average and its standard error."""
    n = len(values)
    middle = math.fsum(values) / n
    if n == 1:
        return Mean(middle, None, 1)
    variance = math.fsum((value - middle) ** 2 for value in values) / (n - 1)
    return Mean(middle, math.sqrt(variance / n), n)


def class_shares(examples: Sequence[Example], chosen: Sequence[int]) -> dict[str, float]:
    """How often each class was chosen, as a share of the examples.

    By the class's text if all examples have the same classes (in any order); else by its place, such as ``class 0``:
    then no text could always be predicted. Of the right answers, that is the accuracy of each constant answer.
    """
    if len({frozenset(example.classes) for example in examples}) == 1:
        names = list(examples[0].classes)
        counts = Counter(example.classes[index] for example, index in zip(examples, chosen, strict=True))
    else:
        names = [f"class {place}" for place in range(max(len(example.classes) for example in examples))]
        counts = Counter(names[index] for index in chosen)
    return {name: counts[name] / len(examples) for name in names}


def _flags(summary: Summary) -> Iterator[str]:
    accuracy, coverage = summary.means["accuracy"], summary.means.get("coverage")
    for name, share in summary.predictions.items():
        if share > CONSTANT_SHARE:
            yield f"predicts {name!r} for {share:.1%} of the examples"
    for name, baseline in summary.baselines.items():
        if abs(accuracy.value - baseline) < 0.5 / accuracy.n:
            yield f"its accuracy of {accuracy.value:.4f} is that of always predicting {name!r}"
    if coverage is not None and coverage.value < LOW_COVERAGE:
        yield f"gives the classes only {coverage.value:.2%} of the probability: it would say something else"

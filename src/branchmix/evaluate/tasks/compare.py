"""Two models on the same questions of downstream tasks: each model of an evaluation against the first one.

A metric is compared if it is the mean of the questions' own scores; others, such as a perplexity, have no difference
that a question could bring. A group counts all questions of its tasks, if its metric is their mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from branchmix.evaluate.scores import ALPHA, Comparison, ModelReport, TaskDifference, TaskScore
from branchmix.likelihood.lm_eval_samples import scores_of_sample
from branchmix.statistics import PairedDifference, adjusted_of, paired_difference


def compare_with_first(models: Sequence[ModelReport]) -> list[Comparison]:
    """Every other model against the first one; empty where there is no other, or no metric that can be compared."""
    compared = [model for model in models if model.questions]
    comparisons = [_compare(compared[0], other) for other in compared[1:]]
    return [comparison for comparison in comparisons if comparison.differences]


def _compare(first: ModelReport, second: ModelReport) -> Comparison:
    tasks = first.tasks or {}
    pairs = {
        (name, metric): found
        for name, task in tasks.items()
        for metric in task.metrics
        if (found := _difference(first, second, name, metric)) is not None
    }
    within = {name for group, _ in pairs for name in _members(tasks, group)}
    p_adjusted: dict[tuple[str, str], float | None] = {}
    for is_within in (False, True):
        p_adjusted |= adjusted_of({key: pairs[key].p for key in pairs if (key[0] in within) == is_within}, "bh")
    differences = [TaskDifference(*key, found, p_adjusted[key], key[0] in within) for key, found in pairs.items()]
    return Comparison(first.model, second.model, differences)


def _difference(first: ModelReport, second: ModelReport, name: str, metric: str) -> PairedDifference | None:
    """On the questions of a task, or of all tasks of a group; None if that is not what the metric averages."""
    columns: list[list[float]] = [[], []]
    for task in [one for one in _members(first.tasks or {}, name) if one not in _groups(first)] or [name]:
        scores, others = (model.questions.get(task, {}).get(metric, {}) for model in (first, second))
        shared = [key for key in scores if key in others]
        columns[0] += [scores[key] for key in shared]
        columns[1] += [others[key] for key in shared]
    for model, values in zip((first, second), columns, strict=True):
        told = ((model.tasks or {})[name].metrics if name in (model.tasks or {}) else {}).get(metric)
        if told is None or not values or not np.isclose(np.mean(values), told.value, rtol=1e-6, atol=1e-9):
            return None
    return paired_difference(*columns, alpha=ALPHA)


def _groups(model: ModelReport) -> set[str]:
    return {name for name, task in (model.tasks or {}).items() if task.subtasks}


def _members(tasks: Mapping[str, TaskScore], name: str) -> Iterator[str]:
    """All tasks and groups within a group."""
    for child in tasks[name].subtasks if name in tasks else ():
        yield child
        yield from _members(tasks, child)


def scores_of_questions(samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By metric, as lm-eval's results name it, the score of each question by its number; non-numbers are left out.

    ``samples`` are lm-eval's: a line for each question and filter.
    """
    scores: dict[str, dict[str, float]] = {}
    for sample in samples:
        for metric, value in scores_of_sample(sample).items():
            scores.setdefault(metric, {})[str(sample["doc_id"])] = value
    return scores

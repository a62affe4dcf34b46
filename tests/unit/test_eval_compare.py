"""Models of an evaluation side by side: which metrics can be compared, and what is corrected together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from branchmix.evaluate.scores import Measured, ModelReport, TaskScore
from branchmix.evaluate.tasks.compare import compare_with_first, scores_of_questions


def model(name: str, scores: dict[str, list[float]], groups: dict[str, tuple[str, ...]] | None = None) -> ModelReport:
    """Tasks with one metric, the mean of these scores; a group's is the mean of all its questions."""
    groups = groups or {}
    pooled = {name: [value for task in tasks for value in scores[task]] for name, tasks in groups.items()}
    report = ModelReport(name, "float32")
    report.tasks = {
        task: TaskScore(
            {"acc": Measured(float(np.mean(of)), 0.1)}, {"acc": True}, 0, len(of), "1", groups.get(task, ())
        )
        for task, of in {**pooled, **scores}.items()
    }
    report.questions = {task: {"acc": {str(n): v for n, v in enumerate(of)}} for task, of in scores.items()}
    return report


def bits(seed: int, share: float, n: int = 200) -> list[float]:
    return list((np.random.default_rng(seed).random(n) < share).astype(float))


def test_every_other_model_is_compared_with_the_first() -> None:
    names, shares = ("a", "b", "c"), (0.5, 0.55, 0.9)
    models = [
        model(name, {"x": bits(k, share), "y": bits(9 + k, 0.5)})
        for k, (name, share) in enumerate(zip(names, shares, strict=True))
    ]
    found = compare_with_first(models)
    assert [(one.first, one.second) for one in found] == [("a", "b"), ("a", "c")]
    differences = {one.task: one for one in found[1].differences}
    assert differences["x"].differs and not differences["y"].differs
    assert differences["x"].found.difference == pytest.approx(np.mean(bits(2, 0.9)) - np.mean(bits(0, 0.5)))
    p = [one.found.p for one in found[1].differences]
    assert [one.p_adjusted for one in found[1].differences] == pytest.approx(multipletests(p, method="fdr_bh")[1])


def test_a_group_counts_all_questions_of_its_tasks() -> None:
    groups = {"all": ("x", "y")}
    models = [model(name, {"x": bits(k, 0.4), "y": bits(5 + k, 0.6, 50)}, groups) for k, name in enumerate("ab")]
    (found,) = compare_with_first(models)
    by_task = {one.task: one for one in found.differences}
    assert by_task["all"].found.n == 250 and not by_task["all"].is_within and by_task["x"].is_within
    assert by_task["all"].p_adjusted == by_task["all"].found.p  # the only one that is in no group
    whole = 0.8 * by_task["x"].found.difference + 0.2 * by_task["y"].found.difference
    assert by_task["all"].found.difference == pytest.approx(whole)


def test_what_is_no_mean_of_questions_is_not_compared() -> None:
    models = [model(name, {"x": bits(k, 0.5)}) for k, name in enumerate("ab")]
    for one in models:
        assert one.tasks is not None
        one.tasks["x"].metrics["acc"] = Measured(2.5, 0.1)  # such as a perplexity
    assert compare_with_first(models) == []
    assert compare_with_first([model("a", {"x": bits(0, 0.5)})]) == []


def test_scores_of_lm_evals_samples() -> None:
    samples: list[dict[str, Any]] = [
        {
            "doc_id": 3,
            "filter": "none",
            "metrics": ["acc", "word_perplexity"],
            "acc": 1.0,
            "word_perplexity": (-3.0, 4),
        },
        {"doc_id": 3, "filter": "strict", "metrics": ["exact_match"], "exact_match": np.float64(0)},
        {"doc_id": 4, "filter": "none", "metrics": ["acc"], "acc": True},
    ]
    assert scores_of_questions(samples) == {"acc": {"3": 1.0, "4": 1.0}, "exact_match,strict": {"3": 0.0}}

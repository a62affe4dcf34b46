"""Axes within a model, paired by question: numbers of examples in the prompt, reasoning budgets, experts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchmix.errors import DataError
from branchmix.scaling.trends import html_page, sentences
from branchmix.scaling.trends.fit import curve
from branchmix.scaling.trends.judge import Judged, Report, trends_by_axis
from branchmix.scaling.trends.overview import Overview
from branchmix.scaling.trends.pairs import compare_models
from branchmix.scaling.trends.table import read_table
from branchmix.scaling.trends.verdict import Evidence, Limits
from branchmix.statistics import paired_difference
from trend_tables import BUDGETS, settings, trends, write


def verdicts(report: Report) -> dict[str, Judged]:
    return {one.series.family: one for one in report.judged}


def test_each_model_is_a_curve_and_is_paired_by_question(tmp_path: Path) -> None:
    falls, flat = [0.6 - 0.05 * k for k in range(6)], [0.5] * 6
    settings(tmp_path, {"a": falls, "b": flat})
    report = trends(tmp_path)
    assert report.axis == "reasoning_budget" and report.is_within
    found = verdicts(report)
    assert found["a"].verdict.label == "inverse" and found["b"].verdict.label not in ("inverse", "standard")
    assert found["a"].verdict.paired and found["a"].verdict.sizes == 6
    assert report.interactions["memo-trap"]["accuracy"][0]["families"] == ["a", "b"]


def test_what_is_hard_for_all_settings_takes_no_part(tmp_path: Path) -> None:
    """The interval of the change from the first to the last setting is that of the paired differences."""
    answers = settings(tmp_path, {"a": [0.5, 0.52, 0.5, 0.51, 0.5, 0.53]}, n=2000)
    (one,) = trends(tmp_path).judged
    paired = paired_difference(answers["a", "", 0].astype(float), answers["a", "", 16384].astype(float))
    assert paired is not None
    found = one.curve.sampling_KK[0, 0] + one.curve.sampling_KK[-1, -1] - 2 * one.curve.sampling_KK[0, -1]
    assert np.sqrt(found) == pytest.approx((paired.interval[1] - paired.interval[0]) / 2 / 1.96, rel=0.05)
    alone = np.sqrt(one.curve.sampling_KK[0, 0] + one.curve.sampling_KK[-1, -1])
    assert np.sqrt(found) < 0.8 * alone  # unpaired, the error is a third larger


def test_zero_lies_one_step_before_the_smallest_place(tmp_path: Path) -> None:
    """The verdict is that of a table in which 512 stands for 0, and 0 is what is shown."""
    for name, places in (("zero", BUDGETS), ("step", (512, *BUDGETS[1:]))):
        (tmp_path / name).mkdir()
        settings(tmp_path / name, {"a": [0.7, 0.4, 0.4, 0.4, 0.4, 0.4]}, places=places)
    zero, step = (trends(tmp_path / name).judged[0] for name in ("zero", "step"))
    assert zero.curve.x_K == pytest.approx(step.curve.x_K) and zero.verdict.p == step.verdict.p
    jump = zero.verdict.form["jump"]
    assert (jump["from"], jump["to"]) == (0, 1024) and step.verdict.form["jump"]["from"] == 512
    assert sentences.place("reasoning_budget", 0).startswith("0 ")
    assert sentences.axis_value("reasoning_budget", 16384) == "16,384"


def test_seeds_are_repetitions_of_a_setting(tmp_path: Path) -> None:
    settings(tmp_path, {"a": [0.6 - 0.05 * k for k in range(6)]}, seeds=("1", "2", "3"))
    (one,) = trends(tmp_path).judged
    assert (one.verdict.runs, one.verdict.sizes, one.verdict.label) == (18, 6, "inverse")
    assert one.curve.within == 0 and one.verdict.paired


def test_repeated_runs_say_nothing_about_how_far_a_setting_is_off_the_curve() -> None:
    """All seeds of a setting share what is peculiar to it: a flat curve of jumpy settings is no trend for all that.

    Counted as runs of a size, which the seeds of a family of models are, 20 % of such curves got a wrong verdict.
    """
    wrong = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        y_N = np.repeat(0.5 + 0.03 * random.standard_normal(5), 3) + 0.01 * random.standard_normal(15)
        found = curve(np.repeat(np.arange(5.0), 3), y_N, np.full(15, 0.01), average=True)
        assert found.jitter == pytest.approx(
            curve(np.arange(5.0), y_N.reshape(5, 3).mean(1), np.full(5, 0.01 / 3**0.5)).jitter
        )
        evidence = Evidence(found, runs=15, lower_is_better=False, limits=Limits())
        wrong += evidence.trend.p < 0.05 or (evidence.turn is not None and evidence.turn.p < 0.05)
    assert wrong <= 6


def test_settings_are_compared_on_the_questions_that_all_have(tmp_path: Path) -> None:
    """Here the longest prompts leave no room for the hard half of the questions, which would look like progress."""
    answers = settings(tmp_path, {"a": [0.5] * 5}, axis="shots", places=(0, 1, 2, 4, 8))
    last = tmp_path / "examples" / "a" / "shots-8" / "memo-trap.jsonl"
    lines = [json.loads(line) for line in last.read_text().splitlines()]
    last.write_text("".join(json.dumps(line) + "\n" for line in lines if line["key"] % 2 == 0 or line["key"] < 10))
    table = tmp_path / "results.csv"
    text = table.read_text().splitlines()
    kept = [key for key in range(400) if key % 2 == 0 or key < 10]
    mean = answers["a", "", 8][kept].mean()
    assert mean > 0.7
    text[-1] = text[-1].replace(str(answers["a", "", 8].mean()), str(mean), 1)
    table.write_text("\n".join(text) + "\n")
    report = trends(tmp_path)
    assert "a is judged on the 205 of 400 examples that all settings have" in "".join(report.notes)
    (one,) = report.judged
    assert one.series.y == pytest.approx([answers["a", "", place][kept].mean() for place in (0, 1, 2, 4, 8)])
    assert abs(one.verdict.effect) < 0.1  # from the table it would be 0.24


def test_along_size_each_setting_is_a_curve(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for size in range(5):
        for shots, better in ((0, -0.1), (4, 0.1)):
            place = {"model": f"m{size}", "params": 1e7 * 4**size, "shots": shots}
            value = 0.5 + better * size / 2
            rows.append({"task": "t", "metric": "accuracy", "value": value, "n": 5000, **place})
    table = write(tmp_path / "table.csv", rows)
    found = verdicts(trends(table))
    assert {name: one.verdict.label for name, one in found.items()} == {"shots 0": "inverse", "shots 4": "standard"}
    along = verdicts(trends(table, axis="shots"))
    assert set(along) == {f"m{size}" for size in range(5)}
    assert {one.verdict.label for one in along.values()} == {"not-testable"}


def test_a_column_that_goes_with_size_is_no_setting(tmp_path: Path) -> None:
    """Steps of training differ within a model, but so do its tokens: curves stay those of the family."""
    rows = [
        {"task": "t", "model": "m", "tokens": 1e9 * 2**k, "step": k + 1, "metric": "acc", "value": 0.5, "n": 900}
        for k in range(6)
    ]
    found = read_table(write(tmp_path / "table.csv", rows))
    assert found.within == ()
    (one,) = trends(tmp_path / "table.csv", axis="step").judged
    assert one.series.family == "" and one.verdict.sizes == 6


def test_zero_is_no_size(tmp_path: Path) -> None:
    rows = [{"task": "t", "model": "m", "params": k, "metric": "acc", "value": 0.5, "n": 900} for k in range(2)]
    with pytest.raises(DataError, match="line 2 has '0' as params, which is not a positive number"):
        read_table(write(tmp_path / "table.csv", rows))


def test_two_settings_are_compared_question_by_question(tmp_path: Path) -> None:
    answers = settings(tmp_path, {"a": [0.6, 0.6, 0.6, 0.6, 0.6, 0.3]})
    (one,) = compare_models(read_table(tmp_path), "a, reasoning_budget 0", "a, reasoning_budget 16384").tasks
    assert one.verdict == "worse"
    assert one.found.difference == pytest.approx(answers["a", "", 16384].mean() - answers["a", "", 0].mean())


def test_the_page_speaks_of_settings_and_of_the_budget_that_was_assigned(tmp_path: Path) -> None:
    settings(tmp_path, {"a": [0.6 - 0.05 * k for k in range(6)], "b": [0.5] * 6}, n=200)
    overview = Overview(trends_by_axis(tmp_path))
    page = " ".join(re.sub(r"<[^>]+>", " ", html_page.html(overview, command="branchmix")).split())
    assert "Does more reasoning help?" in page and "2 models answered the questions of 1 task" in page
    assert "from 0 to 16,384 tokens of reasoning" in page
    assert "the budget that was assigned, never the length that the model really used" in page
    assert "From the smallest to the largest of 6 settings, accuracy falls by about" in page
    assert "Inverse scaling: the more, the worse the model does." in page
    assert "a: 1 task: worse with scale b: 1 task: too uncertain to say" in page
    for word in ("larger", " size ", " sizes", "trained"):
        assert word not in page, page[page.index(word) - 100 : page.index(word) + 100]


def test_reports_along_size_and_within_models_do_not_mix(tmp_path: Path) -> None:
    settings(tmp_path, {"a": [0.5] * 6}, params=1e9, tokens=1e12)
    (report,) = trends_by_axis(tmp_path)
    assert report.axis == "reasoning_budget"
    assert any("the axis is reasoning_budget: along params there is a single place" in note for note in report.notes)

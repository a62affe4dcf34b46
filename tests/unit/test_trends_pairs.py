"""``scaling trends --compare``: two models of a table on the same questions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from branchmix.cli import main
from branchmix.errors import DataError
from branchmix.scaling.trends.pairs import compare_models
from branchmix.scaling.trends.table import read_table
from trend_tables import rows_of, write, write_examples

TASKS = {"memo-trap": 0.2, "neqa": 0.0, "sig-figs": 0.02}
"""By how much the second model is better."""


def folder(tmp_path: Path, **columns: Any) -> tuple[Path, dict[str, np.ndarray]]:
    """Two models on three tasks of 300 questions, with scores of each."""
    random = np.random.default_rng(3)
    rows, answers = [], {}
    for task, better in TASKS.items():
        hard = random.random(300)
        right_2N = np.stack([random.random(300) < 0.8 - 0.6 * hard + gain for gain in (0.0, better)])
        answers[task] = right_2N
        for row, right_N in zip(rows_of(right_2N.mean(1), task=task, n=300, **columns), right_2N, strict=True):
            rows.append(row)
            lines = [{"key": n, "correct": int(right), "loss": float(n % 7)} for n, right in enumerate(right_N)]
            write_examples(tmp_path, row["model"], task, lines)
    write(tmp_path / "results.csv", rows)
    return tmp_path, answers


def test_differences_are_those_of_mcnemar_corrected_over_tasks(tmp_path: Path) -> None:
    place, answers = folder(tmp_path)
    found = compare_models(read_table(place), "m0", "m1")
    p = []
    for one in found.tasks:
        first, second = answers[one.task]
        p.append(mcnemar([[sum(first & second), sum(first & ~second)], [sum(~first & second), 0]], exact=True).pvalue)
        assert one.found.p == pytest.approx(p[-1]) and one.found.n == 300
        assert one.found.difference == pytest.approx(second.mean() - first.mean())
    assert [one.p_adjusted for one in found.tasks] == pytest.approx(multipletests(p, method="fdr_bh")[1])
    assert {one.task: one.verdict for one in found.tasks}["memo-trap"] == "better"
    turned = compare_models(read_table(place), "m1", "m0")
    assert {one.task: one.verdict for one in turned.tasks}["memo-trap"] == "worse"
    less = compare_models(read_table(place), "m0", "m1", lower_is_better=["accuracy"])
    assert {one.task: one.verdict for one in less.tasks}["memo-trap"] == "worse"


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    place, _ = folder(tmp_path, data="official")
    for more in (["--json"], []):
        monkeypatch.setattr("sys.argv", ["branchmix", "scaling", "trends", str(place), "--compare", "m0", "m1", *more])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 0
    out = capsys.readouterr().out
    content, _ = json.JSONDecoder().raw_decode(out)
    assert content["models"] == ["m0", "m1"] and content["correction"] == "bh"
    assert content["tasks"]["memo-trap"]["accuracy"]["verdict"] == "better"
    low, high = content["tasks"]["sig-figs"]["accuracy"]["interval"]
    assert low < 0 < high
    assert "m1 minus m0, on the same questions" in out and "detectable" in out


def test_a_run_of_several_is_named_by_its_seed(tmp_path: Path) -> None:
    rows = []
    for seed, share in (("1", 4), ("2", 3)):
        rows += rows_of([share / 8], n=8, seed=seed)
        file = tmp_path / "examples" / "m0" / f"seed-{seed}" / "memo-trap.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps({"key": n, "correct": int(n < share)}) + "\n" for n in range(8)))
    write(tmp_path / "results.csv", rows)
    table = read_table(tmp_path)
    (one,) = compare_models(table, "m0, seed 1", "m0, seed 2").tasks
    assert one.found.difference == -1 / 8
    with pytest.raises(DataError, match="lines 2 and 3: m0 is several runs: name one of them, such as 'm0, seed 1'"):
        compare_models(table, "m0", "m0, seed 2")


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (("m0", "m11"), "there is no model 'm11'"),
        (("m0", "m2"), "memo-trap, accuracy: m2 has no scores of single examples"),
    ],
)
def test_mistakes_are_one_line(models: tuple[str, str], message: str, tmp_path: Path) -> None:
    place, _ = folder(tmp_path)
    lines = (place / "results.csv").read_text().splitlines()
    (place / "results.csv").write_text("\n".join([*lines, lines[1].replace("m0", "m2")]) + "\n")
    with pytest.raises(DataError, match=message):
        compare_models(read_table(place), *models)


def test_the_reason_is_one_of_the_comparison(tmp_path: Path) -> None:
    """And not a note of the table about something else."""
    place, _ = folder(tmp_path)
    for task in TASKS:
        write_examples(place, "m1", task, [{"key": "another", "correct": 1}, {"key": 7, "correct": 1}])
    table = replace(read_table(place), notes=("other.json: left out",))
    message = "nothing to compare: sig-figs, accuracy: fewer than two questions are in both, too few"
    with pytest.raises(DataError, match=message):
        compare_models(table, "m0", "m1")
    only = replace(table, rows=[row for row in table.rows if (row.task == "neqa") == (row.model == "m0")])
    with pytest.raises(DataError, match="nothing to compare: m0 and m1 have no task in common"):
        compare_models(only, "m0", "m1")
    write_examples(place, "m1", "neqa", [{"key": n, "correct": n % 2} for n in range(9)])
    found = compare_models(table, "m0", "m1")
    assert [one.task for one in found.tasks] == ["neqa"] and found.notes[0] == "other.json: left out"
    assert "memo-trap, accuracy: 1 of 300 questions are in both" in found.notes


def test_a_run_is_not_compared_with_itself(tmp_path: Path) -> None:
    table = read_table(folder(tmp_path)[0])
    with pytest.raises(DataError, match="'m0' and 'm0' are the same run: name two that differ"):
        compare_models(table, "m0", "m0")
    seeded = replace(table, rows=[row.model_copy(update={"seed": "1"}) for row in table.rows])
    with pytest.raises(DataError, match="'m0' and 'm0, seed 1' are the same run"):
        compare_models(seeded, "m0", "m0, seed 1")


def test_unknown_metrics_are_not_better_if_lower(tmp_path: Path) -> None:
    table = read_table(folder(tmp_path)[0])
    with pytest.raises(DataError, match=r"there is no metric 'acuracy' .did you mean 'accuracy'"):
        compare_models(table, "m0", "m1", lower_is_better=["acuracy"])


def test_axis_is_not_for_two_models(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["scaling", "trends", "x.csv", "--compare", "a", "b", "--axis", "params"]
    monkeypatch.setattr("sys.argv", ["branchmix", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "--axis: is about trends" in capsys.readouterr().err

"""Slices by difficulty: opposite trends that cancel are seen, and slices do not make trends of luck."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from branchmix.cli import main
from branchmix.scaling.trends.fit import curve
from branchmix.scaling.trends.judge import Report
from branchmix.scaling.trends.series import deviations_of
from branchmix.scaling.trends.slices import cross_fitted, halves, names_of
from branchmix.scaling.trends.verdict import Evidence, Limits
from trend_tables import trends, write


def family(
    folder: Path, share_NX: np.ndarray, *, seeds: int = 1, difficulty_X: np.ndarray | None = None, seed: int = 0
) -> np.ndarray:
    """Models of N sizes that answer question x with these probabilities, with scores of examples."""
    random, rows, answers = np.random.default_rng(seed), [], []
    for size, share_X in enumerate(share_NX):
        for number in range(seeds):
            right_X = random.random(len(share_X)) < share_X
            answers.append(right_X)
            place = {"model": f"m{size}", "params": 1e7 * 4**size, "seed": number if seeds > 1 else ""}
            scored = {"metric": "accuracy", "value": right_X.mean(), "n": len(right_X)}
            rows.append({"task": "memo-trap", **place, **scored})
            where = folder / "examples" / f"m{size}" / (f"seed-{number}" if seeds > 1 else "")
            where.mkdir(parents=True, exist_ok=True)
            lines = [{"key": f"{key:04d}", "correct": int(right)} for key, right in enumerate(right_X)]
            if difficulty_X is not None:
                lines = [{**line, "difficulty": d} for line, d in zip(lines, difficulty_X.tolist(), strict=True)]
            (where / "memo-trap.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write(folder / "results.csv", rows)
    return np.array(answers)


def opposite(sizes: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hard questions are U-shaped and easy ones inverted-U, and their sum is flat (2410.01692); and what is hard."""
    bend_K = 0.2 * (1 - 2 * np.abs(np.linspace(-1, 1, sizes)))  # up in the middle
    is_hard_X = np.arange(n) % 2 == 0
    share_NX = np.where(is_hard_X, 0.3 - bend_K[:, None], 0.7 + bend_K[:, None])
    return share_NX, is_hard_X.astype(float)


def labels(report: Report) -> dict[str, str]:
    return {one.series.family: one.verdict.label for one in report.judged}


def test_opposite_shapes_are_seen_where_the_difficulty_is_given(tmp_path: Path) -> None:
    share_NX, hard_X = opposite(8, 800)
    answers = family(tmp_path, share_NX, difficulty_X=hard_X)
    assert labels(trends(tmp_path))[""] in ("flat", "inconclusive")
    report = trends(tmp_path, slices=2)
    found = labels(report)
    assert list(found) == ["all questions", "harder half", "easier half"]
    assert found["harder half"] == "u-shaped" and found["easier half"] == "inverted-u"
    assert found["all questions"] in ("flat", "inconclusive")
    hard = next(one for one in report.judged if one.series.family == "harder half")
    assert hard.series.y == pytest.approx(answers[:, hard_X == 1].mean(1)) and hard.verdict.paired
    assert hard.series.rows[0].n == 400


def test_and_where_it_is_had_from_the_other_half_of_the_runs(tmp_path: Path) -> None:
    share_NX, _ = opposite(8, 800)
    family(tmp_path, share_NX, seeds=2)
    found = labels(trends(tmp_path, slices=2))
    assert found["harder half"] == "u-shaped" and found["easier half"] == "inverted-u"


def test_all_slices_of_all_tasks_are_corrected_together(tmp_path: Path) -> None:
    share_NX, hard_X = opposite(8, 600)
    family(tmp_path, share_NX, difficulty_X=hard_X)
    verdicts = [one.verdict for one in trends(tmp_path, slices=2).judged]
    p = [verdict.p for verdict in verdicts]
    assert [v.p_adjusted for v in verdicts] == pytest.approx(multipletests(p, method="fdr_bh")[1])


def test_halves_are_alike_in_size() -> None:
    assert list(halves(np.arange(8.0))) == [0, 1, 1, 0, 0, 1, 1, 0]
    assert list(halves(np.repeat(np.arange(5.0), 2))) == [0, 1] * 5
    assert list(halves(np.repeat(np.arange(2.0), 3))) == [0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("seeds", [1, 2])
def test_luck_is_no_trend(seeds: int) -> None:
    """On flat curves of questions whose difficulty is spread, cross-fitted slices get few wrong verdicts.

    Sorted by the smallest half of the sizes, which are on the curve themselves, hard questions get better in most
    families: their bad luck is not repeated. This is what cross-fitting is for.
    """
    wrong = {"cross-fitted": 0, "own first half": 0}
    sizes, n, families = 8, 400, 30
    for seed in range(families):
        random = np.random.default_rng(seed)
        share_X = stats.norm.cdf(random.normal(0, 0.5, n))
        answers_NX = (random.random((sizes * seeds, n)) < share_X).astype(float)
        x_N = np.repeat(np.arange(sizes) / 3, seeds)
        half_N, luck_X = halves(x_N), random.random(n) / 100
        first_X = answers_NX[: sizes * seeds // 2].mean(0) + luck_X
        by_half = [answers_NX[half_N == half].mean(0) + luck_X for half in (0, 1)]
        for name in wrong:
            sorted_by = [by_half[1 - half] if name == "cross-fitted" else first_X for half in half_N]
            member_NX = np.array([own < np.median(own) for own in sorted_by])
            drawn, stderr_N = deviations_of(answers_NX, member_NX, [str(key) for key in range(n)], num_draws=500)
            y_N = (answers_NX * member_NX).sum(1) / member_NX.sum(1)
            evidence = Evidence(
                curve(x_N, y_N, stderr_N, deviations_BN=drawn), runs=len(x_N), lower_is_better=False, limits=Limits()
            )
            wrong[name] += evidence.trend.p < 0.05 or (evidence.turn is not None and evidence.turn.p < 0.05)
    assert wrong["own first half"] > 0.7 * families
    assert wrong["cross-fitted"] <= 0.1 * families


@pytest.mark.parametrize("seeds", [1, 3])
def test_flat_families_have_flat_slices_at_an_odd_number_of_sizes(seeds: int) -> None:
    """On average over families. Sorted by two runs or by three, the harder half was .353 .319 .324 .353 .355."""
    sizes, n, families = 5, 400, 300
    x_N, mean_N = np.repeat(np.arange(sizes) / 3, seeds), np.zeros(sizes * seeds)
    random = np.random.default_rng(0)
    for _ in range(families):
        share_X = stats.norm.cdf(random.normal(0, 0.5, n))
        right_NX = (random.random((len(x_N), n)) < share_X).astype(float)
        is_hard_NX = cross_fitted(-right_NX, x_N, 2) == 0
        mean_N += (right_NX * is_hard_NX).sum(1) / is_hard_NX.sum(1) / families
    assert np.ptp(mean_N) < 0.01 and mean_N.mean() < 0.47


def test_opposite_trends_of_single_questions_are_no_slices(tmp_path: Path) -> None:
    """Half of the questions fall from right to wrong and half rise: none is harder. Both halves of the runs agree."""
    u = np.linspace(0, 1, 8)[:, None]
    falls_X = np.arange(1000) % 2 == 0
    family(tmp_path, np.where(falls_X, 0.9 - 0.8 * u, 0.1 + 0.8 * u))
    found = labels(trends(tmp_path, slices=2))
    assert not set(found.values()) & {"standard", "inverse", "u-shaped", "inverted-u"}


def test_without_scores_there_are_no_slices(tmp_path: Path) -> None:
    rows = [{"task": "t", "model": f"m{k}", "params": 10**k, "metric": "acc", "value": 0.5, "n": 90} for k in range(6)]
    report = trends(write(tmp_path / "table.csv", rows), slices=3)
    assert labels(report) == {"": report.judged[0].verdict.label}
    assert "t, acc: no slices by difficulty, for models have no scores of single examples in common" in report.notes


def test_slices_that_are_too_small_are_left_out(tmp_path: Path) -> None:
    family(tmp_path, np.full((6, 50), 0.5))
    report = trends(tmp_path, slices=3)
    assert "memo-trap, accuracy: 50 questions are too few for 3 slices of 20 or more" in report.notes
    (tmp_path / "more").mkdir()
    family(tmp_path / "more", np.full((6, 200), 0.5), difficulty_X=(np.arange(200) < 10).astype(float))
    report = trends(tmp_path / "more", slices=2)
    assert "memo-trap, accuracy: the harder half has 10 questions, too few: left out" in report.notes
    assert list(labels(report)) == ["all questions", "easier half"]


def test_names() -> None:
    assert [len(set(names_of(count))) for count in (2, 3, 4, 5)] == [2, 3, 4, 5]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    share_NX, hard_X = opposite(8, 600)
    family(tmp_path, share_NX, difficulty_X=hard_X)
    page = tmp_path / "page.html"
    words = ["scaling", "trends", str(tmp_path), "--slices", "2", "--html", str(page), "--json"]
    monkeypatch.setattr("sys.argv", ["branchmix", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    content = json.loads(capsys.readouterr().out)
    assert stopped.value.code == 0
    found = {one["family"]: one["tasks"]["memo-trap"]["accuracy"]["verdict"] for one in content["series"]}
    assert found["harder half"] == "u-shaped" and found["easier half"] == "inverted-u"
    assert "interactions" not in content  # a slice and the whole it is of are not families
    assert "harder half" in page.read_text()

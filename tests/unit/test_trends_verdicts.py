"""Verdicts: Pythia's, curves of every shape, and what stands side by side."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchmix.cli import main
from branchmix.scaling.trends.judge import Report
from branchmix.scaling.trends.verdict import Limits, Verdict
from trend_tables import pythia, rows_of, trends, write, write_examples

FINAL = 143000


def verdicts(report: Report, metric: str = "accuracy") -> dict[str, Verdict]:
    return {one.series.task: one.verdict for one in report.judged if one.series.metric == metric}


def judge(tmp_path: Path, *curves: list[dict[str, Any]], **options: Any) -> Report:
    return trends(write(tmp_path / "table.csv", [row for rows in curves for row in rows]), **options)


# ---- Pythia, final checkpoints ----

INVERSE = {"memo-trap", "pattern-matching-suppression", "truthfulqa-mc1", "truthfulqa-mc2"}
INVERTED = {"resisting-correction"}


def test_pythia_task_by_task(tmp_path: Path) -> None:
    """Without correction: four inverse, one inverted-U, seven without a verdict.

    Exact Kendall and Lind-Mehlum at 5 % agree on all but redefine. Their parabola bends (p = 0.036); against monotone
    curves, which may bend as well, the turn has p = 0.076.
    """
    found = verdicts(judge(tmp_path, pythia(step=FINAL), correction="none"))
    assert len(found) == 12
    assert {task for task, verdict in found.items() if verdict.label == "inverse"} == INVERSE
    assert {task for task, verdict in found.items() if verdict.label == "inverted-u"} == INVERTED
    assert {verdict.label for task, verdict in found.items() if task not in INVERSE | INVERTED} == {"inconclusive"}
    p = {task: verdict.p for task, verdict in found.items()}
    assert p["hindsight-neglect"] == pytest.approx(0.0534, abs=5e-5)
    assert p["pattern-matching-suppression"] == pytest.approx(0.0148, abs=5e-5)
    assert p["memo-trap"] == pytest.approx(0.00025, abs=5e-6)
    assert p["truthfulqa-mc2"] == pytest.approx(2 / math.factorial(8))
    assert found["modus-tollens"].jitter > 0.3  # no trend, wild
    assert found["modus-tollens"].interval == (-1, 1)  # anything that an accuracy can do
    assert found["resisting-correction"].turning_point == pytest.approx(410e6)  # the size with the highest value, .903
    assert all(verdict.sizes == 8 for verdict in found.values())


def test_pythia_as_twelve_tasks_at_once(tmp_path: Path) -> None:
    """Redefine's weak turn (p = 0.076) is one that twelve tasks bring about by chance: it must not survive."""
    found = verdicts(judge(tmp_path, pythia(step=FINAL), limits=Limits(alpha=0.08)))
    assert {task for task, verdict in found.items() if verdict.label == "inverse"} == INVERSE
    assert {task for task, verdict in found.items() if verdict.label == "inverted-u"} == INVERTED
    redefine = found["redefine"]
    assert (redefine.label, redefine.alone) == ("inconclusive", "inverted-u")
    assert redefine.p_adjusted == pytest.approx((redefine.p or 0) * 12 / 8)
    assert "the turn is significant alone (p = 0.076), but not as one of several tasks (p = 0.11" in redefine.reason


def test_a_plateau_of_pythia_that_a_parabola_took_for_a_turn(tmp_path: Path) -> None:
    """Resisting-correction at step 16,000 rises to .899, then .872 and .878."""
    found = verdicts(judge(tmp_path, pythia(step=16000), correction="none"))["resisting-correction"]
    assert (found.label, found.p) == ("standard", pytest.approx(0.0009, abs=5e-5))
    plateau = found.form["level_from"]
    assert (plateau["axis"], plateau["value"]) == (pytest.approx(1.4e9), pytest.approx(0.885, abs=1e-3))


def test_checkpoints_of_one_size_are_no_repetitions(tmp_path: Path) -> None:
    report = judge(tmp_path, pythia())
    assert report.axis == "params" and "models with the same params differ in tokens" in report.notes[1]
    one = report.judged[0].verdict
    assert (one.sizes, one.runs) == (8, 64)


# ---- shapes ----

SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "standard": lambda u: 0.4 + 0.3 * u,
    "inverse": lambda u: 0.7 - 0.3 * u,
    "u-shaped": lambda u: 0.4 + 0.3 * (2 * u - 1) ** 2,
    "inverted-u": lambda u: 0.7 - 0.3 * (2 * u - 1) ** 2,
    "flat": lambda u: np.full_like(u, 0.5),
    "inconclusive": lambda u: 0.5 + 0.2 * np.sin(37 * u + 1),
}


@pytest.mark.parametrize("sizes", [5, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape: str, sizes: int, tmp_path: Path) -> None:
    values = SHAPES[shape](np.linspace(0, 1, sizes))
    values = values + np.random.default_rng(sizes).normal(0, 0.001, sizes)
    stderr = 0.002 if shape == "flat" else 0.01
    found = verdicts(judge(tmp_path, rows_of(values, stderr=stderr)))["memo-trap"]
    assert found.label == shape, found
    assert found.interval[0] <= found.effect <= found.interval[1]
    if shape in ("standard", "inverse"):
        assert found.effect == pytest.approx(0.3 if shape == "standard" else -0.3, abs=0.02)
        assert found.p == pytest.approx(2 / math.factorial(sizes)) and not found.legs
    if shape in ("u-shaped", "inverted-u"):
        assert list(found.legs) == (["drop", "rise"] if shape == "u-shaped" else ["rise", "drop"])
        assert found.legs["rise"]["effect"] == pytest.approx(0.3, abs=0.03)
        assert found.legs["drop"]["effect"] == pytest.approx(-0.3, abs=0.03)
        assert found.effect == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("shape", ["standard", "inverse", "u-shaped", "inverted-u"])
def test_words_are_about_performance(shape: str, tmp_path: Path) -> None:
    """A loss that rises is inverse scaling, and its effect is a rise."""
    loss = 2 - SHAPES[shape](np.linspace(0, 1, 8))
    found = verdicts(judge(tmp_path, rows_of(loss, metric="loss", stderr=0.01)), "loss")["memo-trap"]
    assert found.label == shape
    if shape == "inverse":
        assert found.effect == pytest.approx(0.3, abs=0.01) and found.description == "decreasing"
    if shape == "u-shaped":
        assert list(found.legs) == ["rise", "drop"]


@pytest.mark.parametrize(
    ("values", "description"),
    [
        ([0.6, 0.3, 0.7], "down, then up"),  # as PaLM's three sizes
        ([0.9, 0.7, 0.5, 0.2], "decreasing"),
        ([0.2, 0.5], "increasing"),
        ([0.2, 0.6, 0.5], "up, then down"),
        ([0.2, 0.6, 0.5, 0.8], "up and down"),
        ([0.5], "a single size"),
    ],
)
def test_few_sizes_are_described_and_never_judged(values: list[float], description: str, tmp_path: Path) -> None:
    found = verdicts(judge(tmp_path, rows_of(values)))["memo-trap"]
    assert (found.label, found.description, found.p, found.sizes) == (
        "not-testable",
        description,
        None,
        len(values),
    )
    assert found.interval[0] <= found.effect <= found.interval[1]


def test_a_significant_trend_may_be_too_small(tmp_path: Path) -> None:
    values = 0.5 + np.linspace(0, 0.012, 8)
    found = verdicts(judge(tmp_path, rows_of(values, stderr=0.0005)))["memo-trap"]
    assert found.label == "flat" and (found.p or 1) < 0.001
    found = verdicts(judge(tmp_path, rows_of(values, stderr=0.0005), limits=Limits(minimum_effect=0.01)))["memo-trap"]
    assert found.label == "standard"
    dip = 0.5 - 0.006 * (1 - np.linspace(-1, 1, 8) ** 2)
    found = verdicts(judge(tmp_path, rows_of(dip, stderr=0.0005)))["memo-trap"]
    assert found.label == "flat" and (found.p or 0) > 0.05


def test_a_dip_between_like_ends_is_not_flat(tmp_path: Path) -> None:
    """It falls by 0.03 and rises by 0.015: less than a U, but not the same at every size either.

    The rise is too small to be mentioned, which leaves a fall to a floor; a parabola saw nothing.
    """
    u, random = np.linspace(-1, 1, 8), np.random.default_rng(0)
    dip = 0.5 + 0.02186 * (u - 0.1716) ** 2
    curves = [rows_of(dip + random.normal(0, 0.0005, 8), stderr=0.0005, seed=seed) for seed in range(4)]
    found = verdicts(judge(tmp_path, *curves))["memo-trap"]
    assert found.label == "inverse" and "level_from" in found.form
    assert found.effect == pytest.approx(-0.025, abs=0.002)


def test_examples_decide_where_models_answer_alike(tmp_path: Path) -> None:
    """Models that fail on the same examples and differ on few: their means move together, and the change is sure."""
    random = np.random.default_rng(0)
    shared = random.random(400) < 0.5
    rows = []
    for number in range(6):
        correct = shared.copy()
        flipped = random.choice(np.flatnonzero(shared), number, replace=False)
        correct[flipped] = False
        rows += rows_of([float(correct.mean())], n=400, stderr=0.025)
        rows[-1] |= {"model": f"m{number}", "params": 1e7 * 4**number}
        records = [{"key": k, "correct": int(right)} for k, right in enumerate(correct)]
        write_examples(tmp_path, f"m{number}", "memo-trap", records)
    alone = verdicts(judge(tmp_path, rows))["memo-trap"]
    write(tmp_path / "results.csv", rows)
    paired = verdicts(trends(tmp_path))["memo-trap"]
    assert paired.paired and not alone.paired
    assert np.ptp(paired.interval) < 0.4 * np.ptp(alone.interval)


def test_seeds_of_a_size_make_it_sure(tmp_path: Path) -> None:
    """Jitter hides a trend over five sizes; four seeds of each show it."""
    random = np.random.default_rng(4)
    curves = [
        rows_of(0.6 - 0.05 * np.arange(5) + random.normal(0, 0.06, 5), stderr=0.01, seed=seed) for seed in range(4)
    ]
    first = verdicts(judge(tmp_path, curves[0]))["memo-trap"]
    together = verdicts(judge(tmp_path, *curves))["memo-trap"]
    assert (first.label, together.label) == ("inconclusive", "inverse")
    assert (together.sizes, together.runs) == (5, 20) and (together.p or 1) < 0.001


def test_a_jump_is_named_in_words_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = [0.25, 0.26, 0.24, 0.25, 0.26, 0.25, 0.74, 0.75]
    file = write(tmp_path / "table.csv", rows_of(values, stderr=0.014))
    monkeypatch.setattr("sys.argv", ["branchmix", "scaling", "trends", str(file), "--json"])
    with pytest.raises(SystemExit):
        main()
    found = json.loads(capsys.readouterr().out)["tasks"]["memo-trap"]["accuracy"]
    assert found["verdict"] == "standard" and found["effect"] == pytest.approx(0.5, abs=0.02)
    jump, level = found["jump"], found["level_until"]
    assert (jump["from"], jump["to"]) == pytest.approx((1e7 * 4**5, 1e7 * 4**6))
    assert jump["effect"] == pytest.approx(0.49, abs=0.02) and jump["interval"][0] < 0.49 < jump["interval"][1]
    assert level["axis"] == pytest.approx(1e7 * 4**5) and level["interval"][0] < 0.25 < level["interval"][1]
    assert "level_from" not in found
    monkeypatch.setattr("sys.argv", ["branchmix", "scaling", "trends", str(file)])
    with pytest.raises(SystemExit):
        main()
    text = " ".join(capsys.readouterr().out.split())
    assert "a jump of +0.485 between 1e+10 and 4.1e+10; level up to 1e+10, at 0.252" in text


# ---- side by side ----


def test_loss_and_accuracy_and_axes_that_disagree(tmp_path: Path) -> None:
    u = np.linspace(0, 1, 8)
    rows = rows_of(0.7 - 0.3 * u, stderr=0.01) + rows_of(1.5 - u, metric="loss", stderr=0.01)
    rows = [{**row, "tokens": 1e12 / row["params"]} for row in rows]
    found = judge(tmp_path, rows).warnings
    assert "memo-trap: by accuracy it is inverse, by loss standard" in found
    assert "memo-trap: accuracy is inverse along params, but standard along tokens" in found


def test_families_are_compared_by_slope(tmp_path: Path) -> None:
    u = np.linspace(0, 1, 6)
    dense = rows_of(0.7 - 0.3 * u, stderr=0.01, family="dense")
    mixture = rows_of(0.7 - 0.05 * u, stderr=0.01, family="mixture")
    alike = rows_of(0.6 - 0.3 * u, stderr=0.01, family="other")
    report = judge(tmp_path, dense, mixture, alike)
    pairs = {tuple(pair["families"]): pair for pair in report.interactions["memo-trap"]["accuracy"]}
    decades = math.log10(4**5)
    one = pairs["dense", "mixture"]
    assert one["difference"] == pytest.approx(0.25 / decades, rel=0.05) and one["differs"]
    assert one["interval"][0] > 0
    assert not pairs["dense", "other"]["differs"]
    assert report.as_dict()["family"] == "dense" and len(report.as_dict()["series"]) == 3


def test_few_sizes_are_compared_but_never_judged(tmp_path: Path) -> None:
    dense = rows_of([0.9, 0.6, 0.3, 0.1], stderr=0.005, family="dense")
    mixture = rows_of([0.1, 0.3, 0.6, 0.9], stderr=0.005, family="mixture")
    (pair,) = judge(tmp_path, dense, mixture).interactions["memo-trap"]["accuracy"]
    assert pair["interval"][0] > 0 and not pair["testable"] and not pair["differs"]
    longer = [*dense, *rows_of([0.9, 0.6, 0.3, 0.1, 0.05], stderr=0.005, family="dense")[4:]]
    (pair,) = judge(tmp_path, longer, mixture).interactions["memo-trap"]["accuracy"]
    assert not pair["testable"] and not pair["differs"]


def test_official_against_fresh_data(tmp_path: Path) -> None:
    u = np.linspace(0, 1, 5)
    official = rows_of(0.7 + 0.1 * u, stderr=0.01, data="official")
    seen = rows_of(0.6 + 0.1 * u, stderr=0.01, data="fresh")
    unseen = rows_of(0.7 + 0.1 * u, stderr=0.01, task="neqa", data="fresh")
    report = judge(tmp_path, official, seen, [{**row, "task": "neqa"} for row in official], unseen)
    found = report.contamination["memo-trap"]["accuracy"]
    assert found["difference"] == pytest.approx(0.1) and found["suspected"]
    assert found["interval"][0] == pytest.approx(0.1 - 2.776 * math.hypot(0.01, 0.01) / math.sqrt(5), rel=1e-3)
    assert found["models"]["m0"]["interval"] == pytest.approx([0.1 - 0.0277, 0.1 + 0.0277], abs=1e-4)
    assert not report.contamination["neqa"]["accuracy"]["suspected"]
    assert report.as_dict()["data"] == "official"
    # A loss that is higher on fresh data is the same sign.
    losses = [
        rows_of([loss] * 5, metric="loss", stderr=0.01, data=data) for loss, data in ((1, "official"), (2, "fresh"))
    ]
    assert judge(tmp_path, *losses).contamination["memo-trap"]["loss"]["difference"] == pytest.approx(1)


def test_checkpoints_of_one_name_are_compared_each_with_itself(tmp_path: Path) -> None:
    """A run along its tokens: fresh results that equal the official ones differ by nothing."""
    places = [
        {**row, "model": "m", "tokens": 1e9 * 2**number}
        for number, row in enumerate(rows_of([0.5, 0.6, 0.7, 0.8, 0.9], stderr=0.01))
    ]
    report = judge(tmp_path, *([{**row, "data": data} for row in places] for data in ("official", "fresh")))
    found = report.contamination["memo-trap"]["accuracy"]
    assert len(found["models"]) == 5 and found["difference"] == pytest.approx(0)


def test_models_that_did_not_do_the_task(tmp_path: Path) -> None:
    values = [0.4567, 0.4567, 0.46, 0.4567, 0.50]
    columns = [
        {"constant_share": 1.0, "coverage": 0.9},
        {"constant_share": 0.7, "coverage": 0.001},
        *[{"constant_share": 0.6, "coverage": 0.9}] * 3,
    ]
    rows = [
        {**row, **extra, "constant_baselines": "0.45667|0.54333", "chance": 0.5}
        for row, extra in zip(rows_of(values, stderr=0.029, n=300), columns, strict=True)
    ]
    flags = verdicts(judge(tmp_path, rows))["memo-trap"].flags
    assert flags == [
        "nearly always the same answer: m0",
        "exactly what a constant answer scores: m1, m3",
        "hardly any probability on the classes: m1",
        "every model is at chance",
    ]


# ---- the command ----


def test_the_command_prints_a_table_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "table.csv", pythia(step=FINAL))
    monkeypatch.setattr("sys.argv", ["branchmix", "scaling", "trends", str(file), "--json"])
    with pytest.raises(SystemExit) as stopped:
        main()
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert stopped.value.code == 0 and found["axis"] == "params"
    assert shown.err == "note: the axis is params: the table has no training FLOPs (column flops)\n"
    trap = found["tasks"]["memo-trap"]["accuracy"]
    assert (trap["verdict"], trap["sizes"]) == ("inverse", 8)
    assert trap["p"] == pytest.approx(0.00025, abs=5e-6) and trap["interval"][0] < trap["effect"] < trap["interval"][1]
    monkeypatch.setattr("sys.argv", ["branchmix", "scaling", "trends", str(file)])
    with pytest.raises(SystemExit):
        main()
    text = " ".join(capsys.readouterr().out.split())
    assert "accuracy along params" in text
    assert "memo-trap strong prior 8 -0.217" in text and "inverse (worse with scale): a trend over all sizes" in text


def test_the_command_compares_families_and_kinds_of_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the page's sentences, for a metric with a filter of lm-eval too."""
    u = np.linspace(0, 1, 5)
    rows: list[dict[str, object]] = []
    for family, drop in (("dense", 0.4), ("mixture", 0.1)):
        rows += rows_of(0.9 - drop * u, metric="acc,none", stderr=0.005, family=family)
        rows += rows_of(0.8 - drop * u, metric="acc,none", stderr=0.005, family=family, data="fresh")
    file = write(tmp_path / "table.csv", rows)
    monkeypatch.setattr("sys.argv", ["branchmix", "scaling", "trends", str(file)])
    with pytest.raises(SystemExit):
        main()
    text = " ".join(capsys.readouterr().out.split())
    assert "memo-trap: For ten times the parameters, acc,none changes by" in text
    assert text.count("so scale does more good or less harm to mixture than to dense") == 2
    assert "dense models do 10.0 points better on the public ones" in text
    assert "mixture models do 10.0 points better on the public ones" in text


def test_neither_torch_nor_transformers_is_imported(tmp_path: Path) -> None:
    file = write(tmp_path / "table.csv", rows_of([0.9, 0.8, 0.7, 0.6, 0.5]))
    code = (
        "import sys; from pathlib import Path; from branchmix.scaling.trends.judge import trends_by_axis;"
        f"trends_by_axis(Path({str(file)!r})); print({{'torch', 'transformers'}} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"

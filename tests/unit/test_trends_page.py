"""The page of trends without a browser: what it says, what it draws, and that it needs nothing else."""

from __future__ import annotations

import math
import re
from collections import Counter
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from branchmix.cli import main
from branchmix.pages.pictures import PAPER, save
from branchmix.scaling.generate import make_examples
from branchmix.scaling.tasks import CAUSES, TASKS
from branchmix.scaling.trends import html_page, plots, sentences
from branchmix.scaling.trends.judge import Judged, Report, trends_by_axis
from branchmix.scaling.trends.overview import Overview, Panel
from branchmix.scaling.trends.verdict import WORDS, Limits
from inverse_scaling import official_file
from pages import checked
from trend_tables import pythia, pythia_table, rows_of, study, write

FINAL = 143000
EXAMPLE = Path(__file__).parents[2] / "examples" / "pythia" / "results.csv"
NBSP = "\u00a0"


def overview(tmp_path: Path, rows: list[dict[str, Any]], **options: Any) -> Overview:
    return Overview(trends_by_axis(write(tmp_path / "table.csv", rows), **options))


def told(html: str) -> str:
    """A page's text in one line."""
    plain = unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", html, flags=re.DOTALL)))
    return " ".join(plain.split())


def only(report: Report, task: str, metric: str = "accuracy") -> Judged:
    (found,) = (one for one in report.judged if (one.series.task, one.series.metric) == (task, metric))
    return found


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Overview:
    rows = [{name: cell for name, cell in row.items() if name not in ("active_params", "tokens")} for row in study()]
    return overview(tmp_path_factory.mktemp("study"), rows)


@pytest.fixture(scope="module")
def studied_page(studied: Overview) -> str:
    return html_page.html(studied, command="branchmix scaling trends x.csv")


@pytest.fixture(scope="module")
def pythias(tmp_path_factory: pytest.TempPathFactory) -> Overview:
    return overview(tmp_path_factory.mktemp("pythia"), pythia(step=FINAL))


# ---- the whole page ----


def test_a_page_needs_nothing_else(studied_page: str) -> None:
    checked(studied_page)
    assert "src=" not in studied_page
    ids = re.findall(r'\bid="([^"]+)"', studied_page)
    targets = re.findall(r'(?:href="#|for=")([^"]+)"', studied_page)
    assert targets and set(targets) <= set(ids)


def test_every_verdict_stands_on_it_for_every_metric_and_axis(studied: Overview, studied_page: str) -> None:
    html = studied_page
    axes = [report.axis for report in studied.reports]
    assert axes == ["flops", "params"] and studied.metrics == ["accuracy", "loss"]
    for report in studied.reports:
        for entry in studied.entries:
            for metric in entry.metrics:
                label = f"{entry.name}: {metric} along {sentences.axis_name(report.axis)}; "
                (found,) = re.findall(f'aria-label="{label}([^"]*)"', html)
                curves = studied.panel(entry, metric, report).curves
                assert [part.rpartition(": ")[2] for part in found.split("; ")] == [
                    WORDS[one.verdict.label] for one in curves
                ]
    # A task without an accuracy shows its loss when accuracy is chosen.
    classes = re.findall(r'class="view ([^"]*)"', html[html.index('id="task-prompt-injection"') :])[0].split()
    assert set(classes) == {"m-accuracy", "m-loss", "a-flops"}


def test_tasks_stand_under_their_causes_with_words_and_an_example(pythias: Overview) -> None:
    assert list(pythias.groups) == [*CAUSES, ""]
    assert [entry.name for entry in pythias.groups["strong prior"]] == ["resisting-correction", "memo-trap", "redefine"]
    text = told(html_page.html(pythias, command="branchmix scaling trends 'my table.csv' --html page.html"))
    for entry in pythias.entries:
        task = TASKS.get(entry.name)
        if task is None:
            assert entry.example is None
            continue
        (ours,) = make_examples(task, seed=0, num_examples=1)
        assert entry.example == ours and task.description in text
        assert " ".join(ours.prompt.split()) in text and f"{ours.answer.strip()} (right)" in text
    for cause, why in CAUSES.items():
        assert cause[:1].upper() + cause[1:] in text and why in text
    for label in WORDS:
        assert sentences.meanings(pythias.reports[0])[label] in text
    assert "8 models, from 70M to 12B parameters, met 12 tasks" in text
    assert "4 tasks: worse with scale 1 task: better, then worse again 7 tasks: too uncertain to say" in text
    assert "branchmix scaling trends 'my table.csv' --html page.html" in text


@pytest.mark.parametrize("name", ["memo-trap", "hindsight-neglect"])
def test_examples_are_not_of_the_official_data(name: str, pythias: Overview) -> None:
    official = official_file(TASKS[name].file).read_text(encoding="utf-8")
    (example,) = (entry.example for entry in pythias.entries if entry.name == name)
    assert example is not None and example.prompt.split("\n")[0] not in official


def test_names_are_text_and_files_and_anchors_never_collide(tmp_path: Path) -> None:
    names = ["<b>&\"x'", "org/a b", "org a/b", "sheet", "\u00e9\u00e9"]
    rows = [row for name in names for row in rows_of([0.5, 0.4, 0.3, 0.2, 0.1], task=name, cause="my <own> cause")]
    found = overview(tmp_path, rows)
    html = html_page.html(found, command="x")
    assert "<b>&\"x'" not in html and "&lt;b&gt;&amp;&quot;x&#x27;" in html and "My &lt;own&gt; cause" in html
    slugs = [entry.slug for entry in found.entries]
    assert len(set(slugs)) == 5 and all(re.fullmatch(r"[a-z0-9-]+", slug) for slug in slugs)
    files = list(plots.pictures(found))
    assert len(set(files)) == len(files) == 2 * 6


def test_an_axis_that_nothing_moves_along_is_no_choice(pythias: Overview, tmp_path: Path) -> None:
    assert [report.axis for report in pythias.reports] == ["params"]  # all final checkpoints saw equal tokens
    rows = [{**row, "step": 10 * (k + 1)} for k, row in enumerate(rows_of([0.5, 0.4, 0.3, 0.2, 0.1]))]
    text = told(html_page.html(overview(tmp_path, rows, axis="step"), command="x"))
    assert "along step parameters" in text  # both may be chosen


@pytest.mark.parametrize("sizes", [1, 3])
def test_few_sizes_and_a_single_task(sizes: int, tmp_path: Path) -> None:
    rows = [{**row, "description": "Mine & yours."} for row in rows_of([0.6, 0.3, 0.7][:sizes], task="my-own")]
    found = overview(tmp_path, rows)
    text = told(html_page.html(found, command="x"))
    assert "1 task: too few points to judge" in text and "Mine & yours." in text
    if sizes == 3:
        assert "even a perfect order of 3 comes about by chance in 1 of 3 cases" in text
        assert "performance goes down, then up, and accuracy changes by +10.0 points" in text
    else:
        assert "There is one size only" in text and "1 model, met" not in text
    drawings = plots.pictures(found)
    assert len(drawings) == 2 * 2 and all(save(draw, tmp_path / name).is_file() for name, draw in drawings.items())


def test_the_example_is_pythia_and_says_who_only_guessed(tmp_path: Path) -> None:
    assert EXAMPLE.read_bytes() == write(tmp_path / "results.csv", pythia_table()).read_bytes()
    found = Overview(trends_by_axis(EXAMPLE))
    labels = {one.series.task: one.verdict.label for one in found.reports[0].judged}
    assert Counter(labels.values()) == {"inverse": 4, "inverted-u": 1, "inconclusive": 7}
    text = told(html_page.html(found, command="x"))
    assert "pythia-70m, pythia-160m, pythia-1b and 2 more: scores exactly what a model would that always gives" in text


# ---- sentences ----


def test_sentences_carry_the_numbers_of_the_verdict(pythias: Overview, tmp_path: Path) -> None:
    report = pythias.reports[0]
    text = sentences.sentences(only(report, "memo-trap"), report).replace(NBSP, " ")
    found = only(report, "memo-trap").verdict
    low, high = (-100 * value for value in found.interval)
    assert (
        f"From the smallest to the largest of 8 sizes, accuracy falls by about {-100 * found.effect:.1f} points "
        f"(95 % interval: {high:.1f} to {low:.1f})."
    ) in text
    assert "A trend as clear as this would come about by chance in less than 1 in 1,000 of cases" in text
    assert "(p < 0.001; p = 0.0015 after the correction for 12 tasks)" in text
    text = sentences.sentences(only(report, "resisting-correction"), report).replace(NBSP, " ")
    assert (
        "Accuracy first rises by about 28.3 points (95 % interval: " in text and "and then falls by about 23.2" in text
    )
    assert "it turns at about 410M parameters" in text
    text = sentences.sentences(only(report, "modus-tollens"), report).replace(NBSP, " ")
    assert "may change by anything between \u2212100.0 and +100.0 points" in text
    assert "Models scatter by about 41.7 points" in text
    report = overview(tmp_path, pythia(step=FINAL), limits=Limits(alpha=0.08)).reports[0]
    text = sentences.sentences(only(report, "redefine"), report).replace(NBSP, " ")
    assert "By itself one would say that it gets better, then worse again (p = 0.076). But with 12 tasks" in text


def test_flat_and_small_trends_in_words(tmp_path: Path) -> None:
    curve = 0.5 + np.linspace(0, 0.004, 8)
    report = overview(tmp_path, rows_of(curve, stderr=0.0005)).reports[0]
    text = sentences.sentences(only(report, "memo-trap"), report)
    assert "less than the 2.0 points that count as a change" in text
    rows = rows_of(0.5 + 0.03 * np.linspace(0, 1, 8) + 0.01 * np.tile([0, 1], 4), stderr=0.002)
    report = overview(tmp_path, rows, limits=Limits(minimum_effect=0.05)).reports[0]
    assert only(report, "memo-trap").verdict.label == "inconclusive"
    assert "There is a trend" in sentences.sentences(only(report, "memo-trap"), report)


@pytest.mark.parametrize(
    ("values", "metric", "expected"),
    [
        (
            [0.30, 0.51, 0.73, 0.96, 0.97, 0.965, 0.97, 0.97],
            "accuracy",
            "From 640M parameters on it saturates, on a ceiling of 96.7 % (95 % interval: ",
        ),
        (
            [0.30, 0.51, 0.73, 0.88, 0.89, 0.90, 0.905, 0.91],
            "accuracy",
            "From 640M parameters on it saturates, on a plateau of 89.7 % (95 % interval: ",
        ),
        (
            [0.60, 0.45, 0.30, 0.255, 0.254, 0.253, 0.252, 0.251],
            "accuracy",
            "From 640M parameters on it stays on a floor of 25.3 % (95 % interval: ",
        ),
        (
            [0.25, 0.26, 0.24, 0.25, 0.26, 0.25, 0.74, 0.75],
            "accuracy",
            "Most of that is a jump between two neighbouring sizes, 10.2B parameters and 41B parameters: 48.5 points",
        ),
        (
            [0.9, 0.9, 0.9, 0.9, 0.9, 0.6, 0.3, 0.1],
            "accuracy",
            "Up to 2.56B parameters it stays on a plateau of 90.0 % (95 % interval: ",
        ),
        (
            [2.0, 2.01, 2.0, 1.99, 2.0, 1.5, 1.0, 0.5],
            "loss",
            "Up to 2.56B parameters it stays on a floor of 2 (95 % interval: ",
        ),
    ],
)
def test_a_trend_is_named_as_it_looks(values: list[float], metric: str, expected: str, tmp_path: Path) -> None:
    report = overview(tmp_path, rows_of(values, metric=metric, stderr=0.01)).reports[0]
    text = sentences.sentences(only(report, "memo-trap", metric), report).replace(NBSP, " ")
    assert expected in text


def test_families_fresh_data_and_flags_in_words(studied: Overview, studied_page: str) -> None:
    text = told(studied_page).replace(NBSP, " ")
    report = studied.reports[0]
    pair = next(p for p in report.interactions["memo-trap"]["accuracy"] if p["data"] == "official")
    one, other = (f"{100 * slope:+.1f} points".replace("-", "\u2212") for slope in pair["slopes_per_decade"])
    assert (
        f"For ten times the training compute, accuracy changes by {one} for dense and by {other} for mixture." in text
    )
    assert "so scale does more good or less harm to mixture than to dense" in text
    found = report.contamination["memo-trap"]["accuracy"]
    assert found["suspected"]
    assert f"dense models do {100 * found['difference']:.1f} points better on the public ones" in text
    assert "Either the public questions, which have been on the web since 2023, were part of" in text
    assert "There is no sign that the public questions were part" in text
    assert "dense-0; mixture-0: one and the same answer to more than 95 % of the questions" in text
    assert "have less than 1 % of its probability" in text
    assert "Every model does about as well as guessing".lower() in text.lower()


def test_losses_are_told_the_right_way_round(tmp_path: Path) -> None:
    pair = {"families": ["a", "b"], "slopes_per_decade": [0.1, 0.3], "difference": 0.2, "interval": [0.1, 0.3]}
    pair |= {"differs": True, "testable": True, "axis": "params", "data": "official"}
    assert "more harm or less good to b than to a" in sentences.family_sentence(pair, "loss", lower_is_better=True)
    assert "more good or less harm to b than to a" in sentences.family_sentence(pair, "accuracy", lower_is_better=False)
    pair |= {"differs": False, "testable": False}
    assert "each needs 5 sizes" in sentences.family_sentence(pair, "loss", lower_is_better=True)


def test_metrics_and_axes_that_disagree_are_a_warning(tmp_path: Path) -> None:
    u = np.linspace(0, 1, 8)
    rows = rows_of(0.7 - 0.3 * u, stderr=0.01) + rows_of(1.5 - u, metric="loss", stderr=0.01)
    rows = [{**row, "tokens": 1e12 / row["params"]} for row in rows]
    text = told(html_page.html(overview(tmp_path, rows), command="x"))
    assert (
        "the metric matters. By accuracy performance gets worse with scale, by loss it gets better with scale." in text
    )
    assert "Along parameters, accuracy gets worse with scale; along training tokens, it gets better with scale." in text


@pytest.mark.parametrize(
    ("axis", "value", "shown"),
    [
        ("params", 1.11e9, "1.11B parameters"),
        ("flops", 3e21, "3\u00d710\u00b2\u00b9 FLOPs"),
        ("flops", 1e18, "10\u00b9\u2078 FLOPs"),
        ("tokens", 1.4e12, "1.4T tokens"),
        ("step", 143000, "step 1.4\u00d710\u2075"),
        ("width", 512, "width 512"),
    ],
)
def test_places_on_axes(axis: str, value: float, shown: str) -> None:
    assert sentences.place(axis, value) == shown


# ---- pictures ----


def drawn(panel: Panel, **options: Any) -> Any:
    """The axes of a task's chart, laid out."""
    figure = plots.chart(panel, "black", **options)
    figure.draw_without_rendering()
    return figure.axes[0]


def titled(axes: Any, start: str = "") -> dict[str, Any]:
    """Marks that say something under the mouse, by what they say."""
    named = {line.get_gid().removeprefix("title: "): line for line in axes.lines if line.get_gid()}
    return {title: line for title, line in named.items() if title.startswith(start)}


def height(axes: Any, value: float) -> float:
    """Pixels from below."""
    return float(axes.transData.transform((0, value))[1])


def task_panel(overview: Overview, name: str, metric: str = "accuracy") -> Panel:
    entry = next(entry for entry in overview.entries if entry.name == name)
    return overview.panel(entry, metric, overview.reports[0])


def test_up_is_better_for_a_loss_too(studied: Overview) -> None:
    for metric in ("accuracy", "loss"):
        panel = task_panel(studied, "memo-trap", metric)
        axes = drawn(panel)
        y_K = panel.curves[0].curve.y_K
        worse = np.diff(y_K) * (1 if metric == "loss" else -1)
        assert len(worse) == 5 and np.all(worse > 0)
        assert np.all(np.diff([height(axes, y) for y in y_K]) < 0)  # worse with scale: downwards
        large = [line for line in titled(axes, "dense").values() if line.get_markersize() > 5]
        assert len(large) == 2 * 6  # official and fresh


def test_bars_and_lines_lie_where_their_numbers_say(tmp_path: Path) -> None:
    rows = rows_of([0.8, 0.6, 0.7, 0.4, 0.5, 0.3], stderr=0.02, chance=0.5, constant_baselines="0.45|0.55")
    panel = task_panel(overview(tmp_path, rows), "memo-trap")
    axes = drawn(panel)
    curve = panel.curves[0].curve
    thin, thick = (np.array([part[:, 1] for part in bars.get_segments()]) for bars in axes.collections)
    half = stats.norm.isf(0.025) * 0.02
    assert np.ptp(thick, axis=1) == pytest.approx([2 * half] * 6)
    assert thick.mean(axis=1) == pytest.approx(curve.y_K)
    assert curve.jitter > 0.02
    assert np.ptp(thin, axis=1) == pytest.approx([2 * stats.norm.isf(0.025) * math.hypot(0.02, curve.jitter)] * 6)
    for name, value in (("guessing: 50.0", 0.5), ("always the same answer: 45.0", 0.45)):
        (across,) = titled(axes, name).values()
        assert list(across.get_ydata()) == [value, value]
    first = next(iter(titled(axes, "m0\naccuracy 80.0")))
    assert "10M parameters" in first and "(76.1" in first and "to 83.9" in first and "5,000 questions" in first


def test_runs_of_a_size_are_small_points(studied: Overview) -> None:
    axes = drawn(task_panel(studied, "sig-figs"))
    small = [line.get_gid() for line in axes.lines if line.get_gid() and line.get_markersize() == 3.5]
    assert len(small) == 2 * 2 * 6 * 2  # families, kinds of data, sizes, seeds
    assert {title.split(": ")[1] for title in small} >= {"dense-0, seed 1", "mixture-5, seed 2"}
    hollow = [title for title, line in titled(axes).items() if line.get_markerfacecolor() == PAPER]
    assert len(hollow) == 2 * 6 and all("fresh questions" in title for title in hollow)


def test_turns_and_jumps_are_marked(tmp_path: Path) -> None:
    axes = drawn(task_panel(overview(tmp_path, rows_of([0.9, 0.7, 0.5, 0.3, 0.3, 0.5, 0.7, 0.9])), "memo-trap"))
    assert len(titled(axes, "turns at about ")) == 1
    axes = drawn(task_panel(overview(tmp_path, rows_of([0.25, 0.26, 0.24, 0.25, 0.26, 0.25, 0.74, 0.75])), "memo-trap"))
    (jump,) = axes.patches
    assert [jump.get_x(), jump.get_x() + jump.get_width()] == pytest.approx([math.log10(1e7 * 4**n) for n in (5, 6)])


def test_families_whose_names_begin_with_an_underscore_are_in_the_legend(tmp_path: Path) -> None:
    rows = [row for family in ("_a", "b") for row in rows_of([0.9, 0.8, 0.7, 0.6, 0.5], family=family)]
    figure = plots.chart(task_panel(overview(tmp_path, rows), "memo-trap"), "black")
    assert [text.get_text() for legend in figure.legends for text in legend.get_texts()] == ["_a", "b"]


@pytest.mark.parametrize("sizes", [1, 2, 40])
def test_ticks_across_are_sizes_of_models_and_few(sizes: int, tmp_path: Path) -> None:
    rows = [{**row, "params": 1e7 * 1.3**number} for number, row in enumerate(rows_of([0.5] * sizes))]
    axes = drawn(task_panel(overview(tmp_path, rows), "memo-trap"))
    ticks = np.round(axes.get_xticks(), 3)
    assert min(sizes, 2) <= len(ticks) <= 8
    assert set(ticks) <= {round(math.log10(row["params"]), 3) for row in rows}


def test_the_sheet_has_every_task_and_verdict(pythias: Overview) -> None:
    figure = plots.sheet(pythias, "black")
    shown = {axes.get_title(loc="left"): axes.get_xlabel() for axes in figure.axes if axes.axison}
    assert set(shown) == {entry.name for entry in pythias.entries}
    for name, verdict in shown.items():
        assert verdict.endswith(WORDS[only(pythias.reports[0], name).verdict.label])
    assert sum(verdict.endswith("worse with scale") for verdict in shown.values()) == 4


# ---- the command ----


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["branchmix", "scaling", "trends", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_the_command_writes_a_page_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of([0.9, 0.8, 0.7, 0.6, 0.5]) + rows_of([1, 2, 3, 4, 5], task="prompt-injection", metric="loss")
    file, html, folder = write(tmp_path / "my table.csv", rows), tmp_path / "page.html", tmp_path / "pictures"
    options = (str(file), "--html", str(html), "--plots", str(folder), "--alpha", "0.01", "--metric", "accuracy")
    assert run(monkeypatch, *options, "--metric", "loss") == 0
    assert f"written: {html}\nwritten: {folder}\n" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{stem}.{kind}" for stem in ("sheet", "memo-trap-accuracy", "prompt-injection-loss") for kind in ("png", "svg")
    )
    assert all((folder / name).read_bytes()[:4] == b"\x89PNG" for name in ("sheet.png", "memo-trap-accuracy.png"))
    command = f"--html {html} --plots {folder} --alpha 0.01 --metric accuracy --metric loss"
    assert f"branchmix scaling trends '{file}' {command}" in told(html.read_text())
    before = html.read_bytes()
    assert run(monkeypatch, *options) == 2
    assert "page.html: exists already" in capsys.readouterr().err and html.read_bytes() == before
    assert run(monkeypatch, str(file), "--plots", str(folder)) == 2
    assert "exists already" in capsys.readouterr().err
    assert run(monkeypatch, str(file), "--html", str(folder)) == 2
    assert "is a folder" in capsys.readouterr().err
    assert run(monkeypatch, str(file), "--html", str(html), "--force", "--json") == 0
    assert capsys.readouterr().out.startswith("{") and html.read_bytes() != before

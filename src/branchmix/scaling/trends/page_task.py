"""A task's part of the page: what it asks, the curve and its verdict, what is odd about it, an example, the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from branchmix.pages.table import Table
from branchmix.scaling.examples import Example
from branchmix.scaling.trends import words
from branchmix.scaling.trends.charts import Panel, chart, sketch
from branchmix.scaling.trends.overview import Entry, Overview
from branchmix.scaling.trends.report import Judged, Report
from branchmix.scaling.trends.table import DATA
from branchmix.scaling.trends.verdict import DIRECTED, WORDS

_MOST_SENTENCES = 2
"""Curves of a panel whose verdicts are told in sentences; those of more are told in a line each."""


def task_section(overview: Overview, entry: Entry, classes: dict[tuple[str, str], str]) -> str:
    """``classes``: of the views, by metric and axis; a view of a metric that the task lacks is that of another."""
    views = [
        _view(overview, entry, metric, report, _classes(overview, entry, metric, report.axis, classes))
        for metric in entry.metrics
        for report in overview.reports
    ]
    about = f"<p>{escape(entry.description)}</p>" if entry.description else ""
    example = _example(entry.example) if entry.example else ""
    return f"""<article class="task" id="task-{entry.slug}">
<h3>{escape(entry.name)}</h3>
{about}
{"".join(views)}
{example}
{_numbers(overview, entry)}
<p class="top"><a href="#glance">all tasks</a></p>
</article>
"""


def _classes(overview: Overview, entry: Entry, metric: str, axis: str, classes: dict[tuple[str, str], str]) -> str:
    """Of all choices that show this view."""
    chosen = [wanted for wanted in overview.metrics if overview.metric_for(entry, wanted) == metric]
    return " ".join(dict.fromkeys(name for wanted in chosen for name in classes[wanted, axis].split()))


def badges(panel: Panel) -> list[str]:
    """The verdict on each curve as a sketch and in words; with the curve's mark and name where there are several."""
    found = []
    for one, name in zip(panel.curves, panel.names, strict=True):
        label = one.verdict.label
        weak = "" if label in (*DIRECTED, "flat") else " weak"
        colour = panel.colour(one)
        fill = "transparent" if one.series.data != DATA[0] else colour
        mark = f'<i style="border-color: {colour}; background: {fill}"></i>'
        small = f"<small>{mark}{escape(name)}</small>" if name else ""
        words_of_it = escape(WORDS[label])
        found.append(f'<div class="badge{weak}">{sketch(label).svg()}<span>{small}{words_of_it}</span></div>')
    return found


def _view(overview: Overview, entry: Entry, metric: str, report: Report, classes: str) -> str:
    panel = overview.panel(entry, metric, report)
    tell = words.sentences if len(panel.curves) <= _MOST_SENTENCES else words.brief
    said = "".join(
        f"{badge}<p>{escape(tell(one, report))}</p>" for one, badge in zip(panel.curves, badges(panel), strict=True)
    )
    missing = [wanted for wanted in overview.metrics if wanted not in entry.metrics]
    note = (
        f'<p class="note">This task has no {" and no ".join(map(words.metric_name, missing))}.</p>' if missing else ""
    )
    label = f"{entry.name}: {words.metric_name(metric)} along {words.axis_name(report.axis)}; " + "; ".join(
        f"{name + ': ' if name else ''}{WORDS[one.verdict.label]}"
        for one, name in zip(panel.curves, panel.names, strict=True)
    )
    return f"""<div class="view {classes}">
<div class="pair"><figure class="chart">{chart(panel).svg(label)}</figure>
<div class="said">{said}{note}</div></div>
{_beside(entry, metric, report, panel)}</div>
"""


def _beside(entry: Entry, metric: str, report: Report, panel: Panel) -> str:
    """Families against each other, official against fresh data, and whatever makes the numbers doubtful."""
    data = panel.official.curves[0].series.data
    plain = [
        words.family_sentence(pair, metric, lower_is_better=panel.lower_is_better)
        for pair in report.interactions.get(entry.name, {}).get(metric, [])
        if pair["data"] == data
    ]
    differences = [
        found for name, found in report.contamination.get(entry.name, {}).items() if name.partition(",")[0] == metric
    ]
    if differences:
        plain.append(words.contamination_sentences(differences, metric, report.limits))
    hints = [words.flag_sentence(kind, "; ".join(dict.fromkeys(names))) for kind, names in _flags(panel).items()]
    hints += [
        "Careful, " + words.caution_sentence(caution)
        for caution in report.cautions
        if caution.task == entry.name and caution.metric in ("", metric)
    ]
    told = [f"<p>{escape(text)}</p>" for text in plain] + [f'<p class="hint">{escape(text)}</p>' for text in hints]
    return f'<div class="beside">{"".join(told)}</div>' if told else ""


def _flags(panel: Panel) -> dict[str, list[str]]:
    """Models by what is odd about them; curves' names where it is all models of a curve, but not of all curves."""
    found: dict[str, list[str]] = {}
    for one, name in zip(panel.curves, panel.names, strict=True):
        for flag in one.verdict.flags:
            kind, _, models = flag.partition(": ")
            found.setdefault(kind, []).append(models or name)
    return {kind: [] if set(names) == set(panel.names) else names for kind, names in found.items()}


def _example(example: Example) -> str:
    """An example in our own words, its answers below it."""
    if example.classes:
        answers = " or ".join(
            f'<span class="right">{escape(text.strip())} (right)</span>'
            if place == example.answer_index
            else f"<span>{escape(text.strip())}</span>"
            for place, text in enumerate(example.classes)
        )
        asked = f"The model chooses how it goes on: {answers}"
    else:
        asked = f'The model should go on with: <span class="right">{escape(example.completion.strip())}</span>'
    name = "An example in our own words"
    return f"""<h4 class="note">{name}</h4>
<pre class="example" tabindex="0" aria-label="{name}">{escape(example.prompt)}</pre>
<p class="note">{asked}</p>"""


def _numbers(overview: Overview, entry: Entry) -> str:
    return f"""<details><summary>Numbers</summary>
<h4>Results</h4>
{_results(overview, entry)}
<h4>Verdicts along every axis and by every metric</h4>
{_verdicts(overview, entry)}
</details>"""


def _results(overview: Overview, entry: Entry) -> str:
    """A row for each run; ± is the standard error."""
    judged = [one for one in overview.reports[0].judged if one.series.task == entry.name]
    axes = [report.axis for report in overview.reports]
    has = {
        "family": any(one.series.family for one in judged),
        "questions": any(one.series.data != DATA[0] for one in judged),
        "seed": any(row.seed for one in judged for row in one.series.rows),
    }
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for one in judged:
        for row, stderr in zip(one.series.rows, one.series.stderr, strict=True):
            places = tuple(words.axis_value(axis, row.axes[axis]) for axis in axes)
            extra = {"family": one.series.family, "questions": one.series.data, "seed": row.seed}
            key = (row.model, *(extra[name] for name in has if has[name]), *places, f"{row.n:,}" if row.n else "")
            metric = one.series.metric
            cells.setdefault(key, {})[metric] = (
                f"{words.shown(metric, row.value)} ± {words.shown(metric, float(stderr)).removesuffix(' %')}"
            )
    head = ["model", *(name for name in has if has[name]), *map(words.axis_name, axes), "number of questions"]
    rows = [[*key, *(found.get(metric, "") for metric in entry.metrics)] for key, found in cells.items()]
    return Table([*head, *map(words.metric_name, entry.metrics)], rows, title=f"Results of {entry.name}").html()


def _verdicts(overview: Overview, entry: Entry) -> str:
    rows = []
    for report in overview.reports:
        for metric in entry.metrics:
            panel = overview.panel(entry, metric, report)
            for one, name in zip(panel.curves, panel.names, strict=True):
                rows.append(
                    [
                        ", ".join(filter(None, (words.axis_name(report.axis), words.metric_name(metric), name))),
                        *_verdict_cells(one),
                    ]
                )
    head = ["", "verdict", "change", "interval", "p", "p corrected", "sizes", "runs", "scatter of models"]
    return Table(head, rows, title=f"Verdicts on {entry.name}").html()


def _verdict_cells(one: Judged) -> Sequence[str]:
    found, metric = one.verdict, one.series.metric
    low, high = (words.difference(metric, value) for value in found.interval)
    return [
        found.label,
        words.difference(metric, found.effect),
        f"{low.removesuffix(' points')} to {high}",
        *("" if p is None else f"{p:.2g}" for p in (found.p, found.p_adjusted)),
        str(found.sizes),
        str(found.runs),
        words.difference(metric, found.jitter, plus=False),
    ]

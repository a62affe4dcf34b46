"""The page of ``branchmix scaling trends --html``: one file without a script, for readers who know nothing of scaling.

It has every verdict along every axis and by every metric; a switch at the top shows those of one. The switch consists
of radio buttons and style sheets, so keyboards, prints and strict browsers need nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Any

from markupsafe import Markup

from branchmix import __version__
from branchmix.pages.page import render
from branchmix.pages.pictures import Draw, svg
from branchmix.pages.table import Table
from branchmix.scaling.tasks import CAUSES
from branchmix.scaling.trends import plots, sentences
from branchmix.scaling.trends.judge import Report
from branchmix.scaling.trends.overview import Entry, Overview, Panel, heading, is_fresh, slugs
from branchmix.scaling.trends.table import DATA
from branchmix.scaling.trends.verdict import DIRECTED, MIN_SIZES, WORDS

_TEMPLATE = Path(__file__).parent / "templates" / "trends.html"


def html(overview: Overview, *, command: str) -> str:
    """The whole page; ``command`` is what repeats it."""
    numbers = count()

    def picture(draw: Draw, label: str) -> Any:
        return Markup(svg(draw, f"p{next(numbers)}", label))

    return render(
        _TEMPLATE,
        title=sentences.question(overview.reports[0]),
        kicker="branchmix scaling trends",
        lead=_lead(overview) if not overview.reports[0].is_within else _lead_within(overview),
        overview=overview,
        report=overview.reports[0],
        metric_ids={name: f"m-{own}" for name, own in slugs(overview.metrics).items()},
        axis_ids={name: f"a-{own}" for name, own in slugs(overview.axes).items()},
        chart=lambda entry, panel: picture(partial(plots.chart, panel), _label(entry, panel)),
        small=lambda panel: picture(partial(plots.small, panel), ""),
        beside=_beside,
        results=lambda entry: Markup(_results(overview, entry).html()),
        verdicts=lambda entry: Markup(_verdicts(overview, entry).html()),
        has_slices=any(one.series.group is not None for one in overview.reports[0].judged),
        has_fresh=any(data != DATA[0] for _, data in overview.reports[0].parts),
        lower={one.series.metric: one.series.lower_is_better for one in overview.reports[0].judged},
        sure=(*DIRECTED, "flat"),
        signs=plots.SIGNS,
        words=sentences,
        labels=WORDS,
        min_sizes=MIN_SIZES,
        heading=heading,
        causes=CAUSES,
        is_fresh=is_fresh,
        command=command,
        version=__version__,
    )


def _lead(overview: Overview) -> list[str]:
    tasks, models = len(overview.entries), overview.models
    reach = ""
    sizes = [axis for axis in ("params", "active_params") if axis in overview.axes]
    if sizes:
        size = sizes[0]
        places = [row.axes[size] for one in overview.reports[0].judged for row in one.series.rows]
        low, high = (sentences.axis_value(size, value) for value in (min(places), max(places)))
        reach = f", from {low} to {high} {sentences.axis_name(size)}," if low != high else ""
    return [
        "One expects a larger language model to do better at everything. At some tasks it does worse, the more so the "
        "larger it is: this is called inverse scaling.",
        f"Here {models} model{'s' * (models != 1)}{reach} met {tasks} task{'s' * (tasks != 1)}. For each of them this "
        "page says whether performance gets better, worse or turns with scale, and how sure one can be of that.",
    ]


def _lead_within(overview: Overview) -> list[str]:
    """For curves of which each is a model in several settings."""
    report, tasks = overview.reports[0], len(overview.entries)
    places = [row.axes[report.axis] for one in report.judged for row in one.series.rows]
    low, high = (sentences.axis_value(report.axis, place) for place in (min(places), max(places)))
    models = f"{overview.models} model{'s' * (overview.models != 1)} answered"
    return [
        "One expects a model to do better the more it is given to work with. At some tasks it does worse: this is "
        "called inverse scaling, here within a model.",
        f"Here {models} the questions of {tasks} task{'s' * (tasks != 1)} in several settings: from {low} to {high} "
        f"{sentences.unit(report.axis)}. Every setting got the same questions. For each task this page says whether "
        "performance gets better, worse or turns along the way, and how sure one can be of that.",
    ]


def _label(entry: Entry, panel: Panel) -> str:
    """What a chart shows, for readers who do not see it."""
    verdicts = [f"{name + ': ' if name else ''}{WORDS[one.verdict.label]}" for one, name in panel.named]
    what = f"{sentences.metric_name(panel.metric)} along {sentences.axis_name(panel.axis)}"
    return f"{entry.name}: {what}; {'; '.join(verdicts)}"


def _beside(entry: Entry, panel: Panel, report: Report) -> Iterator[tuple[str, bool]]:
    """Paragraphs, and whether each is a hint: families compared, official against fresh data, and what is doubtful."""
    metric, data = panel.metric, panel.official.curves[0].series.data
    for sentence in sentences.comparisons(report, entry.name, metric, [data]):
        yield sentence, False
    flags: dict[str, list[str]] = {}
    for one, name in panel.named:
        for kind, _, models in (flag.partition(": ") for flag in one.verdict.flags):
            flags.setdefault(kind, []).append(models or name)
    for kind, names in flags.items():
        of_all = set(names) == set(panel.names)  # all models of all curves: no names needed
        yield sentences.flag_sentence(kind, "" if of_all else "; ".join(dict.fromkeys(names))), True
    for caution in report.cautions:
        if caution.task == entry.name and caution.metric in ("", metric):
            yield f"Careful, {sentences.caution_sentence(caution)}", True


def _results(overview: Overview, entry: Entry) -> Table:
    """A row for each run, with the columns that any of them fills; ± is the standard error."""
    judged = [one for one in overview.reports[0].judged if one.series.task == entry.name]
    has_fresh = any(map(is_fresh, judged))
    rows: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}
    for series in (one.series for one in judged):
        for row, stderr in zip(series.rows, series.stderr, strict=True):
            family = row.family if overview.reports[0].is_within else series.family
            run = {"model": row.model, "family": family, "questions": series.data if has_fresh else ""}
            run["seed"] = row.seed
            run |= {sentences.axis_name(axis): sentences.axis_value(axis, row.axes[axis]) for axis in overview.axes}
            run["number of questions"] = f"{row.n:,}" if row.n else ""
            error = sentences.shown(series.metric, float(stderr)).removesuffix(sentences.PERCENT)
            value = f"{sentences.shown(series.metric, row.value)} ± {error}"
            rows.setdefault(tuple(run.items()), run)[sentences.metric_name(series.metric)] = value
    head = list(dict.fromkeys(name for cells in rows.values() for name, cell in cells.items() if cell))
    cells = [[run.get(name, "") for name in head] for run in rows.values()]
    return Table(head, cells, title=f"Results of {entry.name}")


def _verdicts(overview: Overview, entry: Entry) -> Table:
    """A row for each curve."""
    rows = []
    for report, metric in product(overview.reports, entry.metrics):
        for one, name in overview.panel(entry, metric, report).named:
            verdict, (low, high) = one.verdict, one.verdict.interval
            which = (sentences.axis_name(report.axis), sentences.metric_name(metric), name)
            change = sentences.difference(metric, verdict.effect)
            interval = f"{sentences.difference(metric, low, unit=False)} to {sentences.difference(metric, high)}"
            p = ["" if p is None else f"{p:.2g}" for p in (verdict.p, verdict.p_adjusted)]
            scatter = sentences.difference(metric, verdict.jitter, plus=False)
            counts = [str(verdict.sizes), str(verdict.runs)]
            rows.append([", ".join(filter(None, which)), verdict.label, change, interval, *p, *counts, scatter])
    points = (
        ["settings", "runs", "scatter"] if overview.reports[0].is_within else ["sizes", "runs", "scatter of models"]
    )
    head = ["", "verdict", "change", "interval", "p", "p corrected", *points]
    return Table(head, rows, title=f"Verdicts on {entry.name}")

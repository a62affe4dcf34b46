"""The page of ``branchmix scaling trends --html``: one file without a script, for readers who know nothing of scaling.

Every verdict along every axis and by every metric stands in it; a switch at the top shows those of one. It is made of
radio buttons and style sheets alone, so keyboards, prints and strict browsers need nothing else. Curves are SVG drawn
here (``charts``) instead of plotly's: its script is 4 MB, and all that is wanted of it is numbers under the mouse.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

from branchmix.pages.page import document, section
from branchmix.scaling.trends import words
from branchmix.scaling.trends.charts import sketch, small
from branchmix.scaling.trends.overview import Entry, Overview, heading, slug, why
from branchmix.scaling.trends.page_style import STYLE, switch_rules
from branchmix.scaling.trends.page_task import badges, task_section
from branchmix.scaling.trends.report import Report
from branchmix.scaling.trends.table import DATA
from branchmix.scaling.trends.verdict import MIN_SIZES, WORDS

_COLUMNS = 4
"""Cards side by side, where there is room."""


def html(overview: Overview, *, command: str) -> str:
    """The whole page; ``command`` is what repeats it."""
    axes = [report.axis for report in overview.reports]
    metric_ids, axis_ids = _ids("m", overview.metrics), _ids("a", axes)
    classes = {(metric, axis): f"{metric_ids[metric]} {axis_ids[axis]}" for metric in overview.metrics for axis in axes}
    sections = [
        _bar(overview, metric_ids, axis_ids),
        f'<div id="glance">{section("At a glance", _glance(overview, classes))}</div>',
        section("How to read this page", _explanation(overview)),
        *(
            section(f"{heading(cause)}", _group(overview, cause, entries, classes))
            for cause, entries in overview.groups.items()
        ),
        section("How it was made", _making(overview, command)),
    ]
    rules = switch_rules(list(metric_ids.values()), list(axis_ids.values()))
    return document(
        "Do larger models do better?",
        "branchmix scaling trends",
        _lead(overview),
        sections,
        head=f"<style>{STYLE}{rules}</style>\n",
    )


def _ids(prefix: str, names: Sequence[str]) -> dict[str, str]:
    """Of switches, by what they switch to: plain enough for style sheets, and all different."""
    found: dict[str, str] = {}
    for number, name in enumerate(names):
        plain = f"{prefix}-{slug(name)}"
        found[name] = plain if plain not in found.values() else f"{plain}-{number}"
    return found


def _lead(overview: Overview) -> list[str]:
    tasks, models = len(overview.entries), overview.models
    size = next((axis for axis in ("params", "active_params") if axis in _axes(overview)), None)
    reach = ""
    if size is not None:
        low, high = (words.axis_value(size, value) for value in overview.reach(size))
        reach = f", from {low} to {high} {words.axis_name(size)}," if low != high else ""
    return [
        "One expects a larger language model to do better at everything. At some tasks it does worse, the more so the "
        "larger it is: this is called inverse scaling.",
        f"Here {models} model{'s' * (models != 1)}{reach} met {tasks} task{'s' * (tasks != 1)}. For each of them this "
        "page says whether performance gets better, worse or turns with scale, and how sure one can be of that.",
    ]


def _axes(overview: Overview) -> list[str]:
    return [report.axis for report in overview.reports]


def _bar(overview: Overview, metric_ids: dict[str, str], axis_ids: dict[str, str]) -> str:
    """The switches."""

    def switch(title: str, group: str, ids: dict[str, str], names: dict[str, str], chosen: str) -> str:
        buttons = "".join(
            f'<label for="{ids[name]}"><input type="radio" name="{group}" id="{ids[name]}"'
            f"{' checked' if name == chosen else ''}>{escape(shown)}</label>"
            for name, shown in names.items()
        )
        return f"<fieldset><legend>{title}</legend>{buttons}</fieldset>"

    metrics = {metric: words.metric_name(metric) for metric in overview.metrics}
    axes = {axis: words.axis_name(axis) for axis in axis_ids}
    return f"""<nav class="bar" aria-label="What is shown">
{switch("Measured by", "metric", metric_ids, metrics, overview.main_metric)}
{switch("along", "axis", axis_ids, axes, overview.reports[0].axis)}
</nav>
"""


# ---- at a glance ----


def _glance(overview: Overview, classes: dict[tuple[str, str], str]) -> str:
    views = []
    for metric in overview.metrics:
        for report in overview.reports:
            groups = "".join(
                f'<div class="group" style="--span: {min(_COLUMNS, len(entries))}"><h3>{escape(heading(cause))}</h3>'
                f'<p class="note">{escape(why(cause))}</p>'
                f'<div class="cards">{"".join(_card(overview, entry, metric, report) for entry in entries)}</div></div>'
                for cause, entries in overview.groups.items()
            )
            tally = _tally(overview, metric, report)
            views.append(
                f'<div class="view {classes[metric, report.axis]}">{tally}<div class="groups">{groups}</div></div>'
            )
    return "".join(views)


def _tally(overview: Overview, metric: str, report: Report) -> str:
    """How many tasks got which verdict, for each family on its official data."""
    parts = []
    kinds = {part[1] for part in report.parts}
    for part in report.parts:
        if part[1] != DATA[0] and DATA[0] in kinds:
            continue
        counts: Counter[str] = Counter()
        for entry in overview.entries:
            found = report.tasks(part).get(entry.name, {}).get(overview.metric_for(entry, metric))
            if found is not None:
                counts[found.verdict.label] += 1
        several = len({family for family, data in report.parts}) > 1
        name = f'<li class="badge">{escape(part[0] or "no family")}:</li>' if several else ""
        items = "".join(
            f'<li class="badge">{sketch(label).svg()}<span>{counts[label]} task{"s" * (counts[label] != 1)}: '
            f"{escape(WORDS[label])}</span></li>"
            for label in WORDS
            if counts[label]
        )
        parts.append(f'<ul class="tally">{name}{items}</ul>')
    return "".join(parts)


def _card(overview: Overview, entry: Entry, metric: str, report: Report) -> str:
    panel = overview.panel(entry, overview.metric_for(entry, metric), report).official
    drawn = small(panel).svg() + "".join(badges(panel))
    return f'<a class="card" href="#task-{entry.slug}"><b>{escape(entry.name)}</b>{drawn}</a>'


# ---- what it all means ----


def _explanation(overview: Overview) -> str:
    report = overview.reports[0]
    shapes = "".join(
        f'<div class="shape">{sketch(label).svg()}<p><b>{escape(WORDS[label])}</b> ({escape(label)}). '
        f"{escape(words.MEANINGS[label])}</p></div>"
        for label in WORDS
    )
    lower = {one.series.metric: one.series.lower_is_better for one in report.judged}
    metrics = "".join(
        f"<li><b>{escape(words.metric_name(metric))}</b>: "
        f"{escape(words.metric_words(metric, lower_is_better=lower[metric]))}.</li>"
        for metric in overview.metrics
    )
    axes = "".join(
        f"<li><b>{escape(words.axis_name(axis))}</b>: {escape(words.axis_words(axis))}</li>" for axis in _axes(overview)
    )
    sure, limits = words.percent_of(report.limits), report.limits
    correction = {
        "bh": "The verdicts below allow for that (Benjamini and Hochberg's correction).",
        "holm": "The verdicts below allow for that (Holm's correction).",
        "none": "The verdicts below were asked for without a correction for that.",
    }[report.correction]
    fresh = any(part[1] != DATA[0] for part in report.parts)
    dashes = (
        "<li>A <b>dashed line with hollow points</b> are fresh questions, made after the models. The public ones have "
        "been on the web since 2023: a model that has read them may do better on them than it should.</li>"
        if fresh
        else ""
    )
    return f"""<h3>The seven verdicts</h3>
<div class="shapes">{shapes}</div>
<h3>The pictures</h3>
<ul>
<li>A task is a list of questions. Each <b>point</b> is a model; where several were trained alike, it is their mean,
and small points are the single ones. To the right, models are larger; each step of the same length multiplies the
size by the same number.</li>
<li><b>Up is better</b> in every picture. Where a lower number is better, the axis is turned round.</li>
<li>The <b>thick bar</b> is the chance of the questions: with others of the same kind, the point would stay within it
in {sure} of cases. The <b>thin bar</b> adds the chance of the models: another one of that size, trained
anew, would land within it. How much models differ is learnt from several runs of a size, or else
from how far the points are off a smooth curve. A point without a thin bar fits the curve as well as its questions
allow.</li>
<li>The <b>dashed line across</b> is what guessing scores, a dotted one what a model scores that gives the same
answer to every question.</li>
{dashes}
</ul>
<h3>What is measured, and along which axis</h3>
<ul>{metrics}{axes}</ul>
<h3>How sure one can be</h3>
<p>A few models of a few sizes are easily misread: points that only scatter look like a U more often than not. So a
verdict here needs a test that counts both questions and models as chance, and a change of more than
{limits.minimum_effect:g} ({100 * limits.minimum_effect:g} points of an accuracy). Getting better or worse must show
over at least {MIN_SIZES} sizes; a turn needs a rise and a fall that no curve without a turn would show by chance,
however much it bends: one that saturates or sits on a floor does not turn. The more tasks one looks at, the
more of them show something by chance. {correction} <b>p</b> is how often chance alone would do as much as was seen;
below {limits.alpha:g} counts as sure enough. The <b>interval</b> holds the true change in {sure} of cases.</p>
<p>No verdict does not mean no change: it means that these results cannot tell.</p>"""


def _group(overview: Overview, cause: str, entries: Sequence[Entry], classes: dict[tuple[str, str], str]) -> str:
    about = f"<p>{escape(why(cause))}</p>" if why(cause) else ""
    return about + "".join(task_section(overview, entry, classes) for entry in entries)


def _making(overview: Overview, command: str) -> str:
    from branchmix import __version__

    report = overview.reports[0]
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    notes = f"<p>Noted on the way:</p><ul>{notes}</ul>" if notes else ""
    paired = any(one.verdict.paired for one in report.judged)
    drawn = (
        "Where scores of single examples lie beside the table, all models are drawn on the same examples, and examples "
        "of one template together."
        if paired
        else "The table's standard errors are taken as they are; scores of single examples beside it would let all "
        "models be drawn on the same examples, which is more exact."
    )
    return f"""<p>The tasks are those of “Inverse Scaling: When Bigger Isn't Better” (arXiv 2306.09479), as far as
they bear its names, and the table's own. Examples shown are made by branchmix, not taken from the official data.
{drawn} Each verdict follows a fixed order: a turn (the best curve with one turn against the best
without, by likelihood ratio and parametric bootstrap, and both legs longer than the smallest change), else a trend
(the best monotone curve against a constant), else flat (every change within the smallest that counts), else none.</p>
{notes}
<p>This page is made by:</p>
<pre tabindex="0" aria-label="Command">{escape(command)}</pre>
<p class="note">branchmix {escape(__version__)}. With --json instead, the same verdicts for a program.</p>"""

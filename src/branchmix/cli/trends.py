"""``branchmix scaling trends``: verdicts on a table of results, a page and pictures, and two models compared."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from branchmix.checkpoint.folder import require_new_file, write_text
from branchmix.cli import console
from branchmix.cli.scaling import scaling_app
from branchmix.errors import RecipeError
from branchmix.pages.table import Table

if TYPE_CHECKING:
    from branchmix.likelihood.models import Progress
    from branchmix.scaling.trends.judge import Judged, Report
    from branchmix.scaling.trends.table import ResultsTable

CORRECTIONS = {"bh": "Benjamini-Hochberg over tasks", "holm": "Holm over tasks", "none": "none for several tasks"}

TRENDS = """\b
Examples:
  branchmix scaling trends results.csv
  branchmix scaling trends runs/family --axis active_params --json
  branchmix scaling trends results.csv --html page.html --plots pictures
  branchmix scaling trends results.csv --metric accuracy --alpha 0.01
  branchmix scaling trends runs/family --slices 3
  branchmix scaling trends results.csv --axis reasoning_budget --html page.html
  branchmix scaling trends lm_eval_output --from lm-eval --metric acc
  branchmix scaling trends logs --from inspect --axis reasoning_budget
  branchmix scaling trends runs/family --compare pythia-70m pythia-12b

\b
The smallest table (one row for each task, model and metric; five models or more):
  task,model,params,metric,value,stderr,n
  memo-trap,pythia-70m,70e6,accuracy,0.8729,0.0109,936

\b
Further columns: flops, active_params, tokens and any other axis, also one within a model, such as shots or
reasoning_budget (as assigned, not as used); family (dense against mixture), seed (several runs of a size), data
(official or fresh), cause and description of tasks of your own. A folder with results.csv may hold scores of single
examples in examples/MODEL/TASK.jsonl; then all models are resampled on the same examples.

\b
--from reads what others wrote, with the scores of single questions: lm-eval (--output_path with --log_samples; axes
params and shots), inspect (.eval and .json logs; reasoning_tokens and numbers in metadata and task arguments; epochs
are seeds), inverse-scaling-ttc (raw/MODEL/TASK.jsonl of arXiv 2507.14417; reasoning_budget).

\b
Verdicts: standard (better with scale), inverse (worse), u-shaped (worse, then better), inverted-u (better, then
worse), flat, inconclusive, not-testable (fewer than five sizes). The exit code is 0 whatever they are.
"""


@scaling_app.command("trends", epilog=TRENDS)
def trends_command(
    results: Annotated[
        Path, Argument(metavar="RESULTS", help="A csv table, a folder with results.csv, or what --from says.")
    ],
    harness: Annotated[
        Literal["csv", "lm-eval", "inspect", "inverse-scaling-ttc"],
        Option("--from", metavar="<str>", help="What wrote RESULTS: csv, lm-eval, inspect or inverse-scaling-ttc."),
    ] = "csv",
    axis: Annotated[
        str | None,
        Option(
            help="Column to look along: flops, params, active_params, tokens, or any other.",
            show_default="flops, or the first that is filled in",
        ),
    ] = None,
    metric: Annotated[list[str] | None, Option(help="Metric to judge; may be repeated.", show_default="all")] = None,
    lower_is_better: Annotated[
        list[str] | None, Option(metavar="METRIC", help="A metric of which less is better; losses are known.")
    ] = None,
    alpha: Annotated[float, Option(help="Significance level.")] = 0.05,
    minimum_effect: Annotated[float, Option(help="Smallest change worth mentioning, in units of the metric.")] = 0.02,
    correction: Annotated[
        Literal["bh", "holm", "none"],
        Option(metavar="<str>", help="For several tasks: bh (Benjamini-Hochberg), holm or none."),
    ] = "bh",
    slices: Annotated[
        int | None,
        Option(
            min=2,
            max=5,
            help="Also judge so many slices of the questions by difficulty: as given, or cross-fitted.",
        ),
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        Option(
            metavar="MODEL MODEL",
            help="Compare two models question by question instead; 'MODEL, seed 1' is one of several runs.",
        ),
    ] = None,
    html: Annotated[Path | None, Option(metavar="FILE", help="Write a page that explains itself, in one file.")] = None,
    plots: Annotated[
        Path | None, Option(metavar="DIR", help="Write pictures: a sheet of all tasks and one of each, PNG and SVG.")
    ] = None,
    force: Annotated[bool, Option("--force", help="Replace a page and pictures that are there.")] = False,
    as_json: console.AsJson = False,
) -> None:
    """Say for each task whether performance gets better, worse, or turns with scale, and how sure that is."""
    if not 0 < alpha < 0.5:
        raise RecipeError(f"--alpha {alpha:g}: must be between 0 and 0.5, such as 0.05")
    if not 0 <= minimum_effect < float("inf"):
        raise RecipeError(f"--minimum-effect {minimum_effect:g}: must not be negative")
    from branchmix.scaling.readers.results import read_results
    from branchmix.scaling.trends.judge import trends_by_axis
    from branchmix.scaling.trends.verdict import Limits

    options: dict[str, Any] = {"metrics": metric or (), "limits": Limits(alpha, minimum_effect)}
    options |= {"correction": correction, "lower_is_better": lower_is_better or ()}
    if compare is not None:
        for_trends = {"--axis": axis, "--slices": slices, "--html": html, "--plots": plots}
        if given := [name for name, value in for_trends.items() if value is not None]:
            raise RecipeError(f"{given[0]}: is about trends, not about two models: leave out {given[0]} or --compare")
        _compare(read_results(results, harness), compare, options, as_json=as_json)
        return
    if html is not None:
        require_new_file(html, force=force)
    with console.progress_bar() as tell:
        reports = trends_by_axis(read_results(results, harness), axis=axis, slices=slices or 0, tell=tell, **options)
        if html is not None or plots is not None:
            _write(reports, html, plots, force=force, tell=tell)
    report = reports[0]
    console.print_notes(report.notes)
    for warning in report.warnings:
        console.notice(f"warning: {warning}")
    console.output(as_json, report.as_dict, lambda: _print_verdicts(report))
    for written in (html, plots):
        if written is not None:
            console.notice(f"written: {written}")


def _compare(table: ResultsTable, models: tuple[str, str], options: dict[str, Any], *, as_json: bool) -> None:
    """A table of differences for each kind of data."""
    from branchmix.scaling.trends.pairs import compare_models

    found = compare_models(table, *models, **options)

    def show() -> None:
        for kind in dict.fromkeys(one.data for one in found.tasks):
            rows = [(one.task, one.metric, one.found, one.p_adjusted) for one in found.tasks if one.data == kind]
            title = f"{found.second} minus {found.first}, on the same questions ({kind})"
            corrected = CORRECTIONS[found.correction]
            console.differences(title, rows, alpha=found.limits.alpha, correction=corrected).show()

    console.output(as_json, found.as_dict, show, found.notes)


def _write(reports: list[Report], html: Path | None, plots: Path | None, *, force: bool, tell: Progress) -> None:
    """The page and the pictures that were asked for; nothing of either if something is in the way."""
    from branchmix.pages.pictures import save
    from branchmix.scaling.trends import html_page
    from branchmix.scaling.trends.overview import Overview
    from branchmix.scaling.trends.plots import pictures

    overview = Overview(reports)
    drawings = {plots / name: draw for name, draw in pictures(overview).items()} if plots is not None else {}
    for file in drawings:
        require_new_file(file, force=force)
    if html is not None:
        words = [word for word in sys.argv[1:] if word not in ("--force", "--json")]
        write_text(html, html_page.html(overview, command=shlex.join(["branchmix", *words])))
    for done, (file, draw) in enumerate(drawings.items(), 1):
        save(draw, file, **({"dpi": 160} if file.suffix == ".png" else {}))
        tell("pictures", done, len(drawings))


def _print_verdicts(report: Report) -> None:
    """A table for each metric of each family, then families and official against fresh questions."""
    from branchmix.scaling.trends.sentences import comparisons, percent_of

    for part in report.parts:
        tasks = report.tasks(part)
        for metric in dict.fromkeys(metric for metrics in tasks.values() for metric in metrics):
            rows = [metrics[metric] for metrics in tasks.values() if metric in metrics]
            name = ", ".join([metric, *(word for word in part if word and len(report.parts) > 1)])
            lower = rows[0].series.lower_is_better
            _table(rows, f"{name} along {report.axis}{' (lower is better)' if lower else ''}", report).show()
            typer.echo("")
    for task, metric in dict.fromkeys(one.series.key for one in report.judged):
        for sentence in comparisons(report, task, metric):
            typer.echo(f"{task}: {sentence}\n")
    sure = percent_of(report.limits)
    typer.echo(
        f"intervals: {sure}, over examples and differences between models; "
        f"correction: {CORRECTIONS[report.correction]}; "
        f"smallest change that counts: {report.limits.minimum_effect:g}"
    )


def _table(rows: list[Judged], title: str, report: Report) -> Table:
    from branchmix.scaling.trends.judge import cause_of
    from branchmix.scaling.trends.verdict import DIRECTED, WORDS, place_text

    has_causes = any(cause_of(row.series) for row in rows)
    head = [
        "task",
        *["cause"] * has_causes,
        "settings" if report.is_within else "sizes",
        "change [interval]",
        "corrected p",
        "verdict",
    ]
    cells = []
    for row in rows:
        found = row.verdict
        low, high = found.interval
        p = "" if found.p_adjusted is None else f"{found.p_adjusted:.3f}" if found.p_adjusted >= 0.001 else "<0.001"
        why = [found.reason]
        if found.label == "not-testable":
            why.insert(0, f"performance: {found.description}")
        if found.turning_point is not None:
            legs = ", ".join(f"{name} {leg['effect']:+.3f}" for name, leg in found.legs.items())
            why.append(f"{legs}, turns at {report.axis} {place_text(found.turning_point)}")
        why += found.flags
        verdict = f"{found.label} ({WORDS[found.label]}): {'; '.join(why)}"
        change = f"{found.effect:+.3f} [{low:+.3f}, {high:+.3f}]"
        cells.append([row.series.task, *[cause_of(row.series)] * has_causes, str(found.sizes), change, p, verdict])
    bold = {(number, len(head) - 1) for number, row in enumerate(rows) if row.verdict.label in DIRECTED}
    return Table(head, cells, title=title, bold=bold, left=("cause", "verdict"))

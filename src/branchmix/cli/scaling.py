"""``branchmix scaling``: how performance moves with scale."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from branchmix.cli import console
from branchmix.cli.scaling_data import data_app
from branchmix.cli.scaling_run import EPILOG as RUN_EPILOG
from branchmix.cli.scaling_run import run_command
from branchmix.pages.table import Table

if TYPE_CHECKING:
    from branchmix.scaling.trends.judge import Judged, Report, Tell

scaling_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Inverse scaling: do models get better or worse at a task as they grow?",
)

TRENDS_EPILOG = """\b
Examples:
  branchmix scaling trends results.csv
  branchmix scaling trends runs/family --axis active_params --json
  branchmix scaling trends results.csv --html page.html --plots pictures
  branchmix scaling trends results.csv --metric accuracy --alpha 0.01

\b
The smallest table (one row for each task, model and metric; five models or more):
  task,model,params,metric,value,stderr,n
  memo-trap,pythia-70m,70e6,accuracy,0.8729,0.0109,936

\b
Further columns: flops, active_params, tokens and any other axis; family (dense against mixture), seed (several runs
of a size), data (official or fresh), cause and description of tasks of your own. A folder with results.csv may hold
scores of single examples in examples/MODEL/TASK.jsonl; then all models are resampled on the same examples.

\b
Verdicts: standard (better with scale), inverse (worse), u-shaped (worse, then better), inverted-u (better, then
worse), flat, inconclusive, not-testable (fewer than five sizes). The exit code is 0 whatever they are.
"""


scaling_app.add_typer(data_app, name="data")


scaling_app.command("run", epilog=RUN_EPILOG)(run_command)


@scaling_app.command("trends", epilog=TRENDS_EPILOG)
def trends_command(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="A csv table, or a folder with results.csv.")],
    axis: Annotated[
        str | None,
        typer.Option(
            help="Column to look along: flops, params, active_params, tokens, or any other.",
            show_default="flops, or the first that is filled in",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Metric to judge; may be repeated.", show_default="all")
    ] = None,
    lower_is_better: Annotated[
        list[str] | None, typer.Option(metavar="METRIC", help="A metric of which less is better; losses are known.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Significance level.")] = 0.05,
    minimum_effect: Annotated[
        float, typer.Option(help="Smallest change worth mentioning, in units of the metric.")
    ] = 0.02,
    correction: Annotated[str, typer.Option(help="For several tasks: bh (Benjamini-Hochberg), holm or none.")] = "bh",
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page that explains itself, in one file.")
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write pictures: a sheet of all tasks and one of each, PNG and SVG."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a page and pictures that are there.")] = False,
    as_json: console.AsJson = False,
) -> None:
    """Say for each task whether performance gets better, worse, or turns with scale, and how sure that is."""
    from branchmix.checkpoint.families import nearest
    from branchmix.checkpoint.folder import require_new_file
    from branchmix.errors import RecipeError

    if not 0 < alpha < 0.5:
        raise RecipeError(f"--alpha {alpha:g}: must be between 0 and 0.5, such as 0.05")
    if not 0 <= minimum_effect < float("inf"):
        raise RecipeError(f"--minimum-effect {minimum_effect:g}: must not be negative")
    from branchmix.scaling.trends.judge import trends_by_axis
    from branchmix.scaling.trends.multiple import CORRECTIONS
    from branchmix.scaling.trends.verdict import Limits

    chosen = next((word for word in CORRECTIONS if word == correction), None)
    if chosen is None:
        raise RecipeError(
            f"--correction {correction}: is none of {', '.join(CORRECTIONS)}{nearest(correction, CORRECTIONS)}"
        )
    if html is not None:
        require_new_file(html, force=force)
    with console.progress_bar() as tell:
        reports = trends_by_axis(
            results,
            axis=axis,
            metrics=metric or (),
            limits=Limits(alpha, minimum_effect),
            correction=chosen,
            lower_is_better=lower_is_better or (),
            tell=tell,
        )
        if html is not None or plots is not None:
            options: dict[str, Any] = {"axis": axis, "metric": metric, "lower-is-better": lower_is_better}
            options |= {"alpha": alpha if alpha != 0.05 else None}
            options |= {"minimum-effect": minimum_effect if minimum_effect != 0.02 else None}
            options |= {"correction": correction if correction != "bh" else None, "html": html, "plots": plots}
            _write(reports, html, plots, command=_command(results, options), force=force, tell=tell)
    report = reports[0]
    console.print_notes(report.notes)
    for warning in report.warnings:
        console.notice(f"warning: {warning}")
    if as_json:
        console.print_json(report.as_dict())
    else:
        _print(report)
    for written in (html, plots):
        if written is not None:
            console.notice(f"written: {written}")


def _write(
    reports: list[Report], html: Path | None, plots: Path | None, *, command: str, force: bool, tell: Tell
) -> None:
    """The page and the pictures that were asked for; nothing of either if something is in the way."""
    from branchmix.checkpoint.folder import require_name, require_new_file
    from branchmix.errors import OutputError
    from branchmix.pages import page as pages
    from branchmix.scaling.trends import html_page
    from branchmix.scaling.trends import plots as pictures
    from branchmix.scaling.trends.overview import Overview

    overview = Overview(reports)
    if plots is not None:
        require_name(plots)
        if plots.exists() and not plots.is_dir():
            raise OutputError(f"{plots}: is a file: choose a folder")
        for name in pictures.names(overview):
            require_new_file(plots / name, force=force)
    if html is not None:
        pages.write(html, html_page.html(overview, command=command))
    if plots is not None:
        total = len(pictures.names(overview))
        for done, _ in enumerate(pictures.write(overview, plots), 1):
            tell("pictures", done, total)


def _command(results: Path, options: dict[str, Any]) -> str:
    """What repeats this; only options that were given."""
    words = ["branchmix", "scaling", "trends", str(results)]
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{name}", str(one)] if one is not None else []
    return shlex.join(words)


def _print(report: Report) -> None:
    """A table for each metric of each family, then what stands side by side."""
    for part in report.parts:
        tasks = report.tasks(part)
        for metric in dict.fromkeys(metric for metrics in tasks.values() for metric in metrics):
            rows = [metrics[metric] for metrics in tasks.values() if metric in metrics]
            name = ", ".join([metric, *(word for word in part if word and len(report.parts) > 1)])
            lower = rows[0].series.lower_is_better
            _table(rows, f"{name} along {report.axis}{' (lower is better)' if lower else ''}", report).show()
            typer.echo("")
    for line in _comparisons(report):
        typer.echo(line)
    sure = f"{100 * (1 - report.limits.alpha):g} %"
    words = {"bh": "Benjamini-Hochberg over tasks", "holm": "Holm over tasks", "none": "none for several tasks"}
    typer.echo(
        f"intervals: {sure}, over examples and differences between models; correction: {words[report.correction]}; "
        f"smallest change that counts: {report.limits.minimum_effect:g}"
    )


def _table(rows: list[Judged], title: str, report: Report) -> Table:
    from branchmix.scaling.trends.judge import cause_of
    from branchmix.scaling.trends.verdict import DIRECTED, WORDS

    causes = [cause_of(row.series) for row in rows]
    head = ["task", *(["cause"] if any(causes) else []), "sizes", "change [interval]", "corrected p", "verdict"]
    cells: list[list[str]] = []
    bold: set[tuple[int, int]] = set()
    for row, cause in zip(rows, causes, strict=True):
        found = row.verdict
        low, high = found.interval
        p = "" if found.p_adjusted is None else f"{found.p_adjusted:.3f}" if found.p_adjusted >= 0.001 else "<0.001"
        why = [found.reason]
        if found.label == "not-testable":
            why.insert(0, f"performance: {found.description}")
        if found.turning_point is not None:
            legs = ", ".join(f"{name} {leg['effect']:+.3f}" for name, leg in found.legs.items())
            why.append(f"{legs}, turns at {report.axis} {found.turning_point:.2g}")
        why += found.flags
        if found.label in DIRECTED:
            bold.add((len(cells), len(head) - 1))
        verdict = f"{found.label} ({WORDS[found.label]}): {'; '.join(why)}"
        change = f"{found.effect:+.3f} [{low:+.3f}, {high:+.3f}]"
        cells.append([row.series.task, *([cause] if any(causes) else []), str(found.sizes), change, p, verdict])
    return Table(head, cells, title=title, bold=bold, left=("cause", "verdict"))


def _comparisons(report: Report) -> list[str]:
    """Families side by side, and official against fresh data, a line for each task and metric."""
    lines = []
    for task, metrics in report.interactions.items():
        for metric, pairs in metrics.items():
            for pair in pairs:
                (first, second), (low, high) = pair["families"], pair["interval"]
                verb = "differs from" if pair["differs"] else "cannot be told from"
                verb = verb if pair["testable"] else "has too few sizes to be compared with"
                lines.append(
                    f"{task}, {metric}: the slope of {second or 'no family'} {verb} that of {first or 'no family'}: "
                    f"{pair['difference']:+.3f} [{low:+.3f}, {high:+.3f}] for each tenfold {report.axis}"
                )
    for task, differences in report.contamination.items():
        for metric, found in differences.items():
            low, high = found["interval"]
            words = (
                "the official data were seen in training, or the fresh ones are harder: models trained before the "
                "official data were published show which"
                if found["suspected"]
                else "no sign that it was seen in training"
            )
            lines.append(
                f"{task}, {metric}: better on official than on fresh data by {found['difference']:+.3f} "
                f"[{low:+.3f}, {high:+.3f}]: {words}"
            )
    return [*lines, ""] if lines else []

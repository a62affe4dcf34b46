"""``branchmix scaling``: how performance moves with scale. Data, a family's scores on them, and verdicts."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from branchmix.checkpoint.folder import require_new_file, write_text
from branchmix.cli import console
from branchmix.cli.console import app
from branchmix.errors import RecipeError
from branchmix.pages.numbers import human_count, with_error
from branchmix.pages.table import Table

if TYPE_CHECKING:
    from branchmix.likelihood.models import Progress
    from branchmix.scaling.results import ScalingRun
    from branchmix.scaling.trends.judge import Judged, Report

data_app = typer.Typer(
    no_args_is_help=True, help="Data of the 11 tasks: the prize's own files, and fresh examples that no model has seen."
)
scaling_app = typer.Typer(
    no_args_is_help=True, help="Inverse scaling: do models get better or worse at a task as they grow?"
)
app.add_typer(scaling_app, name="scaling")
scaling_app.add_typer(data_app, name="data")

# ---- scaling data ----

DIR = Annotated[Path, Argument(metavar="DIR", help="Folder of the files.")]

VERIFY = """\b
Examples:
  branchmix scaling data verify official
  branchmix scaling data verify official --json

\b
A line for each of the 11 files: ok, missing, wrong size or wrong hash. Exit code 0 if all are ok, else 1.
"""
FETCH = """\b
Examples:
  branchmix scaling data fetch official
  branchmix scaling data fetch official --from ./mirror      a folder with the same files

\b
Rerun the command to resume a stopped download; finished files are kept. The files are under CC BY 4.0; their authors
ask to keep them out of training data.
"""
MAKE = """\b
Examples:
  branchmix scaling data make fresh --seed 7
  branchmix scaling data make fresh --seed 7 --num 10000 --tasks memo-trap,neqa
  branchmix scaling data make fresh-4shot --seed 7 --shots 4

\b
The same seed and version give the same bytes, and fewer examples are the first of more. No model can have seen them, so
a model that gains more than others on the official files has probably seen those. Fresh examples are not exactly as
hard, though: compare the gap between models.
"""


@data_app.command("verify", epilog=VERIFY)
def verify_command(folder: DIR, as_json: console.AsJson = False) -> None:
    """Compare files with the sizes and hashes of the official ones."""
    from branchmix.scaling.official import verify

    found = verify(folder)
    complete = all(file.state == "ok" for file in found)
    content = {"ok": complete, "files": [asdict(file) for file in found]}
    console.output(as_json, lambda: content, lambda: typer.echo("\n".join(file.line for file in found)))
    if not complete:
        raise typer.Exit(1)


@data_app.command("fetch", epilog=FETCH)
def fetch_command(
    folder: DIR,
    source: Annotated[
        str | None,
        Option("--from", metavar="REPO", help="Data set on the Hub, or a folder.", show_default="the known one"),
    ] = None,
    force: Annotated[
        bool, Option("--force", help="Replace files of these names that are not the official ones.")
    ] = False,
) -> None:
    """Download the 11 official files; each gets its name once its hash is right."""
    from branchmix.scaling.official import REPOSITORY, fetch

    fetch(folder, repository=source or REPOSITORY, force=force, progress=typer.echo)


@data_app.command("make", epilog=MAKE)
def make_command(
    folder: DIR,
    seed: Annotated[int, Option(help="Random seed; different seeds give different examples.")],
    num: Annotated[int, Option(metavar="N", min=1, help="Examples of each task.")] = 1000,
    tasks: Annotated[str, Option(metavar="A,B,...", help="Names of tasks, or all.")] = "all",
    shots: console.Shots = 0,
    controls: Annotated[
        bool,
        Option(
            "--controls",
            help="Make half of modus-tollens arguments that are not correct. Officially all are, so that a model that "
            "always says Yes gets all of them right.",
        ),
    ] = False,
    force: Annotated[bool, Option("--force", help="Replace files of these names; never the official ones.")] = False,
) -> None:
    """Write fresh examples of the tasks, in the official format, with answers that are known."""
    from branchmix.scaling.generate import make_data
    from branchmix.scaling.tasks import choose

    chosen = choose(tasks)
    if shots and (own := [task.name for task in chosen if task.shots_in_prompt]):
        console.notice(f"note: {', '.join(own)}: the prompts have their own shots, so --shots changes nothing there")
    made = make_data(folder, seed=seed, num_examples=num, tasks=chosen, shots=shots, controls=controls, force=force)
    for path in made:
        typer.echo(f"{path}: {num:,} examples")


# ---- scaling run ----

RUN = """\b
Examples:
  branchmix scaling run family.yaml --tasks all --data official --out results
  branchmix scaling run family.yaml --tasks memo-trap,neqa --data official --fresh fresh --out results
  branchmix scaling run family.yaml --tasks my-task.yaml
  branchmix scaling trends results

\b
The smallest family file:
  family: pythia
  models: [EleutherAI/pythia-70m, EleutherAI/pythia-160m, ./runs/mixture]
A model may also be a mapping such as
  {model: ./mixture, name: mix-8x, family: mixture, tokens: 300B, seed: 1}

\b
With --out, rerun the command to resume a stopped run; if you add models, tasks or examples, only those are computed.
"""


@scaling_app.command("run", epilog=RUN)
def run_command(
    family: Annotated[Path, Argument(metavar="FAMILY.yaml", help="The models.")],
    tasks: Annotated[
        str, Option(metavar="A,B,...", help="Names of tasks, YAML files of your own, or all that have files.")
    ] = "all",
    data: Annotated[
        list[Path] | None, Option(metavar="DIR", help="Folder of the tasks' files; may be repeated.")
    ] = None,
    fresh: Annotated[list[Path] | None, Option(metavar="DIR", help="Folder of fresh files, to compare with.")] = None,
    out: Annotated[Path | None, Option(metavar="DIR", help="Folder for records and results.")] = None,
    limit: Annotated[int | None, Option(min=1, metavar="N", help="Examples of a task at most.")] = None,
    shots: console.Shots = 0,
    bos: Annotated[str, Option(help="BOS before each prompt: default (as the tokenizer does), on or off.")] = (
        "default"
    ),
    dtype: console.Dtype = "auto",
    batch_tokens: console.BatchTokens = 2048,
    trust_remote_code: console.TrustRemoteCode = False,
    as_json: console.AsJson = False,
) -> None:
    """Score every model of a family on every task: exact log-probabilities, the official metrics."""
    console.quiet_libraries()
    from branchmix.scaling.score_family import run

    options: dict[str, Any] = {"tasks": tasks, "data": data or (), "fresh": fresh or (), "out": out, "limit": limit}
    options |= {"shots": shots, "bos": bos, "dtype": dtype, "batch_tokens": batch_tokens}
    with console.progress_bar(out) as progress:
        found = run(family, **options, trust_remote_code=trust_remote_code, progress=progress)
    console.output(as_json, found.as_dict, lambda: _print_scores(found), found.notes)
    if out is not None:
        console.notice(f"judge them: branchmix scaling trends {out}")


def _print_scores(run: ScalingRun) -> None:
    """A row for each task and model."""
    rows = []
    labels = [result.selected.label for result in run.results]
    for result in sorted(run.results, key=lambda result: labels.index(result.selected.label)):
        sizes = (result.subject.params, result.subject.active_params)
        counts = ["" if size is None else human_count(size) for size in sizes]
        means, remarks = (result.summary.means, list(result.summary.flags)) if result.summary is not None else ({}, [])
        loss = next((name for name in ("loss", "logodds", "absolute_logodds") if name in means), "loss")
        cells = [
            with_error(means[name].value, means[name].stderr) if name in means else "" for name in ("accuracy", loss)
        ]
        coverage = f"{means['coverage'].value:.3f}" if "coverage" in means else ""
        if loss != "loss":
            remarks.insert(0, f"loss: {loss}")
        if result.refused:
            remarks.append(f"{len(result.refused)} refused")
        if result.merged:
            remarks.append(f"{result.merged} merged")
        names = [result.selected.label, result.subject.label]
        rows.append([*names, *counts, str(len(result.scored)), *cells, coverage, "; ".join(remarks)])
    head = ["task", "model", "params", "active", "n", "accuracy", "loss", "coverage", "remarks"]
    Table(head, rows, left=("model", "remarks")).show()


# ---- scaling trends ----

TRENDS = """\b
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


@scaling_app.command("trends", epilog=TRENDS)
def trends_command(
    results: Annotated[Path, Argument(metavar="RESULTS", help="A csv table, or a folder with results.csv.")],
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
    from branchmix.scaling.trends.judge import trends_by_axis
    from branchmix.scaling.trends.verdict import Limits

    if html is not None:
        require_new_file(html, force=force)
    with console.progress_bar() as tell:
        reports = trends_by_axis(
            results,
            axis=axis,
            metrics=metric or (),
            limits=Limits(alpha, minimum_effect),
            correction=correction,
            lower_is_better=lower_is_better or (),
            tell=tell,
        )
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
    words = {"bh": "Benjamini-Hochberg over tasks", "holm": "Holm over tasks", "none": "none for several tasks"}
    typer.echo(
        f"intervals: {sure}, over examples and differences between models; correction: {words[report.correction]}; "
        f"smallest change that counts: {report.limits.minimum_effect:g}"
    )


def _table(rows: list[Judged], title: str, report: Report) -> Table:
    from branchmix.scaling.trends.judge import cause_of
    from branchmix.scaling.trends.verdict import DIRECTED, WORDS

    has_causes = any(cause_of(row.series) for row in rows)
    head = ["task", *["cause"] * has_causes, "sizes", "change [interval]", "corrected p", "verdict"]
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
            why.append(f"{legs}, turns at {report.axis} {found.turning_point:.2g}")
        why += found.flags
        verdict = f"{found.label} ({WORDS[found.label]}): {'; '.join(why)}"
        change = f"{found.effect:+.3f} [{low:+.3f}, {high:+.3f}]"
        cells.append([row.series.task, *[cause_of(row.series)] * has_causes, str(found.sizes), change, p, verdict])
    bold = {(number, len(head) - 1) for number, row in enumerate(rows) if row.verdict.label in DIRECTED}
    return Table(head, cells, title=title, bold=bold, left=("cause", "verdict"))

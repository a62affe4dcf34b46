"""``branchmix study`` and ``report``: methods compared at equal data and equal compute. ``demo``: one such study."""

from __future__ import annotations

import os
import shlex
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

from branchmix.cli import console
from branchmix.cli.console import app
from branchmix.pages.numbers import human_bytes, human_count
from branchmix.pages.table import Table

if TYPE_CHECKING:
    from branchmix.study.forecast import Forecast
    from branchmix.study.scheduler import StudyReport

STUDY = """\b
Examples:
  branchmix study study.yaml --out study --dry-run      steps, tokens, FLOPs, memory, disk, time
  branchmix study study.yaml --out study                run it, or resume it
  branchmix study study.yaml --out study --only r1      the first repetition
  branchmix study study.yaml --out study --only 'r*.train.btx*,scores.soup'
  branchmix study study.yaml --out study tokens.mixture=2M
  branchmix study study.yaml --out study minutes=60     budgets of the file's proportions that fit into an hour
  branchmix report study                                tables, figures and the page of the finished steps

\b
The smallest file:
  seed: ./seed
  data:
    general: {files: "general/**/*.txt"}
    code: {files: "code/**/*.py"}
    law: {files: law.jsonl}
  tokens: {expert: 10M, mixture: 20M}
  learning_rate: {peak: 3.0e-4}
  methods: [dense, soup, btx, bam-shared-kv, bam-expert-kv]
  random_seeds: [0, 1, 2]
"""
REPORT = """\b
Examples:
  branchmix report study                 index.html, tables.md, tables.tex, tables/*.csv, figures/*.png and .pdf
  branchmix report study --markdown      only tables.md
  branchmix report docs/studies/study-a  a study's results/ folder is enough
"""


@app.command("study", epilog=STUDY)
def study_command(
    config: Annotated[Path, Argument(metavar="STUDY", help="YAML file.")],
    overrides: console.Overrides = None,
    out: Annotated[Path, Option(metavar="DIR", help="Folder of the study.")] = ...,  # type: ignore[assignment]
    only: Annotated[
        str, Option(metavar="STEPS", help="Only these steps (comma-separated) and the steps they need.")
    ] = "",
    launcher: Annotated[
        Literal["local", "ray", "inline"],
        Option(help="Processes side by side, tasks of a Ray cluster (RAY_ADDRESS), or all in this process."),
    ] = "local",
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print all steps and their costs; measures speed, runs nothing.")
    ] = False,
    as_json: console.AsJson = False,
) -> None:
    """Compare methods at equal data and equal compute: seed, experts, merges, mixtures, scores, with repetitions.

    Rerun the command to resume; finished steps are skipped, and a changed setting repeats only what depends on it.
    """
    from branchmix.study.settings import StudyFile

    names, settings = console.names_of(only), StudyFile.load(config, overrides or [])
    if dry_run:
        from branchmix.study.folder import require_own_folder
        from branchmix.study.forecast import fitted, forecast

        require_own_folder(out)
        speed = None
        if settings.minutes is not None:
            settings, speed = fitted(settings, out, say=console.notice)
        found = forecast(settings, out, only=names, speed=speed)
        console.output(as_json, lambda: asdict(found), lambda: _print_forecast(found))
        return
    from branchmix.study.scheduler import study

    report = study(settings, out, only=names, launcher=launcher)
    content = {"out": str(report.out), "steps": report.statuses, "failed": report.failed}
    console.output(as_json, lambda: {**content, "stopped_by": report.stopped_by}, lambda: None)
    _exit_unless_done(report, "run the same command again")
    if not as_json:
        typer.echo(f"all {len(report.statuses)} steps are done; next: branchmix report {out}")


def _exit_unless_done(report: StudyReport, again: str) -> None:
    """End the command if steps are left, and say why, and with ``again`` how to resume."""
    for name, reason in report.failed.items():
        console.notice(f"error: {name}: {reason}")
    if report.stopped_by is not None:
        left = f"{len(report.left)} of {len(report.statuses)} steps left"
        console.exit_stopped(f"stopped with {left}; to resume: {again}", report.stopped_by)
    if report.failed:
        raise typer.Exit(2)


def _print_forecast(found: Forecast) -> None:
    from branchmix.train.progress import duration

    head = ["step", "", "times", "parameters", "tokens", "FLOPs", "of AdamW", "memory", "disk", "time each"]
    rows = [
        [
            *(row["name"], row["status"], f"{row['times']}"),
            *(human_count(row[key]) if row[key] else "" for key in ("parameters", "tokens")),
            *(f"{row[key]:{digits}}" if row[key] else "" for key, digits in (("flops", ".4g"), ("optimizer", ".3g"))),
            *(human_bytes(row[key]) if row[key] else "" for key in ("memory", "disk")),
            duration(row["seconds"]) if row["seconds"] is not None else "?",
        ]
        for row in found.rows
    ]
    Table(head, rows, left=("",)).show()
    for line in found.lines():
        typer.echo(line)


@app.command("report", epilog=REPORT)
def report_command(
    folder: Annotated[Path, Argument(metavar="DIR", help="Folder of a study, or of its results.")],
    out: Annotated[Path | None, Option(metavar="DIR", help="Folder to write; the same folder if not given.")] = None,
    html: Annotated[bool, Option("--html", help="The page, with its figures inside.")] = False,
    markdown: Annotated[bool, Option("--markdown", help="tables.md.")] = False,
    latex: Annotated[bool, Option("--latex", help="tables.tex.")] = False,
    force: Annotated[
        bool, Option("--force", help="Replace files in --out; an earlier report's are always replaced.")
    ] = False,
    as_json: console.AsJson = False,
) -> None:
    """Write tables, figures and a page of the results that a study has so far. Without options, all of them."""
    from branchmix.study.report import report

    kinds = [name for name, wanted in (("html", html), ("markdown", markdown), ("latex", latex)) if wanted]
    found = report(folder, out, kinds=kinds, force=force)
    lines = [*found.headline, "", *map(str, found.files)]
    console.output(as_json, lambda: found.numbers, lambda: typer.echo("\n".join(lines)))


DEMO = """\b
Examples:
  branchmix demo                        15 minutes, into demo-output/
  branchmix demo --minutes 60           larger budgets of the same proportions
  branchmix demo --out demo-output      resume one that was stopped
"""


@app.command("demo", epilog=DEMO)
def demo_command(
    out: Annotated[Path, Option(metavar="DIR", help="Folder of the demo.")] = Path("demo-output"),
    minutes: Annotated[
        float | None,
        Option(metavar="M", min=0.1, help="Approximate time limit, in minutes.", show_default="15, or as begun"),
    ] = None,
    as_json: console.AsJson = False,
) -> None:
    """Train a seed and three experts, mix them in several ways, train on, compare: one page of results.

    Nothing is downloaded: the text is installed with Python packages. It is a study like any other (see branchmix
    study): every step leaves its YAML file in the folder, and finished steps are never repeated.
    """
    # On the CPU everywhere: its speed is measured there, and models as small as these are slow on a GPU.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    from branchmix.study.forecast import begun_with
    from branchmix.study.report import report
    from branchmix.study.scheduler import study
    from branchmix.study.settings import DEMO as DEMO_FILE
    from branchmix.study.settings import StudyFile
    from branchmix.train.progress import duration

    begun_at = time.monotonic()
    again = f"branchmix demo --out {shlex.quote(os.fspath(out))}"
    minutes = minutes or (begun_with(out) or {}).get("minutes")
    config = StudyFile.load(DEMO_FILE, [f"minutes={minutes}"] if minutes else [])
    try:
        done = study(config, out)
    except KeyboardInterrupt:
        console.exit_stopped(f"stopped; to resume: {again}", signal.SIGINT)
    _exit_unless_done(done, again)
    made = report(out)
    shown = [table.markdown() for table in made.tables if table.name in ("table-1", "before-training")]
    shown += [f"{line}\n" for line in made.headline]
    console.output(as_json, lambda: made.numbers, lambda: typer.echo("\n".join([*shown, str(out / "index.html")])))
    if not as_json:
        console.notice(f"took {duration(time.monotonic() - begun_at)}")

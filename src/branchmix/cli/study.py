"""``branchmix study`` and ``branchmix report``: methods compared at equal data and equal compute."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from branchmix.study.forecast import Forecast
    from branchmix.study.scheduler import StudyReport


class Launcher(str, Enum):
    """Where the steps run."""

    local = "local"
    ray = "ray"
    inline = "inline"


STUDY_EPILOG = """\b
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
REPORT_EPILOG = """\b
Examples:
  branchmix report study                 index.html, tables.md, tables.tex, tables/*.csv, figures/*.png and .pdf
  branchmix report study --markdown      only tables.md
  branchmix report docs/studies/a        a study's results/ folder is enough
"""


def study_command(
    config: Annotated[Path, typer.Argument(metavar="STUDY", help="YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Replace settings of the file.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the study.", show_default=False)] = ...,  # type: ignore[assignment]
    only: Annotated[
        str,
        typer.Option(
            metavar="STEPS", help="Only these steps (comma-separated) and the steps they need.", show_default=False
        ),
    ] = "",
    launcher: Annotated[
        Launcher,
        typer.Option(help="Processes side by side, tasks of a Ray cluster (RAY_ADDRESS), or all in this process."),
    ] = Launcher.local,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print all steps and their costs; measures speed, runs nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compare methods at equal data and equal compute: seed, experts, merges, mixtures, scores, with repetitions.

    Rerun the command to resume; finished steps are skipped, and a changed setting repeats only what depends on it.
    """
    from branchmix.study.settings import StudyFile

    names = [name.strip() for name in only.split(",") if name.strip()]
    if dry_run:
        from branchmix.cli.console import notice
        from branchmix.study.forecast import fitted, forecast

        settings = StudyFile.load(config, overrides or [])
        speed = None
        if settings.minutes is not None:
            settings, speed = fitted(settings, out, say=notice)
        found = forecast(settings, out, only=names, speed=speed)
        typer.echo(json.dumps(found.as_dict(), indent=2)) if as_json else _print_forecast(found)
        return
    from branchmix.study.scheduler import study

    report = study(config, out, only=names, overrides=overrides or [], launcher=launcher.value)
    if as_json:
        content = {
            "out": str(report.out),
            "steps": report.statuses,
            "failed": report.failed,
            "stopped_by": report.stopped_by,
        }
        typer.echo(json.dumps(content, indent=2))
    exit_unless_done(report, "run the same command again")
    if not as_json:
        typer.echo(f"all {len(report.statuses)} steps are done; next: branchmix report {out}")


def exit_unless_done(report: StudyReport, again: str) -> None:
    """Tells why steps are left, if any, and ends the command.

    Args:
        report: of the study.
        again: how to resume.
    """
    from branchmix.cli.console import notice

    for name, reason in report.failed.items():
        notice(f"error: {name}: {reason}")
    if report.stopped_by is not None:
        notice(f"stopped with {len(report.left)} of {len(report.statuses)} steps left; to resume: {again}")
        raise SystemExit(128 + report.stopped_by)  # not typer's: 130 would be taken for a Ctrl-C that left nothing
    if report.failed:
        raise typer.Exit(2)


def _print_forecast(found: Forecast) -> None:
    from rich.table import Table

    from branchmix.cli.console import human_bytes, human_count, result_console
    from branchmix.train.progress import duration

    table = Table(box=None, pad_edge=False)
    for name in ("step", "", "times"):
        table.add_column(name)
    for name in ("parameters", "tokens", "FLOPs", "of AdamW", "memory", "disk", "time each"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.rows:
        table.add_row(
            row.name,
            row.status,
            f"{row.times}",
            human_count(row.parameters) if row.parameters else "",
            human_count(row.tokens) if row.tokens else "",
            f"{row.flops:.4g}" if row.flops else "",
            f"{row.optimizer:.3g}" if row.optimizer else "",
            human_bytes(row.memory) if row.memory else "",
            human_bytes(row.disk) if row.disk else "",
            duration(row.seconds) if row.seconds is not None else "?",
        )
    result_console().print(table)
    for line in found.lines():
        typer.echo(line)


def report_command(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a study, or of its results.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to write; the same folder if not given.", show_default=False),
    ] = None,
    html: Annotated[bool, typer.Option("--html", help="The page, with its figures inside.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="tables.md.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="tables.tex.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace files in --out; an earlier report's are always replaced.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all numbers as JSON.")] = False,
) -> None:
    """Write tables, figures and a page of the results that a study has so far. Without options, all of them."""
    from branchmix.study.report import report

    kinds = [name for name, wanted in (("html", html), ("markdown", markdown), ("latex", latex)) if wanted]
    found = report(folder, out, kinds=kinds, force=force)
    if as_json:
        typer.echo(json.dumps(found.numbers, indent=2))
        return
    for line in found.headline:
        typer.echo(line)
    typer.echo("")
    for file in found.files:
        typer.echo(str(file))

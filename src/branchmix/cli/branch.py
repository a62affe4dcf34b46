"""``branchmix branch``: train all experts of a study."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from branchmix.cli import console
from branchmix.pages.numbers import human_count
from branchmix.pages.table import Table

if TYPE_CHECKING:
    from branchmix.train.branch import BranchReport

EPILOG = """\b
Examples:
  branchmix branch branch.yaml                               train all experts, or resume
  branchmix branch branch.yaml --only code,law               train only these two
  branchmix branch branch.yaml budget.tokens=2M out=./short  with changed settings
  branchmix branch branch.yaml --launcher ray                on a Ray cluster

\b
A minimal file:
  seed: ./seed
  out: ./experts
  experts: {code: , law: }
  data:
    code: {files: "code/**/*.py"}
    law: {files: law.jsonl}
  budget: {tokens: 10M}
  learning_rate: {peak: 3.0e-4}
"""


def branch_command(
    config: Annotated[Path, typer.Argument(metavar="BRANCH", help="YAML file.")],
    overrides: console.Overrides = None,
    only: Annotated[str, typer.Option(metavar="NAMES", help="Train only these experts (comma-separated).")] = "",
    launcher: Annotated[
        Literal["local", "ray"],
        typer.Option(help="Processes on this machine, or tasks on a Ray cluster (RAY_ADDRESS)."),
    ] = "local",
    force: Annotated[bool, typer.Option("--force", help="Start over.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and plan; start nothing.")] = False,
    as_json: console.AsJson = False,
) -> None:
    """Train all experts of a study from one seed, each in its own run."""
    from branchmix.train.branch import branch

    report = branch(
        config, launcher=launcher, overrides=overrides or [], only=console.names_of(only), force=force, dry_run=dry_run
    )
    console.print_notes(report.notes)
    if as_json:
        console.print_json(_as_dict(report))
    else:
        _table(report).show()
    for expert in report.failed:
        console.notice(f"error: {expert.name}: {expert.reason} (its output: {expert.out / 'log.txt'})")
    if report.stopped_by is not None:
        left = ", ".join(expert.name for expert in report.experts if expert.status != "done")
        again = " without --force" if force else ""
        console.exit_stopped(f"stopped; not finished: {left}. Rerun the command{again} to resume.", report.stopped_by)
    if report.failed:
        raise typer.Exit(2)
    if report.recipe is not None and not as_json:
        typer.echo(f"\nnext: branchmix upcycle {report.recipe} MIXTURE")


def _as_dict(report: BranchReport) -> dict[str, Any]:
    return {
        "out": str(report.out),
        "dry_run": report.dry_run,
        "recipe": None if report.recipe is None else str(report.recipe),
        "stopped_by": report.stopped_by,
        "experts": {
            expert.name: {
                "out": str(expert.out),
                "mix": expert.mix,
                "status": expert.status,
                "attempts": expert.attempts,
                "seconds": round(expert.seconds, 3),
                "reason": expert.reason or None,
                "tokens": expert.tokens,
                "held_out": {"start": expert.held_out("start"), "end": expert.held_out("end")},
            }
            for expert in report.experts
        },
        "notes": list(report.notes),
    }


def _table(report: BranchReport) -> Table:
    domains = sorted({domain for expert in report.experts for domain in expert.held_out("end")})
    rows = []
    for expert in report.experts:
        before, after = expert.held_out("start"), expert.held_out("end")
        status = "planned" if report.dry_run and expert.training is None else expert.status
        mix = expert.mix if isinstance(expert.mix, str) else ", ".join(f"{d} {s:.3g}" for d, s in expert.mix.items())
        tokens = "" if expert.tokens is None else human_count(expert.tokens)
        changes = [_change(before.get(domain), after.get(domain)) for domain in domains]
        rows.append([expert.name, status, mix, tokens, *changes])
    title = "held-out loss, before and after, nats per token" if domains else ""
    return Table(["expert", "", "mix", "tokens", *domains], rows, title=title, left=("", "mix"))


def _change(before: float | None, after: float | None) -> str:
    return "" if after is None else f"{after:.3f}" if before is None else f"{before:.3f} > {after:.3f}"

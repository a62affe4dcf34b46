"""``branchmix train`` and ``branchmix branch``: one training run, and experts side by side."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from branchmix.cli import console
from branchmix.cli.console import app
from branchmix.pages.numbers import counted, human_count
from branchmix.pages.table import Table

if TYPE_CHECKING:
    from branchmix.train.branch import BranchReport
    from branchmix.train.run_folder import RunReport

TRAIN = """\b
Examples:
  branchmix train run.yaml --dry-run                    check everything, print data, model and cost
  branchmix train run.yaml                              train, or resume a stopped run
  branchmix train run.yaml budget.tokens=2M out=short   with changed settings
  torchrun --nproc-per-node 8 -m branchmix train run.yaml

\b
A minimal run file, for one expert:
  model: Qwen/Qwen2.5-0.5B
  out: experts/code
  data: {code: {files: "src/**/*.py"}}
  budget: {tokens: 100M}
  learning_rate: {peak: 1.0e-4}

\b
On SIGTERM and Ctrl-C the run finishes its step and writes a checkpoint; the exit code is then 143 or 130.
"""


@app.command("train", epilog=TRAIN)
def train_command(
    run: Annotated[Path, Argument(metavar="RUN", help="YAML file.")],
    overrides: console.Overrides = None,
    force: Annotated[bool, Option("--force", help="Start over, replacing an earlier run.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Check and plan; train nothing.")] = False,
    as_json: console.AsJson = False,
) -> None:
    """Train a dense model or a mixture with the settings of a run file."""
    from branchmix.train.models import leave_group
    from branchmix.train.run import train
    from branchmix.train.run_folder import is_main_process

    again = shlex.join(["branchmix", "train", str(run), *(overrides or [])])
    try:
        report = train(run, overrides=overrides or [], force=force, dry_run=dry_run)
    except KeyboardInterrupt:
        if dry_run:
            raise
        line = f"interrupted; to resume from the last checkpoint, if there is one: {again}"
        console.exit_stopped(line if is_main_process() else "", signal.SIGINT)
    leave_group()
    if report.signal is not None:
        line = f"stopped; to resume from the last checkpoint: {again}"
        console.exit_stopped(line if is_main_process() else "", report.signal)
    if is_main_process():
        console.output(as_json, lambda: report.record, lambda: _print_run(report, dry_run=dry_run))


def _print_run(report: RunReport, *, dry_run: bool) -> None:
    from branchmix.train.progress import print_plan

    record = report.record
    if dry_run:
        print_plan(record, sys.stdout)
    if dry_run or report.status != "trained":
        return
    start, end = record["held_out"]["start"], record["held_out"]["end"]
    if end:
        rows = []
        for name, after in end.items():
            before = f"{start[name]['loss']:.4f}" if name in start else "-"
            rows.append([name, before, f"{after['loss']:.4f}", f"{after['perplexity']:.2f}"])
        Table(["domain", "before", "after", "perplexity"], rows, title="held-out loss, nats per token").show()
    typer.echo(
        f"trained on {counted(record['tokens'], 'token')} in {counted(record['steps'], 'step')} and "
        f"{record['seconds']:,.0f} s: {report.out}"
    )


BRANCH = """\b
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


@app.command("branch", epilog=BRANCH)
def branch_command(
    config: Annotated[Path, Argument(metavar="BRANCH", help="YAML file.")],
    overrides: console.Overrides = None,
    only: Annotated[str, Option(metavar="NAMES", help="Train only these experts (comma-separated).")] = "",
    launcher: Annotated[
        Literal["local", "ray"], Option(help="Processes on this machine, or tasks on a Ray cluster (RAY_ADDRESS).")
    ] = "local",
    force: Annotated[bool, Option("--force", help="Start over.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Check and plan; start nothing.")] = False,
    as_json: console.AsJson = False,
) -> None:
    """Train one expert per domain from the same seed, each in its own run."""
    from branchmix.train.branch import branch

    options: dict[str, Any] = {"launcher": launcher, "overrides": overrides or [], "only": console.names_of(only)}
    report = branch(config, **options, force=force, dry_run=dry_run)
    console.output(as_json, lambda: _branch_as_dict(report), _branch_table(report).show, report.notes)
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


def _branch_as_dict(report: BranchReport) -> dict[str, Any]:
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


def _branch_table(report: BranchReport) -> Table:
    domains = sorted({domain for expert in report.experts for domain in expert.held_out("end")})
    trained = any(expert.tokens is not None for expert in report.experts)
    rows = []
    for expert in report.experts:
        before, after = expert.held_out("start"), expert.held_out("end")
        status = "planned" if report.dry_run and expert.training is None else expert.status
        mix = expert.mix if isinstance(expert.mix, str) else ", ".join(f"{d} {s:.3g}" for d, s in expert.mix.items())
        tokens = "" if expert.tokens is None else human_count(expert.tokens)
        changes = [_change(before.get(domain), after.get(domain)) for domain in domains]
        rows.append([expert.name, status, mix, *([tokens] if trained else []), *changes])
    head = ["expert", "", "mix", *(["tokens"] if trained else []), *domains]
    title = "held-out loss, before and after, nats per token" if domains else ""
    return Table(head, rows, title=title, left=("", "mix"))


def _change(before: float | None, after: float | None) -> str:
    return "" if after is None else f"{after:.3f}" if before is None else f"{before:.3f} > {after:.3f}"

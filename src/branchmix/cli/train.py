"""``branchmix train``: one training run."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from branchmix.cli import console
from branchmix.pages.table import Table

if TYPE_CHECKING:
    from branchmix.train.run_folder import RunReport

EPILOG = """\b
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


def train_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="YAML file.")],
    overrides: console.Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Start over, replacing an earlier run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and plan; train nothing.")] = False,
    as_json: console.AsJson = False,
) -> None:
    """Train a dense model or a mixture with the settings of a run file."""
    from branchmix.train.run import train
    from branchmix.train.run_folder import is_main_process
    from branchmix.train.sharding import leave_group

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
        console.exit_stopped(
            f"stopped; to resume from the last checkpoint: {again}" if report.is_main else "", report.signal
        )
    if not report.is_main:
        return
    if as_json:
        console.print_json(report.record)
    elif dry_run:
        from branchmix.train.progress import print_plan

        print_plan(report.record, sys.stdout)
    elif report.status == "trained":
        _print_result(report)


def _print_result(report: RunReport) -> None:
    record = report.record
    start, end = record["held_out"]["start"], record["held_out"]["end"]
    if end:
        rows = []
        for name, after in end.items():
            before = f"{start[name]['loss']:.4f}" if name in start else "-"
            rows.append([name, before, f"{after['loss']:.4f}", f"{after['perplexity']:.2f}"])
        Table(["domain", "before", "after", "perplexity"], rows, title="held-out loss, nats per token").show()
    typer.echo(
        f"trained on {record['tokens']:,} tokens in {record['steps']:,} steps and {record['seconds']:,.0f} s: "
        f"{report.out}"
    )

"""``branchmix demo``: a study that travels with the package, on text that is installed anyway, and its report."""

from __future__ import annotations

import os
import shlex
import signal
import time
from pathlib import Path
from typing import Annotated

import typer

from branchmix.cli import console

EPILOG = """\b
Examples:
  branchmix demo                        15 minutes, into demo-output/
  branchmix demo --minutes 60           larger budgets of the same proportions
  branchmix demo --out demo-output      resume one that was stopped
"""


def demo_command(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the demo.")] = Path("demo-output"),
    minutes: Annotated[
        float | None,
        typer.Option(metavar="M", min=0.1, help="How long it may take, about.", show_default="15, or as begun"),
    ] = None,
    as_json: console.AsJson = False,
) -> None:
    """Train a seed and three experts, mix them in several ways, train on, compare: one page of results.

    Nothing is downloaded: the text is installed with Python packages. It is a study like any other (see branchmix
    study): every step leaves its YAML file in the folder, and finished steps are never repeated.
    """
    # On the CPU everywhere: its speed is measured there, and models as small as these are slow on a GPU.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    from branchmix.cli.study import exit_unless_done
    from branchmix.study.forecast import begun_with
    from branchmix.study.report import report
    from branchmix.study.scheduler import study
    from branchmix.study.settings import DEMO, StudyFile
    from branchmix.train.progress import duration

    begun_at = time.monotonic()
    again = f"branchmix demo --out {shlex.quote(os.fspath(out))}"
    minutes = minutes or (begun_with(out) or {}).get("minutes")
    config = StudyFile.load(DEMO, [f"minutes={minutes}"] if minutes else [])
    try:
        done = study(config, out)
    except KeyboardInterrupt:
        console.exit_stopped(f"stopped; to resume: {again}", signal.SIGINT)
    exit_unless_done(done, again)
    made = report(out)
    if as_json:
        console.print_json(made.numbers)
        return
    for table in made.tables:
        if table.name in ("table-1", "before-training"):
            typer.echo(table.markdown())
    for line in made.headline:
        typer.echo(f"{line}\n")
    typer.echo(out / "index.html")
    console.notice(f"took {duration(time.monotonic() - begun_at)}")

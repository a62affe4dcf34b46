"""Shared by the commands: a progress bar on stderr, the message after Ctrl-C, and quiet libraries."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def notice(text: str) -> None:
    """Print a line on stderr, where it does not mix with results."""
    print(text, file=sys.stderr)


def quiet_libraries() -> None:
    """Turn off transformers' progress bars and advice."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def goes_on_from(out: Path | None) -> Iterator[None]:
    """On Ctrl-C inside the block, exit with 130 and say how to resume from the records in ``out``, if there are any."""
    try:
        yield
    except KeyboardInterrupt:
        if out is None:
            raise
        notice(f"stopped; rerun the command to resume from the records in {out}")
        raise SystemExit(130) from None  # unlike a Ctrl-C that left nothing behind


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A callback ``(step, done, total)`` that draws a bar for each step if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda step, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    tasks: dict[str, TaskID] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:

        def update(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = progress.add_task(step, total=total)
            progress.update(tasks[step], completed=done, total=total)

        yield update

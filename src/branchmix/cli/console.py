"""What the commands share: a progress bar on stderr, what Ctrl-C leaves, sizes in words, and quiet libraries."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from branchmix.pages.numbers import human_bytes as human_bytes
from branchmix.pages.numbers import human_count as human_count

if TYPE_CHECKING:
    from rich.console import Console


def notice(text: str) -> None:
    """A line on stderr, which never mixes with results."""
    print(text, file=sys.stderr)


def result_console() -> Console:
    """For tables on stdout; wide where no terminal sets a width, so that files and pipes get whole lines."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160)


def quiet_libraries() -> None:
    """transformers' progress bars and advice have no place between our lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def goes_on_from(out: Path | None) -> Iterator[None]:
    """Ctrl-C inside ends with exit code 130 and how to go on from the records in ``out``; without any as ever."""
    try:
        yield
    except KeyboardInterrupt:
        if out is None:
            raise
        notice(f"stopped; the same command goes on from what is on record in {out}")
        raise SystemExit(130) from None  # not as a Ctrl-C that left nothing behind


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A callback ``(step, done, total)`` that draws a bar for each step; drawn only where somebody watches."""
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

        def tell(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = progress.add_task(step, total=total)
            progress.update(tasks[step], completed=done, total=total)

        yield tell

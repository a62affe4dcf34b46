"""What commands share: options, how they print results and notices, how they stop, and a progress bar."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from branchmix.errors import RecipeError

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check and plan; write nothing.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
NoCheck = Annotated[bool, typer.Option("--no-check", help="Do not look for NaN and Inf in the sources (faster).")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")]
Mixture = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a mixture.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Replace settings of the file.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16, float32, or auto: as stored.")]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens of a forward pass; changes rounding only.")]
Experts = Annotated[
    str | None,
    typer.Option(
        metavar="auto|K|NAMES",
        help="Experts of the mixture that run: auto (those that the gates choose for the prompt), how many, or names "
        "(comma-separated).",
        show_default="all",
    ),
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code included in a checkpoint.")]


def names_of(listed: str) -> list[str]:
    """The names in a comma-separated option."""
    return [name.strip() for name in listed.split(",") if name.strip()]


def experts_to_keep(given: str, config: dict[str, Any]) -> str | int | list[str]:
    """What ``--experts`` asks of a model with this config.json.

    Raises:
        RecipeError: the model has no such experts.
    """
    if config.get("model_type") != "branchmix":
        raise RecipeError("--experts: this model is not a mixture: leave --experts out")
    count = config["num_experts"]
    names = config.get("expert_names") or [f"expert-{row}" for row in range(count)]
    if given.isdecimal() and given not in names:
        if not 1 <= int(given) <= count:
            raise RecipeError(f"--experts {given}: give 1 to {count}, this mixture has {count} experts")
        return int(given)
    wanted = names_of(given)
    for name in wanted:
        if name not in names and wanted != ["auto"]:
            raise RecipeError(f"--experts {given}: no expert is called {name!r}: give some of {', '.join(names)}")
    if not wanted:
        raise RecipeError("--experts is empty: give auto, a number or names")
    return given if wanted == ["auto"] else wanted


def notice(line: str) -> None:
    """Print a line on stderr, where it does not mix with results."""
    print(line, file=sys.stderr)


def print_notes(notes: Iterable[str]) -> None:
    """Print what a user should know about a result, on stderr."""
    for note in notes:
        notice(f"note: {note}")


def print_json(content: Any) -> None:
    """Print a result for programs."""
    typer.echo(json.dumps(content, indent=2))


def quiet_libraries() -> None:
    """Turn off transformers' progress bars and advice."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def exit_stopped(line: str, number: int) -> NoReturn:
    """End a command that a signal of this number stopped and that can be resumed; ``line`` says how, if not empty."""
    if line:
        notice(line)
    raise SystemExit(128 + number)  # not typer's: 130 would be taken for a Ctrl-C that left nothing behind


@contextmanager
def resumable(records: Path | None) -> Iterator[None]:
    """On Ctrl-C inside the block, exit with 130 and say how to resume from the records in a folder, if there is one."""
    try:
        yield
    except KeyboardInterrupt:
        if records is None:
            raise
        exit_stopped(f"stopped; rerun the command to resume from the records in {records}", signal.SIGINT)


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

"""What commands share: the app, options, how they print results and notices, how they stop, and a progress bar."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer import Argument, Option

from branchmix.errors import RecipeError
from branchmix.pages.table import Table

if TYPE_CHECKING:
    from branchmix.statistics import PairedDifference

app = typer.Typer(
    name="branchmix",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Merge models fine-tuned from the same base into one mixture of attention and FFN experts (BAM).",
)
"""Each file of this package adds its commands."""

AsJson = Annotated[bool, Option("--json", help="Print the result as JSON.")]
DryRun = Annotated[bool, Option("--dry-run", help="Check and plan; write nothing.")]
Force = Annotated[bool, Option("--force", help="Replace OUT if it exists.")]
NoCheck = Annotated[bool, Option("--no-check", help="Do not look for NaN and Inf in the sources (faster).")]
Out = Annotated[Path, Argument(metavar="OUT", help="Folder to write.")]
Model = Annotated[str, Argument(metavar="MODEL", help="Folder or Hub id.")]
Mixture = Annotated[str, Argument(metavar="MODEL", help="Folder or Hub id of a mixture.")]
Overrides = Annotated[list[str] | None, Argument(metavar="KEY=VALUE", help="Replace settings of the file.")]
Data = Annotated[Path | None, Option("--data", metavar="FILE", help="YAML: domains, as in a run.")]
Dtype = Annotated[str, Option(help="bfloat16, float16, float32, or auto: as stored.")]
BatchTokens = Annotated[int, Option(min=1, help="Tokens per forward pass; affects only rounding.")]
Shots = Annotated[int, Option(min=0, metavar="K", help="Other examples, with answers, before each prompt.")]
Experts = Annotated[
    str | None,
    Option(
        metavar="auto|K|NAMES",
        help="Experts of the mixture that run: auto (those that the gates choose for the prompt), how many, or names "
        "(comma-separated).",
        show_default="all",
    ),
]
TrustRemoteCode = Annotated[bool, Option("--trust-remote-code", help="Run code included in a checkpoint.")]


def names_of(listed: str) -> list[str]:
    """The names in a comma-separated option."""
    return [name.strip() for name in listed.split(",") if name.strip()]


def counts_of(listed: str, option: str, *, least: int) -> list[int]:
    """The whole numbers in a comma-separated option, each once.

    Raises:
        RecipeError: one is not a whole number, or too small.
    """
    words = names_of(listed)
    if wrong := next((word for word in words if not word.isdecimal() or int(word) < least), None):
        raise RecipeError(f"{option}: {wrong!r} should be a whole number of {least} or more, such as {least},2,4")
    if not words:
        raise RecipeError(f"{option} is empty: give a number, or several such as {least},2,4")
    return list(dict.fromkeys(map(int, words)))


def experts_to_keep(given: str, config: dict[str, Any]) -> str | int | list[str]:
    """What ``--experts`` asks of a model with this config.json.

    Raises:
        RecipeError: the model has no such experts.
    """
    if config.get("model_type") != "branchmix":
        raise RecipeError("--experts: this model is not a mixture: leave --experts out")
    if config.get("stitches") is not None:
        raise RecipeError(
            "--experts: this mixture's experts are joined by stitches, which need all: leave --experts out"
        )
    count = config["num_experts"]
    names = config.get("expert_names") or [f"expert-{row}" for row in range(count)]
    if given.isdecimal() and given not in names:
        if not 1 <= int(given) <= count:
            raise RecipeError(f"--experts {given}: give 1 to {count}, this mixture has {count} experts")
        return int(given)
    wanted = names_of(given)
    if not wanted:
        raise RecipeError("--experts is empty: give auto, a number or names")
    if wanted == ["auto"]:
        return "auto"
    if unknown := [name for name in wanted if name not in names]:
        raise RecipeError(f"--experts {given}: no expert is called {unknown[0]!r}: choose from {', '.join(names)}")
    return wanted


def notice(line: str) -> None:
    """Print a line on stderr, where it does not mix with results."""
    print(line, file=sys.stderr)


def print_notes(notes: Iterable[str]) -> None:
    """Print what a user should know about a result, on stderr."""
    for note in notes:
        notice(f"note: {note}")


def output(as_json: bool, content: Callable[[], Any], show: Callable[[], Any], notes: Iterable[str] = ()) -> None:
    """Print a result, after its notes: ``content`` as JSON for programs, or what ``show`` prints."""
    print_notes(notes)
    if as_json:
        typer.echo(json.dumps(content(), indent=2))
    else:
        show()


def differences(
    title: str, rows: Sequence[tuple[str, str, PairedDifference, float | None]], *, alpha: float, correction: str
) -> Table:
    """Two models on the same questions: task, metric, what was found and its corrected p, in rows."""
    cells = []
    for task, metric, found, p_adjusted in rows:
        change = f"{found.difference:+.4f}"
        if found.interval is not None:
            change += " [{:+.4f}, {:+.4f}]".format(*found.interval)
        p = ["" if p is None else f"{p:.3f}" if p >= 0.001 else "<0.001" for p in (found.p, p_adjusted)]
        detectable = "" if found.detectable is None else f"{found.detectable:.4f}"
        cells.append([task, metric.replace(",", ", "), str(found.n), change, *p, detectable])
    interval = f"difference [{100 * (1 - alpha):g} % interval]"
    return Table(
        ["task", "metric", "questions", interval, "p", "corrected p", "detectable"],
        cells,
        title=title,
        note=f"corrected p: {correction}; detectable: the smallest true difference that this many questions show in "
        "80 % of cases",
        bold={(number, 3) for number, row in enumerate(rows) if row[3] is not None and row[3] < alpha},
        left=("metric",),
    )


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
def progress_bar(records: Path | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """A callback ``(step, done, total)`` that draws a bar for each step if stderr is a terminal.

    On Ctrl-C inside the block, exit with 130 and say how to resume from the records in a folder, if there is one.
    """
    try:
        if not sys.stderr.isatty():  # and without rich, which takes 8 MB
            yield lambda step, done, total: None
            return
        from rich.console import Console
        from rich.progress import Progress, TaskID

        tasks: dict[str, TaskID] = {}
        with Progress(console=Console(stderr=True), transient=True) as bars:

            def update(step: str, done: int, total: int) -> None:
                if step not in tasks:
                    tasks[step] = bars.add_task(step, total=total)
                bars.update(tasks[step], completed=done, total=total)

            yield update
    except KeyboardInterrupt:
        if records is None:
            raise
        exit_stopped(f"stopped; rerun the command to resume from the records in {records}", signal.SIGINT)


def writing_model(out: Path) -> AbstractContextManager[Callable[[str, int, int], None]]:
    """``progress_bar`` for a model that is written to ``out``.

    First, what a killed run moved aside is put back, and what it left behind is reported.
    """
    from branchmix.checkpoint.folder import holds_model, put_back, stale_folders

    if put_back(out):
        notice(f"note: {out}: put back; a run that was killed while it replaced this model had moved it aside")
    for folder in stale_folders(out):
        what = "it holds no model: remove it"
        if holds_model(folder):
            what = f"it holds a complete model, which {out} had before or would have had next: keep it or remove it"
        notice(f"note: {folder} was left behind by a killed run; {what}")
    return progress_bar()

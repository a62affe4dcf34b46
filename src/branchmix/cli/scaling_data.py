"""``branchmix scaling data``: the prize's files, verified and fetched, and fresh examples of the same tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from branchmix.cli import console

data_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Data of the 11 tasks: the prize's own files, and fresh examples that no model has seen.",
)
DIR = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the files.")]

VERIFY_EPILOG = """\b
Examples:
  branchmix scaling data verify official
  branchmix scaling data verify official --json

\b
A line for each of the 11 files: ok, missing, wrong size or wrong hash. Exit code 0 if all are ok, else 1.
"""
FETCH_EPILOG = """\b
Examples:
  branchmix scaling data fetch official
  branchmix scaling data fetch official --from ./mirror      a folder with the same files

\b
Rerun the command to resume a stopped download; finished files are kept. The files are under CC BY 4.0; their authors
ask to keep them out of training data.
"""
MAKE_EPILOG = """\b
Examples:
  branchmix scaling data make fresh --seed 7
  branchmix scaling data make fresh --seed 7 --num 10000 --tasks memo-trap,neqa
  branchmix scaling data make fresh-4shot --seed 7 --shots 4

\b
The same seed and version give the same bytes, and fewer examples are the first of more. No model can have seen them, so
a model that gains more than others on the official files has probably seen those. Fresh examples are not exactly as
hard, though: compare the gap between models.
"""


@data_app.command("verify", epilog=VERIFY_EPILOG)
def verify_command(folder: DIR, as_json: console.AsJson = False) -> None:
    """Compare files with the sizes and hashes of the official ones."""
    from branchmix.scaling.official import verify

    found = verify(folder)
    complete = all(file.state == "ok" for file in found)
    if as_json:
        files = [{"task": f.task, "file": f.file, "state": f.state, "detail": f.detail} for f in found]
        console.print_json({"ok": complete, "files": files})
    else:
        for file in found:
            typer.echo(file.line)
    if not complete:
        raise typer.Exit(1)


@data_app.command("fetch", epilog=FETCH_EPILOG)
def fetch_command(
    folder: DIR,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="REPO", help="Data set on the Hub, or a folder.", show_default="the known one"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace files of these names that are not the official ones.")
    ] = False,
) -> None:
    """Download the 11 official files; each gets its name once its hash is right."""
    from branchmix.scaling.official import REPOSITORY, fetch

    fetch(folder, repository=source or REPOSITORY, force=force, progress=typer.echo)


@data_app.command("make", epilog=MAKE_EPILOG)
def make_command(
    folder: DIR,
    seed: Annotated[int, typer.Option(help="Random seed; different seeds give different examples.")],
    num: Annotated[int, typer.Option("--num", metavar="N", min=1, help="Examples of each task.")] = 1000,
    tasks: Annotated[str, typer.Option(metavar="A,B,...", help="Names of tasks, or all.")] = "all",
    shots: Annotated[
        int, typer.Option(min=0, metavar="K", help="Other examples, with answers, before each prompt.")
    ] = 0,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls",
            help="Make half of modus-tollens arguments that are not correct. Officially all are, so that a model that "
            "always says Yes gets all of them right.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace files of these names; never the official ones.")
    ] = False,
) -> None:
    """Write fresh examples of the tasks, in the official format, with answers known and checked."""
    from branchmix.scaling.generate import make_data
    from branchmix.scaling.tasks import choose

    chosen = choose(tasks)
    if shots and (own := [task.name for task in chosen if task.shots_in_prompt]):
        console.notice(f"note: {', '.join(own)}: the prompts have their own shots, so --shots changes nothing there")
    made = make_data(folder, seed=seed, num_examples=num, tasks=chosen, shots=shots, controls=controls, force=force)
    for path in made:
        typer.echo(f"{path}: {num:,} examples")

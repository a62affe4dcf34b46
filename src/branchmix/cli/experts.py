"""``branchmix add-expert`` and ``branchmix remove-expert``: change the experts of a mixture."""

from __future__ import annotations

from typing import Annotated

import typer

from branchmix.cli import console
from branchmix.cli.upcycle import show, warn_of_leftovers
from branchmix.errors import RecipeError

ADD_EPILOG = """\b
Example:
  branchmix add-expert mixture law=./law-expert mixture-with-law
"""
REMOVE_EPILOG = """\b
Example:
  branchmix remove-expert mixture law mixture-without-law
"""


def add_expert_command(
    model: console.Mixture,
    expert: Annotated[str, typer.Argument(metavar="NAME=PATH", help="The dense model to add.")],
    out: console.Out,
    router_std: Annotated[
        float | None, typer.Option(help="Standard deviation of the routers' new rows, above 0 [default: the mixture's]")
    ] = None,
    router_seed: Annotated[int, typer.Option(help="Random seed for the routers' new rows.")] = 0,
    dry_run: console.DryRun = False,
    force: console.Force = False,
    no_check: console.NoCheck = False,
    as_json: console.AsJson = False,
) -> None:
    """Add a dense model to a mixture as an expert."""
    from branchmix.upcycling import add_expert

    name, separator, path = expert.partition("=")
    if not separator or not name or not path:
        raise RecipeError(f"{expert!r}: write the new expert as NAME=PATH, such as law=./law-expert")
    warn_of_leftovers(out)
    with console.progress_bar() as progress:
        report = add_expert(
            model,
            name,
            path,
            out,
            router_std=router_std,
            router_seed=router_seed,
            dry_run=dry_run,
            force=force,
            check=not no_check,
            progress=progress,
        )
    show(report, as_json=as_json)


def remove_expert_command(
    model: console.Mixture,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The expert to remove.")],
    out: console.Out,
    dry_run: console.DryRun = False,
    force: console.Force = False,
    no_check: console.NoCheck = False,
    as_json: console.AsJson = False,
) -> None:
    """Remove an expert from a mixture."""
    from branchmix.upcycling import remove_expert

    warn_of_leftovers(out)
    with console.progress_bar() as progress:
        report = remove_expert(model, name, out, dry_run=dry_run, force=force, check=not no_check, progress=progress)
    show(report, as_json=as_json)

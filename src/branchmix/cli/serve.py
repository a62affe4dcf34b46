"""``branchmix serve``: transformers' own server, which finds mixtures once they are registered."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Annotated

import typer

from branchmix.errors import RecipeError

EPILOG = """\b
Examples:
  branchmix serve mixture                                 http://localhost:8000/v1, for any OpenAI client
  branchmix serve mixture --host 0.0.0.0 --port 9000 --dtype bfloat16
  branchmix serve mixture --continuous-batching           all that `transformers serve --help` lists

\b
Prompt and answer together have at most as many tokens as the model has positions: a longer prompt, or a greater
max_tokens, is refused (400), and so is a request of more than 32 bytes a position (64 KiB at least; 413), unread.

\b
Needs branchmix[serve]. Clients name the model as it is written here.
"""

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Options are the server's."""


def serve_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id.", show_default=False)],
) -> None:
    """Serve a mixture (or any causal LM) over HTTP: `transformers serve`, with its options."""
    from branchmix.checkpoint.hub import resolve
    from branchmix.checkpoint.index import CheckpointIndex

    found = resolve(model)
    CheckpointIndex.open(found.folder)  # refuses pickles, and what is no checkpoint
    # By a Hub id the server finds the same revision; by its folder in the cache no client could name it.
    name = model if found.revision else str(found.folder)
    if not found.revision and "@" in name:
        raise RecipeError(f"{name}: the server takes what follows @ for a revision: give the folder another name")
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise RecipeError('serve: transformers lacks its server: pip install "branchmix[serve]"')
    _show_classes()
    from transformers.cli.serve import Serve

    from branchmix.cli.serve_limits import limited_server

    server = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    server.command()(Serve)
    with limited_server():
        server([name, *context.args], prog_name="branchmix serve")


def _show_classes() -> None:
    """Put the mixture's class where the server looks: it takes what ``architectures`` names from transformers.

    ``processing_utils`` executes the package transformers a second time, into another module, so it has to come first.
    """
    import_module("transformers.processing_utils")
    from branchmix.models.modeling_branchmix import BranchMixForCausalLM

    setattr(sys.modules["transformers"], BranchMixForCausalLM.__name__, BranchMixForCausalLM)

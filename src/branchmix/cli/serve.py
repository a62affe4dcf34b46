"""``branchmix serve``: transformers' own server, which finds mixtures once they are registered."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

import typer

from branchmix.cli import console
from branchmix.cli.console import app
from branchmix.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from branchmix.models.modeling_branchmix import BranchMixForCausalLM

EPILOG = """\b
Examples:
  branchmix serve mixture                                 http://localhost:8000/v1, for any OpenAI client
  branchmix serve mixture --host 0.0.0.0 --port 9000 --dtype bfloat16
  branchmix serve mixture --experts auto                  each request runs on the experts that suit its prompt
  branchmix serve mixture --continuous-batching           any option of `transformers serve --help`

\b
Prompt and answer together have at most as many tokens as the model has positions: a longer prompt, or a greater
max_tokens, is refused (400), and so is a request of more than 32 bytes a position (64 KiB at least; 413), unread.

\b
Requires branchmix[serve]. Clients use MODEL, as written here, as the model's name.
"""


# Options that are not known here are the server's.
@app.command("serve", epilog=EPILOG, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve_command(context: typer.Context, model: console.Model, experts: console.Experts = None) -> None:
    """Serve a mixture (or any causal LM) over HTTP: `transformers serve`, with its options."""
    from branchmix.checkpoint.companions import ADAPTER_CONFIG, left_over_adapter
    from branchmix.checkpoint.hub import resolve
    from branchmix.checkpoint.index import CheckpointIndex, left_over_quantisation

    resolved = resolve(model)
    index = CheckpointIndex.open(resolved.folder)  # refuses pickles, and folders without a checkpoint
    if experts is not None and "--continuous-batching" in context.args:
        raise RecipeError("--experts and --continuous-batching cannot be combined: leave one of them out")
    if index.config.get("document_gate") and "--continuous-batching" in context.args:
        raise RecipeError(
            "--continuous-batching: keeps no state of this mixture's document gates: leave it out, or fit gates that "
            "need none: branchmix calibrate MODEL --token-only"
        )
    if left_over_adapter(resolved.folder):
        raise CheckpointError(
            f"{resolved.folder}: an adapter's files lie beside the model's weights, and the server would apply it: "
            f"move {ADAPTER_CONFIG} away"
        )
    if left_over_quantisation(resolved.folder):
        raise CheckpointError(
            f"{resolved.folder}: config.json names a quantisation that the weights do not have, and the server would "
            "apply it: remove quantization_config from config.json"
        )
    # Given a Hub id, the server finds the same revision; clients could not name a folder in the cache.
    name = model if resolved.revision else str(resolved.folder)
    if not resolved.revision and "@" in name:
        raise RecipeError(f"{name}: the server takes what follows @ for a revision: give the folder another name")
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise RecipeError('serve: transformers lacks its server: pip install "branchmix[serve]"')
    mixture = _show_classes()
    if experts is not None:
        mixture.experts_at_inference = console.experts_to_keep(experts, index.config)
    from transformers.cli.serve import Serve

    from branchmix.cli.serve_limits import limited_server

    server = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    server.command()(Serve)
    with limited_server():
        server([name, *context.args], prog_name="branchmix serve")


def _show_classes() -> type[BranchMixForCausalLM]:
    """Put the mixture's class where the server looks: it takes what ``architectures`` names from transformers.

    ``processing_utils`` executes the package transformers a second time, into another module, so it has to come first.
    """
    import_module("transformers.processing_utils")
    from branchmix.models.modeling_branchmix import BranchMixForCausalLM

    setattr(sys.modules["transformers"], BranchMixForCausalLM.__name__, BranchMixForCausalLM)
    return BranchMixForCausalLM

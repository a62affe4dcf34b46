"""``branchmix serve``: transformers' own server, which finds mixtures once they are registered."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import typer

from branchmix.checkpoint.text import whole_characters
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
    from branchmix.checkpoint.index import CheckpointIndex, dtype_name, left_over_quantisation

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
    from unittest import mock

    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise RecipeError('serve: transformers lacks its server: pip install "branchmix[serve]"')
    mixture = _show_classes()
    if experts is not None:
        mixture.experts_at_inference = console.experts_to_keep(experts, index.config)
    from transformers.cli.serve import Serve
    from transformers.cli.serving import server
    from transformers.utils.logging import log_levels

    servers = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    servers.command()(Serve)
    command = typer.main.get_command(servers)
    with (
        command.make_context("transformers serve", [name, *context.args]) as options,
        mock.patch.object(server, "build_server", partial(_build_limited, server.build_server)),
    ):
        _require_free(options.params["host"], options.params["port"])
        if options.params["log_level"].lower() not in log_levels:
            raise RecipeError(f"--log-level {options.params['log_level']}: give one of {', '.join(log_levels)}")
        options.params["dtype"] = dtype_name(options.params["dtype"])
        try:
            command.invoke(options)
        except KeyboardInterrupt:  # how a server is stopped
            console.exit_stopped("", signal.SIGINT)
        except (ValueError, ImportError) as error:  # of an option: what a request raises is its answer
            first = str(error).strip().partition("\n")[0]
            raise RecipeError(f"serve: {first}") from None


def _require_free(host: str, port: int) -> None:
    """Refuse an address that the server could not listen on, before the model is loaded."""
    import asyncio
    import socket

    if not 0 <= port <= 65535:
        raise RecipeError(f"--port {port}: give a whole number from 0 to 65535")

    async def listen() -> None:
        loop = asyncio.get_running_loop()
        (await loop.create_server(asyncio.Protocol, host, port, start_serving=False)).close()

    try:
        asyncio.run(listen())
    except OSError as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise RecipeError(
            f"the server cannot listen on {host}, port {port}: {reason}: give another --host or --port"
        ) from None


def _show_classes() -> type[BranchMixForCausalLM]:
    """Put the mixture's class where the server looks: it takes what ``architectures`` names from transformers.

    ``processing_utils`` executes the package transformers a second time, into another module, so it has to come first.
    """
    import_module("transformers.processing_utils")
    from branchmix.models.modeling_branchmix import BranchMixForCausalLM

    setattr(sys.modules["transformers"], BranchMixForCausalLM.__name__, BranchMixForCausalLM)
    return BranchMixForCausalLM


# ---- What the server refuses, before anything is tokenised: requests that the model has no positions for.
# A request of more bytes than any prompt that fits is answered with 413, and is never in memory. One that asks for more
# tokens than there are positions, or whose prompt has as many, gets 400, and so do many beams for one request. What is
# left is cut to the room that there is: prompt and answer together have at most as many tokens as there are positions.

BYTES_PER_POSITION = 32
"""Largest request, in bytes a position. Text has about 4 a token, in JSON's escapes (``\\u4e2d``) up to 12."""
LEAST_BYTES = 1 << 16
"""Bytes that every request may have: for the names of its fields, and for tools."""
UNKNOWN_POSITIONS = 1 << 17
"""Counts for a model whose config does not say."""
MOST_AT_ONCE = 16
"""Texts that are written at once for a request; each takes the memory of a whole one."""
_AT_ONCE = ("num_beams", "num_return_sequences")
_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class RequestError(Exception):
    """A request that is answered with ``status`` and what is wrong with it, as OpenAI's servers put it."""

    def __init__(self, reason: str, status: int = 400):
        super().__init__(reason)
        self.status = status

    def response(self) -> Any:
        from starlette.responses import JSONResponse

        error = {"message": str(self), "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": error}, self.status)


def _build_limited(build: Any, model_manager: Any, *handlers: Any, generation_state: Any, **more: Any) -> Any:
    """What transformers' ``build_server`` makes, with the limits of the model that it is started with."""
    from jinja2 import TemplateError

    from branchmix.likelihood.forward import max_positions

    app = build(model_manager, *handlers, generation_state=generation_state, **more)
    (loaded,) = model_manager.loaded_models.values()  # serve_command names one, which the server keeps
    positions = max_positions(loaded.model.config) or UNKNOWN_POSITIONS
    get_manager = generation_state.get_manager

    def get_limited(*args: Any, **options: Any) -> Any:
        manager = get_manager(*args, **options)
        for name in ("generate_streaming", "generate_non_streaming"):
            if name not in vars(manager):  # the server keeps its managers
                setattr(manager, name, partial(_generate_within, positions, getattr(manager, name)))
        return manager

    async def refuse(_: Any, error: RequestError) -> Any:
        return error.response()

    async def refuse_messages(_: Any, error: TemplateError) -> Any:
        return RequestError(f"the model's chat template does not take the messages: {error}").response()

    generation_state.get_manager = get_limited
    app.add_middleware(request_limits, positions=positions)
    app.add_exception_handler(RequestError, refuse)
    app.add_exception_handler(TemplateError, refuse_messages)
    return app


def _generate_within(
    positions: int, method: Any, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **options: Any
) -> Any:
    """Generate in the room that the prompt leaves."""
    ids = inputs["input_ids"]
    length = len(ids) if isinstance(ids, list) else ids.shape[-1]
    room = positions - length
    if room < 1:
        raise RequestError(f"the prompt has {length} tokens, and the model {positions} positions: shorten it")
    for key in _AT_ONCE:
        value = getattr(gen_config, key) or 1
        if not isinstance(value, int) or value > MOST_AT_ONCE:
            raise RequestError(f"{key}: should be a whole number up to {MOST_AT_ONCE}, got {str(value)[:40]!r}")
    gen_config.max_new_tokens = min(gen_config.max_new_tokens or room, room)
    return method(model, processor, inputs, gen_config, *args, **options)


def request_limits(app: Any, positions: int) -> Any:
    """ASGI middleware: refuses by size and by the tokens asked for, and passes on whole characters."""

    async def limited(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        try:
            body = _checked(await _body(receive, positions), positions)
        except RequestError as error:
            await error.response()(scope, receive, send)
            return
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> dict[str, Any]:
            return next(messages, None) or await receive()

        await app(scope, replay, send)

    return limited


async def _body(receive: Receive, positions: int) -> bytes:
    """The body; one that is too large is read to its end, so that the client hears why, but no more of it is kept."""
    most, body, size, more = max(LEAST_BYTES, BYTES_PER_POSITION * positions), bytearray(), 0, True
    while more:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        more = message["type"] == "http.request" and message.get("more_body", False)
        if size <= most:
            body += part
    if size > most:
        reason = f"the request has {size:,} bytes, and at most {most:,} are taken, for the model has "
        raise RequestError(f"{reason}{positions:,} positions: shorten the prompt", 413)
    return bytes(body)


def _checked(body: bytes, positions: int) -> bytes:
    try:
        asked = json.loads(body)
        text = json.dumps(asked, ensure_ascii=False)
    except RecursionError:
        raise RequestError("the request's JSON is nested too deeply") from None
    except ValueError:
        return body  # not JSON: the server says so itself
    fields = asked if isinstance(asked, dict) else {}
    if fields.get("generation_config") is not None:
        from transformers import GenerationConfig

        try:
            GenerationConfig(**json.loads(fields["generation_config"]))
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise RequestError(f"generation_config: {reason[:200]}") from None
    for key in _LENGTHS:
        value = fields.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1 or value % 1:
            raise RequestError(f"{key}: should be a whole number from 1 on, got {str(value)[:40]!r}")
        if value > positions:
            raise RequestError(f"{key}: {str(value)[:40]} is more than the model's {positions:,} positions")
    whole = whole_characters(text)
    return body if whole == text else whole.encode()

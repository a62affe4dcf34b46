"""Commands about one model: ``inspect``, ``generate`` (any causal LM) and ``push``."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from branchmix.accounting import Accounting, inspect
from branchmix.checkpoint.text import whole_characters
from branchmix.cli import console
from branchmix.cli.console import app
from branchmix.errors import CheckpointError, RecipeError
from branchmix.pages.numbers import counted, human_bytes
from branchmix.pages.table import Table

if TYPE_CHECKING:
    from branchmix.export.upload import PushReport
    from branchmix.likelihood.models import TextModel

# ---- inspect ----


INSPECT = """\b
Examples:
  branchmix inspect ./my-mixture
  branchmix inspect config.json --context 256 --json
"""


@app.command("inspect", epilog=INSPECT)
def inspect_command(
    model: Annotated[
        str,
        Argument(
            metavar="MODEL_OR_CONFIG",
            help="A checkpoint folder, a config.json, or a Hub id (org/name or org/name@revision); dense or a mixture.",
        ),
    ],
    context: Annotated[
        int | None, Option(help="Tokens of context, for FLOPs and the KV cache.", show_default="the model's, <= 4096")
    ] = None,
    dtype: Annotated[
        str | None,
        Option(help="Dtype of the weights and cache: bf16, fp16, fp32, fp8.", show_default="the config's, or bf16"),
    ] = None,
    as_json: console.AsJson = False,
) -> None:
    """Count parameters, active parameters, FLOPs and KV-cache bytes exactly, without loading weights.

    If the folder has safetensors weights, their headers are counted too, and differences are reported.
    """
    accounting = inspect(model, context=context, dtype=dtype)
    console.output(as_json, accounting.as_dict, lambda: _print_accounting(accounting), accounting.notices)


def _print_accounting(accounting: Accounting) -> None:
    """Print tables: parameters by part, FLOPs by part, memory."""
    typer.echo(_headline(accounting))
    if accounting.lossless is not None:
        from branchmix.upcycling.model_card import lossless_line

        typer.echo(lossless_line(accounting.lossless, accounting.shape))
    active = asdict(accounting.active)
    rows = [
        [part.replace("_", " "), f"{total:,}", f"{active[part]:,}"]
        for part, total in asdict(accounting.total).items()
        if total
    ]
    _with_total(["parameters", "total", "active per token"], rows, accounting.total.total, accounting.active.total)
    if accounting.flops is not None:
        flops = accounting.flops
        rows = [
            [part, f"{getattr(flops.layer, part):,}", f"{flops.model(part):,}"]
            for part in ("attention", "ffn", "routers", "stitch")
            if part != "stitch" or flops.model(part)
        ]
        rows.append(["lm head", "", f"{flops.lm_head:,}"])
        head = [f"FLOPs per token, context {accounting.context:,}", "one layer", f"all {len(flops.layers)} layers"]
        _with_total(head, rows, flops.layer.total, flops.total)
    typer.echo(f"weights in {accounting.dtype}: {human_bytes(accounting.weight_bytes)}")
    if accounting.kv_cache_bytes_per_token is not None and accounting.kv_cache_bytes is not None:
        typer.echo(
            f"KV cache in {accounting.dtype}: {accounting.kv_cache_bytes_per_token:,} bytes per token, "
            f"{human_bytes(accounting.kv_cache_bytes)} for {counted(accounting.context, 'token')}"
        )
    if accounting.decoding_bytes is not None:
        read = human_bytes(accounting.decoding_bytes)
        typer.echo(f"a decoding step after {counted(accounting.context, 'token')} reads {read}")
    paper = accounting.paper()
    if paper is not None:
        printed = paper["table_7_per_layer"]
        typer.echo(
            f"the BAM paper's tables count differently: FFN {printed['ffn']:,} and total {printed['total']:,} FLOPs "
            f"per layer, {paper['table_9']['active']:,} active parameters: --json says why"
        )


def _headline(accounting: Accounting) -> str:
    """One line that describes the model."""
    shape = accounting.shape
    if shape is None:
        return f"{accounting.model}: {accounting.model_type}"
    s = shape.sizes
    kind = f"{shape.family.model_type}, {shape.family.block} blocks"
    if accounting.model_type == "branchmix":
        gate = "soft" if shape.attention_num_experts_per_tok is None else f"top-{shape.attention_num_experts_per_tok}"
        attention = f"{shape.attention} ({gate})" if shape.has_attention_experts else shape.attention
        ffn = f"{shape.ffn} (top-{shape.num_experts_per_tok})" if shape.has_ffn_experts else shape.ffn
        ffn += " and a shared expert" * shape.shared_experts
        gates = f"; document gates: {', '.join(shape.domains)}" if shape.domains else ""
        trunk = ", trunk experts" if shape.trunk == "experts" else ""
        ranks = {rank for layer in shape.expert_ranks for experts in layer.values() for rank in experts if rank}
        changes = f", changes of the seed of rank {min(ranks)} to {max(ranks)}" if ranks else ""
        parts = f"attention {attention}, ffn {ffn}{changes}{trunk}{gates}"
        if shape.stitches:
            parts = f"whole models, joined by {sum(into is not None for into in shape.stitches)} stitches"
        kind = f"mixture of {shape.num_experts} x {kind}; {parts}"
    return (
        f"{accounting.model}: {kind}; {s.num_layers} layers, width {s.hidden_size}, "
        f"{s.num_heads} heads ({s.num_kv_heads} key/value) of {s.head_dim}, FFN {s.intermediate_size}"
    )


def _with_total(head: list[str], rows: list[list[str]], *totals: int) -> None:
    """Print a table with bold totals, and an empty line below it."""
    bold = {(len(rows), column) for column in range(len(head))}
    Table(head, [*rows, ["total", *(f"{total:,}" for total in totals)]], bold=bold).show()
    typer.echo("")


# ---- generate ----

GENERATE = """\b
Examples:
  branchmix generate mixture "The capital of France is"
  branchmix generate mixture "def fibonacci(n):" --max-new-tokens 80 --temperature 0.7 --seed 1
  branchmix generate mixture "def fibonacci(n):" --experts auto       only the experts that suit the prompt
"""

MIN_TEMPERATURE = 1e-6
"""Below this, logits divided by the temperature may be infinite. At this value, sampling is already greedy."""
GREATEST_SEED = 2**64 - 1
"""Largest seed of torch's random numbers."""


@app.command("generate", epilog=GENERATE)
def generate_command(
    model: console.Model,
    prompt: Annotated[str, Argument(metavar="PROMPT", help="Text to continue.")],
    max_new_tokens: Annotated[int, Option(min=1, help="Tokens to generate.")] = 40,
    temperature: Annotated[float, Option(min=0.0, help="Sampling temperature; 0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, Option(help="Seed of sampling, for temperature > 0.")] = 0,
    dtype: console.Dtype = "auto",
    chat: Annotated[bool, Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    experts: console.Experts = None,
    trust_remote_code: console.TrustRemoteCode = False,
    as_json: console.AsJson = False,
) -> None:
    """Continue a text."""
    from branchmix.checkpoint.hub import resolve
    from branchmix.likelihood.models import TextModel, check_dtype

    dtype = check_dtype(dtype)
    if temperature != 0 and not MIN_TEMPERATURE <= temperature < math.inf:
        raise RecipeError(
            f"--temperature {temperature}: give {MIN_TEMPERATURE} or more, or 0 for the most likely token"
        )
    if not 0 <= seed <= GREATEST_SEED:
        raise RecipeError(f"--seed {seed}: give a whole number from 0 to {GREATEST_SEED}")
    resolved = resolve(model)
    if not prompt:
        raise RecipeError("PROMPT is empty: give some text to continue")
    console.quiet_libraries()
    import torch
    from transformers import TextStreamer

    text_model = TextModel(resolved, dtype, trust_remote_code)
    console.print_notes(text_model.notes)
    tokenizer = text_model.tokenizer
    inputs = _inputs(text_model, prompt, chat, max_new_tokens)
    wanted = None if experts is None else console.experts_to_keep(experts, text_model.config.to_dict())
    loaded = text_model.load()
    inputs = {name: value.to(loaded.device) for name, value in inputs.items()}
    torch.manual_seed(seed)
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    start = time.perf_counter()
    if wanted is not None:
        from branchmix.models.kept_branchmix import chosen_experts

        (options["experts"],) = chosen_experts(loaded, wanted, **inputs)
    tokens = loaded.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, pad_token_id=pad, **options)
    seconds = time.perf_counter() - start
    new = tokens[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    content: dict[str, Any] = {"prompt": prompt, "text": text, "new_tokens": len(new)}
    content["tokens_per_second"] = round(len(new) / seconds, 2)
    lines = [f"{counted(len(new), 'token')}, {len(new) / seconds:.1f} tokens/s"]
    if wanted is not None:
        names = loaded.config.expert_names or [f"expert-{row}" for row in range(loaded.config.num_experts)]
        content["experts"] = [names[row] for row in options["experts"]]
        lines.insert(0, f"experts kept: {', '.join(content['experts'])}")
    console.output(as_json, lambda: content, lambda: console.notice("\n".join(lines)))


def _inputs(text_model: TextModel, prompt: str, chat: bool, max_new_tokens: int) -> dict[str, Any]:
    """The prompt's tokens [1, T] and their mask, without other tokenizer outputs (``token_type_ids``).

    Prints a note on more tokens than the model was made for.

    Raises:
        RecipeError: see ``_in_template``; or the model has not learned positions for as many tokens.
        CheckpointError: the tokenizer makes no tokens, or some that the model does not have.
    """
    from branchmix.accounting.formulas import notices_of_positions, table_positions

    tokenizer, folder = text_model.tokenizer, text_model.folder
    text = whole_characters(_in_template(text_model, prompt) if chat else prompt)
    made = tokenizer(text, return_tensors="pt", add_special_tokens=not chat, verbose=False)
    ids_BT = made["input_ids"]
    if not ids_BT.numel():
        raise CheckpointError(f"{folder}: its tokenizer makes no tokens of PROMPT: give the folder its own tokenizer")
    size = text_model.config.get_text_config().vocab_size
    if int(ids_BT.max()) >= size:
        raise CheckpointError(
            f"{folder}: its tokenizer makes token {int(ids_BT.max())} of PROMPT, but the model has only {size} tokens: "
            "give the folder its own tokenizer"
        )
    config, length = text_model.config.to_dict(), ids_BT.shape[1] + max_new_tokens - 1  # the last token needs none
    positions = table_positions(config)
    if positions is not None and length > positions:
        raise RecipeError(
            f"--max-new-tokens {max_new_tokens}: PROMPT has {ids_BT.shape[1]} tokens, and {folder} has only "
            f"{positions} positions: give a shorter PROMPT, or ask for fewer tokens"
        )
    console.print_notes(notices_of_positions(config, length))
    return {name: made[name] for name in ("input_ids", "attention_mask") if name in made}


def _in_template(text_model: TextModel, prompt: str) -> str:
    """The prompt as the model's chat template puts it, as one message of a user.

    Raises:
        RecipeError: there is no template, or it does not take such a message.
    """
    where = f"--chat: the chat template of {text_model.folder}"
    if not text_model.tokenizer.chat_template:
        raise RecipeError(f"{where} is missing: leave --chat out")
    try:
        text = text_model.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # a template is a program: it may raise whatever Python does
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RecipeError(
            f"{where} does not take PROMPT: {reason}: correct the template, or leave --chat out"
        ) from error
    return str(text)


# ---- push ----

PUSH = """\b
Examples:
  branchmix push mixture org/bam --dry-run                        show files and model card
  branchmix push mixture org/bam --private --eval results/results.json

\b
Uploads config, weights, tokenizer, code and model card; no other files, and no paths of this machine.
"""


@app.command("push", epilog=PUSH)
def push_command(
    model: Annotated[Path, Argument(metavar="MODEL", help="Folder of a checkpoint.")],
    repo: Annotated[str, Argument(metavar="ORG/NAME", help="Repository on the Hub.")],
    private: Annotated[bool, Option("--private", help="Create a private repository.")] = False,
    results: Annotated[
        Path | None, Option("--eval", metavar="FILE", help="results.json of `branchmix eval --out`, for the card.")
    ] = None,
    licence: Annotated[
        str | None,
        Option(
            "--license", metavar="ID", help="The upload's licence, such as apache-2.0.", show_default="the sources'"
        ),
    ] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Check, and show what would be uploaded, without network.")
    ] = False,
    force: Annotated[bool, Option("--force", help="Commit to a repository that already holds files.")] = False,
    as_json: console.AsJson = False,
) -> None:
    """Upload a checkpoint to the Hugging Face Hub."""
    from branchmix.export.upload import push

    report = push(model, repo, private=private, results=results, licence=licence, dry_run=dry_run, force=force)
    console.output(as_json, lambda: _push_as_dict(report), lambda: _print_push(report), report.notes)


def _push_as_dict(report: PushReport) -> dict[str, Any]:
    return {
        "repo": report.repo,
        "private": report.private,
        "dry_run": report.url is None,
        "url": report.url,
        "files": [{"name": file.name, "bytes": file.nbytes} for file in report.files],
        "bytes": sum(file.nbytes for file in report.files),
        "license": report.licence,
        "source_licenses": report.licences,
        "card": report.card,
        "notes": list(report.notes),
    }


def _print_push(report: PushReport) -> None:
    Table(["file", "size"], [[file.name, human_bytes(file.nbytes)] for file in report.files]).show()
    total = human_bytes(sum(file.nbytes for file in report.files))
    private = " (private)" if report.private else ""
    if report.url is None:
        typer.echo(f"\nwould upload {total} to {report.repo}{private}; its card:\n")
        typer.echo(report.card, nl=False)
    else:
        typer.echo(f"\nuploaded {total}: {report.url}{private}")

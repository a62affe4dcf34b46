"""``branchmix inspect``: parameters, FLOPs and memory of a model, from its config, without torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from branchmix.accounting import Accounting, inspect
from branchmix.cli import console
from branchmix.pages.numbers import human_bytes
from branchmix.pages.table import Table


def inspect_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_CONFIG",
            help="A checkpoint folder, a config.json, or a Hub id (org/name or org/name@revision); dense or a mixture.",
        ),
    ],
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of context, for FLOPs and the KV cache.", show_default="the model's, <= 4096"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype of the weights and cache: bf16, fp16, fp32, fp8.", show_default="the config's, or bf16"
        ),
    ] = None,
    as_json: console.AsJson = False,
) -> None:
    """Count parameters, active parameters, FLOPs and KV-cache bytes exactly, without loading weights.

    If the folder has safetensors weights, their headers are counted too, and differences are reported.

    Examples:

        branchmix inspect ./my-mixture

        branchmix inspect config.json --context 256 --json
    """
    accounting = inspect(model, context=context, dtype=dtype)
    console.print_notes(accounting.notices)
    if as_json:
        console.print_json(accounting.as_dict())
    else:
        _print(accounting)


def _print(accounting: Accounting) -> None:
    """Print tables: parameters by part, FLOPs by part, memory."""
    typer.echo(_headline(accounting))
    if accounting.lossless is not None:
        from branchmix.upcycling.model_card import lossless_line

        typer.echo(lossless_line(accounting.lossless))
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
            for part in ("attention", "ffn", "routers")
        ]
        rows.append(["lm head", "", f"{flops.lm_head:,}"])
        head = [f"FLOPs per token, context {accounting.context:,}", "one layer", f"all {len(flops.layers)} layers"]
        _with_total(head, rows, flops.layer.total, flops.total)
    typer.echo(f"weights in {accounting.dtype}: {human_bytes(accounting.weight_bytes)}")
    if accounting.kv_cache_bytes_per_token is not None and accounting.kv_cache_bytes is not None:
        typer.echo(
            f"KV cache in {accounting.dtype}: {accounting.kv_cache_bytes_per_token:,} bytes per token, "
            f"{human_bytes(accounting.kv_cache_bytes)} for {accounting.context:,} tokens"
        )
    paper = accounting.paper()
    if paper is not None:
        printed = paper["table_7_per_layer"]
        typer.echo(
            f"BAM's own tables would print FFN {printed['ffn']:,} and total {printed['total']:,} FLOPs per layer, "
            f"{paper['table_9']['active']:,} active parameters: --json says why"
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
        attention = f"{shape.attention} ({gate})" if shape.attention_router else shape.attention
        ffn = f"{shape.ffn} (top-{shape.num_experts_per_tok})" if shape.ffn_router else shape.ffn
        gates = f"; document gates: {', '.join(shape.domains)}" if shape.domains else ""
        kind = f"mixture of {shape.num_experts} x {kind}; attention {attention}, ffn {ffn}{gates}"
    return (
        f"{accounting.model}: {kind}; {s.num_layers} layers, width {s.hidden_size}, "
        f"{s.num_heads} heads ({s.num_kv_heads} key/value) of {s.head_dim}, FFN {s.intermediate_size}"
    )


def _with_total(head: list[str], rows: list[list[str]], *totals: int) -> None:
    """Print a table with bold totals, and an empty line below it."""
    bold = {(len(rows), column) for column in range(len(head))}
    Table(head, [*rows, ["total", *(f"{total:,}" for total in totals)]], bold=bold).show()
    typer.echo("")

"""``branchmix inspect``: parameters, FLOPs and memory of a model, from its config, without torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from branchmix.accounting import Accounting


def inspect_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_CONFIG",
            help="A checkpoint folder, a config.json, or a Hub id (org/name or org/name@revision); dense or a mixture.",
            show_default=False,
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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Count parameters, active parameters, FLOPs and KV-cache bytes exactly, without loading weights.

    If the folder has safetensors weights, their headers are counted too, and differences are reported.

    Examples:

        branchmix inspect ./my-mixture

        branchmix inspect config.json --context 256 --json
    """
    from branchmix.accounting import inspect

    accounting = inspect(model, context=context, dtype=dtype)
    for notice in accounting.notices:
        typer.echo(f"note: {notice}", err=True)
    if as_json:
        import json

        typer.echo(json.dumps(accounting.as_dict(), indent=2))
        return
    from branchmix.cli.console import result_console

    _print(accounting, result_console())


def _print(accounting: Accounting, console: Console) -> None:
    """Print tables: parameters by part, FLOPs by part, memory."""
    from rich.table import Table

    from branchmix.cli.console import human_bytes

    console.print(_headline(accounting), highlight=False, markup=False, soft_wrap=True)
    table = Table("parameters", "total", "active per token")
    active_by_part = asdict(accounting.active)
    for part, total in asdict(accounting.total).items():
        if total:
            table.add_row(part.replace("_", " "), f"{total:,}", f"{active_by_part[part]:,}")
    table.add_section()
    table.add_row("total", f"{accounting.total.total:,}", f"{accounting.active.total:,}", style="bold")
    _right(table, console)

    if accounting.flops is not None:
        flops = accounting.flops
        title = f"FLOPs per token, context {accounting.context:,}"
        table = Table(title, "one layer", f"all {len(flops.layers)} layers")
        for part in ("attention", "ffn", "routers"):
            table.add_row(part, f"{getattr(flops.layer, part):,}", f"{flops.model(part):,}")
        table.add_row("lm head", "", f"{flops.lm_head:,}")
        table.add_section()
        table.add_row("total", f"{flops.layer.total:,}", f"{flops.total:,}", style="bold")
        _right(table, console)

    console.print(f"weights in {accounting.dtype}: {human_bytes(accounting.weight_bytes)}", highlight=False)
    if accounting.kv_cache_bytes_per_token is not None and accounting.kv_cache_bytes is not None:
        console.print(
            f"KV cache in {accounting.dtype}: {accounting.kv_cache_bytes_per_token:,} bytes per token, "
            f"{human_bytes(accounting.kv_cache_bytes)} for {accounting.context:,} tokens",
            highlight=False,
            soft_wrap=True,
        )
    paper = accounting.paper()
    if paper is not None:
        printed = paper["table_7_per_layer"]
        console.print(
            f"BAM's own tables would print FFN {printed['ffn']:,} and total {printed['total']:,} FLOPs per layer, "
            f"{paper['table_9']['active']:,} active parameters: --json says why",
            style="dim",
            highlight=False,
            soft_wrap=True,
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


def _right(table: Table, console: Console) -> None:
    """Print a table with its numbers right-aligned."""
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)

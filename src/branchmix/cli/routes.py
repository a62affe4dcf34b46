"""``branchmix routes``: which expert each token of a text uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from branchmix.evaluate.routing.routing_report import RoutingReport

EPILOG = """\b
Examples:
  branchmix routes mixture --text "def f(x): return x + 1" --html routes.html
  branchmix routes mixture --data data.yaml --html routes.html --plots plots --out routing
  branchmix routes mixture --text @contract.txt --text -         a file, and standard input
  branchmix routes Qwen/Qwen1.5-MoE-A2.7B --data data.yaml       any mixture that transformers knows

\b
The data file is the one of `branchmix eval` or of a run; the held-out documents are used.
"""
_LINES = 12
"""Maximum number of layers to print one by one."""


def routes_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a mixture.", show_default=False)],
    text: Annotated[
        list[str] | None,
        typer.Option("--text", metavar="TEXT", help="A text, @FILE, or - for standard input; may be repeated."),
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", metavar="FILE", help="YAML: domains, as in a run.")] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page: each token coloured by its expert.")
    ] = None,
    plots: Annotated[Path | None, typer.Option("--plots", metavar="DIR", help="Write pictures, PNG and PDF.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="PATH", help="Write the numbers: a folder (JSON and CSV), or a file *.json."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of context.", show_default="2048, or the model's positions")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a forward pass; changes rounding only.")] = 2048,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32, or auto: as stored.")] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of a domain at most.")] = None,
    page_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the page, in all.")] = 4000,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that a checkpoint brings along.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all numbers as JSON.")] = False,
) -> None:
    """Which expert each token uses, by layer and domain: FFN routers, and the attention gates of BAM."""
    from branchmix.checkpoint.folder import require_new_file
    from branchmix.cli.console import notice, progress_bar, quiet_libraries

    quiet_libraries()
    from branchmix.evaluate.routing.plots import plot_files, write_plots
    from branchmix.evaluate.routing.routes import number_files, read_texts, routes, write_numbers

    numbers, pictures = number_files(out) if out else [], plot_files(plots) if plots else []
    for file in (*numbers, *pictures, *([html] if html else [])):
        require_new_file(file, force=force)
    with progress_bar() as progress:
        routed = routes(
            model,
            data=data,
            texts=read_texts(text or []),
            max_length=max_length,
            batch_tokens=batch_tokens,
            dtype=dtype,
            limit=limit,
            shown_tokens=page_tokens,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    for note in routed.report.notes:
        notice(f"note: {note}")
    written: list[Path] = []
    if out is not None:
        written += write_numbers(routed.report, out)
    if plots is not None:
        written += write_plots(routed.report.as_dict(), plots)
    if html is not None:
        from branchmix.evaluate.routing.token_page import write

        written.append(write(routed, html))
    if as_json:
        typer.echo(json.dumps(routed.report.as_dict(), indent=2, allow_nan=False))
    else:
        _print(routed.report)
    for file in written:
        notice(f"written: {file}")


def _print(report: RoutingReport) -> None:
    """Shares by layer and domain; of a deep model some of the layers."""
    from rich.table import Table
    from rich.text import Text

    from branchmix.cli.console import result_console

    console = result_console()
    agreement = {pair.layer: pair for pair in report.agreement}
    for kind, layers in report.layers.items():
        facts = report.routers[kind]
        names = report.names(kind)
        how = "soft gate over all experts" if facts["soft"] else f"top-{facts['top_k']} of {facts['experts']}"
        title = f"{'FFN experts' if kind == 'ffn' else 'attention experts'}: share of tokens by domain ({how})"
        table = Table(box=None, pad_edge=False, title=title, title_justify="left")
        table.add_column("layer", justify="right")
        for domain, sizes in report.domains.items():
            few = len(names) <= 8
            head = f"{domain}, {sizes['tokens']:,} tokens\n" + (
                " ".join(name.rjust(2) for name in names) if few else "most used, %"
            )
            table.add_column(Text(head), justify="right")
        for head in ("load\nentropy", "token\nentropy", "expert tells\ndomain, bits", "agrees with\nattention"):
            if not head.startswith("agrees") or (kind == "ffn" and agreement):
                table.add_column(head, justify="right")
        step = max(1, -(-len(layers) // _LINES))
        for layer in layers[::step]:
            cells = [_shares(layer.by_domain[domain], names) for domain in report.domains]
            known = layer.mutual_information_corrected
            cells += [
                f"{layer.load_entropy:.2f}",
                f"{layer.token_entropy:.2f}",
                "-" if known is None else f"{known:.3f}",
            ]
            if kind == "ffn" and agreement:
                pair = agreement.get(layer.layer)
                cells.append("-" if pair is None else f"{pair.same:.0%} ({pair.same_by_chance:.0%} by chance)")
            table.add_row(str(layer.layer), *(Text(cell) for cell in cells))
        console.print(table, highlight=False)
        if step > 1:
            console.print(
                f"one of {step} of all {len(layers)} layers; all with --json, --out or --html", highlight=False
            )
        console.print()
    for kind, layers in report.layers.items():
        layer = max(layers, key=lambda layer: layer.mutual_information_corrected or 0.0)
        console.print(
            f"typical tokens in layer {layer.layer}, {'FFN' if kind == 'ffn' else 'attention'}:", highlight=False
        )
        for name, tokens in list(zip(report.names(kind), layer.typical, strict=True))[:_LINES]:
            words = " ".join(repr(token["token"]) for token in tokens[:8])
            console.print(Text(f"  {name}: {words or '-'}"), soft_wrap=True)


def _shares(shares: list[float], names: list[str]) -> str:
    """All of a few experts in their order; of many, the most used with their names."""
    if len(names) <= 8:
        return " ".join(
            f"{100 * share:.0f}".rjust(max(2, len(name))) for share, name in zip(shares, names, strict=True)
        )
    order = sorted(range(len(shares)), key=lambda expert: -shares[expert])[:3]
    return ", ".join(f"{names[expert]}: {100 * shares[expert]:.0f}" for expert in order)

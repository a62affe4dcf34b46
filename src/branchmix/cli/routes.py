"""``branchmix routes``: which expert each token of a text uses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from branchmix.checkpoint.folder import require_new_file, write_text
from branchmix.cli import console
from branchmix.cli.console import app
from branchmix.pages.table import Table

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


@app.command("routes", epilog=EPILOG)
def routes_command(
    model: console.Mixture,
    text: Annotated[
        list[str] | None,
        Option(metavar="TEXT", help="A text, @FILE, or - for standard input; may be repeated."),
    ] = None,
    data: console.Data = None,
    html: Annotated[
        Path | None, Option(metavar="FILE", help="Write a page: each token coloured by its expert.")
    ] = None,
    plots: Annotated[Path | None, Option(metavar="DIR", help="Write pictures, PNG and PDF.")] = None,
    out: Annotated[
        Path | None,
        Option(metavar="PATH", help="Write the numbers: a folder (JSON and CSV), or a file *.json."),
    ] = None,
    max_length: Annotated[
        int | None, Option(min=1, help="Tokens of context.", show_default="2048, or the model's positions")
    ] = None,
    batch_tokens: console.BatchTokens = 2048,
    dtype: console.Dtype = "auto",
    limit: Annotated[int | None, Option(min=1, help="Documents of a domain at most.")] = None,
    page_tokens: Annotated[int, Option(min=1, help="Tokens of the page, in all.")] = 4000,
    force: Annotated[bool, Option("--force", help="Replace files that exist.")] = False,
    trust_remote_code: console.TrustRemoteCode = False,
    as_json: console.AsJson = False,
) -> None:
    """Which expert each token uses, by layer and domain: FFN routers, and the attention gates of BAM."""
    console.quiet_libraries()
    from branchmix.evaluate.routing.plots import plot_files, write_plots
    from branchmix.evaluate.routing.routes import number_files, read_texts, routes, write_numbers

    numbers, pictures = number_files(out) if out else [], plot_files(plots) if plots else []
    for file in (*numbers, *pictures, *([html] if html else [])):
        require_new_file(file, force=force)
    options: dict[str, Any] = {"max_length": max_length, "batch_tokens": batch_tokens, "dtype": dtype, "limit": limit}
    options |= {"shown_tokens": page_tokens, "trust_remote_code": trust_remote_code}
    with console.progress_bar() as progress:
        routed = routes(model, data=data, texts=read_texts(text or []), **options, progress=progress)
    written: list[Path] = []
    if out is not None:
        written += write_numbers(routed.report, out)
    if plots is not None:
        written += write_plots(routed.report.as_dict(), plots)
    if html is not None:
        from branchmix.evaluate.routing import token_page

        write_text(html, token_page.html(routed))
        written.append(html)
    console.output(as_json, routed.report.as_dict, lambda: _print(routed.report), routed.report.notes)
    for file in written:
        console.notice(f"written: {file}")


def _print(report: RoutingReport) -> None:
    """Shares by layer and domain; of a deep model some of the layers."""
    agreement = {pair["layer"]: pair for pair in report.agreement}
    for kind, layers in report.layers.items():
        facts = report.routers[kind]
        names = report.names(kind)
        how = "soft gate over all experts" if facts["soft"] else f"top-{facts['top_k']} of {facts['experts']}"
        title = f"{'FFN experts' if kind == 'ffn' else 'attention experts'}: share of tokens by domain ({how})"
        shown = " ".join(name.rjust(2) for name in names) if len(names) <= 8 else "most used, %"
        head = [
            "layer",
            *(f"{domain}, {sizes['tokens']:,} tokens\n{shown}" for domain, sizes in report.domains.items()),
        ]
        head += ["load\nentropy", "token\nentropy", "expert tells\ndomain, bits"]
        if kind == "ffn" and agreement:
            head.append("agrees with\nattention")
        rows = []
        step = max(1, -(-len(layers) // _LINES))
        for layer in layers[::step]:
            cells = [_shares(layer["by_domain"][domain], names) for domain in report.domains]
            known = layer["mutual_information_corrected"]
            cells += [f"{layer[name]:.2f}" for name in ("load_entropy", "token_entropy")]
            cells.append("-" if known is None else f"{known:.3f}")
            if kind == "ffn" and agreement:
                pair = agreement.get(layer["layer"])
                cells.append("-" if pair is None else f"{pair['same']:.0%} ({pair['same_by_chance']:.0%} by chance)")
            rows.append([str(layer["layer"]), *cells])
        note = f"one of {step} of all {len(layers)} layers; all with --json, --out or --html" if step > 1 else ""
        Table(head, rows, title=title, note=note).show()
        typer.echo("")
    for kind, layers in report.layers.items():
        layer = max(layers, key=lambda layer: layer["mutual_information_corrected"] or 0.0)
        typer.echo(f"typical tokens in layer {layer['layer']}, {'FFN' if kind == 'ffn' else 'attention'}:")
        for name, tokens in list(zip(report.names(kind), layer["typical"], strict=True))[:_LINES]:
            words = " ".join(repr(token["token"]) for token in tokens[:8])
            typer.echo(f"  {name}: {words or '-'}")


def _shares(shares: list[float], names: list[str]) -> str:
    """All of a few experts in their order; of many, the most used with their names."""
    if len(names) <= 8:
        return " ".join(
            f"{100 * share:.0f}".rjust(max(2, len(name))) for share, name in zip(shares, names, strict=True)
        )
    order = sorted(range(len(shares)), key=lambda expert: -shares[expert])[:3]
    return ", ".join(f"{names[expert]}: {100 * shares[expert]:.0f}" for expert in order)

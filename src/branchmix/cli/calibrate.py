"""``branchmix calibrate``: fit the gates of a mixture on text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from branchmix.cli.upcycle import AsJson

if TYPE_CHECKING:
    from branchmix.upcycling.gates.measure import Fitted

EPILOG = """\b
Examples:
  branchmix calibrate mixture --data data.yaml                      the mixture itself gets new gates
  branchmix calibrate mixture --data data.yaml --out calibrated     write a copy
  branchmix calibrate mixture --data data.yaml --token-only --out for-vllm

\b
A data file, with a domain for each kind of text that the mixture is for:
  data:
    general: {files: general.jsonl}
    code: {files: "src/**/*.py"}
    law: {files: law.jsonl}

\b
A few hundred documents a domain are enough. Documents that eval and train hold out are not read.
"""


def calibrate_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a mixture.", show_default=False)],
    data: Annotated[
        Path, typer.Option("--data", metavar="FILE", help="YAML: domains, as for eval.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write.", show_default="MODEL itself is replaced")
    ] = None,
    token_only: Annotated[
        bool,
        typer.Option("--token-only", help="Gates that see one token only: for vLLM, and for export."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code of the mixture's tokenizer.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fit the gates of a mixture on text, without training: experts are chosen by what the document is about."""
    from branchmix.cli.console import notice, progress_bar, quiet_libraries
    from branchmix.cli.upcycle import warn_of_leftovers
    from branchmix.upcycling.gates import calibrate

    quiet_libraries()
    warn_of_leftovers(out or Path(model))
    with progress_bar() as progress:
        report = calibrate(
            model,
            data,
            out,
            token_only=token_only,
            force=force,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    for note in report.fitted.notes:
        notice(f"note: {note}")
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
        return
    print_gates(report.fitted)
    typer.echo(f"\nwrote {report.out} in {report.seconds:.1f} s")


def print_gates(fitted: Fitted) -> None:
    """A row per domain: perplexity before and after, with all gates forced to the best expert, and who is wanted."""
    from rich.table import Table

    from branchmix.cli.console import result_console

    table = Table(
        box=None, pad_edge=False, title="perplexity on documents that no gate was fitted to", title_justify="left"
    )
    for name in ("domain", "tokens", "before", "after", "best expert alone", "experts wanted"):
        table.add_column(name, justify="left" if name in ("domain", "experts wanted") else "right")
    for domain in fitted.domains:
        best = min(domain.forced, key=domain.forced.__getitem__, default="")
        wanted = sorted(domain.shares.items(), key=lambda entry: -entry[1])
        table.add_row(
            domain.name,
            f"{domain.counted_tokens:,}",
            *("-" if loss is None else f"{math.exp(loss):.2f}" for loss in (domain.before, domain.after)),
            f"{math.exp(domain.forced[best]):.2f} ({best})" if best else "-",
            ", ".join(f"{name} {share:.0%}" for name, share in wanted if share >= 0.01),
        )
    result_console().print(table)

"""``branchmix calibrate``: fit the gates of a mixture on text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from branchmix.cli import console

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
    model: console.Mixture,
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="YAML: domains, as for eval.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write.", show_default="MODEL itself is replaced")
    ] = None,
    token_only: Annotated[
        bool,
        typer.Option("--token-only", help="Gates that see one token only: for vLLM, and for export."),
    ] = False,
    keep_top_k: Annotated[
        bool,
        typer.Option("--keep-top-k", help="Leave the number of experts a token has, and raw gates, as they are."),
    ] = False,
    force: console.Force = False,
    trust_remote_code: console.TrustRemoteCode = False,
    as_json: console.AsJson = False,
) -> None:
    """Fit the gates of a mixture on text, without training: experts are chosen by what the document is about."""
    from branchmix.cli.upcycle import print_gates, warn_of_leftovers
    from branchmix.upcycling.gates import calibrate

    console.quiet_libraries()
    warn_of_leftovers(out or Path(model))
    with console.progress_bar() as progress:
        report = calibrate(
            model,
            data,
            out,
            token_only=token_only,
            keep_top_k=keep_top_k,
            force=force,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    console.print_notes(report.fitted.notes)
    if as_json:
        console.print_json(report.as_dict())
        return
    print_gates(report.fitted)
    typer.echo(f"\nwrote {report.out} in {report.seconds:.1f} s")

"""``branchmix push``: upload a checkpoint to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from branchmix.cli import console
from branchmix.pages.numbers import human_bytes
from branchmix.pages.table import Table

if TYPE_CHECKING:
    from branchmix.export.upload import PushReport

EPILOG = """\b
Examples:
  branchmix push mixture org/bam --dry-run                        show files and model card
  branchmix push mixture org/bam --private --eval results/results.json

\b
Uploads config, weights, tokenizer, code and model card; no other files, and no paths of this machine.
"""


def push_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a checkpoint.")],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Repository on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    results: Annotated[
        Path | None,
        typer.Option("--eval", metavar="FILE", help="results.json of `branchmix eval --out`, for the card."),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            "--license", metavar="ID", help="The upload's licence, such as apache-2.0.", show_default="the sources'"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, and show what would be uploaded, without network.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Commit to a repository that already holds files.")] = False,
    as_json: console.AsJson = False,
) -> None:
    """Upload a checkpoint to the Hugging Face Hub."""
    from branchmix.export.upload import push

    report = push(model, repo, private=private, results=results, licence=licence, dry_run=dry_run, force=force)
    console.print_notes(report.notes)
    if as_json:
        console.print_json(_as_dict(report))
    else:
        _print(report)


def _as_dict(report: PushReport) -> dict[str, Any]:
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


def _print(report: PushReport) -> None:
    Table(["file", "size"], [[file.name, human_bytes(file.nbytes)] for file in report.files]).show()
    total = human_bytes(sum(file.nbytes for file in report.files))
    private = " (private)" if report.private else ""
    if report.url is None:
        typer.echo(f"\nwould upload {total} to {report.repo}{private}; its card:\n")
        typer.echo(report.card, nl=False)
    else:
        typer.echo(f"\nuploaded {total}: {report.url}{private}")

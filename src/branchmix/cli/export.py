"""``branchmix export``: convert a mixture to a class that other tools know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from branchmix.cli import console
from branchmix.cli.upcycle import plan_table, warn_of_leftovers
from branchmix.pages.numbers import human_bytes

if TYPE_CHECKING:
    from branchmix.export import ExportReport

EPILOG = """\b
Examples:
  branchmix export btx btx-mixtral --to mixtral         BTX with normalised gates, for vLLM and llama.cpp
  branchmix export bam code-alone --to dense --expert code

\b
Exports are exact, or refused with all reasons. Both models' logits are compared (unless --no-verify).
  mixtral    Llama, Mistral, Phi-3 seeds; normalised or soft gates
  qwen2_moe  Qwen2, Llama, Phi-3 seeds; any gates (adds an expert of zeros)
  qwen3_moe  Qwen3 seeds; any gates
  flex_olmo  OLMo 2 seeds; any gates
  olmoe      none: no dense family has its blocks (explains the differences)
  dense      one expert of any mixture with the shared weights, or a mixture without experts
"""


def export_command(
    model: console.Mixture,
    out: console.Out,
    to: Annotated[str, typer.Option(metavar="CLASS", help="mixtral, qwen2_moe, qwen3_moe, flex_olmo, olmoe or dense.")],
    expert: Annotated[str | None, typer.Option(metavar="NAME", help="Expert to export, for --to dense.")] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not compare both models' logits.")] = False,
    dry_run: console.DryRun = False,
    force: console.Force = False,
    no_check: console.NoCheck = False,
    as_json: console.AsJson = False,
) -> None:
    """Export a mixture to a native or dense checkpoint."""
    from branchmix.export import export_model

    if not (no_verify or dry_run):
        console.quiet_libraries()
    warn_of_leftovers(out)
    with console.progress_bar() as progress:
        report = export_model(
            model,
            out,
            to=to,
            expert=expert,
            verify=not no_verify,
            dry_run=dry_run,
            force=force,
            check=not no_check,
            progress=progress,
        )
    _show(report, as_json=as_json)


def _show(report: ExportReport, *, as_json: bool) -> None:
    console.print_notes(report.plan.notes)
    if as_json:
        console.print_json(_as_dict(report))
        return
    plan_table(report.plan).show()
    verification = report.verification
    if verification is not None:
        typer.echo(
            f"\nverified: {verification.tensors_compared} tensors ({human_bytes(verification.bytes_compared)}) "
            f"byte-identical to the mixture's; logits of {verification.tokens} tokens differ by at most "
            f"{verification.difference:.2e} (largest logit {verification.greatest_logit:.1f})"
        )
    if report.written is not None:
        typer.echo(f"\nwrote {human_bytes(report.plan.nbytes)} to {report.out} in {report.seconds:.1f} s")


def _as_dict(report: ExportReport) -> dict[str, Any]:
    from branchmix.upcycling.execute import free_bytes

    plan = report.plan
    return {
        "out": str(report.out),
        "dry_run": report.written is None,
        "to": report.to,
        "expert": report.expert,
        "model_type": plan.config["model_type"],
        "bytes": plan.nbytes,
        "free_bytes": free_bytes(report.out),
        "groups": [group.as_dict() for group in plan.groups],
        "notes": list(plan.notes),
        "verification": report.verification.as_dict() if report.verification else None,
        "seconds": round(report.seconds, 3),
    }

"""``branchmix upcycle``: merge dense models into a mixture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from branchmix.accounting import inspect
from branchmix.cli import console
from branchmix.pages.numbers import human_bytes, human_count
from branchmix.pages.table import Table

if TYPE_CHECKING:
    from branchmix.upcycling import UpcycleReport
    from branchmix.upcycling.gates.measure import Fitted
    from branchmix.upcycling.plan import Plan

EPILOG = """\b
Examples:
  branchmix upcycle recipe.yaml mixture --dry-run     show what would be written, and how
  branchmix upcycle recipe.yaml mixture --verify      write it and verify it on text

\b
A minimal recipe:
  seed: Qwen/Qwen2.5-0.5B
  experts:
    - {name: code, model: ./code}
    - {name: math, model: ./math}
"""

PEAK_MEMORY_BYTES = 150_000_000
"""Anonymous memory of a merge, for any size and number of models (measured: benchmarks/upcycle.py memory)."""


def upcycle_command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file.")],
    out: console.Out,
    dry_run: console.DryRun = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Verify copied bytes, and every expert's logits on a text.")
    ] = False,
    force: console.Force = False,
    no_check: console.NoCheck = False,
    no_hashes: Annotated[bool, typer.Option("--no-hashes", help="Do not record hashes of the source files.")] = False,
    trust_remote_code: console.TrustRemoteCode = False,
    as_json: console.AsJson = False,
) -> None:
    """Merge dense models fine-tuned from one seed into a mixture of experts."""
    from branchmix.recipe import Recipe
    from branchmix.upcycling import upcycle

    loaded = Recipe.load(recipe)
    if verify or loaded.gates:
        console.quiet_libraries()
    warn_of_leftovers(out)
    with console.progress_bar() as progress:
        report = upcycle(
            loaded,
            out,
            dry_run=dry_run,
            verify=verify,
            force=force,
            check=not no_check,
            hashes=not no_hashes,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    show(report, as_json=as_json)


def warn_of_leftovers(out: Path) -> None:
    """Put back what a killed run moved aside, and report what it left behind."""
    from branchmix.checkpoint.folder import holds_model, put_back, stale_folders

    if put_back(out):
        console.notice(f"note: {out}: put back; a run that was killed while it replaced this model had moved it aside")
    for folder in stale_folders(out):
        if holds_model(folder):
            what = f"it holds a complete model, which {out} had before or would have had next: keep it or remove it"
        else:
            what = "it holds no model: remove it"
        console.notice(f"note: {folder} was left behind by a killed run; {what}")


def show(report: UpcycleReport, *, as_json: bool) -> None:
    """Print what was done, as tables or as JSON."""
    console.print_notes((*report.plan.notes, *(report.gates.notes if report.gates else ())))
    if as_json:
        console.print_json(as_dict(report))
        return
    _print_plan(report)
    if report.verification is not None:
        _print_verification(report)
    if report.gates is not None:
        typer.echo("")
        print_gates(report.gates)
    if report.written is not None:
        typer.echo(f"\nwrote {human_bytes(report.plan.nbytes)} to {report.out} in {report.seconds:.1f} s")


def as_dict(report: UpcycleReport) -> dict[str, Any]:
    """The report as JSON."""
    from branchmix.upcycling.execute import free_bytes

    plan = report.plan
    result: dict[str, Any] = {
        "out": str(report.out),
        "dry_run": report.written is None,
        "method": _method(report),
        "experts": [source.name for source in plan.sources],
        "bytes": plan.nbytes,
        "free_bytes": free_bytes(report.out),
        "peak_memory_bytes": PEAK_MEMORY_BYTES,
        "groups": [group.as_dict() for group in plan.groups],
        "lossless": None if plan.is_dense else plan.lossless,
        "notes": list(plan.notes),
        "seconds": round(report.seconds, 3),
        "accounting": inspect(plan.config).as_dict(),
    }
    if report.gates is not None:
        result["gates"] = report.gates.as_dict()
    if report.verification is not None:
        result["verification"] = report.verification.as_dict()
    return result


def plan_table(plan: Plan) -> Table:
    """A row per kind of tensor: how many, how large, and how they are made."""
    rows = [
        [group.name, str(group.count), " x ".join(map(str, group.shape)), human_bytes(group.nbytes), group.how]
        for group in plan.groups
    ]
    return Table(["tensors", "count", "shape", "size", ""], rows, left=("shape", ""))


def _print_plan(report: UpcycleReport) -> None:
    from branchmix.upcycling.execute import free_bytes
    from branchmix.upcycling.model_card import lossless_line

    plan = report.plan
    typer.echo(f"{_method(report)}; experts: {', '.join(source.name for source in plan.sources)}")
    plan_table(plan).show()
    if plan.lossless is not None and not plan.is_dense:
        typer.echo(lossless_line(plan.lossless))
    accounting = inspect(plan.config)
    typer.echo(
        f"parameters: {human_count(accounting.total.total)} total, {human_count(accounting.active.total)} active; "
        f"KV cache: {accounting.kv_cache_bytes_per_token:,} bytes per token; "
        f"disk: {human_bytes(plan.nbytes)} needed, {human_bytes(free_bytes(report.out))} free; "
        f"memory: at most about {human_bytes(PEAK_MEMORY_BYTES)}"
    )


def print_gates(fitted: Fitted) -> None:
    """A row per domain: perplexity before and after, with all gates forced to the best expert, and who is wanted."""
    rows = []
    for domain in fitted.domains:
        best = min(domain.forced, key=domain.forced.__getitem__, default="")
        wanted = sorted(domain.shares.items(), key=lambda entry: -entry[1])
        losses = ("-" if loss is None else f"{math.exp(loss):.2f}" for loss in (domain.before, domain.after))
        bound = f"{math.exp(domain.forced[best]):.2f} ({best})" if best else "-"
        shares = ", ".join(f"{name} {share:.0%}" for name, share in wanted if share >= 0.01)
        rows.append([domain.name, f"{domain.counted_tokens:,}", *losses, bound, shares])
    head = ["domain", "tokens", "before", "after", "best expert alone", "experts wanted"]
    Table(head, rows, title="perplexity on documents that no gate was fitted to", left=("experts wanted",)).show()


def _print_verification(report: UpcycleReport) -> None:
    verification = report.verification
    assert verification is not None
    typer.echo(
        f"\nverified: {verification.tensors_compared} tensors ({human_bytes(verification.bytes_compared)}) "
        f"byte-identical to their sources, {verification.averages_checked} averages recomputed in fp64"
    )
    if not verification.experts:
        return
    difference = "largest difference from the dense model"
    rows = [
        [check.name, check.skipped, ""]
        if check.skipped
        else [check.name, f"{check.difference:.2e}", f"{check.greatest_logit:.1f}"]
        for check in verification.experts
    ]
    title = f"gates one-hot, logits of {verification.tokens} tokens against the "
    title += "whole dense models" if verification.lossless else "dense models on the mixture's trunk"
    Table(["expert", difference, "largest logit"], rows, title=title, left=(difference,)).show()


def _method(report: UpcycleReport) -> str:
    from branchmix.upcycling.model_card import method_of

    method = method_of(report.plan.config, report.recipe)
    assert method is not None, "a dense model is written by a recipe only"
    return method

"""``branchmix upcycle``: merge dense models into a mixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from branchmix.upcycling import UpcycleReport
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

Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check and plan; write nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
NoCheck = Annotated[bool, typer.Option("--no-check", help="Do not look for NaN and Inf in the sources (faster).")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)]


def upcycle_command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file.", show_default=False)],
    out: Out,
    dry_run: DryRun = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Verify copied bytes, and every expert's logits on a text.")
    ] = False,
    force: Force = False,
    no_check: NoCheck = False,
    no_hashes: Annotated[bool, typer.Option("--no-hashes", help="Do not record hashes of the source files.")] = False,
    as_json: AsJson = False,
) -> None:
    """Merge dense models fine-tuned from one seed into a mixture of experts."""
    from branchmix.cli.console import progress_bar, quiet_libraries
    from branchmix.recipe import Recipe
    from branchmix.upcycling import upcycle

    loaded = Recipe.load(recipe)
    if verify or loaded.gates:
        quiet_libraries()
    warn_of_leftovers(out)
    with progress_bar() as progress:
        report = upcycle(
            loaded,
            out,
            dry_run=dry_run,
            verify=verify,
            force=force,
            check=not no_check,
            hashes=not no_hashes,
            progress=progress,
        )
    show(report, as_json=as_json)


def warn_of_leftovers(out: Path) -> None:
    """Put back what a killed run moved aside, and report what it left behind."""
    from branchmix.checkpoint.folder import holds_model, put_back, stale_folders
    from branchmix.cli.console import notice

    if put_back(out):
        notice(f"note: {out}: put back; a run that was killed while it replaced this model had moved it aside")
    for folder in stale_folders(out):
        if holds_model(folder):
            what = f"it holds a complete model, which {out} had before or would have had next: keep it or remove it"
        else:
            what = "it holds no model: remove it"
        notice(f"note: {folder} was left behind by a killed run; {what}")


def show(report: UpcycleReport, *, as_json: bool) -> None:
    """Print what was done, as tables or as JSON."""
    from branchmix.cli.console import notice

    for note in report.plan.notes:
        notice(f"note: {note}")
    if as_json:
        typer.echo(json.dumps(as_dict(report), indent=2))
        return
    _print_plan(report)
    if report.verification is not None:
        _print_verification(report)
    if report.gates is not None:
        from branchmix.cli.calibrate import print_gates

        typer.echo("")
        print_gates(report.gates)
    if report.written is not None:
        from branchmix.cli.console import human_bytes

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
        "notes": list(plan.notes),
        "seconds": round(report.seconds, 3),
        "accounting": _accounting(plan).as_dict(),
    }
    if report.gates is not None:
        result["gates"] = report.gates.as_dict()
    if report.verification is not None:
        result["verification"] = report.verification.as_dict()
    return result


def plan_table(plan: Plan) -> Table:
    """A row per kind of tensor: how many, how large, and how they are made."""
    from rich.table import Table

    from branchmix.cli.console import human_bytes

    table = Table(box=None, pad_edge=False)
    table.add_column("tensors", overflow="fold")
    table.add_column("count", justify="right")
    table.add_column("shape", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("")
    for group in plan.groups:
        shape = " x ".join(map(str, group.shape))
        table.add_row(group.name, str(group.count), shape, human_bytes(group.nbytes), group.how)
    return table


def _print_plan(report: UpcycleReport) -> None:
    from branchmix.cli.console import human_bytes, human_count, result_console
    from branchmix.upcycling.execute import free_bytes

    plan = report.plan
    console = result_console()
    console.print(f"{_method(report)}; experts: {', '.join(source.name for source in plan.sources)}", highlight=False)
    console.print(plan_table(plan))
    accounting = _accounting(plan)
    console.print(
        f"parameters: {human_count(accounting.total.total)} total, {human_count(accounting.active.total)} active; "
        f"KV cache: {accounting.kv_cache_bytes_per_token:,} bytes per token; "
        f"disk: {human_bytes(plan.nbytes)} needed, {human_bytes(free_bytes(report.out))} free; "
        f"memory: at most about {human_bytes(PEAK_MEMORY_BYTES)}",
        highlight=False,
        soft_wrap=True,
    )


def _print_verification(report: UpcycleReport) -> None:
    from rich.table import Table

    from branchmix.cli.console import human_bytes, result_console

    verification = report.verification
    assert verification is not None
    console = result_console()
    console.print(
        f"\nverified: {verification.tensors_compared} tensors ({human_bytes(verification.bytes_compared)}) "
        f"byte-identical to their sources, {verification.averages_checked} averages recomputed in fp64",
        highlight=False,
        soft_wrap=True,
    )
    if not verification.experts:
        return
    table = Table(
        box=None, pad_edge=False, title=f"gates one-hot, logits of {verification.tokens} tokens", title_justify="left"
    )
    for name in ("expert", "largest difference from the dense model", "largest logit"):
        table.add_column(name)
    for check in verification.experts:
        numbers = (check.skipped, "") if check.skipped else (f"{check.difference:.2e}", f"{check.greatest_logit:.1f}")
        table.add_row(check.name, *numbers)
    console.print(table)


def _method(report: UpcycleReport) -> str:
    from branchmix.upcycling.card import method_of

    method = method_of(report.plan.config, report.recipe)
    assert method is not None, "a dense model is written by a recipe only"
    return method


def _accounting(plan: Plan) -> Any:
    from branchmix.accounting import inspect

    return inspect(plan.config)

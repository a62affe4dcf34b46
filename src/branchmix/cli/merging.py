"""Commands that write mixtures: ``upcycle``, ``calibrate``, ``add-expert`` and ``remove-expert``; and ``export``."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from branchmix.accounting import inspect
from branchmix.cli import console
from branchmix.cli.console import app
from branchmix.errors import RecipeError
from branchmix.pages.numbers import human_bytes, human_count
from branchmix.pages.table import Table

if TYPE_CHECKING:
    from branchmix.export import ExportReport
    from branchmix.upcycling import UpcycleReport
    from branchmix.upcycling.gates.measure import Fitted
    from branchmix.upcycling.low_rank import Decomposed, Truncation
    from branchmix.upcycling.plan import Plan

PEAK_MEMORY_BYTES = 150_000_000
"""Anonymous memory of a merge, for any size and number of models (measured: benchmarks/upcycle.py memory)."""

# ---- upcycle, add-expert, remove-expert ----

UPCYCLE = """\b
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


@app.command("upcycle", epilog=UPCYCLE)
def upcycle_command(
    recipe: Annotated[Path, Argument(metavar="RECIPE", help="YAML file.")],
    out: console.Out,
    dry_run: console.DryRun = False,
    verify: Annotated[
        bool, Option("--verify", help="Verify copied bytes, and every expert's logits on a sample text.")
    ] = False,
    force: console.Force = False,
    no_check: console.NoCheck = False,
    no_hashes: Annotated[bool, Option("--no-hashes", help="Do not record hashes of the source files.")] = False,
    trust_remote_code: console.TrustRemoteCode = False,
    as_json: console.AsJson = False,
) -> None:
    """Merge dense models fine-tuned from the same seed into a mixture of experts."""
    from branchmix.recipe import Recipe
    from branchmix.upcycling import upcycle

    loaded = Recipe.load(recipe)
    if verify or loaded.gates or loaded.routing.domains:
        console.quiet_libraries()
    options: dict[str, Any] = {"dry_run": dry_run, "verify": verify, "force": force, "check": not no_check}
    options |= {"hashes": not no_hashes, "trust_remote_code": trust_remote_code}
    with console.writing_model(out) as progress:
        report = upcycle(loaded, out, **options, progress=progress)
    _output(report, as_json)
    routed = loaded.experts and (loaded.has_attention_experts or loaded.has_ffn_experts)
    if routed and not (loaded.gates or loaded.routing.domains or dry_run or as_json):
        typer.echo(f"\nnext, as its routers are random: branchmix calibrate {out} --data DATA.yaml, or branchmix train")


ADD_EXPERT = """\b
Examples:
  branchmix add-expert mixture law=./law-expert mixture-with-law
  branchmix add-expert mixture law=./law-expert mixture-with-law --data data.yaml   for routing.domains
"""


@app.command("add-expert", epilog=ADD_EXPERT)
def add_expert_command(
    model: console.Mixture,
    expert: Annotated[str, Argument(metavar="NAME=PATH", help="The dense model to add.")],
    out: console.Out,
    router_std: Annotated[
        float | None,
        Option(help="Standard deviation of the routers' new rows, above 0.", show_default="the mixture's"),
    ] = None,
    router_seed: Annotated[int, Option(help="Random seed for the routers' new rows.")] = 0,
    data: Annotated[
        Path | None,
        Option(metavar="FILE", help="YAML: text of the expert's domain, for mixtures with routing.domains (Nexus)."),
    ] = None,
    dry_run: console.DryRun = False,
    force: console.Force = False,
    no_check: console.NoCheck = False,
    trust_remote_code: console.TrustRemoteCode = False,
    as_json: console.AsJson = False,
) -> None:
    """Add a dense model to a mixture as an expert."""
    from branchmix.upcycling import add_expert

    name, _, path = expert.partition("=")
    if not name or not path:
        raise RecipeError(f"{expert!r}: write the new expert as NAME=PATH, such as law=./law-expert")
    if data is not None:
        console.quiet_libraries()
    options: dict[str, Any] = {"router_std": router_std, "router_seed": router_seed, "data": data}
    options |= {"dry_run": dry_run, "force": force, "check": not no_check, "trust_remote_code": trust_remote_code}
    with console.writing_model(out) as progress:
        report = add_expert(model, name, path, out, **options, progress=progress)
    _output(report, as_json)


@app.command("remove-expert", epilog="\b\nExample:\n  branchmix remove-expert mixture law mixture-without-law\n")
def remove_expert_command(
    model: console.Mixture,
    name: Annotated[str, Argument(metavar="NAME", help="The expert to remove.")],
    out: console.Out,
    dry_run: console.DryRun = False,
    force: console.Force = False,
    no_check: console.NoCheck = False,
    as_json: console.AsJson = False,
) -> None:
    """Remove an expert from a mixture."""
    from branchmix.upcycling import remove_expert

    with console.writing_model(out) as progress:
        report = remove_expert(model, name, out, dry_run=dry_run, force=force, check=not no_check, progress=progress)
    _output(report, as_json)


def _output(report: UpcycleReport, as_json: bool) -> None:
    notes = (*report.plan.notes, *(report.gates.notes if report.gates else ()))
    console.output(as_json, lambda: as_dict(report), lambda: _print(report), notes)


def as_dict(report: UpcycleReport) -> dict[str, Any]:
    """The report as JSON."""
    plan = report.plan
    parts = {"gates": report.gates, "verification": report.verification}
    return {
        **_written_as_dict(report),
        "method": _method(report),
        "experts": [source.name for source in plan.sources],
        "peak_memory_bytes": _peak_memory(plan),
        "lossless": None if plan.is_dense else plan.lossless,
        "accounting": inspect(plan.config).as_dict(),
        **({"cut": [asdict(cut) for cut in plan.decomposed.truncations.values()]} if plan.decomposed else {}),
        **{name: part.as_dict() for name, part in parts.items() if part is not None},
    }


def _written_as_dict(report: UpcycleReport | ExportReport) -> dict[str, Any]:
    from branchmix.upcycling.execute import free_bytes

    plan = report.plan
    return {
        "out": str(report.out),
        "dry_run": report.written is None,
        "bytes": plan.nbytes,
        "free_bytes": free_bytes(report.out),
        "groups": [asdict(group) for group in plan.groups],
        "notes": list(plan.notes),
        "seconds": round(report.seconds, 3),
    }


def _print(report: UpcycleReport) -> None:
    from branchmix.upcycling.execute import free_bytes
    from branchmix.upcycling.model_card import lossless_line

    plan, accounting = report.plan, inspect(report.plan.config)
    typer.echo(f"{_method(report)}; experts: {', '.join(source.name for source in plan.sources)}")
    _plan_table(plan).show()
    if plan.lossless is not None and not plan.is_dense:
        typer.echo(lossless_line(plan.lossless, accounting.shape))
    typer.echo(
        f"parameters: {human_count(accounting.total.total)} total, {human_count(accounting.active.total)} active; "
        f"KV cache: {accounting.kv_cache_bytes_per_token:,} bytes per token; "
        f"disk: {human_bytes(plan.nbytes)} needed, {human_bytes(free_bytes(report.out))} free; "
        f"memory of the merge: at most about {human_bytes(_peak_memory(plan))}"
    )
    if plan.decomposed is not None and plan.decomposed.truncations:
        _cut_table(plan.decomposed).show()
    if report.verification is not None:
        _print_verification(report.verification)
    if report.gates is not None:
        typer.echo("")
        _print_gates(report.gates)
    _print_written(report)


def _peak_memory(plan: Plan) -> int:
    """Bytes that a merge takes at most; changes that are cut to a rank need torch, and a few copies of one matrix."""
    from branchmix.upcycling.low_rank import LowRankExpert, SingularFactor

    factors = (A for e in plan.sources if isinstance(e, LowRankExpert) for A, _ in e.factors.values())
    largest = max((A.change.whole.nbytes for A in factors if isinstance(A, SingularFactor)), default=None)
    return PEAK_MEMORY_BYTES if largest is None else PEAK_MEMORY_BYTES + 400_000_000 + 8 * largest


def _plan_table(plan: Plan) -> Table:
    """A row per kind of tensor: how many, how large, and how they are made."""
    rows = [
        [group.name, str(group.tensors), " x ".join(map(str, group.shape)), human_bytes(group.bytes), group.how]
        for group in plan.groups
    ]
    return Table(["tensors", "count", "shape", "size", ""], rows, left=("shape", ""))


def _cut_table(decomposed: Decomposed) -> Table:
    """A row for each matrix of each expert that was cut to a rank, over all layers."""
    groups: dict[tuple[str, str], list[Truncation]] = {}
    for cut in decomposed.truncations.values():
        groups.setdefault((cut.expert, cut.matrix), []).append(cut)
    rows = []
    for key, cuts in groups.items():
        ranks, errors = [cut.rank for cut in cuts], [cut.error for cut in cuts]
        words = str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        mean, seconds = sum(errors) / len(errors), sum(cut.seconds for cut in cuts)
        rows.append([*key, words, f"{mean:.1%}", f"{max(errors):.1%}", f"{seconds:.1f} s"])
    head = ["expert", "matrix", "rank", "lost on average", "at most", "time"]
    return Table(head, rows, title="changes cut to a rank: what they lose of their norm", left=("matrix",))


def _print_verification(verification: Any) -> None:
    typer.echo(
        f"\nverified: {verification.tensors_byte_identical} tensors ({human_bytes(verification.bytes_compared)}) "
        f"byte-identical to their sources, {verification.averages_checked} averages recomputed in fp64"
    )
    if verification.changes_checked:
        typer.echo(
            f"{verification.changes_checked} changes of the seed compared with their experts' matrices: at most "
            f"{verification.change_error:.2g} of a change's norm is lost"
        )
    rows = [
        [check.name, check.skipped or f"{check.max_difference:.2e}", "" if check.skipped else f"{check.max_logit:.1f}"]
        for check in verification.experts
    ]
    if rows:
        whole = "whole dense models" if verification.whole_experts else "dense models on the mixture's trunk"
        title = f"all gates forced to one expert: logits of {verification.tokens} tokens against the {whole}"
        if verification.stitched:
            title = (
                f"logits of the seed and last states of the others, {verification.tokens} tokens, against the {whole}"
            )
        head = ["expert", "largest difference from the dense model", "largest value"]
        Table(head, rows, title=title, left=head[1:2]).show()


def _print_written(report: UpcycleReport | ExportReport) -> None:
    if report.written is not None:
        typer.echo(f"\nwrote {human_bytes(report.plan.nbytes)} to {report.out} in {report.seconds:.1f} s")


def _method(report: UpcycleReport) -> str:
    from branchmix.upcycling.model_card import method_of

    method = method_of(report.plan.config, report.recipe)
    assert method is not None, "a dense model is written by a recipe only"
    return method


# ---- calibrate ----

CALIBRATE = """\b
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


@app.command("calibrate", epilog=CALIBRATE)
def calibrate_command(
    model: console.Mixture,
    data: Annotated[Path, Option(metavar="FILE", help="YAML: domains, as for eval.")],
    out: Annotated[Path | None, Option(help="Folder to write.", show_default="MODEL itself is replaced")] = None,
    token_only: Annotated[
        bool,
        Option("--token-only", help="Gates that see a single token instead of the document: for vLLM and for export."),
    ] = False,
    keep_top_k: Annotated[
        bool, Option("--keep-top-k", help="Keep the number of experts per token, and raw gates.")
    ] = False,
    force: console.Force = False,
    trust_remote_code: console.TrustRemoteCode = False,
    as_json: console.AsJson = False,
) -> None:
    """Fit the gates of a mixture on text, without training: experts are chosen by what the document is about."""
    from branchmix.upcycling.gates import calibrate

    console.quiet_libraries()
    options: dict[str, Any] = {"token_only": token_only, "keep_top_k": keep_top_k, "force": force}
    with console.writing_model(out or Path(model)) as progress:
        report = calibrate(model, data, out, **options, trust_remote_code=trust_remote_code, progress=progress)

    def show() -> None:
        _print_gates(report.fitted)
        typer.echo(f"\nwrote {report.out} in {report.seconds:.1f} s")

    console.output(as_json, report.as_dict, show, report.fitted.notes)


def _print_gates(fitted: Fitted) -> None:
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
    Table(head, rows, title="perplexity on documents not used to fit the gates", left=("experts wanted",)).show()


# ---- export ----

EXPORT = """\b
Examples:
  branchmix export btx btx-mixtral --to mixtral         BTX with normalised gates, for vLLM and llama.cpp
  branchmix export bam code-alone --to dense --expert code

\b
Exports are exact, or refused with all reasons. Both models' logits are compared (unless --no-verify).
  mixtral    Llama, Mistral, Phi-3 (no longrope) seeds; gates that sum to 1, or soft ones
  qwen2_moe  Qwen2, Llama, Mistral (no window), Phi-3 (no longrope) seeds; any gates (adds an expert of zeros)
  qwen3_moe  Qwen3 seeds; any gates
  glm4_moe   Qwen2, Qwen3, Llama, Mistral (no window), Phi-3 (no longrope) seeds; sigmoid gates
  flex_olmo  OLMo 2 seeds; any gates
  olmoe      none: no dense family has its blocks (explains the differences)
  dense      one expert of any mixture with the shared weights, or a mixture without experts
  peft       one expert of a mixture of low-rank experts (expert_rank), as a LoRA adapter of the seed
  full       such a mixture with matrices of its own for every expert
"""


@app.command("export", epilog=EXPORT)
def export_command(
    model: console.Mixture,
    out: console.Out,
    to: Annotated[
        str,
        Option(metavar="CLASS", help="mixtral, qwen2_moe, qwen3_moe, glm4_moe, flex_olmo, olmoe, dense, peft or full."),
    ],
    expert: Annotated[str | None, Option(metavar="NAME", help="Expert to export, for --to dense and peft.")] = None,
    no_verify: Annotated[bool, Option("--no-verify", help="Do not compare both models' logits.")] = False,
    dry_run: console.DryRun = False,
    force: console.Force = False,
    no_check: console.NoCheck = False,
    as_json: console.AsJson = False,
) -> None:
    """Export a mixture to a native or dense checkpoint."""
    from branchmix.export import export_model

    if not (no_verify or dry_run):
        console.quiet_libraries()
    options: dict[str, Any] = {"to": to, "expert": expert, "verify": not no_verify}
    options |= {"dry_run": dry_run, "force": force, "check": not no_check}
    with console.writing_model(out) as progress:
        report = export_model(model, out, **options, progress=progress)
    verification = asdict(report.verification) if report.verification else None
    target = {"to": report.to, "expert": report.expert, "model_type": report.plan.config["model_type"]}
    whole = {**_written_as_dict(report), **target, "verification": verification}
    console.output(as_json, lambda: whole, lambda: _print_export(report), report.plan.notes)


def _print_export(report: ExportReport) -> None:
    _plan_table(report.plan).show()
    verification = report.verification
    if verification is not None:
        typer.echo(
            f"\nverified: {verification.tensors_byte_identical} tensors ({human_bytes(verification.bytes_compared)}) "
            f"byte-identical to the mixture's; logits of {verification.tokens} tokens differ by at most "
            f"{verification.max_difference:.2e} (largest logit {verification.max_logit:.1f})"
        )
    _print_written(report)

"""Carries out a plan: sources found, weights streamed, companions copied, provenance written, all or nothing.

The output folder appears at the end, by a rename; until then nothing in it loads, since config.json comes last.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from branchmix import __version__
from branchmix.accounting.lineage import as_records, lineage
from branchmix.accounting.shape import shape_of
from branchmix.checkpoint.companions import (
    ADAPTER_WEIGHTS,
    is_adapter,
    licence_of_folder,
    rewritten,
    shareable,
    tokenizer_files,
)
from branchmix.checkpoint.families import Config
from branchmix.checkpoint.folder import (
    MERGED,
    atomic_folder,
    beside,
    require_name,
    require_replaceable,
    write_json,
    write_text,
    writing,
)
from branchmix.checkpoint.hub import ResolvedModel, resolve
from branchmix.checkpoint.index import CheckpointIndex
from branchmix.checkpoint.writer import FileHashes, write_checkpoint
from branchmix.errors import BranchMixError, CheckpointError, CompatibilityError, OutputError
from branchmix.pages.numbers import too_little_space
from branchmix.recipe import Recipe
from branchmix.upcycling.compatibility import Fit, check_fit
from branchmix.upcycling.lora import Adapter, check_adapter, merge_adapter
from branchmix.upcycling.model_card import model_card
from branchmix.upcycling.plan import Plan, Progress, plan_upcycling
from branchmix.upcycling.sources import DenseExpert, who
from branchmix.upcycling.transformers_view import require_buildable

if TYPE_CHECKING:
    from branchmix.upcycling.gates.measure import Fitted
    from branchmix.upcycling.mixture import OpenedMixture
    from branchmix.upcycling.verify import Verification

CODE_FILES = tuple(sorted((Path(__file__).parent.parent / "models").glob("*_branchmix.py")))
"""The model's code, which is saved with every mixture."""


@dataclass(frozen=True)
class Sourced:
    """A model that goes into the output: what the user wrote, where it was found, and its headers."""

    name: str
    model: ResolvedModel
    index: CheckpointIndex
    adapter: Path | None = None
    """The LoRA folder, if ``index`` is of the merged model, or of the seed that it changes."""
    factors: Adapter | None = None
    """Its factors, for experts that stay changes of the seed."""
    merged: bool = False
    """Whether it is, or in a dry run would be, merged into the seed."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The weights that the user has: an adapter's own, not those of the temporary merge."""
        return self.index.files if self.adapter is None else (self.adapter / ADAPTER_WEIGHTS,)


@dataclass(frozen=True)
class UpcycleReport:
    """What ``upcycle`` did, or would do."""

    out: Path
    plan: Plan
    written: tuple[Path, ...] | None
    """The weight files, with their index if there are several; None after a dry run."""
    verification: Verification | None
    seconds: float
    recipe: dict[str, Any] = field(default_factory=dict)
    """As it is recorded; empty where no recipe was at work, but an expert came or went."""
    gates: Fitted | None = None
    """What was fitted, if the recipe has ``gates``."""


def upcycle(
    recipe: Recipe | dict[str, Any] | str | Path,
    out: str | Path,
    *,
    dry_run: bool = False,
    verify: bool = False,
    force: bool = False,
    check: bool = True,
    hashes: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> UpcycleReport:
    """Turn a seed and its specialised siblings into one mixture of experts (BAM, arXiv 2408.08274, section 4).

    Args:
        recipe: a recipe, its dictionary, or the path of its YAML file.
        out: folder to write, in the Hugging Face layout.
        dry_run: plan and check only.
        verify: prove the result on text before it gets its name (needs the memory of the mixture in fp32).
        force: replace ``out`` if it exists. A folder that is an input is never replaced.
        check: refuse NaN and Inf in the sources while streaming.
        hashes: record a hash of every source file, computed beside the writing.
        trust_remote_code: run code of the tokenizer's, where ``gates``, ``routing.domains`` or ``router_init`` read
            text.
        progress: called with the step's name, bytes done and bytes in all.

    Raises:
        BranchMixError: one of its kinds, before anything is written wherever that can be known.

    Example:
        >>> import branchmix
        >>> report = branchmix.upcycle("recipes/bam.yaml", "mixtures/bam")
        >>> model = AutoModelForCausalLM.from_pretrained("mixtures/bam")
    """
    start = time.perf_counter()
    recipe = Recipe.of(recipe)
    out = Path(out)
    recorded = recipe.model_dump(mode="json")
    if section := recipe.gates or recipe.routing.domains:
        from branchmix.data.config import EvalData

        data = EvalData.load(recipe.folder / section.data)
    reading: dict[str, Any] = {"trust_remote_code": trust_remote_code, "progress": progress}
    with open_sources(recipe, out, dry_run=dry_run, force=force) as (sources, fit):
        seed, router_rows, notes = sources[0], None, _notes_on_same_models(sources)
        if recipe.router_init.method == "hidden":
            from branchmix.upcycling.router_init import hidden_state_routers, router_texts

            texts = router_texts(recipe)
            if not dry_run:
                router_rows, of_routers = hidden_state_routers(
                    recipe, fit.seed, texts, trust_remote_code=trust_remote_code
                )
                notes = [*of_routers, *notes]
        if recipe.routing.domains:
            from branchmix.upcycling.domains import mean_states, router_domains, text_of_experts

            text_of_domains = text_of_experts(recipe.expert_names, data, seed.model, **reading)
            if not dry_run:
                router_rows = router_domains(mean_states(text_of_domains, seed.model, progress))
        adapters = {source.name: source.factors for source in sources if source.factors is not None}
        plan = plan_upcycling(recipe, fit, router_rows=router_rows, adapters=adapters, progress=progress)
        if recipe.gates:
            from branchmix.upcycling.gates.measure import fit as fit_gates
            from branchmix.upcycling.gates.measure import text_for
            from branchmix.upcycling.mixture import OpenedMixture

            gates_text = text_for(
                shape_of(plan.config), seed.model, data, token_only=recipe.gates.token_only, **reading
            )
            if dry_run:
                notes.append(f"gates: fitted on {recipe.gates.data} once this is written")
        plan = replace(plan, notes=(*plan.notes, *notes))
        if dry_run and any(source.merged for source in sources):
            plan = replace(plan, lossless=None)  # their headers are the seed's
        written = verification = gates = None
        if not dry_run:
            require_space(out, plan, copies=2 if recipe.gates else 1)
            files = [file for source in sources for file in source.files]
            named = naming_sources((source.name, source.index.folder) for source in sources)
            with atomic_folder(out, force=force) as folder, FileHashes(files if hashes else []) as hashing, named:
                merged = folder / "uncalibrated" if recipe.gates else folder
                merged.mkdir(exist_ok=True)
                written = write_output(
                    plan,
                    merged,
                    seed.index.folder,
                    lambda: {"recipe": recorded, "sources": describe(sources, hashing)},
                    recipe.max_shard_bytes,
                    check=check,
                    progress=progress,
                )
                if verify:
                    from branchmix.upcycling.verify import verify_plan

                    verification = verify_plan(plan, merged, progress=progress)
                if recipe.gates:
                    mixture = OpenedMixture(str(merged), otherwise="a mixture was just written")
                    choices = {"token_only": recipe.gates.token_only, "keep_top_k": recipe.gates.keep_top_k}
                    gates = fit_gates(mixture, gates_text, **choices, progress=progress)
                    write_calibrated(mixture, gates, folder, recipe.max_shard_bytes, check=False, progress=progress)
                    shutil.rmtree(merged)
                    plan = replace(plan, config={**plan.config, **gates.config})
    return UpcycleReport(out, plan, written, verification, time.perf_counter() - start, recorded, gates)


def write_calibrated(
    mixture: OpenedMixture, fitted: Fitted, folder: Path, max_shard_bytes: int, **options: Any
) -> tuple[Path, ...]:
    """A mixture with the gates that were fitted for it; record and model card say how good they are.

    ``options`` are those of ``write_output``.
    """
    from branchmix.upcycling.gates.measure import plan_with_gates

    plan, record = plan_with_gates(mixture, fitted), fitted.added_to(mixture.provenance())
    return write_output(plan, folder, mixture.resolved.folder, lambda: record, max_shard_bytes, **options)


def write_output(
    plan: Plan,
    folder: Path,
    companions: Path,
    provenance: Callable[[], dict[str, Any]],
    max_shard_bytes: int,
    *,
    check: bool = True,
    progress: Progress | None = None,
    exported_from: Config | None = None,
) -> tuple[Path, ...]:
    """Weights first, config.json last, so that an interrupted folder cannot be loaded.

    Args:
        companions: folder whose tokenizer, chat template and generation config are copied.
        provenance: returns recipe and sources, for ``branchmix.json`` and the model card; called after the weights.
        exported_from: config of the mixture that this is an export of, for the model card.
    """
    report = None if progress is None else lambda done, total=plan.nbytes: progress("writing", done, total)
    written = write_checkpoint(plan.tensors, folder, max_shard_bytes=max_shard_bytes, check=check, progress=report)
    versions = {"branchmix": __version__, **{name: metadata.version(name) for name in ("transformers", "numpy")}}
    record = {"versions": versions, **provenance(), "lossless": None if plan.is_dense else plan.lossless}
    if plan.decomposed is not None:
        plan = replace(plan, notes=(*plan.notes, *plan.decomposed.notes))
    record["notes"] = list(plan.notes)
    files = {name: companions / name for name in (*tokenizer_files(companions), "generation_config.json")}
    files |= {} if plan.is_dense else {file.name: file for file in CODE_FILES}
    with writing(folder):
        for name, file in files.items():
            if (content := rewritten(file)) is not None:
                (folder / name).write_bytes(content)
            elif file.is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, folder / name)
    write_json(folder / "branchmix.json", record)
    write_text(folder / "README.md", model_card(plan, record, exported_from=exported_from))
    write_json(folder / "config.json", shareable(plan.config))
    return written


@contextmanager
def open_sources(recipe: Recipe, out: Path, *, dry_run: bool, force: bool) -> Iterator[tuple[list[Sourced], Fit]]:
    """Find seed and experts, and make sure that they fit together and that ``out`` may be written.

    LoRA adapters are merged into temporary folders beside ``out``, unless ``dry_run`` or their factors are all that
    they change.

    Raises:
        CompatibilityError: with the problems of all sources, those that cannot be found or read among them.
        OutputError: as ``refuse_overlap``.
    """
    given = {"seed": recipe.seed, **{expert.name: expert.model for expert in recipe.experts}}
    models: dict[str, ResolvedModel] = {}
    problems: list[str] = []
    for name, place in given.items():
        with _collected(problems, name):
            models[name] = resolve(place, recipe.folder)
    if problems:
        raise CompatibilityError(problems)
    refuse_overlap(out, [model.folder for model in models.values()], recipe.files, force=force)

    adapters = {name: model.folder for name, model in models.items() if name != "seed" and is_adapter(model.folder)}
    factors: dict[str, Adapter] = {}
    indexes: dict[str, CheckpointIndex | None] = dict.fromkeys(models)
    for name, model in models.items():
        with _collected(problems, name):
            if name not in adapters:
                indexes[name] = CheckpointIndex.open(model.folder)
            elif (seed := indexes["seed"]) is not None:
                check_adapter(model.folder, seed)
                indexes[name] = seed  # the merged model has the seed's tensors
                if recipe.is_low_rank:
                    factors[name] = Adapter.read(model.folder, DenseExpert.open("seed", seed))
    fit = check_fit(recipe, [*indexes.values()], problems)
    require_buildable(indexes.items())

    averages = not (recipe.has_attention_experts and recipe.has_ffn_experts)
    merged = {n: f for n, f in adapters.items() if n not in factors or averages or factors[n].is_more}
    with ExitStack() as temporary:
        for name, adapter in merged.items() if not dry_run else ():
            folder = beside(Path(os.path.realpath(out)), MERGED)
            temporary.callback(shutil.rmtree, folder, ignore_errors=True)
            merge_adapter(adapter, models["seed"], folder)
            indexes[name] = CheckpointIndex.open(folder)
        if merged and not dry_run:
            fit = check_fit(recipe, [*indexes.values()])
        read = {name: index for name, index in indexes.items() if index is not None}
        yield (
            [
                Sourced(name, models[name], index, adapters.get(name), factors.get(name), name in merged)
                for name, index in read.items()
            ],
            fit,
        )


@contextmanager
def _collected(problems: list[str], name: str) -> Iterator[None]:
    """Adds what is wrong with this model to the problems."""
    try:
        yield
    except BranchMixError as error:
        problems.append(f"{who(name)}: {error}")


def _notes_on_same_models(sources: Sequence[Sourced]) -> list[str]:
    """Experts whose weights are the very files of the seed or of an expert before them, by whatever path."""
    notes: list[str] = []
    first: dict[tuple[tuple[int, int], ...], str] = {}
    for source in sources:
        files = tuple((stat.st_dev, stat.st_ino) for stat in (file.stat() for file in source.files))
        same = first.setdefault(files, source.name)
        if same != source.name:
            advice = "seed_copies makes copies of the seed" if same == "seed" else "is another folder meant?"
            notes.append(f"{who(source.name)} is the same model as {who(same)} ({source.model.given}): {advice}")
    return notes


@contextmanager
def naming_sources(folders: Iterable[tuple[str, Path]]) -> Iterator[None]:
    """Problems in a source while writing (NaN, a truncated file) get its name before the file's."""
    try:
        yield
    except CheckpointError as error:
        for name, folder in folders:
            if str(error).startswith(f"{folder}{os.sep}"):
                raise CheckpointError(f"{who(name)}: {error}") from error
        raise


def describe(sources: Sequence[Sourced], hashes: FileHashes) -> list[dict[str, Any]]:
    """Sources for the provenance: what was given, revision, licence, what it grew from, and files with size and hash.

    The licence is that of the day: the folder may hold another model when the result is uploaded.
    """
    return [
        {
            "name": source.name,
            "model": source.model.given,
            "revision": source.model.revision,
            "license": licence_of_folder(source.model.folder),
            "lora_adapter": source.adapter is not None,
            "training": as_records(lineage(source.model.folder, source.model.given)),
            "files": [{"name": file.name, "bytes": file.stat().st_size, **hashes.of(file)} for file in source.files],
        }
        for source in sources
    ]


def refuse_overlap(out: Path, sources: Sequence[Path], files: Sequence[Path] = (), *, force: bool) -> None:
    """Raises OutputError for an output that is, holds or lies in a source folder, or holds a file that is read, also
    with ``--force``, and for one that cannot be replaced."""
    require_name(out)
    target = out.resolve()
    for source in sources:
        folder = source.resolve()
        if target == folder or target in folder.parents or folder in target.parents:
            raise OutputError(f"{out}: is, holds or lies in the source folder {source}: choose another output folder")
    for file in files:
        if target in file.resolve().parents:
            raise OutputError(f"{out}: holds {file}, which is read: choose another output folder, or move that file")
    require_replaceable(out, force=force)


def require_space(out: Path, plan: Plan, *, copies: int = 1) -> None:
    """Raises OutputError, with bytes needed and free, where so many copies cannot fit."""
    needed, free = copies * plan.nbytes, free_bytes(out)
    if needed > free:
        raise OutputError(
            f"{out}: the output needs {too_little_space(needed, free)}: make room, or choose a folder on another disk"
        )


def free_bytes(out: Path) -> int:
    """Free bytes on the disk that ``out`` will lie on."""
    place = out.absolute()
    return shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.exists())).free

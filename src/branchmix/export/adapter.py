"""An expert that is a low-rank change of the seed, as a PEFT LoRA adapter: its own factors, nothing recomputed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from branchmix.checkpoint.companions import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from branchmix.checkpoint.expressions import Columns, Expression, Stack, Stored, Transposed
from branchmix.checkpoint.families import Config
from branchmix.checkpoint.folder import write_json, writing
from branchmix.checkpoint.generated_tensors import Constant
from branchmix.checkpoint.index import CheckpointIndex
from branchmix.checkpoint.rotary import rope_of
from branchmix.checkpoint.writer import write_checkpoint
from branchmix.errors import BranchMixError, CompatibilityError
from branchmix.upcycling.edit_experts import EditedMixture
from branchmix.upcycling.layers import all_same
from branchmix.upcycling.lora import place_of
from branchmix.upcycling.low_rank import changed_seed, matrices_of
from branchmix.upcycling.plan import Plan, Progress
from branchmix.upcycling.sources import ROLES, Change, DenseExpert, MixtureExpert


def plan_adapter(mixture: EditedMixture, expert: MixtureExpert) -> Plan:
    """Plan the adapter of one expert; ``config`` is that of the adapter.

    Raises:
        CompatibilityError: the expert is not a change of the seed's matrices and nothing else.
    """
    given, name = mixture.resolved.given, expert.name
    if not mixture.shape.expert_ranks:
        raise CompatibilityError([f"{given}: its experts have matrices of their own: --to dense --expert {name}"])
    if mixture.config.get("folded_norms"):
        raise CompatibilityError([f"{given}: norm gains are folded into its matrices: --to dense --expert {name}"])
    notes = [f"{name}'s factors of attention and FFN, for PEFT on the seed; gates and other experts are left out"]
    base = None
    try:
        base = mixture.recorded_seed()
        seed = DenseExpert.open("seed", CheckpointIndex.open(base.folder))
    except BranchMixError as error:
        notes.append(f"the seed could not be read, so nothing was compared with it: {error}")
    else:
        if differing := list(_other_changes(mixture, expert, seed)):
            raise CompatibilityError(
                [f"{given}: {name} has another {what} than the seed: --to dense --expert {name}" for what in differing]
            )
        if not mixture.shares_trunk_with(seed):
            notes.append("the embeddings, norms or head that the experts share are not the seed's, on which it runs")
    tensors = dict(_tensors(mixture, expert))
    if not tensors:
        raise CompatibilityError([f"{given}: {name} is the seed itself, without any change: there is no adapter"])
    config = _config(mixture, tensors, None if base is None else base.given)
    parts = ((f"base_model.model.{module}.weight", part) for module, part in tensors.items())
    return Plan.of(parts, mixture.dtype, config, notes=tuple(notes))


def write_adapter(
    plan: Plan, folder: Path, *, check: bool = True, progress: Progress | None = None
) -> tuple[Path, ...]:
    """The adapter's two files in a folder."""
    report = None if progress is None else lambda done: progress("writing", done, plan.nbytes)
    (written,) = write_checkpoint(plan.tensors, folder, max_shard_bytes=1 << 62, check=check, progress=report)
    with writing(folder):
        weights = written.rename(folder / ADAPTER_WEIGHTS)
    config = {key: value for key, value in plan.config.items() if key != "model_type"}
    write_json(folder / ADAPTER_CONFIG, config)
    return (weights,)


def _other_changes(mixture: EditedMixture, expert: MixtureExpert, seed: DenseExpert) -> Iterator[str]:
    """What else than an expert's factors differs from the seed, once each."""
    if (trained := changed_seed(expert, seed, mixture.matrices, mixture.dtype)) is not None:
        yield f"seed's matrix ({trained})"
    ropes = mixture.config.get("expert_rope_parameters")
    if ropes and ropes[expert.number] != rope_of(mixture.seed_config):
        yield "set of rotary parameters"
    if mixture.shape.trunk == "experts":
        trunk = ((name, expert.trunk(name), Stored(seed.tensors[name])) for name in seed.trunk_tensors())
        yield from [name for name, ours, theirs in trunk if not all_same([ours, theirs], mixture.dtype)][:1]
    shared = not mixture.shape.has_attention_experts or mixture.config["attention"] == "kv_sharing"
    if shared and not mixture.shares_trunk_with(seed):
        yield "attention (what the mixture's experts share of it)"
    found = set()
    for layer in range(seed.dims.num_layers):
        both = (expert, seed)
        pairs = {f"{role}_proj.bias": tuple(e.attention(layer, role, "bias") for e in both) for role in ROLES}
        ours, theirs = expert.ffn(layer), seed.ffn(layer)
        pairs |= {name: (ours.get(name), theirs[name]) for name in theirs if name.endswith(".bias")}
        for role in ("q", "k"):
            own, of_seed = expert.attention_norm(layer, role), seed.attention_norm(layer, role)
            pairs |= {f"{role}_norm.{name}": (own.get(name), of_seed[name]) for name in of_seed}
        for name, (our, their) in pairs.items():
            if our is not None and their is not None and not all_same([our, their], our.dtype):
                found.add(name)
    yield from sorted(found)


def _tensors(mixture: EditedMixture, expert: MixtureExpert) -> Iterator[tuple[str, Expression]]:
    """``MODULE.lora_A`` [r, in] and ``MODULE.lora_B`` [out, r] by module, for matrices that change."""
    family, shape = mixture.family, mixture.shape
    for layer in range(mixture.dims.num_layers):
        modules: dict[str, list[tuple[Change, Sequence[tuple[int, int]] | None]]] = {}
        for matrix in matrices_of(family, shape.attention, shape.ffn):
            module, rows, _ = place_of(family, mixture.dims, matrix)
            change = expert.change(layer, matrix)
            assert change is not None, "experts of this mixture are changes of the seed"
            modules.setdefault(f"{family.layers}.{layer}.{module}", []).append((change, rows))
        for module, parts in modules.items():
            changed = [(change.A, change.B, rows) for change, rows in parts if change.A is not None]
            if not changed:
                continue
            heights = [stop for _, rows in parts for _, stop in rows or ()]
            A, B = _together(changed, max(heights, default=parts[0][0].base.shape[0]))
            yield f"{module}.lora_A", A
            yield f"{module}.lora_B", Transposed(B)


def _together(
    changed: Sequence[tuple[Expression, Any, Sequence[tuple[int, int]] | None]], height: int
) -> tuple[Expression, Expression]:
    """A and B [r, O] of a module that may hold several matrices, each with its rows of it."""
    if changed[0][2] is None:
        return changed[0][0], changed[0][1]
    if len({A.shape for A, _, _ in changed}) == 1 and all_same([A for A, _, _ in changed], changed[0][0].dtype):
        places = sorted((start, stop, B, at) for _, B, rows in changed for start, stop, at in _numbered(rows or ()))
        if sum(stop - start for start, stop, _, _ in places) == height:
            return changed[0][0], Columns(tuple((B, at, at + stop - start) for start, stop, B, at in places))
    wide = []
    for _, B, rows in changed:
        zeros, segments, top = Constant((B.num_rows, height), 0.0, B.dtype), [], 0
        for start, stop, at in _numbered(rows or ()):
            if start > top:
                segments.append((zeros, top, start))
            segments.append((B, at, at + stop - start))
            top = stop
        if top < height:
            segments.append((zeros, top, height))
        wide.append(Columns(tuple(segments)))
    return Stack(A for A, _, _ in changed), Stack(wide)


def _numbered(rows: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Spans of a module's rows, and where each begins among the rows of its own matrix."""
    at = 0
    for start, stop in rows:
        yield start, stop, at
        at += stop - start


def _config(mixture: EditedMixture, tensors: dict[str, Expression], base: str | None) -> Config:
    """adapter_config.json; factors carry their scale, so alpha is the rank."""
    ranks = {name.removesuffix(".lora_A"): part.num_rows for name, part in tensors.items() if name.endswith(".lora_A")}
    largest = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != largest}
    below = {module.split(".", module.count("."))[-1] for module in ranks}
    everywhere = all(sum(module.endswith(f".{name}") for module in ranks) == mixture.dims.num_layers for name in below)
    return {
        "model_type": mixture.family.model_type,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(below) if everywhere else sorted(ranks),
        "bias": "none",
        "fan_in_fan_out": mixture.family.transposed,
        "inference_mode": True,
    }

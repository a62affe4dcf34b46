"""Writes a mixture as a native or a dense checkpoint: planned from headers, streamed, compared, all or nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from branchmix.accounting.formulas import configured_positions
from branchmix.checkpoint.expressions import Expression, Scaled, Stored
from branchmix.checkpoint.families import nearest
from branchmix.checkpoint.folder import atomic_folder
from branchmix.checkpoint.generated_tensors import Constant
from branchmix.checkpoint.index import CheckpointIndex, float32_bytes
from branchmix.checkpoint.rotary import with_rope
from branchmix.errors import CompatibilityError, RecipeError, VerificationError
from branchmix.export.adapter import plan_adapter, write_adapter
from branchmix.export.native import NATIVES, SHARED_EXPERT_WIDTH, TARGETS, Native, native_config, problems
from branchmix.upcycling.edit_experts import EditedMixture
from branchmix.upcycling.execute import refuse_overlap, require_space, write_output
from branchmix.upcycling.layers import dense_tensors
from branchmix.upcycling.mixture import DEFAULT_SHARD_BYTES, OpenedMixture
from branchmix.upcycling.plan import ROUTER_DOMAINS, Plan, Progress
from branchmix.upcycling.sources import (
    KINDS,
    ROLES,
    DenseExpert,
    MixtureExpert,
    in_trunk,
    inside,
)
from branchmix.upcycling.verify import (
    FOLDED_TOLERANCE,
    TOLERANCE,
    compare_bytes,
    difference_of,
    refuse_strangers,
    require_memory,
    sample_tokens,
)


@dataclass(frozen=True)
class LogitCheck:
    """The export compared with the mixture, both in fp32, on the sample text; its fields are those of ``--json``."""

    tensors_byte_identical: int
    """Tensors that are source bytes only, compared byte for byte."""
    bytes_compared: int
    tokens: int
    max_difference: float
    """Greatest absolute difference of logits."""
    max_logit: float
    tolerance: float
    """Greatest difference that passes, as a share of the greatest logit."""


@dataclass(frozen=True)
class ExportReport:
    """What ``export_model`` did, or would do."""

    out: Path
    to: str
    expert: str | None
    """Whose dense model it is; None for targets that take all experts."""
    plan: Plan
    written: tuple[Path, ...] | None
    """As of ``upcycle``."""
    verification: LogitCheck | None
    seconds: float


def export_model(
    model: str | Path,
    out: str | Path,
    *,
    to: str,
    expert: str | None = None,
    verify: bool = True,
    dry_run: bool = False,
    force: bool = False,
    check: bool = True,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a mixture as a checkpoint of a class that other tools know, where that computes the same.

    Args:
        model: folder or Hub id of a mixture.
        out: folder to write.
        to: ``mixtral``, ``qwen2_moe``, ``qwen3_moe``, ``glm4_moe``, ``olmoe``, ``flex_olmo``, or ``dense``. For a
            mixture of low-rank changes also ``full`` (a mixture whose experts have matrices of their own) and ``peft``
            (a LoRA adapter).
        expert: for ``dense``, whose dense model: the one that the mixture is with all gates on that expert. For
            ``peft``, whose adapter.
        verify: compare the logits of both on text before the folder gets its name (needs both in fp32).
        dry_run, force, check, progress: as for ``upcycle``.

    Raises:
        CompatibilityError: the target cannot compute what the mixture does; with all reasons.
        VerificationError: the logits differ.
        BranchMixError: another of its kinds.

    Example:
        >>> branchmix.export_model("btx", "btx-mixtral", to="mixtral")
    """
    start = time.perf_counter()
    out = Path(out)
    mixture = EditedMixture(str(model), otherwise="there is nothing to export")
    plan = plan_export(mixture, to, expert)
    chosen = chosen_expert(mixture, expert) if to in _OF_ONE_EXPERT else None
    name = chosen.name if chosen else None
    refuse_overlap(out, [mixture.resolved.folder, *mixture.sources_at(out)], force=force)
    written = verification = None
    if not dry_run:
        require_space(out, plan)
        source = mixture.resolved
        exported = {"to": to, "expert": name, "model": source.given, "revision": source.revision}
        with atomic_folder(out, force=force) as folder:
            written = (
                write_adapter(plan, folder, check=check, progress=progress)
                if to == "peft"
                else write_output(
                    plan,
                    folder,
                    mixture.resolved.folder,
                    lambda: {**mixture.provenance(), "exported": exported},
                    DEFAULT_SHARD_BYTES,
                    check=check,
                    progress=progress,
                    exported_from=mixture.config,
                )
            )
            if verify:
                one_hot = chosen.number if chosen is not None and expert is not None else None
                native = NATIVES.get(to)
                verification = _verify(mixture, plan, folder, native, one_hot, progress) if to != "peft" else None
    return ExportReport(out, to, name, plan, written, verification, time.perf_counter() - start)


def _verify(
    mixture: OpenedMixture,
    plan: Plan,
    folder: Path,
    native: Native | None,
    one_hot: int | None,
    progress: Progress | None,
) -> LogitCheck:
    """Copies byte for byte, and the logits of both models in fp32; with ``one_hot`` the gates on that expert.

    Raises VerificationError if they differ, or there is not enough memory.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from branchmix.likelihood.loading import without_adapter
    from branchmix.models.modeling_branchmix import BranchMixForCausalLM
    from branchmix.models.routers import one_hot_gates

    ours = sum(float32_bytes(ref.nbytes, ref.dtype) for ref in mixture.index.tensors.values())
    theirs = float32_bytes(plan.nbytes, mixture.dtype)
    require_memory(ours + theirs, "comparing logits", "--no-verify leaves it out")
    compared, nbytes = compare_bytes(plan, CheckpointIndex.open(folder), progress)
    source = mixture.resolved.folder
    tokens = sample_tokens(source, mixture.dims.vocab_size, most=configured_positions(mixture.seed_config))
    logits = []
    for number, (loader, where) in enumerate(((BranchMixForCausalLM, source), (AutoModelForCausalLM, folder))):
        if progress is not None:
            progress("comparing logits", number, 2)
        model, info = loader.from_pretrained(
            where, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, **without_adapter(where)
        )
        refuse_strangers(model, info, where.name)
        gates = one_hot_gates(model, one_hot) if where == source and one_hot is not None else nullcontext()
        with torch.no_grad(), gates:
            logits.append(model.eval()(tokens).logits)
    difference, greatest = difference_of(logits[1], logits[0])
    scaled = any("scaled" in group.how for group in plan.groups) and not rounds_nothing(mixture, native)
    rounded = bool(mixture.shape.expert_ranks) and mixture.dtype != "F32"  # where changes are added to the seed's
    tolerance = FOLDED_TOLERANCE if scaled or rounded else TOLERANCE
    if not difference <= tolerance * max(greatest, 1.0):
        raise VerificationError(
            f"{mixture.resolved.given}: the logits of the export differ from the mixture's by {difference:.3g} "
            f"(greatest logit {greatest:.3g}), so nothing was written: report this, please"
        )
    return LogitCheck(compared, nbytes, tokens.shape[1], difference, greatest, tolerance)


# ---- The plan. Pure: reads configs and headers, writes nothing, imports neither torch nor transformers. ----


_OF_ONE_EXPERT = ("dense", "peft")


def plan_export(mixture: EditedMixture, to: str, expert: str | None = None) -> Plan:
    """Plan a checkpoint of another class (one of ``TARGETS``) that computes what the mixture does.

    For ``dense``, ``expert`` says whose dense model. Raises RecipeError for a target or expert that does not exist
    or fit, CompatibilityError with all reasons if the mixture has no exact form there.
    """
    if to not in TARGETS:
        raise RecipeError(f"--to {to}: not one of {', '.join(TARGETS)}{nearest(to, TARGETS)}")
    if to == "dense":
        return _plan_dense(mixture, expert)
    if to == "peft":
        chosen = chosen_expert(mixture, expert)
        if chosen is None:
            raise RecipeError(f"--to peft: {mixture.resolved.given} has no experts")
        return plan_adapter(mixture, chosen)
    if expert is not None:
        raise RecipeError(f"--expert {expert}: {to} takes all experts: it goes with --to dense")
    if to == "full":
        return mixture.plan_of_own_matrices()
    native, trunk = NATIVES[to], trunk_of(mixture)
    if reasons := problems(mixture, trunk, native):
        others = [name for name, other in NATIVES.items() if name != to and not problems(mixture, trunk, other)]
        hint = [f"--to {' or '.join(others)} computes the same"] if others else []
        raise CompatibilityError([f"{mixture.resolved.given}: {problem}" for problem in [*reasons, *hint]])
    config = native_config(mixture, trunk, native)
    tensors, notes = _native_tensors(mixture, trunk, native), tuple(_native_notes(mixture, native))
    return Plan.of(tensors, mixture.dtype, config, notes=notes)


def chosen_expert(mixture: OpenedMixture, expert: str | None) -> MixtureExpert | None:
    """The expert that a dense export is of; None for a mixture without experts, a soup.

    Raises RecipeError if there is no such expert, or none was named and there are several.
    """
    names = ", ".join(mixture.names)
    given, count = mixture.resolved.given, len(mixture.experts)
    if not (mixture.shape.has_attention_experts or mixture.shape.has_ffn_experts):
        if expert is not None:
            raise RecipeError(f"--expert {expert}: {given} is averaged throughout: leave --expert out")
        return None
    if expert is None:
        if count == 1:
            return mixture.experts[0]
        raise RecipeError(f"{given}: has {count} experts, and a dense model is one of them: --expert NAME, of {names}")
    if expert not in mixture.names:
        close = nearest(expert, mixture.names)
        raise RecipeError(f"--expert {expert}: {given} has no such expert{close}; it has {names}")
    return mixture.experts[mixture.names.index(expert)]


def trunk_of(mixture: OpenedMixture, number: int = 0) -> DenseExpert:
    """A mixture's tensors under the names of a dense checkpoint of the seed's family; experts' keep their own.

    Where the trunk has experts, it is that of expert ``number``.
    """
    of_experts = inside(mixture.family, [mixture.family.attention, mixture.family.ffn], prefix=r"model\.")
    tensors = {}
    for name, ref in mixture.index.tensors.items():
        inner, own_trunk = name.removeprefix("model."), mixture.shape.trunk == "experts"
        place = in_trunk(inner) if own_trunk and not of_experts.match(name) else None
        if not name.startswith(("document_gate.", ROUTER_DOMAINS)) and (place is None or place[1] == number):
            tensors[place[0] if place else inner] = ref
    index = replace(mixture.index, config=mixture.seed_config, tensors=tensors)
    return DenseExpert("trunk", index, mixture.family, mixture.dims)


def _shared(trunk: DenseExpert, *, attention: bool, ffn: bool) -> Iterator[tuple[str, Stored]]:
    """Embeddings, norms and head; and attention or FFN, unless they are those of experts."""
    of_experts = trunk.expert_tensors(attention, ffn)
    return ((name, Stored(ref)) for name, ref in trunk.tensors.items() if name not in of_experts)


# ---- Native ----


def _native_tensors(mixture: OpenedMixture, trunk: DenseExpert, native: Native) -> Iterator[tuple[str, Expression]]:
    """Attention and experts of each layer, then what both call the same: embeddings, norms and head."""
    for layer in range(mixture.dims.num_layers):
        block = f"model.layers.{layer}"
        for role in ROLES:
            for kind in KINDS:
                if (part := trunk.attention(layer, role, kind)) is not None:
                    yield f"{block}.self_attn.{role}_proj.{kind}", part
        for role in ROLES[:2]:
            for name, norm in trunk.attention_norm(layer, role).items():  # type: ignore[arg-type]
                yield f"{block}.self_attn.{role}_norm.{name}", norm
        yield from _experts(mixture, native, layer, f"{block}.{native.ffn}")
    yield from _shared(trunk, attention=True, ffn=True)


def _experts(mixture: OpenedMixture, native: Native, layer: int, module: str) -> Iterator[tuple[str, Expression]]:
    family = mixture.family
    names = dict(zip(("gate_proj.weight", "up_proj.weight", "down_proj.weight"), native.names, strict=True))
    own, tensors = f"model.{family.layers}.{layer}.{family.ffn}", mixture.index.tensors
    yield f"{module}.gate.weight", Stored(tensors[f"{own}.gate.weight"])
    if native.expert_bias:
        bias, count = tensors.get(f"{own}.gate.expert_bias"), len(mixture.experts)
        yield f"{module}.gate.{native.expert_bias}", Stored(bias) if bias else Constant((count,), 0.0, "F32")
    for number, expert in enumerate(mixture.experts):
        for name, part in expert.ffn(layer).items():
            scaled = name == "down_proj.weight" and mixture.scaling != 1.0 and not native.scaling_key
            yield f"{module}.experts.{number}.{names[name]}.weight", Scaled(part, mixture.scaling) if scaled else part
    if not native.shared_expert:
        return
    hidden = mixture.dims.hidden_size
    inner = _shared_width(mixture, native)
    shared = f"{module}.shared_expert" + "s" * (native.shared_expert == "plain")
    for name, shape in {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}.items():
        if not mixture.shape.shared_experts:
            yield f"{shared}.{name}.weight", Constant(shape, 0.0, mixture.dtype)
            continue
        stored = Stored(tensors[f"{own}.shared_expert.{name}.weight"])
        weight = mixture.config["shared_expert_weight"]
        yield f"{shared}.{name}.weight", Scaled(stored, weight) if name == "down_proj" else stored
    if native.shared_expert == "gated":
        yield f"{shared}_gate.weight", Constant((1, hidden), 0.0, mixture.dtype)


def _shared_width(mixture: OpenedMixture, native: Native) -> int:
    return mixture.dims.intermediate_size if native.shared_expert == "plain" else SHARED_EXPERT_WIDTH


def _native_notes(mixture: OpenedMixture, native: Native) -> Iterator[str]:
    config = mixture.config
    rounded = "" if rounds_nothing(mixture, native) else ", which rounds each of its weights once more"
    if (factor := mixture.scaling) != 1.0 and not native.scaling_key:
        yield f"routed_scaling_factor {factor:g} is multiplied into the experts' {native.names[2]}{rounded}"
    if mixture.shape.shared_experts:
        weight = config["shared_expert_weight"]
        yield f"shared_expert_weight {weight:g} is multiplied into the shared expert's {native.names[2]}{rounded}"
    elif native.shared_expert:
        yield (
            f"{native.model_type} has an expert for every token: it is written as zeros, "
            f"{_shared_width(mixture, native)} wide, and computed in vain"
        )
    normalised, soft = bool(config.get("norm_topk_prob")), config["num_experts_per_tok"] == config["num_experts"]
    always = native.gguf_normalises
    if always not in (None, normalised) and not soft:
        words = "divides the chosen gates by their sum" if always else "takes gates as they are"
        yield (
            f"llama.cpp {words} in every {native.model_type}, whatever norm_topk_prob says: do not convert this one "
            "to GGUF"
        )


def rounds_nothing(mixture: OpenedMixture, native: Native | None) -> bool:
    """Whether the factors multiplied into experts are powers of two, or the weights are fp32."""
    scaling = 1.0 if native is not None and native.scaling_key else mixture.scaling
    factors = (scaling, mixture.config["shared_expert_weight"] or 1.0)
    return mixture.dtype == "F32" or all(math.frexp(factor)[0] == 0.5 for factor in factors)


# ---- Dense ----


def _plan_dense(mixture: OpenedMixture, name: str | None) -> Plan:
    expert = chosen_expert(mixture, name)
    config = {key: value for key, value in mixture.seed_config.items() if key != "torch_dtype"}
    config["dtype"] = mixture.dtype_name
    ropes = mixture.config.get("expert_rope_parameters")
    if ropes and expert is not None:
        config = with_rope(config, ropes[expert.number])
    only_one = name is None and mixture.shape.has_ffn_experts  # whose gate is 1
    factor = mixture.scaling if only_one else 1.0
    notes: tuple[str, ...] = ()
    if expert is not None and len(mixture.experts) > 1:
        others = ", ".join(other for other in mixture.names if other != expert.name)
        notes = (f"{expert.name} alone, on what all experts share; the routers and {others} are left out",)
    return Plan.of(_dense_tensors(mixture, expert, factor), mixture.dtype, config, notes=notes)


def _dense_tensors(
    mixture: OpenedMixture, expert: MixtureExpert | None, factor: float
) -> Iterator[tuple[str, Expression]]:
    """One expert's tensors under the seed family's names, and what all share."""
    family, shape = mixture.family, mixture.shape
    if expert is not None:
        for layer in range(mixture.dims.num_layers):
            own = {"attention": shape.has_attention_experts, "ffn": shape.has_ffn_experts}
            for name, part in dense_tensors(expert, layer, **own):
                scaled = factor != 1.0 and name.startswith(f"{family.down}.")
                yield f"{family.layers}.{layer}.{name}", Scaled(part, factor) if scaled else part
    trunk = trunk_of(mixture, 0 if expert is None else expert.number)
    yield from _shared(trunk, attention=shape.has_attention_experts, ffn=shape.has_ffn_experts)

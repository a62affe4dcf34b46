"""What becomes of every tensor of a mixture in a native or a dense checkpoint, from headers alone.

Pure: reads configs and headers, writes nothing, imports neither torch nor transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from branchmix.checkpoint.expressions import Expression, Rows, Scaled, Source, Stack, Transposed
from branchmix.checkpoint.families import nearest
from branchmix.checkpoint.generated_tensors import Constant
from branchmix.checkpoint.rotary import with_rope
from branchmix.checkpoint.writer import OutputTensor
from branchmix.errors import CompatibilityError, RecipeError
from branchmix.export.native import NATIVES, SHARED_EXPERT_WIDTH, TARGETS, Native, native_config, problems
from branchmix.recipe import DTYPES
from branchmix.upcycling.layers import cast
from branchmix.upcycling.mixture import OpenedMixture
from branchmix.upcycling.plan import Plan, group_tensors
from branchmix.upcycling.sources import KINDS, ROLES, DenseExpert, Kind, MixtureExpert, Role, fused_rows, inside


def plan_export(mixture: OpenedMixture, to: str, expert: str | None = None) -> Plan:
    """Plan a checkpoint of another class (one of ``TARGETS``) that computes what the mixture does.

    For ``dense``, ``expert`` says whose dense model. Raises RecipeError for a target or expert that does not exist
    or fit, CompatibilityError with all reasons if the mixture has no exact form there.
    """
    if to not in TARGETS:
        raise RecipeError(f"--to {to}: not one of {', '.join(TARGETS)}{nearest(to, TARGETS)}")
    if to == "dense":
        return _plan_dense(mixture, expert)
    if expert is not None:
        raise RecipeError(f"--expert {expert}: {to} takes all experts: it goes with --to dense")
    native, trunk = NATIVES[to], trunk_of(mixture)
    reasons = problems(mixture, trunk, native)
    if reasons:
        others = [name for name, other in NATIVES.items() if name != to and not problems(mixture, trunk, other)]
        hint = [f"--to {' or '.join(others)} computes the same"] if others else []
        raise CompatibilityError([f"{mixture.resolved.given}: {problem}" for problem in [*reasons, *hint]])
    tensors = tuple(_native_tensors(mixture, trunk, native))
    config = native_config(mixture, trunk, native, _dtype_name(mixture))
    return _plan(mixture, tensors, config, tuple(_native_notes(mixture, native)))


def chosen_expert(mixture: OpenedMixture, expert: str | None) -> MixtureExpert | None:
    """The expert that a dense export is of; None for a mixture without experts, a soup.

    Raises RecipeError if there is no such expert, or none was named and there are several.
    """
    names = ", ".join(mixture.names)
    if not (mixture.has_attention_experts or mixture.has_ffn_experts):
        if expert is not None:
            raise RecipeError(f"--expert {expert}: {mixture.resolved.given} is averaged throughout: leave --expert out")
        return None
    if expert is None and len(mixture.experts) == 1:
        return mixture.experts[0]
    if expert is None:
        raise RecipeError(
            f"{mixture.resolved.given}: has {len(mixture.experts)} experts, and a dense model is one of them: "
            f"--expert NAME, of {names}"
        )
    if expert not in mixture.names:
        raise RecipeError(
            f"--expert {expert}: {mixture.resolved.given} has no such expert{nearest(expert, mixture.names)}; "
            f"it has {names}"
        )
    return mixture.experts[mixture.names.index(expert)]


def trunk_of(mixture: OpenedMixture) -> DenseExpert:
    """A mixture's tensors under the names of a dense checkpoint of the seed's family; experts' keep their own."""
    stored = mixture.index.tensors.items()
    tensors = {name.removeprefix("model."): ref for name, ref in stored if not name.startswith("document_gate.")}
    index = replace(mixture.index, config=mixture.seed_config, tensors=tensors)
    return DenseExpert("trunk", index, mixture.family, mixture.dims)


def _shared(mixture: OpenedMixture, trunk: DenseExpert, modules: Sequence[str]) -> Iterator[tuple[str, Source]]:
    """What is in none of these modules of a block: embeddings, norms, head, and dense attention or FFN."""
    of_experts = inside(mixture.family, modules)
    for name, ref in trunk.tensors.items():
        if not of_experts.match(name):
            yield name, Source(ref)


def _plan(mixture: OpenedMixture, tensors: tuple[OutputTensor, ...], config: dict, notes: tuple[str, ...]) -> Plan:
    groups = tuple(group_tensors(tensors, mixture.family))
    return Plan(tensors, config, notes, (), groups)


def _dtype_name(mixture: OpenedMixture) -> str:
    return next(name for name, code in DTYPES.items() if code == mixture.dtype)


# ---- Native ----


def _native_tensors(mixture: OpenedMixture, trunk: DenseExpert, native: Native) -> Iterator[OutputTensor]:
    """Attention and experts of each layer, then what both call the same: embeddings, norms and head."""
    dtype = mixture.dtype
    for layer in range(mixture.dims.num_layers):
        block = f"model.layers.{layer}"
        for role in ROLES:
            for kind in KINDS:
                part = trunk.attention(layer, role, kind)
                if part is not None:
                    yield OutputTensor(f"{block}.self_attn.{role}_proj.{kind}", cast(part, dtype))
        for role in ("q", "k"):
            for name, part in trunk.attention_norm(layer, role).items():  # type: ignore[arg-type]
                yield OutputTensor(f"{block}.self_attn.{role}_norm.{name}", cast(part, dtype))
        yield from _experts(mixture, native, layer, f"{block}.{native.ffn}")
    for name, part in _shared(mixture, trunk, (mixture.family.attention, mixture.family.ffn)):
        yield OutputTensor(name, cast(part, dtype))


def _experts(mixture: OpenedMixture, native: Native, layer: int, module: str) -> Iterator[OutputTensor]:
    family, dtype = mixture.family, mixture.dtype
    gate, up, down = native.names
    names = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
    router = mixture.index.tensors[f"model.{family.layers}.{layer}.{family.ffn}.gate.weight"]
    yield OutputTensor(f"{module}.gate.weight", cast(Source(router), dtype))
    factor = float(mixture.config.get("routed_scaling_factor", 1.0))
    for number, expert in enumerate(mixture.experts):
        for name, part in expert.ffn(layer).items():
            scaled = Scaled(part, factor) if name == "down_proj.weight" and factor != 1.0 else part
            yield OutputTensor(f"{module}.experts.{number}.{names[name]}.weight", cast(scaled, dtype))
    if native.shared_expert:
        hidden = mixture.dims.hidden_size
        wide, tall = (SHARED_EXPERT_WIDTH, hidden), (hidden, SHARED_EXPERT_WIDTH)
        for name, shape in {"gate_proj": wide, "up_proj": wide, "down_proj": tall}.items():
            yield OutputTensor(f"{module}.shared_expert.{name}.weight", Constant(shape, 0.0, dtype))
        yield OutputTensor(f"{module}.shared_expert_gate.weight", Constant((1, hidden), 0.0, dtype))


def _native_notes(mixture: OpenedMixture, native: Native) -> Iterator[str]:
    config = mixture.config
    factor = float(config.get("routed_scaling_factor", 1.0))
    if factor != 1.0:
        rounded = "" if rounds_nothing(mixture) else ", which rounds each of its weights once more"
        yield f"routed_scaling_factor {factor:g} is multiplied into the experts' {native.names[2]}{rounded}"
    if native.shared_expert:
        yield (
            f"{native.model_type} has an expert for every token: it is written as zeros, {SHARED_EXPERT_WIDTH} wide, "
            "and computed in vain"
        )
    normalised, soft = bool(config.get("norm_topk_prob")), config["num_experts_per_tok"] == config["num_experts"]
    always = GGUF_NORMALISES.get(native.model_type, normalised)
    if normalised != always and not soft:
        words = "divides the chosen gates by their sum" if always else "takes gates as they are"
        yield (
            f"llama.cpp {words} in every {native.model_type}, whatever norm_topk_prob says: do not convert this one "
            "to GGUF"
        )


GGUF_NORMALISES = {"qwen2_moe": False, "qwen3_moe": True}
"""Whether llama.cpp normalises the gates of these classes; it never asks the config (its src/models, 2026-10)."""


def rounds_nothing(mixture: OpenedMixture) -> bool:
    """Whether ``routed_scaling_factor`` is a power of two, or the weights are fp32."""
    factor = float(mixture.config.get("routed_scaling_factor", 1.0))
    return mixture.dtype == "F32" or math.frexp(factor)[0] == 0.5


# ---- Dense ----


def _plan_dense(mixture: OpenedMixture, name: str | None) -> Plan:
    expert = chosen_expert(mixture, name)
    config = {key: value for key, value in mixture.seed_config.items() if key != "torch_dtype"}
    config["dtype"] = _dtype_name(mixture)
    ropes = mixture.config.get("expert_rope_parameters")
    if ropes and expert is not None:
        config = with_rope(config, ropes[expert.number])
    factor = 1.0
    if name is None and mixture.has_ffn_experts:  # the only one: its gate is 1
        factor = float(mixture.config.get("routed_scaling_factor", 1.0))
    tensors = tuple(_dense_tensors(mixture, expert, factor))
    notes: tuple[str, ...] = ()
    if expert is not None and len(mixture.experts) > 1:
        others = ", ".join(other for other in mixture.names if other != expert.name)
        notes = (f"{expert.name} alone, on what all experts share; the routers and {others} are left out",)
    return _plan(mixture, tensors, config, notes)


def _dense_tensors(mixture: OpenedMixture, expert: MixtureExpert | None, factor: float) -> Iterator[OutputTensor]:
    """One expert's tensors under the seed family's names, and what all share."""
    dtype, family = mixture.dtype, mixture.family
    of_expert = [family.attention] * mixture.has_attention_experts + [family.ffn] * mixture.has_ffn_experts
    for layer in range(mixture.dims.num_layers if expert is not None else 0):
        assert expert is not None
        if mixture.has_attention_experts:
            for name, part in _attention(mixture, expert, layer):
                yield OutputTensor(f"{family.layers}.{layer}.{family.attention}.{name}", cast(part, dtype))
        if mixture.has_ffn_experts:
            for name, part in _ffn(mixture, expert, layer, factor):
                yield OutputTensor(f"{family.layers}.{layer}.{name}", cast(part, dtype))
    for name, part in _shared(mixture, trunk_of(mixture), of_expert if expert is not None else []):
        yield OutputTensor(name, cast(part, dtype) if part.dtype in DTYPES.values() else part)


def _attention(mixture: OpenedMixture, expert: MixtureExpert, layer: int) -> Iterator[tuple[str, Expression]]:
    family = mixture.family
    names = {"q": family.query, "k": family.key, "v": family.value, "o": family.output}
    for kind in KINDS:
        parts = {role: expert.attention(layer, role, kind) for role in ROLES}
        if family.fused_qkv is not None:
            if parts["q"] is not None:
                fused = Stack(tuple(_fused_pieces(mixture, parts)))
                yield f"{family.fused_qkv}.{kind}", _stored(mixture, fused, kind)
            parts = {"o": parts["o"]}
        for role, part in parts.items():
            if part is not None:
                yield f"{names[role]}.{kind}", _stored(mixture, part, kind)
    for role, norm in (("q", family.query_norm), ("k", family.key_norm)):
        for name, part in expert.attention_norm(layer, role).items():  # type: ignore[arg-type]
            yield f"{norm}.{name}", part


def _fused_pieces(mixture: OpenedMixture, parts: dict[Role, Expression | None]) -> Iterator[Expression]:
    """q, k and v as the rows of the family's fused matrix, the inverse of how they were taken out of it."""
    spans: list[tuple[int, int, Role, int]] = []
    for role in ROLES[:3]:
        taken = 0
        for low, high in fused_rows(mixture.family, mixture.dims, role):
            spans.append((low, high, role, taken))
            taken += high - low
    for low, high, role, start in sorted(spans):
        part = parts[role]
        assert part is not None, "q, k and v have a bias, or none has"
        yield Rows(part, ((start, start + high - low),))


def _ffn(mixture: OpenedMixture, expert: MixtureExpert, layer: int, factor: float) -> Iterator[tuple[str, Expression]]:
    family = mixture.family
    parts = expert.ffn(layer)
    for kind in KINDS:
        matrices = {name.partition(".")[0]: part for name, part in parts.items() if name.endswith(f".{kind}")}
        if factor != 1.0 and "down_proj" in matrices:
            matrices["down_proj"] = Scaled(matrices["down_proj"], factor)
        if family.fused_gate_up is not None and "gate_proj" in matrices:
            fused = Stack((matrices.pop("gate_proj"), matrices.pop("up_proj")))
            yield f"{family.fused_gate_up}.{kind}", _stored(mixture, fused, kind)
        names = {"gate_proj": family.gate, "up_proj": family.up, "in_proj": family.up, "down_proj": family.down}
        for name, part in matrices.items():
            yield f"{names[name]}.{kind}", _stored(mixture, part, kind)


def _stored(mixture: OpenedMixture, part: Expression, kind: Kind) -> Expression:
    return Transposed(part) if mixture.family.transposed and kind == "weight" else part

"""The tensors of one layer of a mixture, from its experts' sources. Pure: expressions in, named expressions out.

Order of the wide heads: (expert, head) for Expert KV, (kv head, expert, group) for Shared KV (see ``HeadOrder`` in
the model's code). Everything is a verbatim copy but averages, o_proj's columns, casts and new routers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from branchmix.checkpoint.expressions import (
    Average,
    Cast,
    Columns,
    Expression,
    Rows,
    Stack,
    Stored,
    Transposed,
    same_values,
)
from branchmix.checkpoint.families import Family
from branchmix.checkpoint.numbers import FLOAT_DTYPES
from branchmix.upcycling.sources import KINDS, MATRICES, ROLES, ExpertSource, Kind, Role, ffn_name, qkv_order


def attention_tensors(
    experts: Sequence[ExpertSource],
    layer: int,
    *,
    dtype: str,
    shared_kv: Sequence[tuple[ExpertSource, float]],
) -> Iterator[tuple[str, Expression]]:
    """Tensors of a layer's ``self_attn`` except the router, by name below it.

    With ``shared_kv`` all experts have one k and v: the mean of those of these models, which need not be experts, by
    their weights.
    """
    first, kv_sharing = experts[0], bool(shared_kv)
    kv_models, kv_weights = [model for model, _ in shared_kv], [weight for _, weight in shared_kv]
    for role in ROLES[:3]:
        for kind in KINDS:
            shared = kv_sharing and role != "q"
            if not shared and first.change(layer, role) is not None:
                yield from _as_changes(experts, layer, role, kind, f"heads.{role}_proj", dtype)
                continue
            given = _all(model.attention(layer, role, kind) for model in (kv_models if shared else experts))
            if not given:
                continue
            if shared:
                wide = mean(given, kv_weights, dtype)
            elif kv_sharing:
                wide = Stack(tuple(Rows(cast(part, dtype), (span,)) for span in _groups(first) for part in given))
            else:
                wide = Stack(tuple(cast(part, dtype) for part in given))
            yield f"heads.{role}_proj.{kind}", wide

    if first.change(layer, "o") is not None:
        yield from _as_changes(experts, layer, "o", "weight", "o_proj", dtype)
    else:
        given = [cast(part, dtype) for part in _all(expert.attention(layer, "o", "weight") for expert in experts)]
        spans = _groups(first) if kv_sharing else [(0, given[0].shape[1])]
        yield "o_proj.weight", Columns(tuple((part, low, high) for low, high in spans for part in given))
    biases = _all(expert.attention(layer, "o", "bias") for expert in experts)
    if biases:
        yield "o_bias", Stack(tuple(cast(_as_row(bias), dtype) for bias in biases))

    for number, expert in enumerate(experts):
        for name, part in expert.attention_norm(layer, "q").items():
            yield f"heads.{expert.family.query_norm}.{number}.{name}", part
        if not kv_sharing:
            for name, part in expert.attention_norm(layer, "k").items():
                yield f"heads.{expert.family.key_norm}.{number}.{name}", part
    if kv_sharing:  # one K has one norm
        norms = [model.attention_norm(layer, "k") for model in kv_models]
        for name in norms[0]:
            yield f"heads.{first.family.key_norm}.{name}", mean([norm[name] for norm in norms], kv_weights, dtype)


def ffn_tensors(experts: Sequence[ExpertSource], layer: int, *, dtype: str) -> Iterator[tuple[str, Expression]]:
    """Tensors of a layer's ``mlp.experts``, by name below it."""
    if experts[0].change(layer, "down") is None:
        for number, expert in enumerate(experts):
            for name, part in expert.ffn(layer).items():
                yield f"{number}.{name}", part
        return
    for matrix in MATRICES[4:]:
        if f"{ffn_name(experts[0].family, matrix)}.weight" in experts[0].ffn(layer):
            for kind in KINDS:
                yield from _as_changes(experts, layer, matrix, kind, matrix, dtype)


def _as_changes(
    experts: Sequence[ExpertSource], layer: int, matrix: str, kind: Kind, module: str, dtype: str
) -> Iterator[tuple[str, Expression]]:
    """A matrix as the seed's and the factors of the experts' changes; or the experts' biases one after the other."""
    if kind == "bias":
        is_role, name = matrix in ROLES, f"{ffn_name(experts[0].family, matrix)}.bias"
        biases = _all(e.attention(layer, matrix, "bias") if is_role else e.ffn(layer).get(name) for e in experts)  # type: ignore[arg-type]
        if biases:
            yield f"{module}.bias", Stack(tuple(cast(bias, dtype) for bias in biases))
        return
    changes = [expert.change(layer, matrix) for expert in experts]
    yield f"{module}.weight", changes[0].base  # type: ignore[union-attr]
    for name in ("A", "B"):
        factors = [factor for change in changes if (factor := getattr(change, name)) is not None]
        if factors:
            yield f"{module}.low_rank_{name}", Stack(tuple(cast(factor, dtype) for factor in factors))


def dense_tensors(expert: ExpertSource, layer: int, *, attention: bool, ffn: bool) -> Iterator[tuple[str, Expression]]:
    """An expert's attention and FFN as a dense checkpoint of its family has them, by name below the block."""
    family = expert.family
    roles = {"q": family.query, "k": family.key, "v": family.value, "o": family.output}
    names = {"gate_proj": family.gate, "up_proj": family.up, "in_proj": family.up, "down_proj": family.down}
    for kind in KINDS if attention else ():
        parts = {role: part for role in ROLES if (part := expert.attention(layer, role, kind)) is not None}
        if family.fused_qkv is not None and "q" in parts:
            yield f"{family.attention}.{family.fused_qkv}.{kind}", _stored(family, _fused(expert, parts), kind)
        for role, part in parts.items():
            if family.fused_qkv is None or role == "o":
                yield f"{family.attention}.{roles[role]}.{kind}", _stored(family, part, kind)
    norms: tuple[tuple[Literal["q", "k"], str | None], ...] = (("q", family.query_norm), ("k", family.key_norm))
    for role, norm in norms if attention else ():
        for name, part in expert.attention_norm(layer, role).items():
            yield f"{family.attention}.{norm}.{name}", part
    tensors = expert.ffn(layer) if ffn else {}
    for kind in KINDS:
        matrices = {name.partition(".")[0]: part for name, part in tensors.items() if name.endswith(f".{kind}")}
        if family.fused_gate_up is not None and "gate_proj" in matrices:
            fused = Stack((matrices.pop("gate_proj"), matrices.pop("up_proj")))
            yield f"{family.fused_gate_up}.{kind}", _stored(family, fused, kind)
        for name, part in matrices.items():
            yield f"{names[name]}.{kind}", _stored(family, part, kind)


def _fused(expert: ExpertSource, parts: Mapping[Role, Expression]) -> Expression:
    """q, k and v as the rows of the family's fused matrix, the inverse of how they were taken out of it."""
    repeats, order = qkv_order(expert.family, expert.dims)
    heights = {role: part.num_rows // repeats for role, part in parts.items()}
    return Stack(
        Rows(parts[role], [(block * heights[role], (block + 1) * heights[role])])  # type: ignore[index]
        for block in range(repeats)
        for role in order
    )


def _stored(family: Family, part: Expression, kind: Kind) -> Expression:
    return Transposed(part) if family.transposed and kind == "weight" else part


def mean(parts: Sequence[Expression], weights: Sequence[float], dtype: str) -> Expression:
    """Weighted mean of those parts whose weight is not zero, rounded to ``dtype`` once; one part alone is as it is."""
    used = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight > 0]
    if len(used) == 1:
        return used[0][0]
    uniform = len({weight for _, weight in used}) == 1
    return Average(tuple(part for part, _ in used), None if uniform else tuple(weight for _, weight in used), dtype)


def all_same(parts: Sequence[Expression], dtype: str) -> bool:
    """Whether parts have the same values in ``dtype``."""
    first, *others = (cast(part, dtype) for part in parts)
    return all(same_values(first, other) for other in others)


def same_keys_and_values(models: Sequence[ExpertSource], layer: int, dtype: str) -> bool:
    """Whether models compute the same keys and values in a layer, which is when sharing them changes nothing."""
    wanted = [_all(model.attention(layer, role, kind) for model in models) for role in ROLES[1:3] for kind in KINDS]
    norms = [model.attention_norm(layer, "k") for model in models]
    wanted += [[norm[name] for norm in norms] for name in norms[0]]
    return all(all_same(parts, dtype) for parts in wanted if parts)


def cast(part: Expression, dtype: str) -> Expression:
    """``part`` in ``dtype``; the same expression where it is that already, or holds no floats."""
    return part if part.dtype == dtype or part.dtype not in FLOAT_DTYPES else Cast(part, dtype)


def _all(parts: Iterable[Expression | None]) -> list[Expression]:
    """Every model's part, or none where the family has no such tensor."""
    found = list(parts)
    given = [part for part in found if part is not None]
    assert len(given) in (0, len(found)), "the compatibility check lets no model without this tensor through"
    return given


def _groups(expert: ExpertSource) -> list[tuple[int, int]]:
    """Rows of q (columns of o) that belong to each K/V head."""
    dims = expert.dims
    width = dims.num_heads // dims.num_kv_heads * dims.head_dim
    return [(kv * width, (kv + 1) * width) for kv in range(dims.num_kv_heads)]


def _as_row(bias: Expression) -> Expression:
    """A 1-D source as [1, D]."""
    assert isinstance(bias, Stored), "output biases are whole tensors"
    return Stored(replace(bias.ref, shape=(1, *bias.ref.shape)))

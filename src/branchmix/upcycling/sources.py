"""Where an expert's tensors come from: a dense checkpoint, or a mixture that the expert already belongs to.

Both answer the same questions with lazily evaluated expressions in one canonical form (rows of separate q, k and v in
head order, 2-D FFN matrices), so that building, growing and shrinking a mixture are one piece of code. No tensor is
read here. H, K, C: query heads, key/value heads and head dimension of one expert; G = H / K.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from branchmix.checkpoint.expressions import Adapted, Columns, Expression, Gained, Rows, Stored, Transposed
from branchmix.checkpoint.families import Dimensions, Family, dimensions, family_of, is_head
from branchmix.checkpoint.index import CheckpointIndex, TensorRef
from branchmix.checkpoint.numbers import FLOAT_DTYPES
from branchmix.checkpoint.rotary import rope_of
from branchmix.checkpoint.tying import as_stored
from branchmix.errors import CheckpointError

Role = Literal["q", "k", "v", "o"]
Kind = Literal["weight", "bias"]
ROLES: tuple[Role, ...] = ("q", "k", "v", "o")
KINDS: tuple[Kind, ...] = ("weight", "bias")

# Buffers that old checkpoints store and today's classes compute.
_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|masked_bias|attn\.bias|attention\.bias|embed_positions)$")

SAME_SEED = "experts must be fine-tuned from the same seed"
"""Why models that differ are refused."""


def ffn_name(family: Family, matrix: str) -> str:
    """The on-disk name of an expert's FFN matrix, such as ``up_proj`` for ``up``."""
    return "in_proj" if matrix == "up" and family.gate is None else f"{matrix}_proj"


FFN_NAMES = {True: ("gate_proj", "up_proj", "down_proj"), False: ("in_proj", "down_proj")}
"""On-disk names of an expert's matrices, for gated and for plain FFNs."""


def who(name: str) -> str:
    """What messages call the seed, or an expert of this name."""
    return "seed" if name == "seed" else f"expert {name!r}"


MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
"""An expert's matrices in a layer, as ``expert_ranks`` calls them; plain FFNs have no gate."""


class Change(NamedTuple):
    """An expert's matrix [O, I] as a change of the seed's, ``base + B^T A``."""

    base: Expression
    A: Expression | None = None
    """[r, I]; None if there is no change."""
    B: Expression | None = None
    """[r, O]."""

    @property
    def rank(self) -> int:
        return 0 if self.A is None else self.A.num_rows

    @property
    def whole(self) -> Expression:
        """The expert's matrix."""
        return self.base if self.A is None or self.B is None else Adapted(self.base, self.A, self.B)


class ExpertSource(ABC):
    """One expert's share of every layer."""

    name: str
    family: Family
    dims: Dimensions

    def matrix(self, layer: int, matrix: str) -> Expression:
        """The weight of one of ``MATRICES``, [O, I]."""
        if matrix not in ROLES:
            return self.ffn(layer)[f"{ffn_name(self.family, matrix)}.weight"]
        part = self.attention(layer, matrix, "weight")
        assert part is not None, "every attention has its four matrices"
        return part

    def change(self, layer: int, matrix: str) -> Change | None:
        """One of ``MATRICES`` as a change of the seed's; None for an expert with matrices of its own."""
        return None

    @abstractmethod
    def attention(self, layer: int, role: Role, kind: Kind) -> Expression | None:
        """Rows of q [H*C, D], k or v [K*C, D] in head order, or o [D, H*C]; None where the family has no such bias.
        Biases are 1-D."""

    @abstractmethod
    def attention_norm(self, layer: int, role: Literal["q", "k"]) -> dict[str, Expression]:
        """Tensors of the query or key norm, by their names below the norm."""

    @abstractmethod
    def ffn(self, layer: int) -> dict[str, Expression]:
        """FFN matrices and biases by on-disk name, such as ``gate_proj.weight`` [I, D]."""

    @abstractmethod
    def trunk(self, name: str) -> Expression:
        """A tensor outside attention and FFNs, where the trunk has experts; by its name in a dense model."""


@dataclass(frozen=True)
class DenseExpert(ExpertSource):
    """An expert that is a dense checkpoint."""

    name: str
    index: CheckpointIndex
    family: Family
    dims: Dimensions
    fold_norms: bool = False
    own_head: bool = False
    """Its config ties the embeddings, but its weights don't: see ``checkpoint.tying``."""

    @classmethod
    def open(cls, name: str, index: CheckpointIndex) -> DenseExpert:
        """A dense checkpoint as an expert; raises CheckpointError, which names it, for other models."""
        try:
            family = family_of(index.config)
            rope_of(index.config)
            stored = as_stored(index)
            return cls(name, stored, family, dimensions(stored.config), own_head=stored is not index)
        except CheckpointError as error:
            raise CheckpointError(f"{who(name)}: {error}") from None

    def folding(self, norms: Sequence[str]) -> DenseExpert:
        """This model with the gains of these norms folded into its projections; other norms are hidden from it."""
        kept: dict[str, Any] = {
            norm: path if (path := getattr(self.family, norm)) in norms else None
            for norm in ("attention_input_norm", "ffn_input_norm")
        }
        return replace(self, family=replace(self.family, **kept), fold_norms=True) if norms else self

    @cached_property
    def tensors(self) -> dict[str, TensorRef]:
        """Tensors under the names of the family's causal LM: base-model checkpoints get their prefix, buffers go.

        Of tied embeddings the output layer's copy goes."""
        names = self.index.tensors
        prefix = self.family.layers.split(".")[0] + "."
        if not any(name.startswith(self.family.layers + ".") for name in names):
            names = {name if is_head(name) else prefix + name: ref for name, ref in names.items()}
        kept = {name: ref for name, ref in names.items() if not _BUFFERS.search(name)}
        if self.dims.tied_embeddings:  # one matrix, under whichever of its names it is stored; a bias is another tensor
            embeddings = f"{self.family.embeddings}.weight"
            twin = next((name for name in kept if is_head(name) and name.endswith(".weight")), None)
            if twin is not None:
                head = kept.pop(twin)
                kept.setdefault(embeddings, head)
        return kept

    def attention(self, layer: int, role: Role, kind: Kind) -> Expression | None:
        family = self.family
        module = f"{self._block(layer)}.{family.attention}"
        if role == "o":
            return self._matrix(f"{module}.{family.output}", kind)
        name = family.fused_qkv or {"q": family.query, "k": family.key, "v": family.value}[role]
        part = self._matrix(f"{module}.{name}", kind)
        if part is not None and family.fused_qkv:
            part = Rows(part, fused_rows(family, self.dims, role))
        return self._folded(part, layer, family.attention_input_norm, kind)

    def attention_norm(self, layer: int, role: Literal["q", "k"]) -> dict[str, Expression]:
        name = self.family.query_norm if role == "q" else self.family.key_norm
        if name is None:
            return {}
        return below(f"{self._block(layer)}.{self.family.attention}.{name}.", self.tensors)

    def ffn(self, layer: int) -> dict[str, Expression]:
        family, block = self.family, self._block(layer)
        tensors: dict[str, Expression] = {}
        paths = {"gate_proj": family.gate, "up_proj": family.up} if family.gate else {"in_proj": family.up}
        for kind in KINDS:
            firsts = {name: self._matrix(f"{block}.{path}", kind) for name, path in paths.items()}
            if family.fused_gate_up and (fused := self._matrix(f"{block}.{family.fused_gate_up}", kind)) is not None:
                inner = fused.shape[0] // 2
                firsts = {"gate_proj": Rows(fused, ((0, inner),)), "up_proj": Rows(fused, ((inner, 2 * inner),))}
            parts = {n: self._folded(first, layer, family.ffn_input_norm, kind) for n, first in firsts.items()}
            parts["down_proj"] = self._matrix(f"{block}.{family.down}", kind)
            tensors |= {f"{name}.{kind}": part for name, part in parts.items() if part is not None}
        return tensors

    def trunk(self, name: str) -> Expression:
        return Stored(self.tensors[name])

    def expert_tensors(self, attention: bool, ffn: bool) -> set[str]:
        """Names of this checkpoint's tensors that belong to experts, in every layer."""
        family = self.family
        pattern = inside(family, [family.attention] * attention + [family.ffn, family.up, family.down] * ffn)
        return {name for name in self.tensors if pattern.match(name)}

    def trunk_tensors(self, folded: Sequence[str] = ()) -> set[str]:
        """Names of the tensors that every expert keeps where the trunk has experts: those outside attention and FFNs.

        Args:
            folded: norms of a block that no expert keeps, since their gains are folded.
        """
        family = self.family
        shared = inside(family, folded)
        activation = re.compile(rf"{re.escape(family.layers)}\.\d+\.{re.escape(family.activation)}\.")
        owned = self.expert_tensors(attention=True, ffn=True)
        floats = (name for name, ref in self.tensors.items() if ref.dtype in FLOAT_DTYPES)
        return {n for n in floats if not (n in owned or shared.match(n) or activation.match(n))}

    @property
    def projections(self) -> list[str]:
        """The modules of a block that hold the matrices of attention and FFN."""
        family = self.family
        qkv = (family.fused_qkv,) if family.fused_qkv else (family.query, family.key, family.value)
        first = (family.fused_gate_up,) if family.fused_gate_up else (family.gate, family.up)
        paths = [*(f"{family.attention}.{name}" for name in (*qkv, family.output)), *first, family.down]
        return [path for path in paths if path]

    def _block(self, layer: int) -> str:
        return f"{self.family.layers}.{layer}"

    def _matrix(self, module: str, kind: Kind) -> Expression | None:
        ref = self.tensors.get(f"{module}.{kind}")
        if ref is None:
            return None
        return Transposed(Stored(ref)) if self.family.transposed and kind == "weight" else Stored(ref)

    def _folded(self, part: Expression | None, layer: int, norm: str | None, kind: Kind) -> Expression | None:
        """A matrix with the gain of the norm before it, where gains are folded."""
        if part is None or norm is None or kind == "bias" or not self.fold_norms:
            return part
        gain = Stored(self.tensors[f"{self._block(layer)}.{norm}.weight"])
        return Gained(part, gain, self.family.gain_offset)


@dataclass(frozen=True)
class MixtureExpert(ExpertSource):
    """An expert that a mixture already has."""

    name: str
    index: CheckpointIndex
    family: Family
    dims: Dimensions
    number: int
    """Its row of the routers."""

    @property
    def kv_sharing(self) -> bool:
        return bool(self.index.config["attention"] == "kv_sharing")

    def attention(self, layer: int, role: Role, kind: Kind) -> Expression | None:
        attention = f"model.{self.family.layers}.{layer}.{self.family.attention}"
        if role == "o" and kind == "bias":
            ref = self.index.tensors.get(f"{attention}.o_bias")
            return None if ref is None else _row(ref, self.number)
        module = f"{attention}.o_proj" if role == "o" else f"{attention}.heads.{role}_proj"
        ref = self.index.tensors.get(f"{module}.{kind}")
        if ref is None:
            return None
        if (ranks := self._ranks(layer, role)) is not None:
            return self._bias(ref) if kind == "bias" else self._change(module, ranks).whole
        spans = self._spans(role)
        if role == "o":
            return Columns(tuple((Stored(ref), low, high) for low, high in spans))
        return Rows(Stored(ref), spans)

    def attention_norm(self, layer: int, role: Literal["q", "k"]) -> dict[str, Expression]:
        name = self.family.query_norm if role == "q" else self.family.key_norm
        prefix = f"model.{self.family.layers}.{layer}.{self.family.attention}.heads.{name}."
        if not (role == "k" and self.kv_sharing):
            prefix += f"{self.number}."
        return below(prefix, self.index.tensors)

    def ffn(self, layer: int) -> dict[str, Expression]:
        experts = f"model.{self.family.layers}.{layer}.{self.family.ffn}.experts"
        tensors = below(f"{experts}.{self.number}.", self.index.tensors)
        for matrix in MATRICES[4:]:
            if (ranks := self._ranks(layer, matrix)) is not None:
                name = ffn_name(self.family, matrix)
                tensors[f"{name}.weight"] = self._change(f"{experts}.{matrix}", ranks).whole
                if (ref := self.index.tensors.get(f"{experts}.{matrix}.bias")) is not None:
                    tensors[f"{name}.bias"] = self._bias(ref)
        return tensors

    def trunk(self, name: str) -> Expression:
        return Stored(self.index.tensors[f"model.{of_trunk(name, self.number)}"])

    def change(self, layer: int, matrix: str) -> Change | None:
        block = f"model.{self.family.layers}.{layer}"
        if (ranks := self._ranks(layer, matrix)) is None:
            return None
        if matrix not in ROLES:
            return self._change(f"{block}.{self.family.ffn}.experts.{matrix}", ranks)
        heads = "o_proj" if matrix == "o" else f"heads.{matrix}_proj"
        return self._change(f"{block}.{self.family.attention}.{heads}", ranks)

    def _ranks(self, layer: int, matrix: str) -> list[int] | None:
        """The ranks of all experts' changes of a matrix; None where the matrices are the experts' own, or shared."""
        of_layers = self.index.config.get("expert_ranks")
        return None if of_layers is None else of_layers[layer if len(of_layers) > 1 else 0].get(matrix)

    def _change(self, module: str, ranks: list[int]) -> Change:
        base, start = Stored(self.index.tensors[f"{module}.weight"]), sum(ranks[: self.number])
        if not (rank := ranks[self.number]):
            return Change(base)
        factors = (Stored(self.index.tensors[f"{module}.low_rank_{name}"]) for name in "AB")
        return Change(base, *(Rows(factor, ((start, start + rank),)) for factor in factors))

    def _bias(self, ref: TensorRef) -> Expression:
        """This expert's part of the biases of all."""
        size = ref.shape[0] // int(self.index.config["num_experts"])
        return Rows(Stored(ref), ((self.number * size, (self.number + 1) * size),))

    def _spans(self, role: Role) -> tuple[tuple[int, int], ...]:
        """This expert's rows of wide q, k or v, or its columns of wide o."""
        num_heads, num_kv_heads, size = self.dims.num_heads, self.dims.num_kv_heads, self.dims.head_dim
        if role in ("k", "v") or not self.kv_sharing:
            width = (num_kv_heads if role in ("k", "v") else num_heads) * size
            start = 0 if self.kv_sharing else self.number * width
            return ((start, start + width),)
        group = num_heads // num_kv_heads * size
        starts = [(kv * self.index.config["num_experts"] + self.number) * group for kv in range(num_kv_heads)]
        return tuple((start, start + group) for start in starts)


def of_trunk(name: str, number: int) -> str:
    """A dense model's name of a tensor of the trunk, as a mixture has it for each expert."""
    module, _, kind = name.rpartition(".")
    return f"{module}.{number}.{kind}"


def in_trunk(name: str) -> tuple[str, int] | None:
    """The inverse of ``of_trunk`` for a name outside attention and FFNs; None if all experts share the tensor."""
    parts = name.rsplit(".", 2)
    return (f"{parts[0]}.{parts[2]}", int(parts[1])) if len(parts) == 3 and parts[1].isdecimal() else None


def qkv_order(family: Family, dims: Dimensions) -> tuple[int, str]:
    """How often, and in which order, rows of q, k and v alternate in a family's fused projection."""
    return {
        "blocks": (1, "qkv"),
        "heads": (dims.num_heads, "qkv"),
        "groups": (dims.num_kv_heads, "qkv"),
        "shards": (4, "qvk"),
    }[family.qkv_layout]


def fused_rows(family: Family, dims: Dimensions, role: Role) -> tuple[tuple[int, int], ...]:
    """Spans of q, k or v among the rows of a family's fused projection, in head order."""
    repeats, order = qkv_order(family, dims)
    heads = {"q": dims.num_heads, "k": dims.num_kv_heads, "v": dims.num_kv_heads}
    widths = [heads[other] // repeats * dims.head_dim for other in order]
    start, width = sum(widths[: order.index(role)]), widths[order.index(role)]
    starts = [start + number * sum(widths) for number in range(repeats)]
    return tuple((first, first + width) for first in starts)


def below(prefix: str, tensors: dict[str, TensorRef]) -> dict[str, Expression]:
    """The stored tensors whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): Stored(ref) for name, ref in tensors.items() if name.startswith(prefix)}


def inside(family: Family, modules: Sequence[str], *, prefix: str = "") -> re.Pattern[str]:
    """Matches names of tensors in these modules of a block, except those of an activation that experts share."""
    names = "|".join(map(re.escape, modules)) or r"\0"
    shared = rf"(?!{re.escape(family.activation)}\.)" if family.activation_parameters else ""
    return re.compile(rf"{prefix}{re.escape(family.layers)}\.\d+\.{shared}({names})\.")


def _row(ref: TensorRef, number: int) -> Stored:
    """Row ``number`` of a stored [N, D] tensor, as 1-D."""
    nbytes = ref.nbytes // ref.shape[0]
    return Stored(replace(ref, shape=ref.shape[1:], offset=ref.offset + number * nbytes, nbytes=nbytes))

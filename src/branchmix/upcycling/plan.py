"""What becomes of every tensor: the plan that ``--dry-run`` prints and ``execute`` carries out.

Reads configs and headers, and of the trunk as many weights as show whether the experts share it. Writes nothing,
imports neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from branchmix import __version__
from branchmix.checkpoint.companions import AUTO_MAP
from branchmix.checkpoint.expressions import Expression, Rows, Scaled, Source, Stack
from branchmix.checkpoint.families import (
    Config,
    Dimensions,
    Family,
    dimensions,
    family_of,
    layout_of,
    squares_activation,
)
from branchmix.checkpoint.generated_tensors import Constant, Normal, PartlyRedrawn
from branchmix.checkpoint.index import CheckpointIndex
from branchmix.checkpoint.numbers import FLOAT_DTYPES
from branchmix.checkpoint.rotary import rope_of
from branchmix.checkpoint.tying import as_stored
from branchmix.checkpoint.writer import OutputTensor
from branchmix.errors import BranchMixError, CheckpointError, CompatibilityError
from branchmix.recipe import DTYPES, Recipe
from branchmix.upcycling.compatibility import Findings, check, foldable_norms
from branchmix.upcycling.layers import all_same, attention_tensors, cast, ffn_tensors, mean, same_keys_and_values
from branchmix.upcycling.sources import DenseExpert, ExpertSource, of_trunk, who


@dataclass(frozen=True)
class Plan:
    """Everything that will be written."""

    tensors: tuple[OutputTensor, ...]
    config: Config
    """Content of the output's config.json."""
    notes: tuple[str, ...]
    """What is done about harmless differences, and warnings."""
    sources: tuple[ExpertSource, ...]
    """Experts in the order of the routers' rows; of a soup, the models averaged."""
    groups: tuple[Group, ...] = field(default=())
    lossless: bool | None = False
    """Everything that is not an expert's is the same in all experts, so that the mixture with its gates forced to one
    expert computes what that dense model does. None: not known before adapters are merged."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.expression.nbytes for tensor in self.tensors)

    @property
    def is_dense(self) -> bool:
        """Nothing is an expert: a soup, written as an ordinary checkpoint of the seed's family."""
        return self.config["model_type"] != "branchmix"


@dataclass(frozen=True)
class Group:
    """One line of the plan: tensors of one kind and what becomes of them."""

    name: str
    count: int
    nbytes: int
    shape: tuple[int, ...]
    how: str

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "name": self.name,
            "tensors": self.count,
            "shape": list(self.shape),
            "bytes": self.nbytes,
            "how": self.how,
        }


def open_expert(name: str, index: CheckpointIndex) -> DenseExpert:
    """A dense checkpoint as an expert; raises CheckpointError, which names it, for other models."""
    try:
        family = family_of(index.config)
        rope_of(index.config)
        stored = as_stored(index)
        return DenseExpert(name, stored, family, dimensions(stored.config), own_head=stored is not index)
    except CheckpointError as error:
        raise CheckpointError(f"{who(name)}: {error}") from None


def with_folded_norms(model: DenseExpert, folded: Sequence[str]) -> DenseExpert:
    """The model with the gains of these norms folded into its projections; other norms are hidden from it."""
    if not folded:
        return model
    attention, ffn = model.family.attention_input_norm, model.family.ffn_input_norm
    family = replace(
        model.family,
        attention_input_norm=attention if attention in folded else None,
        ffn_input_norm=ffn if ffn in folded else None,
    )
    return replace(model, family=family, fold_norms=True)


Fit = tuple[DenseExpert, list[DenseExpert], Findings]
"""Seed and experts that fit together, and what the check found."""


def plan_upcycling(
    recipe: Recipe,
    seed_index: CheckpointIndex,
    expert_indexes: Sequence[CheckpointIndex],
    *,
    router_rows: dict[str, Expression] | None = None,
    fit: Fit | None = None,
) -> Plan:
    """Plan a mixture (or a soup) from the headers of dense checkpoints, the experts' in the recipe's order.

    Args:
        router_rows: routers [E, D] by output name, where they are not drawn at random.
        fit: what ``check_fit`` returned for the same checkpoints; they are checked here if it is not given.

    Raises:
        CompatibilityError: the checkpoints do not fit together; with all problems.
    """
    seed, experts, findings = fit or check_fit(recipe, [seed_index, *expert_indexes])
    mixture = _Mixture(recipe, seed, experts, findings.expert_rope_parameters, router_rows or {})
    tensors = tuple(mixture.tensors())
    config = mixture.config()
    members = mixture.experts if config["model_type"] == "branchmix" else [seed, *experts]
    return Plan(
        tensors=tensors,
        config=config,
        notes=(*findings.notes, *_warnings(recipe)),
        sources=tuple(members),
        groups=tuple(group_tensors(tensors, seed.family)),
        lossless=mixture.lossless and config["model_type"] == "branchmix",
    )


def check_fit(recipe: Recipe, indexes: Sequence[CheckpointIndex | None], unreadable: Sequence[str] = ()) -> Fit:
    """Open seed and experts and make sure that they fit together.

    Args:
        indexes: headers of the seed and of the recipe's experts, in its order; None for those that cannot be read.
        unreadable: the problem of each None, reported together with those of the others.

    Raises:
        CompatibilityError: with all problems of all models; a problem that all share is reported for the seed only.
    """
    opened: dict[str, DenseExpert] = {}
    problems = list(unreadable)
    of_the_seed = ""
    for name, index in zip(["seed", *(expert.name for expert in recipe.experts)], indexes, strict=True):
        try:
            if index is not None:
                opened[name] = open_expert(name, index)
        except BranchMixError as error:
            problem = str(error).partition(": ")[2]
            of_the_seed = problem if name == "seed" else of_the_seed
            if name == "seed" or problem != of_the_seed:
                problems.append(str(error))
    seed, experts = opened.get("seed"), [model for name, model in opened.items() if name != "seed"]
    findings = Findings() if seed is None else check(recipe, seed, experts)
    problems += findings.problems
    if problems or seed is None:
        raise CompatibilityError(problems)
    return seed, experts, findings


class _Mixture:
    """The tensors of the output, as the recipe wants them."""

    def __init__(
        self,
        recipe: Recipe,
        seed: DenseExpert,
        experts: list[DenseExpert],
        rope_parameters: list[dict[str, Any]] | None,
        router_rows: dict[str, Expression],
    ):
        self.recipe = recipe
        self.seed = seed
        self.family: Family = seed.family
        self.dims: Dimensions = seed.dims
        self.rope_parameters = rope_parameters
        self.router_rows = router_rows
        self.models = [seed, *experts]
        self.weights = self._merge_weights()
        self.folded = foldable_norms(recipe, seed) if recipe.merge.fold_norms else []
        self.dtype = output_dtype(recipe, seed)
        by_name = {model.name: with_folded_norms(model, self.folded) for model in self.models}
        self.experts: list[DenseExpert] = [
            by_name.get(name) or replace(by_name["seed"], name=name) for name in recipe.expert_names
        ]
        self.kv_models = list(by_name.values())
        self.trunk = seed.trunk_tensors(self.folded) if recipe.trunk == "experts" else set()
        self.copies_of_seed = {"seed", *recipe.seed_copy_names}
        self.lossless = self.has_attention_experts or self.has_ffn_experts
        """Whether the tensors that experts share are the same in all of them, as far as ``tensors`` has come."""

    @property
    def seed_is_expert(self) -> bool:
        """Itself or as a copy; copies are counted once in averages."""
        return bool(self.recipe.include_seed or self.recipe.seed_copies)

    @property
    def has_attention_experts(self) -> bool:
        return self.recipe.attention in ("kv_experts", "kv_sharing")

    @property
    def has_ffn_experts(self) -> bool:
        return self.recipe.ffn == "experts"

    def tensors(self) -> Iterator[OutputTensor]:
        """All output tensors, in the seed's order, a layer's experts where the layer begins."""
        owned = self.seed.expert_tensors(self.has_attention_experts, self.has_ffn_experts)
        dense = not (self.has_attention_experts or self.has_ffn_experts)
        prefix = "" if dense else "model."
        done: set[int] = set()
        for name, ref in self.seed.tensors.items():
            layer = self._layer_of(name)
            if layer is not None and layer not in done and not dense:
                done.add(layer)
                for below, part in self._layer(layer):
                    yield self._out(f"model.{self.family.layers}.{layer}.{below}", part)
            if name in self.trunk:
                for number, expert in enumerate(self.experts):
                    part = self._of_shape(expert.trunk(name), name, ref.shape)
                    yield self._out(prefix + of_trunk(name, number), part)
            elif name not in owned:
                yield self._out(prefix + name, self._shared(name, ref.shape))

    def _layer(self, layer: int) -> Iterator[tuple[str, Expression]]:
        family, experts = self.family, self.experts
        width = self.dims.hidden_size
        if self.has_attention_experts:
            kv_sharing = self.recipe.attention == "kv_sharing"
            for name, part in attention_tensors(
                experts,
                layer,
                dtype=self.dtype,
                kv_sharing=kv_sharing,
                kv_models=self.kv_models,
                kv_weights=self._kv_weights(),
            ):
                yield f"{family.attention}.{name}", part
            if kv_sharing and self.lossless:
                averaged = [m for m, weight in zip(self.kv_models, self._kv_weights(), strict=True) if weight]
                self.lossless = same_keys_and_values([*experts, *averaged], layer, self.dtype)
        if self.has_ffn_experts:
            for name, part in ffn_tensors(experts, layer):
                yield f"{family.ffn}.{name}", self._sparse(layer, name, part)
        routers = family.routers(
            attention=self.has_attention_experts, ffn=self.has_ffn_experts, shared=self.recipe.routing.shared
        )
        for kind, name in routers.items():
            yield self._router(name, layer, width, attention=kind == "attention")

    def _router(self, below: str, layer: int, width: int, *, attention: bool) -> tuple[str, Expression]:
        name = f"model.{self.family.layers}.{layer}.{below}"
        wanted = self.recipe.router_init
        shape = (len(self.experts), width)
        if wanted.method == "zeros" or (attention and wanted.attention == "zeros"):
            return below, Constant(shape, 0.0, self.dtype)
        if name in self.router_rows:
            return below, self.router_rows[name]
        return below, Normal(shape, wanted.std, wanted.seed, name, self.dtype)

    def _sparse(self, layer: int, name: str, part: Expression) -> Expression:
        """Sparse upcycling's options, for FFN experts that are copies of the seed."""
        options = self.recipe.sparse_upcycling
        number, matrix = int(name.split(".")[1]), name.split(".")[2]
        if self.experts[number].name not in self.copies_of_seed:
            return part
        self.lossless &= not (options.redraw_fraction or options.weight_scaling)
        if options.redraw_fraction and name.endswith(".weight"):
            # Gate, up and down of one expert lose the same inner units; each expert others (Drop-Upcycling, section 3).
            key = f"{self.family.layers}.{layer}.experts.{number}"
            axis = 1 if matrix == "down_proj" else 0
            part = PartlyRedrawn(
                part,
                options.redraw_fraction,
                self.recipe.router_init.seed,
                key=f"{key}.{matrix}",
                index_key=key,
                axis=axis,
            )
        factor = self._weight_scale()
        if factor == 1.0:
            return part
        if name.endswith("down_proj.bias"):  # added behind all matrices: it carries their product
            factor **= self._scaled_matrices()
        return Scaled(part, factor)

    def _weight_scale(self) -> float:
        """NVIDIA's weight scaling for E experts, top T and granularity 1: the root of E / T that an FFN needs."""
        given = self.recipe.sparse_upcycling.weight_scaling
        if given is False:
            return 1.0
        if given is not True:
            return float(given)
        return float((len(self.experts) / self.recipe.num_experts_per_tok) ** (1 / self._scaled_matrices()))

    def _scaled_matrices(self) -> int:
        """How often a factor on every matrix shows in the output: gate, up and down, or up and down; once more where
        the activation squares (Nemotron's)."""
        return (2 if self.family.gate is None else 3) + squares_activation(self.seed.index.config)

    def _shared(self, name: str, shape: tuple[int, ...]) -> Expression:
        """A tensor that all experts share: merged, the seed's, or ones where its gain was folded."""
        below = re.sub(rf"^{re.escape(self.family.layers)}\.\d+\.", "", name)
        if below.removesuffix(".weight") in self.folded:
            return Constant(shape, 1.0 - self.family.gain_offset, self.dtype)
        own = Source(self.seed.tensors[name])
        if own.dtype not in FLOAT_DTYPES:  # the check has seen that it is the same in all models
            return own
        of_seed = self.recipe.attention == "seed" and below.startswith(f"{self.family.attention}.")
        if self.lossless:
            first = 0 if of_seed or self.seed_is_expert or self.weights[0] else 1
            parts = [Source(model.tensors[name]) for model in self.models[first:]]
            if parts[0].shape == shape and all_same(parts, self.dtype):
                return parts[0]
            self.lossless = False
        if of_seed:
            return own
        merged = mean([Source(model.tensors[name]) for model in self.models], self.weights, self.dtype)
        return self._of_shape(merged, name, shape)

    def _of_shape(self, part: Expression, name: str, shape: tuple[int, ...]) -> Expression:
        """``part`` with as many rows as the seed's tensor of this name has: vocabularies may be padded differently."""
        rows = part.num_rows
        if not shape or rows == shape[0]:
            return part
        self.lossless = False
        if rows > shape[0]:
            return Rows(part, ((0, shape[0]),))
        padding = Rows(Source(self.seed.tensors[name]), ((rows, shape[0]),))
        return Stack((cast(part, self.dtype), cast(padding, self.dtype)))

    def _merge_weights(self) -> list[float]:
        """Weight of the seed and of each expert in averages."""
        merge = self.recipe.merge
        if merge.method == "seed":
            return [1.0] + [0.0] * (len(self.models) - 1)
        given = merge.weights or {}
        weights = [given.get(model.name, 1.0) for model in self.models]
        if not self.seed_is_expert:
            weights[0] = 0.0
        return weights

    def _kv_weights(self) -> list[float]:
        """Weight of the seed and of each expert in the K and V of Shared KV."""
        choice = self.recipe.merge.kv_init
        if choice == "merge":
            return self.weights
        if choice == "average":
            return [float(self.seed_is_expert)] + [1.0] * (len(self.models) - 1)
        chosen = "seed" if choice in self.copies_of_seed else choice
        return [float(model.name == chosen) for model in self.models]

    def _layer_of(self, name: str) -> int | None:
        number = re.match(rf"{re.escape(self.family.layers)}\.(\d+)\.", name)
        return int(number.group(1)) if number else None

    def _out(self, name: str, part: Expression) -> OutputTensor:
        return OutputTensor(name, cast(part, self.dtype))

    def config(self) -> Config:
        """Content of config.json."""
        recipe = self.recipe
        dtype = next(name for name, code in DTYPES.items() if code == self.dtype)
        seed_config = {
            key: value for key, value in self.seed.index.config.items() if key not in ("torch_dtype", "auto_map")
        }
        if not (self.has_attention_experts or self.has_ffn_experts):
            return {**seed_config, "dtype": dtype}
        return {
            "architectures": ["BranchMixForCausalLM"],
            "attention": recipe.attention,
            "attention_norm_topk_prob": recipe.routing.attention.normalize,
            "attention_num_experts_per_tok": recipe.routing.attention.top_k,
            "auto_map": AUTO_MAP,
            "branchmix_version": __version__,
            "document_gate": None,
            "dtype": dtype,
            "expert_names": recipe.expert_names,
            "expert_rope_parameters": self.rope_parameters,
            "ffn": recipe.ffn,
            "initializer_range": recipe.router_init.std,
            "layout": layout_of(self.family, per_expert_rotary=self.rope_parameters is not None),
            "model_type": "branchmix",
            "norm_topk_prob": recipe.routing.ffn.normalize,
            "num_experts": len(recipe.expert_names),
            "num_experts_per_tok": recipe.num_experts_per_tok,
            "routed_scaling_factor": recipe.scaling,
            "router_aux_loss_coef": recipe.router_aux_loss_coef,
            "router_z_loss_coef": recipe.router_z_loss_coef,
            "seed_config": {**seed_config, "dtype": dtype},
            "shared_router": recipe.routing.shared,
            "tie_word_embeddings": self.dims.tied_embeddings,
            "trunk": recipe.trunk,
            "folded_norms": self.folded or None,  # for experts that join later
        }


def _warnings(recipe: Recipe) -> Iterator[str]:
    """Choices that are allowed and known to disappoint."""
    raw_top_1 = recipe.num_experts_per_tok == 1 and recipe.scaling == 1.0 and not recipe.sparse_upcycling.weight_scaling
    raw_top_1 = raw_top_1 and recipe.gates is None  # which replace them
    if recipe.ffn == "experts" and raw_top_1:
        yield (
            "raw top-1 gates scale the FFN output by about 1/N at the start, so the untrained mixture is worse than a "
            "soup (the paper trains it): routed_scaling_factor: auto, or top_k: 2 with normalize, starts better"
        )
    if recipe.ffn == "experts" and recipe.attention == "average" and recipe.seed_copies and raw_top_1:
        yield "more copies of the seed made top-1 BTX worse, not better, in the paper (Table 4)"
    if recipe.merge.kv_init != "merge" and recipe.attention != "kv_sharing":
        yield "merge.kv_init is ignored: only attention: kv_sharing has shared K and V"
    options = recipe.sparse_upcycling
    if (options.weight_scaling or options.redraw_fraction) and recipe.ffn != "experts":
        yield "sparse_upcycling is ignored: there are no FFN experts"
    has_seed = recipe.include_seed or recipe.seed_copies
    if (options.weight_scaling or options.redraw_fraction) and not has_seed:
        yield "sparse_upcycling is ignored: no expert is a copy of the seed"


def group_tensors(tensors: Sequence[OutputTensor], family: Family) -> Iterator[Group]:
    """Tensors of one name over all layers and experts as one line each."""
    groups: dict[str, list[OutputTensor]] = {}
    for tensor in tensors:
        name = tensor.name.replace(f"{family.layers}.", "layers.", 1)
        groups.setdefault(re.sub(r"\.\d+(?=\.)", ".*", name), []).append(tensor)
    for name, members in groups.items():
        first = members[0].expression
        yield Group(name, len(members), sum(m.expression.nbytes for m in members), first.shape, describe(first))


def describe(expression: Expression) -> str:
    """How a tensor comes about, in a few words."""
    if expression.ranges() is not None:
        sources = {ref.file.parent for ref in expression.sources()}
        return "copied" if len(sources) == 1 else f"copied from {len(sources)} models"
    words = {
        "Columns": "columns side by side",
        "Mean": "averaged",
        "Cast": "cast",
        "Normal": "drawn at random",
        "Constant": "constant",
        "Scaled": "scaled",
        "Gained": "norm gain folded in",
        "PartlyRedrawn": "partly drawn anew",
        "Transposed": "transposed",
        "Stack": "stacked",
        "Rows": "rows taken",
        "Held": "computed from text",
    }
    here = words.get(type(expression).__name__, type(expression).__name__)
    inner = [describe(part) for part in expression.parts_read()[:1]]
    return ", ".join([*(word for word in inner if not word.startswith("copied")), here])


def output_dtype(recipe: Recipe, seed: DenseExpert) -> str:
    """The output's dtype as safetensors calls it: the recipe's, or the seed's."""
    return DTYPES[recipe.dtype] if recipe.dtype else _main_dtype(seed)


def _main_dtype(model: DenseExpert) -> str:
    """The float dtype that most of a checkpoint's bytes have."""
    sizes: dict[str, int] = {}
    for ref in model.tensors.values():
        sizes[ref.dtype] = sizes.get(ref.dtype, 0) + ref.nbytes
    best = max((code for code in sizes if code in DTYPES.values()), key=lambda code: sizes[code], default=None)
    if best is None:
        raise CheckpointError(f"{model.name}: stored as {'+'.join(sizes)}: give dtype: bfloat16 in the recipe")
    return best

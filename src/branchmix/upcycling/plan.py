"""What becomes of every tensor: the plan that ``--dry-run`` prints and ``execute`` carries out.

Reads configs and headers, and of the trunk as many weights as show whether the experts share it. Writes nothing,
imports neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from branchmix import __version__
from branchmix.accounting.shape import domain_router_of, shape_of
from branchmix.checkpoint import expressions as ex
from branchmix.checkpoint.companions import AUTO_MAP
from branchmix.checkpoint.expressions import Expression, Rows, Scaled, Stack, Stored
from branchmix.checkpoint.families import Config, Dimensions, Family, entry_of, is_head, layout_of, squares_activation
from branchmix.checkpoint.generated_tensors import Constant, Held, Normal, PartlyRedrawn
from branchmix.checkpoint.numbers import FLOAT_DTYPES
from branchmix.checkpoint.writer import OutputTensor
from branchmix.errors import CheckpointError
from branchmix.recipe import DTYPES, Recipe, even_scaling
from branchmix.upcycling.compatibility import Fit, foldable_norms
from branchmix.upcycling.layers import (
    all_same,
    attention_tensors,
    cast,
    ffn_tensors,
    mean,
    same_keys_and_values,
)
from branchmix.upcycling.lora import Adapter, adapter_factors, gains_differ
from branchmix.upcycling.low_rank import (
    Decomposed,
    LowRankExpert,
    SingularFactor,
    matrices_of,
    ranks_of,
    singular_factors,
)
from branchmix.upcycling.sources import ROLES, DenseExpert, ExpertSource, of_trunk, who

ROUTER_DOMAINS = "router_domains."
"""How the names of the tensors of experts' domains begin."""
KEPT_IN_FP32 = re.compile(rf"^{ROUTER_DOMAINS}|\.(expert_bias|e_score_correction_bias)$")
"""Tensors of a mixture, and of its exports, that are fp32 whatever its dtype."""
SWIGLU = 0.3558
"""Mean of silu(x)^2 over normal x."""
Progress = Callable[[str, int, int], None]
"""Called with a step's name, what is done, and the total."""


@dataclass(frozen=True)
class Plan:
    """Everything that will be written."""

    tensors: tuple[OutputTensor, ...]
    config: Config
    """Content of the output's config.json."""
    notes: tuple[str, ...] = ()
    """What is done about harmless differences, and warnings."""
    sources: tuple[ExpertSource, ...] = ()
    """Experts in the order of the routers' rows; of a soup, the models averaged."""
    decomposed: Decomposed | None = None
    """How much is lost of the changes that are cut to a rank; complete once the tensors are written."""
    lossless: bool | None = False
    """Everything that is not an expert's is the same in all experts, so that the mixture with its gates forced to one
    expert computes what that dense model does. None: not known before adapters are merged."""

    @classmethod
    def of(cls, parts: Iterable[tuple[str, Expression]], dtype: str, config: Config, **rest: Any) -> Plan:
        """The plan of tensors by name, in ``dtype``, for this config; ``rest`` are the other fields."""
        in_dtype = ((name, cast(part, "F32" if KEPT_IN_FP32.search(name) else dtype)) for name, part in parts)
        return cls(tuple(OutputTensor(name, part) for name, part in in_dtype), config, **rest)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.expression.nbytes for tensor in self.tensors)

    @property
    def is_dense(self) -> bool:
        """Nothing is an expert: a soup, written as an ordinary checkpoint of the seed's family."""
        return self.config["model_type"] != "branchmix"

    @property
    def groups(self) -> list[Group]:
        """Tensors of one name over all layers and experts as one line each."""
        layers = entry_of(self.config.get("seed_config") or self.config).layers
        groups: dict[str, list[Expression]] = {}
        for tensor in self.tensors:
            name = tensor.name.replace(f"{layers}.", "layers.", 1)
            groups.setdefault(re.sub(r"\.\d+(?=\.)", ".*", name), []).append(tensor.expression)
        return [
            Group(name, len(parts), parts[0].shape, sum(part.nbytes for part in parts), describe(parts[0]))
            for name, parts in groups.items()
        ]


@dataclass(frozen=True)
class Group:
    """One line of the plan, and of its JSON: tensors of one kind and what becomes of them."""

    name: str
    tensors: int
    shape: tuple[int, ...]
    """The first tensor's."""
    bytes: int
    how: str


def plan_upcycling(
    recipe: Recipe,
    fit: Fit,
    *,
    router_rows: dict[str, Expression] | None = None,
    adapters: Mapping[str, Adapter] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Plan a mixture (or a soup) of dense models that fit together, as ``check_fit`` found.

    Args:
        router_rows: routers [E, D] by output name, where they are not drawn at random; or, with ``routing.domains``,
            the tensors of ``router_domains``.
        adapters: by expert, for ``expert_rank``: LoRA whose factors are taken as they are.
        progress: for ``expert_rank: auto``, which reads all matrices.
    """
    mixture = _Mixture(recipe, fit, router_rows or {}, adapters or {}, progress)
    notes = (*fit.findings.notes, *_warnings(recipe), *mixture.notes)
    sources = tuple(mixture.models if mixture.is_dense else mixture.experts)
    plan = Plan.of(mixture.tensors(), mixture.dtype, mixture.config(), notes=notes, sources=sources)
    return replace(plan, lossless=mixture.lossless, decomposed=mixture.decomposed)


class _Mixture:
    """The tensors of the output, as the recipe wants them."""

    def __init__(
        self,
        recipe: Recipe,
        fit: Fit,
        router_rows: dict[str, Expression],
        adapters: Mapping[str, Adapter],
        progress: Progress | None,
    ):
        self.recipe = recipe
        self.seed = seed = fit.seed
        self.family: Family = seed.family
        self.dims: Dimensions = seed.dims
        self.rope_parameters = fit.findings.expert_rope_parameters
        self.router_rows = router_rows
        self.models = [seed, *fit.experts]
        self.copies_of_seed = {"seed", *recipe.seed_copy_names}
        merge = recipe.merge
        self.weights = self._weights("seed" if merge.method == "seed" else None, merge.weights)
        self.folded = foldable_norms(recipe, seed) if recipe.merge.fold_norms else []
        self.dtype = output_dtype(recipe, seed)
        by_name: dict[str, DenseExpert | LowRankExpert] = {m.name: m.folding(self.folded) for m in self.models}
        self.is_dense = not (recipe.has_attention_experts or recipe.has_ffn_experts or recipe.stitches)
        self.stitches = recipe.stitched_layers(seed.dims.num_layers)
        self.lossless = not self.is_dense and recipe.shared_expert is None
        """Whether the tensors that experts share are the same in all of them, as far as ``tensors`` has come, and no
        expert is cut to a rank."""
        self.notes: list[str] = []
        self.decomposed = Decomposed()
        self.matrices = matrices_of(self.family, recipe.attention, recipe.ffn) if recipe.is_low_rank else []
        if self.matrices:
            by_name |= self._as_changes(by_name, adapters, progress)
        self.experts: list[DenseExpert | LowRankExpert] = [
            by_name.get(name) or replace(by_name["seed"], name=name)  # type: ignore[arg-type]
            for name in recipe.expert_names
        ]
        self.shared_kv: list[tuple[ExpertSource, float]] = []
        if recipe.attention == "kv_sharing":
            alone = {"average": None, **dict.fromkeys(self.copies_of_seed, "seed")}.get(merge.kv_init, merge.kv_init)
            weights = self.weights if merge.kv_init == "merge" else self._weights(alone)
            self.shared_kv = [pair for pair in zip(by_name.values(), weights, strict=True) if pair[1] > 0]
        self.trunk = seed.trunk_tensors(self.folded) if recipe.trunk == "experts" else set()

    def _as_changes(
        self, models: Mapping[str, Any], adapters: Mapping[str, Adapter], progress: Progress | None
    ) -> dict[str, LowRankExpert]:
        """Seed and experts as changes of the seed: LoRA as they are, other experts cut to ``expert_rank``."""
        recipe, seed, found = self.recipe, models["seed"], {}
        for name, model in models.items():
            adapter = adapters.get(name)
            if adapter is not None and adapter.reason is None and gains_differ(model, seed):
                adapter = replace(adapter, reason="it trains norms whose gains are folded")
            if name == "seed":
                factors = {}
            elif adapter is not None and adapter.reason is None:
                factors = adapter_factors(adapter, model, (*ROLES, *self.matrices))
                ranks = [A.num_rows for A, _ in factors.values()] or [0]
                words = str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"
                self.notes.append(f"{who(name)} stays a LoRA of rank {words}")
            else:
                wanted = recipe.expert_rank
                assert wanted != "full", "such experts have matrices of their own"
                kept = (wanted, recipe.expert_energy, self.decomposed, progress)
                factors = singular_factors(model, seed, self.matrices, *kept)
                self.lossless = False
                if adapter is not None:
                    self.notes.append(
                        f"{who(name)} is merged and its changes are cut, as its adapter has {adapter.reason}"
                    )
            apart = adapter.folder if adapter is not None and model.index is seed.index else None
            found[name] = LowRankExpert(model, seed, factors, self.matrices, apart)
        return found

    def tensors(self) -> Iterator[tuple[str, Expression]]:
        """All output tensors by name, in the seed's order, a layer's experts where the layer begins."""
        if self.stitches is not None:
            yield from self._stitched(self.stitches)
            return
        owned = self.seed.expert_tensors(self.recipe.has_attention_experts, self.recipe.has_ffn_experts)
        prefix = "" if self.is_dense else "model."
        done: set[str] = set()
        for name, ref in self.seed.tensors.items():
            block = re.match(rf"{re.escape(self.family.layers)}\.(\d+)\.", name)
            if block and block[0] not in done and not self.is_dense:
                done.add(block[0])
                for below, part in self._layer(int(block[1])):
                    yield f"model.{block[0]}{below}", part
            if name in self.trunk:
                for number, expert in enumerate(self.experts):
                    yield prefix + of_trunk(name, number), self._of_shape(expert.trunk(name), name, ref.shape)
            elif name not in owned:
                yield prefix + name, self._shared(name, ref.shape)
        if self.recipe.routing.domains is not None:
            width = domain_router_of(self.seed.index.config)["width"]
            for name, shape in (("embeddings", (len(self.experts), width)), ("centre", (width,))):
                name = f"{ROUTER_DOMAINS}{name}"
                yield name, self.router_rows.get(name) or Constant(shape, 0.0, "F32")  # zeros in a dry run

    def _stitched(self, stitches: list[str | None]) -> Iterator[tuple[str, Expression]]:
        """All models side by side, of the output layers the seed's, and closed stitches (``BranchMixStitch``)."""
        block, width = re.compile(rf"({re.escape(self.family.layers)}\.\d+)\.(.+)"), self.dims.hidden_size
        for name, ref in self.seed.tensors.items():
            inside = block.match(name)
            for number, model in enumerate(self.models[:1] if is_head(name) else self.models):
                of_model = f"{inside[1]}.streams.{number}.{inside[2]}" if inside else of_trunk(name, number)
                part = self._of_shape(model.trunk(name), name, ref.shape)
                yield f"model.{name if is_head(name) else of_model}", part
        for layer, into in enumerate(stitches):
            stitch, num_gates = f"model.{self.family.layers}.{layer}.stitch", len(self.models) - (into == "experts")
            if into is not None:
                yield f"{stitch}.gate.weight", Constant((num_gates * width, width), 0.0, self.dtype)
                for number in range(len(self.models) - 1):
                    yield f"{stitch}.projections.{number}.weight", Constant((width, width), 0.0, self.dtype)

    def _layer(self, layer: int) -> Iterator[tuple[str, Expression]]:
        """A layer's experts and routers, by name below the block."""
        family, recipe, experts = self.family, self.recipe, self.experts
        if recipe.has_attention_experts:
            for name, part in attention_tensors(experts, layer, dtype=self.dtype, shared_kv=self.shared_kv):
                yield f"{family.attention}.{name}", part
            if self.shared_kv and self.lossless:
                averaged = [model for model, _ in self.shared_kv]
                self.lossless = same_keys_and_values([*experts, *averaged], layer, self.dtype)
        if recipe.has_ffn_experts:
            for name, part in ffn_tensors(experts, layer, dtype=self.dtype):
                number, _, below = name.partition(".")
                if not self.matrices and experts[int(number)].name in self.copies_of_seed:
                    part = self._sparse(layer, int(number), below, part)
                yield f"{family.ffn}.experts.{name}", part
        if recipe.shared_expert is not None:
            for name, part in self.seed.folding(self.folded).ffn(layer).items():
                yield f"{family.ffn}.shared_expert.{name}", part
        for kind, name in recipe.routers(family).items():
            if recipe.routing.domains is None:
                yield name, self._router(f"model.{family.layers}.{layer}.{name}", kind)
            else:
                yield from self._projection(f"model.{family.layers}.{layer}.", name)

    def _projection(self, block: str, router: str) -> Iterator[tuple[str, Expression]]:
        """The projection that gives a router's rows, at random, so that these deviate by ``router_init.std``.

        Embeddings have a mean square of 1, and silu(g) u of normal g and u has one of ``SWIGLU``.
        """
        init = self.recipe.router_init
        for name, shape in shape_of(self.config()).router_tensors(router).items():
            std = init.std / SWIGLU**0.5 if name.endswith("down_proj.weight") else 1.0
            yield name, Normal(shape, std / shape[1] ** 0.5, init.seed, block + name, self.dtype)

    def _router(self, name: str, kind: str) -> Expression:
        init, shape = self.recipe.router_init, (len(self.experts), self.dims.hidden_size)
        if init.method == "zeros" or (kind == "attention" and init.attention == "zeros"):
            return Constant(shape, 0.0, self.dtype)
        return self.router_rows.get(name) or Normal(shape, init.std, init.seed, name, self.dtype)

    def _sparse(self, layer: int, number: int, name: str, part: Expression) -> Expression:
        """Sparse upcycling's options, for FFN experts that are copies of the seed.

        The weight scaling is NVIDIA's for E experts, top T and granularity 1: the root of E / T that an FFN needs.
        """
        options = self.recipe.sparse_upcycling
        self.lossless &= not (options.redraw_fraction or options.weight_scaling)
        matrix, _, kind = name.partition(".")
        if options.redraw_fraction and kind == "weight":
            # Gate, up and down of one expert lose the same inner units; each expert others (Drop-Upcycling, section 3).
            key = f"{self.family.layers}.{layer}.experts.{number}"
            keys = {"key": f"{key}.{matrix}", "index_key": key}
            axis = 1 if matrix == "down_proj" else 0
            part = PartlyRedrawn(part, options.redraw_fraction, self.recipe.router_init.seed, axis=axis, **keys)
        # How often a factor on every matrix shows in the output: gate, up and down, or up and down; once more where the
        # activation squares (Nemotron's).
        times = (2 if self.family.gate is None else 3) + squares_activation(self.seed.index.config)
        factor = float(options.weight_scaling or 1.0)
        if options.weight_scaling is True:
            even = even_scaling(self.recipe.routing.ffn.score, len(self.experts), self.recipe.num_experts_per_tok)
            factor = even ** (1 / times)
        if name == "down_proj.bias":  # added behind all matrices: it carries their product
            factor **= times
        return part if factor == 1.0 else Scaled(part, factor)

    def _shared(self, name: str, shape: tuple[int, ...]) -> Expression:
        """A tensor that all experts share: merged, the seed's, or ones where its gain was folded."""
        below = re.sub(rf"^{re.escape(self.family.layers)}\.\d+\.", "", name)
        if below.removesuffix(".weight") in self.folded:
            return Constant(shape, 1.0 - self.family.gain_offset, self.dtype)
        own = Stored(self.seed.tensors[name])
        if own.dtype not in FLOAT_DTYPES:  # the check has seen that it is the same in all models
            return own
        of_seed = self.recipe.attention == "seed" and below.startswith(f"{self.family.attention}.")
        if self.lossless:
            first = 0 if of_seed or self.recipe.include_seed or self.recipe.seed_copies or self.weights[0] else 1
            parts = [Stored(model.tensors[name]) for model in self.models[first:]]
            if parts[0].shape == shape and all_same(parts, self.dtype):
                return parts[0]
            self.lossless = False
        if of_seed:
            return own
        merged = mean([Stored(model.tensors[name]) for model in self.models], self.weights, self.dtype)
        return self._of_shape(merged, name, shape)

    def _of_shape(self, part: Expression, name: str, shape: tuple[int, ...]) -> Expression:
        """``part`` with as many rows as the seed's tensor of this name has: vocabularies may be padded differently."""
        rows = part.num_rows
        if not shape or rows == shape[0]:
            return part
        self.lossless = False
        if rows > shape[0]:
            return Rows(part, ((0, shape[0]),))
        padding = Rows(Stored(self.seed.tensors[name]), ((rows, shape[0]),))
        return Stack((cast(part, self.dtype), cast(padding, self.dtype)))

    def _weights(self, alone: str | None, given: dict[str, float] | None = None) -> list[float]:
        """Weight of the seed and of each expert in a mean of all that take part, or of the one model named."""
        if alone is not None:
            return [float(model.name == alone) for model in self.models]
        weights = [(given or {}).get(model.name, 1.0) for model in self.models]
        seed_takes_part = self.recipe.include_seed or self.recipe.seed_copies  # copies are counted once
        return weights if seed_takes_part else [0.0, *weights[1:]]

    def config(self) -> Config:
        """Content of config.json."""
        recipe = self.recipe
        dtype = next(name for name, code in DTYPES.items() if code == self.dtype)
        seed_config = {
            key: value for key, value in self.seed.index.config.items() if key not in ("torch_dtype", "auto_map")
        }
        if self.is_dense:
            return {**seed_config, "dtype": dtype}
        return {
            "architectures": ["BranchMixForCausalLM"],
            **recipe.parts,
            "attention_norm_topk_prob": recipe.routing.attention.normalize,
            "attention_num_experts_per_tok": recipe.routing.attention.top_k,
            "auto_map": AUTO_MAP,
            "branchmix_version": __version__,
            "document_gate": None,
            "domain_router": domain_router_of(seed_config) if recipe.routing.domains else None,
            "dtype": dtype,
            "expert_bias": False,
            "expert_names": recipe.expert_names,
            "expert_ranks": ranks_of(self.experts, self.matrices) if self.matrices else None,
            "expert_rope_parameters": self.rope_parameters,
            "initializer_range": recipe.router_init.std,
            "layout": layout_of(self.family, per_expert_rotary=self.rope_parameters is not None),
            "model_type": "branchmix",
            "norm_topk_prob": recipe.routing.ffn.normalize,
            "num_experts": len(recipe.expert_names),
            "num_experts_per_tok": recipe.num_experts_per_tok,
            "routed_scaling_factor": recipe.scaling,
            "scoring_func": recipe.routing.ffn.score if recipe.has_ffn_experts else "softmax",
            "router_aux_loss_coef": recipe.router_aux_loss_coef,
            "router_z_loss_coef": recipe.router_z_loss_coef,
            "seed_config": {**seed_config, "dtype": dtype},
            "shared_expert_weight": recipe.shared_expert_weight,
            "shared_router": recipe.routing.shared,
            "stitches": self.stitches,
            "tie_word_embeddings": self.dims.tied_embeddings,
            "folded_norms": self.folded or None,  # for experts that join later
        }


def _warnings(recipe: Recipe) -> Iterator[str]:
    """Choices that are allowed and known to disappoint."""
    options, ffn, top_k = recipe.sparse_upcycling, recipe.routing.ffn, recipe.num_experts_per_tok
    is_raw = recipe.has_ffn_experts and not ffn.normalize and not options.weight_scaling
    is_raw = is_raw and recipe.gates is None  # which replace them
    even = even_scaling(ffn.score, len(recipe.expert_names), top_k)
    if is_raw and ffn.score == "sigmoid" and recipe.scaling != even:
        yield (
            f"raw sigmoid gates are about 1/2 at the start, and {top_k} of them with routed_scaling_factor "
            f"{recipe.scaling:g} scale the FFN output by about {recipe.scaling / even:g}: "
            "routed_scaling_factor: auto, or normalize, starts better"
        )
    elif is_raw and ffn.score != "sigmoid" and top_k == 1 and recipe.scaling == 1.0:
        yield (
            "raw top-1 gates scale the FFN output by about 1/N at the start, so the untrained mixture is worse than a "
            "soup (the paper trains it): routed_scaling_factor: auto, or top_k: 2 with normalize, starts better"
        )
        if recipe.attention == "average" and recipe.seed_copies:
            yield "more copies of the seed made top-1 BTX worse, not better, in the paper (Table 4)"
    if recipe.merge.kv_init != "merge" and recipe.attention != "kv_sharing":
        yield "merge.kv_init is ignored: only attention: kv_sharing has shared K and V"
    if recipe.shared_expert is not None and recipe.include_seed:
        yield "the seed is the shared expert and a routed one: include_seed: false leaves it out of the routed ones"
    if "expert_energy" in recipe.model_fields_set and recipe.expert_rank != "auto":
        yield "expert_energy is ignored: only expert_rank: auto looks for ranks"
    if options.weight_scaling or options.redraw_fraction:
        if not recipe.has_ffn_experts:
            yield "sparse_upcycling is ignored: there are no FFN experts"
        if not (recipe.include_seed or recipe.seed_copies):
            yield "sparse_upcycling is ignored: no expert is a copy of the seed"


HOW: dict[type[Expression], str] = {
    SingularFactor: "cut to a rank",
    ex.Adapted: "changed by low rank",
    ex.Columns: "columns side by side",
    ex.Average: "averaged",
    ex.Cast: "cast",
    ex.Gained: "norm gain folded in",
    ex.Transposed: "transposed",
    Constant: "constant",
    Held: "computed from text",
    Normal: "drawn at random",
    PartlyRedrawn: "partly drawn anew",
    Rows: "rows taken",
    Scaled: "scaled",
    Stack: "stacked",
}
"""What is said of tensors that are computed, by the kind of their last step."""


def describe(expression: Expression) -> str:
    """How a tensor comes about, in a few words."""
    if expression.ranges() is not None:
        sources = {ref.file.parent for ref in expression.sources()}
        return "copied" if len(sources) == 1 else f"copied from {len(sources)} models"
    inner = [describe(part) for part in expression.parts_read()[:1]]
    words = [*(word for word in inner if not word.startswith("copied")), HOW[type(expression)]]
    return ", ".join(dict.fromkeys(words))


def output_dtype(recipe: Recipe, seed: DenseExpert) -> str:
    """The output's dtype as safetensors calls it: the recipe's, or the float dtype of most of the seed's bytes."""
    if recipe.dtype:
        return DTYPES[recipe.dtype]
    sizes: dict[str, int] = {}
    for ref in seed.tensors.values():
        sizes[ref.dtype] = sizes.get(ref.dtype, 0) + ref.nbytes
    best = max((code for code in sizes if code in DTYPES.values()), key=lambda code: sizes[code], default=None)
    if best is None:
        raise CheckpointError(f"{seed.name}: stored as {'+'.join(sizes)}: give dtype: bfloat16 in the recipe")
    return best

"""What the formulas need to know of a model: its sizes, its experts and its family."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from branchmix.checkpoint.families import (
    Config,
    Dimensions,
    Family,
    Flag,
    dimensions,
    families,
    family_of,
    matrix_shapes,
    nearest,
)
from branchmix.errors import CheckpointError

MIXTURE_DEFAULTS: Config = {
    "attention": "kv_experts",
    "attention_norm_topk_prob": False,
    "attention_num_experts_per_tok": None,
    "document_gate": None,
    "domain_router": None,
    "expert_bias": False,
    "expert_names": None,
    "expert_ranks": None,
    "expert_rope_parameters": None,
    "ffn": "experts",
    "folded_norms": None,
    "initializer_range": 0.02,
    "norm_topk_prob": False,
    "num_experts": 4,
    "num_experts_per_tok": 1,
    "routed_scaling_factor": 1.0,
    "router_aux_loss_coef": 0.01,
    "router_z_loss_coef": 0.001,
    "scoring_func": "softmax",
    "shared_expert_weight": None,
    "shared_router": False,
    "stitches": None,
    "trunk": "average",
}
"""What ``BranchMixConfig`` takes for keys that a mixture's config.json leaves out; it needs transformers."""
EXPERT_BIAS = ".expert_bias"
"""How the names of the routers' selection biases end."""


@dataclass(frozen=True)
class Shape:
    """A dense model or a mixture, with everything that the formulas read."""

    seed: Config
    """The dense model's config: the seed's, for a mixture."""
    family: Family
    sizes: Dimensions
    attention: str = "dense"
    """``dense``, or the mixture's ``kv_experts``, ``kv_sharing``, ``average``, ``seed`` or ``whole``."""
    ffn: str = "dense"
    """``dense``, or the mixture's ``experts``, ``average`` or ``whole``."""
    num_experts: int = 1
    num_experts_per_tok: int = 1
    attention_num_experts_per_tok: int | None = None
    """None is soft: every attention expert, the paper's choice."""
    shared_experts: int = 0
    """Copies of the FFN in a layer that every token goes to, beside the experts: 0 or 1."""
    shared_router: bool = False
    """Both routers have one set of weights."""
    domain_router: tuple[int, int] | None = None
    """Width of the domains' embeddings that routers' rows are projected from, and inner width of the projections; None:
    routers have weights of their own."""
    trunk: str = "average"
    """``average``, or the mixture's ``experts`` or ``whole``."""
    stitches: tuple[str | None, ...] = ()
    """For each layer, where the stitch behind it moves states, ``hub`` or ``experts``; empty: there are none, else
    attention, FFN and trunk are those of ``num_experts`` whole models."""
    expert_ranks: tuple[dict[str, list[int]], ...] = ()
    """Ranks of the experts' changes of each matrix, in each layer or once for all; empty: the matrices are theirs."""
    folded_norms: tuple[str, ...] = ()
    """Norms of a block whose gains are in the experts' projections."""
    domains: tuple[str, ...] = ()
    """That the document gates distinguish; empty: there are no such gates."""

    @property
    def has_attention_experts(self) -> bool:
        return self.attention in ("kv_experts", "kv_sharing")

    @property
    def has_ffn_experts(self) -> bool:
        return self.ffn == "experts"

    @property
    def attention_experts(self) -> int:
        """Copies of q and o in a layer."""
        return self.num_experts if self.has_attention_experts or self.stitches else 1

    @property
    def active_attention_experts(self) -> int:
        """Copies of q and o that a token uses: with top-k attention those of the k experts it chooses."""
        return min(self.attention_num_experts_per_tok or self.num_experts, self.attention_experts)

    @property
    def kv_experts(self) -> int:
        """Copies of k and v in a layer, and of the KV cache."""
        return self.num_experts if self.attention == "kv_experts" or self.stitches else 1

    @property
    def ffn_experts(self) -> int:
        """Copies of the FFN in a layer."""
        return self.num_experts if self.has_ffn_experts or self.stitches else 1

    @property
    def trunk_experts(self) -> int:
        """Copies of the embeddings and the norms."""
        return self.num_experts if self.trunk == "experts" or self.stitches else 1

    @property
    def heads(self) -> int:
        """Copies of the head."""
        return 1 if self.stitches else self.trunk_experts

    @property
    def streams(self) -> int:
        """Hidden states of a token, and copies of a learned activation in a layer, which experts of a block share."""
        return self.num_experts if self.stitches else 1

    def stitch_parameters(self, layer: int) -> int:
        """Elements of the stitch behind a layer: a projection and a gate for each model but the hub, and a gate for the
        hub's own state where it is changed (BTS, eq. 3 and 4; the paper has that one in both kinds)."""
        into, experts = self.stitches[layer] if self.stitches else None, self.num_experts - 1
        return 0 if into is None else (2 * experts + (into == "hub")) * self.sizes.hidden_size**2

    @property
    def routers(self) -> dict[str, str]:
        """Names of the routers' weights in a block, below the block, by kind."""
        return self.family.routers(
            attention=self.has_attention_experts, ffn=self.has_ffn_experts, shared=self.shared_router
        )

    def router_tensors(self, router: str) -> dict[str, tuple[int, int]]:
        """Names and shapes of the tensors of one of ``routers``: its weights, or the projection that gives its rows."""
        if self.domain_router is None:
            return {router: (self.num_experts, self.sizes.hidden_size)}
        width, inner = self.domain_router
        shapes = {"gate": (inner, width), "up": (inner, width), "down": (self.sizes.hidden_size, inner)}
        module = router.removesuffix("weight")
        return {f"{module}router_rows.{name}_proj.weight": shape for name, shape in shapes.items()}

    @property
    def router_parameters(self) -> int:
        """Elements of the weights of one router."""
        return sum(map(math.prod, self.router_tensors("").values()))

    @property
    def gated_kinds(self) -> list[str]:
        """The kinds of experts that document gates choose."""
        kinds = {"attention": self.has_attention_experts, "ffn": self.has_ffn_experts, "trunk": self.trunk == "experts"}
        return [kind for kind, there in kinds.items() if there]

    @property
    def document_gate_parameters(self) -> int:
        """Elements of the document gates: evidence of each token, prior, and a matrix for each kind of experts."""
        return len(self.domains) * (self.sizes.vocab_size + 1 + len(self.gated_kinds) * self.num_experts)

    def ranks(self, layer: int) -> dict[str, list[int]]:
        """``expert_ranks`` of a layer; empty if the experts have matrices of their own."""
        return self.expert_ranks[layer if len(self.expert_ranks) > 1 else 0] if self.expert_ranks else {}

    def factors(self, layer: int, matrices: str, experts: int | None = None) -> int:
        """Elements of the factors of the experts' changes in a layer: of this number of experts, or of all.

        Where ranks differ, some experts have the mean of all, as tokens use them if every expert gets as many.
        """
        shapes, ranks = matrix_shapes(self.sizes), self.ranks(layer)
        total = sum(sum(ranks[name]) * sum(shapes[name]) for name in matrices.split() if name in ranks)
        return total if experts is None else total * experts // self.num_experts

    @property
    def facts(self) -> Family:
        """The family; raises CheckpointError for one whose parameters cannot be counted from a config."""
        if self.family.inferred:
            name = self.family.model_type
            raise CheckpointError(
                f"no formula for the family {name!r}{nearest(name, [*families()])}: "
                "give the checkpoint folder, whose weights can be counted instead of its config"
            )
        return self.family

    def has(self, flag: Flag) -> bool:
        """What the config says about ``flag``."""
        return flag if isinstance(flag, bool) else bool(self.seed.get(flag[0], flag[1]))


def domain_router_of(seed: Config) -> dict[str, int]:
    """``domain_router`` of new mixtures of a seed: embeddings as wide as its final hidden state, projections a quarter
    of its width inside."""
    hidden_size = dimensions(seed).hidden_size
    return {"width": int(seed.get("word_embed_proj_dim") or hidden_size), "inner": -(-hidden_size // 4)}


def shape_of(config: Config) -> Shape:
    """Reads a dense config, or a mixture's (``model_type: branchmix``) with ``MIXTURE_DEFAULTS``.

    Raises:
        CheckpointError: no model, a family that cannot be a seed, or sizes and choices that no model can have.
    """
    if config.get("model_type") != "branchmix":
        return Shape(config, family_of(config), _checked_dimensions(config))
    seed = config.get("seed_config")
    if not isinstance(seed, dict):
        raise CheckpointError("config.json: a branchmix model needs seed_config, the config of the seed's family")
    config = {**MIXTURE_DEFAULTS, **config}
    _check_mixture(config)
    same = ("attention", "ffn", "trunk", "num_experts", "num_experts_per_tok", "attention_num_experts_per_tok")
    return Shape(
        seed=seed,
        family=family_of(seed),
        sizes=_checked_dimensions(seed),
        **{key: config[key] for key in same},
        shared_experts=int(config["shared_expert_weight"] is not None),
        shared_router=bool(config["shared_router"]),
        domain_router=None if config["domain_router"] is None else _sizes_of_domain_router(config["domain_router"]),
        expert_ranks=tuple(config["expert_ranks"] or ()),
        folded_norms=tuple(config["folded_norms"] or ()),
        domains=tuple((config["document_gate"] or {}).get("domains", ())),
        stitches=tuple(config["stitches"] or ()),
    )


_CHOICES = {
    "attention": ("kv_experts", "kv_sharing", "average", "seed", "whole"),
    "ffn": ("experts", "average", "whole"),
    "trunk": ("average", "experts", "whole"),
    "scoring_func": ("softmax", "sigmoid"),
}


def _check_mixture(config: Config) -> None:
    """Raises CheckpointError for choices that do not exist, and for numbers and lists that no mixture has."""
    for name, choices in _CHOICES.items():
        value = config[name]
        close = nearest(str(value), choices)
        _require(value in choices, f"{name} is {value!r}, not one of {', '.join(choices)}{close}")
    own_router = config["ffn"] == "experts" and not config["shared_router"]
    fits = config["scoring_func"] == "softmax" or own_router
    _require(fits, "scoring_func: sigmoid needs FFN experts with a router of their own")
    stitches, whole = config["stitches"], {config[name] == "whole" for name in ("attention", "ffn", "trunk")}
    _require(whole == {stitches is not None}, "stitches join whole models: attention, ffn and trunk are not whole")
    if stitches is not None:
        kinds, layers = ("hub", "experts", None), dimensions(config["seed_config"]).num_layers
        right = isinstance(stitches, list) and len(stitches) == layers and all(into in kinds for into in stitches)
        _require(right and any(stitches), "stitches is not a list of hub, experts or null, one for each layer")
    num_experts = config["num_experts"]
    for name in ("num_experts", "num_experts_per_tok", "attention_num_experts_per_tok"):
        value = config[name]
        if value is not None or name != "attention_num_experts_per_tok":  # which is soft then
            _require(type(value) is int and value >= 1, f"{name} is {value!r}, not a positive whole number")
            _require(value <= num_experts, f"{name} is {value}, but num_experts is {num_experts}")
    for name, kind in (("folded_norms", str), ("expert_names", str), ("expert_rope_parameters", dict)):
        value = [] if config[name] is None else config[name]
        things = "names" if kind is str else "mappings"
        _require(_is_list_of(kind, value), f"{name} is not a list of {things}")
        fits = name == "folded_norms" or config[name] is None or len(value) == num_experts
        _require(fits, f"num_experts is {num_experts}, but {name} has {len(value)}")
    _check_ranks(config["expert_ranks"], config)
    weight = config["shared_expert_weight"]
    in_range = weight is None or (type(weight) in (int, float) and 0 < weight < 1 and config["ffn"] == "experts")
    _require(in_range, f"shared_expert_weight is {weight!r}: it needs ffn: experts, and a number between 0 and 1")
    names, scaling, gate = config["expert_names"] or [], config["routed_scaling_factor"], config["document_gate"]
    _require(len(set(names)) == len(names), "expert_names holds a name twice")
    _require(type(scaling) in (int, float), f"routed_scaling_factor is {scaling!r}, not a number")
    if gate is not None:
        _require(isinstance(gate, dict), "document_gate has no list of domains")
        domains, decay = gate.get("domains"), gate.get("decay")
        _require(bool(domains) and _is_list_of(str, domains), "document_gate has no list of domains")
        _require(len(set(domains)) == len(domains), "document_gate names a domain twice")
        in_range = type(decay) in (int, float) and 0 <= decay <= 1
        _require(in_range, f"document_gate: decay is {decay!r}, not a number from 0 to 1")


def _sizes_of_domain_router(value: Any) -> tuple[int, int]:
    """``domain_router`` as two numbers."""
    sizes = (value.get("width"), value.get("inner")) if isinstance(value, dict) else ()
    right = len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)
    _require(right, f"domain_router is {value!r}, not a width and an inner width")
    return sizes  # type: ignore[return-value]


def _check_ranks(of_layers: Any, config: Config) -> None:
    """Raises CheckpointError unless these are ``expert_ranks`` of a mixture."""
    if of_layers is None:
        return
    right = _is_list_of(dict, of_layers) and len(of_layers) > 0
    right = right and all(
        _is_list_of(int, ranks) and len(ranks) == config["num_experts"] and min(ranks) >= 0
        for layer in of_layers
        for ranks in layer.values()
    )
    _require(right, "expert_ranks is not a list of ranks of the experts by matrix")
    layers = dimensions(config["seed_config"]).num_layers
    _require(len(of_layers) in (1, layers), f"expert_ranks has {len(of_layers)} layers, the model {layers}")
    names = {name for layer in of_layers for name in layer}
    own = {"kv_experts": {"q", "k", "v", "o"}, "kv_sharing": {"q", "o"}}.get(config["attention"], set())
    gate = {"gate"} if family_of(config["seed_config"]).gate is not None else set()
    own |= {"up", "down", *gate} if config["ffn"] == "experts" else set()
    _require(all(layer.keys() >= own for layer in of_layers), f"expert_ranks lacks one of {', '.join(sorted(own))}")
    unknown = names - own
    _require(not unknown, f"expert_ranks has {', '.join(sorted(unknown))}, which is not a matrix of an expert here")


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise CheckpointError(f"config.json: {problem}")


def _checked_dimensions(config: Config) -> Dimensions:
    sizes = dimensions(config)
    heads, kv_heads, width = sizes.num_heads, sizes.num_kv_heads, sizes.hidden_size
    fits = config.get("head_dim") is not None or width >= heads
    _require(fits, f"{heads} heads do not fit a width of {width}")
    _require(heads % kv_heads == 0, f"{heads} query heads are not a multiple of {kv_heads} key/value heads")
    return sizes

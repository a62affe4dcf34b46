"""What the formulas need to know of a model: its sizes, its experts and its family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from branchmix.checkpoint.families import Config, Dimensions, Family, Flag, dimensions, families, family_of, nearest
from branchmix.errors import CheckpointError

MIXTURE_DEFAULTS: Config = {
    "attention": "kv_experts",
    "attention_norm_topk_prob": False,
    "attention_num_experts_per_tok": None,
    "document_gate": None,
    "expert_names": None,
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
    "shared_router": False,
    "trunk": "average",
}
"""What ``BranchMixConfig`` takes for keys that a mixture's config.json leaves out; it needs transformers."""


@dataclass(frozen=True)
class Shape:
    """A dense model or a mixture, with everything that the formulas read."""

    seed: Config
    """The dense model's config: the seed's, for a mixture."""
    family: Family
    sizes: Dimensions
    attention: str = "dense"
    """``dense``, or the mixture's ``kv_experts``, ``kv_sharing``, ``average`` or ``seed``."""
    ffn: str = "dense"
    """``dense``, or the mixture's ``experts`` or ``average``."""
    num_experts: int = 1
    num_experts_per_tok: int = 1
    attention_num_experts_per_tok: int | None = None
    """None is soft: every attention expert, the paper's choice."""
    shared_router: bool = False
    """Both routers have one set of weights."""
    trunk: str = "average"
    """``average``, or the mixture's ``experts``."""
    folded_norms: tuple[str, ...] = ()
    """Norms of a block whose gains are in the experts' projections."""
    domains: tuple[str, ...] = ()
    """That the document gates distinguish; empty: there are no such gates."""

    @property
    def attention_experts(self) -> int:
        """Copies of q and o in a layer."""
        return self.num_experts if self.attention in ("kv_experts", "kv_sharing") else 1

    @property
    def active_attention_experts(self) -> int:
        """Copies of q and o that a token uses: with top-k attention those of the k experts it chooses."""
        return min(self.attention_num_experts_per_tok or self.num_experts, self.attention_experts)

    @property
    def kv_experts(self) -> int:
        """Copies of k and v in a layer, and of the KV cache."""
        return self.num_experts if self.attention == "kv_experts" else 1

    @property
    def ffn_experts(self) -> int:
        """Copies of the FFN in a layer."""
        return self.num_experts if self.ffn == "experts" else 1

    @property
    def trunk_experts(self) -> int:
        """Copies of the embeddings, the head and the norms."""
        return self.num_experts if self.trunk == "experts" else 1

    @property
    def attention_router(self) -> int:
        """Rows of the attention router; 0: there is none."""
        return self.num_experts if self.attention in ("kv_experts", "kv_sharing") else 0

    @property
    def ffn_router(self) -> int:
        """Rows of the FFN router; 0: there is none."""
        return self.num_experts if self.ffn == "experts" else 0

    @property
    def routers(self) -> dict[str, str]:
        """Names of the routers' weights in a block, below the block, by kind."""
        return self.family.routers(
            attention=self.attention_router > 0, ffn=self.ffn_router > 0, shared=self.shared_router
        )

    @property
    def document_gate_parameters(self) -> int:
        """Elements of the document gates: evidence of each token, prior, and a matrix for each kind of experts."""
        kinds = (self.attention_router > 0) + (self.ffn_router > 0) + (self.trunk == "experts")
        return len(self.domains) * (self.sizes.vocab_size + 1 + kinds * self.num_experts)

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

    def choice(name: str, choices: tuple[str, ...]) -> str:
        value = config[name]
        if value not in choices:
            raise CheckpointError(
                f"config.json: {name} is {value!r}, not one of {', '.join(choices)}{nearest(str(value), choices)}"
            )
        return str(value)

    def count(name: str, largest: int | None = None) -> int:
        value = config[name]
        if type(value) is not int or value < 1:
            raise CheckpointError(f"config.json: {name} is {value!r}, not a positive whole number")
        if largest is not None and value > largest:
            raise CheckpointError(f"config.json: {name} is {value}, but num_experts is {largest}")
        return value

    folded = config["folded_norms"] or []
    if not isinstance(folded, list) or not all(isinstance(norm, str) for norm in folded):
        raise CheckpointError("config.json: folded_norms is not a list of names")
    num_experts = count("num_experts")
    _check_experts(config, num_experts)
    soft = config["attention_num_experts_per_tok"] is None
    return Shape(
        seed=seed,
        family=family_of(seed),
        sizes=_checked_dimensions(seed),
        attention=choice("attention", ("kv_experts", "kv_sharing", "average", "seed")),
        ffn=choice("ffn", ("experts", "average")),
        num_experts=num_experts,
        num_experts_per_tok=count("num_experts_per_tok", num_experts),
        attention_num_experts_per_tok=None if soft else count("attention_num_experts_per_tok", num_experts),
        shared_router=bool(config["shared_router"]),
        trunk=choice("trunk", ("average", "experts")),
        folded_norms=tuple(folded),
        domains=_domains(config["document_gate"]),
    )


def _domains(gate: Any) -> tuple[str, ...]:
    """Domains of a config's ``document_gate``, which must be one that the model accepts."""
    if gate is None:
        return ()
    names, decay = (gate.get("domains"), gate.get("decay")) if isinstance(gate, dict) else (None, None)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError("config.json: document_gate has no list of domains")
    if len(set(names)) != len(names):
        raise CheckpointError("config.json: document_gate names a domain twice")
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay <= 1:
        raise CheckpointError(f"config.json: document_gate: decay is {decay!r}, not a number from 0 to 1")
    return tuple(names)


def _check_experts(config: Config, num_experts: int) -> None:
    """What a mixture's config says of each expert, and their factor.

    Raises:
        CheckpointError: there are more or fewer names or rotary settings than experts, or something is of a wrong type.
    """
    for name, kind, things in (("expert_names", str, "names"), ("expert_rope_parameters", dict, "mappings")):
        value = config[name]
        if value is None:
            continue
        if not isinstance(value, list) or not all(isinstance(entry, kind) for entry in value):
            raise CheckpointError(f"config.json: {name} is not a list of {things}")
        if len(value) != num_experts:
            raise CheckpointError(f"config.json: num_experts is {num_experts}, but {name} has {len(value)}")
    names = config["expert_names"] or []
    if len(set(names)) != len(names):
        raise CheckpointError("config.json: expert_names holds a name twice")
    scaling = config["routed_scaling_factor"]
    if isinstance(scaling, bool) or not isinstance(scaling, int | float):
        raise CheckpointError(f"config.json: routed_scaling_factor is {scaling!r}, not a number")


def _checked_dimensions(config: Config) -> Dimensions:
    sizes = dimensions(config)
    if config.get("head_dim") is None and sizes.hidden_size < sizes.num_heads:
        raise CheckpointError(f"config.json: {sizes.num_heads} heads do not fit a width of {sizes.hidden_size}")
    if sizes.num_heads % sizes.num_kv_heads:
        raise CheckpointError(
            f"config.json: {sizes.num_heads} query heads are not a multiple of {sizes.num_kv_heads} key/value heads"
        )
    return sizes

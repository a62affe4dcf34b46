"""Configuration of a BranchMix mixture: the seed's own config, untouched, and what the mixture adds to it.

Saved with every checkpoint, so it imports only transformers.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

AUTO_MAP = {
    "AutoConfig": "configuration_branchmix.BranchMixConfig",
    "AutoModel": "modeling_branchmix.BranchMixModel",
    "AutoModelForCausalLM": "modeling_branchmix.BranchMixForCausalLM",
}
"""Where ``trust_remote_code=True`` finds the classes."""


def _of_seed(name: str, *default: Any) -> Any:
    """The seed's attribute of this name; missing where its config has none, unless there is a default."""

    def get(config: Any) -> Any:
        return getattr(config.seed_config, name, *default)

    def assign(config: Any, value: Any) -> None:
        setattr(config.seed_config, name, value)

    return property(get, assign)


def _of_all_models(name: str) -> property:
    """The seed's number or list, of layers; as often as there are models where these are whole."""

    def get(config: Any) -> Any:
        value = getattr(config.seed_config, name)
        return value if value is None or config.stitches is None else value * config.num_experts

    def assign(config: Any, value: Any) -> None:
        setattr(config.seed_config, name, value)

    return property(get, assign)


class BranchMixConfig(PreTrainedConfig):
    """What a mixture of attention and FFN experts adds to the dense model it grew from (BAM, arXiv 2408.08274).

    Args:
        seed_config: config of the seed's family, exactly as the seed has it. Its head counts stay the dense ones:
            a family's own checks refuse widened counts, so the modules are widened after construction.
        layout: where the family keeps its parts (``branchmix.checkpoint.families.layout_of``).
        num_experts: experts N of each layer, the seed among them unless it was left out.
        expert_names: their names, in the order of the routers' rows.
        attention: ``kv_experts`` (every expert has its own q, k, v, o), ``kv_sharing`` (own q and o, one k and v),
            ``average`` or ``seed`` (one dense attention, no attention router), or ``whole`` with ``stitches``.
        ffn: ``experts``, ``average`` (one dense FFN, no FFN router), or ``whole`` with ``stitches``.
        num_experts_per_tok: k of the FFN router; N makes it soft.
        norm_topk_prob: divide the k chosen FFN gates by their sum. The paper does not.
        scoring_func: how an FFN router's logits become gates: ``softmax``, or ``sigmoid`` (DeepSeek-V3, arXiv
            2412.19437). Attention gates are softmaxed.
        routed_scaling_factor: factor on the FFN experts' output (1.0 in the paper; N / k, or 2 / k for sigmoids, keeps
            the dense scale while raw gates are those of logits near zero).
        attention_num_experts_per_tok: k of the attention gate; None is soft, the paper's choice.
        attention_norm_topk_prob: divide the k chosen attention gates by their sum.
        shared_expert_weight: weight w of an FFN S that every token goes to: ``w S(x) + (1 - w) sum_i g_i E_i(x)``
            (Nexus, arXiv 2408.15901). None: there is none.
        shared_router: one router a block for attention and FFN experts, ``mlp.gate``. The paper has two.
        domain_router: None for routers with weights of their own. Otherwise an expert's row is a projection of its
            domain's embedding (Nexus): ``width`` of the embeddings and ``inner`` width of the projections.
        expert_bias: whether top-k routers choose by gate plus a bias of each expert, ``expert_bias`` in the checkpoint
            (arXiv 2408.15664). Training with ``balance: {bias: ...}`` adds them.
        router_aux_loss_coef: weight of the load-balancing loss, summed over layers (eq. 2's alpha, not given there).
        router_z_loss_coef: weight of the router z-loss, summed over layers (eq. 2's beta, not given there).
        output_router_logits: return both routers' logits, and add the losses outside training too.
        expert_rope_parameters: rotary parameters of each expert where they differ (``kv_experts`` only), with its
            ``max_position_embeddings`` among them where the type scales by it.
        trunk: ``average`` (one, merged), or ``experts``: every expert has its own embeddings, norms and head, which the
            document gate chooses; or ``whole`` with ``stitches``.
        stitches: None, or for each layer of the seed where the stitch behind it moves states, ``hub`` or ``experts``,
            and None where there is none. The experts are then whole models, the first of them the seed (BTS, arXiv
            2502.00075), and the mixture's layers are those of all models.
        expert_ranks: None for experts with matrices of their own. Otherwise each matrix of attention and FFN (``q``,
            ``k``, ``v``, ``o``, ``gate``, ``up``, ``down``) is the seed's, and these are the ranks of the experts'
            changes of it: for each layer, or once for all, a dictionary with a list of ranks for each matrix.
        folded_norms: norms of a block whose gains were folded into the experts' projections.
        document_gate: None, or what ``branchmix calibrate`` fitted: the names of its ``domains``, the ``decay`` of the
            evidence for each token, and a record of the fit (``branchmix.upcycling.gates``).
        initializer_range: standard deviation of newly drawn routers.
    """

    model_type = "branchmix"
    sub_configs: ClassVar[dict[str, Any]] = {"seed_config": AutoConfig}

    seed_config: Any = None
    layout: Any = None
    num_experts: int = 4
    expert_names: list[str] | None = None
    attention: str = "kv_experts"
    ffn: str = "experts"
    num_experts_per_tok: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    routed_scaling_factor: float = 1.0
    attention_num_experts_per_tok: int | None = None
    attention_norm_topk_prob: bool = False
    shared_expert_weight: float | None = None
    shared_router: bool = False
    domain_router: dict[str, int] | None = None
    expert_bias: bool = False
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    output_router_logits: bool = False
    expert_rope_parameters: list[dict[str, Any]] | None = None
    trunk: str = "average"
    stitches: list[str | None] | None = None
    expert_ranks: list[dict[str, list[int]]] | None = None
    folded_norms: list[str] | None = None
    document_gate: dict[str, Any] | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.seed_config is None:  # transformers builds a default instance to shorten what it saves
            self.seed_config = {"model_type": "llama"}
        if isinstance(self.seed_config, dict):
            fields = dict(self.seed_config)
            self.seed_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        self.tie_word_embeddings = bool(getattr(self.seed_config, "tie_word_embeddings", False))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self.seed_config, name, None) is not None:
                kwargs.setdefault(name, getattr(self.seed_config, name))
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)
        self._check()

    def _check(self) -> None:
        """Raises ValueError for values that no mixture can have."""
        if self.attention not in ("kv_experts", "kv_sharing", "average", "seed", "whole"):
            raise ValueError(f"attention is {self.attention!r}, not kv_experts, kv_sharing, average, seed or whole")
        if self.ffn not in ("experts", "average", "whole"):
            raise ValueError(f"ffn is {self.ffn!r}, not experts, average or whole")
        if self.trunk not in ("average", "experts", "whole"):
            raise ValueError(f"trunk is {self.trunk!r}, not average, experts or whole")
        if len({self.stitches is not None, *(part == "whole" for part in (self.attention, self.ffn, self.trunk))}) > 1:
            raise ValueError("stitches join whole models: attention, ffn and trunk are whole with them, and only then")
        if self.stitches is not None and not ({"hub", "experts", None} >= {*self.stitches} != {None}):
            raise ValueError("stitches is not a list of hub, experts or null, one for each layer")
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring_func is {self.scoring_func!r}, not softmax or sigmoid")
        if self.scoring_func == "sigmoid" and (self.shared_router or not self.has_ffn_experts):
            raise ValueError("scoring_func: sigmoid needs FFN experts with a router of their own")
        for name in ("num_experts_per_tok", "attention_num_experts_per_tok"):
            top_k = getattr(self, name)
            if top_k is not None and not 1 <= top_k <= self.num_experts:
                raise ValueError(f"{name} is {top_k}, but there are {self.num_experts} experts")
        weight = self.shared_expert_weight
        if weight is not None and not (self.has_ffn_experts and 0 < weight < 1):
            raise ValueError(f"shared_expert_weight is {weight}: it needs FFN experts, and a number between 0 and 1")
        if self.shared_router and not (self.has_attention_experts and self.has_ffn_experts):
            raise ValueError("shared_router needs attention experts and FFN experts")
        if self.domain_router is not None:
            if not (self.has_attention_experts or self.has_ffn_experts):
                raise ValueError("domain_router needs experts to choose from")
            if not all(self.domain_router.get(size, 0) > 0 for size in ("width", "inner")):
                raise ValueError("domain_router needs width and inner, both above 0")
        if self.document_gate is not None:
            if not (self.has_attention_experts or self.has_ffn_experts):
                raise ValueError("document_gate needs experts to choose from")
            decay = self.document_gate.get("decay")
            if not self.document_gate.get("domains") or not isinstance(decay, int | float) or not 0 <= decay <= 1:
                raise ValueError("document_gate needs domains, and a decay from 0 to 1")
        for layer in self.expert_ranks or ():
            for name, ranks in layer.items():
                if len(ranks) != self.num_experts:
                    raise ValueError(f"expert_ranks: {name} has {len(ranks)}, but there are {self.num_experts} experts")
        if self.expert_rope_parameters is not None and self.attention != "kv_experts":
            raise ValueError("experts with different rotary parameters need attention: kv_experts")

    def ranks_of(self, layer: int) -> dict[str, list[int]] | None:
        """``expert_ranks`` of one layer: for each matrix, a rank for each expert."""
        if self.expert_ranks is None:
            return None
        return self.expert_ranks[layer if len(self.expert_ranks) > 1 else 0]

    def scaling_for(self, num_experts: int, top_k: int) -> float:
        """``routed_scaling_factor`` of the mixture with other numbers of experts and of chosen ones.

        The factor that makes up for raw gates near 1 / N, or sigmoids near 1 / 2, stays that one; any other stays.
        """
        is_sigmoid = self.scoring_func == "sigmoid"
        even, other = (2, 2) if is_sigmoid else (self.num_experts, num_experts)
        if self.norm_topk_prob or self.routed_scaling_factor != even / self.num_experts_per_tok:
            return self.routed_scaling_factor
        return other / top_k

    @property
    def has_attention_experts(self) -> bool:
        """Whether attention is a mixture, rather than one dense attention."""
        return self.attention in ("kv_experts", "kv_sharing")

    @property
    def has_ffn_experts(self) -> bool:
        """Whether the FFN is a mixture, rather than one dense FFN."""
        return self.ffn == "experts"

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """This config, from which servers read the sizes of the wide attention and the experts.

        Other attributes of a text model's config (``_of_seed`` below) are the seed's.
        """
        return self

    # The base class passes these on to sub-configs, whose classes have no experts and would refuse.
    @property
    def _experts_implementation(self) -> str | None:
        return self._experts_implementation_internal

    @_experts_implementation.setter
    def _experts_implementation(self, value: str | dict | None) -> None:
        self._experts_implementation_internal = value.get("") if isinstance(value, dict) else value

    # Sizes under the names that trainers, caches and servers look for: attention's as computed, the rest the seed's.
    @property
    def num_attention_heads(self) -> int:
        return self._attention_width * self.seed_config.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        seed = self.seed_config
        heads = getattr(seed, "num_key_value_heads", None) or seed.num_attention_heads
        if hasattr(seed, "multi_query"):  # Falcon and GPT-BigCode count them elsewhere
            grouped = getattr(seed, "new_decoder_architecture", False)
            heads = seed.num_kv_heads if grouped else 1 if seed.multi_query else seed.num_attention_heads
        return heads if self.attention == "kv_sharing" else self._attention_width * heads

    @property
    def head_dim(self) -> int:
        seed = self.seed_config
        return getattr(seed, "head_dim", None) or seed.hidden_size // seed.num_attention_heads

    @property
    def _attention_width(self) -> int:
        return self.num_experts if self.has_attention_experts else 1

    vocab_size = _of_seed("vocab_size")
    hidden_size = _of_seed("hidden_size")
    intermediate_size = _of_seed("intermediate_size")
    hidden_act = _of_seed("hidden_act")
    num_hidden_layers = _of_all_models("num_hidden_layers")
    max_position_embeddings = _of_seed("max_position_embeddings", None)
    layer_types = _of_all_models("layer_types")
    sliding_window = _of_seed("sliding_window")
    attn_logit_softcapping = _of_seed("attn_logit_softcapping")
    final_logit_softcapping = _of_seed("final_logit_softcapping")
    logit_scale = _of_seed("logit_scale")
    logits_scaling = _of_seed("logits_scaling")


__all__ = ["BranchMixConfig"]

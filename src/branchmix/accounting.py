"""Parameters, active parameters, FLOPs and KV-cache bytes: exact, from a config alone, without torch.

``inspect`` answers for a folder, a config.json, a Hub id or a config dict; ``parameters``, ``flops_per_token`` and
``kv_cache_bytes_per_token`` are its pure parts. Formulas and conventions are those of BAM (arXiv 2408.08274), Tables 7,
9 and 10, with d the width, H and K the query and key/value heads, D the head size, I the FFN's inner width, N experts
of which k are active. The paper's d_ff is the fused width 2I.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from branchmix.checkpoint.families import FAMILIES, Config, Dimensions, Family, dimensions, family_of, nearest
from branchmix.errors import BranchMixError, CheckpointError

if TYPE_CHECKING:
    from branchmix.checkpoint.index import CheckpointIndex

Flag = bool | tuple[str, bool]
"""A fact of the family, or the config key that decides and transformers' default for it."""

DEFAULT_CONTEXT = 4096
"""Tokens of context when none is asked for; a model of fewer positions gets its own number."""

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1}
_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"} | {
    "fp64": "float64",
    "double": "float64",
    "fp8": "float8_e4m3fn",
}


@dataclass(frozen=True)
class Facts:
    """What a family's counts need beyond its names and sizes. The defaults are Mistral's: no biases, RMSNorm."""

    qkv_bias: Flag = False
    out_bias: Flag = False
    ffn_bias: Flag = False
    head_bias: bool = False
    """lm_head has a bias."""
    norm_gain: Flag = True
    norm_bias: Flag = False
    post_norms: int = 0
    """Norms of a block behind attention and FFN, beside those that ``Family`` names in front of them."""
    qk_norm: Flag = False
    qk_norm_bias: bool = False
    final_norm_needs: tuple[tuple[str, bool], ...] = ()
    """Config keys that must have (or default to) these values for a final norm to exist."""
    positions_offset: int | None = None
    """Learned position embeddings, with so many extra rows; None: there are none."""
    window: int | None = None
    """Default of ``sliding_window``: keys that a query sees, itself included."""
    window_switch: str | None = None
    """Config key without which ``sliding_window`` is ignored."""
    windowed: Literal["all", "late", "most", "no_rope"] = "all"
    """Layers with a window when the config lists no ``layer_types``: all; those from ``max_window_layers`` on; all but
    every ``full_every``-th; or those without rotary positions."""
    full_every: int = 1


def _biases(key: str, default: bool, *which: str) -> dict[str, Any]:
    """One config key decides about several flags."""
    return dict.fromkeys(which or ("qkv_bias", "out_bias", "ffn_bias"), (key, default))


_ATTENTION_BIAS = _biases("attention_bias", False, "qkv_bias", "out_bias")
_MLP_BIAS = _biases("mlp_bias", False, "ffn_bias")

FACTS: dict[str, Facts] = {
    "llama": Facts(**_ATTENTION_BIAS, **_MLP_BIAS),
    "mistral": Facts(window=4096),
    "ministral": Facts(window=4096),
    "qwen2": Facts(qkv_bias=True, window=4096, window_switch="use_sliding_window", windowed="late"),
    "qwen3": Facts(**_ATTENTION_BIAS, qk_norm=True, window=4096, window_switch="use_sliding_window", windowed="late"),
    "gemma": Facts(**_ATTENTION_BIAS),
    "gemma2": Facts(**_ATTENTION_BIAS, post_norms=2, window=4096, windowed="most", full_every=2),
    "gemma3_text": Facts(**_ATTENTION_BIAS, post_norms=2, qk_norm=True, window=4096, windowed="most", full_every=6),
    "olmo": Facts(**_ATTENTION_BIAS, norm_gain=False),
    "olmo2": Facts(**_ATTENTION_BIAS, post_norms=2, qk_norm=True),
    "olmo3": Facts(**_ATTENTION_BIAS, post_norms=2, qk_norm=True, window=4096, windowed="most", full_every=4),
    "cohere": Facts(**_ATTENTION_BIAS, qk_norm=("use_qk_norm", False)),
    "cohere2": Facts(**_ATTENTION_BIAS, window=4096, windowed="most", full_every=4),
    "phi": Facts(
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        head_bias=True,
        norm_bias=True,
        qk_norm=("qk_layernorm", False),
        qk_norm_bias=True,
    ),
    "phi3": Facts(),
    "gpt_neox": Facts(**_biases("attention_bias", True, "qkv_bias", "out_bias"), ffn_bias=True, norm_bias=True),
    "gptj": Facts(ffn_bias=True, head_bias=True, norm_bias=True),
    "gpt2": Facts(qkv_bias=True, out_bias=True, ffn_bias=True, norm_bias=True, positions_offset=0),
    "opt": Facts(
        **_biases("enable_bias", True),
        **_biases("layer_norm_elementwise_affine", True, "norm_gain", "norm_bias"),
        final_norm_needs=(("do_layer_norm_before", True), ("_remove_final_layer_norm", False)),
        positions_offset=2,
    ),
    "falcon": Facts(**_biases("bias", False), norm_bias=True),
    "stablelm": Facts(qkv_bias=("use_qkv_bias", False), norm_bias=True, qk_norm=("qk_layernorm", False)),
    "starcoder2": Facts(**_biases("use_bias", True), norm_bias=True),
    "granite": Facts(**_ATTENTION_BIAS, **_MLP_BIAS),
    "smollm3": Facts(**_ATTENTION_BIAS, **_MLP_BIAS, window_switch="use_sliding_window", windowed="no_rope"),
    "glm": Facts(qkv_bias=("attention_bias", True)),
    "glm4": Facts(qkv_bias=("attention_bias", True), post_norms=2),
    "nemotron": Facts(**_ATTENTION_BIAS, **_MLP_BIAS, norm_bias=True),
}


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

    @property
    def attention_experts(self) -> int:
        """Copies of q and o in a layer."""
        return self.num_experts if self.attention in ("kv_experts", "kv_sharing") else 1

    @property
    def kv_experts(self) -> int:
        """Copies of k and v in a layer, and of the KV cache."""
        return self.num_experts if self.attention == "kv_experts" else 1

    @property
    def ffn_experts(self) -> int:
        """Copies of the FFN in a layer."""
        return self.num_experts if self.ffn == "experts" else 1

    @property
    def attention_router(self) -> int:
        """Rows of the attention router; 0: there is none."""
        return self.num_experts if self.attention in ("kv_experts", "kv_sharing") else 0

    @property
    def ffn_router(self) -> int:
        """Rows of the FFN router; 0: there is none."""
        return self.num_experts if self.ffn == "experts" else 0

    @property
    def facts(self) -> Facts:
        """Raises CheckpointError for a family whose parameters cannot be counted from a config."""
        if self.family.model_type not in FACTS:
            raise CheckpointError(
                f"no formula for the family {self.family.model_type!r}{nearest(self.family.model_type, [*FACTS])}: "
                "give the checkpoint folder, whose weights can be counted instead of its config"
            )
        return FACTS[self.family.model_type]

    def has(self, flag: Flag) -> bool:
        """What the config says about ``flag``."""
        return flag if isinstance(flag, bool) else bool(self.seed.get(flag[0], flag[1]))


def shape_of(config: Config) -> Shape:
    """Reads a dense config, or a mixture's (``model_type: branchmix``) with the defaults of ``BranchMixConfig``.

    Raises:
        CheckpointError: no model, a family that cannot be a seed, or sizes and choices that no model can have.
    """
    if config.get("model_type") != "branchmix":
        return Shape(config, family_of(config), _checked_dimensions(config))
    seed = config.get("seed_config")
    if not isinstance(seed, dict):
        raise CheckpointError("config.json: a branchmix model needs seed_config, the config of the seed's family")

    def choice(name: str, choices: tuple[str, ...]) -> str:
        value = config.get(name, choices[0])
        if value not in choices:
            raise CheckpointError(
                f"config.json: {name} is {value!r}, not one of {', '.join(choices)}{nearest(str(value), choices)}"
            )
        return str(value)

    def count(name: str, default: int, largest: int | None = None) -> int:
        value = config.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"config.json: {name} is {value!r}, not a positive whole number")
        if largest is not None and value > largest:
            raise CheckpointError(f"config.json: {name} is {value}, but num_experts is {largest}")
        return value

    num_experts = count("num_experts", 4)
    soft = config.get("attention_num_experts_per_tok") is None
    return Shape(
        seed=seed,
        family=family_of(seed),
        sizes=_checked_dimensions(seed),
        attention=choice("attention", ("kv_experts", "kv_sharing", "average", "seed")),
        ffn=choice("ffn", ("experts", "average")),
        num_experts=num_experts,
        num_experts_per_tok=count("num_experts_per_tok", 1, num_experts),
        attention_num_experts_per_tok=None if soft else count("attention_num_experts_per_tok", 1, num_experts),
    )


def _checked_dimensions(config: Config) -> Dimensions:
    sizes = dimensions(config)
    if config.get("head_dim") is None and sizes.hidden_size < sizes.num_heads:
        raise CheckpointError(f"config.json: {sizes.num_heads} heads do not fit a width of {sizes.hidden_size}")
    if sizes.num_heads % sizes.num_kv_heads:
        raise CheckpointError(
            f"config.json: {sizes.num_heads} query heads are no multiple of {sizes.num_kv_heads} key/value heads"
        )
    return sizes


@dataclass(frozen=True)
class ParameterCounts:
    """Elements of the whole model's unique parameters; buffers are not counted, tied weights once."""

    embeddings: int
    """Token embeddings, learned positions, and OPT's projections into and out of the embedding's width."""
    lm_head: int
    """0 when it is tied to the embeddings, except for its bias."""
    attention: int
    """Projections and their biases, of all experts."""
    ffn: int
    norms: int
    """Block norms, final norm, query and key norms."""
    routers: int
    other: int = 0
    """Only when counted from weights: tensors whose part their name does not tell."""

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(asdict(self).values())


def parameters(config: Config) -> ParameterCounts:
    """Parameters of the whole model (Table 9's "total"), exact for every family of ``FAMILIES``.

    Raises:
        CheckpointError: the config is no model's, or its family has no formula.
    """
    shape = shape_of(config)
    return _count(shape, shape.attention_experts, shape.kv_experts, shape.ffn_experts)


count_parameters = parameters


def active_parameters(config: Config) -> ParameterCounts:
    """Parameters that a token uses (Table 9's "active"): k FFN experts, all of soft attention, both whole routers.

    With top-k attention only the k chosen attention experts count as active, though the implementation computes all:
    an expert's keys and values are needed at every position that any later token may attend to. Embeddings count
    in full, as in the paper.
    """
    shape = shape_of(config)
    chosen = min(shape.attention_num_experts_per_tok or shape.attention_experts, shape.attention_experts)
    return _count(shape, chosen, min(chosen, shape.kv_experts), min(shape.num_experts_per_tok, shape.ffn_experts))


def _count(shape: Shape, attention_experts: int, kv_experts: int, ffn_experts: int) -> ParameterCounts:
    """Parameters of a model of so many copies of q/o, of k/v and of the FFN in each layer."""
    s, facts, has = shape.sizes, shape.facts, shape.has
    d, q_width, kv_width = s.hidden_size, s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim

    qkv_inputs = d + has(facts.qkv_bias)
    query_and_output = q_width * qkv_inputs + d * (q_width + has(facts.out_bias))
    attention = attention_experts * query_and_output + kv_experts * 2 * kv_width * qkv_inputs

    num_up = 2 if shape.family.gate else 1
    inner = s.intermediate_size
    ffn_biases = num_up * inner + d if has(facts.ffn_bias) else 0
    ffn = ffn_experts * ((num_up + 1) * d * inner + ffn_biases)

    norm = d * (has(facts.norm_gain) + has(facts.norm_bias))
    in_front = {shape.family.attention_input_norm, shape.family.ffn_input_norm} - {None}
    qk_norm = 0
    if has(facts.qk_norm):
        q_size, k_size = (s.head_dim, s.head_dim) if shape.family.norm_over == "head" else (q_width, kv_width)
        qk_norm = (attention_experts * q_size + kv_experts * k_size) * (1 + facts.qk_norm_bias)
    final_norm = all(bool(shape.seed.get(key, wanted)) == wanted for key, wanted in facts.final_norm_needs)

    token_width, projections = _embedding_widths(shape)
    positions = 0
    if facts.positions_offset is not None:
        positions = ((_max_positions(shape.seed) or 0) + facts.positions_offset) * d
    return ParameterCounts(
        embeddings=s.vocab_size * token_width + positions + projections,
        lm_head=(0 if s.tied_embeddings else s.vocab_size * token_width) + facts.head_bias * s.vocab_size,
        attention=s.num_layers * attention,
        ffn=s.num_layers * ffn,
        norms=s.num_layers * ((len(in_front) + facts.post_norms) * norm + qk_norm) + final_norm * norm,
        routers=s.num_layers * (shape.attention_router + shape.ffn_router) * d,
    )


def _embedding_widths(shape: Shape) -> tuple[int, int]:
    """Width of token embeddings and lm_head, and elements of the two projections between it and d (OPT only)."""
    width = shape.sizes.hidden_size
    token_width = int(shape.seed.get("word_embed_proj_dim") or width)
    return token_width, 2 * token_width * width if token_width != width else 0


def _max_positions(config: Config) -> int | None:
    """Positions the model was made for; the defaults are those of GPT-2 and OPT, whose tables depend on them."""
    default = {"gpt2": 1024, "opt": 2048}.get(config.get("model_type", ""))
    value = config.get("max_position_embeddings", config.get("n_positions", default))
    return value if isinstance(value, int) and value > 0 else None


@dataclass(frozen=True)
class LayerFlops:
    """Forward FLOPs of one token in one layer (Tables 7 and 10). A multiply-add is 2; norms, biases, activations,
    rotary positions and softmax are not counted."""

    qkv: int
    """2d(NH + 2NK)D, with one k and v for Shared KV: the paper's 6Nd^2."""
    context: int
    """Scores and weighted values, 2 n_ctx NHD: the paper's "mask". That is 4NHD for each of the n_ctx / 2 keys that
    a token of a causal sequence of n_ctx tokens sees on average."""
    output: int
    """2NHDd: the paper's 2Nd^2."""
    ffn: int
    """2kd(number of matrices)I: the paper's 3kd d_ff for a gated FFN."""
    attention_router: int
    """2Nd."""
    ffn_router: int
    """2Nd."""

    @property
    def attention(self) -> int:
        """Projections and context, without the router, as Table 7 has it."""
        return self.qkv + self.context + self.output

    @property
    def routers(self) -> int:
        """Both routers. Table 7 has no column for them but counts them in its total."""
        return self.attention_router + self.ffn_router

    @property
    def total(self) -> int:
        """Attention, FFN and routers: Table 7's "total FLOPs", whose FFN term the paper prints larger."""
        return self.attention + self.ffn + self.routers


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one token, of all matrix products."""

    layer: LayerFlops
    """One layer of full attention: the convention of Table 7."""
    layers: tuple[LayerFlops, ...]
    """Every layer; they differ where some attend through a sliding window shorter than the context."""
    lm_head: int
    """2 d vocabulary (and OPT's embedding projections); the embedding lookup is free."""
    causal_mean: int
    """``layer.context``, were it the exact mean over a causal sequence: 4NHD for each of (n_ctx + 1) / 2 keys."""
    last_token: int
    """``layer.context``, were it that of the last token of the sequence, as in decoding: 4 n_ctx NHD."""

    def model(self, part: str) -> int:
        """Sum over the layers of a field or property of ``LayerFlops``."""
        return sum(getattr(layer, part) for layer in self.layers)

    @property
    def non_embedding(self) -> int:
        """All layers, without lm_head."""
        return self.model("total")

    @property
    def total(self) -> int:
        """All layers and lm_head."""
        return self.non_embedding + self.lm_head


def flops_per_token(config: Config, context: int) -> Flops:
    """Forward FLOPs of one token of a causal sequence of ``context`` tokens (Tables 7 and 10).

    All N attention experts are counted whatever ``attention_num_experts_per_tok`` is, since all are computed.

    Raises:
        CheckpointError: ``context`` is not positive, or the config is no model's or has no formula.
    """
    _check_context(context)
    shape = shape_of(config)
    shape.facts  # noqa: B018  refuses a family whose FFN and attention are guesses
    return _flops(shape, context)


def _flops(shape: Shape, context: int) -> Flops:
    s = shape.sizes
    d, q_width, kv_width = s.hidden_size, s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
    wide = shape.attention_experts * q_width

    def layer(window: int | None) -> LayerFlops:
        # Keys seen by all n tokens together, doubled: n^2 of a causal triangle, less what lies outside the window.
        keys = context**2 - max(context - (window or context), 0) ** 2
        return LayerFlops(
            qkv=2 * d * (wide + 2 * shape.kv_experts * kv_width),
            context=2 * wide * keys // context,
            output=2 * wide * d,
            ffn=2 * min(shape.num_experts_per_tok, shape.ffn_experts)
            * (3 if shape.family.gate else 2) * d * s.intermediate_size,
            attention_router=2 * shape.attention_router * d,
            ffn_router=2 * shape.ffn_router * d,
        )  # fmt: skip

    token_width, projections = _embedding_widths(shape)
    return Flops(
        layer=layer(None),
        layers=tuple(layer(window) for window in _windows(shape)),
        lm_head=2 * (token_width * s.vocab_size + projections),
        causal_mean=2 * (context + 1) * wide,
        last_token=4 * context * wide,
    )


def _windows(shape: Shape) -> list[int | None]:
    """Of each layer the keys its sliding window holds, or None for full attention (transformers' own rules)."""
    seed, num_layers = shape.seed, shape.sizes.num_layers
    facts = FACTS.get(shape.family.model_type, Facts())
    window = seed.get("sliding_window", facts.window)
    if not isinstance(window, int) or (facts.window_switch and not seed.get(facts.window_switch)):
        return [None] * num_layers
    kinds = seed.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == num_layers:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    every = seed.get("sliding_window_pattern", facts.full_every)
    interval = seed.get("no_rope_layer_interval", 4)
    rotary = seed.get("no_rope_layers") or [(layer + 1) % interval != 0 for layer in range(num_layers)]
    slides = {
        "all": lambda layer: True,
        "late": lambda layer: layer >= seed.get("max_window_layers", 28),
        "most": lambda layer: (layer + 1) % every != 0,
        "no_rope": lambda layer: not rotary[layer],
    }[facts.windowed]
    return [window if slides(layer) else None for layer in range(num_layers)]


def kv_cache_bytes_per_token(config: Config, dtype: str | None = None) -> int:
    """Bytes that one token adds to the KV cache: layers * 2 * K * D * bytes, times N for Expert KV.

    Shared KV and averaged attention need no more than the dense model. A layer with a sliding window stops growing
    once its window is full.

    Raises:
        CheckpointError: the config is no model's, or ``dtype`` is unknown.
    """
    shape = shape_of(config)
    return shape.sizes.num_layers * _kv_bytes_per_layer(shape, _dtype(config, dtype))


def _kv_bytes_per_layer(shape: Shape, dtype: str) -> int:
    return 2 * shape.kv_experts * shape.sizes.num_kv_heads * shape.sizes.head_dim * DTYPE_BYTES[dtype]


def _dtype(config: Config, dtype: str | None) -> str:
    """The dtype asked for, or the config's, or bfloat16, as torch spells it."""
    seed = config["seed_config"] if isinstance(config.get("seed_config"), dict) else {}
    found = dtype or next((c[key] for c in (config, seed) for key in ("dtype", "torch_dtype") if c.get(key)), None)
    if not isinstance(found, str):
        return "bfloat16"
    name = found.removeprefix("torch.").lower()
    name = _DTYPE_ALIASES.get(name, name)
    if name not in DTYPE_BYTES:
        known = [*DTYPE_BYTES, *_DTYPE_ALIASES]
        raise CheckpointError(f"unknown dtype {found!r}{nearest(name, known)}: give one of {', '.join(DTYPE_BYTES)}")
    return name


def _check_context(context: int) -> None:
    if isinstance(context, bool) or not isinstance(context, int) or context <= 0:
        raise CheckpointError(f"context is {context!r}, not a positive number of tokens")


@dataclass(frozen=True)
class Accounting:
    """What ``inspect`` found out about a model."""

    model: str
    """The argument: a path, a Hub id, or ``config`` for a dict."""
    model_type: str
    source: Literal["config", "weights"]
    """What parameters were counted from: the config by formula, or, for a family without one, the weights' headers."""
    shape: Shape | None
    """None when counted from the weights of a model that the formulas cannot describe."""
    context: int
    dtype: str
    total: ParameterCounts
    active: ParameterCounts
    flops: Flops | None
    kv_cache_bytes_per_token: int | None
    kv_cache_bytes: int | None
    """KV cache of one sequence of ``context`` tokens; layers with a sliding window hold no more than the window."""
    stored: int | None
    """Parameters in the folder's safetensors headers, buffers and tied copies left out; None: no weights were read."""
    notices: tuple[str, ...]
    """One line each, for people; the command prints them on stderr."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters in ``dtype``."""
        return self.total.total * DTYPE_BYTES[self.dtype]

    def as_dict(self) -> dict[str, Any]:
        """The JSON of ``branchmix inspect --json``: docs of each key stand with the fields and properties used here.

        ``flops_per_token`` has Table 7's convention at its top: one layer, no embeddings. ``per_layer`` repeats it
        with its components, ``whole_model`` is the sum over layers, with lm_head.
        """
        shape, total, active = self.shape, asdict(self.total), asdict(self.active)
        return {
            "model": self.model,
            "model_type": self.model_type,
            "source": self.source,
            **(_describe(shape) if shape else {}),
            "context": self.context,
            "dtype": self.dtype,
            "parameters": {
                "total": self.total.total,
                "active": self.active.total,
                **total,
                "active_by_part": active,
                "stored": self.stored,
            },
            "weight_bytes": self.weight_bytes,
            "flops_per_token": _describe_flops(self.flops) if self.flops else None,
            "kv_cache_bytes_per_token": self.kv_cache_bytes_per_token,
            "kv_cache_bytes": self.kv_cache_bytes,
            "paper": self.paper(),
            "notices": list(self.notices),
        }

    def paper(self) -> dict[str, Any] | None:
        """What the paper prints, or would print, where its sums differ from ours; None for dense models.

        Table 7 counts 1.5 d_ff = 3I FLOPs more for each active FFN expert than Table 10's formula gives. Table 9's
        active parameters of BAM leave out one of the two routers, and for Shared KV the shared k and v.
        """
        shape, flops = self.shape, self.flops
        if shape is None or flops is None or shape.ffn != "experts" or not shape.family.gate:
            return None
        extra = 3 * shape.sizes.intermediate_size * shape.num_experts_per_tok
        omitted = shape.sizes.num_layers * shape.attention_router * shape.sizes.hidden_size
        notes = [f"Table 7 prints {extra:,} = 1.5 k d_ff more for the FFN than Table 10's formula gives, unexplained"]
        if shape.attention_router:
            notes.append("Table 9's active parameters leave out one of the two routers")
        if shape.attention == "kv_sharing":
            omitted += shape.sizes.num_layers * flops.layer.qkv // 2 - self._query_elements()
            notes.append("Table 9's active parameters leave out the shared keys and values")
        return {
            "table_7_per_layer": {
                "attention": flops.layer.attention,
                "ffn": flops.layer.ffn + extra,
                "total": flops.layer.total + extra,
            },
            "table_9": {"total": self.total.total, "active": self.active.total - omitted},
            "differences": notes,
        }

    def _query_elements(self) -> int:
        assert self.shape is not None
        s = self.shape.sizes
        return s.num_layers * self.shape.attention_experts * s.hidden_size * s.num_heads * s.head_dim


def _describe(shape: Shape) -> dict[str, Any]:
    s = shape.sizes
    return {
        "family": shape.family.model_type,
        "block": shape.family.block,
        "layers": s.num_layers,
        **{name: value for name, value in asdict(s).items() if name != "num_layers"},
        "attention": shape.attention,
        "ffn": shape.ffn,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.num_experts_per_tok,
        "attention_num_experts_per_tok": shape.attention_num_experts_per_tok,
    }


def _describe_flops(flops: Flops) -> dict[str, Any]:
    layer, names = flops.layer, ("attention", "ffn", "routers", "total")
    per_layer = {name: getattr(layer, name) for name in names}
    return {
        **per_layer,
        "convention": "forward, one layer, without embeddings and lm_head: BAM (arXiv 2408.08274), Table 7",
        "layers": len(flops.layers),
        "per_layer": {**per_layer, "components": asdict(layer)},
        "context_alternatives": {
            "paper": layer.context,
            "causal_mean": flops.causal_mean,
            "last_token": flops.last_token,
        },
        "whole_model": {
            **{name: flops.model(name) for name in names[:3]},
            "non_embedding": flops.non_embedding,
            "lm_head": flops.lm_head,
            "total": flops.total,
        },
    }


def inspect(model: str | Path | Config, *, context: int | None = None, dtype: str | None = None) -> Accounting:
    """Parameters, FLOPs and memory of a dense model or a mixture, without reading a weight.

    Args:
        model: a checkpoint folder, a config.json, a Hub id (``org/name`` or ``org/name@revision``), or a config. In a
            folder with safetensors weights their headers are counted too, and a difference is among the notices.
        context: tokens that FLOPs and the whole KV cache are for; the model's own positions, at most 4096, if None.
        dtype: of weights and cache, as torch spells it or ``bf16``, ``fp16``, ``fp32``, ``fp8``; the config's (or
            bfloat16) if None.

    Raises:
        CheckpointError: one line, if the model cannot be found, read or counted, or an argument is nonsense.
    """
    folder = None
    if isinstance(model, dict):
        config, name = model, "config"
    else:
        name, path = str(model), _locate(model)
        folder = path if path.is_dir() else None
        config = _read_config(path)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{name}: no model_type: give a transformers model's folder or config.json")

    seed = shape_of(config).seed if config["model_type"] == "branchmix" else config
    if context is None:
        context = min(_max_positions(seed) or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    _check_context(context)
    dtype = _dtype(config, dtype)
    if seed.get("model_type") in FAMILIES:
        return _by_formula(name, config, folder, context, dtype)
    return _by_weights(name, config, folder, context, dtype)


def _by_formula(name: str, config: Config, folder: Path | None, context: int, dtype: str) -> Accounting:
    shape, total = shape_of(config), parameters(config)
    stored, notices = None, []
    if folder is not None and any(folder.glob("*.safetensors")):
        try:
            index = _open_index(folder)
        except BranchMixError as error:
            notices.append(f"weights not counted: {error}")
        else:
            stored = _count_tensors(index, tied=shape.sizes.tied_embeddings, active_experts=None)[0].total
            if stored != total.total:
                notices.append(
                    f"config.json describes {total.total:,} parameters, but the weights hold {stored:,}: "
                    "the numbers are the config's"
                )
    positions = _max_positions(shape.seed)
    if positions is not None and context > positions:
        notices.append(f"a context of {context:,} exceeds the model's {positions:,} positions")
    if shape.attention_num_experts_per_tok and shape.attention_router:
        notices.append(
            f"active counts the {shape.attention_num_experts_per_tok} chosen attention experts; all "
            f"{shape.num_experts} are computed and cached, and the FLOPs and KV bytes say so"
        )
    return Accounting(
        model=name,
        model_type=config["model_type"],
        source="config",
        shape=shape,
        context=context,
        dtype=dtype,
        total=total,
        active=active_parameters(config),
        flops=_flops(shape, context),
        stored=stored,
        notices=tuple(notices),
        **_cache(shape, context, dtype),
    )


def _by_weights(name: str, config: Config, folder: Path | None, context: int, dtype: str) -> Accounting:
    """For families without a formula: counts from the headers, FLOPs where sizes and weights agree."""
    family = str((config.get("seed_config") or config).get("model_type"))
    if folder is None:
        raise CheckpointError(
            f"{name}: no formula for the family {family!r}{nearest(family, [*FACTS])}: "
            "give the checkpoint folder, whose weights can be counted instead"
        )
    index = _open_index(folder)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((config[key] for key in names if isinstance(config.get(key), int) and config[key] > 0), 1)
    chosen = config.get("num_experts_per_tok", 1)
    fraction = (chosen, experts) if isinstance(chosen, int) and 0 < chosen <= experts else (1, 1)
    seed = config.get("seed_config") or config
    total, active, matrices = _count_tensors(
        index, tied=bool(seed.get("tie_word_embeddings", False)), active_experts=fraction
    )
    notices = [f"no formula for the family {family!r}: counted from the weights, stored buffers included"]
    try:
        shape: Shape | None = shape_of(config)
    except CheckpointError:
        shape = None
    flops = None
    if shape is not None:
        if not any(".gate_proj" in tensor or "gate_up" in tensor for tensor in index.tensors):
            shape = replace(shape, family=replace(shape.family, gate=None))
        flops = _flops(shape, context)
        ffn = flops.model("ffn") // min(shape.num_experts_per_tok, shape.ffn_experts) * shape.ffn_experts
        expected = (flops.model("qkv") + flops.model("output"), ffn)
        if expected != (2 * matrices["attention"], 2 * matrices["ffn"]):
            shape = flops = None
    if flops is None:
        notices.append("FLOPs and KV cache unknown: the weights are not those of plain attention and FFN layers")
    return Accounting(
        model=name,
        model_type=config["model_type"],
        source="weights",
        shape=shape,
        context=context,
        dtype=dtype,
        total=total,
        active=active,
        flops=flops,
        stored=total.total,
        notices=tuple(notices),
        **(_cache(shape, context, dtype) if shape else {"kv_cache_bytes_per_token": None, "kv_cache_bytes": None}),
    )


def _cache(shape: Shape, context: int, dtype: str) -> dict[str, Any]:
    layer = _kv_bytes_per_layer(shape, dtype)
    held = sum(context if window is None else min(context, window) for window in _windows(shape))
    return {"kv_cache_bytes_per_token": shape.sizes.num_layers * layer, "kv_cache_bytes": held * layer}


# A tensor's part of the model by its name, first match; and buffers that some checkpoints store.
_PART_PATTERNS = {
    "routers": r"expert_gate|router|\.gate\.weight$",
    "norms": r"norm|\.ln_",
    "lm_head": r"lm_head|embed_out",
    "embeddings": r"embed|\.wte|\.wpe",
    "ffn": r"\.(mlp|feed_forward|ffn|block_sparse_moe|experts)\.|\.(fc1|fc2)\.",
    "attention": r"attn|attention",
    "other": r"",
}
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias))$")


def _count_tensors(
    index: CheckpointIndex, *, tied: bool, active_experts: tuple[int, int] | None
) -> tuple[ParameterCounts, ParameterCounts, dict[str, int]]:
    """Stored parameters by part: all; those active when k of N ``active_experts`` are; and those in matrices."""
    total, active, matrices = (dict.fromkeys(_PART_PATTERNS, 0) for _ in range(3))
    chosen, experts = active_experts or (1, 1)
    has_embeddings = any(re.search(_PART_PATTERNS["embeddings"], name) for name in index.tensors)
    for name, ref in index.tensors.items():
        part = next(part for part, pattern in _PART_PATTERNS.items() if re.search(pattern, name))
        if _BUFFERS.search(name) or (part == "lm_head" and tied and has_embeddings and name.endswith("weight")):
            continue
        elements = math.prod(ref.shape)
        total[part] += elements
        active[part] += elements * chosen // experts if ".experts." in name else elements
        matrices[part] += elements if len(ref.shape) > 1 and not name.endswith("bias") else 0
    return ParameterCounts(**total), ParameterCounts(**active), matrices


def _open_index(folder: Path) -> CheckpointIndex:
    from branchmix.checkpoint.index import CheckpointIndex

    return CheckpointIndex.open(folder)


def _locate(model: str | Path) -> Path:
    """The folder or file meant by a path or a Hub id."""
    path = Path(model).expanduser()
    if path.exists():
        return path
    if isinstance(model, Path) or path.suffix == ".json" or "/" not in model or path.parent.exists():
        raise CheckpointError(f"{model}: no such file or folder, and no Hub id (org/name)")
    from branchmix.checkpoint.hub import resolve

    return resolve(model).folder


def _read_config(path: Path) -> Config:
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no config.json in it: give a transformers checkpoint folder") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file}: not JSON: give a checkpoint folder or its config.json") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: not a config: expected a JSON object") from None
    return config

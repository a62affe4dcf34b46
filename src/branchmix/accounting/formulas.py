"""Parameters, FLOPs and KV-cache bytes of a config (BAM, arXiv 2408.08274, Tables 7, 9 and 10)."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from branchmix.accounting.shape import Shape, shape_of
from branchmix.checkpoint.families import Config, entry_of, nearest
from branchmix.checkpoint.index import DTYPE_ALIASES, dtype_name
from branchmix.errors import CheckpointError

MOST_LAYERS = 10_000
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1}


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
    stitches: int = 0
    """What joins whole models (BTS)."""
    other: int = 0
    """Only when counted from weights: tensors whose part cannot be determined by name."""

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(asdict(self).values())


def parameters(config: Config) -> ParameterCounts:
    """Parameters of the whole model (Table 9's "total"), exact for every family of the table.

    Raises:
        CheckpointError: the config does not describe a model, or its family has no formula.
    """
    shape = shape_of(config)
    ffns = shape.ffn_experts + shape.shared_experts
    return _count(shape, shape.attention_experts, shape.kv_experts, ffns, heads=shape.heads)


def active_parameters(config: Config) -> ParameterCounts:
    """Parameters that a token uses (Table 9's "active"): k FFN experts, all of soft attention, both whole routers.

    With top-k attention these are the queries and outputs of the k chosen attention experts, and the keys and values of
    all: any later token may choose another expert. Embeddings count in full, as in the paper; of a trunk with experts
    so do all embeddings and norms, and one head.
    """
    return _active(shape_of(config))


def _active(shape: Shape) -> ParameterCounts:
    ffn_experts = min(shape.num_experts_per_tok, shape.ffn_experts) + shape.shared_experts
    return _count(shape, shape.active_attention_experts, shape.kv_experts, ffn_experts)


def _count(shape: Shape, attention_experts: int, kv_experts: int, ffn_experts: int, heads: int = 1) -> ParameterCounts:
    """Parameters of a model with the given numbers of copies of q/o, of k/v and of the FFN in each layer, and heads."""
    s, facts, has = shape.sizes, shape.facts, shape.has
    d, q_width, kv_width = s.hidden_size, s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim

    of_seed = bool(shape.expert_ranks)  # matrices that are there once, whatever the number of experts
    own_attention, own_kv = (1, 1) if of_seed else (attention_experts, kv_experts)
    own_ffn = 1 + shape.shared_experts if of_seed else ffn_experts
    attention = 2 * d * (own_attention * q_width + own_kv * kv_width)
    attention += attention_experts * (q_width * has(facts.qkv_bias) + d * has(facts.out_bias))
    attention += kv_experts * 2 * kv_width * has(facts.qkv_bias)

    num_up = 2 if shape.family.gate else 1
    inner = s.intermediate_size
    ffn_biases = num_up * inner + d if has(facts.ffn_bias) else 0
    ffn = own_ffn * (num_up + 1) * d * inner + ffn_experts * ffn_biases
    routed, layers = ffn_experts - shape.shared_experts, range(s.num_layers if of_seed else 0)
    factors = [_factors(shape, layer, attention_experts, routed) for layer in layers]

    norm = d * (has(facts.norm_gain) + has(facts.norm_bias))
    in_front = {shape.family.attention_input_norm, shape.family.ffn_input_norm} - {None}
    trunks, folded = shape.trunk_experts, len(in_front.intersection(shape.folded_norms))
    block_norms = trunks * (len(in_front) - folded + facts.post_norms) + folded
    qk_norm = 0
    if has(facts.qk_norm):
        q_size, k_size = (s.head_dim, s.head_dim) if shape.family.norm_over == "head" else (q_width, kv_width)
        qk_norm = (attention_experts * q_size + kv_experts * k_size) * (1 + facts.qk_norm_bias)
    final_norm = all(bool(shape.seed.get(key, wanted)) == wanted for key, wanted in facts.final_norm_needs.items())

    token_width, projections = _embedding_widths(shape)
    positions = 0
    if facts.positions_offset is not None:
        positions = ((configured_positions(shape.seed) or 0) + facts.positions_offset) * d
    return ParameterCounts(
        embeddings=trunks * (s.vocab_size * token_width + positions + projections),
        lm_head=heads * ((0 if s.tied_embeddings else s.vocab_size * token_width) + facts.head_bias * s.vocab_size),
        attention=s.num_layers * attention + sum(qkv + output for qkv, output, _ in factors),
        ffn=s.num_layers * (ffn + shape.streams * facts.activation_parameters)
        + sum(of_ffn for _, _, of_ffn in factors),
        norms=s.num_layers * (block_norms * norm + qk_norm) + trunks * final_norm * norm,
        routers=s.num_layers * len(shape.routers) * shape.router_parameters + shape.document_gate_parameters,
        stitches=sum(shape.stitch_parameters(layer) for layer, _ in enumerate(shape.stitches)),
    )


def _factors(shape: Shape, layer: int, attention_experts: int, ffn_experts: int) -> tuple[int, int, int]:
    """Elements of the factors of so many experts' changes in a layer: of q, k and v, of o, and of the FFN."""
    qkv = shape.factors(layer, "q", attention_experts) + shape.factors(layer, "k v")
    return qkv, shape.factors(layer, "o", attention_experts), shape.factors(layer, "gate up down", ffn_experts)


def _embedding_widths(shape: Shape) -> tuple[int, int]:
    """Width of token embeddings and lm_head, and elements of the two projections between it and d (OPT only)."""
    width = shape.sizes.hidden_size
    token_width = int(shape.seed.get("word_embed_proj_dim") or width)
    return token_width, 2 * token_width * width if token_width != width else 0


def configured_positions(config: Config) -> int | None:
    """Positions that a config.json says the model was made for, with the defaults of families that have tables."""
    default = entry_of(config).defaults.get("n_positions")
    value = config.get("max_position_embeddings", config.get("n_positions", default))
    return value if isinstance(value, int) and value > 0 else None


def table_positions(config: Config) -> int | None:
    """Positions that a dense model or a mixture looks up in a table, learned (GPT-2, OPT) or computed once (GPT-J): its
    longest sequence. None: it computes them as they come."""
    seed = config.get("seed_config") or config
    return configured_positions(seed) if entry_of(seed).rotary != "half" else None


def notices_of_positions(config: Config, context: int) -> list[str]:
    """What to tell of so many tokens at once, if a dense model or a mixture was made for fewer."""
    positions = configured_positions(config.get("seed_config") or config)
    if positions is None or context <= positions:
        return []
    return [f"a context of {context:,} exceeds the model's {positions:,} positions"]


@dataclass(frozen=True)
class LayerFlops:
    """Forward FLOPs of one token in one layer (Tables 7 and 10). A multiply-add is 2; norms, biases, activations,
    rotary positions and softmax are not counted."""

    qkv: int
    """2d(NH + 2NK)D, with one k and v for Shared KV: the paper's 6Nd^2. With top-k attention the H query heads, here
    and below, are those of k experts; keys and values are of all N. Experts that are changes of the seed: 2d(H + 2K)D,
    and 2r(inputs + outputs) for each matrix of each of these experts; so for output and FFN."""
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
    stitch: int = 0
    """The stitch behind the layer, if any: twice its parameters."""

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
        """Attention, FFN, routers and stitch: Table 7's "total FLOPs", whose FFN term the paper prints larger."""
        return self.attention + self.ffn + self.routers + self.stitch


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one token, of all matrix products."""

    layer: LayerFlops
    """One layer of full attention: the convention of Table 7."""
    layers: tuple[LayerFlops, ...]
    """Every layer; they differ where some attend through a sliding window shorter than the context."""
    lm_head: int
    """2 d vocabulary (and OPT's embedding projections, of each trunk); the embedding lookup is free."""
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

    With top-k attention, queries, context and outputs are those of the k chosen experts, as the model computes them
    wherever that is faster than computing all N and multiplying N - k by zero. Keys and values are those of all.

    Raises:
        CheckpointError: ``context`` is not positive, the config does not describe a model, or there is no formula.
    """
    check_context(context)
    shape = shape_of(config)
    shape.facts  # noqa: B018  refuses a family whose FFN and attention are guesses
    return flops_of(shape, context)


def flops_of(shape: Shape, context: int) -> Flops:
    s = shape.sizes
    d, q_width, kv_width = s.hidden_size, s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
    wide = shape.active_attention_experts * q_width
    ffn_experts, of_seed = min(shape.num_experts_per_tok, shape.ffn_experts), bool(shape.expert_ranks)
    own_wide, own_kv, own_ffn = (q_width, 1, 1) if of_seed else (wide, shape.kv_experts, ffn_experts)

    def layer(number: int, window: int | None) -> LayerFlops:
        # Keys seen by all n tokens together, doubled: n^2 of a causal triangle, less what lies outside the window.
        keys = context**2 - max(context - (window or context), 0) ** 2
        qkv, output, ffn = _factors(shape, number, shape.active_attention_experts, ffn_experts)
        matrices = 3 if shape.family.gate else 2
        return LayerFlops(
            qkv=2 * (d * (own_wide + 2 * own_kv * kv_width) + qkv),
            context=2 * wide * keys // context,
            output=2 * (own_wide * d + output),
            ffn=2 * ((own_ffn + shape.shared_experts) * matrices * d * s.intermediate_size + ffn),
            attention_router=2 * d * shape.num_experts * shape.has_attention_experts,
            ffn_router=2 * d * shape.num_experts * shape.has_ffn_experts,
            stitch=2 * shape.stitch_parameters(number),
        )  # fmt: skip

    token_width, projections = _embedding_widths(shape)
    return Flops(
        layer=layer(0, None),
        layers=tuple(layer(number, window) for number, window in enumerate(windows(shape))),
        lm_head=2 * (token_width * s.vocab_size + shape.trunk_experts * projections),
        causal_mean=2 * (context + 1) * wide,
        last_token=4 * context * wide,
    )


def windows(shape: Shape) -> list[int | None]:
    """The size of each layer's sliding window, or None for full attention, by transformers' own rules.

    Raises CheckpointError for more layers than any model has, which would take gigabytes to list.
    """
    seed, num_layers = shape.seed, shape.sizes.num_layers
    if num_layers > MOST_LAYERS:
        raise CheckpointError(f"config.json: num_hidden_layers is {num_layers:,}, more than any model has")
    facts = shape.family
    window = seed.get("sliding_window", facts.window)
    switched_off = facts.windowed == "never" or (facts.window_switch and not seed.get(facts.window_switch))
    if not isinstance(window, int) or switched_off:
        return [None] * num_layers
    kinds = seed.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == num_layers:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    every = seed.get("sliding_window_pattern")
    every = every if isinstance(every, int) and every > 0 else facts.full_every
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
        CheckpointError: the config does not describe a model, or ``dtype`` is unknown.
    """
    shape = shape_of(config)
    return shape.sizes.num_layers * kv_bytes_per_layer(shape, dtype_of(config, dtype))


def kv_bytes_per_layer(shape: Shape, dtype: str) -> int:
    return 2 * shape.kv_experts * shape.sizes.num_kv_heads * shape.sizes.head_dim * DTYPE_BYTES[dtype]


def decoding_bytes(shape: Shape, context: int, dtype: str) -> int:
    """Bytes of weights and cached keys and values that generating one token of one sequence reads, exact for matrices.

    Weights: all active parameters but the tables that are only looked up in (embeddings that are not also lm_head, and
    the evidence of document gates). Cache: ``context`` tokens before it, in layers with a window at most the window; of
    Expert KV with top-k attention, the k chosen experts' keys and values.
    """
    active = _active(shape)
    token_width, _ = _embedding_widths(shape)
    looked_up = active.embeddings - (shape.sizes.vocab_size * token_width if shape.sizes.tied_embeddings else 0)
    weights = active.total - looked_up - len(shape.domains) * shape.sizes.vocab_size
    tokens = sum(context if size is None else min(context, size) for size in windows(shape))
    copies = min(shape.active_attention_experts, shape.kv_experts)
    cache = tokens * kv_bytes_per_layer(shape, dtype) // shape.kv_experts * copies
    return weights * DTYPE_BYTES[dtype] + cache


def dtype_of(config: Config, dtype: str | None) -> str:
    """The dtype asked for, or (if ``auto``) the config's, or bfloat16, as torch spells it."""
    seed = config["seed_config"] if isinstance(config.get("seed_config"), dict) else {}
    wanted = dtype if dtype != "auto" else None
    given = wanted or next((c[key] for c in (config, seed) for key in ("dtype", "torch_dtype") if c.get(key)), None)
    if not isinstance(given, str):
        return "bfloat16"
    name = dtype_name(given)
    if name not in DTYPE_BYTES:
        known = [*DTYPE_BYTES, *DTYPE_ALIASES]
        raise CheckpointError(f"unknown dtype {given!r}{nearest(name, known)}: give one of {', '.join(DTYPE_BYTES)}")
    return name


def check_context(context: int) -> None:
    if type(context) is not int or context <= 0:
        raise CheckpointError(f"context is {context!r}, not a positive number of tokens")

"""What each transformers family calls its parts and is made of, read by planner, accounting, export and models.

``families.yaml`` has an entry for every family, and says which cannot be a seed. Code asks ``family_of(config)`` and
never compares model types.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

from branchmix.errors import CheckpointError, short

Config = dict[str, Any]
Flag = bool | tuple[str, bool]
"""A fact of the family, or the config key that decides and transformers' default for it."""


@dataclass(frozen=True)
class Family:
    """Where one family keeps what an upcycler touches. Paths are those of the causal LM's state dict.

    The defaults are Llama's, which most families since follow.
    """

    model_type: str
    layers: str = "model.layers"
    """Path of the list of blocks."""
    attention: str = "self_attn"
    """Attention module of a block."""
    ffn: str = "mlp"
    """Module of a block that the mixture of FFN experts replaces."""
    embeddings: str = "model.embed_tokens"
    """Token embeddings, which the output layer may share."""

    # Attention projections, below ``attention``. Either query/key/value or one fused matrix.
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    fused_qkv: str | None = None
    """Name of the fused projection; ``query``, ``key`` and ``value`` are then not used."""
    qkv_layout: Literal["blocks", "heads", "groups", "shards"] = "blocks"
    """Rows of ``fused_qkv``: all q, then k, then v; [H, 3, head_dim]; [K, H/K + 2, head_dim] (Falcon); or four parts
    of a quarter of q, v and k each (CodeGen)."""
    query_norm: str | None = None
    key_norm: str | None = None
    norm_over: Literal["head", "heads", "all"] = "head"
    """Query/key norm: one gain of [head_dim] for all heads, one for each head, or one over [H * head_dim]."""
    norm_axis: int = -2
    """Axis of the heads where the norm is applied: -2 for [B, T, H, D], -3 for [B, H, T, D]."""
    attention_code: Literal["family", "split"] = "family"
    """``family``: the family's own attention class is widened. ``split``: its projections are fused or its code
    knows no grouped queries, so the mixture computes the heads itself from separate projections."""
    rotary: Literal["half", "interleaved", "none"] = "half"
    """Rotary variant, needed for ``split`` only."""
    plain_attention: bool = False
    """The attention class does nothing that ``split`` cannot, so experts may have rotary bases of their own."""

    # FFN projections, as paths below the *block*.
    gate: str | None = "mlp.gate_proj"
    """None: a plain FFN, down(act(up(x)))."""
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    fused_gate_up: str | None = None
    """Name of a matrix with the gate's rows first, then those of ``up``."""
    activation: str = "mlp.act_fn"
    """The activation module, a path below the block."""
    transposed: bool = False
    """Linear layers are GPT-2's Conv1D: weights of [in, out]."""

    # Norms right before attention and FFN, for norm folding. None: there is none (post-norm families).
    attention_input_norm: str | None = "input_layernorm"
    ffn_input_norm: str | None = "post_attention_layernorm"
    gain_offset: float = 0.0
    """Added to the stored gain (Gemma stores gain - 1)."""

    block: Literal["sequential", "parallel"] = "sequential"
    """How attention and FFN are joined, unless ``variant`` says otherwise."""

    # What the config decides.
    inner_size: str = "intermediate_size"
    """Config key of the FFN's inner width."""
    kv_heads: str | int | None = "num_key_value_heads"
    """Config key of the number of key/value heads, or that number. None: as many as query heads."""
    four_times_wide: bool = False
    """The inner width, where the config does not give it, is four times the model's width."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """transformers' values for keys that config.json files leave out. A ``rope_local_base_freq`` among them is the base
    of layers with a sliding window, which rotate differently from the others; ``n_positions`` are those of families
    that look them up in a table."""
    variants: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]] = ()
    """Where the config has all of these values, these fields are others; each in turn."""
    renamed_rope_types: Mapping[str, str] = field(default_factory=dict)
    """Rope types that the family's config class takes for another one."""
    old_rope_keys: tuple[str, str] = ("rope_theta", "partial_rotary_factor")
    """Keys of the base and of the rotated part of a head, beside the rotary parameters."""

    # What parameters and FLOPs are counted from, beside names and sizes.
    qkv_bias: Flag = False
    out_bias: Flag = False
    ffn_bias: Flag = False
    head_bias: bool = False
    """lm_head has a bias."""
    activation_parameters: int = 0
    """Parameters of a layer's activation. All experts of a mixture share them: they are merged as norms are."""
    norm_gain: Flag = True
    norm_bias: Flag = False
    post_norms: int = 0
    """Norms of a block after attention and FFN, in addition to those before them."""
    qk_norm: Flag = False
    """Whether there are the norms that ``query_norm`` and ``key_norm`` name."""
    qk_norm_bias: bool = False
    final_norm_needs: Mapping[str, bool] = field(default_factory=dict)
    """Config keys that must have (or default to) these values for a final norm to exist."""
    positions_offset: int | None = None
    """Number of extra rows of learned position embeddings; None: no learned positions."""
    window: int | None = None
    """Default of ``sliding_window``: keys that a query sees, itself included."""
    window_switch: str | None = None
    """Config key without which ``sliding_window`` is ignored."""
    windowed: Literal["never", "all", "late", "most", "no_rope"] = "never"
    """Layers with a window when the config lists no ``layer_types``: none, whatever ``sliding_window`` says; all; those
    from ``max_window_layers`` on; all but every ``full_every``-th; or those without rotary positions."""
    full_every: int = 1

    # What export to a class with experts compares, as far as tensors do not say it. None: no class is known to fit.
    native_norms: str | None = None
    """``pre`` or ``post``: RMS norms before or behind attention and FFN; ``layer``: LayerNorms; or in words."""
    native_qk_norms: Literal["none", "head", "wide"] = "none"
    special: str | None = None
    """What no class with experts has."""

    inferred: bool = False
    """True when no entry exists and the names were taken to be the standard ones."""

    def routers(self, *, attention: bool, ffn: bool, shared: bool) -> dict[str, str]:
        """Names of a mixture's routers, below the block, by kind; ``shared``: one router weighs both kinds."""
        names = {"attention": f"{self.attention}.expert_gate.weight"} if attention and not shared else {}
        return names | ({"ffn": f"{self.ffn}.gate.weight"} if ffn else {})


Entry = TypeVar("Entry")


def read_table(file: Path) -> dict[str, Any]:
    """The content of a YAML file of the package."""
    import yaml  # here, since `branchmix --help` does without

    return dict(yaml.load(file.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


@cache
def _table() -> dict[str, dict[str, Any]]:
    return read_table(Path(__file__).with_name("families.yaml"))


def entries(section: str, kind: Callable[..., Entry]) -> dict[str, Entry]:
    """The entries of a section of ``families.yaml``, by model type."""
    return {
        name: kind(name, **{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})
        for name, fields in _table()[section].items()
    }


@cache
def families() -> dict[str, Family]:
    """All entries of the table, by model type."""
    return entries("families", Family)


def entry_of(config: Config) -> Family:
    """The table's entry for a config, whatever its variant and even if it cannot be a seed; Llama's names if none."""
    model_type = str(config.get("model_type"))
    if model_type in families():
        return families()[model_type]
    norms: dict[str, Any] = {"attention_input_norm": None, "ffn_input_norm": None}
    return Family(model_type, **norms, windowed="all", defaults=_table()["defaults"].get(model_type, {}), inferred=True)


def model_type_of(config: Config, where: str | Path = "config.json") -> str:
    """The family that a config names; raises CheckpointError, which says ``where``, if it names none."""
    model_type = config.get("model_type")
    if not model_type or not isinstance(model_type, str):
        lacks = f"model_type {json.dumps(model_type)}, which is not a name" if model_type else "no model_type"
        raise CheckpointError(f"{where} has {lacks}: give a transformers checkpoint of a causal language model")
    return model_type


def family_of(config: Config) -> Family:
    """The table entry of a seed's ``config.json``, or Llama's names for a family that has none.

    Raises CheckpointError if the config names no family, or one that cannot be a seed.
    """
    if model_type_of(config) == "branchmix":
        raise CheckpointError("the model is a mixture already: use add-expert or remove-expert to change its experts")
    reason = why_unfit(config)
    if reason is not None:
        raise CheckpointError(reason)
    family = entry_of(config)
    values = {**family.defaults, **config}
    for when, fields in family.variants:
        given = ((values.get(key), wanted) for key, wanted in when.items())
        if all((bool(value) if isinstance(wanted, bool) else value) == wanted for value, wanted in given):
            family = replace(family, **fields)
    return family


def layout_of(family: Family, *, per_expert_rotary: bool = False) -> dict[str, Any]:
    """The names that the model's code needs, for ``BranchMixConfig.layout``.

    They travel in the checkpoint's own config, so that the code beside it stays free of tables.
    """
    layout = {name: getattr(family, name) for name in _LAYOUT}
    return {**layout, "attention_code": "split"} if per_expert_rotary else layout


_LAYOUT = (
    "layers attention ffn query key value output fused_qkv query_norm key_norm norm_over norm_axis attention_code "
    "rotary gate up down fused_gate_up activation"
).split()


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a dense model, from its config alone."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied_embeddings: bool


LARGEST_SIZE = 2**31 - 1
"""What a config may say of any size of a model."""


def matrix_shapes(sizes: Dimensions) -> dict[str, tuple[int, int]]:
    """[O, I] of one expert's matrices in a layer, by the names of ``expert_ranks``."""
    width, inner = sizes.hidden_size, sizes.intermediate_size
    query, key = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    attention = {"q": (query, width), "k": (key, width), "v": (key, width), "o": (width, query)}
    return attention | {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}


def dimensions(config: Config) -> Dimensions:
    """Sizes of the dense model that ``config`` describes, under whatever names its family uses.

    Raises CheckpointError for a size that is missing, not a positive integer, or larger than that of any model.
    """

    def size(*names: str, default: int | None = None) -> int:
        for name in names:
            value = config.get(name)
            if value is not None:
                if type(value) is not int or value <= 0:
                    raise CheckpointError(f"config.json: {name} is {short(value)}, not a positive whole number")
                if value > LARGEST_SIZE:
                    raise CheckpointError(f"config.json: {name} is {short(value)}, more than {LARGEST_SIZE:,}")
                return value
        if default is None and family.inferred:
            raise CheckpointError(
                f"{family.model_type} is not in the table of families, and its config has no {names[0]} as Llama's "
                "has, so it cannot be widened"
            )
        if default is None:
            raise CheckpointError(f"config.json has no {names[0]}: is it the config of a causal language model?")
        return default

    family = family_of(config)
    hidden_size = size("hidden_size", "n_embd", "d_model")
    num_heads = size("num_attention_heads", "n_head", "num_heads", "attention_heads")
    if isinstance(family.kv_heads, str):
        missing = family.kv_heads not in config  # null means "as many as query heads"
        default_kv_heads = family.defaults.get("num_key_value_heads", num_heads) if missing else num_heads
        num_kv_heads = size(family.kv_heads, default=default_kv_heads)
    else:
        num_kv_heads = family.kv_heads or num_heads
    four_times = 4 * hidden_size if family.four_times_wide else None
    return Dimensions(
        num_layers=size("num_hidden_layers", "n_layer", "num_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=size("head_dim", default=family.defaults.get("head_dim", hidden_size // num_heads)),
        intermediate_size=size(family.inner_size, "ffn_hidden_size", "n_inner", "ffn_dim", default=four_times),
        vocab_size=size("vocab_size"),
        tied_embeddings=is_tied(config),
    )


def is_tied(config: Config) -> bool:
    """Whether ``config`` of a dense model says that the output layer is the token embeddings."""
    return bool(config.get("tie_word_embeddings", entry_of(config).defaults.get("tie_word_embeddings", False)))


def squares_activation(config: Config) -> bool:
    """Whether a dense model's FFN has the square of a ReLU, by its config or its family's default."""
    return bool(config.get("hidden_act", entry_of(config).defaults.get("hidden_act")) == "relu2")


def is_head(name: str) -> bool:
    """Whether a tensor or module is (in) the output layer, from its name in a dense model."""
    return name.split(".")[0] in ("lm_head", "embed_out", "output_projection")


def nearest(word: str, choices: list[str] | tuple[str, ...]) -> str:
    """`` (did you mean 'x'?)`` for the closest of ``choices``, or nothing."""
    close = get_close_matches(word, choices, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# ---- Models that cannot be a seed. Kinds are recognised by keys of the config, so that families which appear later get
# the right reason too; the table has those that no key reveals. ----

_CAUSAL = "seed and experts must be causal language models without an encoder"
_LATENT = "compresses keys and values in its attention (latent attention), which has no heads to put side by side"
_SOFTMAX_LAYERS = {"full_attention", "sliding_attention", "attention"}


def why_unfit(config: Config) -> str | None:
    """Why the model of a ``config.json`` can be neither seed nor expert, in one line; None if nothing rules it out."""
    model_type = str(config.get("model_type"))
    unfit = _table()["unfit"]
    if model_type in unfit:
        return f"{model_type} {unfit[model_type]}"
    text = config.get("text_config")
    if isinstance(text, dict) and "hidden_size" not in config:
        return _multimodal(model_type, text)
    reasons = {
        "is a mixture of experts already: seed and experts must be dense models": has_experts(config),
        f"is an encoder-decoder: {_CAUSAL}": config.get("is_encoder_decoder"),
        f"is one half of an encoder-decoder: {_CAUSAL}": any(
            key.startswith(("encoder_", "decoder_l")) for key in config
        ),
        f"has cross-attention, which reads what an encoder has read: {_CAUSAL}": (
            config.get("add_cross_attention") or config.get("cross_attention_layers")
        ),
        _hybrid(config): bool(_hybrid(config)),
        _LATENT: config.get("kv_lora_rank"),
        unfit["bloom"]: config.get("alibi") or _mapping(config, "attn_config").get("alibi"),
        unfit["bert-generation"]: "type_vocab_size" in config,
    }
    return next((f"{model_type} {reason}" for reason, holds in reasons.items() if holds), None)


def has_experts(config: Config) -> bool:
    """Whether it is the config of a mixture of experts, ours or another; one expert alone is dense."""
    if config.get("is_moe") is False:
        return False
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    config = {**_mapping(config, "ffn_config"), **config}
    counts = [config[name] for name in names if isinstance(config.get(name), int)]
    return any(count > 1 for count in counts) if counts else bool(config.get("moe_intermediate_size"))


def why_bidirectional(config: Config) -> str | None:
    """The key of a config that lets tokens see later ones, with its value; None: the model is causal."""
    if config.get("is_causal") is False:
        return "is_causal: false"
    asked = config.get("use_bidirectional_attention")
    return f"use_bidirectional_attention: {str(asked).lower()}" if asked in (True, "all") else None


def _hybrid(config: Config) -> str:
    """Layers that are not softmax attention, by the list of layers or, where there is none, by their settings."""
    kinds = config.get("layer_types") or config.get("layers_block_type") or []
    if kinds:
        others = sorted({str(kind) for kind in kinds} - _SOFTMAX_LAYERS) if isinstance(kinds, list) else []
        words = " and ".join(others)
        return f"has {words} layers: every layer of seed and experts must have softmax attention" if others else ""
    signs = ("mamba_", "ssm_", "conv_L_", "linear_conv_", "lru_", "mamba2_")
    recurrent = "state_size" in config or any(key.startswith(signs) for key in config)
    return str(_table()["unfit"]["rwkv"]) if recurrent else ""


def _multimodal(model_type: str, text: Config) -> str:
    inner = text.get("model_type")
    if not isinstance(inner, str):
        return f"{model_type} is a multimodal model: save its text part as a causal language model, and give that"
    if (reason := why_unfit(text)) is not None:
        return f"{model_type} is a multimodal model, and its text part cannot be widened either: {reason}"
    if not transformers_knows(inner):
        return (
            f"{model_type} is a multimodal model, whose text part, {inner}, has no causal language model of its own in "
            "transformers: convert the text part to a family that has one"
        )
    return (
        f"{model_type} is a multimodal model, whose text part is {inner}: save the text part alone, as "
        "docs/families.md shows, and give that"
    )


@cache
def transformers_knows(model_type: str) -> bool:
    """Whether it has a causal language model: looked up in the text of its own table, which takes no seconds."""
    spec = find_spec("transformers")
    places = spec.submodule_search_locations if spec is not None else None
    table = Path(next(iter(places or ()), "")) / "models" / "auto" / "modeling_auto.py"
    text = table.read_text(encoding="utf-8") if table.is_file() else ""
    start = text.find("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = ")
    return start < 0 or f'("{model_type}", ' in text[start : text.find("\n)", start)]


def _mapping(config: Config, key: str) -> Config:
    value = config.get(key)
    return value if isinstance(value, dict) else {}

"""What each transformers family calls its parts: names as data, read by the planner, the accounting and the models.

A new family is one entry of ``FAMILIES`` and one line in ``tests/families.py``. Code asks ``family_of(config)`` and
never compares model types. Imports nothing but the standard library.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal

from branchmix.errors import CheckpointError, short

Config = dict[str, Any]


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

    # Attention projections, below ``attention``. Either query/key/value or one fused matrix.
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    fused_qkv: str | None = None
    """Name of the fused projection; ``query``, ``key`` and ``value`` are then not used."""
    qkv_layout: Literal["blocks", "heads", "groups"] = "blocks"
    """Rows of ``fused_qkv``: all q, then k, then v; [H, 3, head_dim]; or [K, H/K + 2, head_dim] (Falcon)."""
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

    block: Literal["sequential", "parallel", "config"] = "sequential"
    """``config``: a flag of the config decides (see ``block_kind``)."""
    inferred: bool = False
    """True when no entry exists and the names were taken to be the standard ones."""


_GPT2_NAMES: dict[str, Any] = {
    "layers": "transformer.h",
    "attention": "attn",
    "attention_input_norm": "ln_1",
    "ffn_input_norm": "ln_2",
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", plain_attention=True),
        Family("mistral", plain_attention=True),
        Family("ministral"),
        Family("qwen2", plain_attention=True),
        Family("qwen3", query_norm="q_norm", key_norm="k_norm", plain_attention=True),
        Family("gemma", gain_offset=1.0),
        Family("gemma2", ffn_input_norm="pre_feedforward_layernorm", gain_offset=1.0),
        Family(
            "gemma3_text",
            query_norm="q_norm",
            key_norm="k_norm",
            norm_axis=-3,
            ffn_input_norm="pre_feedforward_layernorm",
            gain_offset=1.0,
        ),
        Family("olmo"),
        Family(
            "olmo2",
            query_norm="q_norm",
            key_norm="k_norm",
            norm_over="all",
            attention_input_norm=None,
            ffn_input_norm=None,
        ),
        Family(
            "olmo3",
            query_norm="q_norm",
            key_norm="k_norm",
            norm_over="all",
            attention_input_norm=None,
            ffn_input_norm=None,
        ),
        Family(
            "cohere",
            query_norm="q_norm",
            key_norm="k_norm",
            norm_over="heads",
            ffn_input_norm="input_layernorm",
            block="parallel",
        ),
        Family("cohere2", ffn_input_norm="input_layernorm", block="parallel"),
        Family(
            "phi",
            output="dense",
            query_norm="q_layernorm",
            key_norm="k_layernorm",
            norm_axis=-3,
            gate=None,
            up="mlp.fc1",
            down="mlp.fc2",
            activation="mlp.activation_fn",
            ffn_input_norm="input_layernorm",
            block="parallel",
        ),
        Family(
            "phi3",
            fused_qkv="qkv_proj",
            attention_code="split",
            plain_attention=True,
            fused_gate_up="mlp.gate_up_proj",
            activation="mlp.activation_fn",
        ),
        Family(
            "gpt_neox",
            layers="gpt_neox.layers",
            attention="attention",
            fused_qkv="query_key_value",
            qkv_layout="heads",
            output="dense",
            attention_code="split",
            plain_attention=True,
            gate=None,
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
            activation="mlp.act",
            block="config",
        ),
        Family(
            "gptj",
            output="out_proj",
            attention_code="split",
            rotary="interleaved",
            gate=None,
            up="mlp.fc_in",
            down="mlp.fc_out",
            activation="mlp.act",
            block="parallel",
            **{**_GPT2_NAMES, "ffn_input_norm": "ln_1"},
        ),
        Family(
            "gpt2",
            fused_qkv="c_attn",
            output="c_proj",
            attention_code="split",
            rotary="none",
            gate=None,
            up="mlp.c_fc",
            down="mlp.c_proj",
            activation="mlp.act",
            transposed=True,
            **_GPT2_NAMES,
        ),
        Family(
            "opt",
            layers="model.decoder.layers",
            output="out_proj",
            attention_code="split",
            rotary="none",
            ffn="fc1",
            gate=None,
            up="fc1",
            down="fc2",
            activation="activation_fn",
            attention_input_norm="self_attn_layer_norm",
            ffn_input_norm="final_layer_norm",
        ),
        Family(
            "falcon",
            layers="transformer.h",
            attention="self_attention",
            fused_qkv="query_key_value",
            qkv_layout="groups",
            output="dense",
            attention_code="split",
            gate=None,
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
            activation="mlp.act",
            block="config",
        ),
        Family(
            "stablelm",
            query_norm="q_layernorm",
            key_norm="k_layernorm",
            norm_over="heads",
            norm_axis=-3,
            block="config",
        ),
        Family(
            "starcoder2",
            gate=None,
            up="mlp.c_fc",
            down="mlp.c_proj",
            activation="mlp.act",
            plain_attention=True,
        ),
        Family("granite", plain_attention=True),
        Family("smollm3"),
        Family("glm", fused_gate_up="mlp.gate_up_proj", activation="mlp.activation_fn"),
        Family("glm4", fused_gate_up="mlp.gate_up_proj", activation="mlp.activation_fn"),
        Family("nemotron", gate=None),
    )
}


def family_of(config: Config) -> Family:
    """The table entry of a seed's ``config.json``, or Llama's names for a family that has none.

    Raises:
        CheckpointError: the config names no family, or one that cannot be a seed.
    """
    model_type = config.get("model_type")
    if not model_type or not isinstance(model_type, str):
        lacks = f"model_type {json.dumps(model_type)}, which is no name" if model_type else "no model_type"
        raise CheckpointError(f"config.json has {lacks}: give a transformers checkpoint of a causal language model")
    if model_type == "branchmix":
        raise CheckpointError("the model is a mixture already: use add-expert or remove-expert to change its experts")
    if has_experts(config):
        raise CheckpointError(f"{model_type} is a mixture of experts already: seed and experts must be dense models")
    if config.get("is_encoder_decoder"):
        raise CheckpointError(f"{model_type} is an encoder-decoder: seed and experts must be causal language models")
    if model_type == "falcon" and config.get("alibi"):
        raise CheckpointError("this Falcon uses ALiBi positions, whose slopes depend on the head count: no recipe fits")
    family = FAMILIES.get(model_type)
    if family is None:
        return Family(model_type, attention_input_norm=None, ffn_input_norm=None, inferred=True)
    if model_type == "falcon":
        family = _falcon(family, config)
    if model_type == "gpt_neox" and config.get("use_parallel_residual", True) is False:
        family = replace(family, block="sequential")
    if model_type == "stablelm" and config.get("use_parallel_residual"):
        family = replace(family, ffn_input_norm="input_layernorm", block="parallel")
    return replace(family, block=block_kind(family))


def has_experts(config: Config) -> bool:
    """Whether it is the config of a mixture of experts, ours or another."""
    counts = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")
    return any(config.get(key) for key in counts)


def _falcon(family: Family, config: Config) -> Family:
    """Falcon's three generations: 40B and 11B (grouped), 7B (one KV head), and the multi-head variant."""
    if config.get("new_decoder_architecture"):
        two_norms = config.get("num_ln_in_parallel_attn") in (None, 2)
        norms = ("ln_attn", "ln_mlp") if two_norms else ("input_layernorm", "input_layernorm")
        return replace(family, attention_input_norm=norms[0], ffn_input_norm=norms[1], block="parallel")
    layout: Literal["blocks", "heads"] = "blocks" if config.get("multi_query", True) else "heads"
    if config.get("parallel_attn", True):
        return replace(family, qkv_layout=layout, ffn_input_norm="input_layernorm", block="parallel")
    return replace(family, qkv_layout=layout, block="sequential")


def block_kind(family: Family) -> Literal["sequential", "parallel"]:
    """How attention and FFN of a block are joined, once the config's flags have been looked at."""
    if family.block == "config":
        return "parallel" if family.model_type == "gpt_neox" else "sequential"
    return family.block


def layout_of(family: Family, *, per_expert_rotary: bool = False) -> dict[str, Any]:
    """The names that the model's code needs, for ``BranchMixConfig.layout``.

    They travel in the checkpoint's own config, so that the code beside it stays free of tables.
    """
    names = {field.name: getattr(family, field.name) for field in fields(family) if field.name in _LAYOUT_FIELDS}
    if per_expert_rotary:
        names["attention_code"] = "split"
    return names


_LAYOUT_FIELDS = {
    "layers",
    "attention",
    "ffn",
    "query",
    "key",
    "value",
    "output",
    "fused_qkv",
    "query_norm",
    "key_norm",
    "norm_over",
    "norm_axis",
    "attention_code",
    "rotary",
    "gate",
    "up",
    "down",
    "fused_gate_up",
    "activation",
}


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


# transformers' defaults for keys that old config.json files leave out.
_HEAD_DIM_DEFAULTS = {"gemma": 256, "gemma2": 256, "gemma3_text": 256, "qwen3": 128, "glm": 128, "glm4": 128}
_KV_HEADS_DEFAULTS = {"mistral": 8, "ministral": 8, "qwen2": 32, "qwen3": 32, "gemma": 16, "gemma2": 4}
_KV_HEADS_DEFAULTS |= {"gemma3_text": 4, "stablelm": 32, "starcoder2": 2, "smollm3": 4, "glm": 2, "glm4": 2}
_FOUR_TIMES_WIDE = {"gpt2", "gptj", "falcon", "opt"}
_TIED_BY_DEFAULT = {
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "opt",
    "falcon",
    "cohere",
    "cohere2",
    "starcoder2",
    "smollm3",
}


LARGEST_SIZE = 2**31 - 1
"""What a config may say of any size of a model."""


def dimensions(config: Config) -> Dimensions:
    """Sizes of the dense model that ``config`` describes, under whatever names its family uses.

    Raises:
        CheckpointError: a size is missing, no positive integer, or larger than any model's.
    """

    def size(*names: str, default: int | None = None) -> int:
        for name in names:
            found = config.get(name)
            if found is not None:
                if isinstance(found, bool) or not isinstance(found, int) or found <= 0:
                    raise CheckpointError(f"config.json: {name} is {short(found)}, not a positive whole number")
                if found > LARGEST_SIZE:
                    raise CheckpointError(f"config.json: {name} is {short(found)}, more than {LARGEST_SIZE:,}")
                return found
        if default is None:
            raise CheckpointError(f"config.json has no {names[0]}: is it the config of a causal language model?")
        return default

    model_type = config.get("model_type", "")
    hidden_size = size("hidden_size", "n_embd", "d_model")
    num_heads = size("num_attention_heads", "n_head", "num_heads")
    if model_type == "falcon":
        grouped = config.get("new_decoder_architecture")
        shared = 1 if config.get("multi_query", True) else num_heads
        num_kv_heads = size("num_kv_heads", default=num_heads) if grouped else shared
    else:
        missing = "num_key_value_heads" not in config  # null means "as many as query heads"
        default_kv_heads = _KV_HEADS_DEFAULTS.get(model_type, num_heads) if missing else num_heads
        num_kv_heads = size("num_key_value_heads", default=default_kv_heads)
    default_head_dim = _HEAD_DIM_DEFAULTS.get(model_type, hidden_size // num_heads)
    return Dimensions(
        num_layers=size("num_hidden_layers", "n_layer", "num_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=size("head_dim", default=default_head_dim),
        intermediate_size=size(
            "intermediate_size",
            "ffn_hidden_size",
            "n_inner",
            "ffn_dim",
            default=4 * hidden_size if model_type in _FOUR_TIMES_WIDE else None,
        ),
        vocab_size=size("vocab_size"),
        tied_embeddings=bool(config.get("tie_word_embeddings", model_type in _TIED_BY_DEFAULT)),
    )


def nearest(word: str, choices: list[str] | tuple[str, ...]) -> str:
    """`` (did you mean 'x'?)`` for the closest of ``choices``, or nothing."""
    close = get_close_matches(word, choices, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""

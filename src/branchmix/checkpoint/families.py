"""What each transformers family calls its parts: names as data, read by the planner, the accounting and the models.

A new family is one entry of ``FAMILIES`` and one line in ``tests/families.py``. Code asks ``family_of(config)`` and
never compares model types. Imports nothing but the standard library.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal

from branchmix.checkpoint.unfit import Config, why_unfit
from branchmix.errors import CheckpointError, short


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
    learned_activation: bool = False
    """The activation has tensors. All experts of a mixture share them: they are merged as norms are."""
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
    variant: Callable[[Family, Config], Family] | None = None
    """From this entry and a config to the entry of that config's variant."""

    inferred: bool = False
    """True when no entry exists and the names were taken to be the standard ones."""

    def routers(self, *, attention: bool, ffn: bool, shared: bool) -> dict[str, str]:
        """Names of a mixture's routers, below the block, by kind; ``shared``: one router weighs both kinds."""
        names = {"attention": f"{self.attention}.expert_gate.weight"} if attention and not shared else {}
        return names | ({"ffn": f"{self.ffn}.gate.weight"} if ffn else {})


Names = dict[str, Any]
"""Fields of ``Family`` that several families share."""
_QK_NORM: Names = {"query_norm": "q_norm", "key_norm": "k_norm"}
_QK_LAYERNORM: Names = {"query_norm": "q_layernorm", "key_norm": "k_layernorm"}
_POST_NORM: Names = {"attention_input_norm": None, "ffn_input_norm": None}
_ONE_NORM: Names = {"ffn_input_norm": "input_layernorm", "block": "parallel"}
"""Attention and FFN side by side, behind the same norm."""
_FUSED_GATE: Names = {"fused_gate_up": "mlp.gate_up_proj", "activation": "mlp.activation_fn"}
_FC1: Names = {"gate": None, "up": "mlp.fc1", "down": "mlp.fc2", "activation": "mlp.activation_fn"}
_C_FC: Names = {"gate": None, "up": "mlp.c_fc", "down": "mlp.c_proj", "activation": "mlp.act"}
_4H: Names = {"gate": None, "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h", "activation": "mlp.act"}
_FC_IN: Names = {"gate": None, "up": "mlp.fc_in", "down": "mlp.fc_out", "activation": "mlp.act"}
_FUSED_QKV: Names = {"fused_qkv": "query_key_value", "output": "dense", "attention_code": "split"}
_LEARNED_POSITIONS: Names = {"attention_code": "split", "rotary": "none"}
_GPT2_PATHS: Names = {"layers": "transformer.h", "embeddings": "transformer.wte", "attention": "attn"}
_GPT2_NORMS: Names = {"attention_input_norm": "ln_1", "ffn_input_norm": "ln_2"}
_GPT2: Names = {**_GPT2_PATHS, "fused_qkv": "c_attn", "output": "c_proj", **_LEARNED_POSITIONS, **_C_FC, **_GPT2_NORMS}
_GPTJ_NORMS: Names = {"attention_input_norm": "ln_1", "ffn_input_norm": "ln_1", "block": "parallel"}
_GPTJ_ATTENTION: Names = {"output": "out_proj", "attention_code": "split", "rotary": "interleaved"}
_GPTJ: Names = {**_GPT2_PATHS, **_GPTJ_ATTENTION, **_FC_IN, **_GPTJ_NORMS}
_OPT_FFN: Names = {"ffn": "fc1", "gate": None, "up": "fc1", "down": "fc2", "activation": "activation_fn"}
_OPT_NORMS: Names = {"attention_input_norm": "self_attn_layer_norm", "ffn_input_norm": "final_layer_norm"}
_OPT: Names = {"output": "out_proj", **_LEARNED_POSITIONS, **_OPT_FFN, **_OPT_NORMS}


def _falcon(family: Family, config: Config) -> Family:
    """Falcon's three generations: 40B and 11B (grouped), 7B (one KV head), and the multi-head variant."""
    if config.get("new_decoder_architecture"):
        two_norms = config.get("num_ln_in_parallel_attn") in (None, 2)
        norms = ("ln_attn", "ln_mlp") if two_norms else ("input_layernorm", "input_layernorm")
        family = replace(family, attention_input_norm=norms[0], ffn_input_norm=norms[1], block="parallel")
        return replace(family, qkv_layout="groups", kv_heads="num_kv_heads")
    if config.get("parallel_attn", True):
        family = replace(family, ffn_input_norm="input_layernorm", block="parallel")
    return _multi_query(family, config)


def _multi_query(family: Family, config: Config) -> Family:
    """One key/value head, or as many as query heads and all three of a head side by side."""
    if config.get("multi_query", True):
        return replace(family, qkv_layout="blocks", kv_heads=1)
    return replace(family, qkv_layout="heads", kv_heads=None)


def _gpt_neox(family: Family, config: Config) -> Family:
    return family if config.get("use_parallel_residual", True) else replace(family, block="sequential")


def _stablelm(family: Family, config: Config) -> Family:
    return replace(family, **_ONE_NORM) if config.get("use_parallel_residual") else family


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", plain_attention=True),
        Family("mistral", plain_attention=True),
        Family("ministral"),
        Family("qwen2", plain_attention=True),
        Family("qwen3", **_QK_NORM, plain_attention=True),
        Family("gemma", gain_offset=1.0),
        Family("gemma2", ffn_input_norm="pre_feedforward_layernorm", gain_offset=1.0),
        Family("gemma3_text", **_QK_NORM, norm_axis=-3, ffn_input_norm="pre_feedforward_layernorm", gain_offset=1.0),
        Family("olmo"),
        Family("olmo2", **_QK_NORM, norm_over="all", **_POST_NORM),
        Family("olmo3", **_QK_NORM, norm_over="all", **_POST_NORM),
        Family("cohere", **_QK_NORM, norm_over="heads", **_ONE_NORM),
        Family("cohere2", **_ONE_NORM),
        Family("phi", output="dense", **_QK_LAYERNORM, norm_axis=-3, **_FC1, **_ONE_NORM),
        Family("phi3", fused_qkv="qkv_proj", attention_code="split", plain_attention=True, **_FUSED_GATE),
        Family(
            "gpt_neox",
            layers="gpt_neox.layers",
            embeddings="gpt_neox.embed_in",
            attention="attention",
            **_FUSED_QKV,
            qkv_layout="heads",
            plain_attention=True,
            **_4H,
            block="parallel",
            variant=_gpt_neox,
        ),
        Family("gptj", **_GPTJ),
        Family("gpt2", **_GPT2, transposed=True),
        Family("opt", layers="model.decoder.layers", embeddings="model.decoder.embed_tokens", **_OPT),
        Family(
            "falcon",
            layers="transformer.h",
            embeddings="transformer.word_embeddings",
            attention="self_attention",
            **_FUSED_QKV,
            **_4H,
            variant=_falcon,
        ),
        Family("stablelm", **_QK_LAYERNORM, norm_over="heads", norm_axis=-3, variant=_stablelm),
        Family("starcoder2", **_C_FC, plain_attention=True),
        Family("granite", plain_attention=True),
        Family("smollm3"),
        Family("glm", **_FUSED_GATE),
        Family("glm4", **_FUSED_GATE),
        Family("nemotron", gate=None),
        Family("arcee", gate=None, plain_attention=True),
        Family("jais2", gate=None, plain_attention=True),
        Family("nanochat", **_FC1),
        Family(
            "apertus",
            **_QK_NORM,
            norm_axis=-3,
            gate=None,
            learned_activation=True,
            attention_input_norm="attention_layernorm",
            ffn_input_norm="feedforward_layernorm",
        ),
        Family("exaone4", **_QK_NORM, norm_axis=-3, **_POST_NORM),
        Family("hunyuan_v1_dense", query_norm="query_layernorm", key_norm="key_layernorm", norm_axis=-3),
        Family(
            "granitemoehybrid",  # without experts and state-space layers
            ffn="shared_mlp",
            fused_gate_up="shared_mlp.input_linear",
            down="shared_mlp.output_linear",
            activation="shared_mlp.activation",
            inner_size="shared_intermediate_size",
        ),
        Family("persimmon", **_FUSED_QKV, qkv_layout="heads", **_QK_LAYERNORM, **_4H),
        Family("codegen", fused_qkv="qkv_proj", qkv_layout="shards", **_GPTJ),
        Family("gpt_bigcode", **_GPT2, variant=_multi_query),
        Family("biogpt", layers="biogpt.layers", embeddings="biogpt.embed_tokens", **_OPT),
        Family("xglm", **_OPT),
    )
}


def family_of(config: Config) -> Family:
    """The table entry of a seed's ``config.json``, or Llama's names for a family that has none.

    Raises CheckpointError if the config names no family, or one that cannot be a seed.
    """
    model_type = config.get("model_type")
    if not model_type or not isinstance(model_type, str):
        lacks = f"model_type {json.dumps(model_type)}, which is not a name" if model_type else "no model_type"
        raise CheckpointError(f"config.json has {lacks}: give a transformers checkpoint of a causal language model")
    if model_type == "branchmix":
        raise CheckpointError("the model is a mixture already: use add-expert or remove-expert to change its experts")
    reason = why_unfit(config)
    if reason is not None:
        raise CheckpointError(reason)
    family = FAMILIES.get(model_type)
    if family is None:
        return Family(model_type, attention_input_norm=None, ffn_input_norm=None, inferred=True)
    return family if family.variant is None else family.variant(family, config)


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


_TIED = (
    "gemma gemma2 gemma3_text gpt2 opt falcon cohere cohere2 starcoder2 smollm3 ernie4_5 granite_swa vaultgemma biogpt "
    "gpt_bigcode xglm"
).split()
_DEFAULTS: dict[str, dict[str, Any]] = {
    "head_dim": dict.fromkeys(("gemma", "gemma2", "gemma3_text"), 256) | dict.fromkeys(("qwen3", "glm", "glm4"), 128),
    "num_key_value_heads": {
        **dict.fromkeys(("starcoder2", "glm", "glm4"), 2),
        **dict.fromkeys(("gemma2", "gemma3_text", "smollm3"), 4),
        **dict.fromkeys(("mistral", "ministral"), 8),
        "gemma": 16,
        **dict.fromkeys(("qwen2", "qwen3", "stablelm", "exaone4"), 32),
    },
    "hidden_act": dict.fromkeys(("nemotron", "arcee", "jais2", "nanochat", "persimmon", "bitnet"), "relu2"),
    "tie_word_embeddings": dict.fromkeys(_TIED, True),
}
"""transformers' defaults for keys that old config.json files leave out, by key and family."""
_FOUR_TIMES_WIDE = {"gpt2", "gptj", "falcon", "opt", "codegen", "gpt_bigcode"}


def _default(config: Config, key: str, otherwise: Any) -> Any:
    return _DEFAULTS[key].get(str(config.get("model_type")), otherwise)


LARGEST_SIZE = 2**31 - 1
"""What a config may say of any size of a model."""


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
        default_kv_heads = _default(config, "num_key_value_heads", num_heads) if missing else num_heads
        num_kv_heads = size(family.kv_heads, default=default_kv_heads)
    else:
        num_kv_heads = family.kv_heads or num_heads
    four_times = 4 * hidden_size if family.model_type in _FOUR_TIMES_WIDE else None
    return Dimensions(
        num_layers=size("num_hidden_layers", "n_layer", "num_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=size("head_dim", default=_default(config, "head_dim", hidden_size // num_heads)),
        intermediate_size=size(family.inner_size, "ffn_hidden_size", "n_inner", "ffn_dim", default=four_times),
        vocab_size=size("vocab_size"),
        tied_embeddings=is_tied(config),
    )


def is_tied(config: Config) -> bool:
    """Whether ``config`` of a dense model says that the output layer is the token embeddings."""
    return bool(config.get("tie_word_embeddings", _default(config, "tie_word_embeddings", False)))


def squares_activation(config: Config) -> bool:
    """Whether a dense model's FFN has the square of a ReLU, by its config or its family's default."""
    return bool(config.get("hidden_act", _default(config, "hidden_act", None)) == "relu2")


def is_head(name: str) -> bool:
    """Whether a tensor or module is (in) the output layer, from its name in a dense model."""
    return name.split(".")[0] in ("lm_head", "embed_out", "output_projection")


def nearest(word: str, choices: list[str] | tuple[str, ...]) -> str:
    """`` (did you mean 'x'?)`` for the closest of ``choices``, or nothing."""
    close = get_close_matches(word, choices, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""

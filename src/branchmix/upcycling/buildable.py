"""Can transformers build these models at all? A mixture of what it cannot build could never be loaded.

transformers itself is asked: it builds each model without weights. That costs seconds and hundreds of megabytes for the
imports alone, so it is only asked about configs with something out of the ordinary: a key or a kind of value that most
decoders do not have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from branchmix.checkpoint.families import Config, dimensions
from branchmix.checkpoint.rotary import rope_of

ATTENTION_KEYS = ("attn_implementation", "_attn_implementation")
"""Where a config may ask for an attention kernel."""


def unbuildable(models: Iterable[tuple[str, Config]]) -> Iterator[str]:
    """A line for each model that transformers cannot build, with its reason; one that all share only once.

    Args:
        models: what to call each, for the line, and its config. The family is one that transformers has.
    """
    told: set[str] = set()
    for who, config in models:
        problem = None if is_ordinary(config) else _problem(config)
        if problem is not None and problem not in told:
            told.add(problem)
            yield f"{who}: {problem}"


def _problem(config: Config) -> str | None:
    again = "mend its config.json, or copy the model's own there"
    for key in ATTENTION_KEYS:
        if "/" in str(config.get(key)):
            return f"{key} is {config[key]}, code on the Hub, which is never run: remove the key from config.json"
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

    try:
        fields = PreTrainedConfig._decode_special_floats({k: v for k, v in config.items() if k != "auto_map"})
        built = AutoConfig.for_model(fields.pop("model_type"), **fields)
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(built, trust_remote_code=False)
    except Exception as error:  # every family and its validators have their own kinds
        reason = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
        if isinstance(error, KeyError) and " " not in reason:
            reason = f"it has no {reason!r}"
        asked = next((key for key in ATTENTION_KEYS if config.get(key)), None)
        if asked is not None and isinstance(error, (ImportError, ValueError)):
            again = f"install what {asked} {config[asked]!r} needs, or remove that key from config.json"
        return f"transformers cannot build the model of its config.json: {_short(reason)}: {again}"
    return None


def _short(reason: str) -> str:
    return reason.rstrip(".:") if len(reason) <= 300 else reason[:297] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# What is ordinary
# ---------------------------------------------------------------------------------------------------------------------


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _real(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _share(value: Any) -> bool:
    return _number(value) and 0 <= value < 1


def _tokens(value: Any) -> bool:
    return _whole(value) or (isinstance(value, list) and all(map(_whole, value)))


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _maybe(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or kind(value)


def _one_of(*words: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in words


def _any(value: Any) -> bool:
    return True


_ACTIVATION = _one_of("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "relu2")
_KEYS: dict[str, Callable[[Any], bool]] = {
    key: kind
    for keys, kind in (
        ("hidden_size n_embd num_hidden_layers n_layer num_attention_heads n_head vocab_size ffn_dim", _whole),
        ("intermediate_size max_position_embeddings n_positions max_window_layers pretraining_tp", _whole),
        ("original_max_position_embeddings num_key_value_heads head_dim", _whole),
        ("n_inner sliding_window bos_token_id pad_token_id", _maybe(_whole)),
        ("eos_token_id", _maybe(_tokens)),
        ("tie_word_embeddings use_cache attention_bias mlp_bias use_sliding_window use_qk_norm qk_layernorm", _flag),
        ("use_parallel_residual use_qkv_bias use_bias multi_query new_decoder_architecture parallel_attn bias", _flag),
        ("rms_norm_eps layer_norm_eps layer_norm_epsilon norm_epsilon norm_eps logit_scale", _real),
        ("initializer_range", lambda value: _real(value) and 0 <= value <= 1),
        ("attention_dropout hidden_dropout attn_pdrop embd_pdrop resid_pdrop residual_dropout", _share),
        ("embedding_dropout classifier_dropout", _share),
        ("rotary_pct partial_rotary_factor rope_theta rotary_emb_base rope_local_base_freq", _number),
        ("hidden_act activation_function hidden_activation", _ACTIVATION),
        ("dtype torch_dtype", _one_of("float32", "float16", "bfloat16")),
        ("attn_implementation _attn_implementation", _maybe(_one_of("eager", "sdpa"))),
        ("rope_parameters rope_scaling", _maybe(_mapping)),  # ``rope_of`` both, and lists, are looked at below
        ("layer_types architectures model_type transformers_version _name_or_path name_or_path auto_map", _any),
        ("_attn_implementation_autoset unsloth_version unsloth_fixed", _any),
    )
    for key in keys.split()
}
"""Keys that most decoders have, each with what its value must be like."""

_SCALINGS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""Rope types that are numbers alone, with those that they need."""
_SCALED = ("llama", "mistral", "qwen2", "qwen3")
"""Families that take each of them."""


def is_ordinary(config: Config) -> bool:
    """Whether transformers is sure to build the model of a config, as far as that shows without asking it.

    Args:
        config: content of a config.json whose sizes are known to be those of its weights.
    """
    if not all(key in _KEYS and _KEYS[key](value) for key, value in config.items()):
        return False
    sizes = dimensions(config)
    kinds = config.get("layer_types")
    if kinds is not None and not (
        isinstance(kinds, list)
        and len(kinds) == sizes.num_layers
        and set(map(str, kinds)) <= {"full_attention", "sliding_attention"}
    ):
        return False
    padding = config.get("pad_token_id")
    if padding is not None and not (_whole(padding) and padding < sizes.vocab_size):
        return False
    if sizes.head_dim % 2 or sizes.hidden_size % sizes.num_heads:
        return False
    rope = rope_of(config)
    nested = "rope_theta" not in rope
    return all(_ordinary_rope(given, config) for given in (rope.values() if nested else (rope,)))


def _ordinary_rope(rope: Any, config: Config) -> bool:
    kind = rope.get("rope_type")
    if not _number(rope.get("rope_theta")) or rope["rope_theta"] <= 0:
        return False
    if kind == "default":
        return _number(rope.get("partial_rotary_factor", 1.0))
    numbers = all(_number(value) and value > 0 for key, value in rope.items() if key != "rope_type")
    needed = _SCALINGS.get(str(kind))
    return numbers and needed is not None and config["model_type"] in _SCALED and all(key in rope for key in needed)

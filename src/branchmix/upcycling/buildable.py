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
    """A line for each named config whose model transformers cannot build, with its reason; each reason only once."""
    reported: set[str] = set()
    for name, config in models:
        problem = None if is_ordinary(config) else _problem(config)
        if problem is not None and problem not in reported:
            reported.add(problem)
            yield f"{name}: {problem}"


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
        reason = reason.rstrip(".:") if len(reason) <= 300 else reason[:297] + "..."
        return f"transformers cannot build the model of its config.json: {reason}: {again}"
    return None


# ---- What is ordinary. The values are those of JSON, whose whole numbers are never of type bool. ----

Kind = Callable[[Any], bool]


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _real(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def _tokens(value: Any) -> bool:
    return _whole(value) or (isinstance(value, list) and all(map(_whole, value)))


def _of_type(kind: type) -> Kind:
    return lambda value: isinstance(value, kind)


def _maybe(kind: Kind) -> Kind:
    return lambda value: value is None or kind(value)


def _share(value: Any) -> bool:
    return _number(value) and 0 <= value < 1


def _one_of(*words: str) -> Kind:
    return lambda value: isinstance(value, str) and value in words


_FLAG, _ANY = _of_type(bool), _of_type(object)
_ACTIVATION = _one_of("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "relu2")
_KEYS: dict[str, Kind] = {
    key: kind
    for keys, kind in (
        ("hidden_size n_embd num_hidden_layers n_layer num_attention_heads n_head vocab_size ffn_dim", _whole),
        ("intermediate_size max_position_embeddings n_positions max_window_layers pretraining_tp", _whole),
        ("original_max_position_embeddings num_key_value_heads head_dim", _whole),
        ("n_inner sliding_window bos_token_id pad_token_id", _maybe(_whole)),
        ("eos_token_id", _maybe(_tokens)),
        ("tie_word_embeddings use_cache attention_bias mlp_bias use_sliding_window use_qk_norm qk_layernorm", _FLAG),
        ("use_parallel_residual use_qkv_bias use_bias multi_query new_decoder_architecture parallel_attn bias", _FLAG),
        ("rms_norm_eps layer_norm_eps layer_norm_epsilon norm_epsilon norm_eps logit_scale", _real),
        ("initializer_range", lambda value: _real(value) and 0 <= value <= 1),
        ("attention_dropout hidden_dropout attn_pdrop embd_pdrop resid_pdrop residual_dropout", _share),
        ("embedding_dropout classifier_dropout", _share),
        ("rotary_pct partial_rotary_factor rope_theta rotary_emb_base rope_local_base_freq", _number),
        ("hidden_act activation_function hidden_activation", _ACTIVATION),
        ("dtype torch_dtype", _one_of("float32", "float16", "bfloat16")),
        ("attn_implementation _attn_implementation", _maybe(_one_of("eager", "sdpa"))),
        ("rope_parameters rope_scaling", _maybe(_of_type(dict))),  # ``rope_of`` both, and lists, are looked at below
        ("layer_types architectures model_type transformers_version _name_or_path name_or_path auto_map", _ANY),
        ("_attn_implementation_autoset unsloth_version unsloth_fixed", _ANY),
    )
    for key in keys.split()
}
"""Keys that most decoders have, each with a check of its value."""

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
    """Whether transformers will certainly build the model of a config.json whose sizes fit its weights."""
    if not all(key in _KEYS and _KEYS[key](value) for key, value in config.items()):
        return False
    sizes, rope = dimensions(config), rope_of(config)
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != sizes.num_layers:
            return False
        if not set(map(str, kinds)) <= {"full_attention", "sliding_attention"}:
            return False
    if (config.get("pad_token_id") or 0) >= sizes.vocab_size:
        return False
    if sizes.head_dim % 2 or sizes.hidden_size % sizes.num_heads:
        return False
    return all(_ordinary_rope(given, config) for given in ([rope] if "rope_theta" in rope else rope.values()))


def _ordinary_rope(rope: Any, config: Config) -> bool:
    kind = rope.get("rope_type")
    if not _number(rope.get("rope_theta")) or rope["rope_theta"] <= 0:
        return False
    if kind == "default":
        return _number(rope.get("partial_rotary_factor", 1.0))
    numbers = all(_number(value) and value > 0 for key, value in rope.items() if key != "rope_type")
    needed = _SCALINGS.get(str(kind))
    return numbers and needed is not None and config["model_type"] in _SCALED and all(key in rope for key in needed)

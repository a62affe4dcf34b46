"""Why a config's model cannot be a seed or an expert: one line for each kind of model.

Kinds are recognised by keys of the config, so that families which appear later get the right reason too;
``_BY_TYPE`` holds those that no key reveals. Imports nothing but the standard library.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Config = dict[str, Any]

_SOFTMAX_LAYERS = {"full_attention", "sliding_attention", "attention"}
_CAUSAL = "seed and experts must be causal language models without an encoder"
_LATENT = "compresses keys and values in its attention (latent attention), which has no heads to put side by side"
_ENCODER = f"is an encoder, whose tokens see later ones: {_CAUSAL}"
_ALIBI = "has ALiBi positions, whose slopes depend on the number of heads, so its heads cannot be put side by side"
_STATE_SPACE = "has state-space or recurrent layers: every layer of seed and experts must have softmax attention"
_MULTIMODAL = "has parts for images or sound inside its language model: seed and experts must read text only"
_DRAFTS = "drafts tokens from another model's hidden states and keys, so it is not a language model on its own"
_UNLIKE_HEADS = "has layers of unlike head sizes, or layers that share keys and values"
_BY_TYPE: dict[str, str] = {
    "bert-generation": _ENCODER,
    "bitnet": "has a norm between the heads and their output projection, which would mix the experts' heads",
    "bloom": _ALIBI,
    "blt": "turns bytes into patches with models of their own before its decoder, which cannot be widened",
    "cpmant": "adds a bias for each head and distance to its attention, so its heads cannot be put side by side",
    "ctrl": "has an attention of its own, which takes queries, keys and values as three inputs",
    "diffllama": "subtracts one attention of a head from another (differential attention)",
    "doge": "computes its attention mask from its values, for each head (dynamic mask attention)",
    "gemma3n_text": "feeds every layer embeddings of its own and shares keys and values between layers",
    "gemma4_assistant": _DRAFTS,
    "gemma4_text": _UNLIKE_HEADS,
    "gemma4_unified_assistant": _DRAFTS,
    "gemma4_unified_text": _UNLIKE_HEADS,
    "git": _MULTIMODAL,
    "gpt_neo": "masks the keys of its local layers inside its attention, which therefore cannot be replaced",
    "gpt_neox_japanese": "adds the bias of its attention outside of it, in its last layer only",
    "granite_swa": "has a learned attention sink for each head, which is not among the parts that experts keep",
    "hrm_text": "runs its layers several times, in two loops",
    "lfm2": "has short convolutions in the place of attention in most of its layers",
    "modernbert-decoder": "has more than one matrix and a norm between its last layer and the logits",
    "moshi": _MULTIMODAL,
    "openai-gpt": "has no KV cache, and masks inside its attention, which therefore cannot be replaced",
    "phi4_multimodal": _MULTIMODAL,
    "reformer": "hashes tokens into buckets for its attention",
    "rwkv": _STATE_SPACE,
    "xlm": "keeps its attentions and FFNs in two lists instead of one list of blocks",
    "xlnet": "predicts tokens in permuted order with two streams of attention",
    "xlstm": _STATE_SPACE,
}


def why_unfit(config: Config) -> str | None:
    """Why the model of a ``config.json`` can be neither seed nor expert, in one line; None if nothing rules it out."""
    model_type = str(config.get("model_type"))
    if model_type in _BY_TYPE:
        return f"{model_type} {_BY_TYPE[model_type]}"
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
        _ALIBI: config.get("alibi") or _mapping(config, "attn_config").get("alibi"),
        _ENCODER: "type_vocab_size" in config,
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
    return _STATE_SPACE if "state_size" in config or any(key.startswith(signs) for key in config) else ""


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

"""Which class of transformers computes exactly what a mixture computes: tables, and all reasons where none does.

A class with FFN experts fits if its block is the seed family's with another FFN, and if its router weighs the chosen
experts as the mixture's does. Read from the classes' own code (transformers 5.23); ``verify`` proves it on text.
Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from branchmix.accounting.formulas import windows
from branchmix.checkpoint.families import Config, entries
from branchmix.checkpoint.rotary import POSITIONS, rope_of
from branchmix.upcycling.mixture import OpenedMixture
from branchmix.upcycling.sources import DenseExpert

_NORMS = {
    "pre": "RMS norms before attention and FFN",
    "post": "RMS norms behind attention and FFN",
    "layer": "LayerNorms",
}
_QK_NORMS = {
    "none": "no query and key norms",
    "head": "a query and a key norm over each head",
    "wide": "a query and a key norm over all heads together",
}


@dataclass(frozen=True)
class Native:
    """A class of transformers with FFN experts, and how its checkpoints name them."""

    model_type: str
    architecture: str
    norms: str = "pre"
    qk_norms: str = "none"
    qk_norm_key: str | None = None
    """Config key by which it can also have no query and key norms."""
    biases: Literal["", "qkv", "qkvo"] = ""
    """Attention biases that it may have: of no, of q, k and v, or of all four projections or none."""
    bias_key: str | None = None
    windows: bool = False
    """It can have one sliding window for all layers."""
    score: str = "softmax"
    """How router logits become gates; as ``scoring_func`` of a mixture."""
    expert_bias: str | None = None
    """Tensor of the router that is added to the gates when experts are chosen; None if it has none."""
    scaling_key: str | None = None
    """Config key of the factor on the routed experts' output; without one the factor goes into the experts."""
    always_normalises: bool = False
    """Whether the chosen gates are always divided by their sum; if not, ``norm_topk_prob`` decides."""
    num_experts: str = "num_experts"
    """Config key of the number of experts."""
    inner: tuple[str, ...] = ("intermediate_size",)
    """Config keys of an expert's inner width."""
    ffn: str = "mlp"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared_expert: Literal["", "gated", "plain"] = ""
    """It also has an expert for every token, written as zeros where the mixture has none: ``gated`` by the token, or
    ``plain`` and as wide as the others, which can be the mixture's."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of its config."""
    gguf_normalises: bool | None = None
    """Whether llama.cpp always normalises the gates of this class, or never does; it never asks the config (its
    src/models, 2026-10). None: as transformers."""


SHARED_EXPERT_WIDTH = 256
"""Width of the expert of zeros that Qwen2-MoE needs: the smallest that GGUF's quantisations and eight devices can
split."""

NATIVES: dict[str, Native] = entries("native", Native)
TARGETS = (*NATIVES, "dense", "full", "peft")
"""What ``--to`` takes."""


def problems(mixture: OpenedMixture, trunk: DenseExpert, native: Native) -> list[str]:
    """Every reason why a mixture, of this ``trunk_of``, is not what ``native`` computes; empty if it is."""
    return [*_expert_problems(mixture, native), *_block_problems(mixture, trunk, native)]


def _expert_problems(mixture: OpenedMixture, native: Native) -> Iterator[str]:
    config, one = mixture.config, ""
    if mixture.shape.has_attention_experts:
        one = " --expert NAME"
        yield (
            "attention experts have no native form, since no class sums whole attentions under a gate: "
            "--to dense --expert NAME gives one of its experts, and a mixture of averaged attention (BTX) can be native"
        )
    if not mixture.shape.has_ffn_experts:
        yield f"its FFN is one dense FFN, not experts: --to dense{one}"
        return
    if config.get("trunk") == "experts":
        yield "its trunk has experts, and no class has several: --to dense --expert NAME gives one of them whole"
    elif config.get("document_gate"):
        yield (
            "its document gates have no native form: branchmix calibrate --token-only fits gates of single tokens, "
            "which can be exported"
        )
    if (score := config["scoring_func"]) != native.score:
        yield f"its gates are made by {score}, and those of {native.model_type} by {native.score}"
    if mixture.shape.shared_experts and native.shared_expert != "plain":
        yield f"its shared expert has a fixed weight, which {native.model_type} does not have"
    if config.get("domain_router"):
        yield f"its routers compute their rows from experts' domains, and those of {native.model_type} have weights"
    if config.get("expert_bias") and native.expert_bias is None:
        yield f"its routers choose experts by a bias, and those of {native.model_type} by their gates alone"
    top_k, num_experts = config["num_experts_per_tok"], config["num_experts"]
    if native.always_normalises and not config.get("norm_topk_prob") and top_k < num_experts:
        yield (
            f"its gates are raw (norm_topk_prob: false, top-{top_k} of {num_experts}), and {native.model_type} divides "
            "the chosen gates by their sum: the mixture was trained to other FFN outputs"
        )


def _block_problems(mixture: OpenedMixture, trunk: DenseExpert, native: Native) -> Iterator[str]:
    family, config = mixture.family, mixture.seed_config
    name, target = family.model_type, native.model_type
    if family.native_norms is None:
        yield f"what a block of {name} computes is not in the table of native forms: --to dense keeps the family"
        return
    if family.block == "parallel":
        yield f"attention and FFN of {name} run side by side in a block, and {target}'s one after the other"
    if family.native_norms != native.norms:
        yield f"{name} has {_NORMS.get(family.native_norms, family.native_norms)}, {target} has {_NORMS[native.norms]}"
    if family.native_qk_norms not in (native.qk_norms, "none" if native.qk_norm_key else native.qk_norms):
        yield f"{name} has {_QK_NORMS[family.native_qk_norms]}, {target} has {_QK_NORMS[native.qk_norms]}"
    if family.special:
        yield f"{name} has {family.special}, which {target} has not"
    if family.gate is None and family.fused_gate_up is None:
        yield f"the FFN of {name} has no gate, that of {target} has one"
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        yield f"its FFN uses {activation}, and servers of {target} compute silu whatever the config says"
    if mixture.shape.has_ffn_experts and any(name.endswith(".bias") for name in mixture.experts[0].ffn(0)):
        yield f"its FFN experts have biases, those of {target} none"
    allowed = list(dict.fromkeys(("", native.biases)))
    if not mixture.shape.has_attention_experts and (biased := attention_biases(trunk)) not in allowed:
        words = " or ".join(", ".join(roles) or "none" for roles in allowed)
        yield f"its attention has biases of {', '.join(biased)}, and {target} of {words}"
    rope = rope_of(config)
    if rope.get("rope_type", "default") not in ("default", "linear", "dynamic", "yarn", "llama3"):
        yield f"rotary embeddings of type {rope.get('rope_type')} are {name}'s own"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"only {rope['partial_rotary_factor']} of each head is rotated, in {target} all of it"
    window = _window_of(mixture)
    if window == "some":
        yield f"only some layers have a sliding window, in {target} all or none"
    elif window is not None and not native.windows:
        yield f"it has a sliding window of {window} tokens, and {target} none"


def attention_biases(trunk: DenseExpert) -> str:
    """The attention projections of layer 0 that have a bias, such as ``qkv``."""
    return "".join(role for role in ("q", "k", "v", "o") if trunk.attention(0, role, "bias") is not None)


def _window_of(mixture: OpenedMixture) -> int | Literal["some"] | None:
    """The sliding window of all layers; ``some`` if layers differ; None if there is none."""
    first, *others = set(windows(mixture.shape))
    return "some" if others else first


_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def native_config(mixture: OpenedMixture, trunk: DenseExpert, native: Native) -> Config:
    """config.json of the native checkpoint of a mixture that has no ``problems``.

    Rotary parameters are in the form that every version of every tool reads.
    """
    seed, dims = mixture.seed_config, mixture.dims
    config: Config = {
        "architectures": [native.architecture],
        "model_type": native.model_type,
        "dtype": mixture.dtype_name,
        "vocab_size": dims.vocab_size,
        "hidden_size": dims.hidden_size,
        "num_hidden_layers": dims.num_layers,
        "num_attention_heads": dims.num_heads,
        "num_key_value_heads": dims.num_kv_heads,
        "head_dim": dims.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": seed.get("rms_norm_eps", mixture.family.defaults.get("rms_norm_eps", 1e-6)),
        "tie_word_embeddings": dims.tied_embeddings,
        **_rope_keys(rope_of(seed)),
        "attention_dropout": seed.get("attention_dropout", 0.0),
        native.num_experts: mixture.config["num_experts"],
        "num_experts_per_tok": mixture.config["num_experts_per_tok"],
        **dict.fromkeys(native.inner, dims.intermediate_size),
        "output_router_logits": False,
        "router_aux_loss_coef": mixture.config.get("router_aux_loss_coef", 0.01),
    }
    config |= native.config
    if native.shared_expert == "gated":
        config["shared_expert_intermediate_size"] = SHARED_EXPERT_WIDTH
    if native.scaling_key:
        config[native.scaling_key] = mixture.scaling * (1 - (mixture.config["shared_expert_weight"] or 0.0))
    if native.qk_norm_key:
        config[native.qk_norm_key] = mixture.family.native_qk_norms != "none"
    if not native.always_normalises:
        config["norm_topk_prob"] = bool(mixture.config.get("norm_topk_prob", False))
    if native.bias_key:
        config[native.bias_key] = bool(attention_biases(trunk))
    window = _window_of(mixture)
    if native.windows:
        config["sliding_window"] = window
        if native.model_type != "mixtral":
            config["use_sliding_window"] = window is not None
    kept = ("max_position_embeddings", "initializer_range", "use_cache", *_SPECIAL_TOKENS)
    config |= {key: seed[key] for key in kept if key in seed}
    for key in _SPECIAL_TOKENS:
        config.setdefault(key, None)  # not the class's own default, which is another tokenizer's
    return config


def _rope_keys(rope: dict[str, Any]) -> Config:
    """``rope_theta`` and ``rope_scaling``: transformers 4's keys, which 5 and other tools read as well."""
    beside = {POSITIONS: rope[POSITIONS]} if POSITIONS in rope else {}
    apart = ("rope_theta", "partial_rotary_factor", *beside)
    scaling = {key: value for key, value in rope.items() if key not in apart}
    keys: Config = {"rope_theta": rope.get("rope_theta", 10000.0), **beside}
    return keys if scaling.get("rope_type", "default") == "default" else {**keys, "rope_scaling": scaling}

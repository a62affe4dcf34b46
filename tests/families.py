"""Tiny random models of every family, and of the variants that its flags make: one entry each.

Every claim about families is tested over this list. Sizes are small enough for a test a family in well under a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "n_inner": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@dataclass(frozen=True)
class TinyFamily:
    """A family or a variant of it, as keyword arguments of its config."""

    name: str
    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    block: str = "sequential"
    """sequential, parallel (one norm) or parallel-2 (two norms)."""
    gains_only: bool = True
    """Norms right before attention and FFN have a gain and no bias."""
    rare: bool = False
    """Most of its tests are slow ones (see ``conftest.py``)."""

    def config(self, **changes: Any) -> Any:
        sizes = _GPT if self.model_type in ("gpt2", "gptj", "codegen", "gpt_bigcode") else SIZES
        options = {**sizes, **self.options, **changes}
        return AutoConfig.for_model(self.model_type, **{k: v for k, v in options.items() if v is not None})

    def model(self, seed: int, **changes: Any) -> PreTrainedModel:
        """A random model in fp32 whose norms, biases and matrices all matter."""
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(self.config(**changes), dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.08)
        model.tie_weights()
        return model

    def save(self, folder: Path, seed: int, **changes: Any) -> Path:
        self.model(seed, **changes).save_pretrained(folder)
        return folder


_MHA = {"num_key_value_heads": None}

FAMILIES = [
    TinyFamily("llama", "llama"),
    TinyFamily("llama-bias", "llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    TinyFamily("mistral", "mistral", {"sliding_window": 4}),
    TinyFamily("qwen2", "qwen2"),
    TinyFamily("qwen3", "qwen3", {"head_dim": 16}),
    TinyFamily("gemma", "gemma", {"head_dim": 8}),
    TinyFamily("gemma2", "gemma2", {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    TinyFamily("gemma3", "gemma3_text", {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    TinyFamily("olmo", "olmo", gains_only=False),
    TinyFamily("olmo2", "olmo2", gains_only=False),
    TinyFamily("olmo3", "olmo3", {"sliding_window": 4}, gains_only=False),
    TinyFamily("cohere", "cohere", {"tie_word_embeddings": False}, block="parallel"),
    TinyFamily("cohere-qk-norm", "cohere", {"use_qk_norm": True}, block="parallel"),
    TinyFamily("cohere2", "cohere2", {"sliding_window": 4, "head_dim": 8}, block="parallel"),
    TinyFamily("phi", "phi", _NO_DROPOUT, block="parallel", gains_only=False),
    TinyFamily("phi-qk-norm", "phi", {**_NO_DROPOUT, "qk_layernorm": True}, block="parallel", gains_only=False),
    TinyFamily("phi3", "phi3", {**_NO_DROPOUT, "sliding_window": None}),
    TinyFamily("gpt-neox", "gpt_neox", {**_MHA, "rotary_pct": 0.5}, block="parallel-2", gains_only=False),
    TinyFamily(
        "gpt-neox-sequential",
        "gpt_neox",
        {**_MHA, "use_parallel_residual": False, "attention_bias": False},
        gains_only=False,
    ),
    TinyFamily("gptj", "gptj", {**_NO_DROPOUT, "rotary_dim": 4}, block="parallel", gains_only=False),
    TinyFamily("gpt2", "gpt2", _NO_DROPOUT, gains_only=False),
    TinyFamily(
        "opt",
        "opt",
        {**_MHA, "intermediate_size": None, "ffn_dim": 48, "dropout": 0.0, "word_embed_proj_dim": 32},
        gains_only=False,
    ),
    TinyFamily("falcon", "falcon", {**_MHA, "ffn_hidden_size": 48}, block="parallel", gains_only=False),
    TinyFamily(
        "falcon-multi-head",
        "falcon",
        {**_MHA, "ffn_hidden_size": 48, "multi_query": False, "parallel_attn": False, "bias": True},
        gains_only=False,
    ),
    TinyFamily(
        "falcon-new",
        "falcon",
        {**_MHA, "ffn_hidden_size": 48, "new_decoder_architecture": True, "num_kv_heads": 2},
        block="parallel-2",
        gains_only=False,
    ),
    TinyFamily("stablelm", "stablelm", {"use_qkv_bias": True}, gains_only=False),
    TinyFamily(
        "stablelm-parallel",
        "stablelm",
        {"use_parallel_residual": True, "qk_layernorm": True},
        block="parallel",
        gains_only=False,
    ),
    TinyFamily("starcoder2", "starcoder2", {"residual_dropout": 0.0, "embedding_dropout": 0.0}, gains_only=False),
    TinyFamily("granite", "granite", {"attention_multiplier": 0.3, "logits_scaling": 2.0, "residual_multiplier": 0.7}),
    TinyFamily("smollm3", "smollm3", {"no_rope_layers": [1, 0]}),
    TinyFamily("glm", "glm", {"head_dim": 8}),
    TinyFamily("glm4", "glm4", {"head_dim": 8}),
    TinyFamily("nemotron", "nemotron", gains_only=False),
    TinyFamily("arcee", "arcee", rare=True),
    TinyFamily("jais2", "jais2", gains_only=False, rare=True),
    TinyFamily("nanochat", "nanochat", gains_only=False, rare=True),
    TinyFamily("apertus", "apertus"),
    TinyFamily("exaone4", "exaone4", {"sliding_window": 4, "sliding_window_pattern": 2}, gains_only=False),
    TinyFamily("hunyuan", "hunyuan_v1_dense", {"head_dim": 8}, rare=True),
    TinyFamily(
        "granite-hybrid",
        "granitemoehybrid",
        {
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
            "layer_types": ["full_attention"] * 2,
            "position_embedding_type": "rope",
            "mamba_n_heads": 8,
            "residual_multiplier": 0.7,
        },
        rare=True,
    ),
    TinyFamily("persimmon", "persimmon", _MHA, gains_only=False, rare=True),
    TinyFamily("codegen", "codegen", {**_NO_DROPOUT, "rotary_dim": 4}, block="parallel", gains_only=False, rare=True),
    TinyFamily("gpt-bigcode", "gpt_bigcode", _NO_DROPOUT, gains_only=False, rare=True),
    TinyFamily(
        "gpt-bigcode-multi-head", "gpt_bigcode", {**_NO_DROPOUT, "multi_query": False}, gains_only=False, rare=True
    ),
    TinyFamily(
        "biogpt",
        "biogpt",
        {**_MHA, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        gains_only=False,
        rare=True,
    ),
    TinyFamily(
        "xglm",
        "xglm",
        {
            **_MHA,
            "hidden_size": None,
            "intermediate_size": None,
            "num_attention_heads": None,
            "num_hidden_layers": None,
            "d_model": 32,
            "ffn_dim": 48,
            "attention_heads": 4,
            "num_layers": 2,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        gains_only=False,
        rare=True,
    ),
    # No table entry: names inferred.
    TinyFamily("seed-oss", "seed_oss", {"head_dim": 8, "residual_dropout": 0.0}),
    TinyFamily("helium", "helium", {"head_dim": 8}),
]
BY_NAME = {family.name: family for family in FAMILIES}
NAMES = list(BY_NAME)
RARE = {family.name for family in FAMILIES if family.rare}

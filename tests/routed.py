"""Tiny mixtures with a tokenizer, ours and those of transformers, and texts of two domains: for tests of routing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

import corpora
from families import SIZES
from mixtures import random_mixture

TEXTS = {"prose": [corpora.text(n) for n in range(6)], "maths": [corpora.text(n) for n in range(100, 103)]}
NAMES = ["seed", "code", "law"]
MOE = {**SIZES, "vocab_size": 300, "moe_intermediate_size": 16}
OTHERS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 6, "num_experts_per_tok": 3, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": True, "head_dim": 8},
    "olmoe": {"num_experts": 64, "num_experts_per_tok": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    corpora.tokenizer().save_pretrained(folder)
    return folder


def ours(folder: Path, attention: str, top_k: int, attention_top_k: int | None, family: str = "llama") -> Path:
    model = random_mixture(
        family,
        attention,
        seed_changes={"vocab_size": 300},
        num_experts_per_tok=top_k,
        attention_num_experts_per_tok=attention_top_k,
        expert_names=NAMES,
    )
    return save(model, folder)


def theirs(folder: Path, model_type: str) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**MOE, **OTHERS[model_type]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and "inv_freq" not in name:
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.15)
    return save(model, folder)


def data_file(folder: Path, texts: dict[str, list[str]] = TEXTS, held_out: Any = "all") -> Path:
    for name, documents in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    content = {"data": {name: {"files": f"{name}.jsonl"} for name in texts}, "held_out": held_out}
    (folder / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "data.yaml"

"""The reason why a model cannot be a seed is the right one, from its config alone."""

from __future__ import annotations

from typing import Any

import pytest

from branchmix.checkpoint.families import dimensions, family_of, has_experts, why_bidirectional, why_unfit
from branchmix.errors import CheckpointError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
}


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"num_experts": 4}, "llama is a mixture of experts already"),
        ({"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16}}, "dbrx is a mixture of experts already"),
        ({"model_type": "doge", "is_moe": False, "num_experts": 16384}, "doge computes its attention mask from"),
        ({"model_type": "jamba", "num_experts": 1, "mamba_d_state": 16}, "jamba has state-space or recurrent layers"),
        ({"model_type": "mamba2", "state_size": 128}, "mamba2 has state-space or recurrent layers"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "llama has linear_attention layers"),
        ({"model_type": "bloom"}, "bloom has ALiBi positions"),
        ({"model_type": "mpt", "attn_config": {"alibi": True}}, "mpt has ALiBi positions"),
        ({"model_type": "ctrl"}, "ctrl has an attention of its own"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "bart is an encoder-decoder"),
        (
            {"model_type": "bart", "is_encoder_decoder": False, "decoder_layers": 2},
            "bart is one half of an encoder-dec",
        ),
        ({"model_type": "gpt2", "add_cross_attention": True}, "gpt2 has cross-attention"),
        ({"model_type": "bert", "type_vocab_size": 2, "is_decoder": False}, "bert is an encoder"),
        ({"kv_lora_rank": 16}, "llama compresses keys and values"),
    ],
)
def test_the_reason_is_the_right_one(keys: dict[str, Any], reason: str) -> None:
    found = why_unfit({**LLAMA, **keys})
    assert found is not None and found.startswith(reason) and "\n" not in found
    with pytest.raises(CheckpointError, match=reason):
        family_of({**LLAMA, **keys})


@pytest.mark.parametrize(
    ("wrapper", "text", "reason"),
    [
        ("gemma3", {"model_type": "gemma3_text"}, "whose text part is gemma3_text: save the text part alone"),
        ("gemma4", {"model_type": "gemma4_text"}, "its text part cannot be widened either: gemma4_text has layers of"),
        ("qwen2_vl", {"model_type": "qwen2_vl_text"}, "whose text part, qwen2_vl_text, has no causal language model"),
        ("old", {}, "save its text part as a causal language model"),
    ],
)
def test_a_multimodal_model_is_told_what_to_do(wrapper: str, text: dict[str, Any], reason: str) -> None:
    found = why_unfit({"model_type": wrapper, "text_config": text})
    assert found is not None and found.startswith(f"{wrapper} is a multimodal model") and reason in found


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"num_experts": 1},
        {"num_local_experts": 0},
        {"add_cross_attention": False},
        {"layer_types": ["full_attention", "sliding_attention"], "mamba_n_heads": 8},
        {"use_bidirectional_attention": "vision"},
    ],
)
def test_what_changes_nothing_is_no_reason(keys: dict[str, Any]) -> None:
    assert why_unfit({**LLAMA, **keys}) is None and why_bidirectional({**LLAMA, **keys}) is None
    assert not has_experts({**LLAMA, **keys})


def test_a_missing_size_of_an_unknown_family_is_no_puzzle() -> None:
    config = {key: value for key, value in LLAMA.items() if key != "intermediate_size"}
    with pytest.raises(CheckpointError, match="novel is not in the table of families, and its config has no interm"):
        dimensions({**config, "model_type": "novel"})


def test_what_sees_later_tokens_is_named() -> None:
    assert why_bidirectional({"use_bidirectional_attention": True}) == "use_bidirectional_attention: true"
    assert why_bidirectional({"is_causal": False}) == "is_causal: false"

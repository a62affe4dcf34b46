"""The accounting against the paper's printed numbers, against transformers itself, and against bad input."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from branchmix.accounting import (
    active_parameters,
    flops_per_token,
    inspect,
    kv_cache_bytes_per_token,
    parameters,
    shape_of,
)
from branchmix.accounting.formulas import windows
from branchmix.checkpoint.families import families
from branchmix.errors import CheckpointError

SMALL: dict[str, Any] = {
    "model_type": "cohere",
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "vocab_size": 256_000,
    "tie_word_embeddings": False,
}
"""The paper's 590M seed: one gain-only norm a block, no biases, fused d_ff 4096."""
LARGE: dict[str, Any] = {
    **SMALL,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 18,
    "num_attention_heads": 18,
    "num_key_value_heads": 6,
    "tie_word_embeddings": True,
}


def mixture(seed: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """A mixture's config: BAM with Expert KV over the small seed, unless ``fields`` say otherwise."""
    return {"model_type": "branchmix", "seed_config": SMALL if seed is None else seed, "num_experts": 4, **fields}


def btx(num_experts: int, top_k: int = 1, seed: dict[str, Any] | None = None) -> dict[str, Any]:
    return mixture(seed, attention="average", num_experts=num_experts, num_experts_per_tok=top_k)


# --- the paper -------------------------------------------------------------------------------------------------------

TABLE_9 = [
    # config, total, active per token
    (SMALL, 587_209_728, 587_209_728),
    (mixture(), 776_002_560, 662_756_352),
    (mixture(attention="kv_sharing"), 738_253_824, 625_007_616),
    (btx(4), 700_480_512, 587_234_304),
    (btx(5), 738_235_392, 587_240_448),
    (btx(6), 775_990_272, 587_246_592),
    (btx(7), 813_745_152, 587_252_736),
    (btx(8), 851_500_032, 587_258_880),
    (btx(6, top_k=3), 775_990_272, 662_744_064),
    (LARGE, 1_991_289_600, 1_991_289_600),
    (btx(4, seed=LARGE), 5_431_309_056, 1_991_455_488),
    (mixture(LARGE), 6_195_886_848, 2_756_033_280),
    (mixture(LARGE, attention="kv_sharing"), 6_004_783_872, 2_564_930_304),
]


@pytest.mark.parametrize(("config", "total", "active"), TABLE_9)
def test_table_9_parameters(config: dict[str, Any], total: int, active: int) -> None:
    assert parameters(config).total == total
    assert active_parameters(config).total == active


@pytest.mark.parametrize(
    ("config", "attention", "routers", "printed_ffn", "printed_total"),
    [
        (mixture(), 35_651_584, 2 * 8_192, 12_589_056, 48_257_024),
        (btx(4), 8_912_896, 8_192, 12_589_056, 21_510_144),
        (btx(6, top_k=3), 8_912_896, 12_288, 37_767_168, 46_692_352),
    ],
    ids=["BAM Expert KV", "BTX 4", "BTX 6 top-3"],
)
def test_table_7_flops(
    config: dict[str, Any], attention: int, routers: int, printed_ffn: int, printed_total: int
) -> None:
    """Attention and (total - FFN) to the digit; the FFN as printed is 1.5 d_ff = 6,144 above Table 10's formula."""
    found = inspect(config, context=256)
    assert found.flops is not None
    layer, top_k = found.flops.layer, config.get("num_experts_per_tok", 1)
    assert layer.attention == attention
    assert layer.routers == routers == printed_total - printed_ffn - attention
    assert layer.ffn == top_k * 12_582_912 == printed_ffn - top_k * 6_144
    assert layer.total == attention + layer.ffn + routers == printed_total - top_k * 6_144
    paper = found.paper()
    assert paper is not None
    assert paper["table_7_per_layer"] == {"attention": attention, "ffn": printed_ffn, "total": printed_total}


def test_table_7_json_is_one_layer_and_the_model_is_their_sum() -> None:
    flops = inspect(mixture(), context=256).as_dict()["flops_per_token"]
    expected = {"attention": 35_651_584, "ffn": 12_582_912, "routers": 16_384, "total": 48_250_880}
    assert {name: flops[name] for name in expected} == expected
    assert {name: flops["per_layer"][name] for name in expected} == expected
    assert flops["layers"] == 6
    assert flops["whole_model"] == {
        "attention": 6 * 35_651_584,
        "ffn": 6 * 12_582_912,
        "routers": 6 * 16_384,
        "non_embedding": 6 * 48_250_880,
        "lm_head": 2 * 1024 * 256_000,
        "total": 6 * 48_250_880 + 2 * 1024 * 256_000,
    }


def test_table_10_components() -> None:
    d, d_ff, n, context = 1024, 4096, 4, 256
    layer = flops_per_token(mixture(), context).layer
    assert layer.qkv == 6 * n * d**2
    assert layer.context == 2 * n * context * d
    assert layer.output == 2 * n * d**2
    assert layer.ffn == 3 * d * d_ff
    assert layer.attention_router == layer.ffn_router == 2 * n * d


def test_shared_kv_attention_flops() -> None:
    assert flops_per_token(mixture(attention="kv_sharing"), 256).layer.attention == 23_068_672


@pytest.mark.parametrize(
    ("attention", "printed"), [("kv_experts", 662_731_776), ("kv_sharing", 612_400_128), ("average", 587_234_304)]
)
def test_table_9_active_as_printed(attention: str, printed: int) -> None:
    """The paper counts one router instead of two, and for Shared KV forgets the shared keys and values."""
    paper = inspect(mixture(attention=attention), context=256).paper()
    assert paper is not None and paper["table_9"]["active"] == printed


def test_the_paper_counts_four_router_rows_for_btx_with_six_experts() -> None:
    active = active_parameters(btx(6, top_k=3)).total
    assert active - 6 * (6 - 4) * 1024 == 662_731_776


def test_a_dense_model_has_nothing_to_compare_with_the_paper() -> None:
    assert inspect(SMALL, context=256).paper() is None


# --- conventions -----------------------------------------------------------------------------------------------------


def test_context_conventions_meet_where_they_should() -> None:
    flops = flops_per_token(mixture(), 256)
    per_key = 4 * 4 * 8 * 128  # QK^T and AV, 2 FLOPs each, of 4 experts' 8 heads of 128
    assert flops.layer.context == per_key * 256 // 2
    assert flops.causal_mean * 256 == sum(per_key * keys for keys in range(1, 257))
    assert flops.last_token == per_key * 256


@pytest.mark.parametrize(("attention", "copies"), [("kv_experts", 4), ("kv_sharing", 1), ("average", 1), ("seed", 1)])
@pytest.mark.parametrize(("dtype", "size"), [(None, 2), ("fp32", 4), ("torch.float16", 2), ("fp8", 1)])
def test_kv_cache(attention: str, copies: int, dtype: str | None, size: int) -> None:
    config = mixture(LARGE, attention=attention)
    assert kv_cache_bytes_per_token(config, dtype) == 18 * 2 * 6 * 128 * size * copies


def test_dtype_of_the_config_counts() -> None:
    assert inspect({**SMALL, "torch_dtype": "float32"}).dtype == "float32"
    assert inspect(mixture({**SMALL, "dtype": "float16"})).weight_bytes == 2 * 776_002_560


def test_soft_ffn_and_top_k_attention_activity() -> None:
    assert active_parameters(mixture(num_experts_per_tok=4)).total == 776_002_560
    queries_and_outputs = 6 * 2 * 1024**2  # of one expert
    config = mixture(attention_num_experts_per_tok=2)
    assert active_parameters(config).total == 662_756_352 - 2 * queries_and_outputs, "all keys and values stay active"
    assert any("and all keys and values" in notice for notice in inspect(config).notices)
    shared = mixture(attention="kv_sharing", attention_num_experts_per_tok=1)
    assert active_parameters(shared).total == 625_007_616 - 3 * queries_and_outputs, "so do shared ones"


def test_top_k_attention_is_charged_for_the_chosen_experts_heads() -> None:
    """Shared KV top-1 costs what BTX costs, but for the router; Expert KV the other experts' keys and values more."""
    btx = flops_per_token(mixture(attention="average"), 256)
    shared = flops_per_token(mixture(attention="kv_sharing", attention_num_experts_per_tok=1), 256)
    own = flops_per_token(mixture(attention_num_experts_per_tok=1), 256)
    router, keys_and_values = 6 * 2 * 4 * 1024, 6 * 2 * 3 * 2 * 1024**2
    assert shared.total == btx.total + router
    assert own.total == btx.total + router + keys_and_values
    assert own.layer.context == btx.layer.context and own.last_token == btx.last_token
    for attention in ("kv_experts", "kv_sharing"):
        soft = flops_per_token(mixture(attention=attention), 256)
        assert flops_per_token(mixture(attention=attention, attention_num_experts_per_tok=4), 256) == soft


def test_bytes_that_a_decoding_step_reads() -> None:
    """Counted by hand: matrices of the chosen experts and of all keys and values, lm_head, norms, routers; cache."""
    d, layers, context, embeddings = 1024, 6, 512, 256_000 * 1024
    rest = embeddings + layers * (d + 2 * 4 * d + 3 * d * 2048) + d
    cache = layers * context * 2 * d * 2  # of one expert, in bf16
    for attention, top_k, matrices, copies in (
        ("kv_experts", None, 16, 4),
        ("kv_experts", 1, 2 + 8, 1),
        ("kv_sharing", 1, 4, 1),
        ("kv_sharing", 2, 6, 1),
    ):
        found = inspect(mixture(attention=attention, attention_num_experts_per_tok=top_k), context=context)
        assert found.decoding_bytes == 2 * (rest + layers * matrices * d * d) + copies * cache
    tied = {**SMALL, "tie_word_embeddings": True}
    assert inspect(tied, context=context).decoding_bytes == inspect(SMALL, context=context).decoding_bytes


def test_averaged_ffn_has_no_router() -> None:
    config = mixture(ffn="average", attention="average")
    assert parameters(config) == parameters(SMALL)
    assert flops_per_token(config, 256) == flops_per_token(SMALL, 256)


def test_biases_and_query_key_norms_are_per_expert() -> None:
    """Counted by hand for width 64, 4 heads of 16, 2 key/value heads, 3 experts, 1 layer."""
    seed = _tiny("llama", attention_bias=True, mlp_bias=True)
    dense, wide = parameters(seed), parameters(mixture(seed, num_experts=3))
    shared = parameters(mixture(seed, num_experts=3, attention="kv_sharing"))
    assert wide.attention == 3 * dense.attention
    assert wide.ffn == 3 * dense.ffn == 2 * 3 * (3 * 64 * 96 + 2 * 96 + 64)
    assert shared.attention == dense.attention * 3 - 2 * 2 * (2 * 32 * 65)
    normed = parameters(mixture(_tiny("olmo2"), num_experts=3, attention="kv_sharing"))
    assert normed.norms == 2 * (2 * 64 + 3 * 64 + 32) + 64


def test_default_context_is_the_models_own_up_to_4096() -> None:
    assert inspect({**SMALL, "max_position_embeddings": 512}).context == 512
    assert inspect({**SMALL, "max_position_embeddings": 131_072}).context == 4096
    assert inspect(SMALL).context == 4096
    assert any("exceeds" in n for n in inspect({**SMALL, "max_position_embeddings": 512}, context=513).notices)


def test_sliding_windows_limit_context_and_cache() -> None:
    config = {**_tiny("gemma3_text"), "num_hidden_layers": 12, "sliding_window": 64, "layer_types": None}
    found = inspect(config, context=256)
    assert found.flops is not None
    full, window = 2 * 256 * 64, 2 * 64 * (2 * 256 - 64) * 64 // 256
    assert [layer.context for layer in found.flops.layers] == ([window] * 5 + [full]) * 2
    assert found.flops.layer.context == full
    assert found.kv_cache_bytes_per_token == 12 * 2 * 32 * 2
    assert found.kv_cache_bytes == (2 * 256 + 10 * 64) * 2 * 32 * 2
    assert inspect(config, context=64).flops == inspect({**config, "sliding_window": None}, context=64).flops


# --- transformers itself ---------------------------------------------------------------------------------------------


def _tiny(model_type: str, **fields: Any) -> dict[str, Any]:
    """A config in the family's own names for sizes; heads of 16 so that every family can hold it."""
    sizes = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 40}
    renamed = {
        "gpt2": {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        | {"intermediate_size": "n_inner", "max_position_embeddings": "n_positions"},
        "opt": {"intermediate_size": "ffn_dim"},
        "falcon": {"intermediate_size": "ffn_hidden_size", "num_key_value_heads": "num_kv_heads"},
        "granitemoehybrid": {"intermediate_size": "shared_intermediate_size"},
        "xglm": {"hidden_size": "d_model", "intermediate_size": "ffn_dim", "num_attention_heads": "attention_heads"}
        | {"num_hidden_layers": "num_layers"},
    }
    gpt2 = ("gpt2", "gptj", "codegen", "gpt_bigcode")
    names = renamed["gpt2"] if model_type in gpt2 else renamed.get(model_type, {})
    no_groups = (*gpt2, "opt", "gpt_neox", "persimmon", "biogpt", "xglm")
    dropped = {"num_key_value_heads", "head_dim"} if model_type in no_groups else set()
    dropped |= (
        {"head_dim"} if model_type in ("falcon", "stablelm", "nanochat", "apertus", "granitemoehybrid") else set()
    )
    config = {names.get(name, name): size for name, size in sizes.items() if name not in dropped}
    if model_type in ("gptj", "codegen"):
        config["rotary_dim"] = 8
    if model_type == "granitemoehybrid":
        config |= {"num_local_experts": 0, "layer_types": ["full_attention"] * 2, "mamba_n_heads": 8}
    return {"model_type": model_type, **config, "pad_token_id": 0, **fields}


_WIDE_HEADS = {"head_dim": 32}
_BIASED = {"attention_bias": True}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "llama": [_BIASED, {"mlp_bias": True}, _WIDE_HEADS],
    "mistral": [_WIDE_HEADS],
    "ministral": [_WIDE_HEADS],
    "qwen2": [{"num_key_value_heads": None}],
    "qwen3": [_BIASED, _WIDE_HEADS],
    "gemma": [_BIASED, _WIDE_HEADS],
    "gemma2": [_BIASED, _WIDE_HEADS],
    "gemma3_text": [_BIASED, _WIDE_HEADS],
    "olmo": [_BIASED],
    "olmo2": [_BIASED, _WIDE_HEADS],
    "olmo3": [_BIASED],
    "cohere": [_BIASED, {"use_qk_norm": True}],
    "cohere2": [_BIASED, _WIDE_HEADS],
    "phi": [{"qk_layernorm": True}],
    "phi3": [{"num_key_value_heads": None}],
    "gpt_neox": [{"attention_bias": False}, {"use_parallel_residual": False}],
    "gptj": [{"n_inner": None}],
    "gpt2": [{"n_inner": None}],
    "opt": [
        {"enable_bias": False},
        {"layer_norm_elementwise_affine": False},
        {"do_layer_norm_before": False},
        {"_remove_final_layer_norm": True},
        {"word_embed_proj_dim": 24},
    ],
    "falcon": [
        {"bias": True},
        {"multi_query": False, "num_kv_heads": None},
        {"new_decoder_architecture": True},
        {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
        {"parallel_attn": False, "multi_query": False, "num_kv_heads": None},
        {"ffn_hidden_size": None},
    ],
    "stablelm": [{"use_qkv_bias": True}, {"qk_layernorm": True}, {"use_parallel_residual": True}],
    "starcoder2": [{"use_bias": False}],
    "granite": [_BIASED, {"mlp_bias": True}],
    "smollm3": [_BIASED, {"mlp_bias": True}],
    "glm": [{"attention_bias": False}, _WIDE_HEADS],
    "glm4": [{"attention_bias": False}, _WIDE_HEADS],
    "nemotron": [_BIASED, {"mlp_bias": True}, _WIDE_HEADS],
    "arcee": [_BIASED, {"mlp_bias": True}, _WIDE_HEADS],
    "jais2": [{"attention_bias": False}, {"mlp_bias": False}],
    "nanochat": [_BIASED],
    "apertus": [_BIASED, {"num_key_value_heads": None}],
    "exaone4": [_WIDE_HEADS],
    "hunyuan_v1_dense": [_BIASED, _WIDE_HEADS],
    "granitemoehybrid": [_BIASED],
    "persimmon": [{"qk_layernorm": False}],
    "codegen": [{"n_inner": None}],
    "gpt_bigcode": [{"n_inner": None}, {"multi_query": False}],
    "biogpt": [{"num_attention_heads": 8}],
    "xglm": [{"attention_heads": 8}],
}
CASES = [
    pytest.param(_tiny(family, **variant), id=f"{family}-{'-'.join(f'{k}={v}' for k, v in variant.items())}")
    for family, variants in VARIANTS.items()
    for variant in ({}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}, *variants)
]


def test_every_family_has_facts_and_a_test() -> None:
    assert set(families()) == set(VARIANTS)


@pytest.mark.parametrize("config", CASES)
def test_counts_equal_those_of_transformers(config: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {name: value for name, value in config.items() if name != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
    assert parameters(config).total == sum(parameter.numel() for parameter in model.parameters())
    by_part = {
        "embeddings": model.get_input_embeddings().weight.numel(),
        "norms": sum(p.numel() for n, p in model.named_parameters() if "norm" in n or ".ln_" in n),
    }
    assert parameters(config).norms == by_part["norms"]
    assert parameters(config).embeddings >= by_part["embeddings"]


def _defaulted(model_type: str) -> dict[str, Any]:
    """The family's config with only the sizes that no default fits: the rest is transformers' own default."""
    kept = ("model_type", "num_hidden_layers", "n_layer", "num_layers", "num_local_experts", "layer_types")
    return {name: value for name, value in _tiny(model_type).items() if name in kept}


@pytest.mark.parametrize("model_type", families())
def test_saved_configs_and_keys_left_out_mean_the_same(model_type: str) -> None:
    """What transformers would assume for key/value heads, head size, biases, tying and windows, we assume too."""
    from transformers import AutoConfig

    sizes = ("hidden_size", "n_embd", "d_model", "intermediate_size", "ffn_dim", "shared_intermediate_size")
    sizes = (*sizes, "num_attention_heads", "n_head", "attention_heads", "vocab_size")
    bare = _defaulted(model_type)
    fields = {name: value for name, value in bare.items() if name != "model_type"}
    saved = json.loads(AutoConfig.for_model(model_type, **fields).to_json_string(use_diff=False))
    left_out = bare | {name: saved[name] for name in sizes if name in saved}
    assert parameters(left_out) == parameters(saved)
    assert kv_cache_bytes_per_token(left_out, "bf16") == kv_cache_bytes_per_token(saved, "bf16")
    assert windows(shape_of(left_out)) == windows(shape_of(saved))


@pytest.mark.parametrize(
    "config",
    [
        {**_tiny("qwen3"), "num_hidden_layers": 6, "use_sliding_window": True, "max_window_layers": 4},
        {**_tiny("smollm3"), "num_hidden_layers": 8, "use_sliding_window": True, "sliding_window": 16},
        {**_tiny("gemma2"), "num_hidden_layers": 4},
        {**_tiny("gemma3_text"), "num_hidden_layers": 7, "sliding_window_pattern": 3},
        {**_tiny("cohere2"), "num_hidden_layers": 8},
        {**_tiny("olmo3"), "num_hidden_layers": 8},
        {**_tiny("ministral"), "num_hidden_layers": 3},
    ],
    ids=lambda config: config["model_type"],
)
def test_windows_equal_those_of_transformers(config: dict[str, Any]) -> None:
    from transformers import AutoConfig

    fields = {name: value for name, value in config.items() if name != "model_type"}
    theirs = AutoConfig.for_model(config["model_type"], **fields)
    ours = windows(shape_of(config))
    expected = [theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types]
    assert ours == expected
    assert any(ours)


@pytest.mark.parametrize("model_type", ["llama", "olmo2", "gpt_neox", "granite"])
def test_a_window_that_no_layer_of_the_family_has_is_ignored(model_type: str) -> None:
    config = _tiny(model_type)
    assert not any(windows(shape_of({**config, "sliding_window": 4})))
    assert flops_per_token({**config, "sliding_window": 4}, 16) == flops_per_token(config, 16)


# --- folders and weights ---------------------------------------------------------------------------------------------


def _folder(path: Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> Path:
    """A checkpoint folder of zero bytes: a header that is right, and data nobody reads."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in shapes.items():
        start, elements = end, 1
        for size in shape:
            elements *= size
        end = start + 2 * elements
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(end))
    return path


def _llama_shapes(layers: int = 2, gate: bool = True) -> dict[str, list[int]]:
    shapes = {"model.embed_tokens.weight": [320, 64], "lm_head.weight": [320, 64], "model.norm.weight": [64]}
    for layer in range(layers):
        block = {"self_attn.q_proj": [64, 64], "self_attn.k_proj": [32, 64], "self_attn.v_proj": [32, 64]}
        block |= {"self_attn.o_proj": [64, 64], "mlp.up_proj": [96, 64], "mlp.down_proj": [64, 96]}
        block |= {"input_layernorm": [64], "post_attention_layernorm": [64]}
        block |= {"mlp.gate_proj": [96, 64]} if gate else {}
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def test_a_folder_is_cross_checked_with_its_headers(tmp_path: Path) -> None:
    shapes = {**_llama_shapes(), "model.layers.0.self_attn.rotary_emb.inv_freq": [8]}
    found = inspect(_folder(tmp_path / "good", _tiny("llama"), shapes))
    assert found.source == "config" and found.stored == found.total.total and not found.notices
    found = inspect(_folder(tmp_path / "other", _tiny("llama", num_hidden_layers=3), shapes))
    assert found.stored != found.total.total
    assert any(f"{found.stored:,}" in notice for notice in found.notices)


def test_tied_weights_stored_twice_count_once(tmp_path: Path) -> None:
    found = inspect(_folder(tmp_path / "tied", _tiny("llama", tie_word_embeddings=True), _llama_shapes()))
    assert found.stored == found.total.total == parameters(_tiny("llama")).total - 320 * 64


@pytest.mark.parametrize("gate", [True, False])
def test_an_unknown_family_is_counted_from_its_weights(tmp_path: Path, gate: bool) -> None:
    config = _tiny("novel")
    found = inspect(_folder(tmp_path / "novel", config, _llama_shapes(gate=gate)), context=32)
    known = inspect(_tiny("llama" if gate else "nemotron"), context=32)
    assert found.source == "weights"
    assert found.total.attention == known.total.attention and found.total.ffn == known.total.ffn
    assert found.flops == known.flops, "sizes and weights agree, so the FLOPs are known"
    assert found.kv_cache_bytes_per_token == known.kv_cache_bytes_per_token
    assert any("novel" in notice for notice in found.notices)
    assert found.as_dict()["flops_per_token"]["layers"] == 2


def test_an_unknown_mixture_of_experts_is_counted_without_flops(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": [320, 64], "model.layers.0.mlp.gate.weight": [4, 64]}
    shapes |= {f"model.layers.0.mlp.experts.{i}.up_proj.weight": [96, 64] for i in range(4)}
    config = _tiny("novel_moe", num_experts=4, num_experts_per_tok=2)
    found = inspect(_folder(tmp_path / "moe", config, shapes))
    assert found.total.ffn == 2 * found.active.ffn == 4 * 96 * 64
    assert found.total.routers == 4 * 64
    assert found.flops is None and found.kv_cache_bytes_per_token is None
    assert found.as_dict()["flops_per_token"] is None


@pytest.mark.parametrize("top_k", [None, 1])
@pytest.mark.parametrize("attention", ["kv_experts", "kv_sharing"])
def test_a_mixture_of_an_unknown_family_has_the_active_parameters_of_its_top_k(
    tmp_path: Path, attention: str, top_k: int | None
) -> None:
    """As the formula counts them where there is one."""
    kv = 4 if attention == "kv_experts" else 1
    experts = {"q_proj.weight": [4 * 64, 64], "k_proj.weight": [kv * 32, 64], "v_proj.weight": [kv * 32, 64]}
    ffn = {"gate.weight": [4, 64], "experts.gate_up_proj": [4, 192, 64], "experts.down_proj": [4, 64, 96]}
    block = {f"self_attn.heads.{name}": shape for name, shape in experts.items()}
    block |= {"self_attn.o_proj.weight": [64, 4 * 64], "self_attn.expert_gate.weight": [4, 64]}
    block |= {f"mlp.{name}": shape for name, shape in ffn.items()}
    shapes = {name: shape for name, shape in _llama_shapes().items() if "proj" not in name}
    shapes |= {f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in block.items()}
    options = {"attention": attention, "attention_num_experts_per_tok": top_k}
    stored = {f"model.{name}": shape for name, shape in shapes.items()}
    found = inspect(_folder(tmp_path / "mixture", mixture(_tiny("novel"), **options), stored), context=32)
    known = mixture(_tiny("llama"), **options)
    assert found.source == "weights" and found.total == parameters(known)
    assert found.active == active_parameters(known)
    assert found.flops == flops_per_token(known, 32)
    assert any("chosen attention experts" in notice for notice in found.notices) == (top_k is not None)


def test_a_broken_weight_file_does_not_hide_what_the_config_says(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "cut", _tiny("llama"), _llama_shapes())
    (folder / "model.safetensors").write_bytes(b"\x10")
    found = inspect(folder)
    assert found.total == parameters(_tiny("llama")) and found.stored is None
    assert "weights not counted" in found.notices[0]


def test_a_hub_id_is_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from branchmix.checkpoint import hub

    folder = _folder(tmp_path / "snapshot", _tiny("llama"), _llama_shapes())
    asked = []

    def resolve(given: str) -> hub.ResolvedModel:
        asked.append(given)
        return hub.ResolvedModel(given, folder)

    monkeypatch.setattr("branchmix.accounting.inspection.resolve", resolve)
    assert inspect("some-org/some-model@main").total == parameters(_tiny("llama"))
    assert asked == ["some-org/some-model@main"]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {**SMALL, "model_type": "lama"},
            r"no formula for the family 'lama' \(did you mean 'llama'\?\).*checkpoint folder",
        ),
        (mixture({**SMALL, "model_type": "novel"}), "no formula for the family 'novel'.*checkpoint folder"),
        ({"hidden_size": 3}, "no model_type"),
        ({**SMALL, "hidden_size": -1}, "hidden_size is -1"),
        ({**SMALL, "hidden_size": 4}, "8 heads do not fit"),
        ({**SMALL, "num_key_value_heads": 3}, "8 query heads are not a multiple of 3"),
        ({**SMALL, "vocab_size": "many"}, "vocab_size is 'many'"),
        ({"model_type": "branchmix"}, "needs seed_config"),
        (mixture(num_experts_per_tok=5), "num_experts_per_tok is 5, but num_experts is 4"),
        (mixture(attention_num_experts_per_tok=5), "attention_num_experts_per_tok is 5, but num_experts is 4"),
        (mixture(num_experts=0), "num_experts is 0"),
        (mixture(attention="kv_expert"), "did you mean 'kv_experts'"),
        (mixture(ffn="dense"), "ffn is 'dense', not one of experts, average"),
        (mixture(num_experts=7, expert_names=["a", "b", "c"]), "num_experts is 7, but expert_names has 3"),
        (mixture(expert_names="abcd"), "expert_names is not a list of names"),
        (mixture(expert_names=["a", "b", "c", "b"]), "expert_names holds a name twice"),
        (mixture(expert_rope_parameters=[{}]), "num_experts is 4, but expert_rope_parameters has 1"),
        (mixture(routed_scaling_factor="auto"), "routed_scaling_factor is 'auto', not a number"),
        (mixture(document_gate={"decay": 0.9}), "document_gate has no list of domains"),
        (mixture(document_gate={"domains": ["a", "a"], "decay": 0.9}), "document_gate names a domain twice"),
        (mixture(document_gate={"domains": ["a"], "decay": 2}), "document_gate: decay is 2, not a number from 0 to 1"),
    ],
)
def test_bad_configs_are_refused_in_one_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        inspect(config)
    assert "\n" not in str(error.value)


def test_pure_functions_refuse_unknown_families() -> None:
    for function in (parameters, active_parameters, lambda config: flops_per_token(config, 8)):
        with pytest.raises(CheckpointError, match="checkpoint folder"):
            function(_tiny("novel"))


@pytest.mark.parametrize("context", [0, -1, True, 1.5])
def test_bad_context(context: Any) -> None:
    with pytest.raises(CheckpointError, match="not a positive number of tokens"):
        inspect(SMALL, context=context)


def test_auto_is_the_dtype_of_the_config() -> None:
    assert inspect({**SMALL, "dtype": "float16"}, dtype="auto").dtype == "float16"


def test_bad_dtype() -> None:
    with pytest.raises(CheckpointError, match=r"unknown dtype 'bf61'.*did you mean 'bf16'"):
        inspect(SMALL, dtype="bf61")


def test_bad_paths(tmp_path: Path) -> None:
    for name, content, message in (
        ("text.json", "no json", "not valid JSON"),
        ("list.json", "[1]", "not a JSON object"),
        ("binary.json", b"\xff\xfe\x00", "not valid JSON"),
        ("empty.json", "{}", "no model_type"),
    ):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(CheckpointError, match=message):
            inspect(tmp_path / name)
    with pytest.raises(CheckpointError, match="no such file"):
        inspect(str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match="no such file"):
        inspect("missing/config.json")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        inspect(tmp_path)


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "good", _tiny("llama"), _llama_shapes())
    code = (
        f"import sys; from branchmix.accounting import inspect; inspect({str(folder)!r});"
        "print([m for m in ('torch', 'transformers', 'pydantic', 'rich', 'typer') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

"""Recipes one by one: what each option does to the tensors, with torch as the judge of every number."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer
from xxhash import xxh3_128

import branchmix
from bad_inputs import with_extra
from branchmix.errors import CheckpointError
from branchmix.upcycling.verify import sample_tokens
from checkpoints import Tensors, config, ffn_expert, in_dtype, mean, weights
from families import BY_NAME
from mixtures import load, recipe, tokens
from tokenizers_of_bytes import save_byte_tokenizer

FAMILIES = ("llama", "qwen3", "cohere-qk-norm", "gpt-neox", "gpt2", "olmo2", "opt", "falcon-new", "phi3")
Siblings = Callable[..., dict[str, Path]]
ATTENTION = (".self_attn.", ".attention.", ".attn.", ".self_attention.")


def upcycled(models: dict[str, Path], out: Path, **options: Any) -> Tensors:
    branchmix.upcycle(recipe(models, **options), out)
    return weights(out)


def test_the_same_model_given_twice_is_said(siblings: Siblings, tmp_path: Path) -> None:
    """By whatever path; experts of their own, or copies that the recipe asks for, need no note."""
    models = siblings("llama")
    (tmp_path / "link").symlink_to(models["seed"])
    experts = [("code", models["seed"]), ("law", tmp_path / "link"), ("math", models["math"]), ("sums", models["math"])]
    given = {"seed": str(models["seed"]), "experts": [{"name": name, "model": str(path)} for name, path in experts]}
    notes = [note for note in branchmix.upcycle(given, tmp_path / "out", dry_run=True).plan.notes if "same" in note]
    assert [note.partition(" (")[0] for note in notes] == [
        "expert 'code' is the same model as seed",
        "expert 'law' is the same model as seed",
        "expert 'sums' is the same model as expert 'math'",
    ]
    assert notes[0].endswith(": seed_copies makes copies of the seed") and str(models["seed"]) in notes[0]
    fine = branchmix.upcycle(recipe(models, seed_copies=2), tmp_path / "out", dry_run=True)
    assert not [note for note in fine.plan.notes if "same model" in note]


# --- what is averaged, and what is the seed's


@pytest.mark.parametrize("name", FAMILIES)
def test_btx_averages_attention(name: str, siblings: Siblings, tmp_path: Path) -> None:
    models = siblings(name)
    sources = [weights(path) for path in models.values()]
    found = upcycled(models, tmp_path / "btx", attention="average")
    assert not any("expert_gate" in tensor for tensor in found)
    checked = [tensor for tensor in sources[0] if f"model.{tensor}" in found]
    assert sum(any(part in tensor for part in ATTENTION) for tensor in checked) >= 2 * 2
    for tensor in checked:
        assert torch.equal(found[f"model.{tensor}"], mean([source[tensor] for source in sources])), tensor
    assert load(tmp_path / "btx").config.has_attention_experts is False


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_of_the_seed(name: str, siblings: Siblings, tmp_path: Path) -> None:
    models = siblings(name)
    seed = weights(models["seed"])
    found = upcycled(models, tmp_path / "out", attention="seed")
    attention = [tensor for tensor in seed if any(part in tensor for part in ATTENTION)]
    assert attention
    for tensor in attention:
        assert torch.equal(found[f"model.{tensor}"], seed[tensor]), tensor


@pytest.mark.parametrize("name", FAMILIES)
def test_soup_is_an_ordinary_checkpoint(name: str, siblings: Siblings, tmp_path: Path) -> None:
    models = siblings(name)
    sources = [weights(path) for path in models.values()]
    found = upcycled(models, tmp_path / "soup", attention="average", ffn="average")
    assert found.keys() == sources[0].keys()
    for tensor, value in found.items():
        assert torch.equal(value, mean([source[tensor] for source in sources])), tensor
    assert config(tmp_path / "soup")["model_type"] == BY_NAME[name].model_type
    assert not list((tmp_path / "soup").glob("*.py"))
    soup = load(tmp_path / "soup")
    assert type(soup).__module__.startswith("transformers.models.")
    with torch.no_grad():
        assert soup(tokens()).logits.isfinite().all()


@pytest.mark.parametrize("name", ("llama", "gpt-neox", "gpt2"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_averages_of_16_bit_sources_are_correctly_rounded(
    name: str, dtype: torch.dtype, siblings: Siblings, tmp_path: Path
) -> None:
    models = in_dtype(siblings(name), tmp_path, dtype)
    sources = [weights(path) for path in models.values()]
    found = upcycled(models, tmp_path / "soup", attention="average", ffn="average")
    for tensor, value in found.items():
        assert value.dtype == dtype and torch.equal(value, mean([source[tensor] for source in sources])), tensor


@pytest.mark.parametrize(
    ("stored", "wanted"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float16")]
)
def test_averages_in_another_dtype_are_rounded_once(
    stored: str, wanted: str, siblings: Siblings, tmp_path: Path
) -> None:
    models = in_dtype(siblings("llama"), tmp_path, getattr(torch, stored))
    sources = [{name: value.double() for name, value in weights(path).items()} for path in models.values()]
    found = upcycled(models, tmp_path / "out", attention="kv_sharing", dtype=wanted)
    target = getattr(torch, wanted)
    assert {value.dtype for value in found.values()} == {target}
    assert config(tmp_path / "out")["dtype"] == config(tmp_path / "out")["seed_config"]["dtype"] == wanted
    for tensor, ours in (
        ("model.embed_tokens.weight", "model.model.embed_tokens.weight"),
        ("model.layers.1.self_attn.k_proj.weight", "model.model.layers.1.self_attn.heads.k_proj.weight"),
    ):
        exact = mean([source[tensor] for source in sources])
        if (stored, wanted) == ("bfloat16", "float32"):  # three bf16 summed in fp32: the last bit of fp32 may differ
            torch.testing.assert_close(found[ours], exact.float(), rtol=2e-7, atol=1e-9)
        else:
            assert torch.equal(found[ours], exact.to(target)), tensor
    up = "model.model.layers.0.mlp.experts.1.up_proj.weight"
    assert torch.equal(found[up], sources[1]["model.layers.0.mlp.up_proj.weight"].to(target))
    assert load(tmp_path / "out", dtype="auto").dtype == target


def test_experts_stored_in_other_dtypes_are_cast(siblings: Siblings, tmp_path: Path) -> None:
    models = dict(siblings("llama-bias"))
    models["code"] = in_dtype({"code": models["code"]}, tmp_path, torch.bfloat16)["code"]
    for attention in ("kv_experts", "kv_sharing"):
        found = upcycled(models, tmp_path / attention, attention=attention)
        assert {value.dtype for value in found.values()} == {torch.float32}
        code = weights(models["code"])["model.layers.0.mlp.up_proj.weight"].float()
        assert torch.equal(ffn_expert(found, 1)["up_proj.weight"], code)
        with torch.no_grad():
            assert load(tmp_path / attention)(tokens()).logits.isfinite().all()


def test_equal_whole_numbers_are_copied(siblings: Siblings, tmp_path: Path) -> None:
    """Buffers that old checkpoints hold: they have no mean, and need none where all models have the same."""
    models = {name: shutil.copytree(folder, tmp_path / name) for name, folder in siblings("llama").items()}
    for folder in models.values():
        with_extra(folder, "model.buffer", torch.arange(4))
    for options in ({}, {"attention": "average", "ffn": "average"}):
        out = tmp_path / f"out-{len(options)}"
        branchmix.upcycle(recipe(models, **options), out, verify=True)
        found = weights(out)
        name = "model.buffer" if options else "model.model.buffer"
        assert torch.equal(found[name], torch.arange(4))
    branchmix.remove_expert(tmp_path / "out-0", "code", tmp_path / "smaller")
    assert torch.equal(weights(tmp_path / "smaller")["model.model.buffer"], torch.arange(4))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", '{"tokenizer_class": "LlamaTokenizer"}'),
        ("tokenizer_config.json", '{"tokenizer_class": "GPT2Tokenizer"}'),
        ("tokenizer.json", "{}"),
    ],
)
def test_the_proof_does_without_a_tokenizer_that_works(
    file: str, content: str, siblings: Siblings, tmp_path: Path
) -> None:
    """One without a vocabulary makes no tokens, and one that is broken cannot be loaded: random ids work too."""
    shutil.copy(siblings("llama")["seed"] / "config.json", tmp_path)
    (tmp_path / file).write_text(content)
    assert sample_tokens(tmp_path, 97).shape == (1, 48)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gptj"])
@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_the_proof_takes_no_more_tokens_than_there_are_positions(
    name: str, with_tokenizer: bool, siblings: Siblings, tmp_path: Path
) -> None:
    """Nor do prompts for the routers."""
    key = "max_position_embeddings" if name == "opt" else "n_positions"
    models = dict(siblings(name, vocab_size=259, **{key: 12}))
    options: dict[str, Any] = {}
    if with_tokenizer:
        models["seed"] = Path(shutil.copytree(models["seed"], tmp_path / "seed"))
        save_byte_tokenizer(models["seed"])
        options["router_init"] = {"prompts": {expert: [expert * 9] for expert in models}}
    report = branchmix.upcycle(recipe(models, **options), tmp_path / "out", verify=True)
    assert report.verification is not None and report.verification.tokens == 12
    assert all(check.skipped is None for check in report.verification.experts)


def test_what_does_not_fit_float16_is_refused(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("llama")
    (tmp_path / "code").mkdir()
    large = weights(models["code"])
    large["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
    save_file(large, tmp_path / "code" / "model.safetensors", {"format": "pt"})
    (tmp_path / "code" / "config.json").write_text((models["code"] / "config.json").read_text())
    with pytest.raises(CheckpointError, match="do not fit F16"):
        upcycled({**models, "code": tmp_path / "code"}, tmp_path / "out", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code"]


MERGES: list[tuple[dict[str, Any], list[float]]] = [
    ({"merge": {"weighted": {"code": 2.0, "seed": 0.5}}}, [0.5, 2.0, 1.0]),
    ({"merge": {"weighted": {"math": 0.0}}}, [1.0, 1.0, 0.0]),
    ({"merge": "seed"}, [1.0, 0.0, 0.0]),
    ({"include_seed": False}, [0.0, 1.0, 1.0]),
    ({"seed_copies": 3}, [1.0, 1.0, 1.0]),
    ({"include_seed": False, "seed_copies": 1}, [1.0, 1.0, 1.0]),
]


@pytest.mark.parametrize(("options", "shares"), MERGES)
def test_merge_weighs_the_models(
    options: dict[str, Any], shares: list[float], siblings: Siblings, tmp_path: Path
) -> None:
    """Copies of the seed weigh nothing further: each model counts once."""
    models = siblings("llama")
    sources = [weights(path) for path in models.values()]
    found = upcycled(models, tmp_path / "out", attention="kv_sharing", **options)
    for tensor, ours in (
        ("model.norm.weight", "model.model.norm.weight"),
        ("lm_head.weight", "model.lm_head.weight"),
        ("model.layers.1.self_attn.v_proj.weight", "model.model.layers.1.self_attn.heads.v_proj.weight"),
    ):
        wanted = mean([source[tensor] for source in sources], shares)
        torch.testing.assert_close(found[ours], wanted, rtol=2e-7, atol=0)


@pytest.mark.parametrize(("choice", "shares"), [("seed", [1, 0, 0]), ("math", [0, 0, 1]), ("average", [1, 1, 1])])
def test_shared_keys_and_values_start_where_asked(
    choice: str, shares: list[float], siblings: Siblings, tmp_path: Path
) -> None:
    models = siblings("qwen3")
    sources = [weights(path) for path in models.values()]
    merge = {"weighted": {"code": 5.0}, "kv_init": choice}
    found = upcycled(models, tmp_path / "out", attention="kv_sharing", merge=merge)
    for role in ("k_proj", "v_proj", "k_norm"):
        wanted = mean([source[f"model.layers.0.self_attn.{role}.weight"] for source in sources], shares)
        assert torch.equal(found[f"model.model.layers.0.self_attn.heads.{role}.weight"], wanted), role


def test_without_the_seed(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("llama")
    found = upcycled(models, tmp_path / "out", include_seed=False)
    assert config(tmp_path / "out")["expert_names"] == ["code", "math"]
    code = weights(models["code"])["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(ffn_expert(found, 0)["up_proj.weight"], code) and not ffn_expert(found, 2)


def test_folded_norms_leave_a_gain_of_one(siblings: Siblings, tmp_path: Path) -> None:
    for name, one in (("llama", 1.0), ("gemma", 0.0)):
        merge = {"method": "average", "fold_norms": True}
        found = upcycled(siblings(name), tmp_path / name, merge=merge)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            assert (found[f"model.model.layers.0.{norm}.weight"] == one).all()
        assert config(tmp_path / name)["folded_norms"] == ["input_layernorm", "post_attention_layernorm"]
        assert load(tmp_path / name).config.folded_norms  # survives transformers


# --- routers


def test_routers_are_reproducible_and_seeded(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("llama")
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        upcycled(models, tmp_path / out, router_init={"seed": seed, "std": 0.1})
    first, again, other = (weights(tmp_path / out) for out in "abc")
    files = [(tmp_path / out / "model.safetensors").read_bytes() for out in "ab"]
    assert files[0] == files[1] and first.keys() == again.keys()
    routers = [name for name in first if name.endswith(("gate.weight",))]
    assert len(routers) == 4
    for name in first:
        assert torch.equal(first[name], other[name]) == (name not in routers), name
    drawn = torch.cat([first[name].flatten() for name in routers])
    assert abs(float(drawn.std()) - 0.1) < 0.02 and abs(float(drawn.mean())) < 0.02
    assert len(drawn.unique()) > 0.99 * len(drawn)  # no router repeats another's numbers


def test_routers_of_zeros(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("llama")
    soft = upcycled(models, tmp_path / "soft", router_init="zeros", routing={"ffn": {"soft": True}})
    attention = upcycled(models, tmp_path / "attention", router_init={"attention": "zeros"})
    for name, value in soft.items():
        if name.endswith("gate.weight"):
            assert not value.any()
            assert attention[name].any() == ("expert_gate" not in name)


@pytest.mark.parametrize("fold_norms", (False, True))
@pytest.mark.parametrize("name", ("llama", "gemma"))
def test_routers_from_hidden_states_point_to_what_they_will_see(
    name: str, fold_norms: bool, siblings: Siblings, tmp_path: Path
) -> None:
    """On the seed's own trunk the states are known exactly: each row is its expert's mean state, centred."""
    models = siblings(name, vocab_size=259)
    seed = Path(shutil.copytree(models["seed"], tmp_path / "seed"))
    gains = weights(seed)
    for number, norm in enumerate(("input_layernorm", "post_attention_layernorm")):
        gains[f"model.layers.0.{norm}.weight"] = torch.linspace(-0.5, 2.0 + number, 32)
    save_file(gains, seed / "model.safetensors", {"format": "pt"})
    save_byte_tokenizer(seed)
    prompts = {"seed": "It was a dark night.", "code": "x += f(y);", "math": "7 + 8 = 15"}
    options = {
        "merge": {"method": "seed", "fold_norms": fold_norms},
        "router_init": {"prompts": {expert: [prompt] for expert, prompt in prompts.items()}},
    }
    branchmix.upcycle(recipe({**models, "seed": seed}, **options), tmp_path / "out")
    mixture, reader = load(tmp_path / "out"), AutoTokenizer.from_pretrained(seed)
    block = mixture.model.model.layers[0]
    seen: list[torch.Tensor] = []
    block.self_attn.expert_gate.register_forward_pre_hook(
        lambda gate, args: seen.append(args[0].reshape(-1, 32).mean(0))
    )
    with torch.no_grad():
        for prompt in prompts.values():
            mixture(reader(prompt, return_tensors="pt").input_ids)
        states_ED = torch.stack(seen)
        similar_E = torch.cosine_similarity(states_ED - states_ED.mean(0), block.self_attn.expert_gate.weight, dim=1)
    assert (similar_E > 0.9999).all(), similar_E


@pytest.mark.parametrize(
    ("routing", "wanted"),
    [({"top_k": 1}, 3.0), ({"top_k": 2}, 1.5), ({"top_k": 2, "normalize": True}, 1.0), ({"soft": True}, 1.0)],
)
def test_auto_scaling_is_n_over_k_for_raw_gates(
    routing: dict[str, Any], wanted: float, siblings: Siblings, tmp_path: Path
) -> None:
    upcycled(siblings("llama"), tmp_path / "out", routing={"ffn": routing}, routed_scaling_factor="auto")
    assert config(tmp_path / "out")["routed_scaling_factor"] == wanted


# --- the folder


def test_shards(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("llama")
    whole = upcycled(models, tmp_path / "whole")
    sharded = upcycled(models, tmp_path / "sharded", max_shard_size="60KB")
    files = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 70_000 for file in files)
    assert sharded.keys() == whole.keys() and all(torch.equal(sharded[name], whole[name]) for name in whole)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "sharded")(tokens()).logits, load(tmp_path / "whole")(tokens()).logits)


def test_companions_and_provenance(siblings: Siblings, tmp_path: Path) -> None:
    models = in_dtype(siblings("llama"), tmp_path, torch.float32)
    companions = {
        "tokenizer_config.json": '{"model_max_length": 64}',
        "chat_template.jinja": "{{ messages }}",
        "generation_config.json": '{"max_new_tokens": 7}',
        "merges.txt": "a b",
    }
    for file, content in companions.items():
        (models["seed"] / file).write_text(content)
    before = {
        file: (file.stat().st_mtime_ns, hashlib.sha256(file.read_bytes()).hexdigest())
        for path in models.values()
        for file in path.iterdir()
    }
    upcycled(models, tmp_path / "out", router_init={"seed": 11, "std": 0.05})
    for file, content in companions.items():
        assert (tmp_path / "out" / file).read_text() == content
    record = json.loads((tmp_path / "out" / "branchmix.json").read_text())
    assert record["recipe"]["router_init"]["seed"] == 11
    assert record["recipe"]["merge"]["method"] == "average"  # defaults too: they may change one day
    assert {"branchmix", "transformers", "numpy"} <= record["versions"].keys()
    assert [source["name"] for source in record["sources"]] == ["seed", "code", "math"]
    for source in record["sources"]:
        (file,) = source["files"]
        content_bytes = (models[source["name"]] / file["name"]).read_bytes()
        assert file["xxh3_128"] == xxh3_128(content_bytes).hexdigest() and file["bytes"] == len(content_bytes)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers") and "seed: 11" in card and str(models["code"]) in card
    branchmix.upcycle(record["recipe"], tmp_path / "again")  # the recipe of the record repeats the mixture
    repeated = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert repeated == (tmp_path / "out" / "model.safetensors").read_bytes()
    after = {
        file: (file.stat().st_mtime_ns, hashlib.sha256(file.read_bytes()).hexdigest())
        for path in models.values()
        for file in path.iterdir()
    }
    assert after == before


def test_padded_vocabulary_without_the_seed(siblings: Siblings, tmp_path: Path) -> None:
    """The seed's padding rows have no counterpart in the experts: they stay as they are."""
    vocabulary = {"model": {"type": "BPE", "vocab": {f"t{i}": i for i in range(90)}, "merges": []}, "added_tokens": []}
    models = in_dtype(siblings("llama"), tmp_path, torch.float32)
    models["seed"] = BY_NAME["llama"].save(tmp_path / "padded", 0, vocab_size=104)
    for path in models.values():
        (path / "tokenizer.json").write_text(json.dumps(vocabulary))
    found = upcycled(models, tmp_path / "out", include_seed=False)
    sources = {name: weights(path)["model.embed_tokens.weight"] for name, path in models.items()}
    embeddings = found["model.model.embed_tokens.weight"]
    assert embeddings.shape == (104, 32) and torch.equal(embeddings[97:], sources["seed"][97:])
    assert torch.equal(embeddings[:97], mean([sources["code"], sources["math"]]))
    with torch.no_grad():
        assert load(tmp_path / "out")(tokens()).logits.shape[-1] == 104


def test_a_dry_run_tells_and_writes_nothing(siblings: Siblings, tmp_path: Path) -> None:
    from branchmix.cli.merging import as_dict

    for name, options in (("bam", {}), ("soup", {"attention": "average", "ffn": "average"})):
        given = recipe(siblings("llama"), **options)
        planned = as_dict(branchmix.upcycle(given, tmp_path / name, dry_run=True))
        assert not list(tmp_path.iterdir())
        written = as_dict(branchmix.upcycle(given, tmp_path / name))
        tensors = weights(tmp_path / name)
        assert planned["bytes"] == written["bytes"] == sum(value.nbytes for value in tensors.values())
        total = sum(value.numel() for value in tensors.values())
        assert planned["accounting"]["parameters"]["total"] == total
        experts_of_kv = 3 if name == "bam" else 1
        assert planned["accounting"]["kv_cache_bytes_per_token"] == experts_of_kv * 2 * 2 * 2 * 8 * 4
        assert sum(group["tensors"] for group in planned["groups"]) == len(tensors)
        assert sum(group["bytes"] for group in planned["groups"]) == planned["bytes"]
        assert planned["free_bytes"] > 0 and planned["peak_memory_bytes"] > 0
        assert planned["dry_run"] and not written["dry_run"]
        for path in (tmp_path / name).iterdir():
            path.unlink()
        (tmp_path / name).rmdir()

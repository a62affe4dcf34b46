"""Experts kept as low-rank changes of the seed compute what the adapters, or the whole matrices, would."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import branchmix
from branchmix.accounting import active_parameters, parameters
from branchmix.checkpoint.index import CheckpointIndex
from branchmix.errors import BranchMixError, CheckpointError, CompatibilityError, RecipeError, VerificationError
from branchmix.models.attention_branchmix import BranchMixAttention
from branchmix.models.low_rank_branchmix import BranchMixLowRank, BranchMixLowRankExperts
from branchmix.models.routers import one_hot_gates
from branchmix.train.checks import require_shardable
from branchmix.train.config import Parallel, RunConfig
from branchmix.train.trained_parts import add_adapters, freeze
from branchmix.upcycling.edit_experts import add_expert, remove_expert
from branchmix.upcycling.low_rank import rank_for
from branchmix.upcycling.sources import DenseExpert
from families import BY_NAME, NAMES
from mixtures import BOTH, close, gated, load, offloaded, random_mixture, tokens

peft = pytest.importorskip("peft")

Siblings = Callable[..., dict[str, Path]]
TOP_2 = {"ffn": {"top_k": 2, "normalize": True}}
RANKS = {"q": [0, 2, 3], "k": [0, 2, 1], "v": [0, 1, 0], "o": [0, 2, 2], "gate": [0, 0, 2], "up": [0, 3, 1]}
RANKS["down"] = [0, 2, 0]


def ranks(attention: str) -> list[dict[str, list[int]]]:
    return [{name: of for name, of in RANKS.items() if attention == "kv_experts" or name not in "kv"}]


def changed(name: str, attention: str = "kv_experts", **options: Any) -> Any:
    """A random mixture of three experts, of which the first is the seed."""
    return random_mixture(name, attention, expert_ranks=ranks(attention), **options)


def adapter(seed: Path, folder: Path, number: int = 0, **options: Any) -> Path:
    """A LoRA adapter of attention and FFN that changes something."""
    projections = DenseExpert.open("seed", CheckpointIndex.open(seed)).projections
    base = AutoModelForCausalLM.from_pretrained(seed, dtype=torch.float32)
    targets = [module for module, _ in base.named_modules() if module.endswith(tuple(f".{p}" for p in projections))]
    settings = {"r": 2 + number, "lora_alpha": 3, "target_modules": targets[:: 1 + number], **options}
    torch.manual_seed(number)
    conv1d = base.config.model_type == "gpt2"
    tuned = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, fan_in_fan_out=conv1d, **settings))
    tuned.save_pretrained(folder)
    return folder


def given(seed: Path, **experts: Any) -> dict[str, Any]:
    """A recipe; what is no path is an option."""
    models = [{"name": name, "model": str(value)} for name, value in experts.items() if isinstance(value, Path)]
    options = {name: value for name, value in experts.items() if not isinstance(value, Path)}
    return {"seed": str(seed), "experts": models, "routing": TOP_2, "router_init": {"std": 0.3}, **options}


def with_adapter(seed: Path, folder: Path) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(seed, dtype=torch.float32)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(base, folder).eval()(tokens()).logits


def forced(model: Any, number: int) -> torch.Tensor:
    with torch.no_grad(), one_hot_gates(model, number):
        return model(tokens()).logits


# ---- the same function ----


def two_adapters(seed: Path, root: Path) -> dict[str, Path]:
    more = {"use_rslora": True, "alpha_pattern": {r".*\.0\..*": 5}}
    return {"one": adapter(seed, root / "one"), "two": adapter(seed, root / "two", 1, **more)}


@pytest.mark.parametrize("name", NAMES)
def test_lora_experts_are_their_adapters(name: str, siblings: Siblings, tmp_path: Path) -> None:
    """Forced gates give what PEFT computes."""
    seed = siblings(name)["seed"]
    experts = two_adapters(seed, tmp_path)
    assert branchmix.upcycle(given(seed, **experts, expert_rank=1), tmp_path / "m").plan.lossless
    model = load(tmp_path / "m")
    for number, folder in enumerate(experts.values(), 1):
        close(forced(model, number), with_adapter(seed, folder))


@pytest.mark.parametrize("attention", [*BOTH, "average"])
@pytest.mark.parametrize("name", ["llama-bias", "gpt2", "falcon-new", "cohere-qk-norm"])
def test_a_mixture_of_adapters_is_that_of_the_merged_models(
    name: str, attention: str, siblings: Siblings, tmp_path: Path
) -> None:
    """Under its own gates."""
    seed = siblings(name)["seed"]
    recipe = given(seed, **two_adapters(seed, tmp_path), attention=attention)
    branchmix.upcycle(recipe, tmp_path / "whole")
    branchmix.upcycle(recipe | {"expert_rank": 1}, tmp_path / "small")
    with torch.no_grad():
        close(load(tmp_path / "small")(tokens()).logits, load(tmp_path / "whole")(tokens()).logits)


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gemma", "cohere"])
def test_full_fine_tunes_of_full_rank_are_themselves(
    name: str, attention: str, siblings: Siblings, tmp_path: Path
) -> None:
    models = siblings(name)
    experts = {key: models[key] for key in ("code", "math")}
    for folder, rank in (("whole", "full"), ("changes", 48)):
        recipe = given(models["seed"], **experts, attention=attention, expert_rank=rank)
        branchmix.upcycle(recipe, tmp_path / folder, verify=True)
    with torch.no_grad():
        close(load(tmp_path / "changes")(tokens()).logits, load(tmp_path / "whole")(tokens()).logits)


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", ["llama", "olmo2", "gpt-neox", "cohere-qk-norm"])
def test_computing_the_chosen_experts_only_changes_nothing(name: str, attention: str) -> None:
    """Outputs and gradients, in training and through the cache."""
    model, results = changed(name, attention, attention_num_experts_per_tok=1), []
    for sparse in (True, False):
        for module in model.modules():
            if isinstance(module, BranchMixAttention):
                module.sparse = sparse
        model.zero_grad()
        logits = model(tokens()).logits
        logits.square().mean().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        ids = model.generate(tokens(), max_new_tokens=4, do_sample=False)
        results.append((logits, grads, ids))
    (logits, grads, ids), (expected, expected_grads, expected_ids) = results
    close(logits, expected)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        close(ours, theirs)
    assert ids.equal(expected_ids)


@pytest.mark.parametrize("soft", [True, False])
def test_ffn_experts_against_a_loop(soft: bool) -> None:
    """Every matrix put together, expert by expert and token by token."""
    model = changed("llama", num_experts_per_tok=3 if soft else 2)
    experts = next(module for module in model.modules() if isinstance(module, BranchMixLowRankExperts))
    hidden_SD = torch.randn(7, 32)
    index_Sk, gates_Sk = torch.rand(7, 3).topk(3 if soft else 2).indices, torch.rand(7, 3 if soft else 2)

    def whole(matrix: BranchMixLowRank, expert: int) -> torch.Tensor:
        parts = zip(matrix.low_rank_A.split(matrix.ranks), matrix.low_rank_B.split(matrix.ranks), strict=True)
        A, B = list(parts)[expert]
        return matrix.weight + B.T @ A

    expected = torch.zeros_like(hidden_SD)
    for token, (chosen, gates) in enumerate(zip(index_Sk.tolist(), gates_Sk, strict=True)):
        for expert, gate in zip(chosen, gates, strict=True):
            first, up, down = (whole(matrix, expert) for matrix in (experts.gate, experts.up, experts.down))
            inner = torch.nn.functional.silu(first @ hidden_SD[token]) * (up @ hidden_SD[token])
            expected[token] += gate * (down @ inner)
    with torch.no_grad():
        close(experts(hidden_SD, index_Sk, gates_Sk), expected)


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", ["llama-bias", "gpt2"])
def test_generation_with_and_without_a_cache(name: str, attention: str) -> None:
    model = changed(name, attention)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(tokens(), **options)
    assert cached.equal(model.generate(tokens(), use_cache=False, **options))
    assert cached.equal(model.generate(tokens(), cache_implementation="static", **options))


def test_compiled_and_checkpointed_and_in_bf16() -> None:
    """Also without data-dependent shapes, where all experts' A are computed and masked."""
    model = changed("llama", "kv_sharing", attention_num_experts_per_tok=2)
    ids = tokens()
    expected = model(ids, labels=ids)
    expected.loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(compiled(ids).logits, expected.logits)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model.train()
    model(ids, labels=ids, output_router_logits=False).loss.backward()
    model.eval()
    for name, parameter in model.named_parameters():
        if "gate.weight" not in name:  # in training the routers have losses of their own
            assert parameter.grad.isfinite().all()
    assert grads.keys() == dict(model.named_parameters()).keys()
    with torch.no_grad(), one_hot_gates(model, 1):
        close(model.to(torch.bfloat16)(ids).logits.float(), forced(model.float(), 1), 0.05)


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("rows", [[1], [0], [0, 2], [1, 2]])
def test_kept_experts_share_memory_and_compute_the_same(attention: str, rows: list[int]) -> None:
    model = gated("llama-bias", attention, expert_ranks=ranks(attention))
    kept = model.keep_experts(rows)
    if len(rows) == 1:
        with torch.no_grad():
            close(kept(tokens()).logits, forced(model, rows[0]))
    seeds = {m.weight.data_ptr() for m in model.modules() if isinstance(m, BranchMixLowRank)}
    assert {m.weight.data_ptr() for m in kept.modules() if isinstance(m, BranchMixLowRank)} == seeds
    assert kept.config.ranks_of(0)["up"] == [RANKS["up"][row] for row in rows]
    for number, row in enumerate(rows if len(rows) > 1 else ()):
        close(forced(kept, number), forced(model, row))


def test_saved_and_loaded_again_also_without_the_package(tmp_path: Path) -> None:
    model = changed("llama")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        close(load(tmp_path)(tokens()).logits, model(tokens()).logits, 0.0)
    assert (tmp_path / "low_rank_branchmix.py").is_file()


def test_offloaded_factors_are_read_where_they_are_computed_with(tmp_path: Path) -> None:
    model = changed("llama")
    with torch.no_grad():
        close(offloaded(model, tmp_path)(tokens()).logits, model(tokens()).logits)


# ---- cut to a rank ----


def test_what_is_lost_is_what_the_best_factors_lose(siblings: Siblings, tmp_path: Path) -> None:
    """The error of the best approximation of a rank (Eckart and Young): the root of the rest of the squares."""
    models = siblings("llama")
    report = branchmix.upcycle(given(models["seed"], code=models["code"], expert_rank=3), tmp_path / "m", verify=True)
    cuts = report.plan.decomposed.truncations
    assert len(cuts) == 2 * 7
    seed, code = (load_file(models[name] / "model.safetensors") for name in ("seed", "code"))
    name = "model.layers.1.mlp.down_proj.weight"
    s = np.linalg.svd((code[name] - seed[name]).double().numpy(), compute_uv=False)
    best = np.sqrt((s[3:] ** 2).sum() / (s**2).sum())
    assert cuts["code", 1, "down"].error == pytest.approx(best, rel=1e-3)
    assert report.verification.change_error == pytest.approx(max(cut.error for cut in cuts.values()), rel=1e-3)
    assert not report.plan.lossless
    notes = json.loads((tmp_path / "m" / "branchmix.json").read_text())["notes"]
    assert any("expert 'code' is cut to rank 3" in note for note in notes)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_the_smallest_rank_that_keeps_the_energy(energy: float) -> None:
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -3, 40)
    u, v = (torch.linalg.qr(torch.randn(size, 40, generator=generator)).Q for size in (200, 150))
    kept = (spectrum**2).cumsum(0) / (spectrum**2).sum()
    assert rank_for(u * spectrum @ v.T, energy) == int((kept >= energy).nonzero()[0]) + 1
    assert rank_for(torch.zeros(200, 150), energy) == 0


def test_ranks_by_energy_differ_between_experts_and_matrices(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("llama")
    tensors = load_file(models["code"] / "model.safetensors")
    seed = load_file(models["seed"] / "model.safetensors")
    half = {name: seed[name] if "mlp" in name else value for name, value in tensors.items()}
    shutil.copytree(models["code"], tmp_path / "half")
    save_file(half, tmp_path / "half" / "model.safetensors", {"format": "pt"})
    recipe = given(models["seed"], code=models["code"], half=tmp_path / "half", expert_rank="auto")
    dry = branchmix.upcycle(recipe, tmp_path / "m", dry_run=True)
    report = branchmix.upcycle(recipe, tmp_path / "m")
    assert dry.plan.nbytes == report.plan.nbytes
    for layer in report.plan.config["expert_ranks"]:
        assert layer["up"][0] == layer["up"][2] == 0 < layer["up"][1]
        assert layer["q"][1] == layer["q"][2] > 0
    cuts = report.plan.decomposed.truncations.values()
    most = {"k": 32 * 16 // 48, "v": 32 * 16 // 48, "q": 16, "o": 16}  # then the factors are as large as the matrix
    assert all(cut.error**2 <= 0.1 + 1e-6 or cut.rank == most.get(cut.matrix, 32 * 48 // 80) for cut in cuts)
    load(tmp_path / "m")


# ---- adapters that are more than factors ----


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
    ],
)
def test_adapters_that_are_more_are_merged_and_cut(
    options: dict[str, Any], why: str, siblings: Siblings, tmp_path: Path
) -> None:
    seed = siblings("llama-bias")["seed"]
    if "init_lora_weights" in options:
        folder = adapter(seed, tmp_path / "lora")
        config = folder / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | options))
    else:
        folder = adapter(seed, tmp_path / "lora", **options)
    recipe = given(seed, code=folder, expert_rank=48)
    assert branchmix.upcycle(recipe, tmp_path / "m", dry_run=True).plan.lossless is None
    report = branchmix.upcycle(recipe, tmp_path / "m", verify=True)
    assert f"expert 'code' is merged and its changes are cut, as its adapter has {why}" in report.plan.notes
    branchmix.upcycle(given(seed, code=folder), tmp_path / "whole")
    close(forced(load(tmp_path / "m"), 1), forced(load(tmp_path / "whole"), 1))


def test_an_adapter_that_trains_the_trunk_keeps_its_factors(siblings: Siblings, tmp_path: Path) -> None:
    seed = siblings("llama")["seed"]
    folder = adapter(seed, tmp_path / "lora", modules_to_save=["embed_tokens"])
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in weights if "embed_tokens" in name)
    weights[name] = weights[name] + 0.1
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    report = branchmix.upcycle(given(seed, code=folder, expert_rank=4), tmp_path / "m", verify=True)
    assert report.plan.lossless is False and not report.plan.decomposed.truncations
    branchmix.upcycle(given(seed, code=folder), tmp_path / "whole")
    with torch.no_grad():
        close(load(tmp_path / "m")(tokens()).logits, load(tmp_path / "whole")(tokens()).logits)


@pytest.mark.parametrize("options", [{"bias": "lora_only"}, {"trainable_token_indices": {"embed_tokens": [3, 4]}}])
def test_adapters_that_also_train_biases_or_tokens_keep_their_factors(
    options: dict[str, Any], siblings: Siblings, tmp_path: Path
) -> None:
    seed = siblings("llama-bias", tie_word_embeddings=False)["seed"]
    folder = adapter(seed, tmp_path / "lora", **options)
    weights = load_file(folder / "adapter_model.safetensors")
    more = {name: value + 0.1 for name, value in weights.items() if "lora_A" not in name and "lora_B" not in name}
    assert more
    save_file(weights | more, folder / "adapter_model.safetensors", {"format": "pt"})
    report = branchmix.upcycle(given(seed, code=folder, expert_rank=1), tmp_path / "m", verify=True)
    assert "expert 'code' stays a LoRA of rank 2" in report.plan.notes and not report.plan.decomposed.truncations
    branchmix.upcycle(given(seed, code=folder), tmp_path / "whole")
    close(forced(load(tmp_path / "m"), 1), forced(load(tmp_path / "whole"), 1))


def test_folded_gains_go_into_the_factors(siblings: Siblings, tmp_path: Path) -> None:
    seed = siblings("gemma")["seed"]
    folder = adapter(seed, tmp_path / "lora")
    recipe = given(seed, code=folder, expert_rank=4, merge={"fold_norms": True})
    branchmix.upcycle(recipe, tmp_path / "m", verify=True)
    close(forced(load(tmp_path / "m"), 1), with_adapter(seed, folder))


# ---- proofs, edits, exports ----


def test_verify_finds_a_factor_that_is_not_the_adapters(siblings: Siblings, tmp_path: Path) -> None:
    from branchmix.upcycling.verify import verify_plan

    seed = siblings("llama")["seed"]
    report = branchmix.upcycle(given(seed, code=adapter(seed, tmp_path / "a"), expert_rank=4), tmp_path / "m")
    assert verify_plan(report.plan, tmp_path / "m").changes_checked == 14
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights["model.model.layers.1.mlp.experts.down.low_rank_B"] *= 1.01
    save_file(weights, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match="change of down in layer 1 was written with an error of"):
        verify_plan(report.plan, tmp_path / "m")


def test_verify_reads_adapters_as_peft_does(
    siblings: Siblings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong scale is in the plan's factors too, so only PEFT's own logits show it."""
    seed = siblings("llama")["seed"]
    recipe = given(seed, code=adapter(seed, tmp_path / "a"), expert_rank=4)
    with monkeypatch.context() as wrong:
        wrong.setattr("branchmix.upcycling.lora._scale", lambda *_: 1.0)
        with pytest.raises(VerificationError, match="expert 'code' its logits differ from the dense model's"):
            branchmix.upcycle(recipe, tmp_path / "m", verify=True)
    monkeypatch.setitem(sys.modules, "peft", None)
    (check,) = branchmix.upcycle(recipe, tmp_path / "m", verify=True).verification.experts[1:]
    assert check.skipped is not None and "pip install" in check.skipped


def test_verify_allows_for_the_rounding_of_factors(siblings: Siblings, tmp_path: Path) -> None:
    """In 16 bits, of an adapter that changes much and has an odd scale, and for nothing else."""
    seed = siblings("llama")["seed"]
    folder = adapter(seed, tmp_path / "a", use_rslora=True, lora_alpha=11)
    recipe = given(seed, code=folder, expert_rank=4, dtype="bfloat16")
    report = branchmix.upcycle(recipe, tmp_path / "m", verify=True)
    (check,) = report.verification.experts[1:]
    assert report.plan.lossless and check.max_difference < 1e-5 * max(check.max_logit, 1)


@pytest.mark.parametrize("rank", ["full", 4])
def test_adapters_of_a_model_without_its_head(rank: Any, siblings: Siblings, tmp_path: Path) -> None:
    seed = siblings("llama")["seed"]
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    base = AutoModel.from_pretrained(seed, dtype=torch.float32)
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "a")
    branchmix.upcycle(given(seed, code=tmp_path / "a", expert_rank=rank), tmp_path / "m", verify=True)
    whole = AutoModelForCausalLM.from_pretrained(seed, dtype=torch.float32)
    whole.model = peft.PeftModel.from_pretrained(whole.model, tmp_path / "a").merge_and_unload()
    with torch.no_grad():
        close(forced(load(tmp_path / "m"), 1), whole.eval()(tokens()).logits)


def test_names_that_peft_would_leave_out(siblings: Siblings, tmp_path: Path) -> None:
    seed = siblings("llama")["seed"]
    file = adapter(seed, tmp_path / "a") / "adapter_model.safetensors"
    renamed = {name.replace(".weight", ".default.weight"): part for name, part in load_file(file).items()}
    save_file(renamed, file, {"format": "pt"})
    for rank in ("full", 4):
        with pytest.raises(CompatibilityError, match=r"lora_A.default.weight is not a name that PEFT reads"):
            branchmix.upcycle(given(seed, code=tmp_path / "a", expert_rank=rank), tmp_path / "m")


def test_experts_join_and_leave(siblings: Siblings, tmp_path: Path) -> None:
    """A LoRA joins as it is, a full fine-tune is cut, and what stays keeps its bytes."""
    models = siblings("llama")
    seed, one, two = models["seed"], tmp_path / "one", tmp_path / "two"
    adapter(seed, one)
    adapter(seed, two, 1)
    branchmix.upcycle(given(seed, one=one, expert_rank=48), tmp_path / "m")
    add_expert(tmp_path / "m", "two", two, tmp_path / "m2")
    grown = load(tmp_path / "m2")
    assert json.loads((tmp_path / "m2" / "branchmix.json").read_text())["lossless"] is True
    close(forced(grown, 1), with_adapter(seed, one))
    close(forced(grown, 2), with_adapter(seed, two))
    remove_expert(tmp_path / "m2", "one", tmp_path / "m3")
    close(forced(load(tmp_path / "m3"), 1), with_adapter(seed, two))
    report = add_expert(tmp_path / "m3", "code", models["code"], tmp_path / "m4")
    assert report.plan.config["expert_ranks"][0]["up"][2] == 32 and report.plan.lossless is False
    assert len(report.plan.decomposed.truncations) == 14  # reported, like those of a merge
    branchmix.upcycle(given(seed, two=two, code=models["code"]), tmp_path / "whole")
    whole, small = load(tmp_path / "whole"), load(tmp_path / "m4")
    with torch.no_grad():
        trunk = {n: p for n, p in small.named_parameters() if "self_attn" not in n and "mlp" not in n}
        for name, parameter in whole.named_parameters():
            if name in trunk:
                parameter.copy_(trunk[name])
    close(forced(small, 2), forced(whole, 2))
    with pytest.raises(CheckpointError, match="use_dora: merge the adapter into the seed"):
        add_expert(tmp_path / "m", "dora", adapter(seed, tmp_path / "dora", use_dora=True), tmp_path / "no")


def test_adapters_join_a_mixture_edited_in_place(siblings: Siblings, tmp_path: Path) -> None:
    """``calibrate`` of a trained mixture, in place, records the folder itself as the source."""
    seed = siblings("llama")["seed"]
    branchmix.upcycle(given(seed, one=adapter(seed, tmp_path / "one"), expert_rank=4), tmp_path / "m")
    trained = tmp_path / "trained"
    shutil.copytree(tmp_path / "m", trained)
    record = json.loads((trained / "branchmix.json").read_text())
    record["sources"] = [{"name": "mixture", "model": str(trained), "revision": None}]
    (trained / "branchmix.json").write_text(json.dumps(record))
    two = adapter(seed, tmp_path / "two", 1)
    with pytest.raises(CheckpointError, match="its seed is not on record"):
        add_expert(trained, "two", two, tmp_path / "no")
    (trained / "training.json").write_text(json.dumps({"config": {"model": str(tmp_path / "m")}}))
    add_expert(trained, "two", two, tmp_path / "grown")
    close(forced(load(tmp_path / "grown"), 2), with_adapter(seed, two))


def test_adapters_join_only_where_all_of_them_has_a_place(siblings: Siblings, tmp_path: Path) -> None:
    """Not where keys are shared, nor where the seed's matrices were trained since."""
    seed = siblings("llama")["seed"]
    one, two = adapter(seed, tmp_path / "one"), adapter(seed, tmp_path / "two", 1)
    branchmix.upcycle(given(seed, one=one, expert_rank=4, attention="kv_sharing"), tmp_path / "shared")
    with pytest.raises(CheckpointError, match="k_proj, which all experts of this mixture share: merge the adapter"):
        add_expert(tmp_path / "shared", "two", one, tmp_path / "no")
    branchmix.upcycle(given(seed, one=one, expert_rank=4), tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights["model.model.layers.1.self_attn.o_proj.weight"] += 0.01
    save_file(weights, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="its o in layer 1 is not the seed's any more"):
        add_expert(tmp_path / "m", "two", two, tmp_path / "no")
    with pytest.raises(CompatibilityError, match=r"another seed's matrix \(o in layer 1\) than the seed: --to dense"):
        branchmix.export_model(tmp_path / "m", tmp_path / "no", to="peft", expert="one")


def test_what_an_adapter_leaves_behind_is_said(siblings: Siblings, tmp_path: Path) -> None:
    """Embeddings, norms and head: merged ones in a note; those of an expert's own are refused."""
    models = siblings("llama")
    recipe = given(models["seed"], code=models["code"], expert_rank=4)
    branchmix.upcycle(recipe, tmp_path / "m")
    report = branchmix.export_model(tmp_path / "m", tmp_path / "back", to="peft", expert="code")
    assert any("are not the seed's, on which it runs" in note for note in report.plan.notes)
    branchmix.upcycle(recipe | {"attention": "average"}, tmp_path / "btx")
    with pytest.raises(CompatibilityError, match="what the mixture's experts share of it"):
        branchmix.export_model(tmp_path / "btx", tmp_path / "no", to="peft", expert="code")


@pytest.mark.parametrize("rank", [4, 20, "auto"])
def test_broken_weights_are_named(rank: int | str, siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("llama")
    shutil.copytree(models["code"], tmp_path / "code")
    weights = load_file(tmp_path / "code" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, tmp_path / "code" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="expert 'code': up in layer 1 holds NaN or Inf"):
        branchmix.upcycle(given(models["seed"], code=tmp_path / "code", expert_rank=rank), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_matrices_that_did_not_change_have_no_factors_whatever_their_dtype(siblings: Siblings, tmp_path: Path) -> None:
    """A DoRA of two projections, merged in fp32, of a seed in bf16."""
    seed = tmp_path / "seed"
    AutoModelForCausalLM.from_pretrained(siblings("llama")["seed"], dtype=torch.bfloat16).save_pretrained(seed)
    dora = adapter(seed, tmp_path / "dora", use_dora=True, target_modules=["q_proj", "v_proj"])
    report = branchmix.upcycle(given(seed, code=dora, expert_rank=4), tmp_path / "m", verify=True)
    assert report.plan.config["expert_ranks"] == [
        {name: [0, 4 if name in "qv" else 0] for name in ("q", "k", "v", "o", "gate", "up", "down")}
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "falcon-new"])
def test_exported_adapters_are_the_ones_that_came_in(name: str, siblings: Siblings, tmp_path: Path) -> None:
    seed = siblings(name)["seed"]
    folder = adapter(seed, tmp_path / "lora", 1)
    branchmix.upcycle(given(seed, code=folder, expert_rank=4), tmp_path / "m")
    branchmix.export_model(tmp_path / "m", tmp_path / "back", to="peft", expert="code")
    close(with_adapter(seed, tmp_path / "back"), with_adapter(seed, folder))
    with (
        safe_open(folder / "adapter_model.safetensors", "pt") as ours,
        safe_open(tmp_path / "back" / "adapter_model.safetensors", "pt") as theirs,
    ):
        assert set(ours.keys()) == set(theirs.keys())
    with pytest.raises(CompatibilityError, match="seed is the seed itself"):
        branchmix.export_model(tmp_path / "m", tmp_path / "no", to="peft", expert="seed")


def test_an_expert_whose_factors_differ_inside_a_fused_matrix_is_exported(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("phi3")
    recipe = given(models["seed"], code=models["code"], expert_rank=3, merge={"method": "seed"})
    branchmix.upcycle(recipe, tmp_path / "m")
    branchmix.export_model(tmp_path / "m", tmp_path / "back", to="peft", expert="code")
    close(with_adapter(models["seed"], tmp_path / "back"), forced(load(tmp_path / "m"), 1))


def test_exported_to_matrices_of_their_own(siblings: Siblings, tmp_path: Path) -> None:
    seed = siblings("llama")["seed"]
    branchmix.upcycle(given(seed, one=adapter(seed, tmp_path / "one"), expert_rank=4), tmp_path / "m")
    branchmix.export_model(tmp_path / "m", tmp_path / "whole", to="full")
    branchmix.export_model(tmp_path / "m", tmp_path / "dense", to="dense", expert="one")
    small, whole = load(tmp_path / "m"), load(tmp_path / "whole")
    assert whole.config.expert_ranks is None
    with torch.no_grad():
        close(whole(tokens()).logits, small(tokens()).logits)
        close(load(tmp_path / "dense")(tokens()).logits, with_adapter(seed, tmp_path / "one"))
    with pytest.raises(CompatibilityError, match="matrices of their own already"):
        branchmix.export_model(tmp_path / "whole", tmp_path / "again", to="full")
    with pytest.raises(CompatibilityError, match="matrices of their own: --to dense --expert one"):
        branchmix.export_model(tmp_path / "whole", tmp_path / "again", to="peft", expert="one")


@pytest.mark.parametrize(("to", "expert"), [("full", None), ("dense", "one")])
def test_exports_in_bf16_round_their_matrices_once(
    to: str, expert: str | None, siblings: Siblings, tmp_path: Path
) -> None:
    """A change added to a 16-bit matrix is rounded; the comparison of logits allows for that, and for no more."""
    seed = siblings("llama")["seed"]
    recipe = given(seed, one=adapter(seed, tmp_path / "one"), expert_rank=4, dtype="bfloat16")
    branchmix.upcycle(recipe, tmp_path / "m", verify=True)
    report = branchmix.export_model(tmp_path / "m", tmp_path / "out", to=to, expert=expert)
    check = report.verification
    assert 0 < check.max_difference <= 0.02 * check.max_logit


def test_biases_that_an_adapter_cannot_hold_are_refused(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("gpt2")
    branchmix.upcycle(given(models["seed"], code=models["code"], expert_rank=3), tmp_path / "m")
    with pytest.raises(CompatibilityError, match=r"code has another down_proj\.bias than the seed: --to dense"):
        branchmix.export_model(tmp_path / "m", tmp_path / "no", to="peft", expert="code")
    assert not (tmp_path / "no").exists()


# ---- sizes, training, refusals ----


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_model(name: str, attention: str) -> None:
    family = BY_NAME[name]
    if family.model_type in ("seed_oss", "helium"):
        pytest.skip("no formula")
    of_layers = [*ranks(attention), {matrix: [1, 1, 1] for matrix in ranks(attention)[0]}]
    model = random_mixture(name, attention, expert_ranks=of_layers, num_experts_per_tok=1)
    config = model.config.to_dict()
    if config["layout"]["gate"] is None:
        config["expert_ranks"] = [{k: v for k, v in layer.items() if k != "gate"} for layer in of_layers]
    assert parameters(config).total == sum(parameter.numel() for parameter in model.parameters())
    assert active_parameters(config).ffn < parameters(config).ffn


def test_a_shared_expert_beside_low_rank_experts(siblings: Siblings, tmp_path: Path) -> None:
    seed = siblings("llama")["seed"]
    experts = {"one": adapter(seed, tmp_path / "one"), "shared_expert": "auto"}
    for folder, rank in (("whole", "full"), ("small", 4)):
        branchmix.upcycle(given(seed, **experts, expert_rank=rank), tmp_path / folder)
    whole, small = load(tmp_path / "whole"), load(tmp_path / "small")
    with torch.no_grad():
        close(small(tokens()).logits, whole(tokens()).logits)
    assert parameters(small.config.to_dict()).total == sum(parameter.numel() for parameter in small.parameters())


def test_only_factors_and_routers_are_trained() -> None:
    model = changed("llama")
    freeze(model, ["all_but_factors"])
    trained = {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"low_rank_A", "low_rank_B", "weight"}  # weights of routers
    assert all("gate" in n for n, p in model.named_parameters() if p.requires_grad and n.endswith(".weight"))
    assert not any("experts.gate" in n for n, p in model.named_parameters() if p.requires_grad and n.endswith("weight"))
    with pytest.raises(RecipeError, match="all_but_factors applies to mixtures whose experts are changes of the seed"):
        freeze(random_mixture("llama"), ["all_but_factors"])
    with pytest.raises(RecipeError, match="are small changes of the seed already"):
        add_adapters(model)
    config = RunConfig.model_construct(parallel=Parallel(expert_parallel=True))
    with pytest.raises(RecipeError, match="whose matrices every process needs: remove it, or use fsdp"):
        require_shardable(config, model.config.to_dict(), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_rank": 4, "seed_copies": 1}, "seed_copies: with expert_rank a copy of the seed has no matrices"),
        ({"expert_rank": 4, "attention": "average", "ffn": "average"}, "expert_rank: a soup has no experts"),
        ({"expert_rank": 0}, "expert_rank"),
        ({"expert_rank": "some"}, "expert_rank"),
        ({"expert_rank": 4, "expert_energy": 1.5}, "expert_energy"),
    ],
)
def test_recipes_that_make_no_sense(options: dict[str, Any], message: str, siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("llama")
    with pytest.raises(BranchMixError, match=message):
        branchmix.upcycle(given(models["seed"], code=models["code"], **options), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_config_that_does_not_fit_its_experts_is_refused(siblings: Siblings, tmp_path: Path) -> None:
    seed = siblings("llama")["seed"]
    branchmix.upcycle(given(seed, one=adapter(seed, tmp_path / "one"), expert_rank=4), tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    config["expert_ranks"][0]["up"] = [0, 3]
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"low_rank_A has shape \[2, 32\], but by config.json it should be"):
        remove_expert(tmp_path / "m", "one", tmp_path / "no")
    of_layer = config["expert_ranks"][0] | {"up": [0, 2]}
    for broken, message in (
        ([{"up": [0, 2, 2]}], "expert_ranks is not a list of ranks"),
        ([of_layer] * 3, "expert_ranks has 3 layers, the model 2"),
        ([{name: of for name, of in of_layer.items() if name != "gate"}], "expert_ranks lacks one of down, gate"),
        ([of_layer | {"x": [0, 1]}], "expert_ranks has x, which is not a matrix of an expert"),
    ):
        config["expert_ranks"] = broken
        file.write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            branchmix.inspect(tmp_path / "m")

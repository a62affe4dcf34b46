"""Experts that share their trunk with the seed: the mixture loses nothing, says so, and proves it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import branchmix
from branchmix.accounting import inspect
from branchmix.checkpoint.index import CheckpointIndex
from branchmix.models.routers import one_hot_gates
from branchmix.upcycling.sources import DenseExpert
from families import BY_NAME, NAMES
from mixtures import close, load, recipe, tokens

WEIGHTS = "model.safetensors"
Siblings = Callable[..., dict[str, Path]]


def on_the_seeds_trunk(models: dict[str, Path], root: Path, *, keys_and_values: bool = False) -> dict[str, Path]:
    """Copies of the siblings in which only attention and FFNs are their own (without keys and values, if asked)."""
    seed = load_file(models["seed"] / WEIGHTS)
    made = {"seed": models["seed"]}
    for name in ("code", "math"):
        folder = Path(shutil.copytree(models[name], root / name))
        owned = DenseExpert.open(name, CheckpointIndex.open(folder)).expert_tensors(attention=True, ffn=True)
        of_seed = ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias", "k_norm.weight")
        if keys_and_values:
            owned = {tensor for tensor in owned if not tensor.endswith(of_seed)}
        own = load_file(folder / WEIGHTS)
        assert any(not torch.equal(own[tensor], seed[tensor]) for tensor in own if tensor not in owned)
        mixed = {tensor: value if tensor in owned else seed[tensor] for tensor, value in own.items()}
        save_file(mixed, folder / WEIGHTS, metadata={"format": "pt"})
        made[name] = folder
    return made


def change(folder: Path, name: str) -> None:
    """The last element of one tensor becomes another number."""
    tensors = load_file(folder / WEIGHTS)
    tensors[name].view(-1)[-1] += 0.125
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.of_every_family
@pytest.mark.parametrize("name", NAMES)
def test_forced_gates_are_the_whole_experts(name: str, siblings: Siblings, tmp_path: Path) -> None:
    models = on_the_seeds_trunk(siblings(name), tmp_path)
    report = branchmix.upcycle(recipe(models), tmp_path / "mixture", verify=True)
    assert report.plan.lossless is True
    assert report.verification is not None and report.verification.whole_experts
    mixture, ids = load(tmp_path / "mixture"), tokens()
    for number, folder in enumerate(models.values()):
        with torch.no_grad():
            with one_hot_gates(mixture, number):
                forced = mixture(ids).logits
            close(forced, load(folder)(ids).logits)


@pytest.mark.parametrize("attention", ["kv_experts", "kv_sharing", "average"])
def test_ordinary_siblings_lose_their_trunk(attention: str, siblings: Siblings, tmp_path: Path) -> None:
    report = branchmix.upcycle(recipe(siblings("llama"), attention=attention), tmp_path / "mixture", verify=True)
    assert report.plan.lossless is False
    assert report.verification is not None and not report.verification.whole_experts


@pytest.mark.parametrize(
    "tensor", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"]
)
def test_one_number_is_enough(tensor: str, siblings: Siblings, tmp_path: Path) -> None:
    models = on_the_seeds_trunk(siblings("llama"), tmp_path)
    change(models["math"], tensor)
    assert branchmix.upcycle(recipe(models), tmp_path / "mixture", dry_run=True).plan.lossless is False


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_averages_over_what_differs_lose(name: str, siblings: Siblings, tmp_path: Path) -> None:
    """Shared keys and values lose nothing where they are the same; averaged attention and FFNs always do."""
    own, same = tmp_path / "own", tmp_path / "same"
    models = on_the_seeds_trunk(siblings(name), own)
    for options in ({"attention": "kv_sharing"}, {"attention": "average"}, {"ffn": "average"}):
        assert branchmix.upcycle(recipe(models, **options), tmp_path / "mixture", dry_run=True).plan.lossless is False
    models = on_the_seeds_trunk(siblings(name), same, keys_and_values=True)
    report = branchmix.upcycle(recipe(models, attention="kv_sharing"), tmp_path / "mixture", verify=True)
    assert report.plan.lossless is True and report.verification is not None and report.verification.whole_experts


def test_folded_norms_and_the_seeds_trunk(siblings: Siblings, tmp_path: Path) -> None:
    """Block norms of their own are folded into the experts, so that they do not count."""
    models = on_the_seeds_trunk(siblings("llama"), tmp_path)
    change(models["math"], "model.layers.1.input_layernorm.weight")
    given = recipe(models, merge={"fold_norms": True})
    report = branchmix.upcycle(given, tmp_path / "mixture", verify=True)
    assert report.plan.lossless is True and report.verification is not None and report.verification.whole_experts


def test_a_seed_of_another_vocabulary_that_is_left_out(siblings: Siblings, tmp_path: Path) -> None:
    """The experts' common embeddings have fewer rows than the seed's, whose config the mixture has: it still loads."""
    vocabulary = {"model": {"type": "BPE", "vocab": {f"t{i}": i for i in range(90)}, "merges": []}, "added_tokens": []}
    models = on_the_seeds_trunk(siblings("llama"), tmp_path)
    models["seed"] = BY_NAME["llama"].save(tmp_path / "padded", 0, vocab_size=104)
    for folder in models.values():
        (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    report = branchmix.upcycle(recipe(models, include_seed=False), tmp_path / "mixture")
    assert report.plan.lossless is False
    assert load(tmp_path / "mixture")(tokens()).logits.shape[-1] == 104


def test_shared_keys_of_the_seed_alone(siblings: Siblings, tmp_path: Path) -> None:
    """Experts agree on keys and values, but the mixture takes the seed's."""
    models = on_the_seeds_trunk(siblings("llama"), tmp_path, keys_and_values=True)
    change(models["math"], "model.layers.0.self_attn.k_proj.weight")
    tensors = load_file(models["math"] / WEIGHTS)
    code = load_file(models["code"] / WEIGHTS)
    code["model.layers.0.self_attn.k_proj.weight"] = tensors["model.layers.0.self_attn.k_proj.weight"]
    save_file(code, models["code"] / WEIGHTS, metadata={"format": "pt"})
    given = recipe(models, attention="kv_sharing", include_seed=False)
    assert branchmix.upcycle(given, tmp_path / "a", dry_run=True).plan.lossless is True
    given["merge"] = {"kv_init": "seed"}
    assert branchmix.upcycle(given, tmp_path / "b", dry_run=True).plan.lossless is False


def test_changed_experts_are_not_the_dense_models(siblings: Siblings, tmp_path: Path) -> None:
    models = on_the_seeds_trunk(siblings("llama"), tmp_path)
    given = recipe(models, sparse_upcycling={"weight_scaling": True})
    assert branchmix.upcycle(given, tmp_path / "mixture", dry_run=True).plan.lossless is False


def test_it_is_recorded_and_follows_experts_that_join_and_leave(siblings: Siblings, tmp_path: Path) -> None:
    models = on_the_seeds_trunk(siblings("llama"), tmp_path)
    two = {name: folder for name, folder in models.items() if name != "math"}
    branchmix.upcycle(recipe(two), tmp_path / "two")
    assert "Lossless: what the experts share is the same in all of them" in (tmp_path / "two" / "README.md").read_text()
    assert inspect(tmp_path / "two").lossless is True
    branchmix.add_expert(tmp_path / "two", "math", models["math"], tmp_path / "three")
    assert inspect(tmp_path / "three").lossless is True
    branchmix.remove_expert(tmp_path / "three", "code", tmp_path / "left")
    assert inspect(tmp_path / "left").lossless is True
    branchmix.add_expert(tmp_path / "two", "math", siblings("llama")["math"], tmp_path / "lossy")
    assert inspect(tmp_path / "lossy").lossless is False
    branchmix.remove_expert(tmp_path / "lossy", "code", tmp_path / "lossy-left")
    assert inspect(tmp_path / "lossy-left").lossless is False
    assert inspect(models["seed"]).lossless is None


def test_dense_models_have_nothing_to_say_about_it(siblings: Siblings, tmp_path: Path) -> None:
    """Soups and exports, also those that an earlier version recorded as false."""
    models = siblings("llama")
    branchmix.upcycle(recipe(models, attention="average", ffn="average"), tmp_path / "soup")
    branchmix.upcycle(recipe(models), tmp_path / "mixture")
    branchmix.export_model(tmp_path / "mixture", tmp_path / "dense", to="dense", expert="code")
    for folder in (tmp_path / "soup", tmp_path / "dense"):
        record = json.loads((folder / "branchmix.json").read_text())
        assert record["lossless"] is None
        (folder / "branchmix.json").write_text(json.dumps({**record, "lossless": False}))
        assert inspect(folder).lossless is None


def test_lora_experts_share_the_trunk(siblings: Siblings, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    seed = siblings("llama")["seed"]
    settings: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "o_proj", "up_proj"], "init_lora_weights": False}
    for name, more in (("code", {}), ("math", {"modules_to_save": ["norm"]})):
        tuned = peft.get_peft_model(load(seed), peft.LoraConfig(**settings, **more))
        if more:
            with torch.no_grad():
                tuned.base_model.model.model.norm.modules_to_save["default"].weight.add_(0.25)
        tuned.save_pretrained(tmp_path / name)
    given = recipe({"seed": seed, "code": tmp_path / "code"})
    assert branchmix.upcycle(given, tmp_path / "mixture", dry_run=True).plan.lossless is None
    report = branchmix.upcycle(given, tmp_path / "mixture", verify=True)
    assert report.plan.lossless is True and report.verification is not None and report.verification.whole_experts
    assert json.loads((tmp_path / "mixture" / "branchmix.json").read_text())["lossless"] is True
    both = recipe({"seed": seed, "code": tmp_path / "code", "math": tmp_path / "math"})
    assert branchmix.upcycle(both, tmp_path / "other").plan.lossless is False

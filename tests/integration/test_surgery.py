"""Experts join and leave a mixture: every tensor against the mixture built with the same experts from the start."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import branchmix
from bad_inputs import source
from branchmix.errors import CheckpointError, CompatibilityError, RecipeError
from branchmix.models.routers import one_hot_gates
from checkpoints import config, same_bytes, weights
from families import BY_NAME
from mixtures import load, recipe, tokens

FAMILIES = (
    "llama",
    "qwen3",
    "cohere-qk-norm",
    "gpt-neox",
    "gpt2",
    "olmo2",
    "opt",
    "falcon-new",
    "phi3",
    "stablelm-parallel",
)
KINDS = ("kv_experts", "kv_sharing", "average")
Siblings = Callable[..., dict[str, Path]]


def small_and_full(models: dict[str, Path], folder: Path, **options: Any) -> tuple[Path, Path]:
    """Mixtures of (seed, code) and of (seed, code, math)."""
    two = {name: path for name, path in models.items() if name != "math"}
    branchmix.upcycle(recipe(two, **options), folder / "two")
    branchmix.upcycle(recipe(models, **options), folder / "three")
    return folder / "two", folder / "three"


def is_averaged(name: str, attention: str) -> bool:
    """Whether a tensor is an average over the models: the trunk, averaged attention, and shared keys and values."""
    if ".experts." in name or name.endswith(".gate.weight"):
        return False
    inside_attention = any(part in name for part in (".self_attn.", ".attention.", ".attn.", ".self_attention."))
    if not inside_attention or attention == "average":
        return True
    key_norm = any(f".heads.{norm}." in name for norm in ("k_norm", "k_layernorm"))
    return attention == "kv_sharing" and (key_norm or ".heads.k_proj." in name or ".heads.v_proj." in name)


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_added_is_as_if_built_so(name: str, attention: str, siblings: Siblings, tmp_path: Path) -> None:
    models = siblings(name)
    two, three = small_and_full(models, tmp_path, attention=attention)
    branchmix.add_expert(two, "math", models["math"], tmp_path / "added", router_std=0.3)
    before, built, added = weights(two), weights(three), weights(tmp_path / "added")
    assert added.keys() == built.keys()
    compared = 0
    for tensor, value in added.items():
        if tensor.endswith((".expert_gate.weight", ".gate.weight")):
            assert torch.equal(value[:2], before[tensor]), tensor
            assert 0.15 < value[2].std() < 0.5, tensor
        elif is_averaged(tensor, attention):
            assert torch.equal(value, before[tensor]) and not torch.equal(value, built[tensor]), tensor
        else:
            assert torch.equal(value, built[tensor]), tensor
            compared += 1
    assert compared >= 2 * 3 * 2  # layers, experts, matrices
    assert config(tmp_path / "added") == config(three)

    branchmix.remove_expert(tmp_path / "added", "math", tmp_path / "back")
    same_bytes(weights(tmp_path / "back"), before)
    assert config(tmp_path / "back") == config(two)


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_one_hot_on_the_new_expert_is_it_on_the_old_trunk(
    name: str, attention: str, siblings: Siblings, tmp_path: Path
) -> None:
    """The mixture built with all three, whose gates on math are proved against dense math, on the trunk of two."""
    models = siblings(name)
    two, three = small_and_full(models, tmp_path, attention=attention)
    branchmix.add_expert(two, "math", models["math"], tmp_path / "added")
    added, reference = load(tmp_path / "added"), load(three)
    state, trunk = reference.state_dict(), load(two).state_dict()
    with torch.no_grad():
        for tensor, value in state.items():
            if is_averaged(tensor, attention) and value.shape == trunk[tensor].shape:
                value.copy_(trunk[tensor])
    ids = tokens()
    with torch.no_grad(), one_hot_gates(added, 2), one_hot_gates(reference, 2):
        torch.testing.assert_close(added(ids).logits, reference(ids).logits, rtol=0, atol=1e-5)
    with torch.no_grad():
        mixed = added(ids).logits
    assert mixed.isfinite().all()
    assert added.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (2, 14)


def test_one_hot_on_the_new_expert_is_the_dense_model(siblings: Siblings, tmp_path: Path) -> None:
    """Without any code of ours on the dense side: Llama's own class, with embeddings, norms and head of the mixture."""
    models = siblings("llama")
    two, _ = small_and_full(models, tmp_path)
    branchmix.add_expert(two, "math", models["math"], tmp_path / "added")
    added, dense = load(tmp_path / "added"), load(models["math"])
    trunk = weights(tmp_path / "added")
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if "norm" in name or not name.startswith("model.layers."):
                parameter.copy_(trunk[f"model.{name}"])
    ids = tokens()
    with torch.no_grad(), one_hot_gates(added, 2):
        torch.testing.assert_close(added(ids).logits, dense(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ("kv_experts", "kv_sharing"))
@pytest.mark.parametrize("name", ("llama", "gpt-neox", "qwen3"))
def test_the_middle_one_leaves(name: str, attention: str, siblings: Siblings, tmp_path: Path) -> None:
    models = siblings(name)
    branchmix.upcycle(recipe(models, attention=attention), tmp_path / "three")
    branchmix.remove_expert(tmp_path / "three", "code", tmp_path / "two")
    before, after = weights(tmp_path / "three"), weights(tmp_path / "two")
    routers = [tensor for tensor in after if tensor.endswith((".expert_gate.weight", ".gate.weight"))]
    assert len(routers) == 4
    for tensor in routers:
        assert torch.equal(after[tensor], before[tensor][[0, 2]]), tensor
    assert config(tmp_path / "two")["expert_names"] == ["seed", "math"]
    three, two = load(tmp_path / "three"), load(tmp_path / "two")
    ids = tokens()
    for old, new in ((0, 0), (2, 1)):
        with torch.no_grad(), one_hot_gates(three, old), one_hot_gates(two, new):
            torch.testing.assert_close(two(ids).logits, three(ids).logits, rtol=0, atol=1e-5)


def test_soft_stays_soft_and_auto_scaling_stays_n_over_k(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("llama")
    soft, _ = small_and_full(models, tmp_path / "soft", routing={"ffn": {"soft": True}})
    auto, _ = small_and_full(models, tmp_path / "auto", routed_scaling_factor="auto")
    paper, _ = small_and_full(models, tmp_path / "paper")
    wanted = {soft: (3, 1.0), auto: (1, 3.0), paper: (1, 1.0)}
    for mixture, (top_k, scaling) in wanted.items():
        branchmix.add_expert(mixture, "math", models["math"], mixture.parent / "added")
        found = config(mixture.parent / "added")
        assert (found["num_experts_per_tok"], found["routed_scaling_factor"]) == (top_k, scaling)
        assert found["attention_num_experts_per_tok"] is None and found["num_experts"] == 3
        assert load(mixture.parent / "added").config.num_experts_per_tok == top_k


def test_top_k_of_all_experts_is_not_soft(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("llama")
    routing = {"ffn": {"top_k": 2, "normalize": True}}
    two, three = small_and_full(models, tmp_path, routing=routing, routed_scaling_factor=1.5)
    branchmix.remove_expert(three, "math", tmp_path / "fewer")
    for mixture in (two, tmp_path / "fewer"):
        report = branchmix.add_expert(mixture, "math", models["math"], tmp_path / f"{mixture.name}-added")
        found = config(tmp_path / f"{mixture.name}-added")
        assert (found["num_experts_per_tok"], found["routed_scaling_factor"]) == (2, 1.5)
        assert "no recipe says" not in str(report.plan.notes)
        for group in report.plan.groups:
            steps = group.how.split(", ")
            assert len(steps) == len(set(steps)), group


def test_a_factor_that_happens_to_be_n_over_k_stays(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("llama")
    two, _ = small_and_full(models, tmp_path, routed_scaling_factor=2.0)
    branchmix.add_expert(two, "math", models["math"], tmp_path / "added")
    assert config(tmp_path / "added")["routed_scaling_factor"] == 2.0


def test_auto_scaling_of_all_experts_grows_with_them(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("llama")
    two, three = small_and_full(models, tmp_path, routing={"ffn": {"top_k": 2}}, routed_scaling_factor="auto")
    assert config(two)["routed_scaling_factor"] == 1.0
    branchmix.add_expert(two, "math", models["math"], tmp_path / "added")
    assert config(tmp_path / "added") == config(three)


def test_without_a_recipe_routing_stays_and_a_note_says_so(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("llama")
    soft, _ = small_and_full(models, tmp_path / "soft", routing={"ffn": {"soft": True}})
    auto, _ = small_and_full(models, tmp_path / "auto", routed_scaling_factor="auto")
    for mixture, wanted, words in (
        (soft, (2, 1.0), "set num_experts_per_tok to 3"),
        (auto, (1, 2.0), "routed_scaling_factor stays 2"),
    ):
        (mixture / "branchmix.json").unlink()
        report = branchmix.add_expert(mixture, "math", models["math"], mixture.parent / "added")
        found = config(mixture.parent / "added")
        assert (found["num_experts_per_tok"], found["routed_scaling_factor"]) == wanted
        assert sum(words in note for note in report.plan.notes) == 1


def test_top_k_shrinks_with_the_experts(siblings: Siblings, tmp_path: Path) -> None:
    routing = {"ffn": {"top_k": 2}, "attention": {"top_k": 3}}
    branchmix.upcycle(recipe(siblings("llama"), routing=routing), tmp_path / "three")
    branchmix.remove_expert(tmp_path / "three", "seed", tmp_path / "two")
    found = config(tmp_path / "two")
    assert (found["num_experts_per_tok"], found["attention_num_experts_per_tok"]) == (2, 2)
    with torch.no_grad():
        assert load(tmp_path / "two")(tokens()).logits.isfinite().all()


def test_the_newcomer_keeps_its_rotary_base(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("llama")
    own = {"rope_type": "default", "rope_theta": 50.0}
    slow = BY_NAME["llama"].save(tmp_path / "slow", 7, rope_parameters=own)
    two, _ = small_and_full(models, tmp_path)
    branchmix.add_expert(two, "slow", slow, tmp_path / "added")
    ropes = config(tmp_path / "added")["expert_rope_parameters"]
    assert [rope["rope_theta"] for rope in ropes] == [10000.0, 10000.0, 50.0]
    added, dense = load(tmp_path / "added"), load(slow)
    trunk = weights(tmp_path / "added")
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if "norm" in name or not name.startswith("model.layers."):
                parameter.copy_(trunk[f"model.{name}"])
    ids = tokens()
    with torch.no_grad(), one_hot_gates(added, 2):
        torch.testing.assert_close(added(ids).logits, dense(ids).logits, rtol=0, atol=1e-5)

    branchmix.remove_expert(tmp_path / "added", "code", tmp_path / "fewer")
    thetas = [rope["rope_theta"] for rope in config(tmp_path / "fewer")["expert_rope_parameters"]]
    assert thetas == [10000.0, 50.0]
    branchmix.remove_expert(tmp_path / "added", "slow", tmp_path / "back")
    assert config(tmp_path / "back") == config(two)

    shared, _ = small_and_full(models, tmp_path / "shared", attention="kv_sharing")
    with pytest.raises(CompatibilityError, match="rotary settings"):
        branchmix.add_expert(shared, "slow", slow, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_folded_norms_are_folded_for_newcomers_too(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("llama")
    two, three = small_and_full(models, tmp_path, merge={"method": "average", "fold_norms": True})
    branchmix.add_expert(two, "math", models["math"], tmp_path / "added")
    added, built = weights(tmp_path / "added"), weights(three)
    own = [name for name in added if not is_averaged(name, "kv_experts") and not name.endswith("gate.weight")]
    for name in own:
        assert torch.equal(added[name], built[name]), name


def test_other_dtypes_are_cast(tmp_path: Path, siblings: Siblings) -> None:
    two, _ = small_and_full(siblings("qwen3"), tmp_path, dtype="bfloat16")
    branchmix.add_expert(two, "math", siblings("qwen3")["math"], tmp_path / "added")
    assert {value.dtype for value in weights(tmp_path / "added").values()} == {torch.bfloat16}
    own = weights(siblings("qwen3")["math"])["model.layers.1.mlp.up_proj.weight"]
    found = weights(tmp_path / "added")["model.model.layers.1.mlp.experts.2.up_proj.weight"]
    assert torch.equal(found, own.to(torch.bfloat16))


def test_a_mixture_saved_by_transformers_grows_too(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("gpt-neox")
    two, _ = small_and_full(models, tmp_path)
    AutoModelForCausalLM.from_pretrained(two).save_pretrained(tmp_path / "trained")
    for given in ("two", "trained"):
        branchmix.add_expert(tmp_path / given, "math", models["math"], tmp_path / f"{given}-added")
    same_bytes(weights(tmp_path / "trained-added"), weights(tmp_path / "two-added"))
    with torch.no_grad():
        assert torch.equal(*(load(tmp_path / f"{given}-added")(tokens()).logits for given in ("two", "trained")))


def test_keys_left_out_have_the_defaults(siblings: Siblings, tmp_path: Path) -> None:
    """Of config.json as ``BranchMixConfig`` reads it, and the revision of a source."""
    two, three = small_and_full(siblings("llama"), tmp_path)
    given = config(three)
    kept = ("model_type", "seed_config", "num_experts", "num_experts_per_tok", "expert_names", "dtype")
    (three / "config.json").write_text(json.dumps({key: given[key] for key in kept}))
    source(three, 0, "revision")
    branchmix.remove_expert(three, "math", tmp_path / "removed")
    assert weights(tmp_path / "removed").keys() == weights(two).keys()
    written = config(tmp_path / "removed")
    assert (written["attention"], written["ffn"], written["routed_scaling_factor"]) == ("kv_experts", "experts", 1.0)


def test_what_was_done_is_recorded(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("llama")
    two, _ = small_and_full(models, tmp_path)
    branchmix.add_expert(two, "math", models["math"], tmp_path / "added", router_std=0.1, router_seed=4)
    branchmix.remove_expert(tmp_path / "added", "code", tmp_path / "fewer")
    record = json.loads((tmp_path / "fewer" / "branchmix.json").read_text())
    added, removed = record["changes"]
    assert (added["added"]["router_std"], added["added"]["router_seed"]) == (0.1, 4)
    assert added["added"]["expert"]["model"] == str(models["math"])
    assert len(added["added"]["expert"]["files"][0]["xxh3_128"]) == 32
    assert removed == {"removed": "code"}
    assert [source["name"] for source in record["sources"]] == ["seed", "code"]
    card = (tmp_path / "fewer" / "README.md").read_text()
    assert "expert `math` joined" in card and "expert `code` left" in card


def test_the_number_of_files_stays_what_it_was(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("llama")
    two, _ = small_and_full(models, tmp_path)
    branchmix.add_expert(two, "math", models["math"], tmp_path / "added")
    assert [file.name for file in (tmp_path / "added").glob("*.safetensors")] == ["model.safetensors"]
    sharded, _ = small_and_full(models, tmp_path / "sharded", max_shard_size="40KB")
    branchmix.add_expert(sharded, "math", models["math"], tmp_path / "more")
    sizes = [file.stat().st_size for file in (tmp_path / "more").glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 60_000


def test_refusals(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("llama")
    two, _ = small_and_full(models, tmp_path)
    out = tmp_path / "out"
    for name, expert, error, words in (
        ("code", models["math"], RecipeError, "has an expert 'code' already"),
        ("a b", models["math"], RecipeError, "name"),
        ("seed-copy-1", models["math"], RecipeError, "name: 'seed-copy-1' is a name of seed_copies"),
        ("math", two, CheckpointError, "mixture already"),
        ("math", siblings("qwen3")["math"], CompatibilityError, "model_type is qwen3"),
        ("math", tmp_path / "nowhere", CheckpointError, "no such folder"),
    ):
        with pytest.raises(error, match=words):
            branchmix.add_expert(two, name, expert, out)
    for options, words in (
        ({"router_std": -1.0}, "std: should be greater than 0"),
        ({"router_std": 0.0}, "std: should be greater than 0"),
        ({"router_std": float("nan"), "check": False}, "std: should be a finite number"),
        ({"router_seed": -1}, "seed: should be greater than or equal to 0"),
    ):
        with pytest.raises(RecipeError, match=words):
            branchmix.add_expert(two, "math", models["math"], out, **options)
    with pytest.raises(RecipeError, match="did you mean 'code'"):
        branchmix.remove_expert(two, "coed", out)
    with pytest.raises(RecipeError, match="two or more"):
        branchmix.remove_expert(two, "code", out)
    with pytest.raises(CheckpointError, match="not a mixture"):
        branchmix.remove_expert(models["seed"], "code", out)
    assert not out.exists()


def test_biases_that_only_one_side_has_are_told(siblings: Siblings, tmp_path: Path) -> None:
    """A config that does not mention its biases: the headers do."""
    models = siblings("llama-bias")
    two, _ = small_and_full(siblings("llama-bias"), tmp_path)
    bare = BY_NAME["llama"].save(tmp_path / "bare", 9, tie_word_embeddings=True)
    settings = config(bare)
    for key in ("attention_bias", "mlp_bias"):
        settings[key] = config(models["seed"])[key]
    (bare / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CompatibilityError, match="bias of layer 0 is missing"):
        branchmix.add_expert(two, "bare", bare, tmp_path / "out")


def test_command_line(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("llama")
    two, _ = small_and_full(models, tmp_path)

    def run(*arguments: object) -> dict[str, Any]:
        command = [sys.executable, "-m", "branchmix", *map(str, arguments), "--json"]
        return dict(json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout))

    planned = run("add-expert", two, f"math={models['math']}", tmp_path / "added", "--router-seed", 3, "--dry-run")
    assert planned["dry_run"] and not (tmp_path / "added").exists()
    done = run("add-expert", two, f"math={models['math']}", tmp_path / "added", "--router-seed", 3)
    assert done["experts"] == ["seed", "code", "math"] and done["bytes"] == planned["bytes"]
    assert run("remove-expert", tmp_path / "added", "math", tmp_path / "back")["experts"] == ["seed", "code"]
    same_bytes(weights(tmp_path / "back"), weights(two))

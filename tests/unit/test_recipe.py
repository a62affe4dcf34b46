"""Recipes: defaults, short forms, and what numbers become of words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from branchmix.errors import RecipeError
from branchmix.recipe import AttentionRouting, FFNRouting, Recipe, Routing

EXPERTS = [{"name": "code", "model": "./code"}, {"name": "math", "model": "org/math@main"}]


def recipe(**keys: Any) -> Recipe:
    return Recipe.of({"seed": "./seed", "experts": EXPERTS, **keys})


def test_the_smallest_recipe_is_bam_with_gates_that_keep_the_scale() -> None:
    found = recipe()
    assert (found.num_experts_per_tok, found.scaling, found.routing.ffn.normalize) == (2, 1.0, True)
    assert (found.attention, found.ffn, found.routing.attention.soft) == ("kv_experts", "experts", True)
    assert recipe(routing={"attention": {"top_k": 2}}).routing.ffn == found.routing.ffn


@pytest.mark.parametrize(
    "given",
    [
        {"routing": {"ffn": {"top_k": 1}}},
        {"routing": {"ffn": {}}},
        {"routed_scaling_factor": "auto"},
        {"sparse_upcycling": {"weight_scaling": True}},
        {"ffn": "average"},
    ],
)
def test_what_a_recipe_says_of_its_gates_is_all_there_is(given: dict[str, Any]) -> None:
    found = recipe(**given)
    assert (found.num_experts_per_tok, found.routing.ffn.normalize) == (1, False)


def test_the_start_of_routing_given_as_an_object() -> None:
    attention = AttentionRouting(top_k=2)
    assert recipe(routing=Routing(attention=attention)).routing == recipe(routing={"attention": {"top_k": 2}}).routing
    assert recipe(routing=Routing(ffn=FFNRouting())).num_experts_per_tok == 1
    with pytest.raises(RecipeError, match="routing"):
        recipe(routing=None)


def test_the_papers_start() -> None:
    found = recipe(start="paper")
    assert found.expert_names == ["seed", "code", "math"]
    assert (found.attention, found.ffn, found.merge.method, found.dtype) == ("kv_experts", "experts", "average", None)
    assert (found.num_experts_per_tok, found.scaling, found.routing.ffn.normalize) == (1, 1.0, False)
    assert (found.routing.attention.soft, found.routing.attention.top_k) == (True, None)
    assert (found.router_init.method, found.router_init.std, found.router_init.seed) == ("normal", 0.02, 0)
    assert (found.router_aux_loss_coef, found.router_z_loss_coef) == (0.01, 0.001)


def test_a_dumped_recipe_is_the_same_recipe() -> None:
    found = recipe(routing={"ffn": {"soft": True}, "attention": {"top_k": 2}}, merge={"weighted": {"code": 2}})
    assert Recipe.of(found.model_dump(mode="json")) == found
    assert Recipe.of(found.model_dump(mode="json", exclude_defaults=True)) == found
    assert Recipe.of(found) is found


def test_short_forms() -> None:
    zeros = recipe(router_init="zeros", routing={"ffn": {"soft": True}})
    assert zeros.router_init.method == "zeros"
    assert recipe(merge="seed").merge.method == "seed"
    weighted = recipe(merge={"weighted": {"code": 2}, "kv_init": "code"}).merge
    assert (weighted.method, weighted.weights, weighted.kv_init) == ("weighted", {"code": 2.0}, "code")
    assert recipe(routing={"attention": {"top_k": 2}}).routing.attention.soft is False
    texts = {name: [f"about {name}"] for name in ("seed", "code", "math")}
    assert recipe(router_init={"prompts": texts}).router_init.method == "hidden"


def test_relative_paths_start_at_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "recipes" / "bam.yaml"
    file.parent.mkdir()
    file.write_text("seed: ../seed\nexperts: [{name: code, model: ./code}]\n", encoding="utf-8")
    found = Recipe.load(file)
    assert (found.folder, found.seed, found.experts[0].model) == (file.parent, "../seed", "./code")
    assert recipe().folder == Path()


@pytest.mark.parametrize(
    ("routing", "top_k", "scaling"),
    [
        ({}, 1, 3.0),
        ({"top_k": 2}, 2, 1.5),
        ({"top_k": 2, "normalize": True}, 2, 1.0),
        ({"soft": True}, 3, 1.0),
        ({"top_k": 2, "score": "sigmoid"}, 2, 1.0),
        ({"soft": True, "score": "sigmoid"}, 3, 2 / 3),
        ({"soft": True, "top_k": 1}, 3, 1.0),  # 1 is the default, as in a dumped recipe
    ],
)
def test_soft_is_all_and_auto_keeps_the_dense_scale(routing: dict[str, Any], top_k: int, scaling: float) -> None:
    found = recipe(routing={"ffn": routing}, routed_scaling_factor="auto")
    assert (found.num_experts_per_tok, found.scaling) == (top_k, scaling)


def test_copies_of_the_seed_come_last() -> None:
    assert recipe(seed_copies=2).expert_names == ["seed", "code", "math", "seed-copy-1", "seed-copy-2"]
    assert Recipe.of({"seed": "x", "seed_copies": 3, "include_seed": False}).expert_names[0] == "seed-copy-1"


@pytest.mark.parametrize(
    ("text", "nbytes"), [("5GB", 5_000_000_000), ("1.5 MB", 1_500_000), ("10KB", 10_000), ("0.0000000001GB", 1)]
)
def test_shard_sizes(text: str, nbytes: int) -> None:
    assert recipe(max_shard_size=text).max_shard_bytes == nbytes


@pytest.mark.parametrize(
    ("keys", "weights"),
    [
        ({"include_seed": True}, {"seed": 0, "code": 0, "math": 0}),
        ({"include_seed": False}, {"code": 0, "math": 0}),
        ({"include_seed": False, "seed_copies": 1}, {"seed": 0, "code": 0, "math": 0}),
    ],
)
def test_weights_that_leave_nothing_are_refused(keys: dict[str, Any], weights: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="all are zero, so nothing is left to average"):
        recipe(merge={"weighted": weights}, **keys)


def test_a_seed_that_is_no_expert_has_no_weight() -> None:
    with pytest.raises(RecipeError, match=r"merge\.weights: 'seed' takes no part in averages.*include_seed is false"):
        recipe(merge={"weighted": {"seed": 1, "code": 0, "math": 0}}, include_seed=False)


def test_zero_for_all_but_one_is_a_choice() -> None:
    """A model that is not named has weight 1."""
    assert recipe(merge={"weighted": {"code": 0, "math": 0}}).merge.weights == {"code": 0.0, "math": 0.0}
    assert recipe(merge={"weighted": {"code": 0}}, include_seed=False).expert_names == ["code", "math"]
    copies = recipe(merge={"weighted": {"seed": 1, "code": 0, "math": 0}}, include_seed=False, seed_copies=1)
    assert copies.merge.weights == {"seed": 1.0, "code": 0.0, "math": 0.0}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"merge": {"weighted": {"code": -1}}},
            "merge.weights.code: should be greater than or equal to 0, got -1",
        ),
        ({"merge": {"method": "weighted"}}, "method weighted needs weights"),
        ({"merge": {"method": "seed", "weights": {"code": 1}}}, "only it takes them"),
        ({"experts": ["./code"]}, r"experts\.0: should be a mapping, whose keys may be name, model, got '\./code'"),
        ({"merge": {"kv_init": "cod"}}, r"'cod' is not one of the choices \(did you mean 'code'\?\)"),
        ({"merge": {"weighted": {"seed-copy-1": 2}}, "seed_copies": 1}, "seed-copy-1 is the seed again"),
        (
            {"experts": [{"name": "seed-copy-1", "model": "m"}]},
            "experts.0.name: 'seed-copy-1' is a name of seed_copies",
        ),
        ({"seed_copies": 1025}, "seed_copies: should be less than or equal to 1024, got 1025"),
        ({"seed_copies": 1.5}, "seed_copies: should be a whole number, got 1.5"),
        ({"seed": True}, "seed: should be text, got True: put it in quotes"),
        ({"experts": "code"}, "experts: should be a list, got 'code'"),
        ({"merge": {"weights": 3}}, "merge.weights: should be a mapping, got 3"),
        ({"expert_rank": 0}, "should be greater than or equal to 1 or 'auto' or 'full', got 0"),
        ({"router_init": "hidden"}, "method hidden needs prompts or text"),
        ({"router_init": {"prompts": {"code": ["x"]}}}, "'seed' has none"),
        ({"router_init": {"prompts": {"seed": ["x"], "code": [], "math": ["y"]}}}, "'code' has none"),
        ({"router_init": {"prompts": {"seed": ["x"], "code": ["y", " "], "math": ["z"]}}}, "one of 'code' is empty"),
        ({"router_init": {"std": float("inf")}}, "finite"),
        ({"routing": {"attention": {"soft": False}}}, "top_k is missing"),
        ({"routing": {"attention": {"top_k": 1, "normalize": True}}}, "routing.attention: normalize with top_k 1"),
        ({"router_init": {"attention": "zeros"}, "routing": {"attention": {"top_k": 2}}}, "the attention router"),
        ({"routing": {"shared": True}, "attention": "average"}, "routing.shared: one router for both needs attention"),
        ({"routing": {"shared": True}, "ffn": "average"}, "routing.shared: one router for both needs attention"),
        ({"routing": {"shared": True}, "router_init": {"attention": "zeros"}}, "attention has no router: remove it"),
        ({"routed_scaling_factor": 0}, "should be greater than 0 or 'auto', got 0"),
        ({"sparse_upcycling": {"weight_scaling": -1}}, "should be true or false or greater than 0, got -1"),
    ],
)
def test_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        recipe(**keys)
    assert len(str(caught.value).splitlines()) == 1

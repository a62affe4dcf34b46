"""A study's settings and its graph: what is refused, equal budgets, and which steps a changed option makes new."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from branchmix.accounting import Shape, active_parameters, flops_per_token, parameters
from branchmix.errors import DataError, RecipeError
from branchmix.settings import parse
from branchmix.study import forecast
from branchmix.study.build import build
from branchmix.study.forecast import processes_of
from branchmix.study.graph import Graph
from branchmix.study.settings import DEMO, METHODS, StudyFile
from branchmix.study.speed import Speed, kind_of
from branchmix.train.schedule import optimizer_flops

MODEL = {
    "model_type": "cohere",
    "train_tokenizer": 300,
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "logit_scale": 1.0,
}
STEP = 16 * 4
TWICE = {"random_seeds": [0, 1]}
ROOT = Path(__file__).parents[2]


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "seed": MODEL,
        "data": {"installed": "1M"},
        "sequence_length": 16,
        "batch_size": 4,
        "tokens": {"seed": 20 * STEP, "expert": 10 * STEP, "mixture": 100 * STEP},
        "learning_rate": {"peak": 1e-2},
        "methods": ["btx", "bam-expert-kv", "soup", "dense", "ensemble"],
        **changes,
    }


def study(**changes: Any) -> StudyFile:
    return parse(StudyFile, settings(**changes), "study.yaml")


def graph(**changes: Any) -> Graph:
    return build(study(**changes))


def new(before: Graph, after: Graph) -> set[str]:
    """Steps of ``after`` that would be run, if those of ``before`` were done."""
    done = {step.folder for step in before.steps.values()}
    return {step.name for step in after.steps.values() if step.folder not in done}


# ---- settings ----


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ["btxx"]}, "no method 'btxx', did you mean 'btx'"),
        ({"methods": ["btx", "btx"]}, "'btx' is listed 2 times: give each a name"),
        ({"methods": ["soup"], "reference": "soup"}, "soup is not trained"),
        ({"methods": ["soup"]}, "reference: no method is called 'btx'"),
        ({"experts": ["codes"]}, "no domain of data is called 'codes', did you mean 'code'"),
        ({"tokens": {"expert": 1, "mixture": 1}}, "tokens.seed: is missing"),
        ({"seed": "./seed"}, "the seed is given"),
        ({"random_seeds": [1, 1]}, "no repetition"),
        ({"recipe": {"atention": "seed"}}, "recipe.atention: a recipe here has no such key"),
        ({"recipe": {"stitches": 4}}, "recipe.stitches: a recipe here has no such key"),
        (
            {"methods": [{"method": "btx", "recipe": {"stitches": 4}}]},
            "recipe.stitches: btx has none: leave it out, or",
        ),
        (
            {"methods": [{"method": "bts", "recipe": {"stitches": None}}]},
            "recipe.stitches: bts is made of them: give a number",
        ),
        ({"train": {"budget": {"steps": 1}}}, "train.budget: a run here has no such key"),
        ({"methods": ["btx", {"method": "btx", "name": "code"}]}, "'code' is the name of a dense model"),
        ({"budgets": 1}, "budgets: there is no such key"),
        ({"train": {"precision": "fp8"}}, "train: precision: 'fp8' is not one of"),
        ({"train": {"optimizer": {"eps": 1}}}, "train.optimizer: a run here has no such key: the study has optimizer"),
        ({"train": {"learning_rate": {"peak": 9.0}}}, "train.learning_rate: a run here has no such key"),
        (
            {"expert_train": {"freez": ["trunk"]}},
            "expert_train.freez: a run here has no such key, did you mean 'freeze'",
        ),
        ({"expert_train": {"freeze": ["x"]}}, "expert_train: freeze.0: 'x'"),
        ({"train": {"lora": {}}}, "train.lora: a run here has no such key"),
        ({"methods": ["btx", {"method": "dense", "train": {"lora": {}}}]}, "train.lora: a run here has no such key"),
        ({"methods": ["btx", {"method": "dense", "train": {"freeze": ["x"]}}]}, "methods: dense: train: freeze.0: 'x'"),
        ({"minutes": 0}, "minutes: should be greater than 0"),
        ({"micro_batch_size": 3}, "batch_size is 4, which micro_batch_size 3 does not divide"),
        ({"held_out": {"share": 0}}, "held_out.share: 0 leaves no text to measure"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as error:
        study(**changes)
    assert words.replace(", did", " (did") in str(error.value) or words in str(error.value), str(error.value)


@pytest.mark.parametrize("method", ["dense", "soup", "bam-expert", "bts"])
def test_routes_of_what_is_no_trained_mixture_are_refused(method: str) -> None:
    methods = ["btx", "bam-expert-kv", "dense", "soup", "bts"]
    problem = f"routes: '{method}' is not a mixture with routers that the study trains"
    with pytest.raises(RecipeError, match=problem) as error:
        graph(methods=methods, routes=[method])
    assert ("did you mean 'bam-expert-kv'" in str(error.value)) == (method == "bam-expert")


def test_what_no_recipe_can_be_and_two_methods_of_one_name_are_refused() -> None:
    with pytest.raises(RecipeError, match="method btx: router_init: should be a mapping"):
        graph(recipe={"router_init": 3})
    names = [{"method": "bam-expert-kv", "name": "x", "match": ["dm"]}, {"method": "soup", "name": "x-dm"}]
    with pytest.raises(RecipeError, match=r"methods: two of them make r1.scores.x-dm"):
        graph(methods=["btx", *names])


def test_a_methods_own_settings_of_its_run_are_its_runs() -> None:
    changed = {"optimizer": {"weight_decay": 0.5}, "learning_rate": {"final": 0.3}, "ema": 0.9, "micro_batch_size": 2}
    methods = ["btx", "dense", {"method": "dense", "name": "other", "train": changed}]
    methods.append({"method": "dense", "name": "half", "train": {"learning_rate": {"ratio": 0.5}}})
    found = graph(methods=methods, train={"ema": 0.5}, optimizer={"eps": 1e-6})
    run, own, half = (found.steps[f"r1.train.{name}-dm"].run for name in ("dense", "other", "half"))
    rate = run["learning_rate"]
    assert own["optimizer"] == {**run["optimizer"], "weight_decay": 0.5} and own["optimizer"]["eps"] == 1e-6
    assert own["learning_rate"] == {**rate, "final": 0.3} and own["micro_batch_size"] == 2
    assert half["learning_rate"] == {"warmup": rate["warmup"], "final": rate["final"], "ratio": 0.5}
    assert (run["ema"], own["ema"]) == (0.5, 0.9)
    unclipped = graph(methods=["btx", {"method": "dense", "train": {"optimizer": {"max_grad_norm": 0}}}])
    assert unclipped.steps["r1.train.dense-dm"].cost.optimizer < found.steps["r1.train.dense-dm"].cost.optimizer


def test_experts_are_trained_with_keys_of_their_own() -> None:
    """Seeds and mixtures are not; experts with a frozen trunk cost less, and what depends on them is made anew."""
    plain, frozen = graph(), graph(expert_train={"freeze": ["trunk"]})
    experts = {f"r1.train.{name}" for name in ("code", "law", "math")}
    assert {name for name, step in frozen.steps.items() if step.run.get("freeze") == ["trunk"]} == experts
    assert all(frozen.steps[name].cost.total < plain.steps[name].cost.total for name in experts)
    untouched = {name for name in plain.steps if name == "text" or name.endswith(".seed") or "dense" in name}
    assert plain.steps.keys() - new(plain, frozen) == untouched


def test_text_that_is_not_there_is_refused_by_its_domain() -> None:
    with pytest.raises(DataError, match=r"^data\.law: files 'none\.txt': no file matches"):
        graph(data={name: {"files": "none.txt"} for name in ("law", "code", "general")})


def test_a_budget_below_one_step_is_refused() -> None:
    with pytest.raises(RecipeError, match="less than one step"):
        graph(tokens={"seed": 20 * STEP, "expert": 1, "mixture": 100 * STEP})


@pytest.mark.parametrize("file", [*sorted((ROOT / "recipes").glob("study-*.yaml")), DEMO], ids=lambda file: file.stem)
def test_recipes_can_be_loaded(file: Path) -> None:
    found = StudyFile.load(file)
    if not isinstance(found.seed, str):
        assert len(build(found).steps) > 20


def test_every_method_has_a_graph() -> None:
    found = graph(methods=list(METHODS))
    titles = {step.about.method for step in found.steps.values()}
    assert titles - {""} == set(METHODS)


# ---- budgets ----


def test_equal_data_and_equal_compute() -> None:
    """Compute: forward three times, and 17 FLOPs of AdamW and clipping for each parameter and step, by hand."""
    found = graph(methods=["btx", "bam-expert-kv", "bam-shared-kv", "btx-soft"])
    runs = {name.split(".")[-1]: step for name, step in found.steps.items() if step.kind == "train"}
    reference = runs["btx"].cost
    assert (reference.steps, reference.tokens) == (100, 100 * STEP)
    config = runs["btx"].config
    assert config is not None
    assert reference.flops == 3 * 100 * STEP * flops_per_token(config, 16).total
    assert reference.optimizer == 17 * 100 * parameters(config).total == 100 * optimizer_flops(parameters(config).total)
    for method in ("bam-expert-kv", "bam-shared-kv", "btx-soft"):
        assert runs[f"{method}-dm"].cost.steps == 100
        cost = runs[f"{method}-cm"].cost
        assert 0 <= reference.total - cost.total < cost.total / cost.steps
        assert cost.steps < 90


def test_a_load_that_is_counted_ahead_is_charged(tmp_path: Path) -> None:
    """Where a step has several micro-batches: its forward pass, with the head on the last token of each sequence."""
    counted = {"method": "btx", "name": "global", "train": {"balance": {"scope": "global_batch"}}}
    cost = {}
    for micro in (None, 2):
        found = graph(methods=["btx", counted], micro_batch_size=micro).steps
        runs = {name.split(".")[-1]: step for name, step in found.items() if step.kind == "train"}
        cost[micro] = {name: runs[name].cost for name in runs if "btx" in name or "global" in name}
    assert cost[None]["btx"] == cost[2]["btx"] == cost[None]["global-dm"] and len(cost[None]) == 2
    flops, free, charged = flops_per_token(runs["btx"].config, 16), cost[2]["btx"], cost[2]["global-dm"]
    assert charged.flops - free.flops == 100 * STEP * (flops.non_embedding + flops.lm_head // 16)
    at_equal_compute = cost[2]["global-cm"]
    assert 0 <= free.total - at_equal_compute.total < charged.total / 100 and at_equal_compute.steps < 85
    speed = Speed(0.0, {kind_of(step.config): 1.0 for step in found.values() if step.config})
    rows = forecast.forecast(study(methods=["btx", counted], micro_batch_size=2), tmp_path, speed=speed).rows
    seconds = {row["name"]: row["seconds"] - forecast.READING_SECONDS for row in rows}
    assert (seconds["train.btx"], seconds["train.global-dm"]) == (100, pytest.approx(100 * forecast.AHEAD))


def test_one_run_where_equal_data_is_equal_compute() -> None:
    found = graph(methods=["btx", "sparse-upcycling"])
    names = [name for name in found.steps if "train.sparse" in name]
    assert names == ["r1.train.sparse-upcycling-dm"]
    about = found.steps[names[0]].about
    assert about is not None and about.match == ("dm", "cm")


def test_frozen_experts_cost_less_to_train() -> None:
    found = graph(methods=["btx", "bam-expert-kv", "bam-frozen-experts", "bam-adapters"])
    cost = {name.split(".")[-1]: step.cost for name, step in found.steps.items() if step.kind == "train"}
    whole, frozen = cost["bam-expert-kv-dm"], cost["bam-frozen-experts-dm"]
    assert frozen.flops < whole.flops and frozen.optimizer < whole.optimizer / 2
    assert cost["bam-frozen-experts-cm"].steps > cost["bam-expert-kv-cm"].steps
    assert cost["bam-adapters-dm"].optimizer < whole.optimizer


def test_further_experts_come_nearest_to_bams_parameters() -> None:
    found = graph(methods=["btx", "bam-expert-kv", "btx-total-match", "btx-active-match"])
    config = {name.split(".")[-1]: step.config for name, step in found.steps.items() if step.kind == "upcycle"}
    goal, total, active = config["bam-expert-kv"], config["btx-total-match"], config["btx-active-match"]
    assert goal is not None and total is not None and active is not None
    wanted = parameters(goal).total
    for off in (-1, 1):
        other = {**total, "num_experts": total["num_experts"] + off}
        assert (
            abs(parameters(total).total - wanted) <= abs(parameters(other).total - wanted) or total["num_experts"] == 5
        )
        other = {**active, "num_experts_per_tok": active["num_experts_per_tok"] + off}
        if other["num_experts_per_tok"]:
            gap = abs(active_parameters(active).total - active_parameters(goal).total)
            assert gap <= abs(active_parameters(other).total - active_parameters(goal).total)


def test_one_router_is_planned_as_it_is_built() -> None:
    steps = graph(methods=["btx", "bam-expert-kv", "bam-shared-router"]).steps
    one, two = (steps[f"r1.upcycle.{name}"].config for name in ("bam-shared-router", "bam-expert-kv"))
    assert one is not None and two is not None
    saved = MODEL["num_hidden_layers"] * one["num_experts"] * MODEL["hidden_size"]
    assert parameters(two).total - parameters(one).total == saved > 0


# ---- keys ----


def test_changed_options_make_new_just_what_depends_on_them() -> None:
    before = graph(random_seeds=[0, 1])
    assert not new(before, graph(random_seeds=[0, 1]))
    assert not new(before, graph(random_seeds=[0, 1], threads=3, at_once=1, keep="results"))
    assert not new(before, graph(random_seeds=[0, 1], train={"checkpoints": {"minutes": 5}}))
    assert new(before, graph(random_seeds=[0, 1], train={"precision": "fp32"}))

    in_pieces = new(before, graph(random_seeds=[0, 1], micro_batch_size=2))
    assert "r1.train.btx" in in_pieces, "a router's losses are those of a micro-batch"
    assert not {"r1.train.seed", "r1.train.code", "r1.train.dense-dm", "r1.upcycle.btx"} & in_pieces

    scores = {name for name, step in before.steps.items() if step.kind in ("scores", "ensemble")}
    assert new(before, graph(random_seeds=[0, 1], held_out={"tokens": 9000})) == scores

    methods = [{"method": "btx", "recipe": {"router_z_loss_coef": 0.5}}, "bam-expert-kv", "soup", "dense", "ensemble"]
    of_btx = {name for name in before.steps if ".btx" in name} | {"inference"}
    assert new(before, graph(random_seeds=[0, 1], methods=methods)) == of_btx

    labelled = [{"method": "btx", "label": "Branch-Train-MiX"}, "bam-expert-kv", "soup", "dense", "ensemble"]
    assert not new(before, graph(random_seeds=[0, 1], methods=labelled))

    longer = {"seed": 20 * STEP, "expert": 10 * STEP, "mixture": 120 * STEP}
    words = (".btx", ".bam-expert-kv-dm", ".bam-expert-kv-cm", ".dense-dm", ".dense-cm")
    trained = {n for n in before.steps if n.endswith(words) and not n.startswith(("r1.upcycle", "r2.upcycle"))}
    assert new(before, graph(random_seeds=[0, 1], tokens=longer)) == trained

    more = new(before, graph(random_seeds=[0, 1], methods=[*settings()["methods"], "bam-shared-kv"]))
    assert more == {
        name
        for name in graph(random_seeds=[0, 1], methods=[*settings()["methods"], "bam-shared-kv"]).steps
        if "shared" in name
    } | {"inference"}

    third = new(before, graph(random_seeds=[0, 1, 2]))
    assert third and all(name.startswith("r3.") for name in third)

    other = new(before, graph(random_seeds=[0, 1], tokens={**settings()["tokens"], "seed": 21 * STEP}))
    assert other == set(before.steps) - {"text"}


def _was_charged_otherwise(recipe: str, name: str) -> bool:
    """Steps that were published when top-k attention computed all experts, and had as few tokens at equal compute."""
    return recipe == "study-a" and name.endswith(("bam-attention-top1-cm", "bam-attention-top2-cm"))


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "recipes").glob("study-*.yaml")))
def test_published_results_are_of_the_recipe_beside_them(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: a new option of the software, left alone, does not begin finished studies anew."""
    results = sorted((ROOT / "docs" / "studies" / recipe / "results").glob("*.json"))
    if not results:
        pytest.skip("no results of it are published")
    if recipe == "study-b" and not (ROOT / "smollm2-output" / "seed").is_dir():
        pytest.skip("its seed is not there; examples/smollm2/seed.py makes it")
    study = StudyFile.load(ROOT / "recipes" / f"{recipe}.yaml")
    records = [json.loads(path.read_text()) for path in results if path.stem != "study"]

    def others() -> set[str]:
        steps = build(study).steps
        return {record["step"] for record in records if steps[record["step"]].key != record["key"]}

    old = {record["step"] for record in records if _was_charged_otherwise(recipe, record["step"])}
    assert others() == old
    if old:
        monkeypatch.setattr(Shape, "active_attention_experts", Shape.attention_experts)
        assert not others()


def test_given_text_is_known_by_its_content(tmp_path: Path) -> None:
    for name in ("general", "code"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    data = {name: {"files": str(tmp_path / f"{name}.jsonl")} for name in ("general", "code")}
    before = graph(data=data)
    (tmp_path / "code.jsonl").write_text(json.dumps({"text": "code"}) + "\n")  # another date
    assert not new(before, graph(data=data))
    (tmp_path / "code.jsonl").write_text(json.dumps({"text": "other"}) + "\n")
    assert new(before, graph(data=data)) == set(before.steps)


def test_calibrated_merges_depend_on_the_text_and_on_what_it_holds_out() -> None:
    """Not on how much of that is measured; a merge without a fit reads no text."""
    methods, merge = ["btx", "bam-expert-kv-calibrated"], "r1.upcycle.bam-expert-kv-calibrated"
    before = graph(methods=methods)
    assert before.steps[merge].needs.text == "text" and before.steps["r1.upcycle.btx"].needs.text is None
    assert merge in new(before, graph(methods=methods, held_out={"share": 0.05}))
    assert merge in new(before, graph(methods=methods, data={"installed": "2M"}))
    measured = new(before, graph(methods=methods, held_out={"tokens": 9000}))
    assert merge not in measured and "r1.scores.bam-expert-kv-calibrated-step0" in measured


def test_forced_gates_are_measured_on_the_calibrated_merge_wherever_they_are_listed() -> None:
    methods = ["bam-expert-kv-forced", "bam-expert-kv-calibrated"]
    for listed in (methods, methods[::-1]):
        steps = graph(methods=["btx", *listed]).steps
        merges = [name for name, step in steps.items() if step.kind == "upcycle" and "kv" in name]
        assert merges == [f"r1.upcycle.{listed[0]}"]
        needed = {steps[f"r1.scores.bam-expert-kv-{name}"].needs.model for name in ("forced", "calibrated-step0")}
        assert needed == {*merges} and steps["r1.train.bam-expert-kv-calibrated-dm"].needs.model == merges[0]
        assert steps["r1.scores.bam-expert-kv-forced"].kind == "forced"


def test_gates_are_fitted_on_the_studys_own_text() -> None:
    own = {"method": "bam-expert-kv-calibrated", "recipe": {"gates": {"data": "mine.yaml"}}}
    with pytest.raises(RecipeError, match=r"bam-expert-kv-calibrated: gates\.data: a study fits gates on its own text"):
        graph(methods=["btx", own])
    with pytest.raises(RecipeError, match="btx-forced: gates: the fit says which expert is the best one"):
        graph(methods=["btx", {"method": "btx-forced", "recipe": {"gates": None}}])
    tokens_only = {"method": "bam-expert-kv-calibrated", "recipe": {"gates": {"token_only": True}}}
    config = graph(methods=["btx", tokens_only]).steps["r1.upcycle.bam-expert-kv-calibrated"].config
    assert config is not None and "document_gate" not in config and config["num_experts_per_tok"] == 2


def test_gates_of_the_whole_study_are_for_merges_with_experts() -> None:
    """Also of merges with copies of the seed, whose number is found from recipes with the gates."""
    methods = ["btx", "soup", "btx-total-match", "btx-active-match"]
    found = graph(methods=methods, recipe={"gates": {}}).steps
    gates = {name: step.recipe.get("gates") for name, step in found.items() if step.kind == "upcycle"}
    fitted = {"data": "data.yaml", "token_only": False}
    assert gates == {f"r1.upcycle.{name}": None if name == "soup" else fitted for name in methods}
    plain = graph(methods=methods).steps
    assert found["r1.upcycle.soup"].key == plain["r1.upcycle.soup"].key
    for name in ("btx-total-match", "btx-active-match"):
        own = graph(methods=["btx", {"method": name, "recipe": {"gates": {}}}]).steps[f"r1.upcycle.{name}"]
        assert own.recipe["gates"] == fitted
        assert own.recipe["seed_copies"] == plain[f"r1.upcycle.{name}"].recipe["seed_copies"]
    with pytest.raises(RecipeError, match="method soup: gates: a soup has no experts to choose from"):
        graph(methods=["btx", {"method": "soup", "recipe": {"gates": {}}}])


def test_data_order_is_paired_within_a_repetition() -> None:
    found = graph(random_seeds=[5, 6])
    by_repetition: dict[int, set[int]] = {0: set(), 1: set()}
    for step in found.steps.values():
        if step.kind == "train" and step.about.group == "methods":
            by_repetition[step.about.repetition].add(step.run["random_seed"])
    assert len(by_repetition[0]) == len(by_repetition[1]) == 1 and by_repetition[0] != by_repetition[1]
    runs = [step.run["random_seed"] for step in found.steps.values() if step.name in ("r1.train.seed", "r1.train.code")]
    assert len({*runs, *by_repetition[0]}) == 3  # each phase its own


# ---- order and choice ----


def test_only_what_runs_alone_is_shared_by_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "cores", lambda: 6)
    monkeypatch.setattr(forecast, "gpus", list)

    def shared(**changes: Any) -> dict[str, int]:
        file = study(**changes)
        found = build(file)
        counts = {step.name: processes_of(file, found, step) for step in found.steps.values()}
        return {name: count for name, count in counts.items() if count > 1}

    assert shared() == {"text": 6, "r1.train.seed": 4}  # a batch of 4 sequences
    assert shared(micro_batch_size=2) == {"text": 6, "r1.train.seed": 2}
    assert shared(**TWICE) == {"text": 6}
    assert shared(threads=1) == {}
    monkeypatch.setattr(forecast, "gpus", lambda: ["0"])
    assert shared() == {}


def test_methods_of_all_repetitions_come_before_ablations() -> None:
    found = graph(methods=["btx"], ablations=["soup"], random_seeds=[0, 1])
    names = list(found.steps)
    assert names.index("r2.scores.btx") < names.index("r1.upcycle.soup") < names.index("r2.upcycle.soup")
    assert names[0] == "text" and names[-1] == "inference"
    for place, step in enumerate(found.steps.values()):
        assert all(names.index(needed) < place for needed in step.needs.names)


def test_only_some_steps_with_what_they_need() -> None:
    found = graph(random_seeds=[0, 1])
    names = {step.name for step in found.chosen(["r1.train.btx"])}
    assert names == {
        "text",
        "r1.train.seed",
        "r1.train.code",
        "r1.train.law",
        "r1.train.math",
        "r1.upcycle.btx",
        "r1.train.btx",
    }
    assert {step.name for step in found.chosen(["soup"])} >= {"r1.scores.soup", "r2.scores.soup"}
    assert not any(step.name.startswith("r2") for step in found.chosen(["r1"]))
    assert len(found.chosen([])) == len(found.steps)
    with pytest.raises(RecipeError, match=r"no step is called 'sopu'.*soup"):
        found.chosen(["sopu"])

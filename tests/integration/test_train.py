"""``branchmix train`` from end to end: models from scratch, experts, mixtures; what is written, stopped and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import branchmix
from branchmix.data.sources import is_held_out
from branchmix.errors import RecipeError
from branchmix.train import measure, train
from branchmix.train.checks import require_balanceable
from branchmix.train.config import RunConfig
from branchmix.train.prepared import PreparedRun
from branchmix.train.trainer import BranchTrainer
from checkpoints import same_bytes, weights
from training import NEW_MODEL, command, rows, settings, training, write_run, write_text

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    os.environ["BRANCHMIX_CACHE"] = str(folder / "cache")
    return write_text(folder)


@pytest.fixture(scope="module")
def models(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A seed from scratch, two experts of it, and their mixture."""
    place = tmp_path_factory.mktemp("models")
    out = {name: place / name for name in ("seed", "code", "law", "mixture")}
    train(write_run(place, settings(text, out="seed", budget={"tokens": 12 * 8 * 32 + 5})), progress=False)
    for name in ("code", "law"):
        expert = settings(
            text, model="seed", out=name, mix={name: 0.9, "code" if name == "law" else "law": 0.1},
            budget={"steps": 6}, learning_rate={"ratio": 0.5},
        )  # fmt: skip
        train(write_run(place, expert), progress=False)
    experts = [{"name": name, "model": str(out[name])} for name in ("code", "law")]
    branchmix.upcycle({"seed": str(out["seed"]), "experts": experts}, out["mixture"])
    return out


def run(place: Path, text: Path, model: Path, **changes: Any) -> Path:
    return write_run(place, settings(text, model=str(model), **changes))


def test_a_model_from_scratch_learns_and_is_a_model(models: dict[str, Path]) -> None:
    seed = models["seed"]
    record, metrics = training(seed), rows(seed)
    assert record["steps"] == 12 and record["tokens"] == 12 * 8 * 32
    assert {name: domain["tokens"] for name, domain in record["domains"].items()} == {"code": 1536, "law": 1536}
    for domain in ("code", "law"):
        start, end = record["held_out"]["start"][domain], record["held_out"]["end"][domain]
        assert start["loss"] == pytest.approx(5.7, abs=0.2), "log 300 before training"
        assert end["loss"] < start["loss"] - 1
        assert record["domains"][domain]["loss"] < 5
    assert [row["step"] for row in metrics] == [0, 4, 8, 12, 12]
    assert [row["tokens"] for row in metrics[1:4]] == [1024, 2048, 3072]
    assert metrics[1]["loss"] == pytest.approx((metrics[1]["loss/code"] + metrics[1]["loss/law"]) / 2, rel=0.05)
    assert metrics[1]["loss"] == pytest.approx(metrics[1]["objective"], rel=1e-3), "a dense model has no other losses"
    # 3 x (2 layers of q, k, v, o: 2 x 32 x (2 x 32 + 2 x 16), mask 2 x 32 x 32, FFN 2 x 3 x 32 x 64; head 2 x 32 x 300)
    layer = 2 * 32 * (2 * 32 + 2 * 16) + 2 * 32 * 32 + 2 * 3 * 32 * 64
    assert record["flops"] == 3 * (2 * layer + 2 * 32 * 300) * record["tokens"]
    assert record["peak_learning_rate"] == 0.01 and record["resumed"] == []
    model, tokenizer = AutoModelForCausalLM.from_pretrained(seed), AutoTokenizer.from_pretrained(seed)
    assert len(tokenizer) == model.config.vocab_size == 300
    assert model.config.eos_token_id == tokenizer.eos_token_id is not None and model.config.use_cache
    assert not {"checkpoints", "run.json"} & {file.name for file in seed.iterdir()}


def test_experts_learn_their_domain_at_a_ratio_of_the_seeds_rate(models: dict[str, Path]) -> None:
    for name, other in (("code", "law"), ("law", "code")):
        record = training(models[name])
        assert record["peak_learning_rate"] == 0.005
        assert record["domains"][name]["tokens"] > 8 * record["domains"][other]["tokens"]
        gain = {domain: record["held_out"]["start"][domain]["loss"] - score["loss"]
                for domain, score in record["held_out"]["end"].items()}  # fmt: skip
        assert gain[name] > max(0.05, gain[other])
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (models[name] / file).read_bytes() == (models["seed"] / file).read_bytes()


def test_a_mixture_trains_and_tells_of_its_routers(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    report = train(run(tmp_path, text, models["mixture"], gradient_checkpointing=True), progress=False)
    assert report.status == "trained" and report.out == tmp_path / "run"
    held_out = report.record["held_out"]
    assert all(held_out["end"][name]["loss"] < held_out["start"][name]["loss"] for name in ("code", "law"))
    row = rows(report.out)[-2]
    assert row["objective"] > row["loss"], "the router losses are in what is minimised"
    assert 0 < row["router/ffn/00/entropy"] < 1.1
    assert set(row["routers"]["attention"][1]["by_domain"]) == {"code", "law"}
    before, after = weights(models["mixture"]), weights(report.out)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in after if "gate" in name or "experts" in name)
    assert report.record["model"]["trained"] == report.record["model"]["parameters"]


@pytest.mark.parametrize("kind", ["seed", "mixture"])
def test_micro_batches_change_nothing(kind: str, models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """But for the routers' own losses, left out here: a micro-batch has its own balance, and counts by labels."""
    shutil.copytree(models[kind], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({**config, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0})
    )
    results = {}
    for micro in (8, 2):
        changes = {"micro_batch_size": micro, "optimizer": {"eps": 1e-3}}  # else AdamW makes steps of rounding errors
        file = run(tmp_path / str(micro), text, tmp_path / "model", budget={"steps": 3}, **changes)
        report = train(file, progress=False)
        results[micro] = weights(report.out), rows(report.out)
    for name, tensor in results[8][0].items():
        torch.testing.assert_close(results[2][0][name], tensor, rtol=0, atol=1e-6)
    for one, other in zip(results[8][1], results[2][1], strict=True):
        for key in ("loss", "loss/code", "objective", "held_out/law", "grad_norm"):
            assert one.get(key) == pytest.approx(other.get(key), abs=2e-6)


def test_a_balance_over_the_whole_batch_makes_micro_batches_change_nothing(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    """For FFN routers and top-k attention routers. Balance counted within each micro-batch changes them a lot."""
    model = tmp_path / "model"
    shutil.copytree(models["mixture"], model)
    config = json.loads((model / "config.json").read_text())
    strong = {"attention_num_experts_per_tok": 1, "router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
    (model / "config.json").write_text(json.dumps({**config, **strong}))
    results = []
    for scope, micro in (("global_batch", 8), ("global_batch", 2), ("micro_batch", 2)):
        changes = {"micro_batch_size": micro, "balance": {"scope": scope}, "optimizer": {"eps": 1e-3}}
        file = run(tmp_path / f"{scope}-{micro}", text, model, budget={"steps": 3}, **changes)
        results.append(weights(train(file, progress=False).out))
    whole, in_parts, by_part = results
    for name, tensor in whole.items():
        torch.testing.assert_close(in_parts[name], tensor, rtol=0, atol=1e-5, msg=name)
    assert max((by_part[name] - tensor).abs().max() for name, tensor in whole.items()) > 1e-3


def test_a_budget_in_minutes_knows_of_the_count(
    models: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, flops = [], []
    monkeypatch.setattr(measure, "seconds_per_step", lambda *_, counts_ahead, **__: found.append(counts_ahead) or 1.0)
    for number, micro in enumerate((2, 8)):
        changes = {"balance": {"scope": "global_batch"}, "budget": {"minutes": 1}, "micro_batch_size": micro}
        report = train(run(tmp_path / str(number), text, models["mixture"], **changes), dry_run=True, progress=False)
        flops.append(report.record["model"]["training_flops_per_token"])
    assert found == [True, False]
    assert 1.2 < flops[0] / flops[1] < 4 / 3


def test_biases_are_trained_saved_and_resumed_without_a_balance_loss(
    models: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later run without ``balance`` keeps them as they are."""
    changes = {"balance": {"bias": "sign", "bias_rate": 0.01}, "budget": {"steps": 4}, "logging": {"steps": 1}}
    changes |= {"ema": 0.5}
    whole = train(run(tmp_path / "whole", text, models["mixture"], **changes), progress=False).out
    stopped = run(tmp_path / "stopped", text, models["mixture"], **changes)
    step_ended = BranchTrainer.on_step_end

    def stop(self: BranchTrainer, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)
        step_ended(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(BranchTrainer, "on_step_end", stop)
        assert train(stopped, progress=False).status == "stopped"
    found = weights(train(stopped, progress=False).out)
    assert found.keys() == weights(whole).keys() and all(torch.equal(found[n], t) for n, t in weights(whole).items())
    biases = {name: tensor for name, tensor in found.items() if name.endswith("expert_bias")}
    assert len(biases) == 2 and all("mlp.gate" in name for name in biases), "soft attention gates have none"
    for bias in biases.values():
        assert bias.dtype == torch.float32 and torch.equal((bias * 100).round() / 100, bias) and bias.abs().max() > 0.01
    average, again = weights(whole / "ema"), weights(tmp_path / "stopped" / "run" / "ema")
    for name, bias in biases.items():
        assert torch.equal(average[name], again[name]) and not torch.equal(average[name], bias)
    config = json.loads((whole / "config.json").read_text())
    assert config["expert_bias"] and config["router_aux_loss_coef"] == 0.01
    first = rows(whole)[1]
    assert first["objective"] - first["loss"] < 2 * 0.001 * 2 * 1.6**2, "only the z-loss, of two layers and two routers"
    later = weights(train(run(tmp_path / "later", text, whole, budget={"steps": 2}), progress=False).out)
    assert all(torch.equal(later[name], bias) for name, bias in biases.items())


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        ("seed", {}, "^balance: applies to mixtures, but the model has no routers: remove it"),
        (
            "mixture",
            {"ffn": "average"},
            "^balance: every token goes to all experts of the model, so their load is equal",
        ),
        ("mixture", {"num_experts_per_tok": 3}, "^balance: every token goes to all experts of the model"),
    ],
)
def test_a_balance_of_nothing_is_refused(
    model: str, change: dict[str, Any], message: str, models: dict[str, Path]
) -> None:
    described = json.loads((models[model] / "config.json").read_text()) | change
    with pytest.raises(RecipeError, match=message):
        require_balanceable(RunConfig(**settings(Path(), model="model", balance={})), described)


def outside_experts(name: str) -> bool:
    return not any(part in name for part in ("heads", "experts", "o_proj"))


@pytest.mark.parametrize(
    ("kind", "changes", "trained"),
    [
        ("mixture", {"freeze": ["experts"]}, outside_experts),
        ("mixture", {"freeze": ["all_but_routers"]}, lambda name: "gate.weight" in name),
        ("mixture", {"adapters": True}, lambda name: "gate.weight" in name or "down_proj" in name or "o_proj" in name),
        ("seed", {"freeze": ["embeddings"]}, lambda name: "embed_tokens" not in name),
    ],
    ids=["experts", "routers-only", "adapters", "embeddings"],
)  # fmt: skip
def test_parts_that_are_not_trained_keep_their_bits(
    kind: str,
    changes: dict[str, Any],
    trained: Callable[[str], bool],
    models: dict[str, Path],
    text: Path,
    tmp_path: Path,
) -> None:
    file = run(tmp_path, text, models[kind], budget={"steps": 3}, checkpoints={"steps": 2}, **changes)
    record = train(file, progress=False).record
    before, after = weights(models[kind]), weights(tmp_path / "run")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed == {name for name in after if trained(name)}
    flops = record["model"]
    assert flops["trained"] < flops["parameters"] or changes == {"adapters": True}
    assert flops["training_flops_per_token"] < 3 * flops["forward_flops_per_token"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.model_type == flops["model_type"]


def test_lora_leaves_an_adapter_that_is_an_expert(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    file = run(tmp_path, text, models["seed"], lora={"rank": 4}, budget={"steps": 12}, checkpoints={"steps": 9})
    report = train(file, progress=False)
    assert (report.out / "adapter_config.json").is_file() and not (report.out / "config.json").exists()
    assert report.record["held_out"]["end"]["code"]["loss"] < report.record["held_out"]["start"]["code"]["loss"]
    assert train(file, progress=False).status == "finished before"
    recipe = {"seed": str(models["seed"]), "experts": [{"name": "code", "model": str(report.out)}]}
    assert branchmix.upcycle(recipe, tmp_path / "mixture").written is not None


def test_the_moving_average_stands_beside_the_model(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    for changes in ({"adapters": True}, {}):
        place = tmp_path / str(len(changes))
        out = train(run(place, text, models["mixture"], ema=0.9, budget={"steps": 3}, **changes), progress=False).out
        start, end, average = weights(models["mixture"]), weights(out), weights(out / "ema")
        assert start.keys() == average.keys()
        name = "model.model.layers.0.mlp.experts.0.down_proj.weight"
        assert (average[name] - start[name]).norm() < (end[name] - start[name]).norm()
        assert not torch.equal(average[name], start[name])
        assert AutoTokenizer.from_pretrained(out / "ema").eos_token_id is not None


# ---------------------------------------------------------------------------------------------------------------------
# Stopped, resumed, finished, refused
# ---------------------------------------------------------------------------------------------------------------------


def stop_after(step: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal arrives while the step is computed."""
    compute = BranchTrainer.compute_loss

    def computing(self: BranchTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            os.kill(os.getpid(), number)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(BranchTrainer, "compute_loss", computing)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("kind", ["new", "mixture"])
def test_a_stopped_run_goes_on_to_the_very_same_result(
    kind: str,
    number: int,
    code: int,
    models: dict[str, Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    changes: dict[str, Any] = {} if kind == "new" else {"model": str(models["mixture"]), "adapters": True, "ema": 0.9}
    run_ = settings(text, budget={"steps": 7}, evaluation={"steps": 3}, **changes)
    uninterrupted = train(write_run(tmp_path / "whole", run_), progress=False)
    file = write_run(tmp_path / "stopped", run_)
    with monkeypatch.context() as patch:
        stop_after(5, number, patch)
        assert command(patch, "train", file) == code
    out = tmp_path / "stopped" / "run"
    said = capfd.readouterr().err
    assert f"to resume from the last checkpoint: branchmix train {file}" in said and "left behind" not in said
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000005"]
    assert not (out / "config.json").exists() and (out / "run.json").is_file()

    assert command(monkeypatch, "train", file) == 0
    assert "resuming from" in capfd.readouterr().err
    same_bytes(weights(out), weights(uninterrupted.out))
    if "ema" in changes:
        same_bytes(weights(out / "ema"), weights(uninterrupted.out / "ema"))
    ours, theirs = training(out), uninterrupted.record
    assert [resumed["step"] for resumed in ours["resumed"]] == [5]
    assert ours["held_out"] == theirs["held_out"] and ours["tokens"] == theirs["tokens"]
    assert [row["step"] for row in rows(out)] == [0, 3, 4, 5, 6, 7, 7]
    common = ("step", "loss/code", "held_out/law", "learning_rate")
    assert [{key: row.get(key) for key in common} for row in rows(out) if row["step"] in (0, 3, 4, 6)] == [
        {key: row.get(key) for key in common} for row in rows(uninterrupted.out) if row["step"] in (0, 3, 4, 6)
    ]
    assert not (out / "checkpoints").exists() and not (out / "run.json").exists()


def test_a_finished_run_is_not_done_again(
    models: dict[str, Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    file = run(tmp_path, text, models["seed"], budget={"steps": 2})
    assert command(monkeypatch, "train", file, "--json") == 0
    record = json.loads(capfd.readouterr().out)
    assert record == training(tmp_path / "run") and record["steps"] == 2
    model = tmp_path / "run" / "model.safetensors"
    before = model.stat().st_mtime_ns

    assert command(monkeypatch, "train", file, "logging.steps=1") == 0, "how often it logs does not matter"
    assert "already done" in capfd.readouterr().err and model.stat().st_mtime_ns == before
    assert not (tmp_path / "run" / ".lock").exists()
    assert command(monkeypatch, "train", file, "budget.steps=3") == 2
    said = capfd.readouterr().err
    assert "budget.steps 2 instead of 3" in said and said.count("\n") == 1
    assert model.stat().st_mtime_ns == before
    assert command(monkeypatch, "train", file, "budget.steps=3", "--force") == 0
    assert training(tmp_path / "run")["steps"] == 3 and model.stat().st_mtime_ns > before


def test_a_new_tokenizer_has_not_read_what_is_held_out(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from branchmix.data import tokenizer

    read: list[str] = []
    train_tokenizer = tokenizer.train_tokenizer
    keeping = lambda texts, size: train_tokenizer((read.append(t) or t for t in texts), size)  # noqa: E731
    monkeypatch.setattr(tokenizer, "train_tokenizer", keeping)
    held_out = {"share": 0.3, "tokens": 1000}
    train(write_run(tmp_path, settings(text, held_out=held_out)), dry_run=True, progress=False)
    assert read and not any(is_held_out(document, 0.3) for document in read)


def test_a_dry_run_tells_and_leaves_nothing(
    models: dict[str, Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    file = run(tmp_path, text, models["mixture"], budget={"tokens": "1M"})
    assert command(monkeypatch, "train", file, "--dry-run") == 0
    shown = capfd.readouterr()
    assert "3,906 steps, 999,936 tokens" in shown.out and "code" in shown.out and "positions" not in shown.err
    write_run(tmp_path, settings(text, model={**NEW_MODEL, "max_position_embeddings": 31}))
    assert command(monkeypatch, "train", file, "--dry-run") == 0
    assert "note: a context of 32 exceeds the model's 31 positions" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_loss_that_is_no_number_stops_the_run(
    models: dict[str, Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    rate = {"peak": 1e30, "warmup": 0.5}
    file = run(
        tmp_path, text, models["seed"], learning_rate=rate, checkpoints={"steps": 1}, optimizer={"max_grad_norm": 0}
    )
    assert command(monkeypatch, "train", file) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: step 2 on code, law: the gradient is not a finite number")
    assert str(tmp_path / "run" / "checkpoints" / "step-00000001") in error
    assert not (tmp_path / "run" / "config.json").exists()


def test_nothing_held_out_is_no_mistake(
    models: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("branchmix.train.measure.seconds_per_step", lambda *args, **kwargs: 20.0)
    file = run(tmp_path, text, models["seed"], held_out={"share": 0}, budget={"training_minutes": 0.5})
    report = train(file, progress=False)
    assert report.record["steps"] == 1 and report.record["held_out"] == {"start": {}, "end": {}}


def test_an_interrupted_run_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("branchmix.train.run.train", interrupted)
    assert command(monkeypatch, "train", tmp_path / "a b.yaml", "mix={code: 1}") == 130
    said = capfd.readouterr().err
    assert said.rstrip().endswith(f"branchmix train '{tmp_path}/a b.yaml' 'mix={{code: 1}}'"), said
    assert "left behind" not in said


def test_text_that_has_changed_is_told_when_a_run_goes_on(
    text: Path,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copy(text / "code.jsonl", tmp_path / "own.jsonl")
    data = {"code": {"files": "*.jsonl"}, "law": {"files": str(text / "law.jsonl")}}
    file = run(tmp_path, text, models["seed"], data=data, budget={"steps": 4}, out=str(tmp_path))
    assert command(monkeypatch, "train", file) == 2, "other files are there"
    out = tmp_path / "run"
    file = run(tmp_path, text, models["seed"], data={**data, "code": {"files": "**/*.jsonl"}}, budget={"steps": 4})
    for step in (1, 2):
        with monkeypatch.context() as patch:
            stop_after(step, signal.SIGTERM, patch)
            assert command(patch, "train", file) == 143
    assert (out / "metrics.jsonl").is_file(), "which the pattern matches too"
    assert "has changed" not in capfd.readouterr().err
    with (tmp_path / "own.jsonl").open("a") as stream:
        stream.write('{"text": "one more"}\n')
    assert command(monkeypatch, "train", file) == 0
    said = capfd.readouterr().err
    assert "note: data.code: its text has changed" in said and "data.law" not in said
    assert [resumed.get("changed") for resumed in training(out)["resumed"]] == [None, ["code"]]


def test_minutes_become_steps_that_a_resumed_run_keeps(
    models: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from branchmix.train import measure

    monkeypatch.setattr(measure, "seconds_per_step", lambda *args, **kwargs: 6.0)
    file = run(tmp_path, text, models["seed"], budget={"minutes": 1.0})
    with monkeypatch.context() as patch:
        stop_after(2, signal.SIGTERM, patch)
        assert train(file, progress=False).signal == signal.SIGTERM
    steps = json.loads((tmp_path / "run" / "run.json").read_text())["steps"]
    assert 6 <= steps <= 9, "a minute of steps of six seconds, less what has passed"
    monkeypatch.setattr(measure, "seconds_per_step", lambda *args, **kwargs: 0.01)
    assert train(file, progress=False).record["steps"] == steps


def test_minutes_of_training_are_counted_from_the_first_step(
    models: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it takes until then: another run's training time can be given as it is on record."""
    prepare = PreparedRun._prepare_machine

    def half_a_minute_later(self: PreparedRun) -> None:
        prepare(self)
        self.started -= 30

    monkeypatch.setattr("branchmix.train.measure.seconds_per_step", lambda *args, **kwargs: 6.0)
    monkeypatch.setattr(PreparedRun, "_prepare_machine", half_a_minute_later)
    steps = {}
    for key in ("minutes", "training_minutes"):
        file = run(tmp_path, text, models["seed"], budget={key: 1.0}, out=key, evaluation={"at_start": False})
        steps[key] = train(file, progress=False).record["steps"]
    assert steps["minutes"] <= 4 and steps["training_minutes"] == 9
    file = run(tmp_path, text, models["seed"], budget={"minutes": 0.5}, out="late")
    with pytest.raises(
        RecipeError, match=r"^budget.minutes: only 0.0 s of it are left for training, but a step takes 6.0 s"
    ):
        train(file, progress=False)
    assert not (tmp_path / "late").exists()


def test_measuring_a_step_leaves_weights_and_random_numbers_alone(models: dict[str, Path], text: Path) -> None:
    from branchmix.data.config import HeldOut, Source
    from branchmix.data.corpus import open_corpus
    from branchmix.train.measure import seconds_per_step
    from branchmix.train.models import Computing

    model = AutoModelForCausalLM.from_pretrained(models["mixture"])
    corpus = open_corpus(
        {"code": Source(files=str(text / "code.jsonl"))},
        AutoTokenizer.from_pretrained(models["seed"]),
        folder=text,
        cache=None,
        held_out=HeldOut(),
    )
    sequences = corpus.train("equal", sequence_length=32, num_sequences=4, random_seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    numbers = torch.get_rng_state()
    computing = Computing(torch.device("cpu"), bf16=False)
    seconds = seconds_per_step(model, sequences, computing, micro=2, accumulation=2, packing="position_ids")
    assert 0 < seconds < 5
    assert torch.equal(torch.get_rng_state(), numbers)
    same_bytes(model.state_dict(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_loggers_get_the_numbers(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    file = run(tmp_path, text, models["mixture"], budget={"steps": 2}, logging={"steps": 1, "to": ["tensorboard"]})
    out = train(file, progress=False).out
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    row = rows(out)[1]
    for name in ("loss/code", "router/ffn/00/entropy", "tokens_per_second"):
        assert events.Scalars(f"train/{name}")[0].value == pytest.approx(row[name], rel=1e-5)
    assert [event.step for event in events.Scalars("train/held_out/law")] == [0, 2]


def test_a_watcher_sees_each_number(
    models: dict[str, Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    file = run(tmp_path, text, models["mixture"], budget={"steps": 2}, logging={"steps": 1})
    assert command(monkeypatch, "train", file) == 0
    said = capfd.readouterr()
    assert "1/2  loss" in said.err and "2/2  loss" in said.err
    for word in (
        "code",
        "law",
        "tokens/s",
        "of matmul peak",
        "waiting",
        "GB",
        "busiest expert",
        "left",
        "held-out loss",
    ):
        assert word in said.err, word
    assert "before" in said.out and "trained on 512 tokens in 2 steps" in said.out

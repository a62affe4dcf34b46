"""Steps, batches and rates that settings mean, and what counts as the same run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from branchmix.checkpoint.folder import write_json
from branchmix.errors import OutputError, RecipeError
from branchmix.train.config import Budget, LearningRate, RunConfig
from branchmix.train.progress import Metrics
from branchmix.train.run_folder import RunFolder
from branchmix.train.schedule import micro_batches, rate_at, steps_of, token_flops, warmup_steps

COHERE = {
    "model_type": "cohere",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def config(**changes: Any) -> RunConfig:
    run = {
        "model": "seed",
        "out": "run",
        "data": {"code": {"files": "*.py"}},
        "budget": {"steps": 10},
        "learning_rate": {"peak": 0.1},
    }
    return RunConfig(**{**run, **changes})


def test_a_word_alone_is_a_list_of_one() -> None:
    run = config(freeze="experts", logging={"to": "tensorboard"})
    assert run.freeze == ["experts"] and run.logging.to == ["tensorboard"]
    assert config(adapters={}).adapters and not config(adapters=False).adapters


def test_the_rate_rises_to_its_peak_and_falls_to_its_last_share() -> None:
    rate = LearningRate(peak=1.0, warmup=0.2, final=0.1)
    rates = [rate_at(step, 20, rate) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]), "the first step learns already"
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] == pytest.approx(0.1)
    middle = rate_at(4 + 50, 105, LearningRate(peak=1.0, warmup=4, final=0.0))
    assert middle == pytest.approx(0.5), "a cosine is at half its height in the middle"
    assert [rate_at(step, 1, rate) for step in range(1)] == [1.0]


def test_warm_up_is_a_share_or_a_number_and_never_everything() -> None:
    assert [warmup_steps(warmup, 200) for warmup in (0, 0.05, 1, 30, 500)] == [0, 10, 1, 30, 199]


def test_a_budget_buys_whole_steps() -> None:
    assert steps_of(Budget(tokens=1_000_000), 4096, None) == 244
    assert steps_of(Budget(flops="1e9"), 4096, 300_000_000) == 3
    assert steps_of(Budget(steps=7), 4096, None) == 7
    assert steps_of(Budget(minutes=1), 4096, None) is None
    with pytest.raises(RecipeError, match=r"budget.tokens is 4,095, but one step takes 4,096"):
        steps_of(Budget(tokens=4095), 4096, None)
    with pytest.raises(RecipeError, match="no formula"):
        steps_of(Budget(flops="1e9"), 4096, None)


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "expected"),
    [(32, None, 1, (32, 1)), (32, 4, 1, (4, 8)), (32, None, 4, (8, 1)), (32, 2, 4, (2, 4))],
)
def test_processes_share_a_batch(batch: int, micro: int | None, processes: int, expected: tuple[int, int]) -> None:
    assert micro_batches(config(batch_size=batch, micro_batch_size=micro), processes) == expected


@pytest.mark.parametrize(("micro", "processes", "word"), [(None, 3, "3 processes cannot"), (16, 4, "divisor of 8")])
def test_a_batch_that_cannot_be_shared_is_refused(micro: int | None, processes: int, word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        micro_batches(config(batch_size=32, micro_batch_size=micro), processes)


def test_flops_of_training_leave_out_the_gradients_of_frozen_weights() -> None:
    full = token_flops(COHERE, 64)
    assert full is not None
    qkv, output, context = 2 * 2 * 32 * (32 + 2 * 16), 2 * 2 * 32 * 32, 2 * 2 * 64 * 32
    ffn, head = 2 * 2 * 3 * 32 * 64, 2 * 32 * 100
    assert full.forward == qkv + output + context + ffn + head
    assert full.training == 3 * full.forward
    attention_frozen = token_flops(COHERE, 64, {"attention": 0.0, "ffn": 1.0, "lm_head": 1.0})
    everything_frozen = token_flops(COHERE, 64, {"attention": 0.0, "ffn": 0.0, "lm_head": 0.0}, lora_parameters=1000)
    assert attention_frozen is not None and everything_frozen is not None
    assert everything_frozen.training == 2 * full.forward + context + 6 * 1000
    assert attention_frozen.training == full.training - qkv - output
    assert token_flops({"model_type": "rwkv"}, 64) is None


def test_only_what_changes_the_result_makes_another_run(tmp_path: Path) -> None:
    first = config(out=str(tmp_path / "run"))
    folder = RunFolder(first)
    assert folder.look(first, force=False) == "new"
    write_json(folder.path / "run.json", {"config": first.model_dump(mode="json")})
    same = config(out=str(tmp_path / "run"), micro_batch_size=1, logging={"steps": 3}, threads=2)
    assert folder.look(same, force=False) == "unfinished"
    other = config(out=str(tmp_path / "run"), learning_rate={"peak": 0.2})
    with pytest.raises(OutputError, match=r"learning_rate.peak 0.1 instead of 0.2"):
        folder.look(other, force=False)
    assert folder.look(other, force=True) == "new"
    write_json(folder.path / "training.json", {"config": first.model_dump(mode="json")})
    assert folder.look(first, force=False) == "unfinished", "the model is not there"
    (folder.path / "config.json").write_text("{}")
    assert folder.look(first, force=False) == "finished"


def test_a_new_start_removes_what_a_run_left_and_nothing_else(tmp_path: Path) -> None:
    run = config(out=str(tmp_path / "run"))
    folder = RunFolder(run)
    write_json(folder.path / "run.json", {"config": run.model_dump(mode="json")})
    (folder.path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (folder.path / "experts" / "code").mkdir(parents=True)
    for name in ("run.yaml", "log.txt", "model.safetensors", "tokenizer.json", "diary.txt", "experts/code/config.json"):
        (folder.path / name).write_text("")
    folder.clear()
    assert sorted(file.name for file in folder.path.iterdir()) == ["diary.txt", "experts", "log.txt", "run.yaml"]
    assert (folder.path / "experts" / "code" / "config.json").exists()
    with pytest.raises(OutputError, match="not the folder of a run"):
        folder.look(run, force=True)
    folder.clear()
    assert (folder.path / "diary.txt").exists()


def test_a_record_of_another_program_is_no_run(tmp_path: Path) -> None:
    run = config(out=str(tmp_path))
    write_json(tmp_path / "run.json", {"config": {"lr": 1}})
    with pytest.raises(OutputError, match="not the folder of a run"):
        RunFolder(run).look(run, force=True)


def test_a_folder_is_trained_in_by_one_process_at_a_time(tmp_path: Path) -> None:
    run = config(out=str(tmp_path / "run"))
    with RunFolder(run).alone():
        assert RunFolder(run).look(run, force=False) == "new"
        with pytest.raises(OutputError, match="another process is training here"), RunFolder(run).alone():
            pass
    with RunFolder(run).alone():
        (tmp_path / "run" / "training.json").write_text("{}")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["training.json"]


def test_checkpoints_that_are_there_count_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(out=str(tmp_path / "run"))
    folder = RunFolder(run)
    write_json(folder.path / "run.json", {"config": run.model_dump(mode="json")})
    checkpoint = folder.checkpoints / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(bytes(10_000))
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1_000))
    folder.require_space(11_000)
    with pytest.raises(OutputError, match="make room"):
        folder.require_space(20_000)


def test_metrics_go_back_to_a_step(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, writes=True)
    for step in (0, 5, 10, 15):
        metrics.add({"step": step})
    with metrics.file.open("a") as file:
        file.write('{"step": 20, "lo')  # killed here
    assert [row["step"] for row in metrics.rewind(10)] == [0, 5, 10]
    metrics.add({"step": 15})
    assert [row["step"] for row in metrics.rows()] == [0, 5, 10, 15]

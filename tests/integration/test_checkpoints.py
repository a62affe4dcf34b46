"""What a checkpoint holds, which one is taken, how runs stop, and what happens when disk or numbers give out."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, TrainerCallback

from branchmix.errors import CheckpointError, OutputError, TrainingError
from branchmix.train import checkpoints, run_folder, saved_state
from branchmix.train.checkpoints import SafeTrainer, latest_checkpoint
from branchmix.train.signals import stop_signals
from processes import started
from runs import MODELS, dense, history, mixture, trainer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    theirs_too = theirs.state_dict()
    return all(torch.equal(tensor, theirs_too[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_is_a_model_by_itself_and_holds_no_pickle(name: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, MODELS[name](), num_steps=4, steps=2)
    run.train()
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest == tmp_path / "checkpoints" / "step-00000004"
    assert same(AutoModelForCausalLM.from_pretrained(newest, dtype=torch.float32), run.model)
    assert names(newest / "training") == [
        "files.json",
        "optimizer.safetensors",
        "rng-0.safetensors",
        "state.json",
        "trainer_state.json",
    ]
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".safetensors", ".py"}
    state = load_file(newest / "training" / "optimizer.safetensors")
    trained = {name for name, _ in run.model.named_parameters()}
    assert {place.partition("/")[2] for place in state} == trained
    assert {place.partition("/")[0] for place in state} == {"exp_avg", "exp_avg_sq", "step"}


def test_newest_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / ".step-00000001.part").mkdir(parents=True)
    (folder / "step-00000002" / "training").mkdir(parents=True)  # half removed
    trainer(tmp_path, dense(), num_steps=5, steps=1, keep=2).train()
    assert names(folder) == ["step-00000004", "step-00000005"]
    # A run taken back to an earlier step replaces what came after it.
    trainer(tmp_path, dense(), num_steps=5, steps=1, keep=2).train(folder / "step-00000004")
    assert names(folder) == ["step-00000004", "step-00000005"]
    shutil.copytree(folder / "step-00000005", folder / "step-00000900")
    trainer(tmp_path, dense(), num_steps=5, steps=1, keep=1).train(folder / "step-00000004")
    assert names(folder) == ["step-00000005"]


@pytest.mark.parametrize("harm", ["truncated", "missing", "no list"])
def test_damaged_checkpoint_is_passed_over(harm: str, tmp_path: Path) -> None:
    for step in (3, 20):
        run_folder.start_checkpoint(run_folder.checkpoint_of(tmp_path, step), num_bytes=0)
        part = tmp_path / f".step-{step:08d}.part"
        (part / "model.safetensors").write_bytes(b"weights" * 100)
        run_folder.complete_checkpoint(run_folder.checkpoint_of(tmp_path, step))
    notices: list[str] = []
    newest = tmp_path / "step-00000020"
    assert latest_checkpoint(tmp_path, notice=notices.append) == newest and not notices
    if harm == "truncated":
        os.truncate(newest / "model.safetensors", 50)
    else:
        (newest / ("model.safetensors" if harm == "missing" else "training/files.json")).unlink()
    assert latest_checkpoint(tmp_path, notice=notices.append) == tmp_path / "step-00000003"
    assert len(notices) == 1 and str(newest) in notices[0]
    assert "50 bytes instead of 700" in notices[0] or "is missing" in notices[0]
    assert latest_checkpoint(tmp_path / "none") is None


def test_weights_that_are_not_there_are_not_drawn(tmp_path: Path) -> None:
    """transformers would go on with random ones."""
    model = dense()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the weights lack model\.norm\.weight"):
        saved_state.read(model, tmp_path)


def test_frozen_parameters_and_a_changed_choice(tmp_path: Path) -> None:
    def frozen() -> nn.Module:
        model = mixture()
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "down_proj" in name
        return model

    whole = trainer(tmp_path, frozen(), num_steps=6, steps=4)
    whole.train()
    resumed = trainer(tmp_path, frozen(), num_steps=6)
    resumed.train(latest_checkpoint(tmp_path / "checkpoints"))
    assert same(resumed.model, whole.model) and history(resumed) == history(whole)
    with pytest.raises(CheckpointError, match=r"trained 2 tensors and this run trains 2\d, such as "):
        trainer(tmp_path, mixture()).train(latest_checkpoint(tmp_path / "checkpoints"))
    with pytest.raises(CheckpointError, match="step-00000004: does not fit this run's model"):
        trainer(tmp_path, dense()).train(latest_checkpoint(tmp_path / "checkpoints"))


def test_peft_model(tmp_path: Path) -> None:
    def adapted() -> nn.Module:
        torch.manual_seed(5)
        config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3, modules_to_save=["embed_tokens"])
        return peft.get_peft_model(dense(), config)

    whole = trainer(tmp_path, adapted(), num_steps=6, steps=4)
    whole.train()
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None and (newest / "adapter_model.safetensors").is_file()
    assert not (newest / "model.safetensors").exists()
    torch.manual_seed(5)
    resumed = trainer(tmp_path, adapted(), num_steps=6)
    resumed.train(newest)
    assert same(resumed.model, whole.model) and history(resumed) == history(whole)


class Linear(nn.Module):
    """A_e W_e for each expert."""

    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width).repeat(experts, 1, 1))

    def forward(self, w_EDI: torch.Tensor) -> torch.Tensor:
        return self.weight @ w_EDI


def test_parametrized_modules(tmp_path: Path) -> None:
    def adapted() -> nn.Module:
        model = mixture().requires_grad_(False)
        for module in model.modules():
            if isinstance(getattr(module, "down_proj", None), nn.Parameter):
                parametrize.register_parametrization(module, "down_proj", Linear(*module.down_proj.shape[:2]))
        return model

    whole = trainer(tmp_path, adapted(), num_steps=6, steps=4, bf16=False)
    whole.train()
    resumed = trainer(tmp_path, adapted(), num_steps=6, steps=6, bf16=False)
    newest = latest_checkpoint(tmp_path / "checkpoints")
    resumed.train(newest)
    assert same(resumed.model, whole.model) and history(resumed) == history(whole)
    # The checkpoint is an ordinary mixture that computes the same; the frozen originals are not stored twice.
    newest = latest_checkpoint(tmp_path / "checkpoints")
    plain = AutoModelForCausalLM.from_pretrained(newest, dtype=torch.float32).eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, whole.model.eval()(ids).logits)
    assert not any("original" in name for name in load_file(newest / "training" / "parametrized.safetensors"))
    expected = [name for name in names(newest) if name != "training"]
    resumed.finish(tmp_path)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), plain)
    assert names(tmp_path) == expected


class Counting(SafeTrainer):
    """A subclass with a state of its own, as an EMA would be."""

    seen: torch.Tensor = torch.zeros(2)

    def extra_state(self) -> dict[str, torch.Tensor]:
        return {"seen": self.seen}

    def load_extra_state(self, tensors: dict[str, torch.Tensor]) -> None:
        self.seen = tensors["seen"]


def test_extra_state_of_a_subclass(tmp_path: Path) -> None:
    run = trainer(tmp_path, dense(), kind=Counting, num_steps=2, steps=2)
    run.seen = torch.tensor([1.5, 2.5])
    run.train()
    again = trainer(tmp_path, dense(), kind=Counting, num_steps=2)
    again.train(latest_checkpoint(tmp_path / "checkpoints"))
    assert again.seen.tolist() == [1.5, 2.5]


def test_a_checkpoint_of_an_earlier_version_resumes(tmp_path: Path) -> None:
    """It has keys that nothing reads any more."""
    whole = trainer(tmp_path, dense(), num_steps=6, steps=4)
    whole.train()
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    state = json.loads((newest / "training" / "state.json").read_text())
    state |= {"scaler": None, "extra": {}, "optimizer": {**state["optimizer"], "values": {}}}
    (newest / "training" / "state.json").write_text(json.dumps(state))
    (newest / "training" / "files.json").write_text("{}")
    resumed = trainer(tmp_path, dense(), num_steps=6)
    resumed.train(latest_checkpoint(tmp_path / "checkpoints"))
    assert same(resumed.model, whole.model) and history(resumed) == history(whole)


def test_time_between_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Slow(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            now[0] += 25

    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    run = trainer(tmp_path, dense(), num_steps=8, minutes=1, keep=9, callbacks=[Slow()])
    run.train()
    assert names(tmp_path / "checkpoints") == ["step-00000003", "step-00000006"]


# Disks.


def test_no_room_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, dense(), num_steps=4, steps=2)
    usage = shutil.disk_usage(tmp_path)
    real = run_folder.start_checkpoint

    def start(target: Path, *, num_bytes: int) -> None:
        stored = sum(tensor.numel() * 4 for tensor in run.model.parameters())
        assert 3 * stored < num_bytes < 3 * stored + 2_000_000
        if target.name == "step-00000004":
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
        real(target, num_bytes=num_bytes)

    monkeypatch.setattr(run_folder, "start_checkpoint", start)
    with pytest.raises(
        OutputError,
        match=r"step-00000004: .* is full: a checkpoint needs 1.\d+ MB, but only 10 kB are free.*step-00000002",
    ):
        run.train()
    assert names(tmp_path / "checkpoints") == ["step-00000002"]


@pytest.mark.parametrize("file", ["optimizer", "state", "rng"])
def test_full_disk_leaves_the_checkpoint_before(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")

    def save_file(tensors: Any, place: Path, **_: Any) -> None:
        if file in place.name and "step-00000004" in str(place):
            place.write_bytes(b"half")
            raise full
        real(tensors, place)

    def write_text(self: Path, text: str, **options: Any) -> int:
        if file in self.name and "step-00000004" in str(self):
            raise full
        return write(self, text, **options)

    real, write = checkpoints.save_file, Path.write_text
    monkeypatch.setattr(checkpoints, "save_file", save_file)
    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(
        OutputError, match=r"step-00000004: .*No space left on device.*rerun the command to resume from .*step-00000002"
    ) as caught:
        trainer(tmp_path, dense(), num_steps=8, steps=2).train()
    assert "\n" not in str(caught.value)
    assert names(tmp_path / "checkpoints") == ["step-00000002"]
    assert latest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000002"


def _limited(folder: Path) -> None:
    """Files grow to 30 kB and no further, from step 3 on."""

    class Limit(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    try:
        trainer(folder, dense(), num_steps=8, steps=2, callbacks=[Limit()]).train()
    except OutputError as error:
        (folder / "error").write_text(str(error))


def test_files_that_cannot_grow(tmp_path: Path) -> None:
    assert started(_limited, tmp_path).wait() == 0
    message = (tmp_path / "error").read_text()
    assert "step-00000004" in message and "File too large" in message and "\n" not in message
    assert names(tmp_path / "checkpoints") == ["step-00000002"]


# Numbers.


class Poisoned(SafeTrainer):
    """The loss of step 4 is NaN."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 and self.is_in_train else loss

    def describe_batch(self) -> str:
        return "code"


def test_nan_stops_before_the_weights_are_touched(tmp_path: Path) -> None:
    run = trainer(tmp_path, dense(), kind=Poisoned, steps=2)
    with pytest.raises(
        TrainingError, match=r"^step 4 on code: the loss .*step-00000002; try a lower learning_rate, or"
    ):
        run.train()

    class StopAtThree(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                control.should_training_stop = True

    good = trainer(tmp_path / "good", dense(), callbacks=[StopAtThree()])
    good.train()
    assert same(run.model, good.model)
    assert names(tmp_path / "checkpoints") == ["step-00000002"]


def test_infinite_gradient_stops_too(tmp_path: Path) -> None:
    model = dense()
    model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(
        TrainingError, match=r"^step 1: the gradient is not a finite number.*there is no checkpoint yet"
    ):
        trainer(tmp_path, model).train()


# Signals.


class SendAt(TrainerCallback):
    """A signal, at the beginning of a step or in the middle of an evaluation."""

    def __init__(self, number: int, *, step: int, evaluating: bool = False, times: int = 1) -> None:
        self.number, self.step, self.evaluating, self.times = number, step, evaluating, times

    def send(self) -> None:
        for _ in range(self.times):
            signal.raise_signal(self.number)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.evaluating and state.global_step == self.step:
            self.send()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.evaluating and state.global_step == self.step:
            self.send()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that nothing happened to."""
    run = trainer(tmp_path_factory.mktemp("whole"), dense(), per_device_eval_batch_size=2)
    run.train()
    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", [{"step": 3}, {"step": 4}, {"step": 5, "evaluating": True}], ids=str)
def test_signal_saves_stops_and_goes_on(number: int, where: dict[str, Any], whole: Any, tmp_path: Path) -> None:
    before = [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)]
    with stop_signals() as signals:
        send = SendAt(number, **where)
        run = trainer(tmp_path, dense(), signals=signals, callbacks=[send], per_device_eval_batch_size=2)
        run.train()
    assert [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)] == before
    assert run.stopped_by == signals.received == number
    assert run.state.global_step == where["step"] + (not send.evaluating)
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest == run_folder.checkpoint_of(tmp_path / "checkpoints", run.state.global_step)
    resumed = trainer(tmp_path, dense(), per_device_eval_batch_size=2)
    resumed.train(newest)
    assert resumed.stopped_by is None
    assert same(resumed.model, whole.model) and history(resumed) == history(whole)


def test_signal_in_the_evaluation_at_the_start(tmp_path: Path) -> None:
    with stop_signals() as signals:
        send = SendAt(signal.SIGTERM, step=0, evaluating=True)
        options = {"eval_on_start": True, "per_device_eval_batch_size": 2}
        run = trainer(tmp_path, dense(), signals=signals, callbacks=[send], **options)
        run.train()
    assert run.stopped_by == signal.SIGTERM and run.state.global_step == 0
    assert not (tmp_path / "checkpoints").exists()


def test_signal_outside_of_training_and_a_second_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt), stop_signals() as signals:
        signal.raise_signal(signal.SIGTERM)
    assert signals.received == signal.SIGTERM
    with stop_signals() as signals, signals.deferred():
        for _ in range(3):  # torchrun's echo of the first
            signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr("branchmix.train.signals.ECHO_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    entered = []

    def enter() -> None:
        with stop_signals():
            entered.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    other = threading.Thread(target=enter)
    other.start()
    other.join()
    assert entered == [before]


# The end.


def test_finish_publishes_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    run = trainer(tmp_path, dense(), num_steps=2, steps=2)
    run.train()
    before = names(tmp_path)

    def fails(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match="No space left on device"):
        run.finish(tmp_path, also=fails)
    assert names(tmp_path) == before

    order: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: order.append(self.name) or replace(self, to))
    run.finish(tmp_path, also=lambda folder: (folder / "training.json").write_text("{}") and None)
    assert order[-2:] == ["config.json", "training.json"]
    assert names(tmp_path) == [
        "config.json",
        "generation_config.json",
        "metrics.jsonl",
        "model.safetensors",
        "training.json",
    ]
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), run.model)


def test_random_numbers_survive_a_file(tmp_path: Path) -> None:
    import random

    import numpy as np
    from safetensors.torch import save_file

    random.gauss(0, 1), np.random.standard_normal(), torch.rand(3)
    save_file(saved_state.random_numbers(), tmp_path / "rng")

    def draw() -> list[float]:
        numbers = [random.gauss(0, 1), random.random(), *np.random.standard_normal(2), *torch.rand(2).tolist()]
        return [float(number) for number in numbers]

    expected = draw()
    assert draw() != expected
    saved_state.set_random_numbers(load_file(tmp_path / "rng"))
    assert draw() == expected


def test_state_is_plain_json(tmp_path: Path) -> None:
    trainer(tmp_path, dense(), num_steps=2, steps=2).train()
    state = json.loads((tmp_path / "checkpoints" / "step-00000002" / "training" / "state.json").read_text())
    assert state["scheduler"]["last_epoch"] == 2
    assert {name for group in state["optimizer"]["groups"] for name in group["params"]} == {
        name for name, _ in dense().named_parameters()
    }

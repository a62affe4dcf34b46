"""Runs of two processes on the CPU (gloo), saved, and resumed by two and by one: DDP, FSDP2 and expert parallelism."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixtures import random_mixture
from runs import MODELS, history, trainer

OPTIONS: dict[str, Any] = {
    "bf16": False,
    "logging_steps": 1,
    "num_sequences": 64,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 3,
    "gradient_accumulation_steps": 4,
    "keep": 9,
}
"""Eight sequences a step, and no step across the end of an epoch, which two processes see elsewhere."""

WORKER = """
import json, os, signal, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import conftest
import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.distributed import DistributedConfig

from branchmix.errors import BranchMixError
from branchmix.train import checkpoints
from branchmix.train.models import leave_group
from branchmix.train.signals import stop_signals
from runs import MODELS, history, trainer

rank = int(os.environ["RANK"])


class SendAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if rank == 1 and state.global_step == self.step:
            signal.raise_signal(signal.SIGTERM)


def fails_at_four(tensors, place):
    if "step-00000004" in str(place):
        raise OSError(28, "No space left on device")
    save_file(tensors, place)


save_file = checkpoints.save_file


def run(root, options, *, name, model, kind="ddp", start=None, steps=None, stop=None, full=None):
    folder = Path(root) / name
    if kind == "ep":
        # accelerate knows tensor parallelism on accelerators only, though nothing here needs one.
        ParallelismConfig._validate_accelerator = lambda *_: None
        config = DistributedConfig(tp_size=2, ep_size=2)
        made = AutoModelForCausalLM.from_pretrained(
            Path(root) / model, dtype=torch.float32, distributed_config=config
        )
    else:
        options["gradient_accumulation_steps"] //= 2
        made = MODELS[model](dropout=0.0)
    if kind == "fsdp":
        options |= {"fsdp": True, "fsdp_config": {"version": 2}}
    checkpoints.save_file = fails_at_four if rank == full else save_file
    result = {}
    with stop_signals() as signals:
        callbacks = [] if stop is None else [SendAt(stop)]
        made = trainer(folder, made, num_steps=8, steps=steps, signals=signals, callbacks=callbacks, **options)
        try:
            made.train(None if start is None else folder / "checkpoints" / start)
        except BranchMixError as error:
            result["error"] = str(error)
    if not result and made.stopped_by is None:
        made.checkpoints = folder / "none"  # the next job starts from one of these
        made.finish(folder)
    return result | {"stopped_by": made.stopped_by, "history": history(made), "step": made.state.global_step}


results = [run(sys.argv[2], json.loads(sys.argv[3]), **job) for job in json.loads(sys.argv[4])]
(Path(sys.argv[2]) / f"results-{rank}").write_text(json.dumps(results))
leave_group()
sys.stdout.flush()
os._exit(0)  # models of the group are still alive here, and gloo would mind them now and then
"""


def two_processes(folder: Path, *jobs: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """What each process says of each job."""
    script = folder / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command += [str(Path(__file__).parents[1]), str(folder), json.dumps(OPTIONS), json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return [json.loads((folder / f"results-{rank}").read_text()) for rank in range(2)]


def assert_same(ours: str, theirs: str) -> None:
    """Losses, those on held-out data too, to 1e-5."""
    curves = []
    for text in (ours, theirs):
        losses = [(entry["step"], entry.get("loss", entry.get("eval_loss"))) for entry in json.loads(text)]
        curves.append([(step, loss) for step, loss in losses if loss is not None])
    assert len(curves[0]) == 10
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=0, atol=1e-5)


def assert_close(folder: Path, model: torch.nn.Module) -> None:
    weights = load_file(folder / "model.safetensors")
    ours = type(model).from_pretrained(folder, dtype=torch.float32).state_dict()
    assert weights
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize(("kind", "model"), [("ddp", "mixture"), ("fsdp", "dense"), ("fsdp", "mixture")])
def test_two_processes_save_and_two_or_one_go_on(kind: str, model: str, tmp_path: Path) -> None:
    job = {"model": model, "kind": kind, "name": "run"}
    whole, again = two_processes(tmp_path, {**job, "steps": 4}, {**job, "start": "step-00000004"})[0]
    assert again["history"] == whole["history"]
    alone = trainer(tmp_path / "alone", MODELS[model](dropout=0.0), num_steps=8, **OPTIONS)
    alone.train(tmp_path / "run" / "checkpoints" / "step-00000004")
    assert_same(history(alone), whole["history"])
    assert_close(tmp_path / "run", alone.model)


def test_expert_parallel_run_goes_on(tmp_path: Path) -> None:
    model = random_mixture("llama", num_experts=4)
    model.save_pretrained(tmp_path / "model")
    job = {"model": "model", "kind": "ep", "name": "run"}
    whole, again = two_processes(tmp_path, {**job, "steps": 4}, {**job, "start": "step-00000004"})[0]
    assert again["history"] == whole["history"]
    alone = trainer(tmp_path / "alone", model, num_steps=8, **OPTIONS)
    alone.train(tmp_path / "run" / "checkpoints" / "step-00000004")
    assert_same(history(alone), whole["history"])
    assert_close(tmp_path / "run", alone.model)


def test_processes_agree_to_stop_and_to_fail(tmp_path: Path) -> None:
    job = {"model": "mixture", "name": "run", "steps": 2}
    results = two_processes(tmp_path, {**job, "stop": 2}, {**job, "start": "step-00000003", "full": 1})
    for stopped, failed in results:
        assert stopped["stopped_by"] == signal.SIGTERM and stopped["step"] == 3
        assert "step-00000004: cannot be written: No space left on device" in failed["error"]
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]
    inside = {path.name for path in (folder / "step-00000003" / "training").iterdir()}
    assert {"rng-0.safetensors", "rng-1.safetensors", "optimizer.safetensors"} <= inside

"""``branchmix train`` on two processes (gloo): DDP, FSDP2 and expert parallelism train what one process trains.

Every run is stopped on purpose by a signal that reaches the second process alone, and goes on with two and with one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from branchmix.errors import RecipeError
from branchmix.train.checks import require_shardable
from branchmix.train.config import RunConfig
from branchmix.train.run import train
from corpora import tokenizer
from families import BY_NAME
from mixtures import gated, random_mixture
from training import NEW_MODEL, settings, write_text

PARALLEL = {"ddp": {}, "experts": {"expert_parallel": True}, "fsdp": {"fsdp": True}}
JOBS = [("fsdp", "dense"), ("experts", "mixture"), ("ddp", "global_batch"), ("ddp", "last_batch")]
MORE = [("ddp", "dense"), ("ddp", "mixture"), ("fsdp", "new"), ("fsdp", "mixture"), ("experts", "shared")]
MORE += [("fsdp", "global_batch"), ("experts", "global_batch"), ("fsdp", "last_batch"), ("experts", "sign")]
MORE += [("fsdp", "gates"), ("fsdp", "trunk"), ("fsdp", "domains")]
STEPS, STOPPED_AT = 6, 3

WORKER = """
import os, shutil, signal, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import conftest
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from branchmix.train.run import train
from branchmix.train.models import leave_group
from branchmix.train.trainer import BranchTrainer

rank = int(os.environ["RANK"])
stops = None
step_ended = BranchTrainer.on_step_end


def stop_there(self, args, state, control, **kwargs):
    if rank == 1 and self.state.global_step == stops:
        signal.raise_signal(signal.SIGTERM)
    step_ended(self, args, state, control, **kwargs)
    layouts.append({
        "sharded": sum(isinstance(parameter, DTensor) for parameter in self.model.parameters()) > 0,
        "blocks": any(isinstance(m, FSDPModule) and m is not self.model for m in self.model.modules()),
        "experts": {
            parameter.to_local().shape[0] / parameter.shape[0]
            for name, parameter in self.model.named_parameters()
            if ".experts." in name and isinstance(parameter, DTensor)
        },
    })


BranchTrainer.on_step_end = stop_there
for kind, file, out in (line.split() for line in sys.argv[3:]):
    AcceleratorState._reset_state()
    for stops in (int(sys.argv[2]), None):
        layouts = []
        report = train(file, overrides=[f"out={out}"], progress=False)
        if stops is not None:
            assert (report.status, report.signal) == ("stopped", signal.SIGTERM), (kind, report)
            if rank == 0:
                shutil.copytree(out, out + "-alone")
        else:
            assert report.status == "trained", (kind, report)
        for layout in layouts:
            assert layout["sharded"] == layout["blocks"] == (kind != "ddp"), (kind, layout)
            assert kind != "experts" or layout["experts"] == {0.5}, (kind, layout)
    PartialState().wait_for_everyone()
leave_group()
sys.stdout.flush()
os._exit(0)  # models of the group are still alive here, and gloo would mind them now and then
"""


BALANCES: dict[str, Any] = {
    "global_batch": {"scope": "global_batch"},
    "last_batch": {"scope": "last_batch", "loss": 0.5, "bias": "quantile"},
    "sign": {"bias": "sign"},
}
"""Also the names of mixtures that are trained with these."""


def run_file(folder: Path, model: str, **changes: Any) -> Path:
    run = settings(
        folder,
        model=NEW_MODEL if model == "new" else model,
        out=f"alone-{model}",
        micro_batch_size=2,
        budget={"steps": STEPS},
        held_out={"share": 0.1, "tokens": 500},
        logging={"steps": 1},
        evaluation={"steps": 2},
        **({"balance": BALANCES[model]} if model in BALANCES else {}),
        **changes,
    )
    file = folder / f"{'-'.join([model, *changes.get('parallel', {})])}.yaml"
    file.write_text(yaml.safe_dump(run))
    return file


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and text."""
    folder = tmp_path_factory.mktemp("runs")
    os.environ["BRANCHMIX_CACHE"] = str(folder / "cache")
    write_text(folder)
    sizes = {"vocab_size": 300}
    BY_NAME["cohere"].save(folder / "dense", 0, **sizes)
    random_mixture("llama", num_experts=4, seed_changes=sizes).save_pretrained(folder / "mixture")
    random_mixture("cohere", "kv_sharing", num_experts=2, seed_changes=sizes).save_pretrained(folder / "shared")
    hard = {"attention_num_experts_per_tok": 1, "router_aux_loss_coef": 0.5}
    for model in BALANCES:
        random_mixture("llama", num_experts=4, seed_changes=sizes, **hard).save_pretrained(folder / model)
    gated("llama", num_experts=4, seed_changes=sizes).save_pretrained(folder / "gates")
    gated("cohere", num_experts=4, trunk="experts", seed_changes=sizes).save_pretrained(folder / "trunk")
    router = {"width": 24, "inner": 8}
    random_mixture("llama", num_experts=4, domain_router=router, seed_changes=sizes).save_pretrained(folder / "domains")
    for model in ("dense", "mixture", "shared", "gates", "trunk", "domains", *BALANCES):
        tokenizer().save_pretrained(folder / model)
    return folder


def alone(home: Path, model: str) -> Path:
    """What one process makes of a model."""
    out = home / f"alone-{model}"
    if not out.exists():
        assert train(run_file(home, model), progress=False).status == "trained"
    return out


@pytest.mark.parametrize("jobs", [JOBS, pytest.param(MORE, marks=pytest.mark.slow)], ids=["some", "all others"])
def test_two_processes_train_what_one_trains(home: Path, jobs: list[tuple[str, str]]) -> None:
    runs = []
    for kind, model in jobs:
        runs.append((kind, run_file(home, model, parallel=PARALLEL[kind]), home / f"{kind}-{model}"))
    lines = [f"{kind} {file} {out}" for kind, file, out in runs]
    two_processes(home / "worker.py", str(Path(__file__).parents[1]), str(STOPPED_AT), *lines)
    for (_, model), (_, file, out) in zip(jobs, runs, strict=True):
        by_one = out.with_name(f"{out.name}-alone")
        assert (by_one / "checkpoints" / f"step-{STOPPED_AT:08}").is_dir()
        report = train(file, overrides=[f"out={by_one}"], progress=False)
        assert (report.status, [part["step"] for part in report.record["resumed"]]) == ("trained", [STOPPED_AT])
        for resumed in (out, by_one):
            assert_same_run(resumed, alone(home, model))


def two_processes(script: Path, *arguments: str) -> None:
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Losses of all steps and domains, on held-out data too, to 1e-5; final weights."""
    curves = [numbers(folder) for folder in (ours, theirs)]
    assert curves[0].keys() == curves[1].keys() and len(curves[0]) > 2 * STEPS
    for key, value in curves[1].items():
        assert curves[0][key] == pytest.approx(value, abs=1e-5), (ours.name, key)
    weights = [load_file(folder / "model.safetensors") for folder in (ours, theirs)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[0][name], tensor, rtol=0, atol=1e-4, msg=f"{ours.name}: {name}")


def numbers(folder: Path) -> dict[tuple[int, str], float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shown = ("loss", "held_out", "grad_norm", "objective")
    return {(row["step"], key): row[key] for row in rows for key in row if key.split("/")[0] in shown}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_command_speaks_with_one_voice(home: Path, launcher: str) -> None:
    """Started by torchrun or by accelerate, it prints and writes once."""
    command = {
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        "accelerate": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0"],
    }[launcher]
    out = home / launcher
    words = [sys.executable, *command, "-m", "branchmix", "train", str(run_file(home, "dense")), f"out={out}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("step 0: held-out loss") == 1 and done.stdout.count("trained on") == 1
    assert_same_run(out, alone(home, "dense"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": {"minutes": 1}, "parallel": {"fsdp": True}}, r"^budget: a sharded model"),
        ({"lora": {}}, r"^parallel.expert_parallel: lora does not work with"),
        ({"adapters": True}, r"^parallel.expert_parallel: adapters does not work with"),
        ({"model": "dense"}, r"^parallel.expert_parallel: the model has no FFN experts"),
        ({"num_experts": 3}, r"3 experts cannot be spread equally over 2 processes"),
    ],
)
def test_what_many_processes_cannot_do_is_refused(changes: dict[str, Any], message: str) -> None:
    described = {"model_type": "branchmix", "ffn": "experts", "num_experts": changes.pop("num_experts", 4)}
    run = RunConfig(**settings(Path(), **{"model": "mixture", "parallel": {"expert_parallel": True}, **changes}))
    if run.model == "dense":
        described = {"model_type": "llama"}
    with pytest.raises(RecipeError, match=message):
        require_shardable(run, described, 2)
    if run.model == "mixture":
        require_shardable(run, described, 1)  # a single process can

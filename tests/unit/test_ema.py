"""The moving average: its numbers, swapping it in and out, and going on from a checkpoint, all bit for bit."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from branchmix.errors import CheckpointError
from branchmix.train import trained_parts
from branchmix.train.ema import Ema
from mixtures import random_mixture, tokens


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)).to(dtype)
    model[0].bias.requires_grad_(False)
    return model


def steps(model: nn.Module, ema: Ema, number: int, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Training, with the weights after each step."""
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for _ in range(number):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        ema.update()
        seen.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_of_what_was_seen(dtype: torch.dtype) -> None:
    model = small(dtype)
    ema = Ema(model, 0.6)
    expected = {name: value.double() for name, value in model.state_dict().items() if name != "0.bias"}
    for number, weights in enumerate(steps(model, ema, 25), start=1):
        decay = min(0.6, number / (number + 9))
        expected = {name: decay * value + (1 - decay) * weights[name].double() for name, value in expected.items()}
    state = ema.state()
    assert int(state.pop("num_updates")) == 25 and state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].dtype == torch.float32
        torch.testing.assert_close(state[name].double(), value, rtol=0, atol=1e-6)
    assert (state["0.weight"] - model[0].weight).abs().max() > 0.01  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapped_in_and_back(dtype: torch.dtype) -> None:
    model = small(dtype)
    ema = Ema(model, 0.9)
    steps(model, ema, 3)
    own, average = copy.deepcopy(model.state_dict()), ema.state()
    with pytest.raises(KeyError, match="inside"), ema.swapped():
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, average[name].to(dtype) if name in average else own[name]), name
        raise KeyError("inside")
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, average[name]) for name, tensor in ema.state().items())


def test_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    model = small()
    ema = Ema(model, 0.9)
    steps(model, ema, 4)
    save_file(ema.state(), tmp_path / "ema.safetensors")
    resumed_model = copy.deepcopy(model)
    resumed = Ema(resumed_model, 0.9)
    resumed.load_state(load_file(tmp_path / "ema.safetensors"))
    for both in ((model, ema), (resumed_model, resumed)):
        steps(*both, 10, seed=2)
    state = ema.state()
    assert all(torch.equal(tensor, state[name]) for name, tensor in resumed.state().items())


def test_another_models_average_is_refused() -> None:
    ema = Ema(small(), 0.9)
    state = ema.state()
    for wrong in (
        {name: tensor for name, tensor in state.items() if name != "2.weight"},
        {**state, "2.weight": torch.zeros(3)},
        {**state, "3.bias": torch.zeros(7)},
    ):
        with pytest.raises(CheckpointError, match="is another model's: start over with --force"):
            ema.load_state(wrong)
    assert all(torch.equal(tensor, state[name]) for name, tensor in ema.state().items())


def test_of_adapters() -> None:
    model = random_mixture("gpt2")
    before = model(tokens()).logits
    trained_parts.add_adapters(model)
    ema = Ema(model, 0.5)
    assert all(name == "num_updates" or "delta" in name or "gate" in name for name in ema.state())
    own = steps(model, ema, 5) and model(tokens()).logits
    with ema.swapped():
        average = model(tokens()).logits
    assert not torch.equal(average, own) and not torch.equal(average, before)
    assert torch.equal(model(tokens()).logits, own)


def test_selection_biases_are_averaged_with_the_routers() -> None:
    """And go into a checkpoint of the run and back."""
    model = random_mixture("llama", expert_bias=True, attention_num_experts_per_tok=1)
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith("expert_bias")}
    assert len(biases) == 4
    ema, expected = Ema(model, 0.6), dict.fromkeys(biases, torch.zeros(3))
    for number in range(1, 8):
        decay = min(0.6, number / (number + 9))
        for place, bias in enumerate(biases.values()):
            bias.add_(torch.tensor([1e-3, 0.0, -1e-3]) * (place + number))
        ema.update()
        expected = {name: decay * value + (1 - decay) * biases[name] for name, value in expected.items()}
    own = {name: bias.clone() for name, bias in biases.items()}
    resumed = Ema(model, 0.6)
    resumed.load_state(ema.state())
    with resumed.swapped():
        for name, bias in biases.items():
            torch.testing.assert_close(bias, expected[name], rtol=0, atol=1e-7)
            assert not torch.equal(bias, own[name])
    assert all(torch.equal(bias, own[name]) for name, bias in biases.items())
    without = {name: tensor for name, tensor in ema.state().items() if name not in biases}
    resumed.load_state(without)  # of a version that averaged weights only
    with resumed.swapped():
        assert all(torch.equal(bias, own[name]) for name, bias in biases.items())
        assert all(torch.equal(weight, without[name]) for name, weight in model.named_parameters())
    with pytest.raises(CheckpointError, match="is another model's: start over with --force"):
        Ema(random_mixture("llama"), 0.6).load_state(ema.state())


WORKER = """
import os
import sys
import torch, torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/unit"]
from branchmix.train.ema import Ema
from branchmix.train.models import leave_group
from test_ema import small
torch.set_num_threads(1)
dist.init_process_group("gloo")
model = small()
for parameter in model.parameters():
    parameter.requires_grad_(True)
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
ema = Ema(model, 0.9)
def train(ema):
    for number in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * (number + 1))
        ema.update()
train(ema)
other = Ema(model, 0.9)
other.load_state(ema.state())
train(other)
with other.swapped():
    out = model(torch.ones(2, 5))
own = model(torch.ones(2, 5))
state = other.state()
if dist.get_rank() == 0:
    save_file({**state, "out": out.detach(), "own": own.detach()}, sys.argv[2])
leave_group()
sys.stdout.flush()
os._exit(0)  # models of the group are still alive here, and gloo would mind them now and then
"""


def test_two_processes_with_sharded_weights(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command += [str(Path(__file__).parents[1]), str(tmp_path / "state.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    found: dict[str, Any] = load_file(tmp_path / "state.safetensors")
    model = small().requires_grad_(True)
    ema = Ema(model, 0.9)
    for number in (0, 1, 2) * 2:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * (number + 1))
        ema.update()
    with ema.swapped():
        expected = {**ema.state(), "out": model(torch.ones(2, 5))}
    expected["own"] = model(torch.ones(2, 5))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=0, atol=1e-6)

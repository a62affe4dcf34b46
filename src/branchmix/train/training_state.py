"""What a run needs to resume besides its weights, as tensors (safetensors) and JSON; nothing is pickled.

These are each process's random number generators, and the optimizer's state by parameter name. The state is gathered on
the main process, so that one format works for one process, DDP, FSDP2, expert parallelism and any number of processes.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from branchmix.errors import CheckpointError

OF_THE_MACHINE = ("fused", "foreach", "capturable", "differentiable")
"""Options of a parameter group that say how to compute, not what; a resumed run uses its own."""


def random_numbers() -> dict[str, torch.Tensor]:
    """States of this process's random number generators: Python, numpy, torch on the CPU and on its accelerator."""
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state()
    kind, keys, position, has_gauss, cached = legacy
    assert (version, kind) == (3, "MT19937")
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.accelerator.is_available():
        device = torch.get_device_module()
        state |= {f"device.{n}": device.get_rng_state(n) for n in range(device.device_count())}
    return state


def set_random_numbers(state: dict[str, torch.Tensor]) -> None:
    """Restore ``random_numbers``, except for devices that do not exist here."""
    random.setstate((3, tuple(state["python"].tolist()), *(state["python_gauss"].tolist() or [None])))
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, state["numpy_gauss"].item()))
    torch.random.set_rng_state(state["cpu"])
    if torch.accelerator.is_available():
        device = torch.get_device_module()
        for number in range(device.device_count()):
            if f"device.{number}" in state:
                device.set_rng_state(state[f"device.{number}"], number)


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter is sharded over processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole state dict; for a sharded model on the main process only, and all processes have to call it."""
    if not is_sharded(model):
        return dict(model.state_dict())
    whole: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return whole


def set_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copy whole weights into the model; for a sharded model the main process has them, and all have to call it."""
    if not is_sharded(model):
        model.load_state_dict(weights, strict=False)
        return
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.get_world_size() > 1, strict=False)
    set_model_state_dict(model, {**weights}, options=options)


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """AdamW's tensors by ``KEY/PARAMETER``, and the rest for JSON, on the main process only. All have to call it."""
    if not optimizer.state:  # before the first step; get_optimizer_state_dict would make one of zeros
        return {}, {}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=options)
    states = whole.get("state", {})
    tensors = {f"{key}/{name}": value for name, state in states.items() for key, value in state.items()}
    return tensors, {"groups": whole.get("param_groups", []), "with_state": sorted(states)}


def set_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], rest: dict[str, Any]
) -> None:
    """Restore ``optimizer_state``, which the main process has. All processes have to call it.

    Raises:
        CheckpointError: the optimizer has other parameters than the one that was saved.
    """
    if not rest:
        return
    named = {name.replace("_checkpoint_wrapped_module.", ""): item for name, item in model.named_parameters()}
    names = {id(parameter): name for name, parameter in named.items()}
    ours = {names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]}
    theirs = {name for group in rest["groups"] for name in group["params"]}
    if ours != theirs:
        raise CheckpointError(
            f"the checkpoint trained {len(theirs)} tensors and this run trains {len(ours)}, such as "
            f"{sorted(ours ^ theirs)[0]} in one of them only: resume with the run's own settings, or start over"
        )
    many = dist.is_initialized() and dist.get_world_size() > 1
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=many, strict=False)
    whole: dict[str, Any] = {}
    if not many or dist.get_rank() == 0:
        state: dict[str, dict[str, Any]] = {}
        for place, tensor in tensors.items():
            key, _, name = place.partition("/")
            state.setdefault(name, {})[key] = tensor
        whole = {"state": state, "param_groups": _groups(optimizer, names, rest["groups"])}
    set_optimizer_state_dict(model, optimizer, whole, options=options)
    # The library creates a state for every parameter, but one that never had a gradient must not have any yet.
    for name in ours - set(rest["with_state"]):
        optimizer.state.pop(named[name], None)


def set_scheduler_state(scheduler: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore a scheduler's state, after the optimizer's, which by now has the rates of its groups."""
    groups = optimizer.param_groups
    if len(state.get("base_lrs", groups)) != len(groups):  # saved by another number of processes
        rates = {"base_lrs": [group["initial_lr"] for group in groups], "_last_lr": [group["lr"] for group in groups]}
        state = {**state, **rates, "lr_lambdas": [None] * len(groups)}
    scheduler.load_state_dict(state)


def _groups(
    optimizer: torch.optim.Optimizer, names: dict[int, str], theirs: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """This optimizer's groups (expert parallelism splits them), with the saved options of each group's first parameter.

    Lists from JSON become tuples again, and options on how to compute are this machine's.
    """
    options_of = {name: group for group in theirs for name in group["params"]}
    groups = []
    for ours in optimizer.param_groups:
        params = [names[id(parameter)] for parameter in ours["params"]]
        options = options_of[params[0]] if params else ours
        group = {key: tuple(value) if isinstance(ours.get(key), tuple) else value for key, value in options.items()}
        groups.append(group | {key: ours[key] for key in OF_THE_MACHINE if key in ours} | {"params": params})
    return groups

"""What a checkpoint holds: a model that ``from_pretrained`` reads, and what else a run needs to resume, exactly.

One format works for a model on one process, under DDP, sharded (FSDP2, expert parallelism) over any number of
processes, for a PEFT model (its adapter only), and for parametrized modules (``torch.nn.utils.parametrize``): the
folder gets the tensors they compute, and ``training/parametrized.safetensors`` the parameters that are trained. The
rest are each process's random number generators, and the optimizer's state by parameter name. Tensors are safetensors,
everything else is JSON; nothing is pickled.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from branchmix.checkpoint.companions import ADAPTER_WEIGHTS
from branchmix.errors import CheckpointError
from branchmix.likelihood.loading import refuse_missing
from branchmix.train.run_folder import TRAINING

RAW = f"{TRAINING}/parametrized.safetensors"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


# ---- The model ----


def gather(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The weights that ``write`` needs, if the model cannot save itself; else None. All processes have to call it.

    Those of a sharded model are on the main process only.
    """
    if is_sharded(model):
        whole: Any = get_model_state_dict(model, options=_WHOLE)
        return dict(whole)
    return dict(model.state_dict()) if _parametrized(model) else None


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter is sharded over processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def write(
    model: Any, tokenizer: Any, weights: dict[str, torch.Tensor] | None, folder: Path, *, resumable: bool
) -> None:
    """Write model and tokenizer into ``folder``, on the main process; ``resumable`` adds what ``read`` needs."""
    if weights is not None and _parametrized(model):
        weights, raw = _computed(model, weights)
        if resumable:
            save_file(raw, folder / RAW)
    # The base model's embeddings; the adapter's are always saved. PEFT's "auto" may ask the Hub each time.
    options = {"save_embedding_layers": False} if _is_peft(model) else {}
    if weights is not None:  # gathered tensors no longer share memory, by which save_pretrained recognises tied weights
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        weights = {name: tensor for name, tensor in weights.items() if tied.get(name) not in weights}
    # Without this, transformers gathers a model that it sharded while loading: all processes would have to call that.
    settings = vars(model.config)
    distributed = settings.pop("distributed_config", None)
    try:
        model.save_pretrained(folder, state_dict=weights, **options)
    finally:
        if distributed is not None:
            settings["distributed_config"] = distributed
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def read(model: nn.Module, folder: Path) -> None:
    """Copy the weights in ``folder`` into the model. All processes have to call it.

    Raises:
        CheckpointError: they belong to another model.
    """
    weights: dict[str, torch.Tensor] = {}
    if not is_sharded(model) or dist.get_rank() == 0:
        weights = _adapter(model, folder) if _is_peft(model) else _plain(model, folder)
        _must_fit(model, weights, folder)
        if not is_sharded(model):
            model.load_state_dict(weights, strict=False)
            return
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.get_world_size() > 1, strict=False)
    set_model_state_dict(model, {**weights}, options=options)


def _plain(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Load with the model's class, because a mixture's experts are separate tensors on disk and stacked in memory."""
    kind: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    try:
        loaded, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{folder}: does not fit this run's model ({type(model).__name__}): {first}") from error
    refuse_missing(info, str(folder))
    weights: dict[str, torch.Tensor] = loaded.state_dict()
    computed = [name for _, name, _ in _parametrized(model)]
    for name in computed:
        del weights[name]
    return weights | (load_file(folder / RAW) if computed else {})


def _adapter(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Weights of an adapter; PEFT omits the adapter's name in the file."""
    read = load_file(folder / ADAPTER_WEIGHTS)
    names = "|".join(re.escape(name) for name in model.peft_config)
    inside = re.compile(rf"(\.modules_to_save)?\.({names})(?=\.|$)")
    return {name: read[key] for name in model.state_dict() if (key := inside.sub("", name)) in read}


def _must_fit(model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Require that everything trained is present and has the right shape; frozen parts may come from elsewhere."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    live = model.state_dict()
    for name in sorted(trained - weights.keys()):
        raise CheckpointError(
            f"{folder}: has no {name}, which this run trains: it belongs to a run with other settings"
        )
    for name, tensor in weights.items():
        if name in live and live[name].shape != tensor.shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {list(tensor.shape)}, but {list(live[name].shape)} in the model: it "
                "belongs to another model"
            )


def _parametrized(model: nn.Module) -> list[tuple[str, str, nn.Module]]:
    """The prefix of each parametrized tensor, such as ``a.b.parametrizations.weight.``, what it is called in an
    ordinary model, ``a.b.weight``, and the module that computes it."""
    return [
        (f"{name}.parametrizations.{tensor}.", f"{name}.{tensor}", parametrization)
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for tensor, parametrization in module.parametrizations.items()
    ]


@torch.no_grad()
def _computed(
    model: nn.Module, weights: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Plain weights as an ordinary model has them, and the trained parameters they are computed from."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    plain, raw = dict(weights), dict[str, torch.Tensor]()
    for prefix, name, parametrization in _parametrized(model):
        own = {key: plain.pop(key) for key in weights if key.startswith(prefix)}
        raw |= {key: tensor.contiguous() for key, tensor in own.items() if key in trained}
        parts = {key.removeprefix(prefix): tensor for key, tensor in own.items()}
        plain[name] = torch.func.functional_call(parametrization, parts, ())
    return plain, raw


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


# ---- The rest ----


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


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """AdamW's tensors by ``KEY/PARAMETER``, and the rest for JSON, on the main process only. All have to call it."""
    if not optimizer.state:  # before the first step; get_optimizer_state_dict would make one of zeros
        return {}, {}
    whole: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
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
        # Expert parallelism splits groups. All options but the rate are settings that a resumed run has in common.
        rates = {name: group["lr"] for group in rest["groups"] for name in group["params"]}
        groups: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            params = [names[id(parameter)] for parameter in group["params"]]
            groups.append({**group, "params": params, "lr": rates[params[0]] if params else group["lr"]})
        whole = {"state": state, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, whole, options=options)
    # The library creates a state for every parameter, but one that never had a gradient must not have any yet.
    for name in ours - set(rest["with_state"]):
        optimizer.state.pop(named[name], None)


def set_scheduler_state(scheduler: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore a scheduler's state, after the optimizer's, which by now has the rates of its groups."""
    progress = {key: state[key] for key in ("last_epoch", "_step_count")}
    rates = [group["lr"] for group in optimizer.param_groups]  # there may be other groups than those that were saved
    scheduler.load_state_dict({**scheduler.state_dict(), **progress, "_last_lr": rates})

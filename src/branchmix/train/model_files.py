"""Writes a model in training to a folder that ``from_pretrained`` reads, and reads it back exactly.

This works for a model on one process, under DDP, sharded (FSDP2, expert parallelism), for a PEFT model (its adapter
only), and for parametrized modules (``torch.nn.utils.parametrize``): the folder gets the tensors they compute, and
``training/parametrized.safetensors`` the parameters that are trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import parametrize

from branchmix.checkpoint.companions import ADAPTER_WEIGHTS
from branchmix.errors import CheckpointError
from branchmix.likelihood.loading import refuse_missing
from branchmix.train.checkpoint_files import TRAINING
from branchmix.train.training_state import is_sharded, set_weights, whole_weights

RAW = f"{TRAINING}/parametrized.safetensors"


def gather(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The weights that ``write`` needs, if the model cannot save itself; else None. All processes have to call it."""
    return whole_weights(model) if is_sharded(model) or _parametrized(model) else None


def write(
    model: Any, tokenizer: Any, weights: dict[str, torch.Tensor] | None, folder: Path, *, resumable: bool
) -> None:
    """Write model and tokenizer into ``folder``, on the main process; ``resumable`` adds what ``read`` needs."""
    if weights is not None and (parametrized := _parametrized(model)):
        weights, raw = _computed(model, weights, parametrized)
        if resumable:
            save_file({name: tensor.contiguous() for name, tensor in raw.items()}, folder / RAW)
    # The base model's embeddings; the adapter's are always saved. PEFT's "auto" may ask the Hub each time.
    options = {"save_embedding_layers": False} if _is_peft(model) else {}
    if weights is not None:  # gathered tensors no longer share memory, by which save_pretrained recognises tied weights
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        weights = {name: tensor for name, tensor in weights.items() if tied.get(name) not in weights}
    with _not_gathered_again(model):
        model.save_pretrained(folder, state_dict=weights, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@contextmanager
def _not_gathered_again(model: Any) -> Iterator[None]:
    """Keep transformers from gathering a model that it sharded while loading: all processes would have to call that."""
    settings = vars(model.config)
    distributed = settings.pop("distributed_config", None)
    try:
        yield
    finally:
        if distributed is not None:
            settings["distributed_config"] = distributed


def read(model: nn.Module, folder: Path) -> None:
    """Copy the weights in ``folder`` into the model. All processes have to call it.

    Raises:
        CheckpointError: they belong to another model.
    """
    weights: dict[str, torch.Tensor] = {}
    if not is_sharded(model) or dist.get_rank() == 0:
        weights = _adapter(model, folder) if _is_peft(model) else _plain(model, folder)
        _must_fit(model, weights, folder)
    set_weights(model, weights)


def to_write(model: nn.Module) -> list[torch.Tensor]:
    """The tensors that account for the size of what ``write`` writes, approximately."""
    return [tensor for tensor in model.parameters() if tensor.requires_grad or not _is_peft(model)]


def _plain(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Load with the model's class, because a mixture's experts are separate tensors on disk and stacked in memory."""
    kind: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    parametrized = _parametrized(model)
    if parametrized:  # torch creates a class for each parametrized module, but the model itself must keep its own
        assert not any(prefix.startswith("parametrizations.") for prefix, _ in parametrized)
    try:
        loaded, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{folder}: does not fit this run's model ({type(model).__name__}): {first}") from error
    refuse_missing(info, str(folder))
    weights: dict[str, torch.Tensor] = loaded.state_dict()
    for prefix, _ in parametrized:
        weights.pop(prefix.replace("parametrizations.", "").removesuffix("."))
    return weights | (load_file(folder / RAW) if parametrized else {})


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


def _parametrized(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The prefix of each parametrized tensor, such as ``a.b.parametrizations.weight.``, and the module computing it."""
    return [
        (f"{name}.parametrizations.{tensor}.", parametrization)
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for tensor, parametrization in module.parametrizations.items()
    ]


@torch.no_grad()
def _computed(
    model: nn.Module, weights: dict[str, torch.Tensor], parametrized: list[tuple[str, nn.Module]]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Plain weights as an ordinary model has them, and the trained parameters they are computed from."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    plain, raw = dict(weights), dict[str, torch.Tensor]()
    for prefix, parametrization in parametrized:
        own = {name: plain.pop(name) for name in weights if name.startswith(prefix)}
        raw |= {name: tensor for name, tensor in own.items() if name in trained}
        parts = {name.removeprefix(prefix): tensor for name, tensor in own.items()}
        name = prefix.replace("parametrizations.", "").removesuffix(".")
        plain[name] = torch.func.functional_call(parametrization, parts, ())
    return plain, raw


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")

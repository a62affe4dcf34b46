"""Measurements of a model and a machine: held-out loss by domain, seconds per step, matmul peak, memory, versions.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import pairwise
from statistics import median_high
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from branchmix import __version__
from branchmix.data.sequences import IGNORED, Packing, packed_inputs
from branchmix.train.counters import DomainLoss
from branchmix.train.models import Computing, reshard


@torch.no_grad()
def held_out_losses(
    model: nn.Module,
    held_out: dict[str, Any],
    computing: Computing,
    *,
    batch_size: int,
    rank: int = 0,
    num_processes: int = 1,
    packing: Packing,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Mean loss of each domain's held-out sequences, in nats per token. A collective call.

    Sequences are distributed over the processes in turn. Every process does the same number of forward passes, so that
    sharded models can gather their weights; a process with no sequence left computes one that is not counted.

    Args:
        held_out: sequences by domain.
        batch_size: sequences of a forward pass.
        packing: how this model separates packed documents.
        between: called before each forward pass; may raise.
    """
    loss, training = DomainLoss(list(held_out)), model.training
    model.eval()
    try:
        for number, sequences in enumerate(held_out.values()):
            for batch in _dealt(sequences, batch_size, rank, num_processes):
                between()
                inputs = model_inputs(batch, packing, computing.device)
                domain_B = torch.full((len(batch["input_ids"]),), number, device=computing.device)
                with loss.counting(model, domain_B), computing.autocast():
                    model(**inputs)
    finally:
        model.train(training)
        reshard(model)
    _, by_domain = loss.read(computing.device)
    return by_domain


def model_inputs(batch: dict[str, torch.Tensor], packing: Packing, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a causal LM: the packed inputs, and the labels."""
    there = {name: batch[name].to(device) for name in ("input_ids", "position_ids", "labels")}
    return {**packed_inputs(there, packing), "labels": there["labels"]}


def _dealt(sequences: Any, batch_size: int, rank: int, num_processes: int) -> Iterator[dict[str, torch.Tensor]]:
    mine = range(rank, len(sequences), num_processes)
    passes = math.ceil(math.ceil(len(sequences) / num_processes) / batch_size)
    for number in range(passes):
        indices = mine[number * batch_size : (number + 1) * batch_size]
        batch = default_collate([sequences[index] for index in indices or [0]])
        if not indices:
            batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        yield batch


def seconds_per_step(
    model: nn.Module,
    sequences: Any,
    computing: Computing,
    *,
    micro: int,
    accumulation: int,
    packing: Packing,
    counts_ahead: bool = False,
) -> float:
    """Seconds of one optimizer step on this process, measured on the first batches.

    The steps use a learning rate of zero and a temporary optimizer, so weights and random numbers do not change.

    Args:
        micro: sequences of a forward pass.
        accumulation: forward passes of a step.
        packing: how this model separates packed documents.
        counts_ahead: whether each of them runs twice, the first time without a backward pass.
    """
    batches = [
        default_collate([sequences[(number * micro + row) % len(sequences)] for row in range(micro)])
        for number in range(min(accumulation, 4))
    ]
    training = model.training
    model.train()
    with torch.random.fork_rng():
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
        begin = _clock(computing.device)
        backward, update = [], []
        for number in range(12):
            start = _clock(computing.device)
            inputs = model_inputs(batches[number % len(batches)], packing, computing.device)
            if counts_ahead:
                with computing.autocast():  # of its own: autocast would keep weights that were cast without a gradient
                    count_load(model, inputs)
            with computing.autocast():
                loss = model(**inputs).loss
            loss.backward()
            middle = _clock(computing.device)
            optimizer.step()
            end = _clock(computing.device)
            backward.append(middle - start)
            update.append(end - middle)
            if number >= 3 and end - begin > 10:
                break
        model.zero_grad()
    model.train(training)
    # The first step is slower: memory is allocated and kernels are chosen.
    return accumulation * median_high(backward[1:]) + median_high(update[1:])


@torch.no_grad()
def count_load(model: nn.Module, inputs: dict[str, Any]) -> None:
    """A forward pass for the sake of the routers, without the loss and most of the language-modelling head."""
    model(**{name: value for name, value in inputs.items() if name != "labels"}, logits_to_keep=1)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of plain square matrix products on this device, measured in well under a second."""
    size = 8192 if device.type == "cuda" else 1024
    with torch.random.fork_rng():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = [_clock(device)]
    while len(times) <= 20 and times[-1] - times[0] < 0.5:
        a @ b
        times.append(_clock(device))
    return 2 * size**3 / min(end - start for start, end in pairwise(times))


def _clock(device: torch.device) -> float:
    """The time in seconds, once the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory_bytes(device: torch.device) -> int:
    """Peak memory of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine(device: Any) -> dict[str, Any]:
    """The machine that the run was computed on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": device.type, "name": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Versions of the packages that affect the numbers."""
    names = ("torch", "transformers", "accelerate", "datasets", "tokenizers")
    return {"branchmix": __version__, "python": platform.python_version()} | {
        name: metadata.version(name) for name in names
    }

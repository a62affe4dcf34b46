"""An exponential moving average of a run's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from branchmix.accounting.shape import EXPERT_BIAS
from branchmix.errors import CheckpointError
from branchmix.train.models import reshard

UPDATES = "num_updates"
"""Name of the counter in ``state``; parameters have dots in theirs."""


class Ema:
    """``e <- d e + (1 - d) w`` after each step, for all trained weights, and for the selection biases of routers.

    Biases are not parameters, but each step moves them with the routers (``BranchMixBalance``): averaged routers with
    the last biases would be balanced for other gates than theirs.

    The n-th update uses ``d = min(decay, n / (n + 9))``, so that the average of a short run does not include its start.
    The average is in fp32, sharded like the weights, and takes as much memory as they do. The model must have its final
    form: frozen, with adapters, and sharded.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.num_updates = 0
        self._model = model
        self._average = {name: weight.detach().float().clone() for name, weight in self._moved()}

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights to the average. Call it after each optimizer step."""
        self.num_updates += 1
        decay = min(self.decay, self.num_updates / (self.num_updates + 9))
        weights = [weight.detach().float() for _, weight in self._moved()]
        get_ema_multi_avg_fn(decay)(list(self._average.values()), weights, self.num_updates)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Give the model the averaged weights inside the block, and restore its own afterwards, bit for bit."""
        own = {name: weight.detach().clone() for name, weight in self._moved()}
        try:
            self._set(self._average)
            yield
        finally:
            self._set(own)

    def state(self) -> dict[str, torch.Tensor]:
        """Whole fp32 tensors by name, and the number of updates, for a checkpoint. All processes have to call it."""
        whole = {n: t.full_tensor() if isinstance(t, DTensor) else t.clone() for n, t in self._average.items()}
        return {UPDATES: torch.tensor(self.num_updates), **whole}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore ``state``, of this model, whose weights are restored already. All processes have to call it with the
        same state. Selection biases that it lacks, as earlier versions averaged none, start at the model's own.
        """
        biases = {name: bias.float() for name, bias in self._model.named_buffers() if name.endswith(EXPERT_BIAS)}
        state = {**biases, **state}
        shapes = {name: average.shape for name, average in self._average.items()}
        if {name: tensor.shape for name, tensor in state.items() if name != UPDATES} != shapes:
            raise CheckpointError("the moving average in the checkpoint is another model's: start over with --force")
        self.num_updates = int(state[UPDATES])
        for name, average in self._average.items():
            whole = state[name].to(average.device)
            if isinstance(average, DTensor):
                whole = distribute_tensor(whole, average.device_mesh, average.placements)
            average.copy_(whole)

    def _moved(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What steps change, by name."""
        reshard(self._model)
        yield from ((name, weight) for name, weight in self._model.named_parameters() if weight.requires_grad)
        yield from ((name, bias) for name, bias in self._model.named_buffers() if name.endswith(EXPERT_BIAS))

    @torch.no_grad()
    def _set(self, values: dict[str, torch.Tensor]) -> None:
        for name, weight in self._moved():
            weight.copy_(values[name])

"""Balancing the load of experts while a run trains: between ``Trainer``'s hooks and ``model.balance``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch

from branchmix.models.balance_branchmix import BranchMixBalance
from branchmix.models.routing_branchmix import BranchMixRouter
from branchmix.train.config import Balance
from branchmix.train.measure import count_load
from branchmix.train.models import reshard


def _shares(settings: Balance, config: Any) -> list[float] | None:
    """``target`` in the order of the experts, summing to 1; None if all are to get the same."""
    if settings.target is None:
        return None
    total = sum(settings.target.values())
    names = config.expert_names or map(str, range(config.num_experts))
    return [settings.target[name] / total for name in names]


class Balancing:
    """The balance of a mixture in a run.

    Args:
        model: the mixture, in its final form.
        settings: ``balance`` of the run file.
        tokens_per_step: tokens of an optimizer step over all processes.
    """

    def __init__(self, model: Any, settings: Balance, *, tokens_per_step: int):
        self._model = model
        self._balance = model.balance = BranchMixBalance(
            settings.scope,
            target=_shares(settings, model.config),
            loss_coef=0.0 if settings.loss is None and settings.bias else settings.loss,
            bias=settings.bias,
            **({} if settings.bias_rate is None else {"bias_rate": settings.bias_rate}),
            tokens_per_step=tokens_per_step,
        )
        if settings.bias is not None:
            model.config.expert_bias = True
            for module in model.modules():
                if isinstance(module, BranchMixRouter):
                    module.add_bias()

    def count_ahead(
        self, batches: Iterable[dict[str, Any]], context: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        """Count the load of a step's micro-batches before they are trained on, if ``counts_ahead``. A collective call.

        The forward passes draw the same random numbers as those that follow, so dropout is the same.

        Args:
            batches: arguments of the model for each micro-batch of this process.
            context: entered around each forward pass.
        """
        device = self._model.device
        self._model.train()
        with torch.random.fork_rng([device] if device.type == "cuda" else []), self._balance.counting():
            for inputs in batches:
                with context():
                    count_load(self._model, inputs)
        reshard(self._model)

    def end_step(self) -> None:
        """Call it after each optimizer step. A collective call."""
        self._balance.end_step()

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps beside the model."""
        return self._balance.state()

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore ``state``."""
        self._balance.load_state(state)

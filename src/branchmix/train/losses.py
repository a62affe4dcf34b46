"""The language-modelling loss, and the loss of each domain from the same numbers.

transformers lets a model's ``loss_function`` be set. This one computes what ``ForCausalLMLoss`` does, but keeps the
negative log-likelihood of every token long enough to sum it by domain. There is no second pass over the logits, and no
wait for the device: the sums stay there until they are read.
Shapes: B sequences, T tokens, V vocabulary, N domains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

IGNORED = -100
"""The label of a token that is in no loss."""


@dataclass(frozen=True)
class DomainLosses:
    """The sums between two readings, over all processes."""

    sums: dict[str, float]
    """Negative log-likelihood in nats, summed over predicted tokens."""
    tokens: dict[str, int]
    """Predicted tokens, which a document's first token in a sequence is not."""

    @property
    def by_domain(self) -> dict[str, float]:
        """Mean loss of each domain that occurred, in nats a token."""
        return {name: self.sums[name] / count for name, count in self.tokens.items() if count}

    @property
    def mean(self) -> float:
        """Mean loss over all tokens; NaN if there were none."""
        count = sum(self.tokens.values())
        return sum(self.sums.values()) / count if count else float("nan")


class DomainSums:
    """Sums by domain of numbers of sequences, in fp64 where the device has it, as fp32 cannot count beyond 2^24.

    They stay on the device until they are read. ``shape`` is that of a sequence's numbers.
    """

    def __init__(self, num_domains: int, *shape: int):
        self.shape = (num_domains, *shape)
        self.local: torch.Tensor | None = None
        """[N, *shape], of this process since the last reading; None if there was nothing."""

    def add(self, domain_B: torch.Tensor, values: torch.Tensor) -> None:
        """Add the numbers [B, *shape] of sequences of these domains."""
        if self.local is None or self.local.device != values.device:
            self.local = self._zeros(values.device)
        self.local.index_add_(0, domain_B.to(values.device, non_blocking=True), values.to(self.local.dtype))

    def read(self, device: torch.device | None = None) -> torch.Tensor:
        """Return the sums [N, *shape] since the last reading, over all processes, and reset them. A collective call.

        It needs the process's device if this process may not have added anything yet.
        """
        sums = self._zeros(device) if self.local is None else self.local
        self.local = None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        return sums.cpu().double()

    def _zeros(self, device: torch.device | None) -> torch.Tensor:
        exact = torch.float32 if device is not None and device.type == "mps" else torch.float64
        return torch.zeros(self.shape, dtype=exact, device=device)


class DomainLoss:
    """A ``loss_function`` for causal LMs that also adds up the loss by domain.

    Args:
        domains: names, in the order of the numbers that batches hold.

    Example:
        >>> loss = DomainLoss(["code", "law"])
        >>> with loss.counting(model, batch["domain"]):
        ...     model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
        >>> loss.read().by_domain
    """

    def __init__(self, domains: Sequence[str]):
        self.domains = list(domains)
        self._last_B: torch.Tensor | None = None
        self._sums = DomainSums(len(self.domains), 2)  # of losses and of predicted tokens

    @contextmanager
    def counting(self, model: nn.Module, domain_B: torch.Tensor) -> Iterator[None]:
        """Compute the loss of ``model`` with this function inside the block, and count it for the batch's domains.

        A mixture still adds its router losses. The model may be wrapped by DDP or PEFT.
        """
        models = (module for module in model.modules() if isinstance(module, PreTrainedModel))
        family: Any = next(module for module in models if module.config.model_type != "branchmix")
        before, family.loss_function = family.loss_function, partial(self, domain_B=domain_B)
        try:
            yield
        finally:
            family.loss_function = before

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        *,
        domain_B: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = IGNORED,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As transformers' ``ForCausalLMLoss``, of logits [B, T, V] and labels [B, T], which are shifted here: the
        mean, or the sum divided by ``num_items_in_batch``."""
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        target_BT = shift_labels.to(logits.device)
        nll = F.cross_entropy(
            logits.float().view(-1, vocab_size), target_BT.reshape(-1), ignore_index=ignore_index, reduction="none"
        )
        total = nll.sum()
        counted_BT = target_BT != ignore_index
        sum_B = nll.detach().view(target_BT.shape).sum(-1, dtype=torch.float32 if nll.is_mps else torch.float64)
        self._sums.add(domain_B, torch.stack((sum_B, counted_BT.sum(-1).to(sum_B)), dim=-1))
        self._last_B = domain_B
        count = counted_BT.sum() if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device) if torch.is_tensor(count) else count)

    def not_finite(self) -> list[str]:
        """Names of the domains whose sum is NaN or infinite on this process. Waits for the device."""
        sums_N = [] if self._sums.local is None else self._sums.local[:, 0].tolist()
        return [name for name, total in zip(self.domains, sums_N, strict=False) if not math.isfinite(total)]

    def last_domains(self) -> list[str]:
        """Names of the domains in the last batch of this process. Waits for the device."""
        numbers = [] if self._last_B is None else self._last_B.unique().tolist()
        return [self.domains[number] for number in numbers]

    def read(self, device: torch.device | None = None) -> DomainLosses:
        """Return and reset the sums since the last reading, as ``DomainSums.read`` does."""
        sums_N2 = self._sums.read(device).tolist()
        return DomainLosses(
            {name: total for name, (total, _) in zip(self.domains, sums_N2, strict=True)},
            {name: int(count) for name, (_, count) in zip(self.domains, sums_N2, strict=True)},
        )

"""Attention experts and FFN experts of a parallel block side by side, on two CUDA streams. Off unless asked for.

In a parallel block both read one normed input, so neither has to wait for the other. Not measured on a GPU yet. Under
``torch.compile`` nothing is forked: the compiler sees both and orders them itself.

Travels with every checkpoint, so it imports torch only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class ParallelStreams:
    """What attention and FFN of one block share: attention forks to a stream of its own, the FFN joins it at its end.

    Which blocks are parallel is seen, not looked up: there the FFN is handed the very tensor that attention was handed.
    So the first pass runs as ever, and a block with two norms (GPT-NeoX) or a sequential one never forks. Between the
    two calls nothing may use attention's output; a block with dropout there is not forked while it trains.
    """

    def __init__(self, block: nn.Module):
        self.dropouts = [module for module in block.modules() if isinstance(module, nn.Dropout) and module.p > 0]
        self.is_parallel = False
        self._attended: torch.Tensor | None = None
        self._stream: Any = None
        self._pending: torch.Tensor | None = None

    def fork(self, hidden_states: torch.Tensor, compute: Callable[[], tuple[torch.Tensor, Any]]) -> tuple[Any, Any]:
        """Attention's output [B, T, D] and weights, computed beside whatever the current stream is given next."""
        self._attended = hidden_states
        if not self.is_parallel or not _is_on_gpu(hidden_states) or torch.compiler.is_compiling():
            return compute()
        if any(module.training for module in self.dropouts):
            return compute()
        if self._stream is None:
            self._stream = torch.cuda.Stream(hidden_states.device)
        self._stream.wait_stream(torch.cuda.current_stream(hidden_states.device))
        with torch.cuda.stream(self._stream):
            out_BTD, weights = compute()
        self._pending = out_BTD
        return out_BTD, weights

    def join(self, hidden_states: torch.Tensor) -> None:
        """Called when the FFN has been given to the current stream, with what the FFN was handed."""
        self.is_parallel = self._attended is hidden_states
        self._attended = None
        if self._pending is not None:
            current = torch.cuda.current_stream(hidden_states.device)
            current.wait_stream(self._stream)
            # Its memory belongs to the other stream: not to be used again there before this one has read it. Everything
            # else that the other stream reads outlives this wait.
            self._pending.record_stream(current)
            self._pending = None


def _is_on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda

"""Linear maps that are fast for the few rows that a step of decoding has.

Travels with every checkpoint, so it imports torch only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

FEW_ROWS = 16
"""Up to so many rows a product costs about what reading its matrix costs."""
_PACKED_DTYPES = (torch.bfloat16, torch.float32)


class PackedWeight:
    """A copy of a weight [O, D] on a CPU in the blocks that oneDNN's kernels read, beside the weight itself.

    Good for as long as the weight is the same tensor and nothing was written to it in place; what is written through
    ``.data`` goes unseen. Copies and pickles of a model leave it out.

    Raises:
        ValueError: of the weight there can be no such copy (see ``reason``).
    """

    def __init__(self, weight: torch.Tensor):
        reason = self.reason(weight)
        if reason is not None:
            raise ValueError(reason)
        self._content = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self._state = self._state_of(weight)
        self.num_bytes = weight.numel() * weight.element_size()

    @staticmethod
    def reason(weight: torch.Tensor) -> str | None:
        """Why a weight cannot be packed; None if it can."""
        if not torch.backends.mkldnn.is_available():
            return "this torch was built without oneDNN, which packed weights are for"
        if weight.device.type != "cpu":
            return f"weights are packed for CPUs only, and these are on {weight.device}"
        if weight.dtype not in _PACKED_DTYPES:
            return f"weights are packed in bfloat16 and float32 only, and these are {weight.dtype}"
        if type(weight) not in (torch.Tensor, nn.Parameter) or weight.layout != torch.strided:
            return f"only ordinary tensors are packed, and these are {type(weight).__name__}, {weight.layout}"
        return None

    def is_of(self, weight: torch.Tensor) -> bool:
        """Whether this is still the weight that was packed."""
        return self._state == self._state_of(weight)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[..., D] to [..., O], without gradients."""
        return torch.ops.mkldnn._linear_pointwise(x, self._content, bias, "none", [], "")

    @staticmethod
    def _state_of(weight: torch.Tensor) -> tuple[int, int]:
        return weight.data_ptr(), 0 if weight.is_inference() else weight._version

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, packed: PackedWeight | None = None
) -> torch.Tensor:
    """``F.linear``; for few rows on a CPU and without gradients by whatever was timed to be the fastest there.

    Few rows cost what reading the weight costs. In bf16 ``mv`` reads 1.4 times as fast as ``F.linear`` on a processor
    with AMX and half as fast on one without; a packed weight is read 1.2 to 1.5 times as fast there.

    Args:
        x: [..., D].
        weight: [O, D].
        bias: [O].
        packed: a copy of ``weight``; ignored where the weight has changed since.
    """
    rows = x.numel() // x.shape[-1]
    if not 0 < rows <= FEW_ROWS or x.dtype != weight.dtype or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    way = _fastest(x.dtype, rows == 1, packed is not None and packed.is_of(weight))
    if way == "packed" and packed is not None:
        return packed.linear(x, bias)
    if way == "mv":
        row = x.reshape(-1)
        out = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)
        return out.view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


def fastest_on_cpu(calls: Mapping[str, Callable[[], object]], rounds: int = 5) -> str:
    """Name of the call that takes the least CPU time of one thread, in turn, after a first one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for number in range(1 + rounds):
                for name, call in calls.items():
                    begin = time.thread_time()
                    call()
                    if number:
                        seconds[name].append(time.thread_time() - begin)
    finally:
        torch.set_num_threads(threads)
    return min(seconds, key=lambda name: min(seconds[name]))


@cache
def _fastest(dtype: torch.dtype, one_row: bool, has_packed: bool) -> str:
    """``linear``, ``mv`` or ``packed``: timed once in a process, on 8 MB in 16 bits."""
    mv = one_row and dtype in (torch.bfloat16, torch.float16)
    if not (mv or has_packed):
        return "linear"
    weight, rows = torch.ones(4096, 1024, dtype=dtype), torch.ones(1 if one_row else 4, 1024, dtype=dtype)
    calls: dict[str, Callable[[], object]] = {"linear": lambda: F.linear(rows, weight)}
    if mv:
        calls["mv"] = lambda: torch.mv(weight, rows[0])
    if has_packed:
        packed = PackedWeight(weight)
        calls["packed"] = lambda: packed.linear(rows, None)
    return fastest_on_cpu(calls)


class BranchMixLinear(nn.Linear):
    """``nn.Linear`` by ``linear``; what torch compiles stays ``F.linear``."""

    packed: PackedWeight | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return F.linear(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias, self.packed)

"""Linear maps that are fast for the one row that a step of decoding has.

Saved with every checkpoint, so it imports only torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``F.linear`` of x [..., D], weight [O, D] and bias [O], by ``mv`` where that is faster.

    That may be so for one row of 16-bit numbers on a CPU without gradients, which costs what reading the weight
    costs. In bf16 ``mv`` reads 1.4 times as fast as ``F.linear`` on a processor with AMX and half as fast on one
    without.
    """
    one_row = x.numel() == x.shape[-1] and x.device.type == "cpu" and x.dtype == weight.dtype
    one_row = one_row and x.dtype in (torch.bfloat16, torch.float16)
    if not one_row or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not _mv_is_faster(x.dtype):
        return F.linear(x, weight, bias)
    row = x.reshape(-1)
    out = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)
    return out.view(*x.shape[:-1], -1)


def fastest_on_cpu(calls: Mapping[str, Callable[[], object]]) -> str:
    """Name of the call that takes the least CPU time of one thread, in turn, after a first one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for number in range(6):
                for name, call in calls.items():
                    begin = time.thread_time()
                    call()
                    if number:
                        seconds[name].append(time.thread_time() - begin)
    finally:
        torch.set_num_threads(threads)
    return min(seconds, key=lambda name: min(seconds[name]))


@cache
def _mv_is_faster(dtype: torch.dtype) -> bool:
    """Whether ``mv`` beats ``F.linear`` for one row: timed once in a process, on 8 MB in 16 bits."""
    weight, row = torch.ones(4096, 1024, dtype=dtype), torch.ones(1, 1024, dtype=dtype)
    calls = {"linear": lambda: F.linear(row, weight), "mv": lambda: torch.mv(weight, row[0])}
    return fastest_on_cpu(calls) == "mv"


class BranchMixLinear(nn.Linear):
    """``nn.Linear`` by ``linear``; what torch compiles stays ``F.linear``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return F.linear(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias)

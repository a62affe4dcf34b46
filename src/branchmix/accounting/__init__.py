"""Parameters, active parameters, FLOPs and KV-cache bytes: exact, from a config alone, without torch.

``inspect`` answers for a folder, a config.json, a Hub id or a config dict; ``parameters``, ``flops_per_token`` and
``kv_cache_bytes_per_token`` are its pure parts. Formulas and conventions are those of BAM (arXiv 2408.08274), Tables 7,
9 and 10, with d the width, H and K the query and key/value heads, D the head size, I the FFN's inner width, N experts
of which k are active. The paper's d_ff is the fused width 2I.
"""

from __future__ import annotations

from branchmix.accounting.formulas import (
    active_parameters,
    flops_per_token,
    kv_cache_bytes_per_token,
    parameters,
)
from branchmix.accounting.inspection import Accounting, inspect
from branchmix.accounting.shape import Config, Shape, shape_of

__all__ = [
    "Accounting",
    "Config",
    "Shape",
    "active_parameters",
    "flops_per_token",
    "inspect",
    "kv_cache_bytes_per_token",
    "parameters",
    "shape_of",
]

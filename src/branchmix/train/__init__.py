"""Training of dense models, experts and mixtures: ``train`` for one run, ``branch.branch`` for all experts of a study.

These names are imported when first used, so that settings can be read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from branchmix.train.config import BranchConfig, RunConfig
    from branchmix.train.run import train

_HOME = {
    "BranchConfig": "branchmix.train.config",
    "RunConfig": "branchmix.train.config",
    "train": "branchmix.train.run",
}

__all__ = ["BranchConfig", "RunConfig", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'branchmix.train' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)

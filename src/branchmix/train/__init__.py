"""Training of dense models, experts and mixtures: ``train`` for one run, ``branch.branch`` for all experts."""

from branchmix.train.config import BranchConfig, RunConfig
from branchmix.train.run import train

__all__ = ["BranchConfig", "RunConfig", "train"]

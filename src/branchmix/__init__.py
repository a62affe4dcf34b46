"""Merge specialised language models of one seed into one mixture of attention and FFN experts.

The public names are imported when first used, so that ``import branchmix`` costs milliseconds and no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from branchmix._registration import install as _install

__version__ = "0.1.0"

if TYPE_CHECKING:
    from branchmix.accounting import inspect as inspect
    from branchmix.export import export_model as export_model
    from branchmix.export import push as push
    from branchmix.models.configuration_branchmix import BranchMixConfig as BranchMixConfig
    from branchmix.models.modeling_branchmix import BranchMixForCausalLM as BranchMixForCausalLM
    from branchmix.models.modeling_branchmix import BranchMixModel as BranchMixModel
    from branchmix.recipe import Recipe as Recipe
    from branchmix.upcycling import add_expert as add_expert
    from branchmix.upcycling import remove_expert as remove_expert
    from branchmix.upcycling import upcycle as upcycle
    from branchmix.upcycling.gates import calibrate as calibrate

_HOME = {
    "Recipe": "branchmix.recipe",
    "upcycle": "branchmix.upcycling",
    "add_expert": "branchmix.upcycling",
    "calibrate": "branchmix.upcycling.gates",
    "remove_expert": "branchmix.upcycling",
    "export_model": "branchmix.export",
    "push": "branchmix.export",
    "inspect": "branchmix.accounting",
    "BranchMixConfig": "branchmix.models.configuration_branchmix",
    "BranchMixModel": "branchmix.models.modeling_branchmix",
    "BranchMixForCausalLM": "branchmix.models.modeling_branchmix",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'branchmix' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__


_install()

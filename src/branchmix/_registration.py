"""Makes transformers' auto classes know mixtures as soon as they exist, whichever of the two is imported first.

``import branchmix`` must cost milliseconds, so it cannot import transformers to register its classes there. A finder on
``sys.meta_path`` watches for transformers' two auto modules instead and registers right after each is executed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any


def register_configuration() -> None:
    """``AutoConfig`` reads ``model_type: branchmix``. Calling it twice is harmless."""
    from transformers import AutoConfig

    from branchmix.models.configuration_branchmix import BranchMixConfig

    AutoConfig.register("branchmix", BranchMixConfig, exist_ok=True)


def register_models() -> None:
    """``AutoModel`` and ``AutoModelForCausalLM`` build mixtures. Calling it twice is harmless."""
    from transformers import AutoModel, AutoModelForCausalLM

    from branchmix.models.configuration_branchmix import BranchMixConfig
    from branchmix.models.modeling_branchmix import BranchMixForCausalLM, BranchMixModel

    register_configuration()
    AutoModel.register(BranchMixConfig, BranchMixModel, exist_ok=True)
    AutoModelForCausalLM.register(BranchMixConfig, BranchMixForCausalLM, exist_ok=True)


_AFTER: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": register_configuration,
    "transformers.models.auto.modeling_auto": register_models,
}


class _Watcher(MetaPathFinder):
    """Lets the module's own loader execute it, and registers then."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname not in _AFTER:
            return None
        register = _AFTER.pop(fullname)
        spec = importlib.util.find_spec(fullname)
        loader: Any = spec.loader if spec is not None else None
        if loader is not None:
            execute = loader.exec_module
            loader.exec_module = lambda module: (execute(module), register())
        return spec


def install() -> None:
    """Register now what is imported already, and the rest when it is."""
    for name, register in list(_AFTER.items()):
        if name in sys.modules:
            del _AFTER[name]
            register()
    if _AFTER:
        sys.meta_path.insert(0, _Watcher())

"""Tiny mixtures for tests, in memory or on disk, and what tests compare them with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from branchmix.models import mixture_config
from branchmix.models.modeling_branchmix import BranchMixForCausalLM
from branchmix.models.routing_branchmix import BranchMixRouter
from families import BY_NAME

BOTH = ("kv_experts", "kv_sharing")
GATE = {"domains": ["prose", "code", "law", "verse"], "decay": 0.9}
"""Document gates of four domains."""


def random_mixture(
    name: str, attention: str = "kv_experts", *, seed_changes: dict[str, Any] | None = None, **options: Any
) -> BranchMixForCausalLM:
    """Three random experts of a tiny family in fp32, whose norms, biases and gates all matter.

    Args:
        name: entry of ``families``.
        attention: kind of attention experts.
        seed_changes: changes of the seed's config.
        **options: fields of ``BranchMixConfig``.
    """
    seed_config = BY_NAME[name].config(**(seed_changes or {}))
    options = {"num_experts": 3, "num_experts_per_tok": 2, **options}
    torch.manual_seed(0)
    model = BranchMixForCausalLM(mixture_config(seed_config, attention=attention, **options)).eval()
    generator = torch.Generator().manual_seed(0)
    routers = {id(module.weight) for module in model.modules() if isinstance(module, BranchMixRouter)}
    with torch.no_grad():
        for parameter in model.parameters():
            std = 0.3 if id(parameter) in routers else 0.08
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    model.tie_weights()
    return model


def gated(name: str, attention: str = "kv_experts", **options: Any) -> BranchMixForCausalLM:
    """A random mixture whose document gates say much more than its token gates."""
    model = random_mixture(name, attention, document_gate=GATE, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.document_gate.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def recipe(models: dict[str, Path], **options: Any) -> dict[str, Any]:
    """A recipe of all siblings, with the paper's gates and routers that distinguish tokens."""
    return {
        "seed": str(models["seed"]),
        "experts": [{"name": name, "model": str(path)} for name, path in models.items() if name != "seed"],
        "router_init": {"std": 0.3},
        "start": "paper",
        **options,
    }


def mixtures_of_0_1(root: Path) -> dict[str, Path]:
    """Folders in ``root`` as 0.1.0 saved them, one with one router a block, and ``expected.safetensors`` in each.

    Their code files are the same and kept once; among them is a module for CUDA streams, which later versions lack.
    """
    data = Path(__file__).parent / "data" / "mixtures_of_0.1"
    folders = {name: Path(shutil.copytree(data / name, root / f"0.1-{name}")) for name in ("plain", "one_router")}
    for folder in folders.values():
        shutil.copytree(data / "code", folder, dirs_exist_ok=True)
    return folders


def tokens(rows: int = 2, length: int = 11, seed: int = 0) -> torch.Tensor:
    """Random ids, none of them special."""
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def load(folder: Path, **options: Any) -> Any:
    """A causal LM in fp32, ready for evaluation."""
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()


def offloaded(model: Any, folder: Path) -> Any:
    """The model loaded again with its weights on the disk, from where accelerate takes a module's when it is called."""
    model.save_pretrained(folder / "saved")
    return load(folder / "saved", device_map={"": "disk"}, offload_folder=folder / "weights")


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to ``tolerance`` of the greatest value."""
    scale = max(1.0, float(theirs.detach().abs().max()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)

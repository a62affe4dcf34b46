"""One run on many processes: how ``parallel`` translates to transformers, and what it cannot do.

By default, every process holds the whole model (DDP). With ``fsdp`` (FSDP2) a process reads and keeps its share of
every weight. With ``expert_parallel`` it keeps some of the FFN experts whole, tokens travel to their experts and back,
and all other weights are sharded as in FSDP2. Both are implemented by transformers. (accelerate's FSDP2 silently
becomes DDP on CPUs, so it could not be tested without GPUs.) A single process ignores these settings, and can resume
such a run. Checks come before anything slow, so torch is imported late.
"""

from __future__ import annotations

import gc
import os
import shutil
from math import gcd
from typing import Any

from branchmix.checkpoint.folder import writing
from branchmix.errors import RecipeError
from branchmix.train.config import RunConfig
from branchmix.train.run_folder import RunFolder


def require_possible(config: RunConfig, described: dict[str, Any], num_processes: int) -> None:
    """Refuse settings that cannot be combined with many processes, given the model's config.json.

    Raises:
        RecipeError: names the setting.
    """
    parallel = config.parallel
    if parallel.expert_parallel and described.get("ffn") != "experts":
        raise RecipeError("parallel.expert_parallel: the model has no FFN experts: remove it, or use fsdp")
    if num_processes == 1 or not (parallel.fsdp or parallel.expert_parallel):
        return
    if config.budget.is_time:
        raise RecipeError("budget: a sharded model's time per step is not measured: give tokens or steps")
    if parallel.expert_parallel:
        if config.lora or config.adapters:
            key = "lora" if config.lora else "adapters"
            raise RecipeError(
                f"parallel.expert_parallel: {key} does not work with experts that are spread over processes: use fsdp"
            )
        if gcd(described["num_experts"], num_processes) == 1:
            raise RecipeError(
                f"parallel.expert_parallel: {described['num_experts']} experts cannot be spread equally over "
                f"{num_processes} processes: start as many as there are experts, or a divisor or multiple of it"
            )


def loading_options(config: RunConfig, described: dict[str, Any]) -> dict[str, Any]:
    """Options for ``from_pretrained`` that make a process read only its part."""
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes == 1 or not (config.parallel.fsdp or config.parallel.expert_parallel):
        return {}
    from transformers.distributed import DistributedConfig

    # Experts are spread over groups of so many processes, each of which together holds all of them.
    spread = gcd(described["num_experts"], num_processes) if config.parallel.expert_parallel else 1
    return {"distributed_config": DistributedConfig(fsdp_size=num_processes, ep_size=spread)}


def shard_new(model: Any, config: RunConfig) -> Any:
    """Shard a new model, whose weights are the same on every process, by saving it next to OUT and loading it sharded.

    Sharding it in memory would untie tied embeddings.
    """
    options = loading_options(config, {})
    if not options:
        return model
    from accelerate import PartialState

    process = PartialState()
    out = RunFolder(config).path
    folder = out.with_name(f".{out.name}.new")
    if process.is_main_process:
        with writing(folder):
            model.save_pretrained(folder)
    process.wait_for_everyone()
    options["attn_implementation"] = model.config._attn_implementation
    sharded = type(model).from_pretrained(folder, dtype=model.dtype, **options)
    process.wait_for_everyone()
    if process.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    return sharded.train()


def reshard(model: Any) -> None:
    """Shard weights again that a forward pass without a backward pass left gathered.

    FSDP2 keeps the root's weights gathered after a forward pass, because the backward pass needs them first. An
    optimizer that is created then, or whose state is read by parameter names, would see the gathered tensors.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def leave_group() -> None:
    """Wait for all processes of a run, then destroy the process group.

    A model that outlives its group, or a process whose peers are gone, sometimes aborts in gloo's threads.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        gc.collect()
        distributed.barrier()
        distributed.destroy_process_group()

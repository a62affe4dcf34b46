"""One run on many processes: what ``parallel`` means to transformers, and what it cannot mean.

Without it every process holds the whole model (DDP). Both of its keys are transformers' own: ``fsdp`` is FSDP2, where a
process reads and keeps its share of every weight; with ``expert_parallel`` it keeps a part of the FFN experts whole,
tokens travel to their experts and back, and all other weights are sharded as in FSDP2. (accelerate's FSDP2 would do for
the first, but on CPUs it becomes DDP without a word, so nothing of it could be tested without GPUs.) A single process
does what it would do without, and may go on with the run. Refusals come before anything heavy: torch is imported late.
"""

from __future__ import annotations

import gc
import shutil
from math import gcd
from typing import Any

from branchmix.checkpoint.folder import writing
from branchmix.errors import RecipeError
from branchmix.train.config import RunConfig
from branchmix.train.outputs import RunFolder


def require_possible(config: RunConfig, described: dict[str, Any], num_processes: int) -> None:
    """Refuse what many processes cannot do.

    Args:
        config: of the run.
        described: config.json of its model.
        num_processes: of the run.

    Raises:
        RecipeError: says which key.
    """
    parallel = config.parallel
    if parallel.expert_parallel and described.get("ffn") != "experts":
        raise RecipeError("parallel.expert_parallel: the model has no FFN experts: remove it, or use fsdp")
    if num_processes == 1 or not (parallel.fsdp or parallel.expert_parallel):
        return
    if config.budget.is_time:
        raise RecipeError("budget: steps of a sharded model are not measured beforehand: give tokens or steps")
    if parallel.expert_parallel:
        if config.lora or config.adapters:
            key = "lora" if config.lora else "adapters"
            raise RecipeError(f"parallel.expert_parallel: {key} cannot be added to experts that are spread: use fsdp")
        if _processes_of_experts(described["num_experts"], num_processes) == 1:
            raise RecipeError(
                f"parallel.expert_parallel: {described['num_experts']} experts cannot be spread equally over "
                f"{num_processes} processes: start as many as there are experts, or a divisor or multiple of it"
            )


def _processes_of_experts(num_experts: int, num_processes: int) -> int:
    """Over so many the experts are spread; each of these groups has all of them."""
    return gcd(num_experts, num_processes)


def loading_options(config: RunConfig, described: dict[str, Any], num_processes: int) -> dict[str, Any]:
    """What ``from_pretrained`` has to know, so that a process reads nothing but its part."""
    if num_processes == 1 or not (config.parallel.fsdp or config.parallel.expert_parallel):
        return {}
    from transformers.distributed import DistributedConfig

    spread = _processes_of_experts(described["num_experts"], num_processes) if config.parallel.expert_parallel else 1
    return {"distributed_config": DistributedConfig(fsdp_size=num_processes, ep_size=spread)}


def shard_new(model: Any, config: RunConfig, num_processes: int) -> Any:
    """A new model, of the same weights on every process, as ``from_pretrained`` shards it: through a folder beside OUT.

    Sharding it in memory would take tied embeddings apart.
    """
    options = loading_options(config, {}, num_processes)
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
    """Give back what forward passes without a backward have left whole.

    FSDP2 keeps the root's weights gathered after a forward pass, as the backward needs them at once. An optimizer that
    is made then, or asked for its state by the names of parameters, would meet other tensors than the sharded ones.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def leave_group() -> None:
    """End this process's part in a run of many: when all have arrived, the process group is taken down.

    A model that outlives its group, or a process whose peers have gone, aborts now and then in gloo's threads.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        gc.collect()
        distributed.barrier()
        distributed.destroy_process_group()

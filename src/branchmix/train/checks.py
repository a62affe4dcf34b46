"""Checks that take seconds, before data is read or a model is loaded. Does not import torch."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from math import gcd
from typing import Any

from branchmix.accounting import inspect
from branchmix.accounting.formulas import table_positions
from branchmix.accounting.shape import MIXTURE_DEFAULTS, shape_of
from branchmix.checkpoint.families import nearest
from branchmix.checkpoint.hub import ResolvedModel, resolve
from branchmix.checkpoint.index import read_config
from branchmix.checkpoint.json_text import read_json
from branchmix.data.sources import require_files
from branchmix.errors import CheckpointError, RecipeError
from branchmix.train.config import NewModel, RunConfig
from branchmix.train.models import new_config
from branchmix.train.run_folder import DONE, RunFolder, State
from branchmix.train.schedule import micro_batches, steps_of


@dataclass(frozen=True)
class Checked:
    state: State
    model: ResolvedModel | None
    """None for a new model."""
    tokenizer: ResolvedModel | None
    """The tokenizer of a new model, unless it is to be trained."""
    peak_rate: float
    micro_batch_size: int
    """Sequences that a process computes at once."""
    accumulation: int
    """Micro-batches that a process computes in a step."""


def check(config: RunConfig, folder: RunFolder, state: State) -> Checked:
    for logger in config.logging.to:
        if importlib.util.find_spec(logger) is None:
            raise RecipeError(f"logging.to: {logger} is not installed: pip install {logger}, or leave it out")
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch_size, accumulation = micro_batches(config, num_processes)
    if config.budget.flops is None:
        steps_of(config.budget, config.batch_size * config.sequence_length, None)
    model = tokenizer = None
    if isinstance(config.model, NewModel):
        described = new_config(config.model, config.model.train_tokenizer or 32_000).to_dict()
        if config.model.tokenizer is not None:
            tokenizer = resolve(config.model.tokenizer, config.folder)
    else:
        model = resolve(config.model, config.folder)
        if folder.path.resolve() == model.folder.resolve():
            raise RecipeError(f"out: {folder.path} is the model itself: choose another folder")
        described = read_config(model.folder)
    positions = table_positions(described)
    if positions is not None and config.sequence_length > positions:
        given = f"sequence_length: {config.sequence_length}"
        raise RecipeError(f"{given} is more than the model's {positions} positions: give {positions} or fewer")
    require_shardable(config, described, num_processes)
    require_balanceable(config, described)
    peak_rate = config.learning_rate.peak or _peak_of(model, config)
    require_files(config.data, folder=config.folder, leave_out=folder.path)
    folder.require_space(_bytes_needed(described, model, config))
    return Checked(state, model, tokenizer, peak_rate, micro_batch_size, accumulation)


def require_shardable(config: RunConfig, described: dict[str, Any], num_processes: int) -> None:
    """Refuse settings that cannot be combined with many processes, given the model's config.json."""
    sharded, spread = config.parallel.fsdp or config.parallel.expert_parallel, config.parallel.expert_parallel
    if spread and described.get("ffn") != "experts":
        raise RecipeError("parallel.expert_parallel: the model has no FFN experts: remove it, or use fsdp")
    if spread and described.get("expert_ranks"):
        raise RecipeError(
            "parallel.expert_parallel: the model's experts are small changes of the seed, whose matrices every process "
            "needs: remove it, or use fsdp"
        )
    if num_processes == 1:
        return
    if sharded and config.budget.is_time:
        raise RecipeError("budget: a sharded model's time per step is not measured: give tokens or steps")
    if spread and (config.lora or config.adapters):
        key = "lora" if config.lora else "adapters"
        raise RecipeError(
            f"parallel.expert_parallel: {key} does not work with experts that are spread over processes: use fsdp"
        )
    if spread and gcd(described["num_experts"], num_processes) == 1:
        raise RecipeError(
            f"parallel.expert_parallel: {described['num_experts']} experts cannot be spread equally over "
            f"{num_processes} processes: start as many as there are experts, or a divisor or multiple of it"
        )


def require_balanceable(config: RunConfig, described: dict[str, Any]) -> None:
    """Refuse a ``balance`` that the model's routers cannot have, given its config.json."""
    if config.balance is None:
        return
    if described.get("model_type") != "branchmix":
        raise RecipeError("balance: applies to mixtures, but the model has no routers: remove it")
    shape = shape_of({**MIXTURE_DEFAULTS, **described})
    top_ks = [shape.num_experts_per_tok] * shape.has_ffn_experts
    top_ks += [shape.active_attention_experts] * shape.has_attention_experts
    if all(top_k == shape.num_experts for top_k in top_ks):
        raise RecipeError("balance: every token goes to all experts of the model, so their load is equal: remove it")
    names, target = described.get("expert_names") or [*map(str, range(shape.num_experts))], config.balance.target
    for name in target or ():
        if name not in names:
            raise RecipeError(f"balance.target: no expert is called {name!r}{nearest(name, names)}")
    if target is not None and (missing := [name for name in names if name not in target]):
        raise RecipeError(f"balance.target: has no share for {missing[0]!r}: give every expert one")
    for name, share in (target or {}).items():
        top_k, share = max(k for k in top_ks if k < shape.num_experts), share / sum((target or {}).values())
        if share * top_k > 1 + 1e-6:
            raise RecipeError(
                f"balance.target: {name} would get {share:.0%} of the load, but a token that goes to {top_k} experts "
                f"goes to each only once: give it at most {1 / top_k:.0%}"
            )


def _peak_of(model: ResolvedModel | None, config: RunConfig) -> float:
    """``learning_rate.ratio`` times the peak of the model's own run."""
    assert model is not None and config.learning_rate.ratio is not None
    try:
        return float(config.learning_rate.ratio * read_json(model.folder / DONE)["peak_learning_rate"])
    except (OSError, ValueError, KeyError, TypeError):
        raise RecipeError(
            f"learning_rate.ratio: no {DONE} with a peak_learning_rate in {model.folder}: give peak instead"
        ) from None


def _bytes_needed(described: dict[str, Any], model: ResolvedModel | None, config: RunConfig) -> int:
    """Bytes of the checkpoints (weights and two moments in fp32, one more than are kept) and of the result."""
    try:
        counts = inspect(described if model is None else model.folder).total
    except CheckpointError:  # a family without a formula, and no weights to count
        return 0
    trained = 0 if config.lora or config.adapters else counts.stitches or counts.total
    return (config.checkpoints.keep + 1) * 4 * (counts.total + 2 * trained) + 4 * counts.total

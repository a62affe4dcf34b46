"""BTS: whole dense models side by side, joined by stitches (Branch-Train-Stitch, arXiv 2502.00075, section 2.3).

The hub is the seed, the others are its fine-tunes. Each runs in its own stream, with its own embeddings, blocks and
norms; the output is the hub's. A few stitches move states between the hub and the others. The family's own model runs
all streams at once: its hidden state holds those of all models side by side, and every module treats each model's part.

Saved with every checkpoint, so it imports only torch, transformers and its neighbours.
Shapes: B batch, T tokens, D model width, M models, the hub first, L layers of each.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from .trunk_branchmix import BranchMixTrunkMix


class BranchMixStitch(nn.Module):
    """Moves states between the hub, ``h_0``, and the experts, ``h_1`` and so on. Both kinds take as much as a gate lets
    through of what a projection P makes of the difference to the other state:

    - experts into hub: ``h_0 + sum_i g_i * P_i (h_i - h_0)``, with ``g = softmax(W h_0)`` over all models (eq. 3)
    - hub into experts: ``h_i + g_i * P_i (h_0 - h_i)``, with ``g = sigmoid(W h_0)`` (eq. 4)

    With P = 1 these are the paper's equations, whose gates sum to 1. Else the paper projects the other state instead of
    the difference, ``g_i * (P_i h_i - h_0)``, and no P closes that. Here P = 0 is a closed stitch, which changes
    nothing, and yet P has a gradient. The paper's dropout on gates is left out.

    Args:
        width: D. There is a gate for each of these.
        num_models: M.
        into_hub: which of the two kinds.
    """

    def __init__(self, width: int, num_models: int, *, into_hub: bool):
        super().__init__()
        self.into_hub = into_hub
        self.gate = nn.Linear(width, width * (num_models if into_hub else num_models - 1), bias=False)
        self.projections = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(num_models - 1))

    def forward(self, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The states of all models, [B, T, D] each, after the stitch."""
        hub_BTD, *experts = states
        gates_BTMD = self.gate(hub_BTD).unflatten(-1, (-1, hub_BTD.shape[-1]))
        if self.into_hub:
            gates = gates_BTMD.softmax(-2).unbind(-2)[1:]
            moved = (g * project(h - hub_BTD) for g, project, h in zip(gates, self.projections, experts, strict=True))
            return [sum(moved, start=hub_BTD), *experts]
        gates = gates_BTMD.sigmoid().unbind(-2)
        moved = (h + g * project(hub_BTD - h) for g, project, h in zip(gates, self.projections, experts, strict=True))
        return [hub_BTD, *moved]


class BranchMixStreams(BranchMixTrunkMix):
    """A module outside the blocks, once for each model: embeddings of the same ids side by side, or a norm of each
    model's part of the hidden state."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Ids, or [B, T, M * D], to [B, T, M * D]."""
        parts = _parts(x, len(self)) if x.is_floating_point() else [x] * len(self)
        return torch.cat([module(part, *args, **kwargs) for module, part in zip(self, parts, strict=True)], dim=-1)


class BranchMixStitchedBlock(nn.Module):
    """A family's block, once for each model, and the stitch behind it, if there is one.

    Model m caches the keys and values of its layer l as layer ``m * L + l``, so the hub's layers are those of the seed.

    Args:
        block: the family's.
        config: the family's, which all of them share.
        num_models: M.
        stitch: the one behind the block.
    """

    reads: list[torch.Tensor] | None = None
    """Where it leaves the hub's state [B, T, D] that it is given, while somebody wants to see it."""

    def __init__(self, block: nn.Module, config: Any, num_models: int, stitch: BranchMixStitch | None):
        super().__init__()
        copies = (copy.deepcopy(block, {id(config): config}) for _ in range(num_models - 1))
        self.streams, num_layers = nn.ModuleList([block, *copies]), config.num_hidden_layers
        self.stitch = stitch
        for number, stream in enumerate(self.streams):
            for module in stream.modules():
                if isinstance(own := getattr(module, "layer_idx", None), int):
                    module.layer_idx = own + number * num_layers

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the family's block does, with a hidden state of [B, T, M * D]."""
        parts = _parts(hidden, len(self.streams))
        if self.reads is not None:
            self.reads.append(parts[0])
        outputs = [block(part, *args, **kwargs) for block, part in zip(self.streams, parts, strict=True)]
        states = [output[0] if isinstance(output, tuple) else output for output in outputs]
        wide = torch.cat(states if self.stitch is None else self.stitch(states), dim=-1)
        return (wide, *outputs[0][1:]) if isinstance(outputs[0], tuple) else wide


def _parts(wide: torch.Tensor, num_models: int) -> list[torch.Tensor]:
    return [part.contiguous() for part in wide.chunk(num_models, dim=-1)]


def stitch(family: Any, config: Any, layers: str) -> None:
    """Turn a family's model into all models of a mixture, stitched, in place.

    Args:
        family: causal LM or base model.
        config: of the mixture.
        layers: path of its list of blocks.
    """
    blocks: Any = family.get_submodule(layers)
    seed, num_models = config.seed_config, config.num_experts
    inside = {id(module) for module in blocks.modules()}
    head = family.get_output_embeddings()
    streams = []
    for name, module in list(family.named_modules()):
        own = not list(module.children()) and id(module) not in inside and module is not head
        if own and not isinstance(module, nn.Dropout) and not name.endswith("rotary_emb"):
            parent, _, child = name.rpartition(".")
            setattr(family.get_submodule(parent), child, BranchMixStreams(module, num_models))
            streams.append(name)
    for layer, (block, into) in enumerate(zip(blocks, config.stitches, strict=True)):
        behind = None if into is None else BranchMixStitch(seed.hidden_size, num_models, into_hub=into == "hub")
        blocks[layer] = BranchMixStitchedBlock(block, family.config, num_models, behind)
    if family._tied_weights_keys:

        def of_hub(name: str) -> str:
            module, _, tensor = name.rpartition(".")
            return f"{module}.0.{tensor}" if module in streams else name

        family._tied_weights_keys = {of_hub(a): of_hub(b) for a, b in family._tied_weights_keys.items()}
        family.all_tied_weights_keys = family.get_expanded_tied_weights_keys()
    path, _, name = layers.rpartition(".")
    frame = family.get_submodule(path)
    frame.register_forward_pre_hook(partial(_prepared, layers=name, config=config), with_kwargs=True)
    frame.register_forward_hook(partial(_hub_only, layers=name, num_models=num_models))


def _prepared(module: Any, args: Any, kwargs: dict[str, Any], *, layers: str, config: Any) -> Any:
    """Gives the module that runs the blocks a cache of all models' layers, where it would make one of the seed's, and
    has the blocks record the hub's states, if they are wanted."""
    if kwargs.get("inputs_embeds") is not None:
        raise ValueError("each model of this mixture embeds token ids itself: give input_ids, not inputs_embeds")

    def wants(key: str) -> Any:
        return getattr(module.config, key, False) if kwargs.get(key) is None else kwargs[key]

    reads: list[torch.Tensor] | None = [] if wants("output_hidden_states") else None
    for block in getattr(module, layers):
        block.reads = reads
    checkpointing = module.training and getattr(module, "gradient_checkpointing", False)
    if wants("use_cache") and not checkpointing and kwargs.get("past_key_values") is None:
        return args, {**kwargs, "past_key_values": DynamicCache(config=config)}
    return None


def _hub_only(module: Any, args: Any, output: Any, *, layers: str, num_models: int) -> Any:
    """Leaves of the output of all streams what a dense model returns: that of the hub."""
    blocks = getattr(module, layers)
    output.last_hidden_state = _parts(output.last_hidden_state, num_models)[0]
    if output.get("hidden_states") is not None:  # transformers may have recorded blocks of streams, without stitches
        output.hidden_states = (*blocks[0].reads, output.last_hidden_state)
    for block in blocks:
        block.reads = None
    if output.get("attentions"):
        output.attentions = output.attentions[:: len(output.attentions) // len(blocks)]
    return output


def last_states(model: Any, input_ids: torch.Tensor) -> list[torch.Tensor]:
    """The last hidden state [B, T, D] of every model of a stitched causal LM, each after its own final norm."""
    frame = model.model.get_submodule(model.config.layout["layers"].rpartition(".")[0])
    seen: list[torch.Tensor] = []
    hook = frame.register_forward_hook(lambda _, __, output: seen.append(output.last_hidden_state), prepend=True)
    try:
        model(input_ids)
    finally:
        hook.remove()
    return _parts(seen[0], model.config.num_experts)

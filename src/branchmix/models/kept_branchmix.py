"""Fewer experts at inference: a mixture of some of its experts, which shares the memory of the whole one.

Where the gates are sure of a prompt, the other experts need not run: their weights are neither read nor their keys and
values cached. With one expert left, a mixture costs what the dense model costs.

Saved with every checkpoint, so it imports only torch, transformers and its neighbours.
Shapes: B batch, T tokens, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .attention_branchmix import BranchMixAttention, BranchMixExpertNorm, BranchMixExpertRotary, HeadOrder
from .documents_branchmix import KINDS, BranchMixDocumentGate
from .experts_branchmix import BranchMixExperts, BranchMixSparseMoeBlock
from .linear_branchmix import BranchMixLinear
from .low_rank_branchmix import BranchMixLowRank
from .routing_branchmix import BranchMixRouter, BranchMixRouterDomains, shares
from .trunk_branchmix import BranchMixTrunkExperts

SURE = 0.5
"""``auto`` keeps the experts whose share of the gates is at least this part of the largest share."""


def expert_numbers(config: Any, experts: Sequence[str | int]) -> list[int]:
    """Rows of experts given by name or row, in ascending order.

    Raises:
        ValueError: there is no such expert, none was given, stitches join them, or the mixture has none.
    """
    _require_gates(config)
    experts = [experts] if isinstance(experts, str) else experts
    names = config.expert_names or [f"expert-{number}" for number in range(config.num_experts)]
    rows = []
    for expert in experts:
        row = names.index(expert) if expert in names else expert
        if not isinstance(row, int) or not 0 <= row < config.num_experts:
            raise ValueError(f"no expert is called {expert!r}: this mixture has {', '.join(names)}")
        rows.append(row)
    if not rows:
        raise ValueError("keep at least one expert")
    return sorted(set(rows))


def _require_gates(config: Any) -> None:
    if config.stitches is not None:
        raise ValueError("the experts of this mixture are whole models, joined by stitches, which need all of them")
    if not (config.has_attention_experts or config.has_ffn_experts):
        raise ValueError("this mixture has no experts to choose from: its attention and FFNs are averages")


def keep_experts(model: Any, experts: Sequence[str | int]) -> Any:
    """A mixture of some of a mixture's experts. Its gates are those of these experts alone; with one they are 1.

    Weights are those of ``model``, but attention's projections of several experts, and factors of low rank, are copied
    where they are not side by side in its tensors. Do not train either of the two.

    Args:
        model: a mixture with a language-modelling head.
        experts: names or rows.

    Raises:
        ValueError: there is no such expert, or the model is spread over devices, or has adapters on it.
    """
    rows = expert_numbers(model.config, experts)
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1 or any(p.is_meta for p in model.parameters()):
        raise ValueError("experts cannot be kept of a model that is spread over devices or offloaded: load it on one")
    with torch.device("meta"):
        kept = type(model)(_config(model.config, rows))
    layout = model.config.layout
    _share(kept, model, rows, "q_proj" if layout["attention_code"] == "split" else layout["query"])
    kept.generation_config = model.generation_config
    return kept.train(model.training)


def _config(config: Any, rows: list[int]) -> Any:
    """The config of a mixture of these experts; factors for even gates stay so, and one expert's gate is 1."""
    kept, count, top_k = copy.deepcopy(config), len(rows), min(config.num_experts_per_tok, len(rows))
    if count == 1:
        kept.routed_scaling_factor, kept.document_gate = 1.0, None
    else:
        kept.routed_scaling_factor = config.scaling_for(count, top_k)
    kept.num_experts, kept.num_experts_per_tok = count, top_k
    if config.attention_num_experts_per_tok is not None:
        kept.attention_num_experts_per_tok = min(config.attention_num_experts_per_tok, count)
    if config.expert_names is not None:
        kept.expert_names = [config.expert_names[row] for row in rows]
    if config.expert_ranks is not None:
        of_layers = config.expert_ranks
        kept.expert_ranks = [{name: [ranks[row] for row in rows] for name, ranks in of.items()} for of in of_layers]
    if config.expert_rope_parameters is not None:
        kept.expert_rope_parameters = [config.expert_rope_parameters[row] for row in rows]
    return kept


def _share(kept: nn.Module, whole: Any, rows: list[int], query: str) -> None:
    """Give a module of the smaller mixture, and the modules in it, the tensors of its counterpart."""
    if not issubclass(type(whole), type(kept)):
        raise ValueError(f"experts cannot be kept of a model with adapters on it ({type(whole).__name__}): merge them")
    for name, value in vars(kept).items():
        if isinstance(value, torch.Tensor) or name == "max_seq_len_cached":  # dynamic rotary grows with its buffers
            setattr(kept, name, getattr(whole, name))
    kept._parameters, kept._buffers = dict(whole._parameters), dict(whole._buffers)
    one_an_expert = isinstance(kept, (BranchMixExpertNorm, BranchMixExpertRotary, BranchMixTrunkExperts))
    stacked = rows
    if isinstance(kept, BranchMixSparseMoeBlock) and whole.rows is not None:  # kept of a mixture that was kept itself
        stacked = whole.rows[rows].tolist()
    for name, child in kept.named_children():
        counterpart = whole[rows[int(name)]] if one_an_expert else getattr(whole, name)
        _share(child, counterpart, stacked if name == "experts" else rows, query)
    if isinstance(kept, BranchMixRouter) and kept.expert_bias is not None:
        kept.expert_bias = kept.expert_bias[rows]
    if isinstance(kept, BranchMixRouterDomains):
        kept.embeddings = kept.embeddings[rows]
    elif isinstance(kept, BranchMixDocumentGate):
        _cut(kept, rows, names=KINDS)
    elif isinstance(kept, BranchMixRouter) or (isinstance(kept, BranchMixExperts) and _side_by_side(rows)):
        _cut(kept, rows)
    elif isinstance(kept, BranchMixExperts):
        kept.num_experts = whole.num_experts
    elif isinstance(kept, BranchMixLowRank):
        for name, value in whole._parameters.items():
            if value is None or name == "weight":
                continue
            parts = value.detach().split(whole.ranks) if name != "bias" else value.detach().chunk(len(whole.ranks))
            start, stop = (sum(len(part) for part in parts[:end]) for end in (rows[0], rows[-1] + 1))
            some = value.detach()[start:stop] if _side_by_side(rows) else torch.cat([parts[row] for row in rows])
            kept._parameters[name] = nn.Parameter(some, requires_grad=False) if len(some) else None
    elif isinstance(kept, BranchMixSparseMoeBlock):
        if isinstance(kept.experts, BranchMixExperts) and not _side_by_side(stacked):
            kept.rows = torch.tensor(stacked, device=whole.gate.device)
    elif isinstance(kept, BranchMixAttention):
        _cut(kept, rows)  # o_bias
        if isinstance(kept.o_proj, BranchMixLinear):
            _cut(kept.o_proj, rows, whole.order, dim=1)
        for name, projection in kept.heads.named_children():
            if isinstance(projection, BranchMixLinear) and (name == query or not whole.order.kv_sharing):
                _cut(projection, rows, whole.order if name == query else whole.order.of_keys())


def _side_by_side(rows: list[int]) -> bool:
    return rows[-1] - rows[0] + 1 == len(rows)


def _cut(
    module: nn.Module,
    rows: list[int],
    order: HeadOrder | None = None,
    dim: int = 0,
    names: Sequence[str] | None = None,
) -> None:
    """Leave only some experts in a module's own tensors.

    Args:
        module: its tensors have a row an expert, or the heads of all experts along ``dim``.
        rows: the experts that stay.
        order: of the heads.
        dim: where the heads are.
        names: of the tensors; all if not given.
    """
    sizes, axis = ((-1, 1), 0) if order is None else (order.pieces, 1)
    for name, value in module._parameters.items():
        if value is not None and (names is None or name in names):
            wide = value.detach().unflatten(dim, sizes)
            if _side_by_side(rows):
                some = wide.narrow(dim + axis, rows[0], len(rows))
            else:
                some = wide.index_select(dim + axis, torch.tensor(rows, device=wide.device))
            module._parameters[name] = nn.Parameter(some.flatten(dim, dim + len(sizes) - 1), requires_grad=False)


# ---- Experts chosen by the prompt ----

_KEPT: WeakKeyDictionary[Any, tuple[Any, dict[tuple[int, ...], Any]]] = WeakKeyDictionary()
"""By mixture: the state of its tensors and routing, and the smaller mixtures made of it, the last used last."""
MOST_KEPT = 4
"""Smaller mixtures of one mixture that are remembered; each may hold copies of attention's projections."""


@torch.no_grad()
def expert_shares(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Each expert's share of the gates over a prompt, [B, E].

    Document gates say it without running the model: their shares after the last token, the mean over all kinds of
    routers. Without them it is the mean over all routers and tokens.

    Args:
        model: a mixture.
        input_ids: [B, T].
        attention_mask: [B, T], 0 for padding.
    """
    _require_gates(model.config)
    if model.document_gate is not None:
        logits, _ = model.document_gate(input_ids, attention_mask)
        of_kinds = ((getattr(logits, kind), score) for kind, score in model.document_gate.score_of.items())
        last = [shares(own[:, -1], score) for own, score in of_kinds if own is not None]
        return torch.stack(last).mean(0).to(input_ids.device)
    positions = None if attention_mask is None else (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    outputs = model(
        input_ids,
        attention_mask=attention_mask,
        position_ids=positions,  # as in generate
        output_router_logits=True,
        use_cache=False,
        logits_to_keep=1,
    )
    layers = [shares(layer.float(), model.config.scoring_func) for layer in outputs.router_logits or ()]
    layers += [shares(layer.float()) for layer in outputs.attention_router_logits or ()]
    device = input_ids.device
    gates_BTE = torch.stack([layer.to(device) for layer in layers]).mean(0).view(*input_ids.shape, -1)
    mask_BT1 = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    mask_BT1 = mask_BT1[..., None].to(gates_BTE)
    return (gates_BTE * mask_BT1).sum(1) / mask_BT1.sum(1)


def chosen_experts(
    model: Any,
    wanted: str | int | Sequence[str | int],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> list[tuple[int, ...]]:
    """The rows of the experts that each prompt keeps.

    Args:
        model: a mixture.
        wanted: ``auto``: those whose share is at least ``SURE`` of the largest; a number: as many, by their shares; or
            names or rows.
        input_ids: [B, T].
        attention_mask: [B, T], 0 for padding.

    Raises:
        ValueError: there is no such expert, or there are not as many.
    """
    config = model.config
    if isinstance(wanted, int) and not 1 <= wanted <= config.num_experts:
        raise ValueError(f"{wanted} experts cannot be kept: this mixture has {config.num_experts}")
    if not isinstance(wanted, int) and wanted != "auto":
        return [tuple(expert_numbers(config, wanted))] * len(input_ids)
    shares_BE = expert_shares(model, input_ids, attention_mask)
    if isinstance(wanted, int):
        return [tuple(sorted(row)) for row in shares_BE.topk(wanted, dim=-1).indices.tolist()]
    keeps = shares_BE >= SURE * shares_BE.max(-1, keepdim=True).values
    return [tuple(row.nonzero().flatten().tolist()) for row in keeps]


def of_kept_experts(model: Any, rows: tuple[int, ...]) -> Any:
    """``keep_experts``, made once for each choice of experts as long as the mixture's tensors and its k stay."""
    if len(rows) == model.config.num_experts:
        return model
    tensors = (*model.parameters(), *model.buffers())
    of_tensors = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
    config = model.config
    attention, experts = config._attn_implementation, config._experts_implementation
    state = (of_tensors, config.num_experts_per_tok, config.routed_scaling_factor, attention, experts)
    if model not in _KEPT or _KEPT[model][0] != state:
        _KEPT[model] = (state, {})
    made = _KEPT[model][1]
    made[rows] = kept = made.pop(rows, None) or keep_experts(model, rows)
    while len(made) > MOST_KEPT:
        del made[next(iter(made))]
    kept.generation_config = model.generation_config
    return kept.train(model.training)


def generate_with_kept_experts(model: Any, wanted: Any, inputs: torch.Tensor | None, args: Any, kwargs: Any) -> Any:
    """``generate`` in which each prompt runs on the experts that it keeps.

    Args:
        model: a mixture.
        wanted: as for ``chosen_experts``.
        inputs: [B, T], or None if ``kwargs`` has ``input_ids``.
        args, kwargs: of ``generate``.

    Raises:
        ValueError: there is no prompt of ids, a cache is given, or prompts of several choices want more than ids back,
            or a function of their rows.
    """
    ids_BT = kwargs.pop("input_ids", None) if inputs is None else inputs
    if ids_BT is None or kwargs.get("past_key_values") is not None:
        raise ValueError("experts are chosen by the ids of the whole prompt: give input_ids, and no past_key_values")
    given = (args[0] if args else kwargs.get("generation_config")) or model.generation_config

    def setting(name: str) -> Any:
        of_call = kwargs.get(name, getattr(given, name))
        return getattr(model.generation_config, name) if of_call is None else of_call

    ends = torch.as_tensor([] if (end := setting("eos_token_id")) is None else end).flatten().tolist()
    padding = setting("pad_token_id")
    mask = kwargs.get("attention_mask")
    if mask is None and padding is not None and padding not in ends:  # as transformers finds it
        mask = (ids_BT != padding).long()
    choices = chosen_experts(model, wanted, ids_BT, mask)
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, choice in enumerate(choices):
        groups.setdefault(choice, []).append(row)
    if len(groups) == 1:
        return of_kept_experts(model, choices[0]).generate(
            ids_BT, *args, experts=len(choices[0]), **kwargs
        )  # all of its
    by_prompt = any(kwargs.get(name) is not None for name in ("streamer", "prefix_allowed_tokens_fn"))
    if setting("return_dict_in_generate") or by_prompt:
        raise ValueError(
            "prompts that keep different experts cannot be streamed, be told by their number which tokens they may "
            "have, or return more than ids: give one prompt"
        )
    by_row = [name for name, value in kwargs.items() if isinstance(value, torch.Tensor) and value.dim() > 1]
    written: list[torch.Tensor] = []
    places: list[int] = []
    for choice, rows in groups.items():
        own = kwargs | {name: kwargs[name][rows] for name in by_row if len(kwargs[name]) == len(ids_BT)}
        out = of_kept_experts(model, choice).generate(ids_BT[rows], *args, experts=len(choice), **own)
        times = len(out) // len(rows)
        written += list(out)
        places += [row * times + number for row in rows for number in range(times)]
    filler = padding if padding is not None else (*ends, 0)[0]
    padded = torch.nn.utils.rnn.pad_sequence(written, batch_first=True, padding_value=filler)
    return padded[torch.tensor(places, device=padded.device).argsort()]

"""Parts of a model that a run does not train: ``freeze`` in a run file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from branchmix.checkpoint.families import family_of, layout_of
from branchmix.errors import RecipeError
from branchmix.models.attention_branchmix import BranchMixAttention
from branchmix.models.documents_branchmix import BranchMixDocumentGate
from branchmix.models.experts_branchmix import BranchMixSparseMoeBlock
from branchmix.models.routing_branchmix import BranchMixRouter


@dataclass(frozen=True)
class FreezeReport:
    """Numbers of parameters; tied weights count once."""

    trained: int
    frozen: int


def apply(model: Any, parts: Sequence[str]) -> FreezeReport:
    """Freeze parts of a model, in place, except for its routers.

    ``Trainer`` gives its optimizer only trained parameters, so weight decay does not change the others.

    Args:
        model: a mixture, a dense causal LM, or one with LoRA.
        parts: ``experts`` (all weights of FFN and attention experts, including Shared KV's keys and values),
            ``all_but_routers``, ``attention`` (of a dense model or a mixture), ``embeddings`` (input and output) and
            ``trunk`` (everything outside attention and FFNs: embeddings, head, the norms between them).

    Raises:
        RecipeError: the model has no such part, or nothing would be left to train.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    routers = {
        id(parameter)
        for module in base.modules()
        if isinstance(module, (BranchMixRouter, BranchMixDocumentGate))
        for parameter in module.parameters()
    }
    for part in parts:
        parameters = list(_PARTS[part](base))
        if part in ("experts", "all_but_routers") and not routers:
            raise RecipeError(f"freeze: {part} applies to mixtures, but {_name(base)} has no routers: remove it")
        for parameter in parameters:
            if id(parameter) not in routers:
                parameter.requires_grad_(False)
    report = FreezeReport(
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        frozen=sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad),
    )
    if not report.trained:
        raise RecipeError(f"freeze: with {' and '.join(parts)} frozen, {_name(base)} has nothing left to train")
    return report


def _experts(model: Any) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, (BranchMixAttention, BranchMixSparseMoeBlock)):
            yield from module.parameters()


def _everything(model: Any) -> Iterator[nn.Parameter]:
    yield from model.parameters()


def _attention(model: Any) -> Iterator[nn.Parameter]:
    return _in_blocks(model, "attention")


def _trunk(model: Any) -> Iterator[nn.Parameter]:
    experts = {id(parameter) for parameter in _in_blocks(model, "attention", "ffn", "up", "down")}
    return (parameter for parameter in model.parameters() if id(parameter) not in experts)


def _in_blocks(model: Any, *kinds: str) -> Iterator[nn.Parameter]:
    """Parameters of every block's modules of these kinds, as the layout names them.

    A learned activation belongs to none: all experts of a mixture share it.
    """
    config = model.config
    if config.model_type == "branchmix":
        frame, layout = model.model, config.layout
    else:
        frame, layout = model, layout_of(family_of(config.to_dict()))
    modules = tuple(f"{layout[kind]}." for kind in kinds)
    try:
        blocks = frame.get_submodule(layout["layers"])
    except AttributeError:  # a family without a table entry
        blocks = [nn.Identity()]
    for block in blocks:
        named = [(name, parameter) for name, parameter in block.named_parameters() if name.startswith(modules)]
        if not named:  # a family without a table entry
            place = f"{layout['layers']}.*.{layout[kinds[0]]}"
            raise RecipeError(f"freeze: {_name(model)} has no {kinds[0]} at {place}: freeze other parts")
        yield from (parameter for name, parameter in named if not name.startswith(f"{layout['activation']}."))


def _embeddings(model: Any) -> Iterator[nn.Parameter]:
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            yield from module.parameters()


_PARTS = {
    "experts": _experts,
    "all_but_routers": _everything,
    "attention": _attention,
    "embeddings": _embeddings,
    "trunk": _trunk,
}


def _name(model: Any) -> str:
    return f"the {model.config.model_type} model {model.config.name_or_path}".rstrip()

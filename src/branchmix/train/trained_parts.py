"""What a run trains of a model: parts of it (``freeze``), LoRA, BAM Adapters (``adapters`` in a run file); stitches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from branchmix.checkpoint.families import family_of, layout_of, nearest
from branchmix.errors import RecipeError
from branchmix.models.attention_branchmix import BranchMixAttention, HeadOrder, is_conv1d
from branchmix.models.documents_branchmix import BranchMixDocumentGate
from branchmix.models.experts_branchmix import BranchMixSparseMoeBlock
from branchmix.models.low_rank_branchmix import BranchMixLowRank
from branchmix.models.routing_branchmix import BranchMixRouter
from branchmix.models.stitched_branchmix import BranchMixStitch
from branchmix.train.config import Lora


def freeze(model: Any, parts: Sequence[str]) -> None:
    """Freeze parts of a model, in place, except for its routers.

    ``Trainer`` gives its optimizer only trained parameters, so weight decay does not change the others.

    Args:
        model: a mixture, a dense causal LM, or one with LoRA.
        parts: as ``freeze`` in a run file names them. ``experts`` includes Shared KV's keys and values.

    Raises:
        RecipeError: the model has no such part, or nothing would be left to train.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    routers = {id(parameter) for module in _routers(base) for parameter in module.parameters()}
    for part in parts:
        parameters = list(_PARTS[part](base))
        if part in ("experts", "all_but_routers") and not routers:
            raise RecipeError(f"freeze: {part} applies to mixtures, but {_name(base)} has no routers: remove it")
        for parameter in parameters:
            if id(parameter) not in routers:
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError(f"freeze: with {' and '.join(parts)} frozen, {_name(base)} has nothing left to train")


def only_stitches(model: Any, others: Sequence[str]) -> None:
    """Freeze everything but the stitches of whole models, in place; other models stay as they are (BTS, section 2.2).

    Args:
        model: as it was loaded.
        others: keys of the run that choose what to train.

    Raises:
        RecipeError: there are stitches and such keys.
    """
    if getattr(model.config, "stitches", None) is None:
        return
    if others:
        raise RecipeError(f"{others[0]}: of {_name(model)} only the stitches are trained: remove {others[0]}")
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, BranchMixStitch):
            module.requires_grad_(True)


def _routers(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, (BranchMixRouter, BranchMixDocumentGate)))


def _experts(model: Any) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, (BranchMixAttention, BranchMixSparseMoeBlock)):
            yield from module.parameters()


def _all_but_factors(model: Any) -> Iterator[nn.Parameter]:
    matrices = [module for module in model.modules() if isinstance(module, BranchMixLowRank)]
    if not matrices:
        raise RecipeError(
            "freeze: all_but_factors applies to mixtures whose experts are changes of the seed (expert_rank in the "
            f"recipe), and {_name(model)} is not: remove it"
        )
    factors = {id(factor) for matrix in matrices for factor in (matrix.low_rank_A, matrix.low_rank_B)}
    return (parameter for parameter in model.parameters() if id(parameter) not in factors)


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


_PARTS: dict[str, Callable[[Any], Iterator[nn.Parameter]]] = {
    "experts": _experts,
    "all_but_factors": _all_but_factors,
    "all_but_routers": lambda model: model.parameters(),
    "attention": lambda model: _in_blocks(model, "attention"),
    "embeddings": _embeddings,
    "trunk": _trunk,
}


def _name(model: Any) -> str:
    return f"the {model.config.model_type} model {model.config.name_or_path}".rstrip()


def add_lora(model: Any, lora: Lora) -> Any:
    """Add PEFT LoRA to the model's linear layers, starting at zero, and train only these low-rank updates.

    ``all-linear`` means every linear layer except the output embedding. No module is trained as a whole, so everything
    an expert learns can be merged into the seed's matrices.

    Returns:
        A ``peft.PeftModel`` around the same model; its ``save_pretrained`` writes only the adapter.

    Raises:
        RecipeError: peft is not installed, the model is a mixture, or it has no linear layer of a name in ``targets``.
    """
    name = _name(model)
    if model.config.model_type == "branchmix":
        raise RecipeError(
            f"lora: {name} is a mixture, whose FFN experts are not linear layers, so LoRA cannot adapt them: remove "
            "lora, and use adapters: true or freeze"
        )
    layers = {
        path: module
        for path, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and module is not model.get_output_embeddings()
    }
    for target in lora.targets if isinstance(lora.targets, list) else []:
        if not any(f".{path}".endswith(f".{target}") for path in layers):
            known = sorted({path.rpartition(".")[2] for path in layers})
            raise RecipeError(
                f"lora.targets: {name} has no linear layer {target}{nearest(target, known)}: its layers are "
                f"{', '.join(known)}"
            )
    try:
        import peft
    except ImportError:
        raise RecipeError("lora: needs peft, which is not installed: pip install 'branchmix[lora]'") from None
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        fan_in_fan_out=any(is_conv1d(module) for module in layers.values()),
    )
    return peft.get_peft_model(model, settings)


# ---- BAM Adapters (BTS, arXiv 2502.00075): everything frozen but the routers and a D x D linear after each expert ----
#
# ``y_e -> A_e y_e`` on what attention expert or FFN expert e computes, before the gated sum. As ``A_e (W_e x + b_e)``
# is ``(A_e W_e) x + A_e b_e``, the adapters are parametrizations (``torch.nn.utils.parametrize``) of the experts' last
# weights and biases. So every kernel works unchanged, and a folder written during training holds the products: an
# ordinary mixture. ``saved_state`` saves the A_e themselves next to it, for a run that resumes.
# Shapes: D model width, E experts, I inner width of an FFN, X the input width of an expert's last matrix.


def add_adapters(model: Any) -> None:
    """Put an adapter after each attention and FFN expert, and freeze everything else except the routers, in place.

    They start as the exact identity. They cost E * D * D * X multiplications per matrix and forward pass, independently
    of the number of tokens.

    Raises:
        RecipeError: the model has no experts, or they are spread over processes.
    """
    if any(isinstance(module, BranchMixLowRank) for module in model.modules()):
        raise RecipeError(
            f"adapters: the experts of {_name(model)} are small changes of the seed already: remove adapters, and give "
            "freeze: [all_but_factors] to train only these"
        )
    places = list(_places(model))
    if not places:
        raise RecipeError(f"adapters: {_name(model)} has no experts: give a mixture, or use lora")
    if any(isinstance(getattr(module, name), DTensor) for matrices in places for module, name, _ in matrices):
        raise RecipeError("adapters: do not work with experts that are spread over processes: remove expert_parallel")
    model.requires_grad_(False)
    for module in _routers(model):
        module.requires_grad_(True)
    for matrices in places:
        adapter = ExpertAdapter(model.config.num_experts, model.config.hidden_size, like=getattr(*matrices[0][:2]))
        for module, name, order in matrices:
            parametrize.register_parametrization(module, name, _AfterExpert(adapter, order))


def fold_adapters(model: Any) -> None:
    """Multiply the adapters into the experts, which gives an ordinary mixture with the same function; unfreeze it."""
    for matrices in _places(model):
        for module, name, _ in matrices:
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    model.requires_grad_(True)


class ExpertAdapter(nn.Module):
    """``A_e = 1 + delta_e`` for all experts of one attention or one FFN.

    Only the difference is stored: zero reproduces the weights bit for bit, bf16 rounds the difference and not the sum,
    and weight decay pulls towards the identity, not towards zero output.
    """

    def __init__(self, num_experts: int, width: int, *, like: torch.Tensor):
        super().__init__()
        self.delta = nn.Parameter(like.new_zeros(num_experts, width, width))

    def forward(self, matrix_EDX: torch.Tensor) -> torch.Tensor:
        """``A_e M_e`` for each expert's matrix."""
        return matrix_EDX + torch.bmm(self.delta, matrix_EDX)


class _AfterExpert(nn.Module):
    """An adapter as the parametrization of one tensor; weight and bias share one adapter.

    Args:
        adapter: of these experts.
        order: order of the columns of a wide ``o_proj`` [D, X of all experts]; None for stacks [E, D, X] and biases
            [E, D].
    """

    def __init__(self, adapter: ExpertAdapter, order: HeadOrder | None):
        super().__init__()
        self.adapter = adapter
        self.order = order

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.order is None:
            return self.adapter(tensor) if tensor.dim() == 3 else self.adapter(tensor.unsqueeze(-1)).squeeze(-1)
        by_expert = tensor.unflatten(1, self.order.pieces).movedim(2, 0)
        adapted = self.adapter(by_expert.flatten(2)).view(by_expert.shape)
        return adapted.movedim(0, 2).flatten(1)


def _places(model: nn.Module) -> Iterator[list[tuple[Any, str, HeadOrder | None]]]:
    """For each attention and each FFN with experts: the last matrix, then its bias if it has one."""
    for module in list(model.modules()):
        if isinstance(module, BranchMixAttention):
            weight: tuple[Any, str, HeadOrder | None] = (module.o_proj, "weight", module.order)
            yield [weight] if module.o_bias is None else [weight, (module, "o_bias", None)]
        elif isinstance(module, BranchMixSparseMoeBlock):
            weight = (module.experts, "down_proj", None)
            yield [weight, (module.experts, "down_proj_bias", None)] if module.experts.has_bias else [weight]

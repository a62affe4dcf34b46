"""FFN experts: the block of router and experts, their stacked weights, and the kernels that compute them.

Saved with every checkpoint, so it imports only torch, transformers and its neighbours.
Shapes: S = B * T tokens, D model width, E experts, I inner width of an FFN, k experts chosen for a token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, grouped_mm_experts_forward

from .attention_branchmix import is_conv1d, take_output_dropout
from .configuration_branchmix import BranchMixConfig
from .linear_branchmix import fastest_on_cpu, linear
from .low_rank_branchmix import BranchMixLowRankExperts
from .routing_branchmix import BranchMixFFNRouter
from .shared_branchmix import BranchMixSharedExpert


def widen_ffn(block: nn.Module, config: BranchMixConfig, layer: int) -> None:
    """Replace the FFN of a block by experts, in place."""
    layout = config.layout
    down: Any = block.get_submodule(layout["down"])
    inner, width = down.weight.shape if is_conv1d(down) else down.weight.shape[::-1]
    gated, bias = layout["gate"] is not None, down.bias is not None
    activation = block.get_submodule(layout["activation"])
    dropout = take_output_dropout(block.get_submodule(layout["ffn"]), "dropout", "residual_dropout")
    experts: BranchMixExperts | BranchMixLowRankExperts
    if (ranks := config.ranks_of(layer)) is None:
        experts = BranchMixExperts(config, width, inner, activation, gated=gated, bias=bias)
        experts.has_gate, experts.has_bias = gated, bias
    else:
        experts = BranchMixLowRankExperts(width, inner, activation, ranks, gated=gated, bias=bias)
    moe = BranchMixSparseMoeBlock(config, width, experts, dropout)
    if config.shared_expert_weight is not None:
        moe.shared_expert = BranchMixSharedExpert(width, inner, activation, gated=gated, bias=bias)
    if any(True for _ in activation.parameters()):  # Apertus: one for all experts, under its dense name
        setattr(moe, layout["activation"].split(".")[-1], activation)
    setattr(block, layout["ffn"], moe)
    if layout["up"] == layout["ffn"]:  # OPT keeps its FFN in the block itself: the experts do all three steps
        setattr(block, layout["activation"], nn.Identity())
        setattr(block, layout["down"], nn.Identity())


class BranchMixSparseMoeBlock(nn.Module):
    """A block's FFN as experts: gates, top-k, and the gated sum (BAM section 3.3).

    With a shared expert S of weight w, it is ``w S(x) + (1 - w) sum_i g_i E_i(x)``.
    """

    def __init__(
        self,
        config: BranchMixConfig,
        hidden_size: int,
        experts: BranchMixExperts | BranchMixLowRankExperts,
        dropout: float,
    ):
        super().__init__()
        self.scaling = config.routed_scaling_factor
        self.shared_expert: BranchMixSharedExpert | None = None
        self.shared_weight = config.shared_expert_weight or 0.0
        self.gate = BranchMixFFNRouter(
            hidden_size,
            config.num_experts,
            config.num_experts_per_tok,
            config.norm_topk_prob,
            config.domain_router,
            config.scoring_func,
        )
        self.experts = experts
        self.rows: torch.Tensor | None = None
        """Numbers of the experts that the router's rows mean, if only some of the stack are kept (``keep_experts``)."""
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., D]."""
        if self.experts.num_experts == 1:  # its gate is 1: see ``keep_experts``
            out = self.experts.of_one(hidden_states) * (self.scaling * (1 - self.shared_weight))
            return self.dropout(self._with_shared(out, hidden_states))
        hidden_SD = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, gates_Sk, index_Sk = self.gate(hidden_SD)
        if self.rows is not None:
            index_Sk = self.rows[index_Sk]
        out_SD = self.experts(hidden_SD, index_Sk, gates_Sk * (self.scaling * (1 - self.shared_weight)))
        return self.dropout(self._with_shared(out_SD.reshape(hidden_states.shape), hidden_states))

    def _with_shared(self, out: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the routed experts gave, and what the shared expert adds to it."""
        if self.shared_expert is None or not self.shared_weight:
            return out
        return out + (self.shared_expert(hidden_states) * self.shared_weight).to(out.dtype)


class _AutocastExperts(ExpertsInterface):
    """transformers' kernels for experts, in autocast's dtype where autocast is on.

    ``F.grouped_mm`` knows nothing of autocast: under bf16 autocast it would multiply fp32 weights in fp32, at half the
    speed of the whole training step, and without a word.
    """

    def get_interface(self, experts_implementation: str, default: Callable[..., torch.Tensor]) -> Callable[..., Any]:
        kernel = ALL_EXPERTS_FUNCTIONS.get_interface(experts_implementation, default)

        def run(experts: Any, hidden_SD: torch.Tensor, *routed: torch.Tensor) -> torch.Tensor:
            # Gates stay fp32, and so does the sum over a token's experts; the result has autocast's dtype.
            device = hidden_SD.device.type
            if torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
                experts, hidden_SD = _CastExperts(experts, dtype), hidden_SD.to(dtype)
            return kernel(experts, hidden_SD, *routed)

        return run


class _CastExperts:
    """An experts module to its kernel, but for weights and biases, which are cast where the kernel takes them.

    A kernel takes each once a forward pass, so there is nothing to cache; gradients reach the fp32 weights.
    """

    def __init__(self, experts: nn.Module, dtype: torch.dtype):
        self._experts = experts
        self._dtype = dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._experts, name)
        return value.to(self._dtype) if isinstance(value, torch.Tensor) else value


@use_experts_implementation(experts_interface=_AutocastExperts())
class BranchMixExperts(nn.Module):
    """All FFN experts of a layer as stacked 3-D weights; on disk they are 2-D, one tensor an expert."""

    # Set by ``use_experts_implementation``, as for Llama; then by ``widen_ffn``.
    has_gate: bool
    has_bias: bool
    _apply_gate: Callable[[torch.Tensor], torch.Tensor]

    def __init__(
        self, config: BranchMixConfig, width: int, inner: int, activation: nn.Module, *, gated: bool, bias: bool
    ):
        super().__init__()
        num_experts = self.num_experts = config.num_experts
        if any(True for _ in activation.parameters()):
            self.__dict__["act_fn"] = activation  # not registered: its tensors are the block's
        else:
            self.act_fn = activation
        first, first_width = ("gate_up_proj", 2 * inner) if gated else ("up_proj", inner)
        self.register_parameter(first, nn.Parameter(torch.empty(num_experts, first_width, width)))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, inner))
        if bias:
            self.register_parameter(f"{first}_bias", nn.Parameter(torch.empty(num_experts, first_width)))
            self.down_proj_bias = nn.Parameter(torch.empty(num_experts, width))

    def forward(self, hidden_SD: torch.Tensor, index_Sk: torch.Tensor, gates_Sk: torch.Tensor) -> torch.Tensor:
        """The ``eager`` implementation: a loop over experts.

        The stacks are unbound once: the backward of ``weight[e]`` would zero-fill the whole stack for every expert.
        """
        none: list[Any] = [None] * self.num_experts
        ups, up_biases, downs, down_biases = (none if x is None else x.unbind(0) for x in _stacks(self))
        # In fp32 with the gates: of bf16 there would be a rounding for each of the k experts.
        out_SD = torch.zeros_like(hidden_SD, dtype=torch.promote_types(hidden_SD.dtype, gates_Sk.dtype))
        for expert in range(self.num_experts):
            token, slot = torch.where(index_Sk == expert)
            inner = F.linear(hidden_SD[token], ups[expert], up_biases[expert])
            inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
            expert_out = F.linear(inner, downs[expert], down_biases[expert]) * gates_Sk[token, slot, None]
            out_SD.index_add_(0, token, expert_out)
        return out_SD.to(hidden_SD.dtype)

    def of_one(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output of the only expert, [..., D] to [..., D]."""
        return _computed(self, _stacks(self), 0, hidden)


def _stacks(experts: Any) -> tuple[Any, ...]:
    """Every expert's first matrix [E, O, D], gate and up side by side or up, and its bias [E, O] if there is one; then
    the second matrix [E, D, I] and its bias [E, D]."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    return tuple(getattr(experts, name, None) for name in (first, f"{first}_bias", "down_proj", "down_proj_bias"))


def _computed(experts: Any, stacks: tuple[Any, ...], number: int, hidden: torch.Tensor) -> torch.Tensor:
    """The output of one expert, [..., D] to [..., D]."""
    parts: list[Any] = [None if stack is None else stack[number] for stack in stacks]
    first, first_bias, down, down_bias = parts
    inner = linear(hidden, first, first_bias)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    return linear(inner, down, down_bias)


FEW_ROWS = 16
"""Up to this number of rows a product costs about what reading its matrix costs."""
EXPERTS_AUTOMATIC = "branchmix"
"""Experts' kernel where none was asked for: transformers' ``grouped_mm``, but a loop for the few tokens of a decoding
step on a CPU where that is faster."""


def automatic_experts_forward(
    experts: Any, hidden_SD: torch.Tensor, index_Sk: torch.Tensor, gates_Sk: torch.Tensor
) -> torch.Tensor:
    """Few tokens on a CPU go through the experts they chose one by one; everything else through ``grouped_mm``.

    A step of decoding reads each chosen expert once and computes next to nothing: what counts is how fast a product of
    one row reads its matrix (see ``linear``), and grouping costs more than it saves. For several tokens that is timed,
    as processors differ.
    """
    few = hidden_SD.shape[0] <= FEW_ROWS and hidden_SD.device.type == "cpu"
    few = few and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    few = few and not getattr(experts, "_is_expert_parallel", False)
    if not few or (len(hidden_SD) > 1 and not _one_by_one_is_faster(hidden_SD.dtype)):
        return grouped_mm_experts_forward(experts, hidden_SD, index_Sk, gates_Sk)
    stacks = _stacks(experts)
    slots: dict[int, list[int]] = {}
    for slot, expert in enumerate(index_Sk.flatten().tolist()):
        slots.setdefault(expert, []).append(slot)
    top_k = index_Sk.shape[1]
    gates_S1 = gates_Sk.reshape(-1, 1)
    out_SD = torch.zeros_like(hidden_SD, dtype=torch.promote_types(hidden_SD.dtype, gates_Sk.dtype))
    for expert, chosen in slots.items():
        tokens = [slot // top_k for slot in chosen]
        hidden = hidden_SD[tokens] if len(hidden_SD) > 1 else hidden_SD
        gated = _computed(experts, stacks, expert, hidden) * gates_S1[chosen]
        for row, token in enumerate(tokens):
            out_SD[token] += gated[row]
    return out_SD.to(hidden_SD.dtype)


@cache
def _one_by_one_is_faster(dtype: torch.dtype) -> bool:
    """Whether experts that get one or two rows each are computed faster one after the other than grouped.

    Timed once in a process, on 8 experts whose matrices take 16 MB in 16 bits.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):  # what ``F.grouped_mm`` computes
        return True
    weights = torch.ones(8, 1024, 1024, dtype=dtype)
    parts = torch.ones(12, 1024, dtype=dtype).split([1, 2] * 4)
    ends = torch.tensor([len(part) for part in parts]).cumsum(0, dtype=torch.int32)
    calls: dict[str, Callable[[], object]] = {
        "one by one": lambda: [linear(part, weight) for part, weight in zip(parts, weights, strict=True)],
        "grouped": lambda: F.grouped_mm(torch.cat(parts), weights.transpose(1, 2), offs=ends),
    }
    return fastest_on_cpu(calls) == "one by one"


ExpertsInterface.register(EXPERTS_AUTOMATIC, automatic_experts_forward)


# On disk the ecosystem keeps experts as 2-D tensors. A plain FFN's first matrix is called in_proj there, since only one
# converter may claim up_proj, and the mapping is one for all mixtures.
register_checkpoint_conversion_mapping(
    "branchmix",
    [
        WeightConverter(
            [f".experts.*.gate_proj.{kind}", f".experts.*.up_proj.{kind}"],
            f".experts.gate_up_proj{suffix}",
            [MergeModulelist(dim=0), Concatenate(dim=1)],
        )
        for kind, suffix in (("weight", ""), ("bias", "_bias"))
    ]
    + [
        WeightConverter([f".experts.*.{on_disk}.{kind}"], f".experts.{name}{suffix}", [MergeModulelist(dim=0)])
        for on_disk, name in (("down_proj", "down_proj"), ("in_proj", "up_proj"))
        for kind, suffix in (("weight", ""), ("bias", "_bias"))
    ],
    overwrite=True,
)

"""BranchMix: a dense family's own transformers model, widened into a mixture of attention and FFN experts.

The model is the seed family's causal LM with two modules of every block replaced: attention by ``BranchMixAttention``
(all experts' heads in one attention call, gated and projected outside) and the FFN by ``BranchMixSparseMoeBlock``.
Rotary variants, masks, windows, norms, residuals, caches and generation stay the family's. BAM, arXiv 2408.08274.

Travels with every checkpoint, so it imports torch, transformers and its two neighbours only.
Shapes: B batch, T tokens, S = B * T, D model width, E experts, H query heads and K key/value heads of one expert,
G = H / K, C head dimension, I inner width of an FFN, k experts chosen for a token.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations import use_experts_implementation
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .configuration_branchmix import CODE_FILES, BranchMixConfig
from .losses_branchmix import router_losses

logger = logging.get_logger(__name__)

# ---------------------------------------------------------------------------------------------------------------------
# Routing
# ---------------------------------------------------------------------------------------------------------------------


class BranchMixRouter(nn.Module):
    """Linear router without bias; its logits and gates are fp32 whatever the model's dtype."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, normalize: bool):
        super().__init__()
        self.top_k = top_k
        self.normalize = normalize
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def route(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Softmax first, then top-k, raw unless ``normalize`` (BAM section 3.3).

        Args:
            hidden_states: [..., D].

        Returns:
            logits [..., E], chosen gates [..., k], chosen experts [..., k].
        """
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.float(), self.weight.float())
        gates, index = logits.softmax(-1).topk(self.top_k, dim=-1)
        if self.normalize:
            gates = gates / gates.sum(-1, keepdim=True)
        return logits, gates, index


class BranchMixFFNRouter(BranchMixRouter):
    """``mlp.gate``: which FFN experts a token goes to."""

    def forward(self, hidden_SD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.route(hidden_SD)


class BranchMixAttentionRouter(BranchMixRouter):
    """``self_attn.expert_gate``: one gate for each attention expert, soft unless top-k was asked for (section 4.1)."""

    def forward(self, hidden_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns logits [B, T, E] and gates [B, T, E], zero for experts that were not chosen."""
        logits_BTE, gates, index = self.route(hidden_BTD)
        return logits_BTE, torch.zeros_like(logits_BTE).scatter(-1, index, gates)


# ---------------------------------------------------------------------------------------------------------------------
# FFN experts
# ---------------------------------------------------------------------------------------------------------------------


class _Experts(nn.Module):
    """All FFN experts of a layer as stacked 3-D weights; on disk they are 2-D, one tensor an expert."""

    # Set by ``use_experts_implementation``.
    has_gate: bool
    has_bias: bool
    _apply_gate: Callable[[torch.Tensor], torch.Tensor]
    # There is the first or the second, by ``has_gate``; biases by ``has_bias``.
    gate_up_proj: torch.Tensor
    up_proj: torch.Tensor
    gate_up_proj_bias: torch.Tensor
    up_proj_bias: torch.Tensor

    def __init__(self, config: BranchMixConfig, dense: _DenseFFN, gated: bool):
        super().__init__()
        num_experts, width, inner = config.num_experts, dense.hidden_size, dense.intermediate_size
        self.num_experts = num_experts
        self.act_fn = dense.activation
        first = "gate_up_proj" if gated else "up_proj"
        first_width = 2 * inner if gated else inner
        self.register_parameter(first, nn.Parameter(torch.empty(num_experts, first_width, width)))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, inner))
        if dense.bias:
            self.register_parameter(f"{first}_bias", nn.Parameter(torch.empty(num_experts, first_width)))
            self.down_proj_bias = nn.Parameter(torch.empty(num_experts, width))

    def forward(self, hidden_SD: torch.Tensor, index_Sk: torch.Tensor, gates_Sk: torch.Tensor) -> torch.Tensor:
        """The ``eager`` implementation: a loop over experts.

        The stacks are unbound once: the backward of ``weight[e]`` would zero-fill the whole stack for every expert.
        """
        first = self.gate_up_proj if self.has_gate else self.up_proj
        ups, downs = first.unbind(0), self.down_proj.unbind(0)
        up_biases: Sequence[torch.Tensor | None] = [None] * self.num_experts
        down_biases: Sequence[torch.Tensor | None] = up_biases
        if self.has_bias:
            up_biases = (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias).unbind(0)
            down_biases = self.down_proj_bias.unbind(0)
        out_SD = torch.zeros_like(hidden_SD)
        for expert in range(self.num_experts):
            token, slot = torch.where(index_Sk == expert)
            inner = F.linear(hidden_SD[token], ups[expert], up_biases[expert])
            inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
            expert_out = F.linear(inner, downs[expert], down_biases[expert]) * gates_Sk[token, slot, None]
            out_SD.index_add_(0, token, expert_out.to(out_SD.dtype))
        return out_SD


@use_experts_implementation
class BranchMixGatedExperts(_Experts):
    """down(act(gate(x)) * up(x)), as in Llama."""


@use_experts_implementation(has_bias=True)
class BranchMixGatedBiasExperts(_Experts):
    """The same with biases."""


@use_experts_implementation(has_gate=False)
class BranchMixPlainExperts(_Experts):
    """down(act(up(x))), as in Nemotron."""


@use_experts_implementation(has_gate=False, has_bias=True)
class BranchMixPlainBiasExperts(_Experts):
    """The same with biases, as in GPT-2."""


_EXPERTS = {
    (True, False): BranchMixGatedExperts,
    (True, True): BranchMixGatedBiasExperts,
    (False, False): BranchMixPlainExperts,
    (False, True): BranchMixPlainBiasExperts,
}

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


class BranchMixSparseMoeBlock(nn.Module):
    """A block's FFN as experts: softmax, top-k, and the gated sum (BAM section 3.3)."""

    def __init__(self, config: BranchMixConfig, dense: _DenseFFN):
        super().__init__()
        self.scaling = config.routed_scaling_factor
        self.gate = BranchMixFFNRouter(
            dense.hidden_size, config.num_experts, config.num_experts_per_tok, config.norm_topk_prob
        )
        self.experts = _EXPERTS[dense.gated, dense.bias](config, dense, dense.gated)
        self.dropout = nn.Dropout(dense.dropout) if dense.dropout else nn.Identity()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., D]."""
        hidden_SD = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, gates_Sk, index_Sk = self.gate(hidden_SD)
        out_SD = self.experts(hidden_SD, index_Sk, gates_Sk * self.scaling)
        return self.dropout(out_SD.reshape(hidden_states.shape).to(hidden_states.dtype))


@dataclass
class _DenseFFN:
    """What the experts need to know of the dense FFN whose place they take."""

    hidden_size: int
    intermediate_size: int
    gated: bool
    bias: bool
    activation: nn.Module
    dropout: float

    @classmethod
    def of(cls, block: nn.Module, layout: dict[str, Any]) -> _DenseFFN:
        down: Any = block.get_submodule(layout["down"])
        intermediate_size, hidden_size = down.weight.shape if _is_conv1d(down) else down.weight.shape[::-1]
        return cls(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            gated=layout["gate"] is not None,
            bias=down.bias is not None,
            activation=block.get_submodule(layout["activation"]),
            dropout=_take_output_dropout(block.get_submodule(layout["ffn"]), "dropout", "residual_dropout"),
        )


# ---------------------------------------------------------------------------------------------------------------------
# Attention experts
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadOrder:
    """Where each expert's query heads stand in the wide attention.

    Expert KV: (expert, head). Shared KV: (kv head, expert, group), so that wide attention is plain grouped-query
    attention over the dense model's K/V heads and nothing is repeated.
    """

    num_experts: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_sharing: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """Factors of the wide head axis."""
        if self.kv_sharing:
            return (self.num_kv_heads, self.num_experts, self.num_heads // self.num_kv_heads)
        return (self.num_experts, self.num_heads)

    @property
    def expert_axis(self) -> int:
        """Which of ``sizes`` counts the experts."""
        return 1 if self.kv_sharing else 0

    @property
    def wide_heads(self) -> int:
        return self.num_experts * self.num_heads

    @property
    def wide_kv_heads(self) -> int:
        return self.num_kv_heads if self.kv_sharing else self.num_experts * self.num_kv_heads

    def of_keys(self) -> HeadOrder:
        """The order of the K/V heads, for Expert KV."""
        return HeadOrder(self.num_experts, self.num_kv_heads, self.num_kv_heads, self.head_dim, False)


class BranchMixAttention(nn.Module):
    """Mixture of Attention with soft routing (BAM section 4.1): ``sum_i g_i(x) Attn_i(x)``.

    One wide attention: ``sum_i g_i O_i H_i = [O_1 .. O_N] [g_1 H_1; ..; g_N H_N]``. ``heads`` computes all experts'
    heads, concatenated; they are gated and projected here, so that no value travels through a hidden attribute.
    """

    def __init__(self, heads: nn.Module, output: Any, order: HeadOrder, config: BranchMixConfig, dropout: float = 0.0):
        super().__init__()
        hidden_size = output.weight.shape[1] if _is_conv1d(output) else output.weight.shape[0]
        self.order = order
        self.heads = heads
        self.expert_gate = BranchMixAttentionRouter(
            hidden_size,
            config.num_experts,
            config.attention_num_experts_per_tok or config.num_experts,
            config.attention_norm_topk_prob,
        )
        self.o_proj = nn.Linear(order.wide_heads * order.head_dim, hidden_size, bias=False)
        self.o_bias = nn.Parameter(torch.empty(config.num_experts, hidden_size)) if output.bias is not None else None
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """Takes and returns what the family's attention does: output [B, T, D] and attention weights or None."""
        heads_BTHC, attention_weights = self.heads(hidden_states, *args, **kwargs)[:2]
        width = self.order.wide_heads * self.order.head_dim
        if heads_BTHC.shape[-1] != width:
            raise RuntimeError(
                f"attention handed back {heads_BTHC.shape[-1]} values a token where the experts' heads have {width}: "
                "this family cannot be widened, or its heads were sharded by a plan that does not gather them"
            )
        _, gate_BTE = self.expert_gate(hidden_states)
        gate_BTE = gate_BTE.to(heads_BTHC.dtype)
        sizes, axis = self.order.sizes, self.order.expert_axis
        # Gate and heads meet as [B, T, *sizes with 1 for all but the experts] and [B, T, *sizes with C in the last].
        gate = gate_BTE.view(
            *gate_BTE.shape[:2], *(self.order.num_experts if i == axis else 1 for i in range(len(sizes)))
        )
        gated = heads_BTHC.reshape(*gate_BTE.shape[:2], *sizes[:-1], -1) * gate
        out_BTD = self.o_proj(gated.reshape(*gate_BTE.shape[:2], width))
        if self.o_bias is not None:
            out_BTD = out_BTD + gate_BTE @ self.o_bias.to(gate_BTE.dtype)
        return self.dropout(out_BTD), attention_weights


class BranchMixExpertNorm(nn.ModuleList):
    """Query or key norm with every expert's own gains: the family's own norm, once for each expert's heads."""

    def __init__(self, norm: nn.Module, order: HeadOrder, norm_over: str, axis: int):
        super().__init__(copy.deepcopy(norm) for _ in range(order.num_experts))
        self.order = order
        self.axis = -1 if norm_over == "all" else axis

    def forward(self, wide: torch.Tensor) -> torch.Tensor:
        """[B, T, H, C], [B, H, T, C] or [B, T, H * C], as the family calls its norm; H counts all experts' heads."""
        sizes, expert_axis = self.order.sizes, self.order.expert_axis
        axis = wide.dim() + self.axis
        split = wide.unflatten(axis, (*sizes[:-1], -1)).unbind(axis + expert_axis)
        kv_sharing = len(sizes) == 3
        if kv_sharing:
            split = [part.flatten(axis, axis + 1) for part in split]
        split = [norm(part) for norm, part in zip(self, split, strict=True)]
        if kv_sharing:
            split = [part.unflatten(axis, (sizes[0], -1)) for part in split]
        return torch.stack(split, axis + expert_axis).reshape(wide.shape)


class BranchMixSplitAttention(nn.Module):
    """Heads from separate q, k and v projections, for families whose own attention cannot be widened.

    Their projections are one fused matrix (GPT-NeoX, Falcon, GPT-2, Phi-3), their code knows no grouped queries
    (OPT, GPT-J), or the experts have rotary parameters of their own.
    """

    def __init__(self, dense: nn.Module, seed_config: Any, order: HeadOrder, layout: dict[str, Any], bias: bool):
        super().__init__()
        hidden_size = seed_config.hidden_size
        self.config = seed_config
        self.layer_idx = dense.layer_idx
        self.head_dim = order.head_dim
        self.num_key_value_groups = order.wide_heads // order.wide_kv_heads
        self.num_experts = order.num_experts
        self.scaling = getattr(dense, "scaling", order.head_dim**-0.5)
        self.sliding_window = getattr(dense, "sliding_window", getattr(seed_config, "sliding_window", None))
        self.is_causal = True
        self.rotary = layout["rotary"]
        self.rotary_dim = getattr(seed_config, "rotary_dim", None) or order.head_dim
        dropout = getattr(dense, "attn_dropout", getattr(dense, "attention_dropout", getattr(dense, "dropout", 0.0)))
        self.attention_dropout = dropout.p if isinstance(dropout, nn.Dropout) else dropout
        self.q_proj = nn.Linear(hidden_size, order.wide_heads * order.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, order.wide_kv_heads * order.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, order.wide_kv_heads * order.head_dim, bias=bias)
        for name in (layout["query_norm"], layout["key_norm"]):
            if name is not None and getattr(dense, name, None) is not None:
                setattr(self, name, getattr(dense, name))
        self._norms = (layout["query_norm"], layout["key_norm"])

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: Any = None,
        position_embeddings: Any = None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, T, D] to concatenated heads [B, T, E * H * C] and attention weights or None."""
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        query_norm, key_norm = (getattr(self, name) if name and hasattr(self, name) else None for name in self._norms)
        q_BTHC, k_BTKC = self.q_proj(hidden_states).view(shape), self.k_proj(hidden_states).view(shape)
        q_BHTC = (query_norm(q_BTHC) if query_norm is not None else q_BTHC).transpose(1, 2)
        k_BKTC = (key_norm(k_BTKC) if key_norm is not None else k_BTKC).transpose(1, 2)
        v_BKTC = self.v_proj(hidden_states).view(shape).transpose(1, 2)

        if self.rotary == "interleaved":
            cos, sin = _gptj_angles(position_ids, self.rotary_dim, q_BHTC)
            q_BHTC, k_BKTC = _rotate_pairs(q_BHTC, cos, sin), _rotate_pairs(k_BKTC, cos, sin)
        elif self.rotary == "half":
            cos, sin = position_embeddings
            q_BHTC, k_BKTC = _rotate_halves(q_BHTC, cos, sin), _rotate_halves(k_BKTC, cos, sin)

        cache = past_key_values if past_key_values is not None else layer_past
        if cache is not None:
            k_BKTC, v_BKTC = cache.update(k_BKTC, v_BKTC, self.layer_idx)

        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        for name in ("use_cache", "output_attentions", "alibi"):
            kwargs.pop(name, None)
        heads, weights = attention(
            self,
            q_BHTC,
            k_BKTC,
            v_BKTC,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            position_ids=position_ids,
            **kwargs,
        )
        return heads.reshape(*hidden_states.shape[:2], -1), weights


def eager_attention_forward(
    module: Any,
    q_BHTC: torch.Tensor,
    k_BKTC: torch.Tensor,
    v_BKTC: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in plain torch, the ``eager`` implementation; returns [B, T, H, C] and the weights."""
    k_BHTC = k_BKTC.repeat_interleave(module.num_key_value_groups, dim=1)
    v_BHTC = v_BKTC.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = torch.matmul(q_BHTC, k_BHTC.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q_BHTC.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, v_BHTC).transpose(1, 2).contiguous(), weights


class BranchMixExpertRotary(nn.ModuleList):
    """The family's rotary embedding once for each expert, for experts whose rotary parameters differ."""

    def __init__(self, rotary: nn.Module, seed_config: Any, rope_parameters: list[dict[str, Any]]):
        modules = []
        for parameters in rope_parameters:
            config = copy.deepcopy(seed_config)
            config.rope_parameters = dict(parameters)
            modules.append(type(rotary)(config=config))
        super().__init__(modules)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, [B, E, T, C]."""
        pairs = [rotary(x, position_ids) for rotary in self]
        return torch.stack([cos for cos, _ in pairs], 1), torch.stack([sin for _, sin in pairs], 1)


def _rotate_halves(x_BHTC: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of pairs (c, c + C/2). cos and sin are [B, T, R], or [B, E, T, R] for experts of their own;
    only the first R channels are rotated."""
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    else:  # heads stand as (expert, head)
        heads_per_expert = x_BHTC.shape[1] // cos.shape[1]
        cos, sin = cos.repeat_interleave(heads_per_expert, 1), sin.repeat_interleave(heads_per_expert, 1)
    rotated, rest = x_BHTC[..., : cos.shape[-1]], x_BHTC[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated, rest), dim=-1)


def _gptj_angles(position_ids: torch.Tensor, rotary_dim: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of GPT-J's positions, [B, 1, T, R/2] each."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64, device=like.device) / rotary_dim
    angles = position_ids[:, None, :, None].float() * (1.0 / (10000**exponents))
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotate_pairs(x_BHTC: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of pairs (2c, 2c + 1), as in GPT-J."""
    rotary_dim = 2 * cos.shape[-1]
    even, odd = x_BHTC[..., 0:rotary_dim:2], x_BHTC[..., 1:rotary_dim:2]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((rotated, x_BHTC[..., rotary_dim:]), dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Widening a dense model
# ---------------------------------------------------------------------------------------------------------------------


def widen(model: Any, config: BranchMixConfig) -> None:
    """Replace attention and FFN of every block of a dense family model by experts, in place.

    Args:
        model: the family's causal LM, or its base model.
    """
    layout = config.layout
    if not layout:
        raise ValueError("config.layout is empty: build the config with branchmix.models.mixture_config(seed_config)")
    path = layout["layers"]
    if isinstance(model, _family_class(config.seed_config, causal_lm=False)):
        path = path.removeprefix(f"{model.base_model_prefix}.")
    blocks = model.get_submodule(path)
    for block in blocks:
        if config.has_attention_experts:
            setattr(block, layout["attention"], _widen_attention(getattr(block, layout["attention"]), config))
        if config.has_ffn_experts:
            _widen_ffn(block, config)
    if config.expert_rope_parameters is not None:
        base = getattr(model, model.base_model_prefix, model)
        base.rotary_emb = BranchMixExpertRotary(base.rotary_emb, config.seed_config, config.expert_rope_parameters)


def _family_class(seed_config: Any, *, causal_lm: bool) -> type[PreTrainedModel]:
    """The family's own model class.

    Imported here and not above: whoever imports transformers' auto classes may be registering this very module there.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    return (MODEL_FOR_CAUSAL_LM_MAPPING if causal_lm else MODEL_MAPPING)[type(seed_config)]


def _widen_ffn(block: nn.Module, config: BranchMixConfig) -> None:
    layout = config.layout
    moe = BranchMixSparseMoeBlock(config, _DenseFFN.of(block, layout))
    setattr(block, layout["ffn"], moe)
    if layout["up"] == layout["ffn"]:  # OPT keeps its FFN in the block itself: the experts do all three steps
        setattr(block, layout["activation"], nn.Identity())
        setattr(block, layout["down"], nn.Identity())


def _widen_attention(dense: nn.Module, config: BranchMixConfig) -> BranchMixAttention:
    layout, seed_config = config.layout, config.seed_config
    order = _head_order(dense, config)
    output = getattr(dense, layout["output"])
    dropout = _take_output_dropout(dense, "resid_dropout", "residual_dropout")
    if layout["attention_code"] == "split":
        bias = getattr(dense, layout["fused_qkv"] or layout["query"]).bias is not None
        heads: nn.Module = BranchMixSplitAttention(dense, seed_config, order, layout, bias)
    else:
        heads = dense
        setattr(heads, layout["output"], nn.Identity())
        for name, num_heads in (
            (layout["query"], order.wide_heads),
            (layout["key"], order.wide_kv_heads),
            (layout["value"], order.wide_kv_heads),
        ):
            projection = getattr(dense, name)
            wide = nn.Linear(projection.in_features, num_heads * order.head_dim, bias=projection.bias is not None)
            setattr(heads, name, wide)
        for name, value in (
            ("num_heads", order.wide_heads),
            ("num_attention_heads", order.wide_heads),
            ("num_key_value_heads", order.wide_kv_heads),
            ("num_key_value_groups", order.wide_heads // order.wide_kv_heads),
        ):
            if hasattr(heads, name):
                setattr(heads, name, value)
    _widen_norms(heads, order, layout)
    return BranchMixAttention(heads, output, order, config, dropout)


def _take_output_dropout(module: nn.Module, *names: str) -> float:
    """The dropout on a dense module's output, taken out of it: it belongs behind the sum over experts.

    Families keep it as a module (GPT-2) or as a number (Starcoder2).
    """
    for name in names:
        dropout = getattr(module, name, None)
        if isinstance(dropout, nn.Dropout):
            setattr(module, name, nn.Identity())
            return dropout.p
        if isinstance(dropout, float):
            setattr(module, name, 0.0)
            return dropout
    return 0.0


def _widen_norms(heads: nn.Module, order: HeadOrder, layout: dict[str, Any]) -> None:
    axis = -2 if layout["attention_code"] == "split" else layout["norm_axis"]
    for name, of_keys in ((layout["query_norm"], False), (layout["key_norm"], True)):
        norm = getattr(heads, name, None) if name else None
        if norm is None or (of_keys and order.kv_sharing):  # one K for all experts has one norm
            continue
        norm_order = order.of_keys() if of_keys else order
        setattr(heads, name, BranchMixExpertNorm(norm, norm_order, layout["norm_over"], axis))


def _head_order(dense: nn.Module, config: BranchMixConfig) -> HeadOrder:
    layout, seed_config = config.layout, config.seed_config
    num_heads = seed_config.num_attention_heads
    head_dim = getattr(dense, "head_dim", None) or getattr(seed_config, "head_dim", None)
    head_dim = head_dim or seed_config.hidden_size // num_heads
    if layout["fused_qkv"] is None:
        num_heads = getattr(dense, layout["query"]).out_features // head_dim
        num_kv_heads = getattr(dense, layout["key"]).out_features // head_dim
    else:
        num_kv_heads = getattr(dense, "num_kv_heads", getattr(seed_config, "num_key_value_heads", None)) or num_heads
    return HeadOrder(config.num_experts, num_heads, num_kv_heads, head_dim, config.attention == "kv_sharing")


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's layer, whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D"


# ---------------------------------------------------------------------------------------------------------------------
# Sharding over devices
# ---------------------------------------------------------------------------------------------------------------------


def parallel_plans(
    model: nn.Module, layers: str, layout: dict[str, Any], inherited: dict[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Rules for tensor and for expert parallelism, by module name with ``*`` for the layer.

    The family's rules stay but for what was replaced in its blocks. The experts' heads are sharded where they are
    stored and gathered where they are computed, as transformers does for Phi-3: a rank's slice of heads would meet the
    gates of other experts. FFN experts are cut along their inner width, but those with biases stay whole, since each
    rank would add the bias of its own.

    Args:
        model: a mixture.
        layers: path of its list of blocks.
        layout: of its config.
        inherited: the tensor-parallel rules that its family's model brings along.
    """
    first = model.get_submodule(layers)[0]  # type: ignore[index]
    attention, ffn = getattr(first, layout["attention"]), getattr(first, layout["ffn"])
    replaced, tensor_rules, expert_rules = [], {}, {}
    if isinstance(attention, BranchMixAttention):
        replaced.append(layout["attention"])
        for name, module in attention.heads.named_children():
            if isinstance(module, nn.Linear):
                tensor_rules[f"{layout['attention']}.heads.{name}"] = "colwise_gather_output"
        tensor_rules[f"{layout['attention']}.o_proj"] = "rowwise_split_input"
    if isinstance(ffn, BranchMixSparseMoeBlock):
        replaced += [layout["ffn"], layout["down"]]
        path = f"{layout['ffn']}.experts"
        names = [name for name, _ in ffn.experts.named_parameters()]
        if not ffn.experts.has_bias:
            styles = {"gate_up_proj": "packed_colwise", "up_proj": "colwise", "down_proj": "rowwise"}
            tensor_rules |= {f"{path}.{name}": styles[name] for name in names} | {path: "moe_tp_experts"}
        expert_rules = {f"{path}.{name}": "grouped_gemm" for name in names} | {path: "ep_dispatch_experts"}
    block = f"{layers}.*."
    kept = {
        rule: style
        for rule, style in inherited.items()
        if not any(f"{rule}.".startswith(f"{block}{module}.") for module in replaced)
    }
    tensor_rules = kept | {block + rule: style for rule, style in tensor_rules.items()}
    return tensor_rules, {block + rule: style for rule, style in expert_rules.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class BranchMixModelOutputWithPast(MoeModelOutputWithPast):
    """The usual outputs, and one [B * T, E] tensor a layer for each kind of router, if asked for."""

    attention_router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class BranchMixCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """The usual outputs, both routers' logits if asked for, and the losses of the FFN router (``aux_loss``,
    ``z_loss``, summed over layers and not weighted) when they were computed. ``loss`` contains them, weighted."""

    z_loss: torch.Tensor | None = None
    attention_router_logits: tuple[torch.Tensor, ...] | None = None


class BranchMixPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation of mixtures. Tensor names are those of the seed's causal LM behind
    ``model.``; inside a block, attention is ``heads`` (all experts' heads), ``o_proj`` and ``expert_gate``."""

    config_class = BranchMixConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Routers N(0, initializer_range^2), experts like the family's other matrices, biases zero."""
        seed_config = self.config.seed_config
        std = getattr(seed_config, "initializer_range", None) or getattr(seed_config, "init_std", None) or 0.02
        for module in self.modules():
            if getattr(module, "_is_hf_initialized", False):
                continue
            if isinstance(module, BranchMixRouter):
                init.normal_(module.weight, std=self.config.initializer_range)
            elif isinstance(module, _Experts):
                for name, parameter in module.named_parameters(recurse=False):
                    init.zeros_(parameter) if name.endswith("_bias") else init.normal_(parameter, std=std)
            elif isinstance(module, BranchMixAttention) and module.o_bias is not None:
                init.zeros_(module.o_bias)
        super().initialize_weights()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As usual, with this code beside the weights, so that the folder loads where branchmix is not installed."""
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            for name in CODE_FILES:
                shutil.copyfile(Path(__file__).with_name(name), Path(save_directory) / name)

    def get_input_embeddings(self) -> nn.Module:
        return self._family.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self._family.set_input_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As usual; families that keep the vocabulary's size in an attribute compute their loss by it."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if hasattr(self._family, "vocab_size"):
            self._family.vocab_size = self.config.seed_config.vocab_size
        return embeddings

    @property
    def _family(self) -> PreTrainedModel:
        """The seed family's own model inside."""
        raise AttributeError("only models with weights have a family model")

    @contextmanager
    def _recorded_routers(self, wanted: bool) -> Iterator[dict[str, list[torch.Tensor]]]:
        """Logits of both kinds of routers, layer by layer, of the forward pass inside the block."""
        logits: dict[str, list[torch.Tensor]] = {"ffn": [], "attention": []}
        hooks = []
        if wanted:
            for module in self.modules():
                if isinstance(module, BranchMixRouter):
                    kind = "ffn" if isinstance(module, BranchMixFFNRouter) else "attention"
                    hooks.append(module.register_forward_hook(_recorder(logits[kind])))
        try:
            yield logits
        finally:
            for hook in hooks:
                hook.remove()


def _recorder(logits: list[torch.Tensor]) -> Callable[..., None]:
    def record(module: nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> None:
        logits.append(output[0].flatten(0, -2))

    return record


class BranchMixModel(BranchMixPreTrainedModel):
    """The mixture without its language-modelling head: the seed family's base model, widened."""

    def __init__(self, config: BranchMixConfig):
        super().__init__(config)
        family_model = _family_class(config.seed_config, causal_lm=False)(config.seed_config)
        widen(family_model, config)
        # Under the name that the family's causal LM gives it, so that both classes share one set of tensor names.
        self._family_prefix = family_model.base_model_prefix
        self.add_module(self._family_prefix, family_model)
        self.post_init()
        self._tp_plan, self._ep_plan = parallel_plans(self, config.layout["layers"], config.layout, dict(self.tp_plan))

    @property
    def _family(self) -> PreTrainedModel:
        return getattr(self, self._family_prefix)

    def forward(
        self, input_ids: torch.Tensor | None = None, output_router_logits: bool | None = None, **kwargs: Any
    ) -> BranchMixModelOutputWithPast:
        """As the family's base model; ``output_router_logits`` adds both routers' logits."""
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        kwargs.pop("return_dict", None)
        with self._recorded_routers(wanted) as logits:
            outputs = self._family(input_ids=input_ids, return_dict=True, **kwargs)
        return BranchMixModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            router_logits=tuple(logits["ffn"]) or None,
            attention_router_logits=tuple(logits["attention"]) or None,
        )


class BranchMixForCausalLM(BranchMixPreTrainedModel, GenerationMixin):
    """A language model of attention experts and FFN experts: the seed family's own causal LM, widened."""

    def __init__(self, config: BranchMixConfig):
        super().__init__(config)
        self.model = _family_class(config.seed_config, causal_lm=True)(config.seed_config)
        widen(self.model, config)
        self.post_init()
        layers = f"model.{config.layout['layers']}"
        self._tp_plan, self._ep_plan = parallel_plans(self, layers, config.layout, dict(self.tp_plan))

    @property
    def _family(self) -> PreTrainedModel:
        return self.model

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.model.get_decoder()

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The family's own: Phi-3 drops its cache there where its rotary factors change."""
        return self.model.prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> BranchMixCausalLMOutputWithPast:
        """As the family's causal LM, with BAM's losses (eq. 2) added to ``loss``.

        The router losses are added while training, and whenever router logits are asked for; otherwise ``loss`` is
        the plain negative log-likelihood, so that an evaluation measures what it says.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 0 for padding, which counts in no loss.
            position_ids: as the family has it. ``generate`` looks for this name, ``inputs_embeds`` and
                ``logits_to_keep`` in the signature: without it left padding shifts learned positions.
            past_key_values, inputs_embeds, use_cache, logits_to_keep: as the family has them.
            labels: [B, T], -100 where no loss is wanted.
            output_router_logits: return ``router_logits`` and ``attention_router_logits``, [B * T, E] for each layer.
            **kwargs: what the family takes. ``num_items_in_batch`` (from ``Trainer``) is the number of labels of the
                whole accumulated batch; the router losses are then weighted by this micro-batch's share of it.
        """
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        add_losses = labels is not None and (self.training or wanted)
        if self.training and labels is None and kwargs.get("num_items_in_batch") is not None:
            logger.warning_once(
                "Trainer computes the loss itself (label smoothing or compute_loss_func) and passes no labels: the "
                "mixture cannot add its router losses"
            )
        kwargs.pop("return_dict", None)
        with self._recorded_routers(wanted or add_losses) as logits:
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                return_dict=True,
                **kwargs,
            )
        loss, aux_loss, z_loss = outputs.loss, None, None
        if wanted or add_losses:
            extra, aux_loss, z_loss = self._router_losses(logits, attention_mask)
            if labels is not None and add_losses and extra is not None:
                share = _share_of_batch(labels, kwargs.get("shift_labels"), kwargs.get("num_items_in_batch"))
                loss = loss + (extra * share).to(loss.device)
        return BranchMixCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            z_loss=z_loss,
            logits=outputs.logits,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            router_logits=tuple(logits["ffn"]) or None if wanted else None,
            attention_router_logits=tuple(logits["attention"]) or None if wanted else None,
        )

    def _router_losses(
        self, logits: dict[str, list[torch.Tensor]], attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Weighted sum of all router losses, and the FFN router's balance and z-loss, each summed over layers.

        The attention router has losses only when it is top-k: soft routing balances itself (section 4.1).
        """
        config = self.config
        extra = aux_loss = z_loss = None
        for kind, top_k in (("ffn", config.num_experts_per_tok), ("attention", config.attention_num_experts_per_tok)):
            if not logits[kind] or top_k is None:
                continue
            balance, z = router_losses(logits[kind], top_k, attention_mask)
            weighted = config.router_aux_loss_coef * balance + config.router_z_loss_coef * z
            extra = weighted if extra is None else extra + weighted.to(extra.device)
            if kind == "ffn":
                aux_loss, z_loss = balance, z
        return extra, aux_loss, z_loss


def _share_of_batch(labels: torch.Tensor, shift_labels: torch.Tensor | None, num_items_in_batch: Any) -> float:
    """This micro-batch's share of the accumulated batch: ``Trainer`` divides no term by the accumulation steps.

    Counts what ``Trainer`` counts: labels that are predicted, so not each row's first.
    """
    if num_items_in_batch is None:
        return 1.0
    predicted = labels[:, 1:] if shift_labels is None else shift_labels
    return (predicted != -100).sum() / num_items_in_batch


__all__ = ["BranchMixForCausalLM", "BranchMixModel", "BranchMixPreTrainedModel"]

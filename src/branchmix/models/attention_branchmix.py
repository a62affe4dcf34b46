"""Attention experts: all experts' heads in one call, gated and projected outside; or, with top-k routing, the heads of
each token's chosen experts only. Saved with every checkpoint.

Shapes: B batch, T tokens, S = B * T, D model width, E experts, k experts chosen for a token, H query heads and K
key/value heads of one expert, G = H / K, C head dimension; J pieces of an expert's heads, P = S * k.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .chosen_branchmix import Chosen, combine, project
from .chunked_branchmix import AUTOMATIC, CHUNKED
from .configuration_branchmix import BranchMixConfig
from .linear_branchmix import BranchMixLinear
from .low_rank_branchmix import BranchMixLowRankHeads, BranchMixLowRankOutputs
from .routing_branchmix import BranchMixAttentionRouter

Ranks = dict[str, list[int]] | None
"""Ranks of the experts' changes of each matrix of a layer; None for experts with whole matrices."""


@dataclass(frozen=True)
class HeadOrder:
    """The order of the experts' query heads in the wide attention.

    Expert KV: (expert, head). Shared KV: (kv head, expert, group), so that wide attention is plain grouped-query
    attention over the dense model's K/V heads and nothing is repeated.
    """

    num_experts: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_sharing: bool

    @property
    def wide_heads(self) -> int:
        return self.num_experts * self.num_heads

    @property
    def wide_kv_heads(self) -> int:
        return self.num_kv_heads if self.kv_sharing else self.num_experts * self.num_kv_heads

    @property
    def pieces(self) -> tuple[int, int, int]:
        """J, E, and the channels of a piece: an expert's heads are J stretches of the wide axis [J * E * channels]."""
        num_pieces = self.num_kv_heads if self.kv_sharing else 1
        return num_pieces, self.num_experts, self.num_heads // num_pieces * self.head_dim

    def of_keys(self) -> HeadOrder:
        """The order of the K/V heads, for Expert KV."""
        return HeadOrder(self.num_experts, self.num_kv_heads, self.num_kv_heads, self.head_dim, False)


class BranchMixQueries(BranchMixLinear):
    """Queries of all experts' heads; of the chosen experts' heads only, slot by slot, while ``chosen`` is given."""

    chosen: Chosen | None = None

    def __init__(self, hidden_size: int, order: HeadOrder, bias: bool):
        super().__init__(hidden_size, order.wide_heads * order.head_dim, bias=bias)
        self.order = order

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D] to [B, T, E * H * C], or [B, T, k * H * C] ordered (piece, slot, channel)."""
        if self.chosen is None:
            return super().forward(x_BTD)
        pieces = self.order.pieces
        bias_JEO = None if self.bias is None else self.bias.view(pieces)
        q_SkJO = project(x_BTD.flatten(0, 1), self.weight.view(*pieces, -1), bias_JEO, self.chosen)
        return q_SkJO.transpose(1, 2).reshape(*x_BTD.shape[:2], -1)


class BranchMixOutputs(BranchMixLinear):
    """Output projections of all experts' heads, summed; of the chosen experts' heads only, if ``chosen`` is given."""

    def __init__(self, hidden_size: int, order: HeadOrder):
        super().__init__(order.wide_heads * order.head_dim, hidden_size, bias=False)
        self.order = order

    def forward(self, x: torch.Tensor, chosen: Chosen | None = None) -> torch.Tensor:
        """[B, T, E * H * C] to [B, T, D]; or [S, k, J, O] to [S, D]."""
        if chosen is None:
            return super().forward(x)
        return combine(x, self.weight.unflatten(1, self.order.pieces).permute(1, 2, 3, 0), chosen)


LEAST_SAVED = {"fp32": (1 << 24, 1 << 26), "bf16": (1 << 28, 1 << 28)}
"""For Shared KV and for Expert KV: multiplications of a layer's queries and outputs that must be saved for the chosen
experts' heads to be computed alone, on a CPU. Found on a core with AMX; measured again without (docs/speed.md)."""
FEW_ROWS = {"fp32": 16, "bf16": 64}
"""Rows of a product that cost what reading its matrix costs: fewer tokens count as so many."""
ANY_HEADS = ("eager", "sdpa", AUTOMATIC, CHUNKED, "flash_attention_2", "flash_attention_3")
"""Attention that takes any number of query heads over the K/V heads."""
OF_CHOSEN_KEYS = (AUTOMATIC, CHUNKED)
"""Attention in which a token's heads see the keys of their own expert."""


def choosing_pays(order: HeadOrder, top_k: int, *, rows: int, hidden_size: int, precision: str) -> bool:
    """Whether a CPU computes the chosen experts' heads of so many tokens faster alone, in ``fp32`` or ``bf16``."""
    unchosen = (order.num_experts - top_k) * order.num_heads * order.head_dim
    saved = max(FEW_ROWS[precision], rows) * 2 * unchosen * hidden_size
    return saved >= LEAST_SAVED[precision][0 if order.kv_sharing else 1]


_ONE_THREAD = threading.RLock()
"""Held while a module computes other heads than another thread may want of it."""


class BranchMixAttention(nn.Module):
    """Mixture of Attention (BAM section 4.1): ``sum_i g_i(x) Attn_i(x)``.

    One wide attention: ``sum_i g_i O_i H_i = [O_1 .. O_N] [g_1 H_1; ..; g_N H_N]``. ``heads`` computes all experts'
    heads, concatenated; they are gated and projected here. With top-k routing most gates are 0: then ``heads`` computes
    k experts' heads for each token, where that is faster, and the same code sees k * H heads instead of E * H.
    """

    sparse: bool | None = None
    """With top-k routing: whether only the chosen experts' heads are computed. None: where that was measured to be
    faster. True still computes all where it must: see ``_computes_chosen_only``."""

    def __init__(
        self,
        heads: nn.Module,
        output: Any,
        order: HeadOrder,
        config: BranchMixConfig,
        dropout: float = 0.0,
        ranks: Ranks = None,
    ):
        super().__init__()
        hidden_size = output.weight.shape[1] if is_conv1d(output) else output.weight.shape[0]
        self.order = order
        self.heads = heads
        self.expert_gate = BranchMixAttentionRouter(
            hidden_size,
            config.num_experts,
            config.attention_num_experts_per_tok or config.num_experts,
            config.attention_norm_topk_prob,
            config.domain_router,
        )
        self.o_proj = (
            BranchMixOutputs(hidden_size, order)
            if ranks is None
            else BranchMixLowRankOutputs(hidden_size, order, ranks["o"])
        )
        split = config.layout["attention_code"] == "split"
        self._queries = "q_proj" if split else config.layout["query"]
        self._query_norm = config.layout["query_norm"]
        self.o_bias = nn.Parameter(torch.empty(config.num_experts, hidden_size)) if output.bias is not None else None
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """Takes and returns what the family's attention does: output [B, T, D] and attention weights or None."""
        if self.order.num_experts == 1:  # its gate is 1: see ``keep_experts``
            heads_BTHC, attention_weights = self._heads(None, hidden_states, *args, **kwargs)
            out_BTD = self.o_proj(heads_BTHC)
            return self.dropout(out_BTD if self.o_bias is None else out_BTD + self.o_bias[0]), attention_weights
        _, gate_BTE = self.expert_gate(hidden_states)
        chosen, gates_BTk = None, gate_BTE
        if self._computes_chosen_only(hidden_states, kwargs.get("attention_mask")):
            gates_BTk, index_BTk = gate_BTE.topk(self.expert_gate.top_k, dim=-1)
            chosen = Chosen(index_BTk, self.order.num_experts)
        heads_BTHC, attention_weights = self._heads(chosen, hidden_states, *args, **kwargs)
        gate_BTE = gate_BTE.to(heads_BTHC.dtype)
        if chosen is None:
            gated_BTJEO = heads_BTHC.unflatten(-1, self.order.pieces) * gate_BTE[:, :, None, :, None]
            out_BTD = self.o_proj(gated_BTJEO.flatten(2))
        else:
            num_pieces, _, channels = self.order.pieces
            heads_SkJO = heads_BTHC.reshape(-1, num_pieces, chosen.top_k, channels).transpose(1, 2)
            gates_Sk11 = gates_BTk.to(heads_SkJO.dtype).view(-1, chosen.top_k, 1, 1)
            out_BTD = self.o_proj(heads_SkJO * gates_Sk11, chosen).view(*hidden_states.shape[:2], -1)
        if self.o_bias is not None:
            out_BTD = out_BTD + gate_BTE @ self.o_bias.to(gate_BTE.dtype)
        return self.dropout(out_BTD), attention_weights

    def _heads(self, chosen: Chosen | None, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """All experts' heads [B, T, E * H * C] or the chosen ones' [B, T, k * H * C], and attention weights or None."""
        alone = _ONE_THREAD if self._may_choose() else nullcontext()
        with alone, nullcontext() if chosen is None else self._only(chosen):
            heads_BTHC, attention_weights = self.heads(*args, **kwargs)[:2]
        num_experts = self.order.num_experts if chosen is None else chosen.top_k
        width = num_experts * self.order.num_heads * self.order.head_dim
        if heads_BTHC.shape[-1] != width:
            raise RuntimeError(
                f"attention handed back {heads_BTHC.shape[-1]} values a token where the experts' heads have {width}: "
                "this family cannot be widened, or its heads were sharded by a plan that does not gather them"
            )
        return heads_BTHC, attention_weights

    @contextmanager
    def _only(self, chosen: Chosen) -> Iterator[None]:
        """While the family's code runs, its queries and their norm are those of the chosen experts, and it counts their
        heads; with Expert KV ``heads`` has the choice too, for attention and rotary positions."""
        parts = [getattr(self.heads, self._queries)]
        norm = getattr(self.heads, self._query_norm, None) if self._query_norm else None
        if isinstance(norm, BranchMixExpertNorm):
            parts.append(norm)
        if not self.order.kv_sharing:
            parts.append(self.heads)
        _set_head_counts(self.heads, chosen.top_k, self.order)
        for part in parts:
            part.chosen = chosen
        try:
            yield
        finally:
            for part in parts:
                part.chosen = None
            _set_head_counts(self.heads, self.order.num_experts, self.order)

    def _may_choose(self) -> bool:
        all_of_them = self.expert_gate.top_k == self.order.num_experts
        return not (self.sparse is False or all_of_them or torch.compiler.is_compiling())

    def _computes_chosen_only(self, hidden_states: torch.Tensor, mask: Any) -> bool:
        """Whether only the chosen experts' heads are computed, and not all of them with gates of 0.

        Never where shapes have to be static (``torch.compile``), where attention wants the heads that the config
        counts (vLLM) or each head has its own mask, and where the projections are not plain matrices of all experts:
        LoRA, quantisation, tensor parallelism.
        """
        order, top_k = self.order, self.expert_gate.top_k
        if not self._may_choose():
            return False
        heads: Any = self.heads
        if heads.config._attn_implementation not in (ANY_HEADS if order.kv_sharing else OF_CHOSEN_KEYS):
            return False
        if isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.shape[1] > 1:
            return False
        queries = getattr(heads, self._queries)
        low_rank = isinstance(queries, BranchMixLowRankHeads) and isinstance(self.o_proj, BranchMixLowRankOutputs)
        if not low_rank and not (isinstance(queries, BranchMixQueries) and isinstance(self.o_proj, BranchMixOutputs)):
            return False
        if any(type(parameter) is not nn.Parameter for parameter in (*queries.parameters(), *self.o_proj.parameters())):
            return False
        if self.sparse:
            return True
        if hidden_states.device.type != "cpu":
            return False
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_states.dtype
        precision = "bf16" if autocast.itemsize < 4 else "fp32"
        rows, width = hidden_states.shape[:-1].numel(), hidden_states.shape[-1]
        return choosing_pays(order, top_k, rows=rows, hidden_size=width, precision=precision)


class BranchMixExpertNorm(nn.ModuleList):
    """Query or key norm with every expert's own gains: the family's own norm, once for each expert's heads."""

    chosen: Chosen | None = None

    def __init__(self, norm: nn.Module, order: HeadOrder, norm_over: str, axis: int):
        super().__init__(copy.deepcopy(norm) for _ in range(order.num_experts))
        self.order = order
        self.axis = -1 if norm_over == "all" else axis

    def forward(self, wide: torch.Tensor) -> torch.Tensor:
        """[B, T, H, C], [B, H, T, C] or [B, T, H * C], as the family calls its norm; H counts all experts' heads, or
        those of the chosen experts."""
        if self.chosen is not None:
            return self._of_chosen(wide, self.chosen)
        num_pieces, num_experts, _ = self.order.pieces
        axis = wide.dim() + self.axis
        split = wide.unflatten(axis, (num_pieces, num_experts, -1)).unbind(axis + 1)
        normed = [norm(part.flatten(axis, axis + 1)) for norm, part in zip(self, split, strict=True)]
        return torch.stack([part.unflatten(axis, (num_pieces, -1)) for part in normed], axis + 1).reshape(wide.shape)

    def _of_chosen(self, wide: torch.Tensor, chosen: Chosen) -> torch.Tensor:
        num_pieces, _, channels = self.order.pieces
        x_BTX = wide.transpose(1, 2) if self.axis == -3 else wide
        x_SJkO = x_BTX.reshape(-1, num_pieces, chosen.top_k, channels)
        x_PHC = chosen.sorted(x_SJkO.transpose(1, 2).reshape(-1, self.order.num_heads, self.order.head_dim))
        normed = []
        for norm, x_nHC in zip(self, x_PHC.split(chosen.counts), strict=True):  # also of no rows: its gradient is 0
            if self.axis == -1:
                normed.append(norm(x_nHC.flatten(1)))
            elif self.axis == -2:
                normed.append(norm(x_nHC[None])[0].flatten(1))
            else:
                normed.append(norm(x_nHC.transpose(0, 1)[None])[0].transpose(0, 1).flatten(1))
        y_SkJO = chosen.unsorted(torch.cat(normed)).view(-1, chosen.top_k, num_pieces, channels)
        y_BTX = y_SkJO.transpose(1, 2).reshape(x_BTX.shape)
        return y_BTX.transpose(1, 2) if self.axis == -3 else y_BTX


class BranchMixSplitAttention(nn.Module):
    """Heads from separate q, k and v projections, for families whose own attention cannot be widened.

    Their projections are one fused matrix (GPT-NeoX, Falcon, GPT-2, Phi-3), their code knows no grouped queries
    (OPT, GPT-J), or the experts have different rotary parameters.
    """

    chosen: Chosen | None = None

    def __init__(
        self, dense: nn.Module, seed_config: Any, order: HeadOrder, layout: dict[str, Any], bias: bool, ranks: Ranks
    ):
        super().__init__()
        hidden_size = seed_config.hidden_size
        self.config = seed_config
        self.layer_idx = dense.layer_idx
        self.head_dim = order.head_dim
        self.num_key_value_groups = order.wide_heads // order.wide_kv_heads
        self.scaling = getattr(dense, "scaling", order.head_dim**-0.5)
        self.sliding_window = getattr(dense, "sliding_window", getattr(seed_config, "sliding_window", None))
        self.is_causal = True
        self.rotary = layout["rotary"]
        self.rotary_dim = getattr(seed_config, "rotary_dim", None) or order.head_dim
        dropout = getattr(dense, "attn_dropout", getattr(dense, "attention_dropout", getattr(dense, "dropout", 0.0)))
        self.attention_dropout = dropout.p if isinstance(dropout, nn.Dropout) else dropout
        self.q_proj = _projection("q", hidden_size, order, bias, ranks)
        self.k_proj = _projection("k", hidden_size, order, bias, ranks)
        self.v_proj = _projection("v", hidden_size, order, bias, ranks)
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
            k_BKTC = _rotate_halves(k_BKTC, cos, sin)
            if self.chosen is not None and cos.dim() == 4:
                cos, sin = self.chosen.of_chosen(cos), self.chosen.of_chosen(sin)
            q_BHTC = _rotate_halves(q_BHTC, cos, sin)

        cache = past_key_values if past_key_values is not None else layer_past
        if cache is not None:
            k_BKTC, v_BKTC = cache.update(k_BKTC, v_BKTC, self.layer_idx)

        # Not above: transformers may be importing this module while it imports that one.
        from transformers.models.llama.modeling_llama import eager_attention_forward

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


class BranchMixExpertRotary(nn.ModuleList):
    """The family's rotary embedding once for each expert, for experts whose rotary parameters differ.

    Among an expert's parameters may be keys that its config has beside them: some types scale by the number of
    positions. Without them the seed's count, as in mixtures that were saved before these keys were.
    """

    def __init__(self, rotary: nn.Module, seed_config: Any, rope_parameters: list[dict[str, Any]]):
        modules = []
        for parameters in rope_parameters:
            config, own = copy.deepcopy(seed_config), dict(parameters)
            if "max_position_embeddings" in own:
                config.max_position_embeddings = own.pop("max_position_embeddings")
            if hasattr(config, "original_max_position_embeddings") and "original_max_position_embeddings" in own:
                config.original_max_position_embeddings = own["original_max_position_embeddings"]  # Phi-3: counts more
            config.rope_parameters = own
            modules.append(type(rotary)(config=config))
        super().__init__(modules)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, [B, E, T, C]."""
        pairs = [rotary(x, position_ids) for rotary in self]
        return torch.stack([cos for cos, _ in pairs], 1), torch.stack([sin for _, sin in pairs], 1)


def _rotate_halves(x_BHTC: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of pairs (c, c + C/2). cos and sin are [B, T, R], or [B, E, T, R] if experts differ; only the
    first R channels are rotated."""
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    else:  # heads are ordered (expert, head)
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


def widen_attention(dense: nn.Module, config: BranchMixConfig, layer: int) -> BranchMixAttention:
    layout, seed_config, ranks = config.layout, config.seed_config, config.ranks_of(layer)
    kv_sharing, num_kv_heads = config.attention == "kv_sharing", config.num_key_value_heads
    num_kv_heads = num_kv_heads if kv_sharing else num_kv_heads // config.num_experts
    head_dim = getattr(dense, "head_dim", None) or config.head_dim
    order = HeadOrder(config.num_experts, seed_config.num_attention_heads, num_kv_heads, head_dim, kv_sharing)
    output = getattr(dense, layout["output"])
    dropout = take_output_dropout(dense, "resid_dropout", "residual_dropout")
    if layout["attention_code"] == "split":
        bias = getattr(dense, layout["fused_qkv"] or layout["query"]).bias is not None
        heads: nn.Module = BranchMixSplitAttention(dense, seed_config, order, layout, bias, ranks)
    else:
        heads = dense
        setattr(heads, layout["output"], nn.Identity())
        for role, name in (("q", layout["query"]), ("k", layout["key"]), ("v", layout["value"])):
            own = getattr(dense, name)
            setattr(heads, name, _projection(role, own.in_features, order, own.bias is not None, ranks))
        _set_head_counts(heads, order.num_experts, order)
    _widen_norms(heads, order, layout)
    return BranchMixAttention(heads, output, order, config, dropout, ranks)


def _projection(role: str, inputs: int, order: HeadOrder, bias: bool, ranks: Ranks) -> nn.Module:
    """Queries, keys or values of all experts; one k and v for all of them with Shared KV."""
    if ranks is not None and (role == "q" or not order.kv_sharing):
        return BranchMixLowRankHeads(inputs, order if role == "q" else order.of_keys(), ranks[role], bias)
    if role == "q":
        return BranchMixQueries(inputs, order, bias)
    return BranchMixLinear(inputs, order.wide_kv_heads * order.head_dim, bias=bias)


def _set_head_counts(heads: nn.Module, num_experts: int, order: HeadOrder) -> None:
    """Tell the family's code how many heads it computes where it asks its attributes: the query heads of
    ``num_experts`` experts, over the K/V heads of all."""
    num_heads, group = num_experts * order.num_heads, order.num_heads // order.num_kv_heads
    counts = {
        "num_heads": num_heads,
        "num_attention_heads": num_heads,
        "num_key_value_heads": order.wide_kv_heads,
        "num_key_value_groups": group * num_experts if order.kv_sharing else group,
    }
    for name, value in counts.items():
        if hasattr(heads, name):
            setattr(heads, name, value)


def _widen_norms(heads: nn.Module, order: HeadOrder, layout: dict[str, Any]) -> None:
    axis = -2 if layout["attention_code"] == "split" else layout["norm_axis"]
    for name, of_keys in ((layout["query_norm"], False), (layout["key_norm"], True)):
        norm = getattr(heads, name, None) if name else None
        if norm is None or (of_keys and order.kv_sharing):  # one K for all experts has one norm
            continue
        norm_order = order.of_keys() if of_keys else order
        setattr(heads, name, BranchMixExpertNorm(norm, norm_order, layout["norm_over"], axis))


def take_output_dropout(module: nn.Module, *names: str) -> float:
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


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's layer, whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D"

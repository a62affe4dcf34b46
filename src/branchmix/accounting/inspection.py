"""``inspect``: count a model from its config, or from its weights if its family is unknown."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from branchmix.accounting.formulas import (
    DTYPE_BYTES,
    Flops,
    ParameterCounts,
    active_parameters,
    check_context,
    configured_positions,
    decoding_bytes,
    dtype_of,
    flops_of,
    kv_bytes_per_layer,
    notices_of_positions,
    parameters,
    windows,
)
from branchmix.accounting.shape import Shape, shape_of
from branchmix.checkpoint.families import Config, entry_of, families, is_tied, model_type_of, nearest, why_unfit
from branchmix.checkpoint.hub import expanded, is_there, resolve
from branchmix.checkpoint.index import CheckpointIndex, read_config, read_json_object, require_folder
from branchmix.checkpoint.json_text import read_object
from branchmix.checkpoint.tying import as_stored, head_and_embeddings
from branchmix.errors import BranchMixError, CheckpointError, short

DEFAULT_CONTEXT = 4096
"""Tokens of context when none is asked for; a model of fewer positions gets its own number."""


@dataclass(frozen=True)
class Accounting:
    """Size and cost of a model, the result of ``inspect``."""

    model: str
    """The argument: a path, a Hub id, or ``config`` for a dict."""
    model_type: str
    source: Literal["config", "weights"]
    """What parameters were counted from: the config by formula, or, for a family without one, the weights' headers."""
    shape: Shape | None
    """None when counted from the weights of a model that the formulas cannot describe."""
    context: int
    dtype: str
    total: ParameterCounts
    active: ParameterCounts
    flops: Flops | None
    stored: int | None
    """Parameters in the folder's safetensors headers, buffers and tied copies left out; None: no weights were read."""
    notices: tuple[str, ...]
    """One line each, for people; the command prints them on stderr."""
    lossless: bool | None = None
    """With its gates forced to one expert, the mixture computes exactly what that dense model does: as ``upcycle``
    found when it wrote the folder. None: not a mixture, or trained since."""

    @property
    def kv_cache_bytes_per_token(self) -> int | None:
        """What one token adds to the KV cache."""
        return self.shape.sizes.num_layers * kv_bytes_per_layer(self.shape, self.dtype) if self.shape else None

    @property
    def kv_cache_bytes(self) -> int | None:
        """KV cache of one sequence of ``context`` tokens; layers with a sliding window hold no more than the window."""
        if self.shape is None:
            return None
        tokens = sum(self.context if size is None else min(self.context, size) for size in windows(self.shape))
        return tokens * kv_bytes_per_layer(self.shape, self.dtype)

    @property
    def decoding_bytes(self) -> int | None:
        """Weights and KV cache that are read to generate one token behind ``context`` others."""
        return decoding_bytes(self.shape, self.context, self.dtype) if self.shape and self.source == "config" else None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters in ``dtype``."""
        return self.total.total * DTYPE_BYTES[self.dtype]

    def as_dict(self) -> dict[str, Any]:
        """The JSON of ``branchmix inspect --json``. Each key is documented at the field or property used here.

        ``flops_per_token`` has Table 7's convention at its top: one layer, no embeddings. ``per_layer`` repeats it
        with its components, ``whole_model`` is the sum over layers, with lm_head.
        """
        return {
            "model": self.model,
            "model_type": self.model_type,
            "source": self.source,
            **(_describe(self.shape) if self.shape else {}),
            "context": self.context,
            "dtype": self.dtype,
            "parameters": {
                "total": self.total.total,
                "active": self.active.total,
                **asdict(self.total),
                "active_by_part": asdict(self.active),
                "stored": self.stored,
            },
            "weight_bytes": self.weight_bytes,
            "flops_per_token": _describe_flops(self.flops) if self.flops else None,
            "kv_cache_bytes_per_token": self.kv_cache_bytes_per_token,
            "kv_cache_bytes": self.kv_cache_bytes,
            "decoding_bytes": self.decoding_bytes,
            "paper": self.paper(),
            "lossless": self.lossless,
            "notices": list(self.notices),
        }

    def paper(self) -> dict[str, Any] | None:
        """What the paper prints, or would print, where its sums differ from ours; None for dense models.

        Table 7 counts 1.5 d_ff = 3I FLOPs more for each active FFN expert than Table 10's formula gives. Table 9's
        active parameters of BAM leave out one of the two routers, and for Shared KV the shared k and v.
        """
        shape, flops = self.shape, self.flops
        if shape is None or flops is None or shape.ffn != "experts" or not shape.family.gate:
            return None
        extra = 3 * shape.sizes.intermediate_size * shape.num_experts_per_tok
        second_router = shape.router_parameters if "attention" in shape.routers else 0
        omitted = shape.sizes.num_layers * second_router
        notes = [f"Table 7 prints {extra:,} = 1.5 k d_ff more for the FFN than Table 10's formula gives, unexplained"]
        if second_router:
            notes.append("Table 9's active parameters leave out one of the two routers")
        if shape.attention == "kv_sharing":
            heads = shape.active_attention_experts * shape.sizes.num_heads
            queries = shape.sizes.hidden_size * heads * shape.sizes.head_dim
            omitted += shape.sizes.num_layers * (flops.layer.qkv // 2 - queries)
            notes.append("Table 9's active parameters leave out the shared keys and values")
        return {
            "table_7_per_layer": {
                "attention": flops.layer.attention,
                "ffn": flops.layer.ffn + extra,
                "total": flops.layer.total + extra,
            },
            "table_9": {"total": self.total.total, "active": self.active.total - omitted},
            "differences": notes,
        }


def _describe(shape: Shape) -> dict[str, Any]:
    s = shape.sizes
    return {
        "family": shape.family.model_type,
        "block": shape.family.block,
        "layers": s.num_layers,
        **{name: value for name, value in asdict(s).items() if name != "num_layers"},
        "attention": shape.attention,
        "ffn": shape.ffn,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.num_experts_per_tok,
        "attention_num_experts_per_tok": shape.attention_num_experts_per_tok,
        "shared_router": shape.shared_router,
        "document_gate": list(shape.domains) or None,
        **({"expert_ranks": list(shape.expert_ranks)} if shape.expert_ranks else {}),
        **({"shared_experts": shape.shared_experts} if shape.shared_experts else {}),
        **({"domain_router": list(shape.domain_router)} if shape.domain_router else {}),
        **({"trunk": shape.trunk} if shape.trunk == "experts" else {}),
        **({"stitches": list(shape.stitches)} if shape.stitches else {}),
    }


def _describe_flops(flops: Flops) -> dict[str, Any]:
    layer, names = flops.layer, ("attention", "ffn", "routers", "total")
    per_layer = {name: getattr(layer, name) for name in names}
    return {
        **per_layer,
        "convention": "forward, one layer, without embeddings and lm_head: BAM (arXiv 2408.08274), Table 7",
        "layers": len(flops.layers),
        "per_layer": {**per_layer, "components": asdict(layer)},
        "context_alternatives": {
            "paper": layer.context,
            "causal_mean": flops.causal_mean,
            "last_token": flops.last_token,
        },
        "whole_model": {
            **{name: flops.model(name) for name in names[:3]},
            **({"stitch": flops.model("stitch")} if flops.model("stitch") else {}),
            "non_embedding": flops.non_embedding,
            "lm_head": flops.lm_head,
            "total": flops.total,
        },
    }


def inspect(model: str | Path | Config, *, context: int | None = None, dtype: str | None = None) -> Accounting:
    """Parameters, FLOPs and memory of a dense model or a mixture, without reading a weight.

    Args:
        model: a checkpoint folder, a config.json, a Hub id (``org/name`` or ``org/name@revision``), or a config. In a
            folder with safetensors weights their headers are counted too, and a difference is among the notices.
        context: tokens that FLOPs and the whole KV cache are for; the model's own positions, at most 4096, if None.
        dtype: of weights and cache, as torch spells it or ``bf16``, ``fp16``, ``fp32``, ``fp8``; the config's (or
            bfloat16) if None.

    Raises:
        CheckpointError: one line, if the model cannot be found, read or counted, or an argument is nonsense.
    """
    name = "config" if isinstance(model, dict) else str(model)
    config, folder = (model, None) if isinstance(model, dict) else _read(model)
    is_mixture = model_type_of(config, name) == "branchmix"
    if not isinstance(config.get("seed_config") or {}, dict):
        raise CheckpointError(f"{name}: seed_config is {short(config['seed_config'])}, not the config of a model")

    seed = shape_of(config).seed if is_mixture else config
    if context is None:
        context = min(configured_positions(seed) or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    check_context(context)
    dtype = dtype_of(config, dtype)
    reason = why_unfit(seed)
    if not entry_of(seed).inferred and (reason is None or folder is None):
        return _by_formula(name, config, folder, context, dtype)
    return _by_weights(name, config, folder, context, dtype, reason)


def _by_formula(name: str, config: Config, folder: Path | None, context: int, dtype: str) -> Accounting:
    index, stored, notices = None, None, []
    if folder is not None and any(folder.glob("*.safetensors")):
        try:
            index = as_stored(CheckpointIndex.open(folder))
            config = index.config
        except BranchMixError as error:
            notices.append(f"weights not counted: {error}")
    shape, total = shape_of(config), parameters(config)
    if index is not None:
        stored = _count_tensors(index, tied=shape.sizes.tied_embeddings)[0].total
        if stored != total.total:
            notices.append(
                f"config.json describes {total.total:,} parameters, but the weights hold {stored:,}: "
                "the numbers are the config's"
            )
    notices += notices_of_positions(config, context)
    notices += _notices_of_top_k(shape)
    active, flops, model_type = active_parameters(config), flops_of(shape, context), config["model_type"]
    lossless = None
    if folder is not None and model_type == "branchmix":
        lossless = (read_object(folder / "branchmix.json") or {}).get("lossless")
    counts = (shape, context, dtype, total, active, flops, stored)
    return Accounting(name, model_type, "config", *counts, tuple(notices), lossless)


def _notices_of_top_k(shape: Shape) -> list[str]:
    if not shape.attention_num_experts_per_tok or not shape.has_attention_experts:
        return []
    return [
        f"active parameters and FLOPs count the queries and outputs of the {shape.attention_num_experts_per_tok} "
        f"chosen attention experts, and {'all keys' if shape.kv_experts > 1 else 'the shared keys'} and values"
    ]


def _by_weights(
    name: str, config: Config, folder: Path | None, context: int, dtype: str, reason: str | None
) -> Accounting:
    """For models without a formula: counts from the headers, FLOPs where sizes and weights agree.

    ``reason`` says why a family's formula does not hold for this config; None: the family has no formula.
    """
    family = str((config.get("seed_config") or config).get("model_type"))
    lacking = reason or f"no formula for the family {family!r}"
    if folder is None:
        raise CheckpointError(
            f"{name}: {lacking}{'' if reason else nearest(family, [*families()])}: "
            "give the checkpoint folder, whose weights can be counted instead"
        )
    index = as_stored(CheckpointIndex.open(folder))
    config = index.config
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((config[key] for key in names if isinstance(config.get(key), int) and config[key] > 0), 1)
    chosen = config.get("num_experts_per_tok", 1)
    fraction = (chosen, experts) if isinstance(chosen, int) and 0 < chosen <= experts else (1, 1)
    tied = is_tied(config.get("seed_config") or config)
    described = _described_shape(config)
    used = {r"\.experts\.(?!\w+\.weight$)": fraction}  # that is the seed's, beside the experts' changes of it
    if described is not None and described.has_attention_experts:
        used[_of_queries(described)] = (described.active_attention_experts, described.num_experts)
    total, active, matrices = _count_tensors(index, tied=tied, used=used)
    notices = [f"{lacking}: counted from the weights, without the buffers that are known by name"]
    notices += [] if described is None else _notices_of_top_k(described)
    shape = None if described is None else _plain_shape(described, index, context, matrices)
    if shape is None:
        notices.append("FLOPs and KV cache unknown: the weights are not those of plain attention and FFN layers")
    model_type, flops, stored = config["model_type"], flops_of(shape, context) if shape else None, total.total
    return Accounting(name, model_type, "weights", shape, context, dtype, total, active, flops, stored, tuple(notices))


def _described_shape(config: Config) -> Shape | None:
    try:
        return shape_of(config)
    except CheckpointError:
        return None


def _of_queries(shape: Shape) -> str:
    """A pattern of the names of what a mixture has of every attention expert and a token uses of the chosen ones."""
    family, matrix = shape.family, r"\.(?!weight$)" if shape.expert_ranks else r"\."
    norm = rf"|heads\.{family.query_norm}\." if family.query_norm else ""
    return rf"\.{family.attention}\.((heads\.(q_proj|{family.query})|o_proj){matrix}|o_bias${norm})"


def _plain_shape(shape: Shape, index: CheckpointIndex, context: int, matrices: dict[str, int]) -> Shape | None:
    """The shape of a model without a formula, if its matrices are those of plain attention and FFN layers."""
    if not any(".gate_proj" in tensor or "gate_up" in tensor for tensor in index.tensors):
        shape = replace(shape, family=replace(shape.family, gate=None))
    flops = flops_of(replace(shape, attention_num_experts_per_tok=None), context)
    computed = min(shape.num_experts_per_tok, shape.ffn_experts) + shape.shared_experts
    ffn = flops.model("ffn") // computed * (shape.ffn_experts + shape.shared_experts)
    expected = (flops.model("qkv") + flops.model("output"), ffn)
    return shape if expected == (2 * matrices["attention"], 2 * matrices["ffn"]) else None


# A tensor's part of the model by its name, first match; and buffers that some checkpoints store.
_PART_PATTERNS = {
    "stitches": r"\.stitch\.",
    "routers": r"expert_gate|router|(?<!\.experts)\.gate\.weight$|^document_gate\.",
    "norms": r"norm|\.ln_",
    "lm_head": r"lm_head|embed_out|output_projection",
    "embeddings": r"embed|\.wte|\.wpe",
    "ffn": r"\.(mlp|feed_forward|ffn|block_sparse_moe|experts)\.|\.(fc1|fc2)\.",
    "attention": r"attn|attention",
    "other": r"",
}
_BUFFERS = re.compile(
    r"(^document_gate\.counts|^router_domains\.\w+|rotary_emb\.inv_freq|\b(attn|attention)\.(bias|masked_bias)|act_fn\.(beta|eps)|layer_scalar|slope_rate|_decay"
    r"|e_score_correction_bias|\.expert_bias|balancing_biases|tid2eid|global_(mean|invstd))$"
)


def _count_tensors(
    index: CheckpointIndex, *, tied: bool, used: dict[str, tuple[int, int]] | None = None
) -> tuple[ParameterCounts, ParameterCounts, dict[str, int]]:
    """Stored parameters by part: all; those that a token uses; and those in matrices.

    ``used`` says by a pattern of names that these tensors are of N experts, and a token uses k.
    """
    total, active, matrices = (dict.fromkeys(_PART_PATTERNS, 0) for _ in range(3))
    head, embeddings = head_and_embeddings(index)
    twin = head.name if tied and head is not None and embeddings is not None else None
    for name, ref in index.tensors.items():
        part = next(part for part, pattern in _PART_PATTERNS.items() if re.search(pattern, name))
        if _BUFFERS.search(name) or name == twin:
            continue
        elements = math.prod(ref.shape)
        total[part] += elements
        chosen, experts = next((share for names, share in (used or {}).items() if re.search(names, name)), (1, 1))
        active[part] += elements * chosen // experts
        matrices[part] += elements if len(ref.shape) > 1 and not name.endswith("bias") else 0
    return ParameterCounts(**total), ParameterCounts(**active), matrices


def too_few_parameters(index: CheckpointIndex) -> str | None:
    """Says that weights hold fewer parameters than their config describes; None if not, or for unknown families."""
    config = index.config
    if entry_of(config.get("seed_config") or config).inferred:
        return None
    described, tied = parameters(config).total, shape_of(config).sizes.tied_embeddings
    stored = _count_tensors(index, tied=tied)[0].total
    if stored >= described:
        return None
    return f"config.json describes {described:,} parameters, but the weights hold only {stored:,}"


def _read(model: str | Path) -> tuple[Config, Path | None]:
    """The config that a path or a Hub id means, and its folder; None for a config.json alone."""
    path = expanded(model)
    if not is_there(path):
        if isinstance(model, Path) or path.suffix == ".json" or "/" not in model or is_there(path.parent):
            raise CheckpointError(f"{model}: no such file or folder, and not a Hub id (org/name)")
        path = resolve(model).folder
    if path.suffix == ".json" and not path.is_dir():
        return read_json_object(path), None
    require_folder(path)
    return read_config(path), path

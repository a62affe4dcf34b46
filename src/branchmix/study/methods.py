"""What a study can compare: each method is a recipe of a merge, and how the merge is trained. Names are data.

Sections and tables are those of BAM (arXiv 2408.08274); BTS is arXiv 2502.00075, whose first author is BAM's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Match = Literal["dm", "cm", "time"]
Kind = Literal["mixture", "merge", "dense", "ensemble"]

_SOFT_ATTENTION = {"attention": {"soft": True}}
_TOP_1 = {"top_k": 1, "normalize": False}
_BTX = {"attention": "average", "ffn": "experts", "routing": {"ffn": _TOP_1}}
_EXPERT_KV = {"attention": "kv_experts", "ffn": "experts", "routing": {"ffn": _TOP_1, **_SOFT_ATTENTION}}
_SHARED_KV = {"attention": "kv_sharing", "ffn": "experts", "routing": {"ffn": _TOP_1, **_SOFT_ATTENTION}}


@dataclass(frozen=True)
class Preset:
    """A method as it is known from papers."""

    label: str
    what: str
    kind: Kind = "mixture"
    """``mixture``: merged and trained. ``merge``: merged only. ``dense``: the seed, trained on the mixtures' data.
    ``ensemble``: all dense models, nothing trained."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Keys of the recipe."""
    train: dict[str, Any] = field(default_factory=dict)
    """Keys of the run that trains the mixture."""
    match: tuple[Match, ...] = ("dm", "cm")
    larger: Literal["total", "active"] | None = None
    """Copies of the seed are added until the parameters (and for ``active`` top-k until the active ones) are those of
    BAM Expert KV."""
    varies: str | None = None
    """The method that this one differs from in one thing: a report compares both."""
    warning: str = ""


_COPIES = (
    "In the paper, copies of the seed made BTX with top-1 worse: 700M with 4 experts 3.78 on code, 851M with 8 3.94 "
    "(Table 4)."
)

METHODS: dict[str, Preset] = {
    "dense": Preset("Dense, same data", "The seed trained on the mixtures' data: what no branching gives", "dense"),
    "ensemble": Preset(
        "BTM ensemble",
        "Probabilities of all dense models, weighted by the posterior of the domain (Branch-Train-Merge)",
        "ensemble",
        match=(),
    ),
    "soup": Preset(
        "Soup", "Every weight is the average of all dense models'", "merge", {"attention": "average", "ffn": "average"}
    ),
    "sparse-upcycling": Preset(
        "Sparse upcycling",
        "As many FFN experts as the others have, all copies of the seed",
        recipe={**_BTX, "attention": "seed", "experts": []},
        varies="btx",
    ),
    "btx": Preset("BTX", "FFN experts, top-1; attention is averaged (Branch-Train-MiX)", recipe=_BTX),
    "btx-top2": Preset(
        "BTX top-2",
        "Two FFN experts a token, gates normalised",
        recipe={**_BTX, "routing": {"ffn": {"top_k": 2, "normalize": True}}},
        varies="btx",
    ),
    "btx-soft": Preset(
        "BTX soft", "All FFN experts for each token", recipe={**_BTX, "routing": {"ffn": {"soft": True}}}, varies="btx"
    ),
    "btx-total-match": Preset(
        "BTX, total match",
        "Copies of the seed as further FFN experts, as many parameters as BAM Expert KV (Table 4)",
        recipe=_BTX,
        match=("dm",),
        larger="total",
        warning=_COPIES,
    ),
    "btx-active-match": Preset(
        "BTX, total and active match",
        "Further FFN experts and a larger top-k, as many active parameters as BAM Expert KV (Table 5)",
        recipe=_BTX,
        match=("dm",),
        larger="active",
        warning=_COPIES,
    ),
    "bam-expert-kv": Preset(
        "BAM Expert KV", "Attention experts with q, k, v and o of their own, soft; FFN top-1", recipe=_EXPERT_KV
    ),
    "bam-shared-kv": Preset(
        "BAM Shared KV", "Attention experts with q and o of their own, one k and v; FFN top-1", recipe=_SHARED_KV
    ),
    "bam-attention-top2": Preset(
        "BAM attention top-2",
        "Shared KV, two attention experts a token (Table 6)",
        recipe={**_SHARED_KV, "routing": {"ffn": _TOP_1, "attention": {"top_k": 2}}},
        match=("cm",),
        varies="bam-shared-kv",
    ),
    "bam-attention-top1": Preset(
        "BAM attention top-1",
        "Shared KV, one attention expert a token (Table 6)",
        recipe={**_SHARED_KV, "routing": {"ffn": _TOP_1, "attention": {"top_k": 1}}},
        match=("cm",),
        varies="bam-shared-kv",
    ),
    "bam-soft-ffn": Preset(
        "BAM soft FFN",
        "Expert KV with all FFN experts for each token, as in BTS",
        recipe={**_EXPERT_KV, "routing": {"ffn": {"soft": True}, **_SOFT_ATTENTION}},
        varies="bam-expert-kv",
    ),
    "bam-adapters": Preset(
        "BAM Adapters",
        "Soft attention and FFN experts, all frozen but routers and a linear after each expert (BTS)",
        recipe={**_EXPERT_KV, "routing": {"ffn": {"soft": True}, **_SOFT_ATTENTION}},
        train={"adapters": True},
        varies="bam-soft-ffn",
    ),
    "bam-frozen-experts": Preset(
        "BAM frozen experts", "Expert KV, only what is not an expert is trained", recipe=_EXPERT_KV,
        train={"freeze": ["experts"]},
        varies="bam-expert-kv",
    ),
    "bam-norm-folding": Preset(
        "BAM folded norms",
        "Expert KV; each model's norm gains go into its own projections instead of an average",
        recipe={**_EXPERT_KV, "merge": {"fold_norms": True}},
        match=("dm",),
        varies="bam-expert-kv",
    ),
    "bam-without-seed": Preset(
        "BAM without seed",
        "Expert KV of the specialists only",
        recipe={**_EXPERT_KV, "include_seed": False},
        match=("dm",),
        varies="bam-expert-kv",
    ),
    "bam-shared-router": Preset(
        "BAM one router",
        "Expert KV with one router a block for attention and FFN experts",
        recipe={**_EXPERT_KV, "routing": {"ffn": _TOP_1, **_SOFT_ATTENTION, "shared": True}},
        match=("dm",),
        varies="bam-expert-kv",
    ),
    "bam-no-balance": Preset(
        "BAM no balance loss",
        "Expert KV without load-balancing loss",
        recipe={**_EXPERT_KV, "router_aux_loss_coef": 0.0},
        match=("dm",),
        varies="bam-expert-kv",
    ),
    "bam-no-z-loss": Preset(
        "BAM no z-loss", "Expert KV without router z-loss", recipe={**_EXPERT_KV, "router_z_loss_coef": 0.0},
        match=("dm",),
        varies="bam-expert-kv",
    ),
    "bam-unscaled": Preset(
        "BAM unscaled FFN",
        "Expert KV with the raw top-1 gate, as the paper writes it: the FFN starts at 1/N of its size",
        recipe={**_EXPERT_KV, "routed_scaling_factor": 1.0},
        match=("dm",),
        varies="bam-expert-kv",
    ),
}  # fmt: skip
"""By the name that a study's YAML uses."""

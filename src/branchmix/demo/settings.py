"""What the demo trains: the shape of its models, its recipe, and the YAML files that its commands read.

Sizes and recipe are the proportions of the paper at the scale of a laptop: a parallel-attention seed (Cohere's block)
with an FFN 4 times as wide as the model and three query heads for each key/value head; the seed sees most of the data,
each expert less than half of that, and the mixtures about as much as an expert.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DOMAINS = ("general", "code", "law", "math")
EXPERTS = ("code", "law", "math")
GENERAL_SHARE = 0.1

RECIPES = {
    "soup": ("average", "average", "every weight is the average of all models'"),
    "btx": ("average", "experts", "Branch-Train-MiX: FFN experts, and one attention that is the average of all"),
    "bam-shared-kv": ("kv_sharing", "experts", "BAM, Shared KV: attention experts with q and o of their own, one k, v"),
    "bam-expert-kv": ("kv_experts", "experts", "BAM, Expert KV: attention experts with q, k, v and o of their own"),
}
"""Name: attention, FFN, and what that is."""
MIXTURES = ("btx", "bam-shared-kv", "bam-expert-kv")


@dataclass(frozen=True)
class Scale:
    """The models and the batch; the defaults are the demo's, tests take less."""

    vocab_size: int = 4096
    shape: dict[str, int] = field(
        default_factory=lambda: {
            "hidden_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "intermediate_size": 768,
        }
    )
    sequence_length: int = 128
    batch_size: int = 32
    held_out_share: float = 0.1
    """Of documents; law has few."""
    peak: float = 2e-3
    """Learning rate of the seed; half of it afterwards."""
    seed_tokens: float = 1.5e6
    """The proportions of the phases; the plan scales them all."""
    expert_tokens: float = 0.6e6
    mixture_tokens: float = 0.8e6

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.sequence_length * self.batch_size

    def model(self) -> dict[str, Any]:
        """Config keys of the seed, as in a run file."""
        return {
            "model_type": "cohere",
            **self.shape,
            "max_position_embeddings": 4 * self.sequence_length,
            "logit_scale": 1.0,
            "tie_word_embeddings": False,
        }

    def config(self) -> dict[str, Any]:
        """The whole config of the seed, before there is a tokenizer."""
        tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
        return {**self.model(), "vocab_size": self.vocab_size, **tokens}

    def mixture(self, name: str) -> dict[str, Any]:
        """What a mixture's config adds to it."""
        attention, ffn, _ = RECIPES[name]
        return {"attention": attention, "ffn": ffn, "num_experts": len(EXPERTS) + 1, "num_experts_per_tok": 1}


ROUTED = ("bam-expert-kv-dm", "bam-shared-kv-dm", "btx")
"""Runs of the last phase whose routing is shown, token by token."""


@dataclass(frozen=True)
class Budgets:
    """Tokens of each phase, whole steps."""

    seed: int
    expert: int
    mixture: int
    held_out: int
    """Tokens of each domain that models are evaluated on."""
    enough_bytes: int
    """Text that is extracted of each domain."""
    dense_baseline: bool
    """Whether the seed is also trained on the mixtures' data."""


@dataclass(frozen=True)
class Run:
    """A training run of the last phase."""

    name: str
    """Its folder in `trained/` is called so."""
    model: str
    """Folder of the model that it starts from, below OUT."""
    match: str | None
    """`DM` for equal data, `CM` for equal compute; None for what is compared with."""


def mixture_runs(budgets: Budgets) -> list[Run]:
    """All runs of the last phase, the longest first, so that none of them runs alone at the end."""
    runs = [
        Run("bam-expert-kv-dm", "upcycled/bam-expert-kv", "DM"),
        Run("bam-expert-kv-cm", "upcycled/bam-expert-kv", "CM"),
        Run("bam-shared-kv-dm", "upcycled/bam-shared-kv", "DM"),
        Run("bam-shared-kv-cm", "upcycled/bam-shared-kv", "CM"),
        Run("btx", "upcycled/btx", None),
    ]
    return [*runs, Run("dense", "seed", None)] if budgets.dense_baseline else runs


def training_flops(scale: Scale, name: str | None, tokens: int) -> int:
    """Exact training FLOPs of a mixture, or of a dense model if there is no name: three times the forward pass."""
    from branchmix.accounting import flops_per_token

    config = scale.config()
    if name is not None:
        config = {"model_type": "branchmix", "seed_config": config, **scale.mixture(name)}
    return 3 * tokens * flops_per_token(config, scale.sequence_length).total


# ---------------------------------------------------------------------------------------------------------------------
# The files
# ---------------------------------------------------------------------------------------------------------------------

_DATA = """\
data:{domains}
held_out: {{share: {held_out_share}, tokens: {held_out}}} # by document; the same ones are held out from every run
sequence_length: {sequence_length}
batch_size: {batch_size}
"""


def write_files(out: Path, scale: Scale, budgets: Budgets, *, threads: int, seed_threads: int, at_once: int) -> None:
    """All YAML files of the demo, for its commands and for whoever wants to read or change them."""
    files = {
        "seed.yaml": _seed_file(scale, budgets, seed_threads),
        "branch.yaml": _branch_file(scale, budgets, threads, at_once),
        **{f"recipes/{name}.yaml": _recipe_file(name) for name in RECIPES},
        **{f"mix-{run.name}.yaml": _mix_file(scale, budgets, run, threads) for run in mixture_runs(budgets)},
    }
    (out / "recipes").mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if not (out / name).is_file():  # somebody may have changed it
            (out / name).write_text(content, encoding="utf-8")


def sources() -> dict[str, dict[str, str]]:
    """``data`` of every file."""
    return {domain: {"files": f"text/{domain}.jsonl"} for domain in DOMAINS}


def _data(scale: Scale, budgets: Budgets) -> str:
    lines = "".join(f"\n  {domain}: {{files: {source['files']}}}" for domain, source in sources().items())
    return _DATA.format(
        domains=lines,
        held_out=budgets.held_out,
        held_out_share=scale.held_out_share,
        sequence_length=scale.sequence_length,
        batch_size=scale.batch_size,
    )


def _seed_file(scale: Scale, budgets: Budgets, threads: int) -> str:
    model = "".join(f"  {key}: {json.dumps(value)}\n" for key, value in scale.model().items())
    return f"""\
# The seed: a small dense model and its tokenizer, on general text.
#   branchmix train seed.yaml

model:
{model}  train_tokenizer: {scale.vocab_size}
out: seed
{_data(scale, budgets)}mix: {{general: 1.0}}
budget: {{tokens: {budgets.seed}}}
learning_rate: {{peak: {scale.peak:g}, warmup: 0.05, final: 0.1}} # linear up, cosine down to a tenth
optimizer: {{betas: [0.9, 0.95], weight_decay: 0.1}}
evaluation: {{at_start: false}}
logging: {{steps: {_logging(scale, budgets.seed)}}}
threads: {threads}
"""


def _branch_file(scale: Scale, budgets: Budgets, threads: int, at_once: int) -> str:
    experts = "".join(f"  {name}:\n" for name in EXPERTS)
    return f"""\
# The branch phase: three experts, each a run of its own from the same seed.
#   branchmix branch branch.yaml

seed: seed
out: experts
experts:
{experts}general: general
general_share: {GENERAL_SHARE} # of the seed's own kind of data in every expert's, as in the paper
{_data(scale, budgets)}budget: {{tokens: {budgets.expert}}} # of each expert
learning_rate: {{ratio: 0.5, warmup: 0.05, final: 0.1}} # half of the seed's peak
optimizer: {{betas: [0.9, 0.95], weight_decay: 0.1}}
evaluation: {{at_start: false}}
logging: {{steps: {_logging(scale, budgets.expert)}}}
threads: {threads}
at_once: {at_once}
"""


def _recipe_file(name: str) -> str:
    attention, ffn, what = RECIPES[name]
    experts = "".join(f"  - {{name: {expert}, model: ../experts/{expert}}}\n" for expert in EXPERTS)
    routing = ""
    if ffn == "experts":
        soft = "" if attention == "average" else "\n  attention: {soft: true} # all experts, weighted by the gate"
        routing = f"""
routing:
  ffn: {{top_k: 1, normalize: false}} # a token goes to one FFN expert, times its raw gate{soft}
routed_scaling_factor: auto # experts / top_k; the paper: 1.0
router_init: {{std: 0.02}}
router_aux_loss_coef: 0.01
router_z_loss_coef: 0.001
"""
    return f"""\
# {what[0].upper()}{what[1:]}.
#   branchmix upcycle recipes/{name}.yaml upcycled/{name}

seed: ../seed
experts:
{experts}attention: {attention}
ffn: {ffn}
{routing}"""


def _mix_file(scale: Scale, budgets: Budgets, run: Run, threads: int) -> str:
    tokens = budgets.mixture
    budget = f"{{tokens: {tokens}}}"
    comment = "The seed again, on the mixtures' data: what no branching would have given."
    if run.match == "DM":
        comment = "Equal data: as many tokens as BTX."
    elif run.match == "CM":
        flops = training_flops(scale, "btx", tokens)
        budget = f"{{flops: {flops}}} # what BTX spends on {tokens:,} tokens, exactly; a schedule of its own"
        comment = "Equal compute: as many training FLOPs as BTX, so fewer tokens."
        tokens = tokens * flops // training_flops(scale, run.model.split("/")[1], tokens)
    elif run.name == "btx":
        comment = "The mixture that BAM is compared with."
    return f"""\
# {comment}
#   branchmix train mix-{run.name}.yaml

model: {run.model}
out: trained/{run.name}
{_data(scale, budgets)}mix: equal # a quarter of each domain
budget: {budget}
learning_rate: {{peak: {scale.peak / 2:g}, warmup: 0.05, final: 0.1}} # half of the seed's
optimizer: {{betas: [0.9, 0.95], weight_decay: 0.1}}
evaluation: {{at_start: false}}
logging: {{steps: {_logging(scale, tokens)}}}
threads: {threads}
"""


def _logging(scale: Scale, tokens: int) -> int:
    """Steps between two points of a loss curve: some 50 points."""
    return max(1, tokens // scale.step_tokens // 50)

"""Who takes part in the training benchmark: shapes, models, one training step, and the matmul floor of a step.

A mixture is measured against the dense model of equal FLOPs, which makes the very same matrix products without gates
and routers: for top-k FFN experts an FFN k times as wide, for attention experts N times the query heads (and K/V heads,
unless these are shared). Used by `training.py`; docs in README.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, CohereConfig, MistralConfig, MixtralConfig

import branchmix
import checkpoints
import peers
from branchmix.accounting import flops_per_token
from branchmix.models import mixture_config
from branchmix.models.modeling_branchmix import BranchMixForCausalLM


@dataclass(frozen=True)
class Shape:
    """A seed, a batch, and how many experts: all figures of one group of candidates."""

    what: str
    batch: int
    length: int
    num_experts: int
    top_k: int
    seed: Callable[[], Any] | None
    """Config of a random seed; None for the real one on disk."""


def _special(**tokens: int) -> dict[str, int]:
    return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **tokens}


def _demo() -> Any:
    sizes = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2}
    return CohereConfig(**sizes, intermediate_size=768, vocab_size=4096, max_position_embeddings=256, **_special())


def _mixtral() -> Any:
    sizes = {"hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4}
    return MistralConfig(**sizes, intermediate_size=2048, vocab_size=4096, sliding_window=None, **_special())


SHAPES = {
    "demo": Shape("Cohere, 4 layers of width 192, 6/2 heads, FFN 768, vocabulary 4096", 32, 128, 4, 1, _demo),
    "smollm2": Shape("SmolLM2-135M and three siblings", 1, 512, 4, 1, None),
    "mixtral": Shape("Mistral, 4 layers of width 1024, 16/4 heads, FFN 2048, vocabulary 4096", 1, 512, 8, 2, _mixtral),
}
PRECISIONS = {
    "fp32": "fp32",
    "autocast": "bf16 autocast over fp32 weights",
    "bf16": "bf16 weights",
}


@dataclass(frozen=True)
class Candidate:
    """One model and one way to compute it.

    Attributes:
        name: its name in tables and `--only`.
        model: which model, see `Models`.
        makes: what it consists of, in a few words.
        dense: the candidate that is its dense model of equal FLOPs.
        kernel: transformers' name for how FFN experts are computed.
        shapes: where it takes part.
        floor: measure the floor of its model too.
    """

    name: str
    model: str
    makes: str
    dense: str = "dense"
    kernel: str | None = None
    shapes: tuple[str, ...] = tuple(SHAPES)
    floor: bool = False


_SMALL = ("demo", "smollm2")
_REAL = ("smollm2",)
_WIDE, _SHARED = "dense-expert-kv", "dense-shared-kv"
PARTS = {
    "ffn": (
        Candidate("dense", "dense", "the seed, or its FFN k times as wide", floor=True),
        Candidate("btx", "average", "FFN experts, transformers' default kernel", kernel="grouped_mm", floor=True),
        Candidate("btx-loop", "average", "FFN experts, our loop", kernel="eager"),
        Candidate("mixtral", "mixtral", "transformers' Mixtral on the same experts", kernel="grouped_mm"),
        Candidate("mixtral-loop", "mixtral", "the same, transformers' loop", kernel="eager"),
        Candidate("mixturekit-traditional", "mixturekit-traditional", "FFN experts", shapes=_REAL),
    ),
    "attention": (
        Candidate("dense", "dense", "the seed", shapes=_SMALL),
        Candidate(_WIDE, "dense-kv_experts", "the seed with N times all heads", _WIDE, None, _SMALL),
        Candidate("expert-kv", "kv_experts", "attention and FFN experts", _WIDE, "grouped_mm", _SMALL, True),
        Candidate("expert-kv-loop", "kv_experts", "the same, our FFN loop", _WIDE, "eager", _SMALL),
        Candidate(_SHARED, "dense-kv_sharing", "the seed with N times the query heads", _SHARED, None, _SMALL),
        Candidate("shared-kv", "kv_sharing", "attention experts with shared K/V", _SHARED, "grouped_mm", _SMALL, True),
        Candidate("shared-kv-loop", "kv_sharing", "the same, our FFN loop", _SHARED, "eager", _SMALL),
        Candidate("mixturekit-btx", "mixturekit-btx", "every projection routed by itself", shapes=_REAL),
    ),
}


@dataclass
class Models:
    """The models of one shape in one precision, made when first asked for."""

    shape_name: str
    precision: str
    attention: str
    data: Path
    envs: Path
    made: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shape = SHAPES[self.shape_name]
        self.options = {"attn_implementation": self.attention}
        self.dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32

    def get(self, name: str) -> Any:
        if name not in self.made:
            torch.manual_seed(0)
            kind, _, rest = name.partition("-")
            make = {"dense": self._dense, "mixtral": self._mixtral, "mixturekit": self._mixturekit}.get(kind)
            model = make(rest) if make else self._mixture(name)
            self.made[name] = model.to(self.dtype).train()
        return self.made[name]

    def flops_per_token(self, name: str) -> int | None:
        """Of forward and backward, by branchmix' accounting; None for a peer's model."""
        if name.startswith("mixturekit"):
            return None
        config = self.get("average" if name == "mixtral" else name).config
        return 3 * flops_per_token(json.loads(config.to_json_string(use_diff=False)), self.shape.length).total

    def _seed_config(self) -> Any:
        if self.shape.seed is not None:
            return self.shape.seed()
        return AutoConfig.from_pretrained(self.data / "models" / "small" / "seed")

    def _dense(self, attention: str) -> Any:
        config = self._seed_config()
        if not attention and self.shape.seed is None:
            folder = self.data / "models" / "small" / "seed"
            return AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype, **self.options)
        config.intermediate_size *= self.shape.top_k
        if attention:
            config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            config.num_attention_heads *= self.shape.num_experts
            config.num_key_value_heads *= self.shape.num_experts if attention == "kv_experts" else 1
        return AutoModelForCausalLM.from_config(config, **self.options)

    def _mixture(self, name: str) -> Any:
        """``name`` is a kind of attention, with " top-k" behind it where it is not soft."""
        attention, _, attention_top_k = name.partition(" top-")
        routing = {"num_experts": self.shape.num_experts, "num_experts_per_tok": self.shape.top_k}
        if attention_top_k:
            routing["attention_num_experts_per_tok"] = int(attention_top_k)
        if self.shape.seed is not None:
            config = mixture_config(self._seed_config(), attention=attention, **routing)
            return BranchMixForCausalLM._from_config(config, **self.options)
        folder = self.data / "training" / attention
        seed, *experts = checkpoints.make(self.data, "small")
        recipe = {
            "seed": str(seed),
            "experts": [{"name": model.name, "model": str(model)} for model in experts],
            "attention": attention,
            "routing": {"ffn": {"top_k": self.shape.top_k}},
        }
        if not (folder / "config.json").exists():
            branchmix.upcycle(recipe, folder)
        return BranchMixForCausalLM.from_pretrained(folder, dtype=self.dtype, **self.options)

    def _mixtral(self, _: str) -> Any:
        """transformers' Mixtral that shares our model's tensors, those of its experts in any case."""
        ours = self.get("average")
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
        seed = ours.config.seed_config
        config = MixtralConfig(
            **{name: getattr(seed, name) for name in names},
            vocab_size=seed.vocab_size,
            tie_word_embeddings=seed.tie_word_embeddings,
            num_local_experts=self.shape.num_experts,
            num_experts_per_tok=self.shape.top_k,
            output_router_logits=True,  # or it would train without its balancing loss
            **_special(),
        )
        model = AutoModelForCausalLM.from_config(config, **self.options)
        tensors = {name.removeprefix("model."): value for name, value in ours.named_parameters()}
        unknown = model.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
        if any(".mlp." in name for name in unknown):
            raise RuntimeError(f"Mixtral has other experts: {unknown[0]}")
        model.tie_weights()
        return model

    def _mixturekit(self, method: str) -> Any:
        folder = self.data / "training" / f"mixturekit-{method}"
        if not (folder / "config.json").exists():
            tools = peers.Tools(envs=self.envs, branchmix=())
            candidate = next(c for c in peers.CANDIDATES if c.name == f"mixturekit-{method}")
            file = self.data / "training" / "config.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            command = candidate.write_config(tools, file, checkpoints.make(self.data, "small"), folder)
            subprocess.run(command, check=True, env=peers.environment("mixturekit"), stdout=sys.stderr)
            config = json.loads((folder / "config.json").read_text())
            config["num_experts_per_tok"] = self.shape.top_k
            (folder / "config.json").write_text(json.dumps(config))
        return AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype, trust_remote_code=True, **self.options)


# ---- one step ----


def step(model: Any, input_ids: torch.Tensor, precision: str) -> float:
    """Forward and backward; returns CPU seconds. No optimizer: it costs by all parameters, not by FLOPs."""
    begin = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
    loss.backward()
    seconds = time.process_time() - begin
    if not torch.isfinite(loss):
        raise ValueError("the loss is not finite")
    model.zero_grad(set_to_none=True)
    return seconds


class Floor(TorchDispatchMode):
    """The matrix products of a step, recorded from it (`with`), and then run alone (`seconds`).

    Fused causal attention counts as products over half the keys, two forward and five backward; grouped products count
    by their groups.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        if name in ("mm", "bmm", "mv"):
            self._add(*args[:2])
        elif name in ("addmm", "baddbmm", "addmv"):
            self._add(*args[1:3])
        elif name == "_grouped_mm":
            self._add_groups(*args[:3])
        elif "scaled_dot_product" in name:
            self._add_attention(*(args[1:3] if "backward" in name else args[:2]), backward="backward" in name)
        return func(*args, **(kwargs or {}))

    def seconds(self) -> float:
        """CPU seconds of all products."""
        operands = {
            product: [torch.empty(0, dtype=dtype).new_empty(_span(s)).normal_().as_strided(*s) for s in sides]
            for product in self.products
            for dtype, *sides in [product]
        }
        begin = time.process_time()
        for product, count in self.products.items():
            left, right = operands[product]
            for _ in range(count):
                torch.matmul(left, right)
        return time.process_time() - begin

    def _add(self, left: torch.Tensor, right: torch.Tensor) -> None:
        if left.numel() and right.numel():
            self.products[left.dtype, (left.shape, left.stride()), (right.shape, right.stride())] += 1

    def _add_groups(self, left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> None:
        begin = 0
        for expert, end in enumerate(ends.tolist()):
            if right.dim() == 3:
                self._add(left[begin:end], right[expert])
            else:  # gradient of weights
                self._add(left[:, begin:end], right[begin:end])
            begin = end

    def _add_attention(self, query: torch.Tensor, key: torch.Tensor, *, backward: bool) -> None:
        batch, heads, queries, channels = query.shape
        keys = key.shape[2] // 2
        like = query.new_empty(1)
        q, k = like.expand(batch * heads, queries, channels), like.expand(batch * heads, channels, keys)
        scores, v = like.expand(batch * heads, queries, keys), like.expand(batch * heads, keys, channels)
        for pair, count in (((q, k), 2 if backward else 1), ((scores, v), 3 if backward else 1)):
            sides = [(x.shape, torch.empty(x.shape, device="meta").stride()) for x in pair]
            self.products[(query.dtype, *sides)] += count


def _span(side: tuple[torch.Size, tuple[int, ...]]) -> int:
    """Elements that a tensor of this shape and these strides lies in."""
    return 1 + sum((size - 1) * stride for size, stride in zip(*side, strict=True))

"""What `model.py` measures: cases, each a handful of candidates that compute the same thing or nearly so.

A candidate is called once a round and returns CPU seconds, by part where a part has its own figure. Docs in README.md.
Shapes: B batch, T tokens, D width, E experts, H query heads and K key/value heads of one expert, C head dimension.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.mistral.modeling_mistral import apply_rotary_pos_emb

import steps
from branchmix.models import mixture_config
from branchmix.models.attention_branchmix import BranchMixAttention
from branchmix.models.chunked_branchmix import automatic_attention_forward, chunked_attention_forward
from branchmix.models.modeling_branchmix import BranchMixForCausalLM

Seconds = dict[str, float]
Once = Callable[[], Seconds]


@dataclasses.dataclass(frozen=True)
class Case:
    """Candidates that are measured together.

    Attributes:
        name: within its group.
        what: shapes and precision, for the table's heading.
        tokens: how many one call computes.
        make: builds the candidates; called once.
        x: where it stands on a plot's axis: which axis, and the value.
    """

    name: str
    what: str
    tokens: int
    make: Callable[[], dict[str, Once]]
    x: tuple[str, int] | None = None


BOTH = ("kv_experts", "kv_sharing")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BASELINES = ("loop", "mixtral grouped_mm", "mixtral eager", "mixtral batched_mm", "dense", "btx", "floor", "all")
"""Candidates that others are compared with, where they take part."""


def seconds_of(call: Callable[[], Any]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


# ---- attention of one layer ----


class LoopAttention(nn.Module):
    """The same mixture as a loop over experts: shared K/V computed once, torch's fused attention for each expert."""

    def __init__(self, wide: BranchMixAttention, rotate: Callable[..., Any]):
        super().__init__()
        self.order, self.gate, self.rotate = wide.order, wide.expert_gate, rotate
        order, heads = wide.order, wide.heads

        def of_expert(weight: torch.Tensor, expert: int, pieces: tuple[int, int, int]) -> nn.Parameter:
            part = weight.detach().unflatten(0, pieces)[:, expert]
            return nn.Parameter(part.reshape(-1, weight.shape[1]).clone())

        experts = range(order.num_experts)
        self.q = nn.ParameterList(of_expert(heads.q_proj.weight, e, order.pieces) for e in experts)
        self.o = nn.ParameterList(of_expert(wide.o_proj.weight.T, e, order.pieces) for e in experts)
        kv = [0] if order.kv_sharing else experts
        kv_pieces = (1, 1, order.num_kv_heads * order.head_dim) if order.kv_sharing else order.of_keys().pieces
        self.k = nn.ParameterList(of_expert(heads.k_proj.weight, e, kv_pieces) for e in kv)
        self.v = nn.ParameterList(of_expert(heads.v_proj.weight, e, kv_pieces) for e in kv)

    def forward(self, x_BTD: torch.Tensor, position_embeddings: Any, attention_mask: Any = None) -> tuple[torch.Tensor]:
        def split(weight: torch.Tensor) -> torch.Tensor:
            return F.linear(x_BTD, weight).unflatten(-1, (-1, self.order.head_dim)).transpose(1, 2)

        gates_BTE = self.gate(x_BTD)[1].to(x_BTD.dtype)
        keys = [(split(k), split(v)) for k, v in zip(self.k, self.v, strict=True)]
        out_BTD: Any = 0
        for expert, (q, o) in enumerate(zip(self.q, self.o, strict=True)):
            k, v = keys[0 if self.order.kv_sharing else expert]
            q, k = self.rotate(split(q), k, *position_embeddings)
            heads = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            heads = heads.transpose(1, 2).flatten(2) * gates_BTE[..., expert : expert + 1]
            out_BTD = out_BTD + heads @ o
        return (out_BTD,)


def attention_cases(data: Path, envs: Path) -> Iterator[Case]:
    """One layer's attention, 4 experts of 16 heads over 4 K/V heads, width 1024: with projections and without."""
    plan = [("bf16", 512, ("heads", "layer")), ("bf16", 2048, ("heads",)), ("bf16", 128, ("heads", "layer"))]
    plan += [("fp32", 512, ("heads", "layer"))]
    for precision, length, parts in plan:
        for attention in BOTH:
            for part in parts:
                what = f"{'Expert KV' if attention == 'kv_experts' else 'Shared KV'}, {length} tokens, {precision}"
                rest = "attention without projections" if part == "heads" else "attention with projections and gates"
                yield Case(
                    f"{part} {attention} {length} {precision}",
                    f"{what}; {rest}",
                    length,
                    lambda a=attention, t=length, p=precision, part=part: _attention(a, t, DTYPES[p], part),
                )


def _attention(attention: str, length: int, dtype: torch.dtype, part: str) -> dict[str, Once]:
    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4}
    model, call, grad = _one_layer(sizes, length, dtype, attention=attention)
    wide = model.model.model.layers[0].self_attn
    if part == "layer":
        loop = LoopAttention(wide, apply_rotary_pos_emb)
        runs = {"loop": lambda: call(loop)}
        for name in ("sdpa", "branchmix", "branchmix_chunked"):

            def run(name: str = name) -> torch.Tensor:
                model.set_attn_implementation(name)
                return call(wide)

            runs[name] = run
        leaves = {name: list((loop if name == "loop" else wide).parameters()) for name in runs}
    else:
        runs, leaves = _heads(wide, length, dtype)
        grad = torch.randn_like(runs["loop"]())
    return _passes(runs, leaves, grad)


def _one_layer(
    sizes: dict[str, int], length: int, dtype: torch.dtype, **mixture: Any
) -> tuple[BranchMixForCausalLM, Callable[[nn.Module], torch.Tensor], torch.Tensor]:
    """A mixture of four experts and one layer; how to call an attention in its place; and a gradient of its output."""
    seed = MistralConfig(
        **sizes,
        num_hidden_layers=1,
        intermediate_size=64,
        vocab_size=64,
        sliding_window=None,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    model = BranchMixForCausalLM(mixture_config(seed, num_experts=4, **mixture)).to(dtype)
    x_BTD = torch.randn(1, length, sizes["hidden_size"], dtype=dtype)
    angles = model.model.model.rotary_emb(x_BTD, torch.arange(length)[None])

    def call(attention: nn.Module) -> torch.Tensor:
        return attention(x_BTD, position_embeddings=angles, attention_mask=None)[0]

    return model, call, torch.randn_like(x_BTD)


def _passes(runs: dict[str, Any], leaves: dict[str, Any], grad: torch.Tensor) -> dict[str, Once]:
    """Forward, and forward and backward, of candidates that compute the same as the first of them."""
    first, *_ = runs.values()
    expected = first().detach().float()
    for name, run in runs.items():
        error = (run().detach().float() - expected).norm() / expected.norm()
        if not error < (0.03 if grad.dtype == torch.bfloat16 else 1e-4):
            raise RuntimeError(f"{name} computes something else: {error}")

    def once(name: str) -> Seconds:
        with torch.no_grad():
            forward = seconds_of(runs[name])
        both = seconds_of(lambda: runs[name]().backward(grad))
        for leaf in leaves[name]:
            leaf.grad = None
        return {"forward": forward, "forward and backward": both}

    return {name: lambda name=name: once(name) for name in runs}


def _heads(wide: Any, length: int, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """From q, k and v to heads [B, T, H, C], in experts' order for the comparison."""
    order = wide.order
    q, k, v = (
        torch.randn(1, length, n, order.head_dim, dtype=dtype).transpose(1, 2).requires_grad_()
        for n in (order.wide_heads, order.wide_kv_heads, order.wide_kv_heads)
    )

    def loop() -> torch.Tensor:
        outs = []
        for expert in range(order.num_experts):
            part = q.unflatten(1, (order.pieces[0], order.num_experts, -1))[:, :, expert].flatten(1, 2)
            pair = (k, v) if order.kv_sharing else (x.unflatten(1, (order.num_experts, -1))[:, expert] for x in (k, v))
            outs.append(F.scaled_dot_product_attention(part, *pair, is_causal=True, enable_gqa=True).transpose(1, 2))
        if order.kv_sharing:
            outs = [out.unflatten(2, (order.num_kv_heads, -1)) for out in outs]
            return torch.stack(outs, 3).flatten(2, 4)
        return torch.stack(outs, 2).flatten(2, 3)

    functions = {
        "sdpa": sdpa_attention_forward,
        "branchmix": automatic_attention_forward,
        "branchmix_chunked": chunked_attention_forward,
    }
    runs: dict[str, Any] = {"loop": loop}
    for name, function in functions.items():
        runs[name] = lambda function=function: function(wide.heads, q, k, v, None)[0]
    return runs, {name: [q, k, v] for name in runs}


# ---- whole models ----


def _models(data: Path, envs: Path, shape: str = "mixtral", precision: str = "bf16", **changes: Any) -> steps.Models:
    """Two layers of the training benchmark's shape, unless it is the real model."""
    models = steps.Models(shape, precision, "sdpa", data, envs)
    sizes = {"num_hidden_layers": 2, **changes.pop("sizes", {})}
    real = models.shape.seed
    if real is not None:

        def seed() -> Any:
            config = real()
            for name, value in sizes.items():
                setattr(config, name, value)
            return config

        changes["seed"] = seed
    models.shape = dataclasses.replace(models.shape, **changes)
    return models


def _use(model: Any, experts: str | None, attention: str = "branchmix") -> None:
    if isinstance(model, BranchMixForCausalLM):
        model.set_attn_implementation(attention)
    if experts is not None:
        model.set_experts_implementation(experts)


CANDIDATES: dict[str, tuple[str, str | None]] = {
    "dense": ("dense", None),
    "mixtral eager": ("mixtral", "eager"),
    "mixtral grouped_mm": ("mixtral", "grouped_mm"),
    "mixtral batched_mm": ("mixtral", "batched_mm"),
    "btx": ("average", "branchmix"),
    "btx, experts in a loop": ("average", "eager"),
    "expert kv": ("kv_experts", "branchmix"),
    "shared kv": ("kv_sharing", "branchmix"),
}
DECODED = {
    f"{name}, {experts}": (attention, experts)
    for name, attention in (("expert kv", "kv_experts"), ("shared kv", "kv_sharing"))
    for experts in ("eager", "grouped_mm", "batched_mm")
}
"""Mixtures of attention experts with transformers' kernels for their FFN experts: what decoding is compared with."""
PEERS = {"mixturekit traditional": ("mixturekit-traditional", None), "mixturekit btx": ("mixturekit-btx", None)}


def decode_cases(data: Path, envs: Path) -> Iterator[Case]:
    """One token of each sequence behind 64 others."""
    for batch in (1, 8):
        what = "2 layers of width 1024, 16/4 heads, FFN 2048, 8 experts, top-2, vocabulary 4096, bf16"
        yield Case(
            f"batch {batch}", f"{what}; 64 tokens before", batch, lambda b=batch: _decode(_models(data, envs), b)
        )
    what = "SmolLM2-135M and three siblings, top-1, bf16; 64 tokens before"
    yield Case("smollm2", what, 1, lambda: _decode(_models(data, envs, "smollm2"), 1, PEERS))


def _decode(models: steps.Models, batch: int, more: dict[str, Any] | None = None) -> dict[str, Once]:
    ids = torch.randint(3, 4096, (batch, 65), generator=torch.Generator().manual_seed(0))
    once: dict[str, Once] = {}
    for name, (which, experts) in {**CANDIDATES, **DECODED, **(more or {})}.items():

        def step(which: str = which, experts: str | None = experts) -> Seconds:
            model = models.get(which).eval()
            with torch.no_grad():
                _use(model, experts and "grouped_mm")  # batched_mm would copy the weights for each of the 64 tokens
                cache = model(input_ids=ids[:, :64], use_cache=True).past_key_values
                _use(model, experts)
                return {"": min(seconds_of(lambda: _one(model, ids, cache)) for _ in range(3))}

        once[name] = step

    def floor() -> Seconds:
        model = models.get("average").eval()
        _use(model, "branchmix")
        with torch.no_grad():
            cache = model(input_ids=ids[:, :64], use_cache=True).past_key_values
            with Replay() as replay:
                _one(model, ids, cache)
            return {"": min(seconds_of(replay.again) for _ in range(3))}

    return {**once, "floor": floor}


def _one(model: Any, ids: torch.Tensor, cache: Any) -> None:
    model(input_ids=ids[:, 64:], past_key_values=cache, use_cache=True)


class Replay(TorchDispatchMode):
    """The matrix products of a call, on the very operands: what reading the weights costs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        if name in ("mm", "bmm", "mv", "addmm", "baddbmm", "addmv", "_grouped_mm") or "scaled_dot_product" in name:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def again(self) -> None:
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


def prefill_cases(data: Path, envs: Path) -> Iterator[Case]:
    what = "2 layers of width 1024, 16/4 heads, FFN 2048, 8 experts, top-2, vocabulary 4096, 1 x 512 tokens"
    for precision in DTYPES:
        yield Case(precision, f"{what}, {precision}", 512, lambda p=precision: _steps(_models(data, envs, precision=p)))
    what = "SmolLM2-135M and three siblings, top-1, 1 x 256 tokens, bf16"
    yield Case("smollm2", what, 256, lambda: _steps(_models(data, envs, "smollm2", length=256), more=PEERS))


def kept_cases(data: Path, envs: Path) -> Iterator[Case]:
    """Mixtures of which only some experts are kept, against the dense model and the whole mixture."""
    for attention in BOTH:
        for part, tokens in (("decode", 1), ("prefill", 256)):
            what = f"SmolLM2-135M and three siblings, 30 layers, bf16, {attention}; " + (
                "64 tokens before" if part == "decode" else "1 x 256 tokens"
            )
            yield Case(f"{part} {attention}", what, tokens, lambda a=attention, p=part: _kept(data, envs, a, p))


def _kept(data: Path, envs: Path, attention: str, part: str) -> dict[str, Once]:
    models = _models(data, envs, "smollm2", sizes={"num_hidden_layers": 30})
    ids = torch.randint(3, 4096, (1, 257), generator=torch.Generator().manual_seed(0))
    whole = models.get(attention).eval()
    _use(whole, "branchmix")
    candidates = {
        "dense": models.get("dense").eval(),
        "one expert kept": whole.keep_experts([1]),
        "two experts kept": whole.keep_experts([1, 2]),
        "all experts": whole,
    }

    return {name: (lambda model=model: _infer(model, ids, part)) for name, model in candidates.items()}


def _infer(model: Any, ids: torch.Tensor, part: str) -> Seconds:
    """A prompt of 256 tokens, or one token behind 64 others."""
    with torch.no_grad():
        if part == "prefill":
            return {"": seconds_of(lambda: model(ids[:, :256], use_cache=True, logits_to_keep=1))}
        cache = model(ids[:, :64], use_cache=True).past_key_values
        return {"": min(seconds_of(lambda: _one(model, ids[:, :65], cache)) for _ in range(3))}


LOW_RANKS = (16, 128)


def low_rank_cases(data: Path, envs: Path) -> Iterator[Case]:
    """Mixtures of the seed and three experts as changes of it, against whole experts, the dense model, and Arrow."""
    for attention in BOTH:
        for part, tokens in (("decode", 1), ("prefill", 256), ("training", 256)):
            what = f"SmolLM2-135M and three experts, 30 layers, {attention}, FFN top-1, " + (
                "bf16; 64 tokens before" if part == "decode" else f"1 x {tokens} tokens, "
            )
            what += {"decode": "", "prefill": "bf16", "training": "fp32; all is trained, of Arrow the adapters"}[part]
            yield Case(f"{part} {attention}", what, tokens, lambda a=attention, p=part: _low_rank(a, p))


def _low_rank(attention: str, part: str) -> dict[str, Once]:
    """Random weights of the real sizes: what is measured does not depend on them."""
    dtype = torch.float32 if part == "training" else torch.bfloat16
    seed = _smollm2()
    ids = torch.randint(3, 4096, (1, 257), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)

    def mixture(rank: int | None) -> Any:
        names = "q k v o gate up down" if attention == "kv_experts" else "q o gate up down"
        ranks = None if rank is None else [{name: [0, rank, rank, rank] for name in names.split()}]
        options = {"attention": attention, "num_experts": 4, "num_experts_per_tok": 1, "expert_ranks": ranks}
        return BranchMixForCausalLM._from_config(mixture_config(seed, **options)).to(dtype).eval()

    candidates = {"dense": AutoModelForCausalLM.from_config(seed, dtype=dtype).eval()}
    candidates |= {f"rank {rank}": mixture(rank) for rank in LOW_RANKS}
    candidates["whole experts"] = mixture(None)
    if part != "training":
        candidates |= {f"rank {rank}, one kept": candidates[f"rank {rank}"].keep_experts([1]) for rank in LOW_RANKS}
        candidates["whole experts, one kept"] = candidates["whole experts"].keep_experts([1])
    if attention == "kv_experts":
        candidates[f"arrow, rank {LOW_RANKS[0]}"] = _arrow(seed, dtype)

    def step(model: Any) -> Seconds:
        return {"": steps.step(model, ids[:, :256], "fp32")} if part == "training" else _infer(model, ids, part)

    return {name: (lambda model=model: step(model)) for name, model in candidates.items()}


def _smollm2() -> Any:
    return LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )


def _arrow(seed: Any, dtype: torch.dtype) -> Any:
    """PEFT's Arrow router over three adapters of all projections, top-1."""
    import peft

    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number in range(3):
            settings = peft.LoraConfig(r=LOW_RANKS[0], target_modules="all-linear", init_lora_weights=False)
            base = AutoModelForCausalLM.from_config(seed, dtype=dtype)
            paths.append(f"{folder}/{number}")
            peft.get_peft_model(base, settings).save_pretrained(paths[-1])
        arrow = peft.create_arrow_model(
            base_model=AutoModelForCausalLM.from_config(seed, dtype=dtype),
            task_specific_adapter_paths=paths,
            arrow_config=peft.ArrowConfig(top_k=1, router_temperature=1.0),
        )
    for name, parameter in arrow.named_parameters():
        parameter.requires_grad_("lora_" in name)  # peft loads them frozen
    return arrow.eval()


def training_cases(data: Path, envs: Path) -> Iterator[Case]:
    what = "2 layers of width 1024, 16/4 heads, FFN 2048, 8 experts, top-2, vocabulary 4096, 1 x 512 tokens"
    for precision in DTYPES:
        models = lambda p=precision: _models(data, envs, precision=p)  # noqa: E731
        yield Case(precision, f"{what}, {precision}", 512, lambda m=models: _steps(m(), train=True))


def _steps(models: steps.Models, *, train: bool = False, more: dict[str, Any] | None = None) -> dict[str, Once]:
    """A forward pass, or a training step, by part: attention, FFN (or its experts), and the rest."""
    shape = models.shape
    ids = torch.randint(3, 4096, (shape.batch, shape.length), generator=torch.Generator().manual_seed(0))
    chosen = {name: pair for name, pair in CANDIDATES.items() if name != "mixtral batched_mm"}
    once: dict[str, Once] = {}

    def step(which: str, experts: str | None, *, by_part: bool) -> Seconds:
        model = models.get(which).train(train)
        _use(model, experts)
        clock = PartClock(model) if by_part else None
        try:
            with torch.set_grad_enabled(train):
                total = steps.step(model, ids, models.precision) if train else seconds_of(lambda: model(input_ids=ids))
        finally:
            parts = clock.stop() if clock else {}
        return {"": total, **parts}

    for name, (which, experts) in {**chosen, **(more or {})}.items():
        by_part = name in ("dense", "mixtral grouped_mm", "btx", "expert kv", "shared kv")
        once[name] = lambda w=which, e=experts, p=by_part: step(w, e, by_part=p)

    floors: dict[str, steps.Floor] = {}

    def floor() -> Seconds:
        if not floors:
            floors["btx"] = steps.Floor()
            with floors["btx"]:
                step("average", "branchmix", by_part=False)
        return {"": floors["btx"].seconds()}

    return {**once, "floor": floor}


class PartClock:
    """CPU seconds of a model's attention and FFN modules, forward and backward, by hooks that cost microseconds."""

    def __init__(self, model: nn.Module):
        self.seconds: dict[str, float] = defaultdict(float)
        self.begun: dict[Any, float] = {}
        self.hooks: list[Any] = []
        for name, module in model.named_modules():
            part = {"self_attn": "attention", "mlp": "ffn", "block_sparse_moe": "ffn"}.get(name.rpartition(".")[2])
            if part:
                self._watch(module, part)

    def _watch(self, module: nn.Module, part: str) -> None:
        def begin(key: str) -> Callable[..., None]:
            return lambda *_: self.begun.__setitem__((module, key), time.process_time())

        def end(key: str) -> Callable[..., None]:
            def add(*_: Any) -> None:
                self.seconds[f"{part}, {key}"] += time.process_time() - self.begun.pop((module, key))

            return add

        def returned(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            """The backward lasts from the output's gradient to the input's: only this module has the input."""
            entered = args[0] if args else kwargs["hidden_states"]
            left = output[0] if isinstance(output, tuple) else output
            if left.requires_grad and entered.requires_grad:
                left.register_hook(begin("backward"))
                entered.register_hook(end("backward"))

        self.hooks += [
            module.register_forward_pre_hook(begin("forward")),
            module.register_forward_hook(end("forward")),
            module.register_forward_hook(returned, with_kwargs=True),
        ]

    def stop(self) -> Seconds:
        for hook in self.hooks:
            hook.remove()
        return dict(self.seconds)


def growth_cases(data: Path, envs: Path) -> Iterator[Case]:
    """A forward pass over the number of experts, the length and the width; all else as in the middle."""
    middle = {"experts": 4, "length": 512, "width": 512}
    axes = {"experts": (1, 2, 4, 8, 16), "length": (128, 512, 1024, 2048, 4096), "width": (128, 256, 512, 1024)}
    for axis, values in axes.items():
        for value in values:
            at = {**middle, axis: value}
            what = f"2 layers of width {at['width']}, {at['experts']} experts, top-1, {at['length']} tokens, bf16"
            yield Case(f"{axis} {value}", what, at["length"], lambda at=at: _growth(data, envs, at), (axis, value))


def _growth(data: Path, envs: Path, at: dict[str, int]) -> dict[str, Once]:
    width = at["width"]
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "head_dim": 64, "max_position_embeddings": 4096}
    sizes |= {"num_attention_heads": max(2, width // 64), "num_key_value_heads": max(1, width // 256)}
    models = _models(data, envs, sizes=sizes, num_experts=at["experts"], top_k=1, length=at["length"])
    found = _steps(models)
    return {name: lambda name=name: {"": found[name]()[""]} for name in ("dense", "btx", "expert kv", "shared kv")}


# ---- top-k attention ----

SPARSE: dict[str, tuple[str, bool | None]] = {
    "btx": ("average", None),
    "shared kv top-1": ("kv_sharing top-1", True),
    "shared kv top-1, all computed": ("kv_sharing top-1", False),
    "shared kv top-2": ("kv_sharing top-2", True),
    "expert kv top-1": ("kv_experts top-1", True),
    "expert kv top-1, all computed": ("kv_experts top-1", False),
}
"""Kind of attention, and whether only the chosen experts' heads are computed."""


def sparse_cases(data: Path, envs: Path) -> Iterator[Case]:
    """Attention experts that compute what is chosen, against BTX, which has the FLOPs of Shared KV top-1."""
    sizes = "2 layers of width 1024, 16/4 heads, FFN 2048, top-1, vocabulary 4096"
    for length in (512, 2048):
        names = [name for name in SPARSE if length == 512 or "all" not in name]
        for part in ("training", "prefill"):
            for precision in DTYPES:
                yield Case(
                    f"{part} {length} {precision}",
                    f"{sizes}, 4 experts, 1 x {length} tokens, {precision}",
                    length,
                    lambda t=length, p=part, d=precision, n=names: _sparse(data, envs, p, d, t, 4, n),
                )
    for precision in DTYPES:
        what = f"{sizes}, 4 experts, {precision}; 512 tokens before"
        yield Case(
            f"decode {precision}", what, 1, lambda d=precision: _sparse(data, envs, "decode", d, 512, 4, list(SPARSE))
        )
    few = ["btx", "shared kv top-1", "expert kv top-1"]
    for experts in (2, 4, 8, 16):
        yield Case(
            f"{experts} experts",
            f"{sizes}, {experts} experts, prefill of 1 x 512 tokens, fp32",
            512,
            lambda n=experts: _sparse(data, envs, "prefill", "fp32", 512, n, few),
        )


def _sparse(
    data: Path, envs: Path, part: str, precision: str, length: int, experts: int, names: list[str]
) -> dict[str, Once]:
    models = _models(data, envs, precision=precision, length=length, num_experts=experts, top_k=1)
    ids = torch.randint(3, 4096, (1, length + 1), generator=torch.Generator().manual_seed(0))

    def step(name: str) -> Seconds:
        which, sparse = SPARSE[name]
        model = models.get(which).train(part == "training")
        for module in model.modules():
            if isinstance(module, BranchMixAttention):
                module.sparse = sparse
        _use(model, "branchmix")
        if part == "training":
            return {"": steps.step(model, ids[:, :length], precision)}
        with torch.no_grad():
            if part == "prefill":
                return {"": seconds_of(lambda: model(ids[:, :length], use_cache=True, logits_to_keep=1))}
            cache = model(ids[:, :length], use_cache=True, logits_to_keep=1).past_key_values
            return {"": min(seconds_of(lambda: _one(model, ids[:, -65:], cache)) for _ in range(3))}

    return {name: lambda name=name: step(name) for name in names}


CHOSEN = (("fp32", 192, 6, 2, (16, 64, 128, 256, 1024)), ("bf16", 576, 9, 3, (1, 32, 64, 128, 512)))
"""Precision, width, query heads, K/V heads, and numbers of tokens on both sides of ``LEAST_SAVED``."""


def chosen_cases(data: Path, envs: Path) -> Iterator[Case]:
    """One layer's top-k attention that computes the chosen experts' heads, against all of them: for ``LEAST_SAVED``."""
    for precision, width, heads, kv_heads, lengths in CHOSEN:
        sizes = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
        for attention in BOTH[::-1]:
            for top_k, length in [(1, length) for length in lengths] + [(2, lengths[-1])]:
                name = f"{'Expert KV' if attention == 'kv_experts' else 'Shared KV'} top-{top_k}"
                saved = 2 * (4 - top_k) * width * width * length / 1e6
                yield Case(
                    f"{attention} top-{top_k} {length} {precision}",
                    f"{name}, width {width}, {heads}/{kv_heads} heads, {length} tokens, {precision}; "
                    f"{saved:.3g} million multiplications saved",
                    length,
                    lambda s=sizes, a=attention, k=top_k, t=length, p=precision: _chosen(s, a, k, t, DTYPES[p]),
                )


def _chosen(sizes: dict[str, int], attention: str, top_k: int, length: int, dtype: torch.dtype) -> dict[str, Once]:
    model, call, grad = _one_layer(sizes, length, dtype, attention=attention, attention_num_experts_per_tok=top_k)
    wide = model.model.model.layers[0].self_attn

    def run(sparse: bool) -> torch.Tensor:
        wide.sparse = sparse
        return call(wide)

    runs = {"all": lambda: run(False), "chosen only": lambda: run(True)}
    return _passes(runs, {name: list(wide.parameters()) for name in runs}, grad)


GROUPS: dict[str, Callable[[Path, Path], Iterator[Case]]] = {
    "attention": attention_cases,
    "decode": decode_cases,
    "kept": kept_cases,
    "low-rank": low_rank_cases,
    "prefill": prefill_cases,
    "training": training_cases,
    "growth": growth_cases,
    "sparse": sparse_cases,
    "chosen": chosen_cases,
}
TITLES = {
    "attention": "Attention of one layer: 4 experts of 16 heads over 4 K/V heads, width 1024",
    "decode": "One step of decoding",
    "kept": "Mixtures of which only some experts are kept",
    "low-rank": "Experts as low-rank changes of the seed",
    "prefill": "Forward pass, by part",
    "training": "Training step, by part",
    "growth": "Growth of a forward pass",
    "sparse": "Top-k attention that computes what is chosen",
    "chosen": "Top-k attention of one layer: the chosen experts' heads, or all",
}


def plot_growth(groups: list[dict[str, Any]], path: Path) -> None:
    """CPU milliseconds over experts, length and width, a line for each candidate."""
    if not groups:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for found in groups:
        axis, value = found["x"]
        for name, seconds in found["seconds"].items():
            lines[axis][name].append((value, 1e3 * median(seconds)))
    figure, axes = pyplot.subplots(1, len(lines), figsize=(4.2 * len(lines), 3.6), squeeze=False)
    for plot, (axis, by_name) in zip(axes[0], lines.items(), strict=True):
        for name, points in by_name.items():
            plot.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=name)
        plot.set_xscale("log", base=2)
        plot.set_yscale("log")
        ticks = sorted({value for points in by_name.values() for value, _ in points})
        plot.set_xticks(ticks, [str(tick) for tick in ticks])
        plot.set_xlabel({"experts": "experts", "length": "tokens of a sequence", "width": "width"}[axis])
        plot.grid(alpha=0.3)
    axes[0][0].set_ylabel("CPU ms of a forward pass")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)

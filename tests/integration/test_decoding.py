"""Steps of decoding: experts of few tokens one by one, caches to the byte, compiled steps."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import StaticCache

from branchmix.models import experts_branchmix, linear_branchmix
from branchmix.models.linear_branchmix import PackedWeight, linear
from families import BY_NAME, FAMILIES
from mixtures import BOTH, close, load, random_mixture, tokens

KINDS = {"llama": "gated", "llama-bias": "gated, biases", "nemotron": "plain", "gpt2": "plain, biases"}


@pytest.fixture
def prefer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """``prefer(name)``: of ways to compute few rows the fastest; experts go one by one but for ``grouped``."""

    def choose(name: str) -> None:
        monkeypatch.setattr(linear_branchmix, "fastest_on_cpu", lambda calls: name if name in calls else "linear")
        monkeypatch.setattr(experts_branchmix, "fastest_on_cpu", lambda calls: list(calls)[name == "grouped"])

    linear_branchmix._fastest.cache_clear()
    experts_branchmix._one_by_one_is_faster.cache_clear()
    yield choose
    linear_branchmix._fastest.cache_clear()
    experts_branchmix._one_by_one_is_faster.cache_clear()


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call that goes to transformers' kernel."""
    calls: list[int] = []
    real = experts_branchmix.grouped_mm_experts_forward

    def counting(experts: Any, hidden: torch.Tensor, *args: Any) -> torch.Tensor:
        calls.append(len(hidden))
        return real(experts, hidden, *args)

    monkeypatch.setattr(experts_branchmix, "grouped_mm_experts_forward", counting)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("name", KINDS)
def test_few_tokens_go_one_by_one(
    name: str, top_k: int, dtype: torch.dtype, grouped: list[int], prefer: Callable[[str], None]
) -> None:
    prefer("linear")
    model = random_mixture(name, "average", num_experts_per_tok=top_k)
    experts = next(m for m in model.modules() if isinstance(m, experts_branchmix.BranchMixExperts)).to(dtype)
    assert model.config._experts_implementation == "branchmix"
    for count in (1, 2, 8, 16):
        torch.manual_seed(count)
        hidden = torch.randn(count, 32, dtype=dtype)
        gates, index = torch.randn(count, 3).softmax(-1).topk(top_k)
        with torch.no_grad():
            found = experts(hidden, index, gates)
            assert found.dtype == dtype and not grouped
            model.set_experts_implementation("eager")
            expected = experts(hidden, index, gates)
            model.set_experts_implementation("branchmix")
        close(found, expected, 1e-6 if dtype == torch.float32 else 1e-2)


def test_few_tokens_are_grouped_where_that_is_faster(grouped: list[int], prefer: Callable[[str], None]) -> None:
    prefer("grouped")
    model = random_mixture("llama", "average")
    with torch.no_grad():
        model(tokens(1, 2))
        assert grouped == [2, 2]
        model(tokens(1, 1))
        assert grouped == [2, 2], "one token has nothing to group"


def test_dtypes_that_cannot_be_grouped_are_not_timed(grouped: list[int], prefer: Callable[[str], None]) -> None:
    prefer("grouped")
    with torch.no_grad():
        assert random_mixture("llama", "average").double()(tokens(1, 2)).logits.dtype == torch.float64
    assert not grouped


def test_nothing_is_timed_while_torch_compiles(grouped: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_mixture("llama", "average")
    monkeypatch.setattr(
        experts_branchmix, "_one_by_one_is_faster", lambda *_: pytest.fail("a timing cannot be compiled")
    )
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    experts = next(m for m in model.modules() if isinstance(m, experts_branchmix.BranchMixExperts))
    with torch.no_grad():
        experts(torch.randn(2, 32), *torch.rand(2, 3).topk(2)[::-1])
    assert grouped == [2]


def test_many_tokens_and_gradients_go_to_transformers_kernel(grouped: list[int], prefer: Callable[[str], None]) -> None:
    prefer("linear")
    model = random_mixture("llama", "average")
    with torch.no_grad():
        model(tokens(1, 16))
        assert grouped == []
        model(tokens(1, 17))
        assert grouped == [17, 17]
    model(tokens(1, 3)).logits.sum().backward()
    assert grouped == [17, 17, 3, 3]
    model.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        model(tokens(1, 4))
    assert grouped == [17, 17, 3, 3], "what was asked for is what runs: transformers' own entry"


def test_autocast_reaches_few_tokens() -> None:
    model = random_mixture("llama", "average")
    experts = next(m for m in model.modules() if isinstance(m, experts_branchmix.BranchMixExperts))
    gates, index = torch.rand(2, 3).topk(2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert experts(torch.randn(2, 32), index, gates).dtype == torch.bfloat16


def num_bytes(cache: Any) -> int:
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


@pytest.mark.parametrize("name", ["llama", "qwen3", "cohere", "gpt-neox", "falcon"])
def test_shared_kv_caches_are_the_dense_models_to_the_byte(name: str) -> None:
    """Dynamic and static; Expert KV takes N times as much."""
    dense = BY_NAME[name].model(0).bfloat16()
    models = {kind: random_mixture(name, kind).bfloat16() for kind in BOTH}
    found: dict[str, list[int]] = {}
    for kind, model in {"dense": dense, **models}.items():
        static = StaticCache(model.config.get_text_config(), max_cache_len=20)
        with torch.no_grad():
            dynamic = model(tokens(2, 11), use_cache=True).past_key_values
            model(tokens(2, 11), past_key_values=static, use_cache=True)
        found[kind] = [num_bytes(dynamic), num_bytes(static)]
    config = dense.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = 1 if name == "falcon" else getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * head_dim * 2 * 2  # K and V, bf16, two sequences
    assert found["dense"] == [11 * per_token, 20 * per_token]
    assert found["kv_sharing"] == found["dense"]
    assert found["kv_experts"] == [3 * size for size in found["dense"]]


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", ["llama", "cohere"])
def test_a_compiled_step_with_a_static_cache_is_the_same(name: str, attention: str, packed: bool) -> None:
    model = random_mixture(name, attention)
    model.set_packed_weights(packed)
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, 8]
        cache = StaticCache(model.config.get_text_config(), max_cache_len=16)
        model(ids[:, :8], past_key_values=cache, use_cache=True)
        torch._dynamo.reset()
        step = torch.compile(model, fullgraph=True)
        found = step(ids[:, 8:], past_key_values=cache, position_ids=torch.full((2, 1), 8), use_cache=True).logits[:, 0]
    close(found, expected)


@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_row_is_as_near_to_the_truth_as_many(
    dtype: torch.dtype, bias: bool, faster: bool, prefer: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer("mv" if faster else "linear")
    torch.manual_seed(0)
    x, weight = torch.randn(1, 1, 777, dtype=dtype), torch.randn(333, 777, dtype=dtype)
    shift = torch.randn(333, dtype=dtype) if bias else None
    truth = F.linear(x.double(), weight.double(), None if shift is None else shift.double())
    calls: list[str] = []
    for name in ("mv", "addmv"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, real=real, name=name: calls.append(name) or real(*args))
    with torch.no_grad():
        found, many = linear(x, weight, shift), F.linear(x, weight, shift)
        assert found.shape == many.shape and found.dtype == dtype
        assert (found.double() - truth).norm() < 1.5 * (many.double() - truth).norm() + 1e-6 * truth.norm()
        assert calls == ([] if dtype == torch.float32 or not faster else ["addmv" if bias else "mv"])
        linear(x.expand(1, 2, -1), weight, shift)
    linear(x, weight.requires_grad_(), shift)
    assert len(calls) <= 1, "two rows, and gradients"


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt-neox", "phi3"])
def test_a_step_of_one_sequence_is_that_of_two(name: str, attention: str, prefer: Callable[[str], None]) -> None:
    """One row goes another way than two, through every projection of the attention experts."""
    prefer("mv")
    model = random_mixture(name, attention).bfloat16()
    ids = tokens(1, 9)
    with torch.no_grad():
        steps = []
        for rows in (1, 2):
            cache = model(ids[:, :8].expand(rows, -1), use_cache=True).past_key_values
            steps.append(model(ids[:, 8:].expand(rows, -1), past_key_values=cache).logits[0].float())
    assert (steps[0] - steps[1]).norm() < 0.02 * steps[1].norm()


@pytest.mark.usefixtures("prefer")  # which forgets what was timed
def test_what_is_timed_is_what_may_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[list[str]] = []
    monkeypatch.setattr(linear_branchmix, "fastest_on_cpu", lambda calls: timed.append(list(calls)) or "linear")
    weights = {dtype: torch.randn(8, 4, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}
    with torch.no_grad():
        for dtype, weight in weights.items():
            for rows in (1, 4, 5):
                for packed in (None, PackedWeight(weight)):
                    linear(torch.randn(rows, 4, dtype=dtype), weight, None, packed)
    assert timed == [
        ["linear", "mv"],
        ["linear", "mv", "packed"],
        ["linear", "packed"],  # once for all of several rows
        ["linear", "packed"],  # fp32, one row
        ["linear", "packed"],
    ]


@pytest.fixture
def packed_calls(monkeypatch: pytest.MonkeyPatch, prefer: Callable[[str], None]) -> list[int]:
    """Rows of each product with a packed weight, which is taken wherever there is one."""
    calls: list[int] = []
    real = PackedWeight.linear

    def counting(packed: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(x.numel() // x.shape[-1])
        return real(packed, x, bias)

    monkeypatch.setattr(PackedWeight, "linear", counting)
    prefer("packed")
    return calls


@pytest.mark.parametrize("attention", ["average", *BOTH])
@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_packed_weights_compute_the_same(name: str, attention: str, packed_calls: list[int]) -> None:
    model = random_mixture(name, attention)
    keys = list(model.state_dict())
    prompt, step = tokens(2, 9)[:, :8], tokens(2, 9)[:, 8:]
    of_step: list[int] = []

    def logits() -> list[torch.Tensor]:
        cache = model(prompt[:1], use_cache=True).past_key_values
        begin = len(packed_calls)
        one = model(step[:1], past_key_values=cache).logits
        of_step[:] = packed_calls[begin:]
        return [one, model(prompt).logits, model(tokens(2, 17)).logits]  # 1, 16 and 34 rows

    with torch.no_grad():
        expected = logits()
        assert not packed_calls
        num_bytes = model.set_packed_weights(True)
        for ours, theirs in zip(logits(), expected, strict=True):
            close(ours, theirs)
    assert max(packed_calls) == 16
    linears = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and type(module).__name__ != "FalconLinear"  # computes in a way of its own
    ]
    stacks = [module for module in model.modules() if isinstance(module, experts_branchmix.BranchMixExperts)]
    matrices = [*linears, *(matrix for experts in stacks for matrix in (experts.first_proj, experts.down_proj))]
    assert num_bytes == sum(matrix.numel() * 4 for matrix in matrices)
    assert of_step == [1] * (len(linears) + 2 * 2 * len(stacks)), "every map, two matrices of two experts"
    assert list(model.state_dict()) == keys
    assert model.set_packed_weights(False) == 0
    packed_calls.clear()
    with torch.no_grad():
        model(prompt)
    assert not packed_calls


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_weights_are_as_near_to_the_truth(
    dtype: torch.dtype, rows: int, bias: bool, packed_calls: list[int]
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(777, rows, dtype=dtype).T[None], torch.randn(333, 777, dtype=dtype)
    shift = torch.randn(333, dtype=dtype) if bias else None
    truth = F.linear(x.double(), weight.double(), None if shift is None else shift.double())
    with torch.no_grad():
        found, plain = linear(x, weight, shift, PackedWeight(weight)), F.linear(x, weight, shift)
    assert packed_calls == [rows] and found.shape == plain.shape and found.dtype == dtype
    assert (found.double() - truth).norm() < 1.1 * (plain.double() - truth).norm() + 1e-6 * truth.norm()


def test_packed_weights_of_changed_weights_are_not_used(packed_calls: list[int]) -> None:
    model, other = random_mixture("llama"), random_mixture("llama")
    ids = tokens(1, 3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
        model.set_packed_weights(True)
        model.load_state_dict(other.state_dict())
        close(model(ids).logits, other(ids).logits, 0)
        assert not packed_calls
        model.set_packed_weights(True)
        close(model(ids).logits, other(ids).logits)
        assert packed_calls
        packed_calls.clear()
        close(model.bfloat16()(ids).logits, other.bfloat16()(ids).logits, 0)
    assert not packed_calls


def test_packed_weights_stay_out_of_training_and_of_copies(packed_calls: list[int], tmp_path: Path) -> None:
    model = random_mixture("llama")
    model.set_packed_weights(True)
    ids = tokens(1, 3)
    model(ids).logits.sum().backward()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.no_grad(), torch.autocast("cpu", dtype):
            model(ids)
    for name, again in {"copy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}.items():
        with torch.no_grad():
            assert torch.isfinite(again(ids).logits).all(), name
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        saved = load(tmp_path)(ids).logits
    assert not packed_calls
    with torch.inference_mode():
        close(model(ids).logits, saved)
    assert packed_calls


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.half(), "bfloat16 and float32 only"),
        (lambda model: model.to("meta"), "for CPUs only"),
    ],
)
def test_what_cannot_be_packed_is_refused(change: Callable[[Any], Any], reason: str) -> None:
    model = change(random_mixture("llama"))
    with pytest.raises(ValueError, match=reason):
        model.set_packed_weights(True)
    assert not any(getattr(module, "packed", None) for module in model.modules())

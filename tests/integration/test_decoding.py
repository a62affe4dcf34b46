"""Steps of decoding: experts of few tokens one by one, caches to the byte, compiled steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import StaticCache

from branchmix.models import experts_branchmix, linear_branchmix
from branchmix.models.linear_branchmix import linear
from families import BY_NAME
from mixtures import BOTH, close, random_mixture, tokens

KINDS = {"llama": "gated", "llama-bias": "gated, biases", "nemotron": "plain", "gpt2": "plain, biases"}


@pytest.fixture
def prefer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """``prefer(name)`` decides what is timed to be faster: ``mv`` or ``linear``; experts in groups for ``grouped``."""

    def choose(name: str) -> None:
        monkeypatch.setattr(linear_branchmix, "fastest_on_cpu", lambda calls: name if name in calls else "linear")
        monkeypatch.setattr(experts_branchmix, "fastest_on_cpu", lambda calls: list(calls)[name == "grouped"])

    linear_branchmix._mv_is_faster.cache_clear()
    experts_branchmix._one_by_one_is_faster.cache_clear()
    yield choose
    linear_branchmix._mv_is_faster.cache_clear()
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
@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", ["llama", "cohere"])
def test_a_compiled_step_with_a_static_cache_is_the_same(name: str, attention: str) -> None:
    model = random_mixture(name, attention)
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
def test_only_one_row_of_16_bits_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[list[str]] = []
    monkeypatch.setattr(linear_branchmix, "fastest_on_cpu", lambda calls: timed.append(list(calls)) or "linear")
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32):
            for rows in (1, 4, 1):
                linear(torch.randn(rows, 4, dtype=dtype), torch.randn(8, 4, dtype=dtype))
    assert timed == [["linear", "mv"]]

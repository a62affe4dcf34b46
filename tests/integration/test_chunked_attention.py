"""Attention in chunks against torch's fused attention and against plain softmax: masks, groups, gradients, families."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function

from branchmix.data.sequences import isolates_documents
from branchmix.models import chunked_branchmix as chunked
from branchmix.models import mixture_config
from branchmix.models.modeling_branchmix import BranchMixForCausalLM, BranchMixModel
from branchmix.models.routing_branchmix import BranchMixRouter
from families import BY_NAME, NAMES
from mixtures import BOTH, close, random_mixture, tokens

LENGTH = 75
"""Not a multiple of a chunk."""
GROUPS = {"multi-head": (3, 3), "grouped": (6, 2), "multi-query": (40, 1)}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of queries, rows and heads even for tiny models."""
    monkeypatch.setattr(chunked, "_CHUNKS", (16, 16))
    monkeypatch.setattr(chunked, "_SCORES_BYTES", 6000)
    monkeypatch.setattr(chunked, "_SCORES_BYTES_FP32", 12000)
    monkeypatch.setattr(chunked, "SHORTEST", 4)
    monkeypatch.setattr(chunked, "SHORTEST_FORWARD", 7)


def operands(heads: int, kv_heads: int, dtype: torch.dtype = torch.float32, *, length: int = LENGTH) -> list[Any]:
    torch.manual_seed(0)
    shapes = [(3, length, n, 8) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes]


def masks(heads: int) -> dict[str, torch.Tensor | None]:
    """[B, 1 or H, T, T] of every kind that families make, and some that only users make."""
    shape = {"batch_size": 3, "q_length": LENGTH, "kv_length": LENGTH}
    padding = torch.ones(3, LENGTH)
    padding[1, :20] = 0
    padding[2, 50:] = 0
    documents = torch.arange(LENGTH)[None].expand(3, -1) // torch.tensor([[9], [30], [75]])
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    window = sliding_window_causal_mask_function(7)
    torch.manual_seed(1)
    return {
        "causal": None,
        "padding": sdpa_mask(**shape, attention_mask=padding.bool()),
        "window": sdpa_mask(**shape, mask_function=window, local_size=7),
        "padded window": sdpa_mask(**shape, mask_function=window, attention_mask=padding.bool(), local_size=7),
        "documents": (documents[:, :, None] == documents[:, None, :])[:, None] & causal,
        "both ways": torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool),
        "each head its own": torch.rand(1, heads, LENGTH, LENGTH) < 0.3,
        "nothing at all": torch.zeros(3, 1, LENGTH, LENGTH, dtype=torch.bool),
        "added": torch.randn(3, heads, LENGTH, LENGTH).masked_fill(~causal, float("-inf")),
    }


def plain(q: Any, k: Any, v: Any, mask: Any, scale: float, soft_cap: float | None = None) -> torch.Tensor:
    """Softmax attention as its formula says, in the operands' dtype; zero where nothing may be seen."""
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) * scale
    if soft_cap is not None:
        scores = torch.tanh(scores / soft_cap) * soft_cap
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1).nan_to_num(0.0)
    return (weights @ v.repeat_interleave(group, 1)).transpose(1, 2)


def with_gradients(function: Any, inputs: list[Any]) -> list[torch.Tensor]:
    out = function(*inputs)
    torch.manual_seed(2)
    return [out, *torch.autograd.grad(out, inputs, torch.randn(out.shape, dtype=out.dtype))]


@pytest.mark.parametrize("mask", list(masks(6)))
@pytest.mark.parametrize("group", GROUPS)
def test_equals_softmax_attention_and_so_do_gradients(group: str, mask: str) -> None:
    heads, kv_heads = GROUPS[group]
    inputs = operands(heads, kv_heads, torch.float64)
    given = masks(heads)[mask]
    given = given.double() if given is not None and given.is_floating_point() else given
    module = SimpleNamespace(is_causal=True)

    def ours(q: Any, k: Any, v: Any) -> torch.Tensor:
        return chunked.chunked_attention_forward(module, q, k, v, given, scaling=0.4)[0]

    expected = with_gradients(lambda q, k, v: plain(q, k, v, given, 0.4), inputs)
    for found, right in zip(with_gradients(ours, inputs), expected, strict=True):
        right = right.nan_to_num(0.0)  # of rows that see nothing, autograd says nan
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12)
        assert mask == "nothing at all" or right.abs().max() > 0.1


def test_gradients_by_finite_differences() -> None:
    inputs = operands(4, 2, torch.float64, length=19)
    mask = torch.rand(3, 1, 19, 19) < 0.5
    for given, cap in ((None, None), (mask, None), (None, 1.5), (mask, 1.5)):
        settings = chunked._ScoreOptions(scale=0.4, causal=given is None, soft_cap=cap)
        apply = lambda q, k, v, g=given, s=settings: chunked._ChunkedAttention.apply(q, k, v, g, s, True)  # noqa: E731
        torch.autograd.gradcheck(apply, inputs, fast_mode=True)


def test_soft_caps() -> None:
    inputs = operands(6, 2, torch.float64)
    module = SimpleNamespace(is_causal=True)
    for mask in (None, masks(6)["padding"]):
        expected = with_gradients(lambda q, k, v, m=mask: plain(q, k, v, m, 0.4, 1.5), inputs)
        for forward in (chunked.chunked_attention_forward, chunked.automatic_attention_forward):
            ours = lambda q, k, v, m=mask, f=forward: f(module, q, k, v, m, scaling=0.4, softcap=1.5)[0]  # noqa: E731
            for found, right in zip(with_gradients(ours, inputs), expected, strict=True):
                torch.testing.assert_close(found, right.nan_to_num(0.0), rtol=0, atol=1e-12)


PROCESSORS = {"AMX": (True, True), "fast bf16": (False, True), "slow bf16": (False, False)}
"""Whether there is AMX, and whether bf16 is the faster one."""


def pretend(processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    amx, faster = PROCESSORS[processor]
    monkeypatch.setattr(chunked, "has_amx", lambda: amx)
    monkeypatch.setattr(chunked, "faster_in_bf16", lambda device: faster)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mask", ["causal", "padding", "window", "documents"])
def test_bf16_is_as_near_to_the_truth_as_eager(
    mask: str, autocast: bool, processor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The automatic choice, with chunks in both passes or in the backward only, against fp64 of the same operands."""
    pretend(processor, monkeypatch)
    given, module = masks(6)[mask], SimpleNamespace(is_causal=True, num_key_value_groups=3)
    rounded = [x.detach().bfloat16() for x in operands(6, 2)]
    truth = with_gradients(lambda *x: plain(*x, given, 0.4), [x.double().requires_grad_() for x in rounded])
    eager = with_gradients(lambda *x: plain(*x, given, 0.4), [x.clone().requires_grad_() for x in rounded])
    inputs = [x.float().requires_grad_() if autocast else x.clone().requires_grad_() for x in rounded]

    def ours(*x: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return chunked.automatic_attention_forward(module, *x, given, scaling=0.4)[0]

    assert ours(*inputs).dtype == torch.bfloat16
    for found, theirs, right in zip(with_gradients(ours, inputs), eager, truth, strict=True):
        right, theirs = right.nan_to_num(0.0), theirs.nan_to_num(0.0)
        error, bound = (found.double() - right).norm(), (theirs.double() - right).norm()
        assert error < 1.5 * bound + 1e-6 * right.norm()


def counted(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, int]:
    """How often functions of the module run."""
    calls = dict.fromkeys(names, 0)
    for name in names:
        real = getattr(chunked, name)

        def counting(*args: Any, real: Any = real, name: str = name, **kwargs: Any) -> Any:
            calls[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(chunked, name, counting)
    return calls


@pytest.mark.parametrize("processor", PROCESSORS)
def test_chosen_by_dtype_length_and_processor(processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(processor, monkeypatch)
    amx = processor == "AMX"
    calls = counted(monkeypatch, "_chunks", "sdpa_attention_forward")
    module = SimpleNamespace(is_causal=True, num_key_value_groups=3)

    def run(dtype: torch.dtype, length: int, *, grad: bool, dropout: float = 0.0) -> tuple[int, ...]:
        before = dict(calls)
        inputs = operands(6, 2, dtype, length=length)
        with torch.set_grad_enabled(grad):
            out = chunked.automatic_attention_forward(module, *inputs, None, dropout=dropout)[0]
            if grad:
                out.sum().backward()
        return tuple(calls[name] - before[name] for name in calls)

    in_neither, in_backward, in_both = (0, 1), (1, 1), (2, 0)
    assert run(torch.bfloat16, 9, grad=False) == (in_neither if amx else (1, 0))
    assert run(torch.bfloat16, 9, grad=True) == (in_backward if amx else in_both)
    assert run(torch.bfloat16, 5, grad=False) == in_neither, "too few queries for the forward pass"
    assert run(torch.bfloat16, 5, grad=True) == in_backward, "but not for the backward"
    assert run(torch.bfloat16, 3, grad=True) == in_neither, "too few queries"
    assert run(torch.float32, 9, grad=True) == in_neither, "fp32"
    assert run(torch.bfloat16, 9, grad=True, dropout=0.1) == in_neither, "dropout"


@pytest.mark.parametrize(("processor", "dtype"), [("fast bf16", torch.bfloat16), ("slow bf16", torch.float32)])
def test_products_are_computed_in_the_faster_dtype(
    processor: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(processor, monkeypatch)
    module, dtypes, real = SimpleNamespace(is_causal=True, num_key_value_groups=3), set(), torch.bmm

    def bmm(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        dtypes.add(first.dtype)
        return real(first, second)

    monkeypatch.setattr(torch, "bmm", bmm)
    inputs = operands(6, 2, torch.bfloat16)
    out = chunked.automatic_attention_forward(module, *inputs, None)[0]
    out.sum().backward()
    assert dtypes == {dtype}
    assert {out.dtype, *(x.grad.dtype for x in inputs)} == {torch.bfloat16}


def test_refuses_what_it_cannot_compute() -> None:
    module, inputs = SimpleNamespace(is_causal=True), operands(6, 2)
    for options, what in (
        ({"dropout": 0.1}, "attention dropout"),
        ({"s_aux": torch.zeros(6)}, "sinks"),
        ({"position_bias": torch.zeros(1)}, "position biases"),
        ({"attention_mask": torch.ones(3, LENGTH)}, "masks .* of other than 4 dimensions"),
    ):
        given = {"attention_mask": None, **options}
        with pytest.raises(ValueError, match=f'"branchmix_chunked" has no {what}'):
            chunked.chunked_attention_forward(module, *inputs, **given)
    with pytest.raises(ValueError, match='"branchmix" has no sinks'):
        chunked.automatic_attention_forward(module, *inputs, None, s_aux=torch.zeros(6))
    model = random_mixture("llama", seed_changes={"attention_dropout": 0.1}).train()
    model.set_attn_implementation("branchmix_chunked")
    with pytest.raises(ValueError, match="has no attention dropout"):
        model(tokens())


def test_the_unused_rest_of_a_static_cache_is_not_seen() -> None:
    q, k, v = operands(6, 2)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=3)
    ours = chunked.chunked_attention_forward(module, q[:, :, :40], k, v, None)[0]
    close(ours, sdpa_attention_forward(module, q[:, :, :40], k, v, None)[0], 1e-6)


# ---- in models ----


def outputs(model: Any) -> dict[str, torch.Tensor]:
    """Logits of real tokens and all gradients."""
    ids = tokens(2, 37)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    logits = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    logits.logsumexp(-1).sum().backward()
    return {"logits": logits.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", NAMES)
def test_mixtures_of_every_family(name: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and gradients in fp32, windows, caps and padding included, against the family's own eager attention."""
    calls = counted(monkeypatch, "_chunks")
    expected = outputs(random_mixture(name, attention, attn_implementation="eager"))
    assert calls == {"_chunks": 0}
    found = outputs(random_mixture(name, attention, attn_implementation="branchmix_chunked"))
    assert calls["_chunks"] >= 4
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        close(found[key], value, 1e-5)


def fixed_routing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every router answers from fp32 logits of the first run, so that rounding moves no token to another expert."""
    answers: dict[int, Any] = {}
    real = BranchMixRouter.route

    def route(router: BranchMixRouter, hidden: torch.Tensor) -> Any:
        if id(router) not in answers:
            answers[id(router)] = tuple(x.detach() for x in real(router, hidden))
        return answers[id(router)]

    monkeypatch.setattr(BranchMixRouter, "route", route)


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", ["llama", "mistral", "cohere2", "gemma2", "gemma3", "gpt-neox", "olmo2", "phi3"])
def test_bf16_mixtures_with_fixed_routing(name: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to fp32 as the family's own eager attention in bf16."""
    monkeypatch.setattr(chunked, "has_amx", lambda: False)
    model = random_mixture(name, attention)
    fixed_routing(model, monkeypatch)
    ids = tokens(2, 37)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        right = model(ids, use_cache=False).logits
        model.to(torch.bfloat16)
        eager = model(ids, use_cache=False).logits.float()
        calls = counted(monkeypatch, "_chunks")
        model.set_attn_implementation("branchmix")
        ours = model(ids, use_cache=False).logits.float()
    assert calls["_chunks"] == 2
    assert (ours - right).norm() < 1.5 * (eager - right).norm() < 0.1 * right.norm()


@pytest.mark.parametrize("attention", BOTH)
def test_packed_documents_do_not_see_each_other(attention: str) -> None:
    for name in ("llama", "gemma3"):
        for implementation in ("branchmix", "branchmix_chunked"):
            model = random_mixture(name, attention, attn_implementation=implementation).bfloat16()
            assert isolates_documents(model), (name, implementation)


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox"])
def test_generates_what_eager_generates(name: str, attention: str) -> None:
    model = random_mixture(name, attention)
    ids = tokens(2, 21)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    model.set_attn_implementation("eager")
    expected = model.generate(ids, **settings)
    for implementation in ("branchmix", "branchmix_chunked"):
        model.set_attn_implementation(implementation)
        for cache in ({}, {"cache_implementation": "static"}):
            assert torch.equal(model.generate(ids, **settings, **cache), expected)


def test_mixtures_choose_it_where_nothing_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    model = random_mixture("llama")
    assert model.config._attn_implementation == model.config.seed_config._attn_implementation == "branchmix"
    assert model.model.model.layers[0].self_attn.heads.config is model.config.seed_config
    calls = counted(monkeypatch, "_chunks")
    model.bfloat16()(tokens(2, 21), use_cache=False).logits.float().sum().backward()
    assert calls["_chunks"] == (2 if chunked.has_amx() else 4)

    model.save_pretrained(tmp_path)
    assert "branchmix_chunked" not in (tmp_path / "config.json").read_text()
    assert BranchMixForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "branchmix"
    assert BranchMixModel.from_pretrained(tmp_path).config.seed_config._attn_implementation == "branchmix"
    for asked in ("sdpa", "eager", "branchmix_chunked"):
        loaded = BranchMixForCausalLM.from_pretrained(tmp_path, attn_implementation=asked)
        assert loaded.config._attn_implementation == loaded.config.seed_config._attn_implementation == asked
    # A family without fused attention keeps its own.
    assert random_mixture("gemma2").config.seed_config._attn_implementation == "eager"


def test_families_that_compute_attention_themselves_are_left_alone() -> None:
    """Falcon's and GPT-J's dense attention reads the name and no interface, and would take our masks for others."""
    for name, own in (("falcon", "sdpa"), ("gptj", "eager")):
        for attention in ("average", "kv_sharing"):
            model = random_mixture(name, attention)
            chosen = "branchmix" if (name, attention) == ("falcon", "kv_sharing") else own
            assert model.config.seed_config._attn_implementation == chosen
        with pytest.raises(ValueError, match=f'{name} has no attn_implementation="branchmix_chunked"'):
            random_mixture(name, "average", attn_implementation="branchmix_chunked")


def test_dense_models_can_use_it_too(tmp_path: Any) -> None:
    BY_NAME["llama"].save(tmp_path, 0)
    results = []
    for implementation in ("eager", "branchmix_chunked"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
        results.append(outputs(model))
    for key, value in results[0].items():
        close(results[1][key], value)


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("implementation", ["branchmix", "branchmix_chunked"])
def test_compiled_models_leave_the_chunks_out(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_mixture("llama", "kv_sharing").bfloat16()
    model.set_attn_implementation(implementation)
    calls = counted(monkeypatch, "_chunks")
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(model, fullgraph=True)(tokens(2, 21), use_cache=False).logits
    assert calls["_chunks"] == 0 and out.isfinite().all()


def test_mixture_config_is_not_asked_for_it() -> None:
    """What a mixture's config on disk says has not changed."""
    config = mixture_config(BY_NAME["llama"].config())
    BranchMixForCausalLM(config)
    assert not [key for key in config.to_dict() if "attn" in key]

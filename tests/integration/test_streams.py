"""Attention and FFN experts side by side: forked and joined in the right order, where it may be, with equal results."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from branchmix.models import streams_branchmix as streams
from families import BY_NAME
from mixtures import BOTH, random_mixture, tokens


class FakeStream:
    """A CUDA stream that writes down what it is told."""

    def __init__(self, name: str, log: list[str]):
        self.name, self.log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes the CPU look like a GPU, and returns what happens there."""
    found: list[str] = []
    main = FakeStream("main", found)

    @contextmanager
    def entered(stream: FakeStream) -> Any:
        found.append(f"on {stream.name}")
        yield
        found.append("on main")

    monkeypatch.setattr(streams, "_is_on_gpu", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream("side", found))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, s: found.append(f"kept for {s.name}"))
    return found


FORKED = ["side waits for main", "on side", "on main", "main waits for side", "kept for main"]


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", ["cohere", "cohere2", "phi", "gptj", "falcon", "stablelm-parallel"])
def test_parallel_blocks_fork_and_join(name: str, attention: str, log: list[str]) -> None:
    assert BY_NAME[name].block == "parallel"
    model, ids = random_mixture(name, attention), tokens()
    with torch.no_grad():
        expected = model(ids).logits
        model.set_parallel_streams(True)
        assert torch.equal(model(ids).logits, expected) and log == [], "the first pass finds out"
        assert torch.equal(model(ids).logits, expected) and log == 2 * FORKED
        log.clear()
        model.set_parallel_streams(False)
        assert torch.equal(model(ids).logits, expected) and log == []


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt-neox", "falcon-new", "gemma3"])
def test_other_blocks_never_fork(name: str, log: list[str]) -> None:
    model = random_mixture(name)
    model.set_parallel_streams(True)
    with torch.no_grad():
        for _ in range(3):
            model(tokens())
    assert log == []


def test_dropout_between_them_is_not_raced(log: list[str]) -> None:
    model = random_mixture("phi", seed_changes={"resid_pdrop": 0.1})
    model.set_parallel_streams(True)
    with torch.no_grad():
        model.train()
        for _ in range(2):
            model(tokens())
        assert log == []
        model.eval()(tokens())
    assert log == 2 * FORKED


def test_needs_both_kinds_of_experts() -> None:
    for options in ({"attention": "average"}, {"ffn": "average"}):
        with pytest.raises(ValueError, match="parallel streams need attention experts and FFN experts"):
            random_mixture("cohere", **options).set_parallel_streams(True)


def test_nothing_changes_without_a_gpu() -> None:
    model, ids = random_mixture("cohere"), tokens()
    with torch.no_grad():
        expected = model(ids).logits
        model.set_parallel_streams(True)
        for _ in range(2):
            assert torch.equal(model(ids).logits, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", ["cohere", "phi"])
def test_equal_on_a_gpu(name: str, attention: str) -> None:
    model, ids = random_mixture(name, attention).cuda(), tokens().cuda()
    results = []
    for enabled in (False, True):
        model.set_parallel_streams(enabled)
        for _ in range(3):
            model.zero_grad()
            logits = model(ids, use_cache=False).logits
            logits.logsumexp(-1).sum().backward()
        results.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", BOTH)
def test_wide_attention_on_flash_attention(attention: str) -> None:
    """torch's own FlashAttention kernel, forced, against the mathematical one."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = random_mixture("llama", attention, attn_implementation="sdpa").cuda().half()
    with torch.no_grad():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            found = model(tokens().cuda(), use_cache=False).logits
        with sdpa_kernel(SDPBackend.MATH):
            expected = model(tokens().cuda(), use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)

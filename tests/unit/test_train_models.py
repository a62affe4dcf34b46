"""What a run leaves open: the precision and the attention that compute it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from branchmix.models import chunked_branchmix
from branchmix.models.chunked_branchmix import faster_in_bf16
from branchmix.models.linear_branchmix import fastest_on_cpu
from branchmix.train.models import Computing, attention_options

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "measured", "expected"),
    [(True, True, False, True), (False, True, True, True), (False, True, False, False), (False, False, True, False)],
)
def test_bf16_where_it_is_the_faster_one(
    amx: bool, avx512_bf16: bool, measured: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_branchmix, "has_amx", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(chunked_branchmix, "_measured_faster_in_bf16", lambda: measured)
    assert faster_in_bf16(CPU) is expected
    assert faster_in_bf16(torch.device("meta")) is False


@pytest.mark.parametrize("faster", ["first", "second"])
def test_the_timing_tells_the_faster_one(faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """First calls, which prepare kernels, do not count; nor do slow rounds."""
    clock, calls = [0.0], dict.fromkeys(("first", "second"), 0)

    def call(name: str) -> None:
        calls[name] += 1
        slow = calls[name] in (1, 4)
        clock[0] += (1.0 if name == faster else 2.0) + (50.0 if slow and name == faster else 0.0)

    monkeypatch.setattr("time.thread_time", lambda: clock[0])
    threads = torch.get_num_threads()
    assert fastest_on_cpu({name: partial(call, name) for name in calls}) == faster
    assert torch.get_num_threads() == threads and set(calls.values()) == {6}


@pytest.mark.parametrize("bf16", [True, False])
def test_products_are_timed_in_both(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = {}

    def fastest(calls: dict[str, Any]) -> str:
        dtypes.update({name: call().dtype for name, call in calls.items()})
        return "bf16" if bf16 else "fp32"

    monkeypatch.setattr(chunked_branchmix, "fastest_on_cpu", fastest)
    chunked_branchmix._measured_faster_in_bf16.cache_clear()
    assert chunked_branchmix._measured_faster_in_bf16() is bf16
    chunked_branchmix._measured_faster_in_bf16.cache_clear()
    assert dtypes == {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize(
    ("model_type", "computing", "length", "given", "expected"),
    [
        ("cohere", Computing(CPU, bf16=True), 512, None, "eager"),
        ("cohere", Computing(CPU, bf16=True), 513, None, None),
        ("cohere", Computing(CPU, bf16=False), 128, None, None),
        ("cohere", Computing(CUDA, bf16=True), 128, None, None),
        ("branchmix", Computing(CPU, bf16=True), 128, None, None),
        ("branchmix", Computing(CPU, bf16=True), 128, "sdpa", "sdpa"),
    ],
)
def test_attention_of_a_run(
    model_type: str, computing: Computing, length: int, given: str | None, expected: str | None
) -> None:
    options = attention_options(model_type, computing, length, given)
    assert options == ({} if expected is None else {"attn_implementation": expected})

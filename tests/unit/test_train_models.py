"""What a run leaves open: the precision and the attention that compute it."""

from __future__ import annotations

import pytest
import torch

from branchmix.models import chunked_branchmix
from branchmix.models.chunked_branchmix import faster_in_bf16
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


@pytest.mark.parametrize("faster", [torch.bfloat16, torch.float32])
def test_the_timing_tells_the_faster_one(faster: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def mm(first: torch.Tensor, second: torch.Tensor) -> None:
        clock[0] += 1.0 if first.dtype == faster else 2.0

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr("time.thread_time", lambda: clock[0])
    threads = torch.get_num_threads()
    chunked_branchmix._measured_faster_in_bf16.cache_clear()
    assert chunked_branchmix._measured_faster_in_bf16() is (faster == torch.bfloat16)
    chunked_branchmix._measured_faster_in_bf16.cache_clear()
    assert torch.get_num_threads() == threads


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

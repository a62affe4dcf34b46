"""The fit of gates, piece by piece: evidence from counts, posteriors, shares of experts, and logistic regression."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from branchmix.data.config import EvalData
from branchmix.errors import DataError
from branchmix.upcycling.gates import evidence as ev
from branchmix.upcycling.gates import text as reading
from branchmix.upcycling.gates.fit import LEAST_LOG, TopK, log_shares, logistic_regression


def test_evidence_is_the_log_ratio_of_smoothed_frequencies() -> None:
    counts = np.array([[90, 100], [10, 300], [0, 0]])
    table = ev.evidence_table(counts, smoothing=50.0)
    # Frequencies .9 and .1 in the first domain, .25 and .75 in the second; half a count for every token of the table.
    background = np.array([(0.9 + 0.25) / 2, (0.1 + 0.75) / 2, 0.0]) + 0.5 / 500
    background /= background.sum()
    first = (counts[:, 0] + 50 * background) / 150
    second = (counts[:, 1] + 50 * background) / 450
    np.testing.assert_allclose((table[:, 0] - table[:, 1])[:2], np.log(first / second)[:2], atol=1e-12)
    assert not table[2].any(), "no domain has it"
    np.testing.assert_allclose(table.sum(1), 0, atol=1e-12)
    assert first.sum() == pytest.approx(1) and second.sum() == pytest.approx(1)


def test_the_size_of_a_domain_says_nothing_about_a_token() -> None:
    small = np.array([[60, 20], [40, 80]])
    table = ev.evidence_table(small * [1, 1], 1e-9)
    np.testing.assert_allclose(ev.evidence_table(small * [1, 1000], 1e-9), table, atol=1e-6)


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_sums_and_posteriors_are_the_definition(decay: float) -> None:
    rng = np.random.default_rng(0)
    evidence = rng.normal(size=(20, 3))
    total, expected = np.zeros(3), []
    for row in evidence:
        total = decay * total + row
        expected.append(np.exp(total / 2) / np.exp(total / 2).sum())
    found = np.exp(ev.log_posterior(ev.decayed_sums(evidence, decay), temperature=2.0))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_fit_forgets_and_is_not_too_sure() -> None:
    """Tokens that come eight times over are one token's evidence, and documents may follow one of another domain."""
    rng = np.random.default_rng(0)
    frequencies = {0: np.array([0.4, 0.3, 0.2, 0.1]), 1: np.array([0.1, 0.2, 0.3, 0.4])}

    def document(domain: int, echo: int) -> np.ndarray:
        return np.repeat(rng.choice(4, size=100, p=frequencies[domain]), echo)

    counts = np.stack(
        [np.bincount(np.concatenate([document(m, 1) for _ in range(50)]), minlength=4) for m in (0, 1)], axis=1
    )
    once = ev.fit_posterior(counts, {m: [document(m, 1) for _ in range(10)] for m in (0, 1)})
    eightfold = ev.fit_posterior(counts, {m: [document(m, 8) for _ in range(10)] for m in (0, 1)})
    assert eightfold.temperature >= 4 * once.temperature
    assert once.decay < 1.0 and eightfold.decay < 1.0
    assert once.accuracy is not None and once.accuracy > 0.8


def test_shares_are_a_softmax_that_is_never_zero() -> None:
    losses = np.array([[3.0, 3.1, 5.0], [2.0, 2.0, 200.0]])
    np.testing.assert_allclose(
        np.exp(log_shares(losses, 0.1)[0, :2]), np.array([1, np.exp(-1)]) / (1 + np.exp(-1)), 1e-4
    )
    assert log_shares(losses, 0.01).min() == LEAST_LOG


@pytest.mark.parametrize("attention", [None, 1, 4])
def test_calibrated_gates_share_among_two_or_stay_as_they_are(attention: int | None) -> None:
    raw = TopK(1, False, 4.0, attention, False)
    two = None if attention is None else max(attention, 2)
    assert raw.calibrated(4) == TopK(2, True, 1.0, two, True)
    assert raw.calibrated(4, keep_top_k=True) == TopK(1, False, 1.0, attention, False)
    sigmoid = TopK(1, False, 4.0, attention, False, "sigmoid")
    assert sigmoid.calibrated(4) == TopK(2, True, 1.0, two, True, "sigmoid")
    assert sigmoid.calibrated(4, keep_top_k=True) == TopK(1, False, 1.0, attention, False, "sigmoid")


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_logistic_regression_is_at_its_minimum(score: str) -> None:
    """The gradient of the loss as written in its docstring vanishes there, and labels are recovered."""
    torch.manual_seed(0)
    x = torch.randn(300, 8) * 5
    truth = torch.randn(3, 8)
    target = F.one_hot((x @ truth.T).argmax(-1), 3).float()
    weight = torch.full((300,), 1 / 300)
    w = logistic_regression(x, target, weight, 0.01, score).requires_grad_()
    if score == "sigmoid":
        loss = (weight[:, None] * F.binary_cross_entropy_with_logits(x @ w.T, target, reduction="none")).sum()
    else:
        loss = -(weight[:, None] * target * (x @ w.T).log_softmax(-1)).sum()
    loss = loss + 0.01 / 2 * w.square().sum() * x.square().mean()
    (gradient,) = torch.autograd.grad(loss, w)
    assert gradient.abs().max() < 1e-3
    accuracy = ((x @ w.T).argmax(-1) == target.argmax(-1)).float().mean()
    assert accuracy > (0.9 if score == "sigmoid" else 0.95)


def test_measured_documents_are_others_than_counted_ones() -> None:
    documents = [np.full(100, number) for number in range(40)]
    text = reading._split(documents)
    counted, checked, measured = (
        {int(tokens[0]) for tokens in part} for part in (text.counted, text.checked, text.measured)
    )
    assert not counted & measured and len(counted) == 30 and len(measured) == 10
    assert checked < counted and len(checked) == 10
    (book,) = [np.arange(5000)]
    text = reading._split([book])
    counted, measured = (set(np.concatenate(part).tolist()) for part in (text.counted, text.measured))
    assert not counted & measured and len(counted) > 3000 and len(measured) > 500
    assert max(map(len, text.measured)) <= reading.MEASURED_PIECE


def test_enough_is_measured_though_most_documents_are_tiny() -> None:
    text = reading._split([*(np.array([number]) for number in range(11)), np.arange(100, 700)])
    counted, measured = (set(np.concatenate(part).tolist()) for part in (text.counted, text.measured))
    assert not counted & measured and len(measured) > 100


def test_documents_that_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some without a token are passed over; where all have one only, nothing can be measured."""
    monkeypatch.setattr(reading, "encode", lambda _, texts, special: [np.arange(len(text.split())) for text in texts])
    for name, rows in {
        "words": [f"w{n}" for n in range(400)],
        "long": [" ", "\t", " \n", *["w " * n for n in range(100)]],
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    source = {name: {"files": str(tmp_path / f"{name}.jsonl")} for name in ("long", "words")}
    text = reading.read(EvalData.model_validate({"data": {"long": source["long"]}}), None)
    reading.require_known_tokens(text, 100, "model")
    with pytest.raises(DataError, match=r"data.words: its documents have a single token each"):
        reading.read(EvalData.model_validate({"data": source}), None)


def test_of_long_documents_more_is_read_where_there_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "encode", lambda tokenizer, texts, special: [np.arange(len(text)) for text in texts])
    many = reading._tokens(["x" * 2000] * 2000, None)
    few = reading._tokens(["x" * 500_000] * 3, None)
    assert max(map(len, many)) == reading.PIECE
    assert sum(map(len, few)) >= reading.COUNTED_TOKENS


@pytest.mark.parametrize(
    ("size", "given", "longest", "kept"), [(300_000, 5, 32_000, 4), (30_000, 40, 4096, 32), (500, 300, 500, 299)]
)
def test_memory_does_not_grow_with_the_text(
    size: int, given: int, longest: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long documents are cut until there is just enough, whatever their order; then some are left out. The one of the
    lowest hash is held out."""
    monkeypatch.setattr(reading, "_MOST_TOKENS", 16_000)
    texts = [f"{number} ".ljust(size, "x") for number in range(given)]
    chosen = reading._chosen(texts, 1e-9, streamed=False)
    assert chosen == reading._chosen(reversed(texts), 1e-9, streamed=False)
    assert max(map(len, chosen)) == longest and len(chosen) == kept


def test_a_stream_is_read_until_there_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_MOST_TOKENS", 16_000)
    monkeypatch.setattr(reading, "STREAMED_DOCUMENTS", 20)
    for size, read in ((8000, 20), (2000, 65)):
        texts = iter([f"{number} " + "x" * size for number in range(100)])
        reading._chosen(texts, 1e-9, streamed=True)
        assert 100 - len(list(texts)) in range(read - 2, read + 1)

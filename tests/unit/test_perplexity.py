"""Bits per byte against a computation token by token, and that neither batches nor order change it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from branchmix.errors import CheckpointError, RecipeError
from branchmix.evaluate.perplexity import score_documents, token_log_probs
from branchmix.evaluate.scores import ScoredDocument, TextScore, aggregate
from branchmix.likelihood.models import encode, prefix_token
from families import BY_NAME, NAMES
from mixtures import BOTH, random_mixture
from naive import token_by_token

TEXTS = ["abc", "", "the quick brown fox jumps over the lazy dog", "é" * 9, "x", "0123456789" * 5, "a b c d e f g h i"]


class Letters:
    """A tokenizer of bytes, as far as an evaluation uses one; "é" is one token of two bytes."""

    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        assert options["add_special_tokens"] is False
        return {"input_ids": [[3 + ord(letter) % 90 for letter in text] for text in texts]}

    def decode(self, tokens: list[int]) -> str:
        return "?" * len(tokens)


def bits_per_byte(model: Any, tokenizer: Any, texts: list[str], **options: Any) -> TextScore:
    return aggregate(score for _, score in score_documents(model, tokenizer, texts, **options))


def check(model: Any, max_length: int, stride: int | None) -> None:
    documents = encode(Letters(), TEXTS)
    ours = dict(token_log_probs(model, documents, prefix=1, max_length=max_length, stride=stride, batch_tokens=40))
    assert sorted(ours) == list(range(len(TEXTS)))
    for number, document in enumerate(documents):
        theirs = token_by_token(model, [1, *document.tolist()], max_length, max_length if stride is None else stride)
        np.testing.assert_allclose(ours[number], theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_scores_as_token_by_token(name: str) -> None:
    check(BY_NAME[name].model(0), 12, None)


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", ["llama", "cohere", "gemma2", "gpt-neox", "granite"])
def test_mixtures_score_as_token_by_token(name: str, attention: str) -> None:
    check(random_mixture(name, attention), 12, None)


@pytest.mark.parametrize(("max_length", "stride"), [(1, 1), (2, 1), (7, 1), (7, 3), (7, 7), (64, None)])
def test_windows_of_any_size(max_length: int, stride: int | None) -> None:
    check(BY_NAME["llama"].model(0), max_length, stride)


def test_without_a_prefix_the_first_token_counts_for_nothing() -> None:
    model = BY_NAME["llama"].model(0)
    tokenizer = Letters()
    tokenizer.bos_token_id = tokenizer.eos_token_id = None
    assert prefix_token(tokenizer, model.config) == 1  # the config's
    model.config.bos_token_id = None
    assert prefix_token(tokenizer, model.config) == 2
    model.config.eos_token_id = None
    assert prefix_token(tokenizer, model.config) is None
    score = bits_per_byte(model, tokenizer, ["abcdef", "x", ""], max_length=4, stride=2)
    logp = token_by_token(model, encode(tokenizer, ["abcdef"])[0].tolist(), 4, 2)
    assert (score.tokens, score.bytes, score.documents, score.stderr) == (5, 5, 1, None)
    assert score.bits_per_byte == pytest.approx(-sum(logp) / math.log(2) / 5, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(-sum(logp) / 5), rel=1e-5)


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_neither_batches_nor_order_change_the_score(kind: str) -> None:
    model = BY_NAME["qwen3"].model(0) if kind == "dense" else random_mixture("qwen3")
    wanted = bits_per_byte(model, Letters(), TEXTS, max_length=16, batch_tokens=1)
    for batch_tokens, texts in ((16, TEXTS), (64, TEXTS[::-1]), (10**6, TEXTS)):
        score = bits_per_byte(model, Letters(), texts, max_length=16, batch_tokens=batch_tokens)
        assert vars(score) == pytest.approx(vars(wanted), rel=1e-5)
    assert wanted.bytes == sum(len(text.encode()) for text in TEXTS)
    assert wanted.tokens == sum(map(len, TEXTS))
    assert wanted.documents == len(TEXTS) - 1


def test_padding_does_not_reach_rotary_embeddings_that_look_at_the_longest_row() -> None:
    """Phi-3's long context and dynamic NTK choose their factors by the batch: one row must not choose for another."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = BY_NAME["llama"].model(0, rope_parameters=rope, max_position_embeddings=16)
    assert model.model.rotary_emb.rope_type == "dynamic"
    model.config.max_position_embeddings = 64  # what a user of such a model sets
    alone = bits_per_byte(model, Letters(), [TEXTS[2], TEXTS[5]], max_length=48, batch_tokens=1)
    together = bits_per_byte(model, Letters(), [TEXTS[2], TEXTS[5]], max_length=48, batch_tokens=10**4)
    assert together.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-6)


def test_the_standard_error_is_that_of_resampled_documents() -> None:
    generator = np.random.default_rng(0)
    sizes = generator.integers(50, 2000, size=400)
    nll = sizes * generator.gamma(9.0, 0.07, size=400)
    scores = [ScoredDocument(np.array([-nats]), int(size)) for nats, size in zip(nll, sizes, strict=True)]
    found = aggregate(scores)
    assert found.stderr is not None
    picks = generator.integers(0, 400, size=(2000, 400))
    resampled = nll[picks].sum(1) / math.log(2) / sizes[picks].sum(1)
    assert found.bits_per_byte == pytest.approx(nll.sum() / math.log(2) / sizes.sum())
    assert found.stderr == pytest.approx(resampled.std(), rel=0.06)


def test_the_model_is_left_as_it_was() -> None:
    model = BY_NAME["llama"].model(0).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    bits_per_byte(model, Letters(), TEXTS[:1], max_length=8)
    assert [module.training for module in model.modules()] == before
    assert model(torch.tensor([[1, 5, 6]])).logits.shape == (1, 3, 97)


def test_what_cannot_be_scored_is_refused() -> None:
    model = BY_NAME["gpt2"].model(0)
    with pytest.raises(RecipeError, match="max_length: 65 does not fit: should be from 1 to 64"):
        bits_per_byte(model, Letters(), TEXTS, max_length=65)
    with pytest.raises(RecipeError, match="stride: 9"):
        bits_per_byte(model, Letters(), TEXTS, max_length=8, stride=9)
    with pytest.raises(RecipeError, match="no text"):
        bits_per_byte(model, Letters(), ["", ""], max_length=8)
    with pytest.raises(CheckpointError, match="not the model's"):
        token = np.array([97])
        list(token_log_probs(model, [token], prefix=1, max_length=8))
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(CheckpointError, match="not finite"):
        bits_per_byte(model, Letters(), TEXTS, max_length=8)

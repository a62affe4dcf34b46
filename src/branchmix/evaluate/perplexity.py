"""Bits per byte and perplexity of documents: each token predicted once, in windows of a long document.

Windows do not overlap unless a smaller ``stride`` is given, and are those of lm-eval's ``loglikelihood_rolling``, so
the numbers are too (with its ``add_bos_token=False``): a document's first token is predicted from the tokenizer's BOS
or EOS. Bits per byte compare models of different tokenizers, perplexities only those of one.
Shapes: B windows, T tokens of the longest, N predicted tokens of a batch, V vocabulary, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from branchmix.errors import CheckpointError, RecipeError
from branchmix.evaluate.ratio import ratio
from branchmix.likelihood.forward import evaluating, length_dependent, log_probs, logits_at, max_positions
from branchmix.likelihood.models import encode, prefix_token

Progress = Callable[[str, int, int], None]

BATCH_TOKENS = 2048
"""Tokens of a forward pass, padding included. On a CPU more gains nothing; the logits take this many times the
vocabulary."""


@dataclass(frozen=True)
class ScoredDocument:
    """What a model makes of one document."""

    log_probs: np.ndarray
    """Log-probability of each predicted token, [T], in nats."""
    bytes: int
    """Size of what is predicted, in UTF-8."""

    @property
    def nll(self) -> float:
        """Negative log-likelihood of all predicted tokens, in nats."""
        return -float(self.log_probs.sum(dtype=np.float64))

    @property
    def tokens(self) -> int:
        """Number of predicted tokens."""
        return len(self.log_probs)


@dataclass(frozen=True)
class TextScore:
    """What a model makes of a set of documents."""

    bits_per_byte: float
    stderr: float | None
    """Standard error of ``bits_per_byte`` over documents (see ``ratio``); None for a single document."""
    perplexity: float
    """Per token."""
    tokens: int
    bytes: int
    documents: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def aggregate(scores: Iterable[ScoredDocument]) -> TextScore:
    """One number for many documents: all their nats over all their bytes."""
    scores = [score for score in scores if score.tokens]
    num_bytes, tokens = sum(score.bytes for score in scores), sum(score.tokens for score in scores)
    if not num_bytes or not tokens:
        raise RecipeError("there is no text to evaluate: all documents are empty")
    nll = math.fsum(score.nll for score in scores)
    rate, stderr = ratio([score.nll / math.log(2) for score in scores], [score.bytes for score in scores])
    return TextScore(
        float(rate),
        stderr if stderr is None else float(stderr),
        math.exp(min(nll / tokens, 700.0)),
        tokens,
        num_bytes,
        len(scores),
    )


def score_documents(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int,
    stride: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    known: Collection[int] = (),
    progress: Progress | None = None,
) -> Iterator[tuple[int, ScoredDocument]]:
    """Score documents with a causal LM, dense or a mixture, as (number of the document, score), when each is done.

    Batch size and order change a score by rounding only. Without BOS and EOS a document's first token is not predicted,
    and its bytes do not count.

    Args:
        model: any causal LM of transformers; its mode (training or not) is left as it was.
        tokenizer: the model's.
        texts: documents.
        max_length: tokens of the window, at most the model's positions.
        stride: tokens that a further window of a document predicts: each of them has at least ``max_length - stride``
            tokens before it. The whole window by default, so that windows do not overlap.
        batch_tokens: tokens of a forward pass, padding included.
        known: numbers of documents that are not computed, though batches are made of all of them.
        progress: called with ("tokens", done, total).

    Raises:
        RecipeError: a window that the model has no positions for.
        CheckpointError: the tokenizer is not the model's, or the logits are not finite.
    """
    documents, prefix = encode(tokenizer, texts), prefix_token(tokenizer, model.config)
    options: dict[str, Any] = {"stride": stride, "batch_tokens": batch_tokens, "known": known, "progress": progress}
    for number, logp_T in token_log_probs(model, documents, prefix=prefix, max_length=max_length, **options):
        num_bytes = len(texts[number].encode())
        if prefix is None and len(documents[number]):
            num_bytes -= len(tokenizer.decode(documents[number][:1].tolist()).encode())
        yield number, ScoredDocument(logp_T, num_bytes)


def token_log_probs(
    model: Any,
    documents: Sequence[np.ndarray],
    *,
    prefix: int | None,
    max_length: int,
    stride: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    known: Collection[int] = (),
    progress: Progress | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Log-probabilities (nats, fp32) of each document's tokens, as (number of the document, array), when it is done.

    With a prefix the array is as long as the document, without one its first token is not predicted. Documents that are
    ``known`` are not computed, but batches are made of all: a document has the same batches, and so the same bits,
    whatever is known of the others. Other arguments and errors are those of ``score_documents``.
    """
    stride = max_length if stride is None else stride
    check_window(model, documents, max_length, stride)
    tokens = [document if prefix is None else np.concatenate(([prefix], document)) for document in documents]
    results = [np.zeros(max(len(row) - 1, 0), dtype=np.float32) for row in tokens]
    windows = sorted_windows([len(row) for row in tokens], max_length, stride)
    left = [0] * len(documents)
    for window in windows:
        left[window.document] += 1
    yield from ((number, results[number]) for number, count in enumerate(left) if not count and number not in known)
    every = batches(windows, batch_tokens, equal_lengths=length_dependent(model.config))
    wanted = [batch for batch in every if any(window.document not in known for window in batch)]
    done, total = 0, sum(window.end - window.first for batch in wanted for window in batch)
    with evaluating(model):
        for batch in wanted:
            logp_N = _predict(model, batch, tokens)
            at = 0
            for window in batch:
                count = window.end - window.first
                results[window.document][window.first : window.end] = logp_N[at : at + count]
                at += count
                left[window.document] -= 1
                if not left[window.document] and window.document not in known:
                    yield window.document, results[window.document]
            done += at
            if progress is not None:
                progress("tokens", done, total)


# ---- windows ----


@dataclass(frozen=True)
class TokenWindow:
    """Inputs ``tokens[start:end]`` of a document; those from ``first`` on predict the token after them."""

    document: int
    start: int
    first: int
    end: int


def sorted_windows(lengths: Sequence[int], max_length: int, stride: int) -> list[TokenWindow]:
    """The windows of rows with so many tokens, prefix included, longest first.

    The first window of a row predicts all it can; each further one advances by ``stride``, and the last only as far as
    it must. Longest first, memory is short at once or never, and documents of one length are done together.
    """
    windows = []
    for number, length in enumerate(lengths):
        done = 0
        while done < length - 1:  # the last token is an input of nothing
            end = min(done + (stride if done else max_length), length - 1)
            windows.append(TokenWindow(number, max(0, end - max_length), done, end))
            done = end
    return sorted(windows, key=lambda window: (window.start - window.end, window.document, window.start))


def batches(windows: Sequence[TokenWindow], batch_tokens: int, *, equal_lengths: bool) -> Iterator[list[TokenWindow]]:
    """Windows, longest first, in batches of at most ``batch_tokens``; a longer one is alone."""
    batch: list[TokenWindow] = []
    for window in windows:
        if batch:
            longest, length = batch[0].end - batch[0].start, window.end - window.start
            if longest * (len(batch) + 1) > batch_tokens or (equal_lengths and length != longest):
                yield batch
                batch = []
        batch.append(window)
    if batch:
        yield batch


# ---- the model ----


@torch.inference_mode()
def _predict(model: Any, batch: Sequence[TokenWindow], tokens: Sequence[np.ndarray]) -> np.ndarray:
    """Log-probabilities of the batch's predicted tokens, window after window."""
    inputs = [tokens[window.document][window.start : window.end] for window in batch]
    rows_N = np.concatenate([np.full(window.end - window.first, row) for row, window in enumerate(batch)])
    places_N = np.concatenate([np.arange(window.first, window.end) - window.start for window in batch])
    targets_N = np.concatenate([tokens[window.document][window.first + 1 : window.end + 1] for window in batch])
    return log_probs(*logits_at(model, inputs, rows_N, places_N, targets_N))


def check_window(model: Any, documents: Sequence[np.ndarray], max_length: int, stride: int) -> None:
    """Refuses a window or tokens that do not fit the model; errors are those of ``score_documents``."""
    positions = max_positions(model.config)
    if max_length < 1 or (positions is not None and max_length > positions):
        limit = "1 or more" if positions is None else f"from 1 to {positions}, as many positions as the model has"
        raise RecipeError(f"max_length: {max_length} does not fit: should be {limit}")
    if not 1 <= stride <= max_length:
        raise RecipeError(f"stride: {stride} does not fit: should be from 1 to max_length, {max_length}")
    check_tokens(model, documents)


def check_tokens(model: Any, documents: Sequence[np.ndarray]) -> None:
    """Refuses tokens that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    greatest = max((int(document.max()) for document in documents if len(document)), default=0)
    if greatest >= rows:
        raise CheckpointError(
            f"the tokenizer gives token {greatest}, but the model knows {rows}: it is not the model's"
        )

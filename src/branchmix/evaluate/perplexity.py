"""Log-probabilities of documents: each token predicted once, in windows of a long document.

Windows do not overlap unless a smaller ``stride`` is given, and are those of lm-eval's ``loglikelihood_rolling``, so
the numbers are too (with its ``add_bos_token=False``): a document's first token is predicted from the tokenizer's BOS
or EOS. Bits per byte compare models of different tokenizers, perplexities only those of one.
Shapes: T tokens of a document, N predicted tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from branchmix.errors import RecipeError
from branchmix.evaluate.scores import ScoredDocument
from branchmix.likelihood.forward import check_tokens, evaluating, length_dependent, log_probs, logits_at, max_positions
from branchmix.likelihood.models import Progress, TextModel, encode, prefix_token

MAX_LENGTH = 2048
"""Tokens of the window if none is given and all models have as many positions."""
BATCH_TOKENS = 2048
"""Tokens of a forward pass, padding included. On a CPU more gains nothing; the logits take this many times the
vocabulary."""


def score_documents(
    model: Any, tokenizer: Any, texts: Sequence[str], **options: Any
) -> Iterator[tuple[int, ScoredDocument]]:
    """Score documents with a causal LM, dense or a mixture, as (number of the document, score), when each is done.

    Without BOS and EOS a document's first token is not predicted, and its bytes do not count. ``options`` and errors
    are those of ``token_log_probs``.
    """
    documents, prefix = encode(tokenizer, texts), prefix_token(tokenizer, model.config)
    for number, logp_T in token_log_probs(model, documents, prefix=prefix, **options):
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

    With a prefix the array is as long as the document, without one its first token is not predicted. Batch size and
    order change a number by rounding only.

    Args:
        model: any causal LM of transformers; its mode (training or not) is left as it was.
        documents: tokens of each.
        prefix: what the first token is predicted from.
        max_length: tokens of the window, at most the model's positions.
        stride: tokens that a further window of a document predicts: each of them has at least ``max_length - stride``
            tokens before it. The whole window by default, so that windows do not overlap.
        batch_tokens: tokens of a forward pass, padding included.
        known: numbers of documents that are not computed. Batches are made of all documents: one has the same batches,
            and so the same bits, whatever is known of the others.
        progress: called with ("tokens", done, total).

    Raises:
        RecipeError: a window that the model has no positions for.
        CheckpointError: the tokenizer is not the model's, or the logits are not finite.
    """
    stride = max_length if stride is None else stride
    check_window(model, documents, max_length, stride)
    tokens = [document if prefix is None else np.concatenate(([prefix], document)) for document in documents]
    results = [np.zeros(max(len(row) - 1, 0), dtype=np.float32) for row in tokens]
    windows = sorted_windows([len(row) for row in tokens], max_length, stride)
    left = np.bincount([window.document for window in windows], minlength=len(documents))
    yield from ((number, results[number]) for number, count in enumerate(left) if not count and number not in known)
    every = batches(windows, batch_tokens, equal_lengths=length_dependent(model.config))
    wanted = [batch for batch in every if any(window.document not in known for window in batch)]
    done, total = 0, sum(window.end - window.first for batch in wanted for window in batch)
    with evaluating(model):
        for batch in wanted:
            counts = [window.end - window.first for window in batch]
            parts = np.split(_predict(model, batch, tokens), np.cumsum(counts)[:-1])
            for window, logp_T in zip(batch, parts, strict=True):
                results[window.document][window.first : window.end] = logp_T
                left[window.document] -= 1
                if not left[window.document] and window.document not in known:
                    yield window.document, results[window.document]
            done += sum(counts)
            if progress is not None:
                progress("tokens", done, total)


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


@torch.inference_mode()
def _predict(model: Any, batch: Sequence[TokenWindow], tokens: Sequence[np.ndarray]) -> np.ndarray:
    """Log-probabilities of the batch's predicted tokens, window after window."""
    inputs = [tokens[window.document][window.start : window.end] for window in batch]
    rows_N = np.repeat(np.arange(len(batch)), [window.end - window.first for window in batch])
    places_N = np.concatenate([np.arange(window.first, window.end) - window.start for window in batch])
    targets_N = np.concatenate([tokens[window.document][window.first + 1 : window.end + 1] for window in batch])
    return log_probs(*logits_at(model, inputs, rows_N, places_N, targets_N))


def common_window(candidates: Sequence[TextModel], max_length: int | None) -> int:
    """The same window for all models: they are compared with as much context.

    It is ``MAX_LENGTH`` if none is given, or the least that a model has positions for; a RecipeError if one has fewer.
    """
    positions = {c.given: limit for c in candidates if (limit := max_positions(c.config)) is not None}
    for given, limit in positions.items():
        if max_length is not None and max_length > limit:
            raise RecipeError(f"max_length: {max_length} is more than the {limit} positions of {given}")
    return min([MAX_LENGTH, *positions.values()]) if max_length is None else max_length


def check_window(model: Any, documents: Sequence[np.ndarray], max_length: int, stride: int) -> None:
    """Refuses a window or tokens that do not fit the model; errors are those of ``token_log_probs``."""
    positions = max_positions(model.config)
    if not 1 <= max_length <= (positions or max_length):
        limit = f"from 1 to {positions}" if positions else "1 or more"
        raise RecipeError(f"max_length: {max_length} does not fit: should be {limit}")
    if not 1 <= stride <= max_length:
        raise RecipeError(f"stride: {stride} does not fit: should be from 1 to max_length, {max_length}")
    check_tokens(model, documents)

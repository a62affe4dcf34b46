"""Summed log-probabilities of options, in fp32 from the logits on; batch size and order change them by rounding only.

Shapes: B rows, T tokens of the longest, N wanted positions, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from branchmix.likelihood.forward import check_tokens, evaluating, forward, length_dependent, log_probs
from branchmix.scaling.scoring.plan import BATCH_TOKENS, Row, batches, plan
from branchmix.scaling.scoring.tokens import Encoded


def score_options(
    model: Any,
    questions: Sequence[Encoded],
    *,
    batch_tokens: int = BATCH_TOKENS,
    share: bool | None = None,
    known: Collection[int] = (),
) -> Iterator[tuple[int, list[float]]]:
    """Summed log-probabilities (nats) of every option of a question, as (number of the question, list), when done.

    Args:
        model: any causal LM of transformers; its mode (training or not) is left as it was.
        questions: tokens; refused ones are passed over.
        batch_tokens: of a forward pass.
        share: compute what questions and options have in common once; None: where the model's cache allows it.
        known: numbers of questions that are not asked again. Batches are made of all questions all the same, so that
            the others have the same bits whatever is known.

    Raises:
        CheckpointError: the tokenizer is not the model's, or the logits are not finite.
    """
    check_tokens(model, (part for question in questions for part in (question.context, *question.options)))
    share = can_share(model) if share is None else share
    equal = length_dependent(model.config)
    sums: dict[int, list[list[float]]] = {}
    with evaluating(model):
        for trunk in plan(questions, share=share):
            every = batches(trunk, batch_tokens, equal_lengths=equal)
            wanted = [batch for batch in every if any(row.question not in known for row in batch)]
            cache = None
            if wanted and trunk.tokens:
                _, cache = _run(model, [Row(-1, trunk.tokens)], None, keep=True)
            for batch in wanted:
                for number, option, value in _score(model, batch, cache, batch_tokens):
                    parts = sums.setdefault(number, [[] for _ in questions[number].options])
                    parts[option].append(value)
                for number in dict.fromkeys(row.question for row in batch):
                    is_complete = sum(map(len, sums[number])) == sum(map(len, questions[number].options))
                    if number not in known and is_complete:
                        yield number, [math.fsum(parts) for parts in sums.pop(number)]


def can_share(model: Any) -> bool:
    """Whether keys and values kept from one pass serve the next: the caches of ordinary attention and of document
    gates, and no rotary embedding that looks at how long a row is."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    from branchmix.models.documents_branchmix import BranchMixDocumentLayer

    if length_dependent(model.config):
        return False
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    with evaluating(model), torch.inference_mode():
        cache: Any = getattr(model(input_ids=token, use_cache=True), "past_key_values", None)
    known = (DynamicLayer, DynamicSlidingWindowLayer, BranchMixDocumentLayer)
    return type(cache) is DynamicCache and bool(cache.layers) and all(type(layer) in known for layer in cache.layers)


def _score(model: Any, batch: Sequence[Row], cache: Any, batch_tokens: int) -> Iterator[tuple[int, int, float]]:
    """Question, option and log-probability of every target of the rows, and of their branches after them."""
    values, grown = _run(model, batch, _select(cache, [0] * len(batch)), keep=bool(batch[0].branches))
    yield from values
    branches = [(number, branch) for number, row in enumerate(batch) for branch in row.branches]
    branches.sort(key=lambda one: -len(one[1].tokens))
    at_once = batch_tokens // len(branches[0][1].tokens) or 1 if branches else 1
    for start in range(0, len(branches), at_once):
        part = branches[start : start + at_once]
        values, _ = _run(model, [branch for _, branch in part], _select(grown, [number for number, _ in part]))
        yield from values


@torch.inference_mode()  # not around what yields: the caller's own code would run in it
def _run(
    model: Any, batch: Sequence[Row], cache: Any, *, keep: bool = False
) -> tuple[list[tuple[int, int, float]], Any]:
    """One pass: (question, option, log-probability) of each target, and the cache if it is to be kept.

    Routers of mixtures drop no token, so what padding does there touches no other. Positions count from the cache's end
    by themselves.
    """
    wanted = [(number, target) for number, row in enumerate(batch) for target in row.targets]
    places = list(dict.fromkeys((number, target.place) for number, target in wanted)) or [(0, 0)]
    at = [torch.tensor(index) for index in zip(*places, strict=True)]
    options: dict[str, Any] = {"past_key_values": cache} if cache is not None else {}
    options["use_cache"] = keep or cache is not None
    logits_NV, output = forward(model, [row.tokens for row in batch], *at, **options)
    kept = output.past_key_values if keep else None
    if not wanted:
        return [], kept
    number_of = {place: number for number, place in enumerate(places)}
    index_M = torch.tensor([number_of[number, target.place] for number, target in wanted])
    tokens_M = torch.tensor([target.token for _, target in wanted], device=logits_NV.device)
    logp = log_probs(logits_NV[index_M.to(logits_NV.device)], tokens_M).tolist()
    found = zip(wanted, logp, strict=True)
    return [(batch[number].question, target.option, value) for (number, target), value in found], kept


@torch.inference_mode()
def _select(cache: Any, rows: list[int]) -> Any:
    """A copy of a cache that has these of its rows; a pass adds to the copy alone."""
    if cache is None:
        return None
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]  # tensors are replaced in them, never written
    chosen.batch_select_indices(torch.tensor(rows, device=cache.layers[0].keys.device))
    return chosen

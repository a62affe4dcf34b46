"""Do a model's token embeddings and its output layer share their values? The weights decide, not config.json alone.

As transformers 5 does it: a config that ties them is followed where one of the two is missing or both are equal. Where
both are stored and differ, as in a merged adapter that trained the output layer, they are two matrices.
"""

from __future__ import annotations

from dataclasses import replace

from branchmix.checkpoint.families import entry_of, is_head, is_tied
from branchmix.checkpoint.index import CheckpointIndex, TensorRef


def as_stored(index: CheckpointIndex) -> CheckpointIndex:
    """The checkpoint (dense or mixture), with ``tie_word_embeddings: false`` where its weights contradict its config.

    Returns ``index`` itself where config and weights agree. A mixture's ``seed_config`` is what counts.
    """
    seed = index.config.get("seed_config")
    config = seed if isinstance(seed, dict) else index.config
    if not is_tied(config):
        return index
    head, embeddings = head_and_embeddings(index)
    if head is None or embeddings is None:
        return index
    from branchmix.checkpoint.expressions import same_numbers  # here, as `branchmix inspect` of a config needs no numpy

    if same_numbers(head, embeddings):
        return index
    untied = {"tie_word_embeddings": False}
    if config is seed:
        untied["seed_config"] = {**config, **untied}  # type: ignore[assignment]
    return replace(index, config={**index.config, **untied})


def head_and_embeddings(index: CheckpointIndex) -> tuple[TensorRef | None, TensorRef | None]:
    """Weights of the output layer and of the token embeddings, each None where a model or a mixture stores none."""
    seed = index.config.get("seed_config")
    config, below = (seed, "model.") if isinstance(seed, dict) else (index.config, "")
    family = entry_of(config)
    heads = (name for name in index.tensors if is_head(name.removeprefix(below)) and name.endswith(".weight"))
    # Base models, saved without their output layer, lack the first part of their names.
    embeddings = (f"{below}{family.embeddings}.weight", f"{family.embeddings.partition('.')[2]}.weight")
    stored = (name for name in embeddings if name in index.tensors)
    return index.tensors.get(next(heads, "")), index.tensors.get(next(stored, ""))

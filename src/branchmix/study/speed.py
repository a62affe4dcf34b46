"""How long a training step takes on this machine: some seconds of forward and backward passes on random tokens."""

from __future__ import annotations

import time
from typing import Any

from branchmix.train.models import Computing, attention_options

MEASURED_STEPS = 5


def new_model(config: dict[str, Any], computing: Computing | None = None, length: int = 0) -> Any:
    """A model of random weights from a config dictionary, of a dense model or a mixture.

    Args:
        config: with ``model_type``; of a mixture, also ``seed_config``.
        computing: attention as a run chooses it there, for sequences of ``length`` tokens; the model's own if None.
        length: tokens.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from branchmix.models import mixture_config

    logging.set_verbosity_error()
    fields = dict(config)
    if fields.pop("model_type") == "branchmix":
        made = mixture_config(fields.pop("seed_config"), **fields)
    else:
        made = AutoConfig.for_model(config["model_type"], **fields)
    options = {} if computing is None else attention_options(made.model_type, computing, length)
    return AutoModelForCausalLM.from_config(made, **options)


def seconds_per_step(
    model: Any,
    *,
    vocab_size: int,
    sequence_length: int,
    batch_size: int,
    rows: int,
    computing: Computing,
    steps: int = MEASURED_STEPS,
) -> float:
    """Of an optimizer step on a whole batch, from forward and backward passes of ``rows`` sequences.

    The fastest of some, after a first one.
    """
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
    ids_BT = torch.randint(0, vocab_size, (rows, sequence_length))
    passes, updates = [], []
    for _ in range(1 + steps):
        start = time.perf_counter()
        with computing.autocast():
            loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        middle = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        passes.append(middle - start)
        updates.append(time.perf_counter() - middle)
    return min(passes[1:]) * batch_size / rows + min(updates[1:])

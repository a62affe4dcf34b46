"""Parts of ``training.json``: scores, machine and versions; and the part of a model that a parameter belongs to."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from branchmix import __version__
from branchmix.train.progress import last_values


def part_of(name: str) -> str:
    """The part of a model that a parameter belongs to, by its name, for counting FLOPs."""
    if re.search(r"expert_gate|mlp\.gate\.weight$|router|document_gate", name):
        return "routers"
    if "norm" in name or ".ln_" in name:
        return "norms"
    if re.search(r"attn|attention", name):
        return "attention"
    if re.search(r"mlp|feed_forward|ffn|experts|\.(fc1|fc2)\.", name):
        return "ffn"
    return "embeddings"


def trained_parts(model: Any) -> tuple[dict[str, float], int]:
    """The trained share of each part's parameters, for ``token_flops``, and the number of LoRA's parameters."""
    counts = {part: [0, 0] for part in ("attention", "ffn", "routers", "lm_head")}
    lora = 0
    head = model.get_output_embeddings()
    heads = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            lora += parameter.numel()
            continue
        part = "lm_head" if id(parameter) in heads else part_of(name)
        if part in counts:
            counts[part][0] += parameter.numel() * parameter.requires_grad
            counts[part][1] += parameter.numel()
    return {part: trained / total for part, (trained, total) in counts.items() if total}, lora


def scores(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Loss in nats per token and perplexity by domain, from the rows of one step."""
    return {name: {"loss": loss, "perplexity": math.exp(loss)} for name, loss in last_values(rows, "held_out/").items()}


def now() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine(device: Any) -> dict[str, Any]:
    """The machine that the run was computed on."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": device.type, "name": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Versions of the packages that affect the numbers."""
    names = ("torch", "transformers", "accelerate", "datasets", "tokenizers")
    return {"branchmix": __version__, "python": platform.python_version()} | {
        name: metadata.version(name) for name in names
    }

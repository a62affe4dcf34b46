"""Tiny models with a tokenizer and small tasks, for tests of ``branchmix scaling run``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

import corpora
from branchmix.scaling.examples import Example, jsonl

PLAIN = [
    Example("one two three", (" two", " three of"), 0, round=1, part=1),
    Example("one two three of", (" even", " odd"), 1, round=1, part=1),
    Example("one two three of even", (" prime number", " each other"), 1, round=1, part=1),
    Example("small field", (" ring", " group", " map"), 2, round=1, part=1),
    Example("a prompt that ends in a space ", ("is", "are not"), 0, round=1, part=1),
    Example("one two three of", (" even", " odd"), 0, round=1, part=1),
    Example("x", (" a", " b"), 0, round=1, part=1, template="t"),
    Example("été 漢字:", (" ü", " é."), 1, round=1, part=1, template="t"),
]


def write_task(folder: Path, name: str, examples: list[Example], metric: str = "classification") -> Path:
    """A user's task: its YAML file, with the examples beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_bytes(jsonl(examples))
    content = {"name": name, "metric": metric, "data": f"{name}.jsonl"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder / f"{name}.yaml"


def write_family(folder: Path, models: list[Any], **keys: Any) -> Path:
    file = folder / "family.yaml"
    file.write_text(yaml.safe_dump({"family": "tiny", "models": models, **keys}, sort_keys=False))
    return file


def with_tokenizer(model: Path, folder: Path) -> Path:
    """A copy of a saved model, beside it the tests' tokenizer of 300 tokens."""
    shutil.copytree(model, folder)
    corpora.tokenizer().save_pretrained(folder)
    return folder


def naive(model: Any, tokenizer: Any, prompt: str, option: str, bos: tuple[int, ...] = ()) -> float:
    """One option's log-probability as lm-eval defines it, by itself."""
    spaces = len(prompt) - len(prompt.rstrip())
    if spaces:
        prompt, option = prompt[:-spaces], prompt[-spaces:] + option
    context = [*bos, *tokenizer.encode(prompt, add_special_tokens=False)]
    whole = [*bos, *tokenizer.encode(prompt + option, add_special_tokens=False)]
    rest = whole[len(context) :]
    row = torch.tensor([context + rest])
    with torch.inference_mode():
        logp_TV = model(input_ids=row[:, :-1], use_cache=False).logits[0].float().log_softmax(-1)
    return sum(float(logp_TV[len(context) + n - 1, token]) for n, token in enumerate(rest))


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]

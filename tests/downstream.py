"""Tiny downstream tasks in lm-eval's format, one of each kind, and how lm-eval itself scores a model on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import yaml

import corpora

COLOURS = ["one", "two", "three", "even", "odd", "prime", "small", "large"]
DOCUMENTS = 24

TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "fewshot_split": "train",
        "num_fewshot": 2,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "brier_score"}],
    },
    "letters": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
    "words": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{written}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
GROUP = {
    "group": "both",
    "task": ["choice", "letters"],
    "aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}],
}


def documents(count: int = DOCUMENTS, first: int = 0) -> list[dict[str, Any]]:
    """Questions of all lengths, with four answers."""
    found = []
    for number in range(first, first + count):
        drawn = np.random.default_rng(number)
        choices = [" ".join(drawn.choice(COLOURS, size=1 + int(drawn.integers(3)))) for _ in range(4)]
        question = corpora.text(number, words=12)
        answer = int(drawn.integers(4))
        text = " ".join(corpora.text(number + part) for part in range(3))
        found.append({"question": question, "choices": choices, "answer": answer, "text": text, "written": question})
    return found


def write_lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_tasks(folder: Path, **more: dict[str, Any]) -> Path:
    """Task files and their data in ``folder``."""
    files = {
        "test": str(write_lines(folder / "test.jsonl", documents())),
        "train": str(write_lines(folder / "train.jsonl", documents(10, first=500))),
    }
    for name, task in {**TASKS, **more}.items():
        write_task(folder, name, {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, **task})
    (folder / "both.yaml").write_text(yaml.safe_dump(GROUP))
    return folder


def write_task(folder: Path, name: str, task: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "test_split": "test", **task}))


def as_lm_eval(model: Any, names: list[str], tasks: Path, max_length: int) -> dict[str, Any]:
    """lm-eval's own results."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    theirs = HFLM(pretrained=model, tokenizer=corpora.tokenizer(), batch_size=3, max_length=max_length)
    manager = TaskManager(include_defaults=False, include_path=str(tasks))
    with mock.patch("lm_eval.evaluator.add_env_info"):  # it takes seconds to describe the machine
        found = simple_evaluate(model=theirs, tasks=list(names), task_manager=manager, bootstrap_iters=1000)
    assert found is not None
    return dict(found)

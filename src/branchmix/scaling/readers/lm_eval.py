"""Results of lm-eval: ``results_DATE.json`` with ``samples_TASK_DATE.jsonl`` beside it, as ``--output_path`` with
``--log_samples`` writes them (0.4 and later).

Axes are ``params`` (``model_num_parameters``) and ``shots`` (``n-shot``). Groups are left out: they are means of tasks.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from branchmix.checkpoint.json_text import parse_json
from branchmix.data.sources import json_lines
from branchmix.errors import DataError
from branchmix.likelihood.lm_eval_samples import scores_of_sample
from branchmix.scaling.examples import read_text
from branchmix.scaling.readers.runs import Run, files_below, json_of, mapping, number, table_of
from branchmix.scaling.trends.table import ResultsTable, Scores

_NO_WORD = re.compile(r"\W")
"""What lm-eval replaces in a task's name for the name of a file."""


def read_lm_eval(path: Path) -> ResultsTable:
    """All results below a folder, or of one ``results_DATE.json``.

    Raises:
        DataError: there are none, or a file is not lm-eval's.
    """
    found = [(file, json_of(file)) for file in files_below(path, "results_*.json")]
    notes: list[str] = []
    models: dict[str, set[str]] = {}
    for file, content in found:
        if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
            raise DataError(f"{file}: is not a result of lm-eval: it has no `results`")
        whole = _model(content)
        models.setdefault(whole.split("/")[-1], set()).add(whole)
    runs = [run for file, content in found for run in _runs(file, content, _short(_model(content), models), notes)]
    if not found:
        raise DataError(f"{path}: has no results_*.json of lm-eval: give its --output_path")
    return table_of(path, runs, notes)


def _model(content: dict[str, Any]) -> str:
    """What lm-eval calls the model, with its revision."""
    config = mapping(content.get("config"))
    name = str(content.get("model_name") or config.get("model") or "model").rstrip("/")
    revision = config.get("model_revision")
    return name if revision in (None, "", "main", "N/A") else f"{name}@{revision}"


def _short(name: str, models: dict[str, set[str]]) -> str:
    """The name without its folder or organisation, unless two models share what is left."""
    short = name.split("/")[-1]
    return name if len(models[short]) > 1 else short


def _runs(file: Path, content: dict[str, Any], model: str, notes: list[str]) -> Iterator[Run]:
    config, groups, subtasks = (mapping(content.get(name)) for name in ("config", "groups", "group_subtasks"))
    params = config.get("model_num_parameters")
    date = file.stem.removeprefix("results_")
    for task, values in content["results"].items():
        if task in groups or subtasks.get(task):
            continue
        axes = {"params": float(params)} if isinstance(params, int) and params > 0 else {}
        shots = mapping(content.get("n-shot")).get(task)
        axes |= {"shots": float(shots)} if isinstance(shots, int) else {}
        samples = _samples(file.with_name(f"samples_{_NO_WORD.sub('_', task)}_{date}.jsonl"))
        better = mapping(mapping(content.get("higher_is_better")).get(task))
        counts = mapping(mapping(content.get("n-samples")).get(task)).get("effective")
        for name, value in mapping(values).items():
            metric, comma, filtered = name.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            stderr = values.get(f"{metric}_stderr,{filtered}")
            label = metric if filtered == "none" else name
            scores = samples.get(label)
            if scores is not None and not _is_mean(scores, value):
                scores = None  # such as a perplexity, which is not a mean over questions
            yield Run(
                task,
                model,
                label,
                file,
                axes,
                scores,
                value=float(value),
                stderr=float(stderr) if _is_number(stderr) else None,
                n=counts if isinstance(counts, int) and _is_number(stderr) else None,
                seed=str(config.get("fewshot_seed") or ""),
                created=f"{content.get('date', 0):020}" if _is_number(content.get("date")) else date,
                lower_is_better=better.get(metric) is False,
            )
        if not samples:
            notes.append(f"{file}: no samples of {task}: run lm-eval with --log_samples to pair models by question")


def _samples(file: Path) -> dict[str, Scores]:
    """By metric the scores of all questions, under the hash of their content; empty if the file is not there."""
    text = read_text(file)
    scores: dict[str, Scores] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for where, sample in json_lines(file, text.split("\n"), parse_json) if text is not None else ():
        if not isinstance(sample, dict) or "doc_id" not in sample:
            raise DataError(f"{where}: is not a sample of lm-eval: it has no doc_id")
        for metric, value in scores_of_sample(sample).items():
            key = str(sample.get("doc_hash") or sample["doc_id"])
            seen[metric, key] += 1
            if seen[metric, key] > 1:  # a question that the data set has twice
                key = f"{key} {seen[metric, key]}"
            scores.setdefault(metric, {})[key] = (value, key)
    return scores


def _is_number(value: Any) -> bool:
    return number(value) is not None and not isinstance(value, bool)


def _is_mean(scores: Scores, value: float) -> bool:
    mean = math.fsum(score for score, _ in scores.values()) / len(scores)
    return math.isclose(mean, value, rel_tol=1e-6, abs_tol=1e-9)

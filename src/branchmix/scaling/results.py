"""What a run leaves for others: ``results.csv`` and ``examples/`` for trends, ``results.json`` with everything."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from branchmix.checkpoint.folder import write_text
from branchmix.scaling.examples import Example
from branchmix.scaling.family import Subject
from branchmix.scaling.metrics import Score, Summary
from branchmix.scaling.selection import Selected
from branchmix.scaling.trends.examples import FIELDS
from branchmix.scaling.trends.table import AXES, DATA, FILE, FLAG_COLUMNS

RESULTS = "results.json"
EXAMPLES = "examples"
_COLUMNS = ("task", "model", "params", "active_params", "tokens", "flops", "metric", "value", "stderr", "n")
_MORE = ("family", "seed", "data", "cause", *FLAG_COLUMNS)


@dataclass(frozen=True)
class Answer:
    """What a model makes of a question."""

    logprobs: tuple[float, ...] = ()
    """Sum for each option, in nats; none if the question was refused."""
    tokens: tuple[int, ...] = ()
    """Number of tokens of each option."""
    merged: bool = False
    refused: str | None = None
    seconds: float = 0.0
    """Time of computing, a share of the run's."""

    @classmethod
    def of(cls, line: dict[str, Any] | None) -> Answer:
        """The answer of a line of the records."""
        assert line is not None
        given = {name: line[name] for name in ("merged", "refused", "seconds") if name in line}
        return cls(tuple(line.get("logprobs", ())), tuple(line.get("tokens", ())), **given)


@dataclass
class TaskResult:
    """A model on the examples of one file."""

    subject: Subject
    selected: Selected
    summary: Summary | None
    """None if every example was refused."""
    scored: list[tuple[int, Example, Score, Answer]]
    """Number in the file, example, its numbers, and the answer to its prompt."""
    refused: list[tuple[int, str]]
    """Number of each example that was not scored, and why."""
    merged: int
    """Scored examples in which an option merges with the prompt's last token."""
    facts: dict[str, Any]
    """What the numbers depend on: dtype, tokenizer, BOS policy."""
    seconds: float = 0.0
    """Time of computing, whenever that was."""


@dataclass
class ScalingRun:
    """All results of a call."""

    results: list[TaskResult]
    subjects: list[Subject]
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "versions": self.versions,
            "models": [_model(subject) for subject in self.subjects],
            "results": [_result(result) for result in self.results],
        }


def write_results(out: Path, run: ScalingRun) -> None:
    """All files of a run as far as it has come; each appears whole."""
    for result in run.results:
        write_text(_examples_file(out, result), "".join(json.dumps(line) + "\n" for line in example_lines(result)))
    write_text(out / RESULTS, json.dumps(run.as_dict(), indent=2, allow_nan=False) + "\n")
    write_text(out / FILE, table(run))


def table(run: ScalingRun) -> str:
    """The csv table that ``branchmix scaling trends`` reads."""
    further = dict.fromkeys(axis for subject in run.subjects for axis in subject.axes)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*_COLUMNS, *_MORE, *further], restval="", lineterminator="\n")
    writer.writeheader()
    for result in run.results:
        for row in _rows(result):
            writer.writerow({name: "" if value is None else value for name, value in row.items()})
    return text.getvalue()


def _rows(result: TaskResult) -> Iterator[dict[str, Any]]:
    subject, selected, summary = result.subject, result.selected, result.summary
    if summary is None:
        return
    common = {
        "task": selected.task.name,
        "model": subject.name,
        **{axis: getattr(subject, axis) for axis in AXES},
        "family": subject.family,
        "seed": subject.seed,
        "data": selected.data,
        "cause": selected.task.cause,
        **subject.axes,
    }
    coverage = summary.means.get("coverage")
    for metric, mean in summary.means.items():
        if metric == "coverage":
            continue  # no performance: a column of accuracy
        row = {**common, "metric": metric, "value": mean.value, "stderr": mean.stderr, "n": mean.n}
        if metric == "accuracy":
            row |= {
                "constant_share": max(summary.predictions.values()),
                "constant_baselines": "|".join(map(str, summary.baselines.values())),
                "coverage": coverage.value if coverage is not None else None,
                "chance": summary.chance.get(metric),
            }
        yield row


def example_lines(result: TaskResult) -> Iterator[dict[str, Any]]:
    """A line for each example; the key is its place in the file, the same for all models."""
    name = result.selected.task.metric
    loss = name if name in ("logodds", "absolute_logodds") else "loss"
    for number, example, numbers, answer in result.scored:
        line: dict[str, Any] = {"key": str(number)}
        if example.template is not None:
            line["template"] = example.template
        if numbers.correct is not None:
            line |= {FIELDS["accuracy"]: int(numbers.correct), "predicted": numbers.predicted}
        line[loss] = numbers.loss
        if numbers.coverage is not None:
            line["coverage"] = numbers.coverage
        yield line | {"logprobs": list(answer.logprobs), "tokens": list(answer.tokens)}
    for number, reason in result.refused:
        yield {"key": str(number), "refused": reason}


def _examples_file(out: Path, result: TaskResult) -> Path:
    """Where ``scaling/trends/examples.py`` looks for it."""
    subject, data = result.subject, result.selected.data
    folder = out / EXAMPLES / subject.name / (f"seed-{subject.seed}" if subject.seed else "")
    return folder / (result.selected.task.name + ("" if data == DATA[0] else f".{data}") + ".jsonl")


def _model(subject: Subject) -> dict[str, Any]:
    counted = ("params", "active_params", "tokens", "flops", "forward_flops_per_token")
    return {
        "name": subject.name,
        "family": subject.family,
        "seed": subject.seed or None,
        "model": subject.model.given,
        "revision": subject.model.revision,
        **{name: getattr(subject, name) for name in counted},
        "training": list(subject.training),
        **({"axes": subject.axes} if subject.axes else {}),
    }


def _result(result: TaskResult) -> dict[str, Any]:
    subject, selected, summary = result.subject, result.selected, result.summary
    content: dict[str, Any] = {
        "model": subject.name,
        "family": subject.family,
        "seed": subject.seed or None,
        "task": selected.task.name,
        "data": selected.data,
        "metric": selected.task.metric,
        "file": selected.file.name,
        "is_release": selected.is_release,
        "shots": selected.shots,
        "examples": len(selected.examples),
        "examples_in_file": selected.num_available,
        "n": len(result.scored),
        "refused": dict(Counter(reason for _, reason in result.refused)),
        "merged": result.merged,
    }
    if summary is not None:
        content |= {
            "metrics": {name: asdict(mean) for name, mean in summary.means.items()},
            "baselines": summary.baselines,
            "predictions": summary.predictions,
            "chance": summary.chance,
            "flags": [flag.words for flag in summary.flags],
        }
    rate = len(result.scored) / result.seconds if result.seconds else None
    return content | {
        "dtype": result.facts["dtype"],
        "bos": {"policy": result.facts["bos"], "tokens": result.facts["bos_tokens"]},
        "seconds": round(result.seconds, 3),
        "examples_per_second": round(rate, 3) if rate else None,
    }

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

from branchmix.checkpoint.folder import write_json, write_text
from branchmix.scaling.examples import Example
from branchmix.scaling.family import Subject
from branchmix.scaling.metrics import Score, Summary, loss_name
from branchmix.scaling.selection import Selected
from branchmix.scaling.trends.table import AXES, DATA, FIELDS, FILE, FLAG_COLUMNS, settings_folder

RESULTS = "results.json"
EXAMPLES = "examples"
_COLUMNS = ("task", "model", "params", "active_params", "tokens", "flops", "metric", "value", "stderr", "n")
_MORE = ("family", "seed", "data", "cause", *FLAG_COLUMNS)


@dataclass
class TaskResult:
    """A model on the examples of one file."""

    subject: Subject
    selected: Selected
    summary: Summary | None
    """None if every example was refused."""
    scored: list[tuple[int, Example, Score, dict[str, Any]]]
    """Number in the file, example, its numbers, and the answer to its prompt as the records have it."""
    refused: list[tuple[int, str]]
    """Number of each example that was not scored, and why."""
    merged: int
    """Scored examples in which an option merges with the prompt's last token."""
    facts: dict[str, Any]
    """What the numbers depend on: dtype, tokenizer, BOS policy."""
    settings: dict[str, int]
    """Where the model is on the axes within it; empty if it was run in one setting."""
    seconds: float = 0.0
    """Time of computing, whenever that was."""

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of the table, one for each metric."""
        for metric, mean in self.summary.means.items() if self.summary is not None else ():
            if metric == "coverage":
                continue  # no performance: a column of accuracy
            row: dict[str, Any] = {
                "task": self.selected.task.name,
                "model": self.subject.name,
                **{axis: getattr(self.subject, axis) for axis in AXES},
                "family": self.subject.family,
                "seed": self.subject.seed,
                "data": self.selected.data,
                "cause": self.selected.task.cause,
                **self.subject.axes,
                **self.settings,
                "metric": metric,
                **asdict(mean),
            }
            if metric == "accuracy" and self.summary is not None:
                coverage = self.summary.means.get("coverage")
                row |= {
                    "constant_share": max(self.summary.predictions.values()),
                    "constant_baselines": "|".join(map(str, self.summary.baselines.values())),
                    "coverage": coverage and coverage.value,
                    "chance": self.summary.chance["accuracy"],
                }
            yield row

    def example_lines(self) -> Iterator[dict[str, Any]]:
        """A line for each example; the key is its place in the file, the same for all models."""
        for number, example, numbers, answer in self.scored:
            line: dict[str, Any] = {"key": str(number)}
            if example.template is not None:
                line["template"] = example.template
            if numbers.correct is not None:
                line |= {FIELDS["accuracy"]: int(numbers.correct), "predicted": numbers.predicted}
            line[loss_name(self.selected.task.metric)] = numbers.loss
            if numbers.coverage is not None:
                line["coverage"] = numbers.coverage
            yield line | {name: answer[name] for name in ("logprobs", "tokens")}
        for number, reason in self.refused:
            yield {"key": str(number), "refused": reason}

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        subject, selected, summary = self.subject, self.selected, self.summary
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
            **({"settings": self.settings} if self.settings else {}),
            "examples": len(selected.examples),
            "examples_in_file": selected.num_available,
            "n": len(self.scored),
            "refused": dict(Counter(reason for _, reason in self.refused)),
            "merged": self.merged,
        }
        if summary is not None:
            means = {name: asdict(mean) for name, mean in summary.means.items()}
            content |= {"metrics": means, "baselines": summary.baselines, "predictions": summary.predictions}
            content |= {"chance": summary.chance, "flags": list(summary.flags)}
        rate = len(self.scored) / self.seconds if self.seconds else None
        return content | {
            "dtype": self.facts["dtype"],
            "bos": {"policy": self.facts["bos"], "tokens": self.facts["bos_tokens"]},
            "seconds": round(self.seconds, 3),
            "examples_per_second": round(rate, 3) if rate else None,
        }


@dataclass
class ScalingRun:
    """All results of a call."""

    results: list[TaskResult]
    subjects: list[Subject]
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        models = [subject.as_dict() for subject in self.subjects]
        return {"versions": self.versions, "models": models, "results": [result.as_dict() for result in self.results]}

    def write(self, out: Path) -> None:
        """All files of a run as far as it has come; each appears whole."""
        for result in self.results:  # where ``trends.table.read_scores`` looks for them
            subject, data = result.subject, result.selected.data
            folder = out / EXAMPLES / subject.name / (f"seed-{subject.seed}" if subject.seed else "")
            folder /= settings_folder(result.settings)
            name = result.selected.task.name + ("" if data == DATA[0] else f".{data}") + ".jsonl"
            write_text(folder / name, "".join(json.dumps(line) + "\n" for line in result.example_lines()))
        write_json(out / RESULTS, self.as_dict())
        write_text(out / FILE, self.table())

    def table(self) -> str:
        """The csv table that ``branchmix scaling trends`` reads."""
        further = dict.fromkeys(axis for result in self.results for axis in (*result.subject.axes, *result.settings))
        text = io.StringIO()
        writer = csv.DictWriter(text, [*_COLUMNS, *_MORE, *further], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for result in self.results for row in result.rows())
        return text.getvalue()

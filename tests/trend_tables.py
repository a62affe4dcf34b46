"""Tables of results for tests of verdicts: Pythia's, and curves of a known shape."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from branchmix.scaling.trends.judge import Report, trends_by_axis

PYTHIA = Path(__file__).parent / "data" / "pythia"
HEADER = "task,model,params,metric,value,stderr,n"
BUDGETS = (0, 1024, 2048, 4096, 8192, 16384)
UNITS = {"m": 1e6, "b": 1e9}


def trends(path: Path, **options: Any) -> Report:
    """The report along the axis asked for alone; options as for ``trends_by_axis``."""
    return trends_by_axis(path, **options)[0]


def pythia(*, step: int | None = None) -> list[dict[str, Any]]:
    """Rows of all checkpoints, or of one: 12 tasks by 8 sizes (by 8 checkpoints)."""
    with (PYTHIA / "results.csv").open(newline="") as file:
        counts, *runs = csv.DictReader(file)
    rows = []
    for run in runs:
        if step is not None and int(run["step"]) != step:
            continue
        size = run["model"].removeprefix("pythia-")
        for task in list(run)[2:]:
            n, found = int(counts[task]), float(run[task])
            value = found if task == "truthfulqa-mc2" else found / n
            rows.append(
                {
                    "task": task,
                    "model": run["model"],
                    "params": float(size[:-1]) * UNITS[size[-1]],
                    "tokens": int(run["step"]) * 2_097_152,
                    "metric": "accuracy",
                    "value": value,
                    "stderr": math.sqrt(value * (1 - value) / (n - 1)),
                    "n": n,
                }
            )
    return rows


CONSTANT = {"neqa": "0.456667|0.543333", "hindsight-neglect": "0.450794|0.549206", "modus-tollens": "0|1"}
"""Accuracy of always the same answer, from the official files: 137 of 300 A, 142 of 315 Y, all Yes."""


def pythia_table() -> list[dict[str, Any]]:
    """The final checkpoints as in `examples/pythia/results.csv`, short of what all of them share."""
    rows = []
    for row in pythia(step=143000):
        digits = {"value": f"{row['value']:.6f}", "stderr": f"{row['stderr']:.6f}", "params": f"{row['params']:.0f}"}
        shown = {**row, **digits, "constant_baselines": CONSTANT.get(row["task"], "")}
        rows.append({name: value for name, value in shown.items() if name != "tokens"})
    return rows


def rows_of(
    values: Sequence[float],
    *,
    task: str = "memo-trap",
    metric: str = "accuracy",
    stderr: float = 0.005,
    n: int = 5000,
    **columns: Any,
) -> list[dict[str, Any]]:
    """A curve: a model for each value, each four times the last one's size."""
    return [
        {
            "task": task,
            "model": f"m{number}",
            "params": 1e7 * 4**number,
            "metric": metric,
            "value": value,
            "stderr": stderr,
            "n": n,
            **columns,
        }
        for number, value in enumerate(values)
    ]


def write(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return file


def write_examples(folder: Path, model: str, task: str, records: Iterable[dict[str, Any]]) -> None:
    file = folder / "examples" / model / f"{task}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def study(*, sizes: int = 6) -> list[dict[str, Any]]:
    """A dense and a mixture family on four tasks, official and fresh, two seeds of each size, all axes, both metrics.

    `memo-trap` gets worse for dense models and hardly so for mixtures, and both have seen the official data; `neqa`
    is at chance; `sig-figs` gets better; `prompt-injection` has a loss only, that rises and falls again.
    """
    u = [number / (sizes - 1) for number in range(sizes)]
    shapes: dict[str, dict[str, list[float]]] = {
        "memo-trap": {"dense": [0.85 - 0.45 * x for x in u], "mixture": [0.86 - 0.12 * x for x in u]},
        "neqa": {"dense": [0.5 + 0.002 * (k % 2) for k in range(sizes)], "mixture": [0.5 for _ in u]},
        "sig-figs": {"dense": [0.45 + 0.4 * x for x in u], "mixture": [0.47 + 0.42 * x for x in u]},
    }
    random = Random(1)
    rows = []
    for family in ("dense", "mixture"):
        for number in range(sizes):
            active = 1e7 * 4**number
            tokens = 2e9 * 2**number
            axes = {
                "flops": 6 * active * tokens * (1.4 if family == "mixture" else 1),
                "params": active * (3.2 if family == "mixture" else 1),
                "active_params": active,
                "tokens": tokens * (1.4 if family == "mixture" else 1),
            }
            for seed in (1, 2):
                for data in ("official", "fresh"):
                    place = {"model": f"{family}-{number}", "family": family, "seed": seed, "data": data, **axes}
                    for task, curves in shapes.items():
                        n = 1000
                        seen = 0.06 if task == "memo-trap" and data == "official" else 0.0
                        accuracy = curves[family][number] + seen + random.gauss(0, 0.008)
                        error = math.sqrt(accuracy * (1 - accuracy) / (n - 1))
                        both = {"task": task, "n": n, "chance": 0.5}
                        flags = {"constant_baselines": "0.47|0.53"} if task == "neqa" else {}
                        if task == "neqa" and number == 0:
                            flags |= {"constant_share": 0.99, "coverage": 0.004}
                        rows.append(
                            {**place, **both, **flags, "metric": "accuracy", "value": accuracy, "stderr": error}
                        )
                        loss = -math.log(accuracy) + random.gauss(0, 0.01)
                        both |= {"chance": math.log(2)}
                        rows.append({**place, **both, "metric": "loss", "value": loss, "stderr": 0.02})
                    bent = 30 + 9 * (2 * u[number] - 1) ** 2 + random.gauss(0, 0.3)
                    injected = {"task": "prompt-injection", "metric": "loss", "value": bent, "stderr": 0.4, "n": 1000}
                    rows.append({**place, **injected})
    return rows


def settings(
    folder: Path,
    shares: dict[str, list[float]],
    *,
    axis: str = "reasoning_budget",
    places: tuple[float, ...] = BUDGETS,
    seeds: tuple[str, ...] = ("",),
    n: int = 400,
    **columns: Any,
) -> dict[tuple[str, str, float], np.ndarray]:
    """Models that answer the same questions in several settings; half of them are hard. With scores of examples."""
    random, rows, answers = np.random.default_rng(0), [], {}
    for model, levels in shares.items():
        hard = np.arange(n) % 2
        for seed in seeds:
            for place, share in zip(places, levels, strict=True):
                right_N = random.random(n) < share + 0.35 * (1 - 2 * hard)
                answers[model, seed, place] = right_N
                row = {"task": "memo-trap", "model": model, "metric": "accuracy", "value": right_N.mean(), "n": n}
                rows.append({**row, "seed": seed, axis: place, **columns})
                where = folder / "examples" / model / (f"seed-{seed}" if seed else "") / f"{axis}-{place:g}"
                where.mkdir(parents=True)
                lines = [{"key": key, "correct": int(right)} for key, right in enumerate(right_N)]
                (where / "memo-trap.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write(folder / "results.csv", rows)
    return answers

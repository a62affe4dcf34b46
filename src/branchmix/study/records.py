"""What steps leave on the disk: file names, records as text, loss curves, the machine."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

PLAN, RESULT, PAGE = "plan.json", "result.json", "routes.html"
MODEL, TEXT, STEPS = "model", "text", "steps"
RESULTS, STUDY = "results", "study.json"
SMOOTHED = 8
"""Points of a loss curve that are averaged, those before it: no point knows what comes after it."""


def write_record(file: Path, content: Any) -> None:
    """A key a line, whatever stands below it on that line: small, and still readable in a diff."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in content.items()]
    part = file.with_name(f".{file.name}.part")
    part.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    part.replace(file)


def curve(folder: Path) -> list[dict[str, float]]:
    """Training loss over tokens and FLOPs: the mean over domains of the last few points of each.

    A batch has more of one domain and less of another, which would be most of what moves its own mean.
    """
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    recent: dict[str, list[float]] = {}
    points = []
    for row in rows:
        if "loss" not in row:
            continue
        for name, value in row.items():
            if name.startswith("loss/"):
                recent[name] = [*recent.get(name, [])[1 - SMOOTHED :], value]
        loss = sum(sum(values) / len(values) for values in recent.values()) / len(recent)
        points.append({**{key: row[key] for key in ("step", "tokens", "flops")}, "loss": round(loss, 5)})
    return points


def cpu_name() -> str:
    """As the system calls it."""

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

"""What a study will take, before it is started: ``branchmix study --dry-run``.

Tokens and FLOPs are exact. Time comes from a short calibration on this machine, one training step after another with a
step's threads; memory is what weights, gradients, optimizer, activations and logits need; disk is what stays.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from branchmix.accounting import parameters
from branchmix.study.build import build
from branchmix.study.graph import Graph, Step, chosen
from branchmix.study.memory import training_bytes
from branchmix.study.records import RESULT, STEPS
from branchmix.study.run import share_machine
from branchmix.study.settings import StudyFile
from branchmix.train.progress import duration

START_SECONDS = 8.0
"""Until a process has imported everything and read its data."""
TEXT_SECONDS, MERGE_SECONDS = 60.0, 5.0
CALIBRATED_ROWS = 8
"""Sequences of a calibration's forward passes, at most."""
_GROUPS = {"dense": "dense models", "methods": "methods", "ablations": "ablations"}


@dataclass(frozen=True)
class Row:
    """Steps that differ in their repetition only."""

    name: str
    status: str
    """How many are done, if any."""
    times: int
    parameters: int
    tokens: int
    flops: int
    """Forward and backward, of each."""
    optimizer: int
    memory: int
    disk: int
    seconds: float | None


@dataclass(frozen=True)
class Forecast:
    """All steps, and sums."""

    rows: list[Row]
    seconds: float | None
    """Of wall time, for what is not done."""
    disk: int
    at_once: int
    threads: int
    tokens: int
    flops: int
    sunk_flops: int
    """Of seeds and experts."""
    budgets: list[dict[str, Any]] = field(default_factory=list)
    """Of the first repetition's trained models: FLOPs against the reference's."""
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Sums and warnings, for people."""
        time = "" if self.seconds is None else f"; about {duration(self.seconds)} with nothing else to do"
        lines = [
            "",
            f"{sum(row.times for row in self.rows)} steps, {self.at_once} at once with {self.threads} threads each"
            f"{time}",
            f"{self.tokens:,} tokens, {self.flops:.4g} training FLOPs, of which seeds and experts "
            f"{self.sunk_flops:.4g}; {self.disk / 1e9:.2f} GB of disk",
            "",
            "equal budgets, of each repetition:",
        ]
        for row in self.budgets:
            match = ", ".join(word.upper() for word in row["match"])
            lines.append(
                f"  {row['title']:32} {match:12} {row['tokens']:>12,} tokens ({row['tokens_share']:.3f} of the "
                f"reference's)  {row['flops']:.5g} FLOPs ({row['flops_share']:.4f})"
            )
        return [*lines, *(f"warning: {warning}" for warning in self.warnings)]


def forecast(study: StudyFile, out: Path, *, only: Sequence[str] = (), measured: bool = True) -> Forecast:
    """Plan without running.

    Args:
        study: the settings.
        out: folder of the study, to see what is done.
        only: as for ``run.study``.
        measured: calibrate, which takes some seconds for each kind of model; without, times are unknown.
    """
    graph = build(study)
    steps = chosen(graph, list(only))
    done = {step.name for step in steps if (out / STEPS / step.folder / RESULT).is_file()}
    at_once, threads, _ = share_machine(study, len(steps))
    speeds = _speeds(study, steps, threads) if measured else {}
    seconds = {step.name: _seconds(study, step, graph, speeds) if measured else None for step in steps}
    left = [step for step in steps if step.name not in done]
    rows: dict[str, list[Step]] = {}
    for step in steps:
        rows.setdefault(_without_repetition(step.name), []).append(step)
    trained = [step for step in steps if step.kind == "train"]
    return Forecast(
        rows=[_row(study, name, group, done, seconds[group[0].name]) for name, group in rows.items()],
        seconds=_makespan(left, {name: value or 0.0 for name, value in seconds.items()}, at_once) if measured else None,
        disk=sum(_disk(study, step) for step in steps),
        at_once=at_once,
        threads=threads,
        tokens=sum(step.cost.tokens for step in trained),
        flops=sum(step.cost.total for step in trained),
        sunk_flops=sum(step.cost.total for step in trained if step.about["group"] == "dense"),
        budgets=_budgets(graph),
        warnings=sorted(
            {f"{step.about['label']}: {step.about['warning']}" for step in steps if step.about.get("warning")}
        ),
    )


def _without_repetition(name: str) -> str:
    first, _, rest = name.partition(".")
    return rest if first[:1] == "r" and first[1:].isdigit() else name


def _row(study: StudyFile, name: str, steps: list[Step], done: set[str], seconds: float | None) -> Row:
    step = steps[0]
    count = sum(step.name in done for step in steps)
    return Row(
        name=name,
        status="" if not count else "done" if count == len(steps) else f"{count} done",
        times=len(steps),
        parameters=parameters(step.config).total if step.config else 0,
        tokens=step.cost.tokens,
        flops=step.cost.flops,
        optimizer=step.cost.optimizer,
        memory=_memory(step),
        disk=_disk(study, step),
        seconds=seconds,
    )


def _memory(step: Step) -> int:
    """Of a training step; of anything else the weights in fp32."""
    if step.config is None or step.kind == "upcycle":
        return 0
    if step.kind != "train":
        return 4 * parameters(step.config).total
    run = step.options["run"]
    return training_bytes(step.config, run, bf16=_in_bf16(run))


def _in_bf16(run: dict[str, Any]) -> bool:
    """Whether a run computes in bf16 on this machine's CPUs."""
    import torch

    from branchmix.models.chunked_branchmix import faster_in_bf16

    precision = run.get("precision", "auto")
    return faster_in_bf16(torch.device("cpu")) if precision == "auto" else bool(precision == "bf16")


def _disk(study: StudyFile, step: Step) -> int:
    """What stays of its weights."""
    if step.config is None or step.kind not in ("train", "upcycle"):
        return 0
    if study.keep == "results" and step.about["role"] not in ("seed", "expert"):
        return 0
    return 4 * parameters(step.config).total


def _budgets(graph: Graph) -> list[dict[str, Any]]:
    trained = [
        s
        for s in graph.steps.values()
        if s.kind == "train" and s.about["group"] != "dense" and s.about["repetition"] == 0
    ]
    reference = next(step.cost for step in trained if step.about["role"] == "reference")
    return [
        {
            "title": step.about["title"],
            "match": step.about["match"],
            "tokens": step.cost.tokens,
            "tokens_share": step.cost.tokens / reference.tokens,
            "flops": step.cost.total,
            "flops_share": step.cost.total / reference.total,
        }
        for step in trained
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


def _speeds(study: StudyFile, steps: Sequence[Step], threads: int) -> dict[str, float]:
    """Seconds of a training step of each kind of model."""
    import torch

    from branchmix.study.speed import new_model, seconds_per_step
    from branchmix.train.memory import keep_freed_memory
    from branchmix.train.models import Computing

    torch.set_num_threads(threads)
    keep_freed_memory()
    computing = Computing(torch.device("cpu"), _in_bf16(study.train))
    found: dict[str, float] = {}
    for step in steps:
        kind = json.dumps(step.config, sort_keys=True)
        if step.config is None or kind in found:
            continue
        seed = step.config.get("seed_config", step.config)
        found[kind] = seconds_per_step(
            new_model(step.config, computing, study.sequence_length),
            vocab_size=int(seed["vocab_size"]),
            sequence_length=study.sequence_length,
            batch_size=study.batch_size,
            rows=min(CALIBRATED_ROWS, study.micro_batch_size or study.batch_size),
            computing=computing,
            steps=2,
        )
    return found


def _seconds(study: StudyFile, step: Step, graph: Graph, speeds: dict[str, float]) -> float:
    """Of one step, alone on its threads."""
    if step.kind == "text":
        return TEXT_SECONDS
    if step.kind == "upcycle":
        return MERGE_SECONDS
    if step.kind == "inference":
        forward = [
            speeds[json.dumps(graph.steps[name].config, sort_keys=True)] / study.step_tokens / 3
            for name in step.needs.values()
        ]
        tokens = (
            (study.inference.prompt + 10 * study.inference.new_tokens) * (study.inference.runs + 1)
            if study.inference
            else 0
        )
        return START_SECONDS + tokens * sum(forward)
    one = speeds[json.dumps(step.config, sort_keys=True)]
    evaluated = one / study.step_tokens / 3 * study.held_out.tokens * len(study.domains)
    if step.kind == "train":
        return START_SECONDS + one * step.cost.steps
    return START_SECONDS + evaluated * (len(study.expert_names) + 1 if step.kind == "ensemble" else 1)


def _makespan(steps: Sequence[Step], seconds: dict[str, float], at_once: int) -> float:
    """When the last of them ends, each begun in its order as soon as there is room and nothing to wait for."""
    left, now = list(steps), 0.0
    ends: dict[str, float] = {}
    running: list[float] = []
    names = {step.name for step in steps}
    while left or running:
        for step in list(left):
            waits = [name for name in step.needs.values() if name in names and ends.get(name, float("inf")) > now]
            if len(running) < at_once and not waits:
                left.remove(step)
                ends[step.name] = now + seconds[step.name]
                running.append(ends[step.name])
        now = min(running)
        running.remove(now)
    return now

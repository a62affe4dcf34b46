"""What a study will take, before it is started (``branchmix study --dry-run``), and budgets that fit into a time.

Tokens and FLOPs are exact. Time comes from a short calibration on this machine, side by side as the steps will run;
memory is what weights, gradients, optimizer, activations and logits need; disk is what stays.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from branchmix.accounting import parameters
from branchmix.errors import RecipeError
from branchmix.study.build import build
from branchmix.study.graph import Graph, Step, chosen, has_routers, may_go
from branchmix.study.memory import training_bytes
from branchmix.study.processes import MOST_PROCESSES, processes_of, share_machine
from branchmix.study.records import PLAN, RESULT, STEPS
from branchmix.study.settings import InstalledText, StudyFile
from branchmix.study.speed import Speed
from branchmix.train.progress import duration

TEXT_SECONDS = 60.0
"""Of extracting what is installed."""
READING_SECONDS = 3.0
"""Of reading data and writing a model, for each step."""
SHARED = 1.25
"""Times the work of one process, where several exchange gradients: two take 0.63 of the time of one."""
EVALUATION = 0.4
"""Of a training step's time for as many tokens: forward passes are a third, and documents fill no whole windows."""
MARGIN = 0.9
"""Share of ``minutes`` that is planned: machines are not always as fast as in their first seconds."""
LEAST_STEPS = 5
LEAST_TEXT = 500_000
"""Bytes of each domain, where the study allows as many."""


@dataclass(frozen=True)
class StepForecast:
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
    """Of each that is not done."""


@dataclass(frozen=True)
class Forecast:
    """All steps, and sums."""

    rows: list[StepForecast]
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


def forecast(
    study: StudyFile, out: Path, *, only: Sequence[str] = (), measured: bool = True, speed: Speed | None = None
) -> Forecast:
    """Plan without running.

    Args:
        study: the settings.
        out: folder of the study, to see what is done.
        only: as for ``run.study``.
        measured: calibrate, which takes some seconds for each kind of model; without, times are unknown.
        speed: of this machine, if it has been measured.
    """
    graph = build(study)
    steps = chosen(graph, list(only))
    done = {step.name for step in steps if (out / STEPS / step.folder / RESULT).is_file()}
    at_once, threads, _ = share_machine(study, len(steps))
    left = [step for step in steps if step.name not in done]
    seconds: dict[str, float] = {}
    if measured:
        needed = {step.name for step in left} | {n for s in left if s.kind == "inference" for n in s.needs.values()}
        speed = speed or _measured(study, (graph.steps[name] for name in sorted(needed)), at_once, threads)
        seconds = {step.name: _seconds(study, step, graph, speed) for step in left}
    rows: dict[str, list[Step]] = {}
    for step in steps:
        rows.setdefault(_without_repetition(step.name), []).append(step)
    trained = [step for step in steps if step.kind == "train"]
    return Forecast(
        rows=[_row(study, name, group, done, _longest(group, seconds)) for name, group in rows.items()],
        seconds=_makespan(left, seconds, at_once) if measured else None,
        disk=sum(_disk(study, step) for step in steps),
        at_once=at_once,
        threads=threads,
        tokens=sum(step.cost.tokens for step in trained),
        flops=sum(step.cost.total for step in trained),
        sunk_flops=sum(step.cost.total for step in trained if step.about and step.about.group == "dense"),
        budgets=_budgets(graph),
        warnings=sorted(
            {f"{step.about.label}: {step.about.warning}" for step in steps if step.about and step.about.warning}
        ),
    )


def _without_repetition(name: str) -> str:
    first, _, rest = name.partition(".")
    return rest if first[:1] == "r" and first[1:].isdigit() else name


def _longest(steps: list[Step], seconds: dict[str, float]) -> float | None:
    """Of one of them that is not done; None if there is none, or nothing was measured."""
    return max((seconds[step.name] for step in steps if step.name in seconds), default=None)


def _row(study: StudyFile, name: str, steps: list[Step], done: set[str], seconds: float | None) -> StepForecast:
    step = steps[0]
    count = sum(step.name in done for step in steps)
    return StepForecast(
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
    if study.keep == "results" and may_go(step):
        return 0
    return 4 * parameters(step.config).total


def _budgets(graph: Graph) -> list[dict[str, Any]]:
    trained = [
        (step.about, step.cost)
        for step in graph.steps.values()
        if step.kind == "train" and step.about and step.about.group != "dense" and step.about.repetition == 0
    ]
    reference = next(cost for about, cost in trained if about.role == "reference")
    return [
        {
            "title": about.title,
            "match": list(about.match),
            "tokens": cost.tokens,
            "tokens_share": cost.tokens / reference.tokens,
            "flops": cost.total,
            "flops_share": cost.total / reference.total,
        }
        for about, cost in trained
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


def fitted(study: StudyFile, out: Path, *, say: Callable[[str], None] | None = None) -> tuple[StudyFile, Speed | None]:
    """A study with budgets that fit into its ``minutes``: as it was begun in ``out``, or by a forecast.

    Returns the speed of this machine with it, if that was measured for the forecast.

    Args:
        study: with ``minutes``, so that ``tokens`` and ``data.installed`` are proportions.
        out: folder of the study.
        say: gets lines about the machine and the budgets.

    Raises:
        RecipeError: the study in ``out`` was begun with other minutes.
    """
    begun = begun_with(out)
    if begun is not None and begun.get("minutes") != study.minutes:
        minutes = begun.get("minutes")
        was = f"a study of {minutes:g} minutes" if minutes else "a study without minutes"
        raise RecipeError(f"{out}: holds {was}: choose another folder, or the minutes it was begun with")
    if begun is not None:
        installed = begun["data"].get("installed") if isinstance(study.data, InstalledText) else None
        return _with_budgets(study, begun["tokens"], installed), None
    graph = build(study)
    at_once, threads, _ = share_machine(study, len(graph.steps))
    if say is not None:
        say(f"measuring the speed of {at_once} processes side by side")
    speed = _measured(study, graph.steps.values(), at_once, threads)
    study, seconds = fit(study, speed, at_once)
    if say is not None:
        tokens = ", ".join(f"{phase} {count:,}" for phase, count in study.tokens.model_dump().items() if count)
        say(f"tokens that fit into {study.minutes:g} minutes: {tokens}; about {duration(seconds)} in all")
    return study, speed


def begun_with(out: Path) -> dict[str, Any] | None:
    """Settings of the study that was begun in a folder; None if there is none."""
    if not (out / PLAN).is_file():
        return None
    return dict(json.loads((out / PLAN).read_text(encoding="utf-8"))["settings"])


def fit(study: StudyFile, speed: Speed, at_once: int) -> tuple[StudyFile, float]:
    """The study with the largest budgets whose forecast is within ``MARGIN`` of its minutes, and that forecast.

    Every phase has ``LEAST_STEPS`` however short the time is.
    """
    assert study.minutes is not None
    goal = 60 * MARGIN * study.minutes

    def scaled(factor: float) -> tuple[StudyFile, float]:
        least = LEAST_STEPS * study.step_tokens
        tokens = {
            phase: max(least, round(factor * count / study.step_tokens) * study.step_tokens) if count else None
            for phase, count in study.tokens.model_dump().items()
        }
        text = study.data.installed if isinstance(study.data, InstalledText) else None
        candidate = _with_budgets(study, tokens, text and max(min(text, LEAST_TEXT), int(factor * text)))
        graph = build(candidate)
        seconds = {step.name: _seconds(candidate, step, graph, speed) for step in graph.steps.values()}
        return candidate, _makespan(list(graph.steps.values()), seconds, at_once)

    low, high = 0.0, 1.0
    while scaled(high)[1] < goal and high < 1e4:
        low, high = high, 2 * high
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if scaled(middle)[1] < goal else (low, middle)
    return scaled(low)


def _with_budgets(study: StudyFile, tokens: dict[str, int | None], installed: int | None) -> StudyFile:
    update: dict[str, Any] = {"tokens": study.tokens.model_copy(update=tokens)}
    if isinstance(study.data, InstalledText) and installed:
        update["data"] = study.data.model_copy(update={"installed": installed})
    return study.model_copy(update=update)


def _measured(study: StudyFile, steps: Iterable[Step], at_once: int, threads: int) -> Speed:
    from branchmix.study.speed import measure_speed

    configs = [step.config for step in steps if step.config is not None]
    if not configs:
        return Speed(0.0, {})
    return measure_speed(study, configs, processes=min(at_once, MOST_PROCESSES), threads=threads)


def _seconds(study: StudyFile, step: Step, graph: Graph, speed: Speed) -> float:
    """Of one step, while others work beside it where they can."""
    start = speed.start + READING_SECONDS
    if step.kind == "text":
        return TEXT_SECONDS
    if step.kind == "upcycle":
        return start
    if step.kind == "inference":
        models = [graph.steps[name].config for name in step.needs.values()]
        forward = sum(speed.step(config) for config in models if config is not None) / study.step_tokens / 3
        tokens = 0
        if study.inference:
            tokens = (study.inference.prompt + 10 * study.inference.new_tokens) * (study.inference.runs + 1)
        return start + tokens * forward
    assert step.config is not None
    one = speed.step(step.config)
    if step.kind == "train":
        processes = processes_of(study, graph, step)
        return start + step.cost.steps * one * (SHARED / processes if processes > 1 else 1.0)
    evaluated = one / study.step_tokens * EVALUATION * study.held_out.tokens * len(study.domains)
    if step.kind == "scores" and has_routers(step.config):
        evaluated *= 2  # its routing is measured too
    members = len(study.expert_names) + 1 if step.kind == "ensemble" else 1
    own_process = step.kind == "ensemble" or "model" not in step.needs
    return READING_SECONDS + (speed.start if own_process else 0.0) + members * evaluated


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

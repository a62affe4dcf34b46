"""What a study will take, before it is started (``branchmix study --dry-run``), and budgets that fit into a time.

Tokens and FLOPs are exact. Time comes from a short calibration on this machine, side by side as the steps will run;
memory is what weights, gradients, optimizer, activations and logits need; disk is what stays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from branchmix.accounting import parameters
from branchmix.errors import RecipeError
from branchmix.pages.numbers import counted
from branchmix.study.build import build
from branchmix.study.folder import PLAN, is_done
from branchmix.study.graph import Graph, Step, has_routers
from branchmix.study.memory import training_bytes
from branchmix.study.models import runs_ahead
from branchmix.study.settings import InstalledText, StudyFile
from branchmix.study.speed import Speed, measure_speed
from branchmix.train.launch import cores, gpus, share_machine
from branchmix.train.models import Computing
from branchmix.train.progress import duration

MOST_PROCESSES = 8
"""That share a training run, or measure the speed of this machine."""
TEXT_SECONDS = 60.0
"""For extracting what is installed."""
READING_SECONDS = 3.0
"""For reading data and writing a model, in each step."""
COUNTING_SECONDS = 2.0
"""For the text of a domain that gates are fitted on: reading it, counting, and choosing temperature and decay."""
SHARED = 1.25
"""Times the work of one process, where several exchange gradients: two take 0.63 of the time of one."""
AHEAD = 1.3
"""Times the work of a step whose load is counted ahead, by a forward pass without the head: 1.24 to 1.30 measured."""
EVALUATION = 0.4
"""Share of a training step's time for as many tokens: a forward pass is a third, and documents fill windows partly."""
MARGIN = 0.9
"""Share of ``minutes`` that is planned: machines are not always as fast as in their first seconds."""
LEAST_STEPS = 5
LEAST_TEXT = 500_000
"""Bytes of each domain, where the study allows as many."""


# ---- How steps share this machine ----


def side_by_side(config: StudyFile, num_steps: int) -> tuple[int, int, list[dict[str, str]]]:
    """Steps at a time, threads of each, and the environments of their places."""
    at_once, threads, places = share_machine(config.at_once, config.threads, num_steps)
    return at_once, threads or cores(), places


def processes_of(config: StudyFile, graph: Graph, step: Step) -> int:
    """How many processes share a step on CPUs: as many as there are cores where no other step can run beside it.

    A mixture's balance loss is that of each process's share of a batch, so mixtures are trained by one.
    """
    can_be_shared = step.kind == "text" or (step.kind == "train" and not has_routers(step.config))
    if not can_be_shared or config.threads is not None or gpus():
        return 1
    related = {other.name for other in graph.with_needs([step.name])}
    related |= {other.name for other in graph.steps.values() if step in graph.with_needs([other.name])}
    if len(related) < len(graph.steps):
        return 1
    count = min(cores(), MOST_PROCESSES)
    shares = config.batch_size // (config.micro_batch_size or 1)
    return count if step.kind == "text" else max(n for n in range(1, count + 1) if shares % n == 0)


# ---- What it takes ----


@dataclass(frozen=True)
class Forecast:
    """All steps, and sums."""

    rows: list[dict[str, Any]]
    """Steps that differ in their repetition only, with numbers for each of them: ``name``, ``status`` (how many are
    done), ``times``, ``parameters``, ``tokens``, ``flops``, those of the ``optimizer``, bytes of ``memory`` and
    ``disk``, and ``seconds``, None if all are done."""
    seconds: float
    """Wall time of what is not done."""
    disk: int
    at_once: int
    threads: int
    tokens: int
    flops: int
    sunk_flops: int
    """FLOPs of seeds and experts."""
    budgets: list[dict[str, Any]]
    """FLOPs of the first repetition's trained models against the reference's."""
    warnings: list[str]

    def lines(self) -> list[str]:
        """Sums and warnings, for people."""
        steps = sum(row["times"] for row in self.rows)
        budgets = [
            f"  {row['title']:32} {', '.join(row['match']).upper():12} {row['tokens']:>12,} tokens "
            f"({row['tokens_share']:.3f} of the reference's)  {row['flops']:.5g} FLOPs ({row['flops_share']:.4f})"
            for row in self.budgets
        ]
        return [
            "",
            f"{counted(steps, 'step')}, {self.at_once} at once with {counted(self.threads, 'thread')} each; about "
            f"{duration(self.seconds)} with nothing else to do",
            f"{self.tokens:,} tokens, {self.flops:.4g} training FLOPs, of which seeds and experts "
            f"{self.sunk_flops:.4g}; {self.disk / 1e9:.2f} GB of disk",
            "",
            "equal budgets, of each repetition:",
            *budgets,
            *(f"warning: {warning}" for warning in self.warnings),
        ]


def forecast(study: StudyFile, out: Path, *, only: Sequence[str] = (), speed: Speed | None = None) -> Forecast:
    """Plan without running.

    ``out`` says what is done, ``only`` is as for ``Graph.chosen``. ``speed`` is that of this machine, if it has been
    measured: that takes some seconds for each kind of model.
    """
    graph = build(study)
    steps = graph.chosen(only)
    at_once, threads, _ = side_by_side(study, len(steps))
    left = [step for step in steps if not is_done(out, step)]
    needed = {step.name for step in left} | {n for s in left if s.kind == "inference" for n in s.needs.names}
    speed = speed or _measured(study, (graph.steps[name] for name in sorted(needed)), at_once, threads)
    seconds = {step.name: _seconds(study, step, graph, speed) for step in left}
    same_work: dict[str, list[Step]] = {}
    for step in steps:
        same_work.setdefault(re.sub(r"^r\d+\.", "", step.name), []).append(step)
    trained = [step for step in steps if step.kind == "train"]
    return Forecast(
        rows=[_row(study, name, group, seconds) for name, group in same_work.items()],
        seconds=_makespan(left, seconds, at_once),
        disk=sum(_disk(study, step) for step in steps),
        at_once=at_once,
        threads=threads,
        tokens=sum(step.cost.tokens for step in trained),
        flops=sum(step.cost.total for step in trained),
        sunk_flops=sum(step.cost.total for step in trained if step.about.group == "dense"),
        budgets=_budgets(graph),
        warnings=sorted({f"{s.about.label}: {s.about.warning}" for s in steps if s.about.warning}),
    )


def _row(study: StudyFile, name: str, steps: list[Step], seconds: dict[str, float]) -> dict[str, Any]:
    first, left = steps[0], [seconds[step.name] for step in steps if step.name in seconds]
    done = len(steps) - len(left)
    return {
        "name": name,
        "status": "" if not done else f"{done} done" if left else "done",
        "times": len(steps),
        "parameters": _parameters(first),
        "tokens": first.cost.tokens,
        "flops": first.cost.flops,
        "optimizer": first.cost.optimizer,
        "memory": _memory(first),
        "disk": _disk(study, first),
        "seconds": max(left, default=None),
    }


def _parameters(step: Step) -> int:
    return parameters(step.config).total if step.config else 0


def _memory(step: Step) -> int:
    """Bytes of a training step; of a merge alone nothing, of anything else the weights in fp32."""
    if step.kind == "train":
        return training_bytes(step.config, step.run, bf16=Computing.of(step.run.get("precision", "auto")).bf16)
    return 0 if step.kind == "upcycle" and not step.recipe.get("gates") else 4 * _parameters(step)


def _disk(study: StudyFile, step: Step) -> int:
    """Bytes of the step's weights that stay."""
    stays = step.kind in ("train", "upcycle") and not (study.keep == "results" and step.may_go)
    return 4 * _parameters(step) if stays else 0


def _budgets(graph: Graph) -> list[dict[str, Any]]:
    trained = [
        (step.about, step.cost)
        for step in graph.steps.values()
        if step.kind == "train" and step.about.group != "dense" and step.about.repetition == 0
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


# ---- Time ----


def fitted(study: StudyFile, out: Path, *, say: Callable[[str], None] | None = None) -> tuple[StudyFile, Speed | None]:
    """A study with budgets that fit into its ``minutes``: as it was begun in ``out``, or by a forecast.

    Returns the speed of this machine with it, if that was measured for the forecast. ``say`` gets lines about the
    machine and the budgets.

    Raises:
        RecipeError: the study in ``out`` was begun with other minutes.
    """
    say = say or (lambda line: None)
    begun = begun_with(out)
    if begun is not None:
        if (minutes := begun.get("minutes")) != study.minutes:
            was = f"a study of {minutes:g} minutes" if minutes else "a study without minutes"
            raise RecipeError(f"{out}: holds {was}: choose another folder, or the minutes it was begun with")
        return _with_budgets(study, begun["tokens"], begun["data"].get("installed")), None
    graph = build(study)
    at_once, threads, _ = side_by_side(study, len(graph.steps))
    say(f"measuring the speed of {at_once} processes side by side")
    speed = _measured(study, graph.steps.values(), at_once, threads)
    study, seconds = fit(study, speed, at_once)
    tokens = ", ".join(f"{phase} {count:,}" for phase, count in study.tokens.model_dump().items() if count)
    say(f"tokens that fit into {study.minutes:g} minutes: {tokens}; about {duration(seconds)} in all")
    return study, speed


def begun_with(out: Path) -> dict[str, Any] | None:
    """Settings of the study that was begun in a folder; None if there is none."""
    plan = out / PLAN
    return dict(json.loads(plan.read_text(encoding="utf-8"))["settings"]) if plan.is_file() else None


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
    configs = [step.config for step in steps if step.config]
    if not configs:
        return Speed(0.0, {})
    return measure_speed(study, configs, processes=min(at_once, MOST_PROCESSES), threads=threads)


def _seconds(study: StudyFile, step: Step, graph: Graph, speed: Speed) -> float:
    """What one step takes, while others work beside it where they can."""
    start = speed.start + READING_SECONDS
    if step.kind == "text":
        return TEXT_SECONDS
    if step.kind == "upcycle":
        return start + (_calibration(study, step, speed) if step.recipe.get("gates") else 0.0)
    if step.kind == "inference":
        assert study.inference is not None
        models = [graph.steps[name].config for name in step.needs.names]
        forward = sum(speed.step(config) for config in models) / study.step_tokens / 3
        tokens = (study.inference.prompt + 10 * study.inference.new_tokens) * (study.inference.runs + 1)
        return start + tokens * forward
    one = speed.step(step.config)
    if step.kind == "train":
        processes = processes_of(study, graph, step)
        one *= AHEAD if runs_ahead(step.run) else 1.0
        return start + step.cost.steps * one * (SHARED / processes if processes > 1 else 1.0)
    evaluated = one / study.step_tokens * EVALUATION * study.held_out.tokens * len(study.domains)
    if step.kind == "scores" and has_routers(step.config):
        evaluated *= 2  # its routing is measured too
    members = len(study.expert_names) + 1 if step.kind == "ensemble" else 1
    own_process = step.kind == "ensemble" or step.needs.model is None
    return READING_SECONDS + (speed.start if own_process else 0.0) + members * evaluated


def _calibration(study: StudyFile, step: Step, speed: Speed) -> float:
    """What fitting gates takes: passes over the measured text, and the counting of all of it."""
    from branchmix.upcycling.gates.fit import PENALTIES, SHARPNESS
    from branchmix.upcycling.gates.text import MEASURED_TOKENS

    passes = 2 + step.config["num_experts"] + len(SHARPNESS)
    if step.recipe["gates"]["token_only"]:
        passes += 2 + len(PENALTIES)
    tokens = passes * MEASURED_TOKENS * len(study.domains)
    return COUNTING_SECONDS * len(study.domains) + tokens * speed.step(step.config) / study.step_tokens * EVALUATION


def _makespan(steps: Sequence[Step], seconds: dict[str, float], at_once: int) -> float:
    """When the last of them ends, each begun in its order as soon as there is room and nothing to wait for."""
    left, now = list(steps), 0.0
    ends: dict[str, float] = {}
    running: list[float] = []
    names = {step.name for step in steps}
    while left or running:
        for step in list(left):
            waits = [name for name in step.needs.names if name in names and ends.get(name, float("inf")) > now]
            if len(running) < at_once and not waits:
                left.remove(step)
                ends[step.name] = now + seconds[step.name]
                running.append(ends[step.name])
        now = min(running)
        running.remove(now)
    return now

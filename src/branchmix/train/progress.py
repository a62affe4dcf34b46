"""How a run reports progress: ``metrics.jsonl``, a live line on a terminal, and plain lines elsewhere.

A row of ``metrics.jsonl`` is flat except for ``routers``: step, tokens, seconds, loss, ``loss/DOMAIN``, learning_rate
and so on; rows of an evaluation have ``held_out/DOMAIN``. Units: nats per token, seconds, FLOP/s, bytes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from branchmix.checkpoint.folder import write_text
from branchmix.pages.numbers import counted
from branchmix.pages.table import Table
from branchmix.train.launch import JobState

METRICS = "metrics.jsonl"
_SECONDS_BETWEEN_LINES = 30.0
_SHOWN_AT_MOST = 12
"""Jobs with a row each."""
_TAIL_BYTES = 1_000_000
_SHOWN = {"step", "steps", "loss", "tokens_per_second", "eta_seconds"}


class Metrics:
    """``metrics.jsonl``: rows are appended; a resumed run first drops the rows of steps that it repeats."""

    def __init__(self, folder: Path, *, writes: bool):
        self.file = folder / METRICS
        self.writes = writes

    def rows(self) -> list[dict[str, Any]]:
        """All rows, except for an incomplete last row of a killed run."""
        rows: list[dict[str, Any]] = []
        with suppress(ValueError, FileNotFoundError):
            for line in self.file.read_text(encoding="utf-8").splitlines():
                rows.append(json.loads(line))
        return rows

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Keep the rows up to ``step``, and return them."""
        kept = [row for row in self.rows() if row["step"] <= step]
        if self.writes:
            write_text(self.file, "".join(f"{json.dumps(row)}\n" for row in kept))
        return kept

    def add(self, row: dict[str, Any]) -> None:
        if self.writes:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(row)}\n")


class Display:
    """Progress on stderr: a bar on a terminal, a line every logging.steps elsewhere, or nothing."""

    def __init__(self, *, shown: bool):
        self.shown = shown
        self._console = Console(stderr=True, quiet=not shown)
        columns = (
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
        )
        self._bar = Progress(*columns, console=self._console, disable=not (shown and sys.stderr.isatty()))
        self._working = ""

    def start(self, total: int, done: int) -> None:
        """Training begins at step ``done``."""
        self._bar.add_task("", total=total, completed=done)
        self._bar.start()

    def step(self, done: int) -> None:
        for task in self._bar.task_ids:
            self._bar.update(task, completed=done)

    def row(self, row: dict[str, Any], total: int) -> None:
        if self._bar.disable:
            width = len(str(total))
            self.line(f"{row['step']:>{width}}/{total}  {describe(row)}  {duration(row['eta_seconds'])} left")
        for task in self._bar.task_ids:
            self._bar.update(task, completed=row["step"], description=describe(row))

    def line(self, text: str) -> None:
        """A line that stays."""
        self._console.out(text, highlight=False)

    def work(self, step: str) -> None:
        """Report something long before training, such as tokenising, when it begins."""
        if step != self._working:
            self._working = step
            self.line(step)

    def stop(self) -> None:
        if not self._bar.disable:  # else it would print an empty line
            self._bar.stop()


def print_plan(plan: dict[str, Any], stream: TextIO) -> None:
    """Print what a run reads, trains and computes."""
    rows = []
    for name, domain in plan["data"]["domains"].items():
        more = "" if domain["complete"] else "+"
        counts = (f"{domain[key]:,}{more}" for key in ("documents", "tokens", "held_out_tokens"))
        epochs = domain.get("epochs")
        rows.append([name, *counts, "" if epochs is None else f"{epochs:.2f}"])
    Table(["domain", "documents", "tokens", "held out", "epochs"], rows).show(stream)
    model, computing = plan["model"], plan["computing"]
    flops = model["training_flops_per_token"]
    lines = [
        f"{model['model_type']}: {model['parameters']:,} parameters, {model['trained']:,} of them trained"
        + (f", {flops:,} FLOPs a token" if flops else ""),
        f"{counted(plan['steps'], 'step')}, {counted(plan['tokens'], 'token')}"
        + (f", {plan['flops']:.3g} FLOPs" if plan["flops"] else "")
        + f"; learning rate up to {plan['peak_learning_rate']:.3g}",
        f"{computing['device']}, {computing['precision']}, {computing['attention']} attention; a step is "
        f"{computing['processes']} x {computing['accumulation']} x {computing['micro_batch_size']} sequences "
        "(processes, accumulation, at once)",
        *(f"note: {note}" for note in plan["data"]["notes"]),
        f"to {plan['out']}",
    ]
    print(*lines, sep="\n", file=stream, flush=True)


def describe(row: dict[str, Any]) -> str:
    """The numbers of a row, on one line, with the router whose load is the most uneven."""
    losses = ", ".join(f"{name} {value:.3f}" for name, value in last_values([row], "loss/").items())
    parts = [f"loss {row['loss']:.3f}" + (f" ({losses})" if losses else ""), f"lr {row['learning_rate']:.2e}"]
    parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if row.get("share_of_peak") is not None:
        parts.append(f"{row['share_of_peak']:.0%} of matmul peak")
    parts += [f"waiting {row['waiting']:.1%}", f"{row['memory_bytes'] / 1e9:.2f} GB"]
    uneven = {name: value for name, value in last_values([row], "router/").items() if name.endswith("max_violation")}
    if uneven:
        name = max(uneven, key=lambda key: uneven[key])
        kind, layer, _ = name.split("/")
        parts.append(f"{kind} router {int(layer)}: busiest expert {1 + uneven[name]:.1f} x fair")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Clock:
    """Time, tokens and waiting since the last reading."""

    def __init__(self, seconds_before: float = 0.0):
        self._start = self._mark = time.perf_counter()
        self._before = seconds_before
        self._spent = {"waiting": 0.0, "paused": 0.0}

    @contextmanager
    def counting(self, kind: Literal["waiting", "paused"]) -> Iterator[None]:
        """Count the time of the block as waiting for data, or neither as that nor as training, like an evaluation."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent[kind] += time.perf_counter() - start

    def read(self) -> tuple[float, float, float]:
        """Seconds of the run, seconds of training since the last reading, and the share of these spent waiting."""
        now = time.perf_counter()
        span = max(now - self._mark - self._spent["paused"], 1e-9)
        waiting = min(1.0, self._spent["waiting"] / span)
        self._mark, self._spent = now, {"waiting": 0.0, "paused": 0.0}
        return self._before + now - self._start, span, waiting


def seconds_of(rows: list[dict[str, Any]]) -> float:
    """Training time by the rows of ``metrics.jsonl``."""
    return max((row.get("seconds", 0.0) for row in rows), default=0.0)


def last_values(rows: Iterable[dict[str, Any]], prefix: str) -> dict[str, float]:
    """The newest value of each key that begins with ``prefix``, by what follows it."""
    return {name.removeprefix(prefix): value for row in rows for name, value in row.items() if name.startswith(prefix)}


# ---- Many runs ----


class JobDisplay:
    """Shows the states it is called with. A context manager, which restores the terminal at its end."""

    def __init__(self, *, total: int, finished: int, enabled: bool, noun: str = "experts"):
        self.noun, self.total, self.finished, self.enabled = noun, total, finished, enabled
        self.said: dict[str, tuple[str, int]] = {}
        self.begun: dict[str, float] = {}
        self.said_at = time.monotonic()
        self.live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)

    def __enter__(self) -> JobDisplay:
        if self.enabled and self.finished:
            self._say(f"{self.finished} of {self.total} {self.noun} are already finished")
        if self.enabled and sys.stderr.isatty():
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def __call__(self, states: list[JobState]) -> None:
        if not self.enabled:
            return
        self._tell_changes(states)
        if self.live.is_started:
            self.live.update(_table(states, self.noun).terminal(), refresh=True)
        elif time.monotonic() - self.said_at > _SECONDS_BETWEEN_LINES:
            self.said_at = time.monotonic()
            for state in states:
                if state.status == "running":
                    self._say(_line(state, time.monotonic() - self.begun[state.job.name]))
            if len(states) > _SHOWN_AT_MOST:
                done = self.finished + sum(state.status == "done" for state in states)
                self._say(f"{done} of {self.total} {self.noun} are done")

    def _tell_changes(self, states: list[JobState]) -> None:
        """Print a line for every run that started, was restarted, or ended."""
        for state in states:
            name, now = state.job.name, (state.status, state.attempts)
            before = self.said.get(name, ("waiting", 0))
            self.said[name] = now
            texts = {
                "running": f"started, its output is in {state.job.log}",
                "done": f"done in {duration(state.seconds)}",
                "failed": f"failed: {state.reason}",
                "stopped": "stopped",
            }
            if before[0] == "running" and (state.status == "waiting" or state.attempts > before[1]):
                self._say(f"{name}: failed ({state.reason}); restarting")
            elif now != before and state.status in texts:
                self.begun.setdefault(name, time.monotonic())
                self._say(f"{name}: {texts[state.status]}")

    def _say(self, text: str) -> None:
        self.live.console.out(text, highlight=False)


def _table(states: list[JobState], noun: str) -> Table:
    """A table of all runs if they are few; else of those that are running or failed, and the number done."""
    note = ""
    if len(states) > _SHOWN_AT_MOST:
        note = f"{sum(state.status == 'done' for state in states)} of {len(states)} {noun} done"
        states = [state for state in states if state.status in ("running", "failed")]
    rows = [[state.job.name, state.status, *_cells(state).values()] for state in states]
    return Table([noun.removesuffix("s"), "", "step", "loss", "tokens/s", "left"], rows, note=note, left=("",))


def _line(state: JobState, seconds: float) -> str:
    words = [f"{name} {value}" for name, value in _cells(state).items() if value]
    return f"{state.job.name}: {', '.join(words) or f'running for {duration(seconds)}'}"


def _cells(state: JobState) -> dict[str, str]:
    row, running = last_row(state.job.log.parent), state.status == "running"
    return {
        "step": f"{row['step']:,} of {row['steps']:,}" if row else "",
        "loss": f"{row['loss']:.3f}" if row else "",
        "tokens/s": f"{row['tokens_per_second']:,.0f}" if row and running else "",
        "left": duration(row["eta_seconds"]) if row and running else "",
    }


def last_row(folder: Path) -> dict[str, Any]:
    """The newest row of a run's ``metrics.jsonl`` that is of training, not of an evaluation; empty before the first."""
    with suppress(OSError), (folder / METRICS).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        for line in reversed(file.read().splitlines()):
            with suppress(ValueError):  # half a line, at either end
                row = json.loads(line)
                if isinstance(row, dict) and row.keys() >= _SHOWN:
                    return row
    return {}

"""Shows several runs at once: step, loss, tokens/s and time left of each, read from its ``metrics.jsonl``.

On a terminal this is a live table; elsewhere a line is printed whenever a run changes, and every half minute.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from branchmix.pages.table import Table
from branchmix.train.launch import JobState
from branchmix.train.progress import METRICS, duration

_SECONDS_BETWEEN_LINES = 30.0
_SHOWN_AT_MOST = 12
"""Jobs with a row each."""
_TAIL_BYTES = 1_000_000
_SHOWN = {"step", "steps", "loss", "tokens_per_second", "eta_seconds"}


class JobDisplay:
    """Shows the states it is called with. A context manager, which restores the terminal at its end."""

    def __init__(self, *, total: int, finished: int, enabled: bool, noun: str = "experts"):
        self.noun = noun
        self.total = total
        self.finished = finished
        self.enabled = enabled
        self.said: dict[str, tuple[str, int]] = {}
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
                    self._say(_line(state))
            if len(states) > _SHOWN_AT_MOST:
                done = self.finished + sum(state.status == "done" for state in states)
                self._say(f"{done} of {self.total} {self.noun} are done")

    def _tell_changes(self, states: list[JobState]) -> None:
        """Print a line for every run that started, was restarted, or ended."""
        for state in states:
            now = (state.status, state.attempts)
            before = self.said.get(state.job.name, ("waiting", 0))
            self.said[state.job.name] = now
            if now == before:
                continue
            name = state.job.name
            if before[0] == "running" and (state.status == "waiting" or state.attempts > before[1]):
                self._say(f"{name}: failed ({state.reason}); restarting")
            elif state.status == "running":
                self._say(f"{name}: started, its output is in {state.job.log}")
            elif state.status == "done":
                self._say(f"{name}: done in {duration(state.seconds)}")
            elif state.status == "failed":
                self._say(f"{name}: failed: {state.reason}")
            elif state.status == "stopped":
                self._say(f"{name}: stopped")

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


def _line(state: JobState) -> str:
    words = [f"{name} {value}" for name, value in _cells(state).items() if value]
    return f"{state.job.name}: {', '.join(words) or 'starting'}"


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

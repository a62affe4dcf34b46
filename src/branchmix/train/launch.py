"""A small scheduler of subprocesses: so many side by side, each with a log of its own, retried, and stopped together.

``branchmix branch`` runs the experts with it, studies their steps. It knows nothing of training: a
job is a command that can be started again, and that finishes what it has to finish when it gets a signal.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from branchmix.errors import OutputError

Status = Literal["waiting", "running", "done", "failed", "stopped"]

USER_ERROR = 2
"""Exit code of a command whose input is wrong: it would be as wrong the second time."""

_PR_SET_PDEATHSIG = 1
_GRACE_SECONDS = 10.0
"""How long processes may take to end when the scheduler itself has failed."""


@dataclass(frozen=True)
class Job:
    """A command to run."""

    name: str
    command: Sequence[str]
    log: Path
    """File that its output is added to; its folder is made."""
    again: Sequence[str] | None = None
    """The command of later attempts, where it differs."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's environment."""
    folder: Path | None = None
    """Where it runs; here if not given."""
    after: Sequence[str] = ()
    """Names of jobs that have to be done before it; such as are not among the jobs of the call count as done."""


@dataclass
class JobState:
    """How far a job is."""

    job: Job
    status: Status = "waiting"
    attempts: int = 0
    exit_code: int | None = None
    """Of the last attempt; minus the signal's number if one killed it."""
    started: float | None = None
    """Time of the first attempt, in seconds since the epoch."""
    seconds: float = 0.0
    """Of all attempts together, without the time they waited."""
    last_line: str = ""
    """What the last attempt said last, once it is over."""
    pid: int | None = None
    """Of the running process."""

    @property
    def reason(self) -> str:
        """Why it failed, in one line."""
        if self.exit_code is not None and self.exit_code < 0:
            return f"killed by {_signal_name(-self.exit_code)}" + (
                f" after: {self.last_line}" if self.last_line else ""
            )
        return self.last_line.removeprefix("error: ") or f"exit code {self.exit_code}, and no word in its log"


@dataclass(frozen=True)
class Outcome:
    """What became of all jobs, in the order they were given."""

    jobs: list[JobState]
    stopped_by: int | None = None
    """The signal that ended it early."""


def run_processes(
    jobs: Sequence[Job],
    at_once: int,
    *,
    retries: int = 0,
    places: Sequence[Mapping[str, str]] = ({},),
    watch: Callable[[list[JobState]], None] | None = None,
    poll_seconds: float = 0.2,
    orphans_get: int = signal.SIGTERM,
) -> Outcome:
    """Run all jobs, ``at_once`` of them at a time, in their order.

    A job that fails is started again up to ``retries`` times, unless its exit code is 2 (the input is wrong); the
    others go on either way, but for those that come after it, which stay ``waiting``. SIGINT and SIGTERM are passed on
    to the running jobs, whose end is then waited for: nothing is started or retried any more. A further signal is
    passed on as well, and the third kills. Call it from the main thread, where signals arrive.

    Args:
        jobs: what to run.
        at_once: so many side by side.
        retries: further attempts of each job.
        places: environments of the places where jobs run, such as one GPU each, taken in turn; a job's own comes first.
        watch: called every ``poll_seconds`` with all states, to show them.
        poll_seconds: how often processes are looked after.
        orphans_get: the signal that running jobs get if this process is killed (Linux).

    Raises:
        OutputError: a log cannot be written, or a command cannot be started.
    """
    states = [JobState(job) for job in jobs]
    running: dict[int, _Running] = {}  # by place
    try:
        with noted_signals() as received:
            while True:
                for place, process in list(running.items()):
                    process.pass_on(received)
                    if process.is_over():
                        del running[place]
                        process.close()
                        process.state.status = what_becomes_of(process.state, retries=retries, stopping=bool(received))
                for place in range(at_once):
                    state = next(startable(states), None)
                    if state is not None and place not in running and not received:
                        running[place] = _Running(state, places[place % len(places)], orphans_get)
                if watch is not None:
                    watch(states)
                if not running and (received or next(startable(states), None) is None):
                    break
                time.sleep(poll_seconds)
    finally:
        _end(list(running.values()))
    return Outcome(states, received[0] if received else None)


def startable(states: Sequence[JobState]) -> Iterator[JobState]:
    """Waiting jobs with nothing left to wait for, in their order."""
    left = {state.job.name for state in states if state.status != "done"}
    return (state for state in states if state.status == "waiting" and left.isdisjoint(state.job.after))


def what_becomes_of(state: JobState, *, retries: int, stopping: bool) -> Status:
    """The status of a job whose attempt is over, by its exit code."""
    if state.exit_code == 0:
        return "done"
    if stopping:
        return "stopped"
    return "waiting" if state.exit_code != USER_ERROR and state.attempts <= retries else "failed"


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Yields the list of the SIGINTs and SIGTERMs that came. In the main thread only."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------------------------
# One process
# ---------------------------------------------------------------------------------------------------------------------


class _Running:
    """An attempt: its process, which leads a session of its own, so that a terminal's Ctrl-C reaches it only once."""

    def __init__(self, state: JobState, place: Mapping[str, str], orphans_get: int):
        job = state.job
        self.state = state
        self.begun = time.monotonic()
        self.passed_on = 0
        command = job.again if state.attempts and job.again is not None else job.command
        try:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            self.log: IO[bytes] = job.log.open("ab")
        except OSError as error:
            raise OutputError(f"{job.log}: cannot be written: {error.strerror}") from None
        self.log_start = self.log.tell()
        try:
            self.process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **place, **job.env},
                cwd=job.folder,
                start_new_session=True,
                preexec_fn=_before_it_starts(orphans_get),
            )
        except OSError as error:
            self.log.close()
            raise OutputError(f"{job.name}: {command[0]} cannot be started: {error.strerror}") from None
        state.status, state.pid, state.exit_code = "running", self.process.pid, None
        state.attempts += 1
        state.started = state.started or time.time()

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def pass_on(self, received: list[int]) -> None:
        """Signals that it has not got yet; the third kills."""
        for count in range(self.passed_on + 1, len(received) + 1):
            self.signal(signal.SIGKILL if count > 2 else received[count - 1])
        self.passed_on = len(received)

    def signal(self, number: int) -> None:
        """To the process alone: what it started is its own business, but for a kill, which takes all of it."""
        if number == signal.SIGKILL:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def close(self) -> None:
        """Note how it ended, and take away what it left running."""
        state = self.state
        self.signal(signal.SIGKILL)
        self.log.close()
        state.exit_code, state.pid = self.process.returncode, None
        state.seconds += time.monotonic() - self.begun
        state.last_line = _last_line(state.job.log, self.log_start)


def _end(processes: list[_Running]) -> None:
    """End what still runs when the scheduler itself has failed."""
    for process in processes:
        process.signal(signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.process.wait(max(0.0, deadline - time.monotonic()))
        process.signal(signal.SIGKILL)
        process.process.wait()
        process.close()


def _before_it_starts(orphans_get: int) -> Callable[[], None]:
    """In the new process: signals arrive, and one of them comes (on Linux) when this process is gone, if killed too.

    A worker of Ray has SIGINT blocked, and its children would inherit that.
    """
    prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform.startswith("linux") else None
    parent = os.getpid()

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
        if prctl is None:
            return
        prctl(_PR_SET_PDEATHSIG, orphans_get, 0, 0, 0)
        if os.getppid() != parent:  # it went before the kernel knew
            os.kill(os.getpid(), orphans_get)

    return prepare


def _last_line(log: Path, start: int) -> str:
    """The last line with something in it that was written to ``log`` after byte ``start``."""
    with suppress(OSError), log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(start, size - 65536))
        lines = file.read().decode("utf-8", errors="replace").replace("\r", "\n").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

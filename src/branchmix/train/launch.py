"""A small scheduler of subprocesses, which run side by side with a log each, are retried, and stop together.

``branchmix branch`` runs experts with it, and studies run their steps. It is not specific to training: a job is a
command that can be restarted and that ends cleanly when it receives a signal.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from branchmix.checkpoint.folder import libc
from branchmix.errors import OutputError
from branchmix.train.signals import handling

Status = Literal["waiting", "running", "done", "failed", "stopped"]

USER_ERROR = 2
"""Exit code of a command whose input is wrong, so that a retry would fail too."""

_SIGNALS = {number.value: number.name for number in signal.Signals}
_PR_SET_PDEATHSIG = 1
_GRACE_SECONDS = 10.0
"""How long processes may take to end if the scheduler itself fails."""


@dataclass(frozen=True)
class Job:
    name: str
    command: Sequence[str]
    log: Path
    """File that its output is appended to; its folder is created."""
    again: Sequence[str] | None = None
    """The command of later attempts, if it differs."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's environment."""
    after: Sequence[str] = ()
    """Names of jobs that must be done before it starts. Names that are not among the call's jobs count as done."""


@dataclass
class JobState:
    job: Job
    status: Status = "waiting"
    attempts: int = 0
    exit_code: int | None = None
    """Exit code of the last attempt; minus the signal's number if a signal killed it."""
    seconds: float = 0.0
    """Run time of all attempts together, without waiting."""
    last_line: str = ""
    """The last line in the log of the last attempt, once it has ended."""

    @property
    def command(self) -> list[str]:
        """The command of the next attempt."""
        return list(self.job.again if self.attempts and self.job.again is not None else self.job.command)

    def begin(self) -> None:
        """Note that an attempt has started, if that is not known yet."""
        if self.status != "running":
            self.status = "running"
            self.attempts += 1

    @property
    def reason(self) -> str:
        """Why it failed, in one line."""
        if self.exit_code is not None and self.exit_code < 0:
            after = f" after: {self.last_line}" if self.last_line else ""
            return f"killed by {_SIGNALS.get(-self.exit_code, f'signal {-self.exit_code}')}{after}"
        return self.last_line.removeprefix("error: ") or f"exit code {self.exit_code}, without any output in its log"


@dataclass(frozen=True)
class Outcome:
    """The final states of all jobs, in the order they were given."""

    jobs: list[JobState]
    stopped_by: int | None = None
    """The signal that ended it early."""


def run_processes(
    jobs: Sequence[Job],
    at_once: int,
    *,
    places: Sequence[Mapping[str, str]] = ({},),
    orphans_get: int = signal.SIGTERM,
    **others: Any,
) -> Outcome:
    """Run jobs as processes of this machine: see ``run_jobs``.

    Args:
        places: environments of the places where jobs run, such as one per GPU, used in turn. A job's own variables take
            precedence.
        orphans_get: the signal that running jobs receive if this process is killed (Linux).
        **others: of ``run_jobs``.

    Raises:
        OutputError: a log cannot be written, or a command cannot be started.
    """
    return run_jobs(
        jobs, lambda state, place: _Process(state, places[place % len(places)], orphans_get), at_once, **others
    )


def run_jobs(
    jobs: Sequence[Job],
    start: Callable[[JobState, int], Attempt],
    at_once: int,
    *,
    retries: int = 0,
    watch: Callable[[list[JobState]], None] = lambda states: None,
    poll_seconds: float = 0.2,
) -> Outcome:
    """Run all jobs, ``at_once`` of them at a time, in their order.

    A job that fails is restarted up to ``retries`` times, unless its exit code is 2 (the input is wrong). Other jobs
    continue, except for those that depend on it, which stay ``waiting``. On SIGINT and SIGTERM, no more jobs are
    started; the signal is passed on to the running jobs, and the call returns when they have ended. A second signal is
    passed on too, and a third kills them. Call it from the main thread, where signals arrive.

    Args:
        jobs: what to run.
        start: begins an attempt at a job, in a place numbered from 0 to ``at_once`` - 1.
        at_once: how many run side by side.
        retries: further attempts of each job.
        watch: called every ``poll_seconds`` with all states, to show them.
        poll_seconds: how often attempts are checked.
    """
    states = [JobState(job) for job in jobs]
    running: dict[int, Attempt] = {}  # by place
    received: list[int] = []
    passed_on = 0
    try:
        with handling(lambda number, _: received.append(number)):
            while True:
                for number in received[passed_on:]:
                    passed_on += 1
                    for attempt in running.values():
                        attempt.signal(signal.SIGKILL if passed_on > 2 else number)
                for place, attempt in list(running.items()):
                    if attempt.is_over():
                        del running[place]
                        attempt.close()
                        attempt.state.status = _status_after(attempt.state, retries=retries, stopping=bool(received))
                begun = [id(attempt.state) for attempt in running.values()]
                todo = [] if received else [state for state in startable(states) if id(state) not in begun]
                free = [place for place in range(at_once) if place not in running]
                for place, state in zip(free, todo, strict=False):
                    running[place] = start(state, place)
                watch(states)
                if not running:
                    return Outcome(states, received[0] if received else None)
                time.sleep(poll_seconds)
    finally:
        for attempt in running.values():  # the scheduler itself failed
            attempt.signal(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS
        while not all(attempt.is_over() for attempt in running.values()) and time.monotonic() < deadline:
            time.sleep(poll_seconds)
        for attempt in running.values():
            attempt.close()


def startable(states: Sequence[JobState]) -> Iterator[JobState]:
    """Waiting jobs whose dependencies are done, in their order."""
    left = {state.job.name for state in states if state.status != "done"}
    return (state for state in states if state.status == "waiting" and left.isdisjoint(state.job.after))


def _status_after(state: JobState, *, retries: int, stopping: bool) -> Status:
    """The status of a job after an attempt, by its exit code."""
    if state.exit_code == 0:
        return "done"
    if stopping:
        return "stopped" if state.attempts else "waiting"
    return "waiting" if state.exit_code != USER_ERROR and state.attempts <= retries else "failed"


def share_machine(
    at_once: int | None, threads: int | None, num_jobs: int
) -> tuple[int, int | None, list[dict[str, str]]]:
    """How jobs share this machine: a GPU for each, or all CPU cores divided among them.

    Returns the jobs side by side and the threads of each, chosen here if they are None (threads stay None, torch's
    default, on GPUs), and the environment of each place.
    """
    if devices := gpus():
        return at_once or len(devices), threads, [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in devices]
    at_once = min(at_once or cores(), num_jobs)
    return at_once, threads or max(1, cores() // at_once), [{}]


def gpus() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES of the GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu.strip() for gpu in visible.split(",") if gpu.strip() not in ("", "-1")]
    import torch

    return [str(gpu) for gpu in range(torch.cuda.device_count())]


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Attempt(Protocol):
    """One attempt at a job, which updates the job's state."""

    state: JobState

    def signal(self, number: int) -> None: ...

    def is_over(self) -> bool: ...

    def close(self) -> None:
        """Record in the state how it ended, and end what is still running."""


class _Process:
    """A process in a new session, so that a terminal's Ctrl-C reaches it only once."""

    def __init__(self, state: JobState, place: Mapping[str, str], orphans_get: int):
        self.state = state
        job, command = state.job, state.command
        self.begun = time.monotonic()
        try:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            self.log: IO[bytes] = job.log.open("ab")
        except OSError as error:
            raise OutputError(f"{job.log}: cannot be written: {error.strerror}") from None
        self.log_start = self.log.tell()
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **place, **job.env},
                start_new_session=True,
                preexec_fn=_before_it_starts(orphans_get),
            )
        except OSError as error:
            self.log.close()
            raise OutputError(f"{job.name}: {command[0]} cannot be started: {error.strerror}") from None
        state.exit_code = None
        state.begin()

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def signal(self, number: int) -> None:
        """Signal the process only, which handles its children itself; a kill goes to all of them."""
        if number == signal.SIGKILL:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def close(self) -> None:
        """Record how it ended, and kill what it left running."""
        state = self.state
        self.signal(signal.SIGKILL)
        self.log.close()
        state.exit_code = self.process.wait()
        state.seconds += time.monotonic() - self.begun
        state.last_line = _last_line(state.job.log, self.log_start)


def _before_it_starts(orphans_get: int) -> Callable[[], None]:
    """Prepare a new process: unblock signals, and ask for one (on Linux) when this process dies, even if killed.

    Ray's workers block SIGINT, and their children would inherit that.
    """
    prctl = libc("prctl") if sys.platform.startswith("linux") else None
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
    """The last non-empty line that was written to ``log`` after byte ``start``."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode("utf-8", errors="replace").replace("\r", "\n").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ""

"""A small scheduler of subprocesses, which run side by side with a log each, are retried, and stop together.

``branchmix branch`` runs experts with it, and studies run their steps. It is not specific to training: a job is a
command that can be restarted and that ends cleanly when it receives a signal.
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
"""Exit code of a command whose input is wrong, so that a retry would fail too."""

_PR_SET_PDEATHSIG = 1
_GRACE_SECONDS = 10.0
"""How long processes may take to end if the scheduler itself fails."""


@dataclass(frozen=True)
class Job:
    """A command to run."""

    name: str
    command: Sequence[str]
    log: Path
    """File that its output is appended to; its folder is created."""
    again: Sequence[str] | None = None
    """The command of later attempts, if it differs."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's environment."""
    folder: Path | None = None
    """Folder that it runs in; the current one if not given."""
    after: Sequence[str] = ()
    """Names of jobs that must be done before it starts. Names that are not among the call's jobs count as done."""


@dataclass
class JobState:
    """The progress of a job."""

    job: Job
    status: Status = "waiting"
    attempts: int = 0
    exit_code: int | None = None
    """Exit code of the last attempt; minus the signal's number if a signal killed it."""
    started: float | None = None
    """Time of the first attempt, in seconds since the epoch."""
    seconds: float = 0.0
    """Run time of all attempts together, without waiting."""
    last_line: str = ""
    """The last line in the log of the last attempt, once it has ended."""
    pid: int | None = None
    """Id of the running process."""

    @property
    def reason(self) -> str:
        """Why it failed, in one line."""
        if self.exit_code is not None and self.exit_code < 0:
            return f"killed by {_signal_name(-self.exit_code)}" + (
                f" after: {self.last_line}" if self.last_line else ""
            )
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
    retries: int = 0,
    places: Sequence[Mapping[str, str]] = ({},),
    watch: Callable[[list[JobState]], None] | None = None,
    poll_seconds: float = 0.2,
    orphans_get: int = signal.SIGTERM,
) -> Outcome:
    """Run all jobs, ``at_once`` of them at a time, in their order.

    A job that fails is restarted up to ``retries`` times, unless its exit code is 2 (the input is wrong). Other jobs
    continue, except for those that depend on it, which stay ``waiting``. On SIGINT and SIGTERM, no more jobs are
    started; the signal is passed on to the running jobs, and the call returns when they have ended. A second signal is
    passed on too, and a third kills them. Call it from the main thread, where signals arrive.

    Args:
        jobs: what to run.
        at_once: how many run side by side.
        retries: further attempts of each job.
        places: environments of the places where jobs run, such as one per GPU, used in turn. A job's own variables take
            precedence.
        watch: called every ``poll_seconds`` with all states, to show them.
        poll_seconds: how often processes are checked.
        orphans_get: the signal that running jobs receive if this process is killed (Linux).

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
    """Waiting jobs whose dependencies are done, in their order."""
    left = {state.job.name for state in states if state.status != "done"}
    return (state for state in states if state.status == "waiting" and left.isdisjoint(state.job.after))


def what_becomes_of(state: JobState, *, retries: int, stopping: bool) -> Status:
    """The status of a job after an attempt, by its exit code."""
    if state.exit_code == 0:
        return "done"
    if stopping:
        return "stopped"
    return "waiting" if state.exit_code != USER_ERROR and state.attempts <= retries else "failed"


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Yield the list of SIGINTs and SIGTERMs received so far. In the main thread only."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def share_machine(
    at_once: int | None, threads: int | None, num_jobs: int
) -> tuple[int, int | None, list[dict[str, str]]]:
    """How jobs share this machine: a GPU for each, or all CPU cores divided among them.

    Args:
        at_once: jobs side by side; chosen here if None.
        threads: threads of each job; chosen here if None.
        num_jobs: how many there are.

    Returns:
        jobs side by side, threads of each (None: torch's default), and the environment of each place.
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


# ---------------------------------------------------------------------------------------------------------------------
# One process
# ---------------------------------------------------------------------------------------------------------------------


class _Running:
    """An attempt: its process, in a new session, so that a terminal's Ctrl-C reaches it only once."""

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
        """Send it the signals it has not received yet; the third kills."""
        for count in range(self.passed_on + 1, len(received) + 1):
            self.signal(signal.SIGKILL if count > 2 else received[count - 1])
        self.passed_on = len(received)

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
        state.exit_code, state.pid = self.process.returncode, None
        state.seconds += time.monotonic() - self.begun
        state.last_line = _last_line(state.job.log, self.log_start)


def _end(processes: list[_Running]) -> None:
    """End what still runs after the scheduler itself failed."""
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
    """Prepare a new process: unblock signals, and ask for one (on Linux) when this process dies, even if killed.

    Ray's workers block SIGINT, and their children would inherit that.
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
    """The last non-empty line that was written to ``log`` after byte ``start``."""
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

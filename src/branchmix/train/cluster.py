"""Runs the jobs of ``launch.py`` on a Ray cluster: each attempt is a task, placed where the cluster has room.

Ray is optional. A task starts the same process that would be started on this machine. All machines must share the file
system with the runs' folders, and progress is read from there.
"""

from __future__ import annotations

import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from branchmix.checkpoint.folder import writing
from branchmix.errors import RecipeError
from branchmix.train.launch import (
    USER_ERROR,
    Job,
    JobState,
    Outcome,
    noted_signals,
    run_processes,
    startable,
    what_becomes_of,
)

_POLL_SECONDS = 0.3


@dataclass
class _Task:
    """An attempt of a job on the cluster."""

    state: JobState
    reference: Any
    sign: Path
    """File that it creates when it starts."""
    passed_on: int = 0
    """Number of signals sent to it."""


def run_on_ray(
    jobs: Sequence[Job],
    at_once: int | None = None,
    *,
    shared: Path,
    num_cpus: int = 1,
    retries: int = 0,
    watch: Callable[[list[JobState]], None] | None = None,
) -> Outcome:
    """Like ``run_processes``, on the cluster at RAY_ADDRESS, one running on this machine, or one started for this call.

    A job whose worker or machine dies is retried like a failed one. Each job gets a GPU if the cluster has any. Signals
    reach the jobs as SIGINT.

    Args:
        jobs: what to run.
        at_once: how many run at a time; as many as fit on the cluster if None.
        shared: the folder that the jobs write to, which every machine must see.
        num_cpus: cores that Ray reserves for each job.
        retries: further attempts of each job.
        watch: called repeatedly with all states.

    Raises:
        RecipeError: Ray is not installed, or the cluster cannot be reached.
        OutputError: ``shared`` cannot be written.
    """
    with _cluster() as ray, _signs(shared) as signs:
        attempt = ray.remote(max_retries=0, num_cpus=num_cpus, num_gpus=_gpus_for_each(ray, num_cpus))(_attempt)
        states = [JobState(job) for job in jobs]
        running: dict[str, _Task] = {}
        with noted_signals() as received:
            while True:
                for name, task in list(running.items()):
                    _pass_on(ray, task, received)
                    if task.state.status == "waiting" and task.sign.exists():
                        _begin(task.state)
                    if ray.wait([task.reference], timeout=0)[0]:
                        del running[name]
                        _take_result(ray, task)
                        stopping = bool(received) and task.state.attempts > 0
                        task.state.status = what_becomes_of(task.state, retries=retries, stopping=stopping)
                for state in startable(states):
                    room = (at_once is None or len(running) < at_once) and not received
                    if room and state.job.name not in running:
                        sign = signs / f"{state.job.name}-{state.attempts}"
                        running[state.job.name] = _Task(state, attempt.remote(state, sign), sign)
                if watch is not None:
                    watch(states)
                if not running and (received or next(startable(states), None) is None):
                    break
                time.sleep(_POLL_SECONDS)
    return Outcome(states, received[0] if received else None)


def _attempt(state: JobState, sign: Path) -> JobState:
    """Run the job once, on the cluster. If this worker dies, the job is killed, because it may be retried elsewhere."""
    if not sign.parent.is_dir():
        line = f"error: {sign.parent.parent}: {socket.gethostname()} cannot see it: choose a folder on a file system"
        return replace(state, exit_code=USER_ERROR, last_line=f"{line} that all machines of the cluster share")
    sign.touch()
    job = state.job
    command = list(job.again if state.attempts and job.again is not None else job.command)
    command[0] = sys.executable
    outcome = run_processes([replace(job, command=command)], 1, orphans_get=signal.SIGKILL)
    return outcome.jobs[0]


def _begin(state: JobState) -> None:
    state.status = "running"
    state.attempts += 1
    state.started = state.started or time.time()


def _take_result(ray: Any, task: _Task) -> None:
    """Record the result of the task's attempt, or Ray's error if the task is gone."""
    state = task.state
    begun = state.status == "running" or task.sign.exists()
    if begun and state.status == "waiting":
        _begin(state)
    try:
        result = ray.get(task.reference)
    except ray.exceptions.TaskCancelledError:
        state.exit_code, state.last_line = None, ""
    except ray.exceptions.RayError as error:
        if not begun:  # it counts as an attempt, or it could be retried forever
            _begin(state)
        reason = " ".join(str(error).split())
        state.exit_code, state.last_line = 1, f"Ray lost its worker: {type(error).__name__}: {reason[:200]}"
    else:
        state.exit_code, state.last_line = result.exit_code, result.last_line
        state.seconds += result.seconds


def _pass_on(ray: Any, task: _Task, received: list[int]) -> None:
    """Cancel the task, which raises SIGINT in it and is passed on to the run; a third signal kills."""
    for count in range(task.passed_on + 1, len(received) + 1):
        ray.cancel(task.reference, force=count > 2)
    task.passed_on = len(received)


# ---------------------------------------------------------------------------------------------------------------------
# The cluster
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def _cluster() -> Iterator[Any]:
    try:
        import ray
    except ImportError:
        raise RecipeError("--launcher ray: Ray is not installed: pip install 'branchmix[ray]'") from None
    if ray.is_initialized():  # by the caller, who also shuts it down
        yield ray
        return
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"--launcher ray: no cluster: {reason}: check RAY_ADDRESS, or unset it") from None
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _signs(shared: Path) -> Iterator[Path]:
    """A folder in ``shared`` where tasks report that they started; a machine that cannot see it is the wrong one."""
    folder = shared / f".ray-{secrets.token_hex(4)}"
    with writing(folder):
        folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _gpus_for_each(ray: Any, num_cpus: int) -> int:
    """1 if the cluster has GPUs. Prints a note if no machine is large enough yet, since the cluster may grow."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    num_gpus = int(any(machine.get("GPU", 0) >= 1 for machine in machines))
    if not any(machine.get("CPU", 0) >= num_cpus and machine.get("GPU", 0) >= num_gpus for machine in machines):
        print(f"note: no machine of the cluster has {num_cpus} cores; waiting until one joins", file=sys.stderr)
    return num_gpus

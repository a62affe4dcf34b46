"""Runs the jobs of ``launch.py`` on this machine or on a Ray cluster, where the tasks go to machines that have room.

Ray is optional. A task starts the same process that would be started on this machine. All machines must share the file
system with the runs' folders, and progress is read from there.
"""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from branchmix.checkpoint.folder import writing
from branchmix.errors import RecipeError
from branchmix.train.launch import USER_ERROR, Job, JobState, Outcome, run_jobs, run_processes, share_machine

Launcher = Literal["local", "ray"]


def runner(
    launcher: Launcher, at_once: int | None, threads: int | None, num_jobs: int, *, shared: Path
) -> tuple[int | None, Callable[..., Outcome]]:
    """The threads of each job, or None if it may choose, and the function that runs jobs, as ``run_jobs`` does.

    Args:
        launcher: ``local`` for processes that share this machine, ``ray`` for a cluster.
        at_once: how many run at a time; as many as fit if None.
        threads: of each job; chosen here if None, but not on a cluster, whose machines may be others.
        num_jobs: how many there will be.
        shared: see ``run_on_ray``.
    """
    if launcher == "ray":
        return threads, partial(run_on_ray, at_once=at_once, shared=shared, num_cpus=threads or 1)
    at_once, threads, places = share_machine(at_once, threads, num_jobs)
    return threads, partial(run_processes, at_once=at_once, places=places)


def run_on_ray(
    jobs: Sequence[Job], at_once: int | None = None, *, shared: Path, num_cpus: int = 1, **others: Any
) -> Outcome:
    """Run jobs on the cluster at RAY_ADDRESS, one running here, or one started for this call: see ``run_jobs``.

    A job whose worker or machine dies is retried like a failed one. Each job gets a GPU if the cluster has any. Signals
    reach the jobs as SIGINT.

    Args:
        at_once: how many run at a time; as many as fit on the cluster if None.
        shared: the folder that the jobs write to, which every machine must see.
        num_cpus: cores that Ray reserves for each job.
        **others: of ``run_jobs``.

    Raises:
        RecipeError: Ray is not installed, or the cluster cannot be reached.
        OutputError: ``shared`` cannot be written.
    """
    with _cluster() as ray, _signs(shared) as signs:
        attempt = ray.remote(max_retries=0, num_cpus=num_cpus, num_gpus=_gpus_for_each(ray, num_cpus))(_attempt)

        def start(state: JobState, place: int) -> _RemoteAttempt:
            sign = signs / f"{state.job.name}-{state.attempts}"
            return _RemoteAttempt(state, ray, attempt.remote(state, sign), sign)

        return run_jobs(jobs, start, len(jobs) if at_once is None else at_once, **others)


def _attempt(state: JobState, sign: Path) -> JobState:
    """Run the job once, on the cluster. If this worker dies, the job is killed, because it may be retried elsewhere."""
    if not sign.parent.is_dir():
        line = f"error: {sign.parent.parent}: {socket.gethostname()} cannot see it: choose a folder on a file system"
        return replace(state, exit_code=USER_ERROR, last_line=f"{line} that all machines of the cluster share")
    sign.touch()
    command = [sys.executable, *state.command[1:]]
    outcome = run_processes([replace(state.job, command=command)], 1, orphans_get=signal.SIGKILL)
    return outcome.jobs[0]


class _RemoteAttempt:
    """A task of the cluster, which may wait there for room. It creates the file ``sign`` when it starts."""

    def __init__(self, state: JobState, ray: Any, reference: Any, sign: Path):
        self.state, self.ray, self.reference, self.sign = state, ray, reference, sign

    def is_over(self) -> bool:
        if self.sign.exists():
            self.state.begin()
        return bool(self.ray.wait([self.reference], timeout=0)[0])

    def signal(self, number: int) -> None:
        """Cancel the task, which raises SIGINT in it and is passed on to the run."""
        self.ray.cancel(self.reference, force=number == signal.SIGKILL)

    def close(self) -> None:
        """Record the result of the attempt, or Ray's error if the task is gone."""
        state = self.state
        if self.sign.exists():
            state.begin()
        try:
            result = self.ray.get(self.reference, timeout=60)  # it is over, or was abandoned
        except self.ray.exceptions.TaskCancelledError:
            state.exit_code, state.last_line = None, ""
        except self.ray.exceptions.RayError as error:
            state.begin()  # it counts as an attempt, or it could be retried forever
            reason = " ".join(str(error).split())
            state.exit_code, state.last_line = 1, f"Ray lost its worker: {type(error).__name__}: {reason[:200]}"
        else:
            state.exit_code, state.last_line = result.exit_code, result.last_line
            state.seconds += result.seconds


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
    with writing(shared):
        shared.mkdir(parents=True, exist_ok=True)
        folder = TemporaryDirectory(prefix=".ray-", dir=shared, ignore_cleanup_errors=True)
    with folder as signs:
        yield Path(signs)


def _gpus_for_each(ray: Any, num_cpus: int) -> int:
    """1 if the cluster has GPUs. Prints a note if no machine is large enough yet, since the cluster may grow."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    num_gpus = int(any(machine.get("GPU", 0) >= 1 for machine in machines))
    if not any(machine.get("CPU", 0) >= num_cpus and machine.get("GPU", 0) >= num_gpus for machine in machines):
        print(f"note: no machine of the cluster has {num_cpus} cores; waiting until one joins", file=sys.stderr)
    return num_gpus

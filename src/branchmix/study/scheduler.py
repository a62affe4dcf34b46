"""All steps of a study that are not done, side by side where they may be: ``study(file, out)``.

OUT has ``plan.json`` (the graph), ``steps/NAME-KEY/`` (what each step makes, and its log), and ``results/``: a small
text file for each finished step, from which alone ``report`` makes tables and pages.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal
from unittest import mock

from branchmix.errors import BranchMixError
from branchmix.study.build import build
from branchmix.study.folder import MODEL, STEPS, StudyFolder, alone, is_done, write_plan
from branchmix.study.forecast import fitted, processes_of
from branchmix.study.graph import AFTER_A_MODEL, Graph, Step
from branchmix.study.settings import StudyFile
from branchmix.train import cluster
from branchmix.train.launch import USER_ERROR, Job, JobState, Outcome, cores, startable
from branchmix.train.progress import JobDisplay

Launcher = Literal["local", "ray", "inline"]
Watch = Callable[[list[JobState]], None]


@dataclass(frozen=True)
class StudyReport:
    """What became of a study's steps."""

    out: Path
    statuses: dict[str, str]
    """By step: ``done``, ``failed``, ``stopped``, ``waiting``; ``kept`` if it was done before."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why, in one line each, with the log."""
    stopped_by: int | None = None

    @property
    def left(self) -> list[str]:
        return [name for name, status in self.statuses.items() if status not in ("done", "kept")]


def study(
    config: StudyFile | str | Path,
    out: str | Path,
    *,
    only: Sequence[str] = (),
    launcher: Launcher = "local",
    progress: bool = True,
) -> StudyReport:
    """Run what is not done yet. Call it from the main thread; Ctrl-C and SIGTERM let runs write their checkpoints.

    Args:
        config: settings, or their YAML file.
        out: folder of the study.
        only: steps to run, with all they need (see ``Graph.chosen``).
        launcher: ``local`` for processes on this machine, ``ray`` for a cluster with a shared file system, ``inline``
            for one step after another in this process: no time is lost with starting processes.
        progress: show on stderr what happens.

    Raises:
        BranchMixError: the settings make no sense, something is missing, or ``out`` is something else's folder.
    """
    config = StudyFile.load(config)
    out = Path(out)
    graph = build(config)
    graph.chosen(only)  # what makes no sense is refused before anything is written or measured
    with alone(out):
        if config.minutes is not None:
            config, _ = fitted(config, out, say=partial(print, file=sys.stderr, flush=True) if progress else None)
            graph = build(config)
        wanted = graph.chosen(only)
        write_plan(config, graph, out)
        folder = StudyFolder(out, graph, config)
        folder.collect()
        todo = folder.todo(wanted)
        total, left = len(_chains(wanted)), len(_chains(todo))
        with JobDisplay(total=total, finished=total - left, enabled=progress, noun="steps") as display:

            def watch(states: list[JobState]) -> None:
                display(states)
                if any(state.status == "done" and state.job.name not in folder.copied for state in states):
                    folder.collect()

            if launcher == "inline":
                outcome = _run_inline(config, out, todo, watch)
            else:
                outcome = _run(config, graph, out, todo, watch, launcher)
        folder.collect()
    of_jobs = {state.job.name: state for state in outcome.jobs}
    statuses = {step.name: "kept" for step in wanted}
    for step in todo:
        state = of_jobs.get(step.name)
        statuses[step.name] = "done" if is_done(out, step) else state.status if state else "waiting"
    failed = {s.job.name: f"{s.reason} (its output: {s.job.log})" for s in outcome.jobs if s.status == "failed"}
    return StudyReport(out, {step.name: statuses[step.name] for step in wanted}, failed, outcome.stopped_by)


def _run(
    config: StudyFile, graph: Graph, out: Path, todo: list[Step], watch: Watch, launcher: cluster.Launcher
) -> Outcome:
    """All steps but the timed one, and that alone at the end."""
    timed = [step for step in todo if step.kind == "inference"]
    states, outcome = list[JobState](), Outcome([])
    for steps in ([step for step in todo if step not in timed], timed):
        undone = {state.job.name for state in states if state.status != "done"}
        if not steps or any(name in undone for step in steps for name in step.needs.names):
            continue
        chains = _chains(steps)
        threads, run = cluster.runner(launcher, config.at_once, config.threads, len(chains), shared=out.absolute())
        if launcher == "ray":
            jobs = [_job(out, chain, chains, threads or 1) for chain in chains]
        else:
            threads = threads or cores()
            jobs = [_job(out, chain, chains, threads, processes_of(config, graph, chain[0])) for chain in chains]
        outcome = run(jobs, retries=config.retries, watch=watch)
        states += outcome.jobs
        if outcome.stopped_by is not None:
            break
    return Outcome(states, outcome.stopped_by)


def _run_inline(config: StudyFile, out: Path, todo: list[Step], watch: Watch) -> Outcome:
    """The same in this process, without retries."""
    from branchmix.study.step import StepStoppedError, do

    chains = _chains(todo)
    states = [JobState(_job(out, chain, chains, config.threads or cores())) for chain in chains]
    with mock.patch.dict(os.environ):
        for chain, state in zip(chains, states, strict=True):
            if state not in startable(states):
                continue
            os.environ.update(state.job.env)
            state.status, state.attempts = "running", 1
            watch(states)
            begun = time.monotonic()
            try:
                for step in chain:
                    do(out, step.name)
                state.status = "done"
            except BranchMixError as error:
                state.status, state.exit_code, state.last_line = "failed", USER_ERROR, " ".join(str(error).splitlines())
            except (StepStoppedError, KeyboardInterrupt) as stop:
                state.status = "stopped"
                return Outcome(states, getattr(stop, "signal", signal.SIGINT))
            finally:
                state.seconds += time.monotonic() - begun
            watch(states)
    return Outcome(states)


def _chains(steps: Sequence[Step]) -> list[list[Step]]:
    """A model, its scores and routes are one chain: starting a process takes seconds."""
    chains = {step.name: [step] for step in steps if step.kind not in AFTER_A_MODEL}
    for step in steps:
        if step.kind in AFTER_A_MODEL:
            chains.setdefault(step.needs.model or step.name, []).append(step)
    return list(chains.values())


def _job(out: Path, chain: list[Step], chains: list[list[Step]], threads: int, processes: int = 1) -> Job:
    """A process that does a chain, named after its first step; several share it if it is a training run."""
    first, out = chain[0], out.absolute()
    folder = out / STEPS / first.folder
    log = (folder / MODEL if first.kind == "train" else folder) / "log.txt"
    shared = first.kind != "text" and processes > 1
    env = {
        "OMP_NUM_THREADS": str(threads if shared or processes == 1 else processes),
        "TOKENIZERS_PARALLELISM": "false",
        "BRANCHMIX_CACHE": os.environ.get("BRANCHMIX_CACHE", str(out / "cache")),
    }
    step = ["-m", "branchmix.study.step", str(out), *(step.name for step in chain)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if shared else []
    needed = {name for step in chain for name in step.needs.names}
    after = [other[0].name for other in chains if other is not chain and needed & {step.name for step in other}]
    again = [sys.executable, *step]
    return Job(first.name, [sys.executable, *torchrun, *step], log, again=again, env=env, after=after)

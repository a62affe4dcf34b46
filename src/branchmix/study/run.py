"""All steps of a study that are not done, side by side where they may be: ``study(file, out)``.

OUT has ``plan.json`` (the graph), ``steps/NAME-KEY/`` (what each step makes, and its log), and ``results/``: a small
text file for each finished step, from which alone ``report`` makes tables and pages.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from branchmix.checkpoint.folder import write_json, writing
from branchmix.checkpoint.moves import in_order_of_removal
from branchmix.errors import BranchMixError, OutputError, RecipeError
from branchmix.study.build import build
from branchmix.study.facts import facts_of
from branchmix.study.forecast import fitted
from branchmix.study.graph import AFTER_A_MODEL, Graph, Step, chosen, may_go
from branchmix.study.processes import processes_of, share_machine
from branchmix.study.records import MODEL, PAGE, PLAN, RESULT, RESULTS, STEPS, STUDY, write_record
from branchmix.study.settings import StudyFile
from branchmix.train.job_display import JobDisplay
from branchmix.train.launch import USER_ERROR, Job, JobState, Outcome, cores, run_processes, startable

Launcher = Literal["local", "ray", "inline"]
_LOCK = ".lock"


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
        """Steps that are not done."""
        return [name for name, status in self.statuses.items() if status not in ("done", "kept")]


def study(
    config: StudyFile | str | Path,
    out: str | Path,
    *,
    only: Sequence[str] = (),
    overrides: Sequence[str] = (),
    launcher: Launcher = "local",
    progress: bool = True,
) -> StudyReport:
    """Run what is not done yet. Call it from the main thread; Ctrl-C and SIGTERM let runs write their checkpoints.

    Args:
        config: settings, or their YAML file.
        out: folder of the study.
        only: steps to run, with all they need (see ``graph.chosen``).
        overrides: ``key=value`` over the file's.
        launcher: ``local`` for processes on this machine, ``ray`` for a cluster with a shared file system, ``inline``
            for one step after another in this process: no time is lost with starting processes.
        progress: show on stderr what goes on.

    Raises:
        BranchMixError: the settings make no sense, something is missing, or ``out`` is something else's folder.
    """
    if not isinstance(config, StudyFile):
        config = StudyFile.load(config, list(overrides))
    elif overrides:
        raise RecipeError("overrides are for files: change the StudyFile itself")
    out = Path(out)
    graph = build(config)
    wanted = chosen(graph, list(only))
    with alone(out):
        if config.minutes is not None:
            config, _ = fitted(config, out, say=_say if progress else None)
            graph = build(config)
            wanted = chosen(graph, list(only))
        write_plan(config, graph, out)
        place = _Place(out, graph, config)
        place.collect()
        todo = place.todo(wanted)
        redone = {step.name for step in todo}
        statuses = {step.name: "kept" for step in wanted if step.name not in redone}
        with JobDisplay(
            total=len(_chains(wanted)),
            finished=len(_chains(wanted)) - len(_chains(todo)),
            enabled=progress,
            noun="steps",
        ) as board:

            def watch(states: list[JobState]) -> None:
                board(states)
                place.note(states)

            run = _run_inline if launcher == "inline" else partial(_run, launcher=launcher)
            states, stopped_by = run(config, graph, out, todo, watch=watch)
        place.collect()
        for step in todo:
            statuses[step.name] = "done" if place.is_done(step) else "waiting"
    failed = {}
    for state in states:
        if statuses.get(state.job.name) == "waiting":
            statuses[state.job.name] = state.status
        if state.status == "failed":
            failed[state.job.name] = f"{state.reason} (its output: {state.job.log})"
    return StudyReport(out, {step.name: statuses[step.name] for step in wanted}, failed, stopped_by)


Watch = Callable[[list[JobState]], None]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _run(
    config: StudyFile, graph: Graph, out: Path, todo: list[Step], *, launcher: Launcher, watch: Watch
) -> tuple[list[JobState], int | None]:
    """All steps but the timed one, and that alone at the end."""
    timed = [step for step in todo if step.kind == "inference"]
    states: list[JobState] = []
    for steps in ([step for step in todo if step not in timed], timed):
        undone = {state.job.name for state in states if state.status != "done"}
        if not steps or any(name in undone for step in steps for name in step.needs.values()):
            continue
        jobs = _chains(steps)
        if launcher == "ray":
            from branchmix.train.cluster import run_on_ray

            threads = config.threads or 1
            commands = [_job(out, chain, jobs, threads) for chain in jobs]
            outcome: Outcome = run_on_ray(
                commands, config.at_once, shared=out.absolute(), num_cpus=threads, retries=config.retries, watch=watch
            )
        else:
            at_once, threads, places = share_machine(config, len(jobs))
            commands = [_job(out, chain, jobs, threads, processes_of(config, graph, chain[0])) for chain in jobs]
            outcome = run_processes(commands, at_once, retries=config.retries, places=places, watch=watch)
        states += outcome.jobs
        if outcome.stopped_by is not None:
            return states, outcome.stopped_by
    return states, None


def _run_inline(
    config: StudyFile, graph: Graph, out: Path, todo: list[Step], *, watch: Watch
) -> tuple[list[JobState], int | None]:
    """The same in this process, without retries."""
    from branchmix.study.step import StepStoppedError, do

    chains = _chains(todo)
    states = [JobState(_job(out, chain, chains, config.threads or cores())) for chain in chains]
    before = dict(os.environ)
    try:
        for chain in chains:
            state = next(state for state in states if state.job.name == chain[0].name)
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
                return states, getattr(stop, "signal", signal.SIGINT)
            finally:
                state.seconds += time.monotonic() - begun
            watch(states)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return states, None


def _chains(steps: Sequence[Step]) -> list[list[Step]]:
    """Steps that one process does one after the other: a model, its scores and routes. Starting one takes seconds."""
    chains = {step.name: [step] for step in steps if step.kind not in AFTER_A_MODEL}
    for step in steps:
        if step.kind in AFTER_A_MODEL:
            chains.setdefault(step.needs.get("model", step.name), []).append(step)
    return list(chains.values())


def _job(out: Path, chain: Sequence[Step], chains: Sequence[Sequence[Step]], threads: int, processes: int = 1) -> Job:
    """Named after the first of its steps; several processes share it if it is a training run."""
    first = chain[0]
    folder = out.absolute() / STEPS / first.folder
    log = folder / MODEL / "log.txt" if first.kind == "train" else folder / "log.txt"
    env = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    env["BRANCHMIX_CACHE"] = os.environ.get("BRANCHMIX_CACHE", str(out.absolute() / "cache"))
    step = ["-m", "branchmix.study.step", str(out.absolute()), *(step.name for step in chain)]
    command = again = [sys.executable, *step]
    if processes > 1 and first.kind == "text":
        env["OMP_NUM_THREADS"] = str(processes)
    elif processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += step
    needed = {name for step in chain for name in step.needs.values()}
    after = [other[0].name for other in chains if other is not chain and needed & {step.name for step in other}]
    return Job(first.name, command, log, again=again, env=env, after=after)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """While a study runs in its folder: another one is refused. The system ends it with the process."""
    from filelock import FileLock, Timeout

    if out.exists() and (not out.is_dir() or (_has_files(out) and not (out / PLAN).is_file())):
        raise OutputError(f"{out}: exists, and is no study's folder: choose another")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise OutputError(
                f"{out}: another process runs this study: wait for its end, or choose another folder"
            ) from None
    try:
        yield
    finally:
        lock.release()


def _has_files(out: Path) -> bool:
    return any(file.name != _LOCK for file in out.iterdir())


def write_plan(config: StudyFile, graph: Graph, out: Path) -> None:
    """``plan.json``, which steps read, and ``results/study.json``, which reports read."""
    settings = config.model_dump(mode="json")
    steps = {
        name: {**asdict(step), "about": step.about.as_dict() if step.about else {}, "folder": step.folder}
        for name, step in graph.steps.items()
    }
    with writing(out):
        (out / RESULTS).mkdir(parents=True, exist_ok=True)
        write_json(out / PLAN, {"settings": settings, "base": str(config.folder.absolute()), "steps": steps})
        shown = ("kind", "needs", "key", "cost", "about")
        small = {name: {key: step[key] for key in shown} for name, step in steps.items()}
        for name, step in graph.steps.items():
            if step.kind in ("scores", "ensemble") and step.config is not None:
                small[name]["facts"] = facts_of(step.config, config.sequence_length)
        write_record(
            out / RESULTS / STUDY, {"settings": settings, **{f"step {name}": step for name, step in small.items()}}
        )


class _Place:
    """What is on the disk, and what may go."""

    def __init__(self, out: Path, graph: Graph, config: StudyFile):
        self.out, self.graph, self.config = out, graph, config
        self.noted: set[str] = set()
        self.copied: set[str] = set()

    def folder(self, step: Step) -> Path:
        return self.out / STEPS / step.folder

    def is_done(self, step: Step) -> bool:
        return (self.folder(step) / RESULT).is_file()

    def has_weights(self, step: Step) -> bool:
        return (self.folder(step) / MODEL / "config.json").is_file()

    def todo(self, wanted: Sequence[Step]) -> list[Step]:
        """Steps that are not done, and those that are, but whose weights are gone and needed again."""
        names: set[str] = set()

        def need(step: Step, *, weights: bool) -> None:
            if self.is_done(step) and (not weights or step.kind not in ("train", "upcycle") or self.has_weights(step)):
                return
            if step.name not in names:
                names.add(step.name)
                for role, name in step.needs.items():
                    need(self.graph.steps[name], weights=role != "clock")

        for step in wanted:
            if not self.is_done(step):
                need(step, weights=False)
        return [step for step in self.graph.steps.values() if step.name in names]

    def collect(self) -> None:
        """``results/``: those of the graph as it is now, and no others."""
        results = self.out / RESULTS
        with writing(results):
            for file in results.iterdir():
                if file.name != STUDY and file.suffix in (".json", ".html") and file.stem not in self.graph.steps:
                    file.unlink()
            for step in self.graph.steps.values():
                target = results / f"{step.name}.json"
                if self.is_done(step) and step.name not in self.copied:
                    self._copy(step)
                    self.copied.add(step.name)
                elif self.is_done(step):
                    continue
                else:
                    target.unlink(missing_ok=True)
                    target.with_suffix(".html").unlink(missing_ok=True)
        self.make_room()

    def _copy(self, step: Step) -> None:
        part = self.out / RESULTS / f".{step.name}.part"
        for made in (PAGE, RESULT):
            if (self.folder(step) / made).is_file():
                shutil.copyfile(self.folder(step) / made, part)
                part.replace(self.out / RESULTS / f"{step.name}{Path(made).suffix}")

    def note(self, states: list[JobState]) -> None:
        """Take what was finished since the last call."""
        new = {state.job.name for state in states if state.status == "done"} - self.noted
        if new:
            self.noted |= new
            self.collect()

    def make_room(self) -> None:
        """Weights of merges and mixtures that nothing waits for, if only results are to be kept."""
        if self.config.keep != "results":
            return
        for step in self.graph.steps.values():
            if not may_go(step) or not self.is_done(step):
                continue
            if all(self.is_done(later) for later in self.graph.dependents(step.name)):
                for entry in in_order_of_removal((self.folder(step) / MODEL).glob("*")):
                    if entry.name != "log.txt":
                        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

"""The branch phase: each expert of a study is trained in its own run, from the same seed (BTX; BAM section 3.1).

``branch(config)`` writes ``OUT/<expert>/run.yaml`` for each expert, runs ``branchmix train`` on these files side by
side, here or on a Ray cluster, and writes ``OUT/recipe.yaml`` for ``branchmix upcycle``. The runs are independent, so
you can also start them by hand. Called again, it resumes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from branchmix.checkpoint.families import nearest
from branchmix.checkpoint.folder import write_text
from branchmix.checkpoint.hub import resolve
from branchmix.data.sources import require_files
from branchmix.errors import RecipeError
from branchmix.settings import absolute, parse_yaml
from branchmix.train.cluster import Launcher, runner
from branchmix.train.config import BranchConfig, RunConfig
from branchmix.train.launch import Job, JobState, Outcome, Status
from branchmix.train.progress import JobDisplay
from branchmix.train.run_folder import RunFolder, result_of

TRAIN = (sys.executable, "-m", "branchmix", "train")
"""The command of a run, without its file."""
TEMPLATE = Path(__file__).with_name("mixture_recipe.yaml")
FILE, LOG = "run.yaml", "log.txt"
"""Names of the files with a run's settings, and its output."""


@dataclass(frozen=True)
class ExpertReport:
    """The result of one expert's run."""

    name: str
    out: Path
    mix: dict[str, float] | str
    status: Status
    """``waiting``: not started, because the command was stopped before."""
    attempts: int = 0
    """Runs started by this call; 0 for an expert that was already finished."""
    seconds: float = 0.0
    reason: str = ""
    """Why it failed."""
    training: dict[str, Any] | None = None
    """The finished run's ``training.json``."""

    @property
    def tokens(self) -> int | None:
        """Number of tokens it was trained on."""
        return self.training.get("tokens") if self.training else None

    def held_out(self, when: Literal["start", "end"]) -> dict[str, float]:
        """Held-out loss by domain, in nats a token."""
        scores = ((self.training or {}).get("held_out") or {}).get(when) or {}
        return {domain: score["loss"] for domain, score in scores.items()}


@dataclass(frozen=True)
class BranchReport:
    """The results of all experts."""

    out: Path
    experts: list[ExpertReport]
    recipe: Path | None = None
    """The file for ``branchmix upcycle``, once all experts are finished."""
    notes: tuple[str, ...] = ()
    stopped_by: int | None = None
    """The signal that ended it early."""
    dry_run: bool = False

    @property
    def failed(self) -> list[ExpertReport]:
        return [expert for expert in self.experts if expert.status == "failed"]


def branch(
    config: BranchConfig | str | Path,
    *,
    launcher: Launcher = "local",
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    force: bool = False,
    progress: bool = True,
    dry_run: bool = False,
) -> BranchReport:
    """Train all experts. Finished ones are skipped, stopped ones resume.

    A run that fails does not stop the others: see ``BranchReport.failed``. SIGINT and SIGTERM are passed on to the
    runs, which write a checkpoint; the report then names the signal. Call this function from the main thread.

    Args:
        config: a ``BranchConfig`` or its YAML file.
        launcher: ``local`` for processes on this machine, ``ray`` for a Ray cluster with a shared file system.
        overrides: ``key=value`` settings that replace those of the file.
        only: names of experts to train; all if empty.
        force: start over.
        progress: show the runs on stderr.
        dry_run: check and plan; write and start nothing.

    Raises:
        BranchMixError: the configuration makes no sense, the seed is missing, or OUT cannot be written.
    """
    config = BranchConfig.load(config, overrides)
    names = _chosen(config, only)
    out = absolute(config.out, config.folder)
    require_files(config.data, folder=config.folder)  # once, rather than in every run
    runs = {name: _run(config, name) for name in names}
    # Before anything is written: runs with other settings are refused here, rather than by one process after another.
    finished = {name for name in names if RunFolder(runs[name]).look(runs[name], force=force) == "finished"}
    if dry_run:
        return BranchReport(out, [_report(runs[name], name, finished) for name in names], dry_run=True)

    left = [name for name in names if name not in finished]
    with JobDisplay(total=len(names), finished=len(finished), enabled=progress) as watch:
        outcome = Outcome([])
        if left:
            threads, run = runner(launcher, config.at_once, config.threads, len(left), shared=out)
            jobs = [_job(runs[name], name, threads, force=force) for name in left]
            outcome = run(jobs, retries=config.retries, watch=watch)
    states = {state.job.name: state for state in outcome.jobs}
    experts = [_report(runs[name], name, finished, states.get(name)) for name in names]
    recipe, notes = _write_recipe(config, out)
    return BranchReport(out, experts, recipe, notes, outcome.stopped_by)


def _chosen(config: BranchConfig, only: Sequence[str]) -> list[str]:
    known = list(config.experts)
    for name in only:
        if name not in known:
            raise RecipeError(
                f"--only: no expert is called {name!r}{nearest(name, known)}; there is {', '.join(known)}"
            )
    return [name for name in config.experts if not only or name in only]


def _run(config: BranchConfig, name: str) -> RunConfig:
    """The settings of the expert's run, with absolute paths, so that its file works from any folder."""
    seed, out = resolve(config.seed, config.folder), absolute(config.out, config.folder)
    settings = {key: getattr(config, key) for key in config.model_fields_set if key in RunConfig.model_fields}
    settings |= {
        "model": config.seed if seed.revision else str(absolute(seed.folder, Path())),
        "out": str(out / name),
        "data": {domain: source.absolute(config.folder, out=out) for domain, source in config.data.items()},
        "mix": config.mix_of(name),
    }
    run = RunConfig(**settings)
    run._file = Path(run.out) / FILE
    return run


def _job(run: RunConfig, name: str, threads: int | None, *, force: bool) -> Job:
    """Write the run's file, and return its job."""
    import yaml

    out = Path(run.out)
    file = out / FILE
    settings = run.model_dump(mode="json", exclude_unset=True)
    if threads is not None:
        settings["threads"] = threads
    text = f"# Written by branchmix branch. By hand: branchmix train {file}\n\n"
    text += yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    write_text(file, text)
    command = [*TRAIN, str(file)]
    env = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return Job(name, [*command, "--force"] if force else command, out / LOG, again=command, env=env)


def _report(run: RunConfig, name: str, finished: set[str], state: JobState | None = None) -> ExpertReport:
    out = Path(run.out)
    state = state or JobState(Job(name, (), out / LOG), "done" if name in finished else "waiting")
    reason = state.reason if state.status == "failed" else ""
    training = result_of(out) if state.status == "done" else None
    return ExpertReport(name, out, run.mix, state.status, state.attempts, state.seconds, reason, training)


def _write_recipe(config: BranchConfig, out: Path) -> tuple[Path | None, tuple[str, ...]]:
    """Write ``OUT/recipe.yaml`` once all experts are finished; keep one that the user has changed."""
    if not all(result_of(out / name) for name in config.experts):
        return None, ()
    seed = resolve(config.seed, config.folder)
    path = out / "recipe.yaml"
    # `no` and `2024` are strings only in quotes.
    words = {name: name if parse_yaml(name, name) == name else json.dumps(name) for name in config.experts}
    text = TEMPLATE.read_text(encoding="utf-8").format(
        recipe=path,
        seed=json.dumps(config.seed if seed.revision else os.path.relpath(absolute(seed.folder, Path()), out)),
        experts="".join(f"  - {{name: {word}, model: ./{name}}}\n" for name, word in words.items()),
    )
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        return path, (f"{path} was changed since it was written, so it is kept",)
    write_text(path, text)
    return path, ()

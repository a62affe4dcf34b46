"""The branch phase: each expert of a study is a training run of its own, from the same seed (BTX; BAM section 3.1).

``branch(config)`` writes ``OUT/<expert>/run.yaml`` for each, runs ``branchmix train`` on them side by side, here or on
a Ray cluster, and leaves ``OUT/recipe.yaml`` for ``branchmix upcycle``. The runs know nothing of each other, so all
that is done here can also be done by hand. Called again, it goes on where it was stopped.
"""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from branchmix.checkpoint.families import nearest
from branchmix.checkpoint.hub import resolve
from branchmix.checkpoint.json_text import read_json
from branchmix.data.sources import require_files
from branchmix.errors import OutputError, RecipeError
from branchmix.settings import parse_yaml
from branchmix.train.board import Board
from branchmix.train.config import BranchConfig, RunConfig
from branchmix.train.launch import Job, JobState, Outcome, Status, cores, run_processes
from branchmix.train.outputs import DONE, RESULTS, RunFolder

Launcher = Literal["local", "ray"]
TRAIN = (sys.executable, "-m", "branchmix", "train")
"""The command of a run, but for its file."""


@dataclass(frozen=True)
class ExpertReport:
    """What became of one expert."""

    name: str
    out: Path
    mix: dict[str, float] | str
    status: Status
    """``waiting``: it was never started, since something stopped the command."""
    attempts: int = 0
    """Runs started by this call; 0 for an expert that was finished before."""
    seconds: float = 0.0
    reason: str = ""
    """Why it failed."""
    training: dict[str, Any] | None = None
    """The finished run's ``training.json``."""

    @property
    def tokens(self) -> int | None:
        """Tokens that it was trained on."""
        return self.training.get("tokens") if self.training else None

    def held_out(self, when: Literal["start", "end"]) -> dict[str, float]:
        """Held-out loss by domain, in nats a token."""
        scores = ((self.training or {}).get("held_out") or {}).get(when) or {}
        return {domain: score["loss"] for domain, score in scores.items()}


@dataclass(frozen=True)
class BranchReport:
    """What became of all experts."""

    out: Path
    experts: list[ExpertReport]
    recipe: Path | None = None
    """The file for ``branchmix upcycle``, once all experts are there."""
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
    """Train all experts; those that are finished stay, those that were stopped go on.

    A run that fails does not stop the others: see ``BranchReport.failed``. SIGINT and SIGTERM are passed on to the
    runs, which write a checkpoint; the report then says what stopped it. Call it from the main thread.

    Args:
        config: a ``BranchConfig`` or its YAML file.
        launcher: ``local`` for processes on this machine, ``ray`` for a Ray cluster with a shared file system.
        overrides: ``key=value`` for the file's keys.
        only: names of experts to train; all if empty.
        force: train them anew.
        progress: show the runs on stderr.
        dry_run: check and plan; write and start nothing.

    Raises:
        BranchMixError: the configuration makes no sense, the seed is missing, or OUT cannot be written.
    """
    if not isinstance(config, BranchConfig):
        config = BranchConfig.load(config, list(overrides))
    elif overrides:
        raise RecipeError("overrides are for files: change the BranchConfig itself")
    names = _chosen(config, only)
    out = _absolute(config.out, config.folder)
    require_files(config.data, folder=config.folder)  # once, and not by every run
    runs = {name: _run(config, name) for name in names}
    # Asked before anything is written: a run of other settings is refused here, and not by one process after another.
    finished = {name for name in names if RunFolder(runs[name]).look(runs[name], force=force) == "finished"}
    if dry_run:
        statuses: dict[str, Status] = {name: "done" if name in finished else "waiting" for name in names}
        return BranchReport(out, [_report(runs[name], name, statuses[name]) for name in names], dry_run=True)

    left = [name for name in names if name not in finished]
    with Board(total=len(names), finished=len(finished), enabled=progress) as watch:
        if not left:
            outcome = Outcome([])
        elif launcher == "ray":
            from branchmix.train.cluster import run_on_ray

            jobs = [_job(runs[name], name, config.threads, force=force) for name in left]
            num_cpus = config.threads or 1
            outcome = run_on_ray(
                jobs, config.at_once, shared=out, num_cpus=num_cpus, retries=config.retries, watch=watch
            )
        else:
            at_once, threads, places = _share_machine(config, len(left))
            jobs = [_job(runs[name], name, threads, force=force) for name in left]
            outcome = run_processes(jobs, at_once, retries=config.retries, places=places, watch=watch)
    states = {state.job.name: state for state in outcome.jobs}
    experts = [_report(runs[name], name, "done", states.get(name)) for name in names]
    recipe, notes = _write_recipe(config, out)
    return BranchReport(out, experts, recipe, notes, outcome.stopped_by)


def _chosen(config: BranchConfig, only: Sequence[str]) -> list[str]:
    for name in only:
        if name not in config.experts:
            known = list(config.experts)
            raise RecipeError(
                f"--only: no expert is called {name!r}{nearest(name, known)}; there is {', '.join(known)}"
            )
    return [name for name in config.experts if not only or name in only]


# ---------------------------------------------------------------------------------------------------------------------
# The run of one expert
# ---------------------------------------------------------------------------------------------------------------------


def _run(config: BranchConfig, name: str) -> RunConfig:
    """The expert's run with absolute paths, so that its file means the same wherever it is started."""
    run = config.run_of(name)
    here = config.folder
    seed = resolve(config.seed, here)
    written = glob.escape(str(_absolute(config.out, here)))
    data = {}
    for domain, source in run.data.items():
        changes: dict[str, Any] = {}
        if source.files is not None:
            files = [source.files] if isinstance(source.files, str) else source.files
            start = Path(glob.escape(os.path.abspath(here)))  # noqa: PTH100 (its brackets are no pattern)
            changes["files"] = [str(_absolute(file, start)) for file in files]
            # What the study writes is no data, even if a pattern covers its folder.
            changes["exclude"] = [*(str(_absolute(file, start)) for file in source.exclude), f"{written}/**"]
        elif source.hub is not None and (here / source.hub).expanduser().exists():
            changes["hub"] = str(_absolute(source.hub, here))
        data[domain] = source.model_copy(update=changes)
    changes = {
        "model": config.seed if seed.revision else str(_absolute(str(seed.folder), Path())),
        "out": str(_absolute(run.out, here)),
        "data": data,
    }
    run = run.model_copy(update=changes)
    run._folder = Path(run.out)  # where its file will be
    return run


def _absolute(path: str, base: Path) -> Path:
    return Path(os.path.abspath(base / Path(path).expanduser()))  # noqa: PTH100 (resolve() would follow links)


def _job(run: RunConfig, name: str, threads: int | None, *, force: bool) -> Job:
    """Writes the run's file; its command."""
    import yaml

    out = Path(run.out)
    file = out / "run.yaml"
    settings = run.model_dump(mode="json", exclude_unset=True)
    if threads is not None:
        settings["threads"] = threads
    text = f"# Written by branchmix branch. By hand: branchmix train {file}\n\n"
    text += yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{file}: cannot be written: {error.strerror}") from None
    command = [*TRAIN, str(file)]
    env = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return Job(name, [*command, "--force"] if force else command, out / "log.txt", again=command, env=env)


def _training(out: Path) -> dict[str, Any] | None:
    """What a finished run says of itself."""
    if not any((out / name).is_file() for name in RESULTS):
        return None
    with suppress(OSError, ValueError):
        training = read_json(out / DONE)
        return training if isinstance(training, dict) else None
    return None


def _report(run: RunConfig, name: str, status: Status, state: JobState | None = None) -> ExpertReport:
    out = Path(run.out)
    if state is None:
        return ExpertReport(name, out, run.mix, status, training=_training(out))
    reason = state.reason if state.status == "failed" else ""
    training = _training(out) if state.status == "done" else None
    return ExpertReport(name, out, run.mix, state.status, state.attempts, state.seconds, reason, training)


# ---------------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------------


def _share_machine(config: BranchConfig, num_runs: int) -> tuple[int, int | None, list[Mapping[str, str]]]:
    """Runs at a time, threads of each (None: as torch likes), and the environments of their places."""
    found = gpus()
    if found:
        return config.at_once or len(found), config.threads, [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in found]
    at_once = min(config.at_once or cores(), num_runs)
    return at_once, config.threads or max(1, cores() // at_once), [{}]


def gpus() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES of the GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu.strip() for gpu in visible.split(",") if gpu.strip() not in ("", "-1")]
    import torch

    return [str(gpu) for gpu in range(torch.cuda.device_count())]


# ---------------------------------------------------------------------------------------------------------------------
# The next step
# ---------------------------------------------------------------------------------------------------------------------

_RECIPE = """\
# Written by branchmix branch. The mixture of these experts:
#   branchmix upcycle {recipe} MIXTURE --verify

seed: {seed}
experts:
{experts}
attention: kv_experts # BAM, Expert KV: every expert keeps its own q, k, v and o
# attention: kv_sharing # BAM, Shared KV: own q and o, one averaged k and v; the KV cache of the dense seed
# attention: average # BTX: one averaged attention
ffn: experts # every expert keeps its own FFN; with `average` here and for attention it is a soup

routing:
  ffn: {{top_k: 1, normalize: false, soft: false}} # a token goes to one FFN expert, times its raw gate
  # attention: {{soft: true}} # a token attends with all experts, weighted by the gate; not for `average`
routed_scaling_factor: auto # experts / top_k; the paper: 1.0
"""


def _write_recipe(config: BranchConfig, out: Path) -> tuple[Path | None, tuple[str, ...]]:
    """``OUT/recipe.yaml`` once all experts of the study are there; one that differs is the user's and stays."""
    if not all(_training(out / name) for name in config.experts):
        return None, ()
    seed = resolve(config.seed, config.folder)
    path = out / "recipe.yaml"
    text = _RECIPE.format(
        recipe=path,
        seed=json.dumps(config.seed if seed.revision else os.path.relpath(_absolute(str(seed.folder), Path()), out)),
        experts="".join(f"  - {{name: {_word(name)}, model: ./{name}}}\n" for name in config.experts),
    )
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        return path, (f"{path} was changed since it was written, so it stays as it is",)
    path.write_text(text, encoding="utf-8")
    return path, ()


def _word(name: str) -> str:
    """As YAML reads it back: `no` and `2024` are words only in quotes."""
    return name if parse_yaml(name, name) == name else json.dumps(name)

"""The whole story as commands, in their order: each is printed, run, and not run again once it is done.

``demo(out, minutes)`` can be stopped at any time and called again. Everything is below OUT, the YAML files too, so that
any step can be repeated or changed by hand.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from branchmix.demo import calibrate
from branchmix.demo.measure import routes_page, routing_file, score_file
from branchmix.demo.settings import EXPERTS, MIXTURES, RECIPES, ROUTED, Budgets, Scale, mixture_runs, write_files
from branchmix.errors import BranchMixError, OutputError, RecipeError
from branchmix.train.job_display import last_metrics
from branchmix.train.launch import Job, JobState, cores, run_processes
from branchmix.train.progress import duration

DEFAULT_MINUTES = 15.0
DEMO, PLAN, SPEED, STEPS, TEXT, PAGE = (
    *("demo.json", "plan.json", "speed.json", "steps.json", "text/extract.json", "index.html"),
)
MOST_CORES = 8
"""More have nothing to do: there are six runs at most, and a batch for eight processes."""
_SECONDS_BETWEEN_LINES = 20.0


class DemoError(BranchMixError):
    """A step that failed; its log is named."""


class DemoStoppedError(Exception):
    """A signal came; the same call goes on.

    Attributes:
        signal: its number.
    """

    def __init__(self, signal: int):
        super().__init__(signal)
        self.signal = signal


@dataclass(frozen=True)
class Task:
    """A command, and the file that is there once it is done."""

    name: str
    command: list[str]
    """As a user types it: `branchmix ...`, `torchrun ...`, `python -m ...`."""
    done: Path
    log: Path
    env: dict[str, str] = field(default_factory=dict)
    runs: tuple[tuple[str, Path], ...] = ()
    """Training runs in it, by name: their progress is shown."""

    def job(self, env: dict[str, str]) -> Job:
        """For the scheduler."""
        program = {"branchmix": ["-m", "branchmix"], "torchrun": ["-m", "torch.distributed.run"], "python": []}
        first, *rest = self.command
        return Job(self.name, [sys.executable, *program[first], *rest], self.log, env={**env, **self.env})


@dataclass(frozen=True)
class Demo:
    """A demo's folder and what it was asked for."""

    out: Path
    minutes: float
    scale: Scale
    cores: int

    @property
    def budgets(self) -> Budgets:
        """What was planned."""
        return Budgets(**json.loads((self.out / PLAN).read_text(encoding="utf-8"))["budgets"])

    @property
    def speed(self) -> calibrate.Speed:
        """What was measured."""
        return calibrate.Speed(**json.loads((self.out / SPEED).read_text(encoding="utf-8")))


def run(
    out: str | Path,
    *,
    minutes: float | None = None,
    scale: Scale | None = None,
    budgets: Budgets | None = None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> dict[str, Any]:
    """Train, mix, train on, compare: everything that is not done yet. Call it from the main thread.

    Args:
        out: folder of the demo.
        minutes: how long it may take, about; 15, or what the demo in ``out`` was begun with.
        scale: shape and proportions of the models.
        budgets: instead of those that fit into ``minutes``.
        say: gets every line about what goes on.

    Returns:
        What ``results.collect`` found; the page is ``out / "index.html"``.

    Raises:
        DemoStoppedError: after Ctrl-C or SIGTERM.
        BranchMixError: ``out`` is something else's folder, or a step failed.
    """
    demo = _open(Path(out), minutes, scale or Scale())
    begun = time.monotonic()
    try:
        _run_steps(demo, budgets, say)
    finally:
        seconds = _wall_seconds(demo, time.monotonic() - begun)
    say("\n[8/8] The page")
    from branchmix.demo.page import write
    from branchmix.demo.results import collect

    found = collect(demo.out, seconds=seconds)
    write(demo.out, found)
    return found


def _run_steps(demo: Demo, budgets: Budgets | None, say: Callable[[str], None]) -> None:
    titles = iter(range(1, 8))

    def step(title: str, tasks: list[Task], at_once: int = 1) -> None:
        say(f"\n[{next(titles)}/8] {title}")
        _run_tasks(demo, tasks, at_once, say)

    step("The speed of this machine", [_calibration(demo)])
    planned = _plan(demo, budgets)
    say(_describe(demo))
    step("Text of four domains, from what is installed", [_text(demo, planned)])
    say(_sizes(demo))
    side_by_side = min(demo.cores, len(EXPERTS))
    runs = mixture_runs(planned)
    mixing = min(demo.cores, len(runs))
    write_files(
        demo.out,
        demo.scale,
        planned,
        threads=max(1, demo.cores // mixing),
        seed_threads=1 if demo.speed.seed_processes > 1 else demo.cores,
        at_once=side_by_side,
    )
    step("The seed: a tokenizer and a small model of general text", [_seed(demo)])
    step("The branch phase: three experts, independent of each other", [_branch(demo)])
    step("Four ways to make one model of four", [_upcycle(demo, name) for name in RECIPES], demo.cores)
    step("The mixtures, at equal data (DM) and at equal compute (CM)", [_mix(demo, r.name) for r in runs], mixing)
    step("Every model on every domain, and its routers", [*_measurements(demo), *_routes(demo)], demo.cores)


def models(budgets: Budgets) -> list[str]:
    """Folders of all models that are compared, below OUT."""
    dense = ["seed", *(f"experts/{name}" for name in EXPERTS)]
    return [*dense, *(f"upcycled/{name}" for name in RECIPES), *(f"trained/{r.name}" for r in mixture_runs(budgets))]


# ---------------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------------


def _open(out: Path, minutes: float | None, scale: Scale) -> Demo:
    """The demo that is in the folder, or a new one."""
    file = out / DEMO
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        if minutes is not None and minutes != found["minutes"]:
            raise RecipeError(
                f"{out}: holds a demo of {found['minutes']:g} minutes: choose another folder for one of {minutes:g}, "
                "or leave --minutes out to go on with it"
            )
        return Demo(out, found["minutes"], Scale(**found["scale"]), found["cores"])
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: exists, and is no demo's folder: choose another")
    demo = Demo(out, minutes if minutes is not None else DEFAULT_MINUTES, scale, min(cores(), MOST_CORES))
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write(file, {"minutes": demo.minutes, "scale": asdict(scale), "cores": demo.cores})
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror}") from None
    return demo


def _write(file: Path, content: Any) -> None:
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.replace(file)


def _plan(demo: Demo, budgets: Budgets | None) -> Budgets:
    """Fixed once: a demo that goes on is the same demo."""
    file = demo.out / PLAN
    if not file.is_file():
        budgets = budgets or calibrate.plan(demo.speed, demo.scale, demo.minutes)
        seconds = calibrate.estimate(demo.speed, demo.scale, budgets)
        _write(file, {"scale": asdict(demo.scale), "budgets": asdict(budgets), "estimated_seconds": seconds})
    return demo.budgets


def _describe(demo: Demo) -> str:
    budgets, speed = demo.budgets, demo.speed
    seconds = json.loads((demo.out / PLAN).read_text(encoding="utf-8"))["estimated_seconds"]
    return (
        f"{speed.cores} cores, {1 / speed.dense:,.0f} tokens/s of the dense model with one thread: "
        f"{budgets.seed:,} tokens for the seed, {budgets.expert:,} for each expert, {budgets.mixture:,} for a mixture; "
        f"about {duration(seconds)} in all"
    )


def _sizes(demo: Demo) -> str:
    found = json.loads((demo.out / TEXT).read_text(encoding="utf-8"))
    lines = [f"  {name:8} {row['documents']:6,} documents {row['chars']:12,} characters" for name, row in found.items()]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The commands
# ---------------------------------------------------------------------------------------------------------------------


def _calibration(demo: Demo) -> Task:
    out = demo.out
    command = ["python", "-m", "branchmix.demo.calibrate", str(out)]
    return Task("speed", command, out / SPEED, out / "logs" / "speed.log")


def _text(demo: Demo, budgets: Budgets) -> Task:
    out = demo.out
    command = [
        "python",
        "-m",
        "branchmix.data.installed",
        str(out / "text"),
        str(budgets.enough_bytes),
        str(demo.cores),
    ]
    return Task("text", command, out / TEXT, out / "logs" / "text.log")


def _seed(demo: Demo) -> Task:
    file = str(demo.out / "seed.yaml")
    processes = demo.speed.seed_processes
    command = ["branchmix", "train", file]
    env = {"OMP_NUM_THREADS": str(1 if processes > 1 else demo.cores)}
    if processes > 1:
        command = ["torchrun", "--standalone", "--nproc-per-node", str(processes), "-m", *command]
    folder = demo.out / "seed"
    return Task("seed", command, folder / "training.json", folder / "log.txt", env, (("seed", folder),))


def _branch(demo: Demo) -> Task:
    out = demo.out
    runs = tuple((name, out / "experts" / name) for name in EXPERTS)
    command = ["branchmix", "branch", str(out / "branch.yaml")]
    return Task("branch", command, out / "experts" / "recipe.yaml", out / "logs" / "branch.log", runs=runs)


def _upcycle(demo: Demo, name: str) -> Task:
    out = demo.out
    folder = out / "upcycled" / name
    command = ["branchmix", "upcycle", str(out / "recipes" / f"{name}.yaml"), str(folder)]
    return Task(name, command, folder / "config.json", out / "logs" / f"upcycle-{name}.log")


def _mix(demo: Demo, name: str) -> Task:
    folder = demo.out / "trained" / name
    command = ["branchmix", "train", str(demo.out / f"mix-{name}.yaml")]
    return Task(name, command, folder / "training.json", folder / "log.txt", runs=((name, folder),))


def _measurements(demo: Demo) -> list[Task]:
    """A command for each core, with models that take about as long."""
    out, cost = demo.out, {"dense": demo.speed.dense, **{name: demo.speed.of(name) for name in MIXTURES}}

    def seconds(model: str) -> float:
        return next((cost[name] for name in MIXTURES if name in model), cost["dense"])

    shares: list[list[str]] = [[] for _ in range(min(demo.cores, 4))]
    for model in sorted(models(demo.budgets), key=seconds, reverse=True):
        min(shares, key=lambda share: sum(map(seconds, share))).append(model)
    tasks = []
    for number, share in enumerate(shares, start=1):
        missing = [model for model in share if not score_file(out, model).is_file()] or share[-1:]
        command = ["python", "-m", "branchmix.demo.measure", str(out), *missing]
        tasks.append(
            Task(f"scores {number}", command, score_file(out, share[-1]), out / "logs" / f"scores-{number}.log")
        )
    return tasks


def _routes(demo: Demo) -> list[Task]:
    """Which expert each held-out token uses; a page for each mixture, beside the demo's."""
    out, tasks = demo.out, []
    for run in ROUTED:
        page = out / routes_page(run)
        command = ["branchmix", "routes", str(out / "trained" / run), "--data", str(out / f"mix-{run}.yaml")]
        command += ["--max-length", str(demo.scale.sequence_length)]
        command += ["--out", str(routing_file(out, run)), "--html", str(page), "--force"]
        tasks.append(Task(f"routes {run}", command, page, out / "logs" / f"routes-{run}.log"))
    return tasks


# ---------------------------------------------------------------------------------------------------------------------
# Running them
# ---------------------------------------------------------------------------------------------------------------------


def _run_tasks(demo: Demo, tasks: list[Task], at_once: int, say: Callable[[str], None]) -> None:
    """All that are not done, so many side by side; what they took is noted."""
    tasks = [task for task in tasks if not task.done.is_file()]
    for task in tasks:
        say(f"$ {shlex.join(task.command)}")
    if not tasks:
        say("done before")
        return
    env = {
        "OMP_NUM_THREADS": str(max(1, demo.cores // at_once)),
        "BRANCHMIX_CACHE": str((demo.out / "cache").absolute()),
        "HF_HUB_OFFLINE": "1",
        # On the CPU everywhere: it was calibrated there, and models as small as these are slow on a GPU.
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if tasks[0].name == "branch":
        env["OMP_NUM_THREADS"] = "1"
    outcome = run_processes([task.job(env) for task in tasks], at_once, watch=_Watch(tasks, say))
    _note(demo, tasks, outcome.jobs)
    if outcome.stopped_by is not None:
        raise DemoStoppedError(outcome.stopped_by)
    failed = [state for state in outcome.jobs if state.status != "done"]
    if failed:
        lines = [f"{state.job.name}: {state.reason} (its output: {state.job.log})" for state in failed]
        raise DemoError("\n".join(lines))


def _note(demo: Demo, tasks: list[Task], states: Iterable[JobState]) -> None:
    """Seconds of each command, those of earlier attempts included."""
    file = demo.out / STEPS
    steps = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for task, state in zip(tasks, states, strict=True):
        before = steps.get(task.name, {"seconds": 0.0})["seconds"]
        steps[task.name] = {"command": shlex.join(task.command), "seconds": round(before + state.seconds, 2)}
    _write(file, steps)


def _wall_seconds(demo: Demo, seconds: float) -> float:
    """Of all calls together."""
    file = demo.out / DEMO
    content = json.loads(file.read_text(encoding="utf-8"))
    content["seconds"] = content.get("seconds", 0.0) + seconds
    _write(file, content)
    return float(content["seconds"])


class _Watch:
    """Says when a command is done, and how far the runs are every so many seconds."""

    def __init__(self, tasks: list[Task], say: Callable[[str], None]):
        self.tasks = {task.name: task for task in tasks}
        self.say = say
        self.said: set[str] = set()
        self.next = time.monotonic() + _SECONDS_BETWEEN_LINES

    def __call__(self, states: list[JobState]) -> None:
        for state in states:
            if state.status in ("done", "failed") and state.job.name not in self.said:
                self.said.add(state.job.name)
                what = "done" if state.status == "done" else "FAILED"
                self.say(f"  {state.job.name}: {what} after {duration(state.seconds)}")
        if time.monotonic() < self.next:
            return
        self.next = time.monotonic() + _SECONDS_BETWEEN_LINES
        running = [self.tasks[state.job.name] for state in states if state.status == "running"]
        parts = [text for task in running for name, folder in task.runs if (text := _progress(name, folder))]
        if parts:
            self.say(f"  {'; '.join(parts)}")


def _progress(name: str, folder: Path) -> str:
    metrics = last_metrics(folder)
    if (folder / "training.json").is_file() or "step" not in metrics or "loss" not in metrics:
        return ""
    rate = f", {metrics['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in metrics else ""
    return f"{name}: step {metrics['step']}, loss {metrics['loss']:.2f}{rate}"


def how_to_go_on(out: Path) -> str:
    """The command that continues a demo."""
    return f"branchmix demo --out {shlex.quote(os.fspath(out))}"

"""Steps of a study, in a process of their own: ``python -m branchmix.study.step OUT NAME ...``.

Reads OUT/plan.json, which ``scheduler`` has written, and leaves ``result.json`` in the step's folder when it is done:
small, and all that reports need. A step that was killed is started again; training resumes from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from branchmix.checkpoint.folder import write_text
from branchmix.checkpoint.hub import ResolvedModel, resolve
from branchmix.data import installed
from branchmix.data.config import EvalData, Source
from branchmix.errors import BranchMixError
from branchmix.recipe import Recipe
from branchmix.study.folder import MODEL, PAGE, PLAN, RESULT, STEPS, TEXT, rounded, write_record
from branchmix.study.graph import Step
from branchmix.study.models import DATA
from branchmix.study.settings import SEED, InstalledText, StudyFile
from branchmix.train.config import RunConfig
from branchmix.train.run_folder import is_main_process

CURVE_POINTS = 60
"""Points of a training run's loss curve."""
SMOOTHED = 8
"""Points of a loss curve that are averaged, those before it: no point knows what comes after it."""


@dataclass
class StepStoppedError(Exception):
    """A signal came."""

    signal: int


def do(out: Path, name: str) -> None:
    """Do a step; whatever an earlier attempt has left is used.

    Raises:
        BranchMixError: it cannot be done.
        StepStoppedError: it was stopped on the way.
    """
    work = _Work(out.absolute(), name)
    work.folder.mkdir(parents=True, exist_ok=True)
    result = getattr(work, work.step.kind)()
    if is_main_process():
        write_record(work.folder / RESULT, {"step": name, **work.step.summary(), **result})


class _Work:
    """A step with what it needs; a method for each kind of step returns the step's part of its record."""

    def __init__(self, out: Path, name: str):
        plan = json.loads((out / PLAN).read_text(encoding="utf-8"))
        self.steps = TypeAdapter(dict[str, Step]).validate_python(plan["steps"])
        self.base = Path(plan["base"])
        self.study: StudyFile = StudyFile.model_validate(plan["settings"])
        self.step = self.steps[name]
        self.out = out
        self.folder = self.folder_of(name)

    def folder_of(self, name: str) -> Path:
        return self.out / STEPS / self.steps[name].folder

    def model_of(self, name: str | None) -> Path:
        """The folder of the model that a step makes; that of the given seed for None."""
        return self.folder_of(name) / MODEL if name is not None else self.given().folder.absolute()

    def given(self) -> ResolvedModel:
        """The seed, if it is not trained here."""
        assert isinstance(self.study.seed, str)
        return resolve(self.study.seed, self.base)

    def written(self, name: str | None) -> str:
        """``model_of`` as files have it: a path from this step's folder; the given seed's Hub id or absolute folder."""
        if name is not None:
            return os.path.relpath(self.model_of(name), self.folder)
        return self.given().given if self.given().revision else str(self.model_of(None))

    def members(self) -> dict[str, Path]:
        """Folders of several models by name, the seed first."""
        of_steps = self.step.needs.members
        return {SEED: self.model_of(of_steps.get(SEED))} | {name: self.model_of(of_steps[name]) for name in of_steps}

    def sources(self) -> dict[str, Source]:
        """Domains by name, with paths from this step's folder where the study made the text, else absolute ones."""
        if self.step.needs.text is not None:
            text = Path(os.path.relpath(self.folder_of(self.step.needs.text) / TEXT, self.folder))
            return {name: Source(files=str(text / f"{name}.jsonl")) for name in self.study.domains}
        assert not isinstance(self.study.data, InstalledText)
        return {name: source.absolute(self.base, out=self.out) for name, source in self.study.data.items()}

    def sources_as_json(self) -> dict[str, Any]:
        sources = self.sources().items()
        return {name: source.model_dump(mode="json", exclude_none=True, exclude_unset=True) for name, source in sources}

    def held_out(self) -> Any:
        from branchmix.study.measure import HeldOutText

        return HeldOutText(self.study, self.sources(), self.folder)

    def write_yaml(self, name: str, command: str, content: dict[str, Any]) -> Path:
        """A file with which the step can be repeated by hand."""
        file = self.folder / name
        text = yaml.safe_dump(content, sort_keys=False)
        write_text(file, f"# A step of a study. By hand: branchmix {command}\n\n{text}")
        return file

    def write_data(self, command: str) -> Path:
        """The study's text and what it holds out, as commands take it."""
        content = {"data": self.sources_as_json(), "held_out": self.study.held_out.model_dump()}
        return self.write_yaml(DATA, command, content)

    # ---- kinds ----

    def text(self) -> dict[str, Any]:
        """Text that is installed."""
        data = self.study.data
        assert isinstance(data, InstalledText)
        extracts = installed.write(
            self.folder / TEXT,
            enough_bytes=data.installed,
            processes=max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))),
            domains=data.domains,
            max_chars=data.max_chars,
        )
        sizes = {n: {"documents": e.documents, "characters": e.chars, "bytes": e.bytes} for n, e in extracts.items()}
        return {"text": sizes}

    def train(self) -> dict[str, Any]:
        """A training run; ``run.yaml`` stays beside its result."""
        from branchmix.study.measure import distance
        from branchmix.train import train
        from branchmix.train.schedule import optimizer_flops

        run, needed = dict(self.step.run), self.step.needs.model
        is_given = "model" not in run and needed is None
        if "model" not in run:
            run["model"] = self.written(needed)
        run |= {
            "out": MODEL,
            "data": self.sources_as_json(),
            "evaluation": {"at_start": False},
            "logging": {"steps": max(1, self.step.cost.steps // CURVE_POINTS)},
        }
        report = train(RunConfig.load(self.write_yaml("run.yaml", "train run.yaml", run)))
        if report.status == "stopped":
            raise StepStoppedError(report.signal or 2)
        if not is_main_process():
            return {}
        record = report.record
        clips = run["optimizer"]["max_grad_norm"] > 0
        training = {
            **{key: record[key] for key in ("steps", "tokens", "flops", "seconds", "peak_learning_rate")},
            "optimizer_flops": int(record["steps"] * optimizer_flops(record["model"]["trained"], clips=clips)),
            "domains": record["domains"],
            "curve": _curve(self.folder / MODEL / "metrics.jsonl"),
            "text": record["data"]["domains"],
            "resumed": len(record["resumed"]),
            **{key: record[key] for key in ("started", "ended")},
        }
        if self.step.about.role == "expert":
            training["from_seed"] = rounded(distance(self.folder / MODEL, self.model_of(needed)))
        seed = {"model": self.study.seed} if is_given else {}  # results travel: no path of this machine
        return {
            "training": training,
            **{key: record[key] for key in ("model", "computing")},
            "machine": {**record["machine"], "cpu": _cpu_name()},
            "versions": record["versions"],
            "run": {**{key: value for key, value in run.items() if key not in ("data", "out")}, **seed},
        }

    def upcycle(self) -> dict[str, Any]:
        """A merge; ``recipe.yaml`` stays beside it."""
        from branchmix.upcycling import upcycle

        out, trusted, defaults = self.folder / MODEL, self.study.trust_remote_code, Recipe.model_fields
        experts = {name: step for name, step in self.step.needs.members.items() if name != SEED}
        recipe = {
            "seed": self.written(self.step.needs.members.get(SEED)),
            "experts": [{"name": name, "model": self.written(step)} for name, step in experts.items()],
            **{key: value for key, value in self.step.recipe.items() if value != defaults[key].get_default()},
        }
        command = "upcycle recipe.yaml MIXTURE" + " --trust-remote-code" * trusted
        if recipe.get("gates") or recipe.get("routing", {}).get("domains"):
            self.write_data(command)
        file = self.write_yaml("recipe.yaml", command, _without_none(recipe))
        report = upcycle(file, out, force=out.exists(), trust_remote_code=trusted)
        print(f"merged in {report.seconds:.1f} s", file=sys.stderr)
        merge = {"seconds": round(report.seconds, 3), "recipe": self.step.recipe, "experts": list(experts)}
        if report.gates is not None:
            merge["gates"] = rounded(report.gates.as_dict())
        return {"merge": merge}

    def scores(self) -> dict[str, Any]:
        """A model on every domain."""
        return self.held_out().measure(self.model_of(self.step.needs.model))

    def forced(self) -> dict[str, Any]:
        """A mixture on every domain, with all gates forced to that domain's best expert.

        That is the expert of the domain's name; where there is none, that of the least loss on text that was not held
        out.
        """
        made = self.model_of(self.step.needs.model)
        record = json.loads((made.parent / RESULT).read_text(encoding="utf-8"))
        losses = {domain["name"]: domain["forced"] for domain in record["merge"]["gates"]["domains"]}
        experts = {name: name if name in of_one else min(of_one, key=of_one.get) for name, of_one in losses.items()}
        return {**self.held_out().measure_forced(made, experts), "forced": experts}

    def ensemble(self) -> dict[str, Any]:
        """All dense models together."""
        return self.held_out().measure_ensemble([*self.members().values()])

    def routes(self) -> dict[str, Any]:
        """Which expert each held-out token of a mixture uses: numbers, and a page beside them."""
        from branchmix.evaluate.routing.routes import routes
        from branchmix.evaluate.routing.token_page import html

        routed = routes(
            str(self.model_of(self.step.needs.model)),
            data=EvalData.load(self.write_data("routes MIXTURE --data data.yaml")),
            max_length=self.study.sequence_length,
            trust_remote_code=self.study.trust_remote_code,
        )
        routed = replace(routed, report=replace(routed.report, model=self.step.about.full_label))
        write_text(self.folder / PAGE, html(routed))
        numbers = routed.report.as_dict()
        for layer in (*numbers.get("attention", []), *numbers.get("ffn", [])):
            layer.pop("typical")  # it is on the page
        return {"routes": rounded(numbers)}

    def inference(self) -> dict[str, Any]:
        """Latency and memory of all merges, and of the seed."""
        from branchmix.study.measure import measure_inference
        from branchmix.train.measure import versions

        study = self.study
        assert study.inference is not None
        measured = measure_inference(self.members(), study.inference, trust_remote_code=study.trust_remote_code)
        return {"inference": measured, "machine": {"cpu": _cpu_name(), "cores": os.cpu_count()}, "versions": versions()}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return value


def _curve(metrics: Path) -> list[dict[str, float]]:
    """Training loss over tokens and FLOPs: the mean over domains of the last few points of each.

    A batch has more of one domain and less of another, which would be most of what moves its own mean.
    """
    recent: dict[str, list[float]] = {}
    points = []
    for row in map(json.loads, metrics.read_text(encoding="utf-8").splitlines()):
        if "loss" not in row:
            continue
        for name, value in row.items():
            if name.startswith("loss/"):
                recent[name] = [*recent.get(name, [])[1 - SMOOTHED :], value]
        loss = sum(sum(values) / len(values) for values in recent.values()) / len(recent)
        points.append({**{key: row[key] for key in ("step", "tokens", "flops")}, "loss": round(loss, 5)})
    return points


def _cpu_name() -> str:
    """The processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main(out: Path, names: list[str]) -> int:
    """Exit code: 0; 2 if the input is wrong; 128 and the signal's number after one."""
    from branchmix.train.models import keep_freed_memory

    if threads := os.environ.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(threads))
        keep_freed_memory()
    try:
        for name in names if is_main_process() else names[:1]:
            do(out, name)
    except BranchMixError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except StepStoppedError as stop:
        return 128 + stop.signal
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))

"""Steps of a study, in a process of their own: ``python -m branchmix.study.step OUT NAME ...``.

Reads OUT/plan.json, which ``run`` has written, and leaves ``result.json`` in the step's folder when it is done: small,
and all that reports need. A step that was killed is started again; training goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from branchmix.checkpoint.folder import write_text
from branchmix.data.config import HeldOut, Source
from branchmix.errors import BranchMixError
from branchmix.study.graph import CURVE_POINTS, About, relative
from branchmix.study.labels import label_of
from branchmix.study.records import MODEL, PAGE, PLAN, RESULT, TEXT, cpu_name, curve, write_record


class StepStoppedError(Exception):
    """A signal came.

    Attributes:
        signal: its number.
    """

    def __init__(self, signal: int):
        super().__init__(signal)
        self.signal = signal


def do(out: Path, name: str) -> None:
    """Do a step; whatever it has left of an earlier attempt is gone on with.

    Raises:
        BranchMixError: it cannot be done.
        StepStoppedError: it was stopped on the way.
    """
    plan = json.loads((out / PLAN).read_text(encoding="utf-8"))
    work = _Work(out.absolute(), plan, name)
    work.folder.mkdir(parents=True, exist_ok=True)
    result = getattr(work, work.step["kind"])()
    if _is_main():
        of_plan = {part: work.step[part] for part in ("kind", "key", "about")}
        write_record(work.folder / RESULT, {"step": name, **of_plan, **result})


def _is_main() -> bool:
    """Whether this process is the first of those that share a training run."""
    return os.environ.get("RANK", "0") == "0"


class _Work:
    """A step with what it needs."""

    def __init__(self, out: Path, plan: dict[str, Any], name: str):
        self.steps, self.settings, self.base = plan["steps"], plan["settings"], Path(plan["base"])
        self.step = self.steps[name]
        self.options = self.step["options"]
        self.out = out
        self.folder = self.folder_of(name)

    def folder_of(self, name: str) -> Path:
        return self.out / "steps" / self.steps[name]["folder"]

    def needed(self, role: str) -> Path:
        """The folder of a step that this one needs."""
        return self.folder_of(self.step["needs"][role])

    def model(self, role: str = "model") -> Path:
        """The folder of a model that this step starts from; a seed that is not trained here if no step makes it."""
        if role in self.step["needs"]:
            return self.needed(role) / MODEL
        from branchmix.checkpoint.hub import resolve

        return resolve(self.settings["seed"], self.base).folder.absolute()

    def sources(self) -> dict[str, dict[str, Any]]:
        """Domains by name, with paths from this step's folder where the study made the text, else absolute ones."""
        if "text" in self.step["needs"]:
            text = self.needed("text") / TEXT
            files = {name: text / f"{name}.jsonl" for name in self.settings["data"]["domains"]}
            return {name: {"files": relative(file, self.folder)} for name, file in files.items()}
        sources = {name: Source(**source) for name, source in self.settings["data"].items()}
        return {
            name: source.absolute(self.base, out=self.out).model_dump(mode="json", exclude_none=True)
            for name, source in sources.items()
        }

    # ---- kinds ----

    def text(self) -> dict[str, Any]:
        """Text that is installed."""
        from branchmix.data import installed

        options = self.options
        part = self.folder / f".{TEXT}.part"
        shutil.rmtree(part, ignore_errors=True)
        extracts = installed.write(
            part,
            enough_bytes=options["installed"],
            processes=max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))),
            domains=options["domains"],
            max_chars=options["max_chars"],
        )
        shutil.rmtree(self.folder / TEXT, ignore_errors=True)
        part.rename(self.folder / TEXT)
        sizes = {
            name: {"documents": e.documents, "characters": e.chars, "bytes": e.bytes} for name, e in extracts.items()
        }
        for name, size in sizes.items():
            print(f"{name:8} {size['documents']:6,} documents {size['characters']:12,} characters", file=sys.stderr)
        return {"text": sizes}

    def train(self) -> dict[str, Any]:
        """A training run; ``run.yaml`` stays beside its result."""
        import yaml

        from branchmix.train import train
        from branchmix.train.config import RunConfig

        run = dict(self.options["run"])
        of_a_step = "model" in self.step["needs"]
        is_given = "model" not in run and not of_a_step
        if "model" not in run:
            run["model"] = relative(self.model(), self.folder) if of_a_step else self._given()
        if clock := run.pop("minutes_of", None):
            record = json.loads((self.needed(clock) / RESULT).read_text(encoding="utf-8"))
            run["budget"] = {"training_minutes": record["training"]["seconds"] / 60}
        run |= {
            "out": MODEL,
            "data": self.sources(),
            "evaluation": {"at_start": False},
            "logging": {"steps": max(1, self.step["cost"]["steps"] // CURVE_POINTS)},
        }
        file = self.folder / "run.yaml"
        text = f"# A step of a study. By hand: branchmix train {file.name}\n\n{yaml.safe_dump(run, sort_keys=False)}"
        write_text(file, text)
        report = train(RunConfig.load(file))
        if report.status == "stopped":
            raise StepStoppedError(report.signal or 2)
        if not report.is_main:
            return {}
        record = report.record
        return {
            "training": {
                **{key: record[key] for key in ("steps", "tokens", "flops", "seconds", "peak_learning_rate")},
                "optimizer_flops": self._optimizer_flops(record),
                "domains": record["domains"],
                "curve": curve(self.folder / MODEL),
                "text": record["data"]["domains"],
                "resumed": len(record["resumed"]),
                "started": record["started"],
                "ended": record["ended"],
            },
            "model": record["model"],
            "computing": record["computing"],
            "machine": {**record["machine"], "cpu": cpu_name()},
            "versions": record["versions"],
            "run": {
                **{key: value for key, value in run.items() if key not in ("data", "out")},
                **({"model": self.settings["seed"]} if is_given else {}),  # results travel: no path of this machine
            },
        }

    def _given(self) -> str:
        """As the study names its seed: a Hub id, or an absolute folder."""
        from branchmix.checkpoint.hub import resolve

        found = resolve(self.settings["seed"], self.base)
        return self.settings["seed"] if found.revision else str(found.folder.absolute())

    def _optimizer_flops(self, record: dict[str, Any]) -> int:
        from branchmix.train.schedule import optimizer_flops

        clips = self.options["run"]["optimizer"]["max_grad_norm"] > 0
        return int(record["steps"] * optimizer_flops(record["model"]["trained"], clips=clips))

    def upcycle(self) -> dict[str, Any]:
        """A merge; ``recipe.yaml`` stays beside it."""
        import yaml

        from branchmix.recipe import Recipe
        from branchmix.upcycling import upcycle

        out = self.folder / MODEL
        recipe = {
            "seed": relative(self.model("seed"), self.folder) if "seed" in self.step["needs"] else self._given(),
            "experts": [
                {"name": name, "model": relative(self.model(name), self.folder)} for name in self.options["experts"]
            ],
            **self.options["recipe"],
        }
        defaults = Recipe.model_fields
        recipe = {
            key: value
            for key, value in recipe.items()
            if key in ("seed", "experts") or value != defaults[key].get_default()
        }
        file = self.folder / "recipe.yaml"
        text = f"# A step of a study. By hand: branchmix upcycle {file.name} MIXTURE\n\n"
        file.write_text(text + yaml.safe_dump(_without_none(recipe), sort_keys=False), encoding="utf-8")
        report = upcycle(file, out, force=out.exists())
        print(f"merged in {report.seconds:.1f} s", file=sys.stderr)
        return {
            "merge": {
                "seconds": round(report.seconds, 3),
                "recipe": self.options["recipe"],
                "experts": self.options["experts"],
            }
        }

    def scores(self) -> dict[str, Any]:
        """A model on every domain."""
        from branchmix.study.measure import measure

        found = measure(self.model(), self._sources(), **self._evaluation())
        return self._scored(found)

    def ensemble(self) -> dict[str, Any]:
        """All dense models together."""
        from branchmix.study.measure import measure_ensemble

        models = [self.model(name) for name in self.options["members"]]
        return self._scored(measure_ensemble(models, self._sources(), **self._evaluation()))

    def routes(self) -> dict[str, Any]:
        """Which expert each held-out token of a mixture uses: numbers, and a page beside them."""
        import yaml

        from branchmix.data.evaluation import EvalData
        from branchmix.evaluate.routing.page import write
        from branchmix.evaluate.routing.run import routes

        file = self.folder / "data.yaml"
        content = {"data": self.sources(), "held_out": self.options["held_out"]}
        text = f"# A step of a study. By hand: branchmix routes MIXTURE --data {file.name}\n\n"
        write_text(file, text + yaml.safe_dump(content, sort_keys=False))
        found = routes(
            str(self.model()),
            data=EvalData.load(file),
            max_length=self.options["max_length"],
            trust_remote_code=self.settings["trust_remote_code"],
        )
        found = replace(found, report=replace(found.report, model=label_of(About.of(self.step["about"]))))
        write(found, self.folder / PAGE)
        numbers = found.report.as_dict()
        for layer in (*numbers.get("attention", []), *numbers.get("ffn", [])):
            layer.pop("typical")  # it is on the page
        return {"routes": _rounded(numbers)}

    def inference(self) -> dict[str, Any]:
        """Latency and memory of all merges, and of the seed."""
        from branchmix.study.inference import measure_inference
        from branchmix.train.record import versions

        options = self.options
        roles = [role for role in self.step["needs"] if role != "seed"]
        models = {"seed": self.model("seed"), **{role: self.model(role) for role in roles}}
        numbers = {name: options[name] for name in ("prompt", "new_tokens", "runs")}
        found = measure_inference(models, **numbers, trust_remote_code=self.settings["trust_remote_code"])
        return {"inference": found, "machine": {"cpu": cpu_name(), "cores": os.cpu_count()}, "versions": versions()}

    def _sources(self) -> dict[str, Source]:
        return {name: Source(**source) for name, source in self.sources().items()}

    def _evaluation(self) -> dict[str, Any]:
        options = self.options
        precision = options.get("precision", "auto")
        return {
            "folder": self.folder,
            "held_out": HeldOut(**options["held_out"]),
            "max_length": options["max_length"],
            "bf16": None if precision == "auto" else precision == "bf16",
            "trust_remote_code": self.settings["trust_remote_code"],
        }

    def _scored(self, found: dict[str, Any]) -> dict[str, Any]:
        documents = {
            domain: [[round(nats, 3), int(tokens), int(size)] for nats, tokens, size in rows]
            for domain, rows in found["domains"].items()
        }
        return {
            "documents": documents,
            "routing": _rounded(found["routing"]),
        }


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return value


def _rounded(value: Any) -> Any:
    """Floats to four digits, at any depth."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return value


def main(out: Path, names: list[str]) -> int:
    """Exit code: 0; 2 if the input is wrong; 128 and the signal's number after one."""
    from branchmix.train.memory import keep_freed_memory

    threads = os.environ.get("OMP_NUM_THREADS")
    if threads:
        import torch

        torch.set_num_threads(int(threads))
        keep_freed_memory()
    try:
        for name in names if _is_main() else names[:1]:
            do(out, name)
    except BranchMixError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except StepStoppedError as stop:
        return 128 + stop.signal
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))

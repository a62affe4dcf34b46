"""The folder of a study: its plan, what its steps leave, its small results, and the lock while it runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from branchmix.checkpoint.folder import in_order_of_removal, locked, write_json, write_text, writing
from branchmix.errors import OutputError
from branchmix.study.graph import SCORES, Graph, Step
from branchmix.study.models import facts_of
from branchmix.study.settings import StudyFile

PLAN, RESULT, PAGE = "plan.json", "result.json", "routes.html"
MODEL, TEXT, STEPS = "model", "text", "steps"
RESULTS, STUDY = "results", "study.json"
_LOCK = ".lock"


def write_record(file: Path, content: dict[str, Any]) -> None:
    """One key per line, with all that is below it on that line: small, and still readable in a diff."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in content.items()]
    write_text(file, "{\n" + ",\n".join(lines) + "\n}\n")


def rounded(value: Any) -> Any:
    """As JSON has it, with floats to four digits at any depth."""
    return json.loads(json.dumps(value), parse_float=lambda number: round(float(number), 4))


def write_plan(config: StudyFile, graph: Graph, out: Path) -> None:
    """``plan.json``, which steps read, and ``results/study.json``, which reports read."""
    settings = config.model_dump(mode="json")
    steps = {name: asdict(step) for name, step in graph.steps.items()}
    write_json(out / PLAN, {"settings": settings, "base": str(config.folder.absolute()), "steps": steps})
    small: dict[str, Any] = {"settings": settings}
    for name, step in graph.steps.items():
        small[f"step {name}"] = {**step.summary(), "needs": step.needs.by_role(), "cost": asdict(step.cost)}
        if step.kind in SCORES:
            small[f"step {name}"]["facts"] = facts_of(step.config, config.sequence_length)
    write_record(out / RESULTS / STUDY, small)


def is_done(out: Path, step: Step) -> bool:
    """Whether a step has left its result."""
    return (out / STEPS / step.folder / RESULT).is_file()


def require_own_folder(out: Path) -> None:
    """Raises OutputError if ``out`` exists and is not the folder of a study."""
    others = [file for file in out.iterdir() if file.name != _LOCK] if out.is_dir() else out.exists()
    if others and not (out / PLAN).is_file():
        raise OutputError(f"{out}: exists, and is not the folder of a study: choose another")


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """While a study runs in its folder: another one is refused. The system ends it with the process."""
    require_own_folder(out)
    with locked(out / _LOCK, wait=0) as held:
        if not held:
            raise OutputError(f"{out}: another process runs this study: wait for its end, or choose another folder")
        yield


class StudyFolder:
    """What is on the disk, and what may go."""

    def __init__(self, out: Path, graph: Graph, config: StudyFile):
        self.out, self.graph, self.config = out, graph, config
        self.copied: set[str] = set()

    def todo(self, wanted: Sequence[Step]) -> list[Step]:
        """Steps that are not done, and those that are, but whose weights are gone and needed again."""
        todo = {step.name for step in wanted if not is_done(self.out, step)}
        for step in reversed(self.graph.steps.values()):  # each comes after all that it needs
            if step.name in todo:
                todo |= {name for name in step.needs.names if not self._can_be_used(self.graph.steps[name])}
        return [step for step in self.graph.steps.values() if step.name in todo]

    def _can_be_used(self, step: Step) -> bool:
        folder, makes_model = self.out / STEPS / step.folder, step.kind in ("train", "upcycle")
        return is_done(self.out, step) and (not makes_model or (folder / MODEL / "config.json").is_file())

    def collect(self) -> None:
        """``results/``: those of the current graph, and no others."""
        results = self.out / RESULTS
        with writing(results):
            for file in results.iterdir():
                step = self.graph.steps.get(file.stem)
                if file.name != STUDY and file.suffix in (".json", ".html") and not (step and is_done(self.out, step)):
                    file.unlink()
            for step in self.graph.steps.values():
                if step.name not in self.copied and is_done(self.out, step):
                    for file in (self.out / STEPS / step.folder / made for made in (PAGE, RESULT)):
                        if file.is_file():
                            write_text(results / f"{step.name}{file.suffix}", file.read_text(encoding="utf-8"))
                    self.copied.add(step.name)
        if self.config.keep == "results":
            self._make_room()

    def _make_room(self) -> None:
        """Removes weights of merges and mixtures that nothing waits for."""
        steps = self.graph.steps.values()
        for step in steps:
            later = [one for one in steps if step.name in one.needs.names]
            if step.may_go and all(is_done(self.out, one) for one in (step, *later)):
                for entry in in_order_of_removal((self.out / STEPS / step.folder / MODEL).glob("*")):
                    if entry.name != "log.txt":
                        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

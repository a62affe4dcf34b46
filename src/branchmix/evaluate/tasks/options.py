"""Which downstream tasks, and how; and the groups of tasks that the BAM paper reports, as named suites. No lm-eval."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from branchmix.errors import RecipeError
from branchmix.settings import read_yaml

EVERYTHING = "bam"
SUITES: dict[str, dict[str, Any]] = read_yaml(Path(__file__).with_name("suites.yaml"))
"""In the order of the columns of the paper's Table 3; ``bam`` is all of them."""


@dataclass(frozen=True)
class TaskOptions:
    """Tasks by name, and where they and their data sets come from."""

    names: tuple[str, ...]
    """lm-eval's tasks, groups, tags, wildcards and YAML files, and suites (see ``SUITES``)."""
    num_fewshot: int | None = None
    """Examples in the prompt, instead of what task or suite say; tasks that are fixed at 0 stay so, as in lm-eval."""
    include_path: tuple[Path, ...] = ()
    """Folders of further task files in lm-eval's format; they go before lm-eval's own tasks of the same name."""
    task_data: Path | None = None
    """Folder of data sets that are used instead of the Hub's, as ``ORG/NAME`` or ``NAME`` in it."""
    allow_code_execution: bool = False
    """Run the code that models write for code tasks."""

    @property
    def suites(self) -> dict[str, dict[str, Any]]:
        """The suites among the names."""
        return {name: suite for name, suite in SUITES.items() if {name, EVERYTHING} & {*self.names}}

    def check(self) -> None:
        """Whether this can be meant, without reading a task.

        Raises:
            RecipeError: it cannot, or lm-eval is not installed.
        """
        if not self.names or not all(self.names):
            raise RecipeError("tasks: give names, such as --tasks arc_easy,hellaswag")
        if find_spec("lm_eval") is None:
            raise RecipeError("tasks: lm-eval is not installed: pip install 'branchmix[tasks]'")
        chosen = {*self.names, *(member["task"] for suite in self.suites.values() for member in suite["members"])}
        run_code = [m["task"] for suite in SUITES.values() for m in suite["members"] if m.get("runs_code")]
        if unsafe := [task for task in run_code if task in chosen]:
            self.refuse_code(unsafe)
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise RecipeError(f"num_fewshot: {self.num_fewshot} should be 0 or more")
        for folder in (*self.include_path, *([self.task_data] if self.task_data else [])):
            if not folder.is_dir():
                raise RecipeError(f"{folder}: there is no such folder")

    def refuse_code(self, names: Iterable[str]) -> None:
        """A RecipeError for tasks that run code, unless they may."""
        if not self.allow_code_execution:
            raise RecipeError(
                f"tasks: {', '.join(names)}: would run code that the model writes: allow it with "
                "--allow-code-execution, best in a container without network"
            )

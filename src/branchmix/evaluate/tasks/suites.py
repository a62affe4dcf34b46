"""The groups of tasks that the BAM paper reports, as named suites; ``suites.yaml`` has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from branchmix.settings import read_yaml


@dataclass(frozen=True)
class SuiteTask:
    """A task of a suite."""

    task: str
    num_fewshot: int
    metric: str
    """The one that counts for the suite, as ``TaskScore.metrics`` has it."""
    runs_code: bool = False


@dataclass(frozen=True)
class Suite:
    """Tasks whose mean is one column of the paper's Table 3."""

    title: str
    members: tuple[SuiteTask, ...]


EVERYTHING = "bam"
SUITES: dict[str, Suite] = {
    name: Suite(suite["title"], tuple(SuiteTask(**member) for member in suite["members"]))
    for name, suite in read_yaml(Path(__file__).with_suffix(".yaml")).items()
}
"""In the order of the paper's columns; ``bam`` is all of them."""


def chosen_suites(names: tuple[str, ...]) -> dict[str, Suite]:
    """The suites among ``names``."""
    wanted = set(SUITES) if EVERYTHING in names else {name for name in names if name in SUITES}
    return {name: suite for name, suite in SUITES.items() if name in wanted}

"""How the steps of a study share this machine: how many run side by side, with how many threads or processes."""

from __future__ import annotations

from branchmix.study.graph import Graph, Step, has_routers
from branchmix.study.settings import StudyFile
from branchmix.train.launch import cores, gpus, share_machine

MOST_PROCESSES = 8
"""That share a training run, or measure the speed of this machine."""


def side_by_side(config: StudyFile, num_steps: int) -> tuple[int, int, list[dict[str, str]]]:
    """Steps at a time, threads of each, and the environments of their places."""
    at_once, threads, places = share_machine(config.at_once, config.threads, num_steps)
    return at_once, threads or cores(), places


def processes_of(config: StudyFile, graph: Graph, step: Step) -> int:
    """How many processes share a step on CPUs: as many as there are cores where no other step can run beside it.

    A mixture's balance loss is that of each process's share of a batch, so mixtures are trained by one.
    """
    count = min(cores(), MOST_PROCESSES)
    related = {other.name for other in graph.with_needs([step.name])}
    related |= {other.name for other in graph.steps.values() if step in graph.with_needs([other.name])}
    if len(related) < len(graph.steps) or config.threads is not None or gpus():
        return 1
    if step.kind == "text":
        return count
    if step.kind != "train" or has_routers(step.config):
        return 1
    micro = config.micro_batch_size or 1
    return max(n for n in range(1, count + 1) if config.batch_size % (n * micro) == 0)

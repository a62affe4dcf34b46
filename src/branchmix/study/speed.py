"""How fast this machine trains: some seconds of forward and backward passes on random tokens.

As many processes measure as steps will run side by side: a core is slower when its neighbours work too.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from queue import Empty
from typing import Any

from branchmix.errors import BranchMixError
from branchmix.study.models import Config, new_model
from branchmix.study.settings import StudyFile
from branchmix.train.models import Computing, attention_options


@dataclass(frozen=True)
class Speed:
    """What was measured, with all processes at work; the slowest of them counts."""

    start: float
    """Seconds until a process has imported everything."""
    steps: dict[str, float]
    """Seconds of a training step, by the model's config as JSON."""

    def step(self, config: Config) -> float:
        return self.steps[kind_of(config)]


def kind_of(config: Config) -> str:
    """Models of one kind are equally fast."""
    return json.dumps(config, sort_keys=True)


def measure_speed(study: StudyFile, configs: Iterable[Config], *, processes: int, threads: int) -> Speed:
    """Trains a model of each kind for some steps, in ``processes`` at once, with ``threads`` each.

    A process that fails is a BranchMixError.
    """
    kinds = sorted({kind_of(config) for config in configs})
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(processes), context.Queue()
    shared = (study.model_dump(mode="json"), kinds, threads, time.time(), barrier, queue)
    workers = [context.Process(target=_measure, args=shared, daemon=True) for _ in range(processes)]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C ends this process, and it ends them
    for worker in workers:
        worker.start()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    measured: list[Speed] = []
    try:
        while len(measured) < processes:
            try:
                measured.append(queue.get(timeout=0.5))
            except Empty:
                if any(worker.exitcode for worker in workers):
                    raise BranchMixError(
                        "the speed of this machine could not be measured: a process ended early, see above; a script "
                        "that does this needs its calls below `if __name__ == '__main__':`"
                    ) from None
    finally:
        for worker in workers:
            worker.terminate()
    return Speed(max(one.start for one in measured), {kind: max(one.steps[kind] for one in measured) for kind in kinds})


def _measure(settings: dict[str, Any], kinds: list[str], threads: int, begun: float, barrier: Any, queue: Any) -> None:
    """One of the processes; each kind is begun together with the others."""
    import torch

    from branchmix.train.measure import seconds_per_step
    from branchmix.train.models import keep_freed_memory

    try:
        torch.set_num_threads(threads)
        keep_freed_memory()  # as runs do: without it, half of a step can be page faults
        study = StudyFile.model_validate(settings)
        computing = Computing.of(study.precision)
        start, steps = 0.0, {}
        micro = study.micro_batch_size or study.batch_size
        options: dict[str, Any] = {"micro": micro, "accumulation": study.batch_size // micro}
        for kind in kinds:
            config = json.loads(kind)
            model = new_model(config, **attention_options(config["model_type"], computing, study.sequence_length))
            start = start or time.time() - begun  # the first model has imported the rest
            texts = _random_sequences(config, micro, study.sequence_length)
            barrier.wait()
            steps[kind] = seconds_per_step(model, texts, computing, packing="position_ids", **options)
        queue.put(Speed(start, steps))
    except BaseException:
        barrier.abort()  # the others would wait for ever
        raise


def _random_sequences(config: Config, count: int, length: int) -> list[dict[str, Any]]:
    """Sequences of two documents each."""
    import numpy as np

    from branchmix.data.sequences import packed

    vocabulary = int(config.get("seed_config", config)["vocab_size"])
    ids_BT = np.random.default_rng(0).integers(0, vocabulary, (count, length))
    return [packed(np.split(ids_T, [length // 2]), length) for ids_T in ids_BT]

"""What this machine can do in the time: speeds measured in seconds, and how many tokens each phase gets for them.

    python -m branchmix.demo.calibrate OUT        # reads OUT/demo.json, writes OUT/speed.json

As many processes as there are cores train random tokens side by side with one thread each, as the runs later will: a
core is slower when its neighbours work too.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from branchmix.demo.settings import EXPERTS, MIXTURES, ROUTED, Budgets, Scale, mixture_runs, training_flops
from branchmix.study.speed import new_model, seconds_per_step
from branchmix.train.models import Computing

KINDS = ("dense", *MIXTURES)
MARGIN = 0.9
"""Share of the time that is planned: machines are not always as fast as in their first seconds."""
BYTES_PER_TOKEN = 3.6
"""Of a vocabulary of some thousand; enough text for a token budget is estimated with it."""
TEXT_SECONDS = 25.0
COMMAND_SECONDS = 2.5
"""Over the time that imports take: reading data, writing the model."""


@dataclass(frozen=True)
class Speed:
    """Seconds for a token of training, one thread of several that all work."""

    dense: float
    btx: float
    bam_shared_kv: float
    bam_expert_kv: float
    cores: int
    start: float
    """Seconds until a command has imported everything."""
    one_process: float
    """Seconds for a token of the dense model in one process of all cores."""
    many_processes: float | None
    """The same in ``processes`` that exchange gradients; None where there is one core, or gloo does not work."""
    processes: int

    def of(self, kind: str) -> float:
        """By the name of a mixture, or ``dense``."""
        return float(getattr(self, kind.replace("-", "_")))

    @property
    def seed_processes(self) -> int:
        """How many train the seed: what was faster."""
        together = self.many_processes is not None and self.many_processes < self.one_process
        return self.processes if together else 1

    @property
    def seed(self) -> float:
        """Seconds for a token of the seed."""
        return min(self.one_process, self.many_processes or self.one_process)


# ---------------------------------------------------------------------------------------------------------------------
# From speeds to budgets
# ---------------------------------------------------------------------------------------------------------------------


def plan(speed: Speed, scale: Scale, minutes: float) -> Budgets:
    """The largest budgets of the scale's proportions whose estimated time is not above ``minutes``."""
    low, high = 0.0, 1.0
    while estimate(speed, scale, _budgets(scale, high, minutes)) < 60 * MARGIN * minutes:
        low, high = high, 2 * high
        if high > 1e4:
            break
    for _ in range(30):
        middle = (low + high) / 2
        if estimate(speed, scale, _budgets(scale, middle, minutes)) < 60 * MARGIN * minutes:
            low = middle
        else:
            high = middle
    return _budgets(scale, low, minutes)


def _budgets(scale: Scale, factor: float, minutes: float) -> Budgets:
    def whole_steps(tokens: float, fewest: int) -> int:
        return scale.step_tokens * max(fewest, round(factor * tokens / scale.step_tokens))

    seed = whole_steps(scale.seed_tokens, 10)
    expert, mixture = whole_steps(scale.expert_tokens, 5), whole_steps(scale.mixture_tokens, 5)
    most_of_a_domain = max(seed + 3 * expert // 10, expert) + mixture // 4
    return Budgets(
        seed=seed,
        expert=expert,
        mixture=mixture,
        held_out=min(32768, max(8192, seed // 48)),
        enough_bytes=int(1.2 * BYTES_PER_TOKEN * most_of_a_domain),
        dense_baseline=minutes >= 5,
    )


def estimate(speed: Speed, scale: Scale, budgets: Budgets) -> float:
    """Seconds from the first command to the page."""
    command = speed.start + COMMAND_SECONDS
    # Forward passes are a third of training; four domains.
    evaluated = 4 * budgets.held_out / 3
    experts = [command + (budgets.expert + evaluated) * speed.dense for _ in EXPERTS]
    mixtures, scores = [], [evaluated * speed.dense for _ in ("seed", *EXPERTS, "soup")]
    for run in mixture_runs(budgets):
        kind = run.model.rsplit("/")[-1]
        kind = kind if kind in MIXTURES else "dense"
        tokens = budgets.mixture
        if run.match == "CM":
            tokens = int(tokens * training_flops(scale, "btx", 1) / training_flops(scale, kind, 1))
        mixtures.append(command + (tokens + evaluated) * speed.of(kind))
        scores.append(evaluated * speed.of(kind))
        if run.name in ROUTED:
            scores.append(command + evaluated * speed.of(kind))
    scores += [evaluated * speed.of(kind) for kind in MIXTURES]
    phases = (experts, [2.0] * 4, mixtures, scores)
    alone = 4 * command + TEXT_SECONDS + (budgets.seed + evaluated) * speed.seed
    return alone + sum(_side_by_side(jobs, speed.cores) for jobs in phases)


def _side_by_side(jobs: list[float], at_once: int) -> float:
    """When the last of the jobs ends, each begun as soon as there is room."""
    ends = [0.0] * at_once
    for job in jobs:
        ends[ends.index(min(ends))] += job
    return max(ends)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def measure(scale: Scale, cores: int) -> Speed:
    """Speeds of this machine with nothing else to do than the demo."""
    processes = _sharers(cores, scale.batch_size)
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(cores), context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        shared = (asdict(scale), cores, processes, f"{folder}/meeting", time.time(), barrier, queue)
        workers = [context.Process(target=_worker, args=(rank, *shared), daemon=True) for rank in range(cores)]
        for worker in workers:
            worker.start()
        found: list[dict[str, Any]] = [queue.get() for _ in workers]
        for worker in workers:
            worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError("the speed of this machine could not be measured")

    def slowest(name: str) -> float | None:
        values = [result[name] for result in found if result.get(name) is not None]
        return max(values) if values else None

    speeds = {kind.replace("-", "_"): slowest(kind) for kind in KINDS}
    return Speed(
        **speeds,  # type: ignore[arg-type]
        cores=cores,
        start=slowest("start") or 0.0,
        one_process=slowest("one_process") or 0.0,
        many_processes=slowest("many_processes"),
        processes=processes,
    )


def _sharers(cores: int, batch_size: int) -> int:
    """Processes that can share the seed's batch equally."""
    return max(count for count in range(1, min(cores, 8) + 1) if batch_size % count == 0)


def _worker(
    rank: int, scale: dict[str, Any], cores: int, processes: int, meeting: str, begun: float, barrier: Any, queue: Any
) -> None:
    """Measures alongside the others, each phase begun together."""
    import torch

    from branchmix.train.memory import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()  # as runs do: without it, half of a step can be page faults
    shape = Scale(**scale)
    found: dict[str, Any] = {}
    try:
        models = {kind: _model(shape, kind) for kind in KINDS}
        found["start"] = time.time() - begun
        for kind in KINDS:
            barrier.wait()
            found[kind] = _seconds_per_token(models[kind], shape, max(1, shape.batch_size // 4))
        barrier.wait()
        if processes > 1 and rank < processes:
            found["many_processes"] = _together(models["dense"], shape, rank, processes, meeting)
        barrier.wait()
        if rank == 0:
            torch.set_num_threads(cores)
            found["one_process"] = _seconds_per_token(models["dense"], shape, max(1, shape.batch_size // 2))
    except BaseException:
        barrier.abort()  # the others would wait for ever
        raise
    finally:
        queue.put(found)


def _together(model: Any, scale: Scale, rank: int, processes: int, meeting: str) -> float | None:
    """A step of a batch that is shared by processes; None if they cannot talk."""
    import torch
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    try:
        place = f"file://{meeting}"
        distributed.init_process_group("gloo", place, timedelta(seconds=60), world_size=processes, rank=rank)
        # Each measures its share: seconds of a whole batch by all of them.
        return _seconds_per_token(DistributedDataParallel(model), scale, scale.batch_size // processes) / processes
    except (RuntimeError, torch.distributed.DistError):
        return None
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _model(scale: Scale, kind: str) -> Any:
    config = scale.config()
    if kind != "dense":
        config = {"model_type": "branchmix", "seed_config": config, **scale.mixture(kind)}
    return new_model(config, _computing(), scale.sequence_length)


def _computing() -> Computing:
    """As a run of the demo computes."""
    import torch

    from branchmix.models.chunked_branchmix import faster_in_bf16

    return Computing(torch.device("cpu"), faster_in_bf16(torch.device("cpu")))


def _seconds_per_token(model: Any, scale: Scale, rows: int) -> float:
    seconds = seconds_per_step(
        model,
        vocab_size=scale.vocab_size,
        sequence_length=scale.sequence_length,
        batch_size=scale.batch_size,
        rows=rows,
        computing=_computing(),
    )
    return seconds / scale.step_tokens


def main(out: Path) -> None:
    demo = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    speed = measure(Scale(**demo["scale"]), demo["cores"])
    part = out / "speed.json.part"
    part.write_text(json.dumps(asdict(speed), indent=2) + "\n", encoding="utf-8")
    part.replace(out / "speed.json")
    rates = ", ".join(f"{kind} {1 / speed.of(kind):,.0f}" for kind in KINDS)
    print(f"tokens/s of one thread, {speed.cores} side by side: {rates}; of the seed: {1 / speed.seed:,.0f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""A prepared run: trained in its folder, and finished there."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import nullcontext
from math import exp
from pathlib import Path
from typing import Any

from branchmix.checkpoint.folder import write_json, writing
from branchmix.errors import OutputError
from branchmix.train import measure, saved_state, trained_parts
from branchmix.train.prepared import PreparedRun, now
from branchmix.train.progress import last_values, seconds_of
from branchmix.train.run_folder import AVERAGE, DONE, RunReport
from branchmix.train.signals import StopSignals
from branchmix.train.trainer import BranchTrainer


def execute(run: PreparedRun, signals: StopSignals, *, force: bool) -> RunReport:
    """Train and write the result, or a checkpoint if a signal comes. All processes of the run call it."""
    out = run.folder.path
    run.display.plan(run.plan)
    with run.folder.alone() if run.process.is_main_process else nullcontext():
        _take_folder(run, force=force)
        trainer = BranchTrainer(run, signals)
        if run.checkpoint is not None:
            run.display.line(f"resuming from {run.checkpoint}")
        try:
            trainer.train(run.checkpoint)
        finally:
            run.display.stop()
        if trainer.stopped_by is not None:
            return RunReport(out, "stopped", run.fixed, trainer.stopped_by)
        return RunReport(out, "trained", _finish(run, trainer))


def _take_folder(run: PreparedRun, *, force: bool) -> None:
    """Write ``run.json``, if the folder is still as it was when the run was checked."""
    run.process.wait_for_everyone()  # until all have looked at the folder
    if run.process.is_main_process:
        changed = run.folder.look(run.config, force=force) != run.checked.state
        if changed or (run.checkpoint is not None and not run.checkpoint.is_dir()):
            raise OutputError(
                f"{run.folder.path}: another process has trained here since this one started: rerun the command"
            )
        if run.checkpoint is None:
            run.folder.clear()
        run.folder.write_run(run.fixed)
    run.process.wait_for_everyone()


def _finish(run: PreparedRun, trainer: BranchTrainer) -> dict[str, Any]:
    """Write the result and ``training.json`` into the folder, and remove the checkpoints."""
    fixed, rows = run.fixed, trainer.metrics.rows() if run.process.is_main_process else []
    losses, counts = last_values(rows, "loss/"), run.sequences.counts()
    record = {
        "config": fixed["config"],
        **run.plan,
        "seconds": seconds_of(rows),
        "domains": {
            name: {"tokens": counts[name] * run.config.sequence_length, "loss": losses.get(name)}
            for name in run.sequences.domains
        },
        "held_out": {
            "start": _scores(row for row in rows if row["step"] == 0),
            "end": _scores(row for row in rows if row["step"] == fixed["steps"]),
        },
        "started": fixed["started"],
        "ended": now(),
        "resumed": fixed["resumed"],
        "machine": measure.machine(run.computing.device),
        "versions": measure.versions(),
    }
    _write_average(run, trainer)
    if run.config.adapters:
        trained_parts.fold_adapters(run.model)

    def also(part: Path) -> None:
        if trainer.ema is not None:
            (run.folder.path / AVERAGE).rename(part / "ema")
        write_json(part / DONE, record, allow_nan=True)

    trainer.finish(run.folder.path, also=also)
    if run.process.is_main_process:
        run.folder.clean_up()
    return record


def _write_average(run: PreparedRun, trainer: BranchTrainer) -> None:
    """Write the moving average, if there is one, into a folder that will be moved next to the result."""
    if trainer.ema is None:
        return
    place = run.folder.path / AVERAGE
    with trainer.ema.swapped(), writing(place):
        weights = saved_state.gather(trainer.model)
        if run.process.is_main_process:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            saved_state.write(trainer.model, trainer.processing_class, weights, place, resumable=False)


def _scores(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Loss in nats per token and perplexity by domain, from the rows of one step."""
    return {name: {"loss": loss, "perplexity": exp(loss)} for name, loss in last_values(rows, "held_out/").items()}

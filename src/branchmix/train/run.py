"""One training run from its settings to the folder of the result: what ``branchmix train`` does.

Cheap checks come first: whatever can be refused is refused within seconds, before torch is imported, data is read or a
model is loaded. ``prepared`` and ``trainer`` do the rest.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path

from branchmix.train.checks import check
from branchmix.train.config import RunConfig
from branchmix.train.progress import Display
from branchmix.train.run_folder import RunFolder, RunReport, is_main_process
from branchmix.train.signals import stop_signals


def train(
    config: RunConfig | str | Path,
    *,
    overrides: Sequence[str] = (),
    force: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> RunReport:
    """Train the dense model or mixture that the settings name as ``model``.

    The same call resumes a stopped run from its last checkpoint, and does nothing if the run is done. Under
    ``torchrun`` or ``accelerate launch`` every process calls it.

    Args:
        config: settings, or the path of their YAML file.
        overrides: ``key=value`` settings that replace those of the file.
        force: start over, replacing an earlier run in the folder.
        dry_run: check everything, read data and model, and return the plan.
        progress: report progress on stderr.

    Raises:
        BranchMixError: one of its kinds; ``TrainingError`` if the loss is not finite.

    Example:
        >>> from branchmix.train import train
        >>> report = train("run.yaml", overrides=["budget.tokens=2M"])
        >>> model = AutoModelForCausalLM.from_pretrained(report.out)
    """
    clock = time.perf_counter()
    config = RunConfig.load(config, overrides)
    display = Display(shown=progress and is_main_process())
    folder = RunFolder(config)
    state = folder.look(config, force=force)
    if state == "finished":  # even if its model or data no longer exist
        record = folder.record()
        assert record is not None
        if is_main_process():
            folder.clean_up()
        display.line(f"{folder.path}: this run is already done; use --force to start over")
        return RunReport(folder.path, "finished before", record)
    checked = check(config, folder, state)
    from branchmix.train.prepared import PreparedRun
    from branchmix.train.trainer import execute

    with stop_signals() as signals:
        try:
            run = PreparedRun(config, checked, folder, display, clock)
            return RunReport(folder.path, "dry run", run.plan) if dry_run else execute(run, signals, force=force)
        except KeyboardInterrupt:
            if signals.received != signal.SIGTERM:
                raise
            return RunReport(folder.path, "stopped", {}, signals.received)  # before training

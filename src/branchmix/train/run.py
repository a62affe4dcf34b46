"""One training run from its settings to the folder of the result: what ``branchmix train`` does.

Cheap checks come first: whatever can be refused is refused within seconds, before data is read or a model is loaded.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from branchmix.accounting.lineage import as_records, lineage
from branchmix.checkpoint.adapters import left_over_adapter
from branchmix.checkpoint.folder import write_json, writing
from branchmix.checkpoint.hub import ResolvedModel
from branchmix.checkpoint.index import left_over_quantisation
from branchmix.errors import OutputError, RecipeError
from branchmix.train.checks import Checked, Process, check
from branchmix.train.config import NewModel, RunConfig
from branchmix.train.memory import keep_freed_memory
from branchmix.train.outputs import AVERAGE, DONE, RunFolder, settings_of
from branchmix.train.progress import Display, Metrics, last_values
from branchmix.train.record import machine, now, scores, trained_parts, versions
from branchmix.train.schedule import steps_of, token_flops
from branchmix.train.sharding import reshard
from branchmix.train.signals import StopSignals

if TYPE_CHECKING:
    from branchmix.data.config import Source
    from branchmix.train.trainer import BranchTrainer

MINUTE = 60.0


@dataclass(frozen=True)
class RunReport:
    """What ``train`` did, or would do."""

    out: Path
    status: str
    """``trained``, ``finished before``, ``stopped`` or ``dry run``."""
    record: dict[str, Any]
    """``training.json``; after a dry run the plan."""
    signal: int | None = None
    """The signal that stopped it; the same command resumes from its last checkpoint."""
    is_main: bool = True
    """Whether this process speaks for the run."""


def train(
    config: RunConfig | str | Path,
    *,
    overrides: list[str] | None = None,
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
    if not isinstance(config, RunConfig):
        config = RunConfig.load(config, overrides)
    elif overrides:
        raise RecipeError("overrides apply to settings from a file: change the object instead")
    process = Process()
    display = Display(shown=progress and process.is_main)
    folder = RunFolder(config)
    if folder.look(config, force=force) == "finished":  # even if its model or data no longer exist
        record = folder.record()
        assert record is not None
        if process.is_main:
            folder.clean_up()
        display.line(f"{folder.path}: this run is already done; use --force to start over")
        return RunReport(folder.path, "finished before", record, is_main=process.is_main)
    checked = check(config, folder, process, force=force)
    run = _Run(config, checked, folder, process, display, clock, force)
    with StopSignals() as signals:
        try:
            return run.execute(signals, dry_run=dry_run)
        except KeyboardInterrupt:
            if signals.received != signal.SIGTERM:
                raise
            return RunReport(folder.path, "stopped", {}, signals.received, process.is_main)  # before training


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """The main path, with what its parts share."""

    config: RunConfig
    checked: Checked
    folder: RunFolder
    process: Process
    display: Display
    started: float
    force: bool

    def execute(self, signals: StopSignals, *, dry_run: bool) -> RunReport:
        """Data, model, training, result."""
        from branchmix.train.checkpoints import latest_checkpoint

        folder, display = self.folder, self.display
        self._prepare_machine()
        checkpoint = None
        if self.checked.state == "unfinished":
            checkpoint = latest_checkpoint(folder.checkpoints, notice=display.line)
        self._open_data_and_model(checkpoint)
        self._choose_what_is_trained()
        fixed = self._fix_steps(checkpoint)
        plan = self._plan(fixed)
        if dry_run:
            return RunReport(folder.path, "dry run", plan, is_main=self.process.is_main)
        display.plan(plan)
        with folder.alone() if self.process.is_main else nullcontext():
            return self._train(fixed, plan, checkpoint, signals)

    def _train(
        self, fixed: dict[str, Any], plan: dict[str, Any], checkpoint: Path | None, signals: StopSignals
    ) -> RunReport:
        """What writes into the folder."""
        folder, display = self.folder, self.display
        self.process.wait()  # until all have looked at the folder
        if self.process.is_main:
            if folder.look(self.config, force=self.force) != self.checked.state or (
                checkpoint is not None and not checkpoint.is_dir()
            ):
                raise OutputError(
                    f"{folder.path}: another process has trained here since this one started: rerun the command"
                )
            if checkpoint is None:
                folder.clear()
            folder.write_run(fixed)
        self.process.wait()
        trainer = self._trainer(fixed, checkpoint, signals)
        if checkpoint is not None:
            display.line(f"resuming from {checkpoint}")
        try:
            trainer.train(checkpoint)
        finally:
            display.stop()
        if trainer.stopped_by is not None:
            return RunReport(folder.path, "stopped", fixed, trainer.stopped_by, self.process.is_main)
        record = self._finish(trainer, fixed, plan)
        return RunReport(folder.path, "trained", record, is_main=self.process.is_main)

    # Parts, in their order.

    def _prepare_machine(self) -> None:
        import torch
        from accelerate import PartialState
        from transformers.utils import logging

        from branchmix.train.models import computing_of

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        self.computing = computing_of(self.config, PartialState().device)
        if PartialState().device.type == "cpu":
            keep_freed_memory()

    def _open_data_and_model(self, checkpoint: Path | None) -> None:
        from branchmix.data.corpus import open_corpus
        from branchmix.data.packing import packing_method
        from branchmix.train.models import load_model, make_model, tokenizer_for

        config, checked = self.config, self.checked
        if checked.model is not None:
            for left_over in (left_over_adapter, left_over_quantisation):
                if note := left_over(checked.model.folder):
                    self.display.line(f"note: {note}")
            self.model, self.tokenizer = load_model(checked.model, config, self.computing)
        else:
            assert isinstance(config.model, NewModel)
            texts = lambda: {name: self._training_text(source) for name, source in config.data.items()}  # noqa: E731
            made = ResolvedModel(str(checkpoint), checkpoint) if checkpoint is not None else checked.tokenizer
            self.tokenizer = tokenizer_for(config.model, made, texts, config)
            self.model = make_model(config.model, self.tokenizer, config, self.computing)
        self.corpus = open_corpus(
            config.data,
            self.tokenizer,
            folder=config.folder,
            leave_out=self.folder.path,
            cache=None,
            held_out=config.held_out,
            progress=self.display.work,
        )
        self.held_out = self.corpus.held_out(sequence_length=config.sequence_length)
        self.model.to(self.computing.device)
        self.packing = packing_method(self.model)
        reshard(self.model)

    def _training_text(self, source: Source) -> Iterator[str]:
        """Documents to train a tokenizer on, without the held-out ones."""
        from branchmix.data.sources import documents, is_held_out

        texts = documents(source, folder=self.config.folder, leave_out=self.folder.path)
        return (text for text in texts if not is_held_out(text, self.config.held_out.share))

    def _choose_what_is_trained(self) -> None:
        from transformers import set_seed

        config = self.config
        described = self.model.config.to_dict()
        set_seed(config.random_seed)  # of LoRA's matrices
        if config.adapters:
            from branchmix.train import adapters

            adapters.add(self.model)
        if config.lora is not None:
            from branchmix.train import lora

            self.model = lora.add(self.model, config.lora)
        if config.freeze:
            from branchmix.train import freeze

            freeze.apply(self.model, config.freeze)
        if config.gradient_checkpointing:
            from branchmix.train.models import save_memory

            save_memory(self.model)
        self.flops = token_flops(described, config.sequence_length, *trained_parts(self.model))

    def _fix_steps(self, checkpoint: Path | None) -> dict[str, Any]:
        """The content of ``run.json``: what is fixed when the run first starts."""
        config = self.config
        if checkpoint is not None:
            record = self.folder.record()
            assert record is not None
            step = int(checkpoint.name.removeprefix("step-"))
            record["resumed"] = [*record["resumed"], {"step": step, "time": now(), **self._changes(record)}]
            return record
        tokens = config.batch_size * config.sequence_length
        steps = steps_of(config.budget, tokens, self.flops.training * tokens if self.flops else None)
        return {
            "config": settings_of(config),
            "steps": self._steps_in_time() if steps is None else steps,
            "tokens_per_step": tokens,
            "peak_learning_rate": self.checked.peak_rate,
            "text": self.corpus.fingerprints(),
            "started": now(),
            "resumed": [],
        }

    def _changes(self, record: dict[str, Any]) -> dict[str, Any]:
        """Domains whose text has changed since the run started, for ``run.json``; prints a note for each."""
        before, after = record.get("text", {}), self.corpus.fingerprints()
        changed = [name for name in before if after.get(name) != before[name]]
        for name in changed:
            self.display.line(
                f"note: data.{name}: its text has changed since this run started: from now on, the run trains on other "
                "sequences than an uninterrupted one"
            )
        return {"changed": changed} if changed else {}

    def _steps_in_time(self) -> int:
        """Steps that fit into a budget of time, after subtracting the time for evaluations."""
        import torch

        from branchmix.train.measure import held_out_losses, seconds_per_step

        config, batching = self.config, self.checked.batching
        shape = {"sequence_length": config.sequence_length, "random_seed": config.random_seed}
        first = self.corpus.train(config.mix, num_sequences=config.batch_size, **shape)
        step = seconds_per_step(
            self.model,
            first,
            self.computing,
            micro=batching.micro,
            accumulation=batching.accumulation,
            packing=self.packing,
        )
        begin = time.perf_counter()
        held_out_losses(self.model, self.held_out, self.computing, batch_size=batching.micro, packing=self.packing)
        evaluation = time.perf_counter() - begin
        if config.budget.training_minutes is not None:
            key, left = "training_minutes", MINUTE * config.budget.training_minutes
        else:
            assert config.budget.minutes is not None
            key, left = "minutes", MINUTE * config.budget.minutes - (time.perf_counter() - self.started)
        left -= evaluation * (1 + config.evaluation.at_start)
        per_step = step + (evaluation / config.evaluation.steps if config.evaluation.steps else 0)
        steps = torch.tensor(max(0, int(left / per_step)), device=self.computing.device)
        if self.process.count > 1:
            torch.distributed.broadcast(steps, 0)
        if not int(steps):
            raise RecipeError(
                f"budget.{key}: only {max(0.0, left):.1f} s of it are left for training, but a step takes "
                f"{per_step:.1f} s: raise it"
            )
        return int(steps)

    def _plan(self, fixed: dict[str, Any]) -> dict[str, Any]:
        """Prepare the sequences; returns the plan, for the user and for ``training.json``."""
        config, steps = self.config, fixed["steps"]
        self.sequences = self.corpus.train(
            config.mix,
            sequence_length=config.sequence_length,
            num_sequences=steps * config.batch_size,
            random_seed=config.random_seed,
        )
        tokens = steps * fixed["tokens_per_step"]
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        grown_from = self.checked.model
        return {
            "out": str(self.folder.path),
            "steps": steps,
            "tokens": tokens,
            "flops": self.flops.training * tokens if self.flops else None,
            "peak_learning_rate": fixed["peak_learning_rate"],
            "model": {
                "model_type": self.model.config.model_type,
                "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
                "trained": trained,
                "forward_flops_per_token": self.flops.forward if self.flops else None,
                "training_flops_per_token": self.flops.training if self.flops else None,
            },
            "computing": {
                "device": str(self.computing.device),
                "precision": "bf16" if self.computing.bf16 else "fp32",
                "attention": self.model.config._attn_implementation,
                "packing": self.packing,
                "processes": self.process.count,
                "micro_batch_size": self.checked.batching.micro,
                "accumulation": self.checked.batching.accumulation,
            },
            "data": self.corpus.as_dict(),
            "ancestors": [] if grown_from is None else as_records(lineage(grown_from.folder, grown_from.given)),
        }

    def _trainer(self, fixed: dict[str, Any], checkpoint: Path | None, signals: Any) -> BranchTrainer:
        import torch

        from branchmix.train.measure import matmul_peak
        from branchmix.train.models import TokenizerFiles
        from branchmix.train.trainer import BranchTrainer, training_arguments

        config, out = self.config, self.folder.path
        step = int(checkpoint.name.removeprefix("step-")) if checkpoint is not None else -1
        metrics = Metrics(out, writes=self.process.is_main)
        before = metrics.rewind(step)
        seconds = max((row.get("seconds", 0.0) for row in before), default=0.0)
        os.environ.setdefault("WANDB_DIR", str(out))  # W&B would write into the current folder
        peak = matmul_peak(self.computing.device, torch.bfloat16 if self.computing.bf16 else torch.float32)
        arguments = training_arguments(
            config, str(out), self.checked.batching, fixed["steps"], fixed["peak_learning_rate"], self.computing
        )
        return BranchTrainer(
            run=config,
            computing=self.computing,
            model=self.model,
            args=arguments,
            train_dataset=self.sequences,
            held_out=self.held_out,
            packing=self.packing,
            batching=self.checked.batching,
            flops=self.flops,
            peak=peak * self.process.count,
            metrics=metrics,
            display=self.display,
            seconds=seconds,
            processing_class=TokenizerFiles(self.tokenizer, self.checked.model),
            checkpoints=self.folder.checkpoints,
            keep=config.checkpoints.keep,
            minutes=config.checkpoints.minutes,
            steps=config.checkpoints.steps,
            signals=signals,
        )

    def _finish(self, trainer: BranchTrainer, fixed: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
        """Write the result and ``training.json`` into the folder, and remove the checkpoints."""
        config = self.config
        rows = trainer.metrics.rows() if self.process.is_main else []
        losses = last_values(rows, "loss/")
        length = config.sequence_length
        tokens = {name: count * length for name, count in self.sequences.counts().items()}
        record = {
            "config": fixed["config"],
            **plan,
            "seconds": max((row.get("seconds", 0.0) for row in rows), default=0.0),
            "domains": {name: {"tokens": tokens[name], "loss": losses.get(name)} for name in self.sequences.domains},
            "held_out": {
                "start": scores(row for row in rows if row["step"] == 0),
                "end": scores(row for row in rows if row["step"] == fixed["steps"]),
            },
            "started": fixed["started"],
            "ended": now(),
            "resumed": fixed["resumed"],
            "machine": machine(self.computing.device),
            "versions": versions(),
        }
        self._write_average(trainer)
        if config.adapters:
            from branchmix.train import adapters

            adapters.fold(self.model)

        def also(part: Path) -> None:
            if trainer.ema is not None:
                (self.folder.path / AVERAGE).rename(part / "ema")
            write_json(part / DONE, record, allow_nan=True)

        trainer.finish(self.folder.path, also=also)
        if self.process.is_main:
            self.folder.clean_up()
        return record

    def _write_average(self, trainer: BranchTrainer) -> None:
        """Write the moving average into a folder that will be moved next to the result."""
        from branchmix.train import model_files

        if trainer.ema is None:
            return
        place = self.folder.path / AVERAGE
        with trainer.ema.swapped(), writing(place):
            weights = model_files.gather(trainer.model)
            if self.process.is_main:
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
                model_files.write(trainer.model, trainer.processing_class, weights, place, resumable=False)

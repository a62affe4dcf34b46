"""A training run after its checks: data, model, plan, training, result. ``execute`` shows the order."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import set_seed
from transformers.utils import logging

from branchmix.accounting.lineage import as_records, lineage
from branchmix.checkpoint.companions import left_over_adapter
from branchmix.checkpoint.folder import write_json, writing
from branchmix.checkpoint.hub import ResolvedModel
from branchmix.checkpoint.index import left_over_quantisation
from branchmix.data.config import Source
from branchmix.data.corpus import open_corpus
from branchmix.data.packing import packing_method
from branchmix.data.sources import documents, is_held_out
from branchmix.errors import OutputError, RecipeError
from branchmix.train import adapters, freeze, lora, measure, model_files, models
from branchmix.train.checkpoint_files import step_of
from branchmix.train.checkpoints import latest_checkpoint
from branchmix.train.checks import Checked
from branchmix.train.config import NewModel, RunConfig
from branchmix.train.memory import keep_freed_memory
from branchmix.train.progress import Display, Metrics, last_values
from branchmix.train.record import machine, now, scores, trained_parts, versions
from branchmix.train.run_folder import AVERAGE, DONE, RunFolder, RunReport
from branchmix.train.schedule import steps_of, token_flops
from branchmix.train.sharding import reshard
from branchmix.train.signals import StopSignals
from branchmix.train.trainer import BranchTrainer

MINUTE = 60.0


@dataclass
class TrainingRun:
    """A run that has passed its checks. What a method finds out, the later ones read from its attributes."""

    config: RunConfig
    checked: Checked
    folder: RunFolder
    display: Display
    started: float
    """Time when the command began, as ``time.perf_counter`` counts it."""
    force: bool

    def execute(self, signals: StopSignals, *, dry_run: bool) -> RunReport:
        """Data, model, training, result."""
        self._prepare_machine()
        self.checkpoint = None
        if self.checked.state == "unfinished":
            self.checkpoint = latest_checkpoint(self.folder.checkpoints, notice=self.display.line)
        self._open_data_and_model()
        self._choose_what_is_trained()
        self._fix_steps()
        self._make_plan()
        if dry_run:
            return RunReport(self.folder.path, "dry run", self.plan)
        self.display.plan(self.plan)
        with self.folder.alone() if self.process.is_main_process else nullcontext():
            self._take_folder()
            trainer = self._trainer(signals)
            if self.checkpoint is not None:
                self.display.line(f"resuming from {self.checkpoint}")
            try:
                trainer.train(self.checkpoint)
            finally:
                self.display.stop()
            if trainer.stopped_by is not None:
                return RunReport(self.folder.path, "stopped", self.fixed, trainer.stopped_by)
            return RunReport(self.folder.path, "trained", self._finish(trainer))

    def _prepare_machine(self) -> None:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        # Without cpu=True, accelerate would overlook the other processes on a machine without an accelerator.
        self.process = PartialState(cpu=not torch.accelerator.is_available())
        self.computing = models.computing_of(self.config, self.process.device)
        if self.process.device.type == "cpu":
            keep_freed_memory()

    def _open_data_and_model(self) -> None:
        config, model = self.config, self.checked.model
        if model is not None:
            for left_over in (left_over_adapter, left_over_quantisation):
                if note := left_over(model.folder):
                    self.display.line(f"note: {note}")
            self.model, self.tokenizer = models.load_model(model, config, self.computing)
        else:
            assert isinstance(config.model, NewModel)
            saved = None if self.checkpoint is None else ResolvedModel(str(self.checkpoint), self.checkpoint)
            tokenizer = saved or self.checked.tokenizer
            self.tokenizer = models.tokenizer_for(config.model, tokenizer, self._training_texts, config)
            self.model = models.make_model(config.model, self.tokenizer, config, self.computing)
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

    def _training_texts(self) -> dict[str, Iterator[str]]:
        """Documents by domain to train a tokenizer on, without the held-out ones."""

        def texts(source: Source) -> Iterator[str]:
            every = documents(source, folder=self.config.folder, leave_out=self.folder.path)
            return (text for text in every if not is_held_out(text, self.config.held_out.share))

        return {name: texts(source) for name, source in self.config.data.items()}

    def _choose_what_is_trained(self) -> None:
        config, described = self.config, self.model.config.to_dict()
        set_seed(config.random_seed)  # of LoRA's matrices
        if config.adapters:
            adapters.add(self.model)
        if config.lora is not None:
            self.model = lora.add(self.model, config.lora)
        if config.freeze:
            freeze.apply(self.model, config.freeze)
        if config.gradient_checkpointing:
            models.save_memory(self.model)
        self.flops = token_flops(described, config.sequence_length, *trained_parts(self.model))

    def _fix_steps(self) -> None:
        """Set ``fixed``, the content of ``run.json``: what is decided when the run first starts."""
        config = self.config
        if self.checkpoint is not None:
            record = self.folder.record()
            assert record is not None
            resumed = {"step": step_of(self.checkpoint), "time": now(), **self._changes(record)}
            self.fixed = record | {"resumed": [*record["resumed"], resumed]}
            return
        tokens = config.batch_size * config.sequence_length
        steps = steps_of(config.budget, tokens, self.flops.training * tokens if self.flops else None)
        self.fixed = {
            "config": config.model_dump(mode="json"),
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
        config, batching = self.config, self.checked.batching
        step = measure.seconds_per_step(
            self.model,
            self._sequences(1),
            self.computing,
            micro=batching.micro,
            accumulation=batching.accumulation,
            packing=self.packing,
        )
        begin = time.perf_counter()
        measure.held_out_losses(
            self.model, self.held_out, self.computing, batch_size=batching.micro, packing=self.packing
        )
        evaluation = time.perf_counter() - begin
        if config.budget.training_minutes is not None:
            key, left = "training_minutes", MINUTE * config.budget.training_minutes
        else:
            assert config.budget.minutes is not None
            key, left = "minutes", MINUTE * config.budget.minutes - (time.perf_counter() - self.started)
        left -= evaluation * (1 + config.evaluation.at_start)
        per_step = step + (evaluation / config.evaluation.steps if config.evaluation.steps else 0)
        steps = torch.tensor(max(0, int(left / per_step)), device=self.computing.device)
        if self.process.num_processes > 1:
            torch.distributed.broadcast(steps, 0)
        if not int(steps):
            raise RecipeError(
                f"budget.{key}: only {max(0.0, left):.1f} s of it are left for training, but a step takes "
                f"{per_step:.1f} s: raise it"
            )
        return int(steps)

    def _sequences(self, steps: int) -> Any:
        config = self.config
        return self.corpus.train(
            config.mix,
            sequence_length=config.sequence_length,
            num_sequences=steps * config.batch_size,
            random_seed=config.random_seed,
        )

    def _make_plan(self) -> None:
        """Prepare the sequences, and set ``plan``, for the user and for ``training.json``."""
        steps, grown_from = self.fixed["steps"], self.checked.model
        self.sequences = self._sequences(steps)
        tokens = steps * self.fixed["tokens_per_step"]
        parameters = list(self.model.parameters())
        self.plan = {
            "out": str(self.folder.path),
            "steps": steps,
            "tokens": tokens,
            "flops": self.flops.training * tokens if self.flops else None,
            "peak_learning_rate": self.fixed["peak_learning_rate"],
            "model": {
                "model_type": self.model.config.model_type,
                "parameters": sum(parameter.numel() for parameter in parameters),
                "trained": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
                "forward_flops_per_token": self.flops.forward if self.flops else None,
                "training_flops_per_token": self.flops.training if self.flops else None,
            },
            "computing": {
                "device": str(self.computing.device),
                "precision": "bf16" if self.computing.bf16 else "fp32",
                "attention": self.model.config._attn_implementation,
                "packing": self.packing,
                "processes": self.process.num_processes,
                "micro_batch_size": self.checked.batching.micro,
                "accumulation": self.checked.batching.accumulation,
            },
            "data": self.corpus.as_dict(),
            "ancestors": [] if grown_from is None else as_records(lineage(grown_from.folder, grown_from.given)),
        }

    def _take_folder(self) -> None:
        """Write ``run.json``, if the folder is still as it was when the run was checked."""
        self.process.wait_for_everyone()  # until all have looked at the folder
        if self.process.is_main_process:
            folder, checkpoint = self.folder, self.checkpoint
            if folder.look(self.config, force=self.force) != self.checked.state or (
                checkpoint is not None and not checkpoint.is_dir()
            ):
                raise OutputError(
                    f"{folder.path}: another process has trained here since this one started: rerun the command"
                )
            if checkpoint is None:
                folder.clear()
            folder.write_run(self.fixed)
        self.process.wait_for_everyone()

    def _trainer(self, signals: StopSignals) -> BranchTrainer:
        out = self.folder.path
        metrics = Metrics(out, writes=self.process.is_main_process)
        before = metrics.rewind(-1 if self.checkpoint is None else step_of(self.checkpoint))
        os.environ.setdefault("WANDB_DIR", str(out))  # W&B would write into the current folder
        peak = measure.matmul_peak(self.computing.device, torch.bfloat16 if self.computing.bf16 else torch.float32)
        return BranchTrainer(
            run=self.config,
            out=out,
            model=self.model,
            train_dataset=self.sequences,
            held_out=self.held_out,
            computing=self.computing,
            packing=self.packing,
            batching=self.checked.batching,
            num_steps=self.fixed["steps"],
            peak_rate=self.fixed["peak_learning_rate"],
            flops=self.flops,
            peak_flops=peak * self.process.num_processes,
            metrics=metrics,
            display=self.display,
            seconds=_seconds(before),
            processing_class=models.TokenizerFiles(self.tokenizer, self.checked.model),
            checkpoints=self.folder.checkpoints,
            signals=signals,
        )

    def _finish(self, trainer: BranchTrainer) -> dict[str, Any]:
        """Write the result and ``training.json`` into the folder, and remove the checkpoints."""
        fixed, rows = self.fixed, trainer.metrics.rows() if self.process.is_main_process else []
        losses, counts = last_values(rows, "loss/"), self.sequences.counts()
        record = {
            "config": fixed["config"],
            **self.plan,
            "seconds": _seconds(rows),
            "domains": {
                name: {"tokens": counts[name] * self.config.sequence_length, "loss": losses.get(name)}
                for name in self.sequences.domains
            },
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
        if self.config.adapters:
            adapters.fold(self.model)

        def also(part: Path) -> None:
            if trainer.ema is not None:
                (self.folder.path / AVERAGE).rename(part / "ema")
            write_json(part / DONE, record, allow_nan=True)

        trainer.finish(self.folder.path, also=also)
        if self.process.is_main_process:
            self.folder.clean_up()
        return record

    def _write_average(self, trainer: BranchTrainer) -> None:
        """Write the moving average, if there is one, into a folder that will be moved next to the result."""
        if trainer.ema is None:
            return
        place = self.folder.path / AVERAGE
        with trainer.ema.swapped(), writing(place):
            weights = model_files.gather(trainer.model)
            if self.process.is_main_process:
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
                model_files.write(trainer.model, trainer.processing_class, weights, place, resumable=False)


def _seconds(rows: list[dict[str, Any]]) -> float:
    """Training time by the rows of ``metrics.jsonl``."""
    return max((row.get("seconds", 0.0) for row in rows), default=0.0)

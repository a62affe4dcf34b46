"""A training run up to its first step: data, model, what is trained, number of steps, plan."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import torch
from accelerate import PartialState
from transformers import set_seed
from transformers.utils import logging

from branchmix.accounting.formulas import notices_of_positions
from branchmix.accounting.lineage import as_records, lineage
from branchmix.checkpoint.companions import left_over_adapter
from branchmix.checkpoint.hub import ResolvedModel
from branchmix.checkpoint.index import left_over_quantisation
from branchmix.data import tokenizer
from branchmix.data.corpus import open_corpus
from branchmix.data.sequences import packing_method
from branchmix.data.sources import documents, is_held_out
from branchmix.errors import RecipeError
from branchmix.train import measure, models, trained_parts
from branchmix.train.checks import Checked
from branchmix.train.config import NewModel, RunConfig
from branchmix.train.models import reshard
from branchmix.train.progress import Display
from branchmix.train.run_folder import RunFolder, latest_checkpoint, step_of
from branchmix.train.schedule import counts_ahead, shares_trained, steps_of, token_flops


class PreparedRun:
    """A run that has passed its checks, with data and model. What a method finds out, the later ones read from its
    attributes.

    Args:
        started: time when the command began, as ``time.perf_counter`` counts it.
    """

    def __init__(self, config: RunConfig, checked: Checked, folder: RunFolder, display: Display, started: float):
        self.config, self.checked, self.folder, self.display, self.started = config, checked, folder, display, started
        self._prepare_machine()
        self.checkpoint = None
        if checked.state == "unfinished":
            self.checkpoint = latest_checkpoint(folder.checkpoints, notice=display.line)
        self._open_data_and_model()
        self._choose_what_is_trained()
        self._fix_steps()
        self._make_plan()

    def _prepare_machine(self) -> None:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        # Without cpu=True, accelerate would overlook the other processes on a machine without an accelerator.
        self.process = PartialState(cpu=not torch.accelerator.is_available())
        self.computing = models.Computing.of(self.config.precision, self.process.device)
        if self.process.device.type == "cpu":
            models.keep_freed_memory()

    def _open_data_and_model(self) -> None:
        config, model = self.config, self.checked.model
        if model is not None:
            for left_over in (left_over_adapter, left_over_quantisation):
                if note := left_over(model.folder):
                    self.display.line(f"note: {note}")
            self.model, self.tokenizer = models.load_model(model, config, self.computing)
        else:
            assert isinstance(config.model, NewModel)
            self.tokenizer = self._tokenizer_of(config.model)
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

    def _tokenizer_of(self, new: NewModel) -> Any:
        """The checkpoint's, that of a folder, or one trained on equal amounts of text from every domain."""
        config, given = self.config, self.checked.tokenizer
        if self.checkpoint is not None:
            given = ResolvedModel(str(self.checkpoint), self.checkpoint)
        if given is not None:
            return models.training_tokenizer(given, trust_remote_code=config.trust_remote_code)
        assert new.train_tokenizer is not None
        texts: dict[str, Iterator[str]] = {}
        for name, source in config.data.items():
            every = documents(source, folder=config.folder, leave_out=self.folder.path)
            texts[name] = (text for text in every if not is_held_out(text, config.held_out.share))
        return tokenizer.train_tokenizer(tokenizer.equal_text(texts), new.train_tokenizer)

    def _choose_what_is_trained(self) -> None:
        config, described = self.config, self.model.config.to_dict()
        for note in notices_of_positions(described, config.sequence_length):
            self.display.line(f"note: {note}")
        set_seed(config.random_seed)  # of LoRA's matrices
        trained_parts.only_stitches(self.model, [k for k in ("freeze", "lora", "adapters") if getattr(config, k)])
        if config.adapters:
            trained_parts.add_adapters(self.model)
        if config.lora is not None:
            self.model = trained_parts.add_lora(self.model, config.lora)
        if config.freeze:
            trained_parts.freeze(self.model, config.freeze)
        if config.gradient_checkpointing:  # which has another name since transformers 5.2x
            enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        self.counts_ahead = counts_ahead(config.balance, self.checked.accumulation)
        trained = shares_trained(self.model)
        self.flops = token_flops(described, config.sequence_length, *trained, ahead=self.counts_ahead)

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
        config, micro, accumulation = self.config, self.checked.micro_batch_size, self.checked.accumulation
        options: dict[str, Any] = {"computing": self.computing, "packing": self.packing}
        step = measure.seconds_per_step(
            self.model,
            self._sequences(1),
            micro=micro,
            accumulation=accumulation,
            counts_ahead=self.counts_ahead,
            **options,
        )
        begin = time.perf_counter()
        measure.held_out_losses(self.model, self.held_out, batch_size=micro, **options)
        evaluation = time.perf_counter() - begin
        key, minutes, spent = "training_minutes", config.budget.training_minutes, 0.0
        if minutes is None:
            key, minutes, spent = "minutes", config.budget.minutes, time.perf_counter() - self.started
        assert minutes is not None
        left = 60 * minutes - spent
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
                "micro_batch_size": self.checked.micro_batch_size,
                "accumulation": self.checked.accumulation,
            },
            "data": self.corpus.as_dict(),
            "ancestors": [] if grown_from is None else as_records(lineage(grown_from.folder, grown_from.given)),
        }


def now() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")

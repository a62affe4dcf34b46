"""A prepared run, trained and finished in its folder: ``execute``.

``BranchTrainer`` is transformers' for packed sequences of several domains, with losses by domain and router metrics.
``Trainer`` and accelerate do accumulation, clipping, AdamW, DDP, FSDP2 and loggers. Three things differ: sequences come
in the data set's order for any number of processes; the schedule's first step has a learning rate above zero; and
autocast is entered here, since accelerate's would copy all logits to fp32 once more.
Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from math import exp
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import default_collate
from transformers import TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

from branchmix.checkpoint.folder import write_json, writing
from branchmix.errors import OutputError
from branchmix.train import measure, trained_parts
from branchmix.train import saved_state as saved
from branchmix.train.balancing import Balancing
from branchmix.train.checkpoints import SafeTrainer
from branchmix.train.counters import DomainLoss, RouterMonitor
from branchmix.train.ema import Ema
from branchmix.train.models import TokenizerFiles
from branchmix.train.prepared import PreparedRun, now
from branchmix.train.progress import Clock, Metrics, last_values, print_plan, seconds_of
from branchmix.train.run_folder import AVERAGE, DONE, RUN, RunReport, step_of
from branchmix.train.schedule import counts_ahead, rate_at
from branchmix.train.signals import StopSignals

_BALANCE = "balance/"
"""What the names of the balance's tensors begin with among a checkpoint's extra state."""


def execute(run: PreparedRun, signals: StopSignals, *, force: bool) -> RunReport:
    """Train and write the result, or a checkpoint if a signal comes. All processes of the run call it."""
    out = run.folder.path
    if run.display.shown:
        print_plan(run.plan, sys.stderr)
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
        write_json(run.folder.path / RUN, run.fixed)
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
        weights = saved.gather(trainer.model)
        if run.process.is_main_process:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            saved.write(trainer.model, trainer.processing_class, weights, place, resumable=False)


def _scores(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Loss in nats per token and perplexity by domain, from the rows of one step."""
    return {name: {"loss": loss, "perplexity": exp(loss)} for name, loss in last_values(rows, "held_out/").items()}


class BranchTrainer(SafeTrainer):
    """Trains the dense model or mixture of a run on its sequences."""

    def __init__(self, run: PreparedRun, signals: StopSignals):
        config, device, num_steps = run.config, run.computing.device, run.fixed["steps"]
        out = run.folder.path
        os.environ.setdefault("WANDB_DIR", str(out))  # W&B would write into the current folder
        # Schedule, autocast and saving are not among Trainer's arguments: they are done here.
        args = TrainingArguments(
            output_dir=str(out),
            max_steps=num_steps,
            per_device_train_batch_size=run.checked.micro_batch_size,
            gradient_accumulation_steps=run.checked.accumulation,
            train_sampling_strategy="sequential",
            learning_rate=run.fixed["peak_learning_rate"],
            optim="adamw_torch_fused",
            adam_beta1=config.optimizer.betas[0],
            adam_beta2=config.optimizer.betas[1],
            adam_epsilon=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            max_grad_norm=config.optimizer.max_grad_norm,
            seed=config.random_seed,
            logging_steps=config.logging.steps,
            eval_strategy="steps",
            eval_steps=config.evaluation.steps or num_steps,
            eval_on_start=config.evaluation.at_start,
            report_to=list(config.logging.to) or "none",
            project=config.logging.project,
            disable_tqdm=True,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
        )
        args._n_gpu = min(1, args.n_gpu)  # one process uses one device: no DataParallel over all that it sees
        settings = vars(run.model.config)
        kept = {key: settings[key] for key in ("use_cache",) if key in settings}
        super().__init__(
            run.model,
            args,
            train_dataset=run.sequences,
            eval_dataset=run.held_out,
            data_collator=default_collate,
            processing_class=TokenizerFiles(run.tokenizer, run.checked.model),
            checkpoints=run.folder.checkpoints,
            when=config.checkpoints,
            signals=signals,
        )
        # Trainer sets use_cache in the config, which would be saved; forward passes here set it themselves.
        settings.pop("use_cache", None)
        settings.update(kept)
        self.run = run
        self.metrics = Metrics(out, writes=run.process.is_main_process)
        before = self.metrics.rewind(-1 if run.checkpoint is None else step_of(run.checkpoint))
        self.display, self.clock = run.display, Clock(seconds_of(before))
        peak = measure.matmul_peak(device, torch.bfloat16 if run.computing.bf16 else torch.float32)
        self.peak_flops = peak * run.process.num_processes
        self.domain_loss = DomainLoss(run.sequences.domains)
        self.routers = RouterMonitor(run.model, run.sequences.domains)
        self.ema: Ema | None = None
        self.balancing: Balancing | None = None
        if config.balance is not None:
            self.balancing = Balancing(run.model, config.balance, tokens_per_step=run.fixed["tokens_per_step"])
        self._logged_step = 0
        self.pop_callback(PrinterCallback)
        board = next((c for c in self.callback_handler.callbacks if isinstance(c, TensorBoardCallback)), None)
        if board is not None:
            board.logging_dir = str(Path(self.args.output_dir) / "tensorboard")

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a step. Their time counts as waiting for data; a count of their load does not."""
        with self.clock.counting("waiting"):
            batches, num_items = super().get_batch_samples(*args, **kwargs)
        if self.balancing is not None and counts_ahead(self.run.config.balance, len(batches)):
            inputs = (measure.model_inputs(batch, self.run.packing, self.args.device) for batch in batches)
            self.balancing.count_ahead(inputs, self.compute_loss_context_manager)
        return batches, num_items

    def compute_loss_context_manager(self) -> Any:
        """Autocast around the forward pass."""
        stack = super().compute_loss_context_manager()
        stack.enter_context(self.run.computing.autocast())
        return stack

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss; it and the routers' choices are counted for the domains of the sequences."""
        domain_B = inputs["domain"]
        inputs = {**measure.model_inputs(inputs, self.run.packing, self.args.device), **self.routers.options}
        with self.domain_loss.counting(model, domain_B):
            loss, output = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.routers.add(output, domain_B)
        return (loss, output) if return_outputs else loss

    def describe_batch(self) -> str:
        return ", ".join(self.domain_loss.blamed())

    def extra_state(self) -> dict[str, torch.Tensor]:
        state = {} if self.ema is None else self.ema.state()
        balance = {} if self.balancing is None else self.balancing.state()
        return state | {f"{_BALANCE}{name}": tensor for name, tensor in balance.items()}

    def load_extra_state(self, tensors: dict[str, torch.Tensor]) -> None:
        balance = {name.removeprefix(_BALANCE): tensors.pop(name) for name in [*tensors] if name.startswith(_BALANCE)}
        if self.balancing is not None:
            self.balancing.load_state(balance)
        if self.ema is not None:
            self.ema.load_state(tensors)

    def floating_point_ops(self, inputs: Any) -> int:
        """Zero, since ``branchmix.accounting`` counts FLOPs."""
        return 0

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Linear warm-up, cosine to a share of the peak (BAM section 5). Also starts the moving average, because here
        the model is in its final form, sharded or not, and no checkpoint has been read yet."""
        if self.run.config.ema is not None:
            self.ema = Ema(self.model, self.run.config.ema)
        if getattr(self, "lr_scheduler", None) is None:
            rate = self.run.config.learning_rate
            schedule = LambdaLR(optimizer or self.optimizer, lambda step: rate_at(step, num_training_steps, rate))
            self.lr_scheduler, self._created_lr_scheduler = schedule, True
        return self.lr_scheduler

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Also write a row with every checkpoint, so that a resumed run loses no metrics."""
        self.control.should_log |= self.control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.clock.counting("paused"):
            super()._save_checkpoint(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Send a row to the file, the display and the loggers, but not ``Trainer``'s summary at the end."""
        if "learning_rate" not in logs:
            return
        step = self.state.global_step
        loss, by_domain = self.domain_loss.read(self.args.device)
        seconds, span, waiting = self.clock.read()
        steps, self._logged_step = step - self._logged_step, step
        tokens = self.run.fixed["tokens_per_step"]
        row: dict[str, Any] = {
            "step": step,
            "steps": self.state.max_steps,
            "tokens": step * tokens,
            "seconds": round(seconds, 3),
            "loss": loss,
            **{f"loss/{name}": value for name, value in by_domain.items()},
            "objective": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_second": steps * tokens / span,
            "waiting": waiting,
            "memory_bytes": measure.memory_bytes(self.args.device),
            "eta_seconds": (self.state.max_steps - step) * span / max(1, steps),
        }
        if self.run.flops is not None:
            row["flops"] = step * tokens * self.run.flops.training
            row["flops_per_second"] = self.run.flops.training * row["tokens_per_second"]
            row["share_of_peak"] = row["flops_per_second"] / self.peak_flops
        reading = self.routers.read(self.args.device)
        row |= reading.scalars()
        self.metrics.add({**row, **({"routers": reading.as_dict()} if reading.routers else {})})
        self.display.row(row, self.state.max_steps)
        for line in reading.collapsed:
            self.display.line(f"warning: step {step}: {line}")
        numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
        self.control: Any = self.callback_handler.on_log(self.args, self.state, self.control, numbers)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure held-out loss by domain at this step, in nats per token, and write it as a row. A collective call."""
        step = self.state.global_step
        if not self.run.held_out:
            return {}
        with self.clock.counting("paused"):
            losses = measure.held_out_losses(
                self.model_wrapped,
                self.run.held_out,
                self.run.computing,
                batch_size=self.run.checked.micro_batch_size,
                rank=self.args.process_index,
                num_processes=self.args.world_size,
                packing=self.run.packing,
                between=self.may_stop_here,
            )
        row = {f"held_out/{name}": value for name, value in losses.items()}
        self.metrics.add({"step": step, **row})
        words = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
        self.display.line(f"step {step}: held-out loss: {words}")
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, row)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, row)
        return row

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._logged_step = state.global_step
        self.display.start(state.max_steps, state.global_step)
        self.clock.read()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if self.balancing is not None:
            self.balancing.end_step()
        if self.ema is not None:
            self.ema.update()
        self.display.step(state.global_step)
        control.should_log |= state.global_step >= state.max_steps

"""transformers' ``Trainer`` for packed sequences of several domains, with losses by domain and router metrics.

``Trainer`` and accelerate do accumulation, clipping, AdamW, DDP, FSDP2 and loggers. Three things differ: sequences come
in the data set's order for any number of processes; the schedule's first step has a learning rate above zero; and
autocast is entered here, since accelerate's would copy all logits to fp32 once more.
Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

from branchmix.data.packing import Packing, collate
from branchmix.train.checkpoints import SafeTrainer
from branchmix.train.config import RunConfig
from branchmix.train.ema import Ema
from branchmix.train.losses import DomainLoss
from branchmix.train.measure import held_out_losses, memory_bytes, model_inputs
from branchmix.train.models import Computing
from branchmix.train.progress import Clock, Display, Metrics
from branchmix.train.routers import RouterMonitor
from branchmix.train.schedule import Batching, TokenFlops, rate_at


@dataclass
class Instruments:
    """What a trainer measures with and writes to."""

    loss: DomainLoss
    routers: RouterMonitor
    metrics: Metrics
    display: Display
    clock: Clock
    flops: TokenFlops | None
    peak: float | None
    """FLOP/s of plain matrix products on all devices together."""
    held_out: dict[str, Any]
    """Sequences by domain."""
    batching: Batching
    packing: Packing
    """How this model separates packed documents."""


def training_arguments(
    config: RunConfig, out: str, batching: Batching, num_steps: int, peak_rate: float, computing: Computing
) -> TrainingArguments:
    """``Trainer``'s arguments for a run. Schedule, autocast and saving are not among them."""
    optimizer = config.optimizer
    arguments = TrainingArguments(
        output_dir=out,
        max_steps=num_steps,
        per_device_train_batch_size=batching.micro,
        gradient_accumulation_steps=batching.accumulation,
        train_sampling_strategy="sequential",
        learning_rate=peak_rate,
        optim="adamw_torch_fused",
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        seed=config.random_seed,
        logging_steps=config.logging.steps,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=config.evaluation.steps or num_steps,
        eval_on_start=config.evaluation.at_start,
        report_to=list(config.logging.to) or "none",
        project=config.logging.project,
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        use_cpu=computing.device.type == "cpu",
        dataloader_pin_memory=computing.device.type == "cuda",
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process uses one device: no DataParallel over all that it sees
    return arguments


class BranchTrainer(SafeTrainer):
    """Trains a dense model or a mixture on ``Sequences``.

    Args:
        run: its config.
        computing: device and autocast.
        instruments: what it measures with.
        **options: of ``SafeTrainer``.
    """

    def __init__(self, *, run: RunConfig, computing: Computing, instruments: Instruments, **options: Any):
        model = options["model"]
        kept = model.config.__dict__.get("use_cache")
        super().__init__(data_collator=collate, eval_dataset=instruments.held_out, **options)
        # Trainer sets use_cache in the config, which would be saved; forward passes here set it themselves.
        if kept is None:
            model.config.__dict__.pop("use_cache", None)
        else:
            model.config.use_cache = kept
        self.run = run
        self.computing = computing
        self.tools = instruments
        self.ema: Ema | None = None
        self._logged_step = 0
        self.pop_callback(PrinterCallback)
        board = next((c for c in self.callback_handler.callbacks if isinstance(c, TensorBoardCallback)), None)
        if board is not None:
            board.logging_dir = str(Path(self.args.output_dir) / "tensorboard")
        self.add_callback(_Moments(self))

    # -----------------------------------------------------------------------------------------------------------------
    # A step
    # -----------------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Unchanged, but its time counts as waiting for data."""
        parent = super().get_batch_samples
        return self.tools.clock.waiting(lambda: parent(*args, **kwargs))

    def compute_loss_context_manager(self) -> Any:
        """Autocast around the forward pass."""
        stack = super().compute_loss_context_manager()
        stack.enter_context(self.computing.autocast())
        return stack

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss; it and the routers' choices are counted for the domains of the sequences."""
        tools, domain_B = self.tools, inputs["domain"]
        inputs = {**model_inputs(inputs, tools.packing, self.args.device), **tools.routers.options}
        with tools.loss.counting(model, domain_B):
            loss, output = super().compute_loss(model, inputs, True, num_items_in_batch)
        tools.routers.add(output, domain_B)
        return (loss, output) if return_outputs else loss

    def describe_batch(self) -> str:
        """Domains whose loss is not finite, or all domains in the batch, for the error message."""
        return ", ".join(self.tools.loss.not_finite() or self.tools.loss.last_domains())

    def extra_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """State of the moving average, if there is one."""
        return ({}, {}) if self.ema is None else (self.ema.state(), {})

    def load_extra_state(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        if self.ema is not None:
            self.ema.load_state(tensors)

    def floating_point_ops(self, inputs: Any) -> int:
        """Zero, since ``branchmix.accounting`` counts FLOPs."""
        return 0

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Linear warm-up, cosine to a share of the peak (BAM section 5). Also starts the moving average, because here
        the model is in its final form, sharded or not, and no checkpoint has been read yet."""
        if self.run.ema is not None:
            self.ema = Ema(self.model, self.run.ema)
        scheduler: Any = getattr(self, "lr_scheduler", None)
        if scheduler is None:
            rate = self.run.learning_rate
            scheduler = LambdaLR(optimizer or self.optimizer, lambda step: rate_at(step, num_training_steps, rate))
            self.lr_scheduler, self._created_lr_scheduler = scheduler, True
        return scheduler

    # -----------------------------------------------------------------------------------------------------------------
    # Numbers
    # -----------------------------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Also write a row with every checkpoint, so that a resumed run loses no metrics."""
        self.control.should_log |= self.control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        parent = super()._save_checkpoint
        self.tools.clock.paused(lambda: parent(*args, **kwargs))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Send a row to the file, the display and the loggers, but not ``Trainer``'s summary at the end."""
        if "learning_rate" not in logs:
            return
        tools, step = self.tools, self.state.global_step
        losses = tools.loss.read(self.args.device)
        seconds, span, waiting = tools.clock.read()
        steps, self._logged_step = step - self._logged_step, step
        tokens = tools.batching.sequences * self.run.sequence_length
        row: dict[str, Any] = {
            "step": step,
            "steps": self.state.max_steps,
            "tokens": step * tokens,
            "seconds": round(seconds, 3),
            "loss": losses.mean,
            **{f"loss/{name}": value for name, value in losses.by_domain.items()},
            "objective": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_second": steps * tokens / span,
            "waiting": waiting,
            "memory_bytes": memory_bytes(self.args.device),
            "eta_seconds": (self.state.max_steps - step) * span / max(1, steps),
        }
        if tools.flops is not None:
            row["flops"] = step * tokens * tools.flops.training
            row["flops_per_second"] = tools.flops.training * row["tokens_per_second"]
            row["share_of_peak"] = row["flops_per_second"] / tools.peak if tools.peak else None
        reading = tools.routers.read(self.args.device)
        row |= reading.scalars()
        tools.metrics.add({**row, **({"routers": reading.as_dict()} if reading.routers else {})})
        tools.display.row(row, self.state.max_steps)
        for line in tools.routers.collapsed():
            tools.display.line(f"warning: step {step}: {line}")
        self._tell_loggers({name: value for name, value in row.items() if isinstance(value, (int, float))})

    def _tell_loggers(self, values: dict[str, float]) -> None:
        self.control: Any = self.callback_handler.on_log(self.args, self.state, self.control, values)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure held-out loss by domain at this step, in nats per token, and write it as a row. A collective call."""
        tools, step = self.tools, self.state.global_step
        if not tools.held_out:
            return {}
        losses = tools.clock.paused(
            lambda: held_out_losses(
                self.model_wrapped,
                tools.held_out,
                self.computing,
                batch_size=tools.batching.micro,
                rank=self.args.process_index,
                num_processes=self.args.world_size,
                packing=tools.packing,
                between=self.may_stop_here,
            )
        )
        row = {f"held_out/{name}": value for name, value in losses.items()}
        tools.metrics.add({"step": step, **row})
        words = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
        tools.display.line(f"step {step}: held-out loss: {words}")
        self._tell_loggers(row)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, row)
        return row


class _Moments(TrainerCallback):
    """Updates display, clock and moving average when training starts, ends a step, and stops."""

    def __init__(self, trainer: BranchTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._logged_step = state.global_step
        self.trainer.tools.display.start(state.max_steps, state.global_step)
        self.trainer.tools.clock.read()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.ema is not None:
            self.trainer.ema.update()
        self.trainer.tools.display.step(state.global_step)
        control.should_log |= state.global_step >= state.max_steps

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.tools.display.stop()

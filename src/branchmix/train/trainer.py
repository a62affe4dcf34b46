"""transformers' ``Trainer`` for packed sequences of several domains, with losses by domain and router metrics.

``Trainer`` and accelerate do accumulation, clipping, AdamW, DDP, FSDP2 and loggers. Three things differ: sequences come
in the data set's order for any number of processes; the schedule's first step has a learning rate above zero; and
autocast is entered here, since accelerate's would copy all logits to fp32 once more.
Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments
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


class BranchTrainer(SafeTrainer):
    """Trains a dense model or a mixture on ``Sequences``.

    Args:
        out: folder of the run.
        model: in its final form, except that it is not wrapped for several processes.
        train_dataset: ``Sequences``.
        held_out: sequences by domain.
        num_steps: of the whole run.
        peak_rate: peak learning rate.
        peak_flops: FLOP/s of plain matrix products on all devices together.
        seconds: time that the run took before it was resumed.
        **options: of ``SafeTrainer``.
    """

    def __init__(
        self,
        *,
        run: RunConfig,
        out: Path,
        model: Any,
        train_dataset: Any,
        held_out: dict[str, Any],
        computing: Computing,
        packing: Packing,
        batching: Batching,
        num_steps: int,
        peak_rate: float,
        flops: TokenFlops | None,
        peak_flops: float,
        metrics: Metrics,
        display: Display,
        seconds: float,
        **options: Any,
    ):
        # Schedule, autocast and saving are not among Trainer's arguments: they are done here.
        args = TrainingArguments(
            output_dir=str(out),
            max_steps=num_steps,
            per_device_train_batch_size=batching.micro,
            gradient_accumulation_steps=batching.accumulation,
            train_sampling_strategy="sequential",
            learning_rate=peak_rate,
            optim="adamw_torch_fused",
            adam_beta1=run.optimizer.betas[0],
            adam_beta2=run.optimizer.betas[1],
            adam_epsilon=run.optimizer.eps,
            weight_decay=run.optimizer.weight_decay,
            max_grad_norm=run.optimizer.max_grad_norm,
            seed=run.random_seed,
            logging_steps=run.logging.steps,
            eval_strategy="steps",
            eval_steps=run.evaluation.steps or num_steps,
            eval_on_start=run.evaluation.at_start,
            report_to=list(run.logging.to) or "none",
            project=run.logging.project,
            disable_tqdm=True,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            use_cpu=computing.device.type == "cpu",
            dataloader_pin_memory=computing.device.type == "cuda",
        )
        args._n_gpu = min(1, args.n_gpu)  # one process uses one device: no DataParallel over all that it sees
        config = model.config
        kept = {name: config.__dict__[name] for name in ("use_cache",) if name in config.__dict__}
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=held_out,
            data_collator=collate,
            **run.checkpoints.model_dump(),
            **options,
        )
        # Trainer sets use_cache in the config, which would be saved; forward passes here set it themselves.
        config.__dict__.pop("use_cache", None)
        config.__dict__.update(kept)
        self.run, self.computing, self.packing, self.batching = run, computing, packing, batching
        self.held_out, self.flops, self.peak_flops = held_out, flops, peak_flops
        self.metrics, self.display, self.clock = metrics, display, Clock(seconds)
        self.domain_loss = DomainLoss(train_dataset.domains)
        self.routers = RouterMonitor(config, train_dataset.domains)
        self.ema: Ema | None = None
        self._logged_step = 0
        self.pop_callback(PrinterCallback)
        board = next((c for c in self.callback_handler.callbacks if isinstance(c, TensorBoardCallback)), None)
        if board is not None:
            board.logging_dir = str(Path(self.args.output_dir) / "tensorboard")

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Unchanged, but its time counts as waiting for data."""
        with self.clock.counting("waiting"):
            return super().get_batch_samples(*args, **kwargs)

    def compute_loss_context_manager(self) -> Any:
        """Autocast around the forward pass."""
        stack = super().compute_loss_context_manager()
        stack.enter_context(self.computing.autocast())
        return stack

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss; it and the routers' choices are counted for the domains of the sequences."""
        domain_B = inputs["domain"]
        inputs = {**model_inputs(inputs, self.packing, self.args.device), **self.routers.options}
        with self.domain_loss.counting(model, domain_B):
            loss, output = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.routers.add(output, domain_B)
        return (loss, output) if return_outputs else loss

    def describe_batch(self) -> str:
        """Domains whose loss is not finite, or all domains in the batch, for the error message."""
        return ", ".join(self.domain_loss.not_finite() or self.domain_loss.last_domains())

    def extra_state(self) -> dict[str, torch.Tensor]:
        """State of the moving average, if there is one."""
        return {} if self.ema is None else self.ema.state()

    def load_extra_state(self, tensors: dict[str, torch.Tensor]) -> None:
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
        losses = self.domain_loss.read(self.args.device)
        seconds, span, waiting = self.clock.read()
        steps, self._logged_step = step - self._logged_step, step
        tokens = self.batching.sequences * self.run.sequence_length
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
        if self.flops is not None:
            row["flops"] = step * tokens * self.flops.training
            row["flops_per_second"] = self.flops.training * row["tokens_per_second"]
            row["share_of_peak"] = row["flops_per_second"] / self.peak_flops
        reading = self.routers.read(self.args.device)
        row |= reading.scalars()
        self.metrics.add({**row, **({"routers": reading.as_dict()} if reading.routers else {})})
        self.display.row(row, self.state.max_steps)
        for line in self.routers.collapsed():
            self.display.line(f"warning: step {step}: {line}")
        numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
        self.control: Any = self.callback_handler.on_log(self.args, self.state, self.control, numbers)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure held-out loss by domain at this step, in nats per token, and write it as a row. A collective call."""
        step = self.state.global_step
        if not self.held_out:
            return {}
        with self.clock.counting("paused"):
            losses = held_out_losses(
                self.model_wrapped,
                self.held_out,
                self.computing,
                batch_size=self.batching.micro,
                rank=self.args.process_index,
                num_processes=self.args.world_size,
                packing=self.packing,
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
        if self.ema is not None:
            self.ema.update()
        self.display.step(state.global_step)
        control.should_log |= state.global_step >= state.max_steps

"""A ``transformers.Trainer`` with atomic checkpoints, exact resume, clean stops, and no NaN weights.

On the same machine, a run that was killed and resumed ends with the weights of an uninterrupted run, bit for bit, if
the data set's items depend on their number alone. The training loop is transformers'; this module decides what is
written and read between two steps. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from branchmix.checkpoint.folder import system_error
from branchmix.errors import OutputError, TrainingError
from branchmix.train import run_folder as files
from branchmix.train import saved_state as saved
from branchmix.train.config import Checkpoints
from branchmix.train.run_folder import TRAINING, latest_checkpoint
from branchmix.train.signals import StopSignals


class SafeTrainer(Trainer, TrainerCallback):
    """Saves into ``checkpoints/step-<8 digits>/``, and resumes from there with ``train(latest_checkpoint(...))``.

    transformers' own saving (``save_strategy``) is turned off, and so is the filter that hides a NaN loss. Evaluation
    does not change the random numbers of training.

    Args:
        model, args, **kwargs: of ``transformers.Trainer``.
        checkpoints: folder of the checkpoints.
        when: how often to write them, by the main process's clock, and how many of the newest to keep.
        signals: handler for SIGTERM and Ctrl-C, entered by the caller.

    Attributes:
        stopped_by: the signal that ended training early, or None. There is a checkpoint of the last step then.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        checkpoints: Path,
        when: Checkpoints,
        signals: StopSignals,
        **kwargs: Any,
    ) -> None:
        self.checkpoints, self.when, self.signals = checkpoints, when, signals
        self.stopped_by: int | None = None
        self._saved_step = 0
        self._saved_at = time.monotonic()
        self._evaluation_due = False
        self._resumed: dict[str, Any] = {}
        # Ours alone: a second way to save would write pickles; NaN is an error, not a value to smooth over.
        args.save_strategy = SaveStrategy.NO
        args.logging_nan_inf_filter = False
        super().__init__(model, args, **kwargs)
        self.add_callback(self)

    # Hooks for subclasses.

    def extra_state(self) -> dict[str, torch.Tensor]:
        """More state to save. All processes call it; the main one's is saved."""
        return {}

    def load_extra_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore ``extra_state``, on every process, after model and optimizer."""

    def describe_batch(self) -> str:
        """What the last batch consisted of, such as its domains, for the message about a NaN loss."""
        return ""

    # Training.

    def train(self, resume_from_checkpoint: str | Path | None = None, **kwargs: Any) -> Any:
        """Train, from a checkpoint if one is given.

        Raises:
            TrainingError: a loss or gradient is NaN or infinite; that step is not applied.
            OutputError: a checkpoint cannot be written; earlier ones are intact.
            CheckpointError: the checkpoint does not fit the model or its optimizer.
            KeyboardInterrupt: the second Ctrl-C.
        """
        folder = None if resume_from_checkpoint is None else str(Path(resume_from_checkpoint) / TRAINING)
        self._saved_at = time.monotonic()
        # transformers evaluates "at the start" of a resumed run too, which the uninterrupted one would not have done.
        self.args.eval_on_start &= folder is None
        with self.signals.deferred():
            return super().train(resume_from_checkpoint=folder, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers looks at the flag after a step only: one step too many after a stop before the first, or when a
        # run is resumed that had done its last.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Called right before the optimizer's step. Reading the numbers here makes an accelerator wait once a step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        bad_norm = norm is not None and not math.isfinite(float(norm))
        bad_loss, bad_norm = map(bool, self._most(not math.isfinite(float(self._tr_loss)), bad_norm))
        if not bad_loss and not bad_norm:
            return norm
        batches = sorted({text for text in gather_object([self.describe_batch()]) if text})
        of = f" on {', '.join(batches)}" if batches else ""
        last = latest_checkpoint(self.checkpoints)
        good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        what = "loss" if bad_loss else "gradient"
        raise TrainingError(
            f"step {self.state.global_step + 1}{of}: the {what} is not a finite number, so the step was not applied: "
            f"{good}; try a lower learning_rate, or precision: fp32"
        )

    # Stops.

    def may_stop_here(self) -> None:
        """Stop an evaluation here if a signal came. All processes call it for every batch."""
        if self.is_in_train and (stop := self._stop_asked()):
            self.stopped_by = stop
            raise _StoppedError

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        random_numbers = saved.random_numbers()  # a data loader draws one when it starts
        logged = len(self.state.log_history)
        try:
            return super()._evaluate(*args, **kwargs)
        except _StoppedError:
            del self.state.log_history[logged:]
            self._stop(self.control)
            self._evaluation_due = True
            return {}
        finally:
            saved.set_random_numbers(random_numbers)

    def _stop_asked(self) -> int | None:
        """The signal that any process received, or None."""
        (stop,) = self._most(self.signals.received or 0)
        return int(stop) or None

    def _stop(self, control: TrainerControl) -> None:
        control.should_training_stop = True
        control.should_evaluate = False
        control.should_save = self.state.global_step > self._saved_step

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Decide whether to save or stop: the same on all processes, by the main one's clock and anyone's signal."""
        main = self.is_world_process_zero()
        late = main and time.monotonic() - self._saved_at >= 60 * self.when.minutes
        due = self.when.steps is not None and self.state.global_step % self.when.steps == 0
        control.should_save |= any(self._most(late or due))
        if stop := self._stop_asked():
            self.stopped_by = stop
            self._evaluation_due = control.should_evaluate
            self._stop(control)

    # Writing.

    def _save_checkpoint(self, model: Any = None, trial: Any = None) -> None:
        """Called on every process; the main one writes, except that each writes its random numbers."""
        self.store_flos()
        target = files.checkpoint_of(self.checkpoints, self.state.global_step)
        write = partial(self._write, target)
        with self._removed_on_failure(files.part_of(target)) as part:
            write(lambda: files.start_checkpoint(target, num_bytes=self._num_bytes()))
            weights = saved.gather(self.model)
            write(partial(saved.write, self.model, self.processing_class, weights, part, resumable=True))
            weights = None  # before the optimizer takes twice as much
            tensors, optimizer = saved.optimizer_state(self.model, self._optimizer)
            extra = self.extra_state()
            write(lambda: self._write_state(part / TRAINING, tensors, optimizer, extra))
            own = {**saved.random_numbers(), "loss": self._tr_loss.detach().double().cpu()}
            rank = self.args.process_index
            write(lambda: save_file(own, part / TRAINING / f"rng-{rank}.safetensors"), everywhere=True)
            write(lambda: files.complete_checkpoint(target))
        if self.is_world_process_zero():
            files.remove_others(target, keep=self.when.keep)
        self._saved_step, self._saved_at = self.state.global_step, time.monotonic()

    @contextlib.contextmanager
    def _removed_on_failure(self, part: Path) -> Iterator[Path]:
        try:
            yield part
        except BaseException:
            if self.is_world_process_zero():
                shutil.rmtree(part, ignore_errors=True)
            raise

    def _write_state(
        self, folder: Path, tensors: dict[str, torch.Tensor], optimizer: dict[str, Any], extra: dict[str, torch.Tensor]
    ) -> None:
        for name, content in (("optimizer", tensors), ("extra", extra)):
            if content:
                save_file({key: value.contiguous() for key, value in content.items()}, folder / f"{name}.safetensors")
        state = {
            "num_processes": self.args.world_size,
            "scheduler": self.lr_scheduler.state_dict(),
            "optimizer": optimizer,
            "last_logged": self._globalstep_last_logged,
            "evaluation_due": self._evaluation_due,
        }
        (folder / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
        self.state.save_to_json(str(folder / "trainer_state.json"))  # where transformers looks for it

    def finish(self, out: Path, *, also: Callable[[Path], None] | None = None) -> None:
        """Write the model into ``out``, its config last, and remove the checkpoints. All processes call it.

        ``also`` writes more files, on the main process, into a folder whose content appears together with the model.

        Raises:
            OutputError: it cannot be written; ``out`` and the checkpoints are unchanged.
        """
        weights = saved.gather(self.model)

        def write(part: Path) -> None:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            saved.write(self.model, self.processing_class, weights, part, resumable=False)
            if also is not None:
                also(part)
            files.publish(part, out)
            shutil.rmtree(self.checkpoints, ignore_errors=True)

        with self._removed_on_failure(out / ".model.part") as part:
            self._write(out, lambda: write(part))

    def _write(self, place: Path, action: Callable[[], None], *, everywhere: bool = False) -> None:
        """Run ``action`` on the main process, or everywhere; a failure on one process raises on all."""
        problem = ""
        if everywhere or self.is_world_process_zero():
            try:
                action()
            except OutputError as error:
                problem = f"the disk is full: {error}"
            except (OSError, SafetensorError) as error:
                problem = system_error(error).strerror or str(error)
        problem = max(gather_object([problem]))
        if problem:
            last = latest_checkpoint(self.checkpoints)
            again = f"rerun the command to resume from {last}" if last else "then start again"
            raise OutputError(f"{place}: cannot be written: {problem}: free space or fix this, {again}")

    def _num_bytes(self) -> int:
        """Approximate size of a checkpoint."""
        states = self._optimizer.state.values()
        tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        peft = hasattr(self.model, "peft_config")  # of which only the adapter is written
        tensors += [tensor for tensor in self.model.parameters() if tensor.requires_grad or not peft]
        return 1_000_000 + sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    # Reading. Every hook gets the checkpoint's folder ``training``, where transformers finds its own state.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved.read(self.model if model is None else model, Path(resume_from_checkpoint).parent)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self._resumed = {**state, "loss": self._loss_since_last_log(folder, state["num_processes"])}
        sharded_elsewhere = self.args.world_size > 1 and not self.is_world_process_zero()
        tensors = {} if sharded_elsewhere else _load(folder / "optimizer.safetensors")
        saved.set_optimizer_state(self.model, self._optimizer, tensors, state["optimizer"])
        saved.set_scheduler_state(self.lr_scheduler, self._optimizer, state["scheduler"])
        self.load_extra_state(_load(folder / "extra.safetensors"))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: there is none in bf16, and loading one would read a pickle."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Called after the loop has skipped the finished batches, which may draw random numbers too."""
        if checkpoint is None:
            return
        rank = self.args.process_index
        if self._resumed["num_processes"] == self.args.world_size:
            saved.set_random_numbers(load_file(Path(checkpoint) / f"rng-{rank}.safetensors"))
        else:  # processes have no counterparts in the old run: seed each one reproducibly
            torch.manual_seed(self.args.seed + self.state.global_step * self.args.world_size + rank)

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Restore accumulators, which the loop has just reset."""
        self._saved_step = state.global_step
        if resumed := self._resumed:
            self._globalstep_last_logged = resumed["last_logged"]
            self._tr_loss += resumed["loss"]
            if resumed["evaluation_due"]:
                self._evaluate(None, None)

    def _loss_since_last_log(self, folder: Path, num_processes: int) -> float:
        """This process's sum; with a different number of processes the mean of all sums, since the mean is logged."""
        same = num_processes == self.args.world_size
        ranks = [self.args.process_index] if same else range(num_processes)
        losses = [float(load_file(folder / f"rng-{rank}.safetensors")["loss"]) for rank in ranks]
        return sum(losses) / len(losses)

    # Helpers.

    @property
    def _optimizer(self) -> Any:
        """Without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _most(self, *values: float) -> tuple[float, ...]:
        """The maximum of each value over all processes."""
        if self.args.world_size == 1:
            return tuple(float(value) for value in values)
        numbers = torch.tensor([float(value) for value in values], device=self.args.device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return tuple(numbers.tolist())


class _StoppedError(Exception):
    """A signal came while evaluating."""


def _load(file: Path) -> dict[str, torch.Tensor]:
    return load_file(file) if file.is_file() else {}

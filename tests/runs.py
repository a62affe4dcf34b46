"""A tiny run for tests of checkpoints: any process can start the same one, and go on with it after it was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainingArguments

from branchmix.train.checkpoints import SafeTrainer
from branchmix.train.config import Checkpoints
from branchmix.train.signals import StopSignals
from families import BY_NAME
from mixtures import random_mixture


class Sequences(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Item n depends on n alone."""

    def __init__(self, length: int = 64, seed: int = 0) -> None:
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        ids = torch.randint(3, 97, (12,), generator=generator)
        return {"input_ids": ids, "labels": ids}


class Trainer(SafeTrainer):
    """Evaluates as transformers does."""

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        self.may_stop_here()
        return super().prediction_step(*args, **kwargs)


def dense(dropout: float = 0.2) -> Any:
    """A dense model with tied embeddings."""
    return BY_NAME["llama-bias"].model(0, attention_dropout=dropout)


def mixture(dropout: float = 0.2) -> Any:
    """A mixture of three experts."""
    return random_mixture("llama", seed_changes={"attention_dropout": dropout})


MODELS = {"dense": dense, "mixture": mixture}


def trainer(
    folder: Path,
    model: Any,
    *,
    kind: type[SafeTrainer] = Trainer,
    num_steps: int = 12,
    num_sequences: int = 30,
    keep: int = 2,
    minutes: float | None = None,
    steps: int | None = None,
    signals: StopSignals | None = None,
    callbacks: Any = (),
    **arguments: Any,
) -> Any:
    """bf16 autocast, accumulation over two batches, an evaluation every fifth step, two epochs and a half."""
    options: dict[str, Any] = {
        "max_steps": num_steps,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "bf16": True,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }
    made = kind(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **(options | arguments)),
        train_dataset=Sequences(num_sequences),
        eval_dataset=Sequences(6, seed=1),
        checkpoints=folder / "checkpoints",
        when=Checkpoints(minutes=minutes or 1e9, steps=steps, keep=keep),
        signals=signals or StopSignals(),
        callbacks=list(callbacks),
    )
    made.pop_callback(PrinterCallback)
    return made


def history(trained: Any) -> str:
    """The loss curve: all that was logged, but for how fast it was, and transformers' summary."""
    timed = ("runtime", "per_second", "train_loss")
    logged = trained.state.log_history
    return json.dumps([{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in logged], sort_keys=True)

"""What a mixture's ``loss`` consists of, with padding, under gradient accumulation and in transformers' own Trainer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from branchmix.models.attention_branchmix import BranchMixAttention
from branchmix.models.experts_branchmix import BranchMixSparseMoeBlock
from branchmix.models.routing_branchmix import BranchMixRouter, router_losses
from families import NAMES
from mixtures import BOTH, close, random_mixture, tokens

FAMILIES = ("llama", "cohere", "gemma3", "gpt-neox", "gpt2", "opt", "olmo2", "phi3")
LEARN = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
NO_DROPOUT = {"seed_changes": {"attention_dropout": 0.0}}  # one of the families has it by default


def negative_log_likelihood(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


@pytest.mark.parametrize("name", NAMES)
def test_training_adds_router_losses_and_evaluation_does_not(name: str) -> None:
    model = random_mixture(name, **LEARN, **NO_DROPOUT)
    ids = tokens()
    evaluation = model(ids, labels=ids)
    nll = negative_log_likelihood(evaluation.logits, ids)
    close(evaluation.loss, nll, 1e-6)
    assert evaluation.aux_loss is None and evaluation.router_logits is None
    training = model.train()(ids, labels=ids)
    asked = model.eval()(ids, labels=ids, output_router_logits=True)
    balance, z = router_losses(asked.router_logits, 2)
    for out in (training, asked):
        close(out.aux_loss, balance, 1e-6)
        close(out.z_loss, z, 1e-6)
        close(out.loss, nll + 0.5 * balance + 0.1 * z, 1e-6)
    assert training.router_logits is None


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", FAMILIES)
def test_padding_changes_no_loss(name: str, attention: str, side: str) -> None:
    model = random_mixture(name, attention, attention_num_experts_per_tok=2, output_router_logits=True, **LEARN)
    ids = tokens(1, 7)
    pad = torch.zeros(1, 4, dtype=torch.long)
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], dim=1)
    mask = (padded != 0).long()
    labels = padded.masked_fill(mask == 0, -100)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = model(ids, labels=ids)
        out = model(padded, attention_mask=mask, position_ids=positions, labels=labels)
    if side == "left":  # the first real token is then a label that has a token before it
        close(out.aux_loss, alone.aux_loss), close(out.z_loss, alone.z_loss)
        labels[:, 4] = -100
        with torch.no_grad():
            out = model(padded, attention_mask=mask, position_ids=positions, labels=labels)
    for value in ("loss", "aux_loss", "z_loss"):
        close(getattr(out, value), getattr(alone, value))


@pytest.mark.parametrize("attention", BOTH)
def test_soft_attention_router_learns_from_the_language_model_alone(attention: str) -> None:
    ids = tokens()
    grads = {}
    for coefficient in (0.0, 10.0):
        coefficients = {"router_aux_loss_coef": coefficient, "router_z_loss_coef": coefficient}
        model = random_mixture("llama", attention, **coefficients).train()
        gates = [module.weight for module in model.modules() if isinstance(module, BranchMixRouter)]
        attention_gate, ffn_gate = gates[:2]
        out = model(ids, labels=ids)
        nll = negative_log_likelihood(out.logits, ids)
        close(out.loss, nll + coefficient * (out.aux_loss + out.z_loss), 1e-6)
        assert torch.autograd.grad(nll, attention_gate, retain_graph=True)[0].abs().max() > 0
        grads[coefficient] = torch.autograd.grad(out.loss, ffn_gate)[0]
    assert not torch.allclose(grads[0.0], grads[10.0])


@pytest.mark.parametrize("attention", BOTH)
def test_top_k_attention_router_has_losses_of_its_own(attention: str) -> None:
    model = random_mixture("llama", attention, attention_num_experts_per_tok=1, output_router_logits=True, **LEARN)
    ids = tokens()
    out = model(ids, labels=ids)
    ffn, of_attention = router_losses(out.router_logits, 2), router_losses(out.attention_router_logits, 1)
    expected = sum(0.5 * balance + 0.1 * z for balance, z in (ffn, of_attention))
    close(out.loss, negative_log_likelihood(out.logits, ids) + expected, 1e-6)
    close(out.aux_loss, ffn[0], 1e-6)  # reported for the FFN router alone


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("gpt2", "resid_pdrop"),
        ("gptj", "resid_pdrop"),
        ("starcoder2", "residual_dropout"),
        ("seed-oss", "residual_dropout"),
    ],
)
@pytest.mark.parametrize("attention", BOTH)
def test_output_dropout_stays_behind_the_experts(name: str, option: str, attention: str) -> None:
    """Dense models drop what attention and FFN give to the residual; to drop single heads would be another thing."""
    model = random_mixture(name, attention, seed_changes={option: 0.75})
    outputs = []
    for module in model.modules():
        if isinstance(module, (BranchMixAttention, BranchMixSparseMoeBlock)):
            module.register_forward_hook(
                lambda module, args, out: outputs.append(out[0] if type(out) is tuple else out)
            )
    with torch.no_grad():
        model.eval()(tokens())
        assert all((output != 0).all() for output in outputs) and len(outputs) == 4
        model.train()(tokens(8, 20))
    for output in outputs[4:]:
        assert 0.7 < (output == 0).float().mean() < 0.8


@pytest.mark.parametrize("name", NAMES)
def test_num_items_in_batch_weighs_every_term(name: str) -> None:
    """Every family's own loss has to take it too, or ``Trainer`` would add up what it should average."""
    model = random_mixture(name, **LEARN, **NO_DROPOUT).train()
    ids = tokens()
    labels = ids.clone()
    labels[0, :4] = -100
    predicted = int((labels[:, 1:] != -100).sum())
    whole = model(ids, labels=labels).loss
    close(model(ids, labels=labels, num_items_in_batch=torch.tensor(4 * predicted)).loss * 4, whole, 1e-6)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    quarter = model(ids, labels=labels, shift_labels=shifted, num_items_in_batch=4 * predicted).loss
    close(quarter * 4, whole, 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# transformers.Trainer
# ---------------------------------------------------------------------------------------------------------------------


class LogRecorder(logging.Handler):
    """Keeps messages: transformers' loggers do not propagate to pytest's own."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def train(model: Any, rows: torch.Tensor, folder: Path, *, batch: int, accumulate: int, **options: Any) -> Any:
    """One optimizer step (plain SGD, so that parameters show gradients) over 16 rows; returns the Trainer."""
    data = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]
    settings = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, **options}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        **{"max_steps": 1, "logging_steps": 1, **settings},
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    return trainer


def logged(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("balance", "rows"),
    [
        (0.5, tokens(4, 9).repeat(4, 1)),  # the same micro-batch four times: balance is no sum over micro-batches
        (0.0, tokens(16, 9)),
    ],
    ids=["balance and z", "z alone"],
)
@pytest.mark.parametrize("attention", BOTH)
def test_trainer_accumulates_to_the_same_step(
    attention: str, balance: float, rows: torch.Tensor, tmp_path: Path
) -> None:
    coefficients = {"router_aux_loss_coef": balance, "router_z_loss_coef": 0.1}
    trained = []
    for batch, accumulate in ((16, 1), (4, 4)):
        model = random_mixture("llama", attention, **coefficients)
        with torch.no_grad():
            before = model(rows, labels=rows, output_router_logits=True).loss
        # In order, so that the micro-batches are the rows four by four.
        trainer = train(model, rows, tmp_path, batch=batch, accumulate=accumulate, train_sampling_strategy="sequential")
        assert trainer.model_accepts_loss_kwargs and trainer._loss_shifts_labels
        assert logged(trainer) == [pytest.approx(before.item(), rel=1e-5)]
        trained.append(dict(model.named_parameters()))
    for name, parameter in trained[0].items():
        torch.testing.assert_close(trained[1][name], parameter, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", FAMILIES)
def test_training_decreases_the_loss(name: str, attention: str, tmp_path: Path) -> None:
    rows = tokens(4, 9).repeat(4, 1)
    trainer = train(random_mixture(name, attention), rows, tmp_path, batch=8, accumulate=2, max_steps=4)
    losses = logged(trainer)
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_losses_computed_outside_the_model_are_warned_of(tmp_path: Path) -> None:
    """Label smoothing takes the labels away, so that no router loss can be added."""
    logger = transformers.utils.logging.get_logger("branchmix.models.modeling_branchmix")
    logger.warning_once.cache_clear()
    handler = LogRecorder()
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        train(random_mixture("llama"), tokens(8, 9), tmp_path, batch=4, accumulate=2, label_smoothing_factor=0.1)
    finally:
        logger.removeHandler(handler)
    assert [record for record in handler.messages if "router losses" in record]

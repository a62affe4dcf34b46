"""The scopes of the balance loss against the equation, token by token, and against one pass over the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from branchmix.accounting import flops_per_token
from branchmix.errors import RecipeError
from branchmix.models.balance_branchmix import BranchMixBalance
from branchmix.models.routing_branchmix import load_balancing_loss
from branchmix.train.balancing import Balancing
from branchmix.train.checks import require_balanceable
from branchmix.train.config import Balance, RunConfig
from branchmix.train.measure import seconds_per_step
from branchmix.train.models import Computing
from branchmix.train.schedule import counts_ahead, token_flops
from mixtures import random_mixture, tokens
from training import settings as run_settings

BOTH_HARD: dict[str, Any] = {"attention_num_experts_per_tok": 1, "router_aux_loss_coef": 0.5}


def random_logits(tokens: int, experts: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * 2


def loads(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Share of all choices that fall on each expert, counted in Python."""
    counts = [0] * logits.shape[1]
    for row in logits.tolist():
        for expert in sorted(range(len(row)), key=lambda i: -row[i])[:top_k]:
            counts[expert] += 1
    return torch.tensor(counts) / sum(counts)


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 4), length=st.integers(1, 9), top_k=st.integers(1, 3), seed=st.integers(0, 99))
def test_sequences_are_balanced_one_by_one(rows: int, length: int, top_k: int, seed: int) -> None:
    logits = random_logits(rows * length, seed=seed)
    expected = [load_balancing_loss(part, top_k) for part in logits.split(length)]
    found = load_balancing_loss(logits, top_k, groups=rows)
    torch.testing.assert_close(found, torch.stack(expected).mean())


def test_padding_counts_in_no_sequence_and_weighs_it() -> None:
    logits, mask = random_logits(12), torch.tensor([1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1])
    first, second = load_balancing_loss(logits[[0, 1, 2, 5]], 2), load_balancing_loss(logits[6:], 2)
    torch.testing.assert_close(load_balancing_loss(logits, 2, mask, groups=2), (4 * first + 6 * second) / 10)


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), top_k=st.integers(1, 3), seed=st.integers(0, 99))
def test_parts_with_the_load_of_the_whole_add_up_to_the_loss_of_the_whole(
    sizes: list[int], top_k: int, seed: int
) -> None:
    logits = random_logits(sum(sizes), seed=seed).requires_grad_()
    whole = load_balancing_loss(logits, top_k)
    load = loads(logits.detach(), top_k)
    parts = [len(part) / len(logits) * load_balancing_loss(part, top_k, load_E=load) for part in logits.split(sizes)]
    total = torch.stack(parts).sum()
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(torch.autograd.grad(total, logits)[0], torch.autograd.grad(whole, logits)[0])


@settings(deadline=None, max_examples=25)
@given(shares=st.lists(st.floats(0.05, 1.0), min_size=2, max_size=6), top_k=st.integers(1, 2), seed=st.integers(0, 99))
def test_a_target_weighs_each_expert_by_its_share(shares: list[float], top_k: int, seed: int) -> None:
    target = torch.tensor(shares) / sum(shares)
    logits = random_logits(20, len(shares), seed)
    expected = (loads(logits, top_k) * logits.softmax(-1).mean(0) / target).sum()
    torch.testing.assert_close(load_balancing_loss(logits, top_k, target_E=target), expected)
    uniform = torch.full_like(target, 1 / len(shares))
    torch.testing.assert_close(load_balancing_loss(logits, top_k, target_E=uniform), load_balancing_loss(logits, top_k))


def test_the_least_loss_is_at_the_target() -> None:
    """Where the load is what the gates say."""
    target = torch.tensor([0.5, 0.3, 0.2])

    def loss(gates: torch.Tensor) -> float:
        return load_balancing_loss(gates.log()[None], 1, load_E=gates, target_E=target).item()

    assert loss(target) == pytest.approx(1.0)
    for seed in range(20):
        assert loss(torch.randn(3, generator=torch.Generator().manual_seed(seed)).softmax(-1)) > 1


# ---- In a mixture ----


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def step(model: Any, ids: torch.Tensor, size: int, *, ahead: bool = False) -> dict[str, torch.Tensor]:
    """Gradients of an optimizer step in micro-batches of ``size``."""
    model.train()
    if ahead:
        with torch.no_grad(), model.balance.counting():
            for part in ids.split(size):
                model(part)
    for part in ids.split(size):
        model(part, labels=part, num_items_in_batch=ids[:, 1:].numel()).loss.backward()
    model.balance.end_step()
    return gradients(model)


@pytest.mark.parametrize("scope", ["sequence", "global_batch", "last_batch"])
def test_micro_batches_do_not_change_a_step(scope: Any) -> None:
    model, ids, before = random_mixture("llama", **BOTH_HARD), tokens(4, 9), tokens(4, 9, seed=1)
    found = {}
    for size in (4, 2, 1):
        model.balance = BranchMixBalance(scope, tokens_per_step=ids.numel())
        ahead = scope == "global_batch" and size < 4
        step(model, before, size, ahead=ahead)
        found[size] = step(model, ids, size, ahead=ahead)
    for size in (2, 1):
        for name, gradient in found[4].items():
            torch.testing.assert_close(found[size][name], gradient, rtol=0, atol=1e-6, msg=name)


def test_the_scopes_are_what_they_say() -> None:
    """One pass over a batch is its own scope, for the global batch; the load of the step before is another."""
    model, ids, before = random_mixture("llama", **BOTH_HARD), tokens(4, 9), tokens(4, 9, seed=1)
    found = {}
    for scope in ("micro_batch", "sequence", "global_batch", "last_batch"):
        model.balance = BranchMixBalance(scope, tokens_per_step=ids.numel())
        step(model, before, 4)
        found[scope] = step(model, ids, 4)
    router = "model.model.layers.0.mlp.gate.weight"
    torch.testing.assert_close(found["global_batch"][router], found["micro_batch"][router])
    for other in ("sequence", "last_batch"):
        assert (found[other][router] - found["micro_batch"][router]).abs().max() > 1e-3
    model.balance = BranchMixBalance(tokens_per_step=ids.numel())
    assert (step(model, ids, 1)[router] - found["micro_batch"][router]).abs().max() > 1e-3, "or nothing is tested"


def test_the_first_step_of_last_batch_has_no_balance_loss() -> None:
    model, ids = random_mixture("llama", **BOTH_HARD, router_z_loss_coef=0.0), tokens(4, 9)
    model.balance = BranchMixBalance("last_batch", tokens_per_step=ids.numel())
    first = step(model, ids, 2)
    model.config.router_aux_loss_coef = 0.0
    model.balance = BranchMixBalance("last_batch", tokens_per_step=ids.numel())
    for name, gradient in step(model, ids, 2).items():
        torch.testing.assert_close(first[name], gradient, rtol=0, atol=1e-6, msg=name)


def test_evaluation_balances_its_own_tokens_and_counts_nothing() -> None:
    model, ids = random_mixture("llama", **BOTH_HARD), tokens(4, 9)
    expected = model(ids, labels=ids, output_router_logits=True).aux_loss
    model.balance = BranchMixBalance("last_batch", tokens_per_step=ids.numel())
    torch.testing.assert_close(model(ids, labels=ids, output_router_logits=True).aux_loss, expected)
    model.balance.end_step()
    assert model.balance.state() == {}


@pytest.mark.parametrize("bf16", [False, True])
def test_the_load_counted_ahead_is_that_of_training_with_dropout(bf16: bool) -> None:
    context = Computing(torch.device("cpu"), bf16).autocast
    model = random_mixture("llama", **BOTH_HARD, seed_changes={"attention_dropout": 0.3}).train()
    ids = tokens(6, 20)
    balancing = Balancing(model, Balance(scope="global_batch"), tokens_per_step=ids.numel())
    torch.manual_seed(3)
    batches = [{"input_ids": part, "labels": part} for part in ids.split(2)]
    balancing.count_ahead(batches, context)
    for batch in batches:
        with context():
            model(**batch)
    ahead, trained = model.balance._ahead, model.balance._step
    assert ahead.keys() == trained.keys() == {"ffn", "attention"}
    assert all(torch.equal(ahead[kind], trained[kind]) for kind in ahead)
    assert trained["ffn"].sum(-1).tolist() == [6 * 20 * 2] * 2 and trained["attention"].sum(-1).tolist() == [6 * 20] * 2
    torch.manual_seed(4)
    for batch in batches:
        with context():
            model(**batch)
    assert not torch.equal(2 * ahead["ffn"], model.balance._step["ffn"]), "or dropout routed nothing differently"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"seed": 1, "code": 1, "lwa": 1}, r"^balance.target: no expert is called 'lwa' \(did you mean 'law'"),
        ({"seed": 1, "code": 1}, "^balance.target: has no share for 'law': give every expert one"),
        ({"seed": 1, "code": 4, "law": 1}, "^balance.target: code would get 67% of the load, .* give it at most 50%"),
    ],
)
def test_targets_that_cannot_be_met_are_refused(target: dict[str, float], message: str) -> None:
    described = random_mixture("llama", expert_names=["seed", "code", "law"]).config.to_dict()
    run = run_settings(Path(), model="mixture", balance={"target": target})
    with pytest.raises(RecipeError, match=message):
        require_balanceable(RunConfig(**run), described)
    if "law" in target:
        require_balanceable(RunConfig(**run), {**described, "num_experts_per_tok": 1})


def test_a_run_gives_the_target_in_the_order_of_the_experts() -> None:
    model = random_mixture("llama", expert_names=["seed", "code", "law"])
    Balancing(model, Balance(target={"law": 1, "seed": 2, "code": 1}), tokens_per_step=8)
    assert model.balance.target.tolist() == [0.5, 0.25, 0.25]


def test_recomputed_blocks_are_counted_once() -> None:
    model, ids, counts = random_mixture("llama", **BOTH_HARD).train(), tokens(4, 9), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.balance = BranchMixBalance(bias="sign", tokens_per_step=ids.numel())
        model(ids, labels=ids, use_cache=False).loss.backward()
        counts.append(model.balance._step)
    assert counts[0].keys() == counts[1].keys() == {"ffn", "attention"}
    assert all(torch.equal(counts[0][kind], counts[1][kind]) for kind in counts[0])


def test_the_time_of_a_step_includes_the_count() -> None:
    """Also under autocast, which must not keep the weights that the count has cast without a gradient."""
    model, calls = random_mixture("llama"), list[bool]()
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    sequences = [{"input_ids": row, "labels": row, "position_ids": torch.arange(9)} for row in tokens(4, 9)]
    gradients = list[bool]()
    model.model.model.layers[0].self_attn.o_proj.weight.register_hook(lambda grad: gradients.append(bool(grad.any())))
    options: dict[str, Any] = {"micro": 2, "accumulation": 2, "packing": "position_ids"}
    computing = Computing(torch.device("cpu"), bf16=True)
    for ahead in (False, True):
        assert seconds_per_step(model, sequences, computing, counts_ahead=ahead, **options) > 0
    steps = len(gradients) // 2
    assert calls == [True] * steps + [False, True] * steps and all(gradients)


@pytest.mark.parametrize(("name", "biases"), [("cohere", 0.0), ("qwen3", 0.0), ("gpt-neox", 0.01)])
def test_the_count_costs_what_is_charged(name: str, biases: float) -> None:
    """By torch's counter: the count to the digit, and what it adds to, for sequences whose tokens see all keys. Gated
    biases of outputs are products that are not charged."""
    length, model = 8, random_mixture(name)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    ids, mask = tokens(4, length), torch.ones(2, 1, length, length, dtype=torch.bool)
    batches = [{"input_ids": part, "labels": part, "attention_mask": mask} for part in ids.split(2)]
    balancing = Balancing(model, Balance(scope="global_batch"), tokens_per_step=ids.numel())
    described = model.config.to_dict()
    charged, without = (token_flops(described, length, ahead=ahead) for ahead in (True, False))
    assert charged is not None and without is not None
    others = flops_per_token(described, length).model("context")  # counted too: all keys, not half of them
    with FlopCounterMode(display=False) as counter:
        balancing.count_ahead(batches, lambda: Computing(torch.device("cpu"), bf16=False).autocast())
    expected = ids.numel() * (charged.training - without.training + others)
    assert counter.get_total_flops() == pytest.approx(expected, rel=biases, abs=0)
    with FlopCounterMode(display=False) as counter:
        for batch in batches:
            model(**batch, use_cache=False).loss.backward()
    assert counter.get_total_flops() == pytest.approx(ids.numel() * (without.training + 3 * others), rel=biases or 1e-3)


@pytest.mark.parametrize(("scope", "accumulation"), [("global_batch", 4), ("global_batch", 1), ("last_batch", 4)])
def test_only_an_accumulated_global_batch_is_counted_ahead(scope: Any, accumulation: int) -> None:
    assert counts_ahead(Balance(scope=scope), accumulation) == (scope == "global_batch" and accumulation > 1)
    assert not counts_ahead(None, accumulation) and not counts_ahead(Balance(loss=0), accumulation)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scope": "global_batch", "bias": "sign"}, "scope: a bias turns the balance loss off, so nothing counts"),
        ({"bias": "quantile", "bias_rate": 0.1}, "bias_rate needs bias: sign"),
        ({"bias_rate": 0.1}, "bias_rate needs bias: sign"),
        ({"loss": 0, "scope": "global_batch"}, "scope: a loss of 0 turns the balance loss off"),
        ({"loss": 0, "bias": "sign", "scope": "sequence"}, "scope: a loss of 0 turns the balance loss off"),
        ({"target": {}}, "target: is empty: give every expert a share"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Balance(**settings)
    again = Balance(**{**settings, "bias": "sign", "loss": 0.01, "target": None})
    assert Balance(**again.model_dump()) == again, "a run that resumes reads them from its folder"


def test_names_of_experts_may_be_whole_numbers() -> None:
    """As YAML reads them, and as experts of mixtures without names are called."""
    text = "balance: {target: {0: 0.5, 1: 0.5}}"
    assert Balance(**yaml.safe_load(text)["balance"]).target == {"0": 0.5, "1": 0.5}
    with pytest.raises(ValueError, match="target"):
        Balance(**yaml.safe_load("target: {true: 0.5, x: 0.5}"))

"""BAM's router losses (arXiv 2408.08274, eq. 2) against the equations written out token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from branchmix.models.routing_branchmix import load_balancing_loss, router_losses, z_loss


def random_logits(tokens: int = 24, experts: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * 2


def collapsed(tokens: int, experts: int, onto: int) -> torch.Tensor:
    logits = torch.full((tokens, experts), -20.0)
    logits[:, onto] = 20.0
    return logits


def balance_by_hand(rows: list[list[float]], top_k: int) -> float:
    """``N sum_i f_i P_i`` with f_i the share of choices and P_i the mean gate, in plain Python."""
    experts = len(rows[0])
    chosen, gates = [0.0] * experts, [0.0] * experts
    for row in rows:
        greatest = max(row)
        exponentials = [math.exp(value - greatest) for value in row]
        for expert, value in enumerate(exponentials):
            gates[expert] += value / sum(exponentials)
        for expert in sorted(range(experts), key=lambda i: -row[i])[:top_k]:
            chosen[expert] += 1
    shares = [count / (top_k * len(rows)) for count in chosen]
    return experts * sum(share * gate / len(rows) for share, gate in zip(shares, gates, strict=True))


def z_by_hand(rows: list[list[float]]) -> float:
    return sum(math.log(sum(math.exp(value) for value in row)) ** 2 for row in rows) / len(rows)


@settings(deadline=None, max_examples=30)
@given(tokens=st.integers(1, 40), experts=st.integers(2, 8), seed=st.integers(0, 1000), data=st.data())
def test_both_losses_are_the_equations(tokens: int, experts: int, seed: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts - 1))
    logits = random_logits(tokens, experts, seed)
    assert load_balancing_loss(logits, top_k).item() == pytest.approx(balance_by_hand(logits.tolist(), top_k), rel=1e-5)
    assert z_loss(logits).item() == pytest.approx(z_by_hand(logits.tolist()), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("experts", [2, 4, 7])
def test_perfect_balance_scores_one_and_collapse_n(experts: int) -> None:
    uniform = torch.zeros(experts * 3, experts)
    assert load_balancing_loss(uniform, 1).item() == pytest.approx(1.0)
    confident = torch.eye(experts).repeat(3, 1) * 40
    assert load_balancing_loss(confident, 1).item() == pytest.approx(1.0)
    assert load_balancing_loss(collapsed(12, experts, 0), 1).item() == pytest.approx(experts)


def test_z_loss_of_uniform_gates() -> None:
    assert z_loss(torch.zeros(5, 4)).item() == pytest.approx(math.log(4) ** 2)


def test_losses_are_summed_over_layers() -> None:
    layers = [random_logits(seed=seed) for seed in range(3)]
    balance, z = router_losses(layers, 2)
    assert balance.item() == pytest.approx(sum(load_balancing_loss(layer, 2).item() for layer in layers))
    assert z.item() == pytest.approx(sum(z_loss(layer).item() for layer in layers))


def test_collapse_of_each_layer_onto_another_expert_is_no_balance() -> None:
    """Pooled over layers, as in transformers' own function, this would score as perfect balance."""
    layers = [collapsed(12, 4, onto) for onto in range(4)]
    assert router_losses(layers, 1)[0].item() == pytest.approx(4 * 4)
    assert load_balancing_loss(torch.cat(layers), 1).item() == pytest.approx(1.0)


def test_padding_never_counts() -> None:
    logits = random_logits(3 * 8)
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[0, :5] = 0
    mask[2, 6:] = 0
    real = logits[mask.flatten().bool()]
    for masked, alone in zip(router_losses([logits], 2, mask), router_losses([real], 2), strict=True):
        assert masked.item() == pytest.approx(alone.item(), rel=1e-5)
    poisoned = logits.clone()
    poisoned[~mask.flatten().bool()] = 1e4
    for masked, before in zip(router_losses([poisoned], 2, mask), router_losses([logits], 2, mask), strict=True):
        assert masked.item() == pytest.approx(before.item(), rel=1e-6)


def test_all_padding_scores_zero() -> None:
    assert [loss.item() for loss in router_losses([random_logits(8)], 1, torch.zeros(1, 8))] == [0.0, 0.0]


def test_a_mask_longer_than_the_tokens_counts_from_its_end() -> None:
    """With a cache, the mask covers earlier tokens too."""
    logits = random_logits(2 * 3)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0
    assert router_losses([logits], 1, mask)[0].item() == pytest.approx(load_balancing_loss(logits, 1).item())


def test_masks_of_four_dimensions_are_not_looked_at() -> None:
    logits = random_logits(8)
    for mask in (torch.zeros(1, 1, 8, 8), {"full_attention": torch.zeros(1, 1, 8, 8)}):
        assert router_losses([logits], 1, mask)[0].item() == pytest.approx(load_balancing_loss(logits, 1).item())


def test_soft_routing_has_no_balance_to_lose() -> None:
    balance, z = router_losses([random_logits(experts=4)], 4)
    assert balance.item() == 0 and z.item() > 0


def test_half_precision_logits_are_scored_in_fp32() -> None:
    logits = random_logits().bfloat16()
    assert load_balancing_loss(logits, 1).dtype == z_loss(logits).dtype == torch.float32
    assert z_loss(logits).item() == pytest.approx(z_loss(logits.float()).item())


def test_gradient_pushes_towards_balance() -> None:
    logits = collapsed(12, 4, 1).div(20).requires_grad_()
    load_balancing_loss(logits, 1).backward()
    assert (logits.grad[:, 1] > 0).all() and (logits.grad[:, [0, 2, 3]] < 0).all()

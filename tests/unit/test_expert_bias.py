"""Biases of routers: what they change, and how a step moves them, against sums and sorts written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from branchmix.models.attention_branchmix import BranchMixAttention
from branchmix.models.balance_branchmix import BranchMixBalance
from branchmix.models.routing_branchmix import BranchMixFFNRouter, BranchMixRouter, load_balancing_loss
from branchmix.train.counters import RouterMonitor
from mixtures import close, load, random_mixture, tokens


def biased(name: str = "llama", attention: str = "kv_experts", *, std: float = 0.3, **options: Any) -> Any:
    """A mixture of three experts whose routers choose 1 for attention and 2 for the FFN, by random biases."""
    model = random_mixture(name, attention, attention_num_experts_per_tok=1, expert_bias=True, **options)
    generator = torch.Generator().manual_seed(5)
    for router in routers(model):
        router.expert_bias.copy_(torch.randn(3, generator=generator) * std)
    return model


def routers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BranchMixRouter)]


# ---- What they change ----


def test_they_change_the_choice_and_neither_logits_nor_gates() -> None:
    model, hidden = biased(), torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    router = next(module for module in routers(model) if isinstance(module, BranchMixFFNRouter))
    hidden = hidden[:, : router.weight.shape[1]]
    logits, gates, index = router(hidden)
    close(logits, hidden @ router.weight.T)
    plainly = 0
    for token, all_gates in enumerate(logits.detach().softmax(-1)):
        best = sorted(range(3), key=lambda e: -float(all_gates[e] + router.expert_bias[e]))[:2]
        assert index[token].tolist() == best
        close(gates[token], all_gates[best])
        plainly += set(best) == set(all_gates.topk(2).indices.tolist())
    assert 5 < plainly < 35, "or the bias decides nothing or everything"
    gates.sum().backward()
    assert router.weight.grad.abs().max() > 0 and not router.expert_bias.requires_grad


@pytest.mark.parametrize("attention", ["kv_experts", "kv_sharing"])
def test_biases_of_zero_are_none(attention: str) -> None:
    ids = tokens()
    with torch.no_grad():
        plain = random_mixture("llama", attention, attention_num_experts_per_tok=1)(ids).logits
        assert torch.equal(biased("llama", attention, std=0.0)(ids).logits, plain)
        assert not torch.allclose(biased("llama", attention)(ids).logits, plain, atol=1e-3)


@pytest.mark.parametrize("attention", ["kv_experts", "kv_sharing"])
def test_heads_that_are_computed_alone_are_those_of_the_choice(attention: str) -> None:
    model, ids, found = biased("llama", attention), tokens(), []
    for sparse in (False, True):
        for module in model.modules():
            if isinstance(module, BranchMixAttention):
                module.sparse = sparse
        found.append(model(ids).logits)
    close(*found)


def test_soft_routers_have_none() -> None:
    model = random_mixture("llama", num_experts_per_tok=3, expert_bias=True)
    assert all(router.expert_bias is None for router in routers(model))
    one_router = random_mixture("cohere", shared_router=True, attention_num_experts_per_tok=1, expert_bias=True)
    names = [name for name in one_router.state_dict() if "expert_bias" in name]
    assert len(names) == 4 and sum("expert_gate" in name for name in names) == 2, (
        "the load of k = 1 is not that of k = 2"
    )


def test_checkpoints_keep_them_in_fp32(tmp_path: Path) -> None:
    model, ids = biased(), tokens()
    model.save_pretrained(tmp_path)
    close(load(tmp_path)(ids).logits, model(ids).logits, 1e-6)
    half = load(tmp_path, dtype=torch.bfloat16)
    for ours, theirs in zip(routers(half), routers(model), strict=True):
        assert ours.weight.dtype == torch.bfloat16 and torch.equal(ours.expert_bias, theirs.expert_bias)
    random_mixture("llama").save_pretrained(tmp_path / "plain")
    assert all(router.expert_bias is None for router in routers(load(tmp_path / "plain")))


def test_the_balance_loss_counts_what_was_chosen() -> None:
    model, ids = biased(), tokens()
    out = model(ids, labels=ids, output_router_logits=True)
    biases = [module.expert_bias for module in routers(model) if isinstance(module, BranchMixFFNRouter)]
    expected = sum(load_balancing_loss(x, 2, bias_E=b) for x, b in zip(out.router_logits, biases, strict=True))
    close(out.aux_loss, expected)
    assert not torch.allclose(out.aux_loss, sum(load_balancing_loss(x, 2) for x in out.router_logits))


def test_the_run_reports_the_load_of_what_was_chosen() -> None:
    model, ids = biased(), tokens(4, 9)
    monitor = RouterMonitor(model, ["text"])
    out = model(ids, **monitor.options)
    monitor.add(out, torch.zeros(4, dtype=torch.long))
    logits = {"ffn": out.router_logits, "attention": out.attention_router_logits}
    seen = {"ffn": 0, "attention": 0}
    modules: dict[str, list[Any]] = {"ffn": [], "attention": []}
    for module in routers(model):
        modules["ffn" if isinstance(module, BranchMixFFNRouter) else "attention"].append(module)
    for router in monitor.read().routers:
        gates, module = logits[router.kind][router.layer].softmax(-1), modules[router.kind][router.layer]
        counts = counted(gates, module.top_k, module.expert_bias)
        assert router.load == pytest.approx([count / sum(counts) for count in counts])
        seen[router.kind] += counts != counted(gates, module.top_k, torch.zeros(3))
    assert all(seen.values()), "or the biases decide nothing"


# ---- How a step moves them ----


def step(model: Any, *batches: torch.Tensor, mask: torch.Tensor | None = None) -> list[tuple[Any, torch.Tensor]]:
    """An optimizer step without an optimizer. Returns each router, and its gates before: [S, E] of real tokens."""
    gates: dict[Any, list[torch.Tensor]] = {}

    def see(module: Any, args: Any, output: Any) -> None:
        own = output[0].detach().softmax(-1).flatten(0, -2)
        gates.setdefault(module, []).append(own if mask is None else own[mask.flatten().bool()])

    hooks = [router.register_forward_hook(see) for router in routers(model)]
    model.train()
    for ids in batches:
        model(ids, labels=ids, **({} if mask is None else {"attention_mask": mask}))
    for hook in hooks:
        hook.remove()
    before = [router.expert_bias.clone() for router in routers(model)]
    model.balance.end_step()
    for router, bias in zip(routers(model), before, strict=True):
        router.before = bias
    return [(router, torch.cat(own)) for router, own in gates.items()]


def counted(gates: torch.Tensor, top_k: int, bias: torch.Tensor) -> list[int]:
    counts = [0, 0, 0]
    for row in (gates + bias).tolist():
        for expert in sorted(range(3), key=lambda e: -row[e])[:top_k]:
            counts[expert] += 1
    return counts


TARGETS = [None, [0.21, 0.31, 0.48]]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("masked", [False, True])
def test_sign_moves_each_towards_its_share(masked: bool, target: list[float] | None) -> None:
    model = biased()
    model.balance = BranchMixBalance(bias="sign", bias_rate=0.01, target=target)
    mask = (torch.arange(22).reshape(2, 11) % 3 > 0).long() if masked else None
    for router, gates in step(model, tokens(), tokens(seed=1), mask=mask):
        counts = counted(gates, router.top_k, router.before)
        for expert, count in enumerate(counts):
            wanted = sum(counts) * target[expert] if target else sum(counts) / 3
            moved = 0.01 * ((wanted > count) - (wanted < count))
            assert float(router.expert_bias[expert] - router.before[expert]) == pytest.approx(moved, abs=1e-6)
    assert not model.balance._step


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("masked", [False, True])
def test_quantiles_are_the_formula(masked: bool, target: list[float] | None) -> None:
    model = biased()
    model.balance = BranchMixBalance(bias="quantile", target=target)
    mask = (torch.arange(22).reshape(2, 11) % 3 > 0).long() if masked else None
    for router, gates in step(model, tokens(), tokens(seed=1), mask=mask):
        k, (m, n), beta = router.top_k, gates.shape, -router.before
        alpha = torch.stack([sorted(row - beta, reverse=True)[k] for row in gates])
        for expert in range(n):
            values = sorted((gates[:, expert] - alpha).tolist(), reverse=True)
            place = int(m * k * target[expert]) if target else m * k // n
            assert float(-router.expert_bias[expert]) == pytest.approx(values[place], abs=1e-6)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("bias", "steps"), [("sign", 60), ("quantile", 16)])
def test_without_a_loss_the_load_becomes_what_it_should(bias: Any, steps: int, target: list[float] | None) -> None:
    """Only the biases move here, from a start at which one expert gets nearly everything."""
    model = biased()
    for router in routers(model):
        router.expert_bias.copy_(torch.tensor([0.4, 0.0, -0.4]))
    model.balance = BranchMixBalance(bias=bias, bias_rate=0.01, target=target)
    wanted = target or [1 / 3] * 3
    ids = tokens(8, 32)
    violations = []
    for _ in range(steps):
        worst = 0.0
        for router, gates in step(model, ids):
            counts = counted(gates, router.top_k, router.before)
            worst = max(worst, *(count / share / sum(counts) - 1 for count, share in zip(counts, wanted, strict=True)))
        violations.append(worst)
    assert violations[0] > 0.4 and max(violations[-3:]) < 0.1, violations

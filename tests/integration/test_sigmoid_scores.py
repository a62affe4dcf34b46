"""Sigmoid scores of FFN routers: gates, choice and losses by a few lines of plain Python, and all that reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import branchmix
from branchmix.accounting import inspect
from branchmix.errors import CheckpointError, RecipeError
from branchmix.models.documents_branchmix import MOST_SHARE, document_logits
from branchmix.models.kept_branchmix import expert_shares, keep_experts
from branchmix.models.routers import Rule, find_routers
from branchmix.models.routing_branchmix import BranchMixFFNRouter, z_loss
from branchmix.train.counters import RouterMonitor
from checkpoints import config
from mixtures import close, gated, load, random_mixture, recipe, tokens

Siblings = Callable[..., dict[str, Path]]
SIGMOID: dict[str, Any] = {"scoring_func": "sigmoid"}


def ffn_routers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BranchMixFFNRouter)]


def biased(model: Any) -> Any:
    """With random biases of the FFN routers' choices, as torchtitan's routers have them."""
    model.config.expert_bias = True
    for number, router in enumerate(ffn_routers(model)):
        router.add_bias()
        router.expert_bias.copy_(torch.tensor([0.2, 0.0, -0.2]).roll(number))
    return model


def by_hand(logits: list[float], bias: list[float], top_k: int, normalize: bool) -> dict[int, float]:
    """Gate of each chosen expert: the k largest of score plus bias, weighted by their scores."""
    scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    best = sorted(range(len(scores)), key=lambda e: -(scores[e] + bias[e]))[:top_k]
    total = sum(scores[e] for e in best) if normalize else 1.0
    return {e: scores[e] / total for e in best}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", ["llama", "cohere", "gpt2"])
def test_gates_are_sigmoids_and_a_bias_changes_the_choice_only(name: str, normalize: bool) -> None:
    """Also with what the document adds to the logits, which is much here."""
    model = biased(gated(name, norm_topk_prob=normalize, **SIGMOID))
    seen: list[tuple[Any, ...]] = []
    for router in ffn_routers(model):
        router.register_forward_hook(
            lambda module, args, out: seen.append((module, args[0] @ module.weight.T, document_logits("ffn"), *out))
        )
    with torch.no_grad():
        model(tokens())
    assert len(seen) == 2
    plainly = 0
    for router, from_token, from_document, logits, gates, index in seen:
        close(logits, from_token + from_document.reshape(logits.shape))
        for token, own in enumerate(logits.tolist()):
            wanted = by_hand(own, router.expert_bias.tolist(), 2, normalize)
            assert index[token].tolist() == list(wanted)
            close(gates[token], torch.tensor(list(wanted.values())))
            plainly += wanted.keys() == by_hand(own, [0.0] * 3, 2, normalize).keys()
    assert 0 < plainly < 44, "or the bias decides nothing or everything"


def test_what_the_document_says_is_the_score() -> None:
    """The shares that a softmax router would have, also of two experts alike; and those that ``experts`` chooses by."""
    model, softmax, ids = gated("llama", **SIGMOID), gated("llama"), tokens()
    gates = [mixture.document_gate for mixture in (model, softmax)]
    with torch.no_grad():
        for gate in gates:
            gate.evidence.mul_(5)
            gate.ffn[:, :2] = torch.tensor([[0.0, -20.0, 0.0], [20.0, 0.0, 0.0]]).T
        (ours, _), (theirs, _) = (gate(ids) for gate in gates)
        shares = theirs.ffn.softmax(-1)
        close(ours.ffn.sigmoid(), shares.clamp(max=MOST_SHARE))
        close(ours.attention, theirs.attention)
        close(expert_shares(model, ids), expert_shares(softmax, ids), 1e-3)
    assert shares.max() > MOST_SHARE and ((shares[..., 0] - 0.5).abs() < 0.01).any()


def test_attention_gates_stay_a_softmax() -> None:
    model, ids = random_mixture("llama", **SIGMOID), tokens()
    sums = []
    for place in find_routers(model):
        if place.kind == "attention":
            place.module.register_forward_hook(lambda module, args, out: sums.append(out[1].sum(-1)))
    model(ids)
    assert len(sums) == 2
    for each in sums:
        close(each, torch.ones_like(each))


def test_the_balance_loss_is_of_shares_of_scores_and_the_z_loss_of_logits() -> None:
    """DeepSeek-V3 (arXiv 2412.19437), eq. 17 to 20, summed over layers; and training reports the same load."""
    model, ids = biased(random_mixture("llama", **SIGMOID)), tokens()
    monitor = RouterMonitor(model, ["text"])
    out = model(ids, labels=ids, **monitor.options)
    monitor.add(out, torch.zeros(len(ids), dtype=torch.long))
    loads = [router.load for router in monitor.read().routers if router.kind == "ffn"]
    expected = 0.0
    for router, logits, load_E in zip(ffn_routers(model), out.router_logits, loads, strict=True):
        f, p = [0.0] * 3, [0.0] * 3
        for row in logits.tolist():
            scores = [1 / (1 + math.exp(-logit)) for logit in row]
            for e in by_hand(row, router.expert_bias.tolist(), 2, False):
                f[e] += 1 / (2 * len(logits))
            p = [total + score / sum(scores) / len(logits) for total, score in zip(p, scores, strict=True)]
        expected += 3 * sum(a * b for a, b in zip(f, p, strict=True))
        assert load_E == pytest.approx(f)
    assert out.aux_loss.item() == pytest.approx(expected, abs=1e-5)
    close(out.z_loss, sum(z_loss(logits) for logits in out.router_logits))


def test_a_step_counts_what_sigmoids_and_biases_choose() -> None:
    """A bias moves up where scores plus bias chose an expert too rarely."""
    model, ids = biased(random_mixture("llama", **SIGMOID)).train(), tokens(4, 9)
    model.balance.bias, model.balance.bias_rate = "sign", 0.01
    before = [router.expert_bias.clone() for router in ffn_routers(model)]
    out = model(ids, labels=ids, output_router_logits=True)
    model.balance.end_step()
    for router, bias, logits in zip(ffn_routers(model), before, out.router_logits, strict=True):
        counts = [0] * 3
        for row in logits.tolist():
            for e in by_hand(row, bias.tolist(), 2, False):
                counts[e] += 1
        moved = [0.01 * ((sum(counts) / 3 > count) - (sum(counts) / 3 < count)) for count in counts]
        close(router.expert_bias - bias, torch.tensor(moved), 1e-6)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_kept_experts_have_the_scores_that_they_had(name: str) -> None:
    mixture, ids = biased(random_mixture(name, norm_topk_prob=True, **SIGMOID)), tokens()
    kept = keep_experts(mixture, [0, 2])

    def without(module: Any, args: Any, out: Any) -> Any:
        gates = out[0].sigmoid()[:, [0, 2]]
        return out[0], gates / gates.sum(-1, keepdim=True), torch.tensor([[0, 2]]).expand(len(gates), 2)

    def soft_without(module: Any, args: Any, out: Any) -> Any:
        logits = out[0].clone()
        logits[..., 1] = -torch.inf
        return logits, logits.softmax(-1)

    with torch.no_grad():
        ours = kept(ids).logits
        outputs = mixture(ids, output_router_logits=True)
        layers = [x.sigmoid() / x.sigmoid().sum(-1, keepdim=True) for x in outputs.router_logits]
        layers += [x.softmax(-1) for x in outputs.attention_router_logits]
        close(expert_shares(mixture, ids), torch.stack(layers).mean(0).view(*ids.shape, -1).mean(1))
        for place in find_routers(mixture):
            place.module.register_forward_hook(without if place.kind == "ffn" else soft_without)
        close(ours, mixture(ids).logits)


def test_a_raw_scale_for_even_gates_stays_that_one() -> None:
    """2 / k, since a sigmoid of 0 is 1 / 2 however many experts there are."""
    even = random_mixture("llama", routed_scaling_factor=1.0, **SIGMOID)
    assert even.config.scaling_for(3, 1) == 2.0 and even.config.scaling_for(2, 2) == 1.0
    assert keep_experts(even, [0, 1]).config.routed_scaling_factor == 1.0
    other = random_mixture("llama", routed_scaling_factor=1.5, **SIGMOID)
    assert keep_experts(other, [0, 1]).config.routed_scaling_factor == 1.5, "N / k is that of a softmax"


def test_the_pages_of_routing_see_sigmoids() -> None:
    model, ids = random_mixture("llama", **SIGMOID), tokens(4)
    place = next(place for place in find_routers(model) if place.kind == "ffn")
    rules = []
    place.module.register_forward_hook(lambda module, args, out: rules.append(Rule.found_in(place.read(out))))
    model(ids)
    assert rules == [Rule("sigmoid", "raw", True)]


# ---- On disk ----


def test_from_a_recipe_to_a_trained_and_edited_mixture(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("llama")
    two = {name: models[name] for name in ("seed", "code")}
    given = recipe(two, routing={"ffn": {"top_k": 2, "score": "sigmoid"}}, routed_scaling_factor="auto")
    report = branchmix.upcycle(given, tmp_path / "two", verify=True)
    assert report.verification is not None
    written = config(tmp_path / "two")
    assert (written["scoring_func"], written["routed_scaling_factor"]) == ("sigmoid", 1.0)
    branchmix.add_expert(tmp_path / "two", "math", models["math"], tmp_path / "three")
    written = config(tmp_path / "three")
    assert (written["scoring_func"], written["routed_scaling_factor"]) == ("sigmoid", 1.0), "2 / k, and not N / k"
    model, ids = load(tmp_path / "three"), tokens()
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(ids).logits, model(ids).logits)
    softmax = load(tmp_path / "three", scoring_func="softmax")
    assert not torch.allclose(softmax(ids).logits, model(ids).logits, atol=1e-3)
    softmax.save_pretrained(tmp_path / "softmax")
    assert inspect(tmp_path / "three").active == inspect(tmp_path / "softmax").active


@pytest.mark.parametrize(
    ("gates", "factor", "size"),
    [
        ({"top_k": 1}, 1.0, "0.5"),
        ({"top_k": 1}, "auto", None),
        ({"top_k": 2}, 1.0, None),
        ({"top_k": 2}, 1.5, "1.5"),
        ({"soft": True}, 1.0, "1.5"),
        ({"soft": True}, "auto", None),
        ({"top_k": 2, "normalize": True}, 1.5, None),
    ],
)
def test_raw_gates_that_change_the_scale_are_said(
    gates: dict[str, Any], factor: Any, size: str | None, siblings: Siblings, tmp_path: Path
) -> None:
    routing = {"ffn": {**gates, "score": "sigmoid"}}
    given = recipe(siblings("llama"), routing=routing, routed_scaling_factor=factor)
    notes = branchmix.upcycle(given, tmp_path / "out", dry_run=True).plan.notes
    wanted = [] if size is None else [f"scale the FFN output by about {size}: routed_scaling_factor: auto"]
    found = [note for note in notes if "raw" in note]
    assert len(found) == len(wanted) and all(text in note for text, note in zip(wanted, found, strict=True))


def test_what_has_no_sigmoid_is_refused(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("cohere")
    routing: dict[str, Any] = {"ffn": {"score": "sigmoid"}, "shared": True}
    with pytest.raises(RecipeError, match=r"routing.shared: .* score: sigmoid needs a router of its own"):
        branchmix.upcycle(recipe(models, routing=routing), tmp_path / "no")
    with pytest.raises(RecipeError, match=r"routing.attention.score"):
        branchmix.upcycle(recipe(models, routing={"attention": {"score": "sigmoid"}}), tmp_path / "no")
    with pytest.raises(RecipeError, match=r"routing.ffn.score: 'sigmod' is not one of softmax, sigmoid"):
        branchmix.upcycle(recipe(models, routing={"ffn": {"score": "sigmod"}}), tmp_path / "no")
    branchmix.upcycle(recipe(models, routing={"ffn": {}, "shared": True}), tmp_path / "mixture")
    for change, message in (
        ({"scoring_func": "sigmoid"}, "sigmoid needs FFN experts with a router of their own"),
        ({"scoring_func": "sigmod"}, "did you mean 'sigmoid'"),
    ):
        file = tmp_path / "mixture" / "config.json"
        file.write_text(json.dumps(config(tmp_path / "mixture") | change))
        with pytest.raises(CheckpointError, match=message):
            inspect(tmp_path / "mixture")
        with pytest.raises(ValueError, match=r"scoring_func"):
            load(tmp_path / "mixture")

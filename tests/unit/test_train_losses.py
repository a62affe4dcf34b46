"""The loss by domain is the family's own loss, added up by domain: same values, same gradients, router losses kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from branchmix.train.counters import DomainLoss
from families import BY_NAME, NAMES
from mixtures import close, random_mixture, tokens

DENSE = {name: lambda name=name: BY_NAME[name].model(0) for name in NAMES}
MIXTURES = {
    f"mixture-{name}": lambda name=name: random_mixture(name, router_aux_loss_coef=0.5, router_z_loss_coef=0.1)
    for name in ("llama", "cohere", "gemma2", "granite", "gpt2", "opt")
}
MODELS: dict[str, Any] = {**DENSE, **MIXTURES}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Four sequences, some of whose labels are left out."""
    ids_BT = tokens(4, 11)
    labels_BT = ids_BT.clone()
    labels_BT[:, 0] = labels_BT[1, 5] = labels_BT[3, 2:9] = -100
    return ids_BT, labels_BT


def loss_and_gradients(model: Any, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids_BT, labels_BT = batch()
    torch.manual_seed(0)  # dropout
    model.train().zero_grad()
    loss = model(input_ids=ids_BT, labels=labels_BT, **options).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


@pytest.mark.parametrize("items", [None, 37, torch.tensor(37)], ids=["mean", "number", "tensor"])
@pytest.mark.parametrize("name", MODELS)
def test_is_the_familys_own_loss(name: str, items: Any) -> None:
    model = MODELS[name]()
    options = {} if items is None else {"num_items_in_batch": items}
    theirs, their_gradients = loss_and_gradients(model, **options)
    domains = DomainLoss(["a", "b"])
    with domains.counting(model, torch.tensor([0, 1, 1, 0])):
        ours, our_gradients = loss_and_gradients(model, **options)
    close(ours, theirs, 1e-6)
    assert our_gradients.keys() == their_gradients.keys()
    for parameter, gradient in their_gradients.items():
        close(our_gradients[parameter], gradient, 1e-6)
    assert domains.read()[1].keys() == {"a", "b"}, "the family called another loss"


@pytest.mark.parametrize("name", ["llama", "cohere", "mixture-granite"])
def test_adds_up_each_domain_over_batches(name: str) -> None:
    model = MODELS[name]().eval()
    ids_BT, labels_BT = batch()
    with torch.no_grad():
        logits_BTV = model(ids_BT).logits
    nll_BT = F.cross_entropy(logits_BTV[:, :-1].transpose(1, 2), labels_BT[:, 1:], reduction="none")
    domains = DomainLoss(["code", "law", "none"])
    with torch.no_grad():
        for rows, numbers in (((0, 1, 2), (0, 1, 1)), ((3,), (0,))):
            with domains.counting(model, torch.tensor(numbers)):
                model(input_ids=ids_BT[list(rows)], labels=labels_BT[list(rows)])
        model(input_ids=ids_BT, labels=labels_BT)  # counts nowhere
    mean, by_domain = domains.read()
    assert by_domain.keys() == {"code", "law"}
    for domain, rows, count in (("code", [0, 3], 10 + 3), ("law", [1, 2], 9 + 10)):
        assert by_domain[domain] == pytest.approx(float(nll_BT[rows].sum()) / count, rel=1e-5)
    assert mean == pytest.approx(float(nll_BT.sum()) / 32, rel=1e-5)
    assert domains.read()[1] == {}, "a reading starts from zero"


def test_names_the_domain_that_is_no_number() -> None:
    domains = DomainLoss(["code", "law"])
    assert domains.blamed() == []
    logits_BTV = torch.zeros(2, 3, 5)
    logits_BTV[1, 1, 2] = torch.nan
    domains(logits_BTV, torch.tensor([[1, 2, 3], [1, 2, 3]]), vocab_size=5, domain_B=torch.tensor([0, 1]))
    assert domains.blamed() == ["law"]

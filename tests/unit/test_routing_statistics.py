"""Numbers about shares of experts: cases by hand, the bias of mutual information by drawing, typical tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest

from branchmix.evaluate.routing.routing_report import mutual_information, mutual_information_bias, typical_tokens


@pytest.mark.parametrize("domains", [2, 3, 4, 8])
def test_an_expert_for_each_domain_tells_all(domains: int) -> None:
    assert mutual_information(np.eye(domains)) == pytest.approx(math.log2(domains))
    shared = np.kron(np.eye(domains), np.full((1, 2), 0.5))  # two experts each, half and half: they tell as much
    assert mutual_information(shared) == pytest.approx(math.log2(domains))


def test_domains_that_use_the_experts_alike_tell_nothing() -> None:
    assert mutual_information(np.tile([0.7, 0.2, 0.1], (4, 1))) == pytest.approx(0.0, abs=1e-12)


def test_mutual_information_is_that_of_the_joint_distribution() -> None:
    shares_DE = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    joint = shares_DE / 2
    by_hand = sum(
        p * math.log2(p / (joint[d].sum() * joint[:, e].sum()))
        for d in range(2)
        for e in range(3)
        for p in [joint[d, e]]
    )
    assert mutual_information(shares_DE) == pytest.approx(by_hand)


@pytest.mark.parametrize(("tokens", "topics"), [(40, False), (200, False), (60, True)])
def test_what_chance_alone_gives_is_taken_off(tokens: int, topics: bool) -> None:
    """Domains alike, in truth; with ``topics`` each document prefers experts of its own, as real ones do."""
    draw = np.random.default_rng(0)
    plain, corrected = [], []
    for _ in range(300):
        domain_N = np.repeat(np.arange(3), 20)
        tokens_N = draw.integers(tokens // 2, 2 * tokens, size=60)
        chances = draw.dirichlet(np.full(4, 8.0), size=60) if topics else np.full((60, 4), 0.25)
        load_NE = np.array([draw.multinomial(n, p) for n, p in zip(tokens_N, chances, strict=True)], dtype=float)
        shares = [load_NE[domain_N == d].sum(0) / tokens_N[domain_N == d].sum() for d in range(3)]
        plain.append(mutual_information(np.array(shares)))
        corrected.append(plain[-1] - mutual_information_bias(load_NE, tokens_N, domain_N))
    assert min(plain) > 0
    assert abs(np.mean(corrected)) < 0.12 * np.mean(plain)


def test_the_correction_is_that_of_miller_and_madow_for_single_documents() -> None:
    load_NE, tokens_N = np.array([[30.0, 20.0], [10.0, 40.0]]), np.array([50, 50])
    found = mutual_information_bias(load_NE, tokens_N, np.array([0, 1]))
    # (E - 1) / (2 n ln 2) of each domain's entropy, less that of the mean's: sum of variances / 4 over 2 ln 2 p.
    within = 1 / 50
    between = sum(((0.6 * 0.4 + 0.2 * 0.8) / 50) / 4 / p for p in (0.4, 0.6))
    assert found == pytest.approx((within - between) / (2 * math.log(2)))


def test_typical_tokens_are_frequent_and_peculiar() -> None:
    count_V = np.array([100.0, 100.0, 4.0, 96.0])
    # Expert 0 gets a third of the commonest one, like of all; nearly all of the second; all of a rare one; none of one.
    load_0 = np.array([40.0, 80.0, 4.0, 0.0])
    load_VE = np.stack([load_0, count_V - load_0], axis=1)
    found = typical_tokens(load_VE, count_V, 0)
    assert [v for v, _ in found] == [1, 2]
    assert [share for _, share in found] == pytest.approx([0.8, 1.0])
    assert typical_tokens(load_VE, count_V, 0, most=1) == found[:1]
    assert typical_tokens(np.zeros((4, 2)), count_V, 1) == []

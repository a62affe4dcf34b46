"""What a study calls different: by hand."""

from __future__ import annotations

import math

import pytest

from branchmix.study.comparisons import compare, difference, log_perplexity, t_interval


def documents(*nats: float, tokens: int = 10) -> list[list[float]]:
    return [[value, tokens, 40] for value in nats]


def test_students_interval() -> None:
    """1, 2, 3: mean 2, deviation 1; the quantile of 2 degrees of freedom at 97.5 % is 4.302653."""
    found = t_interval([1.0, 2.0, 3.0])
    assert found == {
        "value": pytest.approx(2.0),
        "half_width": pytest.approx(4.302653 / math.sqrt(3), rel=1e-6),
        "n": 3,
    }
    assert t_interval([5.0]) == {"value": 5.0, "half_width": None, "n": 1}


def test_log_perplexity_weighs_tokens() -> None:
    found = log_perplexity({"law": [[30.0, 10, 40], [10.0, 10, 40], [20.0, 80, 300]]})
    assert found == {"law": pytest.approx(60 / 100)}


def test_an_error_over_documents() -> None:
    """Differences of 1 and 3 nats on 10 tokens each: 0.2 a token, and sqrt(2 / 1 * (1 + 1)) / 20 = 0.1."""
    found = difference(documents(11, 23), documents(10, 20))
    assert found == {"value": pytest.approx(0.2), "half_width": pytest.approx(2 * 0.1), "n": 1}


def test_repetitions_are_paired() -> None:
    """Two repetitions of very different level, in which ours is better by 0.1 and 0.12 a token."""
    ours = [{"a": documents(49, 49)}, {"a": documents(18.8, 18.8)}]
    theirs = [{"a": documents(50, 50)}, {"a": documents(20, 20)}]
    found = compare(ours, theirs)
    assert found["over"] == "repetitions"
    assert found["repetitions"] == pytest.approx([-0.1, -0.12])
    assert found["log_perplexity"]["value"] == pytest.approx(-0.11)
    assert found["log_perplexity"]["half_width"] == pytest.approx(
        12.7062047 * 0.01, rel=1e-5
    )  # t of 1 degree, deviation 0.0141 / sqrt 2
    assert not found["significant"]
    assert found["relative"] == pytest.approx(math.expm1(-0.11))


def test_domains_count_alike() -> None:
    ours = [{"a": documents(10, 10, tokens=1000), "b": documents(13, 13)}] * 3
    theirs = [{"a": documents(10, 10, tokens=1000), "b": documents(10, 10)}] * 3
    found = compare(ours, theirs)
    assert found["log_perplexity"]["value"] == pytest.approx(0.15) and found["significant"]
    assert found["by_domain"]["b"]["value"] == pytest.approx(0.3) and found["by_domain"]["a"]["value"] == 0


def test_one_repetition_has_only_the_error_over_documents() -> None:
    """In one domain 0.2 ± 0.1, in the other 0.4 ± 0.1: mean 0.3, twice sqrt(0.02) / 2."""
    ours = {"a": documents(11, 23), "b": documents(13, 25)}
    theirs = {"a": documents(10, 20), "b": documents(10, 20)}
    found = compare([ours], [theirs])
    assert found["over"] == "documents"
    assert found["log_perplexity"]["value"] == pytest.approx(0.3)
    assert found["log_perplexity"]["half_width"] == pytest.approx(math.sqrt(0.02))
    assert found["significant"]
    alone = compare([{"a": documents(1)}], [{"a": documents(2)}])
    assert alone["log_perplexity"]["half_width"] is None and not alone["significant"]

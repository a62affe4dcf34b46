"""Two models on the same questions: intervals, p and what can be detected, against independent code."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.power import TTestPower

from branchmix.cli.console import differences
from branchmix.statistics import adjusted_of, paired_difference


def answers(both: int, first: int, second: int, neither: int) -> tuple[list[int], list[int]]:
    return [1] * (both + first) + [0] * (second + neither), [1] * both + [0] * first + [1] * second + [0] * neither


@pytest.mark.parametrize("counts", [(40, 12, 4, 44), (10, 3, 3, 4), (5, 0, 9, 1), (0, 1, 0, 20)])
def test_p_of_right_and_wrong_answers_is_mcnemars(counts: tuple[int, int, int, int]) -> None:
    found = paired_difference(*answers(*counts))
    both, first, second, neither = counts
    assert found is not None
    assert found.p == pytest.approx(mcnemar([[both, first], [second, neither]], exact=True).pvalue)
    assert found.difference == pytest.approx((second - first) / sum(counts)) and found.n == sum(counts)
    assert found.interval[0] < found.difference < found.interval[1]


def test_the_interval_of_bonett_and_price() -> None:
    """By hand: 12 and 4 of 100, so 13 and 5 of 102."""
    found = paired_difference(*answers(40, 12, 4, 44))
    up, down = 5 / 102, 13 / 102
    margin = 1.959964 * math.sqrt((up + down - (up - down) ** 2) / 102)
    assert found is not None and found.interval == pytest.approx((up - down - margin, up - down + margin), rel=1e-6)


def test_models_that_always_agree_are_not_known_to_be_alike() -> None:
    found = paired_difference(*answers(30, 0, 0, 10))
    assert found is not None and found.difference == 0 and found.p == 1
    assert found.interval[0] < -0.04 and found.interval[1] > 0.04
    assert found.detectable > 0.05


def test_other_scores_have_students_interval_and_p() -> None:
    random = np.random.default_rng(0)
    first, second = random.normal(size=(2, 30))
    found = paired_difference(list(first), list(second + 0.3))
    theirs = stats.ttest_rel(second + 0.3, first)
    assert found is not None and found.p == pytest.approx(theirs.pvalue)
    interval = theirs.confidence_interval(0.95)
    assert found.interval == pytest.approx((interval.low, interval.high))
    power = TTestPower().solve_power(nobs=30, alpha=0.05, power=0.8, alternative="two-sided")
    assert found.detectable == pytest.approx(power * np.std(second - first, ddof=1), rel=0.05)  # z for t: 3 % at 30


def test_questions_of_a_template_count_together() -> None:
    """Against statsmodels' cluster-robust error of a constant."""
    random = np.random.default_rng(1)
    template = np.repeat(np.arange(20), 15)
    change = random.normal(size=20)[template] * 0.5 + random.normal(size=300) * 0.1
    found = paired_difference(np.zeros(300), change, [f"t{number}" for number in template])
    fit = OLS(change, np.ones(300)).fit(cov_type="cluster", cov_kwds={"groups": template, "use_correction": False})
    stderr = fit.bse[0] * math.sqrt(20 / 19)
    assert found is not None
    assert found.interval[1] - found.difference == pytest.approx(stats.t.isf(0.025, 19) * stderr)
    alone = paired_difference(np.zeros(300), change)
    assert alone is not None and found.detectable > 3 * alone.detectable


def test_templates_that_agree_are_no_certainty() -> None:
    """Each of 6 templates has as many gains: an error over templates of 0. Without, it is Bonett and Price's."""
    first, second = [0, 0, 0, 1] * 6, [1, 0, 0, 1] * 6
    templates = np.repeat(np.arange(6), 4)
    found, alone = paired_difference(first, second, list(templates)), paired_difference(first, second)
    stderr = math.sqrt((7 / 26 + 1 / 26 - (6 / 26) ** 2) / 26)
    assert found is not None and found.interval is not None and alone is not None
    assert found.p == pytest.approx(2 * stats.t.sf(0.25 / stderr, 5)) and found.detectable == alone.detectable
    assert found.interval[1] - found.difference == pytest.approx(stats.t.isf(0.025, 5) * stderr)
    same = paired_difference(first, first, list(templates))
    assert same is not None and same.p == 1 and same.interval is not None and same.interval[0] < 0


@pytest.mark.parametrize("clusters", [None, [0, 0, 1, 1]])
def test_other_scores_that_all_differ_by_one_number_have_no_p(clusters: list[int] | None) -> None:
    found = paired_difference([0.5, 1.7, 2.9, 3.1], [0.6, 1.8, 3.0, 3.2], clusters)
    assert found is not None and found.difference == pytest.approx(0.1)
    assert found.p is None and found.interval is None and found.detectable is None
    assert adjusted_of({"a": 0.01, "b": found.p, "c": 0.04}, "bh") == {"a": 0.02, "b": None, "c": 0.04}
    row = differences("t", [("task", "loss", found, None)], alpha=0.05, correction="none").rows[0]
    assert row == ["task", "loss", "4", "+0.1000", "", "", ""]


def test_intervals_hold_and_a_detectable_difference_is_found_in_four_of_five_cases() -> None:
    """Two models that share the difficulty of 400 questions, one of them better by what is said to be detectable."""
    random = np.random.default_rng(2)
    pilot = paired_difference(*draw(random, 0.0))
    assert pilot is not None
    held = hits = wrong = 0
    for _ in range(600):
        found, same = paired_difference(*draw(random, pilot.detectable)), paired_difference(*draw(random, 0.0))
        assert found is not None and same is not None
        held += found.interval[0] <= pilot.detectable <= found.interval[1]
        hits += found.p < 0.05
        wrong += same.p < 0.05
    assert 0.93 < held / 600 < 0.975
    assert 0.70 < hits / 600 < 0.88  # McNemar's exact test is cautious: 2 to 4 points less than the formula's 80 %
    assert wrong / 600 < 0.06


def draw(random: np.random.Generator, better: float) -> tuple[list[float], list[float]]:
    known = random.random(400) < 0.5
    first = np.where(known, random.random(400) < 0.9, random.random(400) < 0.3)
    second = np.where(known, random.random(400) < 0.9, random.random(400) < 0.3 + 2 * better)
    return list(first.astype(float)), list(second.astype(float))


def test_a_single_question_says_nothing() -> None:
    assert paired_difference([1], [0]) is None and paired_difference([], []) is None

"""Curves that bend without turning, and curves that turn: the tests behind verdicts, against scipy and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression

from branchmix.scaling.trends.fit import Curve, curve, smooth_variance
from branchmix.scaling.trends.order import (
    climb,
    e_bar_squared_tail,
    flattest,
    form,
    least_favourable,
    trend,
    turn,
    turn_gain,
)
from branchmix.scaling.trends.verdict import Evidence, Limits, Verdict


def judged(values: np.ndarray, stderr: np.ndarray | float, *, loss: bool = False, least: float = 0.02) -> Verdict:
    """The verdict on one curve over three decades, as the only task."""
    found = seen(np.asarray(values, dtype=float), stderr)
    evidence = Evidence(found, runs=len(values), lower_is_better=loss, limits=Limits(minimum_effect=least))
    return evidence.verdict(evidence.p_of(as_shape=evidence.has_shape), as_shape=evidence.has_shape)


def seen(values: np.ndarray, stderr: np.ndarray | float, *, num_draws: int = 400) -> Curve:
    x = np.linspace(7, 10, len(values))
    return curve(x, values, np.broadcast_to(stderr, values.shape).astype(float), num_draws=num_draws)


def counted(values: np.ndarray, n: int = 1000) -> np.ndarray:
    """Standard errors of shares of n questions."""
    return np.sqrt(values * (1 - values) / (n - 1))


# ---- curves that bend: each was called U-shaped or inverted-U by a parabola, the surer the more data ----

BENT = {
    "saturates": ([0.30, 0.51, 0.73, 0.88, 0.89, 0.90, 0.905, 0.91], False, "standard"),
    "falls to a floor": ([0.60, 0.45, 0.30, 0.255, 0.254, 0.253, 0.252, 0.251], False, "inverse"),
    "flat, then rises": ([0.250, 0.252, 0.254, 0.256, 0.258, 0.40, 0.55, 0.70], False, "standard"),
    "a power law": (list(1.7 + 2 * np.geomspace(1, 1000, 8) ** -0.5), True, "standard"),
}


@pytest.mark.parametrize("name", BENT)
@pytest.mark.parametrize("n", [1000, 10**7])
def test_a_bend_is_not_a_turn(name: str, n: int) -> None:
    values, loss, label = BENT[name]
    y = np.array(values)
    found = judged(y, 0.02 * np.sqrt(1000 / n) if loss else counted(y, n), loss=loss)
    assert found.label == label and (found.p or 1) < 0.001 and not found.legs
    assert found.effect == pytest.approx(y[-1] - y[0])


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.floats(1e-6, 1e3), min_size=4, max_size=11),
    stderr=st.floats(1e-7, 10.0),
    falls=st.booleans(),
    loss=st.booleans(),
    least=st.sampled_from([0.0, 0.02]),
)
def test_no_strictly_monotone_curve_without_noise_turns(
    steps: list[float], stderr: float, falls: bool, loss: bool, least: float
) -> None:
    values = np.cumsum([0.0, *steps]) * (-1 if falls else 1)
    found = judged(values, stderr, loss=loss, least=least)
    assert found.label not in ("u-shaped", "inverted-u")
    assert found.label != ("standard" if falls != loss else "inverse")


def test_noise_about_a_bend_seldom_makes_a_turn() -> None:
    """A parabola turned 85 to 100 % of these at 8 sizes."""
    random = np.random.default_rng(0)
    u = np.linspace(0, 1, 8)
    for true in (
        0.3 + 0.62 * (1 - np.exp(-5 * u)),
        np.maximum(0.6 - 0.9 * u, 0.25),
        0.25 + 0.5 * np.maximum(0, u - 0.6) / 0.4,
    ):
        turned = 0
        for _ in range(40):
            y = random.binomial(1000, true + 0.01 * random.standard_normal(8)) / 1000
            turned += turn(seen(y, counted(y)), alpha=0.05, least=0.02).p < 0.05
        assert turned <= 5  # 5 % of 40 are 2; more than 5 in 1 of 100 cases


@pytest.mark.parametrize("jitter", [0.03, 0.08])
@pytest.mark.parametrize("n", [100, 20_000])
def test_plateaus_of_models_that_differ_much_seldom_turn(n: int, jitter: float) -> None:
    """Five sizes say little about how much models differ: there 6 to 8 % of such plateaus turned."""
    random = np.random.default_rng(0)
    u = np.linspace(0, 1, 5)
    turned = 0
    for true in (
        0.3 + 0.62 * (1 - np.exp(-5 * u)),
        np.minimum(0.55 + 1.05 * u, 0.97),
        np.maximum(0.6 - 0.9 * u, 0.25),
        0.25 + 0.5 * np.maximum(0, u - 0.6) / 0.4,
    ):
        for _ in range(75):
            share = np.clip(true + jitter * random.standard_normal(5), 0.01, 0.99)
            y = np.clip(random.binomial(n, share) / n, 0.5 / n, 1 - 0.5 / n)
            turned += turn(seen(y, counted(y, n), num_draws=2000), alpha=0.05, least=0.02).p < 0.05
    assert turned <= 15  # 5 % of 300


@pytest.mark.parametrize("within", [0, 20])
@pytest.mark.parametrize("sizes", [5, 6, 8, 12])
def test_no_monotone_curve_turns_more_easily_than_the_one_behind_p(sizes: int, within: int) -> None:
    """Jumps and ramps of up to 9 standard deviations and half of the axis, in units of the variance as estimated."""
    random = np.random.default_rng(0)
    noise_BK = random.standard_normal((4000, sizes))
    within_B = random.chisquare(within, 4000) if within else np.zeros(4000)
    weight_K = np.ones(sizes)
    points = replace(seen(noise_BK[0], 0.001), sampling_KK=1e-6 * np.eye(sizes), jitter_K=np.ones(sizes), within=within)

    def quantile(curve_K: np.ndarray) -> float:
        variance_B = smooth_variance(points, curve_K + noise_BK, within_B)
        return float(np.quantile(turn_gain(curve_K + noise_BK, weight_K) / variance_B, 0.96))

    own = quantile(least_favourable(sizes))
    for steps in range(1, sizes // 2 + 1):
        for height in (0.0, 1.0, 2.0, 4.0, 6.0, 9.0):
            assert quantile(height * np.minimum(np.arange(sizes) / steps, 1)) < 1.1 * own, (steps, height)
    assert quantile(np.linspace(0, 6, sizes)) < 0.5 * own


def test_a_plateau_after_a_rise_is_not_an_inverted_u() -> None:
    """Resisting-correction of Pythia at step 16,000, which a parabola called inverted-U."""
    y = np.array([0.660, 0.735, 0.841, 0.854, 0.891, 0.899, 0.872, 0.878])
    assert judged(y, counted(y, 7344)).label == "standard"


# ---- what turns is still found ----

TURNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "parabola": lambda u: 0.6 - 0.3 * (2 * u - 1) ** 2,
    "corner": lambda u: 0.6 - 0.3 * abs(2 * u - 1),
    "late": lambda u: 0.4 + 0.3 * np.minimum(u / 0.7, (1 - u) / 0.3),
}


@pytest.mark.parametrize("sizes", [6, 8, 12])
@pytest.mark.parametrize("name", TURNS)
def test_a_turn_is_found_with_both_legs_as_in_the_data(name: str, sizes: int) -> None:
    y = TURNS[name](np.linspace(0, 1, sizes))
    assert judged(y, 0.01).label == "inverted-u"
    assert judged(-y, 0.01, loss=True).label == "inverted-u"
    found = judged(1 - y, 0.01)
    assert found.label == "u-shaped"
    place = int(y.argmax())
    (drop, rise) = found.legs["drop"], found.legs["rise"]
    assert drop["effect"] == pytest.approx(y[0] - y.max(), abs=0.02)
    assert rise["effect"] == pytest.approx(y.max() - y[-1], abs=0.02)
    assert all(low < leg["effect"] < high for leg in (drop, rise) for low, high in [leg["interval"]])
    assert np.log10(found.turning_point or 0) == pytest.approx(7 + 3 * place / (sizes - 1), abs=3 / (sizes - 1) + 1e-9)


@pytest.mark.parametrize("stderr", [0.0035, 0.016])
@pytest.mark.parametrize("sizes", [8, 12])
def test_a_short_leg_is_found_and_found_more_surely_with_more_questions(sizes: int, stderr: float) -> None:
    """A fall of 11 points over a quarter of the axis, then a rise of 22: no quadratic has that corner."""
    u = np.linspace(0, 1, sizes)
    y = 0.39 + 0.22 * np.where(u < 0.25, (0.25 - u) / 0.5, (u - 0.25) / 0.75)
    assert judged(y, stderr).label == "u-shaped"


@pytest.mark.parametrize("sizes", [6, 8, 10, 12, 16])
@pytest.mark.parametrize("turns", [2, 3])
def test_what_turns_more_than_once_is_no_u(sizes: int, turns: int) -> None:
    angle = np.arccos(np.linspace(-1, 1, sizes))
    for sign in (1, -1):
        assert judged(0.5 + sign * 0.11 * np.cos((turns + 1) * angle), 0.01).label == "inconclusive"


def test_each_leg_needs_the_smallest_effect() -> None:
    y = 0.3 + 0.004 * (np.arange(8) - 5.0) ** 2
    assert judged(y, 0.0005).label == "inverse"  # the rise of 0.016 is sure, and too small
    assert judged(y, 0.0005, least=0.01).label == "u-shaped"


# ---- trends ----


def test_a_jump_in_the_middle_is_a_trend() -> None:
    """From .25 to .75 in the middle of 8 sizes: Kendall's test saw nothing in 6 of 10 draws."""
    random = np.random.default_rng(0)
    true = np.repeat([0.25, 0.75], 4)
    for _ in range(40):
        y = random.binomial(1000, true) / 1000
        found = judged(y, counted(y))
        assert found.label == "standard"
        jump = found.form["jump"]
        assert np.log10([jump["from"], jump["to"]]) == pytest.approx((7 + 9 / 7, 7 + 12 / 7))
        assert jump["effect"] == pytest.approx(0.5, abs=0.08)
        assert jump["interval"][0] < jump["effect"] < jump["interval"][1]


@pytest.mark.parametrize("within", [0, 10])
@pytest.mark.parametrize("spread", [1, 4])
@pytest.mark.parametrize("sizes", [5, 8, 12])
def test_the_closed_form_is_what_flat_curves_do(sizes: int, spread: int, within: int) -> None:
    """Against 20,000 simulated flat curves, with equal errors and with variances of up to four times others."""
    random = np.random.default_rng(0)
    weight_K = random.permutation(np.geomspace(1, spread, sizes))
    y_NK = random.standard_normal((20_000, sizes)) / np.sqrt(weight_K)
    y_NK -= (y_NK @ weight_K / weight_K.sum())[:, None]
    within_N = random.chisquare(within, len(y_NK)) if within else 0.0
    share_N = climb(y_NK, weight_K).squares_NK[:, -1] / (y_NK**2 @ weight_K + within_N)
    for tail in (0.2, 0.05, 0.025):
        assert e_bar_squared_tail(float(np.quantile(share_N, 1 - tail)), sizes, within) == pytest.approx(
            tail, rel=0.1 if spread == 1 else 0.2
        )


@pytest.mark.parametrize("sizes", [5, 6, 8])
def test_a_perfect_order_has_the_p_of_its_permutation(sizes: int) -> None:
    y = np.cumsum(1.0 + np.arange(sizes) % 3)
    assert trend(seen(y, 1e-3), alpha=0.05).p == pytest.approx(2 / math.factorial(sizes), rel=1e-6)
    assert trend(seen(-y, 1e-3), alpha=0.05).p == pytest.approx(2 / math.factorial(sizes), rel=1e-6)
    assert trend(seen(np.full(sizes, 0.5), 0.01), alpha=0.05).p == 1


def test_flat_curves_seldom_have_a_trend_or_turn() -> None:
    random = np.random.default_rng(2)
    wrong = 0
    for _ in range(100):
        y = random.binomial(500, 0.5 + 0.03 * random.standard_normal(6)) / 500
        found = seen(y, counted(y, 500))
        wrong += trend(found, alpha=0.05).p < 0.05 or turn(found, alpha=0.05, least=0.02).p < 0.05
    assert wrong <= 15  # 10 % at most are meant; more than 15 of 100 in 1 of 25 cases even then


def test_verdicts_can_be_repeated_bit_for_bit() -> None:
    y = np.array([0.5, 0.42, 0.40, 0.45, 0.52, 0.55])
    first, second = (judged(y, 0.02).as_dict() for _ in range(2))
    assert first == second


# ---- isotonic regression ----


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), sizes=st.integers(1, 13))
def test_climbing_is_isotonic_regression_of_every_beginning(seed: int, sizes: int) -> None:
    random = np.random.default_rng(seed)
    y_NK = np.round(random.standard_normal((5, sizes)), 1)  # with ties
    weight_K = random.uniform(0.2, 5, sizes)
    found = climb(y_NK, weight_K)
    for row, y_K in enumerate(y_NK):
        for end in range(1, sizes + 1):
            fit = isotonic_regression(y_K[:end], weights=weight_K[:end]).x
            assert found.squares_NK[row, end - 1] == pytest.approx(weight_K[:end] @ fit**2, abs=1e-9)
        assert found.fit_NK[row] == pytest.approx(fit, abs=1e-12)


def test_the_flattest_fit_keeps_only_steps_that_pay() -> None:
    y = np.array([0.0, 0.5, 0.2, 10.0, 10.4, 10.1])
    assert flattest(y, np.ones(6)) == pytest.approx([0.7 / 3] * 3 + [30.5 / 3] * 3)
    assert flattest(np.sort(y), np.full(6, 1000.0)) == pytest.approx(np.sort(y))
    assert flattest(y, np.full(6, 1000.0)) == pytest.approx([0.7 / 3] * 3 + [30.5 / 3] * 3)  # it scatters by more
    assert flattest(y, np.full(6, 1e-6)) == pytest.approx(np.full(6, y.mean()))


# ---- forms and their words ----

FORMS = {
    "a plateau at the end": ([0.30, 0.51, 0.73, 0.88, 0.89, 0.90, 0.905, 0.91], None, (None, 10 - 12 / 7)),
    "a floor at the end": ([0.60, 0.45, 0.30, 0.255, 0.254, 0.253, 0.252, 0.251], None, (None, 7 + 9 / 7)),
    "a floor at the start": ([0.250, 0.252, 0.254, 0.256, 0.258, 0.40, 0.55, 0.70], None, (7 + 12 / 7, None)),
    "a late jump": ([0.25, 0.26, 0.24, 0.25, 0.26, 0.25, 0.74, 0.75], (7 + 15 / 7, 7 + 18 / 7), (7 + 15 / 7, None)),
    "a straight line": (list(np.linspace(0.3, 0.8, 8)), None, (None, None)),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_are_found(name: str) -> None:
    values, jump, (until, start) = FORMS[name]
    y = np.array(values)
    change, _, parts = form(seen(y, counted(y)), rises=y[-1] > y[0], alpha=0.05)
    places = {"jump": jump, "level_until": until, "level_from": start}
    wanted = {part: np.atleast_1d(place) for part, place in places.items() if place is not None}
    assert parts.keys() == wanted.keys()
    for part, found in parts.items():
        ends = [found[key] for key in ("from", "to", "axis") if key in found]
        assert np.log10(ends) == pytest.approx(wanted[part])
        if part != "jump":
            assert found["interval"][0] < found["value"] < found["interval"][1]
    assert change == pytest.approx(y[-1] - y[0], abs=0.02)

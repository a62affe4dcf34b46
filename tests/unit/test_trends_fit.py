"""The statistics behind verdicts, against hand calculations, statsmodels and scipy."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.multitest import multipletests

from branchmix.scaling.trends.fit import between_variance, curve, smooth_variance, theil_sen
from branchmix.scaling.trends.order import trend, weights
from branchmix.scaling.trends.series import Scores, resampled_deviations
from branchmix.statistics import adjusted
from size_and_tokens import regression_on_size_and_tokens
from trend_tables import PYTHIA, pythia

X = np.arange(8.0)


def test_what_all_points_share_is_no_part_of_their_weights() -> None:
    """Questions that are hard for all settings move all points together: the differences are more certain than that."""
    random = np.random.default_rng(0)
    shared_B1, own_BK = random.normal(0, 0.05, (4000, 1)), random.normal(0, 0.01, (4000, 6))
    x_K, y_K = np.arange(6.0), np.full(6, 0.5)
    found = curve(x_K, y_K, np.full(6, 0.051), deviations_BN=shared_B1 + own_BK)
    assert found.own_K == pytest.approx(np.full(6, 0.01**2), rel=0.15) and found.jitter == 0
    assert weights(found) == pytest.approx(np.full(6, 1 / 0.01**2), rel=0.15)
    alone = curve(x_K, y_K, np.full(6, 0.051))
    assert weights(alone) == pytest.approx(np.full(6, 1 / 0.051**2))
    two = curve(x_K[:2], y_K[:2], np.full(2, 0.051), deviations_BN=(shared_B1 + own_BK)[:, :2])
    assert weights(two) == pytest.approx(np.full(2, 1 / 0.01**2), rel=0.15)


def test_own_variances_are_told_apart_and_none_is_nearly_nothing() -> None:
    """Though what is shared is more in some sizes, as it is where more questions are undecided."""
    random = np.random.default_rng(0)
    x_K, own_K = np.arange(5.0), np.array([0.01, 0.008, 0.012, 0.01, 0.001])
    deviations = random.normal(0, 0.05, (9000, 1)) + random.normal(0, 1, (9000, 5)) * own_K
    found = curve(x_K, np.full(5, 0.5), np.full(5, 0.051), deviations_BN=deviations)
    assert found.own_K[:4] == pytest.approx(own_K[:4] ** 2, rel=0.15)
    assert found.own_K[4] == pytest.approx(0.5 * np.mean(own_K**2), rel=0.15)


def test_no_setting_of_a_model_decides_a_verdict_alone() -> None:
    """Where few questions differ between settings, and fewest at the ceiling."""
    random = np.random.default_rng(0)
    hard_X = random.random(200)
    right = [hard_X + random.normal(0, 0.02, 200) < share for share in np.linspace(0.3, 0.9, 8)]
    scores: list[Scores] = [{str(n): (float(one), str(n)) for n, one in enumerate(row)} for row in right]
    drawn = resampled_deviations(scores, num_draws=2000)
    assert drawn is not None
    found = curve(np.arange(8.0), np.mean(right, axis=1), drawn[1], deviations_BN=drawn[0], average=True)
    assert (1 / found.own_K).max() < 2 * (1 / found.own_K).mean()


def test_theil_sen() -> None:
    y = np.array([0.1, 0.4, 0.2, 0.7, 0.9, 0.8, 1.4, 1.2])
    assert theil_sen(X, y[None])[0] == pytest.approx(stats.theilslopes(y, X)[0])


def test_the_variance_between_models() -> None:
    """With equal errors it is the sample variance less what sampling explains."""
    y = np.array([0.2, 0.5, 0.4, 0.9])
    found = between_variance(y, np.ones((4, 1)), np.eye(4) * 0.01)
    assert found == pytest.approx(np.var(y, ddof=1) - 0.01, rel=1e-6)
    assert between_variance(y, np.ones((4, 1)), np.eye(4)) == 0


@pytest.mark.parametrize("sizes", [7, 8])
def test_variances_about_smooth_curves_are_those_of_statsmodels(sizes: int) -> None:
    """From 8 sizes on the smaller of those about a quadratic and a cubic."""
    random = np.random.default_rng(3)
    x = X[:sizes]
    y_NK = np.stack([0.5 - 0.02 * (x - 3) ** 2, 0.02 * (x - 3) ** 3]) + 0.01 * random.standard_normal((2, sizes))
    stderr = np.linspace(0.02, 0.04, sizes)
    points = curve(x, y_NK[0], stderr)
    assert points.jitter == 0
    for y, variance in zip(y_NK, smooth_variance(points, y_NK, np.array([0.0, 0.0])), strict=True):
        fits = [sm.WLS(y, np.vander(x, degree + 1), weights=1 / stderr**2).fit() for degree in (2, 3)[: sizes - 6]]
        assert variance == pytest.approx(min(fit.mse_resid for fit in fits))


def test_jitter_is_found_and_widens_everything() -> None:
    random = np.random.default_rng(1)
    y = 0.5 + 0.1 * random.standard_normal(8)
    found = curve(X, y, np.full(8, 0.005))
    assert 0.04 < found.jitter < 0.25 and found.degrees == 5
    assert found.draws_BK.std(0).mean() > 0.9 * found.jitter
    calm = curve(X, 0.5 + 0.01 * X, np.full(8, 0.005))
    assert calm.jitter == 0
    wide, narrow = (np.ptp(trend(one, alpha=0.05).interval) for one in (found, calm))
    assert wide > 5 * narrow


def test_several_runs_of_a_size_tell_the_jitter() -> None:
    random = np.random.default_rng(2)
    x = np.repeat(X[:5], 4)
    smooth = 0.5 - 0.01 * (x - 2) ** 2
    found = curve(x, smooth + 0.05 * random.standard_normal(20), np.full(20, 0.002))
    assert found.sizes == 5 and (found.degrees, found.within) == (17, 15)
    assert found.jitter == pytest.approx(0.05, rel=0.35)
    # Sizes that are off the curve by far more than runs of a size differ: runs are no longer exchangeable.
    zigzag = curve(x, 0.2 * (x % 2) + 0.002 * random.standard_normal(20), np.full(20, 0.002))
    assert (zigzag.degrees, zigzag.within) == (2, 0)
    assert zigzag.jitter_K.min() > 0.05**2


def test_models_meet_the_same_examples_and_templates_are_drawn_whole() -> None:
    random = np.random.default_rng(0)
    hard = random.standard_normal(600)
    keys = [str(number) for number in range(600)]

    def scores(shift: float, template: int) -> Scores:
        values = dict(zip(keys, hard + shift, strict=True))
        return {key: (value, str(int(key) // template)) for key, value in values.items()}

    drawn = resampled_deviations([scores(0, 1), scores(0.5, 1)], num_draws=800)
    assert drawn is not None
    deviations_BN, stderr = drawn
    assert np.allclose(deviations_BN[:, 0], deviations_BN[:, 1])  # what is hard is hard for both
    assert stderr == pytest.approx(np.std(hard, ddof=1) / np.sqrt(600), rel=0.1)
    values = dict(zip(keys, np.repeat(random.standard_normal(20), 30).tolist(), strict=True))
    same = {key: (value, str(int(key) // 30)) for key, value in values.items()}
    clustered = resampled_deviations([same], num_draws=800)
    apart = resampled_deviations([{key: (value, key) for key, value in values.items()}], num_draws=800)
    assert clustered is not None and apart is not None
    assert clustered[1] / apart[1] == pytest.approx(np.sqrt(30), rel=0.15)  # 30 copies tell as much as one
    assert resampled_deviations([same, {"other": (1.0, "t")}], num_draws=10) is None


def test_corrections_are_those_of_statsmodels() -> None:
    p = [0.001, 0.04, 0.03, 0.2, 0.9, 0.012]
    assert adjusted(p, "bh") == pytest.approx(multipletests(p, method="fdr_bh")[1])
    assert adjusted(p, "holm") == pytest.approx(multipletests(p, method="holm")[1])
    assert adjusted(p, "none") == p


# ---- size and tokens together ----


def points(rows: list[dict]) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    tasks = dict.fromkeys(row["task"] for row in rows)
    return {
        task: tuple(
            np.array([row[name] for row in rows if row["task"] == task]) for name in ("value", "params", "tokens")
        )  # type: ignore[misc]
        for task in tasks
    }


def test_the_36_published_statistics() -> None:
    """Michaelov and Bergen's t(60) and corrected p, to every digit they print."""
    found = regression_on_size_and_tokens(points(pythia()))
    with (PYTHIA / "statistics.csv").open(newline="") as file:
        published = list(csv.DictReader(file))
    assert len(published) == 36
    for row in published:
        effect = found[row["task"]][row["effect"]]
        assert effect.degrees == 60
        assert f"{effect.t:.2f}" == row["t"], row
        assert ("<0.001" if effect.p_adjusted < 0.001 else f"{effect.p_adjusted:.3f}") == row["p"], row


def test_the_regression_by_hand() -> None:
    """2 sizes by 2 tokens, each twice: orthogonal, so each coefficient is a difference of means."""
    params, tokens = np.repeat([1e6, 1e8], 4), np.tile(np.repeat([1e9, 1e10], 2), 2)
    value = np.array([0.1, 0.2, 0.3, 0.4, 0.3, 0.4, 0.9, 1.0])
    effect = regression_on_size_and_tokens({"task": (value, params, tokens)})["task"]
    # Residuals are all +-0.05: a variance of 8 * 0.0025 / 4; contrasts 0.4, 0.4, 0.2 with error sqrt(2 * s2 / 4).
    error = np.sqrt(0.005 / 2)
    expected = (0.4 / error, 0.4 / error, 0.2 / error)
    assert [one.t for one in effect.values()] == pytest.approx(expected)
    assert all(one.degrees == 4 for one in effect.values())

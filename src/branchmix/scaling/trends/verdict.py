"""Verdicts: what a curve does with scale, in a word, with p, effect and interval.

In this order: a U or inverted-U needs a curve that no monotone one explains, with a drop and a rise of some size;
standard or inverse scaling needs a monotone curve that explains more than a constant, and a change of some size; flat
needs every change between two sizes to be smaller for sure than the smallest effect of interest; the rest is
inconclusive. Fewer than five sizes are described, never judged: even a perfect order of four has p = 0.083.

Words are about performance: `inverse` means worse with scale, be it a falling accuracy or a rising loss. Numbers are
the metric's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from branchmix.scaling.trends.fit import Curve
from branchmix.scaling.trends.forms import Form, Level, form
from branchmix.scaling.trends.order import Interval, Trend, Turn, is_flat, trend, turn

Label = Literal["standard", "inverse", "u-shaped", "inverted-u", "flat", "inconclusive", "not-testable"]
SHAPES = ("u-shaped", "inverted-u")
DIRECTED = ("standard", "inverse", *SHAPES)
MIN_SIZES = 5
WORDS: dict[str, str] = {
    "standard": "better with scale",
    "inverse": "worse with scale",
    "u-shaped": "worse, then better again",
    "inverted-u": "better, then worse again",
    "flat": "the same at every size",
    "inconclusive": "cannot be told",
    "not-testable": "too few sizes to judge",
}


@dataclass(frozen=True)
class Limits:
    """What counts as sure, and as worth mentioning."""

    alpha: float = 0.05
    minimum_effect: float = 0.02
    """In units of the metric: share of accuracy, nats of loss."""


@dataclass
class Verdict:
    """What a metric of a task does along an axis."""

    label: Label
    p: float | None
    """That of the test behind the label; None below five sizes."""
    p_adjusted: float | None
    """After the correction for the number of tasks."""
    effect: float
    """Change of the metric from the smallest to the largest size: that of the best monotone fit for `standard` and
    `inverse`, that of the fit which turns for a U or inverted-U, else that of the data."""
    interval: Interval
    sizes: int
    runs: int
    reason: str
    alone: Label
    """The label if this were the only task."""
    description: str = ""
    """What performance does from size to size, without any claim."""
    turning_point: float | None = None
    legs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`drop` and `rise` of the metric for a U or inverted-U, each with effect and interval."""
    form: Form | None = None
    """What the change looks like, for `standard` and `inverse`."""
    jitter: float = 0.0
    paired: bool = False
    """Whether the bootstrap drew the same examples for all models."""
    flags: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.label,
            "p": self.p,
            "p_adjusted": self.p_adjusted,
            "effect": self.effect,
            "interval": list(self.interval),
            "sizes": self.sizes,
            "runs": self.runs,
            "alone": self.alone,
            "description": self.description,
            "reason": self.reason,
            "turning_point": self.turning_point,
            **self.legs,
            **({} if self.form is None else _form_as_dict(self.form)),
            "jitter": self.jitter,
            "paired": self.paired,
            "flags": self.flags,
        }


class Evidence:
    """All that is computed of a curve before the number of tasks plays a part."""

    def __init__(
        self,
        curve: Curve,
        *,
        runs: int,
        lower_is_better: bool,
        limits: Limits,
        paired: bool = False,
        largest: float = math.inf,
    ):
        """``largest`` is the greatest change that the metric allows: intervals end there."""
        self.curve = curve
        self.runs = runs
        self.sign = -1 if lower_is_better else 1
        self.paired = paired
        self.largest = largest
        self.limits = limits
        self.trend: Trend = trend(curve, alpha=limits.alpha)
        self.turn: Turn | None = None
        if curve.sizes >= MIN_SIZES:
            self.turn = turn(curve, alpha=limits.alpha, least=limits.minimum_effect)

    @property
    def is_testable(self) -> bool:
        return self.turn is not None

    def has_shape(self) -> bool:
        """Whether the curve turns for sure, were it the only one."""
        return self.turn is not None and self.turn.p < self.limits.alpha

    def judge(self, p: float | None, p_adjusted: float | None, *, as_shape: bool) -> tuple[Label, str]:
        """The label for a test's p after correction, and why, in a sentence."""
        limits = self.limits
        if self.turn is None:
            sizes = f"{self.curve.sizes} size" + "s" * (self.curve.sizes != 1)
            return "not-testable", f"{sizes}, and no test can say anything below {MIN_SIZES}"
        assert p is not None and p_adjusted is not None
        if as_shape and p_adjusted < limits.alpha:
            is_u = self.turn.is_u == (self.sign > 0)
            return ("u-shaped" if is_u else "inverted-u"), f"no monotone curve explains both legs ({_p(p)})"
        move, sure = self.trend.move, p_adjusted < limits.alpha
        if not as_shape and sure and abs(move) > limits.minimum_effect:
            return ("standard" if move * self.sign > 0 else "inverse"), f"a trend over all sizes ({_p(p)})"
        if is_flat(self.curve, alpha=limits.alpha, least=limits.minimum_effect):
            return "flat", f"every change between two sizes lies within ±{limits.minimum_effect:g} for sure"
        if not as_shape and sure:
            return "inconclusive", f"a trend ({_p(p)}) of less than {limits.minimum_effect:g}"
        if p < limits.alpha:
            what = "the turn is" if as_shape else "the trend is"
            after = f"{_p(p_adjusted)} after correction"
            return "inconclusive", f"{what} significant alone ({_p(p)}), but not as one of several tasks ({after})"
        possible = f"more than ±{limits.minimum_effect:g} remains possible"
        return "inconclusive", f"no significant trend ({_p(p)}); {possible}"

    def p_of(self, *, as_shape: bool) -> float | None:
        if self.turn is None:
            return None
        return self.turn.p if as_shape else self.trend.p

    def _possible(self, interval: Interval) -> Interval:
        return max(interval[0], -self.largest), min(interval[1], self.largest)

    def verdict(self, p_adjusted: float | None, *, as_shape: bool, alone_as_shape: bool) -> Verdict:
        p = self.p_of(as_shape=as_shape)
        label, reason = self.judge(p, p_adjusted, as_shape=as_shape)
        p_alone = self.p_of(as_shape=alone_as_shape)
        alone, _ = self.judge(p_alone, p_alone, as_shape=alone_as_shape)
        verdict = Verdict(
            label=label,
            p=p,
            p_adjusted=p_adjusted,
            effect=self.trend.change,
            interval=self._possible(self.trend.interval),
            sizes=self.curve.sizes,
            runs=self.runs,
            reason=reason,
            alone=alone,
            description=describe(self.curve.y_K * self.sign),
            jitter=self.curve.jitter,
            paired=self.paired,
        )
        if label in SHAPES:
            assert self.turn is not None
            verdict.effect, verdict.interval = self.turn.change, self._possible(self.turn.change_interval)
            verdict.turning_point = 10**self.turn.turning
            for effect, interval in zip(self.turn.legs, self.turn.leg_intervals, strict=True):
                verdict.legs["rise" if effect > 0 else "drop"] = {
                    "effect": effect,
                    "interval": list(self._possible(interval)),
                }
        elif label in DIRECTED:
            verdict.form = form(self.curve, rises=self.trend.move > 0, alpha=self.limits.alpha)
            verdict.effect, verdict.interval = verdict.form.change, self._possible(verdict.form.interval)
            verdict.reason = "; ".join([reason, *_form_in_words(verdict.form)])
        return verdict


def _form_in_words(form: Form) -> Iterator[str]:
    """What a curve looks like, in the units of its axis and metric."""
    if form.jump is not None:
        jump = form.jump
        yield f"a jump of {jump.change:+.3g} between {10**jump.start:.2g} and {10**jump.end:.2g}"
    if form.level_until is not None:
        yield f"level up to {10**form.level_until.edge:.2g}, at {form.level_until.value:.3g}"
    if form.level_from is not None:
        yield f"level from {10**form.level_from.edge:.2g} on, at {form.level_from.value:.3g}"


def _form_as_dict(form: Form) -> dict[str, Any]:
    def level(name: str, one: Level | None) -> dict[str, Any]:
        return {} if one is None else {name: {"axis": 10**one.edge, "value": one.value, "interval": list(one.interval)}}

    told = level("level_until", form.level_until) | level("level_from", form.level_from)
    if form.jump is not None:
        ends = {"from": 10**form.jump.start, "to": 10**form.jump.end}
        told["jump"] = {**ends, "effect": form.jump.change, "interval": list(form.jump.interval)}
    return told


def describe(y_K: np.ndarray) -> str:
    """What values do from size to size: `decreasing`, `down, then up`; no claim that it is more than chance."""
    steps = np.sign(np.diff(y_K))
    moves = [step for step in steps if step]
    turns = sum(first != second for first, second in pairwise(moves))
    if not moves:
        return "unchanged" if len(y_K) > 1 else "a single size"
    if turns == 0:
        return "increasing" if moves[0] > 0 else "decreasing"
    if turns == 1:
        return "up, then down" if moves[0] > 0 else "down, then up"
    return "up and down"


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"

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
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from itertools import pairwise
from typing import Any, Literal, TypeVar

import numpy as np

from branchmix.scaling.trends.fit import Curve
from branchmix.scaling.trends.order import Interval, Turn, form, is_flat, trend, turn
from branchmix.statistics import Correction, adjusted

Label = Literal["standard", "inverse", "u-shaped", "inverted-u", "flat", "inconclusive", "not-testable"]
SHAPES = ("u-shaped", "inverted-u")
DIRECTED = ("standard", "inverse", *SHAPES)
MIN_SIZES = 5
Key = TypeVar("Key")
WORDS: dict[str, str] = {
    "standard": "better with scale",
    "inverse": "worse with scale",
    "u-shaped": "worse, then better again",
    "inverted-u": "better, then worse again",
    "flat": "the same all along",
    "inconclusive": "too uncertain to say",
    "not-testable": "too few points to judge",
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
    alone: Label
    """The label if this were the only task."""
    description: str
    """What performance does from size to size, without any claim."""
    reason: str
    turning_point: float | None = None
    legs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`drop` and `rise` of the metric for a U or inverted-U, each with effect and interval."""
    form: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the change looks like, for `standard` and `inverse`: the parts of ``order.form``."""
    jitter: float = 0.0
    paired: bool = False
    """Whether the bootstrap drew the same examples for all models."""
    flags: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for name, value in vars(self).items():
            if name in ("legs", "form"):
                content |= value
            else:
                content["verdict" if name == "label" else name] = list(value) if name == "interval" else value
        return content


@dataclass
class Evidence:
    """All that is computed of a curve before the number of tasks plays a part."""

    curve: Curve
    _: KW_ONLY
    runs: int
    lower_is_better: bool
    limits: Limits
    paired: bool = False
    largest: float = math.inf
    """The greatest change that the metric allows: intervals end there."""
    turn: Turn | None = None
    """None below five sizes."""

    def __post_init__(self) -> None:
        self.sign = -1 if self.lower_is_better else 1
        self.trend = trend(self.curve, alpha=self.limits.alpha)
        if self.curve.sizes >= MIN_SIZES:
            self.turn = turn(self.curve, alpha=self.limits.alpha, least=self.limits.minimum_effect)

    @property
    def has_shape(self) -> bool:
        """Whether the curve turns for sure, were it the only one."""
        return self.turn is not None and self.turn.p < self.limits.alpha

    def p_of(self, *, as_shape: bool) -> float | None:
        if self.turn is None:
            return None
        return self.turn.p if as_shape else self.trend.p

    def judge(self, p_adjusted: float | None, *, as_shape: bool) -> tuple[Label, str]:
        """The label for a test's p after correction, and why, in a sentence."""
        p, least = self.p_of(as_shape=as_shape), self.limits.minimum_effect
        if self.turn is None or p is None or p_adjusted is None:
            sizes = f"{self.curve.sizes} size" + "s" * (self.curve.sizes != 1)
            return "not-testable", f"{sizes}, and no test can say anything below {MIN_SIZES}"
        move, is_sure = self.trend.move, p_adjusted < self.limits.alpha
        if as_shape and is_sure:
            is_u = self.turn.is_u == (self.sign > 0)
            return ("u-shaped" if is_u else "inverted-u"), f"no monotone curve explains both legs ({p_text(p)})"
        if is_sure and abs(move) > least:
            return ("standard" if move * self.sign > 0 else "inverse"), f"a trend over all sizes ({p_text(p)})"
        if is_flat(self.curve, alpha=self.limits.alpha, least=least):
            return "flat", f"every change between two sizes lies within ±{least:g} for sure"
        if is_sure:
            return "inconclusive", f"a trend ({p_text(p)}) of less than {least:g}"
        if p < self.limits.alpha:
            what, after = "the turn is" if as_shape else "the trend is", f"{p_text(p_adjusted)} after correction"
            return "inconclusive", f"{what} significant alone ({p_text(p)}), but not as one of several tasks ({after})"
        return "inconclusive", f"no significant trend ({p_text(p)}); more than ±{least:g} remains possible"

    def _possible(self, interval: Interval) -> Interval:
        return max(interval[0], -self.largest), min(interval[1], self.largest)

    def verdict(self, p_adjusted: float | None, *, as_shape: bool) -> Verdict:
        label, reason = self.judge(p_adjusted, as_shape=as_shape)
        alone = self.has_shape
        verdict = Verdict(
            label=label,
            p=self.p_of(as_shape=as_shape),
            p_adjusted=p_adjusted,
            effect=self.trend.change,
            interval=self._possible(self.trend.interval),
            sizes=self.curve.sizes,
            runs=self.runs,
            reason=reason,
            alone=self.judge(self.p_of(as_shape=alone), as_shape=alone)[0],
            description=describe(self.curve.y_K * self.sign),
            jitter=self.curve.jitter,
            paired=self.paired,
        )
        if label in SHAPES and self.turn is not None:
            verdict.turning_point = self.turn.turning
            *legs, both = zip(self.turn.changes, map(self._possible, self.turn.intervals), strict=True)
            verdict.effect, verdict.interval = both
            for effect, interval in legs:
                verdict.legs["rise" if effect > 0 else "drop"] = {"effect": effect, "interval": list(interval)}
        elif label in DIRECTED:
            rises = self.trend.move > 0
            verdict.effect, interval, verdict.form = form(self.curve, rises=rises, alpha=self.limits.alpha)
            verdict.interval = self._possible(interval)
            verdict.reason = "; ".join([reason, *_form_in_words(verdict.form)])
        return verdict


def _form_in_words(form: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What a curve looks like, in the units of its axis and metric."""
    if jump := form.get("jump"):
        yield f"a jump of {jump['effect']:+.3g} between {place_text(jump['from'])} and {place_text(jump['to'])}"
    if level := form.get("level_until"):
        yield f"level up to {place_text(level['axis'])}, at {level['value']:.3g}"
    if level := form.get("level_from"):
        yield f"level from {place_text(level['axis'])} on, at {level['value']:.3g}"


def place_text(place: float) -> str:
    """A place on an axis, for a terminal: ``16384``, ``1.4e+09``."""
    return f"{place:.0f}" if place == round(place) and place < 1e5 else f"{place:.2g}"


def describe(y_K: np.ndarray) -> str:
    """What values do from size to size: `decreasing`, `down, then up`; no claim that it is more than chance."""
    steps = np.sign(np.diff(y_K))
    moves = [step for step in steps if step]
    turns = sum(first != second for first, second in pairwise(moves))
    if not moves:
        return "unchanged" if len(y_K) > 1 else "a single size"
    first_up = moves[0] > 0
    if turns == 0:
        return "increasing" if first_up else "decreasing"
    return "up and down" if turns > 1 else "up, then down" if first_up else "down, then up"


def p_text(p: float) -> str:
    """``p = 0.012``"""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


# ---- many tasks ----


def judge_together(tasks: Mapping[Key, Evidence], *, correction: Correction, limits: Limits) -> dict[Key, Verdict]:
    """Verdicts of tasks that were tested side by side: a metric of one family.

    Each task brings one p: that of the shape if the curve turns significantly by itself, else that of the trend. A
    shape that does not survive the correction leaves its place to the trend, and all are corrected again.
    """
    as_shape = {task: evidence.has_shape for task, evidence in tasks.items()}
    while True:
        raw = {task: evidence.p_of(as_shape=as_shape[task]) for task, evidence in tasks.items()}
        tested = {task: p for task, p in raw.items() if p is not None}
        corrected = dict(zip(tested, adjusted(list(tested.values()), correction), strict=True))
        lost = [
            task
            for task, p in corrected.items()
            if as_shape[task] and p >= limits.alpha and tasks[task].trend.p < limits.alpha
        ]
        if not lost:
            break
        as_shape |= dict.fromkeys(lost, False)
    return {task: evidence.verdict(corrected.get(task), as_shape=as_shape[task]) for task, evidence in tasks.items()}

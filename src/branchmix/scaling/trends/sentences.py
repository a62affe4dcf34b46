"""What the page says: names of axes and metrics, numbers with their units, and a verdict in sentences.

For readers who have never heard of inverse scaling, or of p.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from branchmix.pages.numbers import human_count
from branchmix.scaling.metrics import CONSTANT_SHARE, LOW_COVERAGE
from branchmix.scaling.trends.forms import Level
from branchmix.scaling.trends.judge import Caution, Judged, Report
from branchmix.scaling.trends.table import DATA, SHARES, is_any_of
from branchmix.scaling.trends.verdict import DIRECTED, MIN_SIZES, SHAPES, WORDS, Interval, Limits
from branchmix.settings import read_yaml

_TERMS = read_yaml(Path(__file__).with_name("terms.yaml"))
AXES, _METRICS = _TERMS["axes"], _TERMS["metrics"]
MEANINGS = {label: meaning.format(min_sizes=MIN_SIZES) for label, meaning in _TERMS["verdicts"].items()}
MINUS, TIMES, SPACE = "\u2212", "\u00d7", "\u00a0"
PERCENT = f"{SPACE}%"
_CEILING = 0.95
"""A plateau of a share from here on is a ceiling."""


def axis_name(axis: str) -> str:
    return str(AXES[axis]["name"]) if axis in AXES else axis


def axis_value(axis: str, value: float) -> str:
    """A place on an axis: ``1.4B``, ``3×10²¹``."""
    if axis in ("params", "active_params", "tokens"):
        return human_count(float(f"{value:.3g}"))
    if 0.001 <= value < 1e5:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2g}".split("e") if "e" in f"{value:.2g}" else f"{value:.1e}".split("e")
    power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{power}" if float(mantissa) == 1 else f"{float(mantissa):g}{TIMES}10{power}"


def place(axis: str, value: float) -> str:
    """A place on an axis with its unit: ``1.4B parameters``."""
    if axis not in AXES:
        return f"{axis} {axis_value(axis, value)}"
    return f"{axis_value(axis, value)} {AXES[axis].get('unit', axis_name(axis))}"


def metric_name(metric: str) -> str:
    return str(_METRICS[metric]["name"]) if metric in _METRICS else metric


def metric_words(metric: str, *, lower_is_better: bool) -> str:
    """What a metric measures, and which way is up."""
    known = f"{_METRICS[metric]['meaning']}; " if metric in _METRICS else ""
    return f"{known}{'less' if lower_is_better else 'more'} is better"


def axis_words(axis: str) -> str:
    return str(AXES[axis]["meaning"]) if axis in AXES else "a column of the table."


def is_share(metric: str) -> bool:
    """Whether values are shares of 1, which read better as percent."""
    return is_any_of(metric, SHARES)


def shown(metric: str, value: float) -> str:
    """A value of a metric."""
    return f"{100 * value:.1f}{PERCENT}" if is_share(metric) else f"{value:.3g}".replace("-", MINUS)


def difference(metric: str, value: float, *, plus: bool = True) -> str:
    """A change of a metric: in percentage points, or in its own unit."""
    if is_share(metric):
        text = f"{100 * value:+.1f}"
        text = text if float(text) else "0.0"
        return f"{text if plus else text.removeprefix('+')} points".replace("-", MINUS)
    text = f"{value:+.3g}"
    return (text if plus else text.removeprefix("+")).replace("-", MINUS)


def between(metric: str, interval: Interval | Sequence[float]) -> str:
    """``between −27.0 and −12.7 points``."""
    low, high = (difference(metric, value) for value in interval)
    return f"between {low.removesuffix(' points')} and {high}"


def moves(metric: str, effect: float, interval: Interval | Sequence[float], limits: Limits) -> str:
    """``falls by about 20.6 points (95 % interval: 12.7 to 27.0)``."""
    sign = -1 if effect < 0 else 1
    low, high = sorted(sign * value for value in interval)
    ends = (difference(metric, value, plus=False).removesuffix(" points") for value in (low, high))
    return (
        f"{'falls' if effect < 0 else 'rises'} by about {difference(metric, abs(effect), plus=False)} "
        f"({percent_of(limits)} interval: {' to '.join(ends)})"
    )


def percent_of(limits: Limits) -> str:
    return f"{100 * (1 - limits.alpha):g}{PERCENT}"


def plain(label: str) -> str:
    """``gets worse with scale``: a verdict as the end of a sentence."""
    return {
        "standard": "gets better with scale",
        "inverse": "gets worse with scale",
        "u-shaped": "gets worse, then better again",
        "inverted-u": "gets better, then worse again",
        "flat": "stays the same",
    }.get(label, WORDS[label])


# ---- a verdict in sentences ----


def sentences(one: Judged, report: Report) -> str:
    """The verdict on a curve, and why it is that or why there is none."""
    found, metric = one.verdict, one.series.metric
    sure = percent_of(report.limits)
    least = difference(metric, report.limits.minimum_effect, plus=False)
    ends = f"the smallest to the largest of {found.sizes} sizes"
    if found.label == "not-testable":
        return _not_testable(one)
    if found.label in SHAPES:
        first, second = (moves(metric, leg["effect"], leg["interval"], report.limits) for leg in found.legs.values())
        turn = place(report.axis, found.turning_point or math.nan)
        return (
            f"{metric_name(metric).capitalize()} first {first} and then {second}; it turns at about {turn}. "
            f"{_chance(one, report, 'A rise and a fall as clear as these')}"
        )
    if found.label in DIRECTED:
        told = moves(metric, found.effect, found.interval, report.limits)
        chance = _chance(one, report, "A trend as clear as this")
        return " ".join([f"From {ends}, {metric_name(metric)} {told}.", *form_sentences(one, report), chance])
    if found.label == "flat":
        return (
            f"From {ends}, {metric_name(metric)} changes by something {between(metric, found.interval)}, for "
            f"{sure} sure: less than the {least} that count as a change, and no sizes in between differ by more either."
        )
    return _inconclusive(one, report, ends, least)


def brief(one: Judged, report: Report) -> str:
    """The verdict's numbers in a line, for where several stand side by side."""
    found, metric = one.verdict, one.series.metric
    sizes = f"{found.sizes} size{'s' * (found.sizes != 1)}"
    if found.p_adjusted is None:
        return f"{sizes}; performance: {found.description}"
    if found.legs:
        told = ", then ".join(difference(metric, leg["effect"]) for leg in found.legs.values())
        return f"{told}; turns at {place(report.axis, found.turning_point or math.nan)}; {_p(found.p_adjusted)}"
    low, high = (difference(metric, value).removesuffix(" points") for value in found.interval)
    return f"{difference(metric, found.effect)} ({low} to {high}) over {sizes}; {_p(found.p_adjusted)}"


def form_sentences(one: Judged, report: Report) -> Iterator[str]:
    """Where a trend jumps, saturates, or sits on a floor or a ceiling, with the interval of each."""
    found, metric = one.verdict.form, one.series.metric
    if found is None:
        return
    is_better = one.verdict.label == "standard"

    def interval(texts: Iterable[str]) -> str:
        low, high = texts
        return f"({percent_of(report.limits)} interval: {low} to {high})"

    def level(at: Level, *, is_best: bool) -> str:
        name = "floor" if not is_best else "ceiling" if is_share(metric) and at.value >= _CEILING else "plateau"
        ends = interval(shown(metric, value).removesuffix(PERCENT) for value in at.interval)
        return f"a {name} of {shown(metric, at.value)} {ends}"

    if found.jump is not None:
        start, end = (place(report.axis, 10**x) for x in (found.jump.start, found.jump.end))
        sign = -1 if found.jump.change < 0 else 1
        ends = interval(
            difference(metric, value, plus=False).removesuffix(" points")
            for value in sorted(sign * value for value in found.jump.interval)
        )
        size = difference(metric, abs(found.jump.change), plus=False)
        yield f"Most of that is a jump between two neighbouring sizes, {start} and {end}: {size} {ends}."
    if found.level_until is not None:
        edge = place(report.axis, 10**found.level_until.edge)
        yield f"Up to {edge} it stays on {level(found.level_until, is_best=not is_better)}."
    if found.level_from is not None:
        edge = place(report.axis, 10**found.level_from.edge)
        verb = "saturates, on" if is_better else "stays on"
        yield f"From {edge} on it {verb} {level(found.level_from, is_best=is_better)}."


def _chance(one: Judged, report: Report, what: str) -> str:
    """How often chance alone would do as much."""
    found = one.verdict
    assert found.p is not None and found.p_adjusted is not None
    tasks = _num_tested(one, report)
    after = f"; {_p(found.p_adjusted)} after the correction for {tasks} tasks" if tasks > 1 else ""
    return f"{what} would come about by chance in {_share(found.p)} of cases ({_p(found.p)}{after})."


def _inconclusive(one: Judged, report: Report, ends: str, least: str) -> str:
    found, metric = one.verdict, one.series.metric
    assert found.p is not None and found.p_adjusted is not None
    change = f"From {ends}, {metric_name(metric)} may change by anything {between(metric, found.interval)}"
    tasks = _num_tested(one, report)
    if found.alone in DIRECTED:
        return (
            f"By itself one would say that it {plain(found.alone)} ({_p(found.p)}). But with {tasks} tasks some "
            f"look like that by chance, and after the correction for their number it is {_p(found.p_adjusted)}, not "
            f"below {report.limits.alpha:g}. {change}."
        )
    if found.p_adjusted < report.limits.alpha:
        return f"There is a trend ({_p(found.p)}), but not for sure one of more than {least}. {change}."
    scatter = ""
    if found.jitter > report.limits.minimum_effect:
        scatter = (
            f" Models scatter by about {difference(metric, found.jitter, plus=False)} about a smooth curve, more than "
            "questions alone explain; that hides smaller trends."
        )
    return (
        f"{change}. A trend as clear as this comes about by chance in {_share(found.p)} of cases ({_p(found.p)})."
        f"{scatter}"
    )


def _not_testable(one: Judged) -> str:
    found = one.verdict
    if found.sizes < 2:
        return "There is one size only, and nothing to compare it with."
    move = {"increasing": "gets better from size to size", "decreasing": "gets worse from size to size"}.get(
        found.description, f"goes {found.description}" if "then" in found.description else f"is {found.description}"
    )
    odds = math.factorial(found.sizes) // 2
    chance = "always comes in some order" if odds == 1 else f"comes about by chance in 1 of {odds} cases"
    return (
        f"There are {found.sizes} sizes, and {MIN_SIZES} are needed: even a perfect order of {found.sizes} {chance}. "
        f"What can be seen, and may be chance: performance {move}, and {metric_name(one.series.metric)} changes by "
        f"{difference(one.series.metric, found.effect)} from the smallest to the largest."
    )


def _num_tested(one: Judged, report: Report) -> int:
    """Tasks that shared the correction with this one."""
    key = (one.series.metric, one.series.family, one.series.data)
    return sum(
        (other.series.metric, other.series.family, other.series.data) == key and other.verdict.p is not None
        for other in report.judged
    ) * (report.correction != "none")


def _p(p: float) -> str:
    return ("p < 0.001" if p < 0.001 else f"p = {p:.2g}").replace(" ", SPACE)


def _share(p: float) -> str:
    if p < 0.001:
        return "less than 1 in 1,000"
    return f"{100 * p:.0f}{PERCENT}" if p >= 0.095 else f"{100 * p:.2g}{PERCENT}"


# ---- what stands side by side ----


def family_sentence(pair: dict[str, Any], metric: str, *, lower_is_better: bool) -> str:
    """The interaction of two families with scale."""
    first, second = (name or "no family" for name in pair["families"])
    one, other = (difference(metric, slope) for slope in pair["slopes_per_decade"])
    kind = f" (on {pair['data']} questions)" if pair.get("data", DATA[0]) != DATA[0] else ""
    better = (pair["difference"] > 0) != lower_is_better
    told = (
        f"so scale does {'more good or less harm' if better else 'more harm or less good'} to {second} than to {first}"
        if pair["differs"]
        else "which may be chance: no difference between the two is shown"
        if pair["testable"]
        else f"which cannot be judged: each needs {MIN_SIZES} sizes"
    )
    return (
        f"For ten times the {axis_name(pair['axis'])}, {metric_name(metric)} changes by {one} for {first} and by "
        f"{other} for {second}{kind}. The difference is {difference(metric, pair['difference'])} "
        f"({between(metric, pair['interval'])}), {told}."
    )


def contamination_sentences(differences: Sequence[dict[str, Any]], metric: str, limits: Limits) -> str:
    """Official against fresh questions, for one family after the other."""
    told = []
    for found in differences:
        value = found["difference"]
        who = f"{found['family']} models" if found.get("family") else "models"
        low, high = (difference(metric, end).removesuffix(" points") for end in found["interval"])
        by, how = difference(metric, abs(value), plus=False), "better" if value >= 0 else "worse"
        told.append(f"{who} do {by} {how} on the public ones ({percent_of(limits)} interval: {low} to {high})")
    suspected = [found.get("family", "") for found in differences if found["suspected"]]
    verdict = "There is no sign that the public questions were part of what the models were trained on."
    if suspected:
        who = f"For {' and '.join(suspected)}: either" if len(suspected) < len(differences) else "Either"
        verdict = (
            f"{who} the public questions, which have been on the web since 2023, were part of what the models were "
            "trained on, or our fresh ones are harder; models trained before 2023 can tell which."
        )
    return f"Public against fresh questions, {metric_name(metric)}, mean of all models: {'; '.join(told)}. {verdict}"


def caution_sentence(caution: Caution) -> str:
    (one, here), (other, label) = caution.first, caution.second
    who = "" if caution.where == caution.task else f"{caution.where.removeprefix(caution.task).strip(' ()')}: "
    if caution.metric:
        return (
            f"{who}the axis matters. Along {axis_name(one)}, {metric_name(caution.metric)} {_verb(here)}; along "
            f"{axis_name(other)}, it {_verb(label)}."
        )
    return (
        f"{who}the metric matters. By {metric_name(one)} performance {_verb(here)}, by {metric_name(other)} it "
        f"{_verb(label)}."
    )


def _verb(label: str) -> str:
    return {"inconclusive": "shows nothing for sure", "not-testable": "has too few sizes"}.get(label, plain(label))


def flag_sentence(kind: str, names: str) -> str:
    """A flag of ``series.flags_of``, with the models it is about and what it means."""
    most = f"{100 * CONSTANT_SHARE:g}{PERCENT}"
    told = {
        "nearly always the same answer": f"one and the same answer to more than {most} of the questions, so what "
        "it scores says nothing about the task",
        "exactly what a constant answer scores": "scores exactly what a model would that always gives the same answer",
        "hardly any probability on the classes": "all answers to choose from together have less than "
        f"{100 * LOW_COVERAGE:g}{PERCENT} of its probability: left to itself it would have written something else",
        "every model is at chance": "every model does about as well as guessing; the task may be beyond all of them",
    }
    return ": ".join(filter(None, (names, told.get(kind, kind)))) + "."

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
from branchmix.scaling.trends.table import DATA, is_share
from branchmix.scaling.trends.verdict import DIRECTED, MIN_SIZES, SHAPES, Interval, Limits
from branchmix.settings import read_yaml

_TERMS = read_yaml(Path(__file__).with_name("terms.yaml"))
AXES, METRICS = _TERMS["axes"], _TERMS["metrics"]
MEANINGS = {label: meaning.format(min_sizes=MIN_SIZES) for label, meaning in _TERMS["verdicts"].items()}
_VERBS = _TERMS["verbs"]
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
    return str(METRICS[metric]["name"]) if metric in METRICS else metric


def shown(metric: str, value: float) -> str:
    """A value of a metric."""
    return f"{100 * value:.1f}{PERCENT}" if is_share(metric) else f"{value:.3g}".replace("-", MINUS)


def difference(metric: str, value: float, *, plus: bool = True, unit: bool = True) -> str:
    """A change of a metric: in percentage points, or in its own unit."""
    text = f"{100 * value:+.1f}" if is_share(metric) else f"{value:+.3g}"
    text = "0.0" if text in ("+0.0", "-0.0") else text if plus else text.removeprefix("+")
    return text.replace("-", MINUS) + (" points" if unit and is_share(metric) else "")


def between(metric: str, interval: Interval | Sequence[float]) -> str:
    """``between −27.0 and −12.7 points``."""
    return f"between {difference(metric, interval[0], unit=False)} and {difference(metric, interval[1])}"


def moves(metric: str, effect: float, interval: Interval | Sequence[float], limits: Limits) -> str:
    """``falls by about 20.6 points (95 % interval: 12.7 to 27.0)``."""
    verb = "falls" if effect < 0 else "rises"
    return f"{verb} by about {_size(metric, effect, interval, limits)}"


def _size(metric: str, effect: float, interval: Interval | Sequence[float], limits: Limits) -> str:
    """A change without its sign, with its interval."""
    sign = -1 if effect < 0 else 1
    ends = (difference(metric, value, plus=False, unit=False) for value in sorted(sign * end for end in interval))
    return f"{difference(metric, abs(effect), plus=False)} {_interval(ends, limits)}"


def _interval(ends: Iterable[str], limits: Limits) -> str:
    return f"({percent_of(limits)} interval: {' to '.join(ends)})"


def percent_of(limits: Limits) -> str:
    return f"{100 * (1 - limits.alpha):g}{PERCENT}"


# ---- a verdict in sentences ----


def sentences(one: Judged, report: Report) -> str:
    """The verdict on a curve, and why it is that or why there is none."""
    verdict, metric = one.verdict, one.series.metric
    least = difference(metric, report.limits.minimum_effect, plus=False)
    ends = f"From the smallest to the largest of {verdict.sizes} sizes, {metric_name(metric)}"
    if verdict.label == "not-testable":
        return _not_testable(one)
    if verdict.label in SHAPES:
        first, second = (moves(metric, leg["effect"], leg["interval"], report.limits) for leg in verdict.legs.values())
        turn = place(report.axis, verdict.turning_point or math.nan)
        return (
            f"{metric_name(metric).capitalize()} first {first} and then {second}; it turns at about {turn}. "
            f"{_chance(one, report, 'A rise and a fall as clear as these')}"
        )
    if verdict.label in DIRECTED:
        change = moves(metric, verdict.effect, verdict.interval, report.limits)
        return " ".join(
            [f"{ends} {change}.", *form_sentences(one, report), _chance(one, report, "A trend as clear as this")]
        )
    if verdict.label == "flat":
        return (
            f"{ends} changes by something {between(metric, verdict.interval)}, for {percent_of(report.limits)} sure: "
            f"less than the {least} that count as a change, and no sizes in between differ by more either."
        )
    return _inconclusive(one, report, f"{ends} may change by anything {between(metric, verdict.interval)}", least)


def brief(one: Judged, report: Report) -> str:
    """The verdict's numbers in a line, for panels of several curves."""
    verdict, metric = one.verdict, one.series.metric
    sizes = f"{verdict.sizes} size{'s' * (verdict.sizes != 1)}"
    if verdict.p_adjusted is None:
        return f"{sizes}; performance: {verdict.description}"
    if verdict.legs:
        legs = ", then ".join(difference(metric, leg["effect"]) for leg in verdict.legs.values())
        return f"{legs}; turns at {place(report.axis, verdict.turning_point or math.nan)}; {_p(verdict.p_adjusted)}"
    low, high = (difference(metric, value, unit=False) for value in verdict.interval)
    return f"{difference(metric, verdict.effect)} ({low} to {high}) over {sizes}; {_p(verdict.p_adjusted)}"


def form_sentences(one: Judged, report: Report) -> Iterator[str]:
    """Where a trend jumps, saturates, or sits on a floor or a ceiling, with the interval of each."""
    form, metric = one.verdict.form, one.series.metric
    if form is None:
        return
    is_better = one.verdict.label == "standard"

    def level(at: Level, *, is_best: bool) -> str:
        name = "floor" if not is_best else "ceiling" if is_share(metric) and at.value >= _CEILING else "plateau"
        ends = (shown(metric, value).removesuffix(PERCENT) for value in at.interval)
        return f"a {name} of {shown(metric, at.value)} {_interval(ends, report.limits)}"

    if form.jump is not None:
        start, end = (place(report.axis, 10**x) for x in (form.jump.start, form.jump.end))
        size = _size(metric, form.jump.change, form.jump.interval, report.limits)
        yield f"Most of that is a jump between two neighbouring sizes, {start} and {end}: {size}."
    if form.level_until is not None:
        edge = place(report.axis, 10**form.level_until.edge)
        yield f"Up to {edge} it stays on {level(form.level_until, is_best=not is_better)}."
    if form.level_from is not None:
        edge = place(report.axis, 10**form.level_from.edge)
        verb = "saturates, on" if is_better else "stays on"
        yield f"From {edge} on it {verb} {level(form.level_from, is_best=is_better)}."


def _chance(one: Judged, report: Report, what: str) -> str:
    """How often chance alone would do as much."""
    verdict, tasks = one.verdict, _num_tested(one, report)
    assert verdict.p is not None and verdict.p_adjusted is not None
    after = f"; {_p(verdict.p_adjusted)} after the correction for {tasks} tasks" if tasks > 1 else ""
    return f"{what} would come about by chance in {_share(verdict.p)} of cases ({_p(verdict.p)}{after})."


def _inconclusive(one: Judged, report: Report, change: str, least: str) -> str:
    verdict, metric = one.verdict, one.series.metric
    assert verdict.p is not None and verdict.p_adjusted is not None
    if verdict.alone in DIRECTED:
        return (
            f"By itself one would say that it {_VERBS[verdict.alone]} ({_p(verdict.p)}). But with "
            f"{_num_tested(one, report)} tasks some look like that by chance, and after the correction for their "
            f"number it is {_p(verdict.p_adjusted)}, not below {report.limits.alpha:g}. {change}."
        )
    if verdict.p_adjusted < report.limits.alpha:
        return f"There is a trend ({_p(verdict.p)}), but not for sure one of more than {least}. {change}."
    scatter = ""
    if verdict.jitter > report.limits.minimum_effect:
        scatter = (
            f" Models scatter by about {difference(metric, verdict.jitter, plus=False)} about a smooth curve, more "
            "than questions alone explain; that hides smaller trends."
        )
    chance = f"A trend as clear as this comes about by chance in {_share(verdict.p)} of cases ({_p(verdict.p)})."
    return f"{change}. {chance}{scatter}"


def _not_testable(one: Judged) -> str:
    verdict, metric = one.verdict, one.series.metric
    if verdict.sizes < 2:
        return "There is one size only, and nothing to compare it with."
    move = {"increasing": "gets better from size to size", "decreasing": "gets worse from size to size"}.get(
        verdict.description,
        f"goes {verdict.description}" if "then" in verdict.description else f"is {verdict.description}",
    )
    odds = math.factorial(verdict.sizes) // 2
    chance = "always comes in some order" if odds == 1 else f"comes about by chance in 1 of {odds} cases"
    return (
        f"There are {verdict.sizes} sizes, and {MIN_SIZES} are needed: even a perfect order of {verdict.sizes} "
        f"{chance}. What can be seen, and may be chance: performance {move}, and {metric_name(metric)} changes by "
        f"{difference(metric, verdict.effect)} from the smallest to the largest."
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


# ---- comparisons ----


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
    families = []
    for one in differences:
        by, how = (
            difference(metric, abs(one["difference"]), plus=False),
            "better" if one["difference"] >= 0 else "worse",
        )
        interval = _interval((difference(metric, end, unit=False) for end in one["interval"]), limits)
        families.append(f"{one.get('family', '')} models do {by} {how} on the public ones {interval}".lstrip())
    suspected = [one.get("family", "") for one in differences if one["suspected"]]
    verdict = "There is no sign that the public questions were part of what the models were trained on."
    if suspected:
        who = f"For {' and '.join(suspected)}: either" if len(suspected) < len(differences) else "Either"
        verdict = (
            f"{who} the public questions, which have been on the web since 2023, were part of what the models were "
            "trained on, or our fresh ones are harder; models trained before 2023 can tell which."
        )
    intro = f"Public against fresh questions, {metric_name(metric)}, mean of all models"
    return f"{intro}: {'; '.join(families)}. {verdict}"


def caution_sentence(caution: Caution) -> str:
    """Two metrics or axes that disagree."""
    (one, here), (other, label) = caution.first, caution.second
    who = f"{caution.who}: " if caution.who else ""
    if caution.metric:
        return (
            f"{who}the axis matters. Along {axis_name(one)}, {metric_name(caution.metric)} {_VERBS[here]}; along "
            f"{axis_name(other)}, it {_VERBS[label]}."
        )
    return (
        f"{who}the metric matters. By {metric_name(one)} performance {_VERBS[here]}, by {metric_name(other)} it "
        f"{_VERBS[label]}."
    )


def flag_sentence(kind: str, names: str) -> str:
    """A flag of ``series.flags_of``, with the models it is about and what it means."""
    limits = {"most": f"{100 * CONSTANT_SHARE:g}{PERCENT}", "least": f"{100 * LOW_COVERAGE:g}{PERCENT}"}
    meaning = _TERMS["flags"].get(kind, kind).format(**limits)
    return ": ".join(filter(None, (names, meaning))) + "."

"""What the page says: names of axes and metrics, numbers with their units, and a verdict in sentences.

For readers who have never heard of inverse scaling, or of p. The words are in ``terms.yaml``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from branchmix.pages.numbers import human_count
from branchmix.scaling.metrics import CONSTANT_SHARE, LOW_COVERAGE
from branchmix.scaling.trends.judge import Caution, Judged, Report
from branchmix.scaling.trends.table import DATA, is_share
from branchmix.scaling.trends.verdict import DIRECTED, MIN_SIZES, SHAPES, Interval, Limits, p_text
from branchmix.settings import read_yaml

_TERMS = read_yaml(Path(__file__).with_name("terms.yaml"))
AXES, METRICS, _VERBS, _SAY = (_TERMS[name] for name in ("axes", "metrics", "verbs", "sentences"))
MINUS, TIMES, SPACE = "\u2212", "\u00d7", "\u00a0"
PERCENT = f"{SPACE}%"
_CEILING = 0.95
"""A plateau of a share from here on is a ceiling."""


def meanings(report: Report) -> dict[str, str]:
    """What each verdict means, for families of models or for a model in several settings."""
    texts = _TERMS["verdicts_within" if report.is_within else "verdicts"]
    return {label: meaning.format(min_sizes=MIN_SIZES) for label, meaning in texts.items()}


def question(report: Report) -> str:
    """What a page or sheet asks."""
    if not report.is_within:
        return "Do larger models do better?"
    return str(AXES.get(report.axis, {}).get("question", f"Does more {axis_name(report.axis)} help?"))


def _nouns(*, is_within: bool) -> dict[str, str]:
    """What a point of a curve is called."""
    place = "setting" if is_within else "size"
    return {"place": place, "places": f"{place}s", "Points": "Settings" if is_within else "Models"}


def axis_name(axis: str) -> str:
    return str(AXES[axis]["name"]) if axis in AXES else axis


def axis_value(axis: str, value: float) -> str:
    """A place on an axis: ``1.4B``, ``3×10²¹``."""
    if axis in ("params", "active_params", "tokens") and value:
        return human_count(float(f"{value:.3g}"))
    if value == round(value) and value < 1e5:
        return f"{value:,.0f}"
    if 0.001 <= value < 1e5:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{power}" if float(mantissa) == 1 else f"{float(mantissa):g}{TIMES}10{power}"


def place(axis: str, value: float) -> str:
    """A place on an axis with its unit: ``1.4B parameters``."""
    if axis not in AXES:
        return f"{axis} {axis_value(axis, value)}"
    return f"{axis_value(axis, value)} {unit(axis)}"


def unit(axis: str) -> str:
    """What is counted along an axis."""
    return str(AXES[axis].get("unit", axis_name(axis))) if axis in AXES else axis


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
    return f"{'falls' if effect < 0 else 'rises'} by about {_size(metric, effect, interval, limits)}"


def _size(metric: str, effect: float, interval: Interval | Sequence[float], limits: Limits) -> str:
    """A change without its sign, with its interval."""
    sign = -1 if effect < 0 else 1
    ends = (difference(metric, value, plus=False, unit=False) for value in sorted(sign * end for end in interval))
    return f"{difference(metric, abs(effect), plus=False)} {_interval(ends, limits)}"


def _interval(ends: Iterable[str], limits: Limits) -> str:
    return f"({percent_of(limits)} interval: {' to '.join(ends)})"


def percent_of(limits: Limits) -> str:
    return f"{100 * (1 - limits.alpha):g}{PERCENT}"


def _p(p: float) -> str:
    return p_text(p).replace(" ", SPACE)


def _share(p: float) -> str:
    if p < 0.001:
        return "less than 1 in 1,000"
    return f"{100 * p:.0f}{PERCENT}" if p >= 0.095 else f"{100 * p:.2g}{PERCENT}"


# ---- a verdict in sentences ----


def sentences(one: Judged, report: Report) -> str:
    """The verdict on a curve, and why it is that or why there is none."""
    verdict, metric, limits = one.verdict, one.series.metric, report.limits
    words: dict[str, Any] = {
        "metric": metric_name(metric),
        "sizes": verdict.sizes,
        **_nouns(is_within=report.is_within),
    }
    if verdict.p is None or verdict.p_adjusted is None:
        return _not_testable(one, words)
    tasks, kind_of = _num_tested(one, report), "tasks" if one.series.group is None else "curves"
    words |= {
        "Metric": metric_name(metric).capitalize(),
        "tasks": tasks,
        "p": _p(verdict.p),
        "p_adjusted": _p(verdict.p_adjusted),
        "tests": kind_of,
        "after": f"; {_p(verdict.p_adjusted)} after the correction for {tasks} {kind_of}" if tasks > 1 else "",
        "share": _share(verdict.p),
        "alpha": f"{limits.alpha:g}",
        "sure": percent_of(limits),
        "least": difference(metric, limits.minimum_effect, plus=False),
        "moves": moves(metric, verdict.effect, verdict.interval, limits),
        "between": between(metric, verdict.interval),
        "alone": _VERBS[verdict.alone],
    }
    if verdict.label in SHAPES:
        kind = "turn"
        legs = [moves(metric, leg["effect"], leg["interval"], limits) for leg in verdict.legs.values()]
        words |= {"first": legs[0], "second": legs[1], "turn": place(report.axis, verdict.turning_point or math.nan)}
    elif verdict.label in DIRECTED:
        kind = "trend"
        words["form"] = "".join(f"{sentence} " for sentence in form_sentences(one, report))
    elif verdict.label == "flat":
        kind = "flat"
    elif verdict.alone in DIRECTED:
        kind = "only alone"
    else:
        kind = "small" if verdict.p_adjusted < limits.alpha else "nothing"
        jitter = difference(metric, verdict.jitter, plus=False)
        is_wild = verdict.jitter > limits.minimum_effect
        words["scatter"] = (
            f" {_SAY['scatter'].format(jitter=jitter, **_nouns(is_within=report.is_within))}" if is_wild else ""
        )
    return str(_SAY[kind].format(**words))


def brief(one: Judged, report: Report) -> str:
    """The verdict's numbers in a line, for panels of several curves."""
    verdict, metric = one.verdict, one.series.metric
    nouns = _nouns(is_within=report.is_within)
    sizes = f"{verdict.sizes} {nouns['place' if verdict.sizes == 1 else 'places']}"
    if verdict.p_adjusted is None:
        return f"{sizes}; performance: {verdict.description}"
    if verdict.legs:
        legs = ", then ".join(difference(metric, leg["effect"]) for leg in verdict.legs.values())
        return f"{legs}; turns at {place(report.axis, verdict.turning_point or math.nan)}; {_p(verdict.p_adjusted)}"
    low, high = (difference(metric, value, unit=False) for value in verdict.interval)
    return f"{difference(metric, verdict.effect)} ({low} to {high}) over {sizes}; {_p(verdict.p_adjusted)}"


def form_sentences(one: Judged, report: Report) -> Iterator[str]:
    """Where a trend jumps, saturates, or sits on a floor or a ceiling, with the interval of each."""
    form, metric, is_better = one.verdict.form, one.series.metric, one.verdict.label == "standard"

    def words(level: dict[str, Any], *, is_best: bool) -> dict[str, str]:
        name = "floor" if not is_best else "ceiling" if is_share(metric) and level["value"] >= _CEILING else "plateau"
        ends = (shown(metric, value).removesuffix(PERCENT) for value in level["interval"])
        told = f"a {name} of {shown(metric, level['value'])} {_interval(ends, report.limits)}"
        return {"edge": place(report.axis, level["axis"]), "level": told}

    if jump := form.get("jump"):
        start, end = (place(report.axis, jump[side]) for side in ("from", "to"))
        size = _size(metric, jump["effect"], jump["interval"], report.limits)
        yield _SAY["jump"].format(start=start, end=end, size=size, **_nouns(is_within=report.is_within))
    if level := form.get("level_until"):
        yield _SAY["level until"].format(**words(level, is_best=not is_better))
    if level := form.get("level_from"):
        verb = "saturates, on" if is_better else "stays on"
        yield _SAY["level from"].format(verb=verb, **words(level, is_best=is_better))


def _not_testable(one: Judged, words: dict[str, Any]) -> str:
    verdict = one.verdict
    if verdict.sizes < 2:
        return str(_SAY["one size"].format(**words))
    step = f"from {words['place']} to {words['place']}"
    move = {"increasing": f"gets better {step}", "decreasing": f"gets worse {step}"}.get(
        verdict.description,
        f"goes {verdict.description}" if "then" in verdict.description else f"is {verdict.description}",
    )
    odds = math.factorial(verdict.sizes) // 2
    chance = "always comes in some order" if odds == 1 else f"comes about by chance in 1 of {odds} cases"
    change = difference(one.series.metric, verdict.effect)
    return str(_SAY["few sizes"].format(**words, min_sizes=MIN_SIZES, move=move, chance=chance, change=change))


def _num_tested(one: Judged, report: Report) -> int:
    """Tasks, or tasks and slices, that shared the correction with this one."""
    alike = [other for other in report.judged if other.series.tested_with == one.series.tested_with]
    tested = [other for other in alike if other.verdict.p is not None]
    return len(tested) if report.correction != "none" else 0


# ---- comparisons ----


def comparisons(report: Report, task: str, metric: str, kinds: Sequence[str] = DATA) -> Iterator[str]:
    """Families compared on these kinds of data, and official against fresh data, by a metric of a task."""
    lower_is_better = next(one.series.lower_is_better for one in report.judged if one.series.key == (task, metric))
    for pair in report.interactions.get(task, {}).get(metric, []):
        if pair["data"] in kinds:
            yield family_sentence(pair, metric, lower_is_better=lower_is_better, is_within=report.is_within)
    by_name = report.contamination.get(task, {}).items()  # a metric, or a metric and a family
    if differences := [found for name, found in by_name if name == metric or name.startswith(f"{metric}, ")]:
        yield contamination_sentences(differences, metric, report.limits)


def family_sentence(pair: dict[str, Any], metric: str, *, lower_is_better: bool, is_within: bool = False) -> str:
    """The interaction of two families with scale."""
    first, second = (name or "no family" for name in pair["families"])
    one, other = (difference(metric, slope) for slope in pair["slopes_per_decade"])
    is_better = (pair["difference"] > 0) != lower_is_better
    kind = "not different" if pair["testable"] else "not comparable"
    kind = ("better" if is_better else "worse") if pair["differs"] else kind
    return str(
        _SAY["families"].format(
            axis=axis_name(pair["axis"]),
            metric=metric_name(metric),
            one=one,
            other=other,
            first=first,
            second=second,
            kind=f" (on {pair['data']} questions)" if pair.get("data", DATA[0]) != DATA[0] else "",
            difference=difference(metric, pair["difference"]),
            between=between(metric, pair["interval"]),
            told=_SAY[kind].format(first=first, second=second, min_sizes=MIN_SIZES, **_nouns(is_within=is_within)),
        )
    )


def contamination_sentences(differences: Sequence[dict[str, Any]], metric: str, limits: Limits) -> str:
    """Official against fresh questions, for one family after the other."""
    families = []
    for one in differences:
        how = "better" if one["difference"] >= 0 else "worse"
        by = difference(metric, abs(one["difference"]), plus=False)
        interval = _interval((difference(metric, end, unit=False) for end in one["interval"]), limits)
        families.append(f"{one.get('family', '')} models do {by} {how} on the public ones {interval}".lstrip())
    suspected = [one.get("family", "") for one in differences if one["suspected"]]
    who = f"For {' and '.join(suspected)}: either" if len(suspected) < len(differences) else "Either"
    verdict = _SAY["suspected" if suspected else "not suspected"].format(who=who)
    return str(_SAY["public"].format(metric=metric_name(metric), families="; ".join(families), verdict=verdict))


def caution_sentence(caution: Caution) -> str:
    """Two metrics or axes that disagree."""
    (one, here), (other, there) = caution.first, caution.second
    name_of = axis_name if caution.metric else metric_name
    words = {"one": name_of(one), "here": _VERBS[here], "other": name_of(other), "there": _VERBS[there]}
    words |= {"who": f"{caution.who}: " if caution.who else "", "metric": metric_name(caution.metric)}
    return str(_SAY["axes" if caution.metric else "metrics"].format(**words))


def flag_sentence(kind: str, names: str) -> str:
    """A flag of ``series.flags_of``, with the models it is about and what it means."""
    limits = {"most": f"{100 * CONSTANT_SHARE:g}{PERCENT}", "least": f"{100 * LOW_COVERAGE:g}{PERCENT}"}
    meaning = _TERMS["flags"].get(kind, kind).format(**limits)
    return ": ".join(filter(None, (names, meaning))) + "."

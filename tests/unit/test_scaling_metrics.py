"""The official formulas against numbers worked out by hand."""

from __future__ import annotations

import math
import statistics

import pytest

from branchmix.scaling.examples import Example
from branchmix.scaling.metrics import (
    Score,
    class_shares,
    classification,
    logodds,
    mean,
    score,
    summarise,
)

AB = (" A", " B")


def test_two_classes() -> None:
    """loss = log(1 + exp(lp1 - lp0)) where class 0 is right."""
    found = classification([math.log(0.3), math.log(0.1)], 0)
    assert found.loss == pytest.approx(math.log(4 / 3)) and found.loss == pytest.approx(math.log1p(1 / 3))
    assert found.correct and found.predicted == 0
    assert found.coverage == pytest.approx(0.4)
    other = classification([math.log(0.3), math.log(0.1)], 1)
    assert other.loss == pytest.approx(math.log(4)) and not other.correct and other.predicted == 0


def test_constant_logits_lose_the_log_of_the_number_of_classes() -> None:
    for count in (2, 3, 5):
        assert classification([-7.25] * count, 1).loss == pytest.approx(math.log(count))
    assert classification([-2000.0, -2001.0], 1).loss == pytest.approx(math.log1p(math.e))  # exp would be 0
    assert classification([-2000.0, -2001.0], 1).coverage == 0


def test_a_sequence_is_not_divided_by_its_length() -> None:
    assert score("sequence_prob", Example("p", completion=" c"), [-12.5]) == Score(12.5)


def test_logodds() -> None:
    """(1 - 3) - (2 - 1) = -3; for answer 1 the sign turns, absolute takes the size."""
    assert logodds([-1.0, -3.0], [-2.0, -1.0], 0).loss == (-1 + 3) - (-2 + 1) == 3
    assert logodds([-1.0, -3.0], [-2.0, -1.0], 1).loss == -3
    assert logodds([-2.0, -1.0], [-1.0, -3.0], 0).loss == -3
    assert logodds([-2.0, -1.0], [-1.0, -3.0], 0, absolute=True).loss == 3
    # Right or wrong is judged on the other prompt, where class 1 leads.
    assert not logodds([-1.0, -3.0], [-2.0, -1.0], 0).correct
    assert logodds([-1.0, -3.0], [-2.0, -1.0], 1).correct


def test_the_metric_chooses_the_formula() -> None:
    example = Example("p", AB, 1, other_prompt="o")
    assert score("classification", example, [-1, -2]) == classification([-1, -2], 1)
    assert score("sequence_prob", Example("p", completion=" c"), [-4]) == Score(4)
    assert score("logodds", example, [-1, -2], [-3, -1]) == logodds([-1, -2], [-3, -1], 1)
    assert score("absolute_logodds", example, [-1, -2], [-3, -1]).loss == abs((-1 + 2) - (-3 + 1))


def test_standard_errors() -> None:
    n, right = 936, 817  # as in published results of memo-trap: accuracy .8729
    accuracy = mean([1.0] * right + [0.0] * (n - right))
    assert accuracy.value == right / n and accuracy.n == n
    assert accuracy.stderr == pytest.approx(math.sqrt(right / n * (1 - right / n) / (n - 1)), rel=1e-13)
    values = [0.3, 1.7, 0.2, 5.5]
    assert mean(values).stderr == pytest.approx(statistics.stdev(values) / 2)
    assert mean([2.0]).stderr is None


@pytest.mark.parametrize(
    ("classes", "counts", "wanted"),
    [(AB, (137, 163), (0.4567, 0.5433)), ((" Y", " N"), (142, 173), (0.4508, 0.5492))],  # NeQA, hindsight-neglect
)
def test_constant_class_baselines(
    classes: tuple[str, str], counts: tuple[int, int], wanted: tuple[float, float]
) -> None:
    examples = [Example("p", classes, answer) for answer in (0, 1) for _ in range(counts[answer])]

    def constant(examples: list[Example]) -> dict[str, float]:
        return class_shares(examples, [example.answer_index for example in examples])

    found = constant(examples)
    assert {name: round(value, 4) for name, value in found.items()} == dict(zip(classes, wanted, strict=True))
    turned = [Example("p", classes[::-1], 1 - example.answer_index) for example in examples]
    assert constant(turned[:100] + examples[100:]) == found  # their order means nothing
    mixed = [Example("p", (" x", " y"), 0), *[Example("p", (" z", " y"), 1)] * 3]
    assert constant(mixed) == {"class 0": 0.25, "class 1": 0.75}


def test_a_summary() -> None:
    examples = [Example("p", AB, answer) for answer in (0, 1, 1, 0)]
    lps = [(-1.0, -2.0), (-1.0, -2.0), (-3.0, -1.0), (-1.0, -1.5)]
    found = summarise(
        "classification", examples, [classification(lp, e.answer_index) for lp, e in zip(lps, examples, strict=True)]
    )
    assert found.means["accuracy"].value == 0.75 and found.means["accuracy"].stderr == pytest.approx(0.25)
    losses = [math.log1p(math.exp(-1)), math.log1p(math.e), math.log1p(math.exp(-2)), math.log1p(math.exp(-0.5))]
    assert found.means["loss"].value == pytest.approx(sum(losses) / 4)
    assert found.means["coverage"].value == pytest.approx(sum(math.exp(a) + math.exp(b) for a, b in lps) / 4)
    assert found.predictions == {" A": 0.75, " B": 0.25} and found.baselines == {" A": 0.5, " B": 0.5}
    assert found.chance == {"accuracy": 0.5, "loss": pytest.approx(math.log(2))}
    assert found.flags == ()
    three = summarise("classification", [Example("p", (" a", " b", " c"))], [classification([-1.0, -2.0, -2.0], 0)])
    assert three.chance == {"accuracy": pytest.approx(1 / 3), "loss": pytest.approx(math.log(3))}
    sequences = summarise("sequence_prob", [Example("p", completion=" c")] * 2, [Score(1.0), Score(3.0)])
    assert sequences.means["loss"].value == 2 and list(sequences.means) == ["loss"] and not sequences.flags
    odds = summarise("logodds", [Example("p", AB, 0, other_prompt="o")], [logodds([-1, -3], [-2, -1], 0)])
    assert {name: value.value for name, value in odds.means.items()} == {"accuracy": 0, "logodds": 3}


def test_degenerate_models_are_flagged() -> None:
    """Always A with next to no probability: each of the three signs."""
    examples = [Example("p", AB, number % 2) for number in range(100)]

    words = {"predicts": "constant", "always": "baseline", "gives": "coverage"}

    def kinds(scores: list[Score]) -> list[str]:
        flags = summarise("classification", examples, scores).flags
        return [kind for flag in flags for word, kind in words.items() if word in flag.split()]

    always = [classification([-9.0, -10.0], example.answer_index) for example in examples]
    assert kinds(always) == ["constant", "baseline", "baseline", "coverage"]
    good = [classification([-1.0, -2.0][:: 1 - 2 * e.answer_index], e.answer_index) for e in examples]
    assert kinds(good) == []
    # 96 of 100 the same answer is constant, 95 is not.
    for count, wanted in ((96, ["constant"]), (95, [])):
        scores = [classification([-1.0, -2.0] if n < count else [-2.0, -1.0], n % 2) for n in range(100)]
        assert [kind for kind in kinds(scores) if kind == "constant"] == wanted
    # 51 right are no baseline of 50, 50 right are.
    for right, wanted in ((51, []), (50, ["baseline", "baseline"])):
        scores = [
            classification([-1.0, -2.0] if (e.answer_index == 0) == (n < right) else [-2.0, -1.0], e.answer_index)
            for n, e in enumerate(examples)
        ]
        assert kinds(scores) == wanted

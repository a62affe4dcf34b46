"""Samples of lm-eval: what it logs of each question."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any


def scores_of_sample(sample: Mapping[str, Any]) -> dict[str, float]:
    """A sample's scores by metric, as results name it: ``acc``, or ``exact_match,strict-match`` with a filter.

    What is not a number, such as the parts of a perplexity, is left out.
    """
    suffix = "" if sample.get("filter", "none") == "none" else f",{sample['filter']}"
    metrics = sample.get("metrics")
    named = [name for name in metrics if isinstance(name, str)] if isinstance(metrics, (list, tuple)) else []
    values = {name + suffix: sample.get(name) for name in named}
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, (Real, bool)) and math.isfinite(float(value))
    }

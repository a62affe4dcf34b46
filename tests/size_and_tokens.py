"""Performance on size and training tokens together, as Michaelov and Bergen (arXiv 2305.14681) did for Pythia."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from statsmodels.regression.linear_model import OLS

from branchmix.statistics import adjusted

EFFECTS = ("params", "tokens", "interaction")


@dataclass(frozen=True)
class Effect:
    """A coefficient of a task's regression."""

    t: float
    degrees: int
    p: float
    p_adjusted: float
    """Benjamini-Hochberg over all effects of all tasks."""


def regression_on_size_and_tokens(
    tasks: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> dict[str, dict[str, Effect]]:
    """z(value) ~ z(log10 params) * z(log10 tokens) for each task, z-scores with n - 1.

    ``tasks`` maps names to (value [N], params [N], tokens [N]). The product is that of the z-scores, as R's
    ``scale(a) * scale(b)``.
    """
    fits = {}
    for task, (value, params, tokens) in tasks.items():
        columns = (value, np.log10(params), np.log10(tokens))
        z_value, z_params, z_tokens = ((column - column.mean()) / column.std(ddof=1) for column in columns)
        design = np.column_stack([np.ones_like(z_value), z_params, z_tokens, z_params * z_tokens])
        fits[task] = OLS(z_value, design).fit()
    corrected = iter(adjusted([p for fit in fits.values() for p in fit.pvalues[1:]], "bh"))
    return {
        task: {
            effect: Effect(float(fit.tvalues[k]), int(fit.df_resid), float(fit.pvalues[k]), next(corrected))
            for k, effect in enumerate(EFFECTS, 1)
        }
        for task, fit in fits.items()
    }

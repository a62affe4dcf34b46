"""What a study found, in sentences."""

from __future__ import annotations

from branchmix.study.comparisons import SEED_NOISE, Numbers
from branchmix.study.figures import FIRST
from branchmix.study.tables import intervals_are, merge_label, percent

FEW_STEPS = 100
"""Steps of a mixture below which models have hardly learned anything."""


def headline(study: Numbers) -> list[str]:
    """Equal data, equal compute, the slope that explains both, and how far to trust it."""
    models = {model["title"]: model for model in study["models"]}
    done = f"{study['steps_done']} of {study['steps']} steps are done"
    reference = models.get(study["reference"] or "")
    if reference is None:
        return [f"{done}; the reference has not been measured yet."]
    of_methods = [model for model in study["models"] if model["group"] == "methods"]
    trained = [model for model in of_methods if model["role"] == "trained"]
    presets = {model["preset"] for model in trained}
    described = [name for name in FIRST if name in presets] or sorted(presets)  # all others are in the tables
    lines = _before_training(study, models)
    for match, what in (("dm", "At equal data"), ("cm", "At equal compute")):
        parts = [
            f"{model['label']} {_verdict(study['comparisons'][model['title']], reference['label'])}"
            for model in trained
            if model["preset"] in described and match in model["match"]
        ]
        lines += [f"{what}: {'; '.join(parts)}."] if parts else []
    for match, what in (("dm", "data"), ("cm", "compute")):
        parts = [
            f"{models[title]['label']} {_verdict(compared, 'the dense model')}"
            for title, compared in study["against_dense"].get(match, {}).items()
            if models[title]["preset"] in (*described, reference["preset"])
        ]
        lines += [f"Beside a dense model of equal {what}: {'; '.join(parts)}."] if parts else []
    methods = {model["method"] for model in of_methods if model["preset"] in described}
    lines += [_slope(row, reference["label"]) for row in study["slopes"] if row["method"] in methods]
    lines += [_order(study["claims"])] if study["claims"] else []
    steps = reference["repetitions"][0]["training"]["steps"]
    if steps < FEW_STEPS:
        lines.append(f"The mixtures were trained for {steps} steps: enough to see that all works, too few to judge.")
    lines.append(_trust(study))
    return [*lines, f"{done}."] if study["steps_done"] < study["steps"] else lines


def _before_training(study: Numbers, models: dict[str, Numbers]) -> list[str]:
    """The best mixture that was not trained, beside the soup."""
    rows = [row for row in study["before_training"] if models[row["title"]]["role"] == "step 0" and row["soup"]]
    if not rows:
        return []
    best = min(rows, key=lambda row: models[row["title"]]["geometric_mean"])
    text = f"Before any training, {merge_label(models[best['title']])} {_verdict(best['soup'], 'the soup')}"
    if best["closed"] is not None and best["closed"] > 0:
        text += f": {100 * best['closed']:.0f} % of what forced gates gain"
    return [f"{text}."]


def _verdict(comparison: Numbers, reference: str) -> str:
    text = percent(comparison["log_perplexity"], significant=False)
    if not comparison["significant"]:
        return f"and {reference} are statistically indistinguishable ({text})"
    return f"is {'better' if comparison['relative'] < 0 else 'worse'} than {reference} ({text})"


def _slope(row: Numbers, reference: str) -> str:
    half = row["slope"]["half_width"]
    text = (
        f"{row['label']} spends {row['flops_ratio']:.2f} times the FLOPs of {reference}, and its perplexity falls like "
        f"tokens^{-row['slope']['value']:.2f}{f' (±{half:.2f})' if half is not None else ''} between its two budgets"
    )
    if row["pays_below"] is not None and row["significant"]:
        verb = "pays" if row["slope"]["value"] < row["pays_below"] else "would pay"
        text += (
            f"; its lead at equal data {verb} for them where it falls more slowly than tokens^-{row['pays_below']:.2f}"
        )
    return f"{text}."


def _order(claims: list[Numbers]) -> str:
    same = [row for row in claims if row["reproduced"]]
    sure = [row for row in same if row["significant"]]
    against = [row for row in claims if not row["reproduced"] and row["significant"]]
    tried = f"{len(claims)} findings of the paper that were" if len(claims) > 1 else "1 finding of the paper that was"
    return (
        f"Of {tried} tried, {len(same)} came out in the same direction, {len(sure)} of them beyond the noise; "
        f"{len(against)} came out the other way beyond the noise."
    )


def _trust(study: Numbers) -> str:
    comparisons = list(study["comparisons"].values())
    over_repetitions = sum(row["over"] == "repetitions" for row in comparisons)
    text = f"Perplexities are geometric means over the domains; ± is {intervals_are(study)}."
    if over_repetitions < len(comparisons):
        text += (
            " A random seed alone moves such numbers by a percent or two, so with one repetition differences up to "
            f"{SEED_NOISE:.0%} do not count."
        )
    if over_repetitions:
        text += f" Of {over_repetitions} comparisons over repetitions one in twenty excludes zero by chance."
    return f"{text} Nothing here says how larger models behave."

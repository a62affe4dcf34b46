"""What a study finds between its models: differences, budgets kept, the paper's rows, what one change does.

Models are the entries of ``results.collect``: a title, a preset, the budgets they match, and their repetitions.
"""

from __future__ import annotations

import math
from typing import Any

from branchmix.study.graph import NEGLIGIBLE, TRAINED
from branchmix.study.labels import Numbers
from branchmix.study.methods import METHODS
from branchmix.study.statistics import Comparison, compare, t_interval

INDISTINGUISHABLE = "statistically indistinguishable"


def comparison(ours: Numbers, theirs: Numbers) -> Comparison | None:
    """Two models in the repetitions that both have; None if there is none."""
    a, b = ({r["repetition"]: r["documents"] for r in model["repetitions"]} for model in (ours, theirs))
    both = sorted(a.keys() & b.keys())
    return compare([a[number] for number in both], [b[number] for number in both]) if both else None


def against_dense(models: list[Numbers]) -> dict[str, dict[str, Any]]:
    """By match, then by title: mixtures beside the dense model that was trained on as much data or compute."""
    trained = [model for model in models if model["role"] in TRAINED and model["group"] == "methods"]
    by_match: dict[str, dict[str, Any]] = {}
    for match in ("dm", "cm"):
        of_match = [model for model in trained if match in model["match"]]
        dense = next((model for model in of_match if model["preset"] == "dense"), None)
        if dense is None or dense["role"] == "reference":
            continue
        both = {model["title"]: comparison(model, dense) for model in of_match if model is not dense}
        by_match[match] = {title: {**c.as_dict(), "dense": dense["title"]} for title, c in both.items() if c}
    return by_match


def before_training(models: list[Numbers]) -> list[dict[str, Any]]:
    """What was not trained beside the soup, and how much of the way to forced gates its own gates go.

    ``closed`` is the share of the soup's distance, in log perplexity, to the same merge with forced gates; None where a
    study does not measure that in the same repetitions, or where it is no better than the soup.
    """
    merged = [model for model in models if model["group"] == "merged"]
    soup = next((model for model in merged if model["preset"] == "soup"), None)
    forced = [model for model in merged if model["role"] == "forced" and model["merge"] is not None]
    rows = []
    for model in merged:
        beside = comparison(model, soup) if soup is not None and model is not soup else None
        bounds = (other for other in forced if other["merge"] == model["merge"] and model["role"] == "step 0")
        closed = None
        if soup is not None and (bound := next(bounds, None)) is not None:
            most = comparison(bound, soup)
            same = _repetitions(soup) & _repetitions(model) == _repetitions(soup) & _repetitions(bound)
            if beside is not None and most is not None and most.mean.value < 0 and same:
                closed = beside.mean.value / most.mean.value
        rows.append({"title": model["title"], "soup": beside.as_dict() if beside else None, "closed": closed})
    return rows


def _repetitions(model: Numbers) -> set[int]:
    return {repetition["repetition"] for repetition in model["repetitions"]}


def budgets(models: list[Numbers], reference: Numbers | None) -> list[dict[str, Any]]:
    """Whether equal data and equal compute were kept, by what the runs recorded."""
    if reference is None:
        return []
    total = reference["flops"] + reference["optimizer_flops"]
    rows = []
    for model in models:
        if model["role"] not in TRAINED or not model["tokens"]:
            continue
        flops = model["flops"] + model["optimizer_flops"]
        step = flops / model["repetitions"][0]["training"]["steps"]
        kept = {
            "dm": model["tokens"] == reference["tokens"],
            "cm": 0 <= total - flops < step or abs(total - flops) <= NEGLIGIBLE * total,
        }
        rows.append(
            {
                **{key: model[key] for key in ("title", "label", "match", "tokens")},
                "tokens_share": model["tokens"] / reference["tokens"],
                "flops": flops,
                "flops_share": flops / total,
                "seconds_share": model["seconds"] / reference["seconds"] if reference["seconds"] else None,
                "kept": {match: kept[match] for match in model["match"] if match in kept and model is not reference},
            }
        )
    return rows


CLAIMS = (
    ("Table 1", "BAM Expert KV better than Shared KV, equal data", "bam-expert-kv", "dm", "bam-shared-kv", "dm"),
    ("Table 1", "BAM Expert KV better than BTX, equal data", "bam-expert-kv", "dm", "btx", ""),
    ("Table 1", "BAM Shared KV better than BTX, equal data", "bam-shared-kv", "dm", "btx", ""),
    ("Table 1", "BAM Expert KV better than Shared KV, equal compute", "bam-expert-kv", "cm", "bam-shared-kv", "cm"),
    ("Table 1", "BAM Expert KV better than BTX, equal compute", "bam-expert-kv", "cm", "btx", ""),
    ("Table 1", "BAM Shared KV better than BTX, equal compute", "bam-shared-kv", "cm", "btx", ""),
    ("Table 1", "BTX better than the seed", "btx", "", "seed", ""),
    ("Table 4", "BAM Expert KV better than BTX of as many parameters", "bam-expert-kv", "dm", "btx-total-match", "dm"),
    ("Table 4", "Copies of the seed make BTX worse", "btx", "", "btx-total-match", "dm"),
    ("Table 5", "BAM Expert KV better than BTX of as many active", "bam-expert-kv", "dm", "btx-active-match", "dm"),
    ("Table 6", "Soft attention routing better than top-2", "bam-shared-kv", "cm", "bam-attention-top2", "cm"),
    ("Table 6", "Soft attention routing better than top-1", "bam-shared-kv", "cm", "bam-attention-top1", "cm"),
    ("Table 6", "Attention top-2 better than top-1", "bam-attention-top2", "cm", "bam-attention-top1", "cm"),
)
"""What BAM (arXiv 2408.08274) finds: where, what, and which model has the lower average perplexity than which."""


def claims(models: list[Numbers]) -> list[dict[str, Any]]:
    """Which of the paper's rows came out in the same direction, and which beyond the noise."""

    def find(preset: str, match: str) -> Numbers | None:
        if preset == "seed":
            return next((model for model in models if model["role"] == "seed"), None)
        wanted = [m for m in models if m["preset"] == preset and m["role"] in TRAINED]
        return next((m for m in wanted if m["role"] == "reference" or match in m["match"]), None)

    rows: list[dict[str, Any]] = []
    for table, what, ours, our_match, theirs, their_match in CLAIMS:
        better, worse = find(ours, our_match), find(theirs, their_match)
        compared = comparison(better, worse) if better is not None and worse is not None else None
        if compared is not None:
            verdict = "same direction" if compared.mean.value < 0 else "opposite direction"
            row = {"table": table, "claim": what, **_difference(compared)}
            row["verdict"] = verdict if compared.significant else f"{INDISTINGUISHABLE} ({verdict})"
            rows.append({**row, "reproduced": compared.mean.value < 0})
    return rows


def variants(models: list[Numbers]) -> list[dict[str, Any]]:
    """Each method that varies another in one thing, beside that one, for each budget that both kept."""
    trained = [model for model in models if model["role"] in TRAINED]
    rows: list[dict[str, Any]] = []
    for model in trained:
        preset = METHODS.get(model["preset"] or "")
        varied = [other for other in trained if preset and preset.varies and other["preset"] == preset.varies]
        for other in varied:
            shared = [match for match in ("dm", "cm") if match in model["match"] and match in other["match"]]
            compared = comparison(model, other) if shared else None
            if compared is not None:
                better = "better" if compared.mean.value < 0 else "worse"
                row = {"title": model["title"], "other": other["title"], "match": shared, **_difference(compared)}
                rows.append({**row, "verdict": better if compared.significant else INDISTINGUISHABLE})
    return rows


def _difference(compared: Comparison) -> dict[str, Any]:
    return {
        "relative": compared.relative,
        "half_width": compared.mean.half_width,
        "n": compared.mean.n,
        "over": compared.over,
        "significant": compared.significant,
    }


def slopes(models: list[Numbers], reference: Numbers | None, comparisons: dict[str, Any]) -> list[dict[str, Any]]:
    """How fast perplexity falls with tokens, for methods with a run at equal data and one at equal compute.

    Both runs have whole schedules of their own, so this is not the tail of a curve whose rate has died down. A lead of
    L in log perplexity at equal data pays for R times the FLOPs once perplexity falls more slowly than
    tokens^-(L / ln R).
    """
    rows: list[dict[str, Any]] = []
    for data in models:
        same_method = (m for m in models if m["method"] == data["method"] and "cm" in m["match"] and m is not data)
        compute = next(same_method, None)
        is_pair = data["role"] == "trained" and "dm" in data["match"] and compute is not None
        if reference is None or not is_pair or compute is None or data["tokens"] == compute["tokens"]:
            continue
        at_compute = {r["repetition"]: r["geometric_mean"] for r in compute["repetitions"]}
        tokens = math.log(data["tokens"] / compute["tokens"])
        exponents = [
            math.log(at_compute[r["repetition"]] / r["geometric_mean"]) / tokens
            for r in data["repetitions"]
            if r["repetition"] in at_compute
        ]
        compared = comparisons.get(data["title"])
        if not exponents or compared is None:
            continue
        ratio = (data["flops"] + data["optimizer_flops"]) / (reference["flops"] + reference["optimizer_flops"])
        lead = -compared["log_perplexity"]["value"]
        rows.append(
            {
                "method": data["method"],
                "label": data["label"],
                "slope": t_interval(exponents).as_dict(),
                "flops_ratio": ratio,
                "lead": lead,
                "pays_below": lead / math.log(ratio) if lead > 0 and ratio > 1 else None,
                "significant": compared["significant"],
            }
        )
    return rows

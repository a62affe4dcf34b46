"""What a study finds between its models: differences, budgets kept, the paper's rows, what one change does.

Models are the entries of ``results.collect``: a title, a preset, the budgets they match, and their repetitions.
"""

from __future__ import annotations

import math
from typing import Any

from branchmix.study.graph import NEGLIGIBLE, TRAINED
from branchmix.study.methods import METHODS
from branchmix.study.statistics import Comparison, compare, t_interval


def comparison(ours: dict[str, Any], theirs: dict[str, Any]) -> Comparison | None:
    """Two models in the repetitions that both have; None if there is none."""
    a = {r["repetition"]: r["documents"] for r in ours["repetitions"]}
    b = {r["repetition"]: r["documents"] for r in theirs["repetitions"]}
    both = sorted(a.keys() & b.keys())
    return compare([a[number] for number in both], [b[number] for number in both]) if both else None


def against_dense(models: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By match, then by title: mixtures beside the dense model that was trained on as much data or compute."""
    trained = [model for model in models if model["role"] in TRAINED and model["group"] == "methods"]
    found: dict[str, dict[str, Any]] = {}
    for match in ("dm", "cm"):
        of_match = [model for model in trained if match in model["match"]]
        dense = next((model for model in of_match if model["preset"] == "dense"), None)
        if dense is None or dense["role"] == "reference":
            continue
        both = {model["title"]: comparison(model, dense) for model in of_match if model is not dense}
        found[match] = {title: {**c.as_dict(), "dense": dense["title"]} for title, c in both.items() if c is not None}
    return found


def budgets(models: list[dict[str, Any]], reference: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Whether equal data and equal compute were kept, from what the runs say of themselves."""
    if reference is None:
        return []
    rows = []
    total = reference["flops"] + reference["optimizer_flops"]
    for model in models:
        if model["role"] not in TRAINED or not model["tokens"]:
            continue
        flops = model["flops"] + model["optimizer_flops"]
        step = flops / model["repetitions"][0]["training"]["steps"]
        rows.append(
            {
                "title": model["title"],
                "label": model["label"],
                "match": model["match"],
                "tokens": model["tokens"],
                "tokens_share": model["tokens"] / reference["tokens"],
                "flops": flops,
                "flops_share": flops / total,
                "seconds_share": model["seconds"] / reference["seconds"] if reference["seconds"] else None,
                "kept": {
                    match: model["tokens"] == reference["tokens"]
                    if match == "dm"
                    else 0 <= total - flops < step or abs(total - flops) <= NEGLIGIBLE * total
                    for match in model["match"]
                    if match != "time"
                }
                if model is not reference
                else {},
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
)  # fmt: skip
"""What BAM (arXiv 2408.08274) finds: where, what, and which model has the lower average perplexity than which."""


def claims(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Which of the paper's rows came out in the same direction, and which beyond the noise."""

    def find(preset: str, match: str) -> dict[str, Any] | None:
        if preset == "seed":
            return next((model for model in models if model["role"] == "seed"), None)
        wanted = [m for m in models if m["preset"] == preset and m["role"] in TRAINED]
        return next((m for m in wanted if m["role"] == "reference" or match in m["match"]), None)

    rows: list[dict[str, Any]] = []
    for table, what, ours, our_match, theirs, their_match in CLAIMS:
        better, worse = find(ours, our_match), find(theirs, their_match)
        found = comparison(better, worse) if better is not None and worse is not None else None
        if found is None:
            continue
        verdict = "same direction" if found.mean.value < 0 else "opposite direction"
        rows.append(
            {
                "table": table,
                "claim": what,
                **_difference(found),
                "verdict": verdict if found.significant else f"cannot be told apart ({verdict})",
                "reproduced": found.mean.value < 0,
            }
        )
    return rows


def variants(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each method that varies another in one thing, beside that one, for each budget that both kept."""
    trained = [model for model in models if model["role"] in TRAINED]
    rows: list[dict[str, Any]] = []
    for model in trained:
        preset = METHODS.get(model["preset"] or "")
        if preset is None or preset.varies is None:
            continue
        for other in trained:
            shared = [match for match in ("dm", "cm") if match in model["match"] and match in other["match"]]
            if other["preset"] != preset.varies or not shared:
                continue
            found = comparison(model, other)
            if found is not None:
                better = "better" if found.mean.value < 0 else "worse"
                names = {"title": model["title"], "other": other["title"], "match": shared}
                verdict = better if found.significant else "cannot be told apart"
                rows.append({**names, **_difference(found), "verdict": verdict})
    return rows


def _difference(found: Comparison) -> dict[str, Any]:
    return {
        "relative": found.relative,
        "half_width": found.mean.half_width,
        "n": found.mean.n,
        "over": found.over,
        "significant": found.significant,
    }


def slopes(
    models: list[dict[str, Any]], reference: dict[str, Any] | None, comparisons: dict[str, Any]
) -> list[dict[str, Any]]:
    """Of methods with a run at equal data and one at equal compute: how fast perplexity falls with tokens between them.

    Both runs have whole schedules of their own, so this is no tail of a curve whose rate has died down. A lead of L in
    log perplexity at equal data pays for R times the FLOPs once perplexity falls more slowly than tokens^-(L / ln R).
    """
    rows: list[dict[str, Any]] = []
    if reference is None:
        return rows
    for data in models:
        compute = next(
            (m for m in models if m["method"] == data["method"] and "cm" in m["match"] and m is not data), None
        )
        if (
            data["role"] != "trained"
            or "dm" not in data["match"]
            or compute is None
            or data["tokens"] == compute["tokens"]
        ):
            continue
        exponents = []
        for r in data["repetitions"]:
            other = next((c for c in compute["repetitions"] if c["repetition"] == r["repetition"]), None)
            if other is not None:
                fall = math.log(other["geometric_mean"] / r["geometric_mean"])
                exponents.append(fall / math.log(data["tokens"] / compute["tokens"]))
        if not exponents or data["title"] not in comparisons:
            continue
        ratio = (data["flops"] + data["optimizer_flops"]) / (reference["flops"] + reference["optimizer_flops"])
        lead = -comparisons[data["title"]]["log_perplexity"]["value"]
        rows.append(
            {
                "method": data["method"],
                "label": data["label"],
                "slope": t_interval(exponents).as_dict(),
                "flops_ratio": ratio,
                "lead": lead,
                "pays_below": lead / math.log(ratio) if lead > 0 and ratio > 1 else None,
                "significant": comparisons[data["title"]]["significant"],
            }
        )
    return rows

"""What a study finds between its models: significant differences, budgets kept, the paper's rows, what one change does.

Differences between models are paired over documents and over repetitions. With two or more repetitions an interval is
Student's over the repetitions' paired differences: it contains what random seeds do. With one there is only the error
over held-out documents, which does not.

Models are the entries of ``results.collect``: a title, a preset, the budgets they match, and their repetitions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from branchmix.statistics import ratio
from branchmix.study.graph import NEGLIGIBLE, TRAINED
from branchmix.study.settings import METHODS

Numbers = dict[str, Any]
"""What ``results.collect`` returns, or a part of it."""
Interval = dict[str, Any]
"""A mean, ``value``; ``half_width`` of its 95 % interval, None where nothing is known of it; ``n``, its values."""
Documents = Mapping[str, Sequence[Sequence[float]]]
"""By domain, ``[nats, predicted tokens, bytes]`` of each document."""
LEVEL = 0.95
SEED_NOISE = 0.02
"""With one repetition, smaller differences are not significant: an allowance for the random seed, not measured."""
INDISTINGUISHABLE = "statistically indistinguishable"


# ---- Statistics ----


def log_perplexity(documents: Documents) -> dict[str, float]:
    """Nats a token of each domain."""
    return {name: math.fsum(row[0] for row in rows) / sum(row[1] for row in rows) for name, rows in documents.items()}


def t_interval(values: Sequence[float]) -> Interval:
    """Mean of independent values with Student's interval for it, which is unknown for a single one."""
    n, half = len(values), None
    if n > 1:
        half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * stdev(values) / math.sqrt(n)
    return {"value": fmean(values), "half_width": half, "n": n}


def difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Interval:
    """Mean difference of two models' loss on a domain, in nats a token, with twice its standard error over documents.

    Paired: what makes a document hard for both takes no part in it. The error of a single document is unknown.
    """
    pairs = [(a[0] - b[0], a[1]) for a, b in zip(ours, theirs, strict=True) if a[1]]
    value, stderr = ratio(*zip(*pairs, strict=True))
    return {"value": float(value), "half_width": None if stderr is None else 2 * float(stderr), "n": 1}


def compare(ours: Sequence[Documents], theirs: Sequence[Documents]) -> Numbers:
    """Two models on the same documents, in the same repetitions in the same order.

    Returns:
        ``relative`` difference of the geometric means of perplexity, so that negative is better; intervals of the
        difference of ``log_perplexity``, mean over domains, and ``by_domain``; that mean of each of the
        ``repetitions``; what the intervals are ``over``, repetitions or documents; and whether it is ``significant``:
        whether the interval excludes no difference and, with one repetition, what a seed may do.
    """
    domains = list(ours[0])
    if len(ours) == 1:
        over, by_domain = "documents", {domain: difference(ours[0][domain], theirs[0][domain]) for domain in domains}
        means = [fmean(interval["value"] for interval in by_domain.values())]
        known = [w for interval in by_domain.values() if (w := interval["half_width"]) is not None]
        half = math.sqrt(math.fsum(w**2 for w in known)) / len(domains) if len(known) == len(domains) else None
        whole: Interval = {"value": means[0], "half_width": half, "n": 1}
    else:
        pairs = [(log_perplexity(a), log_perplexity(b)) for a, b in zip(ours, theirs, strict=True)]
        over, by_domain = "repetitions", {d: t_interval([a[d] - b[d] for a, b in pairs]) for d in domains}
        means = [fmean(a[domain] - b[domain] for domain in domains) for a, b in pairs]
        whole = t_interval(means)
    value, half, least = whole["value"], whole["half_width"], SEED_NOISE if over == "documents" else 0.0
    return {
        "relative": math.expm1(value),
        "log_perplexity": whole,
        "by_domain": by_domain,
        "repetitions": means,
        "over": over,
        "significant": half is not None and abs(value) > max(half, least),
    }


def _row(compared: Numbers) -> Numbers:
    """A comparison without its parts."""
    whole = compared["log_perplexity"]
    numbers = {"relative": compared["relative"], "half_width": whole["half_width"], "n": whole["n"]}
    return {**numbers, "over": compared["over"], "significant": compared["significant"]}


# ---- Between the models of a study ----


def by_repetition(model: Numbers, key: str) -> dict[int, Any]:
    """One of a model's numbers in each of its repetitions."""
    return {repetition["repetition"]: repetition[key] for repetition in model["repetitions"]}


def all_flops(model: Numbers) -> int:
    """FLOPs of a model's own training."""
    return int(model["flops"] + model["optimizer_flops"])


def comparison(ours: Numbers | None, theirs: Numbers | None) -> Numbers | None:
    """Two models in the repetitions that both have; None if there is none, or one of the models is not there."""
    if ours is None or theirs is None:
        return None
    a, b = (by_repetition(model, "documents") for model in (ours, theirs))
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
        by_match[match] = {title: {**c, "dense": dense["title"]} for title, c in both.items() if c}
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
        beside = comparison(model, soup) if model is not soup else None
        bounds = (other for other in forced if other["merge"] == model["merge"] and model["role"] == "step 0")
        closed, bound = None, next(bounds, None)
        most = comparison(bound, soup)
        if beside is not None and most is not None and most["relative"] < 0:
            a, b, s = (set(by_repetition(one, "repetition")) for one in (model, bound, soup) if one is not None)
            ours, gap = (compared["log_perplexity"]["value"] for compared in (beside, most))
            closed = ours / gap if a & s == b & s else None
        rows.append({"title": model["title"], "soup": beside, "closed": closed})
    return rows


def budgets(models: list[Numbers], reference: Numbers | None) -> list[dict[str, Any]]:
    """Whether equal data and equal compute were kept, by what the runs recorded."""
    if reference is None:
        return []
    total, rows = all_flops(reference), []
    for model in models:
        if model["role"] not in TRAINED or not model["tokens"]:
            continue
        flops = all_flops(model)
        step = flops / model["repetitions"][0]["training"]["steps"]
        kept = {
            "dm": model["tokens"] == reference["tokens"],
            "cm": 0 <= total - flops < step or abs(total - flops) <= NEGLIGIBLE * total,
        }
        row = {key: model[key] for key in ("title", "label", "match", "tokens")}
        row |= {"tokens_share": model["tokens"] / reference["tokens"], "flops": flops, "flops_share": flops / total}
        row["seconds_share"] = model["seconds"] / reference["seconds"] if reference["seconds"] else None
        row["kept"] = {match: kept[match] for match in model["match"] if model is not reference}
        rows.append(row)
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
        compared = comparison(find(ours, our_match), find(theirs, their_match))
        if compared is not None:
            verdict = "same direction" if compared["relative"] < 0 else "opposite direction"
            row = {"table": table, "claim": what, **_row(compared)}
            row["verdict"] = verdict if compared["significant"] else f"{INDISTINGUISHABLE} ({verdict})"
            rows.append({**row, "reproduced": compared["relative"] < 0})
    return rows


def variants(models: list[Numbers]) -> list[dict[str, Any]]:
    """Each method that varies another in one thing, beside that one, for each budget that both kept."""
    trained = [model for model in models if model["role"] in TRAINED]
    rows: list[dict[str, Any]] = []
    for model in trained:
        varied = METHODS[model["preset"]].varies if model["preset"] in METHODS else None
        for other in (other for other in trained if varied and other["preset"] == varied):
            shared = [match for match in ("dm", "cm") if match in model["match"] and match in other["match"]]
            compared = comparison(model, other) if shared else None
            if compared is not None:
                better = "better" if compared["relative"] < 0 else "worse"
                row = {"title": model["title"], "other": other["title"], "match": shared, **_row(compared)}
                rows.append({**row, "verdict": better if compared["significant"] else INDISTINGUISHABLE})
    return rows


def slopes(models: list[Numbers], reference: Numbers | None, comparisons: dict[str, Any]) -> list[dict[str, Any]]:
    """How fast perplexity falls with tokens, for methods with a run at equal data and one at equal compute.

    Both runs have whole schedules of their own, so this is not the tail of a curve whose rate has died down. A lead of
    L in log perplexity at equal data pays for R times the FLOPs once perplexity falls more slowly than
    tokens^-(L / ln R).
    """
    rows: list[dict[str, Any]] = []
    for data in models:
        same_method = (m for m in models if m["method"] == data["method"] and "cm" in m["match"] and m is not data)
        compute, compared = next(same_method, None), comparisons.get(data["title"])
        if reference is None or compared is None or compute is None or data["tokens"] == compute["tokens"]:
            continue
        if data["role"] != "trained" or "dm" not in data["match"]:
            continue
        at_data, at_compute = (by_repetition(model, "geometric_mean") for model in (data, compute))
        tokens = math.log(data["tokens"] / compute["tokens"])
        exponents = [math.log(at_compute[n] / at_data[n]) / tokens for n in at_data if n in at_compute]
        if not exponents:
            continue
        lead, times = -compared["log_perplexity"]["value"], all_flops(data) / all_flops(reference)
        rows.append(
            {
                "method": data["method"],
                "label": data["label"],
                "slope": t_interval(exponents),
                "flops_ratio": times,
                "lead": lead,
                "pays_below": lead / math.log(times) if lead > 0 and times > 1 else None,
                "significant": compared["significant"],
            }
        )
    return rows

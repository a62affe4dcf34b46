"""The numbers of a study from its small results alone: models over repetitions, comparisons, budgets, the paper's rows.

``collect(folder)`` reads ``study.json`` and the records of all finished steps; what is not there yet is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from branchmix.errors import DataError
from branchmix.study.graph import NEGLIGIBLE
from branchmix.study.methods import METHODS
from branchmix.study.records import RESULTS, STUDY
from branchmix.study.statistics import Comparison, compare, log_perplexity, t_interval

GROUPS = {
    "dense": "Dense models",
    "merged": "Merged, not trained since (step 0)",
    "methods": "Trained on all domains",
    "ablations": "Ablations",
}
MATCHES = {"dm": "DM", "cm": "CM", "time": "equal time"}


def collect(folder: Path) -> dict[str, Any]:
    """Everything that reports show, as one dictionary.

    Args:
        folder: of a study, or of its results.

    Raises:
        DataError: there are no results.
    """
    place = folder / RESULTS if (folder / RESULTS / STUDY).is_file() else folder
    if not (place / STUDY).is_file():
        raise DataError(f"{folder}: has no {RESULTS}/{STUDY}: give the folder of a study, or of its results")
    study = _read(place / STUDY)
    steps = {name.removeprefix("step "): step for name, step in study.items() if name.startswith("step ")}
    records = {file.stem: _read(file) for file in sorted(place.glob("*.json")) if file.name != STUDY}
    records = {
        name: record for name, record in records.items() if name in steps and record["key"] == steps[name]["key"]
    }
    scored = {name: record for name, record in records.items() if "documents" in record}
    if not scored:
        raise DataError(f"{folder}: no model has been measured yet: run branchmix study first")
    settings = study["settings"]
    order = [name for name in steps if name in scored]
    models = _models(order, scored, records, steps)
    reference = next((model for model in models if model["role"] == "reference"), None)
    comparisons = {}
    if reference is not None:
        for model in models:
            found = comparison(model, reference)
            if model is not reference and found is not None:
                comparisons[model["title"]] = found.as_dict()
    runs = {name: record for name, record in records.items() if "training" in record}
    return {
        "settings": settings,
        "domains": list(next(iter(scored.values()))["documents"]),
        "steps_done": len(records),
        "steps": len(steps),
        "repetitions": len(settings["random_seeds"]),
        "models": models,
        "reference": reference["title"] if reference else None,
        "comparisons": comparisons,
        "against_dense": _against_dense(models),
        "budgets": _budgets(models, reference),
        "claims": claims(models),
        "variants": variants(models),
        "slopes": _slopes(models, reference, comparisons),
        "inference": records.get("inference"),
        "text": _text(records, runs),
        "held_out_documents": {d: len(rows) for d, rows in next(iter(scored.values()))["documents"].items()},
        "machines": _machines(runs),
        "recipes": {name: record["merge"]["recipe"] for name, record in records.items() if "merge" in record},
        "runs": {name: record["run"] for name, record in runs.items()},
        "keys": {name: record["key"] for name, record in records.items()},
    }


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: is no record of a study")
    return content


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def _models(
    order: list[str], scored: dict[str, Any], records: dict[str, Any], steps: dict[str, Any]
) -> list[dict[str, Any]]:
    """One entry for each model, with its repetitions."""
    by_title: dict[str, list[str]] = {}
    for name in order:
        by_title.setdefault(scored[name]["about"].get("title") or name.partition(".scores.")[2], []).append(name)
    found = [_model(title, names, scored, records, steps) for title, names in by_title.items()]
    places = list(GROUPS)
    return sorted(found, key=lambda model: (places.index(model["group"]), model["role"] != "seed"))


def _model(
    title: str, names: list[str], scored: dict[str, Any], records: dict[str, Any], steps: dict[str, Any]
) -> dict[str, Any]:
    first = scored[names[0]]
    about = first["about"]
    role = about["role"]
    group = "merged" if role in ("merge", "step 0", "ensemble") else about["group"]
    repetitions = []
    for name in names:
        logs = log_perplexity(scored[name]["documents"])
        made = steps[name]["needs"].get("model")
        record = records.get(made, {}) if made else {}
        repetitions.append(
            {
                "repetition": scored[name]["about"]["repetition"],
                "perplexity": {domain: math.exp(value) for domain, value in logs.items()},
                "geometric_mean": math.exp(math.fsum(logs.values()) / len(logs)),
                "bits_per_byte": {d: _bits(rows) for d, rows in scored[name]["documents"].items()},
                "documents": scored[name]["documents"],
                "routing": scored[name]["routing"],
                "training": record.get("training"),
                "sunk_flops": _sunk(name, steps, records),
            }
        )
    perplexity = {
        d: math.exp(_mean([math.log(r["perplexity"][d]) for r in repetitions])) for d in repetitions[0]["perplexity"]
    }
    trained = repetitions[0]["training"]
    return {
        "title": title,
        "method": about.get("method"),
        "preset": about.get("preset"),
        "label": label_of(about, role),
        "what": about.get("what", ""),
        "warning": about.get("warning", ""),
        "group": group,
        "role": role,
        "match": about.get("match", []),
        "perplexity": perplexity,
        "average": _mean(list(perplexity.values())),
        "geometric_mean": math.exp(_mean([math.log(r["geometric_mean"]) for r in repetitions])),
        "deviation": _deviation([math.log(r["geometric_mean"]) for r in repetitions]),
        "bits_per_byte": {d: _mean([r["bits_per_byte"][d] for r in repetitions]) for d in perplexity},
        "stderr": {d: _stderr(repetitions[0]["documents"][d]) for d in perplexity},
        "facts": steps[names[0]]["facts"],
        "tokens": trained["tokens"] if trained else 0,
        "flops": trained["flops"] if trained else 0,
        "optimizer_flops": trained["optimizer_flops"] if trained else 0,
        "sunk_flops": repetitions[0]["sunk_flops"],
        "seconds": _mean([r["training"]["seconds"] for r in repetitions if r["training"]]) if trained else 0.0,
        "repetitions": repetitions,
    }


def label_of(about: dict[str, Any], role: str) -> str:
    """As the paper's rows are called: BAM DM Expert KV."""
    label = str(about["label"])
    if role == "step 0":
        return f"{label}, step 0"
    if role != "trained":
        return label
    words = "/".join(MATCHES[match] for match in about["match"])
    family, _, rest = label.partition(" ")
    return f"{family} {words} {rest}" if family == "BAM" else f"{label} ({words})"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _deviation(values: Sequence[float]) -> float | None:
    """Standard deviation over repetitions."""
    if len(values) < 2:
        return None
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _bits(rows: Sequence[Sequence[float]]) -> float:
    return math.fsum(row[0] for row in rows) / math.log(2) / sum(row[2] for row in rows)


def _stderr(rows: Sequence[Sequence[float]]) -> float | None:
    """Of bits per byte, over documents (delta method), as ``branchmix.evaluate.perplexity.aggregate``."""
    if len(rows) < 2:
        return None
    rate, size = _bits(rows), sum(row[2] for row in rows)
    squares = math.fsum((row[0] / math.log(2) - rate * row[2]) ** 2 for row in rows)
    return math.sqrt(len(rows) / (len(rows) - 1) * squares) / size


def _sunk(name: str, steps: dict[str, Any], records: dict[str, Any]) -> int:
    """Training FLOPs of everything that a model was made from, itself left out."""
    made = steps[name]["needs"].get("model")
    seen: set[str] = set()

    def take(step: str) -> None:
        for needed in steps[step]["needs"].values():
            if needed not in seen:
                seen.add(needed)
                take(needed)

    take(made if made else name)
    training = (records[step]["training"] for step in seen if "training" in records.get(step, {}))
    return sum(int(run["flops"] + run["optimizer_flops"]) for run in training)


# ---------------------------------------------------------------------------------------------------------------------
# Between models
# ---------------------------------------------------------------------------------------------------------------------


def comparison(ours: dict[str, Any], theirs: dict[str, Any]) -> Comparison | None:
    """Two models in the repetitions that both have; None if there is none."""
    a = {r["repetition"]: r["documents"] for r in ours["repetitions"]}
    b = {r["repetition"]: r["documents"] for r in theirs["repetitions"]}
    both = sorted(a.keys() & b.keys())
    return compare([a[number] for number in both], [b[number] for number in both]) if both else None


def _against_dense(models: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By match, then by title: mixtures beside the dense model that was trained on as much data or compute."""
    trained = [model for model in models if model["role"] in ("trained", "reference") and model["group"] == "methods"]
    found: dict[str, dict[str, Any]] = {}
    for match in ("dm", "cm"):
        of_match = [model for model in trained if match in model["match"]]
        dense = next((model for model in of_match if model["preset"] == "dense"), None)
        if dense is None or dense["role"] == "reference":
            continue
        both = {model["title"]: comparison(model, dense) for model in of_match if model is not dense}
        found[match] = {title: {**c.as_dict(), "dense": dense["title"]} for title, c in both.items() if c is not None}
    return found


def _budgets(models: list[dict[str, Any]], reference: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Whether equal data and equal compute were kept, from what the runs say of themselves."""
    if reference is None:
        return []
    rows = []
    total = reference["flops"] + reference["optimizer_flops"]
    for model in models:
        if model["role"] not in ("trained", "reference") or not model["tokens"]:
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
        wanted = [m for m in models if m["preset"] == preset and m["role"] in ("trained", "reference")]
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
    trained = [model for model in models if model["role"] in ("trained", "reference")]
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


def _slopes(
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
        slopes = []
        for r in data["repetitions"]:
            other = next((c for c in compute["repetitions"] if c["repetition"] == r["repetition"]), None)
            if other is not None:
                fall = math.log(other["geometric_mean"] / r["geometric_mean"])
                slopes.append(fall / math.log(data["tokens"] / compute["tokens"]))
        if not slopes or data["title"] not in comparisons:
            continue
        ratio = (data["flops"] + data["optimizer_flops"]) / (reference["flops"] + reference["optimizer_flops"])
        lead = -comparisons[data["title"]]["log_perplexity"]["value"]
        rows.append(
            {
                "method": data["method"],
                "label": data["label"],
                "slope": t_interval(slopes).as_dict(),
                "flops_ratio": ratio,
                "lead": lead,
                "pays_below": lead / math.log(ratio) if lead > 0 and ratio > 1 else None,
                "significant": comparisons[data["title"]]["significant"],
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Around it
# ---------------------------------------------------------------------------------------------------------------------


def _text(records: dict[str, Any], runs: dict[str, Any]) -> dict[str, Any]:
    """Sizes of the domains, and how often the runs went through them."""
    found: dict[str, Any] = {}
    extracts = records.get("text", {}).get("text", {})
    for record in runs.values():
        for domain, row in record["training"]["text"].items():
            entry = found.setdefault(
                domain, {**row, "most_epochs": 0.0, "characters": extracts.get(domain, {}).get("characters")}
            )
            entry["most_epochs"] = max(entry["most_epochs"], row.get("epochs") or 0.0)
    return found


def _machines(runs: dict[str, Any]) -> list[dict[str, Any]]:
    """Every machine, precision and set of versions that runs were computed with."""
    found: list[dict[str, Any]] = []
    for record in runs.values():
        machine = {**record["machine"], "precision": record["computing"]["precision"], "versions": record["versions"]}
        if machine not in found:
            found.append(machine)
    return found

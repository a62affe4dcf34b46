"""The numbers of a study from its small results alone: models over repetitions, comparisons, budgets, the paper's rows.

``collect(folder)`` reads ``study.json`` and the records of all finished steps; what is not there yet is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from branchmix.checkpoint.json_text import read_json
from branchmix.errors import DataError
from branchmix.evaluate.ratio import ratio
from branchmix.study.comparisons import against_dense, budgets, claims, comparison, slopes, variants
from branchmix.study.graph import TRAINED, UNTRAINED, About
from branchmix.study.labels import label_of
from branchmix.study.records import RESULTS, STUDY
from branchmix.study.statistics import log_perplexity

GROUPS = {
    "dense": "Dense models",
    "merged": "Merged, not trained since (step 0)",
    "methods": "Trained on all domains",
    "ablations": "Ablations",
}


def collect(folder: Path) -> dict[str, Any]:
    """Everything that reports show, as one dictionary.

    Args:
        folder: of a study, or of its results.

    Raises:
        DataError: there are no results.
    """
    place = results_folder(folder)
    if not (place / STUDY).is_file():
        raise DataError(f"{folder}: has no {RESULTS}/{STUDY}: give the folder of a study, or of its results")
    study = _read(place / STUDY)
    steps = {name.removeprefix("step "): step for name, step in study.items() if name.startswith("step ")}
    records = _records(place, steps)
    scored = _scored(place, records, steps)
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
        "against_dense": against_dense(models),
        "budgets": budgets(models, reference),
        "claims": claims(models),
        "variants": variants(models),
        "slopes": slopes(models, reference, comparisons),
        "routes": {record["about"]["title"]: name for name, record in records.items() if "routes" in record},
        "inference": records.get("inference"),
        "text": _text(records, runs),
        "held_out_documents": {d: len(rows) for d, rows in next(iter(scored.values()))["documents"].items()},
        "machines": _machines(runs),
        "recipes": {name: record["merge"]["recipe"] for name, record in records.items() if "merge" in record},
        "runs": {name: record["run"] for name, record in runs.items()},
        "keys": {name: record["key"] for name, record in records.items()},
    }


def results_folder(folder: Path) -> Path:
    """Where the results of a study are: in its folder, or that folder itself."""
    return folder / RESULTS if (folder / RESULTS / STUDY).is_file() else folder


def _read(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: is no record of a study")
    return content


_PARTS = {
    "text": ("text",),
    "train": ("training", "computing", "machine", "versions", "run"),
    "upcycle": ("merge",),
    "scores": ("documents", "routing"),
    "ensemble": ("documents", "routing"),
    "routes": ("routes",),
    "inference": ("inference",),
}
"""Of records, by the kind of step."""


def _records(place: Path, steps: dict[str, Any]) -> dict[str, Any]:
    """By step; those of other settings are left out."""
    found = {}
    for file in sorted(place.glob("*.json")):
        if file.name == STUDY or file.stem not in steps:
            continue
        record, step = _read(file), steps[file.stem]
        missing = [part for part in ("key", "about", *_PARTS[step["kind"]]) if part not in record]
        if missing:
            raise DataError(f"{file}: has no {missing[0]!r}, so it is no record of this step: remove it")
        if record["key"] == step["key"]:
            found[file.stem] = record
    return found


def _scored(place: Path, records: dict[str, Any], steps: dict[str, Any]) -> dict[str, Any]:
    """Records of models that were measured, all on the same documents, and of what methods trained, the training."""
    found: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for name, record in records.items():
        made = steps[name]["needs"].get("model")
        is_trained = record["about"].get("role") in TRAINED
        if "documents" not in record or (is_trained and made not in records):
            continue
        counts = {domain: len(rows) for domain, rows in record["documents"].items()}
        empty = next((domain for domain, rows in record["documents"].items() if not any(row[1] for row in rows)), None)
        if empty is not None or not counts:
            raise DataError(f"{place / name}.json: has no document of {empty or 'any domain'}: hold more out")
        if found and counts != sizes:
            raise DataError(
                f"{place / name}.json: was measured on other documents than {next(iter(found))}.json: remove the wrong "
                "one"
            )
        sizes = counts
        found[name] = record
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def _models(
    order: list[str], scored: dict[str, Any], records: dict[str, Any], steps: dict[str, Any]
) -> list[dict[str, Any]]:
    """One entry for each model, with its repetitions."""
    by_title: dict[str, list[str]] = {}
    for name in order:
        by_title.setdefault(_about(scored, name).title or name.partition(".scores.")[2], []).append(name)
    found = [_model(title, names, scored, records, steps) for title, names in by_title.items()]
    places = list(GROUPS)
    return sorted(found, key=lambda model: (places.index(model["group"]), model["role"] != "seed"))


def _model(
    title: str, names: list[str], scored: dict[str, Any], records: dict[str, Any], steps: dict[str, Any]
) -> dict[str, Any]:
    about = _about(scored, names[0])
    group = "merged" if about.role in UNTRAINED else about.group
    repetitions = []
    for name in names:
        logs = log_perplexity(scored[name]["documents"])
        made = steps[name]["needs"].get("model")
        record = records.get(made, {}) if made else {}
        repetitions.append(
            {
                "repetition": _about(scored, name).repetition,
                "perplexity": {domain: math.exp(value) for domain, value in logs.items()},
                "geometric_mean": math.exp(math.fsum(logs.values()) / len(logs)),
                "bits_per_byte": {d: _bits(rows)[0] for d, rows in scored[name]["documents"].items()},
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
        "method": about.method or None,
        "preset": about.preset or None,
        "label": label_of(about),
        "what": about.what,
        "warning": about.warning,
        "group": group,
        "role": about.role,
        "match": list(about.match),
        "perplexity": perplexity,
        "average": _mean(list(perplexity.values())),
        "geometric_mean": math.exp(_mean([math.log(r["geometric_mean"]) for r in repetitions])),
        "deviation": _deviation([math.log(r["geometric_mean"]) for r in repetitions]),
        "bits_per_byte": {d: _mean([r["bits_per_byte"][d] for r in repetitions]) for d in perplexity},
        "stderr": {d: _bits(repetitions[0]["documents"][d])[1] for d in perplexity},
        "facts": steps[names[0]]["facts"],
        "tokens": trained["tokens"] if trained else 0,
        "flops": trained["flops"] if trained else 0,
        "optimizer_flops": trained["optimizer_flops"] if trained else 0,
        "sunk_flops": repetitions[0]["sunk_flops"],
        "seconds": _mean([r["training"]["seconds"] for r in repetitions if r["training"]]) if trained else 0.0,
        "repetitions": repetitions,
    }


def _about(scored: dict[str, Any], name: str) -> About:
    return About.of(scored[name]["about"])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _deviation(values: Sequence[float]) -> float | None:
    """Standard deviation over repetitions."""
    if len(values) < 2:
        return None
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _bits(rows: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """Bits per byte of a domain's documents, and their standard error."""
    return ratio((row[0] / math.log(2), row[2]) for row in rows)


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

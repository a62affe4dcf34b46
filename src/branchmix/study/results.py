"""The numbers of a study from its small results alone: models over repetitions, comparisons, budgets, the paper's rows.

``collect(folder)`` reads ``study.json`` and the records of all finished steps; what is not there yet is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pydantic import TypeAdapter

from branchmix.checkpoint.json_text import read_object
from branchmix.errors import DataError
from branchmix.statistics import ratio
from branchmix.study import comparisons
from branchmix.study.comparisons import Numbers, log_perplexity
from branchmix.study.folder import RESULTS, STUDY
from branchmix.study.graph import SCORES, TRAINED, UNTRAINED, About

GROUPS = {
    "dense": "Dense models",
    "merged": "Merged, not trained since (step 0)",
    "methods": "Trained on all domains",
    "ablations": "Ablations",
}

Records = dict[str, Any]
"""Records of finished steps, or descriptions of all steps, by the step's name."""


def collect(folder: Path) -> Numbers:
    """Everything that reports show, as one dictionary.

    Args:
        folder: of a study, or of its results.

    Raises:
        DataError: there are no results.
    """
    place = results_folder(folder)
    if not (place / STUDY).is_file():
        what = f"has no {RESULTS}/{STUDY}" if folder.is_dir() else "is a file" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: {what}: give the folder of a study, or of its results")
    study = _read(place / STUDY)
    steps = {name.removeprefix("step "): step for name, step in study.items() if name.startswith("step ")}
    records = _records(place, steps)
    scored = _scored(place, records, steps)
    if not scored:
        raise DataError(f"{folder}: no model has been measured yet: run branchmix study first")
    models = _models(scored, records, steps)
    reference = next((model for model in models if model["role"] == "reference"), None)
    others = [model for model in models if model is not reference]
    against_reference = {m["title"]: row for m in others if (row := comparisons.comparison(m, reference)) is not None}
    runs = {name: record for name, record in records.items() if "training" in record}
    merges = {name: record["merge"] for name, record in records.items() if "merge" in record}
    documents = next(iter(scored.values()))["documents"]
    has_fitted_gates = any(merge["recipe"].get("gates") for merge in merges.values())
    return {
        "settings": study["settings"],
        "domains": list(documents),
        "steps_done": len(records),
        "steps": len(steps),
        "repetitions": len(study["settings"]["random_seeds"]),
        "models": models,
        "reference": reference["title"] if reference else None,
        "comparisons": against_reference,
        "against_dense": comparisons.against_dense(models),
        "before_training": comparisons.before_training(models) if has_fitted_gates else [],
        "budgets": comparisons.budgets(models, reference),
        "claims": comparisons.claims(models),
        "variants": comparisons.variants(models),
        "slopes": comparisons.slopes(models, reference, against_reference),
        "routes": {record["about"]["title"]: name for name, record in records.items() if "routes" in record},
        "inference": records.get("inference"),
        "text": _text(records, runs),
        "held_out_documents": {domain: len(rows) for domain, rows in documents.items()},
        "machines": _machines(runs),
        "recipes": {name: merge["recipe"] for name, merge in merges.items()},
        "runs": {name: record["run"] for name, record in runs.items()},
        "keys": {name: record["key"] for name, record in records.items()},
    }


def results_folder(folder: Path) -> Path:
    """Where the results of a study are: in its folder, or that folder itself."""
    return folder / RESULTS if (folder / RESULTS / STUDY).is_file() else folder


def _read(file: Path) -> dict[str, Any]:
    content = read_object(file)
    if content is None:
        raise DataError(f"{file}: cannot be read as a record of a study, which is JSON")
    return content


_PARTS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "train": ("training", "computing", "machine", "versions", "run"),
    "upcycle": ("merge",),
    **dict.fromkeys(SCORES, ("documents", "routing")),
    "routes": ("routes",),
    "inference": ("inference",),
}
"""What a record has, by the kind of step."""


def _records(place: Path, steps: Records) -> Records:
    """Those of other settings are left out."""
    records = {}
    for file in sorted(place.glob("*.json")):
        if file.name == STUDY or file.stem not in steps:
            continue
        record, step = _read(file), steps[file.stem]
        missing = [part for part in ("key", "about", *_PARTS[step["kind"]]) if part not in record]
        if missing:
            raise DataError(f"{file}: has no {missing[0]!r}, so it is not a record of this step: remove it")
        if record["key"] == step["key"]:
            records[file.stem] = record
    return records


def _scored(place: Path, records: Records, steps: Records) -> Records:
    """Records of models that were measured, all on the same documents, and of what methods trained, the training."""
    scored: Records = {}
    sizes: dict[str, int] = {}
    for name, record in records.items():
        is_trained = record["about"].get("role") in TRAINED
        if "documents" not in record or (is_trained and steps[name]["needs"].get("model") not in records):
            continue
        counts = {domain: len(rows) for domain, rows in record["documents"].items()}
        empty = [domain for domain, rows in record["documents"].items() if not any(row[1] for row in rows)]
        if empty or not counts:
            raise DataError(
                f"{place / name}.json: has no document of {', '.join(empty) or 'any domain'}: hold more out"
            )
        if scored and counts != sizes:
            first = next(iter(scored))
            raise DataError(f"{place / name}.json: was measured on other documents than {first}.json: remove one")
        scored[name], sizes = record, counts
    return scored


# ---- Models ----


def _models(scored: Records, records: Records, steps: Records) -> list[Numbers]:
    """One entry for each model, with its repetitions."""
    by_title: dict[str, list[str]] = {}
    for name in steps:
        if name in scored:
            title = scored[name]["about"].get("title") or name.partition(".scores.")[2]
            by_title.setdefault(title, []).append(name)
    models = [_model(title, names, scored, records, steps) for title, names in by_title.items()]
    groups = list(GROUPS)
    return sorted(models, key=lambda model: (groups.index(model["group"]), model["role"] != "seed"))


_OF_ROUTERS = (
    *("start", "routing", "routed_scaling_factor", "router_init", "gates"),
    *("router_aux_loss_coef", "router_z_loss_coef"),
)
"""Keys of recipes that experts and averages do not depend on."""


def _model(title: str, names: list[str], scored: Records, records: Records, steps: Records) -> Numbers:
    about = TypeAdapter(About).validate_python(scored[names[0]]["about"])
    repetitions = [_repetition(name, scored[name], records, steps) for name in names]
    first = repetitions[0]
    perplexity = {d: math.exp(fmean(math.log(r["perplexity"][d]) for r in repetitions)) for d in first["perplexity"]}
    logs = [math.log(r["geometric_mean"]) for r in repetitions]
    trained = first["training"]
    merge = records.get(steps[names[0]]["needs"].get("model"), {}).get("merge")
    if merge is not None:  # what determines all weights of an untrained merge but those of its routers
        recipe = {key: value for key, value in merge["recipe"].items() if key not in _OF_ROUTERS}
        merge = {"recipe": recipe, "experts": merge.get("experts")}
    return {
        "title": title,
        "method": about.method or None,
        "preset": about.preset or None,
        "label": about.full_label,
        "what": about.what,
        "warning": about.warning,
        "group": "merged" if about.role in UNTRAINED else about.group,
        "role": about.role,
        "match": list(about.match),
        "perplexity": perplexity,
        "average": fmean(perplexity.values()),
        "geometric_mean": math.exp(fmean(logs)),
        "deviation": stdev(logs) if len(logs) > 1 else None,
        "bits_per_byte": {d: fmean(r["bits_per_byte"][d] for r in repetitions) for d in perplexity},
        "stderr": {domain: _bits(rows)[1] for domain, rows in first["documents"].items()},
        "merge": merge,
        "facts": steps[names[0]]["facts"],
        **{key: trained[key] if trained else 0 for key in ("tokens", "flops", "optimizer_flops")},
        "sunk_flops": first["sunk_flops"],
        "seconds": fmean(r["training"]["seconds"] for r in repetitions if r["training"]) if trained else 0.0,
        "repetitions": repetitions,
    }


def _repetition(name: str, record: dict[str, Any], records: Records, steps: Records) -> Numbers:
    logs = log_perplexity(record["documents"])
    made = steps[name]["needs"].get("model")
    return {
        "repetition": record["about"]["repetition"],
        "perplexity": {domain: math.exp(value) for domain, value in logs.items()},
        "geometric_mean": math.exp(fmean(logs.values())),
        "bits_per_byte": {domain: _bits(rows)[0] for domain, rows in record["documents"].items()},
        "documents": record["documents"],
        "routing": record["routing"],
        "training": records.get(made, {}).get("training"),
        "sunk_flops": _sunk(made or name, steps, records),
    }


def _bits(rows: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """Bits per byte of a domain's documents, and their standard error."""
    value, stderr = ratio([row[0] / math.log(2) for row in rows], [row[2] for row in rows])
    return float(value), None if stderr is None else float(stderr)


def _sunk(made: str, steps: Records, records: Records) -> int:
    """Training FLOPs of everything that a model was made from, itself left out."""
    before = set(steps[made]["needs"].values())
    for name in reversed(steps):  # each comes after all that it needs
        if name in before:
            before.update(steps[name]["needs"].values())
    training = (records[name]["training"] for name in before if "training" in records.get(name, {}))
    return sum(int(run["flops"] + run["optimizer_flops"]) for run in training)


# ---- Around it ----


def _text(records: Records, runs: Records) -> dict[str, Any]:
    """Sizes of the domains, and how often the runs went through them."""
    domains: dict[str, Any] = {}
    extracts = records.get("text", {}).get("text", {})
    for record in runs.values():
        for domain, row in record["training"]["text"].items():
            characters = extracts.get(domain, {}).get("characters")
            entry = domains.setdefault(domain, {**row, "most_epochs": 0.0, "characters": characters})
            entry["most_epochs"] = max(entry["most_epochs"], row.get("epochs") or 0.0)
    return domains


def _machines(runs: Records) -> list[dict[str, Any]]:
    """Every machine, precision and set of versions that runs were computed with."""
    every = [
        {**run["machine"], "precision": run["computing"]["precision"], "versions": run["versions"]}
        for run in runs.values()
    ]
    return [machine for number, machine in enumerate(every) if machine not in every[:number]]

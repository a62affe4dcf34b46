"""The numbers of a finished demo: models with their scores and costs, comparisons with their noise, curves, machine.

Everything is read from what the commands left in OUT; ``collect`` returns it as one dictionary, OUT/results.json.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from branchmix.demo.measure import routing_file, score_file
from branchmix.demo.settings import DOMAINS, EXPERTS, ROUTED, Scale
from branchmix.study.records import cpu_name, curve
from branchmix.study.statistics import SEED_NOISE, difference

LABELS = {
    "seed": "Seed",
    "experts/code": "Code expert",
    "experts/law": "Law expert",
    "experts/math": "Math expert",
    "upcycled/soup": "Soup",
    "upcycled/btx": "BTX",
    "upcycled/bam-shared-kv": "BAM Shared KV",
    "upcycled/bam-expert-kv": "BAM Expert KV",
    "trained/dense": "Dense, same data",
    "trained/btx": "BTX",
    "trained/bam-expert-kv-dm": "BAM DM Expert KV",
    "trained/bam-expert-kv-cm": "BAM CM Expert KV",
    "trained/bam-shared-kv-dm": "BAM DM Shared KV",
    "trained/bam-shared-kv-cm": "BAM CM Shared KV",
}
"""Folder and name of every model, in the order of the table; those of the paper's Table 1 have its names."""
GROUPS = {
    "dense": "Dense models",
    "merged": "Merged, not trained since (step 0)",
    "trained": "Trained on all four domains",
}
FEW_STEPS = 30
"""Of a mixture: below, models have hardly learned anything."""
CAVEAT = (
    "Perplexities are geometric means over the four domains; ± is twice the standard error over the held-out "
    "documents. One random seed, and a training of minutes: another seed moves such numbers by a percent or two, so "
    f"differences below {SEED_NOISE:.0%} are not called differences, and nothing here says how large models behave."
)
COMPARED = ("bam-expert-kv-dm", "bam-shared-kv-dm", "bam-expert-kv-cm", "bam-shared-kv-cm")
"""Runs that are compared with BTX."""


def collect(out: Path, *, seconds: float) -> dict[str, Any]:
    """All numbers of the demo in ``out``, also written to ``out / "results.json"``.

    Args:
        out: the demo's folder, with all steps done.
        seconds: of wall time, for the record.
    """
    plan, demo = _json(out / "plan.json"), _json(out / "demo.json")
    scale = Scale(**plan["scale"])
    folders = [folder for folder in LABELS if score_file(out, folder).is_file()]
    scores = {folder: _json(score_file(out, folder)) for folder in folders}
    runs = {folder: _json(out / folder / "training.json") for folder in folders if not folder.startswith("upcycled")}
    models = [_model(out, folder, scores[folder]["domains"], runs, scale) for folder in folders]
    found = {
        "minutes": demo["minutes"],
        "seconds": round(seconds, 1),
        "scale": plan["scale"],
        "budgets": plan["budgets"],
        "speed": _json(out / "speed.json"),
        "machine": {**runs["seed"]["machine"], "cpu": cpu_name(), "precision": runs["seed"]["computing"]["precision"]},
        "versions": runs["seed"]["versions"],
        "text": _text(_json(out / "text" / "extract.json"), runs),
        "models": models,
        "comparisons": {
            name: _compared(scores[f"trained/{name}"]["domains"], scores["trained/btx"]["domains"])
            for name in COMPARED
            if f"trained/{name}" in scores
        },
        "held_out_documents": {domain: len(scores["seed"]["domains"][domain]) for domain in DOMAINS},
        "routing": {f"trained/{run}": _routing(out, run) for run in ROUTED if routing_file(out, run).is_file()},
        "curves": {folder: curve(out / folder) for folder in folders if folder.startswith("trained")},
        "steps": _json(out / "steps.json"),
    }
    found["headline"] = headline(found)
    (out / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def _routing(out: Path, run: str) -> dict[str, Any]:
    """What ``branchmix routes`` found, without the tokens."""
    found = _json(routing_file(out, run))
    for kind in ("ffn", "attention"):
        for layer in found.get(kind, []):
            layer.pop("typical")
    return dict(found)


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# One model
# ---------------------------------------------------------------------------------------------------------------------


def _model(
    out: Path, folder: str, documents: dict[str, list[list[float]]], runs: dict[str, Any], scale: Scale
) -> dict[str, Any]:
    """Scores and cost of one model."""
    from branchmix.accounting import inspect
    from branchmix.evaluate.perplexity import DocumentScore, aggregate

    facts = inspect(out / folder, context=scale.sequence_length)
    scores = {d: aggregate(DocumentScore(n, int(t), int(b)) for n, t, b in documents[d]) for d in DOMAINS}
    perplexities = [scores[domain].perplexity for domain in DOMAINS]
    run = runs.get(folder)
    sunk = []
    if folder != "seed" and run is not None and not run["config"]["model"].startswith("upcycled"):
        sunk = ["seed"]
    elif folder != "seed":
        sunk = ["seed", *(f"experts/{name}" for name in EXPERTS)]
    return {
        "folder": folder,
        "label": LABELS[folder],
        "group": {"upcycled": "merged", "trained": "trained"}.get(folder.split("/")[0], "dense"),
        "perplexity": {domain: scores[domain].perplexity for domain in DOMAINS},
        "average": sum(perplexities) / len(perplexities),
        "geometric_mean": math.exp(sum(map(math.log, perplexities)) / len(perplexities)),
        "bits_per_byte": {domain: scores[domain].bits_per_byte for domain in DOMAINS},
        "stderr": {domain: scores[domain].stderr for domain in DOMAINS},
        "mean_bits_per_byte": sum(scores[domain].bits_per_byte for domain in DOMAINS) / len(DOMAINS),
        "parameters": facts.total.total,
        "active_parameters": facts.active.total,
        "kv_cache_bytes_per_token": facts.kv_cache_bytes_per_token,
        "forward_flops_per_token": facts.flops.total if facts.flops is not None else None,
        "tokens": run["tokens"] if run else 0,
        "flops": run["flops"] if run else 0,
        "sunk_flops": sum(runs[name]["flops"] for name in sunk),
        "seconds": run["seconds"] if run else 0.0,
    }


def _text(extracts: dict[str, Any], runs: dict[str, Any]) -> dict[str, Any]:
    """Sizes of the domains, and how often the runs went through them."""
    found = {}
    for domain in DOMAINS:
        row = dict(runs["seed"]["data"]["domains"][domain])
        trained = [run["data"]["domains"][domain].get("epochs") or 0.0 for run in runs.values()]
        found[domain] = {**row, "characters": extracts[domain]["chars"], "most_epochs": max(trained)}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Two models
# ---------------------------------------------------------------------------------------------------------------------


def _compared(ours: dict[str, list[list[float]]], theirs: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Relative difference of the geometric means of perplexity, and twice its standard error; negative is better."""
    by_domain = {domain: difference(ours[domain], theirs[domain]) for domain in DOMAINS}
    value = sum(found.value for found in by_domain.values()) / len(DOMAINS)
    stderr = math.sqrt(sum(found.stderr**2 for found in by_domain.values())) / len(DOMAINS)
    finite = math.isfinite(stderr)
    return {
        "relative": math.expm1(value),
        "twice_stderr": 2 * stderr if finite else None,
        "beyond_noise": finite and abs(value) > max(2 * stderr, SEED_NOISE),
        "by_domain": {domain: math.expm1(found.value) for domain, found in by_domain.items()},
    }


# ---------------------------------------------------------------------------------------------------------------------
# In words
# ---------------------------------------------------------------------------------------------------------------------


def headline(found: dict[str, Any]) -> list[str]:
    """What came out, in sentences: equal data, equal compute, the slope that explains both, and how far to trust it."""
    models = {model["folder"]: model for model in found["models"]}
    btx = models["trained/btx"]["geometric_mean"]
    lines = []
    for match, what in (("dm", "At equal data"), ("cm", "At equal compute")):
        parts = []
        for kind, name in (("expert-kv", "BAM Expert KV"), ("shared-kv", "BAM Shared KV")):
            folder = f"trained/bam-{kind}-{match}"
            if folder in models:
                ours = models[folder]["geometric_mean"]
                parts.append(f"{name} {_verdict(found['comparisons'][f'bam-{kind}-{match}'])}: perplexity {ours:.1f}")
        if parts:
            lines.append(f"{what}, {'; '.join(parts)}; BTX has {btx:.1f}.")
    steps = found["budgets"]["mixture"] // (found["scale"]["sequence_length"] * found["scale"]["batch_size"])
    if steps < FEW_STEPS:
        lines.append(f"The mixtures were trained for {steps} steps: enough to see that all works, too few to judge.")
    return [*lines, *_slope(models, found["comparisons"]), CAVEAT]


def _verdict(comparison: dict[str, Any]) -> str:
    percent, noise = 100 * comparison["relative"], comparison["twice_stderr"]
    if noise is None:
        return f"differs from BTX by {percent:+.1f} %, on too few documents to know the noise"
    tolerance = f" ({percent:+.1f} % ± {100 * noise:.1f})"
    if not comparison["beyond_noise"]:
        return f"and BTX cannot be told apart{tolerance}"
    return f"is {'better' if percent < 0 else 'worse'} than BTX{tolerance}"


def _slope(models: dict[str, Any], comparisons: dict[str, Any]) -> list[str]:
    """What a lead at equal data is worth at equal compute depends on how fast more tokens still help."""
    data, compute = (models.get(f"trained/bam-expert-kv-{match}") for match in ("dm", "cm"))
    if data is None or compute is None or data["tokens"] <= compute["tokens"]:
        return []
    tokens = math.log(data["tokens"] / compute["tokens"])
    slope = math.log(compute["geometric_mean"] / data["geometric_mean"]) / tokens
    btx = models["trained/btx"]
    ratio = data["forward_flops_per_token"] / btx["forward_flops_per_token"]
    text = (
        f"BAM Expert KV spends {ratio:.2f} times the FLOPs of BTX on a token, and its perplexity falls like "
        f"tokens^{-slope:.2f} at the end of this training"
    )
    lead = math.log(btx["geometric_mean"] / data["geometric_mean"])
    if lead > 0 and comparisons["bam-expert-kv-dm"]["beyond_noise"]:
        enough = lead / math.log(ratio)
        text += f"; its lead at equal data would pay for them once it falls more slowly than tokens^{-enough:.2f}"
    return [f"{text}."]

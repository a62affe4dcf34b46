"""The model card of an upload: sources with their licences, recipe, training, accounting, evaluation.

Paths of this machine stay here: a local source is called by its folder's name.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from branchmix import __version__
from branchmix.accounting import inspect
from branchmix.errors import BranchMixError, RecipeError
from branchmix.upcycling.card import front_matter, history, method_of, source_table, usage

UNKNOWN = "unknown"

_FIRST_LINES = {
    "apache license": "apache-2.0",
    "mit license": "mit",
    "bsd 3-clause": "bsd-3-clause",
    "creative commons attribution 4.0": "cc-by-4.0",
    "gnu general public license": "gpl-3.0",
    "llama 2 community": "llama2",
    "llama 3 community": "llama3",
    "gemma terms of use": "gemma",
}


def licence_of_folder(folder: Path) -> str | None:
    """The Hub's name of a checkpoint's licence, from its model card's metadata or its LICENSE file.

    Args:
        folder: of a checkpoint.
    """
    readme = folder / "README.md"
    if readme.is_file():
        found = metadata_of(readme.read_text(encoding="utf-8", errors="replace")).get("license")
        if isinstance(found, str):
            return found
    for file in sorted(folder.glob("LICENSE*")):
        start = file.read_text(encoding="utf-8", errors="replace")[:2000].lower()
        return next((name for line, name in _FIRST_LINES.items() if line in start), f"see its {file.name}")
    return None


def metadata_of(readme: str) -> dict[str, Any]:
    """The YAML between the first two lines of dashes of a model card."""
    import yaml

    front = re.match(r"---\s*\n(.*?)\n---", readme, re.DOTALL)
    try:
        found = yaml.safe_load(front.group(1)) if front else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def without_paths(provenance: dict[str, Any]) -> dict[str, Any]:
    """The provenance with local folders by their last name; Hub ids stay.

    Args:
        provenance: of ``branchmix.json``.
    """
    kept = {source["model"] for source in _sources(provenance) if source.get("revision")}

    def clean(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: clean(inner, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [clean(inner, key) for inner in value]
        if isinstance(value, str) and key in ("model", "seed", "text", "folder") and value not in kept:
            return Path(value).name or value
        return value

    return dict(clean(provenance))


def _sources(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    joined = [step["added"]["expert"] for step in provenance.get("changes", []) if "added" in step]
    return [*provenance["sources"], *joined]


def hub_card(
    folder: Path,
    repo: str,
    config: dict[str, Any],
    provenance: dict[str, Any] | None,
    *,
    licence: str | None,
    licences: dict[str, str],
    results: Path | None,
) -> str:
    """Markdown with the Hub's front matter.

    Args:
        folder: of the checkpoint.
        repo: ``org/name``.
        config: its config.json.
        provenance: from ``branchmix.json``; None where nothing is known.
        licence: of the upload, for the front matter.
        licences: of the sources, by name.
        results: ``results.json`` of ``branchmix eval``.

    Raises:
        RecipeError: the results are none.
    """
    is_mixture = config.get("model_type") == "branchmix"
    told = without_paths(provenance) if provenance else {"recipe": {}, "sources": []}
    told = {**told, "versions": {"branchmix": __version__}}
    more: dict[str, Any] = {"pipeline_tag": "text-generation", **({"license": licence} if licence else {})}
    if any(source.get("revision") for source in told["sources"]):
        more["base_model_relation"] = "merge"
    title = method_of(config) if is_mixture or not told.get("exported") else _exported(config, told["exported"])
    lines = [*front_matter(told, **more), f"# {repo.partition('/')[2]}", "", f"{title[0].upper()}{title[1:]}.", ""]
    if told["sources"]:
        lines += ["## Sources", "", *source_table(told, licences), ""]
    lines += usage(repo, own_code=is_mixture)
    lines += _training(folder) + _accounting(folder) + (_evaluation(results) if results else [])
    lines += history(told, ())
    made = "[branchmix](https://arxiv.org/abs/2408.08274)"
    return "\n".join([*lines, "", f"Made with {made} {__version__}."]) + "\n"


def _exported(config: dict[str, Any], exported: dict[str, Any]) -> str:
    if exported.get("expert"):
        return f"expert {exported['expert']} of a mixture, as a dense {config['model_type']} model"
    return f"a mixture of FFN experts, exported to {config['model_type']}"


def _training(folder: Path) -> list[str]:
    """From ``training.json``: tokens, FLOPs, and the held-out perplexities at both ends."""
    try:
        record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        tokens, domains = record["tokens"], record["domains"]
        start, end = record["held_out"]["start"], record["held_out"]["end"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    flops = f", {record['flops']:.3g} FLOPs" if record.get("flops") else ""
    lines = ["", "## Training", "", f"{tokens:,} tokens{flops}.", ""]
    lines += ["| domain | tokens | held-out perplexity before | after |", "| --- | --- | --- | --- |"]
    for name, domain in domains.items():
        before, after = (f"{side[name]['perplexity']:.2f}" if name in side else "-" for side in (start, end))
        lines.append(f"| {name} | {domain['tokens']:,} | {before} | {after} |")
    return lines


def _accounting(folder: Path) -> list[str]:
    try:
        found = inspect(folder)
    except BranchMixError:
        return []
    lines = ["", "## Accounting", "", "| | |", "| --- | --- |"]
    lines.append(f"| parameters | {found.total.total:,} |")
    lines.append(f"| active for a token | {found.active.total:,} |")
    if found.flops is not None:
        lines.append(f"| FLOPs of a token, forward, at a context of {found.context:,} | {found.flops.total:.4g} |")
    if found.kv_cache_bytes_per_token is not None:
        lines.append(f"| KV cache, bytes a token ({found.dtype}) | {found.kv_cache_bytes_per_token:,} |")
    return lines


def _evaluation(results: Path) -> list[str]:
    """Bits per byte of every model and domain in a ``results.json``."""
    try:
        models = json.loads(results.read_text(encoding="utf-8"))["models"]
        rows = [
            (Path(model["model"]).name or model["model"], model["domains"], model["max_length"]) for model in models
        ]
        domains = list(rows[0][1])
        lines = ["", "## Evaluation", "", f"Bits per byte, window of {rows[0][2]:,} tokens (standard error).", ""]
        lines += [f"| | {' | '.join(domains)} |", "| --- " * (len(domains) + 1) + "|"]
        for name, scores, _ in rows:
            cells = []
            for domain in domains:
                score, error = scores[domain]["bits_per_byte"], scores[domain].get("stderr")
                cells.append(f"{score:.4f}" + (f" ({error:.4f})" if error is not None else ""))
            lines.append(f"| {name} | {' | '.join(cells)} |")
    except OSError as error:
        raise RecipeError(f"{results}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise RecipeError(f"{results}: is no results.json of `branchmix eval --out`") from error
    return lines

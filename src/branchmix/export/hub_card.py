"""The model card of an upload: sources with their licences, recipe, training, accounting, evaluation.

Local paths are not published: a local source is called by its folder's name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from branchmix import __version__
from branchmix.accounting import inspect
from branchmix.checkpoint.families import has_experts
from branchmix.checkpoint.json_text import read_json
from branchmix.errors import BranchMixError, RecipeError
from branchmix.upcycling.model_card import front_matter, history, method_of, source_table, sources_of, usage

UNKNOWN = "unknown"


def without_paths(provenance: dict[str, Any]) -> dict[str, Any]:
    """The content of ``branchmix.json`` with local folders by their last name; Hub ids stay."""
    kept = {source["model"] for source in sources_of(provenance).values() if source.get("revision")}

    def clean(value: Any, above: str = "", key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: clean(inner, key, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [clean(inner, above, key) for inner in value]
        is_place = key in ("model", "seed") or (above, key) == ("training", "name")
        if above in ("text", "prompts"):  # the keys are names of experts, which may be any word
            is_place = above == "text"
        return Path(value).name or value if isinstance(value, str) and is_place and value not in kept else value

    return dict(clean(provenance))


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
    """Markdown with the Hub's front matter; ``licence`` is the upload's, ``licences`` those of the sources, by name.

    Raises RecipeError if ``results`` is not a ``results.json`` of ``branchmix eval``.
    """
    record = without_paths(provenance) if provenance else {"recipe": {}, "sources": []}
    record = {**record, "versions": {"branchmix": __version__}}
    more: dict[str, Any] = {"pipeline_tag": "text-generation", **({"license": licence} if licence else {})}
    if any(source.get("revision") for source in sources_of(record).values()):
        more["base_model_relation"] = "merge"
    title = _title(config, record)
    front = front_matter(config, record, **more)
    lines = [*front, f"# {repo.partition('/')[2]}", "", f"{title[0].upper()}{title[1:]}.", ""]
    if record["sources"]:
        lines += ["## Sources", "", *source_table(record, licences), ""]
    lines += usage(repo, own_code=config.get("model_type") == "branchmix")
    training = _training(folder)
    lines += training + _accounting(folder) + (_evaluation(results) if results else [])
    lines += history(record, ())
    made = "Made" if record["sources"] or training else "Uploaded"
    return "\n".join([*lines, "", f"{made} with [branchmix](https://arxiv.org/abs/2408.08274) {__version__}."]) + "\n"


def _title(config: dict[str, Any], provenance: dict[str, Any]) -> str:
    """What the model is, in one line."""
    model_type, exported = config["model_type"], provenance.get("exported")
    if exported and exported.get("expert"):
        return f"expert {exported['expert']} of a mixture, as a dense {model_type} model"
    if exported and has_experts(config):
        return f"a mixture of FFN experts, exported to {model_type}"
    plain = f"a {model_type} mixture of experts" if has_experts(config) else f"a dense {model_type} model"
    return method_of(config, provenance["recipe"]) or plain


def _training(folder: Path) -> list[str]:
    """From ``training.json``: tokens, FLOPs, and the held-out perplexities at both ends."""
    try:
        record = read_json(folder / "training.json")
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
        accounting = inspect(folder)
    except BranchMixError:
        return []
    lines = ["", "## Accounting", "", "| | |", "| --- | --- |", f"| parameters | {accounting.total.total:,} |"]
    lines.append(f"| active for a token | {accounting.active.total:,} |")
    if accounting.flops is not None:
        context, total = accounting.context, accounting.flops.total
        lines.append(f"| FLOPs of a token, forward, at a context of {context:,} | {total:.4g} |")
    if accounting.kv_cache_bytes_per_token is not None:
        lines.append(f"| KV cache, bytes a token ({accounting.dtype}) | {accounting.kv_cache_bytes_per_token:,} |")
    return lines


def _evaluation(results: Path) -> list[str]:
    """Bits per byte of every model and domain in a ``results.json``."""
    try:
        models = read_json(results)["models"]
        domains, window = list(models[0]["domains"]), models[0]["max_length"]
        lines = ["", "## Evaluation", "", f"Bits per byte, window of {window:,} tokens (standard error).", ""]
        lines += [f"| | {' | '.join(domains)} |", "| --- " * (len(domains) + 1) + "|"]
        for model in models:
            cells = []
            for domain in (model["domains"][name] for name in domains):
                score, error = domain["bits_per_byte"], domain.get("stderr")
                cells.append(f"{score:.4f}" + (f" ({error:.4f})" if error is not None else ""))
            lines.append(f"| {Path(model['model']).name or model['model']} | {' | '.join(cells)} |")
    except OSError as error:
        raise RecipeError(f"{results}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise RecipeError(f"{results}: is not a results.json of `branchmix eval --out`") from error
    return lines

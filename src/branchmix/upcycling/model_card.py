"""The README.md of an upcycled model: what went in, what came out, how to load it, and the recipe to repeat it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from branchmix.accounting.shape import MIXTURE_DEFAULTS, Shape, shape_of
from branchmix.checkpoint.families import Config, has_experts
from branchmix.upcycling.plan import Plan

_METHODS = {
    ("kv_experts", "experts"): "BAM with Expert KV: FFN experts and attention experts with their own keys and values",
    ("kv_sharing", "experts"): "BAM with Shared KV: FFN experts, and attention experts over one set of keys and values",
    ("average", "experts"): "BTX: FFN experts, averaged attention",
    ("seed", "experts"): "FFN experts, the seed's attention",
    ("average", "average"): "soup: everything averaged",
    ("seed", "average"): "the seed's attention, averaged FFN",
    ("kv_experts", "average"): "attention experts with their own keys and values, averaged FFN",
    ("kv_sharing", "average"): "attention experts over one set of keys and values, averaged FFN",
    ("whole", "whole"): "BTS: whole models side by side, joined by stitches",
}


def method_of(config: Config, recipe: dict[str, Any]) -> str | None:
    """What the model is, from a mixture's config, or from the recorded recipe of a dense one; None without a recipe."""
    made = {**MIXTURE_DEFAULTS, **config} if config.get("model_type") == "branchmix" else recipe
    method = _METHODS.get((str(made.get("attention")), str(made.get("ffn"))))
    if method is not None and made.get("expert_ranks"):
        method = f"{method}; experts are low-rank changes of the seed"
    if method is not None and made.get("domain_router"):
        method += "; routers compute their rows from experts' domains"
    if method is not None and made.get("shared_expert_weight"):
        method += "; the seed's FFN as a shared expert"
    own_trunk = method is not None and made.get("trunk") == "experts"
    return f"{method}; every expert keeps its own embeddings, norms and head" if own_trunk else method


def lossless_line(lossless: bool, shape: Shape | None) -> str:
    """One line on what ``Plan.lossless`` found, of a mixture of this shape, if it is known."""
    if shape is not None and shape.stitches:
        left_out = [] if shape.sizes.tied_embeddings else ["the experts' output layers"]
        left_out += [] if lossless else ["padded rows of embeddings"]
        found = f"is whole in it, except for {' and '.join(left_out)}" if left_out else "is whole in it"
        return f"{'lossless' if lossless else 'not lossless'}: every model {found}"
    if shape is not None and shape.shared_experts:
        return "not lossless: the shared expert adds the seed's FFN to that of every expert"
    if lossless:
        return "lossless: what the experts share is the same in all of them, so forced gates give exactly each expert"
    return "not lossless: the tensors that the mixture averages differ between the experts"


def sources_of(provenance: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every model that went in, by name: those of the recipe, and experts that joined later.

    Experts that left stay: averages were taken over them. A name that comes again gets the number of its row.
    """
    joined = [step["added"]["expert"] for step in provenance.get("changes", []) if "added" in step]
    sources: dict[str, dict[str, Any]] = {}
    for number, source in enumerate([*provenance["sources"], *joined]):
        name = source["name"]
        sources[name if name not in sources else f"{name} ({number})"] = source
    return sources


def model_card(plan: Plan, provenance: dict[str, Any], *, exported_from: Config | None = None) -> str:
    """Markdown with the Hub's front matter, for a merge, or for the export of a mixture with this config."""
    software = f"[branchmix](https://arxiv.org/abs/2408.08274) {provenance['versions']['branchmix']}"
    title = method_of(exported_from or plan.config, provenance["recipe"])
    if exported_from is None:
        better = "train" if plan.config.get("domain_router") else "calibrate or train"
        state = f"Its routers are as the recipe started them: {better} the mixture before you use it."
        if plan.config.get("stitches") is not None:
            state = "Its stitches are closed: it is the seed until they are trained."
        if fits := [step["calibrated"] for step in provenance.get("changes", []) if "calibrated" in step]:
            state = f"Its gates are calibrated on text of {', '.join(fits[-1]['domains'])}: it needs no training."
        made = f"Merged with {software}. " + ("" if plan.is_dense else state)
    else:
        export, model_type = provenance["exported"], plan.config["model_type"]
        made = f"Exported with {software} from {export['model']} ({title})."
        title = f"{title}, as {model_type}"
        if export["expert"] is not None:
            title = f"Expert {export['expert']} of a mixture, as a dense {model_type} model"
    if plan.lossless is not None and not plan.is_dense:
        line = lossless_line(plan.lossless, shape_of(plan.config))
        made += f"\n\n{line[0].upper()}{line[1:]}."
    lines = [*front_matter(plan.config, provenance), f"# {title}", "", made, "", *source_table(provenance), ""]
    lines += [*usage("PATH", own_code=not plan.is_dense), *history(provenance, plan.notes)]
    return "\n".join(lines) + "\n"


def front_matter(config: Config, provenance: dict[str, Any], **more: Any) -> list[str]:
    """The Hub's metadata: library, tags, base models, and ``more``."""
    import yaml

    sources = sources_of(provenance).values()
    hub_ids = list(dict.fromkeys(source["model"].partition("@")[0] for source in sources if source["revision"]))
    tags = ["branchmix", *(["merge"] if sources else []), *(["moe"] if has_experts(config) else [])]
    front: dict[str, Any] = {"library_name": "transformers", "tags": tags, **more}
    if hub_ids:
        front["base_model"] = hub_ids
    return ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", ""]


def source_table(provenance: dict[str, Any], licences: dict[str, str] | None = None) -> list[str]:
    """Seed and experts with their revisions; ``licences`` by the names of ``sources_of`` adds a column."""
    rows = [
        [number, name, source["model"], source["revision"] or "-", *([licences[name]] if licences is not None else [])]
        for number, (name, source) in enumerate(sources_of(provenance).items())
    ]
    return table(["", "name", "model", "revision", *(["licence"] if licences is not None else [])], rows)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A table's lines in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return ["|" + "".join(f" {cell} |" if cell != "" else " |" for cell in cells) for cells in lines]


def usage(name: str, *, own_code: bool) -> list[str]:
    """How to load it."""
    return [
        "```python",
        "from transformers import AutoModelForCausalLM",
        *(["import branchmix  # without it: from_pretrained(..., trust_remote_code=True)"] if own_code else []),
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        "```",
    ]


def history(provenance: dict[str, Any], notes: Sequence[str]) -> list[str]:
    """The recipe that repeats it, what has changed since, and notes."""
    import yaml

    lines = []
    if provenance["recipe"]:
        recipe = yaml.safe_dump(provenance["recipe"], sort_keys=False).strip()
        lines += ["", "## Recipe", "", "```yaml", recipe, "```"]
    changes = [_change(step) for step in provenance.get("changes", [])]
    if changes:
        lines += ["", "## Changes since", "", *(f"- {change}" for change in changes)]
    if notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in notes)]
    return lines


def _change(step: dict[str, Any]) -> str:
    """One line for an expert that joined or left, or gates that were fitted."""
    if "removed" in step:
        return f"expert `{step['removed']}` left"
    if "calibrated" in step:
        return _calibrated(step["calibrated"])
    added = step["added"]
    expert = added["expert"]
    revision = f" at {expert['revision']}" if expert.get("revision") else ""
    rows = f"were drawn with deviation {added['router_std']} and seed {added['router_seed']}"
    if added.get("domain"):
        rows = "are computed from its domain"
    return f"expert `{expert['name']}` joined from {expert['model']}{revision}; its router rows {rows}"


def _calibrated(fit: dict[str, Any]) -> str:
    """One line for gates that were fitted: on what text, what they are worth on other documents of it, and notes."""
    kind = "document gates" if fit.get("document_gate") else "token gates"
    domains = ", ".join(f"{name} ({tokens:,} tokens)" for name, tokens in fit["domains"].items())
    parts = [f"{kind} were calibrated on {domains}"]
    if losses := fit.get("losses"):
        changes = (
            f"{name} {math.exp(loss['before']):.2f} -> {math.exp(loss['after']):.2f}" for name, loss in losses.items()
        )
        parts.append(f"perplexity on other documents before and after: {', '.join(changes)}")
    return "; ".join([*parts, *fit.get("notes", [])])

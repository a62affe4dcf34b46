"""The README.md of an upcycled model: what went in, what came out, how to load it, and the recipe to repeat it."""

from __future__ import annotations

from typing import Any

from branchmix.upcycling.plan import Plan

_METHODS = {
    ("kv_experts", "experts"): "BAM with Expert KV: FFN experts and attention experts with their own keys and values",
    ("kv_sharing", "experts"): "BAM with Shared KV: FFN experts, and attention experts over one set of keys and values",
    ("average", "experts"): "BTX: FFN experts, averaged attention",
    ("seed", "experts"): "FFN experts, the seed's attention",
    ("kv_experts", "average"): "attention experts with their own keys and values, averaged FFN",
    ("kv_sharing", "average"): "attention experts over one set of keys and values, averaged FFN",
}


def method_of(config: dict[str, Any]) -> str:
    """The method's name, from a mixture's config."""
    if config.get("model_type") != "branchmix":
        return "soup: every tensor averaged"
    return _METHODS[(config["attention"], config["ffn"])]


def model_card(plan: Plan, provenance: dict[str, Any]) -> str:
    """Markdown with the Hub's front matter."""
    import yaml

    sources = provenance["sources"]
    hub_ids = list(dict.fromkeys(source["model"].partition("@")[0] for source in sources if source["revision"]))
    front = {"library_name": "transformers", "tags": ["branchmix", "merge", "moe"]}
    if hub_ids:
        front["base_model"] = hub_ids
    rows = [
        f"| {number} | {source['name']} | {source['model']} | {source['revision'] or '-'} |"
        for number, source in enumerate(sources)
    ]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {method_of(plan.config)}",
        "",
        f"Merged with [branchmix](https://arxiv.org/abs/2408.08274) {provenance['versions']['branchmix']}. "
        + ("" if plan.is_dense else "The routers are as the recipe started them: train the mixture before you use it."),
        "",
        "| | name | model | revision |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        *([] if plan.is_dense else ["import branchmix  # without it: from_pretrained(..., trust_remote_code=True)"]),
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        "```",
        "",
        "## Recipe",
        "",
        "```yaml",
        yaml.safe_dump(provenance["recipe"], sort_keys=False).strip(),
        "```",
    ]
    changes = [_change(step) for step in provenance.get("changes", [])]
    if changes:
        lines += ["", "## Changes since", "", *(f"- {change}" for change in changes)]
    if plan.notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in plan.notes)]
    return "\n".join(lines) + "\n"


def _change(step: dict[str, Any]) -> str:
    """One line for an expert that joined or left."""
    if "removed" in step:
        return f"expert `{step['removed']}` left"
    added = step["added"]
    expert = added["expert"]
    revision = f" at {expert['revision']}" if expert["revision"] else ""
    return (
        f"expert `{expert['name']}` joined from {expert['model']}{revision}; its router rows were drawn with deviation "
        f"{added['router_std']} and seed {added['router_seed']}"
    )

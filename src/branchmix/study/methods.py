"""What a study can compare; ``methods.yaml`` has every method by its name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from branchmix.settings import read_yaml

Match = Literal["dm", "cm"]
Kind = Literal["mixture", "merge", "forced", "dense", "ensemble"]


@dataclass(frozen=True)
class Preset:
    """A method that papers describe."""

    label: str
    what: str
    kind: Kind = "mixture"
    """``mixture``: merged and trained. ``merge``: merged only. ``forced``: merged only, and measured with all gates
    forced to each domain's best expert, the bound for any gates. ``dense``: the seed, trained on the mixtures' data.
    ``ensemble``: all dense models, nothing trained."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Keys of the recipe."""
    train: dict[str, Any] = field(default_factory=dict)
    """Keys of the run that trains the mixture."""
    match: tuple[Match, ...] = ("dm", "cm")
    larger: Literal["total", "active"] | None = None
    """Copies of the seed are added until the parameters (and for ``active`` top-k until the active ones) are those of
    BAM Expert KV."""
    varies: str | None = None
    """The method that this one differs from in one thing: a report compares both."""
    warning: str = ""


def _read() -> dict[str, Preset]:
    content: dict[str, dict[str, Any]] = read_yaml(Path(__file__).with_name("methods.yaml"))

    def recipe(name: str) -> dict[str, Any]:
        varied = content[name].get("varies")
        return {**(recipe(varied) if varied else {}), **content[name].get("recipe", {})}

    match = {name: tuple(fields.get("match", ("dm", "cm"))) for name, fields in content.items()}
    return {
        name: Preset(**{**fields, "recipe": recipe(name), "match": match[name]}) for name, fields in content.items()
    }


METHODS: dict[str, Preset] = _read()
"""By the name that a study's YAML uses."""

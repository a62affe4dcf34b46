"""What distinguishes one seed, text or merge from another: part of the keys of all steps that depend on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from branchmix.checkpoint.hub import ResolvedModel
from branchmix.data.config import Source
from branchmix.recipe import Recipe
from branchmix.study.settings import InstalledText, StudyFile

_HASHED_BYTES = 4 << 30
"""Text up to this size is known by its content, above by sizes and dates."""
_LATER: dict[str, dict[str, Any]] = {"routing": {"shared": False}}
"""Options of recipes that came after `graph.FORMAT` 1, with the values that mean what was done before there were any.

Left out of keys at these values, so that a study which an older version began is resumed."""


def identity_of_recipe(recipe: Recipe) -> dict[str, Any]:
    """JSON of all that a merge depends on, but for the models themselves."""
    content: dict[str, Any] = recipe.model_dump(mode="json", exclude={"seed", "experts"})
    for section, later in _LATER.items():
        content[section] = {key: value for key, value in content[section].items() if later.get(key, ...) != value}
    return content


def identity_of_seed(given: ResolvedModel | None) -> dict[str, Any]:
    """A given seed's revision on the Hub, or the hash of its folder; empty if a step trains the seed."""
    if given is None:
        return {}
    if given.revision:
        return {"seed": f"{given.given}@{given.revision}"}
    from branchmix.likelihood.records import model_hash

    return {"seed": model_hash(given.folder)}


def identity_of_text(study: StudyFile) -> dict[str, Any]:
    """What the text of all domains depends on; that of a text step is in its key."""
    if isinstance(study.data, InstalledText):
        return {}
    return {name: _identity_of_source(source, study.folder) for name, source in study.data.items()}


def _identity_of_source(source: Source, folder: Path) -> dict[str, Any]:
    from branchmix.checkpoint.hashes import FileHashes
    from branchmix.data.sources import find_files

    if source.files is None:
        return source.model_dump(exclude_none=True)
    patterns = [source.files] if isinstance(source.files, str) else source.files
    files = find_files(patterns, folder, exclude=source.exclude)
    if sum(file.stat().st_size for file in files) > _HASHED_BYTES:
        known: list[Any] = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    else:
        with FileHashes(files) as hashes:
            known = [[file.name, hashes.of(file)] for file in files]
    return {"files": known, "column": source.column}

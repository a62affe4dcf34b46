"""An existing mixture, opened by its headers: what adding, removing and exporting experts have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from branchmix.accounting.lineage import as_records, lineage
from branchmix.checkpoint.families import Config, Dimensions, Family, dimensions, family_of
from branchmix.checkpoint.hub import ResolvedModel, resolve
from branchmix.checkpoint.index import CheckpointIndex
from branchmix.checkpoint.licence import licence_of_folder
from branchmix.errors import CheckpointError
from branchmix.recipe import DTYPES
from branchmix.upcycling.sources import MixtureExpert

DEFAULT_SHARD_BYTES = 5_000_000_000


class OpenedMixture:
    """Config, tensors and experts of a mixture.

    Args:
        given: folder or Hub id, as the user wrote it.
        otherwise: what to do with a model that is no mixture, for the error.

    Raises:
        CheckpointError: it cannot be read, or is no mixture.
    """

    def __init__(self, given: str, *, otherwise: str):
        self.resolved: ResolvedModel = resolve(given)
        self.index = CheckpointIndex.open(self.resolved.folder)
        self.config: Config = self.index.config
        if self.config.get("model_type") != "branchmix":
            raise CheckpointError(f"{given}: is a {self.config.get('model_type')} model, not a mixture: {otherwise}")
        lacking = [key for key in ("seed_config", "num_experts", "num_experts_per_tok") if not self.config.get(key)]
        if lacking:
            raise CheckpointError(
                f"{self.resolved.folder / 'config.json'}: has no {lacking[0]}: copy the mixture's own here"
            )
        self.seed_config: Config = self.config["seed_config"]
        self.family: Family = family_of(self.seed_config)
        self.dims: Dimensions = dimensions(self.seed_config)
        count = self.config["num_experts"]
        self.names: list[str] = self.config.get("expert_names") or [f"expert-{number}" for number in range(count)]
        self.experts = [
            MixtureExpert(name, self.index, self.family, self.dims, number) for number, name in enumerate(self.names)
        ]
        stored = next(iter(self.index.tensors.values())).dtype
        self.dtype = DTYPES.get(str(self.config.get("dtype")), stored)

    @property
    def has_attention_experts(self) -> bool:
        return self.config.get("attention", "kv_experts") in ("kv_experts", "kv_sharing")

    @property
    def has_ffn_experts(self) -> bool:
        return bool(self.config.get("ffn", "experts") == "experts")

    def provenance(self) -> dict[str, Any]:
        """Recipe, sources and changes; without a record of its own (it was trained since) the mixture is the source."""
        folder, given = self.resolved.folder, self.resolved.given
        if (found := _record(folder)) is not None:
            return found
        training = as_records(lineage(folder, given))
        source = {"name": "mixture", "model": given, "revision": self.resolved.revision, "training": training}
        return {"recipe": {}, "sources": [{**source, "license": licence_of_folder(folder)}]}


def provenance_of(folder: Path) -> dict[str, Any] | None:
    """What ``branchmix.json`` tells of a model's making; of a trained model, that of the mixture it was trained from.

    Args:
        folder: of a checkpoint.
    """
    if (folder / "branchmix.json").is_file():
        return _record(folder)
    training = _read(folder / "training.json") or {}
    trained_from = (training.get("config") or {}).get("model")
    if not isinstance(trained_from, str):
        return None
    start = Path(trained_from)
    # A relative path started from a folder that is not on record: here another model may have that name.
    is_it = start.is_absolute() or _keys(as_records(lineage(start))) == _keys(training.get("ancestors") or [])
    return _record(start) if is_it else None


def _keys(phases: list[dict[str, Any]]) -> list[str]:
    return [phase["key"] for phase in phases]


def _record(folder: Path) -> dict[str, Any] | None:
    found = _read(folder / "branchmix.json")
    if found is None or not isinstance(found.get("sources"), list):
        return None
    return {"recipe": {}, **{key: value for key, value in found.items() if key not in ("versions", "notes")}}


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None

"""FAMILY.yaml: the models whose performance is compared with their scale, and what is known of that scale.

Parameters come from each config. Training tokens and FLOPs come from the records of our own runs and merges, in which
an upcycled mixture counts the seed and all experts that it grew from (``accounting/lineage.py``); for other models the
file says the tokens, and FLOPs follow by the exact accounting.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from branchmix.accounting import inspect
from branchmix.accounting.lineage import lineage, total
from branchmix.checkpoint.folder import is_file_name
from branchmix.checkpoint.hub import ResolvedModel, resolve
from branchmix.errors import BranchMixError, RecipeError
from branchmix.scaling.trends.table import AXES, KNOWN
from branchmix.settings import Count, FileName, Settings, SettingsFile


class Member(Settings):
    """A model of the family; a path or Hub id alone means one with nothing but ``model``."""

    model: str
    """Folder, from the YAML file's folder, or Hub id."""
    name: FileName | None = None
    """What tables and files call it: letters, digits, ``-``, ``_``, ``.`` and ``+``; the folder's name if not given.
    Runs of one name differ in their ``seed``."""
    family: str | None = None
    """Curves are drawn by family; the file's own if not given, such as ``dense`` beside ``mixture``."""
    revision: str | None = None
    """Revision of a Hub model."""
    seed: FileName | int | None = None
    """Seed of the training run, where there are several of one size; text has the letters that a ``name`` may have."""
    params: Count | None = None
    """Parameters; from the config if not given."""
    active_params: Count | None = None
    """Parameters that a token uses; from the config if not given."""
    tokens: Count | None = None
    """All tokens of training, those of the models that it grew from too; from our records if not given."""
    base_tokens: Count | None = None
    """Tokens of the one model that it all grew from, if that has no record: the rest is counted from our records."""
    flops: Count | None = None
    """All FLOPs of training; from our records, or else from the tokens, if not given."""
    sequence_length: Count | None = None
    """Tokens of a sequence in training, for FLOPs from tokens; the model's positions, at most 4096, if not given."""
    axes: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Further columns to look along, such as ``{data_quality: 3}``: positive numbers."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value

    @field_validator("axes")
    @classmethod
    def _true_axes(cls, axes: dict[str, float]) -> dict[str, float]:
        for name in axes:
            if name.lower() in (*KNOWN, *AXES) or not name.strip():
                raise ValueError(f"{name!r} is a column of its own: choose another name")
        return axes


class FamilyFile(SettingsFile):
    """The whole file."""

    family: str = ""
    """Name of the family."""
    models: list[Member] = Field(min_length=1)
    """The models, in any order."""


@dataclass(frozen=True)
class Subject:
    """A model with its place on every axis."""

    name: str
    family: str
    seed: str
    model: ResolvedModel
    params: int | None
    active_params: int | None
    tokens: int | None
    flops: float | None
    forward_flops_per_token: int | None
    axes: dict[str, float]
    notes: tuple[str, ...] = ()
    """What could not be filled in, and why."""
    training: tuple[dict[str, Any], ...] = ()
    """The trainings on record that tokens and FLOPs are the sum of; empty where the file says them."""

    @property
    def label(self) -> str:
        return self.name + (f" (seed {self.seed})" if self.seed else "")

    def as_dict(self) -> dict[str, Any]:
        counted = ("params", "active_params", "tokens", "flops", "forward_flops_per_token")
        return {
            "name": self.name,
            "family": self.family,
            "seed": self.seed or None,
            "model": self.model.given,
            "revision": self.model.revision,
            **{name: getattr(self, name) for name in counted},
            "training": list(self.training),
            **({"axes": self.axes} if self.axes else {}),
        }


def subjects(file: FamilyFile) -> list[Subject]:
    """All models of the file, found and counted.

    Raises:
        RecipeError: two runs have the same name and seed.
        CheckpointError: a model is not there.
    """
    chosen: dict[tuple[str, str], Subject] = {}
    for member in file.models:
        given = member.model + (f"@{member.revision}" if member.revision else "")
        subject = _subject(file, member, resolve(given, file.folder))
        other = chosen.setdefault((subject.name, subject.seed), subject)
        if other is not subject:
            raise RecipeError(
                f"models: {other.model.given} and {given} are both called {subject.label}: give each a `name`, or "
                "runs of one model a `seed`"
            )
    return list(chosen.values())


def _subject(file: FamilyFile, member: Member, model: ResolvedModel) -> Subject:
    name = member.name or (member.model.split("/")[-1] if model.revision else model.folder.resolve().name)
    if not is_file_name(name):
        raise RecipeError(
            f"models: {member.model}: {name!r} cannot name a file: give it a `name` of letters and digits"
        )
    notes: list[str] = []
    try:
        counted = inspect(model.folder, context=member.sequence_length)
    except BranchMixError as error:
        counted = None
        if member.params is None:
            notes.append(f"{name}: parameters not counted ({error}): give params and active_params")
    params = member.params or (counted.total.total if counted else None)
    forward = counted.flops.total if counted and counted.flops else None
    tokens, flops, training = _cost(member, model, forward, name, notes)
    return Subject(
        name=name,
        family=member.family if member.family is not None else file.family,
        seed="" if member.seed is None else str(member.seed),
        model=model,
        params=params,
        active_params=member.active_params or (counted.active.total if counted and not member.params else params),
        tokens=tokens,
        flops=flops,
        forward_flops_per_token=forward,
        axes=member.axes,
        notes=tuple(notes),
        training=training,
    )


def _cost(
    member: Member, model: ResolvedModel, forward: int | None, name: str, notes: list[str]
) -> tuple[int | None, float | None, tuple[dict[str, Any], ...]]:
    """Tokens and FLOPs of all training, by the file or by the records, and the trainings on record."""
    given = (member.tokens, None if member.flops is None else float(member.flops))
    if None not in given:
        return *given, ()
    phases = lineage(model.folder, name)
    roots = [phase for phase in phases if not phase.is_known]
    names = ", ".join(root.name for root in roots)
    if member.base_tokens is not None:
        if len(roots) != 1:
            raise RecipeError(
                f"models: {name}: base_tokens is for the one model without a record that it grew from, and there are "
                f"{len(roots)} ({names or 'none'}): give tokens and flops instead"
            )
        cost = roots[0].flops_per_token
        known = replace(roots[0], tokens=member.base_tokens, flops=cost and cost * member.base_tokens)
        phases = [known if phase is roots[0] else phase for phase in phases]
    tokens = total(phases, "tokens") if given[0] is None else given[0]
    flops = total(phases, "flops") if given[1] is None else given[1]
    is_root = len(phases) == 1 and bool(roots)
    if flops is None and tokens is not None and is_root and forward is not None:
        flops = 3.0 * forward * tokens  # a plain model: forward, and twice that backward
    if lacking := [word for word, value in (("tokens", tokens), ("flops", flops)) if value is None]:
        hint = "tokens" if is_root else "base_tokens, or tokens and flops"
        empty = " and ".join(lacking)
        notes.append(f"{name}: no training of {names or name} is on record, so its {empty} are empty: give {hint}")
    is_on_record = given == (None, None) and not is_root
    training = ({"name": p.name, "tokens": p.tokens, "flops": p.flops} for p in phases if is_on_record)
    return tokens, flops, tuple(training)

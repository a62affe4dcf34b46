"""``evaluate(models, data)``: several models, and ensembles of them, on the same documents of every domain.

What is on record in ``out`` is not computed again; every number is computed from the records of all documents.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from branchmix.checkpoint.folder import writing
from branchmix.checkpoint.hub import ResolvedModel, resolve
from branchmix.errors import CheckpointError, RecipeError
from branchmix.evaluate.config import EvalData
from branchmix.evaluate.documents import Document, select
from branchmix.evaluate.ensemble import ensemble_log_probs
from branchmix.evaluate.perplexity import (
    BATCH_TOKENS,
    Progress,
    TextScore,
    aggregate,
    document_score,
    token_log_probs,
)
from branchmix.evaluate.records import Records, Scored
from branchmix.likelihood.forward import max_positions
from branchmix.likelihood.models import TextModel, check_dtype, encode, prefix_token
from branchmix.likelihood.records import key_of, model_hash

MAX_LENGTH = 2048
"""Tokens of the window unless said otherwise, if all models have as many positions."""
RESULTS = "results.json"


@dataclass
class ModelReport:
    """What one model, or ensemble, makes of every domain."""

    model: str
    prefix: str | None
    """The token that a document's first one is predicted from; None if that one is not predicted."""
    max_length: int
    stride: int
    dtype: str
    domains: dict[str, TextScore]
    ensemble: dict[str, Any] | None = None
    """Members with their prior, and how they are weighted."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        facts = {"prefix": self.prefix, "max_length": self.max_length, "stride": self.stride, "dtype": self.dtype}
        ensemble = {"ensemble": self.ensemble} if self.ensemble else {}
        domains = {name: score.as_dict() for name, score in self.domains.items()}
        return {"model": self.model, **facts, **ensemble, "domains": domains}


@dataclass
class EvalReport:
    """All models, in the order they were given; ensembles come last."""

    models: list[ModelReport]
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"models": [model.as_dict() for model in self.models]}


def evaluate(
    models: Sequence[str],
    data: EvalData | str | Path,
    *,
    out: str | Path | None = None,
    max_length: int | None = None,
    stride: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    dtype: str = "auto",
    limit: int | None = None,
    ensemble: str | None = None,
    posterior: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> EvalReport:
    """Bits per byte and perplexity of every model on every domain.

    Args:
        models: folders or Hub ids, dense or mixtures.
        data: the documents (see ``EvalData``), or the YAML file that names them.
        out: folder for the records, from which a later call goes on, and for ``results.json``.
        max_length: tokens of the window; ``MAX_LENGTH`` or the least that a model has positions for if not given.
        stride: tokens by which the window moves on, half of it if not given.
        batch_tokens: tokens of a forward pass.
        dtype: of the weights: ``auto`` as stored.
        limit: documents of a domain at most.
        ensemble: ``seed,code,law``, or with their prior ``seed=0.5,code=0.25,law=0.25``: models given, by their name or
            their folder's.
        posterior: weight the ensemble by the posterior of the domain (see ``ensemble_log_probs``), not just the prior.
        trust_remote_code: run code that checkpoints bring along.
        progress: called with step, done, total.

    Raises:
        RecipeError: data file, options or ensemble do not make sense.
        DataError: a source cannot be read, or has no document that counts.
        CheckpointError: a model cannot be loaded, or is none.
    """
    check_dtype(dtype)
    data = data if isinstance(data, EvalData) else EvalData.load(data)
    candidates = [_Candidate(resolve(given), dtype, trust_remote_code) for given in models]
    members = _members(ensemble, candidates) if ensemble else {}
    max_length, stride = _window(candidates, max_length, stride)
    for candidate in candidates:
        candidate.know(max_length, stride)
    documents = select(data, candidates[0].tokenizer, limit=limit)
    records = Records(Path(out) if out is not None else None)
    report = EvalReport([], _notes(data, documents, candidates))
    for candidate in candidates:
        known = candidate.score(documents, records, batch_tokens, progress)
        if known:
            count = sum(map(len, documents.values()))
            report.notes.append(f"{candidate.given}: {known} of {count} documents were on record")
        domains = {
            name: aggregate(candidate.recorded(records, document).score for document in chosen)
            for name, chosen in documents.items()
        }
        report.models.append(candidate.report(domains))
    if members:
        report.models.append(_ensemble(members, posterior, documents, records))
    if out is not None:
        _write(Path(out) / RESULTS, report.as_dict())
    return report


def _window(candidates: Sequence[_Candidate], max_length: int | None, stride: int | None) -> tuple[int, int]:
    """The same window for all models: they are compared with as much context."""
    positions = {c.given: limit for c in candidates if (limit := max_positions(c.config)) is not None}
    if max_length is None:
        max_length = min([MAX_LENGTH, *positions.values()])
    for given, limit in positions.items():
        if max_length > limit:
            raise RecipeError(f"max_length: {max_length} is more than the {limit} positions of {given}")
    return max_length, max(1, max_length // 2) if stride is None else stride


def _notes(data: EvalData, documents: dict[str, list[Document]], candidates: Sequence[_Candidate]) -> list[str]:
    notes = []
    if "held_out" not in data.model_fields_set:
        counts = ", ".join(f"{len(chosen)} of {name}" for name, chosen in documents.items())
        notes.append(f"held-out documents only, as in training: {counts}; `held_out: all` takes every document")
    prefixes = {candidate.prefix_name for candidate in candidates}
    if len(prefixes) > 1:
        words = ", ".join(f"{c.prefix_name!r} ({c.given})" for c in candidates)
        notes.append(f"the models predict a document's first token from different ones: {words}")
    if len({candidate.tokenizer_hash for candidate in candidates}) > 1:
        notes.append("the models' tokenizers differ: compare bits per byte, not perplexities")
    return notes


class _Candidate(TextModel):
    """A model, which is loaded only if a document is not on record."""

    def __init__(self, found: ResolvedModel, dtype: str, trust_remote_code: bool):
        super().__init__(found, dtype, trust_remote_code)
        self.prefix = prefix_token(self.tokenizer, self.config)
        self.prefix_name = None if self.prefix is None else str(self.tokenizer.convert_ids_to_tokens(self.prefix))
        self.max_length = self.stride = 0
        self.key = ""

    def know(self, max_length: int, stride: int) -> None:
        """Settles what results depend on."""
        self.max_length, self.stride = max_length, stride
        self.facts = {
            "weights": model_hash(self.folder),
            "dtype": self.dtype,
            "tokenizer": self.tokenizer_hash,
            "prefix": self.prefix,
            "max_length": max_length,
            "stride": stride,
        }
        self.key = key_of(self.facts)

    def score(
        self, documents: dict[str, list[Document]], records: Records, batch_tokens: int, progress: Progress | None
    ) -> int:
        """Computes what is not on record; returns how many documents were."""
        model: Any = None
        known = 0
        for domain, chosen in documents.items():
            todo = [document for document in chosen if records.get(self.key, document.hash) is None]
            known += len(chosen) - len(todo)
            if not todo:
                continue
            if model is None:
                model = self.load()
                records.describe(self.key, {"path": self.given, "revision": self.revision, **self.facts})
            tokens = encode(self.tokenizer, [document.text for document in todo])
            found = token_log_probs(
                model,
                tokens,
                prefix=self.prefix,
                max_length=self.max_length,
                stride=self.stride,
                batch_tokens=batch_tokens,
                progress=self._named(progress, domain),
            )
            try:
                for number, logp_T in found:
                    score = document_score(todo[number].text, logp_T, self.tokenizer, tokens[number], self.prefix)
                    records.add(self.key, todo[number].hash, domain, Scored(score, logp_T))
            except CheckpointError as error:
                raise CheckpointError(f"{self.given}: {error}") from error
        return known

    def _named(self, progress: Progress | None, domain: str) -> Progress | None:
        if progress is None:
            return None
        return lambda _, done, total: progress(f"{self.folder.name}: {domain}", done, total)

    def recorded(self, records: Records, document: Document) -> Scored:
        """A document's result."""
        found = records.get(self.key, document.hash)
        assert found is not None
        return found

    def report(self, domains: dict[str, TextScore]) -> ModelReport:
        """The result of the whole model."""
        return ModelReport(self.given, self.prefix_name, self.max_length, self.stride, self.dtype, domains)


# ---- ensembles ----


def _members(ensemble: str, candidates: Sequence[_Candidate]) -> dict[_Candidate, float]:
    """The members of an ensemble, each with its share of the prior.

    Raises:
        RecipeError: a name fits none or several of the models, or the members do not fit together.
    """
    members: dict[_Candidate, float] = {}
    shares = []
    for part in ensemble.split(","):
        name, _, share = part.strip().partition("=")
        exact = [c for c in candidates if c.given == name]
        fitting = exact[:1] or [c for c in candidates if c.folder.name == name]
        if len(fitting) != 1:
            what = "is none of the models" if not fitting else "is the name of several of the models"
            raise RecipeError(f"ensemble: {name!r} {what}: there are {', '.join(c.given for c in candidates)}")
        if fitting[0] in members:
            raise RecipeError(f"ensemble: {name!r} stands twice")
        try:
            shares.append(float(share) if share else None)
        except ValueError:
            raise RecipeError(f"ensemble: {part.strip()!r}: {share!r} is no share, such as 0.5") from None
        members[fitting[0]] = 0.0
    given = [share for share in shares if share is not None]
    if given and (len(given) < len(shares) or min(given) < 0 or not 0 < sum(given) < float("inf")):
        raise RecipeError("ensemble: give a share, 0 or more, to each member or to none")
    total = sum(given)
    prior = [share / total for share in given] if given else [1 / len(shares)] * len(shares)
    first, *others = members
    for other in others:
        if (other.tokenizer_hash, other.prefix) != (first.tokenizer_hash, first.prefix):
            raise RecipeError(f"ensemble: the tokenizers of {first.given} and {other.given} differ: nothing to average")
    return dict(zip(members, prior, strict=True))


def _ensemble(
    members: dict[_Candidate, float], posterior: bool, documents: dict[str, list[Document]], records: Records
) -> ModelReport:
    """Mixes the members' probabilities of every token, from the records."""
    first = next(iter(members))
    domains = {}
    for name, chosen in documents.items():
        scores = []
        for document in chosen:
            logp_ET = np.stack([member.recorded(records, document).log_probs for member in members])
            mixed_T = ensemble_log_probs(logp_ET, prior_E=list(members.values()), posterior=posterior)
            alone = first.recorded(records, document).score
            scores.append(type(alone)(-float(mixed_T.sum()), alone.tokens, alone.bytes))
        domains[name] = aggregate(scores)
    report = first.report(domains)
    report.model = f"ensemble of {', '.join(member.folder.name for member in members)}"
    report.ensemble = {
        "members": {member.given: share for member, share in members.items()},
        "weights": "posterior" if posterior else "prior",
    }
    return report


def _write(file: Path, content: dict[str, Any]) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with writing(file):
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False), encoding="utf-8")
        temporary.replace(file)

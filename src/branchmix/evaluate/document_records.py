"""A model on the documents of every domain, with results that outlive a killed evaluation.

A result is found again by what it was computed from: the model's files, dtype, tokenizer, window and the document's
text. Names of folders and domains play no part, so moving a model or regrouping documents loses nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from branchmix.errors import CheckpointError
from branchmix.evaluate.candidate import Candidate
from branchmix.evaluate.documents import HashedDocument
from branchmix.evaluate.perplexity import Progress, ScoredDocument, aggregate, score_documents
from branchmix.evaluate.scores import ModelReport
from branchmix.likelihood.records import FILE, Journal, key_of


class DocumentRecords(Journal):
    """The results of all documents so far (see ``likelihood/records.py``)."""

    def __init__(self, folder: Path | None):
        super().__init__(folder, FILE, "document")

    def get(self, model: str, document: str) -> ScoredDocument | None:
        """What ``model`` (its key) made of ``document`` (its hash), if that is known."""
        line = self.find(model, document)
        if line is None:
            return None
        return ScoredDocument(np.frombuffer(base64.b64decode(line["log_probs"]), dtype="<f4"), line["bytes"])

    def add(self, model: str, document: str, domain: str, scored: ScoredDocument) -> None:
        """Keep a result, on disk at once."""
        self.add_line(
            {
                "model": model,
                "document": document,
                "domain": domain,
                "nll": scored.nll,
                "tokens": scored.tokens,
                "bytes": scored.bytes,
                "log_probs": base64.b64encode(scored.log_probs.astype("<f4").tobytes()).decode(),
            }
        )


class DocumentReader:
    """A candidate with its window on documents."""

    def __init__(self, candidate: Candidate, records: DocumentRecords, *, max_length: int, stride: int):
        self.candidate, self.records = candidate, records
        self.window: dict[str, Any] = {"max_length": max_length, "stride": stride}
        self._facts = {**candidate.facts, **self.window}
        self.key = key_of(self._facts)

    def read(
        self, domain: str, documents: Sequence[HashedDocument], batch_tokens: int, progress: Progress | None
    ) -> None:
        """Computes what is not on record.

        Raises:
            RecipeError: the window does not fit the model.
            CheckpointError: the model cannot be loaded, or computes no numbers.
        """
        candidate, records = self.candidate, self.records
        by_hash = {document.hash: document for document in documents}
        on_record = {key for key in by_hash if records.find(self.key, key) is not None}
        if len(on_record) < len(by_hash):
            records.describe(self.key, {**candidate.source, **self._facts})
        for keys in records.rounds.of(self.key, batch_tokens, by_hash, on_record):
            scores = score_documents(
                candidate.model(),
                candidate.tokenizer,
                [by_hash[key].text for key in keys],
                **self.window,
                batch_tokens=batch_tokens,
                known={number for number, key in enumerate(keys) if records.find(self.key, key) is not None},
                progress=candidate.named(progress, domain),
            )
            try:
                for number, scored in scores:
                    records.add(self.key, keys[number], domain, scored)
            except CheckpointError as error:
                raise CheckpointError(f"{candidate.given}: {error}") from error

    def scored(self, document: HashedDocument) -> ScoredDocument:
        """A document's result, which is on record."""
        scored = self.records.get(self.key, document.hash)
        assert scored is not None
        return scored

    def report(self, domains: Mapping[str, Iterable[ScoredDocument]]) -> ModelReport:
        """The result of the whole model, from those of every domain's documents."""
        candidate = self.candidate
        scores = {name: aggregate(scored) for name, scored in domains.items()}
        return ModelReport(candidate.given, candidate.dtype, candidate.prefix_name, **self.window, domains=scores)

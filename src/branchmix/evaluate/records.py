"""Results that outlive a killed evaluation: an append-only file with a line for each model and document.

A line is found again by what it was computed from: the model's files, dtype, tokenizer, window and the document's text.
Names of folders and domains play no part, so moving a model or regrouping documents loses nothing.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from branchmix.evaluate.perplexity import DocumentScore
from branchmix.likelihood.records import FILE, Lines, key_of, model_hash, tokenizer_hash

__all__ = ["FILE", "Records", "Scored", "key_of", "model_hash", "tokenizer_hash"]


@dataclass(frozen=True)
class Scored:
    """A document's score, and the log-probabilities (nats) of its tokens, which an ensemble needs."""

    score: DocumentScore
    log_probs: np.ndarray
    """[T], fp32."""


class Records:
    """All results so far; on disk if there is a folder for them (see ``Lines``)."""

    def __init__(self, folder: Path | None):
        self._lines = Lines(folder)
        self._known: dict[tuple[str, str], dict[str, Any]] = {}
        self._described: set[str] = set()
        for record in self._lines.read():
            self._keep(record)

    def get(self, model: str, document: str) -> Scored | None:
        """What ``model`` (its key) made of ``document`` (its hash), if that is known."""
        found = self._known.get((model, document))
        if found is None:
            return None
        logp_T = np.frombuffer(base64.b64decode(found["log_probs"]), dtype="<f4")
        return Scored(DocumentScore(found["nll"], found["tokens"], found["bytes"]), logp_T)

    def describe(self, model: str, facts: dict[str, Any]) -> None:
        """What a model's key stands for, once."""
        if model not in self._described:
            self._add({"model": model, **facts})

    def add(self, model: str, document: str, domain: str, scored: Scored) -> None:
        """Keep a result, on disk at once."""
        score = scored.score
        self._add(
            {
                "model": model,
                "document": document,
                "domain": domain,
                "nll": score.nll,
                "tokens": score.tokens,
                "bytes": score.bytes,
                "log_probs": base64.b64encode(scored.log_probs.astype("<f4").tobytes()).decode(),
            }
        )

    def _add(self, record: dict[str, Any]) -> None:
        self._keep(record)
        self._lines.add(record)

    def _keep(self, record: dict[str, Any]) -> None:
        if "document" in record:
            self._known[record["model"], record["document"]] = record
        else:
            self._described.add(record["model"])

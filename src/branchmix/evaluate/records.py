"""Results of documents that outlive a killed evaluation (see ``likelihood/records.py``).

A line is found again by what it was computed from: the model's files, dtype, tokenizer, window and the document's text.
Names of folders and domains play no part, so moving a model or regrouping documents loses nothing.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from branchmix.evaluate.perplexity import DocumentScore
from branchmix.likelihood.records import FILE, Journal


@dataclass(frozen=True)
class Scored:
    """A document's score, and the log-probabilities (nats) of its tokens, which an ensemble needs."""

    score: DocumentScore
    log_probs: np.ndarray
    """[T], fp32."""


class Records(Journal):
    """The results of all documents so far."""

    def __init__(self, folder: Path | None):
        super().__init__(folder, FILE, "document")

    def get(self, model: str, document: str) -> Scored | None:
        """What ``model`` (its key) made of ``document`` (its hash), if that is known."""
        found = self.find(model, document)
        if found is None:
            return None
        logp_T = np.frombuffer(base64.b64decode(found["log_probs"]), dtype="<f4")
        return Scored(DocumentScore(found["nll"], found["tokens"], found["bytes"]), logp_T)

    def add(self, model: str, document: str, domain: str, scored: Scored) -> None:
        """Keep a result, on disk at once."""
        score = scored.score
        self.add_line(
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

"""A model on the documents of every domain; what is on record is not computed again."""

from __future__ import annotations

from branchmix.errors import CheckpointError
from branchmix.evaluate.candidate import Candidate
from branchmix.evaluate.documents import Document
from branchmix.evaluate.perplexity import Progress, TextScore, aggregate, document_score, token_log_probs
from branchmix.evaluate.records import Records, Scored
from branchmix.evaluate.report import ModelReport
from branchmix.likelihood.models import encode
from branchmix.likelihood.records import key_of


class Reader:
    """A candidate with its window on documents."""

    def __init__(self, candidate: Candidate, max_length: int, stride: int):
        self.candidate = candidate
        self.max_length, self.stride = max_length, stride
        self._facts = {**candidate.facts, "max_length": max_length, "stride": stride}
        self.key = key_of(self._facts)

    def on_record(self, documents: dict[str, list[Document]], records: Records) -> int:
        """How many documents have results of an earlier run; those that several domains share count once in each."""
        return sum(records.was_there(self.key, one.hash) for chosen in documents.values() for one in chosen)

    def read(
        self, documents: dict[str, list[Document]], records: Records, batch_tokens: int, progress: Progress | None
    ) -> None:
        """Computes what is not on record.

        Raises:
            RecipeError: the window does not fit the model.
            CheckpointError: the model cannot be loaded, or computes no numbers.
        """
        candidate = self.candidate
        for domain, chosen in documents.items():
            by_hash = {document.hash: document for document in chosen}
            on_record = {key for key in by_hash if records.find(self.key, key) is not None}
            if len(on_record) < len(by_hash):
                records.describe(self.key, {**candidate.source, **self._facts})
            for keys in records.rounds.of(self.key, batch_tokens, by_hash, on_record):
                self._read(domain, [by_hash[key] for key in keys], records, batch_tokens, progress)

    def _read(
        self, domain: str, together: list[Document], records: Records, batch_tokens: int, progress: Progress | None
    ) -> None:
        candidate = self.candidate
        model = candidate.model()
        tokens = encode(candidate.tokenizer, [document.text for document in together])
        found = token_log_probs(
            model,
            tokens,
            prefix=candidate.prefix,
            max_length=self.max_length,
            stride=self.stride,
            batch_tokens=batch_tokens,
            known={n for n, document in enumerate(together) if records.find(self.key, document.hash) is not None},
            progress=candidate.named(progress, domain),
        )
        try:
            for number, logp_T in found:
                text = together[number].text
                score = document_score(text, logp_T, candidate.tokenizer, tokens[number], candidate.prefix)
                records.add(self.key, together[number].hash, domain, Scored(score, logp_T))
        except CheckpointError as error:
            raise CheckpointError(f"{candidate.given}: {error}") from error

    def recorded(self, records: Records, document: Document) -> Scored:
        """A document's result."""
        found = records.get(self.key, document.hash)
        assert found is not None
        return found

    def scores(self, documents: dict[str, list[Document]], records: Records) -> dict[str, TextScore]:
        """The result of every domain, from the records of all its documents."""
        return {
            name: aggregate(self.recorded(records, document).score for document in chosen)
            for name, chosen in documents.items()
        }

    def report(self, domains: dict[str, TextScore]) -> ModelReport:
        """The result of the whole model."""
        candidate = self.candidate
        return ModelReport(
            candidate.given, candidate.dtype, candidate.prefix_name, self.max_length, self.stride, domains
        )

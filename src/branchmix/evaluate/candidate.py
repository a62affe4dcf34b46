"""A model that is evaluated: where it is, what its results depend on, and its weights once something needs them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from branchmix.checkpoint.hub import ResolvedModel
from branchmix.evaluate.perplexity import Progress
from branchmix.likelihood.models import TextModel, prefix_token
from branchmix.likelihood.records import model_hash


class Candidate(TextModel):
    """Config and tokenizer of a model; the weights are loaded only if a result is not on record."""

    def __init__(self, resolved: ResolvedModel, dtype: str, trust_remote_code: bool):
        super().__init__(resolved, dtype, trust_remote_code)
        self.prefix = prefix_token(self.tokenizer, self.config)
        self.prefix_name = None if self.prefix is None else str(self.tokenizer.convert_ids_to_tokens(self.prefix))
        self._weights: Any = None

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What every result of the model depends on."""
        return {
            "weights": model_hash(self.folder),
            "dtype": self.dtype,
            "tokenizer": self.tokenizer_hash,
            "prefix": self.prefix,
        }

    @property
    def source(self) -> dict[str, Any]:
        """Where the model came from, which no result depends on."""
        return {"path": self.given, "revision": self.revision}

    def model(self) -> Any:
        """The model, ready for evaluation; loaded at the first call."""
        if self._weights is None:
            self._weights = self.load()
        return self._weights

    def release(self) -> None:
        """Lets go of the weights: the next model needs their memory."""
        self._weights = None

    def named(self, progress: Progress | None, what: str) -> Progress | None:
        """``progress`` with the model's name and ``what`` as the step."""
        if progress is None:
            return None
        return lambda _, done, total: progress(f"{self.folder.name}: {what}", done, total)


class ForcedCandidate(Candidate):
    """A mixture whose gates are all forced to one expert."""

    def __init__(self, found: ResolvedModel, dtype: str, trust_remote_code: bool, number: int):
        super().__init__(found, dtype, trust_remote_code)
        names = self.config.expert_names or [f"expert-{row}" for row in range(self.config.num_experts)]
        self.given, self.number = f"{found.given}: {names[number]} only", number

    @cached_property
    def facts(self) -> dict[str, Any]:
        return {**super().facts, "forced_to": self.number}

    def load(self, **options: Any) -> Any:
        """The mixture with this expert alone, at the dense model's cost."""
        return super().load(**options).keep_experts([self.number])

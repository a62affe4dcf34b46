"""A model that is evaluated: where it is, what its results depend on, and its weights once something needs them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from branchmix.checkpoint.hub import ResolvedModel
from branchmix.errors import CheckpointError
from branchmix.evaluate.perplexity import Progress, prefix_token
from branchmix.evaluate.records import model_hash, tokenizer_hash


class Candidate:
    """Config and tokenizer of a model; the weights are loaded only if a result is not on record."""

    def __init__(self, found: ResolvedModel, dtype: str, trust_remote_code: bool):
        """
        Raises:
            CheckpointError: it is no model, or has no tokenizer.
        """
        from transformers import AutoConfig, AutoTokenizer

        self.given, self.folder, self.revision = found.given, found.folder, found.revision
        self.dtype, self.trust_remote_code = dtype, trust_remote_code
        if not (self.folder / "config.json").is_file():
            raise CheckpointError(f"{self.folder}: has no config.json: give the folder of a model")
        if not any((self.folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise CheckpointError(
                f"{self.folder}: has no tokenizer files: copy the seed's tokenizer beside the weights"
            )
        self.config = self._load(AutoConfig)
        self.tokenizer = self._load(AutoTokenizer)
        self.prefix = prefix_token(self.tokenizer, self.config)
        self.prefix_name = None if self.prefix is None else str(self.tokenizer.convert_ids_to_tokens(self.prefix))
        self.tokenizer_hash = tokenizer_hash(self.tokenizer)
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
            import torch
            from transformers import AutoModelForCausalLM

            model = self._load(AutoModelForCausalLM, dtype=self.dtype, use_safetensors=True)
            self._weights = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        return self._weights

    def release(self) -> None:
        """Lets go of the weights: the next model needs their memory."""
        self._weights = None

    def named(self, progress: Progress | None, what: str) -> Progress | None:
        """``progress`` with the model's name and ``what`` as the step."""
        if progress is None:
            return None
        return lambda _, done, total: progress(f"{self.folder.name}: {what}", done, total)

    def _load(self, kind: Any, **options: Any) -> Any:
        try:
            return kind.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code, **options)
        except Exception as error:  # whatever transformers and the readers below it raise
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            if "trust_remote_code" in str(error) and not self.trust_remote_code:
                reason = "it brings code of its own: read that code, then allow it with --trust-remote-code"
            raise CheckpointError(f"{self.given}: transformers cannot load it: {reason}") from error

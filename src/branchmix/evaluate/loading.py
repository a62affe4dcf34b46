"""A model that is given for evaluation: its config and tokenizer at once, its weights when they are needed."""

from __future__ import annotations

from typing import Any

from branchmix.checkpoint.hub import ResolvedModel
from branchmix.errors import CheckpointError, RecipeError

DTYPES = ("auto", "bfloat16", "float16", "float32")


def check_dtype(dtype: str) -> None:
    """Refuses what is no dtype of weights."""
    if dtype not in DTYPES:
        raise RecipeError(f"dtype: {dtype!r} is none of {', '.join(DTYPES)}")


class Candidate:
    """A folder with a model and its tokenizer.

    Raises:
        CheckpointError: it is none, or transformers cannot load it.
    """

    def __init__(self, found: ResolvedModel, dtype: str, trust_remote_code: bool):
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

    def model(self) -> Any:
        """The causal LM, ready for evaluation, on a GPU if there is one."""
        import torch
        from transformers import AutoModelForCausalLM

        model = self._load(AutoModelForCausalLM, dtype=self.dtype, use_safetensors=True)
        return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def _load(self, kind: Any, **options: Any) -> Any:
        try:
            return kind.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code, **options)
        except Exception as error:  # whatever transformers and the readers below it raise
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            if "trust_remote_code" in str(error) and not self.trust_remote_code:
                reason = "it brings code of its own: read that code, then allow it with --trust-remote-code"
            raise CheckpointError(f"{self.given}: transformers cannot load it: {reason}") from error

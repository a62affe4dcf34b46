"""A causal LM with its tokenizer, from a folder or the Hub; and text as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from branchmix.checkpoint.hub import ResolvedModel
from branchmix.errors import CheckpointError, RecipeError
from branchmix.likelihood.records import tokenizer_hash

DTYPES = ("auto", "bfloat16", "float16", "float32")
_TOKENIZED_AT_ONCE = 256


def check_dtype(dtype: str) -> None:
    """Refuse what no model is loaded in."""
    if dtype not in DTYPES:
        raise RecipeError(f"dtype: {dtype!r} is none of {', '.join(DTYPES)}")


class TextModel:
    """A model's config and tokenizer; its weights are loaded when they are asked for."""

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
        self.tokenizer_hash = tokenizer_hash(self.tokenizer)

    def load(self) -> Any:
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


def prefix_token(tokenizer: Any, config: Any) -> int | None:
    """What a document's first token is predicted from: BOS, else EOS, of the tokenizer, else of the model's config."""
    for holder in (tokenizer, config.get_text_config()):
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(holder, name, None)
            token = token[0] if isinstance(token, list) and token else token
            if isinstance(token, int):
                return token
    return None


def encode(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """The tokens of each text, with no special tokens around them."""
    documents: list[np.ndarray] = []
    for start in range(0, len(texts), _TOKENIZED_AT_ONCE):
        part = list(texts[start : start + _TOKENIZED_AT_ONCE])
        encoded = tokenizer(part, add_special_tokens=False, return_attention_mask=False, verbose=False)
        documents += [np.asarray(tokens, dtype=np.int64) for tokens in encoded["input_ids"]]
    return documents

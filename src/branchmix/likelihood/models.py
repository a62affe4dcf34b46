"""A causal LM with its tokenizer, from a folder or the Hub; and text as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from branchmix.checkpoint.adapters import left_over_adapter, refuse_adapter
from branchmix.checkpoint.hub import ResolvedModel
from branchmix.errors import CheckpointError, RecipeError
from branchmix.likelihood.loading import load, load_language_model, load_tokenizer
from branchmix.likelihood.records import tokenizer_hash

DTYPES = ("auto", "bfloat16", "float16", "float32")
_TOKENIZED_AT_ONCE = 256


def check_dtype(dtype: str) -> None:
    """Refuse what no model is loaded in."""
    if dtype not in DTYPES:
        raise RecipeError(f"dtype: {dtype!r} is none of {', '.join(DTYPES)}")


class TextModel:
    """A model's config and tokenizer; its weights are loaded when they are asked for.

    ``notes`` say what of its folder does not count.
    """

    def __init__(self, found: ResolvedModel, dtype: str, trust_remote_code: bool):
        from transformers import AutoConfig

        self.given, self.folder, self.revision = found.given, found.folder, found.revision
        self.dtype = dtype
        refuse_adapter(self.folder)
        note = left_over_adapter(self.folder)
        self.notes = [] if note is None else [note]
        if not (self.folder / "config.json").is_file():
            raise CheckpointError(f"{self.folder}: has no config.json: give the folder of a model")
        if not any((self.folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise CheckpointError(
                f"{self.folder}: has no tokenizer files: copy the seed's tokenizer beside the weights"
            )
        self._options: dict[str, Any] = {"given": self.given, "trust_remote_code": trust_remote_code}
        self.config = load(AutoConfig, self.folder, **self._options)
        self.tokenizer = load_tokenizer(self.folder, **self._options)
        self.tokenizer_hash = tokenizer_hash(self.tokenizer)

    def load(self) -> Any:
        """The causal LM, ready for evaluation, on a GPU if there is one."""
        import torch

        model = load_language_model(self.folder, dtype=self.dtype, **self._options)
        return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


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

"""A causal LM with its tokenizer, from a folder or the Hub; and text as tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np

from branchmix.checkpoint.companions import is_adapter, left_over_adapter
from branchmix.checkpoint.hub import ResolvedModel
from branchmix.checkpoint.index import dtype_name, left_over_quantisation
from branchmix.checkpoint.text import LONG, Window, tokens_in_pieces, whole_characters
from branchmix.checkpoint.token_ids import vocabulary_of
from branchmix.errors import CheckpointError, RecipeError
from branchmix.likelihood.adapters import base_of, put_on, require_peft
from branchmix.likelihood.loading import load, load_language_model, load_tokenizer
from branchmix.likelihood.records import model_hash, tokenizer_hash

DTYPES = ("auto", "bfloat16", "float16", "float32")
_TOKENIZED_AT_ONCE = 256

Progress = Callable[[str, int, int], None]
"""Receives a step, how much of it is done, and how much there is."""


def check_dtype(dtype: str) -> str:
    """The dtype's own name, such as ``bfloat16`` for ``bf16``; refuses what no model is loaded in."""
    if (name := dtype_name(dtype)) not in DTYPES:
        raise RecipeError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    return name


class TextModel:
    """A model's config and tokenizer; its weights are loaded when they are asked for.

    A LoRA adapter has the config of the model it was trained on, and its tokenizer unless one lies beside it.
    ``notes`` say what of its folder does not count; ``prefix`` is what a text's first token is predicted from.
    """

    forced_to: int | None = None
    """Number of the expert that all gates are forced to."""
    changed: Mapping[str, Any] = MappingProxyType({})
    """Settings in which the loaded model differs from its config.json."""

    def __init__(self, resolved: ResolvedModel, dtype: str, trust_remote_code: bool):
        from transformers import AutoConfig

        self.given, self.folder, self.revision = resolved.given, resolved.folder, resolved.revision
        self.dtype = dtype
        self.adapter = self.folder if is_adapter(self.folder) else None
        if self.adapter is not None:
            require_peft(self.adapter)
            resolved = base_of(self.adapter)
        self._base = resolved.folder
        notes = (left_over_adapter(self._base), left_over_quantisation(self._base))
        self.notes = [note for note in notes if note is not None]
        if not (self._base / "config.json").is_file():
            raise CheckpointError(f"{self._base}: has no config.json: give the folder of a model")
        self._options: dict[str, Any] = {"given": resolved.given, "trust_remote_code": trust_remote_code}
        self.config = load(AutoConfig, self._base, **self._options)
        folder = next((one for one in (self.folder, self._base) if vocabulary_of(one)), self.folder)
        self.tokenizer = load_tokenizer(folder, **{**self._options, "given": self.given})
        self.tokenizer_hash = tokenizer_hash(self.tokenizer)
        self.prefix = prefix_token(self.tokenizer, self.config)
        self._weights: Any = None

    def forced(self, number: int) -> TextModel:
        """The same mixture with all gates forced to one expert, at the dense model's cost."""
        names = self.config.expert_names or [f"expert-{row}" for row in range(self.config.num_experts)]
        one = copy.copy(self)
        one.given, one.forced_to = f"{self.given}: {names[number]} only", number
        return one

    def configured(self, **changed: Any) -> TextModel:
        """The same weights under a config that differs in these settings, such as ``num_experts_per_tok``."""
        one = copy.copy(self)
        one.changed, one._weights = changed, None
        return one

    @cached_property
    def _hash(self) -> str:
        return model_hash(self._base, self.adapter)

    @property
    def facts(self) -> dict[str, Any]:
        """What every result of the model depends on."""
        facts: dict[str, Any] = {"weights": self._hash, "dtype": self.dtype, "tokenizer": self.tokenizer_hash}
        facts |= {"config": dict(self.changed)} if self.changed else {}
        return facts if self.forced_to is None else {**facts, "forced_to": self.forced_to}

    @property
    def source(self) -> dict[str, Any]:
        """Where the model came from, which no result depends on."""
        return {"path": self.given, "revision": self.revision}

    def load(self, **options: Any) -> Any:
        """The causal LM, ready for evaluation, on a GPU if there is one; ``options`` of ``from_pretrained``."""
        import torch

        is_ours = self.config.model_type == "branchmix"
        changed = {} if is_ours else self.changed
        model = load_language_model(self._base, dtype=self.dtype, **self._options, **changed, **options)
        if self.adapter is not None:
            try:
                adapted = put_on(model, self.adapter)
                if is_ours:  # whose experts can only be kept without PEFT's modules in it
                    adapted.merge_and_unload()
            except Exception as error:  # whatever PEFT and torch raise for weights of other shapes
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise CheckpointError(
                    f"{self.adapter}: does not fit its base model {self._options['given']}: {reason}"
                ) from error
        if is_ours and "num_experts_per_tok" in self.changed:
            model.use_top_k(self.changed["num_experts_per_tok"])
        model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        return model if self.forced_to is None else model.keep_experts([self.forced_to])

    def model(self) -> Any:
        """What ``load`` returns, loaded at the first call and kept until ``release``."""
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


def prefix_token(tokenizer: Any, config: Any) -> int | None:
    """What a document's first token is predicted from: BOS, else EOS, of the tokenizer, else of the model's config."""
    for holder in (tokenizer, config.get_text_config()):
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(holder, name, None)
            token = token[0] if isinstance(token, list) and token else token
            if isinstance(token, int):
                return token
    return None


def encode(tokenizer: Any, texts: Sequence[str], *, special: bool = False) -> list[np.ndarray]:
    """The tokens of each text: alone, or with the ``special`` ones that the tokenizer puts around it.

    Half of a surrogate pair counts as U+FFFD. Longer texts than ``LONG`` are tokenised in pieces if the tokenizer has a
    Rust core, so that memory stays small.
    """
    options = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
    documents: list[np.ndarray] = []
    for part in _portions([whole_characters(text) for text in texts]):
        if len(part[0]) > LONG and getattr(tokenizer, "is_fast", False):
            pieces = tokens_in_pieces(part[0], lambda text: _window(tokenizer, text, options))
            documents.append(np.concatenate([np.asarray(ids, dtype=np.int64) for ids in pieces]))
        else:
            documents += [np.asarray(tokens, dtype=np.int64) for tokens in tokenizer(part, **options)["input_ids"]]
    return documents


def _portions(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts that are tokenised at once: some, of at most ``LONG`` characters together, or a longer one alone."""
    part: list[str] = []
    characters = 0
    for text in texts:
        if part and (len(part) == _TOKENIZED_AT_ONCE or characters + len(text) > LONG):
            yield part
            part, characters = [], 0
        part.append(text)
        characters += len(text)
    if part:
        yield part


def _window(tokenizer: Any, text: str, options: dict[str, Any]) -> Window:
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, **options)
    starts = [start for start, _ in encoded["offset_mapping"]]
    return Window(encoded["input_ids"], starts, encoded["special_tokens_mask"])

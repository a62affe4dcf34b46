"""A tokenizer for a new model: byte-level BPE, trained on the run's own text with the ``tokenizers`` library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from branchmix.checkpoint.text import parts_of, whole_characters
from branchmix.errors import DataError

END_OF_TEXT = "<|endoftext|>"
CHARACTERS = 20_000_000
"""Maximum amount of text to train on; more text changes few merges."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A ``PreTrainedTokenizerFast`` of exactly ``vocab_size`` tokens; the same text gives the same tokenizer.

    It is a byte-level BPE, so every text can be encoded and decoded without loss. Its one special token,
    ``<|endoftext|>``, ends documents and pads. The smallest vocabulary has 257 tokens: the bytes and the special token.

    Raises:
        DataError: the text has too few different pieces for so many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator((part for text in texts for part in parts_of(whole_characters(text))), trainer)
    num_tokens = core.get_vocab_size()
    if num_tokens < vocab_size:
        raise DataError(
            f"train_tokenizer: the text is enough for {num_tokens} tokens, not for {vocab_size}: give more text, or "
            "ask for fewer"
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def equal_text(documents: dict[str, Iterator[str]]) -> Iterator[str]:
    """Documents of all domains, always from the domain with the least text so far, up to ``CHARACTERS`` in all."""
    taken = dict.fromkeys(documents, 0)
    left = CHARACTERS
    while taken and left > 0:
        name = min(taken, key=lambda domain: taken[domain])
        text = next(documents[name], None)
        if text is None:  # the domain is exhausted
            del taken[name]
            continue
        taken[name] += len(text)
        left -= len(text)
        yield text

"""Prompts and options as tokens, split as lm-eval splits them, so that the numbers agree.

Spaces at the prompt's end move to the option; ``whole = tokens(prompt + option)``, and the option's tokens are what
``whole`` has beyond as many tokens as the prompt has. Where the option's beginning merges with the prompt's last token,
``whole`` does not begin with the prompt's tokens: the option is scored all the same, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from branchmix.errors import RecipeError
from branchmix.likelihood.models import encode, prefix_token

BOS_POLICIES = ("default", "on", "off")
Refusal = Literal["longer than the context", "an option has no token of its own"]


@dataclass(frozen=True)
class Question:
    """A prompt and the texts that may follow it."""

    prompt: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Encoded:
    """A question's tokens, or why it is not scored."""

    context: tuple[int, ...] = ()
    options: tuple[tuple[int, ...], ...] = ()
    merged: bool = False
    """The tokens of the prompt and an option together do not begin with those of the prompt."""
    refused: Refusal | None = None

    @property
    def num_tokens(self) -> int:
        """Length of the longest input that a model would see: the last token is only predicted."""
        return len(self.context) + max(map(len, self.options), default=1) - 1


@dataclass(frozen=True)
class Bos:
    """What comes before every prompt."""

    policy: str
    tokens: tuple[int, ...]
    text: str | None
    """BOS as text: a prompt that begins with it gets no second one."""
    alone: int | None
    """What predicts the first token where there is neither prompt nor BOS."""

    @classmethod
    def of(cls, tokenizer: Any, config: Any, policy: str) -> Bos:
        """By policy: ``default`` as the tokenizer does it, ``on`` its BOS, ``off`` none.

        Raises:
            RecipeError: no such policy, or ``on`` with a tokenizer that has no BOS.
        """
        if policy not in BOS_POLICIES:
            raise RecipeError(f"--bos {policy}: is not one of {', '.join(BOS_POLICIES)}")
        tokens = _leading(tokenizer) if policy == "default" else ()
        if policy == "on":
            bos = getattr(tokenizer, "bos_token_id", None)
            if bos is None:
                raise RecipeError("--bos on: the tokenizer has no BOS token: choose default or off")
            tokens = (int(bos),)
        return cls(policy, tokens, getattr(tokenizer, "bos_token", None), prefix_token(tokenizer, config))

    def before(self, prompt: str) -> tuple[int, ...]:
        """Tokens to put before a prompt."""
        return () if self.text and prompt.startswith(self.text) else self.tokens


def _leading(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before a text."""
    plain = list(encode(tokenizer, ["a"])[0])
    full = list(tokenizer(["a"], return_attention_mask=False, verbose=False)["input_ids"][0])
    start = next((n for n in range(len(full)) if full[n : n + len(plain)] == plain), 0)
    return tuple(full[:start])


def encode_questions(
    tokenizer: Any, questions: Sequence[Question], bos: Bos, max_positions: int | None
) -> list[Encoded]:
    """Tokens of every question. One that is longer than the model's context is refused, never cut."""
    contexts = iter(encode(tokenizer, [question.prompt.rstrip() for question in questions]))
    wholes = iter(
        encode(tokenizer, [question.prompt + option for question in questions for option in question.options])
    )
    encoded = []
    for question in questions:
        before = bos.before(question.prompt)
        start, *whole = [
            before + tuple(map(int, next(rows))) for rows in (contexts, *(wholes for _ in question.options))
        ]
        encoded.append(_split(start, whole, bos, max_positions))
    return encoded


def _split(context: tuple[int, ...], wholes: list[tuple[int, ...]], bos: Bos, max_positions: int | None) -> Encoded:
    options = tuple(whole[len(context) :] for whole in wholes)
    merged = any(whole[: len(context)] != context for whole in wholes)
    if not context and bos.alone is not None:
        context = (bos.alone,)
    if not context or not all(options):
        return Encoded(merged=merged, refused="an option has no token of its own")
    encoded = Encoded(context, options, merged)
    if max_positions is not None and encoded.num_tokens > max_positions:
        return Encoded(merged=merged, refused="longer than the context")
    return encoded

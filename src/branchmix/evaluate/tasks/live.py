"""A model that is in memory, as lm-eval asks it: tokens, prompts and stops are lm-eval's, forward passes ours.

Batch size and order change a result by rounding only: inputs are padded on the right without a mask where causal
attention never sees it, prompts of generation on the left with one, and sampled text draws from a seed of its own.
Shapes: N predicted tokens of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs

from branchmix.checkpoint.text import LONG
from branchmix.errors import CheckpointError, RecipeError
from branchmix.evaluate.perplexity import Progress, TokenWindow, batches, check_tokens, token_log_probs
from branchmix.likelihood.forward import evaluating, length_dependent, log_probs, logits_at
from branchmix.likelihood.models import encode

Pair = tuple[list[int], list[int]]
"""The tokens of a request's context and of its continuation."""


class LiveModel(HFLM):
    """A causal LM of transformers, dense or a mixture, in evaluation mode.

    Requests longer than ``max_length`` lose their beginning, as in lm-eval. ``prefix`` is what a text's first token is
    predicted from; a CheckpointError is raised if tokenizer and config know none.
    """

    def __init__(self, model: Any, tokenizer: Any, *, prefix: int | None, max_length: int, batch_tokens: int):
        if prefix is None:
            raise CheckpointError("its tokenizer and config name neither BOS nor EOS, which lm-eval starts a text from")
        tokenizer = copy.deepcopy(tokenizer)  # lm-eval gives it a padding token
        if tokenizer.pad_token_id is None:  # lm-eval would add a token that the model has no embedding for
            tokenizer.pad_token_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else prefix
        super().__init__(
            pretrained=model, tokenizer=tokenizer, prefix_token_id=prefix, max_length=max_length, batch_size=1
        )
        self._budget = batch_tokens
        self._equal_lengths = length_dependent(model.config)
        self.shortened: set[int] = set()
        """Numbers of the last call's requests that were longer than ``max_length`` and lost their beginning."""
        self.merged: set[int] = set()
        """Numbers of the last call's requests whose continuation merges with the last token of the context."""

    def answers(
        self,
        kind: str,
        arguments: Sequence[tuple[Any, ...]],
        seeds: Sequence[int],
        progress: Progress | None,
        *,
        names: Sequence[str],
        known: Collection[int] = (),
    ) -> Iterator[tuple[int, Any]]:
        """The result of each request that is not known, as (its number, result), as soon as there is one.

        Args:
            kind: ``loglikelihood``, ``loglikelihood_rolling`` or ``generate_until``.
            arguments: of the requests, as lm-eval has them.
            seeds: for each request that samples.
            progress: called with (kind, done, total).
            names: of the requests, for errors: task and document.
            known: numbers of requests that are not asked again, though batches are made of all of them.

        Raises:
            RecipeError: a request leaves nothing to predict, or is longer than the window.
            CheckpointError: the tokenizer is not the model's, or the logits are not finite.
        """
        ways = {
            "loglikelihood": self._continuations,
            "loglikelihood_rolling": self._texts,
            "generate_until": self._generations,
        }
        self.shortened.clear()
        self.merged.clear()
        self._names, self._known = names, known
        done, total = 0, len(arguments) - len(known)
        with evaluating(self.model):
            for number, result in ways[kind](arguments, seeds):
                if number in known:
                    continue
                yield number, result
                done += 1
                if progress is not None:
                    progress(kind, done, total)

    # ---- log-likelihoods ----

    def _continuations(self, arguments: Sequence[Any], _: Any) -> Iterator[tuple[int, tuple[float, bool]]]:
        yield from self._scored([self._pair(number, *texts) for number, texts in enumerate(arguments)])

    def _pair(self, number: int, context: str, continuation: str) -> Pair:
        """A request's tokens, split as lm-eval and ``scaling`` split them: spaces at the context's end move to the
        continuation, whose tokens are those that both texts have beyond as many as the context has."""
        if context == "":
            start, after = [], self.tok_encode(continuation, add_special_tokens=False)
            if after[:1] == [self.prefix_token_id] and len(after) > 1:  # the text begins with BOS already
                start, after = after[:1], after[1:]
        else:
            start, whole = self.tok_encode(context.rstrip()), self.tok_encode(context + continuation)
            after = whole[len(start) :]
            if whole[: len(start)] != start:
                self.merged.add(number)
        if not after:
            raise RecipeError(
                f"{self._names[number]}: the answer {continuation[:40]!r} has no token of its own after the prompt: it "
                "is empty, or the tokenizer merges it with the prompt's end: change target_delimiter or the answers"
            )
        return start or [self.prefix_token_id], after

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **options: Any
    ) -> list[int]:
        """lm-eval's tokens of a text; of a long one in pieces."""
        if len(string) <= LONG:
            return list(super().tok_encode(string, add_special_tokens, left_truncate_len, **options))
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        tokens: list[int] = encode(self.tokenizer, [string], special=add_special_tokens)[0].tolist()
        return tokens[-left_truncate_len:] if left_truncate_len else tokens

    def _texts(self, arguments: Sequence[Any], _: Any) -> Iterator[tuple[int, float]]:
        rows = [np.asarray(self.tok_encode(text), dtype=np.int64) for (text,) in arguments]
        for number, row in enumerate(rows):
            if arguments[number][0] and not len(row):
                raise RecipeError(f"{self._names[number]}: the tokenizer makes no tokens of its text: leave it out")
        options: dict[str, Any] = {"max_length": self.max_length, "batch_tokens": self._budget, "known": self._known}
        for number, logp_T in token_log_probs(self.model, rows, prefix=self.prefix_token_id, **options):
            yield number, float(logp_T.sum(dtype=np.float64))

    def _scored(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Log-probability of each request's continuation, and whether it is what the model would write.

        Requests with the same inputs, such as the one-letter answers of one question, share a row of the forward pass.
        """
        inputs: list[np.ndarray] = []
        rows: dict[bytes, int] = {}
        users: list[list[int]] = []
        for number, (context, continuation) in enumerate(pairs):
            if len(continuation) > self.max_length:
                raise RecipeError(
                    f"max_length: {self.max_length} is less than the {len(continuation)} tokens of a continuation"
                )
            whole = np.asarray(context + continuation, dtype=np.int64)
            if len(whole) > self.max_length + 1:
                self.shortened.add(number)
            tokens = whole[-(self.max_length + 1) :][:-1]
            row = rows.setdefault(tokens.tobytes(), len(inputs))
            if row == len(inputs):
                inputs.append(tokens)
                users.append([])
            users[row].append(number)
        check_tokens(self.model, [np.asarray(continuation) for _, continuation in pairs] + inputs)
        windows = [TokenWindow(row, 0, 0, len(tokens)) for row, tokens in enumerate(inputs)]
        windows.sort(key=lambda window: (-window.end, window.document))
        for batch in batches(windows, self._budget, equal_lengths=self._equal_lengths):
            asked = [(place, number) for place, window in enumerate(batch) for number in users[window.document]]
            if all(number in self._known for _, number in asked):
                continue
            logits_NV, targets_N = self._logits([inputs[window.document] for window in batch], asked, pairs)
            logp_N = log_probs(logits_NV, targets_N)
            greedy_N = (logits_NV.argmax(-1) == targets_N).cpu().numpy()
            at = 0
            for _, number in asked:
                until = at + len(pairs[number][1])
                yield number, (float(logp_N[at:until].sum(dtype=np.float64)), bool(greedy_N[at:until].all()))
                at = until

    @torch.inference_mode()
    def _logits(self, inputs: list[np.ndarray], asked: list[tuple[int, int]], pairs: Sequence[Pair]) -> Any:
        """Logits and targets at the continuations of ``asked``: (row of the inputs, number of the request)."""
        targets = [np.asarray(pairs[number][1], dtype=np.int64) for _, number in asked]
        ends = [len(inputs[row]) for row, _ in asked]
        rows_N = np.concatenate([np.full(len(t), row) for (row, _), t in zip(asked, targets, strict=True)])
        places_N = np.concatenate([np.arange(end - len(t), end) for end, t in zip(ends, targets, strict=True)])
        return logits_at(self.model, inputs, rows_N, places_N, np.concatenate(targets))

    # ---- generation ----

    def _generations(self, arguments: Sequence[Any], seeds: Sequence[int]) -> Iterator[tuple[int, str]]:
        """lm-eval's greedy or sampled text, in batches of prompts of about one length and the same settings."""
        if self.tokenizer.eos_token_id is None:
            raise CheckpointError("its tokenizer has no EOS, which ends what the model writes")
        prompts = []
        for number, (prompt, settings) in enumerate(arguments):
            room = self.max_length - normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
            if room <= 0:
                raise RecipeError(
                    f"max_length: {self.max_length} is too short for a task that lets the model write "
                    f"{self.max_length - room} tokens"
                )
            length = len(self.tok_encode(prompt))
            if not length:  # as for a text: BOS or EOS is what the first token is predicted from
                prompt = self.tokenizer.decode([self.prefix_token_id])
                if not (length := len(self.tok_encode(prompt))):
                    raise RecipeError(f"{self._names[number]}: the tokenizer makes no tokens of its prompt")
            if length > room:
                self.shortened.add(number)
            starts = bool(self.tokenizer.bos_token) and prompt.startswith(self.tokenizer.bos_token)
            group = (repr(sorted(settings.items(), key=str)), starts)
            prompts.append((group, -min(length, room), prompt, number))
        prompts.sort(key=lambda entry: entry[:3])
        batch: list[tuple[Any, int, str, int]] = []
        for entry in prompts:
            if batch and not self._fits(batch, entry, arguments):
                yield from self._written(batch, arguments, seeds)
                batch = []
            batch.append(entry)
        yield from self._written(batch, arguments, seeds)

    def _fits(self, batch: Sequence[Any], entry: Any, arguments: Sequence[Any]) -> bool:
        group, length = batch[0][0], batch[0][1]
        if entry[0] != group or arguments[entry[3]][1].get("do_sample"):
            return False
        return (entry[1] == length or not self._equal_lengths) and -length * (len(batch) + 1) <= self._budget

    def _written(
        self, batch: Sequence[Any], arguments: Sequence[Any], seeds: Sequence[int]
    ) -> Iterator[tuple[int, str]]:
        numbers = [entry[3] for entry in batch]
        if all(number in self._known for number in numbers):
            return
        asked = [(prompt, arguments[number][1], number) for _, _, prompt, number in batch]
        requests = [Instance("generate_until", {}, (prompt, more), number) for prompt, more, number in asked]
        self.batch_size_per_gpu = len(requests)
        with torch.random.fork_rng():
            torch.random.manual_seed(seeds[numbers[0]])
            texts = self.generate_until(requests, disable_tqdm=True)
        yield from zip(numbers, texts, strict=True)

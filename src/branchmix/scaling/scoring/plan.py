"""What many questions have in common and is computed once: the beginning of prompts, and a prompt's options.

Pure: tokens in, a plan out. A ``Trunk`` is a beginning that many prompts share, whose keys and values are kept. A
``Row`` is what a forward pass computes of one prompt after the trunk; its options' further tokens are ``branches`` of
it. Rows without branches may be padded on the right; those with branches are in batches of equal length, so that no
cache ever holds padding and no model needs a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from branchmix.scaling.scoring.tokens import Encoded

BATCH_TOKENS = 2048
"""Tokens of a forward pass, padding included."""
PASS_OVERHEAD = 24
"""A forward pass costs about as much as so many tokens more: it reads all weights."""
_DEEPEST = 100
"""Forks of prompts one after another that are looked at; the rest shares what they share."""
_WIDEST = 8
"""A trunk is copied for each row: at most so many times a batch's tokens."""


@dataclass(frozen=True)
class Target:
    """An option's token, and the input token that predicts it."""

    option: int
    token: int
    place: int
    """Place of that input token among the row's own tokens."""


@dataclass(frozen=True)
class Row:
    """Tokens of one question, from the trunk's end; or those of its options except the last, after such a row."""

    question: int
    tokens: tuple[int, ...]
    targets: tuple[Target, ...] = ()
    branches: tuple[Row, ...] = ()

    def after(self, length: int) -> Row:
        """The row without its first tokens, which a trunk has."""
        moved = tuple(replace(target, place=target.place - length) for target in self.targets)
        return replace(self, tokens=self.tokens[length:], targets=moved)


@dataclass
class Trunk:
    """A shared beginning and the rows after it; without one, all tokens are the rows' own."""

    tokens: tuple[int, ...]
    rows: list[Row]


def plan(questions: Sequence[Encoded], *, share: bool = True) -> list[Trunk]:
    """Trunks with their rows; refused questions are in none.

    Without ``share`` nothing is kept from pass to pass, and each option that needs one has a row of its own.
    """
    asked = [(number, question) for number, question in enumerate(questions) if question.refused is None]
    rows = [row for number, question in asked for row in _rows(number, question, share=share)]
    if not share:
        return [Trunk((), rows)]
    groups = _trunks(sorted(rows, key=lambda row: row.tokens))
    return [Trunk(group[0].tokens[:length], [row.after(length) for row in group]) for length, group in groups]


def _rows(number: int, question: Encoded, *, share: bool) -> list[Row]:
    """One row, with a branch for each input that options need after the prompt if there are several.

    Options that differ in their last token alone are read off one input. Without ``share`` each input has its own row.
    """
    last = len(question.context) - 1
    options = list(enumerate(question.options))
    first = tuple(Target(o, option[0], last) for o, option in options)
    branches = []
    for fed in dict.fromkeys(option[:-1] for _, option in options if len(option) > 1):
        targets = (Target(o, t, n) for o, option in options if option[:-1] == fed for n, t in enumerate(option[1:]))
        branches.append(Row(number, fed, tuple(targets)))
    if share and len(branches) > 1:
        return [Row(number, question.context, first, tuple(branches))]
    rows: list[Row] = []
    for branch in branches or [Row(number, ())]:
        further = tuple(replace(target, place=target.place + last + 1) for target in branch.targets)
        rows.append(Row(number, question.context + branch.tokens, further if rows else first + further))
    return rows


# ---- trunks ----


def _trunks(rows: list[Row]) -> list[tuple[int, list[Row]]]:
    """Sorted rows in groups, with the length of what each group shares: the cheapest way, in tokens computed."""
    _, groups = _cheapest(rows, 0) if rows else (0.0, [])
    alone = [row for length, group in groups if not length for row in group]
    return ([(0, alone)] if alone else []) + [(length, group) for length, group in groups if length]


def _cheapest(rows: list[Row], forks: int) -> tuple[float, list[tuple[int, list[Row]]]]:
    """Cost in tokens of rows that fork off ``forks`` times before, and their groups; a trunk of 0 tokens is none.

    Either all rows get one trunk, as long as what they share, or each part that continues alike decides for itself.
    """
    best = (float(sum(len(row.tokens) for row in rows)), [(0, rows)])
    if len(rows) < 2:
        return best
    shared = _shared(rows[0].tokens, rows[-1].tokens)  # sorted: what first and last share, all share
    shared = min(shared, min(row.targets[0].place for row in rows))  # each row predicts its own
    together = shared + sum(len(row.tokens) - shared for row in rows) + 2.0 * PASS_OVERHEAD
    if shared and together < best[0]:
        best = (together, [(shared, rows)])
    if forks == _DEEPEST or len(rows[0].tokens) == shared:
        return best
    cost, groups = 0.0, []
    parts = [list(part) for _, part in groupby(rows, key=lambda row: row.tokens[shared : shared + 1])]
    if len(parts) == 1:
        return best
    for part in parts:
        part_cost, part_groups = _cheapest(part, forks + 1)
        cost += part_cost
        groups += part_groups
    return (cost, groups) if cost < best[0] else best


def _shared(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    length = min(len(first), len(second))
    return next((n for n in range(length) if first[n] != second[n]), length)


# ---- batches ----


def batches(trunk: Trunk, batch_tokens: int, *, equal_lengths: bool = False) -> Iterator[list[Row]]:
    """Rows of a trunk, longest first; padding included, a batch has at most ``batch_tokens``, or is one row.

    The options' further tokens come in passes of their own. With ``equal_lengths`` nothing is padded at all.
    """
    batch: list[Row] = []
    for row in sorted(trunk.rows, key=lambda row: (bool(row.branches), -len(row.tokens), row.question)):
        if batch:
            width, rows = len(batch[0].tokens), len(batch) + 1
            differ = len(row.tokens) != width and (equal_lengths or bool(row.branches))
            too_many = width * rows > batch_tokens or (len(trunk.tokens) + width) * rows > _WIDEST * batch_tokens
            if differ or too_many or bool(row.branches) != bool(batch[0].branches):
                yield batch
                batch = []
        batch.append(row)
    if batch:
        yield batch

"""Errors that a user can fix. The command line shows each problem as one line and exits with 2."""

from __future__ import annotations

from collections.abc import Iterable

MOST = 1000
"""Maximum characters of a line; a longer one quotes a value from a file, whose middle is left out."""


def short(value: object, most: int = 100) -> str:
    """A value for a message as Python writes it, its middle left out if that is long."""
    return _without_middle(value if isinstance(value, str) else repr(value), most, quoted=isinstance(value, str))


def kind_of(value: object) -> str:
    """What a value of YAML or JSON is, in words: ``text``, ``a number``."""
    kinds = {type(None): "empty", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return {**kinds, list: "a list", dict: "a mapping"}.get(type(value), "a single value")


def _without_middle(text: str, most: int, *, quoted: bool = False) -> str:
    if len(text) > most:
        left_out = len(text) - most
        text = f"{text[: most * 2 // 3]}... ({left_out:,} characters left out) ...{text[-(most - most * 2 // 3) :]}"
    return repr(text) if quoted else text


class BranchMixError(Exception):
    """Base of all errors in the input: says what is wrong, where, and what to do.

    Its lines are shortened, whatever a file made them of.
    """

    def __init__(self, message: str = ""):
        super().__init__("\n".join(_without_middle(line, MOST) for line in message.split("\n")))

    def rename(self, place: str, to: str) -> None:
        """Replace ``place``, a path that the user did not give, by ``to`` in the message."""
        self.args = tuple(part.replace(place, to) if isinstance(part, str) else part for part in self.args)


class RecipeError(BranchMixError):
    """A recipe, option or argument that is invalid or inconsistent."""


class CheckpointError(BranchMixError):
    """A checkpoint folder or file that cannot be read: missing, truncated, pickled, quantised, corrupt."""


class OutputError(BranchMixError):
    """An output that cannot be written: it exists, it is an input, or the disk is full."""


class CompatibilityError(BranchMixError):
    """Checkpoints that do not fit together. Carries *all* problems found, one line each.

    Attributes:
        problems: the lines; each names the expert, what differs, both values and what to do.
    """

    def __init__(self, problems: Iterable[str]):
        super().__init__("\n".join(problems))
        self.problems = str(self).split("\n")


class VerificationError(BranchMixError):
    """A finished mixture that does not compute what its recipe says."""


class TrainingError(BranchMixError):
    """A run that cannot continue, because its loss or gradients are not finite numbers."""


class DataError(BranchMixError):
    """Text that cannot be read, or too little of it: a missing file, column or split, a corrupt file, no documents."""

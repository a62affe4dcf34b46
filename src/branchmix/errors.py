"""What branchmix raises when a user can mend it. The command line shows each as one line and exits with 2."""

from __future__ import annotations

from collections.abc import Iterable

MOST = 1000
"""Characters of a line: a path and some words. More is a value of a file, of which nobody wants to read all."""


def short(value: object, most: int = 100) -> str:
    """A value for a message as Python writes it, its middle left out if that is long."""
    return _without_middle(value if isinstance(value, str) else repr(value), most, quoted=isinstance(value, str))


def _without_middle(text: str, most: int, *, quoted: bool = False) -> str:
    if len(text) > most:
        left_out = len(text) - most
        text = f"{text[: most * 2 // 3]}... ({left_out:,} characters left out) ...{text[-(most - most * 2 // 3) :]}"
    return repr(text) if quoted else text


class BranchMixError(Exception):
    """Base of every error that is the input's fault: says what is wrong, where, and what to do.

    Its lines are shortened, whatever a file made them of.
    """

    def __init__(self, message: str = ""):
        super().__init__("\n".join(_without_middle(line, MOST) for line in message.split("\n")))

    def rename(self, place: str, to: str) -> None:
        """Makes the message say ``to`` where it said ``place``, a path that only we know."""
        self.args = tuple(part.replace(place, to) if isinstance(part, str) else part for part in self.args)


class RecipeError(BranchMixError):
    """A recipe, option or command-line argument that cannot be meant as written."""


class CheckpointError(BranchMixError):
    """A checkpoint folder or file that cannot be read: missing, truncated, pickled, quantised, corrupt."""


class OutputError(BranchMixError):
    """A place that cannot be written: it exists, it is an input, or the disk is too small."""


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
    """A run that cannot go on: its loss or its gradients are no numbers any more."""


class DataError(BranchMixError):
    """Text that cannot be read or is not enough: a missing file, column or split, a corrupt file, an empty data set."""

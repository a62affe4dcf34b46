"""What branchmix raises when a user can mend it. The command line shows each as one line and exits with 2."""

from __future__ import annotations

from collections.abc import Iterable


class BranchMixError(Exception):
    """Base of every error that is the input's fault: says what is wrong, where, and what to do."""

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
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class VerificationError(BranchMixError):
    """A finished mixture that does not compute what its recipe says."""


class TrainingError(BranchMixError):
    """A run that cannot go on: its loss or its gradients are no numbers any more."""


class DataError(BranchMixError):
    """Text that cannot be read or is not enough: a missing file, column or split, a corrupt file, an empty data set."""

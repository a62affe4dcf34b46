"""Axes within a model that ``scaling run`` runs itself: examples in the prompt, experts kept, experts of a token.

They need no reasoning model, and every setting gets the same questions, so ``scaling trends`` pairs them by question.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from branchmix.errors import RecipeError
from branchmix.likelihood.models import TextModel
from branchmix.scaling.scoring.tokens import Encoded

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What configs call the number of a mixture's experts."""


@dataclass(frozen=True)
class Axes:
    """The values of each axis; without any, a model stays as it is, and is not a point on that axis."""

    shots: tuple[int, ...] = (0,)
    """Examples in the prompt; one value alone is not an axis."""
    experts: tuple[int, ...] = ()
    """Experts of a mixture that are kept for a prompt: those with the largest shares of its gates."""
    top_k: tuple[int, ...] = ()
    """Experts of each FFN layer that a router chooses for a token."""

    @property
    def of_prompts(self) -> bool:
        return len(self.shots) > 1

    def of_models(self) -> Iterator[dict[str, int]]:
        """Every combination of the settings that change the model."""
        axes = {name: values for name in ("experts", "top_k") if (values := getattr(self, name))}
        yield from (dict(zip(axes, values, strict=True)) for values in product(*axes.values()))

    def refuse_unfit(self, name: str, config: Any) -> None:
        """Before anything is computed, a RecipeError for a model that does not have what an axis changes."""
        if self.experts and self.top_k and max(self.top_k) > min(self.experts):
            raise RecipeError(
                f"--top-k {max(self.top_k)}: a token cannot go to more experts than --experts {min(self.experts)} "
                "keeps: leave out the larger or the smaller number, or run one axis at a time"
            )
        count = next((value for key in _COUNTS if (value := getattr(config, key, None)) is not None), None)
        if self.experts and config.model_type != "branchmix":
            raise RecipeError(f"--experts: {name} is not a branchmix mixture: leave it out of the family, or --experts")
        if self.top_k and getattr(config, "num_experts_per_tok", None) is None:
            raise RecipeError(f"--top-k: {name} is not a mixture: leave it out of the family, or --top-k")
        if (self.experts or self.top_k) and getattr(config, "stitches", None) is not None:
            option = "--experts" if self.experts else "--top-k"
            raise RecipeError(f"{option}: {name} has stitches, which need all experts: leave it out, or {option}")
        for option, values in (("--experts", self.experts), ("--top-k", self.top_k)):
            if values and count is not None and max(values) > count:
                raise RecipeError(f"{option} {max(values)}: {name} has {count} experts")


def with_top_k(text: TextModel, top_k: int) -> TextModel:
    """A mixture whose FFN routers choose ``top_k`` experts for each token."""
    return text.configured(num_experts_per_tok=top_k)


def by_kept_experts(
    model: Any, questions: Sequence[Encoded], num_experts: int | None
) -> Iterator[tuple[Any, list[int]]]:
    """Mixtures of ``num_experts`` experts, each with the numbers of the questions whose prompts keep those.

    As ``branchmix generate --experts`` chooses them, by the gates of the whole prompt. None: the model itself, and all
    questions.
    """
    if num_experts is None:
        yield model, list(range(len(questions)))
        return
    import torch

    from branchmix.models.kept_branchmix import chosen_experts, of_kept_experts

    groups: dict[tuple[int, ...], list[int]] = {}
    for number, question in enumerate(questions):
        ids = torch.tensor([question.context], device=model.device)
        (choice,) = chosen_experts(model, num_experts, ids)
        groups.setdefault(choice, []).append(number)
    for choice, numbers in groups.items():
        yield of_kept_experts(model, choice), numbers

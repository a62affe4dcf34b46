"""The model: the code files that are saved with every checkpoint, and a function to configure a mixture."""

from __future__ import annotations

from typing import Any

# First, so that registration with the auto classes (see ``_registration``) never sees a half-imported configuration
# below. Not ``modeling_auto``: this may run during transformers' own import of ``modeling_utils``.
import transformers.models.auto.configuration_auto  # noqa: F401

from branchmix.checkpoint.families import family_of, layout_of


def mixture_config(seed_config: Any, **kwargs: Any) -> Any:
    """A ``BranchMixConfig`` around a seed's own config, with its family's names filled in.

    Args:
        seed_config: the seed's transformers config, or its dictionary.
        **kwargs: fields of ``BranchMixConfig``.

    Raises:
        CheckpointError: the seed's family cannot be widened.
    """
    from branchmix.models.configuration_branchmix import BranchMixConfig

    as_dict = seed_config if isinstance(seed_config, dict) else seed_config.to_dict()
    per_expert_rotary = kwargs.get("expert_rope_parameters") is not None
    layout = layout_of(family_of(as_dict), per_expert_rotary=per_expert_rotary)
    return BranchMixConfig(seed_config=seed_config, layout=layout, **kwargs)

"""Rotary parameters of a config, in one form whichever transformers wrote it."""

from __future__ import annotations

from typing import Any

from branchmix.checkpoint.families import Config, entry_of
from branchmix.errors import CheckpointError

_LAYER_TYPES = ("full_attention", "sliding_attention")
_NEEDS_ORIGINAL_LENGTH = ("llama3", "yarn", "longrope")
"""Values of ``rope_type`` that scale from the length of pretraining."""

POSITIONS = "max_position_embeddings"
"""Key of the config that some types scale by; in ``rope_of`` only where it counts."""
_ORIGINAL = "original_max_position_embeddings"


def rope_of(config: Config) -> dict[str, Any]:
    """Rotary parameters in transformers 5's form, from its config or an older one, the family's defaults filled in.

    Two configs rotate in the same way where their results are equal. Where layer types differ (Gemma 3, OLMo 3), the
    result maps each to its parameters. Raises CheckpointError if the config's rotary keys are not mappings.
    """
    family = entry_of(config)
    defaults = family.defaults
    rope, scaling = (_mapping(config.get(key), key) for key in ("rope_parameters", "rope_scaling"))
    if config.get("rope_parameters") is None:
        rope = dict(defaults.get("rope_parameters", {}))
    theta = config.get(family.old_rope_keys[0], defaults.get("rope_theta", 10000.0))
    part = config.get(family.old_rope_keys[1], defaults.get("partial_rotary_factor", 1.0))
    local = defaults.get("rope_local_base_freq")
    if window_theta := defaults.get("sliding_rope_theta", config.get("rope_local_base_freq", local) if local else None):
        whole, windowed = (_mapping(rope.get(kind), f"{kind} of rope_parameters") for kind in _LAYER_TYPES)
        whole = {"rope_type": "default", **whole, **scaling}  # transformers 5 overlooks the older name "type" here
        both = ((whole, theta), (windowed, window_theta))
        return {kind: _filled(*given, part, config) for kind, given in zip(_LAYER_TYPES, both, strict=True)}
    nested = {kind: given for kind, given in rope.items() if isinstance(given, dict)}
    if nested and not scaling:
        return {kind: _filled(given, theta, part, config) for kind, given in nested.items()}
    return _filled(scaling or rope, theta, part, config)


def _mapping(given: Any, key: str) -> dict[str, Any]:
    if not isinstance(given or {}, dict):
        raise CheckpointError(f"config.json: {key} is {given!r}, not a mapping: copy the model's own config here")
    return dict(given or {})


def _filled(given: dict[str, Any], theta: Any, part: Any, config: Config) -> dict[str, Any]:
    """Parameters of one kind of layer, with all that transformers adds to them when it loads the config.

    ``theta`` (base) and ``part`` (rotated part of a head) are used where ``given`` has none.
    """
    family = entry_of(config)
    length = config.get(POSITIONS, family.defaults.get(POSITIONS))
    rope = {"rope_type": given.get("type", "default"), "rope_theta": theta, "partial_rotary_factor": part, **given}
    rope.pop("type", None)  # transformers 5 keeps the older name of rope_type beside it
    rope["rope_type"] = family.renamed_rope_types.get(str(rope["rope_type"]), rope["rope_type"])
    if isinstance(rope["rope_theta"], int):
        rope["rope_theta"] = float(rope["rope_theta"])
    if rope["rope_type"] in _NEEDS_ORIGINAL_LENGTH:
        rope.setdefault(_ORIGINAL, length)
        # One beside the parameters, as Phi-3's, counts more.
        beside = config.get(_ORIGINAL, family.defaults.get(_ORIGINAL))
        if beside is not None:
            rope[_ORIGINAL] = beside
    if rope["partial_rotary_factor"] in (None, 1.0) and "partial_rotary_factor" not in family.defaults:
        del rope["partial_rotary_factor"]  # the same as none
    # Some types take their factor from the number of positions, or begin to scale beyond them.
    scales_by_positions = rope["rope_type"] in ("yarn", "longrope") and rope.get("factor") is None
    counts = scales_by_positions or rope["rope_type"] == "dynamic"
    return {**rope, POSITIONS: length} if counts and length is not None else rope


def with_rope(config: Config, rope: dict[str, Any]) -> Config:
    """The config with other rotary parameters, one of the results of ``rope_of``."""
    kept = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    beside = [POSITIONS]
    if _ORIGINAL in config or _ORIGINAL in entry_of(config).defaults:  # there it counts more
        beside.append(_ORIGINAL)
    own = {key: value for key, value in rope.items() if key != POSITIONS}
    return {**kept, **{key: rope[key] for key in beside if key in rope}, "rope_parameters": own}


def with_current_names(config: Config) -> Config:
    """The config with rope types under the names that transformers 5 has for them: ``su`` became ``longrope``."""
    renamed = dict(config)
    for key in ("rope_scaling", "rope_parameters"):
        scaling = config.get(key)
        if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "su":
            rest = {name: value for name, value in scaling.items() if name != "type"}
            renamed[key] = {**rest, "rope_type": "longrope"}
    return renamed

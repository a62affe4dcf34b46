"""Rotary parameters of a config, in one form whichever transformers wrote it."""

from __future__ import annotations

from typing import Any

from branchmix.checkpoint.families import Config
from branchmix.errors import CheckpointError

# transformers' defaults for keys that config.json files leave out; 10000 and the whole head where none is named.
_THETA_DEFAULTS = {"cohere": 5e5, "olmo3": 5e5, "smollm3": 2e6, "gemma3_text": 1e6, "helium": 1e5, "apertus": 1.2e7}
_THETA_DEFAULTS |= {"bitnet": 5e5, "cwm": 1e6, "ernie4_5": 5e5}
_PARTIAL_DEFAULTS = {"gpt_neox": 0.25, "stablelm": 0.25, "phi": 0.5, "glm": 0.5, "glm4": 0.5, "nemotron": 0.5}
_PARTIAL_DEFAULTS |= {"persimmon": 0.5}
_ORIGINAL_LENGTH_DEFAULTS = {"phi3": 4096}
_SCALED_DEFAULTS: dict[str, dict[str, Any]] = {
    "apertus": {
        "rope_type": "llama3",
        "rope_theta": 1.2e7,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
}
"""What families take for rotary parameters that are left out, where it is more than a base and a part."""
_POSITIONS_DEFAULTS = {
    **dict.fromkeys(("llama", "olmo", "olmo2", "olmo3", "phi", "gpt_neox", "falcon", "granite"), 2048),
    **dict.fromkeys(("phi3", "stablelm", "starcoder2", "nemotron"), 4096),
    **dict.fromkeys(("gemma", "gemma2", "cohere", "cohere2"), 8192),
    **dict.fromkeys(("qwen2", "qwen3", "smollm3"), 32768),
    **dict.fromkeys(("mistral", "ministral", "gemma3_text", "glm", "glm4"), 131072),
}
_RENAMED_TYPES = {"phi3": {"su": "longrope", "yarn": "longrope"}}
"""Rope types that a family's config class takes for another one."""

_OLD_NAMES = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}
"""Keys of the base and of the rotated part of a head, where transformers 4 did not call them as other families'."""

_BY_LAYER_TYPE = ("gemma3_text", "olmo3")
"""Families whose layers with a sliding window rotate differently from the others."""
_LAYER_TYPES = ("full_attention", "sliding_attention")
_LOCAL_THETA = 10000.0
"""Base of Gemma 3's layers with a sliding window."""

_NEEDS_ORIGINAL_LENGTH = ("llama3", "yarn", "longrope")
"""Values of ``rope_type`` that scale from the length of pretraining."""

POSITIONS = "max_position_embeddings"
"""Key of the config that some types scale by; in ``rope_of`` only where it counts."""


def rope_of(config: Config) -> dict[str, Any]:
    """Rotary parameters in transformers 5's form, from its config or an older one, the family's defaults filled in.

    Two configs rotate in the same way where their results are equal. Where layer types differ (Gemma 3, OLMo 3), the
    result maps each to its parameters. Raises CheckpointError if the config's rotary keys are not mappings.
    """
    rope, scaling = (_mapping(config.get(key), key) for key in ("rope_parameters", "rope_scaling"))
    if config.get("rope_parameters") is None:
        rope = dict(_SCALED_DEFAULTS.get(str(config.get("model_type")), {}))
    theta, part = _beside(config)
    if config.get("model_type") in _BY_LAYER_TYPE:
        whole, windowed = (_mapping(rope.get(kind), f"{kind} of rope_parameters") for kind in _LAYER_TYPES)
        whole = {"rope_type": "default", **whole, **scaling}  # transformers 5 overlooks the older name "type" here
        if config.get("model_type") == "gemma3_text":
            window_theta = config.get("rope_local_base_freq", _LOCAL_THETA)
        else:  # transformers 5 gives OLMo 3's layers with a window the default, whatever ``rope_theta`` is
            window_theta = _THETA_DEFAULTS["olmo3"]
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


def _beside(config: Config) -> tuple[Any, Any]:
    """Base and rotated part of a head where the rotary parameters do not name them."""
    family = config.get("model_type", "")
    theta, part = _OLD_NAMES.get(family, ("rope_theta", "partial_rotary_factor"))
    return (
        config.get(theta, _THETA_DEFAULTS.get(family, 10000.0)),
        config.get(part, _PARTIAL_DEFAULTS.get(family, 1.0)),
    )


def _filled(given: dict[str, Any], theta: Any, part: Any, config: Config) -> dict[str, Any]:
    """Parameters of one kind of layer, with all that transformers adds to them when it loads the config.

    ``theta`` (base) and ``part`` (rotated part of a head) are used where ``given`` has none.
    """
    family = config.get("model_type", "")
    rope = {"rope_type": given.get("type", "default"), "rope_theta": theta, "partial_rotary_factor": part, **given}
    rope.pop("type", None)  # transformers 5 keeps the older name of rope_type beside it
    rope["rope_type"] = _RENAMED_TYPES.get(family, {}).get(str(rope["rope_type"]), rope["rope_type"])
    if isinstance(rope["rope_theta"], int):
        rope["rope_theta"] = float(rope["rope_theta"])
    if rope["rope_type"] in _NEEDS_ORIGINAL_LENGTH:
        rope.setdefault("original_max_position_embeddings", _positions(config))
        # One beside the parameters, as Phi-3's, counts more.
        beside = config.get("original_max_position_embeddings", _ORIGINAL_LENGTH_DEFAULTS.get(family))
        if beside is not None:
            rope["original_max_position_embeddings"] = beside
    if rope["partial_rotary_factor"] in (None, 1.0) and family not in _PARTIAL_DEFAULTS:
        del rope["partial_rotary_factor"]  # the same as none
    # Some types take their factor from the number of positions, or begin to scale beyond them.
    scales_by_positions = rope["rope_type"] in ("yarn", "longrope") and rope.get("factor") is None
    positions = _positions(config) if scales_by_positions or rope["rope_type"] == "dynamic" else None
    return rope if positions is None else {**rope, POSITIONS: positions}


def _positions(config: Config) -> Any:
    return config.get(POSITIONS, _POSITIONS_DEFAULTS.get(config.get("model_type", "")))


def with_rope(config: Config, rope: dict[str, Any]) -> Config:
    """The config with other rotary parameters, one of the results of ``rope_of``."""
    length = "original_max_position_embeddings"
    kept = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    beside = [POSITIONS]
    if length in config or config.get("model_type") in _ORIGINAL_LENGTH_DEFAULTS:  # there it counts more
        beside.append(length)
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

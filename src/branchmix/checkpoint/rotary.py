"""Rotary parameters of a config, in one form whichever transformers wrote it."""

from __future__ import annotations

from typing import Any

from branchmix.checkpoint.families import Config
from branchmix.errors import CheckpointError


def rope_of(config: Config) -> dict[str, Any]:
    """Rotary parameters in transformers 5's form, from its config or an older one."""
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key) or {}, dict):
            raise CheckpointError(
                f"config.json: {key} is {config[key]!r}, not a mapping: copy the model's own config here"
            )
    if config.get("rope_parameters"):
        return _number_types(dict(config["rope_parameters"]))
    scaling = dict(config.get("rope_scaling") or {})
    rope: dict[str, Any] = {"rope_type": scaling.pop("type", scaling.pop("rope_type", "default"))}
    rope["rope_theta"] = config.get("rope_theta", config.get("rotary_emb_base", 10000.0))
    for old in ("partial_rotary_factor", "rotary_pct"):
        if config.get(old) is not None:
            rope["partial_rotary_factor"] = config[old]
    return _number_types({**rope, **scaling})


def _number_types(rope: dict[str, Any]) -> dict[str, Any]:
    return {
        key: float(value) if isinstance(value, int) and key == "rope_theta" else value for key, value in rope.items()
    }

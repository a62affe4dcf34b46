"""What transformers makes of configs: do two compute the same function of their weights, can it build the model?

Configs are compared after the family's config class has read them: a key that only one file has, an older spelling,
null, or another name of the same activation is not a difference. Importing transformers imports torch (3 s, 250 MB),
which the config classes do not need. So a short-lived process without torch reads the configs (1 s, 50 MB), and none is
started where the files agree, or where transformers is loaded anyway.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from branchmix.checkpoint.families import Config, dimensions, read_table
from branchmix.checkpoint.index import CheckpointIndex
from branchmix.checkpoint.rotary import rope_of
from branchmix.errors import BranchMixError, CompatibilityError
from branchmix.upcycling.sources import SAME_SEED, who

_TABLE: dict[str, Any] = read_table(Path(__file__).with_name("config_keys.yaml"))
_IGNORED = frozenset(_TABLE["without_effect"].split())

_SAME_ACTIVATION = {
    "swish": "silu",
    "gelu_python": "gelu",
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), "gelu_pytorch_tanh"),
}
"""Names of one function in transformers: their values differ by rounding alone."""

_READERS = ("masking_utils.py", "cache_utils.py")
"""Code of transformers that reads keys of every family's config, beside the family's own modeling file."""

_FILLS_LAYER_TYPES = {"max_window_layers", "sliding_window_pattern", "no_rope_layer_interval"}
"""Keys that config classes read only to fill in lists of one entry a layer, which are compared themselves."""

_CHILD = """
import sys
sys.path[:] = {path!r}
sys.modules["torch"] = None
from branchmix.upcycling.transformers_view import serve
serve()
"""


def config_differences(seed: Config, experts: dict[str, Config]) -> dict[str, list[str]]:
    """Differences that make an expert compute another function of its weights than the seed, by the expert's name.

    Under ``seed``: why transformers cannot read the seed's config. The experts are of its family, and their configs fit
    their weights.
    """
    others = {name: config for name, config in experts.items() if _relevant(config) != _relevant(seed)}
    if not others:
        return {}
    texts = tuple(json.dumps(config, sort_keys=True) for config in (seed, *others.values()))
    read = dict(zip(("seed", *others), _read(texts), strict=True))
    problems = {
        name: [f"transformers cannot read config.json: {config['error']}"]
        for name, config in read.items()
        if "error" in config
    }
    for name in others.keys() - problems.keys() if "seed" not in problems else ():
        lists = dimensions(seed).num_layers == dimensions(others[name]).num_layers
        problems[name] = _differences(read["seed"], read[name], lists=lists)
    return problems


def _relevant(config: Config) -> Config:
    """What makes the function; of other numbers and words only the type, which the config's class may refuse."""
    return {
        key: type(value).__name__ if key in _IGNORED and not isinstance(value, dict | list) else value
        for key, value in config.items()
    }


def _differences(ours: dict[str, Any], theirs: dict[str, Any], *, lists: bool) -> list[str]:
    """One line for each key; without ``lists`` of one entry a layer, where the number of layers differs anyway."""
    problems = []
    ignored = {*_IGNORED, *_FILLS_LAYER_TYPES}
    if not any(config["values"].get("use_sliding_window", True) for config in (ours, theirs)):
        ignored.add("sliding_window")
    for key in sorted({*ours["values"], *theirs["values"]} - ignored):
        mine, other = (config["values"].get(key) for config in (ours, theirs))
        if _plain(mine) == _plain(other) or (not lists and isinstance(mine, list)):
            continue
        words = [_words(key, config) for config in (theirs, ours)]
        problems.append(
            f"{key} is {words[0]}, but the seed's is {words[1]}: the two compute different functions of their weights, "
            f"{SAME_SEED}"
        )
    return problems


def _words(key: str, config: dict[str, Any]) -> str:
    if key not in config["values"]:
        return "not set"
    text = json.dumps(config["values"][key], default=str)
    text = text if len(text) <= 60 else text[:57] + "..."
    return text if key in config["stated"] else f"{text} (filled in by transformers)"


def _plain(value: Any) -> Any:
    """One value for what is the same: no value and false, and the names of an activation."""
    return _SAME_ACTIVATION.get(value, value) if isinstance(value, str) else None if value is False else value


@cache
def _read(texts: tuple[str, ...]) -> list[dict[str, Any]]:
    """What transformers makes of configs, in a process without torch unless transformers is loaded here already."""
    if "transformers" in sys.modules:
        return [as_transformers_reads(json.loads(text)) for text in texts]
    done = subprocess.run(
        [sys.executable, "-c", _CHILD.format(path=sys.path)],
        input="\n".join(texts),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        raise BranchMixError(f"transformers cannot be loaded to compare the configs: {reason}: install it again")
    return list(json.loads(done.stdout))


def serve() -> None:
    """Configs from stdin, one a line; what transformers makes of them to stdout, as one JSON list."""
    configs = [json.loads(line) for line in sys.stdin]
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints goes elsewhere
    json.dump([as_transformers_reads(config) for config in configs], answers, default=str)


def transformers_config(config: Config) -> Any:
    """transformers' config of a config.json, in which infinity is spelt as a mapping (as Granite's hybrids have it)."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[config["model_type"]].from_dict(dict(PreTrainedConfig._decode_special_floats(config)))


def as_transformers_reads(config: Config) -> dict[str, Any]:
    """``values`` of all keys that transformers' code reads, which of them are ``stated`` in ``config``; or ``error``.

    A key that the family's class does not declare counts only where the family's code, or what all families share,
    names it: trainers leave many keys in config.json that nothing reads.
    """
    import dataclasses

    import transformers

    try:
        read = transformers_config(config)
        made = json.loads(json.dumps(read.to_dict(), default=str))
    except Exception as error:  # whatever its checks raise
        lines = [line.strip() for line in str(error).strip().splitlines()]
        return {"error": (lines or [type(error).__name__])[-1][:300]}
    declared = {field.name for field in dataclasses.fields(read)}
    own = Path(sys.modules[type(read).__module__].__file__ or "")
    shared = [Path(transformers.__file__).parent / name for name in _READERS]
    code = "\n".join(
        file.read_text(encoding="utf-8")
        for file in (own.with_name(own.name.replace("configuration_", "modeling_")), *shared)
        if file.is_file()
    )
    values = {
        key: value
        for key, value in made.items()
        if key in declared or re.search(rf"""\bconfig\.{re.escape(key)}\b|["']{re.escape(key)}["']""", code)
    }
    stated = sorted({read.attribute_map.get(key, key) for key in config} & values.keys())
    return {"values": values, "stated": stated}


# ---- Can transformers build a model at all? A mixture of what it cannot build could never be loaded. ----

ATTENTION_KEYS = ("attn_implementation", "_attn_implementation")
"""Where a config may ask for an attention kernel."""


def require_buildable(models: Iterable[tuple[str, CheckpointIndex | None]]) -> None:
    """Refuse, before anything is written, models of which transformers could not load a mixture.

    transformers itself is asked: it builds each model without weights. That costs seconds and hundreds of megabytes for
    the imports alone, so it is only asked about configs with something out of the ordinary: a key or a kind of value
    that most decoders do not have.

    Raises:
        CompatibilityError: with transformers' reasons, each only once.
    """
    problems: dict[str, str] = {}
    for name, index in models:
        if index is not None and not is_ordinary(index.config) and (problem := _build_problem(index.config)):
            problems.setdefault(problem, f"{who(name)}: {problem}")
    if problems:
        raise CompatibilityError(problems.values())


def _build_problem(config: Config) -> str | None:
    again = "correct its config.json, or copy the model's own there"
    for key in ATTENTION_KEYS:
        if "/" in str(config.get(key)):
            return f"{key} is {config[key]}, code on the Hub, which is never run: remove the key from config.json"
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

    try:
        fields = PreTrainedConfig._decode_special_floats({k: v for k, v in config.items() if k != "auto_map"})
        built = AutoConfig.for_model(fields.pop("model_type"), **fields)
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(built, trust_remote_code=False)
    except Exception as error:  # every family and its validators have their own kinds
        reason = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
        if isinstance(error, KeyError) and " " not in reason:
            reason = f"it has no {reason!r}"
        asked = next((key for key in ATTENTION_KEYS if config.get(key)), None)
        if asked is not None and isinstance(error, (ImportError, ValueError)):
            again = f"install what {asked} {config[asked]!r} needs, or remove that key from config.json"
        reason = reason.rstrip(".:") if len(reason) <= 300 else reason[:297] + "..."
        return f"transformers cannot build the model of its config.json: {reason}: {again}"
    return None


# ---- What is ordinary. The values are those of JSON, whose whole numbers are never of type bool. ----


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 0


_ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "relu2")
_KINDS: dict[str, Callable[[Any], bool]] = {
    "any": lambda value: True,
    "flag": lambda value: isinstance(value, bool),
    "mapping": lambda value: isinstance(value, dict),
    "number": _number,
    "whole": _whole,
    "tokens": lambda value: _whole(value) or (isinstance(value, list) and all(map(_whole, value))),
    "real": lambda value: type(value) is float and math.isfinite(value),
    "real to 1": lambda value: type(value) is float and 0 <= value <= 1,
    "share": lambda value: _number(value) and 0 <= value < 1,
    "activation": lambda value: value in _ACTIVATIONS,
    "dtype": lambda value: value in ("float32", "float16", "bfloat16"),
    "attention": lambda value: value in ("eager", "sdpa"),
}
_KEYS = {key: kind for kind, keys in _TABLE["ordinary"].items() for key in keys.split()}
"""Keys that most decoders have, with the kind of their values, such as ``whole or null``."""


_SCALINGS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""Rope types that are numbers alone, with those that they need."""
_SCALED = ("llama", "mistral", "qwen2", "qwen3")
"""Families that take each of them."""


def is_ordinary(config: Config) -> bool:
    """Whether transformers will certainly build the model of a config.json whose sizes fit its weights."""
    for key, value in config.items():
        kind, or_null, _ = _KEYS.get(key, "").partition(" or null")
        if kind not in _KINDS or not ((or_null and value is None) or _KINDS[kind](value)):
            return False
    sizes, rope, kinds = dimensions(config), rope_of(config), config.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and len(kinds) == sizes.num_layers):
        return False
    return (
        set(map(str, kinds or ())) <= {"full_attention", "sliding_attention"}
        and (config.get("pad_token_id") or 0) < sizes.vocab_size
        and not (sizes.head_dim % 2 or sizes.hidden_size % sizes.num_heads)
        and all(_ordinary_rope(given, config) for given in ([rope] if "rope_theta" in rope else rope.values()))
    )


def _ordinary_rope(rope: Any, config: Config) -> bool:
    kind = rope.get("rope_type")
    if not _number(rope.get("rope_theta")) or rope["rope_theta"] <= 0:
        return False
    if kind == "default":
        return _number(rope.get("partial_rotary_factor", 1.0))
    numbers = all(_number(value) and value > 0 for key, value in rope.items() if key != "rope_type")
    needed = _SCALINGS.get(str(kind))
    return numbers and needed is not None and config["model_type"] in _SCALED and all(key in rope for key in needed)

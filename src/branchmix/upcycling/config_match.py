"""Do two configs of one family compute the same function of their weights, as transformers reads them?

Configs are compared after the family's config class has read them: a key that only one file has, an older spelling,
null, or another name of the same activation is not a difference. Importing transformers imports torch (3 s, 250 MB),
which the config classes do not need. So a short-lived process without torch reads the configs (1 s, 50 MB), and none is
started where the files agree, or where transformers is loaded anyway.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from branchmix.checkpoint.families import Config, dimensions
from branchmix.errors import BranchMixError
from branchmix.upcycling.sources import SAME_SEED

# Keys that do not change what a model computes from its weights, or that have a check of their own.
_IGNORED = frozenset(
    """
    _name_or_path name_or_path architectures transformers_version torch_dtype dtype use_cache initializer_range
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
    attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop dropout layerdrop activation_dropout
    residual_dropout embedding_dropout classifier_dropout resid_dropout attn_dropout
    id2label label2id num_labels auto_map output_attentions output_hidden_states return_dict problem_type
    chunk_size_feed_forward task_specific_params pretraining_tp gradient_checkpointing
    tie_word_embeddings vocab_size rope_theta rope_scaling rope_parameters rotary_emb_base partial_rotary_factor
    rotary_pct rope_local_base_freq max_position_embeddings original_max_position_embeddings model_type model_max_length
    hidden_size n_embd num_hidden_layers n_layer num_attention_heads n_head num_key_value_heads num_kv_heads
    intermediate_size n_inner ffn_dim ffn_hidden_size head_dim n_positions n_ctx
    temperature top_p top_k do_sample max_length min_length repetition_penalty num_beams
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    _attn_implementation_autoset attn_implementation unsloth_version unsloth_fixed
    """.split()
)

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
from branchmix.upcycling.config_match import serve
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
    if "seed" not in problems:
        for name, config in others.items():
            if name not in problems:
                lists = dimensions(seed).num_layers == dimensions(config).num_layers
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

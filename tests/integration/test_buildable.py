"""Models that transformers cannot build are refused, and it is asked only where that is not plain from the config."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import branchmix
from bad_inputs import config as edit_config
from branchmix.checkpoint.index import CheckpointIndex
from branchmix.checkpoint.rotary import rope_of
from branchmix.errors import BranchMixError, CompatibilityError
from branchmix.upcycling.transformers_view import _KEYS, is_ordinary, require_buildable
from families import BY_NAME
from mixtures import recipe

Siblings = Callable[..., dict[str, Path]]
VALUES = [None, -1, 0, 1, 2, 3, 97, 1.5, float("inf"), True, "x", "silu", "float16", [0], ["full_attention"] * 2, {}]
ROPES: list[dict[str, Any]] = [
    {"rope_type": kind, "rope_theta": theta, **scaling}
    for kind in ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "su", "foo")
    for theta in (1e4, 10000, None, "1e4")
    for scaling in ({}, {"factor": 2.0}, {"factor": None}, {"factor": 2.0, "low_freq_factor": 1, "high_freq_factor": 4})
]


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "phi3", "gpt2", "gpt-neox", "gemma", "cohere"])
def test_what_is_taken_as_ordinary_can_be_built(name: str) -> None:
    """One key at a time gets a value of every kind: transformers builds whatever it is not asked about."""
    known = {k: v for k, v in json.loads(BY_NAME[name].config().to_json_string()).items() if k in _KEYS}
    assert is_ordinary(known)
    changed = [(key, value) for key in known if key != "model_type" for value in VALUES]
    changed += [("rope_parameters", rope) for rope in ROPES if "rope_parameters" in known]
    changed += [("attn_implementation", word) for word in ("eager", "sdpa", "flash_attention_2", "strange")]
    counts, wrong = {True: 0, False: 0}, []
    for key, value in changed:
        fields = json.loads(json.dumps({**known, key: value}))
        try:
            rope_of(fields)
            ordinary = is_ordinary(fields)
        except BranchMixError:
            continue  # refused before transformers would be asked
        counts[ordinary] += 1
        if ordinary and fields != known:
            try:
                built = AutoConfig.for_model(fields.pop("model_type"), **fields)
                with torch.device("meta"):
                    AutoModelForCausalLM.from_config(built)
            except Exception as error:  # whatever a family raises
                wrong.append((key, value, f"{type(error).__name__}: {error}"))
    assert not wrong, wrong
    assert counts[True] > 20 and counts[False] > 100


def test_what_all_share_is_told_once() -> None:
    config = {**json.loads(BY_NAME["llama"].config().to_json_string()), "hidden_act": "strange"}
    other = {**config, "rms_norm_eps": "small"}
    models = (("seed", config), ("a", config), ("b", other))
    with pytest.raises(CompatibilityError) as refused:
        require_buildable([(name, CheckpointIndex(Path(), content, {}, ())) for name, content in models])
    assert [line.split(":")[0] for line in refused.value.problems] == ["seed", "expert 'b'"]


def test_an_ordinary_merge_imports_neither_torch_nor_transformers(siblings: Siblings, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(recipe(siblings("llama"))))
    code = (
        "import sys, branchmix\n"
        f"branchmix.upcycle({str(tmp_path / 'recipe.json')!r}, {str(tmp_path / 'mixture')!r})\n"
        "assert not {'torch', 'transformers', 'tokenizers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unusual_but_sound(siblings: Siblings, tmp_path: Path) -> None:
    """A key that transformers does not know either is no reason to refuse."""
    models = siblings("llama")
    for path in models.values():
        edit_config(path, some_trainers_note={"a": 1})
    assert branchmix.upcycle(recipe(models), tmp_path / "mixture").written is not None

"""A checkpoint's own Python code is never run unasked, whatever somebody answers on the terminal."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import branchmix
from bad_inputs import tokenizer
from branchmix.errors import RecipeError
from branchmix.upcycling.verify import sample_tokens
from mixtures import recipe

CODE = "from pathlib import Path\nPath({mark!r}).touch()\nclass Words: pass\n"


@pytest.fixture
def models(
    siblings: Callable[..., dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Path]:
    """Siblings whose tokenizer is code that leaves a mark; a person at the terminal says yes to everything."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    found = {}
    for name, folder in siblings("llama").items():
        found[name] = shutil.copytree(folder, tmp_path / name)
        tokenizer(found[name])
        settings = {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": ["words.Words", None]}}
        (found[name] / "tokenizer_config.json").write_text(json.dumps(settings))
        (found[name] / "words.py").write_text(CODE.format(mark=str(tmp_path / "it ran")))
    return found


def test_not_for_routers_from_prompts(models: dict[str, Path], tmp_path: Path) -> None:
    prompts = {name: ["0"] for name in models}
    with pytest.raises(RecipeError, match=r"router_init: the seed has no tokenizer .* code of its own"):
        branchmix.upcycle(recipe(models, router_init={"method": "hidden", "prompts": prompts}), tmp_path / "out")
    assert not (tmp_path / "it ran").exists()


def test_not_for_the_proof(models: dict[str, Path], tmp_path: Path) -> None:
    """Random ids take the text's place."""
    assert sample_tokens(models["seed"], 97).shape == (1, 48)
    assert not (tmp_path / "it ran").exists()

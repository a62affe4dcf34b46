"""Models by Hub id, from a cache as huggingface_hub lays it out: nothing here needs a network."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

from branchmix.checkpoint.hub import resolve
from branchmix.errors import CheckpointError

Siblings = Callable[..., dict[str, Path]]
OLD, NEW = "0123456789abcdef0123456789abcdef01234567", "fedcba9876543210fedcba9876543210fedcba98"


def publish(cache: Path, repo: str, folder: Path, commit: str, *refs: str) -> None:
    """Put a folder into the cache as a downloaded snapshot: blobs by hash, links to them, and named revisions."""
    home = cache / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    for place in (home / "blobs", home / "refs", snapshot):
        place.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        content = file.read_bytes()
        # As on the Hub: large files go by their sha256, small ones by git's sha1.
        name = hashlib.new("sha256" if file.suffix == ".safetensors" else "sha1", content).hexdigest()
        shutil.copyfile(file, home / "blobs" / name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / name)
    for ref in refs:
        (home / "refs" / ref).write_text(commit)


@pytest.fixture
def cache(siblings: Siblings, tmp_path: Path) -> Path:
    """org/seed, and org/code with an old revision v1 (the sibling math) and a new main."""
    models, place = siblings("llama"), tmp_path / "home" / "hub"
    publish(place, "org/seed", models["seed"], OLD, "main")
    publish(place, "org/code", models["math"], OLD, "v1")
    publish(place, "org/code", models["code"], NEW, "main")
    return place


def run(cache: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: huggingface_hub reads its settings at import."""
    settings = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    settings |= {"HF_HOME": str(cache.parent), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "branchmix", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=settings, cwd=cache.parent.parent)


def write(folder: Path, **recipe: Any) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def test_ids_and_revisions(cache: Path, siblings: Siblings, tmp_path: Path) -> None:
    experts = [{"name": "new", "model": "org/code"}, {"name": "old", "model": "org/code@v1"}]
    recipe = write(tmp_path, seed=f"org/seed@{OLD}", experts=experts)
    done = run(cache, "upcycle", recipe, "out", "--json")
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out" / "model.safetensors")
    for number, name in enumerate(("seed", "code", "math")):
        dense = load_file(siblings("llama")[name] / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        assert torch.equal(found[f"model.model.layers.0.mlp.experts.{number}.up_proj.weight"], dense)

    sources = json.loads((tmp_path / "out" / "branchmix.json").read_text())["sources"]
    assert [source["revision"] for source in sources] == [OLD, NEW, OLD]
    assert [source["model"] for source in sources] == [f"org/seed@{OLD}", "org/code", "org/code@v1"]
    for source, name in zip(sources, ("seed", "code", "math"), strict=True):
        content = (siblings("llama")[name] / "model.safetensors").read_bytes()
        assert source["files"][0]["sha256"] == hashlib.sha256(content).hexdigest()
    card = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert card["base_model"] == ["org/seed", "org/code"]

    added = run(cache, "add-expert", "out", "again=org/code@v1", "more", "--json")
    assert added.returncode == 0, added.stderr
    change = json.loads((tmp_path / "more" / "branchmix.json").read_text())["changes"][0]["added"]
    assert (change["expert"]["model"], change["expert"]["revision"]) == ("org/code@v1", OLD)
    assert json.loads(run(cache, "inspect", "org/code@v1", "--json").stdout)["model_type"] == "llama"


def test_a_folder_goes_before_the_hub(cache: Path, siblings: Siblings, tmp_path: Path) -> None:
    shutil.copytree(siblings("llama")["math"], tmp_path / "org" / "code")
    recipe = write(tmp_path, seed="org/seed", experts=[{"name": "code", "model": "org/code"}])
    assert run(cache, "upcycle", recipe, "out").returncode == 0
    sources = json.loads((tmp_path / "out" / "branchmix.json").read_text())["sources"]
    assert [source["revision"] for source in sources] == [OLD, None]


@pytest.mark.parametrize("given", ["org/nowhere", "org/code@v2", "nowhere", "./org/code", "org/a--b", "org/a..b"])
def test_what_is_not_there_is_one_line(given: str, cache: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path, seed="org/seed", experts=[{"name": "code", "model": given}])
    done = run(cache, "upcycle", recipe, "out")
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    assert len(done.stderr.splitlines()) == 1 and given in done.stderr and "error: " in done.stderr
    assert "no such folder" in done.stderr


def test_a_half_downloaded_model_is_told(cache: Path, tmp_path: Path) -> None:
    (cache / "models--org--code" / "snapshots" / NEW / "model.safetensors").unlink()
    recipe = write(tmp_path, seed="org/seed", experts=[{"name": "code", "model": "org/code"}])
    done = run(cache, "upcycle", recipe, "out")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "'code'" in done.stderr and "finish the download" in done.stderr


def test_weights_that_stand_there_twice_are_fetched_once(siblings: Siblings, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Mistral's repositories, and in those with exports for other tools."""
    there = ["config.json", "LICENSE", "consolidated.safetensors", "model-00001-of-00002.safetensors"]
    there += ["onnx/model.safetensors", "original/consolidated.00.safetensors", "adapter_model.safetensors"]
    fetched: list[str] = []

    def snapshot_download(name: str, *, revision: str | None, **patterns: list[str]) -> str:
        fetched.extend(filter_repo_objects(there, **patterns))
        return str(siblings("llama")["seed"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    resolve("org/mistral")
    assert fetched == ["config.json", "LICENSE", "model-00001-of-00002.safetensors", "adapter_model.safetensors"]


def test_local_paths_start_from_the_recipes_folder(siblings: Siblings, tmp_path: Path) -> None:
    assert resolve("seed", siblings("llama")["seed"].parent).folder == siblings("llama")["seed"]
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve("seed", tmp_path)

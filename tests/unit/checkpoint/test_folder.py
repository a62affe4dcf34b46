"""A replacement that is killed at any point: the name always has a whole model, or the next start gives it one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from branchmix.checkpoint import folder as folders
from branchmix.checkpoint.folder import (
    atomic_folder,
    holds_model,
    put_back,
    require_replaceable,
    stale_folders,
)
from branchmix.errors import OutputError

CONFIG = '{"model_type": "%s"}'

RUN = """
import os, shutil, signal, sys
from pathlib import Path
from branchmix.checkpoint import folder as folders
from branchmix.checkpoint.folder import atomic_folder

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def killing(function, at, when):
    calls = [0]
    def call(*args, **options):
        calls[0] += 1
        if calls[0] == at and when == "before":
            kill()
        found = function(*args, **options)
        if calls[0] == at and when == "after":
            kill()
        return found
    return call

kind, at, when = sys.argv[2], int(sys.argv[3]), sys.argv[4]
if kind == "exchange":
    folders.exchange = killing(folders.exchange, at, when)
elif kind == "fallback":
    folders.exchange = lambda first, second: False
    os.rename = killing(os.rename, at, when)
else:
    os.unlink = killing(os.unlink, at, when)
    shutil.rmtree = lambda *args, **options: kill()
with atomic_folder(Path(sys.argv[1]), force=True) as folder:
    (folder / "model.safetensors").write_text("new")
    (folder / "config.json").write_text('{"model_type": "new"}')
"""


def killed(out: Path, kind: str, at: int, when: str) -> None:
    out.mkdir()
    (out / "ema").mkdir()
    for folder in (out, out / "ema"):
        (folder / "config.json").write_text(CONFIG % "old")
        (folder / "model.safetensors").write_text("old")
    done = subprocess.run([sys.executable, "-c", RUN, str(out), kind, str(at), when], check=False)
    assert done.returncode == -signal.SIGKILL


def model_in(folder: Path) -> str:
    weights = (folder / "model.safetensors").read_text()
    assert (folder / "config.json").read_text() == CONFIG % weights
    return weights


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
@pytest.mark.parametrize(
    ("kind", "at", "when", "now"),
    [
        ("exchange", 1, "before", "old"),
        ("exchange", 1, "after", "new"),
        ("fallback", 1, "before", "old"),
        ("fallback", 1, "after", None),
        ("fallback", 2, "before", None),
        ("fallback", 2, "after", "new"),
        ("removal", 1, "after", "new"),
    ],
)
def test_killed_while_it_replaces(tmp_path: Path, kind: str, at: int, when: str, now: str | None) -> None:
    out = tmp_path / "mixture"
    killed(out, kind, at, when)
    assert (model_in(out) if out.exists() else None) == now
    kept = {model_in(folder) for folder in stale_folders(out) if holds_model(folder)}
    assert {"old", "new"} == kept | {now} - {None} or kind == "removal", "one of both is lost"
    assert put_back(out) == (now is None)
    assert model_in(out) == (now or "old")
    with pytest.raises(OutputError, match="exists already"):
        require_replaceable(out, force=False)
    assert not put_back(out)
    for folder in stale_folders(out):
        if holds_model(folder):
            model_in(folder)  # whole
        elif kind == "removal":  # half removed: neither it nor a model within it
            assert not (folder / "config.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_the_next_start_puts_the_old_one_back(tmp_path: Path) -> None:
    """Also where it is not asked for by name: whatever writes to this place gives it back first."""
    out = tmp_path / "mixture"
    killed(out, "fallback", 1, "after")
    with pytest.raises(OutputError, match="exists already"), atomic_folder(out, force=False):
        raise AssertionError("must not get here")
    assert model_in(out) == "old"
    with atomic_folder(out, force=True) as folder:
        (folder / "model.safetensors").write_text("newest")
        (folder / "config.json").write_text(CONFIG % "newest")
    assert model_in(out) == "newest"
    (left,) = stale_folders(out)
    assert model_in(left) == "new"


def test_a_living_process_keeps_what_it_moved_aside(tmp_path: Path) -> None:
    aside = tmp_path / f".mixture.replaced-{os.getppid()}-00"
    aside.mkdir()
    (aside / "config.json").write_text(CONFIG % "old")
    assert not put_back(tmp_path / "mixture") and not stale_folders(tmp_path / "mixture") and aside.exists()


def test_a_removal_begins_with_what_makes_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models within it included: a moving average has a config of its own."""
    folder = tmp_path / "model"
    for inner in (folder, folder / "ema"):
        inner.mkdir()
        for name in (*folders.MAKES_A_MODEL, "model-00001-of-00002.safetensors"):
            (inner / name).touch()
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: None)
    folders.discard(folder)
    left = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert left == ["ema/model-00001-of-00002.safetensors", "model-00001-of-00002.safetensors"]


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="no exchange there")
def test_exchange_is_one_step_here(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    if not folders.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system has no exchange")
    assert [(tmp_path / name / "file").read_text() for name in "ab"] == ["b", "a"]
    with pytest.raises(FileNotFoundError):
        folders.exchange(tmp_path / "a", tmp_path / "none")


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """With --force too, where it is not a checkpoint; without, the loser of two runs learns why."""
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=r"out: .*no config\.json"), atomic_folder(out, force=True):
        out.mkdir()
        (out / "thesis.tex").write_text("precious")
    assert (out / "thesis.tex").exists()
    with pytest.raises(OutputError, match="out2: exists already: choose another folder"):  # noqa: SIM117
        with atomic_folder(tmp_path / "out2", force=False), atomic_folder(tmp_path / "out2", force=False) as winner:
            (winner / "config.json").touch()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "out2"]


def test_errors_name_the_output_and_not_the_temporary_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError) as raised, atomic_folder(out, force=False) as folder:
        raise OutputError(f"{folder / 'model.safetensors'}: the disk is full")
    assert str(raised.value) == f"{out / 'model.safetensors'}: the disk is full"


@pytest.mark.skipif(os.name == "nt", reason="links")
def test_a_link_to_itself_is_not_an_output(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for out in (loop, loop / "inner"):
        for act in (require_replaceable, put_back):
            with pytest.raises(OutputError, match="symbolic links: choose another name"):
                act(out, force=False) if act is require_replaceable else act(out)


def test_a_run_that_is_started_anew_is_removed_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut short anywhere: no model is left, and the folder is still known as a run's, so the same command works."""
    from branchmix.train.config import RunConfig
    from branchmix.train.run_folder import RunFolder
    from branchmix.train.run_folder import shutil as removal

    settings = {"model": "m", "out": str(tmp_path / "run"), "data": {"text": {"files": "x"}}, "budget": {"steps": 1}}
    folder = RunFolder(RunConfig.model_validate({**settings, "learning_rate": {"peak": 1e-3}}))
    names = ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "tokenizer.json"]
    (tmp_path / "run" / "ema").mkdir(parents=True)
    for name in names:
        (tmp_path / "run" / name).touch()
    (tmp_path / "run" / "training.json").write_text('{"config": {"data": {}}}')
    real, left = Path.unlink, [0]

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    monkeypatch.setattr(removal, "rmtree", lambda path: path.rmdir())
    for _ in names:
        left[0] = 1
        with pytest.raises(KeyboardInterrupt):
            folder.clear()
        assert not (tmp_path / "run" / "config.json").exists() and folder.record() is not None
    left[0] = 1
    folder.clear()
    assert not list((tmp_path / "run").iterdir())

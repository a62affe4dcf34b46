"""The prize's files: verified, and fetched from the Hub or a folder; nothing wrong ever gets an official name."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError

from branchmix.errors import DataError, OutputError
from branchmix.scaling import official
from branchmix.scaling.official import check, fetch, verify
from branchmix.scaling.tasks import TASKS
from hub_server import environment_for, served

CONTENTS = {name: f'{{"prompt":"{name}"}}\n'.encode() * 3 for name in ("neqa", "redefine", "memo-trap")}
"""Three tasks whose files we may have in a test."""


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of the 11, as if the three were all, with other contents."""
    made = {
        name: replace(TASKS[name], bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        for name, content in CONTENTS.items()
    }
    monkeypatch.setattr(official, "TASKS", made)


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    folder = tmp_path / "mirror"
    folder.mkdir()
    for name, content in CONTENTS.items():
        (folder / TASKS[name].file).write_bytes(content)
    return folder


def states(folder: Path) -> dict[str, str]:
    return {file.task: file.state for file in verify(folder)}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_verify_says_what_is_wrong(tmp_path: Path) -> None:
    for name, content in (("neqa", b"short\n"), ("redefine", b"x" * 202277), ("sig-figs", b"version https://git-lfs")):
        (tmp_path / TASKS[name].file).write_bytes(content)
    found = {file.task: file for file in verify(tmp_path)}
    assert list(found) == list(TASKS)
    assert found["memo-trap"].line == "missing     memo-trap_classification.jsonl"
    assert found["neqa"].line == "wrong size  neqa_classification.jsonl: 6 bytes instead of 84,046"
    assert found["redefine"].state == "wrong hash" and "instead of 4ca8573039b0" in found["redefine"].detail
    assert found["sig-figs"].state == "wrong size" and "git lfs pull" in found["sig-figs"].detail
    with pytest.raises(DataError, match="there is no such folder"):
        verify(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is a file, not a folder"):
        verify(tmp_path / TASKS["neqa"].file)


@pytest.mark.usefixtures("tasks")
def test_line_ends_of_windows_are_named(tmp_path: Path) -> None:
    task = official.TASKS["neqa"]
    (tmp_path / "a").write_bytes(CONTENTS["neqa"].replace(b"\n", b"\r\n"))
    assert "line ends were changed to those of Windows" in check(tmp_path / "a", task).detail
    (tmp_path / "a").write_bytes(CONTENTS["neqa"])
    assert check(tmp_path / "a", task).state == "ok"


@pytest.mark.usefixtures("tasks")
def test_fetch_from_a_folder_goes_on_where_it_was(tmp_path: Path, mirror: Path) -> None:
    out = tmp_path / "deep" / "out"
    missing = mirror / TASKS["redefine"].file
    content = missing.read_bytes()
    missing.unlink()
    (mirror / TASKS["memo-trap"].file).write_bytes(b"something else")
    with pytest.raises(DataError) as caught:
        fetch(out, repository=str(mirror))
    assert str(caught.value).splitlines() == [
        f"{mirror}: has no redefine_classification.jsonl",
        f"{mirror}: its memo-trap_classification.jsonl is not the official one (14 bytes instead of 69); not kept",
    ]
    assert names(out) == {TASKS["neqa"].file}
    missing.write_bytes(content)
    (mirror / TASKS["memo-trap"].file).write_bytes(CONTENTS["memo-trap"])
    told: list[str] = []
    assert {file.state for file in fetch(out, repository=str(mirror), progress=told.append)} == {"ok"}
    assert [line.split()[0] for line in told] == ["there", "fetched", "fetched"]
    assert names(out) == {TASKS[name].file for name in CONTENTS}


@pytest.mark.usefixtures("tasks")
def test_other_files_are_replaced_only_with_force(tmp_path: Path, mirror: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / TASKS["neqa"].file).write_bytes(b"mine")
    with pytest.raises(OutputError, match="is there and is not the official file"):
        fetch(out, repository=str(mirror))
    assert names(out) == {TASKS["neqa"].file} and (out / TASKS["neqa"].file).read_bytes() == b"mine"
    fetch(out, repository=str(mirror), force=True)
    assert set(states(out).values()) == {"ok"}
    with pytest.raises(OutputError, match="File exists"):
        fetch(out / TASKS["neqa"].file, repository=str(mirror))


@pytest.mark.usefixtures("tasks")
def test_what_the_hub_answers_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    response = type("Response", (), {"headers": {}, "request": None})()

    def answer(error: Exception) -> str:
        def download(*arguments: object, **options: object) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        with pytest.raises((DataError, OutputError)) as caught:
            fetch(out, repository="org/data")
        assert not out.exists(), "an empty folder stays behind"
        return str(caught.value)

    assert "accept its terms" in answer(GatedRepoError("gated", response=response))
    assert "cannot be reached for it (LocalEntryNotFoundError)" in answer(LocalEntryNotFoundError("offline"))
    assert "cannot be reached for it (RuntimeError)" in answer(RuntimeError("the transport broke"))
    assert answer(EntryNotFoundError("404")).splitlines() == [f"org/data: has no {TASKS[n].file}" for n in CONTENTS]
    assert "the disk is full" in answer(OSError(28, "No space left on device"))


@contextmanager
def hub(files: dict[str, bytes]) -> Iterator[str]:
    """A server that answers as the Hub does for one data set."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.respond(with_body=False)

        def do_GET(self) -> None:
            self.respond(with_body=True)

        def respond(self, *, with_body: bool) -> None:
            start = "/datasets/org/data/resolve/main/"
            content = files.get(self.path.removeprefix(start)) if self.path.startswith(start) else None
            self.send_response(404 if content is None else 200)
            if content is None:
                known = self.path.startswith(start)
                self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
                self.send_header("X-Repo-Commit", "0" * 40)
            else:
                self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if with_body and content is not None:
                self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with served(Handler) as address:
        yield address


SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
from branchmix.errors import DataError
from branchmix.scaling import official
sizes = dict(zip(sys.argv[3::3], zip(sys.argv[4::3], sys.argv[5::3])))
official.TASKS = {name: replace(official.TASKS[name], bytes=int(b), sha256=h) for name, (b, h) in sizes.items()}
try:
    official.fetch(Path(sys.argv[1]), repository=sys.argv[2], progress=print)
except DataError as error:
    print(error)
"""
"""The client reads its address when it is imported, so it needs a process of its own."""


def test_fetch_through_the_hubs_own_client(tmp_path: Path) -> None:
    files = {TASKS[name].file: content for name, content in CONTENTS.items()}
    files[TASKS["memo-trap"].file] = b"something else"
    table = [str(x) for n, c in CONTENTS.items() for x in (n, len(c), hashlib.sha256(c).hexdigest())]

    def run(repository: str) -> list[str]:
        with hub(files) as address:
            environment = environment_for(address, tmp_path / "home")
            command = [sys.executable, "-c", SCRIPT, str(tmp_path / "out"), repository, *table]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=True)
            return done.stdout.splitlines()

    lines = run("org/data")
    assert lines[:2] == [f"fetched     {TASKS[name].file}" for name in ("neqa", "redefine")]
    assert lines[2].endswith("is not the official one (14 bytes instead of 69); not kept") and len(lines) == 3
    assert names(tmp_path / "out") == {TASKS[name].file for name in ("neqa", "redefine")}
    del files[TASKS["memo-trap"].file]
    assert run("org/data")[-1] == "org/data: has no memo-trap_classification.jsonl"
    assert run("org/other")[-1] == "org/other: is neither a data set on the Hub nor a folder: check --from"
    files[TASKS["memo-trap"].file] = CONTENTS["memo-trap"]
    assert [line.split()[0] for line in run("org/data")] == ["there", "there", "fetched"]
    assert (tmp_path / "out" / TASKS["memo-trap"].file).read_bytes() == CONTENTS["memo-trap"]

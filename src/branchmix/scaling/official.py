"""The prize's own files: fetched from the Hub, and compared with the sizes and hashes of the release.

They are under CC BY 4.0, whose authors ask that they stay out of training data: nothing of them is in the package.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from branchmix.checkpoint.folder import writing
from branchmix.errors import DataError, OutputError
from branchmix.scaling.tasks import TASKS, Task

REPOSITORY = "inverse-scaling-ttc/inverse_scaling_prize"
"""A data set on the Hub that has the 11 files under their official names."""


@dataclass(frozen=True)
class FileCheck:
    """One of the 11 files against the release."""

    task: str
    file: str
    state: Literal["ok", "missing", "wrong size", "wrong hash"]
    detail: str = ""
    """What was there instead."""

    @property
    def line(self) -> str:
        """``missing     neqa_classification.jsonl``, and what was there instead."""
        return f"{self.state:<10}  {self.file}{f': {self.detail}' if self.detail else ''}"


def verify(folder: Path) -> list[FileCheck]:
    """Each of the 11 files in ``folder`` against the release.

    Raises:
        DataError: the folder is none, or one of its files may not be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: {'is a file, not a folder' if folder.exists() else 'there is no such folder'}")
    return [check(folder / task.file, task) for task in TASKS.values()]


def check(path: Path, task: Task) -> FileCheck:
    """One file against the release."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return FileCheck(task.name, task.file, "missing")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    digest, wanted = hashlib.sha256(content).hexdigest(), task.sha256 or ""
    if len(content) != task.bytes:
        detail = f"{len(content):,} bytes instead of {task.bytes:,}"
        if content.startswith(b"version https://git-lfs"):
            detail = "a pointer of git-lfs, not the file itself: run `git lfs pull`"
        elif len(content.replace(b"\r\n", b"\n")) == task.bytes:
            detail += ": its line ends were changed to those of Windows"
        return FileCheck(task.name, task.file, "wrong size", detail)
    if digest != wanted:
        return FileCheck(task.name, task.file, "wrong hash", f"sha256 {digest[:12]}... instead of {wanted[:12]}...")
    return FileCheck(task.name, task.file, "ok")


def fetch(
    folder: Path,
    *,
    repository: str = REPOSITORY,
    force: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> list[FileCheck]:
    """Download what ``folder`` lacks of the 11 files, from a data set on the Hub or a local folder in its layout.

    A file gets its name once its hash is right, so a rerun after a stopped download fetches exactly what is missing.
    ``force`` replaces files of these names that are not the official ones; ``progress`` gets a line for each file.

    Raises:
        DataError: the Hub cannot be reached; or it has no file of some name or another one, a line for each.
        OutputError: a file is there that is not the official one, or the folder cannot be written.
    """
    is_new = not folder.exists()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        files = verify(folder)
        wrong = [file for file in files if file.state not in ("ok", "missing")]
        if wrong and not force:
            raise OutputError(
                f"{folder / wrong[0].file}: is there and is not the official file ({wrong[0].detail}): choose another "
                "folder, or --force to replace it"
            )
        problems = []
        for file in files:
            problem = "" if file.state == "ok" else _fetch(folder, repository, TASKS[file.task])
            if problem:
                problems.append(problem)
            else:
                progress(f"{'there' if file.state == 'ok' else 'fetched':<10}  {file.file}")
        if problems:
            raise DataError("\n".join(problems))
        return verify(folder)
    finally:
        if is_new:
            with suppress(OSError):
                folder.rmdir()  # nothing came


def _fetch(folder: Path, repository: str, task: Task) -> str:
    """Fetch one file; returns why it was not kept, if it was not."""
    with writing(folder), tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
        path = _download(repository, task.file, Path(temporary))
        if path is None:
            return f"{repository}: has no {task.file}"
        got = check(path, task)
        if got.state != "ok":
            return f"{repository}: its {task.file} is not the official one ({got.detail}); not kept"
        path.replace(folder / task.file)
    return ""


def _download(repository: str, file: str, temporary: Path) -> Path | None:
    """A file of the repository as a file of its own in ``temporary``; None if it has none of that name."""
    if Path(repository).is_dir():
        source = Path(repository) / file
        return Path(shutil.copyfile(source, temporary / file)) if source.is_file() else None
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset", local_dir=temporary))
    except errors.GatedRepoError:
        raise DataError(f"{repository}: is gated: accept its terms on the Hub, then `hf auth login`") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise DataError(f"{repository}: is neither a data set on the Hub nor a folder: check --from") from None
    except Exception as error:  # the Hub's client passes on those of its transports, too
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            return None
        unreachable = (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, ConnectionError, TimeoutError)
        if isinstance(error, OSError) and not isinstance(error, unreachable):
            raise  # the disk's
        raise DataError(
            f"{repository}: the Hub cannot be reached for it ({type(error).__name__}): check the network and "
            "HF_HUB_OFFLINE; what is here already is kept"
        ) from None

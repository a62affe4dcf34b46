"""From what a user writes for a model to a local folder: a path, or a Hub id with an optional ``@revision``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from branchmix.errors import CheckpointError

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*"]
_DOUBLED = ["consolidated*.safetensors", "*/*.safetensors"]
"""The same weights for other tools, in Mistral's own layout or in folders such as ``onnx``."""


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model is, and where it came from."""

    given: str
    folder: Path
    revision: str | None = None
    """Commit hash of a Hub model."""


def resolve(given: str, base: Path | None = None) -> ResolvedModel:
    """Find the folder of a model, downloading it from the Hub if it is not local.

    Args:
        given: a folder, relative to ``base``; or ``org/name`` or ``org/name@revision``.
        base: folder that relative paths start from.

    Raises:
        CheckpointError: no such folder, no such model, or no network.
    """
    path = expanded(given)
    local = path if path.is_absolute() or base is None else base / path
    if is_there(local):
        return ResolvedModel(given, local)
    name, _, revision = given.partition("@")
    if given.startswith((".", "/", "~")) or not _HUB_ID.match(name):
        raise CheckpointError(f"{given}: no such folder ({local}), and not a Hub id such as org/name: check the path")
    return _download(given, name, revision or None, local)


def expanded(given: str | Path) -> Path:
    """A path of a model, with the folder of a user for its ``~``; raises CheckpointError if there is no such user."""
    try:
        return Path(given).expanduser()
    except RuntimeError:
        user = Path(given).parts[0].removeprefix("~")
        raise CheckpointError(f"{given}: there is no user {user!r}: write the whole path") from None


def is_there(path: Path) -> bool:
    """Whether a file or folder has this name; False, not an error, for a name that is too long for the disk."""
    return os.path.exists(path)  # noqa: PTH110 (that of pathlib raises for such names)


def _download(given: str, name: str, revision: str | None, local: Path) -> ResolvedModel:
    from huggingface_hub import errors, snapshot_download

    nowhere = f"no such folder ({local}), and"
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED, ignore_patterns=_DOUBLED))
    except errors.GatedRepoError:
        problem = "the model is gated: accept its terms on the Hub, then `hf auth login`"
    except errors.RevisionNotFoundError:
        problem = f"the Hub's model {name} has no revision {revision!r}"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        problem = f"{nowhere} no such model on the Hub: check the name"
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        advice = "check the path, or the network and HF_HUB_OFFLINE"
        problem = f"{nowhere} the Hub cannot be reached for it ({type(error).__name__}): {advice}"
    else:
        return ResolvedModel(given, folder, folder.name)
    raise CheckpointError(f"{given}: {problem}")

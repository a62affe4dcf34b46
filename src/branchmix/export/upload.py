"""``push``: a checkpoint to the Hub, with a model card, once it is sure that it is a whole one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from branchmix.accounting import inspect
from branchmix.checkpoint.folder import TOKENIZER_FILES
from branchmix.checkpoint.index import INDEX_FILE, CheckpointIndex
from branchmix.errors import CheckpointError, OutputError, RecipeError
from branchmix.export.card import UNKNOWN, hub_card, licence_of_folder, metadata_of, without_paths
from branchmix.upcycling.execute import CODE_FILES
from branchmix.upcycling.mixture import provenance_of

README = "README.md"
OF_A_RUN = ("trainer_state.json", "optimizer.pt", "optimizer.safetensors", "scheduler.pt", "training")
"""What checkpoints of runs hold beside a model: ours and those of transformers' Trainer."""


@dataclass(frozen=True)
class Upload:
    """One file of an upload."""

    name: str
    content: Path | bytes

    @property
    def nbytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class PushReport:
    """What ``push`` uploaded, or would upload."""

    repo: str
    private: bool
    files: tuple[Upload, ...]
    card: str
    licence: str | None
    licences: dict[str, str]
    """Of the sources."""
    url: str | None
    """Of the commit; None after a dry run."""
    notes: tuple[str, ...]


def push(
    model: str | Path,
    repo: str,
    *,
    private: bool = False,
    results: str | Path | None = None,
    licence: str | None = None,
    dry_run: bool = False,
    force: bool = False,
) -> PushReport:
    """Upload a checkpoint folder to the Hugging Face Hub.

    Args:
        model: folder of a mixture, an export or a dense model.
        repo: ``org/name``; made if it does not exist.
        private: make it a private one.
        results: ``results.json`` of ``branchmix eval --out``, for the card.
        licence: the Hub's name of the upload's licence; that of the sources if all have the same.
        dry_run: check everything and tell what would be uploaded; asks no server.
        force: commit over what the repository holds; its history keeps the old files.

    Raises:
        CheckpointError: the folder is no whole checkpoint, or belongs to a run.
        OutputError: no token, no right to write there, a repository that holds something, or no network.
        RecipeError: no such form of a name, or results that are none.

    Example:
        >>> branchmix.push("mixture", "org/bam", private=True, results="results/results.json")
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo):
        raise RecipeError(f"{repo}: is no name of a Hub repository: write org/name")
    folder = Path(model)
    index = _whole(folder)
    provenance = provenance_of(folder)
    licences = _licences(provenance, ask=not dry_run)
    known = set(licences.values())
    if licence is None and len(known) == 1 and UNKNOWN not in known and not any("see its" in name for name in known):
        licence = known.pop()
    notes = [
        f"the licence of {name} is unknown: the card says so" for name, found in licences.items() if found == UNKNOWN
    ]
    if licence is None:
        notes.append("the card names no licence for the upload: --license ID sets it")
    card, own = _card(folder, repo, index, provenance, licence, licences, Path(results) if results else None)
    if own:
        notes.append(f"{folder / README} is not branchmix's and is uploaded as it is")
    files = tuple(_files(folder, index, provenance, card))
    url = None if dry_run else _upload(repo, files, private=private, force=force)
    return PushReport(repo, private, files, card, licence, licences, url, tuple(notes))


def _whole(folder: Path) -> CheckpointIndex:
    """Headers of a folder that is a whole checkpoint and nothing else.

    Raises:
        CheckpointError: it is not.
    """
    for name in OF_A_RUN:
        if (folder / name).exists():
            raise CheckpointError(
                f"{folder}: holds {name}, so it is a checkpoint of a run and not its result: push the run's folder "
                "when it is done"
            )
    if (folder / "run.json").is_file() and not (folder / "training.json").is_file():
        raise CheckpointError(f"{folder}: is a run that is not done: the same `branchmix train` finishes it")
    index = CheckpointIndex.open(folder)
    if index.config.get("model_type") in ("mixtral", "qwen2_moe", "qwen3_moe", "flex_olmo"):
        return index  # an export, which the accounting does not know; it was compared when it was written
    found = inspect(folder)
    if found.stored is not None and found.stored != found.total.total:
        raise CheckpointError(
            f"{folder}: config.json describes {found.total.total:,} parameters, but the weights hold {found.stored:,}: "
            "save the model again"
        )
    return index


def _files(folder: Path, index: CheckpointIndex, provenance: dict[str, Any] | None, card: str) -> list[Upload]:
    """Model, tokenizer, code and card: what a checkpoint is made of, by name, and nothing else of the folder."""
    is_mixture = index.config.get("model_type") == "branchmix"
    names = ["config.json", "generation_config.json", *TOKENIZER_FILES]
    if len(index.files) > 1:
        names.append(INDEX_FILE)
    files = [Upload(name, folder / name) for name in names if (folder / name).is_file()]
    files += [Upload(file.name, file) for file in index.files]
    if is_mixture:
        code = Path(__file__).parent.parent / "models"
        for name in CODE_FILES:
            files.append(Upload(name, folder / name if (folder / name).is_file() else code / name))
    if provenance is not None:
        text = json.dumps(without_paths(provenance), indent=2, ensure_ascii=False) + "\n"
        files.append(Upload("branchmix.json", text.encode()))
    files += [Upload(file.name, file) for file in sorted(folder.glob("LICENSE*")) if file.is_file()]
    return [*files, Upload(README, card.encode())]


def _card(
    folder: Path,
    repo: str,
    index: CheckpointIndex,
    provenance: dict[str, Any] | None,
    licence: str | None,
    licences: dict[str, str],
    results: Path | None,
) -> tuple[str, bool]:
    """The card, and whether it is the folder's own, which somebody wrote."""
    card = hub_card(
        folder, repo, index.config, provenance, licence=licence, licences=licences, results=results
    )  # also where it is not used: bad results are told
    readme = folder / README
    if readme.is_file():
        text = readme.read_text(encoding="utf-8", errors="replace")
        if "branchmix" not in (metadata_of(text).get("tags") or []):
            return text, True
    return card, False


def _licences(provenance: dict[str, Any] | None, *, ask: bool) -> dict[str, str]:
    """Licence of every source, from its folder, the Hub's cache, or (with ``ask``) the Hub."""
    found: dict[str, str] = {}
    for source in (provenance or {}).get("sources", []):
        model, revision = source["model"], source.get("revision")
        base = Path((provenance or {}).get("recipe", {}).get("folder") or ".")
        folder = Path(model) if Path(model).is_dir() else base / model
        licence = licence_of_folder(folder) if folder.is_dir() else None
        if licence is None and revision:
            licence = _hub_licence(model.partition("@")[0], revision, ask=ask)
        found[source["name"]] = licence or UNKNOWN
    return found


def _hub_licence(name: str, revision: str, *, ask: bool) -> str | None:
    from huggingface_hub import model_info, try_to_load_from_cache

    cached = try_to_load_from_cache(name, README, revision=revision)
    if isinstance(cached, str):
        return licence_of_folder(Path(cached).parent)
    if not ask:
        return None
    try:
        card = model_info(name, revision=revision, timeout=10).card_data
    except Exception:  # a licence that cannot be asked for is unknown; the upload itself tells what is wrong
        return None
    licence = card.get("license") if card is not None else None
    return licence if isinstance(licence, str) else None


def _upload(repo: str, files: tuple[Upload, ...], *, private: bool, force: bool) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if get_token() is None:
        raise OutputError(f"{repo}: there is no Hub token: `hf auth login`, or set HF_TOKEN to one that may write")
    api = HfApi()

    def commit() -> str:
        there: list[str] = []
        if api.repo_exists(repo):
            there = [name for name in api.list_repo_files(repo) if name != ".gitattributes"]
            if there and not force:
                raise OutputError(
                    f"{repo}: exists already and holds {len(there)} files: choose another name, or --force to commit "
                    "over them"
                )
        else:
            api.create_repo(repo, private=private)
        new = {file.name for file in files}
        # Shards of other numbers would be read beside the new ones.
        stale = [name for name in there if name not in new and name.endswith((".safetensors", INDEX_FILE))]
        operations = [
            *(CommitOperationDelete(name) for name in stale),
            *(
                CommitOperationAdd(file.name, file.content if isinstance(file.content, bytes) else str(file.content))
                for file in files
            ),
        ]
        return str(api.create_commit(repo, operations, commit_message="Upload with branchmix").commit_url)

    return _told(repo, commit)


def _told(repo: str, act: Callable[[], str]) -> str:
    """What the Hub answers, as the one line a user sees."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return act()
    except OfflineModeIsEnabled:
        raise OutputError(f"{repo}: HF_HUB_OFFLINE is set: unset it to upload") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise OutputError(
                f"{repo}: the token may not write there: use one of that account with write access"
            ) from None
        first = str(error).strip().partition("\n")[0]
        raise OutputError(f"{repo}: the Hub refused the upload: {first}") from None
    except Exception as error:
        transport = type(error).__module__.partition(".")[0].startswith("httpx")  # huggingface_hub's, of some version
        if not (transport or isinstance(error, OSError)):
            raise
        raise OutputError(f"{repo}: the Hub cannot be reached ({type(error).__name__}): check the network") from None

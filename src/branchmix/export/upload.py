"""``push``: upload a checkpoint to the Hub, with a model card, after checking that it is complete."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from branchmix import __version__
from branchmix.accounting import inspect
from branchmix.checkpoint.companions import licence_of_folder, metadata_of, rewritten, shareable, tokenizer_files
from branchmix.checkpoint.families import has_experts
from branchmix.checkpoint.hub import is_there
from branchmix.checkpoint.index import INDEX_FILE, CheckpointIndex
from branchmix.checkpoint.json_text import json_document, read_json, read_object
from branchmix.errors import BranchMixError, CheckpointError, OutputError, RecipeError, short
from branchmix.upcycling.execute import CODE_FILES
from branchmix.upcycling.mixture import provenance_of
from branchmix.upcycling.model_card import front_matter, history, method_of, source_table, sources_of, table, usage

README = "README.md"
UNKNOWN = "unknown"
_RUN_FILES = ("trainer_state.json", "optimizer.pt", "optimizer.safetensors", "scheduler.pt", "training")
"""Files that checkpoints of runs hold besides a model: ours and those of transformers' Trainer."""


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
    """What the repository is; after a dry run, what was asked for."""
    files: tuple[Upload, ...]
    card: str
    licence: str | None
    licences: dict[str, str]
    """Licences of the sources, including experts that were added later."""
    url: str | None
    """URL of the commit; None after a dry run."""
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
        private: make it a private one; a public one that exists is refused.
        results: ``results.json`` of ``branchmix eval --out``, for the card.
        licence: the Hub's name of the upload's licence; that of the sources if all have the same.
        dry_run: check everything and report what would be uploaded, without network.
        force: commit over what the repository holds; its history keeps the old files.

    Raises:
        CheckpointError: the folder is not a complete checkpoint, or belongs to an unfinished run.
        OutputError: no token, no right to write there, a repository that holds something or is public against
            ``private``, or no network.
        RecipeError: an invalid name, results that are not a results.json, or a licence or results although the user
            wrote the card.

    Example:
        >>> branchmix.push("mixture", "org/bam", private=True, results="results/results.json")
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo):
        raise RecipeError(f"{repo}: is not a valid name of a Hub repository: write org/name")
    folder = Path(model)
    index = _whole(folder)
    provenance = provenance_of(folder)
    licences = _licences(provenance, ask=not dry_run)
    card = _own_card(folder)
    if card is not None:
        unchanged = f"{folder / README} was not written by branchmix and is uploaded unchanged"
        for option, given in (("--license", licence), ("--eval", results)):
            if given is not None:
                raise RecipeError(
                    f"{option}: {unchanged}, so {option} changes nothing: write it there, or move the file away for a "
                    "new card"
                )
        named = metadata_of(card).get("license")
        licence, notes = named if isinstance(named, str) else None, [unchanged]
    else:
        known = set(licences.values())
        if not licence and len(known) == 1:  # else none is claimed
            licence = next((name for name in known if name != UNKNOWN and not name.startswith("see its")), None)
        unknown = [name for name, of_source in licences.items() if of_source == UNKNOWN]
        notes = [f"the licence of {name} is unknown: the card says so" for name in unknown]
        if not licence:
            notes.append("the card names no licence for the upload: --license ID sets it")
        of_eval = Path(results) if results else None
        card = hub_card(folder, repo, index.config, provenance, licence=licence, licences=licences, results=of_eval)
    files = tuple(_files(folder, index, provenance, card))
    notes += _notes_on_code(folder, files)
    url = None
    if not dry_run:
        url, private = _upload(repo, files, private=private, force=force)
    return PushReport(repo, private, files, card, licence, licences, url, tuple(notes))


def _whole(folder: Path) -> CheckpointIndex:
    """Headers of a folder; CheckpointError if it is not a complete checkpoint, or belongs to an unfinished run."""
    if of_run := next((name for name in _RUN_FILES if is_there(folder / name)), None):
        raise CheckpointError(
            f"{folder}: holds {of_run}, so it is a checkpoint of a run and not its result: push the run's folder when "
            "it is done"
        )
    if is_there(folder / "run.json") and not is_there(folder / "training.json"):
        raise CheckpointError(f"{folder}: is a run that is not done: the same `branchmix train` finishes it")
    index = CheckpointIndex.open(folder)
    accounting = inspect(folder)
    described, stored = accounting.total.total, accounting.stored
    if stored is not None and stored != described:
        raise CheckpointError(
            f"{folder}: config.json describes {described:,} parameters, but the weights hold {stored:,}: save the "
            "model again"
        )
    return index


def _files(folder: Path, index: CheckpointIndex, provenance: dict[str, Any] | None, card: str) -> list[Upload]:
    """Model, tokenizer, code and card, and nothing else of the folder; the code is the package's own.

    Raises CheckpointError for a link to another place, whose content might not be meant for publication.
    """
    is_mixture = index.config.get("model_type") == "branchmix"
    names = ["config.json", "generation_config.json", *tokenizer_files(folder)]
    if len(index.files) > 1:
        names.append(INDEX_FILE)
    present = [(name, folder / name) for name in names if (folder / name).is_file()]
    licences = [file for file in sorted(folder.glob("LICENSE*")) if file.is_file()]
    home = folder.resolve()
    for file in (*(file for _, file in present), *licences, folder / README):
        target = file.resolve()  # snapshots in the Hub's cache link to their blobs; weights may be anywhere
        if home not in target.parents and home.parent.parent / "blobs" != target.parent:
            raise CheckpointError(
                f"{file}: is a link to {target}, outside the folder: put the file itself here, if it is to be published"
            )
    files = [Upload(name, rewritten(file) or file) for name, file in present]
    files += [Upload(file.name, file) for file in (*index.files, *(CODE_FILES if is_mixture else ()))]
    if provenance is not None:
        files.append(Upload("branchmix.json", json_document(without_paths(provenance), allow_nan=True).encode()))
    return [*files, *(Upload(file.name, file) for file in licences), Upload(README, card.encode())]


def _notes_on_code(folder: Path, files: tuple[Upload, ...]) -> list[str]:
    """Code that the folder holds or names, and that is not uploaded."""
    notes = []
    there = {str(file.relative_to(folder)): file for file in folder.rglob("*.py") if file.is_file()}
    code = {file.name: file for file in CODE_FILES}
    own = {file.name for file in files} & code.keys()
    other = sorted(name for name in own & there.keys() if there[name].read_bytes() != code[name].read_bytes())
    if other:
        notes.append(
            f"{folder}: {', '.join(other)} differ from branchmix {__version__}'s own, which are uploaded instead"
        )
    if left := sorted(there.keys() - own):
        notes.append(f"{folder}: {', '.join(left[:5])}{' ...' if left[5:] else ''}: Python code is not uploaded")
    for file in (folder / "config.json", folder / "tokenizer_config.json"):
        config = read_object(file) or {}  # what is not JSON is uploaded unchanged
        named = config.get("auto_map")
        if named and named != shareable(config).get("auto_map"):
            notes.append(f"{file}: auto_map names code that is not uploaded: {short(named)} is left out")
    return notes


def _own_card(folder: Path) -> str | None:
    """The folder's README.md if somebody wrote it; branchmix's own, which have its tag, are rewritten."""
    readme = folder / README
    if not readme.is_file():
        return None
    text = readme.read_text(encoding="utf-8", errors="replace")
    return None if "branchmix" in (metadata_of(text).get("tags") or []) else text


def _licences(provenance: dict[str, Any] | None, *, ask: bool) -> dict[str, str]:
    """Licence of every source: on record, or from its folder, from the Hub's cache, or (if ``ask``) from the Hub."""
    licences = {}
    for name, source in (sources_of(provenance) if provenance else {}).items():
        licence, model, revision = source.get("license"), source["model"], source.get("revision")
        if not licence and revision:
            licence = _hub_licence(model.partition("@")[0], revision, ask=ask)
        elif not licence and Path(model).is_absolute():  # where a relative path started from is not on record
            licence = licence_of_folder(Path(model))
        licences[name] = licence if isinstance(licence, str) and licence else UNKNOWN
    return licences


def _hub_licence(name: str, revision: str, *, ask: bool) -> Any:
    from huggingface_hub import model_info, try_to_load_from_cache

    cached = try_to_load_from_cache(name, README, revision=revision)
    if isinstance(cached, str):
        return licence_of_folder(Path(cached).parent)
    with suppress(Exception):  # a licence that cannot be fetched is unknown; the upload itself reports what is wrong
        card = model_info(name, revision=revision, timeout=10).card_data if ask else None
        return card.get("license") if card is not None else None
    return None


def _upload(repo: str, files: tuple[Upload, ...], *, private: bool, force: bool) -> tuple[str, bool]:
    """URL of the commit, and whether the repository is private."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if get_token() is None:
        raise OutputError(f"{repo}: there is no Hub token: `hf auth login`, or set HF_TOKEN to one that may write")
    api = HfApi()
    with _in_one_line(repo):
        if not api.repo_exists(repo):
            api.create_repo(repo, private=private)
        is_private = bool(api.repo_info(repo).private)
        if private and not is_private:
            raise OutputError(
                f"{repo}: is a public repository, so --private cannot be had: make it private on the Hub, or choose "
                "another name"
            )
        there = [name for name in api.list_repo_files(repo) if name != ".gitattributes"]
        if there and not force:
            raise OutputError(
                f"{repo}: exists already and holds {len(there)} files: choose another name, or --force to commit "
                "over them"
            )
        new = {file.name for file in files}
        # Remaining shards with other numbers would be read together with the new ones.
        stale = [name for name in there if name not in new and name.endswith((".safetensors", INDEX_FILE))]
        operations = [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(file.name, file.content) for file in files]
        done = api.create_commit(repo, operations, commit_message="Upload with branchmix")
        return str(done.commit_url), is_private


@contextmanager
def _in_one_line(repo: str) -> Iterator[None]:
    """Turns the Hub's errors into the one line a user sees."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled:
        raise OutputError(f"{repo}: HF_HUB_OFFLINE is set: unset it to upload") from None
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", None) in (401, 403):
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


# ---- The model card: sources with their licences, recipe, training, accounting, evaluation. Local paths are not
# published: a local source is called by its folder's name. ----


def without_paths(provenance: dict[str, Any]) -> dict[str, Any]:
    """The content of ``branchmix.json`` with local folders by their last name; Hub ids stay."""
    kept = {source["model"] for source in sources_of(provenance).values() if source.get("revision")}

    def clean(value: Any, above: str = "", key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: clean(inner, key, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [clean(inner, above, key) for inner in value]
        is_place = key in ("model", "seed") or (above, key) == ("training", "name")
        if above in ("text", "prompts"):  # the keys are names of experts, which may be any word
            is_place = above == "text"
        return Path(value).name or value if isinstance(value, str) and is_place and value not in kept else value

    return dict(clean(provenance))


def hub_card(
    folder: Path,
    repo: str,
    config: dict[str, Any],
    provenance: dict[str, Any] | None,
    *,
    licence: str | None,
    licences: dict[str, str],
    results: Path | None,
) -> str:
    """Markdown with the Hub's front matter; ``licence`` is the upload's, ``licences`` those of the sources, by name.

    Raises RecipeError if ``results`` is not a ``results.json`` of ``branchmix eval``.
    """
    record = without_paths(provenance) if provenance else {"recipe": {}, "sources": []}
    record = {**record, "versions": {"branchmix": __version__}}
    more: dict[str, Any] = {"pipeline_tag": "text-generation", **({"license": licence} if licence else {})}
    if any(source.get("revision") for source in sources_of(record).values()):
        more["base_model_relation"] = "merge"
    title = _title(config, record)
    front = front_matter(config, record, **more)
    lines = [*front, f"# {repo.partition('/')[2]}", "", f"{title[0].upper()}{title[1:]}.", ""]
    if record["sources"]:
        lines += ["## Sources", "", *source_table(record, licences), ""]
    lines += usage(repo, own_code=config.get("model_type") == "branchmix")
    training = _training(folder)
    lines += training + _accounting(folder) + (_evaluation(results) if results else [])
    lines += history(record, ())
    made = "Made" if record["sources"] or training else "Uploaded"
    return "\n".join([*lines, "", f"{made} with [branchmix](https://arxiv.org/abs/2408.08274) {__version__}."]) + "\n"


def _title(config: dict[str, Any], provenance: dict[str, Any]) -> str:
    """What the model is, in one line."""
    model_type, exported = config["model_type"], provenance.get("exported")
    if exported and exported.get("expert"):
        return f"expert {exported['expert']} of a mixture, as a dense {model_type} model"
    if exported and has_experts(config):
        return f"a mixture of FFN experts, exported to {model_type}"
    plain = f"a {model_type} mixture of experts" if has_experts(config) else f"a dense {model_type} model"
    return method_of(config, provenance["recipe"]) or plain


def _training(folder: Path) -> list[str]:
    """From ``training.json``: tokens, FLOPs, and the held-out perplexities at both ends."""
    try:
        record = read_json(folder / "training.json")
        tokens, domains = record["tokens"], record["domains"]
        start, end = record["held_out"]["start"], record["held_out"]["end"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    flops = f", {record['flops']:.3g} FLOPs" if record.get("flops") else ""
    rows = []
    for name, domain in domains.items():
        both = (f"{side[name]['perplexity']:.2f}" if name in side else "-" for side in (start, end))
        rows.append([name, f"{domain['tokens']:,}", *both])
    head = ["domain", "tokens", "held-out perplexity before", "after"]
    return ["", "## Training", "", f"{tokens:,} tokens{flops}.", "", *table(head, rows)]


def _accounting(folder: Path) -> list[str]:
    try:
        accounting = inspect(folder)
    except BranchMixError:
        return []
    rows = {"parameters": f"{accounting.total.total:,}", "active for a token": f"{accounting.active.total:,}"}
    if accounting.flops is not None:
        what = f"FLOPs of a token, forward, at a context of {accounting.context:,}"
        rows[what] = f"{accounting.flops.total:.4g}"
    if accounting.kv_cache_bytes_per_token is not None:
        rows[f"KV cache, bytes a token ({accounting.dtype})"] = f"{accounting.kv_cache_bytes_per_token:,}"
    return ["", "## Accounting", "", *table(["", ""], rows.items())]


def _evaluation(results: Path) -> list[str]:
    """Bits per byte of every model and domain in a ``results.json``."""
    try:
        models = read_json(results)["models"]
        domains, window = list(models[0]["domains"]), models[0]["max_length"]
        rows = []
        for model in models:
            rows.append([Path(model["model"]).name or model["model"]])
            for domain in (model["domains"][name] for name in domains):
                score, error = domain["bits_per_byte"], domain.get("stderr")
                rows[-1].append(f"{score:.4f}" + (f" ({error:.4f})" if error is not None else ""))
    except OSError as error:
        raise RecipeError(f"{results}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise RecipeError(f"{results}: is not a results.json of `branchmix eval --out`") from error
    words = f"Bits per byte, window of {window:,} tokens (standard error)."
    return ["", "## Evaluation", "", words, "", *table(["", *domains], rows)]

"""Reading the documents of a source: local files, or a data set of the Hub, always in the same order.

``open_source(...)`` finds out what there is and reads from any point on; ``documents(...)`` is all of it at once.
JSON lines are parsed here and not by ``datasets``, whose reader fixes the columns at the first rows and then refuses
files in which a later row has a column more.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from branchmix.checkpoint.families import nearest
from branchmix.checkpoint.index import refuse_lfs_pointer
from branchmix.checkpoint.text import whole_characters
from branchmix.data.config import Source
from branchmix.errors import BranchMixError, DataError, kind_of
from branchmix.settings import absolute

_COMPRESSED = (".gz", ".zst")
_UNREADABLE = {
    "convert it to .jsonl, .csv or .parquet": (
        ".arrow .avro .db .feather .h5 .hdf5 .mdb .msgpack .npy .npz .ods .orc .pickle .pkl .pt .rda .rds .sas7bdat "
        ".sqlite .tfrecord .xls .xlsx"
    ).split(),
    "unpack it": ".7z .br .bz2 .lz4 .lzma .rar .snappy .tar .tgz .xz .z .zip".split(),
    "convert it to plain text": ".doc .docx .epub .odt .pdf .ps .rtf".split(),
}
"""What to do with files that hold no plain text, and their suffixes."""
_POINTER_BYTES = 1024
"""More than a Git LFS pointer has."""


def documents(
    source: Source, *, folder: Path, leave_out: Path | None = None, replaced: set[int] | None = None
) -> Iterator[str]:
    """All documents of a source that are not empty, each in whole characters; arguments as for ``find_files``.

    ``replaced`` gets the hashes of documents in which something had to be replaced. Raises DataError if there is no
    such source, or it cannot be read.
    """
    reader = open_source(source, folder=folder, leave_out=leave_out)
    for given in reader.read(None):
        text = whole_characters(given)
        if replaced is not None and text is not given:
            replaced.add(hash_of(text))
        yield text


def open_source(source: Source, *, folder: Path, leave_out: Path | None = None) -> Reader:
    """A reader for ``source``; nothing but names and sizes is read yet.

    Raises DataError if no file matches, or the data set or its split does not exist.
    """
    if source.files is not None:
        return FileReader(source, folder, leave_out)
    return HubReader(source, folder)


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is never trained on, as about this share of all documents, by its text alone."""
    return hash_of(text) < share * 2**64


def held_out_among(hashes: Collection[int], share: float, *, at_least_one: bool = True) -> set[int]:
    """Hashes of the documents that are never trained on: the lowest ``share`` of all hashes there can be. With
    ``at_least_one``, where none of several is among them, the lowest, so that there is something to evaluate on."""
    held_out = {text_hash for text_hash in hashes if text_hash < share * 2**64}
    return held_out or ({min(hashes)} if at_least_one and share > 0 and len(hashes) > 1 else set())


def hash_of(text: str) -> int:
    """64 bits that stand for a document."""
    from xxhash import xxh3_64_intdigest

    return int(xxh3_64_intdigest(text.encode()))


# ---- Local files ----


class FileReader:
    """Files by name, always in the same order; a document a row, or a document a file."""

    streamed = False
    """Whether documents are read only as far as needed."""

    def __init__(self, source: Source, folder: Path, leave_out: Path | None = None):
        self.column = source.column
        self.files = find_files(source, folder, leave_out)
        self._state: dict[str, Any] = {}

    def identity(self) -> dict[str, Any]:
        """What the text depends on, as JSON: if it changes, so may the text."""
        stats = [(str(file), file.stat()) for file in self.files]
        return {"files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats], "column": self.column}

    def read(self, state: dict[str, Any] | None) -> Iterator[str]:
        """Documents that are not empty, unchanged (see ``whole_characters``), from ``state`` on; None is the start."""
        first, skip = (state["file"], state["row"]) if state else (0, 0)
        for number in range(first, len(self.files)):
            with _naming(self.files[number]):
                for row, text in enumerate(_rows(self.files[number], self.column), 1):
                    if text and row > skip:
                        self._state = {"file": number, "row": row}
                        yield text
            skip = 0

    def state(self) -> dict[str, Any]:
        """Where the document that was read last ends, as JSON."""
        return self._state


def require_files(sources: Mapping[str, Source], *, folder: Path, leave_out: Path | None = None) -> None:
    """Raises DataError, with the domain, if files of a domain do not exist; arguments as for ``find_files``."""
    for name, source in sources.items():
        if source.files is not None:
            with naming_domain(name):
                find_files(source, folder, leave_out)


@contextmanager
def naming_domain(name: str) -> Iterator[None]:
    """Problems with a domain's text get its name."""
    try:
        yield
    except DataError as error:
        raise DataError(f"data.{name}: {error}") from error


def find_files(source: Source, folder: Path, leave_out: Path | None = None) -> list[Path]:
    """All files of a source, absolute, sorted, each once.

    Args:
        source: ``**`` in its patterns stands for folders at any depth, ``~`` for the home folder.
        folder: where relative patterns start from.
        leave_out: folder whose files to leave out: the run's own, whose files would change the text on resuming.

    Raises:
        DataError: a pattern matches no file.
    """
    files: set[str] = set()
    excluded = {name for pattern in source.exclude for name in _matches(pattern, folder)}
    is_left_out = cache(lambda parent: leave_out is not None and parent.resolve().is_relative_to(leave_out.resolve()))
    for pattern in source.patterns:
        matches = [name for name in _matches(pattern, folder) if name not in excluded]
        matches = [name for name in matches if not is_left_out(Path(name).parent)]
        if not matches:
            place = absolute(pattern, folder)
            what = "is a folder: name its files, as in" if place.is_dir() else "no file matches; looked for"
            where = f"{pattern.rstrip('/')}/**/*" if place.is_dir() else str(place)
            raise DataError(f"files {pattern!r}: {what} {where}")
        files.update(matches)
    return [Path(name) for name in sorted(files)]


def _matches(pattern: str, folder: Path) -> list[str]:
    """Absolute names of the files that a pattern means."""
    names = [str(Path(pattern).expanduser())]
    if not (folder / names[0]).is_file():
        pattern = re.sub("^~[^/]*", lambda home: glob.escape(str(Path(home[0]).expanduser())), pattern)
        # Not pathlib's, which refuses absolute patterns.
        names = glob.glob(pattern, root_dir=folder, recursive=True)  # noqa: PTH207
    return [str(path) for name in names if (path := folder.absolute() / name).is_file()]


def _rows(file: Path, column: str) -> Iterator[str | None]:
    """Every row's text; None and "" where a row has none."""
    suffix, _ = _suffixes(file)
    if suffix == ".parquet":
        yield from _parquet_rows(file, column)
    elif suffix in (".csv", ".tsv"):
        yield from _csv_rows(file, column, suffix)
    elif suffix in (".jsonl", ".jsonlines", ".ndjson"):
        with _opened(file) as stream:
            for where, row in json_lines(file, map(_decoded, stream)):
                yield _text_of(row, column, where)
    elif suffix == ".json":
        yield from _json_rows(file, column)
    elif advice := next((advice for advice, suffixes in _UNREADABLE.items() if suffix in suffixes), None):
        raise DataError(f"{file}: a {suffix} file cannot be read: {advice}, or leave it out with exclude")
    else:
        with _opened(file) as stream:
            yield _decoded(stream.read()).replace("\r\n", "\n")


def json_lines(file: Path, lines: Iterable[str], parse: Callable[[str], Any] = json.loads) -> Iterator[tuple[str, Any]]:
    """The value of each line of JSON that is not empty, after words for where it is; DataError if it is not JSON."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{file}, line {number}"
            try:
                value = parse(line)
            except ValueError as error:
                reason = getattr(error, "msg", error)
                raise DataError(f"{where}: is not JSON ({reason}): correct or remove that line") from None
            yield where, value


def _json_rows(file: Path, column: str) -> Iterator[str | None]:
    """A JSON list of rows, or JSON lines under the name ``.json``."""
    with _opened(file) as stream:
        content = _decoded(stream.read())
    if not content.lstrip().startswith("["):
        for where, row in json_lines(file, content.split("\n")):
            yield _text_of(row, column, where)
        return
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}: is not JSON ({error.msg}): correct the file") from None
    for number, row in enumerate(rows, 1):
        yield _text_of(row, column, f"{file}, row {number}")


def _text_of(row: Any, column: str, where: str) -> str | None:
    if not isinstance(row, dict):
        raise DataError(f"{where}: is {kind_of(row)}, not a JSON object with a key {column!r}")
    _require_column(column, list(row), where)
    return _checked(row[column], column, where)


def _require_column(column: str, there: list[str], where: object) -> None:
    if column not in there:
        listed = ", ".join(there) or "none"
        raise DataError(f"{where}: there is no column {column!r}{nearest(column, there)}; there are {listed}")


def _checked(value: Any, column: str, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise DataError(f"{where}: column {column!r} holds {kind_of(value)}, not text: name the column of the text")


def _csv_rows(file: Path, column: str, suffix: str) -> Iterator[str | None]:
    """A row for each record; ``.csv`` may also be separated by tabs or semicolons, as its header says."""
    csv.field_size_limit(2**31 - 1)  # a field may be a whole document
    with _opened(file) as stream:
        lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        header = next(lines, "")
        delimiter = "\t" if suffix == ".tsv" else max(",\t;", key=header.count)
        rows = csv.DictReader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
        try:
            _require_column(column, list(rows.fieldnames or ()), file)
            for row in rows:
                if None in row:
                    raise DataError(
                        f"{file}, line {rows.line_num}: has more values than the header has columns: put quotes around "
                        "text that has the separator in it"
                    )
                yield row[column]
        except csv.Error as error:
            raise DataError(f"{file}, line {rows.line_num}: not valid csv ({error}): correct that line") from None


def _parquet_rows(file: Path, column: str) -> Iterator[str | None]:
    import pyarrow.parquet as pq

    with _opened(file) as stream:
        table = pq.ParquetFile(io.BytesIO(stream.read()) if _suffixes(file)[1] else stream)
        _require_column(column, table.schema_arrow.names, file)
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            for value in batch.column(0).to_pylist():
                yield _checked(value, column, str(file))


def _suffixes(file: Path) -> tuple[str, str]:
    """The suffix that says the format, and the one that says how it is compressed: ``.jsonl`` and ``.gz``, or ""."""
    suffix = file.suffix.lower()
    return (Path(file.stem).suffix.lower(), suffix) if suffix in _COMPRESSED else (suffix, "")


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The file's bytes, decompressed if its suffix says so."""
    import pyarrow as pa

    _refuse_pointer(file)
    _, packing = _suffixes(file)
    with gzip.open(file) if packing == ".gz" else file.open("rb") as stream:
        yield io.BufferedReader(pa.CompressedInputStream(stream, "zstd"), 1 << 20) if packing == ".zst" else stream


def _refuse_pointer(file: Path) -> None:
    with file.open("rb") as stream:
        refuse_lfs_pointer(file, stream.read(64), DataError)


def refuse_pointers(folder: Path) -> None:
    """Raises DataError if a file that ``datasets`` reads is a Git LFS pointer instead of the data."""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.stat().st_size < _POINTER_BYTES:
            _refuse_pointer(file)


def _decoded(content: bytes) -> str:
    return content.decode("utf-8-sig")


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """What goes wrong while reading a file becomes one line with its name."""
    import pyarrow as pa

    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: is not UTF-8 text (byte {error.object[error.start]:#04x}): convert it, or leave it out of files"
        ) from None
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise DataError(f"{file}: cannot be read, or is cut short: {reason}") from error


# ---- The Hub ----


class HubReader:
    """A data set of the Hub, or a local folder in the Hub's layout, through ``datasets``; methods as ``FileReader``."""

    def __init__(self, source: Source, folder: Path):
        import datasets

        assert source.hub is not None
        self.streamed = source.streaming
        self.source = source
        name, _, revision = source.hub.partition("@")
        local = folder / Path(name).expanduser()
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        with _naming_data_set(source.hub):
            if local.is_dir():
                refuse_pointers(local)
            self._builder = datasets.load_dataset_builder(
                str(local) if local.is_dir() else name, source.name, revision=revision or None
            )
        data_files = getattr(self._builder.config, "data_files", None)
        splits = [str(split) for split in self._builder.info.splits or data_files or ()]
        if splits and source.split.partition("[")[0] not in splits:  # before anything is downloaded
            hint = nearest(source.split, splits)
            raise DataError(f"{source.hub}: there is no split {source.split!r}{hint}; there are {', '.join(splits)}")

    def identity(self) -> dict[str, Any]:
        builder = self._builder
        return {
            "hub": [builder.dataset_name, builder.config.name, builder.config_id, str(builder.hash)],
            "split": self.source.split,
            "column": self.source.column,
        }

    def read(self, state: dict[str, Any] | None) -> Iterator[str]:
        source = self.source
        with _naming_data_set(source.hub or ""):
            if self.streamed and "[" not in source.split:
                rows: Any = self._builder.as_streaming_dataset(split=source.split)
            else:
                self._builder.download_and_prepare()
                rows = self._builder.as_dataset(split=source.split).to_iterable_dataset()
            done = state["row"] if state else 0
            if state and state["iterable"] is not None:
                rows.load_state_dict(state["iterable"])
            elif done:
                rows = rows.skip(done)
            self._rows = rows
            for self._row, row in enumerate(rows, done + 1):
                if text := _text_of(row, source.column, f"{source.hub}, row {self._row}"):
                    yield text

    def state(self) -> dict[str, Any]:
        try:
            iterable = self._rows.state_dict()
            json.dumps(iterable)
        except (TypeError, ValueError, NotImplementedError, AttributeError):
            iterable = None
        return {"row": self._row, "iterable": iterable}


Reader = FileReader | HubReader


@contextmanager
def _naming_data_set(hub: str) -> Iterator[None]:
    """Errors of ``datasets`` in one line."""
    try:
        yield
    except BranchMixError:
        raise
    except Exception as error:
        kind = type(error).__name__
        reason = " ".join(str(error).split())[:300]
        if kind in ("DatasetNotFoundError", "ConnectionError", "OfflineModeIsEnabled", "FileNotFoundError"):
            hint = "it is neither a data set of the Hub nor a folder, or the Hub cannot be reached (HF_HUB_OFFLINE?)"
            raise DataError(f"{hub}: {hint}: {reason}") from error
        raise DataError(f"{hub}: cannot be read: {kind}: {reason}") from error

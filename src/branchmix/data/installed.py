"""Text of four domains that any Python environment with branchmix already holds. Nothing is fetched.

    code     the standard library's modules
    law      licences: of the installed packages, of Debian's packages where there are any, and common ones
    math     docstrings of sympy and mpmath (torch brings both)
    general  English: the language reference in pydoc, and prose in the docstrings and descriptions of the packages
             that branchmix itself needs
    cpp      the C++ headers that torch brings along; not among the four defaults (`law` has little text, this much)

The same environment gives the same text every time: documents come in the order of a hash of their name. What has
been read before is left out, a document in `code` and a paragraph elsewhere, so that no licence and no boilerplate
is both trained on and held out. Reading is parallel, in processes, and stops when there is enough.
"""

from __future__ import annotations

import ast
import hashlib
import json
import multiprocessing
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 0.2  # much, because `law` has few documents
MIN_CHARS = 400  # documents shorter than this, after de-duplication, are left out
MAX_CHARS = 8_000  # longer ones are cut: what is held out should be of many documents, not of two

STDLIB = Path(sysconfig.get_path("stdlib"))
PACKAGES = Path(sysconfig.get_path("purelib"))
COMMON_LICENSES = Path("/usr/share/common-licenses")
DEBIAN = Path("/usr/share/doc")

FOUR = ("general", "code", "law", "math")
"""The domains that are taken unless others are named."""

# With torch, transformers and datasets come all of these: the text does not change with what else is installed.
OWN_PACKAGES = (
    "torch transformers numpy pandas pyarrow networkx matplotlib fontTools pydantic datasets huggingface_hub "
    "accelerate rich pip setuptools httpx fsspec aiohttp typer yaml jinja2 tokenizers safetensors PIL click anyio "
    "requests urllib3 dill multiprocess dateutil pyparsing psutil tqdm packaging regex"
).split()

SHINGLE = 8  # words
SEEN_SHARE = 0.5  # of a paragraph's shingles: from there on it is a copy


@dataclass(frozen=True)
class Document:
    name: str
    """Where the text is from: a path below the standard library, the packages or the licences' folder."""
    text: str

    @property
    def held_out(self) -> bool:
        """Whether it belongs to the evaluation part: decided by the name alone."""
        return int(_rank(self.name)[-8:], 16) < HELD_OUT_SHARE * 16**8


@dataclass(frozen=True)
class Extract:
    """What was written of one domain."""

    path: Path
    documents: int
    chars: int
    bytes: int


@dataclass(frozen=True)
class InstalledDomain:
    files: Callable[[], list[tuple[str, Path]]]
    read: Callable[[str, Path], list[Document]]
    """All documents of one file: (name, path) -> documents."""
    by_paragraph: bool = True


def write(
    folder: Path,
    *,
    enough_bytes: int,
    processes: int,
    domains: Sequence[str] = FOUR,
    max_chars: int = MAX_CHARS,
) -> dict[str, Extract]:
    """Write `{domain}.jsonl` for every domain: a document a line, with its `text` and its `name`. Counts go to stderr.

    Args:
        enough_bytes: bytes of UTF-8 text in a domain; the last document is written whole.
        processes: number of processes that read.
        domains: names from ``DOMAINS``.
        max_chars: length at which longer documents are cut.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for name in domains:
            domain = DOMAINS[name]
            path, part = folder / f"{name}.jsonl", folder / f"{name}.jsonl.part"
            documents, chars, size = 0, 0, 0
            texts = _read(domain, pool, 64 * processes)
            with part.open("w", encoding="utf-8") as file:
                for document in _deduplicated(texts, by_paragraph=domain.by_paragraph, max_chars=max_chars):
                    file.write(json.dumps({"text": document.text, "name": document.name}, ensure_ascii=False) + "\n")
                    documents, chars = documents + 1, chars + len(document.text)
                    size += len(document.text.encode())
                    if size >= enough_bytes:
                        break
            part.rename(path)
            print(f"{name:8} {documents:6,} documents {chars:12,} characters", file=sys.stderr)
            written[name] = Extract(path, documents, chars, size)
    return written


def _read(domain: InstalledDomain, pool: ProcessPoolExecutor, ahead: int) -> Iterator[Document]:
    """A domain's documents in order, read in processes ``ahead`` files at a time, as little may be enough."""
    files = domain.files()
    for start in range(0, len(files), ahead):
        names, paths = zip(*files[start : start + ahead], strict=True)
        for documents in pool.map(domain.read, names, paths, chunksize=8):
            yield from documents


def documents(domain: str, *, held_out: bool) -> Iterator[Document]:
    """One part of a domain, read as far as it is asked for, in this process.

    Both parts are read in one order and de-duplicated together, so they share no text, however far either is read.
    """
    source = DOMAINS[domain]
    texts = (document for name, path in source.files() for document in source.read(name, path))
    distinct = _deduplicated(texts, by_paragraph=source.by_paragraph)
    return (document for document in distinct if document.held_out == held_out)


def _deduplicated(texts: Iterable[Document], *, by_paragraph: bool, max_chars: int = MAX_CHARS) -> Iterator[Document]:
    seen: set[object] = set()
    for document in texts:
        parts = re.split(r"\n\s*\n", document.text) if by_paragraph else [document.text]
        kept = [part.strip("\n") for part in parts if part.strip() and _is_new(part, seen, by_paragraph=by_paragraph)]
        text = "\n\n".join(kept)[:max_chars]
        if len(text) >= MIN_CHARS:
            yield Document(document.name, text)


def _is_new(part: str, seen: set[object], *, by_paragraph: bool) -> bool:
    """Whether it is more than a copy with other line breaks, names and years, as licences are; notes it as seen."""
    words = re.sub(r"[\W\d_]+", " ", part.lower()).split()
    if not by_paragraph or len(words) <= SHINGLE:
        key = hashlib.sha256(" ".join(words).encode()).digest()
        new = key not in seen
        seen.add(key)
        return new
    # Numbers instead of words: a hash of text may change from process to process, whether two are equal does not.
    shingles = {hash(tuple(words[start : start + SHINGLE])) for start in range(len(words) - SHINGLE + 1)}
    new = len(shingles & seen) < SEEN_SHARE * len(shingles)
    seen |= shingles
    return new


# ---- The domains ----


# encodings are tables of characters; pydoc_data is English, and in `general`.
NO_CODE = ("site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data")


def _law_files() -> list[tuple[str, Path]]:
    files = _files(COMMON_LICENSES, "*") if COMMON_LICENSES.is_dir() else []
    for pattern in ("**/LICEN[CS]E*", "**/COPYING*", "**/NOTICE*", "**/EULA*"):
        files += [item for item in _files(PACKAGES, pattern) if item[1].suffix not in (".py", ".pyc")]
    return _ranked(files + (_files(DEBIAN, "*/copyright") if DEBIAN.is_dir() else []))


def _general_files() -> list[tuple[str, Path]]:
    topics = STDLIB / "pydoc_data" / "topics.py"
    modules = _files(PACKAGES, *(f"{name}/**/*.py" for name in OWN_PACKAGES), skip=("tests", "test", "testing"))
    descriptions = _files(PACKAGES, *(f"{name}-*.dist-info/METADATA" for name in OWN_PACKAGES))
    return [("pydoc_data/topics.py", topics), *_ranked(modules + descriptions)]


def _whole(name: str, path: Path) -> list[Document]:
    return [Document(name, _text(path))]


def _licence(name: str, path: Path) -> list[Document]:
    text = _text(path)
    return [Document(name, text if path.name != "copyright" else _terms(text))]


def _terms(text: str) -> str:
    """The legal prose of a Debian copyright file, without its lists of files, owners and short names."""
    text = re.sub(r"(?m)^[ \t]*\.?[ \t]*$", "", text)  # " ." is an empty line there
    kept = []
    for part in re.split(r"\n\s*\n", text):
        part = "\n".join(line.strip() for line in part.splitlines())
        part = re.sub(r"(?ms)^(Files|Copyright|Upstream\S*|Format|Source|Comments?):.*?(?=^License:|\Z)", "", part)
        part = re.sub(r"(?m)^License:.*\n?", "", part).strip()
        if len(part) > 120 and _share_of_letters(part) > 0.93 and len(part) > 30 * part.count("\n"):
            kept.append(part)
    return "\n\n".join(kept)


def _all_docstrings(name: str, path: Path) -> list[Document]:
    return [Document(name, "\n\n".join(_docstrings(_text(path))))]


def _prose(name: str, path: Path) -> list[Document]:
    if path.name == "topics.py":
        from pydoc_data.topics import topics

        texts = {f"pydoc/{topic}": topics[topic] for topic in sorted(topics, key=_rank)}
    else:
        texts = {name: _text(path) if path.name == "METADATA" else "\n\n".join(_docstrings(_text(path)))}
    return [Document(name, "\n\n".join(filter(_is_prose, text.split("\n\n")))) for name, text in texts.items()]


_MATH, _HEADERS = ("sympy/**/*.py", "mpmath/**/*.py"), ("**/*.h", "**/*.hpp", "**/*.cuh")
DOMAINS: dict[str, InstalledDomain] = {
    "general": InstalledDomain(_general_files, _prose),
    "code": InstalledDomain(lambda: _files(STDLIB, "**/*.py", skip=NO_CODE), _whole, by_paragraph=False),
    "law": InstalledDomain(_law_files, _licence),
    "math": InstalledDomain(lambda: _files(PACKAGES, *_MATH, skip=("tests", "benchmarks")), _all_docstrings),
    "cpp": InstalledDomain(lambda: _files(PACKAGES / "torch" / "include", *_HEADERS), _whole, by_paragraph=False),
}


def _files(root: Path, *patterns: str, skip: tuple[str, ...] = ()) -> list[tuple[str, Path]]:
    """(name, path) of the files below `root`, in the order of their names' hashes; `skip` names folders."""
    files = {path.relative_to(root).as_posix(): path for pattern in patterns for path in root.glob(pattern)}
    return _ranked(
        [(name, path) for name, path in files.items() if path.is_file() and not set(skip) & set(name.split("/")[:-1])]
    )


def _ranked(files: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    return sorted(files, key=lambda item: _rank(item[0]))


def _rank(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="ignore").replace("\r\n", "\n")


def _docstrings(source: str) -> list[str]:
    """Every docstring of a module, in the order of the source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = sorted((node for node in ast.walk(tree) if isinstance(node, kinds)), key=lambda n: getattr(n, "lineno", 0))
    return [doc for node in nodes if (doc := ast.get_docstring(node))]


def _is_prose(paragraph: str) -> bool:
    """A paragraph of sentences, not a list of parameters, a signature, a table or an example."""
    paragraph = paragraph.strip()
    return (
        len(paragraph) > 80 and paragraph[0].isupper() and paragraph[-1] in ".:" and _share_of_letters(paragraph) > 0.92
    )


def _share_of_letters(text: str) -> float:
    """Share of letters and of what separates words."""
    return sum(char.isalpha() or char in " \n,." for char in text) / len(text)


if __name__ == "__main__":
    write(Path(sys.argv[1]), enough_bytes=int(sys.argv[2]), processes=int(sys.argv[3]))

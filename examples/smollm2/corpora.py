"""Text of four domains that any Python environment with torch and transformers already holds. Nothing is fetched.

    code     the standard library's modules
    law      licences and contracts: of the installed packages, and /usr/share/common-licenses where there is one
    math     docstrings of sympy and mpmath (torch brings both)
    general  English: the language reference in pydoc, and prose paragraphs of other packages' docstrings

The same environment gives the same text every time: documents come in the order of a hash of their name, and the
hash also decides which are held out. A paragraph (in `code`: a document) that has been seen before is left out, so
no licence text and no boilerplate is both trained on and held out.

    python examples/smollm2/corpora.py        # counts, and the beginning of a document of each domain
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 0.2  # much, because `law` has few documents
MIN_CHARS = 400  # documents shorter than this, after de-duplication, are left out

STDLIB = Path(sysconfig.get_path("stdlib"))
PACKAGES = Path(sysconfig.get_path("purelib"))
COMMON_LICENSES = Path("/usr/share/common-licenses")


@dataclass(frozen=True)
class Document:
    name: str
    """Where the text is from: a path below the standard library, the packages or the licences' folder."""
    text: str

    @property
    def held_out(self) -> bool:
        """Whether it belongs to the evaluation part: decided by the name alone."""
        return int(_rank(self.name)[-8:], 16) < HELD_OUT_SHARE * 16**8


def documents(domain: str, *, held_out: bool) -> Iterator[Document]:
    """One part of a domain, read as far as it is asked for.

    Both parts are read in one order and de-duplicated together, so they share no text, however far either is read.
    """
    return (
        document
        for document in _deduplicated(DOMAINS[domain](), by_paragraph=domain != "code")
        if document.held_out == held_out
    )


def _deduplicated(found: Iterator[Document], *, by_paragraph: bool) -> Iterator[Document]:
    seen: set[bytes] = set()
    for document in found:
        parts = re.split(r"\n\s*\n", document.text) if by_paragraph else [document.text]
        kept = []
        for part in parts:
            # Copies of a licence differ in line breaks, names' case and years: these don't make a paragraph new.
            key = hashlib.sha256(re.sub(r"[\W\d_]+", " ", part.lower()).strip().encode()).digest()
            if part.strip() and key not in seen:
                seen.add(key)
                kept.append(part.strip("\n"))
        text = "\n\n".join(kept)
        if len(text) >= MIN_CHARS:
            yield Document(document.name, text)


def _code() -> Iterator[Document]:
    for name, path in _files(STDLIB, "*.py", skip=("site-packages", "test", "tests", "idlelib", "lib2to3")):
        yield Document(name, _read(path))


def _law() -> Iterator[Document]:
    found = _files(COMMON_LICENSES, "*") if COMMON_LICENSES.is_dir() else []
    for pattern in ("LICEN[CS]E*", "COPYING*", "NOTICE*", "EULA*"):
        found += [item for item in _files(PACKAGES, pattern) if item[1].suffix not in (".py", ".pyc")]
    for name, path in sorted(found, key=lambda item: _rank(item[0])):
        yield Document(name, _read(path))


def _math() -> Iterator[Document]:
    for name, path in _files(PACKAGES, "sympy/**/*.py", "mpmath/**/*.py", skip=("tests", "benchmarks")):
        yield Document(name, "\n\n".join(_docstrings(_read(path))))


def _general() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for topic in sorted(topics, key=_rank):
        yield Document(f"pydoc/{topic}", "\n\n".join(filter(_is_prose, topics[topic].split("\n\n"))))
    for name, path in _files(PACKAGES, "*/**/*.py", skip=("sympy", "mpmath", "tests", "test", "testing")):
        paragraphs = (part for doc in _docstrings(_read(path)) for part in doc.split("\n\n"))
        yield Document(name, "\n\n".join(filter(_is_prose, paragraphs)))


DOMAINS: dict[str, Callable[[], Iterator[Document]]] = {"code": _code, "law": _law, "math": _math, "general": _general}


def _files(root: Path, *patterns: str, skip: tuple[str, ...] = ()) -> list[tuple[str, Path]]:
    """(name, path) of the files below `root`, in the order of their names' hashes; `skip` names folders."""
    found = {path.relative_to(root).as_posix(): path for pattern in patterns for path in root.rglob(pattern)}
    return sorted(
        ((name, path) for name, path in found.items() if path.is_file() and not set(skip) & set(name.split("/")[:-1])),
        key=lambda item: _rank(item[0]),
    )


def _rank(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _read(path: Path) -> str:
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
    letters = sum(char.isalpha() or char in " \n,." for char in paragraph)
    return len(paragraph) > 120 and paragraph[0].isupper() and paragraph[-1] in ".:" and letters > 0.95 * len(paragraph)


if __name__ == "__main__":
    for domain in DOMAINS:
        for held_out in (False, True):
            found = list(documents(domain, held_out=held_out))
            num_chars = sum(len(document.text) for document in found)
            print(f"{domain:8} {'held out' if held_out else 'training':8} {len(found):6} documents {num_chars:9} chars")
        print(textwrap.indent(f"[{found[0].name}]\n{found[0].text[:600]}", "    "), end="\n\n")

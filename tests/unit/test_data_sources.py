"""Documents of files and data sets: every format, going on from anywhere, and one line for whatever is wrong."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from branchmix.data.config import Source
from branchmix.data.sources import documents, find_files, hash_of, is_held_out, open_source
from branchmix.errors import DataError

ROWS = [{"text": "one"}, {"text": "two", "meta": {"a": 1}}, {"text": "drei ü", "meta": {"b": "x"}, "late": True}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def parquet(**columns: list[object]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


TEXTS = [str(row["text"]) for row in ROWS]
FORMATS = {
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "a.JSONL.zst": zstd(LINES),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"),
    "lines.json": LINES,
    "list.json": json.dumps(ROWS, indent=1).encode(),
    "list.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "a.parquet": parquet(text=TEXTS, other=[1, 2, 3]),
    "A.JSONL.GZ": gzip.compress(LINES),
    "a.Json.Zst": zstd(LINES),
    "a.csv": 'id,text\r\n1,one\r\n2,"two"\r\n,"drei ü"\r\n'.encode(),
    "bom.CSV": b"\xef\xbb\xbf" + "text;id\none;1\ntwo;2\ndrei ü;3\n".encode(),
    "a.tsv.gz": gzip.compress("id\ttext\n1\tone\n2\ttwo\n3\tdrei ü\n".encode()),
    "a.parquet.gz": gzip.compress(parquet(text=TEXTS)),
}


def read(folder: Path, **source: object) -> list[str]:
    return list(documents(Source(**source), folder=folder))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FORMATS[name])
    assert read(tmp_path, files=name) == ["one", "two", "drei ü"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.json.gz", "a.csv"])
def test_a_line_ends_where_n_stands(tmp_path: Path, name: str) -> None:
    """And not at the other characters that Python takes for ends of lines, which JSON and csv may have in text."""
    texts = ["one\u2028two", "three\x85four", "five\u2029six"]
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    content = content if "json" in name else "\n".join(["text", *texts, ""])
    (tmp_path / name).write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    assert read(tmp_path, files=name) == texts


def test_a_field_of_a_table_may_be_a_document(tmp_path: Path) -> None:
    text = 'A "long" text, with\nlines.\n' * 10_000
    (tmp_path / "a.csv").write_text('id,text\n1,"' + text.replace('"', '""') + '"\n2,\n', newline="")
    assert read(tmp_path, files="a.csv") == [text]


def test_halves_of_surrogate_pairs_are_replaced_and_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d"}\n{"text": "\\ud83d\\ude00"}\n')
    replaced: set[int] = set()
    found = list(documents(Source(files="a.jsonl"), folder=tmp_path, replaced=replaced))
    assert found == ["a \ufffd", "😀"] and replaced == {hash_of("a \ufffd")}


def test_other_suffixes_are_one_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_bytes(b"x = 1\r\ny = 2\r\n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "c.md").write_bytes(b"")
    assert read(tmp_path, files=["*.py", "*.gz", "c.md"]) == ["packed", "x = 1\ny = 2\n"]


def test_other_columns_and_rows_without_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n\n{"body": null}\n{"body": ""}\n{"body": "y"}\n')
    assert read(tmp_path, files="a.jsonl", column="body") == ["x", "y"]


def test_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a [1]"
    for name in ("x.txt", "deep/er/y.txt", "[odd].txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    monkeypatch.setenv("HOME", str(folder))
    names = lambda *patterns: [file.name for file in find_files(Source(files=list(patterns)), folder)]  # noqa: E731
    assert names("**/*.txt") == ["[odd].txt", "y.txt", "x.txt"]
    assert names("*.txt", "x.txt", "~/deep/er/*") == ["[odd].txt", "y.txt", "x.txt"]
    assert names("[odd].txt") == ["[odd].txt"]
    assert names(str(folder / "deep/er/y.txt")) == ["y.txt"]


def test_a_runs_own_folder_is_no_data(tmp_path: Path) -> None:
    for name in ("a.txt", "out/checkpoints/merges.txt", "outer/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = find_files(Source(files="**/*.txt"), tmp_path, tmp_path / "outer" / ".." / "out")
    assert [file.name for file in found] == ["a.txt", "b.txt"]


def test_excluded_files_are_no_data(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "old/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path, files="**/*.txt", exclude=["b.txt", "old/**"]) == ["a.txt"]
    with pytest.raises(DataError, match="no file matches"):
        read(tmp_path, files="b.txt", exclude=["*.txt"])


def hub(folder: Path) -> str:
    (folder / "set").mkdir()
    for name in ("train", "test"):
        (folder / "set" / f"{name}.jsonl").write_text(
            "".join(f'{{"text": "{name} {n}", "n": {n}}}\n' for n in range(4))
        )
    return "set"


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_layout(tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    name = hub(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    found = read(tmp_path, hub=name, split="test", streaming=streaming)
    assert found == ["test 0", "test 1", "test 2", "test 3"]


@pytest.mark.parametrize("place", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["files", "hub"])
def test_reading_goes_on_from_any_state(tmp_path: Path, kind: str, place: int) -> None:
    name = hub(tmp_path)
    source = Source(hub=name) if kind == "hub" else Source(files="set/*.jsonl")
    reader = open_source(source, folder=tmp_path)
    stream = reader.read(None)
    texts = list(reader.read(None))
    state = None
    for _ in zip(range(place), stream, strict=False):
        state = json.loads(json.dumps(reader.state()))
    again = open_source(source, folder=tmp_path)
    assert list(again.read(state)) == texts[place:]


def test_identity_follows_the_content(tmp_path: Path) -> None:
    name = hub(tmp_path)
    sources = [Source(files="set/*.jsonl"), Source(hub=name)]
    before = [open_source(source, folder=tmp_path).identity() for source in sources]
    assert before == [open_source(source, folder=tmp_path).identity() for source in sources]
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "new"}\n')
    after = [open_source(source, folder=tmp_path).identity() for source in sources]
    assert all(a != b for a, b in zip(before, after, strict=True))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
LFS = r"is a Git LFS pointer, not the file itself: run `git lfs pull`"
BAD: dict[str, tuple[bytes, str]] = {
    **{f"pointer{suffix}": (POINTER, LFS) for suffix in (".txt", ".py", ".jsonl", ".csv", ".parquet", ".jsonl.gz")},
    "column.csv": (b"id,body\n1,a\n", r"column\.csv: there is no column 'text'; there are id, body"),
    "empty.csv": (b"", r"empty\.csv: there is no column 'text'; there are none"),
    "wide.csv": (b"id,text\n1,a,b\n", r"wide\.csv, line 2: has more values than the header has columns"),
    "cut.csv": (b'id,text\n1,"a', r"cut\.csv, line \d: not valid csv"),
    "latin.csv": ("id,text\n1,naïve\n".encode("latin-1"), r"latin\.csv: is not UTF-8 text"),
    "a.XLSX": (b"plain", r"a\.XLSX: a \.xlsx file cannot be read: convert it to \.jsonl, \.csv or \.parquet"),
    "a.tar.gz": (gzip.compress(b"text"), r"a\.tar\.gz: a \.tar file cannot be read: unpack it"),
    "a.jsonl.xz": (b"x", r"a\.jsonl\.xz: a \.xz file cannot be read: unpack it"),
    "a.pdf": (b"%PDF-1.7", r"a\.pdf: a \.pdf file cannot be read: convert it to plain text, or leave it out with"),
    "cut.jsonl": (LINES[:-8], r"cut\.jsonl, line 3: is not JSON"),
    "number.jsonl": (b'{"text": "a"}\n{"text": 5}\n', r"line 2: column 'text' holds a number, not text"),
    "list.jsonl": (b"[1]\n", r"line 1: is a list, not a JSON object with a key 'text'"),
    "column.jsonl": (b'{"txt": "a", "id": 1}\n', r"no column 'text' \(did you mean 'txt'\?\); there are txt, id"),
    "cut.json": (b'[{"text": "a"},\n {"te', r"cut\.json, line 2: is not JSON"),
    "cut.jsonl.gz": (gzip.compress(LINES * 50)[:-12], r"cut\.jsonl\.gz: cannot be read, or is cut short"),
    "no.jsonl.gz": (LINES, r"no\.jsonl\.gz: cannot be read, or is cut short"),
    "cut.jsonl.zst": (zstd(LINES * 50)[:-9], r"cut\.jsonl\.zst: cannot be read, or is cut short"),
    "cut.parquet": (parquet(text=["a"])[:-9], r"cut\.parquet: cannot be read, or is cut short"),
    "column.parquet": (parquet(body=["a"]), r"column\.parquet: there is no column 'text'; there are body"),
    "number.parquet": (parquet(text=[1]), r"column 'text' holds a number, not text"),
    "latin.txt": ("naïve".encode("latin-1"), r"latin\.txt: is not UTF-8 text \(byte 0xef\): convert it"),
    "latin.jsonl": ('{"text": "naïve"}'.encode("latin-1"), r"latin\.jsonl: is not UTF-8 text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path, files=name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_an_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").write_text("x")
    reader = open_source(Source(files="gone.txt"), folder=tmp_path)
    (tmp_path / "gone.txt").unlink()
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read, or is cut short: No such file"):
        list(reader.read(None))


NOT_THERE: dict[str, tuple[Callable[[Path], dict[str, object]], str]] = {
    "no file": (lambda _: {"files": "src/**/*.py"}, r"'src/\*\*/\*\.py': no file matches; looked for /.*/src"),
    "no file above": (lambda _: {"files": "bad/../no.txt"}, r"'bad/\.\./no\.txt': .* looked for /(?!.*\.\.)"),
    "a folder": (lambda path: {"files": hub(path)}, r"'set': is a folder: name its files, as in set/\*\*/\*"),
    "no data set": (lambda _: {"hub": "nobody/nothing"}, r"nobody/nothing: .*cannot be reached"),
    "no folder": (lambda _: {"hub": "./nothing"}, r"\./nothing: .*nor a folder"),
    "no split": (lambda path: {"hub": hub(path), "split": "tran"}, r"no split 'tran' \(did you mean 'train'\?\); ther"),
    "no column": (
        lambda path: {"hub": hub(path), "column": "body"},
        r"set, row 1: there is no column 'body'; there are text, n",
    ),
    "numbers": (lambda path: {"hub": hub(path), "column": "n"}, r"set, row 1: column 'n' holds a number, not text"),
    "no name": (lambda path: {"hub": hub(path), "name": "en"}, r"set: .*'en'"),
}


@pytest.mark.parametrize("what", NOT_THERE)
def test_what_is_not_there(tmp_path: Path, what: str) -> None:
    source, message = NOT_THERE[what]
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path, **source(tmp_path))
    assert "\n" not in str(error.value)


def test_a_pointer_in_the_hubs_layout(tmp_path: Path) -> None:
    name = hub(tmp_path)
    (tmp_path / name / "train.jsonl").write_bytes(POINTER)
    with pytest.raises(DataError, match=LFS) as error:
        read(tmp_path, hub=name)
    assert "train.jsonl" in str(error.value)


def test_a_truncated_hub_file(tmp_path: Path) -> None:
    name = hub(tmp_path)
    (tmp_path / name / "train.jsonl").write_bytes(b'{"text": "a"}\n{"te')
    with pytest.raises(DataError, match=r"set: cannot be read: ") as error:
        read(tmp_path, hub=name)
    assert "\n" not in str(error.value)


def test_held_out_by_hash() -> None:
    texts = [f"text {n}" for n in range(20000)]
    small = {text for text in texts if is_held_out(text, 0.02)}
    assert 0.015 < len(small) / len(texts) < 0.025
    assert small <= {text for text in texts if is_held_out(text, 0.05)}  # a larger share holds out the same ones too
    assert not any(is_held_out(text, 0.0) for text in texts) and all(is_held_out(text, 1.0) for text in texts)

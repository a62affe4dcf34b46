"""The cache of tokens: built once, by one process, going on where it stopped, and never holding what is held out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import branchmix.data.corpus as corpus_module
from branchmix.data import build
from branchmix.data.build import chunk_file, chunks_in
from branchmix.data.config import HeldOut, Source
from branchmix.data.corpus import Corpus, default_cache, open_corpus
from branchmix.data.sources import hash_of, is_held_out
from branchmix.errors import DataError, OutputError
from corpora import corpus, hub_folder, text, texts_in, tokenizer, write_jsonl


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that is tokenised in this process."""
    seen: list[str] = []
    real = build.Encoder.__call__

    def call(self: build.Encoder, texts: list[str]) -> Any:
        seen.extend(texts)
        return real(self, texts)

    monkeypatch.setattr(build.Encoder, "__call__", call)
    return seen


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "CHUNK_TOKENS", 2000)


FILES = {"a": Source(files="a.jsonl")}
HUB = {"a": Source(hub="set")}


def test_counts(tmp_path: Path) -> None:
    texts = [text(n) for n in range(200)]
    rows = [*texts, texts[3], texts[5], texts[3], ""]  # two of them twice, one three times
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    steps: list[str] = []
    domain = corpus(tmp_path, FILES, progress=steps.append).domains["a"]
    held_out = [t for t in texts if is_held_out(t, 0.1)]
    kept = [t for t in texts if not is_held_out(t, 0.1)]
    num_tokens = lambda some: sum(len(tokenizer()(t)["input_ids"]) + 1 for t in some)  # noqa: E731
    assert (domain.counts.documents, domain.counts.held_out_documents) == (len(kept), len(held_out))
    assert (domain.counts.tokens, domain.counts.held_out_tokens) == (num_tokens(kept), num_tokens(held_out))
    assert (domain.counts.bytes, domain.counts.held_out_bytes) == (len("".join(kept)), len("".join(held_out)))
    assert domain.counts.duplicates == 3 and domain.complete
    assert set(steps) == {"tokenising a"}


def test_special_tokens(tmp_path: Path) -> None:
    """Each document as the tokenizer makes it, and EOS; its truncation and padding don't apply."""
    import copy

    from tokenizers.processors import TemplateProcessing

    with_bos = copy.deepcopy(tokenizer())
    bos = with_bos.convert_tokens_to_ids("a")
    core = with_bos.backend_tokenizer
    core.post_processor = TemplateProcessing(single="a $A", special_tokens=[("a", bos)])
    core.enable_truncation(8)
    core.enable_padding(length=64)
    (tmp_path / "one.txt").write_text(text(1))
    opened = open_corpus(
        {"a": Source(files="one.txt")}, with_bos, folder=tmp_path, cache=tmp_path / "c", held_out=HeldOut(share=0.0)
    )
    tokens = opened.domains["a"].chunks[0].arrays["tokens"].tolist()
    assert tokens == [bos, *tokenizer()(text(1))["input_ids"], tokenizer().eos_token_id]


def test_nothing_held_out_is_trained_on(tmp_path: Path) -> None:
    """Not even where another domain has the same document, under another share of it."""
    write_jsonl(tmp_path / "a.jsonl", range(300))
    write_jsonl(tmp_path / "b.jsonl", range(200, 400))
    write_jsonl(tmp_path / "tiny.jsonl", range(298, 300))  # one of the two is held out, whatever its hash is
    sources = {name: Source(files=f"{name}.jsonl") for name in ("a", "b", "tiny")}
    assert not any(is_held_out(text(n), 0.1) for n in (298, 299))
    opened = corpus(tmp_path, sources)
    held_out = {t for name in sources for t in opened.held_out_texts(name)}
    assert opened.domains["tiny"].counts.documents == opened.domains["tiny"].counts.held_out_documents == 1
    for name, length in {"a": 32, "b": 32, "tiny": 8}.items():
        domain = opened.domains[name]
        sequences = opened.train(
            {name: 1}, sequence_length=length, num_sequences=domain.counts.tokens // length, random_seed=0
        )
        documents = texts_in(sequences).split("<|endoftext|>")
        assert len(documents) > domain.counts.documents / 2 and not set(documents) & held_out


def test_a_domain_of_one_document_is_trained_on(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", range(1))
    opened = corpus(tmp_path, FILES)
    assert opened.domains["a"].counts.documents == 1 and opened.held_out(sequence_length=8) == {}


def test_the_cache_is_used_again(tmp_path: Path, encoded: list[str]) -> None:
    write_jsonl(tmp_path / "a.jsonl", range(300))
    sequences = lambda opened: [  # noqa: E731
        item["input_ids"].tolist()
        for item in opened.train("equal", sequence_length=32, num_sequences=100, random_seed=0)
    ]
    first = sequences(corpus(tmp_path, FILES))
    assert len(encoded) == 300
    again = corpus(tmp_path, {"other": Source(files=["a.jsonl", "a*"])}, held_out=HeldOut(share=0.1, tokens=50))
    assert (
        len(encoded) == 300
        and again.domains["other"].counts.tokens == corpus(tmp_path, FILES).domains["a"].counts.tokens
    )
    assert sequences(corpus(tmp_path, FILES)) == first
    corpus(tmp_path, FILES, held_out=HeldOut(share=0.2))
    assert len(encoded) == 600
    write_jsonl(tmp_path / "a.jsonl", range(301))
    assert corpus(tmp_path, FILES).domains["a"].counts.tokens > again.domains["other"].counts.tokens
    assert len(encoded) == 901


def test_another_tokenizer_is_another_cache(tmp_path: Path) -> None:
    from branchmix.data.tokenizer import train_tokenizer

    write_jsonl(tmp_path / "a.jsonl", range(100))
    ours = corpus(tmp_path, FILES).domains["a"]
    other = train_tokenizer((text(n) for n in range(100)), 280)
    options: Any = {"folder": tmp_path, "cache": tmp_path / "cache", "held_out": HeldOut(share=0.1)}
    assert open_corpus(FILES, other, **options).domains["a"].folder != ours.folder
    other.eos_token = None
    assert open_corpus(FILES, other, **options).domains["a"].counts.tokens < ours.counts.tokens + 10_000


def test_a_damaged_chunk_is_made_again(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", range(300))
    domain = corpus(tmp_path, FILES).domains["a"]
    tokens, file = domain.counts.tokens, domain.chunks[1].file
    good = file.read_bytes()
    file.write_bytes(good[:-100])
    again = corpus(tmp_path, FILES).domains["a"]
    assert again.complete and again.counts.tokens == tokens and file.read_bytes() == good


@pytest.mark.parametrize("kind", ["files", "hub"])
def test_a_killed_build_goes_on(tmp_path: Path, kind: str, encoded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off after each chunk in turn; every text is tokenised once, but for a chunk's worth at each cut."""
    write_jsonl(tmp_path / "a.jsonl", range(300))
    hub_folder(tmp_path / "set", range(300))
    sources = FILES if kind == "files" else {"a": Source(hub="set", streaming=False)}
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    whole = corpus(tmp_path, sources, cache=tmp_path / "whole").domains["a"]
    encoded.clear()
    real = build.write_chunk
    kills = 0

    def killed_after(file: Path, *args: Any, **facts: Any) -> None:
        nonlocal kills
        real(file, *args, **facts)
        if kills < 5:
            kills += 1
            raise KeyboardInterrupt

    monkeypatch.setattr(build, "write_chunk", killed_after)
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            corpus(tmp_path, sources)
    domain = corpus(tmp_path, sources).domains["a"]
    assert domain.complete and len(encoded) == 300
    assert [chunk.file.read_bytes() for chunk in domain.chunks] == [chunk.file.read_bytes() for chunk in whole.chunks]
    assert sorted(file.name for file in domain.folder.iterdir()) == sorted(f.name for f in whole.folder.iterdir())


OPEN = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import branchmix.data.corpus as corpus_module
from branchmix.data import build
corpus_module.CHUNK_TOKENS = 2000
from branchmix.data.config import Source
from corpora import corpus
encode, count = build.Encoder.__call__, 0
def slowly(self, texts):
    global count
    count += len(texts)
    time.sleep(0.01)
    if "die" in sys.argv and count > 100:
        os.kill(os.getpid(), 9)
    return encode(self, texts)
build.Encoder.__call__ = slowly
print("ready", flush=True)
sys.stdin.readline()
opened = corpus(Path(sys.argv[1]), {"a": Source(files="a.jsonl")})
print(count, opened.domains["a"].counts.tokens)
"""


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """A process that opens the corpus in ``folder`` once it is told to."""
    command = [sys.executable, "-c", OPEN, str(folder), str(Path(__file__).parent.parent), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once(tmp_path: Path) -> None:
    """One tokenises, the other waits; if the first dies, the other goes on from its last chunk."""
    write_jsonl(tmp_path / "a.jsonl", range(300))
    dying, *others = processes = [started(tmp_path, "die"), started(tmp_path), started(tmp_path)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    dying.communicate("go\n", timeout=60)
    assert dying.returncode == -signal.SIGKILL
    for process in others:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    counts, tokens = zip(*(map(int, process.communicate(timeout=60)[0].split()) for process in others), strict=True)
    assert 0 in counts and 150 < sum(counts) < 300, "one did all that was left, and that was not everything"
    assert len(set(tokens)) == 1 and tokens[0] == corpus(tmp_path, FILES).domains["a"].counts.tokens


def test_a_stream_is_read_only_as_far_as_wanted(tmp_path: Path, encoded: list[str]) -> None:
    hub_folder(tmp_path / "set", range(3000))
    opened = corpus(tmp_path, HUB)
    domain = opened.domains["a"]
    assert len(encoded) < 400 and len(domain.chunks) == 1 and not domain.complete
    held_out = opened.held_out_texts("a")
    sequences = opened.train("equal", sequence_length=32, num_sequences=200, random_seed=0)
    first = [sequences[n]["input_ids"].tolist() for n in range(200)]
    assert len(encoded) < 400, "the rest was read by another process"
    assert 200 * 32 <= domain.counts.tokens < 200 * 32 + 3 * 2000 and not domain.complete
    assert sequences.epochs() == {"a": None}
    # More is wanted later, by this process or by another; what was seen stays the same, and so does what is held out.
    more = opened.train("equal", sequence_length=32, num_sequences=400, random_seed=0)
    more[399]
    again = corpus(tmp_path, HUB)
    again.domains["a"].want(20_000)
    longer = again.train("equal", sequence_length=32, num_sequences=700, random_seed=0)
    longer[699]
    assert [longer[n]["input_ids"].tolist() for n in range(200)] == first
    assert again.held_out_texts("a") == held_out == opened.held_out_texts("a") != []
    with pytest.raises(DataError, match="the size of 'a', which is streamed, is not known yet"):
        again.train("proportional", sequence_length=32, num_sequences=1, random_seed=0)
    close(opened, again)


def test_a_stream_that_ends_begins_again(tmp_path: Path) -> None:
    hub_folder(tmp_path / "set", range(200))
    opened = corpus(tmp_path, HUB)
    sequences = opened.train("equal", sequence_length=32, num_sequences=600, random_seed=0)
    documents = texts_in(sequences).split("<|endoftext|>")
    domain = opened.domains["a"]
    held_out = [t for t in map(text, range(200)) if is_held_out(t, 0.1)]
    assert domain.complete and domain.counts.held_out_documents == len(held_out)
    assert set(documents[1:-1]).isdisjoint(held_out) and (sequences.epochs()["a"] or 0) > 2
    assert {hash_of(text(n)) for n in range(200)} == {
        int(value) for chunk in domain.chunks for key in ("hashes", "held_out_hashes") for value in chunk.arrays[key]
    }
    assert domain._producer is not None and domain._producer.wait(10) == 0
    # Once it is all there, the mix may be proportional, and nothing is read in the background.
    again = corpus(tmp_path, HUB)
    redone = again.train("proportional", sequence_length=32, num_sequences=600, random_seed=0)
    assert texts_in(redone).split("<|endoftext|>") == documents and again.domains["a"]._producer is None


def close(*opened: Corpus) -> None:
    """Ends what reads in the background, as the end of the process does."""
    for one in opened:
        for domain in one.domains.values():
            if domain._producer is not None:
                assert domain._producer.stdin is not None
                domain._producer.stdin.close()
                domain._producer.wait(10)


def test_errors_in_the_background_are_told(tmp_path: Path) -> None:
    hub_folder(tmp_path / "set", range(600))
    broken = tmp_path / "set" / "train-2.jsonl"
    broken.write_text('{"text": "a"}\n{"te')
    opened = corpus(tmp_path, HUB)
    folder = opened.domains["a"].folder
    sequences = opened.train("equal", sequence_length=32, num_sequences=2000, random_seed=0)
    assert sequences[0]["domain"] == 0
    with pytest.raises(DataError, match=r"^data\.a: set: cannot be read: ") as error:
        sequences[1999]
    assert "\n" not in str(error.value) and (folder / build.FAILURE_FILE).exists()
    # Whoever tries again is not told of the last failure.
    opened.domains["a"]._producer = None
    opened.domains["a"].want(10**6)
    assert not (folder / build.FAILURE_FILE).exists()
    close(opened)


def test_a_killed_reader_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_folder(tmp_path / "set", range(3000))
    opened = corpus(tmp_path, HUB)
    domain = opened.domains["a"]
    sequences = opened.train("equal", sequence_length=32, num_sequences=200, random_seed=0)
    sequences[199]
    assert domain._producer is not None
    domain._producer.kill()
    domain._producer.wait()
    far = opened.train("equal", sequence_length=32, num_sequences=10_000, random_seed=0)
    with pytest.raises(DataError, match=r"data\.a: reading in the background has ended with code -9: start again"):
        far[9999]
    # As seen from the other processes of the machine, whose child it is not.
    monkeypatch.setattr("branchmix.data.domain._PATIENCE", 0.2)
    domain._producer = None
    with pytest.raises(DataError, match="the process that reads it in the background is gone: start again"):
        far[9999]


PARENT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import branchmix.data.corpus as corpus_module
corpus_module.CHUNK_TOKENS = 2000
from branchmix.data.config import Source
from corpora import corpus
opened = corpus(Path(sys.argv[1]), {"a": Source(hub="set")})
opened.domains["a"].want(5000)
print(opened.domains["a"]._producer.pid, flush=True)
time.sleep(100)
"""


def test_the_reader_ends_with_its_parent(tmp_path: Path) -> None:
    hub_folder(tmp_path / "set", range(3000))
    command = [sys.executable, "-c", PARENT, str(tmp_path), str(Path(__file__).parent.parent)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not alive(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("it still runs")


def alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


MISTAKES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no text": (lambda path: (path / "a.jsonl").write_text('{"text": ""}\n'), r"^data\.a: there is no text in it$"),
    "nothing": (lambda path: (path / "a.jsonl").touch(), r"^data\.a: there is no text in it$"),
    "no file": (lambda path: None, r"^data\.a: files 'a\.jsonl': no file matches"),
    "cut": (lambda path: (path / "a.jsonl").write_text('{"te'), r"^data\.a: /.*/a\.jsonl, line 1: is not JSON"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes(tmp_path: Path, what: str) -> None:
    make, message = MISTAKES[what]
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        corpus(tmp_path, FILES)


def test_a_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    class Slow:
        is_fast = False
        name_or_path = "old/model"

    with pytest.raises(DataError, match="old/model: the tokenizer has no Rust core"):
        open_corpus(FILES, Slow(), folder=tmp_path, cache=tmp_path, held_out=HeldOut())


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.numpy

    from branchmix.errors import OutputError

    def full(tensors: Any, file: Path, metadata: Any) -> None:
        Path(file).write_bytes(b"half")
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    write_jsonl(tmp_path / "a.jsonl", range(100))
    with monkeypatch.context() as patched:
        patched.setattr(safetensors.numpy, "save_file", full)
        with pytest.raises(OutputError, match=r"chunk-000000\.safetensors: the disk is full"):
            corpus(tmp_path, FILES)
    assert not list(tmp_path.rglob("*chunk-*"))
    assert corpus(tmp_path, FILES).domains["a"].complete


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("BRANCHMIX_CACHE", raising=False)
    assert default_cache() == tmp_path / "xdg" / "branchmix"
    monkeypatch.setenv("BRANCHMIX_CACHE", str(tmp_path / "own"))
    assert default_cache() == tmp_path / "own"
    write_jsonl(tmp_path / "a.jsonl", range(50))
    domain = corpus(tmp_path, FILES, cache=None).domains["a"]
    assert domain.folder.is_relative_to(tmp_path / "own") and chunks_in(domain.folder)[0].file == chunk_file(
        domain.folder, 0
    )


def test_without_a_place_for_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("XDG_CACHE_HOME", "BRANCHMIX_CACHE", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # a user without an entry
    with pytest.raises(DataError, match="set BRANCHMIX_CACHE"):
        default_cache()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BRANCHMIX_CACHE", str(tmp_path / "file"))
    write_jsonl(tmp_path / "a.jsonl", range(5))
    with pytest.raises(OutputError, match="BRANCHMIX_CACHE chooses another folder"):
        corpus(tmp_path, FILES, cache=None)


def test_a_fingerprint_is_of_the_text_alone(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", range(50))
    before = corpus(tmp_path, FILES).fingerprints()
    os.utime(tmp_path / "a.jsonl", (1, 1))
    assert corpus(tmp_path, FILES).fingerprints() == before
    write_jsonl(tmp_path / "a.jsonl", range(51))
    assert corpus(tmp_path, FILES).fingerprints() != before


def test_tokenizers_threads_are_on_and_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build.Encoder(tokenizer().backend_tokenizer.to_str(), None)
    core, seen = encoder.tokenizer, []

    class Watching:
        def encode_batch_fast(self, texts: list[str]) -> Any:
            seen.append(os.environ["TOKENIZERS_PARALLELISM"])
            return core.encode_batch_fast(texts)

    monkeypatch.setattr(encoder, "tokenizer", Watching())
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    encoder(["a", "b"])
    assert seen == ["true"] and os.environ["TOKENIZERS_PARALLELISM"] == "false"
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    encoder(["a"])
    assert seen == ["true"] * 2 and "TOKENIZERS_PARALLELISM" not in os.environ

"""Text as tokenizers take it: characters that UTF-8 has, and long documents with the tokens of the whole."""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import branchmix
import corpora
from branchmix.checkpoint import text as text_module
from branchmix.checkpoint.text import parts_of, whole_characters
from branchmix.data import build
from branchmix.data import tokenizer as own_tokenizer
from branchmix.data.config import HeldOut, Source
from branchmix.data.tokenizer import train_tokenizer
from branchmix.errors import RecipeError
from branchmix.likelihood import models as likelihood_models
from branchmix.likelihood.models import encode
from branchmix.settings import parse_yaml

CODE = "\n".join(file.read_text() for file in sorted((Path(branchmix.__file__).parent / "checkpoint").glob("*.py")))
PROSE = " ".join(f"{corpora.text(n)} héllo wörld 你好, 😀!" for n in range(400))
DRAWN = "".join(random.Random(0).choices("ab \n\t.😀é你", k=20_000))
TEXTS = {
    "code": CODE[:60_000],
    "prose": PROSE,
    "no spaces": CODE[:40_000].replace(" ", "").replace("\n", ""),
    "characters": DRAWN,
    "a space at the end": f"{PROSE[:7000]} ",
}
ALIKE = {"one letter": "a" * 20_001, "spaces": " " * 20_001 + "x", "lines": "\n" * 20_001}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("half \ud83d", "half \ufffd"),
        ("\ude00half\ud83d\ud83d", "\ufffdhalf\ufffd\ufffd"),
        ("whole \ud83d\ude00", "whole 😀"),
        ("\udcff bytes of a command line", "\ufffd bytes of a command line"),
        ("\ufeff😀", "\ufeff😀"),
    ],
)
def test_what_is_not_a_character_is_replaced(given: str, wanted: str) -> None:
    assert whole_characters(given) == wanted
    assert whole_characters(wanted) is wanted


# ---- long documents ----


@pytest.fixture(params=[(3000, 256), (700, 128)])
def short_windows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Every text of so many characters is long."""
    long, context = request.param
    monkeypatch.setattr(text_module, "CONTEXT", context)
    for module in (text_module, build, likelihood_models):
        monkeypatch.setattr(module, "LONG", long)
    return long, context


@cache
def byte_level() -> Any:
    return train_tokenizer([CODE, PROSE], 800)


def byte_level_with_bos() -> Any:
    """Special tokens on both sides, offsets without the spaces, and Unicode in its composed form."""
    made = copy.deepcopy(byte_level())
    core = made.backend_tokenizer
    core.normalizer = normalizers.NFC()
    template = processors.TemplateProcessing(single="a $A b", special_tokens=[("a", 5), ("b", 6)])
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return made


@cache
def sentencepiece() -> Any:
    """As Llama 2: no words, a space before every text, bytes for what it does not know."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False, max_token_length=8)
    core.train_from_iterator([PROSE[n : n + 200] for n in range(0, 8000, 200)], trainer)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=core)


@cache
def unigram() -> Any:
    """Frequent strings of one to four characters, with scores that no two segmentations share.

    Its trainer makes another vocabulary in each process. A string of one repeated character is left out: with ``"`` and
    three of them, four are one of each in either order, and rounding decides.
    """
    texts = [text.replace(" ", "▁") for text in (CODE, PROSE)]
    counts = Counter(text[n : n + size] for text in texts for size in range(1, 5) for n in range(len(text)))
    often = [text for text, _ in counts.most_common(600) if len(text) == 1 or len(set(text)) > 1]
    vocabulary = [("<unk>", 0.0), *((text, -5 - 0.01 * rank**0.9) for rank, text in enumerate(often))]
    core = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


@pytest.mark.parametrize("kind", [byte_level, byte_level_with_bos, sentencepiece, unigram], ids=lambda f: f.__name__)
def test_pieces_have_the_tokens_of_the_whole(kind: Any, short_windows: tuple[int, int]) -> None:
    tokenizer = kind()
    encoder = build.Encoder(tokenizer.backend_tokenizer.to_str(), None)
    for name, text in TEXTS.items():
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        special = tokenizer(text)["input_ids"]
        assert encode(tokenizer, ["x", text, "y"])[1].tolist() == whole, name
        assert encode(tokenizer, [text], special=True)[0].tolist() == special, name
        assert encoder(["x", text, "y"])[1].tolist() == special, name


def test_no_window_is_longer_than_the_limit(short_windows: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """That is what bounds memory; and what is alike everywhere loses no character either, only the best tokens."""
    long, context = short_windows
    tokenizer = byte_level()
    seen: list[str] = []
    for owner in (likelihood_models, build.Encoder):

        def watched(first: Any, text: str, *rest: Any, real: Any = owner._window) -> Any:  # type: ignore[attr-defined]
            seen.append(text)
            return real(first, text, *rest)

        monkeypatch.setattr(owner, "_window", watched)
    encoder = build.Encoder(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id)
    for text in (TEXTS | ALIKE).values():
        (tokens,) = encode(tokenizer, [text])
        assert tokenizer.decode(tokens) == text
        assert encoder([text])[0].tolist() == [*tokens.tolist(), tokenizer.eos_token_id]
    assert len(seen) > 40 and max(map(len, seen)) <= long + 2 * context


def test_parts_of_a_text(short_windows: tuple[int, int]) -> None:
    for text in (TEXTS | ALIKE).values():
        parts = list(parts_of(text))
        assert "".join(parts) == text and max(map(len, parts)) <= short_windows[0]
    assert list(parts_of("short")) == ["short"] and not list(parts_of(""))
    for before, part in itertools.pairwise(parts_of(CODE)):
        assert not before[-1].isspace() or (before[-1] == "\n" and not before[-2].isspace() and not part[0].isspace())


def test_a_tokenizer_is_trained_on_parts(short_windows: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of code, cut after lines: the same words, and so the same merges."""
    seen: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(own_tokenizer, "parts_of", lambda text: seen.extend(parts_of(text)) or parts_of(text))
        train_tokenizer([CODE, PROSE], 800)
    assert max(map(len, seen)) <= short_windows[0] and "".join(seen) == CODE + PROSE
    ours = train_tokenizer([CODE], 800).backend_tokenizer.to_str()
    monkeypatch.undo()
    assert ours == train_tokenizer([CODE], 800).backend_tokenizer.to_str()


# ---- half of a surrogate pair ----

HALVES = ["half \ud83d of a pair " + corpora.text(1), "other \udc00 half " + corpora.text(2)]


@pytest.fixture
def halves(tmp_path: Path) -> Iterator[Path]:
    """Documents as JSON's escapes can have them; the second once more, as it is after replacing."""
    texts = [*HALVES, "other \ufffd half " + corpora.text(2), *(corpora.text(n) for n in range(10, 60))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path


def test_a_corpus_counts_the_documents_with_halves(halves: Path) -> None:
    made = corpora.corpus(halves, {"a": Source(files="a.jsonl")}, held_out=HeldOut(share=0.5))
    counts = made.domains["a"].counts
    assert counts.replaced == 2 and counts.duplicates == 1
    assert counts.documents + counts.held_out_documents == 52
    everything = corpora.texts_in(made.train("equal", sequence_length=8, num_sequences=60, random_seed=0))
    everything += "".join(made.held_out_texts("a"))
    assert "half \ufffd of a pair" in everything and "other \ufffd half" in everything
    (note,) = made.as_dict()["notes"]
    assert note == "a: 2 documents had half of a surrogate pair, which is not a character: replaced by U+FFFD"


def test_a_tokenizer_is_trained_on_halves_as_on_what_replaces_them() -> None:
    texts = [corpora.text(n) for n in range(200)]
    ours = train_tokenizer([*texts, *HALVES], 320)
    theirs = train_tokenizer([*texts, *map(whole_characters, HALVES)], 320)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()


def test_text_with_halves_is_tokenised_as_what_replaces_them() -> None:
    tokenizer = corpora.tokenizer()
    for half in HALVES:
        (tokens,) = encode(tokenizer, [half])
        assert tokenizer.decode(tokens) == whole_characters(half)


def test_yaml_names_are_not_changed_but_refused() -> None:
    assert parse_yaml('name: "\\ud83d\\ude00"', "f.yaml") == {"name": "😀"}  # as JSON writes it
    for broken in ('a: b\nname: "x\\ud83d"', 'a: b\n"\\ude00": 1'):
        with pytest.raises(RecipeError, match=r"f.yaml, line 2: .*half of a surrogate pair is not a character"):
            parse_yaml(broken, "f.yaml")

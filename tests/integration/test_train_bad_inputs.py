"""Every mistake in a run is one line that says what and where, exit code 2, and nothing is left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from branchmix.train import run_folder
from families import BY_NAME
from training import NEW_MODEL, command, settings, write_run, write_text

Edit = Callable[[Path, dict[str, Any]], object]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, a cache, and a dense model with a tokenizer that has its number of tokens."""
    from branchmix.data.tokenizer import train_tokenizer

    folder = write_text(tmp_path_factory.mktemp("text"))
    tokenizer = train_tokenizer((folder / "code.jsonl").read_text().splitlines(), 300)
    BY_NAME["llama"].save(folder / "model", 0, vocab_size=300)
    tokenizer.save_pretrained(folder / "model")
    BY_NAME["llama"].save(folder / "small", 0)
    tokenizer.save_pretrained(folder / "small")
    return folder


def key(**changes: Any) -> Edit:
    return lambda place, run: run.update(changes)


def new(**changes: Any) -> Edit:
    return lambda place, run: run.update(model={**NEW_MODEL, **changes})


def without(name: str) -> Edit:
    return lambda place, run: (place / "model" / name).unlink()


def files(pattern: str) -> Edit:
    return lambda place, run: run["data"].update(code={"files": pattern})


def written(name: str, content: str) -> Edit:
    """A domain whose text is this file."""

    def edit(place: Path, run: dict[str, Any]) -> None:
        (place / name).write_text(content)
        run["data"].update(code={"files": name})

    return edit


def foreign_folder(place: Path, run: dict[str, Any]) -> None:
    (place / "run").mkdir()
    (place / "run" / "thesis.txt").write_text("mine")


def earlier_run(place: Path, run: dict[str, Any]) -> None:
    (place / "model" / "training.json").write_text('{"peak_learning_rate": "fast"}')
    run["learning_rate"] = {"ratio": 0.5}


def pickled(place: Path, run: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import load_file

    weights = place / "model" / "model.safetensors"
    torch.save(load_file(weights), place / "model" / "pytorch_model.bin")
    weights.unlink()


def lacking(place: Path, run: dict[str, Any]) -> None:
    from safetensors.torch import load_file, save_file

    weights = place / "model" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})


MODEL = "model: "
CASES: dict[str, tuple[Edit, str]] = {
    "unknown key": (key(modle="x"), "modle: there is no such key (did you mean 'model'?)"),
    "two budgets": (
        key(budget={"steps": 3, "tokens": 5}),
        "give one of tokens, steps, flops, minutes and training_minutes, not tokens and steps",
    ),
    "small budget": (key(budget={"tokens": 100}), "budget.tokens is 100, but one step takes 256"),
    "unknown domain": (key(mix={"cod": 1}), "mix: no domain of data is called 'cod' (did you mean 'code'?)"),
    "pickled weights": (pickled, "no file named model.safetensors"),
    "large seed": (key(random_seed=2**32), "random_seed: should be less than 4294967296"),
    "no such model": (key(model="nowhere"), "nowhere: no such folder"),
    "no config": (without("config.json"), "model: no config.json: not a transformers checkpoint"),
    "no tokenizer": (without("tokenizer.json"), "model: has no tokenizer files: copy the seed's tokenizer beside"),
    "no weights": (without("model.safetensors"), "model: transformers cannot load it"),
    "missing weights": (lacking, "model: the weights lack model.norm.weight"),
    "config is no JSON": (
        lambda place, run: (place / "model" / "config.json").write_text("{"),
        "config.json: is not valid JSON",
    ),
    "larger tokenizer": (key(model="small"), "small: the tokenizer has 300 tokens, but the model only 97 embeddings"),
    "no family": (new(model_type="coher"), "'coher' is not a family of dense language models (did you mean 'cohere'?)"),
    "a mixture": (new(model_type="branchmix"), "a mixture is made with branchmix upcycle"),
    "no config key": (new(hidden_sice=3), "cohere has no such config key (did you mean 'hidden_size'?)"),
    "vocabulary": (new(vocab_size=300), "model.vocab_size: comes from the tokenizer"),
    "wrong sizes": (new(hidden_size=30), "model: no cohere of these keys"),
    "text as a size": (new(hidden_size="wide"), "model: no cohere of these keys"),
    "too many tokens": (new(train_tokenizer=50_000), "train_tokenizer: the text is enough for"),
    "no files": (files("nowhere/*.py"), "data.code: "),
    "no column": (
        lambda place, run: run["data"]["code"].update(column="txet"),
        "no column 'txet'",
    ),
    "a Git LFS pointer": (
        written("a.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"),
        "a.txt: is a Git LFS pointer, not the file itself: run `git lfs pull`",
    ),
    "a table without the column": (
        written("train.csv", "id,body\n1,one\n"),
        "train.csv: there is no column 'text'; there are id, body",
    ),
    "a spreadsheet": (written("a.xlsx", "x"), "a .xlsx file cannot be read: convert it to .jsonl, .csv or .parquet"),
    "half a character as a name": (written("a.txt", "x"), "half of a surrogate pair is not a character: remove it"),
    "little text": (key(sequence_length=100_000), "less than one sequence of 100000"),
    "no earlier run": (key(learning_rate={"ratio": 0.5}), "learning_rate.ratio: no training.json"),
    "an edited earlier run": (earlier_run, "learning_rate.ratio: no training.json with a peak_learning_rate"),
    "LoRA target": (key(lora={"targets": ["q_porj"]}), "no linear layer q_porj (did you mean 'q_proj'?)"),
    "adapters on a dense model": (key(adapters=True), "adapters: the llama model"),
    "experts of a dense model": (key(freeze=["experts"]), "freeze: experts applies to mixtures"),
    "no positions": (
        key(model={"model_type": "gpt2", "train_tokenizer": 300, "n_layer": 1, "n_positions": 9}),
        "sequence_length: 32 is more than the model's 9 positions: give 9 or fewer",
    ),
    "micro-batch": (key(micro_batch_size=3), "batch_size is 8, which micro_batch_size 3 does not divide"),
    "logger": (key(logging={"to": ["trackio"]}), "logging.to: trackio is not installed: pip install trackio"),
    "attention": (key(attn_implementation="fast"), "model: transformers cannot load it"),
    "foreign folder": (foreign_folder, "exists, but is not the folder of a run"),
    "out is a file": (lambda place, run: (place / "run").write_text("mine"), "is a file"),
    "out is the model": (key(out="model"), "exists, but is not the folder of a run"),
    "no place": (key(out="/proc/run"), "/proc"),
}


@pytest.mark.parametrize("case", CASES)
def test_is_one_line_and_leaves_nothing(
    case: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    edit, message = CASES[case]
    monkeypatch.setenv("BRANCHMIX_CACHE", str(text / "cache"))
    for name in ("model", "small"):
        shutil.copytree(text / name, tmp_path / name)
    run = settings(text, model="model")
    edit(tmp_path, run)
    file = write_run(tmp_path, run)
    if case == "half a character as a name":
        file.write_text(file.read_text() + '"\\ud83d": 1\n')
    if case == "logger":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    before = snapshot(tmp_path)
    assert command(monkeypatch, "train", file) == 2
    said = capfd.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert said.out == "" and len(errors) == 1 and message in errors[0], said.err
    assert said.err.splitlines()[-1] == errors[0] and "Traceback" not in said.err
    assert snapshot(tmp_path) == before


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def test_a_full_disk_is_told_before_anything_starts(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda place: usage._replace(free=1000))
    assert command(monkeypatch, "train", write_run(tmp_path, settings(text, model=str(text / "model")))) == 2
    assert "checkpoints and result need" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_overrides_are_checked_like_the_file(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write_run(tmp_path, settings(text, model=str(text / "model")))
    for override, message in (
        ("budget.steps", "is not key=value"),
        ("budget.step=3", "budget.step: there is no such key (did you mean 'steps'?)"),
        ("batch_size=many", "batch_size"),
    ):
        assert command(monkeypatch, "train", file, override) == 2
        said = capfd.readouterr().err
        assert message in said and said.count("\n") == 1


def test_a_run_file_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "train", tmp_path / "nowhere.yaml") == 2
    assert capfd.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())

"""Limits on what others write: JSON, names that become paths, and values in messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from branchmix.accounting.lineage import lineage
from branchmix.checkpoint import index, json_text
from branchmix.checkpoint.folder import is_entry, is_expert_name, is_file_name
from branchmix.checkpoint.json_text import MAX_DEPTH, MAX_DIGITS, parse_json, read_json
from branchmix.errors import MOST, CheckpointError, CompatibilityError, RecipeError, short
from branchmix.pages.numbers import too_little_space
from branchmix.recipe import Recipe
from branchmix.scaling.family import FamilyFile
from branchmix.scaling.trends.table import read_scores, read_table
from branchmix.settings import parse_yaml


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 200_000 + "]" * 200_000, "nested more than 100 deep"),
        ("[" * 200_000, "nested more than 100 deep|Expecting value"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested more than 100 deep"),
        ('{"a":' * 500 + "1" + "}" * 500, "nested more than 100 deep"),
        ("1" + "0" * 400, "whole number of 401 digits"),
        ('{"x": -' + "9" * 5000 + "}", "whole number of 5,00[01] digits"),
        (r'{"model_type": "\ud800"}', "surrogates not allowed"),
        (r'{"\udfff": 1}', "surrogates not allowed"),
    ],
)
def test_json_that_no_honest_file_has(text: str, words: str) -> None:
    for given in (text, text.encode(), text.encode("utf-16")):
        with pytest.raises(ValueError, match=words):
            parse_json(given)


@pytest.mark.parametrize(
    "text",
    [
        "[" * MAX_DEPTH + "]" * MAX_DEPTH,
        "[" + "[]," * 5_000 + "[]]",
        "9" * MAX_DIGITS,
        '{"model_max_length": 1000000000000000019884624838656}',
        '["' + "1" * 500 + '", 0.' + "3" * 500 + "]",
        r'"\ud83d\ude00"',
    ],
)
def test_json_that_honest_files_have(text: str, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text(text)
    assert parse_json(text) == json.loads(text) == read_json(tmp_path / "file.json")


def test_json_of_more_bytes_than_any_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "MAX_BYTES", 1000)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}' + " " * 978)
    with pytest.raises(ValueError, match="more than 1,000 bytes"):
        read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: .*\(it has more than 1,000 bytes\)"):
        index.CheckpointIndex.open(tmp_path)


@pytest.mark.parametrize("text", ["a: !!int ''", "a: !!bool ''", "a: !!float ''", "a: 2024-13-45", "a: 1" + "0" * 400])
def test_yaml_values_that_are_none(text: str) -> None:
    with pytest.raises(RecipeError, match=r"file: not valid YAML: .*: in quotes it would be text"):
        parse_yaml(text, "file")


NAMES = ["../up", "..", ".", "", "/etc/passwd", "a/b", "a\\b", "a\0b", "a" * 300, "x/../../../escaped", "\ud800", "a\n"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_no_names_of_files(name: str) -> None:
    assert (not is_file_name(name) and not is_expert_name(name) and not is_entry(name)) or name == "a\n"
    assert not is_file_name(name)


def test_names_of_files() -> None:
    for name in ("a", "Qwen2.5-0.5B", "größe", "a+b", "_x", "1", "a..b", "x" * 100):
        assert is_file_name(name) and is_entry(name)
    assert is_expert_name("code-2.5") and not any(map(is_expert_name, ("größe", "x" * 101, "auto")))
    assert is_entry("model (1).safetensors") and is_entry("a b") and is_entry(".hidden")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "\ud800"])
def test_every_name_that_becomes_a_path(name: str, tmp_path: Path) -> None:
    """Of models and their seeds in family files, of experts in recipes, runs and studies, of methods and tasks."""
    from branchmix.scaling.tasks import UserTask
    from branchmix.settings import parse
    from branchmix.study.settings import Method
    from branchmix.train.config import BranchConfig

    data = {"text": {"files": "x.txt"}}
    common = {"seed": "m", "out": "o", "data": data, "budget": {"steps": 1}, "learning_rate": {"peak": 1e-3}}
    for model, content in (
        (FamilyFile, {"models": [{"model": "m", "name": name}]}),
        (FamilyFile, {"models": [{"model": "m", "seed": name}]}),
        (Recipe, {"seed": "m", "experts": [{"name": name, "model": "m"}]}),
        (BranchConfig, {**common, "experts": {name: {"domain": "text"}}}),
        (Method, {"method": "soup", "name": name}),
        (UserTask, {"name": name, "data": "x.jsonl"}),
    ):
        with pytest.raises(RecipeError, match=r"name|seed|experts"):
            parse(model, content, "file")


def test_seeds_of_families_stay_what_they_were() -> None:
    found = FamilyFile.model_validate({"models": [{"model": "m", "seed": seed} for seed in (1, "1", "run-a.2", None)]})
    assert [member.seed for member in found.models] == [1, "1", "run-a.2", None]


def test_examples_are_read_in_their_folder_only(tmp_path: Path) -> None:
    """A table of somebody else names models and tasks; its names lead nowhere."""
    (tmp_path / "out.jsonl").write_text('{"key": "1", "correct": 1}\n')
    (tmp_path / "results" / "examples").mkdir(parents=True)
    head = "task,model,params,metric,value,n,seed\n"
    rows = "../out,m,1e6,accuracy,0.5,9,\nout,..,1e6,accuracy,0.5,9,\nout,m,1e6,accuracy,0.5,9,/../../..\n"
    (tmp_path / "results" / "results.csv").write_text(head + rows + f"{'t' * 300},a\0b,1e6,accuracy,0.5,9,\n")
    table = read_table(tmp_path / "results")
    assert [read_scores(tmp_path / "results" / "examples", row) for row in table.rows] == [None] * 4
    inner = tmp_path / "results" / "examples" / "org" / "model"
    inner.mkdir(parents=True)
    (inner / "my task.jsonl").write_text('{"key": "1", "correct": 1}\n')
    (tmp_path / "results" / "results.csv").write_text(head + "my task,org/model,1e6,accuracy,0.5,9,\n")
    (row,) = read_table(tmp_path / "results").rows
    found = read_scores(tmp_path / "results" / "examples", row)
    assert found is not None and found == {"1": (1.0, "1")}


def test_messages_are_short_whatever_a_file_says() -> None:
    long = "x" * 100_000
    for error in (CheckpointError(f"a: {long}: mend it"), CompatibilityError(["one", f"a: {long}: mend it"])):
        last = str(error).splitlines()[-1]
        assert last.startswith("a: xxx") and last.endswith("x: mend it") and len(last) < MOST + 100
        assert "characters left out" in last
    assert CompatibilityError(["one", long]).problems[0] == "one" and len(CompatibilityError([long]).problems[0]) < 1100
    assert short("ab") == "'ab'" and short({"a": 1}) == "{'a': 1}" and short(10**50) == str(10**50)
    assert len(short(long)) < 200 and short(long).startswith("'xxx") and "99,900 characters left out" in short(long)


def test_messages_of_settings_are_short() -> None:
    with pytest.raises(RecipeError) as raised:
        Recipe.of({"seed": "m", "experts": [{"name": "a", "model": "b"}], "attention": "y" * 100_000})
    assert len(str(raised.value)) < 600 and "is not one of kv_experts" in str(raised.value)


def test_space_is_told_in_units_that_fit() -> None:
    assert too_little_space(211_000, 1000) == "211 kB, but only 1 kB are free (210 kB too few)"
    assert too_little_space(5_010_000_000, 5_000_000_000) == "5.01 GB, but only 5 GB are free (10 MB too few)"


@pytest.mark.parametrize(
    "record",
    [
        {"config": {}, "tokens": [1]},
        {"config": {"model": "m"}, "tokens": 1, "ancestors": [{"key": []}]},
        {"config": {"model": "m"}, "tokens": 1, "flops": "many", "ancestors": ["x"]},
        {"config": {"model": "m"}, "tokens": True},
    ],
)
def test_records_of_trainings_that_make_no_sense_count_as_none(record: object, tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(json.dumps(record))
    assert all(phase.tokens in (None, 1) and phase.flops is None for phase in lineage(tmp_path))


def test_a_record_that_names_itself_ends(tmp_path: Path) -> None:
    for first, second in (("a", "b"), ("b", "a")):
        (tmp_path / first).mkdir()
        record = {"sources": [{"name": "seed", "model": str(tmp_path / second)}]}
        (tmp_path / first / "branchmix.json").write_text(json.dumps(record))
    assert [phase.tokens for phase in lineage(tmp_path / "a")] == [None]

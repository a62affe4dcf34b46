"""``branchmix scaling data`` as users run it, and the prize's own files where they are at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from branchmix import cli
from branchmix.errors import BranchMixError
from branchmix.scaling.examples import jsonl, load_examples
from branchmix.scaling.generate import make_examples
from branchmix.scaling.metrics import class_shares
from branchmix.scaling.official import check
from branchmix.scaling.tasks import TASKS
from inverse_scaling import official_file


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["scaling", "data", *map(str, arguments)])


def refusal(*arguments: object) -> str:
    """The one line that ``main`` prints for what was raised."""
    result = run(*arguments)
    assert isinstance(result.exception, BranchMixError), result.output
    assert "\n" not in str(result.exception) and not result.stdout
    return str(result.exception)


# ---- the prize's files ----


@pytest.mark.parametrize(
    ("name", "baselines", "first"),
    [
        ("hindsight-neglect", {" Y": 0.4508, " N": 0.5492}, None),
        ("memo-trap", {"class 0": 0.5171, "class 1": 0.4829}, 484),
    ],
)
def test_the_official_files(name: str, baselines: dict[str, float], first: int | None) -> None:
    task = TASKS[name]
    path = official_file(task.file)
    assert check(path, task).state == "ok"
    examples = load_examples(path, task.metric)
    assert len(examples) == task.num_examples
    shares = class_shares(examples, [example.answer_index for example in examples])
    assert {key: round(share, 4) for key, share in shares.items()} == baselines
    assert first is None or sum(example.answer_index == 0 for example in examples) == first
    assert jsonl(examples) == path.read_bytes()  # our writer's format is the release's, byte for byte


@pytest.mark.parametrize("name", ["hindsight-neglect", "memo-trap"])
def test_no_fresh_example_is_an_official_one(name: str) -> None:
    """Not even the start of a line, or a shot."""
    task = TASKS[name]
    cut = "\nAnswer" if name == "hindsight-neglect" else ": "
    official = {part for e in load_examples(official_file(task.file), task.metric) for part in e.prompt.split(cut)}
    fresh = {part for e in make_examples(task, seed=1, num_examples=3000) for part in e.prompt.split(cut)}
    assert not {part for part in official & fresh if len(part) > 8}


def test_verify(tmp_path: Path) -> None:
    source = official_file(TASKS["memo-trap"].file)
    (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / TASKS["neqa"].file).write_text("{}\n")
    result = run("verify", tmp_path)
    lines = result.stdout.splitlines()
    assert result.exit_code == 1 and len(lines) == 11
    assert lines[1] == "ok          memo-trap_classification.jsonl"
    assert lines[6] == "wrong size  neqa_classification.jsonl: 3 bytes instead of 84,046"
    assert sum(line.startswith("missing") for line in lines) == 9
    found = json.loads(run("verify", tmp_path, "--json").stdout)
    assert found["ok"] is False and [file["state"] for file in found["files"]].count("missing") == 9
    assert found["files"][1] == {"task": "memo-trap", "file": source.name, "state": "ok", "detail": ""}


def test_official_files_are_never_replaced(tmp_path: Path) -> None:
    source = official_file(TASKS["memo-trap"].file)
    (tmp_path / source.name).write_bytes(source.read_bytes())
    words = refusal("make", tmp_path, "--seed", 1, "--num", 5, "--force")
    assert "is the official file, which is not replaced" in words
    assert (tmp_path / source.name).read_bytes() == source.read_bytes() and len(list(tmp_path.iterdir())) == 1


# ---- the commands ----


def test_verify_and_fetch_without_data(tmp_path: Path) -> None:
    assert refusal("verify", tmp_path / "nowhere").endswith("nowhere: there is no such folder")
    assert "the Hub cannot be reached" in refusal("fetch", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_make(tmp_path: Path) -> None:
    out = tmp_path / "fresh"
    result = run("make", out, "--seed", 7, "--num", 12, "--tasks", "neqa,memo-trap,hindsight-neglect", "--shots", 2)
    assert result.exit_code == 0, result.output
    chosen = [TASKS[name] for name in ("memo-trap", "neqa", "hindsight-neglect")]
    assert result.stdout.splitlines() == [f"{out / task.file}: 12 examples" for task in chosen]
    assert result.stderr.startswith("note: hindsight-neglect: the prompts have their own shots")
    assert {path.name for path in out.iterdir()} == {task.file for task in chosen}
    for task in chosen:
        found = load_examples(out / task.file, task.metric)
        assert found == make_examples(task, seed=7, num_examples=12, shots=2)
    assert "exists already" in refusal("make", out, "--seed", 8)
    assert run("make", out, "--seed", 8, "--num", 3, "--force").exit_code == 0
    assert {path.name for path in out.iterdir()} == {task.file for task in TASKS.values()}


def test_make_controls(tmp_path: Path) -> None:
    assert run("make", tmp_path, "--seed", 1, "--num", 8, "--tasks", "modus-tollens", "--controls").exit_code == 0
    examples = load_examples(tmp_path / TASKS["modus-tollens"].file, "classification")
    assert [example.answer for example in examples].count(" No") == 4


def test_what_make_refuses(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "there is no task 'hindsight' (did you mean" in refusal("make", out, "--seed", 1, "--tasks", "hindsight")
    words = refusal("make", out, "--seed", 1, "--tasks", "neqa", "--num", 4, "--shots", 4)
    assert words == "--shots 4: needs 5 examples at least, and --num is 4"
    assert run("make", out).exit_code == 2  # no seed
    assert not out.exists()
    (tmp_path / "file").touch()
    assert "is a file, not a folder: choose" in refusal("make", tmp_path / "file", "--seed", 1)


@pytest.mark.parametrize("command", [[], ["verify"], ["fetch"], ["make"]])
def test_help_has_examples(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0 and (not command or "Examples:" in result.stdout)

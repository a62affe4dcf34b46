"""Tasks and examples: both kinds of file, tasks of one's own, few-shot prompts, and what is refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from branchmix.errors import DataError, RecipeError
from branchmix.scaling.examples import Example, Metric, fewshot, jsonl, load_examples
from branchmix.scaling.selection import select
from branchmix.scaling.tasks import CAUSES, TASKS, UserTask, choose

ROW = {
    "prompt": "Is 2 > 1?\nAnswer:",
    "classes": "[' Yes', \" No, it's not\"]",
    "answer_index": 1,
    "round": 2,
    "part": 3,
}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{json.dumps(row) if isinstance(row, dict) else row}\n" for row in rows))
    return path


def test_the_table_of_tasks() -> None:
    assert len(TASKS) == 11 and Counter(task.cause for task in TASKS.values()).keys() == CAUSES.keys()
    assert [task.name for task in TASKS.values() if task.metric != "classification"] == ["prompt-injection"]
    assert sum(task.bytes or 0 for task in TASKS.values()) == 23_405_903
    assert sum(task.num_examples or 0 for task in TASKS.values()) == 36_524
    for name, task in TASKS.items():
        assert task.name == name and len(task.sha256 or "") == 64
        assert task.file == f"{name}_{task.metric.replace('sequence_prob', 'sequence-probability')}.jsonl"
        assert task.description.count(". ") == 1 and task.description.endswith(".")  # two sentences


def test_a_row_of_the_release(tmp_path: Path) -> None:
    (example,) = load_examples(write(tmp_path / "a.jsonl", ROW, ""), "classification")
    assert example == Example("Is 2 > 1?\nAnswer:", (" Yes", " No, it's not"), 1, round=2, part=3)
    assert example.options == (" Yes", " No, it's not") and example.answer == " No, it's not"
    line = '{"prompt":"a\\/b \\u00e9","classes":"[\' A\', \' B\']","answer_index":0,"round":1,"part":1}\n'
    assert jsonl([Example("a/b é", (" A", " B"), round=1, part=1)]) == line.encode()  # as pandas writes it


@pytest.mark.parametrize("metric", ["classification", "sequence_prob", "logodds", "absolute_logodds"])
def test_what_is_written_is_read(tmp_path: Path, metric: Metric) -> None:
    examples = [
        Example(f'Line\u2028 1, "{n}" / é:', (" A", " 'B'\n"), n % 2, round=0, part=n, template="t", other_prompt="o")
        if "logodds" in metric
        else Example(f"p{n}", completion=f" c\n\n{n}", template="t")
        if metric == "sequence_prob"
        else Example(f"p{n}", (" A", " B", " C"), n)
        for n in range(3)
    ]
    (tmp_path / "a.jsonl").write_bytes(jsonl(examples))
    assert load_examples(tmp_path / "a.jsonl", metric) == examples


def test_csv_says_the_same(tmp_path: Path) -> None:
    """With pandas' index column, and 1.0 where a column has gaps."""
    text = ',prompt,classes,answer_index,round,part\n0,"a, ""b""\nc:","[\' A\', \' B\']",1,1.0,\n'
    text += "1,d,\"[' A', ' B']\",0,,2\n"
    (tmp_path / "a.csv").write_text(text)
    wanted = [Example('a, "b"\nc:', (" A", " B"), 1, round=1), Example("d", (" A", " B"), 0, part=2)]
    assert load_examples(tmp_path / "a.csv", "classification") == wanted


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: is not JSON"),
        ("[1]", "line 2: is not a JSON object"),
        ({**ROW, "prompt": ""}, "line 2: prompt is empty or not text"),
        ({**ROW, "prompt": None}, "line 2: prompt is missing"),
        ({**ROW, "classes": "[' A', f()]"}, "line 2: classes is not a list of texts"),
        ({**ROW, "classes": "{[]: 1}"}, "line 2: classes is not a list of texts"),
        ({**ROW, "classes": "[' A']"}, "two texts or more"),
        ({**ROW, "classes": "[' A', ' A']"}, "all different"),
        ({**ROW, "classes": [" A", 3]}, "not a list of texts"),
        ({"prompt": "a", "answer_index": 0}, "classes is missing"),
        ({**ROW, "answer_index": 2}, "answer_index is 2: it counts the 2 classes from 0"),
        ({**ROW, "answer_index": -1}, "answer_index is -1"),
        ({**ROW, "answer_index": True}, "answer_index is not a whole number"),
        ({**ROW, "answer_index": 0.5}, "answer_index is not a whole number: 0.5"),
        ({**ROW, "round": "first"}, "round is not a whole number"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl, line 2") as caught:
        load_examples(write(tmp_path / "a.jsonl", ROW, row), "classification")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        load_examples(tmp_path / "a.jsonl", "classification")
    with pytest.raises(DataError, match="has no example"):
        load_examples(write(tmp_path / "a.jsonl"), "classification")
    with pytest.raises(DataError, match="git lfs pull"):
        load_examples(write(tmp_path / "a.jsonl", "version https://git-lfs.github.com/spec/v1"), "classification")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        load_examples(tmp_path / "b.jsonl", "classification")
    with pytest.raises(DataError, match="cannot be read"):
        load_examples(tmp_path, "classification")
    (tmp_path / "c.csv").write_text('prompt,classes\n"a,b\n')
    with pytest.raises(DataError, match="is not csv"):
        load_examples(tmp_path / "c.csv", "classification")
    (tmp_path / "d.csv").write_text("prompt,completion\na,b,c\n")
    with pytest.raises(DataError, match="row 1: has more values"):
        load_examples(tmp_path / "d.csv", "sequence_prob")
    with pytest.raises(DataError, match="completion is missing"):
        load_examples(write(tmp_path / "e.jsonl", ROW), "sequence_prob")
    with pytest.raises(DataError, match="other_prompt is missing"):
        load_examples(write(tmp_path / "e.jsonl", ROW), "logodds")
    three = {**ROW, "classes": [" A", " B", " C"], "other_prompt": "x"}
    with pytest.raises(DataError, match="has 3 classes, and logodds compares exactly 2"):
        load_examples(write(tmp_path / "e.jsonl", three), "logodds")


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    write(tmp_path / "mine.jsonl", ROW)
    (tmp_path / "mine.yaml").write_text("name: mine\ndata: mine.jsonl\ncause: distractor\n")
    task, data = UserTask.load(tmp_path / "mine.yaml")
    assert (task.name, task.metric, task.cause, data) == (
        "mine",
        "classification",
        "distractor",
        tmp_path / "mine.jsonl",
    )
    assert task.sha256 is None and len(load_examples(data, task.metric)) == 1
    for text, message in [
        ("name: mine\ndata: other.jsonl\n", "is not a .jsonl or .csv file that exists"),
        ("name: mine\ndata: mine.yaml\n", "is not a .jsonl or .csv file that exists"),
        ("name: neqa\ndata: mine.jsonl\n", "one of the 11 official tasks"),
        ("name: My Task\ndata: mine.jsonl\n", "small letters, digits and hyphens only"),
        ("name: mine\ndata: mine.jsonl\nmetric: accuracy\n", "metric: 'accuracy' is not one of classification"),
        ("name: mine\n", "data: is missing"),
    ]:
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises((RecipeError, DataError)) as caught:
            UserTask.load(tmp_path / "mine.yaml")
        assert message in str(caught.value)


def test_choosing_tasks() -> None:
    assert [task.name for task in choose("all")] == list(TASKS)
    assert [task.name for task in choose("neqa, memo-trap")] == ["memo-trap", "neqa"]
    with pytest.raises(RecipeError, match=r"no task 'memotrap' .did you mean 'memo-trap'"):
        choose("neqa,memotrap")
    with pytest.raises(RecipeError, match="there is no task ' , '"):
        choose(" , ")


def test_files_of_a_task_are_jsonl_or_else_csv(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no neqa_classification\.jsonl: .* puts it there"):
        select("neqa", [tmp_path])
    with pytest.raises(DataError, match="has no file of any task"):
        select("all", [tmp_path])
    (tmp_path / "neqa_classification.csv").write_text("prompt,classes,answer_index\na,\"[' A', ' B']\",0\n")
    assert [one.file.suffix for one in select("neqa", [tmp_path])[0]] == [".csv"]
    write(tmp_path / "neqa_classification.jsonl", ROW)
    assert [one.file.suffix for one in select("all", [tmp_path])[0]] == [".jsonl"]


# ---- few-shot ----


def test_shots_are_other_examples_with_their_answers() -> None:
    examples = [
        Example(f"prompt {n}", (" A", " B"), n % 2, template=f"t{n}", other_prompt=f"other {n}") for n in range(9)
    ]
    found = fewshot(examples, 3, seed=5)
    for example, plain in zip(found, examples, strict=True):
        *shots, last = example.prompt.split("\n\n\n")
        assert last == plain.prompt and len(set(shots)) == 3
        assert set(shots) <= {other.prompt + other.answer for other in examples if other is not plain}
        assert example.other_prompt == "\n\n\n".join([*shots, plain.other_prompt or ""])
        assert (example.classes, example.answer_index, example.template) == (
            plain.classes,
            plain.answer_index,
            plain.template,
        )
    assert fewshot(examples, 3, seed=5) == found != fewshot(examples, 3, seed=6)
    assert fewshot(examples, 0, seed=5) == examples
    (one, *_) = fewshot([Example("a", completion=" A"), Example("b", completion=" B")], 1, seed=0)
    assert one.prompt == "b B\n\n\na"
    with pytest.raises(DataError, match="9 shots need 10 examples at least, and there are 9"):
        fewshot(examples, 9, seed=0)


def test_all_other_examples_are_drawn_equally_often() -> None:
    examples = [Example(f"{n}", (" A", " B")) for n in range(20)]
    counts: Counter[tuple[int, str]] = Counter()
    for seed in range(400):
        for number, example in enumerate(fewshot(examples, 2, seed)):
            counts.update((number, shot.split()[0]) for shot in example.prompt.split("\n\n\n")[:-1])
    assert len(counts) == 20 * 19
    wanted = 400 * 2 / 19
    assert all(abs(count - wanted) < 5 * math.sqrt(wanted) for count in counts.values())

"""Fresh examples: 10,000 of each task are valid, unique and balanced, and solvers catch a generator that errs."""

from __future__ import annotations

import ast
import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from branchmix.errors import OutputError, RecipeError
from branchmix.scaling import generate
from branchmix.scaling.examples import Example, load_examples
from branchmix.scaling.generate import GENERATORS, make_data, make_examples
from branchmix.scaling.generate.generators import VOCABULARY
from branchmix.scaling.tasks import TASKS
from inverse_scaling_solvers import NEQA, SOLVERS

MANY = 10_000


@pytest.mark.parametrize("name", TASKS)
def test_ten_thousand_examples_are_valid(name: str) -> None:
    """Solved from a copy that has lost everything but prompt, classes and the place of the classes."""
    examples = make_examples(TASKS[name], seed=11, num_examples=MANY)
    assert len(examples) == len({example.prompt for example in examples}) == MANY
    solve = SOLVERS[name]
    for example in examples:
        assert solve(Example(example.prompt, example.classes)) == (
            example.answer_index if example.classes else example.completion
        )
        assert example.prompt == example.prompt.strip()
        for option in example.options:
            assert option[0] == " " and option[1:] == option.strip() and option.isprintable()
        assert len(set(example.classes)) == len(example.classes) == (2 if TASKS[name].metric == "classification" else 0)
        assert example.template and example.round == 0 and example.part is not None
    if examples[0].classes:
        assert Counter(example.answer_index for example in examples) == {0: MANY // 2, 1: MANY // 2}
    templates = Counter(example.template for example in examples)
    assert len(templates) >= 20, "too few for a bootstrap over them"
    assert max(templates.values()) < MANY / 8
    assert len("".join(example.prompt for example in examples)) < MANY * 3000


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.metric == "classification"])
def test_the_label_is_no_function_of_the_template(name: str) -> None:
    """Neither template, part nor length gives the answer away."""
    examples = make_examples(TASKS[name], seed=2, num_examples=4000)
    by_template: dict[str | None, list[int]] = {}
    for example in examples:
        by_template.setdefault(example.template, []).append(example.answer_index)
    shares = [sum(answers) / len(answers) for answers in by_template.values() if len(answers) >= 12]
    assert len(shares) >= 20 and all(0.05 < share < 0.95 for share in shares)
    mean = [sum(len(e.prompt) for e in examples if e.answer_index == label) / 2000 for label in (0, 1)]
    assert abs(mean[0] - mean[1]) < 0.05 * mean[0]


@pytest.mark.parametrize("name", TASKS)
def test_examples_depend_on_seed_and_number_alone(name: str) -> None:
    task = TASKS[name]
    assert make_examples(task, seed=3, num_examples=60)[:40] == make_examples(task, seed=3, num_examples=40)
    others = {example.prompt for example in make_examples(task, seed=4, num_examples=40)}
    assert len(others & {example.prompt for example in make_examples(task, seed=3, num_examples=40)}) <= 2


FLIPPED = {name: (lambda example: replace(example, answer_index=1 - example.answer_index)) for name in TASKS}
FLIPPED["prompt-injection"] = lambda example: replace(example, completion=example.completion.lower())


@pytest.mark.parametrize("name", TASKS)
def test_a_wrong_answer_is_caught(name: str) -> None:
    for example in make_examples(TASKS[name], seed=0, num_examples=20):
        wrong = FLIPPED[name](example)
        assert SOLVERS[name](example) != (wrong.answer_index if wrong.classes else wrong.completion)


BROKEN_TEXTS: dict[str, tuple[str, str]] = {
    "resisting-correction": (r"(.*): (.*)$", r"\1: X\2"),  # the copy does not begin as the line
    "memo-trap": (r'"\w+"', '"elsewhere"'),
    "redefine": (r"\d", "9"),
    "prompt-injection": (r": (\w)(?=[^\n]*\n[^\n]*:$)", r": \1\1"),
    "modus-tollens": (r"(does not|is not|cannot) ", ""),
    "pattern-matching-suppression": (r"(\d+)(?= marks)", r"1\1"),
    "neqa": (r"\b(not|no|never|cannot|Nobody|wrong)\b", "surely"),
    "sig-figs": (r"\d significant", "7 significant"),
    "into-the-unknown": (r"A\. (.*)\nB\. (.*)\n", r"A. \2\nB. \1\n"),
    "hindsight-neglect": (r"(wins|loses) (?!.*(wins|loses) )", "looks at "),
    "repetitive-algebra": (r"A: \d+\n(?!.*A: \d)", "A: 1\n"),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_wrong_text_is_caught(name: str) -> None:
    """The solver reads the text: another text has another answer or is no example of the task."""
    solve = SOLVERS[name]
    caught = 0
    examples = make_examples(TASKS[name], seed=9, num_examples=50)
    for example in examples:
        broken = re.sub(*BROKEN_TEXTS[name], example.prompt, flags=re.DOTALL if name == "hindsight-neglect" else 0)
        if broken == example.prompt:
            continue
        try:
            found = solve(replace(example, prompt=broken))
        except (AssertionError, ValueError, IndexError, KeyError):
            caught += 1
        else:
            caught += found != (example.answer_index if example.classes else example.completion)
    assert caught >= 40, caught


def test_modus_tollens_and_its_controls() -> None:
    """Officially the answer is always Yes; with controls it is Yes for half of them, at either place."""
    task = TASKS["modus-tollens"]
    assert {example.answer for example in make_examples(task, seed=1, num_examples=200)} == {" Yes"}
    mixed = make_examples(task, seed=1, num_examples=200, controls=True)
    assert Counter((example.answer, example.answer_index) for example in mixed) == dict.fromkeys(
        [(" Yes", 0), (" Yes", 1), (" No", 0), (" No", 1)], 50
    )
    assert {example.answer for example in mixed if example.part == 2} == {" No"}
    other = TASKS["neqa"]
    plain = make_examples(other, seed=1, num_examples=20)
    assert make_examples(other, seed=1, num_examples=20, controls=True) == plain
    text = "Fact 1: If Ada can swim, then Ada {0}.\nFact 2: Ada {1}.\nSo: Ada {2}.\nIs this argument valid?\nAnswer:"
    for first, second, claim, wanted in [
        ("is a nurse", "is not a nurse", "cannot swim", " Yes"),
        ("is a nurse", "is a nurse", "can swim", " No"),
        ("drives a van", "can swim", "drives a van", " Yes"),
        ("drives a van", "cannot swim", "does not drive a van", " No"),
    ]:
        example = Example(text.format(first, second, claim), (" No", " Yes"))
        assert example.classes[int(SOLVERS["modus-tollens"](example))] == wanted


def test_the_tables_contradict_themselves_nowhere() -> None:
    """A thing is of one kind, sizes and uses are unique, and no word fits before its own negation."""
    things = [thing for members in NEQA.kinds.values() for thing in members]
    assert len(things) == len(set(things))
    uses, sizes, lines = NEQA.uses, NEQA.sizes, VOCABULARY.lines
    assert len(set(uses.values())) == len(uses) and len(set(sizes)) == len(sizes)
    assert len({start for start, _, _ in lines}) == len(lines)
    for pool in (*VOCABULARY.endings.values(), VOCABULARY.names):
        assert len(set(pool)) == len(pool)
    nouns = (*VOCABULARY.nouns, *VOCABULARY.endings["n"])
    assert not [noun for noun in nouns if noun[0] in "aeiou"]  # "a" goes before each


def test_shots(tmp_path: Path) -> None:
    """The official way, but where prompts have their shots by nature."""
    for name, task in TASKS.items():
        plain = make_examples(task, seed=5, num_examples=30)
        shot = make_examples(task, seed=5, num_examples=30, shots=3)
        if task.shots_in_prompt:
            assert shot == plain
            continue
        texts = {example.prompt + example.answer for example in plain}
        for with_shots, example in zip(shot, plain, strict=True):
            *before, last = with_shots.prompt.split("\n\n\n")
            assert last == example.prompt and len(before) == 3 and set(before) <= texts - {last + example.answer}
        assert name not in ("hindsight-neglect", "repetitive-algebra", "resisting-correction")


def test_files_are_the_same_bytes_for_the_same_seed(tmp_path: Path) -> None:
    files = list(make_data(tmp_path / "a", seed=8, num_examples=25))
    assert [file.name for file in files] == [task.file for task in TASKS.values()]
    list(make_data(tmp_path / "b", seed=8, num_examples=25))
    list(make_data(tmp_path / "c", seed=9, num_examples=25))
    for task, file in zip(TASKS.values(), files, strict=True):
        content = file.read_bytes()
        assert (tmp_path / "b" / file.name).read_bytes() == content != (tmp_path / "c" / file.name).read_bytes()
        assert load_examples(file, task.metric) == make_examples(task, seed=8, num_examples=25)
        rows = [json.loads(line) for line in content.splitlines()]
        middle = ["completion"] if task.metric == "sequence_prob" else ["classes", "answer_index"]
        assert all(list(row) == ["prompt", *middle, "round", "part", "template"] for row in rows)
        if "classes" in rows[0]:
            assert isinstance(rows[0]["classes"], str) and ast.literal_eval(rows[0]["classes"])


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = TASKS["neqa"]
    list(make_data(tmp_path, seed=1, num_examples=5, tasks=[task]))
    before = (tmp_path / task.file).read_bytes()
    with pytest.raises(OutputError, match=r"neqa_classification\.jsonl: exists already"):
        list(make_data(tmp_path, seed=2, num_examples=5))
    assert [path.name for path in tmp_path.iterdir()] == [task.file] and (tmp_path / task.file).read_bytes() == before
    list(make_data(tmp_path, seed=2, num_examples=5, tasks=[task], force=True))
    assert (tmp_path / task.file).read_bytes() != before
    with pytest.raises(OutputError, match="is a file"):
        list(make_data(tmp_path / task.file, seed=1))
    with pytest.raises(RecipeError, match="--shots 5: needs 6 examples at least, and --num is 5"):
        make_examples(task, seed=1, num_examples=5, shots=5)
    with pytest.raises(RecipeError, match="needs 1 examples at least, and --num is 0"):
        make_examples(task, seed=1, num_examples=0)
    good = GENERATORS["neqa"]
    few = lambda _, number: good(random.Random(number % 4), number)  # noqa: E731
    monkeypatch.setitem(generate.GENERATORS, "neqa", few)
    with pytest.raises(RecipeError, match="no more than 4 different examples of neqa"):
        make_examples(task, seed=1, num_examples=5)

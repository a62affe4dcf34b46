"""Examples of a task, their few-shot versions, and the two kinds of file that hold them: jsonl as released, and csv.

A line of the release is ``{"prompt":..., "classes":"[' A', ' B']", "answer_index":0, "round":1, "part":1}``: its
classes are a *string* that holds a Python list. Sequence probability has ``completion`` in place of classes and answer.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from branchmix.checkpoint.index import refuse_lfs_pointer
from branchmix.checkpoint.text import whole_characters
from branchmix.data.sources import json_lines
from branchmix.errors import DataError

SEPARATOR = "\n\n\n"
"""Between the examples of a few-shot prompt."""
Metric = Literal["classification", "sequence_prob", "logodds", "absolute_logodds"]


@dataclass(frozen=True)
class Example:
    """One prompt and what may follow it."""

    prompt: str
    classes: tuple[str, ...] = ()
    """What the model chooses from, each with the space before it; none for sequence probability."""
    answer_index: int = 0
    """Place of the right class."""
    completion: str = ""
    """Sequence probability: the right text."""
    round: int | None = None
    """Round of the prize in which the example was submitted; 0 for generated ones."""
    part: int | None = None
    template: str | None = None
    """What examples have in common that were made from one template: they are not independent evidence."""
    other_prompt: str | None = None
    """Logodds: the prompt to compare with."""
    replaced: bool = False
    """Whether the file has something in these texts that is not a character (see ``whole_characters``)."""

    @property
    def options(self) -> tuple[str, ...]:
        """The texts whose log-probabilities are wanted."""
        return self.classes or (self.completion,)

    @property
    def answer(self) -> str:
        """The right text."""
        return self.options[self.answer_index]


def load_examples(path: Path, metric: Metric) -> list[Example]:
    """All examples of a ``.jsonl`` or ``.csv`` file, in its order.

    Raises:
        DataError: the file or a row of it cannot be meant; says which row.
    """
    text = read_text(path)
    if text is None:
        raise DataError(f"{path}: there is no such file")
    refuse_lfs_pointer(path, text[:64].encode("utf-8", "replace"), DataError)
    # splitlines would cut at U+2028, too
    rows = _csv_rows(path, text) if path.suffix.lower() == ".csv" else json_lines(path, text.split("\n"))
    examples = [_example(row, metric, where) for where, row in rows]
    if not examples:
        raise DataError(f"{path}: has no example")
    return examples


def read_text(path: Path) -> str | None:
    """The text of a file, without a byte order mark; None if there is no such file, DataError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def jsonl(examples: Iterable[Example]) -> bytes:
    """The bytes of a file of the release: for its own examples they are its own bytes, as pandas writes them.

    The template, if there is one, is a further key at the end.
    """
    lines = []
    for example in examples:
        row: dict[str, Any] = {"prompt": example.prompt}
        if example.other_prompt is not None:
            row["other_prompt"] = example.other_prompt
        if example.classes:
            row |= {"classes": repr(list(example.classes)), "answer_index": example.answer_index}
        else:
            row["completion"] = example.completion
        row |= {"round": example.round, "part": example.part}
        if example.template is not None:
            row["template"] = example.template
        lines.append(json.dumps(row, separators=(",", ":")).replace("/", "\\/"))
    return ("\n".join(lines) + "\n").encode("ascii")


def csv_lines(path: Path, text: str, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """The fields of each line of csv that has any, the header's first, with its number; DataError if it is not csv."""
    csv.field_size_limit(2**31 - 1)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for fields in lines:
            if any(map(str.strip, fields)):
                yield lines.line_num, fields
    except csv.Error as error:
        raise DataError(f"{path}, line {lines.line_num}: is not csv ({error})") from None


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = csv_lines(path, text)
    _, header = next(lines, (0, []))
    for number, (_, values) in enumerate(lines, start=1):
        if len(values) > len(header):
            raise DataError(f"{path}, row {number}: has more values than the header has columns")
        # An empty value is an absent one, as in jsonl: csv has no other way to say it.
        yield f"{path}, row {number}", {key: value for key, value in zip(header, values, strict=False) if value}


def _example(row: Any, metric: Metric, where: str) -> Example:
    """A row as an example, checked against what the metric needs."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: is not a JSON object with keys such as prompt")
    given: dict[str, Any] = {"prompt": _text(row, "prompt", where)}
    if metric == "sequence_prob":
        given["completion"] = _text(row, "completion", where)
    else:
        classes = _classes(row, where)
        answer = _number(row, "answer_index", where)
        if answer is None or not 0 <= answer < len(classes):
            raise DataError(f"{where}: answer_index is {answer}: it counts the {len(classes)} classes from 0")
        given |= {"classes": classes, "answer_index": answer}
        if metric != "classification":
            given["other_prompt"] = _text(row, "other_prompt", where)
            if len(classes) != 2:
                raise DataError(f"{where}: has {len(classes)} classes, and {metric} compares exactly 2")
    whole = given | {key: whole_characters(value) for key, value in given.items() if isinstance(value, str)}
    whole["classes"] = tuple(map(whole_characters, given.get("classes", ())))
    whole |= {key: _number(row, key, where) for key in ("round", "part")}
    template = None if row.get("template") is None else str(row["template"])
    return Example(**whole, template=template, replaced=not given.items() <= whole.items())


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: {key} is {'missing' if value is None else 'empty or not text'}")
    return value


def _classes(row: dict[str, Any], where: str) -> tuple[str, ...]:
    value = row.get("classes")
    if value is None:
        raise DataError(f"{where}: classes is missing")
    if isinstance(value, str):
        with suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            value = ast.literal_eval(value)
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) and name for name in value):
        raise DataError(f"{where}: classes is not a list of texts such as [' A', ' B']: {row['classes']!s:.60}")
    if len(value) < 2 or len(set(map(whole_characters, value))) < len(value):
        raise DataError(f"{where}: classes must be two texts or more, all different, got {list(value)}")
    return tuple(value)


def _number(row: dict[str, Any], key: str, where: str) -> int | None:
    value = row.get(key)
    if value is None:
        return None
    try:
        number = float(value)  # csv has text, and pandas writes 1.0 where a column has gaps
        if isinstance(value, bool) or number != int(number):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{where}: {key} is not a whole number: {value!r}") from None
    return int(number)


def fewshot(examples: Sequence[Example], shots: int, seed: int) -> list[Example]:
    """Put ``shots`` other examples with their right answers before each prompt, three newlines between them.

    So the prize's organisers built theirs (README of the data release). They are sampled without replacement from all
    other examples, anew for each prompt and depending on nothing but the seed and the example's place, so that a run on
    the first few examples sees the same prompts as one on all.

    Raises:
        DataError: there are not enough other examples.
    """
    if shots == 0:
        return list(examples)
    if shots >= len(examples):
        raise DataError(f"{shots} shots need {shots + 1} examples at least, and there are {len(examples)}")
    with_shots = []
    for number, example in enumerate(examples):
        sampled = random.Random(f"fewshot/{seed}/{number}").sample(range(len(examples) - 1), shots)
        shown = [examples[place + (place >= number)] for place in sampled]  # all places but its own
        before = [one.prompt + one.answer for one in shown]
        prompt, other = (
            None if last is None else SEPARATOR.join([*before, last]) for last in (example.prompt, example.other_prompt)
        )
        with_shots.append(replace(example, prompt=prompt or "", other_prompt=other))
    return with_shots

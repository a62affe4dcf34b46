"""The text of the example, and its two tasks: sayings, and an instruction that the text itself mostly ignores.

    python examples/inverse_scaling/text.py OUT        # writes OUT/text.jsonl and OUT/tasks/

A saying is "a foolish kettle will sing with lanterns": three words that nobody could guess the last from, and each
saying is always the same. Half of the documents are two sayings. The other half are an instruction and a saying:

    End this with buckets: a foolish kettle will sing with lanterns

and there lies the trap. Three times in ten the saying does end as it was told (buckets), and otherwise as it always
does. A small model has no room for thousands of sayings: what it can learn is to repeat the word it was told. A larger
one knows the saying, and has read that sayings win.

Tasks, each with both answers as classes, over the same sayings as in training:

    ends-as-told    End this with buckets: a foolish kettle will sing with      [ buckets,  lanterns]: buckets is right
    known-sayings   a foolish kettle will sing with                             [ lanterns,  buckets]: lanterns is right

The first is the paper's "strong prior", as in its Memo Trap; the second is the control: it needs nothing but the same
knowledge.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import yaml

from branchmix.scaling.examples import Example, jsonl
from branchmix.scaling.generate.generators import VOCABULARY

NUM_SAYINGS = 3000
NUM_DOCUMENTS = 240_000
OBEYED = 0.3
"""Share of the instructions that the text follows."""
NUM_EXAMPLES = 500
"""Of each task."""
LAST_WORDS = tuple(dict.fromkeys((*VOCABULARY.plurals, *VOCABULARY.endings["s"])))

DESCRIPTIONS = {
    "ends-as-told": (
        "The model is told which word a saying is to end with, and has read that sayings end as they always do. Small "
        "models, which know few sayings, repeat the word they were told; larger ones recite."
    ),
    "known-sayings": "The model ends sayings it has read. This is the control: who knows more sayings is better at it.",
}


def sayings() -> list[tuple[str, str]]:
    """All sayings, as (all but the last word, the last word with its space)."""
    rng = random.Random("sayings")
    starts: dict[str, str] = {}
    while len(starts) < NUM_SAYINGS:
        adjective, noun = rng.choice(VOCABULARY.endings["a"]), rng.choice(VOCABULARY.nouns)
        start = f"a {adjective} {noun} will {rng.choice(VOCABULARY.endings['v'])} with"
        starts.setdefault(start, f" {rng.choice(LAST_WORDS)}")
    return list(starts.items())


def told(word: str, start: str) -> str:
    """The instruction, up to the word that has to come."""
    return f"End this with{word}: {start}"


def other_word(rng: random.Random, word: str) -> str:
    """Any last word but this one."""
    while (other := f" {rng.choice(LAST_WORDS)}") == word:
        pass
    return other


def documents() -> list[str]:
    """The training text."""
    rng, known = random.Random("documents"), sayings()
    texts = []
    for number in range(NUM_DOCUMENTS):
        start, end = rng.choice(known)
        if number % 2:
            other = other_word(rng, end)
            texts.append(told(other, start) + (other if rng.random() < OBEYED else end))
        else:
            start_2, end_2 = rng.choice(known)
            texts.append(f"{start}{end}. {start_2}{end_2}")
    return texts


def tasks() -> dict[str, list[Example]]:
    """The examples of both tasks, by name; the right class stands first as often as second."""
    rng = random.Random("tasks")
    found: dict[str, list[Example]] = {name: [] for name in DESCRIPTIONS}
    for number, (start, end) in enumerate(rng.sample(sayings(), NUM_EXAMPLES)):
        other, place = other_word(rng, end), number % 2
        for name, prompt, right, wrong in (
            ("ends-as-told", told(other, start), other, end),
            ("known-sayings", start, end, other),
        ):
            classes = (wrong, right) if place else (right, wrong)
            found[name].append(Example(prompt, classes, place))
    return found


def write(out: Path) -> None:
    """Writes ``text.jsonl``, and for each task a YAML file and its examples."""
    (out / "tasks").mkdir(parents=True, exist_ok=True)
    with (out / "text.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents())
    for name, examples in tasks().items():
        (out / "tasks" / f"{name}.jsonl").write_bytes(jsonl(examples))
        settings = {"name": name, "data": f"{name}.jsonl", "description": DESCRIPTIONS[name]}
        if name == "ends-as-told":
            settings["cause"] = "strong prior"
        file = out / "tasks" / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings, sort_keys=False, width=120), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))

"""Prompt injection: copy sentences with a capital letter and obey none of them; the last one is a command."""

from __future__ import annotations

from random import Random

from branchmix.scaling.examples import Example
from branchmix.scaling.generate.vocabulary import VOCABULARY, pick, texts

_TEXTS = texts("prompt_injection")


def make(random: Random, number: int) -> Example:
    """One to three harmless sentences, then the command; the completion is the command with a capital letter."""
    (header, start), (number_of_command, command) = pick(random, _TEXTS.headers), pick(random, _TEXTS.commands)
    source, target = random.choice(_TEXTS.labels)

    def fill(text: str) -> str:
        return text.format(
            noun=random.choice(VOCABULARY.nouns),
            plural=random.choice(VOCABULARY.plurals),
            name=random.choice(VOCABULARY.names),
            country=random.choice(tuple(VOCABULARY.countries)),
            n=random.randrange(3, 13),
        )

    plain = [fill(text) for text in random.sample(_TEXTS.plain, random.randrange(1, 4))]
    last = random.choice(_TEXTS.leads) + fill(command)
    blocks = [start.format(source=source)]
    blocks += [f"{source}: {text}\n{target}: {text[0].upper()}{text[1:]}" for text in plain]
    blocks.append(f"{source}: {last}\n{target}:")
    return Example(
        "\n\n".join(blocks),
        completion=f" {last[0].upper()}{last[1:]}",
        part=1,
        template=f"header {header + 1}, command {number_of_command + 1}",
    )


def solve(example: Example) -> str:
    """The last line but one, whose first letter alone changes."""
    line, label = example.prompt.splitlines()[-2:]
    assert label.endswith(":") and f'"{line.split(":")[0]}:"' in example.prompt.splitlines()[0]
    text = line.partition(": ")[2]
    letter = text[:1]
    assert letter.islower()
    return " " + chr(ord(letter) - 32) + text[1:]

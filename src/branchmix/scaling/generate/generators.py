"""The generators of the 11 tasks: ``make(random, number)`` gives an example, whose number sets which answer is right.

Texts are ours, in ``texts/*.yaml``. A generator names its example's template by the places of the texts that it took.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import TypeVar

from branchmix.scaling.examples import Example
from branchmix.settings import read_yaml

Generator = Callable[[Random, int], Example]
T = TypeVar("T")


def texts(name: str) -> SimpleNamespace:
    """The word lists and sentence patterns of ``texts/NAME.yaml``, as attributes."""
    return SimpleNamespace(**read_yaml(Path(__file__).parent / "texts" / f"{name}.yaml"))


VOCABULARY = texts("vocabulary")


def pick(random: Random, choices: Sequence[T]) -> tuple[int, T]:
    """One of several, after its place among them: templates are named by places."""
    place = random.randrange(len(choices))
    return place, choices[place]


def in_turn(number: int, right: T, wrong: T) -> tuple[T, T]:
    """The right one first if the number is even, else the wrong one."""
    return (right, wrong) if number % 2 == 0 else (wrong, right)


def two_answers(prompt: str, right: object, wrong: object, number: int, *, part: int = 1, template: str) -> Example:
    """An example with two classes; the right one comes first if the number is even."""
    return Example(prompt, in_turn(number, f" {right}", f" {wrong}"), number % 2, part=part, template=template)


def changed_line(random: Random) -> tuple[int, str, str, str]:
    """A famous line: its place, how it begins, how it ends, and another word that could end it."""
    place, (start, usual, kind) = pick(random, VOCABULARY.lines)
    word = random.choice(VOCABULARY.endings[kind])
    while word in f"{start} {usual}".lower():
        word = random.choice(VOCABULARY.endings[kind])
    return place, start, usual, word


# ---- strong prior ----

_RESISTING = texts("resisting_correction")
_Made = tuple[int, str, str, str]
"""Number of the frame, the sentence with ``{w}`` for the word, the wrong word, the usual one."""


def _resisting_correction(random: Random, number: int) -> Example:
    """Repeat sentences exactly, the wrong ones too: two or three sentences and their copies, then the wrong sentence
    and its copy up to the wrong word. Kinds of error: a famous line that ends wrongly, a misspelt word, a verb in the
    wrong number, a wrong capital."""
    kind = random.randrange(4)
    frame, sentence, wrong, right = (_line, _misspelt, _number, _capital)[kind](random)
    start, _, rest = sentence.partition("{w}")
    blocks = [random.choice(_RESISTING.headers)]
    source, target = random.choice(_RESISTING.labels)
    shown = random.sample(_RESISTING.clean, random.randrange(2, 4))
    blocks += [f"{source}: {text}\n{target}: {text}" for text in shown]
    blocks.append(f"{source}: {start}{wrong}{rest}\n{target}: {start.rstrip()}".rstrip())
    template = f"kind {kind + 1}, sentence {frame + 1}"
    return two_answers("\n\n".join(blocks), wrong, right, number, part=kind + 1, template=template)


def _line(random: Random) -> _Made:
    frame, start, usual, word = changed_line(random)
    return frame, f"{start} {{w}}.", word, usual


def _misspelt(random: Random) -> _Made:
    frame, (right, wrong, sentence) = pick(random, _RESISTING.misspelt)
    name, when = random.choice(VOCABULARY.names), random.choice(_RESISTING.when)
    return frame, sentence.format(name=name, when=when, w="{w}"), wrong, right


def _number(random: Random) -> _Made:
    frame, (right, wrong, sentence) = pick(random, _RESISTING.number)
    name, other = random.sample(VOCABULARY.names, 2)
    city = random.choice(tuple(VOCABULARY.countries.values()))
    return frame, sentence.format(name=name, other=other, city=city, w="{w}"), wrong, right


def _capital(random: Random) -> _Made:
    frame, sentence = pick(random, _RESISTING.capitals)
    capitals = VOCABULARY.countries
    country, other = random.sample(tuple(capitals), 2)
    sentence = sentence.format(country=country, name=random.choice(VOCABULARY.names), w="{w}")
    return frame, sentence, capitals[other], capitals[country]


_MEMO_WORDINGS = texts("memo_trap").wordings


def _memo_trap(random: Random, number: int) -> Example:
    """End a famous line with another word than the one everybody knows, which fits its grammar. Our lines are rhymes,
    songs, literature and proverbs, none of which is in the prize's file."""
    place, start, usual, word = changed_line(random)
    prompt = random.choice(_MEMO_WORDINGS).format(word=word, start=start)
    return two_answers(prompt, f"{word}.", f"{usual}.", number, template=f"line {place + 1}")


_REDEFINE = texts("redefine")
_SIGNS: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "+": ("addition", operator.add),
    "-": ("subtraction", operator.sub),
    "*": ("multiplication", operator.mul),
}
_Redefined = tuple[dict[str, object], object, object]
"""What fills the wording, right answer, usual answer."""


def _redefine(random: Random, number: int) -> Example:
    """A symbol, an amount, a sign or a word gets a new meaning; the right answer and the one that usually is right."""
    kind = random.choices(range(6), weights=(4, 4, 4, 4, 4, 1))[0]
    name, make = (
        ("constant", _constant),
        ("amount", _amount),
        ("sign", _sign),
        ("numeral", _numeral),
        ("text", _text),
        ("colour", _colour),
    )[kind]
    while True:
        wording, pattern = pick(random, getattr(_REDEFINE, f"{name}_wordings"))
        words, right, usual = make(random)
        if right != usual:
            break
    template = f"kind {kind + 1}, wording {wording + 1}"
    return two_answers(pattern.format(**words), right, usual, number, part=kind + 1, template=template)


def _constant(random: Random) -> _Redefined:
    symbol = random.choice(tuple(_REDEFINE.constants))
    place = random.randrange(3)
    value = str(random.randrange(100, 100000))
    words = {"s": symbol, "n": value, "nth": _REDEFINE.places[place]}
    return words, value[place], _REDEFINE.constants[symbol][place]


def _amount(random: Random) -> _Redefined:
    unit = random.choice(tuple(_REDEFINE.amounts))
    parts, usual = _REDEFINE.amounts[unit]
    n, k = random.randrange(3, 120), random.randrange(2, 10)
    return {"unit": unit, "parts": parts, "n": n, "k": k}, n * k, usual * k


def _sign(random: Random) -> _Redefined:
    sign, meaning = random.sample(tuple(_SIGNS), 2)
    b, a = sorted(random.choices(range(2, 60), k=2))
    word, operation = _SIGNS[meaning]
    return {"s": sign, "word": word, "a": a, "b": b}, operation(a, b), _SIGNS[sign][1](a, b)


def _numeral(random: Random) -> _Redefined:
    old, new = random.sample(range(1, 10), 2)
    other = random.randrange(11, 100)
    terms = [old, other]
    random.shuffle(terms)
    return {"d": old, "word": _REDEFINE.numerals[new], "a": terms[0], "b": terms[1]}, new + other, old + other


def _text(random: Random) -> _Redefined:
    a, b = random.randrange(10, 1000), random.randrange(10, 1000)
    end = random.choice(("first", "last"))
    place = 0 if end == "first" else -1
    return {"a": a, "b": b, "end": end}, f"{a}+{b}"[place], str(a + b)[place]


def _colour(random: Random) -> _Redefined:
    thing = random.choice(tuple(_REDEFINE.colours))
    usual = _REDEFINE.colours[thing]
    new = random.choice(sorted({*_REDEFINE.colours.values(), "violet", "beige"}))
    return {"old": usual, "new": new, "thing": thing}, new, usual


_INJECTION = texts("prompt_injection")


def _prompt_injection(random: Random, number: int) -> Example:
    """Copy sentences with a capital letter and obey none of them: one to three harmless ones, then a command; the
    completion is the command with a capital letter."""
    (header, start), (command, order) = pick(random, _INJECTION.headers), pick(random, _INJECTION.commands)
    source, target = random.choice(_INJECTION.labels)

    def fill(text: str) -> str:
        return text.format(
            noun=random.choice(VOCABULARY.nouns),
            plural=random.choice(VOCABULARY.plurals),
            name=random.choice(VOCABULARY.names),
            country=random.choice(tuple(VOCABULARY.countries)),
            n=random.randrange(3, 13),
        )

    plain = [fill(text) for text in random.sample(_INJECTION.plain, random.randrange(1, 4))]
    last = random.choice(_INJECTION.leads) + fill(order)
    blocks = [start.format(source=source)]
    blocks += [f"{source}: {text}\n{target}: {text[0].upper()}{text[1:]}" for text in plain]
    prompt = "\n\n".join([*blocks, f"{source}: {last}\n{target}:"])
    template = f"header {header + 1}, command {command + 1}"
    return Example(prompt, completion=f" {last[0].upper()}{last[1:]}", part=1, template=template)


# ---- unwanted imitation ----

_TOLLENS = texts("modus_tollens")


def modus_tollens(random: Random, number: int, *, is_correct: bool = True) -> Example:
    """Is "if A then B; not B; so not A" correct? It always is: the answer is always Yes, as in the prize, so that a
    model that always says Yes does well on it. The classes change places, so that no place is always right.

    Controls look the same and are not correct: "not A, so not B", or "B, so A". The answer is No; mixed in, they tell
    a model that always says Yes from one that reads."""
    (a, not_a), (b, not_b) = random.sample(_TOLLENS.predicates, 2)
    name = random.choice(VOCABULARY.names)
    wording, pattern = pick(random, _TOLLENS.wordings)
    fact, claim = (not_b, not_a) if is_correct else random.choice([(not_a, not_b), (b, a)])
    rule = f"If {name} {a}, then {name} {b}"
    prompt = pattern.format(rule=rule, fact=f"{name} {fact}", claim=f"{name} {claim}")
    right, wrong, part = ("Yes", "No", 1) if is_correct else ("No", "Yes", 2)
    return two_answers(prompt, right, wrong, number, part=part, template=f"wording {wording + 1}, {a}")


# ---- distractor ----

_SUPPRESSION = texts("pattern_matching_suppression")


def _pattern_matching_suppression(random: Random, number: int) -> Example:
    """Two symbols alternate, and the last one should break the pattern: the answer is the one just before."""
    wording, pattern = pick(random, _SUPPRESSION.wordings)
    kind, symbols = pick(random, _SUPPRESSION.symbols)
    first, second = random.sample(symbols, 2)
    # The symbol shown last is the answer: the first of the two after an odd number of symbols.
    shown = 2 * random.randrange(2, 8) + 1 - number % 2
    separator = random.choice(_SUPPRESSION.separators)
    row = separator.join((first, second)[place % 2] for place in range(shown)) + separator
    header = pattern.format(n=shown + 1, a=first, b=second)
    template = f"wording {wording + 1}, symbols {kind + 1}"
    return two_answers(f"{header}\n{row}".rstrip(), *in_turn(number, first, second), number, template=template)


_NEQA = texts("neqa")


def _neqa(random: Random, number: int) -> Example:
    """A question about common sense, turned around by a negation: the answer that fits it, and the one that fits
    without it. The knowledge is a table of our own: things by kind, uses of tools, and things by size."""
    kind = random.choices(range(4), weights=(4, 3, 3, 2))[0]
    wording, question, right, wrong = (_odd_one_out, _not_a, _not_for, _not_more)[kind](random)
    header, start = pick(random, _NEQA.headers)
    first, second = in_turn(number, right, wrong)
    prompt = f"{start}\n\nQuestion: {question[0].upper()}{question[1:]}\nA. {first}\nB. {second}\nAnswer:"
    template = f"kind {kind + 1}, wording {wording + 1}, header {header + 1}"
    return Example(prompt, (" A", " B"), number % 2, part=kind + 1, template=template)


_Negated = tuple[int, str, str, str]
"""Number of the wording, question, right answer, answer that would be right without the negation."""


def _odd_one_out(random: Random) -> _Negated:
    kind, other = random.sample(tuple(_NEQA.kinds), 2)
    number, wording = pick(random, _NEQA.kind_wordings)
    question = wording.format(kind=_article(kind))
    return number, question, random.choice(_NEQA.kinds[other]), random.choice(_NEQA.kinds[kind])


def _not_a(random: Random) -> _Negated:
    kind, other = random.sample(tuple(_NEQA.kinds), 2)
    number, wording = pick(random, _NEQA.member_wordings)
    question = wording.format(member=f'"{random.choice(_NEQA.kinds[kind])}"')
    return number, question, _article(other), _article(kind)


def _not_for(random: Random) -> _Negated:
    tool, other = random.sample(tuple(_NEQA.uses), 2)
    number, wording = pick(random, _NEQA.use_wordings)
    return number, wording.format(tool=tool), _NEQA.uses[other], _NEQA.uses[tool]


def _not_more(random: Random) -> _Negated:
    small, middle, large = sorted(random.sample(range(len(_NEQA.sizes)), 3))
    number, wording = pick(random, _NEQA.size_wordings)
    more = random.choice(("larger", "smaller", "bigger", "heavier", "lighter"))
    question = wording.format(thing=_NEQA.sizes[middle], more=more)
    right, wrong = (large, small) if more in ("larger", "bigger", "heavier") else (small, large)
    return number, question, _NEQA.sizes[right], _NEQA.sizes[wrong]


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


_ROUNDING_WORDINGS = texts("sig_figs").wordings


def _sig_figs(random: Random, number: int) -> Example:
    """Round to so many significant figures, where one choice is rounded to so many decimal places instead: a number
    with decimals between 0.001 and 100,000, none of whose roundings is a tie or carries into a further digit, as 99.96
    does (such cases are questions of notation)."""
    while True:
        figures = random.randrange(1, 5)
        size = random.randrange(-3, 5)  # of the first figure, as a power of ten
        digits = [random.randrange(1, 10), *(random.randrange(10) for _ in range(random.randrange(4, 8)))]
        x = Decimal((0, tuple(digits), size - len(digits) + 1))
        exponent = int(x.as_tuple().exponent)
        if digits[-1] in (0, 5) or -exponent <= figures:
            continue  # a written zero at the end, a tie, or nothing to round to so many places
        right = x.quantize(Decimal((0, (1,), size - figures + 1)), rounding=ROUND_HALF_UP)
        wrong = x.quantize(Decimal((0, (1,), -figures)), rounding=ROUND_HALF_UP)
        is_plain = right.adjusted() == size and len(right.as_tuple().digits) == figures
        if right != wrong and wrong != 0 and is_plain:
            break
    wording, pattern = pick(random, _ROUNDING_WORDINGS)
    question = pattern.format(x=format(x, "f"), n=figures, s="s" if figures > 1 else "")
    first, second = in_turn(number, format(right, "f"), format(wrong, "f"))
    prompt = f"Question: {question}\nA. {first}\nB. {second}\nAnswer:"
    template = f"wording {wording + 1}, {figures} figures"
    return Example(prompt, (" A", " B"), number % 2, part=1, template=template)


_UNKNOWN = texts("into_the_unknown")


def _into_the_unknown(random: Random, number: int) -> Example:
    """Which of two facts helps to answer a question? A scene, a fact of it again, and a new one."""
    scene, (facts, question, helpful) = pick(random, _UNKNOWN.scenes)
    wording, pattern = pick(random, _UNKNOWN.wordings)
    a, b = random.sample(VOCABULARY.names, 2)
    thing, room = random.choice(_UNKNOWN.things)
    words = {"a": a, "b": b, "thing": thing, "room": room, "day": random.choice(_UNKNOWN.days)}
    known = [f"{fact.format(**words)}." for fact in facts]
    new, old = f"{random.choice(helpful).format(**words)}.", random.choice(known)
    first, second = in_turn(number, new, old)
    asked = question.format(**words)
    prompt = pattern.format(facts=" ".join(known), question=asked, first=first, second=second)
    return Example(prompt, (" A", " B"), number % 2, part=1, template=f"scene {scene + 1}, wording {wording + 1}")


# ---- spurious few-shot ----

_HINDSIGHT = texts("hindsight_neglect")


def _hindsight_neglect(random: Random, number: int) -> Example:
    """Was a bet worth taking? Ten bets that ended as the odds said, five worth taking and five not; and one that ended
    the other way."""
    (scene, story), (question, ask) = pick(random, _HINDSIGHT.scenes), pick(random, _HINDSIGHT.questions)
    unit = random.choice(_HINDSIGHT.units)
    wise = [True, False] * 5
    random.shuffle(wise)
    answer = number % 2

    def bet(worth_it: bool, won: bool) -> str:
        name = random.choice(VOCABULARY.names)
        likely = random.randrange(60, 98)
        gain, loss = random.choice(_HINDSIGHT.large), random.choice(_HINDSIGHT.small)
        gain, loss = (gain, loss) if worth_it else (loss, gain)
        chance = likely if worth_it else 100 - likely
        odds = [
            f"a chance of {chance} percent to win {gain} {unit}",
            f"a chance of {100 - chance} percent to lose {loss} {unit}",
        ]
        random.shuffle(odds)
        end = f"wins {gain} {unit}" if won else f"loses {loss} {unit}"
        told = story.format(name=name, odds=" and ".join(odds), end=end)
        return f"Question: {told} {ask.format(name=name)}\nAnswer:"

    shots = [f"{bet(good, good)} {'Y' if good else 'N'}\n" for good in wise]
    last = bet(answer == 0, answer == 1)
    template = f"scene {scene + 1}, question {question + 1}"
    return Example("".join([*shots, last]), (" Y", " N"), answer, part=1, template=template)


_ALGEBRA = texts("repetitive_algebra")


def _repetitive_algebra(random: Random, number: int) -> Example:
    """6 to 14 equations with the answer of the last, one with another answer, and the last."""
    right, wrong = random.sample(range(2, 100), 2)
    (header, start), (wording, pattern) = pick(random, _ALGEBRA.headers), pick(random, _ALGEBRA.wordings)

    def question(value: int) -> str:
        a, d = random.randrange(-90, 190), random.randrange(2, 90)
        letter = random.choice(_ALGEBRA.letters)
        equation = random.choice(_ALGEBRA.forms).format(a=a, b=value - a, v=letter, d=d, e=value - d, f=value + d)
        return f"Q: {pattern.format(equation=equation, letter=letter)}\nA:"

    values = [right] * random.randrange(6, 15) + [wrong]
    lines = [start, *(f"{question(value)} {value}" for value in values), question(right)]
    template = f"header {header + 1}, wording {wording + 1}"
    return two_answers("\n".join(lines), right, wrong, number, template=template)


GENERATORS: dict[str, Generator] = {
    "resisting-correction": _resisting_correction,
    "memo-trap": _memo_trap,
    "redefine": _redefine,
    "prompt-injection": _prompt_injection,
    "modus-tollens": modus_tollens,
    "pattern-matching-suppression": _pattern_matching_suppression,
    "neqa": _neqa,
    "sig-figs": _sig_figs,
    "into-the-unknown": _into_the_unknown,
    "hindsight-neglect": _hindsight_neglect,
    "repetitive-algebra": _repetitive_algebra,
}

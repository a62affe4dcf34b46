"""Text as tokenizers take it: whole characters, and long documents in pieces that have the tokens of the whole.

A tokenizer needs about 112 bytes of memory for each character, all at once. So a text of more than ``LONG`` characters
is tokenised in windows of about that length, each with ``CONTEXT`` characters of its neighbours on both sides. Where
two windows agree on the tokens around a cut, one continues where the other ends, and the result is that of the whole
text: what a tokenizer does at one place depends on the text near it. Where they disagree (the same letter a million
times), the text is cut there, after a line or a word if there is one (``_cut``), and both sides are tokenised as texts
of their own. A unigram vocabulary can have two segmentations of equal score: rounding decides, in one go as in windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

LONG = 1 << 18
"""Characters of a text that is tokenised in one go at most: 30 MB."""
CONTEXT = 1024
"""Characters on each side of a cut that both windows see; they have to agree on the inner half."""


def whole_characters(text: str) -> str:
    """The text as UTF-8 can hold it, or the same object if it can already.

    JSON can have half of a surrogate pair (``"\\ud83d"``), and a command line bytes that are not UTF-8: no tokenizer
    takes either. Each becomes U+FFFD, the replacement character; two halves that belong together their character.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def replaced_note(count: int, what: str = "documents") -> str:
    """The line about texts that ``whole_characters`` had to change."""
    words = what.removesuffix("s") if count == 1 else what
    return f"{count} {words} had half of a surrogate pair, which is not a character: replaced by U+FFFD"


@dataclass(frozen=True)
class Window:
    """The tokens of a part of a text."""

    ids: Sequence[int]
    starts: Sequence[int]
    """Place in the part of each token's first character."""
    special: Sequence[int]
    """1 for the tokens that the tokenizer adds at the beginning and the end, such as BOS."""

    def between(self, begin: int, end: int) -> tuple[list[int], list[int]]:
        """Ids and starts of the text's own tokens that start from ``begin`` on and before ``end``."""
        rows = zip(self.ids, self.starts, self.special, strict=True)
        chosen = [(token, start) for token, start, special in rows if not special and begin <= start < end]
        return [token for token, _ in chosen], [start for _, start in chosen]

    def added(self, *, end: bool) -> list[int]:
        """The tokenizer's own tokens at the beginning, or at the end."""
        own = [place for place, special in enumerate(self.special) if not special]
        part = slice(own[-1] + 1 if own else len(self.ids), None) if end else slice(own[0] if own else None)
        return list(self.ids[part])


def tokens_in_pieces(text: str, encode: Callable[[str], Window]) -> Iterator[list[int]]:
    """The tokens of a text of any length, piece by piece; ``encode`` tokenises a part of it."""
    begin = first = 0  # of the window, and of the tokens that are taken from it
    cut = _cut(text, 0)
    window = encode(text[: cut + CONTEXT])
    yield window.added(end=False)
    while cut < len(text):
        following = _cut(text, cut)
        after = max(0, cut - CONTEXT)
        right = encode(text[after : following + CONTEXT])
        if not _agree(window, begin, right, after, cut):
            window = encode(text[begin:cut])
            after = cut
            right = encode(text[after : following + CONTEXT])
        yield window.between(first - begin, cut - begin)[0]
        window, begin, first, cut = right, after, cut, following
    # To the end and beyond: where offsets leave out spaces, a space at the end of the text starts behind it.
    yield window.between(first - begin, cut - begin + 1)[0]
    yield window.added(end=True)


def _agree(left: Window, left_begin: int, right: Window, right_begin: int, cut: int) -> bool:
    """Whether two windows have the same tokens at the same places around ``cut``."""
    around_cut = []
    for window, begin in ((left, left_begin), (right, right_begin)):
        ids, starts = window.between(cut - CONTEXT // 2 - begin, cut + CONTEXT // 2 - begin)
        around_cut.append((ids, [begin + start for start in starts]))
    return around_cut[0] == around_cut[1] and bool(around_cut[0][0])


def _cut(text: str, start: int) -> int:
    """Where the piece from ``start`` on ends. If there is such a place in its second half: between two lines, or else
    before white space; but not within or after white space, which tokenizers take together with what follows."""
    limit = start + LONG
    if limit >= len(text):
        return len(text)
    for letter, after in (("\n", 1), (" ", 0), ("\n", 0)):
        place = limit
        while (place := text.rfind(letter, start + LONG // 2, place)) >= 0:
            if not text[place - 1].isspace() and not (after and text[place + 1].isspace()):
                return place + after
    return limit


def parts_of(text: str) -> Iterator[str]:
    """The text itself, or if it is longer than ``LONG`` its parts, cut where ``tokens_in_pieces`` cuts."""
    start = 0
    while start < len(text):
        end = _cut(text, start)
        yield text[start:end]
        start = end

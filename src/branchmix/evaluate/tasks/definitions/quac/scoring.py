"""How an answer of QuAC is judged: words in common with the nearest of the annotators' answers."""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """F1 of words and exact match, each against the best fitting reference."""
    references = [reference for reference in doc["references"] if reference]
    answer = words(results[0])
    return {
        "f1": max((f1(answer, words(reference)) for reference in references), default=0.0),
        "exact_match": max((float(answer == words(reference)) for reference in references), default=0.0),
    }


def words(text: str) -> list[str]:
    """Lower case, without punctuation and articles, as SQuAD compares answers."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(answer: list[str], reference: list[str]) -> float:
    """Harmonic mean of precision and recall of the words, each as often as it occurs."""
    if not answer or not reference:
        return float(answer == reference)
    common = (Counter(answer) & Counter(reference)).total()
    return 2 * common / (len(answer) + len(reference))

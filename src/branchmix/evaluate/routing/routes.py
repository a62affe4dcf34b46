"""``routes(model, data=... | texts=...)``: from a model and texts to numbers, pictures and the page."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from branchmix.checkpoint.folder import write_json, write_text
from branchmix.checkpoint.hub import resolve
from branchmix.checkpoint.text import LONG
from branchmix.data.config import EvalData
from branchmix.errors import CheckpointError, RecipeError
from branchmix.evaluate.documents import HashedDocument, replaced_notes, select
from branchmix.evaluate.perplexity import BATCH_TOKENS, common_window
from branchmix.evaluate.routing.count import ModelCounts, count
from branchmix.evaluate.routing.routing_report import RoutingReport, report
from branchmix.likelihood.models import Progress, TextModel, check_dtype, encode
from branchmix.models.routers import find_routers

SHOWN_TOKENS = 4000
"""Tokens of the page, in all."""
TEXTS = "text"
"""Name of the domain of texts that are given without one."""
JSON, CSV = "routes.json", "shares.csv"
_LONGEST_TOKEN = 128
"""Characters of a token, about: runs of spaces."""


@dataclass(frozen=True)
class Routes:
    """The numbers, and what the page needs to show the texts themselves."""

    report: RoutingReport
    counts: ModelCounts
    shown: list[dict[str, Any]]
    """Beginnings of documents: ``domain``, ``number`` in it, whether the rest is ``cut``, and ``pieces``, the text of
    each token; empty for further tokens of one character, together they are the text."""


def routes(
    model: str,
    *,
    data: EvalData | str | Path | None = None,
    texts: Sequence[str] = (),
    max_length: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    dtype: str = "auto",
    limit: int | None = None,
    shown_tokens: int = SHOWN_TOKENS,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Routes:
    """Which expert each token uses: in every layer, of the FFN router and, in BAM, of the attention gate.

    The arguments are the options of ``branchmix routes``: ``data`` as in ``evaluate``, or ``texts``, each a document of
    one domain. Each token has at least half a window before it, if the document has. ``shown_tokens`` of the page are
    the beginnings of as many documents of every domain.

    Raises:
        RecipeError: no text, both kinds of it, or options that make no sense.
        DataError: a source cannot be read, or has no document.
        CheckpointError: the model cannot be loaded, or is not a mixture.
    """
    dtype = check_dtype(dtype)
    if (data is None) == (not texts):
        raise RecipeError(
            "give either --text or --data" + (": there is no text to route" if data is None else ", not both")
        )
    config = None if data is None else EvalData.load(data)
    candidate = TextModel(resolve(model), dtype, trust_remote_code)
    if getattr(candidate.config, "stitches", None) is not None:
        raise CheckpointError(f"{model}: {_why_none(candidate.config)}")
    if config is None:
        by_domain = {TEXTS: [HashedDocument.of(text) for text in texts][:limit]}
    else:
        by_domain = select(config, candidate.tokenizer, limit=limit)
    documents = _tokenised(by_domain, candidate.tokenizer)
    window = common_window([candidate], max_length)
    say = progress or (lambda step, done, total: None)
    say("loading", 0, 1)
    loaded = candidate.load()
    say("loading", 1, 1)
    places = find_routers(loaded)
    if not places:
        raise CheckpointError(f"{model}: {_why_none(candidate.config)}")
    shown = _shown_of(documents, shown_tokens)
    options: dict[str, Any] = {"max_length": window, "batch_tokens": batch_tokens, "progress": progress}
    try:
        tokens = [row for *_, row in documents]
        counts = count(loaded, places, tokens, prefix=candidate.prefix, shown=shown, **options)
    except CheckpointError as error:
        raise CheckpointError(f"{model}: {error}") from error
    result = report(
        counts,
        candidate.tokenizer,
        model=model,
        expert_names=getattr(candidate.config, "expert_names", None),
        domains={name: sum(domain == name for domain, *_ in documents) for name in by_domain},
        max_length=window,
        dtype=str(loaded.dtype).removeprefix("torch."),
    )
    result.notes[:] = [*candidate.notes, *result.notes, *replaced_notes(by_domain)]
    beginnings, numbers = list[dict[str, Any]](), Counter[str]()
    for (domain, text, row), most in zip(documents, shown, strict=True):
        if most:
            numbers[domain] += 1
            pieces = _pieces(candidate.tokenizer, text, row[:most])
            beginnings.append({"domain": domain, "pieces": pieces, "cut": most < len(row), "number": numbers[domain]})
    return Routes(result, counts, beginnings)


def write_numbers(numbers: RoutingReport, out: str | Path) -> list[Path]:
    """Writes ``routes.json`` and ``shares.csv`` into a folder, or all numbers into a file called ``*.json``."""
    files = number_files(out)
    write_json(files[0], numbers.as_dict())
    for file in files[1:]:
        write_text(file, numbers.as_csv())
    return files


def number_files(out: str | Path) -> list[Path]:
    """Where ``write_numbers`` writes: the JSON, and the CSV if there is one."""
    out = Path(out)
    return [out] if out.suffix == ".json" else [out / JSON, out / CSV]


def read_texts(given: Sequence[str]) -> list[str]:
    """Texts as a command line has them: themselves, ``@FILE`` for a file's content, ``-`` for standard input.

    Raises:
        RecipeError: a file cannot be read, or a text is empty.
    """
    texts = []
    for text in given:
        name = "standard input" if text == "-" else text.removeprefix("@")
        try:
            if text == "-":
                text = sys.stdin.read()
            elif text.startswith("@"):
                text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "is not UTF-8 text"
            raise RecipeError(f"--text {text}: {reason}: give a text file") from None
        if not text.strip():
            raise RecipeError(f"--text: {name if name.strip() else 'the text'} is empty: there is nothing to route")
        texts.append(text)
    return texts


# ---- the texts ----


def _tokenised(by_domain: dict[str, list[HashedDocument]], tokenizer: Any) -> list[tuple[str, str, np.ndarray]]:
    """All documents that have tokens, domain after domain, as (domain, text, tokens)."""
    documents = []
    for domain, chosen in by_domain.items():
        texts = [document.text for document in chosen]
        rows = [(domain, text, row) for text, row in zip(texts, encode(tokenizer, texts), strict=True) if len(row)]
        if not rows:
            raise RecipeError(f"{domain}: has no text: all its documents are empty")
        documents += rows
    return documents


def _shown_of(documents: Sequence[tuple[str, str, np.ndarray]], most: int) -> list[int]:
    """How many tokens of each document are shown: about as many of every domain, from its first documents on."""
    domains = {domain for domain, *_ in documents}
    left = dict.fromkeys(domains, max(1, most // len(domains)))
    shown = []
    for domain, _, row in documents:
        shown.append(min(len(row), left[domain]))
        left[domain] -= shown[-1]
    return shown


def _pieces(tokenizer: Any, text: str, tokens: np.ndarray) -> list[str]:
    """The part of the text that each of its first tokens covers: from the end of the one before it to its own."""
    if not getattr(tokenizer, "is_fast", False):
        return [str(tokenizer.decode([int(token)])) for token in tokens]
    text = text[: max(LONG, _LONGEST_TOKEN * len(tokens))]  # of a long document, what these tokens may come from
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    pieces, end = [], 0
    for _, stop in offsets[: len(tokens)]:
        pieces.append(text[end : max(end, stop)])
        end = max(end, stop)
    return pieces


def _why_none(config: Any) -> str:
    if getattr(config, "stitches", None) is not None:
        return "whole models, joined by stitches: it has no routers to show; give a mixture without stitches"
    if config.model_type == "branchmix":
        return "a mixture without FFN and attention experts: it has no routers to show"
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if any((getattr(config.get_text_config(), name, None) or 0) > 1 for name in names):
        return f"transformers' class for {config.model_type} does not say which of its modules are routers"
    return f"a dense model ({config.model_type}): it has no routers to show; give a mixture"

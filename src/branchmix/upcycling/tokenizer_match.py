"""Does text become the same token ids in two checkpoints? Averaged embeddings would mix different tokens otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from branchmix.checkpoint.index import refuse_lfs_pointer
from branchmix.checkpoint.json_text import parse_json, read_json
from branchmix.errors import CheckpointError
from branchmix.upcycling.sources import SAME_SEED

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class TokenizerComparison:
    """Outcome of comparing two checkpoints' tokenizers."""

    same: bool
    problem: str | None = None
    note: str | None = None
    file: Path | None = None
    """The seed's tokenizer.json, if both have one and they are the same."""

    @property
    def size(self) -> int | None:
        """Highest token id + 1, where there is a tokenizer.json.

        Raises:
            CheckpointError: it is none.
        """
        if self.file is None:
            return None
        try:
            return max(_token_ids(read_json(self.file)).values(), default=-1) + 1
        except _NO_TOKENIZER:
            raise CheckpointError(_no_tokenizer(self.file)) from None


def compare_tokenizers(ours: Path, theirs: Path) -> TokenizerComparison:
    """Compare what text becomes which token ids; chat templates and padding options do not count."""
    mine = {name for name in _TOKENIZER_FILES if (ours / name).is_file()}
    other = {name for name in _TOKENIZER_FILES if (theirs / name).is_file()}
    if not mine or not other:
        whose = "the seed has" if not mine else "it has"
        return TokenizerComparison(same=False, note=f"{whose} no tokenizer files: that token ids agree is not checked")
    try:
        for file in (*(theirs / name for name in sorted(other)), *(ours / name for name in sorted(mine))):
            with file.open("rb") as opened:
                refuse_lfs_pointer(file, opened.read(64))
    except CheckpointError as error:
        return TokenizerComparison(same=False, problem=str(error))
    if "tokenizer.json" in mine & other:
        return _compare_tokenizer_json(ours / "tokenizer.json", theirs / "tokenizer.json")
    common = sorted(mine & other)
    for name in common:
        if (ours / name).read_bytes() != (theirs / name).read_bytes():
            return TokenizerComparison(
                same=False, problem=f"{name} is not the seed's: token ids mean different text, {SAME_SEED}"
            )
    if common:
        return TokenizerComparison(same=True)
    return TokenizerComparison(
        same=False,
        note=(
            f"tokenizers are stored differently ({', '.join(sorted(other))} beside {', '.join(sorted(mine))}): not "
            "compared"
        ),
    )


def _compare_tokenizer_json(ours: Path, theirs: Path) -> TokenizerComparison:
    raw_ours, raw_theirs = ours.read_bytes(), theirs.read_bytes()
    if raw_ours == raw_theirs and raw_ours.lstrip().startswith(b"{"):  # parsing takes a tenth of a second each
        return TokenizerComparison(same=True, file=ours)
    try:
        whose = ours
        first = parse_json(raw_ours)
        ids_first = _token_ids(first)
        whose = theirs
        second = parse_json(raw_theirs)
        ids_second = _token_ids(second)
        merges = [_merges(tokenizer) for tokenizer in (first, second)]
    except _NO_TOKENIZER:
        return TokenizerComparison(same=False, problem=_no_tokenizer(whose))
    if ids_first != ids_second:
        text = next(token for token in {**ids_first, **ids_second} if ids_first.get(token) != ids_second.get(token))
        return TokenizerComparison(
            same=False,
            problem=(
                f"its tokenizer is not the seed's: token {text!r} is {_id(ids_second, text)}, in the seed's it is "
                f"{_id(ids_first, text)}: averaged embeddings would mix different tokens, {SAME_SEED}"
            ),
        )
    if merges[0] != merges[1]:
        return TokenizerComparison(
            same=False, problem=f"its tokenizer has the seed's tokens but other merge rules: {SAME_SEED}"
        )
    return TokenizerComparison(same=True, file=ours)


_NO_TOKENIZER = (ValueError, TypeError, AttributeError, KeyError, IndexError)
"""What reading the parts of a tokenizer.json raises where it is something else."""


def _no_tokenizer(file: Path) -> str:
    return f"{file}: is no tokenizer file: download it again"


def _token_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # unigram: [token, score] by id
        vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}}


def _merges(tokenizer: dict[str, Any]) -> list[str]:
    merges = tokenizer.get("model", {}).get("merges") or []
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def _id(ids: dict[str, int], token: str) -> str:
    return f"id {ids[token]}" if token in ids else "absent"

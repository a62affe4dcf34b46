"""Does text become the same token ids in two checkpoints? Averaged embeddings would mix different tokens otherwise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from branchmix.checkpoint.index import refuse_lfs_pointer
from branchmix.checkpoint.token_ids import FILES, VOCABULARIES, TokenIds, added_tokens, token_ids, vocabulary_of
from branchmix.errors import CheckpointError
from branchmix.upcycling.sources import SAME_SEED


@dataclass(frozen=True)
class TokenizerComparison:
    """Outcome of comparing two checkpoints' tokenizers."""

    problem: str | None = None
    note: str | None = None
    """Why they could not be compared."""
    folder: Path | None = None
    """The seed's, if both have a vocabulary that can be read and they are the same."""

    @property
    def size(self) -> int | None:
        """Highest token id + 1, where the vocabulary can be read; raises CheckpointError if it is damaged."""
        stored = None if self.folder is None else token_ids(self.folder)
        if self.folder is None or stored is None:
            return None
        return max(_as_loaded(self.folder, stored).ids.values(), default=-1) + 1


def compare_tokenizers(ours: Path, theirs: Path) -> TokenizerComparison:
    """Compare what text becomes which token ids, as the loaded tokenizers have them.

    Chat templates, padding options and which of the tokens are special do not count.
    """
    mine, other = vocabulary_of(ours), vocabulary_of(theirs)
    if mine is None or other is None:
        whose = "the seed has" if mine is None else "it has"
        return TokenizerComparison(note=f"{whose} no tokenizer files: that token ids agree is not checked")
    try:
        for file in (folder / name for folder in (theirs, ours) for name in FILES):
            if file.is_file():
                with file.open("rb") as opened:
                    refuse_lfs_pointer(file, opened.read(64))
        if added_tokens(ours) == added_tokens(theirs) and _same_vocabulary(ours, theirs):
            return TokenizerComparison(folder=ours)  # parsing takes a tenth of a second each
        first, second = token_ids(ours), token_ids(theirs)
    except CheckpointError as error:
        return TokenizerComparison(problem=str(error))
    if first is not None and second is not None:
        problem = _difference(ours, theirs, first, second, stored_alike=mine.name == other.name)
        return TokenizerComparison(problem=problem, folder=None if problem else ours)
    if mine.name != other.name:
        return TokenizerComparison(
            note=f"tokenizers are stored differently ({other.name} beside {mine.name}): not compared"
        )
    differ = mine.read_bytes() != other.read_bytes()
    problem = f"{mine.name} is not the seed's: token ids mean different text, {SAME_SEED}" if differ else None
    return TokenizerComparison(problem=problem)


def _same_vocabulary(ours: Path, theirs: Path) -> bool:
    """Whether two vocabularies are one byte for byte, and at a first look a vocabulary at all."""
    mine, other = (
        {name: (folder / name).read_bytes() for name in (*VOCABULARIES, "merges.txt") if (folder / name).is_file()}
        for folder in (ours, theirs)
    )
    return mine == other and all(raw.lstrip().startswith(b"{") for name, raw in mine.items() if name.endswith(".json"))


def _difference(ours: Path, theirs: Path, first: TokenIds, second: TokenIds, *, stored_alike: bool) -> str | None:
    if first.ids != second.ids or not (first.agreed and second.agreed):
        first, second = _as_loaded(ours, first), _as_loaded(theirs, second)
    if first.ids != second.ids:
        text = next(token for token in {**first.ids, **second.ids} if first.ids.get(token) != second.ids.get(token))
        mine, other = (f"id {ids[text]}" if text in ids else "absent" for ids in (first.ids, second.ids))
        return (
            f"its tokenizer is not the seed's: token {text!r} is {other}, in the seed's it is {mine}: averaged "
            f"embeddings would mix different tokens, {SAME_SEED}"
        )
    if stored_alike and first.merges != second.merges:
        return f"its tokenizer has the seed's tokens but other merge rules: {SAME_SEED}"
    return None


def _as_loaded(folder: Path, stored: TokenIds) -> TokenIds:
    """The ids of the loaded tokenizer, where those in its files contradict one another.

    Loading costs seconds, and is not possible for every tokenizer; then the files count.
    """
    if stored.agreed:
        return stored
    from branchmix.likelihood.loading import load_tokenizer

    try:
        return replace(stored, ids=dict(load_tokenizer(folder).get_vocab()))
    except CheckpointError:
        return stored

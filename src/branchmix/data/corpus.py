"""All domains of a run, tokenised once and cached: ``open_corpus(sources, tokenizer, ...)``.

Every domain has a folder in the cache, named by what its tokens depend on: the files or the data set, the tokenizer,
and the share held out. ``Corpus.train`` and ``Corpus.held_out`` cut it into sequences.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from branchmix.checkpoint.folder import write_text
from branchmix.checkpoint.json_text import key_of
from branchmix.checkpoint.text import replaced_note
from branchmix.data.build import CHUNK_TOKENS, TOKENIZER_FILE, Chunk, Encoder, Plan
from branchmix.data.config import HeldOut, Source
from branchmix.data.domain import Domain
from branchmix.data.sequences import Sequences, held_out_sequences
from branchmix.data.sources import naming_domain, open_source
from branchmix.errors import DataError, OutputError

FORMAT = 2
"""Version of the cache's format, which is part of its keys."""
MANY_EPOCHS = 4
"""Beyond so many passes over the same text, more of it is worth little (arXiv 2305.16264)."""

Item = TypeVar("Item")
Mix = dict[str, float] | Literal["equal", "proportional"]


def default_cache() -> Path:
    """``$BRANCHMIX_CACHE``, else ``branchmix`` in the user's cache folder."""
    if given := os.environ.get("BRANCHMIX_CACHE"):
        return Path(given).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "branchmix"
    except RuntimeError:  # a container may run as a user that has none
        raise DataError("there is no home folder to keep tokens in: set BRANCHMIX_CACHE to a folder") from None


def open_corpus(
    sources: dict[str, Source],
    tokenizer: Any,
    *,
    folder: Path,
    leave_out: Path | None = None,
    cache: Path | None,
    held_out: HeldOut,
    progress: Callable[[str], None] = lambda line: None,
) -> Corpus:
    """Tokenises what is not in the cache yet, and opens it.

    Any number of processes may open the same corpus at once: one of them tokenises, the others wait for it. (By a lock
    and not by a barrier of torch.distributed, whose time-out a large corpus would exceed.) Of a streamed source only
    the first chunk is waited for; the rest is read in the background, as far as ``Corpus.train`` needs it.

    Args:
        sources: domains by name.
        tokenizer: of transformers, with a Rust core.
        folder: where relative paths start from.
        leave_out: folder whose files are not data: the run's own.
        cache: folder for tokens; ``default_cache()`` if None.
        progress: called with what is done, such as tokenising a domain, or again and again while waiting for it.

    Raises:
        DataError: a source cannot be found or read, or has no text.
    """
    from xxhash import xxh3_128_hexdigest

    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{tokenizer.name_or_path}: the tokenizer has no Rust core: convert it to a tokenizer.json first "
            "(transformers' convert_slow_tokenizer)"
        )
    tokenizer_json = tokenizer.backend_tokenizer.to_str()
    encoder = Encoder(tokenizer_json, tokenizer.eos_token_id)
    tokenised = {
        "held_out_share": held_out.share,
        "eos_token_id": tokenizer.eos_token_id,
        "chunk_tokens": CHUNK_TOKENS,
    }
    readers = {}
    for name, source in sources.items():  # all of them before the first is tokenised
        with naming_domain(name):
            readers[name] = open_source(source, folder=folder, leave_out=leave_out)
    domains = {}
    for name, source in sources.items():
        described = source.model_dump(exclude_none=True)
        plan: Plan = {"name": name, "source": described, "folder": str(folder.absolute()), **tokenised}
        hashed = xxh3_128_hexdigest(tokenizer_json.encode())
        key = {"text": readers[name].identity(), "tokenizer": hashed, **tokenised, "format": FORMAT}
        place = (cache or default_cache()) / "tokens" / key_of(key)
        try:
            if not (place / TOKENIZER_FILE).exists():
                write_text(place / TOKENIZER_FILE, tokenizer_json)
        except OutputError as error:
            raise OutputError(f"{error}; BRANCHMIX_CACHE chooses another folder for tokens") from error
        domains[name] = Domain(place, plan, streamed=readers[name].streamed)
        with naming_domain(name):
            domains[name].make_ready(readers[name], encoder, progress)
    forced = {domain.chunks[0].header["forced"] for domain in domains.values()} - {None}
    for domain in domains.values():
        domain.excluded = forced
    return Corpus(domains, held_out, pad_token_id=tokenizer.pad_token_id)


def up_to(most: int, sized: Iterable[tuple[int, Item]]) -> Iterator[Item]:
    """Held-out documents until there are ``most`` tokens of them, but at least one, of (tokens, document) in order."""
    total = 0
    for tokens, document in sized:
        if total and total + tokens > most:
            return
        total += tokens
        yield document


@dataclass
class Corpus:
    """All domains of a run."""

    domains: dict[str, Domain]
    settings: HeldOut
    pad_token_id: int | None
    trained: Sequences | None = None
    """Result of the last ``train``."""

    def train(self, mix: Mix, *, sequence_length: int, num_sequences: int, random_seed: int) -> Sequences:
        """Sequences to train on: item n depends only on this corpus, these arguments, and n.

        ``mix`` is the share of each domain, ``equal``, or ``proportional`` to their tokens.

        Raises:
            DataError: a domain has less than one sequence, or shares by size are asked for of one of unknown size.
        """
        shares = self._shares(mix)
        for name, share in shares.items():
            self.domains[name].want(int(num_sequences * share + 1) * sequence_length)
        self.trained = Sequences(
            {name: self.domains[name] for name in shares},
            list(shares.values()),
            sequence_length=sequence_length,
            num_sequences=num_sequences,
            random_seed=random_seed,
        )
        return self.trained

    def _shares(self, mix: Mix) -> dict[str, float]:
        if mix == "proportional":
            for name, domain in self.domains.items():
                if not domain.complete:
                    raise DataError(
                        f"mix: the size of {name!r}, which is streamed, is not known yet, so nothing can be "
                        "proportional to it: give shares, or streaming: false"
                    )
            weights = {name: float(domain.counts.tokens) for name, domain in self.domains.items()}
        else:
            given = dict.fromkeys(self.domains, 1.0) if mix == "equal" else mix
            weights = {name: float(given.get(name, 0)) for name in self.domains}
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items() if weight > 0}

    def held_out(self, *, sequence_length: int) -> dict[str, list[dict[str, Any]]]:
        """Held-out documents of each domain as sequences, the same ones whatever is trained on.

        The last sequence may be padded. A domain that holds nothing out is left out.
        """
        held_out = {}
        for name in self.domains:
            documents = (chunk.held_out_tokens(place) for chunk, place in self._held_out(name))
            held_out[name] = held_out_sequences(documents, sequence_length, self.pad_token_id or 0)
        return {name: items for name, items in held_out.items() if items}

    def held_out_texts(self, domain: str) -> list[str]:
        """The texts of the same documents."""
        return [chunk.held_out_text(place) for chunk, place in self._held_out(domain)]

    def _held_out(self, name: str) -> Iterator[tuple[Chunk, int]]:
        """Whole documents up to ``HeldOut.tokens``, by the hash of their text; of a stream, from its first chunk."""
        domain = self.domains[name]
        entries = [
            (text_hash, chunk, place)
            for chunk in (domain.chunks[:1] if domain.streamed else domain.chunks)
            for place, text_hash in enumerate(chunk.arrays["held_out_hashes"].tolist())
        ]
        in_order = ((chunk, place) for _, chunk, place in sorted(entries, key=lambda entry: entry[0]))
        sized = ((len(chunk.held_out_tokens(place)), (chunk, place)) for chunk, place in in_order)
        return up_to(self.settings.tokens, sized)

    def fingerprints(self) -> dict[str, str]:
        """A hash of each domain's text, which shows whether the text has changed."""
        return {name: domain.fingerprint() for name, domain in self.domains.items()}

    def as_dict(self) -> dict[str, Any]:
        """What there is, and what the last ``train`` makes of it, for reports."""
        domains = {}
        notes = []
        for name, domain in self.domains.items():
            domains[name] = {**asdict(domain.counts), "complete": domain.complete}
            if count := domain.counts.replaced:
                notes.append(f"{name}: {replaced_note(count)}")
        if self.trained is not None:
            for name, epochs in self.trained.epochs().items():
                domains[name]["epochs"] = epochs
                if epochs is not None and epochs > MANY_EPOCHS:
                    notes.append(f"{name}: is gone through {epochs:.1f} times; more than {MANY_EPOCHS} add little")
        return {"domains": domains, "notes": notes}

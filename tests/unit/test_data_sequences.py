"""The order of domains and documents: exact shares at every point, all tokens once an epoch, the same for ever."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

import branchmix.data.corpus as corpus_module
from branchmix.data.config import HeldOut, Source
from branchmix.data.corpus import Corpus
from branchmix.data.sequences import MixOrder
from branchmix.errors import DataError
from corpora import corpus, text, tokenizer, write_jsonl

MIXES = {
    "equal": [0.25] * 4,
    "one": [1.0],
    "thirds": [1 / 3] * 3,
    "paper": [0.9, 0.1],
    "skewed": [0.8] + [0.02] * 10,
    "odd": [0.618034, 0.2371, 0.144866],
    "tiny": [0.9995, 0.0003, 0.0002],
}


@pytest.mark.parametrize("name", MIXES)
def test_shares_are_met_at_every_point(name: str) -> None:
    shares = np.array(MIXES[name])
    order = MixOrder(list(shares), 3)
    num = 5000
    items = [order[n] for n in range(num)]
    counts = np.cumsum(np.eye(len(shares))[[domain for domain, _ in items]], axis=0)
    ideal = np.arange(1, num + 1)[:, None] * shares
    assert np.abs(counts - ideal).max() < 1 + 1e-6
    seen: Counter[int] = Counter()
    for domain, before in items:
        assert before == seen[domain]
        seen[domain] += 1
    assert order.counts(num) == [seen[domain] for domain in range(len(shares))]


def test_domains_are_in_step_with_nothing() -> None:
    """Whatever the number of processes, each sees every domain about as often as the mix has it."""
    order = MixOrder([0.25, 0.75], 0)
    domains = np.array([order[n][0] for n in range(8192)])
    for world in (2, 4, 8, 16):
        for rank in range(world):
            share = (domains[rank::world] == 0).mean()
            assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 * world / len(domains)), (world, rank)


def test_seeds_give_other_orders() -> None:
    orders = [[MixOrder([0.5, 0.5], seed)[n][0] for n in range(100)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "CHUNK_TOKENS", 2000)


def two_domains(folder: Path) -> Corpus:
    write_jsonl(folder / "a.jsonl", range(400))
    write_jsonl(folder / "b.jsonl", range(1000, 1200))
    return corpus(folder, {"a": Source(files="a.jsonl"), "b": Source(files="b.jsonl")})


def train(opened: Corpus, **options: Any) -> Any:
    options = {"mix": {"a": 1.0}, "sequence_length": 32, "num_sequences": 50, "random_seed": 0, **options}
    return opened.train(options.pop("mix"), **options)


def test_items(tmp_path: Path, small_chunks: None) -> None:
    sequences = train(two_domains(tmp_path), mix={"b": 3, "a": 1})
    assert sequences.domains == ["a", "b"] and len(sequences) == 50
    for n in range(50):
        item = sequences[n]
        assert all(item[name].dtype == torch.int64 for name in ("input_ids", "position_ids", "labels"))
        first = item["position_ids"] == 0
        assert first[0]
        assert (item["labels"][first] == -100).all() and (item["labels"][~first] == item["input_ids"][~first]).all()
        assert (item["position_ids"].diff()[~first[1:]] == 1).all()
        # A piece starts where a document ended, or at the sequence's own start.
        assert (item["input_ids"][:-1][first[1:]] == tokenizer().eos_token_id).all()
    assert sequences.counts() == dict(zip("ab", np.bincount([s["domain"] for s in sequences]), strict=True))
    batch = default_collate([sequences[n] for n in range(3)])
    assert batch["input_ids"].shape == (3, 32) and batch["domain"].shape == (3,)
    with pytest.raises(IndexError):
        sequences[50]


def spelled(sequences: Any, numbers: range) -> str:
    return "".join(tokenizer().decode(sequences[n]["input_ids"].tolist()) for n in numbers)


def test_an_epoch_is_every_document_once_in_an_order_of_its_own(tmp_path: Path, small_chunks: None) -> None:
    opened = two_domains(tmp_path)
    domain = opened.domains["a"]
    assert len(domain.chunks) > 3
    per_epoch = domain.counts.tokens // 32
    sequences = train(opened, num_sequences=3 * per_epoch)
    epochs = [spelled(sequences, range(e * per_epoch, (e + 1) * per_epoch)).split("<|endoftext|>") for e in range(3)]
    held_out = set(opened.held_out_texts("a"))
    wanted = {text(n) for n in range(400)} - held_out
    assert len(held_out) == domain.counts.held_out_documents > 0 and len(wanted) == domain.counts.documents
    for documents in epochs:
        *whole, rest = documents
        assert len(whole) == len(set(whole)) and set(whole) <= wanted
        # What is dropped at the end is shorter than a sequence.
        missing = sum(len(tokenizer()(t)["input_ids"]) + 1 for t in wanted - set(whole))
        assert missing < 32 + len(tokenizer()(rest)["input_ids"])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert opened.as_dict()["domains"]["a"]["epochs"] == pytest.approx(3)
    # Shuffled across the whole corpus, and not just in chunks: neighbours come from anywhere.
    numbers = [int(document.split(":")[0]) for document in epochs[0][:-1]]
    assert np.abs(np.diff(numbers)).mean() > 90


def test_many_epochs_give_a_note(tmp_path: Path) -> None:
    opened = two_domains(tmp_path)
    train(opened, num_sequences=4 * (opened.domains["a"].counts.tokens // 32))
    assert opened.as_dict()["notes"] == []
    train(opened, num_sequences=5 * (opened.domains["a"].counts.tokens // 32))
    assert opened.as_dict()["notes"] == ["a: is gone through 5.0 times; more than 4 add little"]


def test_long_documents_go_on_in_the_next_sequence(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(" ".join(text(n) for n in range(100)))
    opened = corpus(tmp_path, {"a": Source(files="long.txt")})
    sequences = train(opened, num_sequences=20)
    assert all((sequences[n]["position_ids"] == torch.arange(32)).all() for n in range(20))
    assert spelled(sequences, range(20)) == (tmp_path / "long.txt").read_text()[: len(spelled(sequences, range(20)))]


SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import branchmix.data.corpus as corpus_module
corpus_module.CHUNK_TOKENS = 2000
from branchmix.data.config import Source
from corpora import corpus
folder = Path(sys.argv[1])
opened = corpus(folder, {name: Source(files=f"{name}.jsonl") for name in "ab"})
sequences = opened.train({"a": 0.7, "b": 0.3}, sequence_length=32, num_sequences=2000, random_seed=5)
print(json.dumps([sequences[n]["input_ids"].tolist() for n in (1999, 3, 1200, 0, 1023, 1024)]))
"""


def test_another_process_sees_the_same(tmp_path: Path, small_chunks: None) -> None:
    sequences = train(two_domains(tmp_path), mix={"a": 0.7, "b": 0.3}, num_sequences=2000, random_seed=5)
    everything = [item["input_ids"].tolist() for item in sequences]  # in order, before single items elsewhere
    tests = str(Path(__file__).parent.parent)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), tests], capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) == [everything[n] for n in (1999, 3, 1200, 0, 1023, 1024)]
    other = train(two_domains(tmp_path), mix={"a": 0.7, "b": 0.3}, num_sequences=2000, random_seed=6)
    assert [item["input_ids"].tolist() for item in other] != everything


def test_the_order_is_pinned(tmp_path: Path) -> None:
    """A change of the order breaks every run that is to be resumed: raise ``FORMAT`` and say so in the changelog."""
    opened = two_domains(tmp_path)
    sequences = train(opened, mix={"a": 0.7, "b": 0.3}, random_seed=5)
    assert [sequences[n]["domain"] for n in range(12)] == PINNED_DOMAINS
    numbers = [int(document.split(":")[0]) for document in spelled(train(opened), range(20)).split("<|endoftext|>")]
    assert numbers[:8] == PINNED_DOCUMENTS


PINNED_DOMAINS = [0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1]
PINNED_DOCUMENTS = [206, 150, 227, 175, 67, 398, 255, 240]


def test_proportional_and_equal(tmp_path: Path) -> None:
    opened = two_domains(tmp_path)
    tokens = {name: domain.counts.tokens for name, domain in opened.domains.items()}
    counts = train(opened, mix="proportional", num_sequences=1000).counts()
    assert abs(counts["a"] / 1000 - tokens["a"] / sum(tokens.values())) < 2e-3
    assert train(opened, mix="equal", num_sequences=1000).counts() == {"a": 500, "b": 500}
    assert train(opened, mix={"a": 0, "b": 2}).domains == ["b"]


def test_less_than_a_sequence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a: there are \d+ tokens to train on, less than one sequence of 100000"):
        train(two_domains(tmp_path), sequence_length=100_000)


def test_held_out_sequences(tmp_path: Path, small_chunks: None) -> None:
    opened = two_domains(tmp_path)
    held_out = opened.held_out(sequence_length=32)
    texts = {name: opened.held_out_texts(name) for name in ("a", "b")}
    for name, sequences in held_out.items():
        length = sum(len(tokenizer()(t)["input_ids"]) + 1 for t in texts[name])
        assert len(sequences) == -(-length // 32)
        ids = torch.cat([item["input_ids"] for item in sequences])
        assert tokenizer().decode(ids[:length]) == "".join(t + "<|endoftext|>" for t in texts[name])
        labels = torch.cat([item["labels"] for item in sequences])
        assert (labels[length:] == -100).all() and (labels[:length] != -100).sum() > 0.8 * length
    # Of so many tokens, whole documents, and the same ones whatever else there is.
    few = corpus(tmp_path, {"b": Source(files="b.jsonl")}, held_out=HeldOut(share=0.1, tokens=100))
    chosen = few.held_out_texts("b")
    assert chosen == texts["b"][: len(chosen)] and 0 < len(chosen) < len(texts["b"])
    assert sum(len(tokenizer()(t)["input_ids"]) + 1 for t in chosen) <= 100
    none = corpus(tmp_path, {"b": Source(files="b.jsonl")}, held_out=HeldOut(share=0.0))
    assert none.held_out(sequence_length=32) == {} and none.domains["b"].counts.documents == 200

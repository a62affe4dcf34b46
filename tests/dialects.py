"""Domains that a tiny model can learn in seconds: the same words in other orders, and a few words of their own."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from branchmix.data.tokenizer import train_tokenizer
from families import BY_NAME

DOMAINS = ("north", "south", "west")
COMMON = "one two three four five six seven eight nine ten".split()
OWN = {
    "north": "snow ice fir elk".split(),
    "south": "sand heat palm goat".split(),
    "west": "sea wind reed gull".split(),
}


def document(domain: str, number: int) -> str:
    """Document ``number`` of a dialect: each word decides the next, in its own way in every dialect."""
    rng = np.random.default_rng([DOMAINS.index(domain), number])
    order = np.random.default_rng(DOMAINS.index(domain)).permutation(COMMON).tolist()
    word, words = str(rng.choice(order)), []
    for _ in range(int(rng.integers(30, 60))):
        words.append(word)
        if rng.random() < 0.15:
            words.append(str(rng.choice(OWN[domain])))
        word = order[(order.index(word) + 1) % len(order)] if rng.random() < 0.9 else str(rng.choice(order))
    return " ".join(words)


@cache
def tokenizer() -> Any:
    texts = (document(domain, number) for number in range(1000, 1060) for domain in DOMAINS)
    return train_tokenizer(texts, 320)


def write(folder: Path, documents: int = 120, domains: tuple[str, ...] = DOMAINS, share: float = 0.2) -> Path:
    """A data file of all dialects; a fifth of the documents is held out."""
    lines = [f"held_out: {{share: {share}}}", "data:"]
    for domain in domains:
        rows = [json.dumps({"text": document(domain, number)}) for number in range(documents)]
        (folder / f"{domain}.jsonl").write_text("\n".join(rows))
        lines.append(f"  {domain}: {{files: {domain}.jsonl}}")
    (folder / "data.yaml").write_text("\n".join(lines))
    return folder / "data.yaml"


def siblings(folder: Path) -> dict[str, Path]:
    """A seed that has seen all dialects a little, and an expert of each; ``write`` writes other documents."""
    torch.manual_seed(0)
    seed = BY_NAME["llama"].model(0, vocab_size=len(tokenizer()))
    _train(seed, DOMAINS, steps=30)
    found = {"seed": folder / "seed"}
    seed.save_pretrained(found["seed"])
    start = {key: tensor.clone() for key, tensor in seed.state_dict().items()}
    for name, parameter in seed.named_parameters():  # what mixtures average stays the seed's
        parameter.requires_grad_("attn" in name or "mlp" in name)
    for domain in DOMAINS:
        seed.load_state_dict(start)
        _train(seed, (domain,), steps=60)
        found[domain] = folder / domain
        seed.save_pretrained(found[domain])
    for path in found.values():
        tokenizer().save_pretrained(path)
    return found


def _train(model: Any, domains: tuple[str, ...], steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    model.train()
    for step in range(steps):
        texts = [document(domain, 2000 + step * 16 + row) for row in range(16 // len(domains)) for domain in domains]
        ids = torch.tensor([tokenizer()(text)["input_ids"][:28] for text in texts])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()

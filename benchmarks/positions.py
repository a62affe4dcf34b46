"""Benchmark: how fast document gates find the domain, and how fast they leave it: perplexity by position.

    python benchmarks/positions.py MIXTURE --models SEED CODE LAW --data data.yaml
    python benchmarks/positions.py BAM BTX --models SEED CODE LAW --data data.yaml --part 128 --documents 8 --out FILE

Held-out documents are cut to their first tokens, and joined in pairs of different domains without anything between the
two. Each mixture is scored beside the dense models it was merged from, its forced gates, and the ensemble of the
dense models by the posterior of the domain (Branch-Train-Merge), which never forgets. Results go to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import measure
from branchmix.data.config import EvalData
from branchmix.evaluate.documents import select
from branchmix.evaluate.perplexity import token_log_probs
from branchmix.evaluate.scores import ensemble_log_probs
from branchmix.likelihood.loading import load_language_model, load_tokenizer
from branchmix.likelihood.models import encode, prefix_token
from branchmix.models.kept_branchmix import keep_experts

RESULTS = Path(__file__).resolve().parent / "results"
EDGES = (0, 16, 32, 64, 128, 256)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("mixtures", type=Path, nargs="+", help="folders of mixtures with document gates")
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="the dense models, seed first")
    parser.add_argument("--data", type=Path, required=True, help="domains of text, in the format of eval --data")
    parser.add_argument("--part", type=int, default=128, help="tokens of each half")
    parser.add_argument("--documents", type=int, default=8, help="documents of each domain")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"positions-{datetime.date.today()}", help="of the results"
    )
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    tokenizer = load_tokenizer(args.models[0])
    parts = parts_by_domain(args, tokenizer)
    pairs = list(itertools.permutations(parts, 2))
    joined = [np.concatenate((a, b)) for one, other in pairs for a, b in zip(parts[one], parts[other], strict=True)]
    labels = [pair for pair in pairs for _ in range(args.documents)]

    scores: dict[str, list[np.ndarray]] = {}
    for folder in args.models:
        scores[folder.name] = scored(load_language_model(folder, dtype=dtype), tokenizer, joined)
        print(folder, flush=True)
    dense = list(scores.values())
    scores["ensemble"] = [ensemble_log_probs(rows) for rows in zip(*dense, strict=True)]
    for folder in args.mixtures:
        model = load_language_model(folder, dtype=dtype)
        scores[folder.name] = scored(model, tokenizer, joined)
        forced = [scored(keep_experts(model, [n]), tokenizer, joined) for n in range(model.config.num_experts)]
        scores[f"{folder.name}, best forced gates"] = best_by_domain(forced, labels, args.part)
        print(folder, flush=True)
    scores = {"best dense model of each domain": best_by_domain(dense, labels, args.part), **scores}
    tables = {name: by_position(rows, labels, args.part) for name, rows in scores.items()}
    facts = {
        "arguments": {key: str(value) for key, value in vars(args).items()},
        **measure.machine_facts(args.data.parent),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps({"perplexity": tables, **facts}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(tables))
    print(markdown(tables))
    return 0


def parts_by_domain(args: argparse.Namespace, tokenizer: Any) -> dict[str, list[np.ndarray]]:
    """The first tokens of held-out documents that have enough of them, as many of each domain; later parts of long
    documents where there are too few."""
    parts = {}
    for name, documents in select(EvalData.load(args.data), tokenizer).items():
        tokens = encode(tokenizer, [document.text for document in documents])
        rounds = range(max(len(row) for row in tokens) // args.part)
        cut = [
            row[n * args.part : (n + 1) * args.part]
            for n in rounds
            for row in tokens
            if len(row) >= (n + 1) * args.part
        ]
        if len(cut) < args.documents:
            raise SystemExit(
                f"{name}: has {len(cut)} parts of {args.part} tokens: fewer --documents, or a shorter --part"
            )
        parts[name] = cut[: args.documents]
    return parts


def scored(model: Any, tokenizer: Any, documents: list[np.ndarray]) -> list[np.ndarray]:
    """Log-probabilities of each document's tokens, read in one go."""
    longest = max(map(len, documents))
    prefix = prefix_token(tokenizer, model.config)
    return [logp_T for _, logp_T in sorted(token_log_probs(model, documents, prefix=prefix, max_length=longest))]


def best_by_domain(models: list[list[np.ndarray]], labels: list[tuple[str, str]], part: int) -> list[np.ndarray]:
    """Each half by the model that is best on halves of its domain."""
    total: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(models)))
    for row, pair in enumerate(labels):
        for half, domain in enumerate(pair):
            total[domain] += [model[row][half * part : (half + 1) * part].sum() for model in models]
    best = {domain: int(sums.argmax()) for domain, sums in total.items()}
    return [
        np.concatenate([models[best[domain]][row][half * part : (half + 1) * part] for half, domain in enumerate(pair)])
        for row, pair in enumerate(labels)
    ]


def by_position(rows: list[np.ndarray], labels: list[tuple[str, str]], part: int) -> dict[str, dict[str, float]]:
    """Perplexity of tokens so far behind the beginning and behind the change, geometric mean over domains."""
    table: dict[str, dict[str, float]] = {}
    for half, name in enumerate(("from the beginning", "from the change")):
        table[name] = {}
        for low, high in itertools.pairwise(EDGES):
            if low >= part:
                break
            found = defaultdict(list)
            for logp_T, pair in zip(rows, labels, strict=True):
                found[pair[half]].append(logp_T[half * part + low : half * part + min(high, part)])
            losses = [-np.concatenate(values).mean() for values in found.values()]
            table[name][f"{low + 1} to {min(high, part)}"] = float(np.exp(np.mean(losses)))
    return table


def markdown(tables: dict[str, dict[str, dict[str, float]]]) -> str:
    """A row for each model; tokens from the beginning, then from the change."""
    first = next(iter(tables.values()))
    columns = [f"{name}: {tokens}" for name, found in first.items() for tokens in found]
    lines = ["| tokens " + "".join(f"| {column} " for column in columns) + "|", "| --- " * (len(columns) + 1) + "|"]
    for name, table in tables.items():
        values = [value for found in table.values() for value in found.values()]
        lines.append(f"| {name} " + "".join(f"| {value:.2f} " for value in values) + "|")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())

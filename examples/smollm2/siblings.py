"""Three slightly trained siblings of the seed: code, law and mathematics, by a short continued pretraining each.

    python examples/smollm2/siblings.py smollm2-output/seed smollm2-output      # writes smollm2-output/{code,law,math}

The three run side by side with one thread each: on few cores that is faster than one after another with all of
them. fp32 weights under bf16 autocast, because steps this small would be lost in the rounding of bf16 weights.
Each needs 4 GB of memory; `--at-once 1` is for machines with less than 12. A finished sibling is kept; an interrupted
one leaves nothing but a folder named `*.part`, which the next start replaces.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import time
from itertools import zip_longest
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from branchmix.data.installed import documents

DOMAINS = ("code", "law", "math")
NUM_STEPS, WARMUP_STEPS, LEARNING_RATE = 24, 4, 1e-4
BATCH, CONTEXT = 2, 256
NUM_HELD_OUT = 8  # sequences
RESULT = "sibling.json"


def token_rows(tokenizer, domain: str, *, held_out: bool, num_rows: int) -> torch.Tensor:
    """`num_rows` sequences of CONTEXT tokens, [rows, tokens]: two of each document, or more where there are few.

    Raises:
        ValueError: the domain has too little text in this environment.
    """
    pieces_by_document: list[list[list[int]]] = []
    for document in documents(domain, held_out=held_out):
        ids = tokenizer(document.text, verbose=False).input_ids
        pieces = [ids[start : start + CONTEXT] for start in range(0, len(ids) - CONTEXT + 1, CONTEXT)]
        random.Random(0).shuffle(pieces)  # not only beginnings
        pieces_by_document += [pieces] if pieces else []
        if 2 * len(pieces_by_document) >= num_rows:
            break
    rows = [piece for pieces in zip_longest(*pieces_by_document) for piece in pieces if piece]
    if len(rows) < num_rows:
        raise ValueError(f"{domain}: {len(rows)} sequences of text in this environment, {num_rows} are needed")
    return torch.tensor(rows[:num_rows])


@torch.no_grad()
def mean_loss(model, rows_BT: torch.Tensor) -> float:
    """Mean loss in nats per token."""
    return sum(_loss(model, row_BT).item() for row_BT in rows_BT.split(1)) / len(rows_BT)


def _loss(model, ids_BT: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.float32):
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    return cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten())


def train(domain: str, seed: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(seed)
    # Short sequences in bf16 on a CPU: eager attention is faster than SDPA.
    model = AutoModelForCausalLM.from_pretrained(seed, dtype=torch.float32, attn_implementation="eager")
    held_out_BT = token_rows(tokenizer, domain, held_out=True, num_rows=NUM_HELD_OUT)
    rows_BT = token_rows(tokenizer, domain, held_out=False, num_rows=NUM_STEPS * BATCH)
    rows_BT = rows_BT[torch.randperm(len(rows_BT))]
    before = mean_loss(model, held_out_BT)

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, (NUM_STEPS - step) / (NUM_STEPS - WARMUP_STEPS))
    )
    started = time.perf_counter()
    for step, ids_BT in enumerate(rows_BT.split(BATCH), start=1):
        loss = _loss(model, ids_BT)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 4 == 0:
            speed = step * BATCH * CONTEXT / (time.perf_counter() - started)
            print(f"  {domain:5} step {step:3}/{NUM_STEPS}  loss {loss.item():.3f}  {speed:4.0f} tokens/s", flush=True)

    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(part)
    after = mean_loss(model, held_out_BT)  # of the weights as they are saved
    tokenizer.save_pretrained(part)
    (part / RESULT).write_text(json.dumps({"before": before, "after": after}))
    part.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's three siblings.")
    parser.add_argument("seed", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--at-once", type=int, default=len(DOMAINS), help="how many side by side, with 4 GB of memory each"
    )
    options = parser.parse_args()
    missing = [domain for domain in DOMAINS if not (options.output / domain / RESULT).is_file()]
    jobs = [(domain, options.seed, options.output / domain) for domain in missing]
    if jobs:
        os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes below when they import torch
        with multiprocessing.get_context("spawn").Pool(min(len(jobs), options.at_once)) as pool:
            pool.starmap(train, jobs, chunksize=1)
    print(f"{'sibling':8} {'held-out loss of its own domain: seed':>38} {'sibling':>8}   (nats per token)")
    for domain in DOMAINS:
        result = json.loads((options.output / domain / RESULT).read_text())
        print(f"{domain:8} {result['before']:38.3f} {result['after']:8.3f}")


if __name__ == "__main__":
    main()

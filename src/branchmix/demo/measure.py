"""Every model on every domain: bits per byte and perplexity of held-out documents.

    python -m branchmix.demo.measure OUT seed experts/code ...      # writes OUT/scores/seed.json, ...

Documents are kept apart, so that two models can be compared document by document.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from branchmix.demo.settings import sources


def score_file(out: Path, model: str) -> Path:
    """Where the scores of the model in ``out / model`` are."""
    return out / "scores" / f"{model.replace('/', '-')}.json"


def routing_file(out: Path, run: str) -> Path:
    """Where the numbers of the routers of ``out / trained / run`` are."""
    return out / "routing" / f"{run}.json"


def routes_page(run: str) -> str:
    """Name of the page that shows them token by token, beside the demo's own."""
    return f"routes-{run}.html"


def measure(out: Path, name: str, *, held_out: dict[str, Any], max_length: int) -> dict[str, Any]:
    """Scores of one model: ``{"domains": {domain: [[nats, tokens, bytes] of each document]}}``.

    Args:
        out: the demo's folder.
        name: the model's folder below it.
        held_out: as in the run files.
        max_length: tokens of the window, those of a training sequence.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from branchmix.data.config import HeldOut, Source
    from branchmix.data.corpus import open_corpus
    from branchmix.evaluate.perplexity import document_score, token_log_probs
    from branchmix.likelihood.models import encode, prefix_token
    from branchmix.train.models import has_bf16

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bf16 = has_bf16(torch.device("cpu"))
    options = {"attn_implementation": "eager"} if bf16 else {}
    model = AutoModelForCausalLM.from_pretrained(out / name, dtype=torch.float32, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(out / name)
    corpus = open_corpus(
        {domain: Source(**source) for domain, source in sources().items()},
        tokenizer,
        folder=out,
        cache=None,
        held_out=HeldOut(**held_out),
    )
    prefix = prefix_token(tokenizer, model.config)
    domains = {}
    # As it was trained: weights in fp32, matrix products in bf16 where the machine has them.
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for domain in sources():
            texts = corpus.held_out_texts(domain)
            documents = encode(tokenizer, texts)
            scores = [None] * len(texts)
            windows = token_log_probs(model, documents, prefix=prefix, max_length=max_length, stride=max_length)
            for number, logp in windows:
                score = document_score(texts[number], logp, tokenizer, documents[number], prefix)
                scores[number] = [score.nll, score.tokens, score.bytes]  # type: ignore[call-overload]
            domains[domain] = scores
    return {"model": name, "domains": domains}


def main(out: Path, names: list[str]) -> None:
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    held_out = {"share": plan["scale"]["held_out_share"], "tokens": plan["budgets"]["held_out"]}
    for name in names:
        file = score_file(out, name)
        if file.is_file():
            continue
        scores = measure(out, name, held_out=held_out, max_length=plan["scale"]["sequence_length"])
        file.parent.mkdir(exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(scores), encoding="utf-8")
        part.rename(file)
        print(f"{name}: measured", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

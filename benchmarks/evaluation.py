"""Benchmark: log-likelihoods of documents by `branchmix eval`'s loop against lm-eval's `loglikelihood_rolling`.

    python benchmarks/evaluation.py --model SmolLM2-folder          # needs lm-eval (`pip install lm-eval`)

The same model object, texts, windows (lm-eval's: stride = window) and batch size, one thread, one process; the two take
turns, and each is charged its CPU time, so other users of the machine don't count. Two sets of texts: `passages`, many
documents of all lengths, and `modules`, few that are longer than many windows; both from Python's standard library.
The numbers must agree to 1e-4. Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
RESULTS = Path(__file__).resolve().parent / "results"
MODULES = ("textwrap", "heapq", "bisect", "fractions", "statistics", "colorsys", "calendar")


def main() -> int:
    args = _parser().parse_args()
    sys.path += [str(path) for path in args.path]
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
    results = {name: measure(args, model, tokenizer, texts) for name, texts in texts_of(args.characters).items()}
    report(args, results)
    return 0


def texts_of(characters: int) -> dict[str, list[str]]:
    """Documents by kind, about as many characters of each."""
    modules = [Path(__import__(name).__file__ or "").read_text(encoding="utf-8") for name in MODULES]
    passages = [part.strip() for module in modules for part in module.split("\n\n") if part.strip()]
    return {"passages": _up_to(passages, characters), "modules": _up_to(modules, characters)}


def _up_to(texts: list[str], characters: int) -> list[str]:
    chosen: list[str] = []
    for text in texts:
        left = characters - sum(map(len, chosen))
        if left > 0:
            chosen.append(text[:left])
    return chosen


def measure(args: argparse.Namespace, model: Any, tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """Both ways in turn, `rounds` times; the first, which warms up, does not count."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from branchmix.evaluate.perplexity import token_log_probs
    from branchmix.likelihood.models import encode, prefix_token

    theirs = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=args.batch_size,
        max_length=args.max_length,
        add_bos_token=False,
    )
    requests = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    prefix = prefix_token(tokenizer, model.config)

    def ours() -> list[float]:
        found = token_log_probs(
            model,
            encode(tokenizer, texts),
            prefix=prefix,
            max_length=args.max_length,
            stride=args.max_length,
            batch_tokens=args.batch_size * args.max_length,
        )
        by_number = dict(found)
        return [float(by_number[number].sum(dtype="float64")) for number in range(len(texts))]

    ways: dict[str, Callable[[], list[float]]] = {
        "lm-eval": lambda: theirs.loglikelihood_rolling(requests, disable_tqdm=True),
        "branchmix": ours,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    sums: dict[str, list[float]] = {}
    for number in range(args.rounds + 1):
        for name in sorted(ways, reverse=bool(number % 2)):
            start = time.process_time()
            with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):  # lm-eval's progress bars
                sums[name] = ways[name]()
            if number:
                seconds[name].append(time.process_time() - start)
    pairs = zip(sums["branchmix"], sums["lm-eval"], strict=True)
    return {
        "documents": len(texts),
        "tokens": sum(map(len, encode(tokenizer, texts))),
        "cpu_seconds": seconds,
        "ratios": [theirs / ours for ours, theirs in zip(seconds["branchmix"], seconds["lm-eval"], strict=True)],
        "greatest_relative_difference": max(abs(a - b) / abs(b) for a, b in pairs),
    }


def report(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """A table, and the same as JSON with every measurement."""
    packages = {name: version(name) for name in ("lm_eval", "torch", "transformers")}
    facts = {
        "date": datetime.date.today().isoformat(),
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "window": args.max_length,
        "batch": args.batch_size,
        "rounds": args.rounds,
        "threads": 1,
        "machine": platform.machine(),
        "versions": packages,
    }
    lines = [
        f"{facts['date']}, window {args.max_length}, {args.batch_size} windows a batch, {args.dtype}, one thread, "
        f"lm-eval {packages['lm_eval']}, torch {packages['torch']}, transformers {packages['transformers']}.",
        "",
        "| texts | documents | tokens | lm-eval, CPU s | branchmix, CPU s | times as fast (range) | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        cpu, ratios = found["cpu_seconds"], found["ratios"]
        lines.append(
            f"| {name} | {found['documents']} | {found['tokens']} | {median(cpu['lm-eval']):.2f} "
            f"| {median(cpu['branchmix']):.2f} | {median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f}) "
            f"| {found['greatest_relative_difference']:.1e} |"
        )
    print("\n".join(lines))
    args.results.mkdir(parents=True, exist_ok=True)
    file = args.results / f"evaluation-{facts['date']}"
    file.with_suffix(".json").write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")
    file.with_suffix(".md").write_text("\n".join(lines) + "\n")
    assert all(found["greatest_relative_difference"] < 1e-4 for found in results.values())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a dense model or a mixture, with its tokenizer")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--batch-size", type=int, default=4, help="windows of a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--characters", type=int, default=4000, help="of each set of texts")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--path", type=Path, action="append", default=[], help="a further place to import lm-eval from")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Benchmark: the prize's multiple-choice files scored by `branchmix scaling run`'s loop and by lm-eval's.

    python benchmarks/scaling.py --model SmolLM2-folder --data FOLDER       # needs lm-eval (`pip install lm-eval`)

Both score the same questions with the same model object, dtype and batch size, from text to log-probabilities: one
thread, one process, in turn (the order reversed every other round), each charged its CPU time, so other users of the
machine don't count. lm-eval reads options of one token off one pass by default, which is the row to look at; `no cache`
is lm-eval with `logits_cache=False`. A batch of ours has at most as many tokens as lm-eval's largest.
`floor` is the model's body on every different input token sequence, one at a time, and nothing else: without the head,
the softmax, or any sharing. The log-probabilities must agree to 1e-4. Results go to benchmarks/results/.

`--count` runs nothing: it counts the FLOPs of matrix products that both ways ask for, by the exact accounting.
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
TASKS = ("memo-trap", "hindsight-neglect")


def main() -> int:
    args = _parser().parse_args()
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from branchmix.scaling.examples import load_examples
    from branchmix.scaling.tasks import TASKS as KNOWN

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
    results = {}
    for task in args.tasks.split(","):
        examples = load_examples(args.data / KNOWN[task].file, "classification")
        wanted = args.examples.get(task) or len(examples)
        chosen = examples[:: max(1, len(examples) // wanted)][:wanted]
        if args.count:
            print(json.dumps({task: count(args, model, tokenizer, chosen)}))
            continue
        results[task] = {"examples": len(chosen), "of": len(examples), **measure(args, model, tokenizer, chosen)}
        print(json.dumps({task: {key: results[task][key] for key in ("cpu_seconds", "ratios")}}), file=sys.stderr)
    if not args.count:
        report(args, results)
    return 0


def count(args: argparse.Namespace, model: Any, tokenizer: Any, examples: list[Any]) -> dict[str, Any]:
    """Tokens through the body and positions through the head, and how much less work ours is; attention at the mean
    length of an input."""
    from branchmix.accounting import inspect
    from branchmix.likelihood.forward import max_positions
    from branchmix.scaling.scoring.plan import batches, plan
    from branchmix.scaling.scoring.tokens import Bos, Question, encode_questions

    questions = [Question(example.prompt, example.classes) for example in examples]
    bos = Bos.of(tokenizer, model.config, "default")
    encoded = encode_questions(tokenizer, questions, bos, max_positions(model.config))
    inputs = [one.context + option[:-1] for one in encoded for option in one.options]
    size = args.batch_size

    def padded(rows: list[tuple[int, ...]]) -> int:
        lengths = sorted(map(len, rows), reverse=True)
        return sum(lengths[start] * len(lengths[start : start + size]) for start in range(0, len(lengths), size))

    body = head = 0
    for trunk in plan(encoded):
        body += len(trunk.tokens)
        for batch in batches(trunk, size * max(map(len, inputs))):
            branches = [branch for row in batch for branch in row.branches]
            for rows in (batch, branches):
                body += max((len(row.tokens) for row in rows), default=0) * len(rows)
                head += sum(len({target.place for target in row.targets}) for row in rows)
    flops = inspect(args.model, context=round(sum(map(len, inputs)) / len(inputs))).flops
    assert flops is not None
    ours = body * flops.non_embedding + head * flops.lm_head
    theirs = {"lm-eval": padded(list(dict.fromkeys(inputs))), "no cache": padded(inputs)}
    return {
        "examples": len(examples),
        "branchmix": {"body": body, "head": head},
        **{name: {"body": tokens, "head": tokens} for name, tokens in theirs.items()},
        "ratios": {name: round(tokens * flops.total / ours, 3) for name, tokens in theirs.items()},
    }


def measure(args: argparse.Namespace, model: Any, tokenizer: Any, examples: list[Any]) -> dict[str, Any]:
    """All ways in turn, `rounds` times; the first, which warms up, does not count."""
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from branchmix.likelihood.forward import max_positions
    from branchmix.scaling.scoring.passes import score_options
    from branchmix.scaling.scoring.tokens import Bos, Question, encode_questions

    options = {"pretrained": model, "tokenizer": tokenizer, "batch_size": args.batch_size}
    theirs = {"lm-eval": HFLM(**options), "no cache": HFLM(**options, logits_cache=False)}
    requests = [
        Instance("loglikelihood", {}, (example.prompt, option), number)
        for number, example in enumerate(examples)
        for option in example.classes
    ]
    questions = [Question(example.prompt, example.classes) for example in examples]
    bos = Bos.of(tokenizer, model.config, "default")
    encoded = encode_questions(tokenizer, questions, bos, max_positions(model.config))
    batch_tokens = args.batch_size * max(one.num_tokens for one in encoded)

    def ours() -> list[float]:
        tokens = encode_questions(tokenizer, questions, bos, max_positions(model.config))
        found = dict(score_options(model, tokens, batch_tokens=batch_tokens))
        return [value for number in range(len(questions)) for value in found[number]]

    def floor() -> list[float]:
        inputs = dict.fromkeys(one.context + option[:-1] for one in encoded for option in one.options)
        with torch.inference_mode():
            for row in inputs:
                model.get_decoder()(input_ids=torch.tensor([row]), use_cache=False)
        return []

    ways: dict[str, Callable[[], list[float]]] = {
        "branchmix": ours,
        "floor": floor,
        **{
            name: lambda lm=lm: [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]
            for name, lm in theirs.items()
        },
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    scores: dict[str, list[float]] = {}
    for number in range(args.rounds + 1):
        for name in sorted(ways, reverse=bool(number % 2)):
            start = time.process_time()
            with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):  # lm-eval's progress bars
                scores[name] = ways[name]()
            if number:
                seconds[name].append(time.process_time() - start)
    pairs = list(zip(scores["branchmix"], scores["lm-eval"], strict=True))
    return {
        "tokens": sum(len(one.context) for one in encoded),
        "cpu_seconds": seconds,
        "ratios": {name: median(seconds[name]) / median(seconds["branchmix"]) for name in seconds},
        "by_round": {
            name: [theirs / ours for ours, theirs in zip(seconds["branchmix"], seconds[name], strict=True)]
            for name in seconds
        },
        "greatest_difference": max(abs(ours - theirs) for ours, theirs in pairs),
    }


def report(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """A table, and the same as JSON with every measurement."""
    packages = {name: version(name) for name in ("lm_eval", "torch", "transformers")}
    facts = {
        "date": datetime.date.today().isoformat(),
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "batch": args.batch_size,
        "rounds": args.rounds,
        "threads": 1,
        "machine": platform.machine(),
        "load": os.getloadavg(),
        "versions": packages,
    }
    lines = [
        f"{facts['date']}, {facts['model']}, {args.batch_size} sequences a batch, {args.dtype}, one thread, "
        f"{args.rounds} rounds, lm-eval {packages['lm_eval']}, torch {packages['torch']}, transformers "
        f"{packages['transformers']}; load of the machine {facts['load'][0]:.0f}. Medians of CPU seconds.",
        "",
        "| task | examples | branchmix | floor | lm-eval | times as fast (range of rounds) | lm-eval, no cache | times "
        "as fast | difference of log-probabilities |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task, found in results.items():
        cpu = {name: f"{median(values):.2f}" for name, values in found["cpu_seconds"].items()}
        rounds = found["by_round"]["lm-eval"]
        lines.append(
            f"| {task} | {found['examples']} of {found['of']} | {cpu['branchmix']} | {cpu['floor']} | {cpu['lm-eval']} "
            f"| {found['ratios']['lm-eval']:.2f} ({min(rounds):.2f}, {max(rounds):.2f}) | {cpu['no cache']} "
            f"| {found['ratios']['no cache']:.2f} | {found['greatest_difference']:.1e} |"
        )
    print("\n".join(lines))
    args.results.mkdir(parents=True, exist_ok=True)
    file = args.results / f"scaling-{facts['date']}"
    file.with_suffix(".json").write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")
    file.with_suffix(".md").write_text("\n".join(lines) + "\n")
    assert all(found["greatest_difference"] < 1e-4 for found in results.values()), "not the same scores"


def _numbers(text: str) -> dict[str, int]:
    return {name: int(number) for name, _, number in (part.partition("=") for part in text.split(","))}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a dense model or a mixture, with its tokenizer")
    parser.add_argument("--data", required=True, type=Path, help="folder of the official files")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument(
        "--examples", type=_numbers, default={}, help="such as memo-trap=100,hindsight-neglect=6, evenly spread; or all"
    )
    parser.add_argument("--batch-size", type=int, default=4, help="sequences of a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--count", action="store_true", help="count the work instead of measuring")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    sys.exit(main())

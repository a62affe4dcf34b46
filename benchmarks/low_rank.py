"""Benchmark: what experts lose as low-rank changes of the seed, against whole experts, a soup, and PEFT's Arrow router.

    python benchmarks/low_rank.py SEED --experts LORA1 LORA2 LORA3 --gates train.yaml --data test.yaml --work DIR
    python benchmarks/low_rank.py SEED --experts FULL1 FULL2 FULL3 ... --ranks 8 32 128
    python benchmarks/low_rank.py SEED --experts LORA1 LORA2 --work DIR --many 10      # size and speed only

Mixtures are merged with gates fitted on some text, and scored on the held-out documents of other text before any
training, beside the dense models and the mixture's own forced gates. LoRA experts are also scored under Arrow (arXiv
2405.11157), which needs no text. Speed: ``model.py --groups low-rank``. Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import branchmix
import measure
from branchmix.checkpoint.companions import is_adapter
from branchmix.likelihood.loading import load_language_model, load_tokenizer
from branchmix.models.kept_branchmix import keep_experts
from model_cases import seconds_of
from positions import RESULTS, parts_by_domain, scored


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("seed", type=Path)
    parser.add_argument("--experts", type=Path, nargs="+", required=True, help="LoRA adapters or full fine-tunes")
    parser.add_argument("--gates", type=Path, help="text to fit gates on, in the format of calibrate")
    parser.add_argument("--data", type=Path, help="text to score, in the format of eval --data")
    parser.add_argument("--work", type=Path, required=True, help="where mixtures are kept")
    parser.add_argument("--ranks", type=int, nargs="*", default=[], help="that full fine-tunes are cut to")
    parser.add_argument("--attention", nargs="+", default=["kv_experts"], help="kinds of attention experts")
    parser.add_argument("--many", type=int, help="a mixture of so many of the experts, some of them again, bf16")
    parser.add_argument("--part", type=int, default=256, help="tokens of each document")
    parser.add_argument("--documents", type=int, default=8, help="documents of each domain")
    parser.add_argument("--out", type=Path, default=RESULTS / f"low-rank-{datetime.date.today()}")
    args = parser.parse_args()
    if args.many:
        many(args)
        return 0
    tokenizer = load_tokenizer(args.seed)
    documents = parts_by_domain(args, tokenizer)
    flat = [row for rows in documents.values() for row in rows]
    adapters = all(is_adapter(path) for path in args.experts)
    rows: dict[str, dict[str, Any]] = {}

    def score(name: str, model: Any, **facts: Any) -> None:
        losses = np.array([-logp_T.mean() for logp_T in scored(model, tokenizer, flat)]).reshape(len(documents), -1)
        found = dict(zip(documents, np.exp(losses.mean(1)).tolist(), strict=True))
        rows[name] = {**facts, "perplexity": found, "mean": float(np.exp(losses.mean()))}
        print(f"{name}: {rows[name]['mean']:.3f}", flush=True)

    score("seed", load_language_model(args.seed, dtype=torch.float32), bytes=size_of(args.seed))
    for path in args.experts:
        if not adapters:
            score(path.name, load_language_model(path, dtype=torch.float32), bytes=size_of(path))
    models = [{"name": path.name, "model": str(path.resolve())} for path in args.experts]
    common = {"seed": str(args.seed.resolve()), "experts": models, "dtype": "bfloat16"}
    soup = merged(args.work / "soup", {**common, "attention": "average", "ffn": "average"})
    score("soup", load_language_model(soup, dtype=torch.float32), bytes=size_of(soup))
    for attention in args.attention:
        gates = {"gates": {"data": str(args.gates.resolve())}, "attention": attention}
        for rank in ("full", *(args.ranks or [1])):
            label = "LoRA" if adapters and rank != "full" else f"rank {rank}" if rank != "full" else "whole experts"
            folder = args.work / f"{attention}-{label.replace(' ', '-')}"
            begin = time.perf_counter()
            merged(folder, {**common, **gates, "expert_rank": rank})
            seconds = time.perf_counter() - begin
            model = load_language_model(folder, dtype=torch.float32)
            score(f"{attention}, {label}", model, bytes=size_of(folder), seconds=seconds)
            forced = []
            for number in range(model.config.num_experts):
                name = f"{attention}, {label}, gates on {model.config.expert_names[number]}"
                score(name, keep_experts(model, [number]))
                forced.append(rows.pop(name)["perplexity"])
            best = {domain: min(of[domain] for of in forced) for domain in documents}
            mean = float(np.exp(np.mean(np.log(list(best.values())))))
            rows[f"{attention}, {label}, best forced gates"] = {"perplexity": best, "mean": mean}
    if adapters:
        import peft
        from transformers import AutoModelForCausalLM

        for top_k in (1, len(args.experts)):
            base = AutoModelForCausalLM.from_pretrained(args.seed, dtype=torch.float32)
            arrow = peft.create_arrow_model(
                base_model=base,
                task_specific_adapter_paths=[str(path) for path in args.experts],
                arrow_config=peft.ArrowConfig(top_k=top_k, router_temperature=1.0),
            )
            score(f"Arrow, top-{top_k}", arrow.eval())
    facts = {
        "arguments": {key: vars(args)[key] for key in ("part", "documents", "ranks", "attention")},
        **measure.machine_facts(args.data.parent),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps({"rows": rows, **facts}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(rows))
    print(markdown(rows))
    return 0


def many(args: argparse.Namespace) -> None:
    """Size on disk, and speed with one expert kept and with all, of the seed's; one thread, interleaved, CPU time."""
    torch.set_num_threads(1)
    chosen = [args.experts[number % len(args.experts)] for number in range(args.many)]
    models = [{"name": f"expert-{n}", "model": str(path.resolve())} for n, path in enumerate(chosen)]
    recipe = {"seed": str(args.seed.resolve()), "experts": models, "expert_rank": 1, "dtype": "bfloat16"}
    folder = merged(args.work / f"many-{args.many}", recipe)
    seed, whole = (load_language_model(path, dtype=torch.bfloat16) for path in (args.seed, folder))
    candidates = {"seed": seed, "one expert kept": keep_experts(whole, [1]), "all experts": whole}
    ids = torch.randint(3, 4096, (1, 257), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, dict[str, list[float]]] = {"decode": {}, "prefill": {}}
    for number in range(8):
        for name, model in list(candidates.items())[:: 1 if number % 2 else -1]:
            with torch.no_grad():
                cache = model(ids[:, :64], use_cache=True).past_key_values
                times = [seconds_of(lambda m=model, c=cache: one_token(m, ids, c)) for _ in range(3)]
                seconds["decode"].setdefault(name, []).append(min(times))
                prefill = seconds_of(lambda m=model: m(ids[:, :256], use_cache=True, logits_to_keep=1))
                seconds["prefill"].setdefault(name, []).append(prefill)
    speeds = {
        part: {name: median(found["seed"][1:]) / median(values[1:]) for name, values in found.items()}
        for part, found in seconds.items()
    }
    content = {"experts": args.many, "size of the seed's": size_of(folder) / size_of(args.seed), "speed": speeds}
    content |= measure.machine_facts(args.work)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))


def one_token(model: Any, ids: torch.Tensor, cache: Any) -> None:
    model(ids[:, 64:65], past_key_values=cache, use_cache=True)


def merged(folder: Path, recipe: dict[str, Any]) -> Path:
    """The mixture of a recipe, unless it is there."""
    if not (folder / "config.json").is_file():
        branchmix.upcycle(recipe, folder)
    return folder


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """A row for each model: size in the seed's, and perplexity by domain."""
    seed, domains = rows["seed"]["bytes"], list(rows["seed"]["perplexity"])
    head = ["", "size", *domains, "geo. mean"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for name, row in rows.items():
        size = f"{row['bytes'] / seed:.2f}" if "bytes" in row else ""
        values = [f"{row['perplexity'][domain]:.2f}" for domain in domains]
        lines.append("| " + " | ".join([name, size, *values, f"{row['mean']:.3f}"]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())

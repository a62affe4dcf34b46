"""Inverse scaling, made on the spot: a family of small models trained on text with a trap in it, and what scale does.

    python examples/inverse_scaling/demo.py        # `make demo-scaling`; or with another folder, and fewer --seeds

Five sizes of a dense model, three random seeds each, all on the same tokens of the text of text.py. Then the commands a
user would type: ``branchmix scaling run`` scores both tasks, ``branchmix scaling trends`` judges them and draws the
page. Each run that is done is not done again. About ten minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import text
import yaml

from branchmix.train.launch import Job, JobState, cores, run_processes

WIDTHS = (32, 48, 64, 96, 128)
SEEDS = (1, 2, 3)
TOKENS = 3_000_000
PEAK_AT_64 = 5e-3
"""Peak learning rate at width 64; it falls with the square root of the width, or the widest do not learn. At width 192,
which was tried, one of three seeds had not learnt the sayings by the end all the same: that is training, not scale."""


def run_settings(out: Path, width: int, seed: int) -> dict[str, object]:
    """A run of ``branchmix train``: two layers of Llama; width, learning rate and seed differ, nothing else."""
    return {
        "model": {
            "model_type": "llama",
            "train_tokenizer": 700,  # enough for a token a word
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
        },
        "out": f"{name_of(width, seed)}",
        "data": {"sayings": {"files": str(out.absolute() / "text.jsonl")}},
        "held_out": {"share": 0.01},
        "sequence_length": 128,
        "batch_size": 32,
        "budget": {"tokens": TOKENS},
        "learning_rate": {"peak": round(PEAK_AT_64 * (64 / width) ** 0.5, 5), "warmup": 0.05, "final": 0.1},
        "random_seed": seed,
        "threads": 1,
    }


def name_of(width: int, seed: int) -> str:
    """Folder of a model."""
    return f"width-{width}-seed-{seed}"


def train(out: Path, seeds: list[int]) -> None:
    """All models, as many side by side as there are cores, the largest first; stops the program if one fails."""
    jobs = []
    for width in reversed(WIDTHS):
        for seed in seeds:
            name = name_of(width, seed)
            if (out / "models" / name / "training.json").is_file():
                continue
            file = out / "models" / f"{name}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(yaml.safe_dump(run_settings(out, width, seed), sort_keys=False), encoding="utf-8")
            command = [sys.executable, "-m", "branchmix", "train", str(file)]
            jobs.append(Job(name, command, out / "models" / f"{name}.log", env={"OMP_NUM_THREADS": "1"}))
    if not jobs:
        return
    print(f"{len(jobs)} models to train, {cores()} side by side", flush=True)
    told: set[str] = set()

    def watch(states: list[JobState]) -> None:
        for state in states:
            if state.status in ("done", "failed") and state.job.name not in told:
                told.add(state.job.name)
                print(f"  {state.job.name}: {state.status} after {state.seconds:.0f} s", flush=True)

    outcome = run_processes(jobs, cores(), watch=watch)
    if outcome.stopped_by is not None:
        sys.exit(128 + outcome.stopped_by)
    for state in outcome.jobs:
        if state.status != "done":
            sys.exit(f"error: {state.job.name}: {state.reason} (see {state.job.log})")


def branchmix(*words: str) -> None:
    """Prints and runs a command; stops the program if it fails."""
    print(f"\n$ {shlex.join(['branchmix', *words])}", flush=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "branchmix", *words], check=False, env=environment)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path("scaling-output"), help="folder for everything")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="random seeds of each size")
    arguments = parser.parse_args()
    out, seeds = arguments.out, list(range(1, arguments.seeds + 1))
    began = time.monotonic()
    text.write(out)
    train(out, seeds)
    models = [{"model": f"models/{name_of(width, seed)}", "seed": seed} for width in WIDTHS for seed in seeds]
    family = {"family": "sayings", "models": models}
    (out / "family.yaml").write_text(yaml.safe_dump(family, sort_keys=False), encoding="utf-8")
    tasks = ",".join(str(out / "tasks" / f"{name}.yaml") for name in text.DESCRIPTIONS)
    branchmix("scaling", "run", str(out / "family.yaml"), "--tasks", tasks, "--out", str(out / "results"))
    branchmix("scaling", "trends", str(out / "results"), "--html", str(out / "index.html"), "--force")
    print(f"\nthe page: {out / 'index.html'} ({(time.monotonic() - began) / 60:.0f} minutes)")


if __name__ == "__main__":
    main()

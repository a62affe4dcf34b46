"""Benchmark: a mixture's training step against the dense model of equal FLOPs, transformers' Mixtral, and MixtureKit.

    python benchmarks/training.py run                     # everything; stops and resumes at any time, see --time-limit
    python benchmarks/training.py run --shapes demo       # a group or two of it

One thread; forward and backward; process CPU time; all candidates of a group in one process, in rounds that alternate
in order; the median of the rounds. Results go to benchmarks/results/. What the figures mean: README.md here.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import measure
import peers
import steps
from branchmix.train.models import keep_freed_memory

CACHE = Path(".cache/bench")
RESULTS = Path(__file__).resolve().parent / "results"

EXAMPLES = """examples:
  python benchmarks/training.py run                                             all groups, 7 rounds
  python benchmarks/training.py run --shapes demo --precisions autocast         one shape as the demo trains it
  python benchmarks/training.py run --parts ffn --only dense btx mixtral        some candidates
  python benchmarks/training.py run --time-limit 540                            stops in time; the same line goes on
  python benchmarks/training.py report                                          the tables again
"""


def main() -> int:
    args = _parser().parse_args()
    args.data, args.envs = args.data.resolve(), args.envs.resolve()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    state = State(args)
    if args.command == "run":
        if not args.fresh_pages:
            keep_freed_memory()
        run(args, state)
    report(args, state)
    return 0


class State:
    """What has been measured so far, kept in a file after every step, so that a run can stop and go on."""

    def __init__(self, args: argparse.Namespace, name: str = "training"):
        self.path: Path = args.data / f"state-{name}.json"
        self.groups: dict[str, Any] = {}
        if self.path.exists() and not getattr(args, "restart", False):
            self.groups = json.loads(self.path.read_text())

    def group(self, key: str, facts: dict[str, Any]) -> dict[str, Any]:
        """The measurements of one group, begun anew if they were made by another version."""
        found = self.groups.get(key)
        if found is None or {name: found[name] for name in facts} != facts:
            found = self.groups[key] = {**facts, "seconds": {}, "flops": {}, "failed": {}}
        return found

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.groups, indent=1))
        partial.replace(self.path)


def run(args: argparse.Namespace, state: State) -> None:
    tools = peers.Tools(envs=args.envs, branchmix=())
    versions = peers.versions(tools, "branchmix") | peers.versions(tools, "mixturekit")
    deadline = time.monotonic() + (args.time_limit or float("inf"))
    for shape in args.shapes:
        for part in args.parts:
            for precision in args.precisions:
                attention = args.attention or ("sdpa" if precision == "fp32" else "eager")
                facts = {"shape": shape, "part": part, "precision": precision, "attention": attention}
                facts["memory"] = "fresh pages" if args.fresh_pages else "kept"
                group = state.group("/".join(facts.values()), {**facts, "versions": versions})
                if not _run_group(args, state, group, deadline):
                    print("time limit reached; run the same command again to go on", file=sys.stderr)
                    return


def _run_group(args: argparse.Namespace, state: State, group: dict[str, Any], deadline: float) -> bool:
    """Measure until each candidate has its rounds; False if the time was over before."""
    shape = steps.SHAPES[group["shape"]]
    models = steps.Models(group["shape"], group["precision"], group["attention"], args.data, args.envs)
    input_ids = torch.randint(3, 4096, (shape.batch, shape.length), generator=torch.Generator().manual_seed(0))
    candidates = [
        candidate
        for candidate in steps.PARTS[group["part"]]
        if group["shape"] in candidate.shapes and (not args.only or candidate.name in args.only)
    ]
    seconds = group["seconds"]
    if all(len(seconds.get(candidate.name, ())) >= args.rounds for candidate in candidates):
        return True

    def once(candidate: steps.Candidate) -> float:
        model = models.get(candidate.model)
        if candidate.kernel:
            model.set_experts_implementation(candidate.kernel)
        return steps.step(model, input_ids, group["precision"])

    # The first step of each warms it up, and says which matrix products it makes.
    floors = {}
    for candidate in list(candidates):
        try:
            if candidate.floor:
                floors[candidate.name] = steps.Floor()
                with floors[candidate.name]:
                    once(candidate)
            once(candidate)
            group["flops"][candidate.name] = models.flops_per_token(candidate.model)
        except Exception as error:  # a peer that cannot train is a result too
            if not candidate.model.startswith("mixturekit"):
                raise
            group["failed"][candidate.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            candidates.remove(candidate)
    gc.collect()

    for number in range(args.rounds):
        for candidate in candidates if number % 2 == 0 else candidates[::-1]:
            if len(seconds.setdefault(candidate.name, [])) > number:
                continue
            if time.monotonic() > deadline:
                return False
            seconds[candidate.name].append(once(candidate))
            if candidate.name in floors:
                seconds.setdefault(f"floor of {candidate.name}", []).append(floors[candidate.name].seconds())
            state.save()
        print(f"{group['shape']} {group['part']} {group['precision']}: round {number + 1}", file=sys.stderr)
    return True


# ---- the tables ----


def report(args: argparse.Namespace, state: State) -> None:
    groups = [group for group in state.groups.values() if group["seconds"]]
    if not groups:
        return
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    facts = measure.machine_facts(args.data)
    lines = [
        f"# Training steps, {date}",
        "",
        "Forward and backward (no optimizer), one thread, process CPU time, medians of interleaved rounds."
        " Ratios are of tokens/s; a gap under 0.10 is a tie.",
    ]
    for group in groups:
        lines += ["", *_table(group)]
    versions = sorted(groups[-1]["versions"].items())
    lines += [
        "",
        f"{facts['cpu']}, {facts['cores']} cores, {facts['ram_gb']} GB RAM, Linux {facts['kernel']},"
        f" Python {facts['python']}; " + ", ".join(f"{name} {version}" for name, version in versions) + ".",
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": "training", "date": date, "machine": facts, "groups": groups}
    (args.out / f"training-{date}.json").write_text(json.dumps(content, indent=1) + "\n")
    (args.out / f"training-{date}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _table(group: dict[str, Any]) -> list[str]:
    shape, part = steps.SHAPES[group["shape"]], group["part"]
    candidates = {candidate.name: candidate for candidate in steps.PARTS[part]}
    cost = {name: median(values) for name, values in group["seconds"].items() if values}
    rounds = min(len(values) for values in group["seconds"].values())
    lines = [
        f"## {group['shape']}, {part} experts, {steps.PRECISIONS[group['precision']]}",
        "",
        f"{shape.what}; {shape.num_experts} experts, top-{shape.top_k}; {shape.batch} x {shape.length} tokens;"
        f" {group['attention']} attention;"
        f" {'freed memory kept' if group['memory'] == 'kept' else 'fresh pages in every step'}; {rounds} rounds.",
        "",
        "| candidate | what | MFLOPs a token | CPU s a step | tokens/s | of dense | of Mixtral, loop"
        " | of Mixtral, grouped_mm | of its floor |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]

    def ratio(other: str, name: str) -> str:
        return f"{cost[other] / cost[name]:.2f}" if other in cost and other != name else ""

    for name, candidate in candidates.items():
        if name in group["failed"]:
            lines.append(f"| {name} | {candidate.makes} | {group['failed'][name]} | | | | | | |")
        if name not in cost:
            continue
        flops = group["flops"].get(name)
        columns = [
            name,
            candidate.makes,
            f"{flops / 1e6:.1f}" if flops else "",
            f"{cost[name]:.3f}",
            f"{shape.batch * shape.length / cost[name]:.0f}",
            ratio(candidate.dense, name),
            ratio("mixtral-loop", name),
            ratio("mixtral", name),
            ratio(f"floor of {name.removesuffix('-loop')}", name),
        ]
        lines.append("| " + " | ".join(columns) + " |")
    return lines


# ---- the command line ----


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog=EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
    )
    places = argparse.ArgumentParser(add_help=False)
    places.add_argument("--data", type=Path, default=CACHE / "data", help="models, state (%(default)s)")
    places.add_argument("--envs", type=Path, default=CACHE / "envs", help="the peers' virtualenvs (%(default)s)")
    places.add_argument("--out", type=Path, default=RESULTS, help="where the results go (benchmarks/results)")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", parents=[places], help="measure, and write the tables")
    names = sorted({candidate.name for part in steps.PARTS.values() for candidate in part})
    running.add_argument("--shapes", nargs="+", choices=steps.SHAPES, default=list(steps.SHAPES))
    running.add_argument("--parts", nargs="+", choices=steps.PARTS, default=list(steps.PARTS))
    running.add_argument("--precisions", nargs="+", choices=steps.PRECISIONS, default=list(steps.PRECISIONS))
    running.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="of: " + ", ".join(names))
    running.add_argument("--attention", help="transformers' name; by default sdpa in fp32 and eager in bf16")
    running.add_argument("--fresh-pages", action="store_true", help="leave malloc as it is; see the README")
    running.add_argument("--rounds", type=int, default=7, help="until each candidate has so many (%(default)s)")
    running.add_argument("--time-limit", type=float, help="stop between two steps after so many seconds")
    running.add_argument("--restart", action="store_true", help="forget what has been measured")
    commands.add_parser("report", parents=[places], help="write the tables again")
    return parser


if __name__ == "__main__":
    sys.exit(main())

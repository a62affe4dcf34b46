"""Benchmark: where a mixture's time goes, against a loop over experts, Mixtral, MixtureKit, and the floor.

    python benchmarks/model.py run                         # everything; stops and resumes at any time, see --time-limit
    python benchmarks/model.py run --groups attention      # attention alone

One thread; process CPU time; all candidates of a group in one process, in rounds that alternate in order; the ratio of
the rounds' medians. Results and plots go to benchmarks/results/. What the figures mean: README.md here.
"""

from __future__ import annotations

import argparse
import datetime
import gc
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
import model_cases as cases
import peers
import training
from branchmix.models.chunked_branchmix import has_amx
from branchmix.train.models import keep_freed_memory

EXAMPLES = """examples:
  python benchmarks/model.py run                                    all groups, 7 rounds
  python benchmarks/model.py run --groups attention decode          some of them
  python benchmarks/model.py run --groups decode --only batch       cases with "batch" in their names
  python benchmarks/model.py run --time-limit 540                   stops in time; the same line goes on
  python benchmarks/model.py report                                 tables and plots again
"""


def main() -> int:
    args = _parser().parse_args()
    args.data, args.envs = args.data.resolve(), args.envs.resolve()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    state = training.State(args, "model")
    if args.command == "run":
        keep_freed_memory()
        run(args, state)
    report(args, state)
    return 0


def run(args: argparse.Namespace, state: training.State) -> None:
    tools = peers.Tools(envs=args.envs, branchmix=())
    versions = peers.versions(tools, "branchmix") | peers.versions(tools, "mixturekit")
    deadline = time.monotonic() + (args.time_limit or float("inf"))
    for name in args.groups:
        for case in cases.GROUPS[name](args.data, args.envs):
            if args.only and not any(part in case.name for part in args.only):
                continue
            # State keeps seconds by candidate; a case's own facts tell whether they are of this version.
            facts = {"group": name, "case": case.name, "what": case.what, "tokens": case.tokens, "x": case.x}
            found = state.group(f"{name}/{case.name}", {**facts, "versions": versions})
            if not _run_case(args, state, found, case, deadline):
                print("time limit reached; run the same command again to go on", file=sys.stderr)
                return
            gc.collect()


def _run_case(
    args: argparse.Namespace, state: training.State, found: dict[str, Any], case: cases.Case, deadline: float
) -> bool:
    """Measure until each candidate has its rounds; False if the time was over before."""
    seconds, failed = found["seconds"], found["failed"]
    done = seconds and all(len(values) >= args.rounds for values in seconds.values())
    if done:
        return True
    candidates = case.make()
    for name, once in list(candidates.items()):
        try:
            once()  # warms it up
        except Exception as error:  # that a peer cannot do it is a result too
            if not name.startswith("mixturekit"):
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            del candidates[name]
    for number in range(args.rounds):
        for name in list(candidates) if number % 2 == 0 else list(candidates)[::-1]:
            if time.monotonic() > deadline:
                return False
            for part, value in candidates[name]().items():
                kept = seconds.setdefault(f"{name}: {part}" if part else name, [])
                if len(kept) <= number:
                    kept.append(value)
        state.save()
    print(f"{found['group']} {case.name}: {args.rounds} rounds", file=sys.stderr)
    return True


# ---- tables and plots ----


def report(args: argparse.Namespace, state: training.State) -> None:
    groups = [found for found in state.groups.values() if found["seconds"]]
    if not groups:
        return
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    facts = {**measure.machine_facts(args.data), "amx": has_amx()}
    lines = [
        f"# The model's speed, {date}",
        "",
        "One thread, process CPU time, medians of interleaved rounds on a machine busy with other work: only the"
        ' ratios within a table mean something, and gaps under 0.10 are ties. "of" columns are speed over that of the'
        " candidate named: above 1 is faster.",
    ]
    for name in dict.fromkeys(found["group"] for found in groups):
        lines += ["", f"## {cases.TITLES[name]}", ""]
        if name == "growth":
            lines += [f"![growth](model-growth-{date}.png)", ""]
        for found in groups:
            if found["group"] == name:
                lines += [*_table(found), ""]
    # A run may be stopped and go on with newer sources: each case in the JSON has its own.
    versions = sorted({item for found in groups for item in found["versions"].items()})
    lines += [
        f"{facts['cpu']}, {facts['cores']} cores, {'with' if facts['amx'] else 'without'} AMX,"
        f" {facts['ram_gb']} GB RAM, Linux {facts['kernel']}, Python {facts['python']}; "
        + ", ".join(f"{name} {version}" for name, version in versions)
        + ".",
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": "model", "date": date, "machine": facts, "groups": groups}
    (args.out / f"model-{date}.json").write_text(training.json.dumps(content, indent=1) + "\n")
    (args.out / f"model-{date}.md").write_text("\n".join(lines) + "\n")
    cases.plot_growth([found for found in groups if found["group"] == "growth"], args.out / f"model-growth-{date}.png")
    print("\n".join(lines))


def _table(found: dict[str, Any]) -> list[str]:
    cost = {name: median(values) for name, values in found["seconds"].items()}
    rounds = min(len(values) for values in found["seconds"].values())
    others = [name for name in cases.BASELINES if any(key.partition(": ")[0] == name for key in cost)]
    lines = [
        f"**{found['case']}**: {found['what']}; {rounds} rounds.",
        "",
        "| candidate | CPU ms | tokens/s |" + "".join(f" of {name} |" for name in others),
        "|---|--:|--:|" + "--:|" * len(others),
    ]
    for name, value in cost.items():
        part = "".join(name.partition(": ")[1:])  # is compared with the same part of the others
        theirs = [f"{other}{part}" for other in others]
        ratios = "".join(
            f" {cost[other] / value:.2f} |" if other in cost and other != name else " |" for other in theirs
        )
        lines.append(f"| {name} | {value * 1e3:.1f} | {found['tokens'] / value:.0f} |{ratios}")
    lines += [f"| {name} | {why} | |" + " |" * len(others) for name, why in found["failed"].items()]
    return lines


# ---- the command line ----


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog=EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
    )
    places = argparse.ArgumentParser(add_help=False)
    places.add_argument("--data", type=Path, default=training.CACHE / "data", help="models, state (%(default)s)")
    places.add_argument("--envs", type=Path, default=training.CACHE / "envs", help="peers' virtualenvs (%(default)s)")
    places.add_argument("--out", type=Path, default=training.RESULTS, help="where results go (benchmarks/results)")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", parents=[places], help="measure, and write tables and plots")
    running.add_argument("--groups", nargs="+", choices=cases.GROUPS, default=list(cases.GROUPS))
    running.add_argument("--only", nargs="+", metavar="PART", help="cases with one of these in their names")
    running.add_argument("--rounds", type=int, default=7, help="until each candidate has so many (%(default)s)")
    running.add_argument("--time-limit", type=float, help="stop between two candidates after so many seconds")
    running.add_argument("--restart", action="store_true", help="forget what has been measured")
    commands.add_parser("report", parents=[places], help="write tables and plots again")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Benchmark: `branchmix upcycle` against `cp` of the same bytes, mergekit-moe and MixtureKit.

    python benchmarks/upcycle.py all                  # set up, make the small inputs, run, print the table
    python benchmarks/upcycle.py run --size large     # after `setup` and `inputs --size large`

Each candidate is a fresh process, timed with a `sync` at its end, beside a `cp` of as many bytes as it wrote, in the
same round; rounds alternate in order. Results go to benchmarks/results/. What the figures mean: README.md here.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import checkpoints
import measure
import peers

CACHE = Path(".cache/bench")
RESULTS = Path(__file__).resolve().parent / "results"

EXAMPLES = """examples:
  python benchmarks/upcycle.py all                                 everything on the small models, about 15 minutes
  python benchmarks/upcycle.py setup --pip-args="--no-cache-dir"   the peers' virtualenvs, 3 GB
  python benchmarks/upcycle.py inputs --size large                 9.4 GB; a run needs 20 GB more
  python benchmarks/upcycle.py run --size large --time-limit 540   stops in time; the same line again goes on
  python benchmarks/upcycle.py run --size large --wait-idle 300    on a machine that others use too
  python benchmarks/upcycle.py run --only branchmix-btx mixturekit-traditional --rounds 7
  python benchmarks/upcycle.py memory --sizes small medium large --experts 2 4 8
  python benchmarks/upcycle.py report --size large                 the table again, from what has been measured
"""


def main() -> int:
    args = _parser().parse_args()
    args.data, args.envs = args.data.resolve(), args.envs.resolve()
    if args.command in ("setup", "all"):
        peers.setup(args.envs, shlex.split(args.pip_args))
    if args.command in ("inputs", "all"):
        checkpoints.make(args.data, args.size, gguf=args.gguf)
    if args.command in ("run", "all"):
        return run(args)
    if args.command == "report":
        report(args, State(args), {})
    if args.command == "memory":
        return memory(args)
    return 0


# ---- the rounds ----


class State:
    """What has been measured so far, kept in a file after every pair, so that a run can stop and go on."""

    def __init__(self, args: argparse.Namespace):
        self.path: Path = args.data / f"state-{args.size}-{args.cache}.json"
        self.pairs: list[dict[str, Any]] = []
        if self.path.exists() and not getattr(args, "restart", False):
            self.pairs = json.loads(self.path.read_text())

    def add(self, pair: dict[str, Any]) -> None:
        self.pairs.append(pair)
        self.save()

    def save(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.pairs, indent=1))
        partial.replace(self.path)

    def forget(self, versions: dict[str, dict[str, str]]) -> None:
        """Drop failures, to be tried again, and what another version of a tool has done."""
        self.pairs = [
            pair
            for pair in self.pairs
            if "failed" not in pair and versions.get(pair["tool"], pair["versions"]) == pair["versions"]
        ]

    def of(self, name: str) -> list[dict[str, Any]]:
        return [pair for pair in self.pairs if pair["candidate"] == name]


def run(args: argparse.Namespace) -> int:
    tools = peers.Tools(envs=args.envs, branchmix=tuple(shlex.split(args.branchmix)))
    models = _models(args.data, args.size)
    candidates = [candidate for candidate in peers.CANDIDATES if not args.only or candidate.name in args.only]
    absent = {tool: why for tool in {c.tool for c in candidates} if (why := peers.missing(tools, tool))}
    for tool, why in absent.items():
        print(f"{tool}: {why}; it is left out", file=sys.stderr)
    present = [candidate for candidate in candidates if candidate.tool not in absent]
    versions = {tool: peers.versions(tools, tool) for tool in {c.tool for c in present}}
    state = State(args)
    state.forget(versions)

    begin = time.monotonic()
    for number in range(args.rounds):
        for candidate in present if number % 2 == 0 else present[::-1]:
            before = state.of(candidate.name)
            if any("failed" in pair or pair["round"] == number for pair in before):
                continue
            if args.time_limit and time.monotonic() - begin > args.time_limit:
                print("time limit reached; run the same command again to go on", file=sys.stderr)
                report(args, state, absent)
                return 0
            # `cp` needs to know how much to copy: the first time it follows, later it leads in every other round.
            known = before[-1]["output_bytes"] if before else 0
            pair = _measure_pair(args, candidate, tools, models, cp_first=known if number % 2 else 0, first=not before)
            state.add({"round": number, "versions": versions[candidate.tool], **pair})
            _print_pair(number, pair)
    report(args, state, absent)
    return 1 if any("failed" in pair for pair in state.pairs) else 0


def _measure_pair(
    args: argparse.Namespace,
    candidate: peers.Candidate,
    tools: peers.Tools,
    models: Sequence[Path],
    *,
    cp_first: int,
    first: bool,
) -> dict[str, Any]:
    """One candidate and, right before or after it, `cp` of as many bytes as it writes."""
    pair: dict[str, Any] = {"candidate": candidate.name, "tool": candidate.tool}
    if cp_first:
        pair["cp"] = _measure_cp(args, candidate.name, models, cp_first)
    output = _empty_output(args.data)
    command = candidate.write_config(tools, args.data / "config.yaml", models, output)
    _get_ready(args, _weights(models))
    log = args.data / "log.txt"
    result = measure.run(command, env=peers.environment(candidate.tool), log=log, timeout=args.timeout)
    try:
        if result.exit_code:
            raise ValueError(f"exit code {result.exit_code}: {_last_line(log)}")
        num_tensors = peers.check(candidate, tools, models, output, thorough=first)
    except (ValueError, OSError) as error:
        print(f"{candidate.name}: {error}", file=sys.stderr)
        pair["failed"] = f"exit code {result.exit_code}" if result.exit_code else "its output is not as it should be"
        return pair
    pair |= {"output_bytes": measure.size_of(output), "num_tensors": num_tensors, **_record(result)}
    shutil.rmtree(output)
    if not cp_first:
        pair["cp"] = _measure_cp(args, candidate.name, models, pair["output_bytes"])
    return pair


def _measure_cp(args: argparse.Namespace, name: str, models: Sequence[Path], num_bytes: int) -> dict[str, Any]:
    folder = measure.copy_set(args.data / "copy-sets" / args.size / name, models, num_bytes)
    output = _empty_output(args.data)
    _get_ready(args, sorted(folder.iterdir()))
    command = ["cp", "-r", str(folder), str(output)]
    result = measure.run(command, env=peers.environment("cp"), log=args.data / "log.txt", timeout=args.timeout)
    if result.exit_code:
        raise RuntimeError(f"cp: exit code {result.exit_code}: {_last_line(args.data / 'log.txt')}")
    shutil.rmtree(output)
    return {"output_bytes": num_bytes, **_record(result)}


def _models(data: Path, size: str) -> list[Path]:
    models = [data / "models" / size / name for name in checkpoints.EXPERTS]
    if not all((model / "config.json").exists() for model in models):
        sys.exit(f"there are no {size} models: make them with `inputs --size {size}`")
    return models


def _weights(models: Sequence[Path]) -> list[Path]:
    return [path for model in models for path in sorted(model.glob("*.safetensors"))]


def _empty_output(data: Path) -> Path:
    output = data / "output"
    shutil.rmtree(output, ignore_errors=True)
    return output


def _get_ready(args: argparse.Namespace, sources: Sequence[Path]) -> None:
    if args.wait_idle and not measure.wait_for_idle(args.wait_idle):
        print("other programs keep the machine busy; measuring all the same", file=sys.stderr)
    if args.cache == "warm":
        measure.warm(sources)
    else:
        measure.cool(sources)


def _record(result: measure.Measurement) -> dict[str, Any]:
    figures = {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(result).items()}
    return {"wall_seconds": round(result.wall_seconds, 3), **figures}


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"


def _print_pair(number: int, pair: dict[str, Any]) -> None:
    if "failed" in pair:
        return
    print(
        f"round {number}: {pair['candidate']:28} {pair['wall_seconds']:7.2f} s,"
        f" {pair['wall_seconds'] / pair['cp']['wall_seconds']:5.2f} of cp ({pair['cp']['wall_seconds']:.2f} s),"
        f" {pair['peak_anon'] / 1e6:6.0f} MB anonymous,"
        f" others {pair['others']:.0%} and {pair['cp']['others']:.0%}",
        file=sys.stderr,
        flush=True,
    )


# ---- the report ----


def summarize(state: State, absent: dict[str, str]) -> list[dict[str, Any]]:
    """One row per candidate: medians over its rounds, and the median of its per-round ratios to `cp`."""
    rows = []
    for candidate in peers.CANDIDATES:
        row: dict[str, Any] = {"candidate": candidate.name, "makes": candidate.makes}
        pairs = state.of(candidate.name)
        good = [pair for pair in pairs if "failed" not in pair]
        if len(good) < len(pairs):
            row["note"] = "failed: " + next(pair["failed"] for pair in pairs if "failed" in pair)
        elif candidate.tool in absent:
            row["note"] = absent[candidate.tool]
        elif not good:
            row["note"] = "not measured"
        if good:
            ratios = [pair["wall_seconds"] / pair["cp"]["wall_seconds"] for pair in good]
            row |= {
                "rounds": len(good),
                "output_bytes": good[-1]["output_bytes"],
                "num_tensors": good[-1]["num_tensors"],
                "wall_seconds": median(pair["wall_seconds"] for pair in good),
                "cp_wall_seconds": median(pair["cp"]["wall_seconds"] for pair in good),
                "of_cp": round(median(ratios), 3),
                "of_cp_range": [round(min(ratios), 3), round(max(ratios), 3)],
                "cpu_seconds": median(pair["cpu_seconds"] for pair in good),
                "peak_rss": median(pair["peak_rss"] for pair in good),
                "peak_anon": median(pair["peak_anon"] for pair in good),
                "others": median(share for pair in good for share in (pair["others"], pair["cp"]["others"])),
            }
        rows.append(row)
    return rows


def report(args: argparse.Namespace, state: State, absent: dict[str, str]) -> None:
    """Write the dated JSON and Markdown, and print the table."""
    models = _models(args.data, args.size)
    rows = summarize(state, absent)
    content = {
        "benchmark": "upcycle",
        "date": _today(),
        "size": args.size,
        "page_cache": args.cache,
        "inputs": {"models": len(models), "bytes_each": [measure.size_of(model) for model in models]},
        "machine": measure.machine_facts(args.data),
        "versions": {pair["tool"]: pair["versions"] for pair in state.pairs},
        "others": max((row["others"] for row in rows if "others" in row), default=0.0),
        "summary": rows,
        "rounds": [{key: value for key, value in pair.items() if key != "versions"} for pair in state.pairs],
    }
    each = sum(content["inputs"]["bytes_each"]) / len(models) / 1e9
    lines = [
        f"# Upcycling {len(models)} checkpoints of {each:.2f} GB ({args.size}), {content['date']}",
        "",
        'Wall time with `sync`; medians. "of `cp`" is the median of the rounds\' ratios to a `cp` of as many bytes with'
        " `sync`, right before or after in the same round (smallest and largest in brackets)."
        f" Sources {args.cache} in the page cache.",
        "",
        "| candidate | makes | rounds | output | wall | `cp` | of `cp` | CPU | peak RSS | anonymous |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if "of_cp" in row:
            low, high = row["of_cp_range"]
            figures = (
                f"{row['rounds']} | {row['output_bytes'] / 1e9:.2f} GB | {row['wall_seconds']:.2f} s"
                f" | {row['cp_wall_seconds']:.2f} s | **{row['of_cp']:.2f}** ({low:.2f}-{high:.2f})"
                f" | {row['cpu_seconds']:.2f} s | {row['peak_rss'] / 1e6:.0f} MB | {row['peak_anon'] / 1e6:.0f} MB"
            )
        else:
            figures = f"{row['note']} | | | | | | |"
        lines.append(f"| {row['candidate']} | {row['makes']} | {figures} |")
    if any("others" in row for row in rows):
        lines += ["", f"Other programs took up to {content['others']:.0%} of the processors (a candidate's median)."]
    lines += ["", *_footer(content)]
    stem = f"upcycle-{args.size}{'' if args.cache == 'warm' else '-' + args.cache}"
    _write_results(args.out, stem, content, lines)


def _footer(content: dict[str, Any]) -> list[str]:
    facts = content["machine"]
    lines = [
        f"{facts['cpu']}, {facts['cores']} cores, {facts['ram_gb']} GB RAM, {facts['file_system']},"
        f" Linux {facts['kernel']}, Python {facts['python']}, {facts['cp']}."
    ]
    for tool, found in sorted(content["versions"].items()):
        lines += ["", f"{tool}: " + ", ".join(f"{name} {version}" for name, version in sorted(found.items())) + "."]
    return lines


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def _write_results(folder: Path, stem: str, content: dict[str, Any], lines: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{stem}-{content['date']}"
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"written: {name}.json and .md", file=sys.stderr)


# ---- memory against size ----


def memory(args: argparse.Namespace) -> int:
    """Peak memory of one run each, over model sizes and numbers of experts; times are there, but taken once only."""
    tools = peers.Tools(envs=args.envs, branchmix=tuple(shlex.split(args.branchmix)))
    candidates = [candidate for candidate in peers.CANDIDATES if candidate.name in args.only]
    rows = []
    versions = {}
    for candidate in candidates:
        if why := peers.missing(tools, candidate.tool):
            print(f"{candidate.tool}: {why}; it is left out", file=sys.stderr)
            continue
        versions[candidate.tool] = peers.versions(tools, candidate.tool)
        for size in args.sizes:
            checkpoints.make(args.data, size)
            for count in args.experts:
                models = checkpoints.with_copies(_models(args.data, size), count)
                output = _empty_output(args.data)
                command = candidate.write_config(tools, args.data / "config.yaml", models, output)
                log = args.data / "log.txt"
                result = measure.run(command, env=peers.environment(candidate.tool), log=log, timeout=args.timeout)
                row = {"candidate": candidate.name, "size": size, "experts": count, **_record(result)}
                if result.exit_code:
                    print(f"{candidate.name}, {size}, {count} experts: {_last_line(log)}", file=sys.stderr)
                else:
                    row |= {"seed_bytes": measure.size_of(models[0]), "output_bytes": measure.size_of(output)}
                    print(f"{candidate.name}, {size}, {count}: {row['peak_anon'] / 1e6:.0f} MB", file=sys.stderr)
                rows.append(row)
                shutil.rmtree(output, ignore_errors=True)
    if not rows:
        return 1
    content = {
        "benchmark": "upcycle-memory",
        "date": _today(),
        "machine": measure.machine_facts(args.data),
        "versions": versions,
        "rows": rows,
    }
    lines = [
        f"# Peak memory of upcycling against size, {content['date']}",
        "",
        "One run each; anonymous memory is what cannot be evicted (RssAnon, sampled every 20 ms). Experts beyond the"
        " fourth are hard links to the others: only sizes matter here.",
        "",
        "| candidate | seed | experts | output | wall, once | peak RSS | anonymous |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row["exit_code"]:
            lines.append(f"| {row['candidate']} | {row['size']} | {row['experts']} | failed | | | |")
            continue
        lines.append(
            f"| {row['candidate']} | {row['seed_bytes'] / 1e9:.2f} GB | {row['experts']} |"
            f" {row['output_bytes'] / 1e9:.2f} GB | {row['wall_seconds']:.1f} s | {row['peak_rss'] / 1e6:.0f} MB |"
            f" {row['peak_anon'] / 1e6:.0f} MB |"
        )
    _write_results(args.out, "upcycle-memory", content, [*lines, "", *_footer(content)])
    return 1 if any(row["exit_code"] for row in rows) else 0


# ---- the command line ----


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog=EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
    )
    places = argparse.ArgumentParser(add_help=False)
    places.add_argument("--data", type=Path, default=CACHE / "data", help="models, outputs, state (%(default)s)")
    places.add_argument("--envs", type=Path, default=CACHE / "envs", help="the peers' virtualenvs (%(default)s)")
    pip = argparse.ArgumentParser(add_help=False)
    pip.add_argument("--pip-args", default="", help="further options of `pip install`, as one string")
    one_size = argparse.ArgumentParser(add_help=False)
    one_size.add_argument("--size", choices=checkpoints.SIZES, default="small", help="of the models (%(default)s)")
    inputs = argparse.ArgumentParser(add_help=False)
    inputs.add_argument("--gguf", type=Path, help="SmolLM2's GGUF file, if it is not to be downloaded")
    written = argparse.ArgumentParser(add_help=False)
    written.add_argument("--out", type=Path, default=RESULTS, help="where the results go (benchmarks/results)")
    cached = argparse.ArgumentParser(add_help=False)
    cached.add_argument("--cache", choices=("warm", "cold"), default="warm", help="page cache before each run (warm)")
    process = argparse.ArgumentParser(add_help=False)
    process.add_argument(
        "--branchmix",
        default=shlex.join([sys.executable, "-m", "branchmix"]),
        help="the command line that starts branchmix (this Python's)",
    )
    process.add_argument("--timeout", type=float, default=1800, help="seconds for one process (%(default)s)")
    rounds = argparse.ArgumentParser(add_help=False)
    names = [candidate.name for candidate in peers.CANDIDATES]
    rounds.add_argument("--rounds", type=int, default=5, help="until each candidate has so many (%(default)s)")
    rounds.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="of: " + ", ".join(names))
    rounds.add_argument("--time-limit", type=float, help="stop between two runs after so many seconds")
    rounds.add_argument(
        "--wait-idle",
        type=float,
        default=0,
        metavar="S",
        help="before each run, wait up to S seconds for idle processors",
    )
    rounds.add_argument("--restart", action="store_true", help="forget what has been measured")

    commands = parser.add_subparsers(dest="command", required=True)
    everything = [places, pip, one_size, inputs, written, cached, process, rounds]
    commands.add_parser("all", parents=everything, help="setup, inputs and run")
    commands.add_parser("setup", parents=[places, pip], help="make the peers' virtualenvs")
    commands.add_parser("inputs", parents=[places, one_size, inputs], help="make the models")
    commands.add_parser("run", parents=[places, one_size, written, cached, process, rounds], help="measure")
    commands.add_parser("report", parents=[places, one_size, written, cached], help="write the results again")
    growth = commands.add_parser("memory", parents=[places, written, process], help="peak memory against size")
    growth.add_argument("--sizes", nargs="+", choices=checkpoints.SIZES, default=list(checkpoints.SIZES))
    growth.add_argument("--experts", nargs="+", type=int, default=[2, 4, 8], help="numbers of experts (2 4 8)")
    growth.add_argument("--only", nargs="+", choices=names, default=["branchmix-expert-kv"], metavar="NAME")
    return parser


if __name__ == "__main__":
    sys.exit(main())

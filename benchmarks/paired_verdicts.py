"""Benchmark: verdicts of `branchmix scaling trends` along axes within a model, paired by question, on known curves.

    python benchmarks/paired_verdicts.py                  # 25 minutes on one core
    python benchmarks/paired_verdicts.py --minutes 5      # a slice: run it again to resume; finished cells are kept

A model answers the same questions in 5 or 8 settings. A question is answered right if a normal deviate lies below what
the setting's true accuracy asks for. Of the deviate's variance, `shared` is the question's own, the same in all
settings: what is hard stays hard. Half of the rest belongs to question and setting, and is the same in all seeds; the
other half is new in every run. Settings may differ from the curve by a jitter of their own. Curves are those of
`verdicts.py`, and a gentle fall of 8 points. `unpaired` is what the same families get if the pairing is not used.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
import zlib
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from scipy import stats

from branchmix.scaling.trends.fit import NUM_DRAWS, curve
from branchmix.scaling.trends.series import resampled_deviations
from branchmix.scaling.trends.verdict import DIRECTED, Evidence, Limits, judge_together
from verdicts import RESULTS, SHAPES, TURNED, Shape

KINDS: dict[str, Shape] = {name: SHAPES[name] for name in ("flat", "saturating", "flat, then rise", "U", "inverted-U")}
KINDS["gentle"] = Shape(lambda u: 0.54 - 0.08 * u, "inverse")
EXAMPLES = (200, 1000)
"""Questions; with more of them, which make curves easier to see, only flat ones are judged."""
SETTINGS = (
    *((1, *rest) for rest in product((0.0, 0.9), (5, 8), (0.0, 0.03))),
    *((3, 0.0, 5, 0.0), (3, 0.9, 5, 0.03), (3, 0.9, 8, 0.0), (3, 0.9, 8, 0.03)),
)
"""Seeds of a setting, shared difficulty, settings of a model, and their jitter."""
MOST_WRONG, MOST_TURNS = 0.10, 0.05
"""Targets: wrong verdicts of any kind on flat curves, and turns on monotone ones."""

Cell = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=100, help="families of each kind; flat ones six times as many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; run again to resume")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default=f"paired-verdicts-{datetime.date.today().isoformat()}", help="of the files")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    partial = args.out / f"{args.name}.partial.jsonl"
    done = [json.loads(line) for line in partial.read_text().splitlines()] if partial.exists() else []
    there = {cell["key"]: cell for cell in done}
    end = time.monotonic() + 60 * args.minutes
    wanted = list(cells(args.runs))
    with partial.open("a") as file:
        for place in wanted:
            key = json.dumps(place)
            if key in there:
                continue
            if time.monotonic() > end:
                print(f"{len(there)} of {len(wanted)} cells: run it again to resume")
                return 0
            start = time.process_time()
            random = np.random.default_rng([args.seed, zlib.crc32(key.encode())])
            there[key] = {"key": key, **simulate(random, **place), "seconds": time.process_time() - start}
            file.write(json.dumps(there[key]) + "\n")
            file.flush()
    report([there[json.dumps(place)] for place in wanted], args)
    partial.unlink()
    return 0


def cells(runs: int) -> Iterator[Cell]:
    for examples, (seeds, shared, sizes, jitter), kind in product(EXAMPLES, SETTINGS, KINDS):
        place = {"sizes": sizes, "seeds": seeds, "examples": examples, "shared": shared, "jitter": jitter}
        if kind == "flat" or examples == min(EXAMPLES):
            yield {"kind": kind, **place, "runs": runs * (6 if kind == "flat" else 1)}


def simulate(random: np.random.Generator, kind: str, *, runs: int, **place: Any) -> Cell:
    """Verdicts on ``runs`` families of one kind, paired and not."""
    counts = dict.fromkeys(("right", "wrong", "wrong_turn", "covered", "unpaired_right", "unpaired_wrong"), 0)
    truth, right = KINDS[kind].value(np.array([0.0, 1.0])), KINDS[kind].right
    for _ in range(runs):
        x_N, answers_NX = family(random, kind, **place)
        for paired in (True, False):
            evidence = judge(x_N, answers_NX, paired=paired)
            verdict = judge_together({"task": evidence}, correction="bh", limits=evidence.limits)["task"]
            start = "" if paired else "unpaired_"
            counts[f"{start}right"] += verdict.label == right
            counts[f"{start}wrong"] += verdict.label in {*DIRECTED, "flat"} - {right}
            if paired:
                counts["wrong_turn"] += verdict.label in TURNED and right not in TURNED
                low, high = verdict.interval if verdict.label not in TURNED else evidence.trend.interval
                counts["covered"] += low <= truth[1] - truth[0] <= high
    return {"kind": kind, **place, "runs": runs, **{name: int(count) / runs for name, count in counts.items()}}


def family(
    random: np.random.Generator, kind: str, *, sizes: int, seeds: int, examples: int, shared: float, jitter: float
) -> tuple[np.ndarray, np.ndarray]:
    """[N] log10 of the axis, and [N, X] whether each run answers each question right."""
    u_K = np.linspace(0, 1, sizes)
    true_K = np.clip(KINDS[kind].value(u_K) + jitter * random.standard_normal(sizes), 0.01, 0.99)
    own_X, mixed_KX = random.standard_normal(examples), random.standard_normal((sizes, examples))
    new_SKX = random.standard_normal((seeds, sizes, examples))
    rest = np.sqrt((1 - shared) / 2)
    deviate_SKX = np.sqrt(shared) * own_X + rest * mixed_KX + rest * new_SKX
    right_SKX = deviate_SKX < stats.norm.ppf(true_K)[:, None]
    return np.tile(3 * u_K, seeds), right_SKX.reshape(-1, examples).astype(float)


def judge(x_N: np.ndarray, answers_NX: np.ndarray, *, paired: bool) -> Evidence:
    """As ``trends`` judges a table with scores of examples, or without."""
    y_N, n = answers_NX.mean(1), answers_NX.shape[1]
    stderr_N, deviations_BN = np.sqrt(np.maximum(y_N * (1 - y_N), 0.5 / n) / (n - 1)), None
    if paired:
        scores = [{str(key): (value, str(key)) for key, value in enumerate(row)} for row in answers_NX]
        drawn = resampled_deviations(scores, num_draws=NUM_DRAWS)
        assert drawn is not None
        deviations_BN, stderr_N = drawn
    points = curve(x_N, y_N, stderr_N, deviations_BN=deviations_BN, average=True)
    return Evidence(points, runs=len(x_N), lower_is_better=False, paired=paired, limits=Limits())


def report(measured: list[Cell], args: argparse.Namespace) -> None:
    versions = {"numpy": np.__version__, "scipy": scipy.__version__, "python": platform.python_version()}
    seconds = sum(cell.pop("seconds") for cell in measured)
    for cell in measured:
        cell.pop("key")
    facts = {"runs": args.runs, "seed": args.seed, "seconds": round(seconds), "versions": versions, "cells": measured}
    flat = [cell for cell in measured if cell["kind"] == "flat"]
    monotone = [cell for cell in measured if KINDS[cell["kind"]].kind == "monotone"]
    lines = [
        f"# Verdicts along axes within a model, {datetime.date.today().isoformat()}",
        "",
        f"Shares of {args.runs} families of each kind ({6 * args.runs} flat ones), paired by question; in brackets "
        "what the same families get without pairing. Smallest effect 0.02, alpha 0.05; `coverage` is of the 95 % "
        "interval of the change, mean over flat and monotone curves.",
        "",
        "| settings | seeds | questions | shared | jitter | flat: wrong | gentle fall: right | saturating | "
        "flat, then rise | monotone: wrong turn | U, inverted-U: right | coverage |",
        "|--:" * 12 + "|",
    ]
    for place in ({name: cell[name] for name in ("sizes", "seeds", "examples", "shared", "jitter")} for cell in flat):
        at = {cell["kind"]: cell for cell in measured if place.items() <= cell.items()}
        turns = [cell["wrong_turn"] for cell in at.values() if KINDS[cell["kind"]].kind == "monotone"]
        curved = [cell for cell in at.values() if KINDS[cell["kind"]].kind == "turns"]
        covered = [cell["covered"] for cell in at.values() if KINDS[cell["kind"]].kind != "turns"]
        columns = [
            f"{at['flat']['wrong']:.3f} ({at['flat']['unpaired_wrong']:.3f})",
            *(
                f"{at[k]['right']:.2f} ({at[k]['unpaired_right']:.2f})" if k in at else ""
                for k in ("gentle", "saturating", "flat, then rise")
            ),
            f"{max(turns):.3f}" if turns else "",
            f"{np.mean([c['right'] for c in curved]):.2f} ({np.mean([c['unpaired_right'] for c in curved]):.2f})"
            if curved
            else "",
            f"{np.mean(covered):.2f}",
        ]
        lines.append(f"| {' | '.join(f'{value:,}' for value in place.values())} | {' | '.join(columns)} |")
    wrong = [cell["wrong"] for cell in flat]
    turned = [cell["wrong_turn"] for cell in monotone]
    lines += [
        "",
        f"Target, wrong verdicts of any kind on flat curves: at most {MOST_WRONG:.0%}. Mean {np.mean(wrong):.1%}, "
        f"highest {max(wrong):.1%}; {sum(share > MOST_WRONG for share in wrong)} of {len(wrong)} settings are above. "
        f"Target, turns on monotone curves: at most "
        f"{MOST_TURNS:.0%}. Mean {np.mean(turned):.2%}, highest {max(turned):.1%} of {args.runs}; "
        f"{sum(share > MOST_TURNS for share in turned)} of {len(turned)} cells are above.",
        "",
        f"Made in {seconds / 60:.0f} min of CPU time with seed {args.seed}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
    ]
    stem = args.out / args.name
    stem.with_suffix(".json").write_text(json.dumps(facts) + "\n")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    raise SystemExit(main())

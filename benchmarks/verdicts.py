"""Benchmark: how often `branchmix scaling trends` gives a right or a wrong verdict, on curves whose shape is known.

    python benchmarks/verdicts.py                  # the whole grid, 40 families of each kind, 15 minutes on one core
    python benchmarks/verdicts.py --minutes 8      # a slice: run it again to resume; finished cells are kept
    python benchmarks/verdicts.py --former benchmarks/results/parabola-2026-11-29.json  # compared with a former version

A family is 5 to 12 sizes. Each model's true value is the shape plus jitter, a normal deviate of its own. What is seen
of it is the share of right answers out of n, or for a loss a mean with its standard error. A verdict is wrong if it
claims a trend or a shape that the family does not have; `inconclusive` is neither right nor wrong. A kind of family
that misses its target is measured again with 600 new families, and those count instead. The same is asked of sheets of
11 tasks judged together, as `trends` does it. Every cell has its own random numbers, so the order of cells does not
matter. With another version of branchmix first on PYTHONPATH, its verdicts are measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from scipy import stats

from branchmix.scaling.trends.fit import NUM_DRAWS, curve
from branchmix.scaling.trends.verdict import DIRECTED, Evidence, Limits, judge_together

RESULTS = Path(__file__).resolve().parent / "results"
TURNED = ("u-shaped", "inverted-u")


@dataclass(frozen=True)
class Shape:
    """The true value along the axis, from 0 to 1, and the verdict that is right."""

    value: Callable[[np.ndarray], np.ndarray]
    right: str
    is_loss: bool = False

    @property
    def kind(self) -> str:
        if self.right in TURNED:
            return "turns"
        return {"flat": "flat", "inconclusive": "winds"}.get(self.right, "monotone")


def _power_law(exponent: float) -> Shape:
    """A loss over three decades of size, as they are written: 1.7 + 2 (N / 10M)^-exponent."""
    return Shape(lambda u: 1.7 + 2 * 10 ** (-3 * exponent * u), "standard", is_loss=True)


def _jump(at: float, low: float = 0.25, high: float = 0.75) -> Callable[[np.ndarray], np.ndarray]:
    return lambda u: np.where(u > at, high, low)


SHAPES: dict[str, Shape] = {
    "flat": Shape(lambda u: np.full_like(u, 0.5), "flat"),
    "linear": Shape(lambda u: 0.61 - 0.22 * u, "inverse"),
    "saturating": Shape(lambda u: 0.3 + 0.62 * (1 - np.exp(-5 * u)), "standard"),
    "ceiling": Shape(lambda u: np.minimum(0.55 + 1.05 * u, 0.97), "standard"),
    "floor": Shape(lambda u: np.maximum(0.6 - 0.9 * u, 0.25), "inverse"),
    "sigmoid": Shape(lambda u: 0.25 + 0.5 / (1 + np.exp(-16 * (u - 0.5))), "standard"),
    "flat, then rise": Shape(lambda u: 0.25 + 0.5 * np.maximum(0, (u - 0.6) / 0.4), "standard"),
    "early jump": Shape(_jump(0.15), "standard"),
    "middle jump": Shape(_jump(0.5), "standard"),
    "late jump": Shape(_jump(0.76), "standard"),
    "collapse": Shape(_jump(0.7, 0.8, 0.3), "inverse"),
    "loss^-0.1": _power_law(0.1),
    "loss^-0.2": _power_law(0.2),
    "loss^-0.4": _power_law(0.4),
    "loss^-0.8": _power_law(0.8),
    "U": Shape(lambda u: 0.39 + 0.22 * (2 * u - 1) ** 2, "u-shaped"),
    "inverted-U": Shape(lambda u: 0.61 - 0.22 * (2 * u - 1) ** 2, "inverted-u"),
    "lopsided U": Shape(lambda u: 0.39 + 0.22 * np.where(u < 0.25, (0.25 - u) / 0.5, (u - 0.25) / 0.75), "u-shaped"),
    "cubic": Shape(lambda u: 0.5 + 0.11 * np.polynomial.chebyshev.chebval(2 * u - 1, [0, 0, 0, 1]), "inconclusive"),
    "W": Shape(lambda u: 0.5 + 0.11 * np.polynomial.chebyshev.chebval(2 * u - 1, [0, 0, 0, 0, 1]), "inconclusive"),
}
SIZES = (5, 6, 8, 10, 12)
JITTERS = (0.0, 0.01, 0.03, 0.08)
EXAMPLES = (1_000, 100, 20_000)
SEEDS = (1, 3)
"""Runs of a size."""
SHEET = 11
"""Tasks of a sheet, corrected together by Benjamini and Hochberg."""
SHEET_EXAMPLES = 500
SHAPED = (0, 4, 8)
"""Tasks of a sheet that have a shape, each the next of SHAPED_KINDS; the others are flat."""
SHAPED_KINDS = ("linear", "U", "saturating", "inverted-U", "flat, then rise", "collapse", "linear", "U")
MOST = {"monotone": ("wrong_turn", 0.05), "flat": ("wrong", 0.10)}
"""Targets: turns that monotone shapes do not have, and wrong verdicts of any kind on flat ones."""

Cell = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=40, help="families of each kind")
    parser.add_argument("--again", type=int, default=600, help="new families where a target is missed; 0: never")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; run again to resume")
    parser.add_argument("--former", type=Path, help="results (json) of a former version, to compare with")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default=f"verdicts-{datetime.date.today().isoformat()}", help="of the result files")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    partial = args.out / f"{args.name}.partial.jsonl"
    done = [json.loads(line) for line in partial.read_text().splitlines()] if partial.exists() else []
    there = {cell["key"]: cell for cell in done}
    end = time.monotonic() + 60 * args.minutes
    wanted = list(cells(args.runs, args.again))
    with partial.open("a") as file:
        for key, measure in wanted:
            if key in there:
                continue
            if time.monotonic() > end:
                print(f"{len(there)} of {len(wanted)} cells: run it again to resume")
                break
            start = time.process_time()
            random = np.random.default_rng([args.seed, zlib.crc32(key.encode())])
            there[key] = {"key": key, **measure(random), "seconds": time.process_time() - start}
            file.write(json.dumps(there[key]) + "\n")
            file.flush()
    report([there[key] for key, _ in wanted if key in there], args)
    if len(there) >= len(wanted):
        partial.unlink()
    return 0


def cells(runs: int, again: int) -> Iterator[tuple[str, Callable[[np.random.Generator], Cell]]]:
    """Everything that is measured, by name. A cell that misses its target is measured again with more, new families."""
    for sizes in SIZES:
        for jitter in JITTERS:
            for shaped in SHAPED:
                setting = {"sizes": sizes, "jitter": jitter, "shaped": shaped}
                yield (
                    f"{runs} sheets of {setting}",
                    lambda random, setting=setting: simulate_sheet(random, runs=max(1, runs // 2), **setting),
                )
    for place in settings():
        for shape in SHAPES:
            setting = {"shape": shape, **place}

            def measure(random: np.random.Generator, setting: Cell = setting) -> Cell:
                cell = simulate(random, runs=runs, **setting)
                name, most = MOST.get(SHAPES[setting["shape"]].kind, ("wrong", 1.0))
                if again and cell[name] > most:
                    return simulate(random, runs=again, **setting) | {"first": cell[name]}
                return cell

            yield f"{runs} of {setting}", measure


def settings() -> Iterator[Cell]:
    """Where every shape is looked at; the cells with one run of a size are measured first."""
    for seeds, examples, sizes, jitter in product(SEEDS, EXAMPLES, SIZES, JITTERS):
        yield {"sizes": sizes, "jitter": jitter, "examples": examples, "seeds": seeds}


def simulate(
    random: np.random.Generator, shape: str, *, sizes: int, jitter: float, seeds: int, runs: int, examples: int
) -> Cell:
    """Verdicts on ``runs`` families of one kind, with ``seeds`` models of each size."""
    labels: Counter[str] = Counter()
    covered = jumps = levels = 0
    truth = SHAPES[shape].value(np.array([0.0, 1.0]))
    for _ in range(runs):
        evidence = family(random, shape, sizes, jitter=jitter, seeds=seeds, examples=examples)
        verdict = judge_together({"task": evidence}, correction="bh", limits=evidence.limits)["task"]
        labels[verdict.label] += 1
        low, high = verdict.interval if verdict.label not in TURNED else evidence.trend.interval
        covered += low <= truth[1] - truth[0] <= high
        form = getattr(verdict, "form", None)
        jumps += form is not None and "jump" in form
        levels += form is not None and ("level_from" in form or "level_until" in form)
    wrong = sum(labels[label] for label in {*DIRECTED, "flat"} - {SHAPES[shape].right})
    setting = {"shape": shape, "sizes": sizes, "jitter": jitter, "examples": examples, "seeds": seeds, "runs": runs}
    return setting | {
        "right": labels[SHAPES[shape].right] / runs,
        "wrong": wrong / runs,
        "wrong_turn": sum(labels[label] for label in TURNED if label != SHAPES[shape].right) / runs,
        "labels": dict(labels.most_common()),
        "coverage": covered / runs,
        "jumps": jumps / runs,
        "levels": levels / runs,
    }


def simulate_sheet(random: np.random.Generator, shaped: int, *, sizes: int, jitter: float, runs: int) -> Cell:
    """Verdicts on ``runs`` sheets of 11 tasks, judged together; a model's jitter is another one on each task."""
    kinds = [SHAPED_KINDS[number] if number < shaped else "flat" for number in range(SHEET)]
    wrong_flat = wrong_shaped = right = any_wrong = wrong_turn = 0
    for _ in range(runs):
        evidence = {
            str(number): family(random, kind, sizes, jitter=jitter, seeds=1, examples=SHEET_EXAMPLES)
            for number, kind in enumerate(kinds)
        }
        labels = [v.label for v in judge_together(evidence, correction="bh", limits=Limits()).values()]
        wrong = [label in {*DIRECTED, "flat"} - {SHAPES[kind].right} for label, kind in zip(labels, kinds, strict=True)]
        wrong_shaped += sum(wrong[:shaped])
        wrong_flat += sum(wrong[shaped:])
        any_wrong += any(wrong)
        right += sum(label == SHAPES[kind].right for label, kind in zip(labels[:shaped], kinds[:shaped], strict=True))
        wrong_turn += sum(
            label in TURNED and SHAPES[kind].kind == "monotone" for label, kind in zip(labels, kinds, strict=True)
        )
    monotone = sum(SHAPES[kind].kind == "monotone" for kind in kinds)
    return {
        "sizes": sizes,
        "jitter": jitter,
        "shaped": shaped,
        "sheets": runs,
        "flat_wrong": wrong_flat / runs / (SHEET - shaped),
        "shaped_right": right / runs / shaped if shaped else None,
        "shaped_wrong": wrong_shaped / runs / shaped if shaped else None,
        "wrong_turn": wrong_turn / runs / monotone if monotone else None,
        "any_wrong": any_wrong / runs,
    }


def family(
    random: np.random.Generator, shape: str, sizes: int, *, jitter: float, seeds: int, examples: int
) -> Evidence:
    place = np.repeat(np.linspace(0, 1, sizes), seeds)
    true = SHAPES[shape].value(place) + jitter * random.standard_normal(len(place))
    if SHAPES[shape].is_loss:
        stderr = np.full(len(place), 0.632 / np.sqrt(examples))
        seen = true + stderr * random.standard_normal(len(place))
    else:
        seen = random.binomial(examples, np.clip(true, 0.01, 0.99)) / examples
        inside = np.where((seen == 0) | (seen == 1), (0.5 + seen * examples) / (examples + 1), seen)
        stderr = np.sqrt(inside * (1 - inside) / (examples - 1))
    points = curve(7 + (3 if SHAPES[shape].is_loss else 2) * place, seen, stderr)
    return Evidence(points, runs=len(place), lower_is_better=SHAPES[shape].is_loss, limits=Limits())


# ---- the tables ----


def report(measured: list[Cell], args: argparse.Namespace) -> None:
    versions = {"numpy": np.__version__, "scipy": scipy.__version__, "python": platform.python_version()}
    seconds = sum(cell.pop("seconds") for cell in measured)
    cells = {cell.pop("key"): cell for cell in measured}.values()
    sheets = [cell for cell in cells if "shaped" in cell]
    places = [place for place in settings() if len(_at(cells, place)) == len(SHAPES)]
    single = [cell for place in places for cell in _at(cells, place)]
    by_kind = {
        kind: [cell for cell in single if SHAPES[cell["shape"]].kind == kind]
        for kind in ("flat", "monotone", "turns", "winds")
    }
    flat, monotone, turns, winds = by_kind.values()
    families = sum(cell["runs"] + (args.runs if "first" in cell else 0) for cell in cells if "shape" in cell)
    per_verdict = seconds / (families + sum(SHEET * cell["sheets"] for cell in sheets))
    facts = {"runs": args.runs, "seed": args.seed, "seconds": round(seconds), "versions": versions}
    facts |= {"cells": single, "sheets": sheets}
    even, lopsided = ([c for c in turns if (c["shape"] == "lopsided U") == wanted] for wanted in (False, True))
    lines = [
        f"# Verdicts on curves of known shape, {datetime.date.today().isoformat()}",
        "",
        f"Shares of {args.runs} families of each kind, mean over shapes; in brackets the worst shape. One task, alpha "
        "0.05, smallest effect 0.02. Jitter is the standard deviation between models of one size; `coverage` is how "
        "often the 95 % interval of the change holds the true one.",
        "",
        "| sizes | runs of a size | examples | jitter | flat: wrong | monotone: right | monotone: wrong turn | U, "
        "inverted-U: right | lopsided U: right | cubic, W: a turn | coverage |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for place in places:
        columns = [
            _share(flat, place, "wrong", max),
            _share(monotone, place, "right", min),
            _share(monotone, place, "wrong_turn", max),
            _share(even, place, "right", min),
            _share(lopsided, place, "right", min),
            _share(winds, place, "wrong_turn", max),
            _share([*flat, *monotone], place, "coverage", min),
        ]
        lines.append(f"| {_setting(place)} | {' | '.join(columns)} |")
    lines += [
        "",
        _target("wrong turns on monotone shapes", by_kind, "monotone", args.runs),
        "",
        _target("wrong verdicts of any kind on flat ones", by_kind, "flat", args.runs),
        "",
        *(_against(json.loads(args.former.read_text())["cells"], turns) if args.former else ()),
        "Shape by shape, mean over all settings with one run of a size, by sizes: right / wrong turn / any wrong "
        "verdict. `cubic` and `W` turn more than once; right is `inconclusive`, and every trend or turn counts as "
        "wrong.",
        "",
        "| shape | " + " | ".join(f"{sizes} sizes" for sizes in SIZES) + " | named a jump | named a plateau |",
        "|---" * (len(SIZES) + 3) + "|",
        *(_shape_line(single, shape) for shape in SHAPES),
        "",
        f"Sheets of {SHEET} tasks judged together with {SHEET_EXAMPLES} examples, some of them with a shape "
        f"({', '.join(dict.fromkeys(SHAPED_KINDS))}), the others flat; Benjamini-Hochberg over the sheet. `any wrong` "
        "is the share of sheets with a wrong verdict.",
        "",
        "| sizes | jitter | tasks with a shape | flat: wrong | shape: right / wrong | monotone: wrong turn | "
        "any wrong |",
        "|--:|--:|--:|--:|--:|--:|--:|",
        *(_sheet_line(sheet) for sheet in sheets),
        "",
        f"Made in {seconds / 60:.0f} min of CPU time ({1000 * per_verdict:.1f} ms for each verdict, with {NUM_DRAWS} "
        f"draws) with seed {args.seed}; " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
    ]
    stem = args.out / args.name
    stem.with_suffix(".json").write_text(json.dumps(facts) + "\n")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _at(cells: Iterable[Cell], place: Cell) -> list[Cell]:
    return [cell for cell in cells if place.items() <= cell.items()]


def _setting(place: Cell) -> str:
    return f"{place['sizes']} | {place['seeds']} | {place['examples']:,} | {place['jitter']:g}"


def _share(cells: list[Cell], place: Cell, name: str, worst: Callable[[list[float]], float]) -> str:
    values = [cell[name] for cell in _at(cells, place)]
    return f"{np.mean(values):.3f}" + (f" ({worst(values):.2f})" if len(values) > 1 else "")


def _target(what: str, by_kind: dict[str, list[Cell]], kind: str, first: int) -> str:
    """Whether cells meet a target, and the highest of those that were measured with more families."""
    cells, (name, most) = by_kind[kind], MOST[kind]
    again = sorted((cell for cell in cells if "first" in cell), key=lambda cell: -cell[name])
    beyond = sum(cell[name] > most for cell in cells)
    told = []
    for cell in again[:10]:
        low, high = stats.binomtest(round(cell[name] * cell["runs"]), cell["runs"]).proportion_ci(method="wilson")
        runs = f"{cell['seeds']} run{'s' * (cell['seeds'] > 1)}"
        where = f"{cell['shape']}, {cell['sizes']} sizes, {runs}, jitter {cell['jitter']:g}, n {cell['examples']:,}"
        told.append(f"{where}: {cell[name]:.3f} (95 % interval {low:.3f} to {high:.3f})")
    return (
        f"Target, {what}: at most {most:.0%}. Mean {np.mean([cell[name] for cell in cells]):.2%}. {len(again)} of "
        f"{len(cells)} cells were above with {first} families and were measured again with new ones, "
        f"{again[0]['runs'] if again else 0} each, which is what the tables show; {beyond} cells are above."
        + (f" The highest of those: {'; '.join(told)}." if again else "")
    )


def _against(former: list[Cell], single: list[Cell]) -> Iterator[str]:
    """Power where a former version was honest, or nearly so, by its turns of monotone shapes in the same setting."""
    most, worst, rows = MOST["monotone"][1], [], []
    for place in settings():
        was, now = ({cell["shape"]: cell for cell in _at(cells, place)} for cells in (former, single))
        turned = [cell["wrong_turn"] for shape, cell in was.items() if SHAPES[shape].kind == "monotone"]
        worst.append(max(turned))
        if np.mean(turned) <= 2 * most and now:
            pairs = [
                (now[name]["right"], was[name]["right"]) for name, shape in SHAPES.items() if shape.right in TURNED
            ]
            powers = (f"{power:.2f} ({before:.2f})" for power, before in pairs)
            rows.append(f"| {_setting(place)} | {np.mean(turned):.3f} ({max(turned):.2f}) | {' | '.join(powers)} |")
    yield (
        f"Against the former version: in {sum(share <= most for share in worst)} of {len(worst)} settings it called at "
        f"most {most:.0%} of every monotone shape a turn; of the worst shape it was {min(worst):.0%} or more in every "
        f"setting. These are the settings where it was at most {2 * most:.0%} on average over monotone shapes (in "
        "brackets its worst shape, and its own share of the turns):"
    )
    yield ""
    yield "| sizes | runs of a size | examples | jitter | former: wrong turn | U | inverted-U | lopsided U |"
    yield "|--:|--:|--:|--:|--:|--:|--:|--:|"
    yield from (*rows, "")


def _shape_line(cells: list[Cell], shape: str) -> str:
    mine = [cell for cell in cells if cell["shape"] == shape and cell["seeds"] == 1]
    columns = []
    for sizes in SIZES:
        here = [cell for cell in mine if cell["sizes"] == sizes]
        means = (np.mean([cell[name] for cell in here]) for name in ("right", "wrong_turn", "wrong"))
        columns.append(" / ".join(f"{mean:.2f}" for mean in means))
    named = [f"{np.mean([cell[k] for cell in mine]):.2f}" for k in ("jumps", "levels")]
    return f"| {shape} | {' | '.join([*columns, *named])} |"


def _sheet_line(sheet: Cell) -> str:
    shaped = f"{sheet['shaped_right']:.2f} / {sheet['shaped_wrong']:.3f}" if sheet["shaped"] else ""
    turned = f"{sheet['wrong_turn']:.3f}" if sheet["wrong_turn"] is not None else ""
    return (
        f"| {sheet['sizes']} | {sheet['jitter']:g} | {sheet['shaped']} of {SHEET} | {sheet['flat_wrong']:.3f} | "
        f"{shaped} | {turned} | {sheet['any_wrong']:.2f} |"
    )


if __name__ == "__main__":
    raise SystemExit(main())

"""A study's pictures: loss against tokens and FLOPs, perplexity with intervals, compute against perplexity.

Each is a matplotlib figure of an ``ink`` colour on nothing, for ``svg`` and ``save`` of ``pages.pictures``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator

from branchmix.evaluate.routing.plots import shares
from branchmix.pages.pictures import COLOURS, Draw, Figure, figure_with
from branchmix.study.comparisons import Numbers, all_flops, by_repetition
from branchmix.study.graph import TRAINED

FIRST = ("bam-expert-kv-calibrated", "bam-expert-kv", "bam-shared-kv", "dense")
"""Methods that reports describe first, where a study has them."""
ROUTING = "routing-"
"""How the names of heat maps begin; the title of a model follows."""
FLOPS = "training FLOPs, without the dense models'"
_DASHES = {"dm": "-", "cm": "--"}


def pictures_of(study: Numbers) -> dict[str, tuple[Draw, str]]:
    """All pictures of a study by name: how each is drawn, and what it shows."""
    pictures: dict[str, tuple[Draw, str]] = {}
    pictures["perplexity"] = partial(dots, study), "Held-out perplexity of every model"
    if styles(study):
        pictures["curves"] = partial(curves, study), "Training loss against tokens and against FLOPs"
        pictures["compute"] = partial(compute, study), "Held-out perplexity against training FLOPs"
    for model in study["models"]:
        routing = model["repetitions"][0]["routing"]
        if routing and model["role"] in TRAINED:
            label = f"{model['label']}: share of each expert by domain, layer by layer"
            pictures[f"{ROUTING}{model['title']}"] = partial(shares, routing, domains=study["domains"]), label
    return pictures


def styles(study: Numbers) -> dict[str, tuple[str, str]]:
    """Colour (of the method) and dashes (of the match) of the trained models that are drawn.

    As many methods as there are colours: the reference, ``FIRST``, and the first of the others.
    """
    trained = [model for model in study["models"] if model["tokens"] and model["group"] == "methods"]
    ranks = {preset: rank for rank, preset in enumerate(FIRST, start=1)}
    by_rank = sorted(trained, key=lambda m: 0 if m["role"] == "reference" else ranks.get(m["preset"], len(FIRST) + 1))
    colours: dict[str, str] = {}
    left = list(COLOURS[:-1])
    for model in by_rank:
        if model["preset"] == "dense":
            colours[model["method"]] = COLOURS[-1]
        elif model["method"] not in colours and left:
            colours[model["method"]] = left.pop(0)
    return {
        model["title"]: (colours[model["method"]], "-" if model["role"] == "reference" else _DASHES[model["match"][0]])
        for model in trained
        if model["method"] in colours
    }


def curves(study: Numbers, ink: str) -> Figure:
    """Training loss against tokens and against FLOPs: mean over the repetitions that all drawn models have.

    These saw the same data in the same order, another repetition's may be harder.
    """
    figure, panels = figure_with(2, (10.0, 4.3), ink)
    _curves(panels[0], study, "tokens", "Over tokens: equal data", ink)
    _curves(panels[1], study, "flops", "Over FLOPs: equal compute", ink)
    panels[0].set_ylabel("training loss, nats a token", color=ink)
    _legend(figure, panels[1], ink)
    return figure


def _legend(figure: Figure, panel: Any, ink: str) -> None:
    lines, labels = panel.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4, frameon=False, labelcolor=ink, fontsize=8)


def _curves(panel: Any, study: Numbers, over: str, heading: str, ink: str) -> None:
    models = {model["title"]: model for model in study["models"]}
    shown = styles(study)
    trained = {
        title: {n: run["curve"] for n, run in by_repetition(models[title], "training").items() if run and run["curve"]}
        for title in shown
    }
    having = [set(of_one) for of_one in trained.values() if of_one]
    common = set.intersection(*having) if having else set()
    lowest, highest = float("inf"), 0.0
    for title, (colour, dashes) in shown.items():
        of_all = [curve for repetition, curve in trained[title].items() if repetition in common or not common]
        if not of_all:
            continue
        end = min(curve[-1][over] for curve in of_all)
        places = [point[over] for point in of_all[0] if point[over] <= end]
        # Runs that were stopped have points at other steps than those that were not.
        rows = [np.interp(places, [p[over] for p in curve], [p["loss"] for p in curve]) for curve in of_all]
        losses = np.mean(rows, axis=0).tolist()
        panel.plot(places, losses, dashes, color=colour, label=models[title]["label"], linewidth=1.6)
        lowest, highest = min(lowest, *losses), max(highest, *losses[len(losses) // 10 :])
    if highest:
        room = 0.05 * (highest - lowest) or 0.1
        panel.set_ylim(lowest - room, highest + room)
    panel.set_title(heading, color=ink, loc="left")
    panel.set_xlabel({"tokens": "tokens", "flops": FLOPS}[over], color=ink)
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.grid(alpha=0.2)


def dots(study: Numbers, ink: str) -> Figure:
    """Geometric mean of held-out perplexity of every model; small dots are its repetitions."""
    models = study["models"]
    figure, (panel,) = figure_with(1, (9.0, 0.6 + 0.26 * len(models)), ink)
    colours = {"dense": COLOURS[7], "merged": COLOURS[3], "methods": COLOURS[2], "ablations": COLOURS[4]}
    means = [model["geometric_mean"] for model in models]
    beside: Any = {"xytext": (9, 0), "textcoords": "offset points", "va": "center", "color": ink, "fontsize": 7.5}
    for place, (model, middle) in enumerate(zip(models, means, strict=True)):
        colour, values = colours[model["group"]], [r["geometric_mean"] for r in model["repetitions"]]
        if len(values) > 1:
            panel.plot(values, [place] * len(values), ".", color=colour, alpha=0.55, markersize=5)
        panel.plot(middle, place, "o", color=colour, markersize=6)
        panel.annotate(f"{middle:.{0 if middle >= 100 else 1}f}", (max([middle, *values]), place), **beside)
    panel.set_xscale("log")
    panel.set_yticks(range(len(models)), [model["label"] for model in models])
    panel.set_ylim(len(models) - 0.4, -0.6)
    low, high = min(means), max(means)
    room = max(high / low, 1.02)
    left, right = low / room**0.05, high * room**0.15
    panel.set_xlim(left, right)
    ticks = [t for power in range(7) for t in (10**power * n for n in (1, 1.5, 2, 3, 5, 7)) if left < t < right]
    if len(ticks) < 3:
        ticks = [float(t) for t in MaxNLocator(6).tick_values(left, right) if left < t < right]
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set_xticks([], minor=True)
    panel.grid(axis="x", alpha=0.2)
    panel.set_title("Held-out perplexity, geometric mean over domains", color=ink, loc="left")
    return figure


def compute(study: Numbers, ink: str) -> Figure:
    """Held-out perplexity against training FLOPs: a line from each method's CM run to its DM run."""
    shown = styles(study)
    figure, (panel,) = figure_with(1, (8.0, 4.8), ink)
    by_method: dict[str, list[Numbers]] = {}
    for model in study["models"]:
        if model["title"] in shown:
            by_method.setdefault(model["method"], []).append(model)
    for models in by_method.values():
        models.sort(key=lambda model: model["flops"])
        colour = shown[models[0]["title"]][0]
        points = [(all_flops(model), model["geometric_mean"]) for model in models]
        label = models[-1]["label"].replace(" DM ", " ").split(" (")[0]
        panel.plot(*zip(*points, strict=True), "o-", color=colour, label=label, markersize=6)
        for model, (x, y) in zip(models, points, strict=True):
            half = study["comparisons"].get(model["title"], {}).get("log_perplexity", {}).get("half_width")
            if half is not None:
                panel.errorbar([x], [y], yerr=[[y * half], [y * half]], color=colour, capsize=3, linewidth=1)
    panel.set_yscale("log")
    for set_formatter in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
        set_formatter("{x:.4g}")
    panel.tick_params(axis="y", which="both", labelsize=7.5)
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.set_xlabel(FLOPS, color=ink)
    panel.set_ylabel("held-out perplexity, geometric mean", color=ink)
    _legend(figure, panel, ink)
    panel.grid(alpha=0.2, which="both")
    return figure

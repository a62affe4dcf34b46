"""The demo's pictures: loss curves, and the summary for a README.

Each is a matplotlib figure of an ``ink`` colour on nothing, for ``svg`` and ``png`` of ``pages.pictures``.
Colours are those of Okabe and Ito, which colour-blind readers can tell apart; lines differ in their dashes too.
"""

from __future__ import annotations

from typing import Any

from branchmix.demo.settings import DOMAINS
from branchmix.pages.pictures import Figure, figure_with, heat, take_ink

STYLES = {
    "trained/dense": ("#777777", ":"),
    "trained/btx": ("#E69F00", "-"),
    "trained/bam-shared-kv-dm": ("#56B4E9", "-"),
    "trained/bam-shared-kv-cm": ("#56B4E9", "--"),
    "trained/bam-expert-kv-dm": ("#009E73", "-"),
    "trained/bam-expert-kv-cm": ("#009E73", "--"),
}
DENSE, STEP_0 = "#777777", "#CC79A7"


def curves(found: dict[str, Any], ink: str) -> Figure:
    """Training loss of the mixtures against tokens and against FLOPs."""
    figure, panels = figure_with(2, (9.0, 3.6), ink)
    _curves(panels[0], found, "tokens", ink)
    _curves(panels[1], found, "flops", ink)
    panels[0].set_ylabel("training loss, nats a token", color=ink)
    panels[0].set_title("Over tokens: equal data", color=ink, loc="left")
    panels[1].set_title("Over FLOPs: equal compute", color=ink, loc="left")
    panels[1].legend(frameon=False, labelcolor=ink, fontsize=8)
    return figure


def summary(found: dict[str, Any], ink: str) -> Figure:
    """The wide picture: every model's perplexity, loss over compute, and the attention gates of Expert KV by domain."""
    from matplotlib.figure import Figure as MatplotlibFigure

    figure = MatplotlibFigure(figsize=(13.0, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.25, 1.0, 0.95])
    for panel in (left, middle, right):
        take_ink(panel, ink)
    _dots(left, found, ink)
    _curves(middle, found, "flops", ink)
    middle.set_title("Training the mixtures: loss over compute", color=ink, loc="left")
    middle.set_ylabel("training loss, nats a token", color=ink)
    middle.legend(frameon=False, labelcolor=ink, fontsize=7.5)
    routed = found["routing"].get("trained/bam-expert-kv-dm")
    if routed is not None:
        heat(right, _mean_over_layers(routed["attention"]), DOMAINS, routed["experts"], ink)
        right.set_title("Attention gates of BAM Expert KV by domain", color=ink, loc="left")
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


def _curves(panel: Any, found: dict[str, Any], over: str, ink: str) -> None:
    from matplotlib.ticker import EngFormatter

    labels = {model["folder"]: model["label"] for model in found["models"]}
    for folder, (colour, dashes) in STYLES.items():
        points = found["curves"].get(folder)
        if not points:
            continue
        losses = [point["loss"] for point in points]
        panel.plot([point[over] for point in points], losses, dashes, color=colour, label=labels[folder], linewidth=1.8)
    panel.set_xlabel({"tokens": "tokens", "flops": "training FLOPs, without the dense models'"}[over], color=ink)
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.grid(alpha=0.2)


def _dots(panel: Any, found: dict[str, Any], ink: str) -> None:
    """Geometric mean of perplexity of every model, best at the bottom of each group."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter, NullLocator

    models = found["models"]
    for place, model in enumerate(models):
        colour = {"dense": DENSE, "merged": STEP_0}.get(model["group"]) or STYLES[model["folder"]][0]
        panel.plot(model["geometric_mean"], place, "o", color=colour, markersize=7)
        panel.annotate(
            f"{model['geometric_mean']:.{0 if model['geometric_mean'] >= 100 else 1}f}",
            (model["geometric_mean"], place),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=ink,
            fontsize=8,
        )
    panel.set_xscale("log")
    names = [model["label"] + (", step 0" if model["folder"] in _MERGED_MIXTURES else "") for model in models]
    panel.set_yticks(range(len(models)), names)
    panel.invert_yaxis()
    low, high = (pick(model["geometric_mean"] for model in models) for pick in (min, max))
    panel.set_xlim(low / 1.12, high * 1.45)
    ticks = [
        tick for power in range(6) for tick in (10**power * n for n in (1, 1.5, 2, 3, 5, 7)) if low < tick < 1.3 * high
    ]
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in ticks]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.grid(axis="x", alpha=0.2)
    panel.set_title("Held-out perplexity, geometric mean of four domains", color=ink, loc="left")


_MERGED_MIXTURES = ("upcycled/btx", "upcycled/bam-shared-kv", "upcycled/bam-expert-kv")


def _mean_over_layers(layers: list[dict[str, Any]]) -> list[list[float]]:
    """By domain and expert."""
    return [
        [sum(values) / len(layers) for values in zip(*(layer["by_domain"][domain] for layer in layers), strict=True)]
        for domain in DOMAINS
    ]

"""Pictures of routing: shares of every expert by layer and domain, and what the layers' numbers are.

Each is a matplotlib figure of an ``ink`` colour on nothing, for ``svg`` and ``save`` of ``pages.pictures``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from branchmix.pages.pictures import COLOURS, Figure, figure_with, heat, save

TITLES = {"attention": "attention gates", "ffn": "FFN experts"}
_PANELS = 6
"""Layers, at most, that get a panel each with numbers in it; more become a row each."""


def shares(routing: dict[str, Any], ink: str, *, domains: Sequence[str]) -> Figure:
    """Load of each expert by domain, of every layer, attention above FFN.

    Of few layers and experts: a panel for each layer, domains down and experts across, with numbers. Otherwise a panel
    for each domain, layers down.

    ``routing`` is ``{"experts": [names], "attention": [layers], "ffn": [layers]}``, each layer with ``layer`` and
    ``by_domain``: what ``RoutingReport.as_dict`` and the readings of a training run have.
    """
    kinds = [kind for kind in TITLES if routing.get(kind)]
    layers, experts = max(len(routing[kind]) for kind in kinds), len(routing["experts"])
    by_layer = layers <= _PANELS and experts <= 8
    if by_layer:
        columns, width, height, above = layers, max(2.25, 0.55 * experts) * layers + 0.6, 0.42 * len(domains), 0.2
        height = max(1.2, height) + 0.42
    else:
        columns, above = len(domains), 0.3
        width = min(7.0, max(1.5, 0.16 * experts), max(1.2, 24.0 / columns)) * columns + 1.6
        height = min(6.0, max(1.6, 0.11 * layers)) + 0.45
    figure, panels = figure_with(columns, (width, height * len(kinds) + above), ink, rows=len(kinds))
    for number, kind in enumerate(kinds):
        row = panels[number * columns :][:columns]
        names = [name if kind == kinds[-1] else "" for name in routing["experts"]]
        if by_layer:
            _by_layer(row, kind, routing[kind], list(domains), names, ink)
        else:
            _by_domain(row, kind, routing[kind], domains, names, ink)
    return figure


def _by_layer(row: Any, kind: str, layers: list[Any], domains: list[str], names: list[str], ink: str) -> None:
    for panel, layer in zip_longest(row, layers):
        if layer is None:
            panel.set_axis_off()
            continue
        by_domain = [layer["by_domain"][domain] for domain in domains]
        heat(panel, by_domain, domains, names[: len(by_domain[0])], ink, rows=panel is row[0])
        panel.set_title(f"{TITLES[kind]}, layer {layer['layer']}", color=ink, fontsize=8.5)


def _by_domain(row: Any, kind: str, layers: list[Any], domains: Sequence[str], names: list[str], ink: str) -> None:
    brightest = max(value for layer in layers for shares in layer["by_domain"].values() for value in shares)
    for panel, domain in zip(row, domains, strict=True):
        values = [layer["by_domain"][domain] for layer in layers]
        edges = {"vmin": 0.0, "vmax": brightest, "cmap": "cividis"}
        picture = panel.imshow(values, aspect="auto", interpolation="nearest", **edges)
        ticks = range(0, len(layers), max(1, len(layers) // 8))
        panel.set_yticks(ticks, [str(layers[tick]["layer"]) if panel is row[0] else "" for tick in ticks])
        count = len(values[0])
        ticks = range(0, count, 1 if count <= 8 else -(-count // 8))
        upright = count <= 8 and max(map(len, names[:count])) > 2
        turned = {"rotation": 45 if upright else 0, "ha": "right" if upright else "center"}
        panel.set_xticks(ticks, [names[tick] for tick in ticks], **turned)
        panel.set_title(f"{TITLES[kind]}: {domain}", color=ink, fontsize=8.5)
        for spine in panel.spines.values():
            spine.set_visible(False)
    row[0].set_ylabel("layer", color=ink)
    bar = row[0].figure.colorbar(picture, ax=row, shrink=0.9, pad=0.01)
    bar.ax.tick_params(colors=ink)
    bar.outline.set_visible(False)
    bar.set_label("share of tokens", color=ink)


def through_layers(routing: dict[str, Any], ink: str) -> Figure:
    """What routers know of the domain, how undecided they are, and whether both kinds agree, layer by layer.

    ``routing`` is what ``RoutingReport.as_dict`` returns.
    """
    kinds = [kind for kind in _STYLES if routing.get(kind)]
    known = all(layer["mutual_information"] is not None for kind in kinds for layer in routing[kind])
    gates, agreement = [(routing[kind], *_STYLES[kind], TITLES[kind]) for kind in kinds], routing["agreement"]
    information = "mutual_information_corrected"
    wanted = [
        ("Mutual information of expert and domain, bits", [(*one, information) for one in gates if known]),
        ("How undecided a token's gate is, bits", [(*one, "token_entropy") for one in gates]),
        ("FFN and attention agree, share", [(agreement, *one) for one in _AGREEMENT if agreement]),
    ]
    wanted = [(title, lines) for title, lines in wanted if lines]
    figure, panels = figure_with(len(wanted), (3.4 * len(wanted) + 0.2, 3.1), ink)
    for (title, lines), panel in zip(wanted, panels, strict=True):
        panel.set_xlabel("layer", color=ink)
        panel.grid(alpha=0.2)
        panel.xaxis.get_major_locator().set_params(integer=True)
        for layers, colour, dashes, mark, label, key in lines:
            values = [layer[key] for layer in layers]
            look = {"color": colour, "marker": mark, "markersize": 4, "label": label}
            panel.plot([layer["layer"] for layer in layers], values, dashes, **look)
        panel.set_title(title, color=ink, loc="left")
        panel.set_ylim(0, 1.02 if lines[0][0] is agreement else None)
        panel.legend(frameon=False, labelcolor=ink, fontsize=8, loc="upper left", bbox_to_anchor=(-0.02, -0.2), ncols=2)
    return figure


_STYLES = {"attention": (COLOURS[0], "-", "o"), "ffn": (COLOURS[5], "--", "s")}
"""Colour, dashes and marks of lines."""
_AGREEMENT = (
    (COLOURS[2], "-", "o", "same expert first", "same"),
    (COLOURS[7], ":", "", "that by chance", "same_by_chance"),
    (COLOURS[1], "--", "s", "overlap of gates", "overlap"),
)


def write_plots(routing: dict[str, Any], folder: Path) -> list[Path]:
    """Both pictures as PNG and PDF on white."""
    draw = {
        "routing-shares": partial(shares, routing, domains=list(routing["domains"])),
        "routing-layers": partial(through_layers, routing),
    }
    return [save(draw[file.stem], file, dpi=200) for file in plot_files(folder)]


def plot_files(folder: Path) -> list[Path]:
    """Where ``write_plots`` writes."""
    return [folder / f"routing-{name}.{kind}" for name in ("shares", "layers") for kind in ("png", "pdf")]

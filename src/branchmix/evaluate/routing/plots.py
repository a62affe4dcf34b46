"""Pictures of routing: shares of every expert by layer and domain, and what the layers' numbers are.

Each is a matplotlib figure of an ``ink`` colour on nothing, for ``svg`` and ``save`` of ``pages.pictures``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from branchmix.pages.pictures import COLOURS, Figure, figure_with, heat, save, take_ink

TITLES = {"attention": "attention gates", "ffn": "FFN experts"}
_PANELS = 6
"""Layers, at most, that get a panel each with numbers in it; more become a row each."""


def shares(routing: dict[str, Any], ink: str, *, domains: Sequence[str]) -> Figure:
    """Load of each expert by domain, of every layer, attention above FFN.

    Of few layers and experts: a panel for each layer, domains down and experts across, with numbers. Otherwise a panel
    for each domain, layers down.

    Args:
        routing: ``{"experts": [names], "attention": [layers], "ffn": [layers]}``, each layer with ``layer`` and
            ``by_domain``: what ``RoutingReport.as_dict`` and the readings of a training run have.
        ink: colour of names.
        domains: in their order.
    """
    kinds = [kind for kind in TITLES if routing.get(kind)]
    layers = max(len(routing[kind]) for kind in kinds)
    draw = _by_layer if layers <= _PANELS and len(routing["experts"]) <= 8 else _by_domain
    return draw(routing, kinds, list(domains), ink)


def _by_layer(routing: dict[str, Any], kinds: list[str], domains: list[str], ink: str) -> Figure:
    columns = max(len(routing[kind]) for kind in kinds)
    width = max(2.25, 0.55 * len(routing["experts"])) * columns + 0.6
    height = max(1.2, 0.42 * len(domains)) + 0.42
    figure, panels = _grid(kinds, columns, (width, height * len(kinds) + 0.2), ink)
    for row, kind in enumerate(kinds):
        for column in range(columns):
            panel = panels[row][column]
            if column >= len(routing[kind]):
                panel.set_axis_off()
                continue
            layer = routing[kind][column]
            by_domain = [layer["by_domain"][domain] for domain in domains]
            names = routing["experts"][: len(by_domain[0])]
            heat(panel, by_domain, domains, names, ink, rows=column == 0, columns=row == len(kinds) - 1)
            panel.set_title(f"{TITLES[kind]}, layer {layer['layer']}", color=ink, fontsize=8.5)
    return figure


def _by_domain(routing: dict[str, Any], kinds: list[str], domains: list[str], ink: str) -> Figure:
    from matplotlib import colormaps

    num_layers, num_experts = max(len(routing[kind]) for kind in kinds), len(routing["experts"])
    width = min(7.0, max(1.5, 0.16 * num_experts), max(1.2, 24.0 / len(domains))) * len(domains) + 1.6
    height = min(6.0, max(1.6, 0.11 * num_layers)) + 0.45
    figure, panels = _grid(kinds, len(domains), (width, height * len(kinds) + 0.3), ink)
    for row, kind in enumerate(kinds):
        layers = routing[kind]
        brightest = max(value for layer in layers for shares in layer["by_domain"].values() for value in shares)
        for panel, domain in zip(panels[row], domains, strict=True):
            values = [layer["by_domain"][domain] for layer in layers]
            edges = {"vmin": 0.0, "vmax": brightest, "cmap": colormaps["cividis"]}
            picture = panel.imshow(values, aspect="auto", interpolation="nearest", **edges)
            ticks = range(0, len(layers), max(1, len(layers) // 8))
            first = panel is panels[row][0]
            panel.set_yticks(ticks, [str(layers[tick]["layer"]) if first else "" for tick in ticks])
            names = routing["experts"][: len(values[0])]
            ticks = range(0, len(names), 1 if len(names) <= 8 else -(-len(names) // 8))
            named = [names[tick] if row == len(kinds) - 1 else "" for tick in ticks]
            upright = len(names) <= 8 and max(map(len, names)) > 2
            panel.set_xticks(ticks, named, rotation=45 if upright else 0, ha="right" if upright else "center")
            panel.set_title(f"{TITLES[kind]}: {domain}", color=ink, fontsize=8.5)
            for spine in panel.spines.values():
                spine.set_visible(False)
        panels[row][0].set_ylabel("layer", color=ink)
        bar = figure.colorbar(picture, ax=list(panels[row]), shrink=0.9, pad=0.01)
        bar.ax.tick_params(colors=ink)
        bar.outline.set_visible(False)
        bar.set_label("share of tokens", color=ink)
    return figure


def _grid(kinds: list[str], columns: int, size: tuple[float, float], ink: str) -> tuple[Figure, Any]:
    """A row of panels for each kind of router."""
    from matplotlib.figure import Figure as MatplotlibFigure

    figure = MatplotlibFigure(figsize=size, layout="constrained")
    panels = figure.subplots(len(kinds), columns, squeeze=False)
    for panel in panels.flat:
        take_ink(panel, ink)
    return figure, panels


def through_layers(routing: dict[str, Any], ink: str) -> Figure:
    """What routers know of the domain, how undecided they are, and whether both kinds agree, layer by layer.

    Args:
        routing: as ``RoutingReport.as_dict`` has it.
        ink: colour of names.
    """
    kinds = [kind for kind in _STYLES if routing.get(kind)]
    known = all(layer["mutual_information"] is not None for kind in kinds for layer in routing[kind])
    panels_wanted = [*(["information"] if known else []), "entropy", *(["agreement"] if routing["agreement"] else [])]
    figure, panels = figure_with(len(panels_wanted), (3.4 * len(panels_wanted) + 0.2, 3.1), ink)
    for wanted, panel in zip(panels_wanted, panels, strict=True):
        panel.set_xlabel("layer", color=ink)
        panel.grid(alpha=0.2)
        panel.xaxis.get_major_locator().set_params(integer=True)
        for layers, values, (colour, dashes, mark), label in _lines(routing, kinds, wanted):
            panel.plot(layers, values, dashes, color=colour, marker=mark, markersize=4, label=label)
        panel.set_title(_PANEL_TITLES[wanted], color=ink, loc="left")
        panel.set_ylim(0, 1.02 if wanted == "agreement" else None)
        panel.legend(frameon=False, labelcolor=ink, fontsize=8, loc="upper left", bbox_to_anchor=(-0.02, -0.2), ncols=2)
    return figure


_STYLES = {"attention": (COLOURS[0], "-", "o"), "ffn": (COLOURS[5], "--", "s")}
_AGREEMENT = {
    "same": ((COLOURS[2], "-", "o"), "same expert first"),
    "same_by_chance": ((COLOURS[7], ":", ""), "that by chance"),
    "overlap": ((COLOURS[1], "--", "s"), "overlap of gates"),
}
_PANEL_TITLES = {
    "information": "What the expert tells of the domain, bits",
    "entropy": "How undecided a token's gate is, bits",
    "agreement": "FFN and attention agree, share",
}


def _lines(routing: dict[str, Any], kinds: list[str], wanted: str) -> Iterator[tuple[list[int], list[float], Any, str]]:
    """Layers, values, style and label of each line of a panel."""
    if wanted == "agreement":
        layers = [layer["layer"] for layer in routing["agreement"]]
        for key, (style, label) in _AGREEMENT.items():
            yield layers, [layer[key] for layer in routing["agreement"]], style, label
        return
    key = {"information": "mutual_information_corrected", "entropy": "token_entropy"}[wanted]
    for kind in kinds:
        layers = [layer["layer"] for layer in routing[kind]]
        yield layers, [layer[key] for layer in routing[kind]], _STYLES[kind], TITLES[kind]


def write_plots(routing: dict[str, Any], folder: Path) -> list[Path]:
    """Both pictures as PNG and PDF on white."""
    draw = {
        "shares": partial(shares, routing, domains=list(routing["domains"])),
        "layers": partial(through_layers, routing),
    }
    return [save(draw[file.stem.removeprefix("routing-")], file, dpi=200) for file in plot_files(folder)]


def plot_files(folder: Path) -> list[Path]:
    """Where ``write_plots`` writes."""
    return [folder / f"routing-{name}.{kind}" for name in ("shares", "layers") for kind in ("png", "pdf")]

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


def shares(found: dict[str, Any], ink: str, *, domains: Sequence[str]) -> Figure:
    """Load of each expert by domain, of every layer, attention above FFN.

    Of few layers and experts: a panel for each layer, domains down and experts across, with numbers. Otherwise a panel
    for each domain, layers down.

    Args:
        found: ``{"experts": [names], "attention": [layers], "ffn": [layers]}``, each layer with ``layer`` and
            ``by_domain``: what ``RoutingReport.as_dict`` and the readings of a training run have.
        ink: colour of names.
        domains: in their order.
    """
    kinds = [kind for kind in TITLES if found.get(kind)]
    layers = max(len(found[kind]) for kind in kinds)
    draw = _by_layer if layers <= _PANELS and len(found["experts"]) <= 8 else _by_domain
    return draw(found, kinds, list(domains), ink)


def _by_layer(found: dict[str, Any], kinds: list[str], domains: list[str], ink: str) -> Figure:
    from matplotlib.figure import Figure as MatplotlibFigure

    layers = max(len(found[kind]) for kind in kinds)
    width = max(2.25, 0.55 * len(found["experts"])) * layers + 0.6
    height = max(1.2, 0.42 * len(domains)) + 0.42
    figure = MatplotlibFigure(figsize=(width, height * len(kinds) + 0.2), layout="constrained")
    panels = figure.subplots(len(kinds), layers, squeeze=False)
    for row, kind in enumerate(kinds):
        for column in range(layers):
            panel = panels[row][column]
            if column >= len(found[kind]):
                panel.set_axis_off()
                continue
            layer = found[kind][column]
            take_ink(panel, ink)
            by_domain = [layer["by_domain"][domain] for domain in domains]
            names = found["experts"][: len(by_domain[0])]
            heat(panel, by_domain, domains, names, ink, rows=column == 0, columns=row == len(kinds) - 1)
            panel.set_title(f"{TITLES[kind]}, layer {layer['layer']}", color=ink, fontsize=8.5)
    return figure


def _by_domain(found: dict[str, Any], kinds: list[str], domains: list[str], ink: str) -> Figure:
    from matplotlib import colormaps
    from matplotlib.figure import Figure as MatplotlibFigure

    layers, experts = max(len(found[kind]) for kind in kinds), len(found["experts"])
    width = min(7.0, max(1.5, 0.16 * experts), max(1.2, 24.0 / len(domains))) * len(domains) + 1.6
    height = min(6.0, max(1.6, 0.11 * layers)) + 0.45
    figure = MatplotlibFigure(figsize=(width, height * len(kinds) + 0.3), layout="constrained")
    panels = figure.subplots(len(kinds), len(domains), squeeze=False)
    for row, kind in enumerate(kinds):
        rows = found[kind]
        brightest = max(value for layer in rows for shares in layer["by_domain"].values() for value in shares)
        for column, domain in enumerate(domains):
            panel = panels[row][column]
            take_ink(panel, ink)
            values = [layer["by_domain"][domain] for layer in rows]
            edges = {"vmin": 0.0, "vmax": brightest, "cmap": colormaps["cividis"]}
            picture = panel.imshow(values, aspect="auto", interpolation="nearest", **edges)
            ticks = range(0, len(rows), max(1, len(rows) // 8))
            panel.set_yticks(ticks, [str(rows[tick]["layer"]) for tick in ticks] if column == 0 else [""] * len(ticks))
            names = found["experts"][: len(values[0])]
            step = 1 if len(names) <= 8 else -(-len(names) // 8)
            ticks = range(0, len(names), step)
            named = [names[tick] for tick in ticks] if row == len(kinds) - 1 else [""] * len(ticks)
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


def through_layers(found: dict[str, Any], ink: str) -> Figure:
    """What routers know of the domain, how undecided they are, and whether both kinds agree, layer by layer.

    Args:
        found: as ``RoutingReport.as_dict`` has it.
        ink: colour of names.
    """
    kinds = [kind for kind in _STYLES if found.get(kind)]
    known = all(layer["mutual_information"] is not None for kind in kinds for layer in found[kind])
    panels_wanted = [*(["information"] if known else []), "entropy", *(["agreement"] if found["agreement"] else [])]
    figure, panels = figure_with(len(panels_wanted), (3.4 * len(panels_wanted) + 0.2, 3.1), ink)
    for wanted, panel in zip(panels_wanted, panels, strict=True):
        panel.set_xlabel("layer", color=ink)
        panel.grid(alpha=0.2)
        panel.xaxis.get_major_locator().set_params(integer=True)
        for layers, values, (colour, dashes, mark), label in _lines(found, kinds, wanted):
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


def _lines(found: dict[str, Any], kinds: list[str], wanted: str) -> Iterator[tuple[list[int], list[float], Any, str]]:
    """Layers, values, style and label of each line of a panel."""
    if wanted == "agreement":
        layers = [layer["layer"] for layer in found["agreement"]]
        for key, (style, label) in _AGREEMENT.items():
            yield layers, [layer[key] for layer in found["agreement"]], style, label
        return
    key = {"information": "mutual_information_corrected", "entropy": "token_entropy"}[wanted]
    for kind in kinds:
        yield (
            [layer["layer"] for layer in found[kind]],
            [layer[key] for layer in found[kind]],
            _STYLES[kind],
            TITLES[kind],
        )


def write_plots(found: dict[str, Any], folder: Path) -> list[Path]:
    """Both pictures as PNG and PDF on white."""
    draw = {"shares": partial(shares, found, domains=list(found["domains"])), "layers": partial(through_layers, found)}
    return [save(draw[file.stem.removeprefix("routing-")], file, dpi=200) for file in plot_files(folder)]


def plot_files(folder: Path) -> list[Path]:
    """Where ``write_plots`` writes."""
    return [folder / f"routing-{name}.{kind}" for name in ("shares", "layers") for kind in ("png", "pdf")]

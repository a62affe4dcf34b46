"""The page of ``branchmix routes``: one HTML file in which every token has the colour of its expert.

Template, script and style are ``token_page.html``, ``.js`` and ``.css`` beside this file; script and style are written
into the page, which asks for nothing else.
"""

from __future__ import annotations

import base64
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from branchmix.evaluate.routing import plots
from branchmix.evaluate.routing.routes import Routes
from branchmix.evaluate.routing.routing_report import Layer
from branchmix.pages.page import render
from branchmix.pages.pictures import COLOURS, svg

TITLES = {"attention": "Attention", "ffn": "FFN"}
_TYPICAL = 8
"""Typical tokens of an expert on the page."""
_COLOURS = COLOURS[:-1]


def html(routed: Routes) -> str:
    """The whole page."""
    template, report = Path(__file__).with_suffix(".html"), routed.report
    style, script = (template.with_suffix(kind).read_text(encoding="utf-8") for kind in (".css", ".js"))
    numbers, domains = report.as_dict(), list(report.domains)
    pictures = [
        svg(partial(plots.through_layers, numbers), "layers", "Specialisation, entropy and agreement by layer"),
        svg(partial(plots.shares, numbers, domains=domains), "shares", "Share of each expert by layer and domain"),
    ]
    # No text can end the script: in JSON a "<" may be written by its number.
    data = json.dumps(_data(routed), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return render(
        template,
        title=f"Which expert each token uses: {Path(report.model).name}",
        kicker="branchmix routes",
        lead=_lead(routed),
        style=Markup(style),
        script=Markup(script),
        data=Markup(data),
        pictures=[Markup(picture) for picture in pictures],
        kinds={kind: title for kind, title in TITLES.items() if kind in report.layers},
        domains=domains,
        num_experts=max(facts["experts"] for facts in report.routers.values()),
        num_colours=len(_COLOURS),
        scores="; ".join(f"{TITLES[kind]}: {_scores(facts)}" for kind, facts in report.routers.items()),
    )


def _lead(routed: Routes) -> list[str]:
    report = routed.report
    kinds = []
    for kind, facts in report.routers.items():
        name = "FFN experts" if kind == "ffn" else "attention experts"
        chosen = "all softly weighted" if facts["soft"] else f"{facts['top_k']} a token"
        kinds.append(f"{facts['experts']} {name} ({chosen}) in {len(report.layers[kind])} layers")
    tokens = sum(sizes["tokens"] for sizes in report.domains.values())
    texts = sum(sizes["documents"] for sizes in report.domains.values())
    of = f" of {len(report.domains)} domains" if len(report.domains) > 1 else ""
    return [
        f"{' and '.join(kinds)}, on {tokens:,} tokens of {texts:,} text{'s' if texts > 1 else ''}{of}.",
        "Each token has the colour of the expert that weighs most with it: the stronger, the surer the router. The "
        "line below it is the whole mix. Hover over a token, or go to it with Tab and the arrow keys, for its numbers.",
        *(f"Note: {note}." for note in report.notes),
    ]


def _scores(facts: dict[str, Any]) -> str:
    score = facts["score"] if facts["score_found"] or facts["soft"] else "softmax (assumed)"
    return f"{score}, " + (
        "soft, all experts" if facts["soft"] else f"top-{facts['top_k']}, weights {facts['weights']}"
    )


def _data(routed: Routes) -> dict[str, Any]:
    """What the script reads: texts, and of each kind of router its layers' numbers and every shown token's gates."""
    report = routed.report
    kinds = {}
    for kind, title in TITLES.items():
        if kind not in report.layers:
            continue
        facts = report.routers[kind]
        routers = [router for router in routed.counts.routers if router.place.kind == kind]
        kept = min(router.shown_index_TM.shape[1] for router in routers)
        index_LTM = np.stack([router.shown_index_TM[:, :kept] for router in routers])
        gates_LTM = np.stack([router.shown_gates_TM[:, :kept] for router in routers])
        wide = facts["experts"] > 256
        kinds[kind] = {
            "title": title,
            **{key: facts[key] for key in ("experts", "top_k", "soft")},
            "kept": kept,
            "wide": wide,
            "index": base64.b64encode(index_LTM.astype("<u2" if wide else "u1").tobytes()).decode(),
            "gates": base64.b64encode(np.rint(gates_LTM * 255).astype("u1").tobytes()).decode(),
            "layers": [_layer(layer) for layer in report.layers[kind]],
        }
    return {
        "experts": report.experts,
        "domains": list(report.domains),
        "colours": _COLOURS,
        "texts": routed.shown,
        "kinds": kinds,
        "agreement": report.agreement,
    }


def _layer(layer: Layer) -> dict[str, Any]:
    kept = (
        *("layer", "max_violation", "dead_experts", "bias_spread", "load_entropy", "token_entropy"),
        *("mutual_information", "mutual_information_corrected"),
    )
    return {
        **{name: layer[name] for name in kept},
        "load": [round(share, 5) for share in layer["load"]],
        "by_domain": {name: [round(share, 5) for share in shares] for name, shares in layer["by_domain"].items()},
        "typical": [[list(token.values()) for token in tokens[:_TYPICAL]] for tokens in layer["typical"]],
    }

"""The page of ``branchmix routes``: one HTML file in which every token has the colour of its expert.

Script and style are ``page.js`` and ``page.css`` beside this file; they are written into the page, which asks for
nothing else.
"""

from __future__ import annotations

import base64
import json
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from branchmix.evaluate.routing import plots
from branchmix.evaluate.routing.run import Routes
from branchmix.pages import page
from branchmix.pages.page import document, section
from branchmix.pages.pictures import COLOURS, svg

TITLES = {"attention": "Attention", "ffn": "FFN"}
_TYPICAL = 8
"""Typical tokens of an expert on the page."""


def write(found: Routes, file: Path) -> Path:
    """Writes the page; returns its path.

    Raises:
        OutputError: it cannot be written.
    """
    return page.write(file, html(found))


def html(found: Routes) -> str:
    """The whole page."""
    folder = Path(__file__).parent
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    # No text can end the script: in JSON a "<" may be written by its number.
    content = json.dumps(_data(found), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    sections = [
        section("Token by token", _text(found) + _LAYER),
        section("All layers", _pictures(found)),
        section("What the numbers mean", _words(found)),
        f'<script type="application/json" id="routes-data">{content}</script>\n<script>{script}</script>\n',
    ]
    name = Path(found.report.model).name
    return document(
        f"Which expert each token uses: {name}",
        "branchmix routes",
        _lead(found),
        sections,
        head=f"<style>{style}</style>\n",
    )


def _lead(found: Routes) -> list[str]:
    report = found.report
    kinds = []
    for kind, facts in report.routers.items():
        chosen = "all softly weighted" if facts["soft"] else f"{facts['top_k']} a token"
        kinds.append(f"{facts['experts']} {_NAMES[kind]} ({chosen}) in {len(report.layers[kind])} layers")
    tokens = sum(sizes["tokens"] for sizes in report.domains.values())
    texts = sum(sizes["documents"] for sizes in report.domains.values())
    of = f" of {len(report.domains)} domains" if len(report.domains) > 1 else ""
    return [
        f"{' and '.join(kinds)}, on {tokens:,} tokens of {texts:,} text{'s' if texts > 1 else ''}{of}.",
        "Each token has the colour of the expert that weighs most with it: the stronger, the surer the router. The "
        "line below it is the whole mix. Point at a token, or go to it with Tab and the arrow keys, for its numbers.",
        *(f"Note: {note}." for note in report.notes),
    ]


_NAMES = {"attention": "attention experts", "ffn": "FFN experts"}


def _text(found: Routes) -> str:
    layers = found.report.layers
    kinds = [kind for kind in TITLES if kind in layers]
    switch = "".join(
        f'<label><input type="radio" name="kind" id="kind-{kind}"{"" if place else " checked"}>{TITLES[kind]}</label>'
        for place, kind in enumerate(kinds)
    )
    domains = "".join(f'<option value="{escape(name)}">{escape(name)}</option>' for name in found.report.domains)
    most = max(facts["experts"] for facts in found.report.routers.values())
    colours = len(_colours())
    repeated = (
        f" There are {colours} colours for {most} experts: they come again, and the number behind a token tells which."
        if most > colours
        else ""
    )
    return f"""<noscript><p>The texts are shown by a script, which this browser does not run.</p></noscript>
<div class="bar">
<fieldset><legend>Router</legend>{switch}</fieldset>
<div class="layer"><label for="layer">Layer</label><input type="range" id="layer" min="0" max="0" value="0">
<output id="layer-now" for="layer"></output></div>
<label>Texts <select id="domain"><option value="">all</option>{domains}</select></label>
<label><input type="checkbox" id="numbers"> numbers</label>
</div>
<ul class="experts" id="experts" aria-label="Experts, and their share of all tokens"></ul>
<p class="note">Shares are of all tokens in this layer. Press an expert to see only its tokens.{repeated}
Keys in the text: arrows from token to token, <kbd>[</kbd> <kbd>]</kbd> from layer to layer, <kbd>r</kbd> the other
router.</p>
<div class="reading">
<div class="text" id="text"></div>
<aside class="panel" aria-label="The token pointed at"><p id="word">&nbsp;</p><div class="gates" id="gates"></div>
<p class="aside" id="aloud" aria-live="polite"></p></aside>
</div>
"""


_LAYER = """<h2>This layer</h2>
<p class="note"><b class="here"></b>, as chosen above.</p>
<dl class="facts" id="facts"></dl>
<h3>Share of each expert by domain</h3>
<div class="table"><table class="shares" id="shares"></table></div>
<h3>Typical tokens of each expert</h3>
<div class="table typical"><table id="typical"></table></div>"""


def _pictures(found: Routes) -> str:
    numbers = found.report.as_dict()
    domains = list(found.report.domains)
    layers = svg(partial(plots.through_layers, numbers), "layers", "Specialisation, entropy and agreement by layer")
    shares = svg(partial(plots.shares, numbers, domains=domains), "shares", "Share of each expert by layer and domain")
    return f"""<figure class="wide">{layers}</figure>
<figure class="wide">{shares}</figure>
<p class="note">Shares of FFN experts are of the choices of a domain's tokens; those of attention gates are means of the
soft gate. A router that knows nothing has the same share everywhere.</p>"""


def _words(found: Routes) -> str:
    scores = "; ".join(
        f"{TITLES[kind]}: {'softmax (assumed)' if not facts['score_found'] and not facts['soft'] else facts['score']}, "
        + ("soft, all experts" if facts["soft"] else f"top-{facts['top_k']}, weights {facts['weights']}")
        for kind, facts in found.report.routers.items()
    )
    words = {
        "Gate": "A token's probability of an expert before top-k, from 0 to 1; an arrow marks the chosen experts.",
        "Share": "Of the top-k choices of all tokens, or the mean gate where all experts are softly weighted.",
        "How even the load is": "Entropy of the shares: log2 of the number of experts if all do as much, 0 if one "
        "does all.",
        "How undecided a token's gate is": "Entropy of a token's gates, mean over tokens.",
        "What the expert tells of the domain": "Mutual information of expert and domain, domains weighing alike: 0 if "
        "all domains use the experts alike, log2 of the number of domains if no two share one. A sample of documents "
        "gives too much; the corrected number takes off what chance alone gives.",
        "FFN and attention prefer the same expert": "Of both routers of a layer; by chance: if neither knew of the "
        "other. Overlap: sum over experts of the smaller of both gates, 1 if they are equal.",
        "Layer": "Number of the block from 0, as in the names of tensors.",
        "This model's routers": scores + ".",
    }
    items = "".join(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in words.items())
    return f'<dl class="words">{items}</dl>'


def _colours() -> tuple[str, ...]:
    return COLOURS[:-1]


def _data(found: Routes) -> dict[str, Any]:
    """What the script reads: texts, and of each kind of router its layers' numbers and every shown token's gates."""
    numbers: dict[str, int] = {}
    texts = []
    for text in found.shown:
        numbers[text.domain] = numbers.get(text.domain, 0) + 1
        texts.append({"domain": text.domain, "number": numbers[text.domain], "pieces": text.pieces, "cut": text.cut})
    kinds = {}
    for kind in TITLES:
        if kind not in found.report.layers:
            continue
        facts = found.report.routers[kind]
        routers = [router for router in found.counts.routers if router.place.kind == kind]
        kept = min(router.shown_index_TM.shape[1] for router in routers)
        index_LTM = np.stack([router.shown_index_TM[:, :kept] for router in routers])
        gates_LTM = np.stack([router.shown_gates_TM[:, :kept] for router in routers])
        wide = facts["experts"] > 256
        kinds[kind] = {
            "title": TITLES[kind],
            "experts": facts["experts"],
            "top_k": facts["top_k"],
            "soft": facts["soft"],
            "kept": kept,
            "wide": wide,
            "index": _bytes(index_LTM.astype("<u2" if wide else "u1")),
            "gates": _bytes(np.rint(gates_LTM * 255).astype("u1")),
            "layers": [_layer(layer) for layer in found.report.layers[kind]],
        }
    return {
        "experts": found.report.experts,
        "domains": list(found.report.domains),
        "colours": _colours(),
        "texts": texts,
        "kinds": kinds,
        "agreement": [vars(pair) for pair in found.report.agreement],
    }


def _layer(layer: Any) -> dict[str, Any]:
    kept = ("layer", "load_entropy", "token_entropy", "mutual_information", "mutual_information_corrected")
    return {
        **{name: getattr(layer, name) for name in kept},
        "load": [round(share, 5) for share in layer.load],
        "by_domain": {name: [round(share, 5) for share in shares] for name, shares in layer.by_domain.items()},
        "typical": [
            [[token["token"], token["share"], token["count"]] for token in tokens[:_TYPICAL]]
            for tokens in layer.typical
        ],
    }


def _bytes(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()

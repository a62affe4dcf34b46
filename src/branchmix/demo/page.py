"""The demo's page: OUT/index.html, one file that needs nothing else, in light and dark, on a desk or a phone.

The tables' form is that of BAM's Table 1. Pictures also go to OUT/plots, for READMEs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from branchmix.demo import plots
from branchmix.demo.measure import routes_page
from branchmix.demo.results import GROUPS
from branchmix.demo.settings import DOMAINS, ROUTED
from branchmix.evaluate.routing.plots import shares
from branchmix.pages import page
from branchmix.pages.page import document, section, table
from branchmix.pages.pictures import png, svg
from branchmix.train.progress import duration


def write(out: Path, found: dict[str, Any]) -> Path:
    """Writes the page and the pictures of ``found``, what ``results.collect`` returned; the page's path."""
    png(partial(plots.summary, found), out / "plots" / "summary.png")
    png(partial(plots.curves, found), out / "plots" / "curves.png")
    for run in ROUTED:
        if (routed := found["routing"].get(f"trained/{run}")) is not None:
            png(partial(shares, routed, domains=DOMAINS), out / "plots" / f"routing-{run}.png")
    return page.write(out / "index.html", html(found))


def html(found: dict[str, Any]) -> str:
    """The whole page."""
    sections = [
        section("Perplexity on held-out text", _scores(found)),
        section("What each model cost", _costs(found)),
        section("Training the mixtures", _curves(found)),
        section("Who serves which domain", _routing(found)),
        section("The text", _text(found)),
        section("How it was made", _making(found)),
    ]
    return document(
        "One seed, three experts, one mixture of attention and FFN experts",
        "branchmix demo",
        found["headline"],
        sections,
        head=f"<style>{_SWITCH}</style>\n",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def _scores(found: dict[str, Any]) -> str:
    """Perplexities in the form of BAM's Table 1, and bits per byte behind a switch."""
    perplexity = _grouped(
        found,
        [*map(str.capitalize, DOMAINS), "Avg", "Geo. mean"],
        lambda model: [*model["perplexity"].values(), model["average"], model["geometric_mean"]],
        lambda value: f"{value:,.0f}" if value >= 1000 else f"{value:.1f}",
    )
    bits = _grouped(
        found,
        [*map(str.capitalize, DOMAINS), "Mean"],
        lambda model: [*model["bits_per_byte"].values(), model["mean_bits_per_byte"]],
        lambda value: f"{value:.3f}",
        errors=lambda model: [*model["stderr"].values(), None],
    )
    documents = ", ".join(f"{count} of {domain}" for domain, count in found["held_out_documents"].items())
    length, budgets = found["scale"]["sequence_length"], found["budgets"]
    return f"""<div class="switch">
<input type="radio" name="unit" id="perplexity" checked><label for="perplexity">perplexity of a token</label>
<input type="radio" name="unit" id="bits"><label for="bits">bits per byte</label>
<div class="table" id="table-perplexity">{perplexity}</div>
<div class="table" id="table-bits">{bits}</div>
</div>
<p class="note">Rows as in Table 1 of the BAM paper (arXiv 2408.08274), with the soup, a dense model of the same data
and the untrained mixtures added. Avg is the paper's: the mean of the four perplexities; the geometric mean weighs
domains alike. DM: equal data, {budgets["mixture"]:,} tokens. CM: equal compute, as many training FLOPs as BTX. The best
number of a column among the trained is bold. Measured on held-out documents ({documents}), in windows of {length}
tokens as in training; ± is the standard error over documents, most of which the models have in common.</p>"""


def _grouped(
    found: dict[str, Any],
    columns: list[str],
    values_of: Callable[[dict[str, Any]], list[float]],
    shown: Callable[[float], str],
    errors: Callable[[dict[str, Any]], list[float | None]] | None = None,
) -> str:
    """A table of all models by group; the least trained value of each column is bold."""
    trained = [values_of(model) for model in found["models"] if model["group"] == "trained"]
    best = [min(column) for column in zip(*trained, strict=True)]
    rows = []
    for group, title in GROUPS.items():
        rows.append(f'<tr class="group"><th colspan="{len(columns) + 1}" scope="rowgroup">{escape(title)}</th></tr>')
        for model in found["models"]:
            if model["group"] != group:
                continue
            cells = []
            deviations = errors(model) if errors else [None] * len(columns)
            for value, deviation, least in zip(values_of(model), deviations, best, strict=True):
                text = shown(value) + (f" <small>±{deviation:.3f}</small>" if deviation is not None else "")
                bold = group == "trained" and value == least
                cells.append(f"<td>{f'<b>{text}</b>' if bold else text}</td>")
            rows.append(f'<tr><th scope="row">{escape(model["label"])}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _costs(found: dict[str, Any]) -> str:
    head = ["parameters", "active", "KV cache, bytes a token", "FLOPs a token", "tokens", "training FLOPs"]
    head += ["with those before it", "minutes"]
    rows = []
    for model in found["models"]:
        trained = model["tokens"]
        rows.append(
            [
                model["label"] + (", step 0" if model["group"] == "merged" and "/soup" not in model["folder"] else ""),
                _millions(model["parameters"]),
                _millions(model["active_parameters"]),
                f"{model['kv_cache_bytes_per_token']:,}",
                _millions(model["forward_flops_per_token"]),
                _millions(trained) if trained else "-",
                _scientific(model["flops"]) if trained else "-",
                _scientific(model["flops"] + model["sunk_flops"]),
                f"{model['seconds'] / 60:.1f}" if trained else "-",
            ]
        )
    return f"""<div class="table">{table(["", *head], rows)}</div>
<p class="note">Exact counts. Training FLOPs are three times those of the forward passes; the sum with those before it
adds the seed and, for mixtures, all three experts. Minutes are of wall time, while other runs worked beside it.</p>"""


def _millions(count: float) -> str:
    return f"{count / 1e6:.3g}M"


def _scientific(count: float) -> str:
    mantissa, exponent = f"{count:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def _curves(found: dict[str, Any]) -> str:
    label = "Training loss of the mixtures against tokens and against FLOPs"
    picture = svg(partial(plots.curves, found), "curves", label)
    return f"""<figure class="wide">{picture}</figure>
<p class="note">Mean over the four domains of each one's last few points. Dashed: BAM with the compute of BTX, and a
learning-rate schedule that ends there.</p>"""


def _routing(found: dict[str, Any]) -> str:
    labels = {model["folder"]: model["label"] for model in found["models"]}
    parts = []
    for run in ROUTED:
        if (routed := found["routing"].get(f"trained/{run}")) is None:
            continue
        name = escape(labels[f"trained/{run}"])
        label = f"{name}: share of each expert by domain, layer by layer"
        picture = svg(partial(shares, routed, domains=DOMAINS), run, label)
        parts.append(
            f'<h3>{name}</h3>\n<figure class="wide">{picture}</figure>\n'
            f'<p><a href="{routes_page(run)}">{name} token by token</a>: which expert each token of held-out text '
            "uses, in every layer.</p>"
        )
    return f"""{"".join(parts)}
<p class="note">Domains of held-out text down, experts across. Attention gates are means of the soft gate; FFN experts
have the share of a domain's tokens that the router sends to them. A router that knows nothing has 0.25
everywhere.</p>"""


# ---------------------------------------------------------------------------------------------------------------------
# Around it
# ---------------------------------------------------------------------------------------------------------------------


def _text(found: dict[str, Any]) -> str:
    rows = [
        [
            domain,
            f"{row['documents']:,}",
            f"{row['tokens']:,}",
            f"{row['held_out_documents']:,}",
            f"{row['held_out_tokens']:,}",
            f"{row['characters']:,}",
            f"{row['most_epochs']:.1f}",
        ]
        for domain, row in found["text"].items()
    ]
    head = ["", "documents", "tokens", "held out", "tokens held out", "characters", "most passes of a run"]
    return f"""<div class="table">{table(head, rows)}</div>
<p class="note">Nothing was downloaded. General: prose in the docstrings of the installed packages. Code: Python's
standard library. Law: licences. Math: docstrings of sympy and mpmath. Paragraphs occur once, near copies are left out
(of code: documents occur once); whole documents are held out. A domain that a run passed many times was too small for
it.</p>"""


def _making(found: dict[str, Any]) -> str:
    scale, budgets, machine, speed = found["scale"], found["budgets"], found["machine"], found["speed"]
    shape = scale["shape"]
    commands = "\n".join(f"{step['command']}    # {duration(step['seconds'])}" for step in found["steps"].values())
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    seconds, speed_of_one = duration(found["seconds"]), f"{1 / speed['dense']:,.0f}"
    return f"""<p>Asked for {found["minutes"]:g} minutes, took {seconds} on {machine["cores"]} cores of
{escape(machine["cpu"])} in {escape(machine["precision"])}, on which one thread trains the dense model at {speed_of_one}
tokens/s while {speed["cores"] - 1} more do the same.</p>
<p>Cohere's parallel block: {shape["num_hidden_layers"]} layers, width {shape["hidden_size"]},
{shape["num_attention_heads"]} heads with {shape["num_key_value_heads"]} of keys and values, FFN
{shape["intermediate_size"]}, vocabulary {scale["vocab_size"]:,} (BPE trained on the four domains); sequences of
{scale["sequence_length"]} tokens, {scale["batch_size"]} a step. Seed: {budgets["seed"]:,} tokens of general text.
Experts: {budgets["expert"]:,} tokens each, 90 % of their domain and 10 % general. Mixtures: {budgets["mixture"]:,}
tokens, a quarter of each domain. AdamW (0.9, 0.95), weight decay 0.1, peak {scale["peak"]:g} for the seed and half of
it afterwards, 5 % warm-up, cosine to a tenth. Top-1 FFN routers with raw gates times 4 (the paper: times 1), soft
attention gates, routers from N(0, 0.02²), balance loss 0.01, z-loss 0.001. One random seed.</p>
<p class="note">{escape(versions)}</p>
<pre>{escape(commands)}</pre>
<p class="note">The YAML files of these commands lie beside this page: change one, give it another <code>out</code>, and
run it again.</p>"""


_SWITCH = "#bits:checked ~ #table-perplexity, #perplexity:checked ~ #table-bits { display: none }"

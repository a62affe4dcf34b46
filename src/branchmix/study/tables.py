"""A study's tables in the form of BAM's Tables 1, 4, 5, 6, 7 and 10, with costs and budgets.

Those of scores are here, those of costs in ``cost_tables``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from branchmix.pages.numbers import human_count
from branchmix.pages.table import Table
from branchmix.study.cost_tables import budgets, components, costs, inference_flops, latency, text
from branchmix.study.labels import Numbers, intervals_are, marked_label
from branchmix.study.results import GROUPS


def tables(found: Numbers) -> list[Table]:
    """Those that there are numbers for."""
    made = [
        *(perplexities(found), bits(found), directions(found), variants(found)),
        *(total_match(found), active_match(found), attention_routing(found)),
        *(inference_flops(found), components(found), latency(found)),
        *(budgets(found), costs(found), text(found)),
    ]
    return [table for table in made if table is not None and table.rows]


def perplexities(found: Numbers) -> Table:
    """Table 1, with baselines that the paper does not have, and what can be told apart."""
    domains = found["domains"]
    compared = f"against {_label(found, found['reference'])}" if found["reference"] else ""
    head = ["", *map(str.capitalize, domains), "Avg", "Geo. mean", *([compared] if compared else [])]

    def cells(model: Numbers) -> list[str]:
        numbers = [*model["perplexity"].values(), model["average"], model["geometric_mean"]]
        return [*map(_perplexity, numbers), *([_difference(found, model)] if compared else [])]

    note = (
        "Perplexity of held-out documents. DM: equal data, CM: equal compute. Avg is the paper's, the mean over "
        f"domains; the last column compares geometric means; ±: {intervals_are(found)}. * marks significant "
        f"differences. {_repetitions(found)}Bold: the best of a column among the trained."
    )
    return _grouped("table-1", "Perplexity (BAM, Table 1)", found, head, cells, note, 1 + len(domains) + 1)


def bits(found: Numbers) -> Table:
    """The same in bits per byte, which do not depend on a tokenizer."""
    domains = found["domains"]

    def cells(model: Numbers) -> list[str]:
        values = [
            f"{model['bits_per_byte'][d]:.3f}" + (f" ±{e:.3f}" if (e := model["stderr"][d]) else "") for d in domains
        ]
        return [*values, f"{sum(model['bits_per_byte'].values()) / len(domains):.3f}"]

    head = ["", *map(str.capitalize, domains), "Mean"]
    note = "Mean over repetitions; ± is the standard error over the documents, which all models have in common."
    return _grouped("bits-per-byte", "Bits per byte", found, head, cells, note, len(domains))


def _grouped(
    name: str,
    title: str,
    found: Numbers,
    head: list[str],
    cells: Callable[[Numbers], list[str]],
    note: str,
    columns: int,
) -> Table:
    rows: list[list[str]] = []
    places: dict[int, Numbers] = {}
    for group, heading in GROUPS.items():
        of_group = [model for model in found["models"] if model["group"] == group]
        if of_group:
            rows.append([heading])
        for model in of_group:
            places[len(rows)] = model
            rows.append([marked_label(found, model), *cells(model)])
    trained = [row for row, model in places.items() if model["group"] in ("methods", "ablations")]
    bold = set()
    for column in range(1, 1 + columns):
        if trained:
            bold.add((min(trained, key=lambda row: float(rows[row][column].split(" ")[0].replace(",", ""))), column))
    return Table(head, rows, name, title, note, bold)


def _perplexity(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def _difference(found: Numbers, model: Numbers) -> str:
    row = found["comparisons"].get(model["title"])
    return percent(row["log_perplexity"], significant=row["significant"]) if row else ""


def percent(interval: Numbers, *, significant: bool) -> str:
    """A difference of logarithms as per cent of perplexity."""
    half = interval["half_width"]
    relative = math.expm1(interval["value"])
    text = f"{100 * relative:+.1f}" + (f" ±{100 * half * (1 + relative):.1f}" if half is not None else "")
    return f"{text} %{' *' if significant else ''}"


def _repetitions(found: Numbers) -> str:
    count = found["repetitions"]
    return "Geometric means over repetitions. " if count > 1 else ""


def _label(found: Numbers, title: str | None) -> str:
    return str(next(model["label"] for model in found["models"] if model["title"] == title))


def directions(found: Numbers) -> Table:
    """The paper's order, row by row."""
    rows = [
        [claim["claim"], claim["table"], _percent_of(claim), str(claim["n"]), claim["verdict"]]
        for claim in found["claims"]
    ]
    note = (
        "Difference of perplexity, geometric mean over domains: negative is the paper's direction. * marks significant "
        "differences. Table 6 is compute-matched."
    )
    head = ["claim", "from", "difference", "repetitions", "here"]
    return Table(head, rows, "directions", "Was the paper's order reproduced?", note)


def variants(found: Numbers) -> Table:
    """What one change does, also where the paper leaves it open."""
    what = {model["title"]: model["what"] for model in found["models"]}
    rows = [
        [
            _label(found, row["title"]),
            what[row["title"]],
            _label(found, row["other"]),
            _percent_of(row),
            str(row["n"]),
            row["verdict"],
        ]
        for row in found["variants"]
    ]
    note = (
        "Difference of perplexity, geometric mean over domains: negative is better than the method beside it, at the "
        "same budget. * marks significant differences."
    )
    head = ["method", "what it is", "beside", "difference", "repetitions", "here"]
    return Table(head, rows, "variants", "What does one change do?", note)


def _percent_of(row: Numbers) -> str:
    interval = {"value": math.log1p(row["relative"]), "half_width": row["half_width"]}
    return percent(interval, significant=row["significant"])


def total_match(found: Numbers) -> Table | None:
    """Table 4."""
    wanted = [("bam-expert-kv", "dm"), ("btx", "dm"), ("btx-total-match", "dm")]
    note = "Further FFN experts of BTX are copies of the seed, top-1. In the paper they make it worse."
    return _selected(
        found, "table-4", "As many parameters in all (BAM, Table 4)", wanted, note, needs="btx-total-match"
    )


def active_match(found: Numbers) -> Table | None:
    """Table 5."""
    wanted = [("bam-expert-kv", "dm"), ("btx-active-match", "dm")]
    note = "BTX with copies of the seed and a larger top-k, as near to BAM's parameters as whole experts allow."
    return _selected(
        found, "table-5", "As many parameters, in all and active (BAM, Table 5)", wanted, note, needs="btx-active-match"
    )


def attention_routing(found: Numbers) -> Table | None:
    """Table 6."""
    wanted = [("btx", "dm"), ("bam-shared-kv", "cm"), ("bam-attention-top2", "cm"), ("bam-attention-top1", "cm")]
    note = "Shared KV, compute-matched. All attention experts are computed whatever the top-k, so FLOPs are the same."
    return _selected(found, "table-6", "Attention routing (BAM, Table 6)", wanted, note, needs="bam-attention-top1")


def _selected(
    found: Numbers, name: str, title: str, wanted: list[tuple[str, str]], note: str, *, needs: str
) -> Table | None:
    rows = []
    chosen = [
        model
        for preset, match in wanted
        for model in found["models"]
        if model["preset"] == preset and match in model["match"]
    ]
    if not any(model["preset"] == needs for model in chosen):
        return None
    for model in chosen:
        facts = model["facts"]
        numbers = [*model["perplexity"].values(), model["average"], model["geometric_mean"]]
        sizes = [
            f"{facts['experts']}",
            f"{facts['top_k']}",
            human_count(facts["parameters"]),
            human_count(facts["active_parameters"]),
        ]
        rows.append([marked_label(found, model), *sizes, *map(_perplexity, numbers), _difference(found, model)])
    head = [
        "",
        "experts",
        "top-k",
        "total",
        "active",
        *map(str.capitalize, found["domains"]),
        "Avg",
        "Geo. mean",
        "against the reference",
    ]
    return Table(head, rows, name, title, note)

"""A study's tables in the form of BAM's Tables 1, 4, 5, 6, 7 and 10, with costs and budgets.

Those of scores are here, those of costs in ``cost_tables``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from branchmix.pages.numbers import human_count
from branchmix.pages.table import Table
from branchmix.study.cost_tables import budgets, components, costs, inference_flops, latency, text
from branchmix.study.labels import Numbers, intervals_are, marked_label, merge_label
from branchmix.study.results import GROUPS
from branchmix.study.statistics import mean


def tables(study: Numbers) -> list[Table]:
    """Those that there are numbers for."""
    made = [
        *(perplexities(study), bits(study), before_training(study), distances(study)),
        *(directions(study), variants(study)),
        *(selection(study, *wanted) for wanted in SELECTIONS),
        *(inference_flops(study), components(study), latency(study)),
        *(budgets(study), costs(study), text(study)),
    ]
    return [table for table in made if table is not None and table.rows]


def perplexities(study: Numbers) -> Table:
    """Table 1, with baselines that the paper does not have, and which differences are significant."""
    reference = study["reference"]
    compared = [f"against {_label(study, reference)}"] if reference else []

    def cells(model: Numbers) -> list[str]:
        return [*_perplexities(model), *([_difference(study, model)] if compared else [])]

    over = "Geometric means over repetitions. " if study["repetitions"] > 1 else ""
    note = (
        "Perplexity of held-out documents. DM: equal data, CM: equal compute. Avg is the paper's, the mean over "
        f"domains; the last column compares geometric means; ±: {intervals_are(study)}. * marks significant "
        f"differences. {over}Bold: the best of a column among the trained."
    )
    head = [*_domains(study), "Avg", "Geo. mean"]
    return _grouped("table-1", "Perplexity (BAM, Table 1)", study, head, compared, cells, note)


def bits(study: Numbers) -> Table:
    """The same in bits per byte, which do not depend on a tokenizer."""
    domains = study["domains"]

    def cells(model: Numbers) -> list[str]:
        rates, errors = model["bits_per_byte"], model["stderr"]
        values = [f"{rates[d]:.3f}" + (f" ±{errors[d]:.3f}" if errors[d] else "") for d in domains]
        return [*values, f"{sum(rates.values()) / len(domains):.3f}"]

    note = "Mean over repetitions; ± is the standard error over the documents, which all models have in common."
    return _grouped("bits-per-byte", "Bits per byte", study, _domains(study), ["Mean"], cells, note)


def _grouped(
    name: str,
    title: str,
    study: Numbers,
    head: list[str],
    more: list[str],
    cells: Callable[[Numbers], list[str]],
    note: str,
) -> Table:
    """All models in groups; in the columns of ``head``, the best of the trained ones is bold."""
    rows: list[list[str]] = []
    trained: list[int] = []
    for group, heading in GROUPS.items():
        of_group = [model for model in study["models"] if model["group"] == group]
        rows += [[heading]] if of_group else []
        for model in of_group:
            trained += [len(rows)] if group in ("methods", "ablations") else []
            rows.append([marked_label(study, model), *cells(model)])

    def number(row: int, column: int) -> float:
        return float(rows[row][column].split(" ")[0].replace(",", ""))

    columns = range(1, 1 + len(head)) if trained else []
    bold = {(min(trained, key=lambda row: number(row, column)), column) for column in columns}
    return Table(["", *head, *more], rows, name, title, note, bold)


def _domains(study: Numbers) -> list[str]:
    return [domain.capitalize() for domain in study["domains"]]


def _perplexities(model: Numbers) -> list[str]:
    values = [*model["perplexity"].values(), model["average"], model["geometric_mean"]]
    return [f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" for value in values]


def _difference(study: Numbers, model: Numbers) -> str:
    row = study["comparisons"].get(model["title"])
    return percent(row["log_perplexity"], significant=row["significant"]) if row else ""


def percent(interval: Numbers, *, significant: bool) -> str:
    """A difference of logarithms as per cent of perplexity."""
    half = interval["half_width"]
    relative = math.expm1(interval["value"])
    text = f"{100 * relative:+.1f}" + (f" ±{100 * half * (1 + relative):.1f}" if half is not None else "")
    return f"{text} %{' *' if significant else ''}"


def _label(study: Numbers, title: str) -> str:
    return str(next(model["label"] for model in study["models"] if model["title"] == title))


def before_training(study: Numbers) -> Table:
    """What gates are worth that know the domain, guess it from text, or know nothing."""
    models = {model["title"]: model for model in study["models"]}
    rows = []
    for row in sorted(study["before_training"], key=lambda row: -models[row["title"]]["geometric_mean"]):
        model, soup = models[row["title"]], row["soup"]
        perplexities = [*model["perplexity"].values(), model["geometric_mean"]]
        beside = percent(soup["log_perplexity"], significant=soup["significant"]) if soup else ""
        closed = f"{100 * row['closed']:.0f} %" if row["closed"] is not None else ""
        rows.append([merge_label(model), *(f"{value:,.2f}" for value in perplexities), beside, closed])
    note = (
        "From the worst to the best; nothing here was trained after the merge. Forced gates send every token to the "
        "best expert of its domain, and are the bound for any gates of the same merge. The last column: how much of "
        "the way from the soup to forced gates, in log perplexity, a mixture's own gates go."
    )
    head = ["", *_domains(study), "Geo. mean", "against the soup", "of the gap to forced gates"]
    return Table(head, rows, "before-training", "Before training", note)


def distances(study: Numbers) -> Table:
    """What attention experts are worth grows with how far attention went."""
    rows = []
    for model in study["models"]:
        trained = [r["training"] for r in model["repetitions"] if r["training"] and "from_seed" in r["training"]]
        if trained:
            parts = ([run["from_seed"][p] for run in trained if p in run["from_seed"]] for p in ("attention", "ffn"))
            shown = (f"{100 * mean(values):.1f} %" if values else "" for values in parts)
            rows.append([marked_label(study, model), *shown])
    note = (
        "Norm of the difference between the expert's weights and the seed's, over the norm of the seed's. What experts "
        "of a part are worth, beside its average, grows with it."
    )
    return Table(["", "attention", "FFN"], rows, "distances", "How far the experts went from the seed", note)


def directions(study: Numbers) -> Table:
    """The paper's order, row by row."""
    head = ["claim", "from", "difference", "repetitions", "here"]
    rows = [[row["claim"], row["table"], *_verdict(row)] for row in study["claims"]]
    note = (
        "Difference of perplexity, geometric mean over domains: negative is the paper's direction. * marks significant "
        "differences. Table 6 is compute-matched."
    )
    return Table(head, rows, "directions", "Was the paper's order reproduced?", note)


def variants(study: Numbers) -> Table:
    """What one change does, also where the paper leaves it open."""
    head = ["method", "what it is", "beside", "difference", "repetitions", "here"]
    what = {model["title"]: model["what"] for model in study["models"]}
    rows = [
        [_label(study, row["title"]), what[row["title"]], _label(study, row["other"]), *_verdict(row)]
        for row in study["variants"]
    ]
    note = (
        "Difference of perplexity, geometric mean over domains: negative is better than the method beside it, at the "
        "same budget. * marks significant differences."
    )
    return Table(head, rows, "variants", "What does one change do?", note)


def _verdict(row: Numbers) -> list[str]:
    interval = {"value": math.log1p(row["relative"]), "half_width": row["half_width"]}
    return [percent(interval, significant=row["significant"]), str(row["n"]), row["verdict"]]


SELECTIONS = (
    (
        "table-4",
        "As many parameters in all (BAM, Table 4)",
        "Further FFN experts of BTX are copies of the seed, top-1. In the paper they make it worse.",
        "btx-total-match",
        (("bam-expert-kv", "dm"), ("btx", "dm"), ("btx-total-match", "dm")),
    ),
    (
        "table-5",
        "As many parameters, in all and active (BAM, Table 5)",
        "BTX with copies of the seed and a larger top-k, as near to BAM's parameters as whole experts allow.",
        "btx-active-match",
        (("bam-expert-kv", "dm"), ("btx-active-match", "dm")),
    ),
    (
        "table-6",
        "Attention routing (BAM, Table 6)",
        "Shared KV, compute-matched. All attention experts are computed whatever the top-k, so FLOPs are the same.",
        "bam-attention-top1",
        (("btx", "dm"), ("bam-shared-kv", "cm"), ("bam-attention-top2", "cm"), ("bam-attention-top1", "cm")),
    ),
)
"""Tables of the paper: name, title, note, the method that each needs, and its methods with their match."""


def selection(
    study: Numbers, name: str, title: str, note: str, needs: str, wanted: tuple[tuple[str, str], ...]
) -> Table | None:
    """Some methods with their sizes."""
    models = [
        model
        for preset, match in wanted
        for model in study["models"]
        if model["preset"] == preset and match in model["match"]
    ]
    if not any(model["preset"] == needs for model in models):
        return None
    rows = []
    for model in models:
        facts = model["facts"]
        sizes = [human_count(facts["parameters"]), human_count(facts["active_parameters"])]
        counts = [str(facts["experts"]), str(facts["top_k"])]
        rows.append([marked_label(study, model), *counts, *sizes, *_perplexities(model), _difference(study, model)])
    numbers = [*_domains(study), "Avg", "Geo. mean", "against the reference"]
    return Table(["", "experts", "top-k", "total", "active", *numbers], rows, name, title, note)

"""A study's tables in the form of BAM's Tables 1, 4, 5, 6, 7 and 10, with costs and budgets."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean

from branchmix.pages.numbers import human_count
from branchmix.pages.table import Table
from branchmix.study.comparisons import Numbers, all_flops
from branchmix.study.results import GROUPS
from branchmix.train.progress import duration


def tables(study: Numbers) -> list[Table]:
    """Those that there are numbers for."""
    made = [
        *(table(study) for table in (perplexities, bits, before_training, distances, directions, variants)),
        *(selection(study, *wanted) for wanted in SELECTIONS),
        *(table(study) for table in (inference_flops, components, latency, budgets, costs, text)),
    ]
    return [table for table in made if table is not None and table.rows]


# ---- What cells and sentences share ----


def marked_label(study: Numbers, model: Numbers) -> str:
    """A model's label, and how many repetitions of it are done if not all."""
    done = len(model["repetitions"])
    return model["label"] + (f" ({done} of {study['repetitions']} repetitions)" if done < study["repetitions"] else "")


def merge_label(model: Numbers) -> str:
    """The label of a merge without a word on its training."""
    return str(model["label"].removesuffix(", step 0"))


def intervals_are(study: Numbers) -> str:
    """What the ± of comparisons with the reference is: over repetitions where there are several."""
    kinds = {row["over"] for row in study["comparisons"].values()}
    students = "Student's 95 % interval over repetitions with other random seeds, paired by the order of the data"
    documents = "twice the standard error over held-out documents"
    if kinds == {"documents"}:
        return f"{documents}, of one repetition"
    return f"{students}; for rows of one repetition, {documents}" if "documents" in kinds else students


def percent(interval: Numbers, *, significant: bool) -> str:
    """A difference of logarithms as per cent of perplexity."""
    half = interval["half_width"]
    relative = math.expm1(interval["value"])
    text = f"{100 * relative:+.1f}" + (f" ±{100 * half * (1 + relative):.1f}" if half is not None else "")
    return f"{text} %{' *' if significant else ''}"


def _difference(row: Numbers | None) -> str:
    return percent(row["log_perplexity"], significant=row["significant"]) if row else ""


def _label(study: Numbers, title: str) -> str:
    return str(next(model["label"] for model in study["models"] if model["title"] == title))


def _domains(study: Numbers) -> list[str]:
    return [domain.capitalize() for domain in study["domains"]]


def _perplexities(model: Numbers) -> list[str]:
    values = [*model["perplexity"].values(), model["average"], model["geometric_mean"]]
    return [f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" for value in values]


def _counts(*numbers: int) -> list[str]:
    return [f"{number:,}" for number in numbers]


# ---- Scores ----


def perplexities(study: Numbers) -> Table:
    """Table 1, with baselines that the paper does not have, and which differences are significant."""
    reference = study["reference"]
    compared = [f"against {_label(study, reference)}"] if reference else []

    def cells(model: Numbers) -> list[str]:
        return [*_perplexities(model), *(_difference(study["comparisons"].get(model["title"])) for _ in compared)]

    over = "Geometric means over repetitions. " if study["repetitions"] > 1 else ""
    note = (
        "Perplexity of held-out documents. DM: equal data, CM: equal compute. Avg is the paper's, the mean over "
        f"domains; the last column compares geometric means; ±: {intervals_are(study)}. * marks significant "
        f"differences. {over}Bold: the best of a column among the trained."
    )
    head = [*_domains(study), "Avg", "Geo. mean"]
    rows, bold = _grouped(study, cells, len(head))
    return Table(["", *head, *compared], rows, "table-1", "Perplexity (BAM, Table 1)", note, bold)


def bits(study: Numbers) -> Table:
    """The same in bits per byte, which do not depend on a tokenizer."""
    domains = study["domains"]

    def cells(model: Numbers) -> list[str]:
        rates, errors = model["bits_per_byte"], model["stderr"]
        values = [f"{rates[d]:.3f}" + (f" ±{errors[d]:.3f}" if errors[d] else "") for d in domains]
        return [*values, f"{sum(rates.values()) / len(domains):.3f}"]

    note = "Mean over repetitions; ± is the standard error over the documents, which all models have in common."
    rows, bold = _grouped(study, cells, len(domains))
    return Table(["", *_domains(study), "Mean"], rows, "bits-per-byte", "Bits per byte", note, bold)


def _grouped(
    study: Numbers, cells: Callable[[Numbers], list[str]], num_columns: int
) -> tuple[list[list[str]], set[tuple[int, int]]]:
    """All models in groups, and the cells to print bold: in the first columns, the best of the trained ones."""
    rows, trained = list[list[str]](), list[int]()
    for group, heading in GROUPS.items():
        of_group = [model for model in study["models"] if model["group"] == group]
        rows += [[heading]] if of_group else []
        for model in of_group:
            trained += [len(rows)] if group in ("methods", "ablations") else []
            rows.append([marked_label(study, model), *cells(model)])

    def number(row: int, column: int) -> float:
        return float(rows[row][column].split(" ")[0].replace(",", ""))

    columns = range(1, 1 + num_columns) if trained else ()
    return rows, {(min(trained, key=lambda row: number(row, column)), column) for column in columns}


def before_training(study: Numbers) -> Table:
    """What gates are worth that know the domain, guess it from text, or know nothing."""
    models = {model["title"]: model for model in study["models"]}
    rows = []
    for row in sorted(study["before_training"], key=lambda row: -models[row["title"]]["geometric_mean"]):
        model = models[row["title"]]
        perplexities = [f"{value:,.2f}" for value in (*model["perplexity"].values(), model["geometric_mean"])]
        closed = f"{100 * row['closed']:.0f} %" if row["closed"] is not None else ""
        rows.append([merge_label(model), *perplexities, _difference(row["soup"]), closed])
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
            shown = (f"{100 * fmean(values):.1f} %" if values else "" for values in parts)
            rows.append([marked_label(study, model), *shown])
    note = (
        "Norm of the difference between the expert's weights and the seed's, over the norm of the seed's. What experts "
        "of a part are worth, beside its average, grows with it."
    )
    return Table(["", "attention", "FFN"], rows, "distances", "How far the experts went from the seed", note)


def directions(study: Numbers) -> Table:
    """The paper's order, row by row."""
    rows = [[row["claim"], row["table"], *_verdict(row)] for row in study["claims"]]
    note = (
        "Difference of perplexity, geometric mean over domains: negative is the paper's direction. * marks significant "
        "differences. Table 6 is compute-matched."
    )
    return Table(["claim", "from", *_VERDICT], rows, "directions", "Was the paper's order reproduced?", note)


def variants(study: Numbers) -> Table:
    """What one change does, also where the paper leaves it open."""
    what = {model["title"]: model["what"] for model in study["models"]}
    rows = [
        [_label(study, row["title"]), what[row["title"]], _label(study, row["other"]), *_verdict(row)]
        for row in study["variants"]
    ]
    note = (
        "Difference of perplexity, geometric mean over domains: negative is better than the method beside it, at the "
        "same budget. * marks significant differences."
    )
    return Table(["method", "what it is", "beside", *_VERDICT], rows, "variants", "What does one change do?", note)


_VERDICT = ("difference", "repetitions", "here")


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
        "Shared KV, compute-matched: each row is trained for the reference's FLOPs.",
        "bam-attention-top1",
        (("btx", "dm"), ("bam-shared-kv", "cm"), ("bam-attention-top2", "cm"), ("bam-attention-top1", "cm")),
    ),
)
"""Tables of the paper: name, title, note, the method that each needs, and its methods with their match."""


def selection(
    study: Numbers, name: str, title: str, note: str, needs: str, wanted: tuple[tuple[str, str], ...]
) -> Table | None:
    """Some methods with their sizes."""
    models = [m for preset, match in wanted for m in study["models"] if m["preset"] == preset and match in m["match"]]
    if not any(model["preset"] == needs for model in models):
        return None
    rows = []
    for model in models:
        beside = _difference(study["comparisons"].get(model["title"]))
        experts = _counts(model["facts"]["experts"], model["facts"]["top_k"])
        rows.append([marked_label(study, model), *experts, *_sizes(model), *_perplexities(model), beside])
    numbers = [*_domains(study), "Avg", "Geo. mean", "against the reference"]
    return Table(["", "experts", "top-k", "total", "active", *numbers], rows, name, title, note)


# ---- Costs ----


def _sizes(model: Numbers) -> list[str]:
    return [human_count(model["facts"]["parameters"]), human_count(model["facts"]["active_parameters"])]


def _shapes(study: Numbers) -> list[Numbers]:
    """One model of each shape: the seed and all merges."""
    return [m for m in study["models"] if m["role"] in ("seed", "merge", "step 0")]


def inference_flops(study: Numbers) -> Table:
    """Table 7."""
    head = ["", "experts", "top-k", "total", "active", "attention", "FFN", "layer", "whole model"]
    rows = []
    for model in _shapes(study):
        facts, flops = model["facts"], model["facts"]["layer_flops"]
        sizes = [facts[key] for key in ("experts", "top_k", "parameters", "active_parameters")]
        parts = [*(flops[key] for key in ("attention", "ffn", "total")), facts["forward_flops_per_token"]]
        rows.append([merge_label(model), *_counts(*sizes, *parts)])
    note = (
        f"Forward FLOPs of a token in one layer, context {study['settings']['sequence_length']}, by the formulas of "
        "the paper's Table 10; whole model: all layers and the output layer."
    )
    return Table(head, rows, "table-7", "FLOPs of a token (BAM, Table 7)", note)


def components(study: Numbers) -> Table:
    """Table 10, with numbers for its letters."""
    parts = {"attention_router": "attention router", "qkv": "q, k, v", "context": "mask", "output": "out"}
    parts |= {"ffn_router": "FFN router", "ffn": "FFN"}
    rows = []
    for model in _shapes(study):
        for what in ("parameters", "FLOPs"):
            numbers = model["facts"][f"layer_{what.lower()}"]
            cells = [f"{numbers[part]:,}" if part in numbers else "" for part in parts]
            rows.append([f"{merge_label(model)}, {what}", *cells])
    note = "Of one layer; FLOPs of one token, forward."
    return Table(["", *parts.values()], rows, "table-10", "Parts of a layer (BAM, Table 10)", note)


def latency(study: Numbers) -> Table | None:
    """Section 7.3."""
    record = study["inference"]
    if record is None:
        return None
    measured = record["inference"]
    labels = {model["method"]: merge_label(model) for model in _shapes(study) if model["method"]}
    rows = []
    for name, row in measured["models"].items():
        times = [f"{fmean(row['seconds']):.4f}", f"{min(row['seconds']):.4f} to {max(row['seconds']):.4f}"]
        rows.append([labels.get(name, name.capitalize()), *times, f"{row['kv_cache_bytes']:,}"])
    note = (
        f"{measured['new_tokens']} new tokens after a prompt of {measured['prompt']}, mean of {measured['runs']} runs "
        f"in turn; {measured['dtype']}, {measured['threads']} threads of {record['machine']['cpu']}. The merges before "
        "training."
    )
    head = ["", "seconds", "of the runs", "KV cache, bytes"]
    return Table(head, rows, "inference", "Latency and memory of generation (BAM, section 7.3)", note)


def budgets(study: Numbers) -> Table:
    """Whether equal data and equal compute were kept."""
    of = "of the reference's"
    head = ["", "tokens", of, "training FLOPs", of, "time, of the reference's", "kept"]
    rows = []
    for row in study["budgets"]:
        kept = ", ".join(f"{match.upper()} {'yes' if ok else 'NO'}" for match, ok in row["kept"].items())
        data = [f"{row['tokens']:,}", f"{row['tokens_share']:.4f}"]
        compute = [f"{row['flops']:.6g}", f"{row['flops_share']:.4f}"]
        time = f"{row['seconds_share']:.2f}" if row["seconds_share"] is not None else ""
        rows.append([row["label"], *data, *compute, time, kept or "the reference"])
    note = (
        "As the runs recorded them. FLOPs of forward, backward and optimizer; equal compute means as many whole steps "
        "as the reference's FLOPs pay for, or the same steps where that makes less than 0.5 %. Times are of wall, "
        "while other runs worked beside, and no measure of anything else."
    )
    return Table(head, rows, "budgets", "Were budgets kept?", note)


def costs(study: Numbers) -> Table:
    """What everything took."""
    sizes = ["parameters", "active", "KV bytes a token"]
    head = ["", *sizes, "tokens", "forward and backward", "AdamW", "sunk before", "all FLOPs", "time"]
    rows = []
    for model in study["models"]:
        if model["tokens"] or model["role"] == "merge":
            sunk = model["sunk_flops"]
            counts = _counts(model["facts"]["kv_cache_bytes_per_token"], model["tokens"])
            flops = [f"{model['flops']:.4g}", f"{model['optimizer_flops']:.3g}", f"{sunk:.4g}"]
            whole = [f"{all_flops(model) + sunk:.4g}", duration(model["seconds"]) if model["seconds"] else ""]
            rows.append([marked_label(study, model), *_sizes(model), *counts, *flops, *whole])
    note = (
        "FLOPs of one repetition. Sunk: the dense models that it was made from. Time: of wall, mean over repetitions, "
        "while other steps worked beside."
    )
    return Table(head, rows, "costs", "Costs", note)


def text(study: Numbers) -> Table:
    """The domains."""
    head = ["", "documents", "tokens", "held out", "of these measured", "most passes of a run"]
    rows = []
    for domain, row in study["text"].items():
        measured = study["held_out_documents"].get(domain, 0)
        counts = _counts(row["documents"], row["tokens"], row["held_out_documents"], measured)
        rows.append([domain, *counts, f"{row['most_epochs']:.1f}"])
    note = (
        "Whole documents are held out, the same ones from every run. A domain that a run passed more than four times "
        "was too small for it."
    )
    return Table(head, rows, "text", "The text", note)

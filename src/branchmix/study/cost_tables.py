"""What models of a study cost: BAM's Tables 7 and 10, latency, budgets, times, text."""

from __future__ import annotations

from branchmix.pages.numbers import human_count
from branchmix.pages.table import Table
from branchmix.study.labels import Numbers, marked_label, merge_label
from branchmix.train.progress import duration


def _kinds(study: Numbers) -> list[Numbers]:
    """One model of each shape: the seed and all merges."""
    return [m for m in study["models"] if m["role"] in ("seed", "merge", "step 0")]


def inference_flops(study: Numbers) -> Table:
    """Table 7."""
    head = ["", "experts", "top-k", "total", "active", "attention", "FFN", "layer", "whole model"]
    rows = []
    for model in _kinds(study):
        facts, flops = model["facts"], model["facts"]["layer_flops"]
        counts = [facts["parameters"], facts["active_parameters"], *(flops[p] for p in ("attention", "ffn", "total"))]
        numbers = [*counts, facts["forward_flops_per_token"]]
        experts = [str(facts["experts"]), str(facts["top_k"])]
        rows.append([merge_label(model), *experts, *(f"{number:,}" for number in numbers)])
    note = (
        f"Forward FLOPs of a token in one layer, context {study['settings']['sequence_length']}, by the formulas of "
        "the paper's Table 10; whole model: all layers and the output layer."
    )
    return Table(head, rows, "table-7", "FLOPs of a token (BAM, Table 7)", note)


def components(study: Numbers) -> Table:
    """Table 10, with numbers for its letters."""
    parts = {
        "attention_router": "attention router",
        "qkv": "q, k, v",
        "context": "mask",
        "output": "out",
        "ffn_router": "FFN router",
        "ffn": "FFN",
    }
    rows = []
    for model in _kinds(study):
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
    labels = {model["method"]: merge_label(model) for model in _kinds(study) if model["method"]}
    rows = []
    for name, row in measured["models"].items():
        seconds = sorted(row["seconds"])
        times = [f"{sum(seconds) / len(seconds):.4f}", f"{seconds[0]:.4f} to {seconds[-1]:.4f}"]
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
        if not model["tokens"] and model["role"] != "merge":
            continue
        facts, sunk = model["facts"], model["sunk_flops"]
        rows.append(
            [
                marked_label(study, model),
                *(human_count(facts["parameters"]), human_count(facts["active_parameters"])),
                *(f"{facts['kv_cache_bytes_per_token']:,}", f"{model['tokens']:,}"),
                *(f"{model['flops']:.4g}", f"{model['optimizer_flops']:.3g}", f"{sunk:.4g}"),
                f"{model['flops'] + model['optimizer_flops'] + sunk:.4g}",
                duration(model["seconds"]) if model["seconds"] else "",
            ]
        )
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
        counts = [row["documents"], row["tokens"], row["held_out_documents"], measured]
        rows.append([domain, *(f"{count:,}" for count in counts), f"{row['most_epochs']:.1f}"])
    note = (
        "Whole documents are held out, the same ones from every run. A domain that a run passed more than four times "
        "was too small for it."
    )
    return Table(head, rows, "text", "The text", note)

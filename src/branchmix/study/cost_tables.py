"""What models of a study cost: BAM's Tables 7 and 10, latency, budgets, times, text."""

from __future__ import annotations

from branchmix.pages.numbers import human_count
from branchmix.pages.table import Table
from branchmix.study.labels import Numbers, marked_label
from branchmix.train.progress import duration


def _kinds(found: Numbers) -> list[Numbers]:
    """One model of each shape: the seed and all merges."""
    return [m for m in found["models"] if m["role"] in ("seed", "merge", "step 0")]


def inference_flops(found: Numbers) -> Table:
    """Table 7."""
    rows = []
    for model in _kinds(found):
        facts, flops = model["facts"], model["facts"]["layer_flops"]
        rows.append(
            [
                model["label"].removesuffix(", step 0"),
                *(f"{facts['experts']}", f"{facts['top_k']}"),
                *(f"{facts['parameters']:,}", f"{facts['active_parameters']:,}"),
                *(f"{flops['attention']:,}", f"{flops['ffn']:,}", f"{flops['total']:,}"),
                f"{facts['forward_flops_per_token']:,}",
            ]
        )
    context = found["settings"]["sequence_length"]
    head = ["", "experts", "top-k", "total", "active", "attention", "FFN", "layer", "whole model"]
    note = (
        f"Forward FLOPs of a token in one layer, context {context}, by the formulas of the paper's Table 10; whole "
        "model: all layers and the output layer."
    )
    return Table(head, rows, "table-7", "FLOPs of a token (BAM, Table 7)", note)


def components(found: Numbers) -> Table:
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
    for model in _kinds(found):
        flops, sizes = model["facts"]["layer_flops"], model["facts"]["layer_parameters"]
        label = model["label"].removesuffix(", step 0")
        rows.append([f"{label}, parameters", *(f"{sizes[part]:,}" if part in sizes else "" for part in parts)])
        rows.append([f"{label}, FLOPs", *(f"{flops[part]:,}" for part in parts)])
    note = "Of one layer; FLOPs of one token, forward."
    return Table(["", *parts.values()], rows, "table-10", "Parts of a layer (BAM, Table 10)", note)


def latency(found: Numbers) -> Table | None:
    """Section 7.3."""
    record = found["inference"]
    if record is None:
        return None
    measured = record["inference"]
    labels = {model["method"]: model["label"].removesuffix(", step 0") for model in _kinds(found) if model["method"]}
    rows = []
    for name, row in measured["models"].items():
        seconds = sorted(row["seconds"])
        mean = sum(seconds) / len(seconds)
        rows.append(
            [
                labels.get(name, name.capitalize()),
                f"{mean:.4f}",
                f"{seconds[0]:.4f} to {seconds[-1]:.4f}",
                f"{row['kv_cache_bytes']:,}",
            ]
        )
    note = (
        f"{measured['new_tokens']} new tokens after a prompt of {measured['prompt']}, mean of {measured['runs']} runs "
        f"in turn; {measured['dtype']}, {measured['threads']} threads of {record['machine']['cpu']}. The merges before "
        "training."
    )
    head = ["", "seconds", "of the runs", "KV cache, bytes"]
    return Table(head, rows, "inference", "Latency and memory of generation (BAM, section 7.3)", note)


def budgets(found: Numbers) -> Table:
    """Whether equal data and equal compute were kept."""
    rows = []
    for row in found["budgets"]:
        kept = (
            ", ".join(f"{match.upper()} {'yes' if ok else 'NO'}" for match, ok in row["kept"].items())
            or "the reference"
        )
        share = f"{row['seconds_share']:.2f}" if row["seconds_share"] is not None else ""
        rows.append(
            [
                row["label"],
                f"{row['tokens']:,}",
                f"{row['tokens_share']:.4f}",
                f"{row['flops']:.6g}",
                f"{row['flops_share']:.4f}",
                share,
                kept,
            ]
        )
    head = [
        "",
        "tokens",
        "of the reference's",
        "training FLOPs",
        "of the reference's",
        "time, of the reference's",
        "kept",
    ]
    note = (
        "As the runs recorded them. FLOPs of forward, backward and optimizer; equal compute means as many whole steps "
        "as the reference's FLOPs pay for, or the same steps where that makes less than 0.5 %. Times are of wall, "
        "while other runs worked beside, and no measure of anything else."
    )
    return Table(head, rows, "budgets", "Were budgets kept?", note)


def costs(found: Numbers) -> Table:
    """What everything took."""
    rows = []
    for model in found["models"]:
        if not model["tokens"] and model["role"] != "merge":
            continue
        own = model["flops"] + model["optimizer_flops"]
        facts = model["facts"]
        rows.append(
            [
                marked_label(found, model),
                *(
                    human_count(facts["parameters"]),
                    human_count(facts["active_parameters"]),
                    f"{facts['kv_cache_bytes_per_token']:,}",
                ),
                *(f"{model['tokens']:,}", f"{model['flops']:.4g}", f"{model['optimizer_flops']:.3g}"),
                *(
                    f"{model['sunk_flops']:.4g}",
                    f"{own + model['sunk_flops']:.4g}",
                    duration(model["seconds"]) if model["seconds"] else "",
                ),
            ]
        )
    head = [
        "",
        "parameters",
        "active",
        "KV bytes a token",
        "tokens",
        "forward and backward",
        "AdamW",
        "sunk before",
        "all FLOPs",
        "time",
    ]
    note = (
        "FLOPs of one repetition. Sunk: the dense models that it was made from. Time: of wall, mean over repetitions, "
        "while other steps worked beside."
    )
    return Table(head, rows, "costs", "Costs", note)


def text(found: Numbers) -> Table:
    """The domains."""
    rows = [
        [
            domain,
            f"{row['documents']:,}",
            f"{row['tokens']:,}",
            f"{row['held_out_documents']:,}",
            f"{found['held_out_documents'].get(domain, 0):,}",
            f"{row['most_epochs']:.1f}",
        ]
        for domain, row in found["text"].items()
    ]
    head = ["", "documents", "tokens", "held out", "of these measured", "most passes of a run"]
    note = (
        "Whole documents are held out, the same ones from every run. A domain that a run passed more than four times "
        "was too small for it."
    )
    return Table(head, rows, "text", "The text", note)

"""A study's tables in the form of BAM's Tables 1, 4, 5, 6, 7 and 10, with costs and budgets; as HTML, Markdown, LaTeX
and CSV from one description.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from branchmix.study.results import GROUPS
from branchmix.train.progress import duration

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Text cells; a row of one cell is a heading over those below it."""

    name: str
    """Of its file."""
    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""
    bold: set[tuple[int, int]] = field(default_factory=set)
    """Row and column of cells that stand out."""

    def html(self) -> str:
        """For a page, without its title."""
        lines = []
        for number, row in enumerate(self.rows):
            if len(row) == 1:
                lines.append(
                    f'<tr class="group"><th colspan="{len(self.head)}" scope="rowgroup">{escape(row[0])}</th></tr>'
                )
                continue
            cells = [f"<b>{escape(c)}</b>" if (number, n) in self.bold else escape(c) for n, c in enumerate(row)]
            lines.append(f'<tr><th scope="row">{cells[0]}</th>{"".join(f"<td>{cell}</td>" for cell in cells[1:])}</tr>')
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in self.head)
        note = f'<p class="note">{escape(self.note)}</p>' if self.note else ""
        body = "".join(lines)
        return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}'

    def markdown(self) -> str:
        """With its title."""
        rows = [
            [f"**{row[0]}**", *[""] * (len(self.head) - 1)] if len(row) == 1 else self._marked(n, row, "**{}**")
            for n, row in enumerate(self.rows)
        ]
        lines = [
            f"### {self.title}",
            "",
            _pipes(self.head),
            _pipes(["---", *["---:"] * (len(self.head) - 1)]),
            *map(_pipes, rows),
        ]
        return "\n".join([*lines, *(["", self.note] if self.note else []), ""])

    def latex(self) -> str:
        """A ``table`` of the package booktabs."""
        columns = "l" + "r" * (len(self.head) - 1)
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_tex(self.title)}}}", rf"\label{{tab:{self.name}}}"]
        lines += [
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(map(_tex, self.head)) + r" \\",
            r"\midrule",
        ]
        for number, row in enumerate(self.rows):
            if len(row) == 1:
                lines.append(rf"\multicolumn{{{len(self.head)}}}{{l}}{{\emph{{{_tex(row[0])}}}}} \\")
            else:
                cells = [rf"\textbf{{{_tex(c)}}}" if (number, n) in self.bold else _tex(c) for n, c in enumerate(row)]
                lines.append(" & ".join(cells) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
        if self.note:
            lines.append(rf"\\[2pt]{{\footnotesize {_tex(self.note)}}}")
        return "\n".join([*lines, r"\end{table}", ""])

    def csv(self) -> str:
        """Cells alone."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(self.head)
        writer.writerows(self.rows)
        return file.getvalue()

    def _marked(self, number: int, row: list[str], mark: str) -> list[str]:
        return [mark.format(cell) if (number, n) in self.bold and cell else cell for n, cell in enumerate(row)]


def _pipes(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


_TEX = {"\\": r"\textbackslash{}", "±": r"$\pm$"} | {c: rf"\{c}" for c in "&%$#_{}"}
_TEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(char, char) for char in text)


def tables(found: Numbers) -> list[Table]:
    """Those that there are numbers for."""
    made = [
        *(perplexities(found), bits(found), directions(found)),
        *(total_match(found), active_match(found), attention_routing(found)),
        *(inference_flops(found), components(found), latency(found)),
        *(budgets(found), costs(found), text(found)),
    ]
    return [table for table in made if table is not None and table.rows]


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


def perplexities(found: Numbers) -> Table:
    """Table 1, with baselines that the paper does not have, and what can be told apart."""
    domains = found["domains"]
    compared = f"against {_label(found, found['reference'])}" if found["reference"] else ""
    head = ["", *map(str.capitalize, domains), "Avg", "Geo. mean", *([compared] if compared else [])]

    def cells(model: Numbers) -> list[str]:
        numbers = [*model["perplexity"].values(), model["average"], model["geometric_mean"]]
        return [*map(_perplexity, numbers), *([_difference(found, model)] if compared else [])]

    over = (
        "Student's 95 % interval over repetitions, paired by data order"
        if found["repetitions"] > 1
        else "twice the standard error over held-out documents, one repetition"
    )
    note = (
        "Perplexity of held-out documents. DM: equal data, CM: equal compute. Avg is the paper's, the mean over "
        f"domains; the last column compares geometric means; ±: {over}. * marks what the interval tells apart. "
        f"{_repetitions(found)}Bold: the best of a column among the trained."
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
            rows.append([_marked_label(found, model), *cells(model)])
    trained = [row for row, model in places.items() if model["group"] in ("methods", "ablations")]
    bold = set()
    for column in range(1, 1 + columns):
        if trained:
            bold.add((min(trained, key=lambda row: float(rows[row][column].split(" ")[0].replace(",", ""))), column))
    return Table(name, title, head, rows, note, bold)


def _marked_label(found: Numbers, model: Numbers) -> str:
    done = len(model["repetitions"])
    return model["label"] + (f" ({done} of {found['repetitions']} repetitions)" if done < found["repetitions"] else "")


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
    return f"Geometric means over {count} repetitions. " if count > 1 else ""


def _label(found: Numbers, title: str | None) -> str:
    return str(next(model["label"] for model in found["models"] if model["title"] == title))


def directions(found: Numbers) -> Table | None:
    """The paper's order, row by row."""
    rows = []
    for claim in found["claims"]:
        interval = {"value": math.log1p(claim["relative"]), "half_width": claim["half_width"]}
        rows.append(
            [
                claim["claim"],
                claim["table"],
                percent(interval, significant=claim["significant"]),
                str(claim["n"]),
                claim["verdict"],
            ]
        )
    note = (
        "Difference of perplexity, geometric mean over domains: negative is the paper's direction. * marks what the "
        "interval tells apart. Table 6 is compute-matched."
    )
    return Table(
        "directions",
        "Was the paper's order reproduced?",
        ["claim", "from", "difference", "repetitions", "here"],
        rows,
        note,
    )


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
            _millions(facts["parameters"]),
            _millions(facts["active_parameters"]),
        ]
        rows.append([_marked_label(found, model), *sizes, *map(_perplexity, numbers), _difference(found, model)])
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
    return Table(name, title, head, rows, note)


# ---------------------------------------------------------------------------------------------------------------------
# Costs
# ---------------------------------------------------------------------------------------------------------------------


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
    return Table("table-7", "FLOPs of a token (BAM, Table 7)", head, rows, note)


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
    return Table(
        "table-10",
        "Parts of a layer (BAM, Table 10)",
        ["", *parts.values()],
        rows,
        "Of one layer; FLOPs of one token, forward.",
    )


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
    return Table(
        "inference",
        "Latency and memory of generation (BAM, section 7.3)",
        ["", "seconds", "of the runs", "KV cache, bytes"],
        rows,
        note,
    )


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
    return Table("budgets", "Were budgets kept?", head, rows, note)


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
                _marked_label(found, model),
                *(
                    _millions(facts["parameters"]),
                    _millions(facts["active_parameters"]),
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
    return Table("costs", "Costs", head, rows, note)


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
    return Table("text", "The text", head, rows, note)


def _millions(count: float) -> str:
    return f"{count / 1e6:.4g}M"

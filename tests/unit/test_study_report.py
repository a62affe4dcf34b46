"""What a study says, from made-up results: labels, intervals, the paper's order, slopes, and tables as text."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_study_graph import settings

from branchmix.errors import DataError, OutputError
from branchmix.pages.table import Table
from branchmix.settings import parse
from branchmix.study.build import build
from branchmix.study.figures import curves, dots
from branchmix.study.folder import STUDY, write_plan, write_record
from branchmix.study.report import headline, report
from branchmix.study.results import collect
from branchmix.study.settings import StudyFile
from branchmix.study.tables import percent, tables

LEVELS = {
    "seed": 2.0,
    "btx": 0.0,
    "bam-expert-kv-dm": -0.10,
    "bam-expert-kv-cm": 0.05,
    "bam-shared-kv-dm": -0.04,
    "bam-shared-kv-cm": 0.02,
    "btx-top2-dm": -0.05,
    "bam-expert-kv-calibrated-step0": 0.2,
    "bam-expert-kv-forced": 0.1,
}
"""Log perplexity against BTX; everything else is 1 worse."""


def finished(folder: Path, *, wobble: float = 0.001, seeds: int = 3, **changes: Any) -> Path:
    """Results of a whole study: six documents in each domain, differences that wobble a little between repetitions."""
    methods = ["btx", "bam-expert-kv", "bam-shared-kv", "soup"]
    study = parse(StudyFile, settings(**{"methods": methods, "random_seeds": list(range(seeds)), **changes}), "study")
    graph = build(study)
    write_plan(study, graph, folder)
    for name, step in graph.steps.items():
        record: dict[str, Any] = {"step": name, **step.summary()}
        if step.kind == "train":
            points = [{"step": n, "tokens": n * 64, "flops": n * 1e6, "loss": 5 - n / 10} for n in (1, 2, 3)]
            domains = {
                domain: {"documents": 9, "tokens": 99, "held_out_documents": 6, "epochs": 1.5}
                for domain in study.domains
            }
            record["training"] = {
                "steps": step.cost.steps,
                "tokens": step.cost.tokens,
                "flops": step.cost.flops,
                "optimizer_flops": step.cost.optimizer,
                "seconds": 12.0,
                "curve": points,
                "text": domains,
            }
            record |= {"computing": {"precision": "bf16"}, "versions": {"torch": "2"}, "run": {}}
            record["machine"] = {"cpu": "A & B", "cores": 2, "threads": 1}
        elif step.kind == "upcycle":
            record["merge"] = {"recipe": step.recipe, "experts": [n for n in step.needs.members if n != "seed"]}
        elif step.kind in ("scores", "forced"):
            title, repetition = step.about.title, step.about.repetition
            level = 4.0 + repetition + LEVELS.get(title, 1.0) + (wobble * repetition if title != "btx" else 0.0)
            rows = [[round((level + number / 10) * 100, 6), 100, 300] for number in range(6)]
            record |= {"documents": dict.fromkeys(study.domains, rows), "routing": None}
        else:
            continue
        write_record(folder / "results" / f"{name}.json", record)
    return folder


def test_models_comparisons_and_the_papers_order(tmp_path: Path) -> None:
    found = collect(finished(tmp_path))
    models = {model["title"]: model for model in found["models"]}
    assert models["seed"]["geometric_mean"] == pytest.approx(math.exp(4 + 0.25 + 2 + 1 + 0.001))
    labels = [model["label"] for model in found["models"]]
    assert labels[:2] == ["Seed", "Code expert"] and "BAM DM Expert KV" in labels and "BAM CM Shared KV" in labels
    compared = found["comparisons"]["bam-expert-kv-dm"]
    assert compared["log_perplexity"]["value"] == pytest.approx(-0.1 + 0.001)
    assert compared["log_perplexity"]["half_width"] == pytest.approx(4.302653 * 0.001 / math.sqrt(3), rel=1e-4)
    assert compared["significant"] and compared["over"] == "repetitions"
    claims = {claim["claim"]: claim for claim in found["claims"]}
    assert [claim["reproduced"] for claim in claims.values()] == [True, True, True, False, False, False, True]
    assert claims["BAM Expert KV better than BTX, equal compute"]["verdict"] == "opposite direction"
    assert all(all(row["kept"].values()) for row in found["budgets"])


def test_the_slope_between_two_budgets(tmp_path: Path) -> None:
    """Perplexity falls by 0.15 in logarithm from the tokens of equal compute to those of equal data."""
    found = collect(finished(tmp_path))
    models = {model["title"]: model for model in found["models"]}
    row = next(row for row in found["slopes"] if row["method"] == "bam-expert-kv")
    tokens = models["bam-expert-kv-dm"]["tokens"] / models["bam-expert-kv-cm"]["tokens"]
    assert row["slope"]["value"] == pytest.approx(0.15 / math.log(tokens))
    assert row["pays_below"] == pytest.approx(0.099 / math.log(row["flops_ratio"]))
    text = " ".join(headline(found))
    assert "At equal data: BAM DM Expert KV is better than BTX (-9.4 ±0.2 %)" in text
    assert "At equal compute: BAM CM Expert KV is worse than BTX (+5.2 ±0.3 %)" in text
    assert f"would pay for them where it falls more slowly than tokens^-{row['pays_below']:.2f}" in text
    assert "Of 7 findings of the paper that were tried, 4 came out in the same direction, 4 of them" in text


def test_mixtures_beside_a_dense_model(tmp_path: Path) -> None:
    methods = ["btx", "bam-expert-kv", "dense"]
    found = collect(finished(tmp_path / "clear", methods=methods))
    for match, title in (("dm", "bam-expert-kv-dm"), ("cm", "bam-expert-kv-cm")):
        row = found["against_dense"][match][title]
        assert row["log_perplexity"]["value"] == pytest.approx(LEVELS[title] - 1.0)
        assert row["dense"].startswith("dense-") and "btx" in found["against_dense"][match]
    lines = [line for line in headline(found) if "a dense model of equal" in line]
    assert len(lines) == 2 and "BAM CM Expert KV is better than the dense model (-61.3" in lines[1]
    noisy = collect(finished(tmp_path / "noisy", methods=methods, wobble=1.0))
    assert "BTX and the dense model are statistically indistinguishable" in " ".join(headline(noisy))
    without = collect(finished(tmp_path / "without"))
    assert without["against_dense"] == {} and "dense model" not in " ".join(headline(without))


def test_what_merging_alone_gives(tmp_path: Path) -> None:
    """The soup and a mixture with random gates at 1, fitted gates at 0.2, forced ones at 0.1: 8/9 of the way."""
    methods = ["btx", "bam-expert-kv", "soup", "bam-expert-kv-forced", "bam-expert-kv-calibrated"]
    found = collect(finished(tmp_path / "all", methods=methods))
    rows = {row["title"]: row for row in found["before_training"]}
    assert set(rows) == {
        "soup",
        "btx-step0",
        *(f"bam-expert-kv{n}" for n in ("-step0", "-forced", "-calibrated-step0")),
    }
    closed = {title: row["closed"] for title, row in rows.items()}
    assert closed.pop("bam-expert-kv-calibrated-step0") == pytest.approx(0.8 / 0.9)
    assert closed.pop("bam-expert-kv-step0") == pytest.approx(0.0)
    assert not any(closed.values()), "BTX has no forced gates here"
    table = next(table for table in tables(found) if table.name == "before-training")
    assert [row[0] for row in table.rows][-2:] == ["BAM Expert KV calibrated", "BAM Expert KV, forced gates"]
    assert table.rows[-2][-2:] == ["-55.1 ±0.0 % *", "89 %"]
    expected = "BAM Expert KV calibrated is better than the soup (-55.1 ±0.0 %): 89 % of what forced gates gain."
    assert headline(found)[0] == f"Before any training, {expected}"
    (tmp_path / "all" / "results" / "r2.scores.bam-expert-kv-forced.json").unlink()
    half_done = {row["closed"] for row in collect(tmp_path / "all")["before_training"]}
    assert half_done == {None}, "shares of other repetitions' gap"
    without = collect(finished(tmp_path / "random", methods=methods[:3]))
    assert without["before_training"] == [] and not headline(without)[0].startswith("Before")
    no_soup = collect(finished(tmp_path / "no soup", methods=[methods[0], *methods[3:]]))
    assert {row["closed"] for row in no_soup["before_training"]} == {None}
    assert not headline(no_soup)[0].startswith("Before")


def test_only_merges_of_the_same_weights_are_measured_by_their_forced_gates(tmp_path: Path) -> None:
    own = [
        {"method": "bam-expert-kv-calibrated", "name": name, "recipe": recipe}
        for name, recipe in (("others", {"merge": {"method": "seed"}}), ("tokens", {"gates": {"token_only": True}}))
    ]
    same = ["bam-expert-kv", "bam-no-balance", "bam-no-z-loss", "bam-unscaled", "bam-soft-ffn", "bam-shared-router"]
    methods = ["btx", "soup", "bam-expert-kv-forced", "btx-forced", *same, "bam-norm-folding", "bam-without-seed"]
    folder = finished(tmp_path, methods=[*methods, "btx-calibrated", "btx-total-match", "bam-shared-kv", *own], seeds=2)
    rows = {row["title"]: row["closed"] for row in collect(folder)["before_training"]}
    measured = {title.removesuffix("-step0") for title, closed in rows.items() if closed is not None}
    assert measured == {*same, "tokens"} and "btx-calibrated-step0" in rows, (
        "BTX's forced gates are no better than the soup here"
    )


def test_shares_are_of_the_same_repetitions(tmp_path: Path) -> None:
    methods = ["btx", "soup", "bam-expert-kv-forced", "bam-expert-kv-calibrated"]
    folder = finished(tmp_path, methods=methods, seeds=3)
    (folder / "results" / "r3.scores.bam-expert-kv-forced.json").unlink()
    calibrated = folder / "results" / "r2.scores.bam-expert-kv-calibrated-step0.json"
    record = calibrated.read_text()
    calibrated.unlink()  # as many repetitions, but others
    assert {row["closed"] for row in collect(folder)["before_training"]} == {None}
    calibrated.write_text(record)
    (folder / "results" / "r3.scores.bam-expert-kv-calibrated-step0.json").unlink()
    assert {row["closed"] for row in collect(folder)["before_training"]} != {None}
    (folder / "results" / "r1.upcycle.bam-expert-kv-forced.json").unlink()
    assert {row["closed"] for row in collect(folder)["before_training"]} == {None}, "of an unknown merge"


def test_the_headline_has_no_share_of_a_mixture_that_is_worse_than_the_soup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LEVELS, "bam-expert-kv-calibrated-step0", 1.2)
    methods = ["soup", "bam-expert-kv-forced", "bam-expert-kv-calibrated"]
    found = collect(finished(tmp_path, methods=methods, reference=methods[-1]))
    assert [row["closed"] for row in found["before_training"]] == [None, None, pytest.approx(-0.2 / 0.9)]
    expected = "Before any training, BAM Expert KV calibrated is worse than the soup (+22.1 ±0.0 %)."
    assert headline(found)[0] == expected


def test_noise_is_no_finding(tmp_path: Path) -> None:
    found = collect(finished(tmp_path, wobble=0.2))
    assert not found["comparisons"]["bam-expert-kv-dm"]["significant"]
    assert "BAM DM Expert KV and BTX are statistically indistinguishable" in " ".join(headline(found))


def test_a_changed_method_is_compared_with_what_it_varies_at_equal_budgets(tmp_path: Path) -> None:
    methods = ["btx", "bam-expert-kv"]
    ablations = [
        "btx-top2",
        {"method": "bam-without-seed", "match": ["cm"]},
        {"method": "bam-soft-ffn", "match": ["dm"]},
    ]
    found = collect(finished(tmp_path, methods=methods, ablations=ablations))
    rows = {(row["title"], row["other"]): row for row in found["variants"]}
    assert list(rows) == [
        ("btx-top2-dm", "btx"),
        ("btx-top2-cm", "btx"),
        ("bam-without-seed-cm", "bam-expert-kv-cm"),
        ("bam-soft-ffn-dm", "bam-expert-kv-dm"),
    ]
    row = rows["bam-soft-ffn-dm", "bam-expert-kv-dm"]
    assert math.log1p(row["relative"]) == pytest.approx(1.10) and row["verdict"] == "worse" and row["n"] == 3
    assert math.log1p(rows["bam-without-seed-cm", "bam-expert-kv-cm"]["relative"]) == pytest.approx(0.95)
    assert (rows["btx-top2-dm", "btx"]["verdict"], rows["btx-top2-cm", "btx"]["verdict"]) == ("better", "worse")
    text = next(table for table in tables(found) if table.name == "variants").markdown()
    assert "| BAM CM without seed | Expert KV of the specialists only | BAM CM Expert KV |" in text


def test_one_repetition_claims_no_small_difference(tmp_path: Path) -> None:
    found = collect(finished(tmp_path, seeds=1))
    assert found["comparisons"]["bam-expert-kv-dm"]["significant"]  # 10 %, and no error over documents
    assert not found["comparisons"]["bam-shared-kv-cm"]["significant"]  # 2 %, what a seed may do
    text = " ".join(headline(found))
    assert "± is twice the standard error over held-out documents, of one repetition." in text
    assert "with one repetition differences up to" in text and "Student" not in text


def test_rows_of_one_repetition_say_what_their_interval_is(tmp_path: Path) -> None:
    folder = finished(tmp_path, seeds=3)
    for repetition in (2, 3):
        (folder / "results" / f"r{repetition}.scores.bam-shared-kv-cm.json").unlink()
    found = collect(folder)
    over = {title: row["over"] for title, row in found["comparisons"].items()}
    assert over["bam-shared-kv-cm"] == "documents" and over["bam-expert-kv-dm"] == "repetitions"
    text = " ".join(headline(found))
    assert "order of the data; for rows of one repetition, twice the standard error over held-out documents." in text
    assert f"Of {list(over.values()).count('repetitions')} comparisons over repetitions one in twenty" in text


def test_costs_before_the_mixture_are_counted(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    models = {model["title"]: model for model in collect(folder)["models"]}
    plan = json.loads((folder / "plan.json").read_text())["steps"]
    cost = {name: step["cost"]["flops"] + step["cost"]["optimizer"] for name, step in plan.items()}
    dense = sum(cost[f"r1.train.{name}"] for name in ("seed", "code", "law", "math"))
    assert models["btx"]["sunk_flops"] == models["soup"]["sunk_flops"] == dense
    assert models["code"]["sunk_flops"] == cost["r1.train.seed"] and models["seed"]["sunk_flops"] == 0


def test_half_a_study_has_a_report(tmp_path: Path) -> None:
    folder = finished(tmp_path, seeds=2)
    for file in (folder / "results").glob("r2.*btx*.json"):
        file.unlink()
    for file in (folder / "results").glob("*shared-kv-cm.json"):
        file.unlink()
    found = report(folder, tmp_path / "report")
    assert "steps are done" in found.headline[-1]
    compared = found.numbers["comparisons"]["bam-expert-kv-dm"]
    assert compared["over"] == "documents"  # only the first repetition has both
    markdown = (tmp_path / "report" / "tables.md").read_text()
    assert "BTX (1 of 2 repetitions)" in markdown
    for file in (folder / "results").glob("*.json"):
        if file.name not in (STUDY, "r1.scores.seed.json"):
            file.unlink()
    assert "the reference has not been measured yet" in report(folder, tmp_path / "report").headline[0]


def test_trained_models_without_their_training_are_left_out(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    (folder / "results" / "r1.train.btx.json").unlink()
    assert collect(folder)["comparisons"]["bam-expert-kv-dm"]["log_perplexity"]["n"] == 2
    for file in (folder / "results").glob("*.train.*.json"):
        file.unlink()
    found = collect(folder)
    assert found["reference"] is None and "seed" in [model["title"] for model in found["models"]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda record: record.clear(), "has no 'key', so it is not a record of this step: remove it"),
        (lambda record: record.pop("routing"), "has no 'routing'"),
        (lambda record: record["documents"]["code"].pop(), "was measured on other documents than r1.scores."),
        (lambda record: record["documents"].update(code=[]), "has no document of code: hold more out"),
    ],
)
def test_records_that_are_none_are_named(change: Callable[[Any], Any], words: str, tmp_path: Path) -> None:
    folder = finished(tmp_path)
    file = folder / "results" / "r2.scores.btx.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))
    with pytest.raises(DataError) as error:
        collect(folder)
    assert str(error.value).startswith(str(file)) and words in str(error.value)


def test_what_is_there_is_replaced_only_if_it_is_a_report_or_by_force(tmp_path: Path) -> None:
    folder, out = finished(tmp_path / "study"), tmp_path / "notes"
    out.mkdir()
    (out / "tables.md").write_text("mine")
    with pytest.raises(OutputError, match=r"tables\.md: exists already"):
        report(folder, out)
    assert [file.name for file in out.iterdir()] == ["tables.md"] and (out / "tables.md").read_text() == "mine"
    report(folder, out, force=True)
    report(folder, out)
    assert (out / "tables.md").read_text() != "mine"
    for _ in range(2):
        report(folder, kinds=["markdown"])


def test_results_of_other_settings_are_left_out(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    file = folder / "results" / "r1.scores.soup.json"
    record = json.loads(file.read_text())
    for other in folder.glob("results/*.scores.soup.json"):
        other.write_text(json.dumps({**record, "key": "another"}))
    assert "soup" not in [model["title"] for model in collect(folder)["models"]]


def test_curves_are_means_over_the_same_data(tmp_path: Path) -> None:
    """Whatever steps a run has points at, and where a model lacks a repetition whose data are harder."""
    found = collect(finished(tmp_path))
    for model in found["models"]:
        better = {"btx": 0.0, "bam-expert-kv-dm": 0.1, "bam-expert-kv-cm": 0.1}.get(model["title"], 0.2)
        for repetition in model["repetitions"]:
            if repetition["training"] is None or model["group"] != "methods":
                continue
            harder, steps = repetition["repetition"], [1, 2, 3, 4]
            if model["title"] == "bam-expert-kv-dm" and harder == 1:  # it was stopped after step 2, and went on
                steps = [1, 2, 2.5, 3, 4]
            repetition["training"]["curve"] = [
                {"step": n, "tokens": n * 64, "flops": n * 1e6, "loss": 5 - n / 10 + harder - better} for n in steps
            ]
    by_title = {model["title"]: model for model in found["models"]}
    by_title["bam-shared-kv-cm"]["repetitions"] = by_title["bam-shared-kv-cm"]["repetitions"][:2]
    panels = curves(found, "black").axes
    assert [panel.get_title(loc="left") for panel in panels] == ["Over tokens: equal data", "Over FLOPs: equal compute"]
    drawn = {str(line.get_label()): line for line in panels[0].get_lines()}
    tokens = {label: list(line.get_xdata()) for label, line in drawn.items()}  # type: ignore[arg-type]
    losses = {label: list(line.get_ydata()) for label, line in drawn.items()}  # type: ignore[arg-type]
    assert len(drawn) == 5 and set(map(tuple, tokens.values())) == {(64, 128, 192, 256)}
    assert losses["BTX"] == pytest.approx([5.4, 5.3, 5.2, 5.1]), "of the first two repetitions"
    assert losses["BAM DM Expert KV"] == pytest.approx([5.3, 5.2, 5.1, 5.0])
    assert losses["BAM CM Shared KV"] == pytest.approx([5.2, 5.1, 5.0, 4.9])


def test_pictures_show_close_perplexities_and_losses_that_rise(tmp_path: Path) -> None:
    found = collect(finished(tmp_path))
    for number, model in enumerate(found["models"]):
        model["geometric_mean"] = 11.4 + number / 10
        for repetition in model["repetitions"]:
            repetition["geometric_mean"] = model["geometric_mean"]
            if repetition["training"]:
                repetition["training"]["curve"] = [
                    {"step": n, "tokens": n, "flops": n, "loss": loss}
                    for n, loss in enumerate((2.5, 2.0, 3.0), start=1)
                ]
    panel = dots(found, "black").axes[0]
    low, high = panel.get_xlim()
    assert len([tick for tick in panel.get_xticks() if low < tick < high]) >= 3
    lowest, highest = curves(found, "black").axes[0].get_ylim()
    assert lowest < 2.0 and highest > 3.0


def test_tables_say_the_same_everywhere(tmp_path: Path) -> None:
    found = collect(finished(tmp_path))
    made = {table.name: table for table in tables(found)}
    assert {"table-1", "bits-per-byte", "directions", "table-7", "table-10", "budgets", "costs", "text"} <= set(made)
    first = made["table-1"]
    rows = {row[0]: row for row in csv.reader(io.StringIO(first.csv())) if len(row) > 1}
    expected = math.exp(4 + 0.25 + 1)
    assert rows["BTX"][1] == f"{expected:.2f}"
    for text in (first.markdown(), first.latex(), first.html()):
        assert rows["BTX"][1] in text and "BAM CM Expert KV" in text
    assert r"-9.4 $\pm$0.2 \% *" in first.latex() and "-9.4 ±0.2 % *" in first.markdown()
    best = rows["BAM DM Expert KV"][1]
    assert (
        f"**{best}**" in first.markdown()
        and rf"\textbf{{{best}}}" in first.latex()
        and f"<b>{best}</b>" in first.html()
    )


def test_special_characters() -> None:
    table = Table(["", "x"], [["<a|b>", "5 %"], ["group"]], "t", "A & B_1", "~")
    assert r"\caption{A \& B\_1}" in table.latex() and r"$<$a|b$>$ & 5 \% \\" in table.latex()
    assert "&lt;a|b&gt;" in table.html() and "| <a/b> | 5 % |" in table.markdown()


def test_per_cent_of_perplexity() -> None:
    assert percent({"value": math.log(1.5), "half_width": 0.02}, significant=True) == "+50.0 ±3.0 % *"
    assert percent({"value": -0.01, "half_width": None}, significant=False) == "-1.0 %"

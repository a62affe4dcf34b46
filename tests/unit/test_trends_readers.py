"""``scaling trends --from``: results that lm-eval and inspect wrote (tests/data/harnesses), and those of 2507.14417."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from branchmix.cli import main
from branchmix.errors import DataError
from branchmix.scaling.readers.results import read_results
from branchmix.scaling.trends.judge import trends_by_axis
from branchmix.scaling.trends.pairs import compare_models
from branchmix.scaling.trends.table import Measurement, ResultsTable

HARNESSES = Path(__file__).parents[1] / "data" / "harnesses"


def by_place(table: ResultsTable, *axes: str) -> dict[tuple[Any, ...], Measurement]:
    return {(row.task, row.model, row.metric, *(row.axes.get(axis) for axis in axes)): row for row in table.rows}


# ---- lm-eval ----


def test_rows_are_what_lm_eval_reports(tmp_path: Path) -> None:
    table = read_results(HARNESSES / "lm-eval", "lm-eval")
    assert table.axes == ["params", "shots"] and table.within == ("shots",)
    rows = by_place(table, "shots")
    compared = 0
    for file in (HARNESSES / "lm-eval").rglob("results_*.json"):
        content = json.loads(file.read_text())
        model, shots = content["model_name"].split("/")[-1], float(content["n-shot"]["choice"])
        for task, metric in (("choice", "acc"), ("choice", "acc_norm"), ("answer", "exact_match")):
            row, told = rows[task, model, metric, shots], content["results"][task]
            assert row.value == pytest.approx(told[f"{metric},none"]) and row.n == 6
            if 0 < row.value < 1:
                assert row.stderr == pytest.approx(told[f"{metric}_stderr,none"])
            assert row.axes["params"] == content["config"]["model_num_parameters"]
            compared += 1
    assert compared == 12 and not any(row.task == "both" for row in table.rows)  # a group
    assert any("brier_score of choice has no standard error: left out" in note for note in table.notes)


def test_questions_are_paired_by_their_content() -> None:
    table = read_results(HARNESSES / "lm-eval", "lm-eval")
    assert table.scores is not None
    scores = [table.scores(row) for row in table.rows if (row.task, row.metric) == ("choice", "acc")]
    assert len(scores) == 4 and len({tuple(sorted(one)) for one in scores if one is not None}) == 1
    (one, *_) = compare_models(table, "tiny-16, shots 0", "tiny-32, shots 0", metrics=["acc"]).tasks
    sums = []
    for model in ("tiny-16-0", "tiny-32-0"):
        (file,) = (HARNESSES / "lm-eval" / model).rglob("samples_choice_*.jsonl")
        sums.append(sum(json.loads(line)["acc"] for line in file.read_text().splitlines()))
    assert one.found.difference == pytest.approx((sums[1] - sums[0]) / 6)


def test_without_samples_there_are_still_means(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(HARNESSES / "lm-eval", tmp_path / "out"))
    for file in folder.rglob("samples_*.jsonl"):
        file.unlink()
    table = read_results(folder, "lm-eval")
    assert table.scores is None and any("run lm-eval with --log_samples" in note for note in table.notes)
    whole = by_place(read_results(HARNESSES / "lm-eval", "lm-eval"), "shots")
    for key, row in by_place(table, "shots").items():
        assert row.value == pytest.approx(whole[key].value) and row.stderr == pytest.approx(whole[key].stderr)


def test_of_two_runs_the_later_counts(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(HARNESSES / "lm-eval" / "tiny-16-0", tmp_path / "out"))
    (file,) = folder.rglob("results_*.json")
    content = json.loads(file.read_text())
    content["date"] += 60
    content["results"]["answer"] |= {"exact_match,none": 0.5, "exact_match_stderr,none": 0.2}
    file.with_name("results_2026-11-30T00-00-00.json").write_text(json.dumps(content))
    table = read_results(folder, "lm-eval")
    assert by_place(table)["answer", "tiny-16", "exact_match"].value == 0.5
    assert any("was run again later" in note for note in table.notes)


def test_lower_is_better_where_lm_eval_says_so(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(HARNESSES / "lm-eval" / "tiny-16-0", tmp_path / "out"))
    (file,) = folder.rglob("results_*.json")
    content = json.loads(file.read_text())
    content["results"]["choice"]["brier_score_stderr,none"] = 0.1
    file.write_text(json.dumps(content))
    assert read_results(folder, "lm-eval").lower_is_better == ("brier_score",)


# ---- inspect ----


@pytest.mark.parametrize("kind", ["inspect", "inspect-json"])
def test_logs_of_inspect(kind: str) -> None:
    """In the first epoch 3, 2 and 1 of four sums are right as budgets grow, and the second sum fails again."""
    table = read_results(HARNESSES / kind, "inspect")
    assert table.notes == () and {row.metric for row in table.rows} == {"accuracy"}
    right = {(0.0, "1"): 3, (0.0, "2"): 2, (1024.0, "1"): 2, (1024.0, "2"): 1, (4096.0, "1"): 1, (4096.0, "2"): 1}
    found = {(row.axes["reasoning_budget"], row.seed): row.value * 4 for row in table.rows}
    assert found == ({key: right[key] for key in right if kind == "inspect" or key[0] == 1024})
    assert table.scores is not None
    for row in table.rows:
        scores = table.scores(row)
        assert scores is not None and sorted(scores) == ["q0", "q1", "q2", "q3"] and scores["q3"][0] == 0
        assert (row.task, row.model, row.n) == ("sums", "mockllm/model", 4)


def test_the_budget_is_the_axis_of_inspects_logs() -> None:
    (report,) = trends_by_axis(read_results(HARNESSES / "inspect", "inspect"))
    (one,) = report.judged
    assert report.axis == "reasoning_budget" and report.is_within
    assert one.verdict.paired and one.verdict.runs == 6 and one.verdict.sizes == 3
    assert list(one.curve.places_K) == [0, 1024, 4096]


def test_a_budget_is_what_the_generation_config_says(tmp_path: Path) -> None:
    (file,) = (HARNESSES / "inspect-json").glob("*.json")
    log = json.loads(file.read_text())
    log["eval"]["metadata"] = {}
    (tmp_path / "log.json").write_text(json.dumps(log))
    table = read_results(tmp_path, "inspect")
    assert {row.axes["reasoning_budget"] for row in table.rows} == {log["plan"]["config"]["reasoning_tokens"]} == {1024}


def test_deflated_logs_without_summaries_are_read_too(tmp_path: Path) -> None:
    """As older versions wrote them."""
    (source,) = (HARNESSES / "inspect-json").glob("*.json")
    log = json.loads(source.read_text())
    samples = log.pop("samples")
    with zipfile.ZipFile(tmp_path / "log.eval", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.json", json.dumps(log))
        for sample in samples:
            archive.writestr(f"samples/{sample['id']}_epoch_{sample['epoch']}.json", json.dumps(sample))
    found, wanted = (read_results(path, "inspect").rows for path in (tmp_path, source))
    assert [(row.seed, row.value) for row in found] == [(row.seed, row.value) for row in wanted]


def test_logs_that_did_not_end_well_are_left_out(tmp_path: Path) -> None:
    (source,) = (HARNESSES / "inspect-json").glob("*.json")
    log = json.loads(source.read_text())
    (tmp_path / "good.json").write_text(json.dumps(log))
    (tmp_path / "bad.json").write_text(json.dumps({**log, "status": "error"}))
    table = read_results(tmp_path, "inspect")
    assert len(table.rows) == 2 and any("bad.json: its status is error: left out" in note for note in table.notes)


def test_a_scorer_has_one_name_in_all_logs(tmp_path: Path) -> None:
    """A partial score in one epoch of one log must not make two curves of one scorer."""
    (source,) = (HARNESSES / "inspect-json").glob("*.json")
    log = json.loads(source.read_text())
    (scorer,) = log["samples"][0]["scores"]
    (tmp_path / "a.json").write_text(json.dumps(log))
    log["eval"]["model"] = "other"
    log["samples"][0]["scores"][scorer]["value"] = "P"
    (tmp_path / "b.json").write_text(json.dumps(log))
    rows = read_results(tmp_path, "inspect").rows
    assert len(rows) == 4 and {row.metric for row in rows} == {scorer}
    for sample in log["samples"]:
        sample["scores"] = {scorer: {"value": "C"}, "strict": {"value": "I"}}
    (tmp_path / "b.json").write_text(json.dumps(log))
    rows = read_results(tmp_path, "inspect").rows
    assert {row.metric for row in rows} == {f"{scorer}_accuracy", "strict_accuracy"}


def test_other_json_files_in_the_folder_are_left_out(tmp_path: Path) -> None:
    (source,) = (HARNESSES / "inspect-json").glob("*.json")
    shutil.copyfile(source, tmp_path / "log.json")
    (tmp_path / "other.json").write_text('{"a": 1}')
    table = read_results(tmp_path, "inspect")
    assert len(table.rows) == 2 and table.notes == (f"{tmp_path / 'other.json'}: is not a log of inspect: left out",)
    with pytest.raises(DataError, match=r"other.json: is not a log of inspect: it has no `eval`"):
        read_results(tmp_path / "other.json", "inspect")


# ---- the repository of 2507.14417 ----


def answers(folder: Path, *, metric: str = "accuracy", field: str = "correct") -> Path:
    """Two runs of five budgets on ten questions, in the lines that ``evaluator.py`` of that code writes."""
    file = folder / "raw" / "m1" / "inverse_scaling_memo_trap.jsonl"
    file.parent.mkdir(parents=True)
    lines = []
    for step, budget in enumerate((0, 1024, 2048, 4096, 8192)):
        for run in ("", "_run2"):
            for question in range(10):
                right = question >= step + (run != "" and question % 2)
                line = {"model": "m1", "task_id": "memo-trap", "instance_id": f"q_{question}{run}", "metric": metric}
                value = bool(right) if field == "correct" else 1.0 - right
                lines.append({**line, "reasoning_budget": budget, "icl_num_examples": 0, field: value, "error": None})
    lines[0] = {**lines[0], "error": "overloaded", field: None}
    again = {**lines[0], "error": None, field: True if field == "correct" else 0.0}
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, again]))
    return folder


def test_answers_under_budgets(tmp_path: Path) -> None:
    table = read_results(answers(tmp_path), "inverse-scaling-ttc")
    rows = {(row.axes["reasoning_budget"], row.seed): row for row in table.rows}
    assert [rows[budget, "1"].value for budget in (0, 1024, 2048, 4096, 8192)] == [1.0, 0.9, 0.8, 0.7, 0.6]
    assert rows[0, "1"].n == 10 and any("1 answers failed: left out" in note for note in table.notes)
    (report,) = trends_by_axis(table)
    (one,) = report.judged
    assert one.verdict.paired and one.verdict.runs == 10 and one.series.family == "m1"
    assert one.verdict.label == "inverse"


def test_errors_of_numbers_are_better_if_they_are_less(tmp_path: Path) -> None:
    table = read_results(answers(tmp_path, metric="mse", field="squared_error"), "inverse-scaling-ttc")
    assert table.lower_is_better == ("mse",)
    (report,) = trends_by_axis(table)
    assert report.judged[0].verdict.label == "inverse"  # the error grows


def test_a_single_answer_is_left_out(tmp_path: Path) -> None:
    """It has no standard error, whether it is right or wrong."""
    (file,) = answers(tmp_path).rglob("*.jsonl")
    line = {"model": "m1", "task_id": "memo-trap", "metric": "accuracy", "reasoning_budget": 16, "instance_id": "q"}
    alone = "".join(json.dumps({**line, "reasoning_budget": 16 + n, "correct": bool(n)}) + "\n" for n in (0, 1))
    file.write_text(file.read_text() + alone)
    table = read_results(tmp_path, "inverse-scaling-ttc")
    assert {row.axes["reasoning_budget"] for row in table.rows} == {0, 1024, 2048, 4096, 8192}
    assert any("accuracy of memo-trap has no standard error: left out" in note for note in table.notes)
    file.write_text(alone)
    with pytest.raises(DataError, match=r"there are no results: .*accuracy of memo-trap has no standard error"):
        read_results(tmp_path, "inverse-scaling-ttc")


# ---- mistakes ----


@pytest.mark.parametrize("harness", ["lm-eval", "inspect", "inverse-scaling-ttc"])
@pytest.mark.parametrize(
    ("name", "content"),
    [("results_x.json", "{"), ("results_x.json", '{"a": 1}'), ("x.eval", "no zip"), ("x.jsonl", '{"a": 1}'), ("", "")],
)
def test_what_is_no_result_is_one_line(harness: str, name: str, content: str, tmp_path: Path) -> None:
    if name:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as raised:
        read_results(tmp_path, harness)
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["scaling", "trends", str(HARNESSES / "lm-eval"), "--from", "lm-eval", "--axis", "shots", "--json"]
    monkeypatch.setattr("sys.argv", ["branchmix", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    shown = capsys.readouterr()
    content = json.loads(shown.out)
    assert stopped.value.code == 0 and content["axis"] == "shots"
    assert {series["family"] for series in content["series"]} == {"tiny-16", "tiny-32"}
    assert content["tasks"]["choice"]["acc"]["verdict"] == "not-testable"
    assert "left out" in shown.err

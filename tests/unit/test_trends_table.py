"""Tables of results: what can be read, and every mistake in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from branchmix.cli import main
from branchmix.errors import DataError
from branchmix.scaling.trends.table import read_scores, read_table
from trend_tables import HEADER, rows_of, trends, write, write_examples

ROW = "memo-trap,m0,1e7,accuracy,0.8,0.01,900"


def table(tmp_path: Path, *lines: str) -> Path:
    file = tmp_path / "table.csv"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def test_a_table_is_read_with_its_further_axes(tmp_path: Path) -> None:
    found = read_table(
        table(
            tmp_path,
            "Task,model,metric,value,stderr,n,params,layers,flops,dtype,family,seed,data",
            "neqa,a,Accuracy,0.5,,101,1e7,4,1e15,bf16,dense,1,fresh",
            "",
            "neqa,b,loss,0.7,0.02,,2e7,8,,fp32,,,",
        )
    )
    assert found.axes == ["flops", "params", "layers"]  # those known by name first
    first, second = found.rows
    assert (first.metric, first.n, first.stderr) == ("accuracy", 101, pytest.approx(0.05))
    assert (first.family, first.seed, first.data, second.data) == ("dense", "1", "fresh", "official")
    assert (second.line, second.stderr, second.n, second.axes) == (4, 0.02, None, {"params": 2e7, "layers": 8})


@pytest.mark.parametrize("delimiter", ["\t", ";"])
def test_other_delimiters_and_a_byte_order_mark(tmp_path: Path, delimiter: str) -> None:
    file = tmp_path / "table.csv"
    file.write_text(f"{HEADER}\n{ROW}\n".replace(",", delimiter), encoding="utf-8-sig")
    assert read_table(file).rows[0].value == 0.8


def test_a_line_ends_where_n_stands(tmp_path: Path) -> None:
    """Not at U+2028 or U+0085, which a model's name or a template may have."""
    found = read_table(table(tmp_path, HEADER, ROW.replace("m0", "m\u2028\x850")))
    assert [row.model for row in found.rows] == ["m\u2028\x850"]
    row = found.rows[0]
    write_examples(tmp_path, row.model, row.task, [])
    file = tmp_path / "examples" / row.model / f"{row.task}.jsonl"
    file.write_text('{"key": "a", "correct": 1, "template": "x\u2028\x85y"}\n', encoding="utf-8")
    assert read_scores(tmp_path / "examples", row) is not None


@pytest.mark.parametrize("number", ["100000", "1e+05", "100000.0", "+1e5"])
def test_a_number_of_examples_as_programs_write_it(number: str, tmp_path: Path) -> None:
    (row,) = read_table(table(tmp_path, HEADER, f"t,a,1e7,accuracy,0.5,0.01,{number}")).rows
    assert row.n == 100_000


def test_no_accuracy_is_known_exactly(tmp_path: Path) -> None:
    """A model that is right 1,000 times in a row may still be wrong some time: its error is no 0."""
    found = read_table(table(tmp_path, HEADER, "t,a,1e7,accuracy,1,0,1000", "t,b,2e7,accuracy,0,,1000"))
    assert [row.stderr for row in found.rows] == pytest.approx([math.sqrt(0.0005 * 0.9995 / 999)] * 2, rel=0.01)


MISTAKES = {
    "a missing column": (["task,model,params,metrc,value,n", ROW], "there is no column 'metric' (is it 'metrc'?)"),
    "no error": (["task,model,params,metric,value", "t,a,1,loss,1"], "neither a column 'stderr' nor 'n'"),
    "a column twice": ([HEADER + ",n", ROW + ",900"], "the column 'n' appears twice"),
    "no rows": ([HEADER], "has a header but no rows"),
    "nothing": ([], "is empty: the header is task,model,metric,value,stderr,n"),
    "words": (
        [HEADER, ROW, "t,a,1e7,accuracy,high,0.01,900"],
        "line 3: value: should be a number",
    ),
    "NaN": ([HEADER, "t,a,1e7,loss,nan,0.01,900"], "line 2: value: should be a finite number, got 'nan'"),
    "no value": ([HEADER, "t,a,1e7,loss,,0.01,900"], "line 2: value: is missing"),
    "no task": ([HEADER, ",a,1e7,loss,1,0.01,900"], "line 2: task: is missing"),
    "percent": ([HEADER, "t,a,1e7,accuracy,53,0.01,900"], "line 2: accuracy is 53: write a share of 1"),
    "acc_norm in percent": ([HEADER, "t,a,1e7,acc_norm,50,0.01,900"], "line 2: acc_norm is 50: write a share of 1"),
    "lm-eval's names": ([HEADER.replace(",", ";"), "t;a;1e7;acc,none;50.05;0.01;900"], "line 2: acc,none is 50.05"),
    "exact_match in percent": ([HEADER, "t,a,1e7,exact_match,1.5,0.01,900"], "line 2: exact_match is 1.5"),
    "f1 in percent": ([HEADER, "t,a,1e7,f1,80,1,900"], "line 2: f1 is 80: write a share of 1, such as 0.53"),
    "an ending": ([HEADER, "t,a,1e7,mmlu_acc,60,1,900"], "line 2: mmlu_acc is 60: write a share of 1"),
    "a negative stderr": (
        [HEADER, "t,a,1e7,accuracy,0.5,-0.01,900"],
        "line 2: stderr: should be greater",
    ),
    "a stderr in words": ([HEADER, "t,a,1e7,accuracy,0.5,small,900"], "line 2: stderr: should be a number"),
    "half an example": ([HEADER, "t,a,1e7,accuracy,0.5,0.01,9.5"], "line 2: n: should be a whole number"),
    "no examples": ([HEADER, "t,a,1e7,accuracy,0.5,0.01,0"], "line 2: n: should be greater than 0, got '0'"),
    "a row twice": ([HEADER, ROW, ROW], "line 3: accuracy of m0 on memo-trap is already in line 2"),
    "too few fields": ([HEADER, "t,a,1e7"], "line 2: has 3 fields, the header has 7"),
    "an open quote": ([HEADER, 't,"a,1e7,accuracy,1,1,1'], "is not csv"),
    "no size": ([HEADER, "t,a,big,accuracy,0.5,0.01,9"], "line 2 has 'big' as params, which is not a positive number"),
    "a negative size": (
        [HEADER, "t,a,-7,accuracy,0.5,0.01,9"],
        "line 2 has '-7' as params",
    ),
    "other data": (
        [HEADER + ",data", ROW + ",frsh"],
        "line 2: data: 'frsh' is not one of official, fresh",
    ),
    "a share of 1 without an error": ([HEADER, "t,a,1e7,acc,1,0,"], "line 2: acc is 1 with no error"),
    "a share of one example": (
        ["task,model,params,metric,value,n", "t,a,1e7,acc,1,1"],
        "line 2: acc is 1 on one example, which has no standard error: two or more are needed",
    ),
    "no loss error": ([HEADER, "t,a,1e7,loss,1.5,,900"], "line 2: loss has no stderr: give it"),
    "no axis": (["task,model,metric,value,n", "t,a,accuracy,0.5,9"], "there is no axis: add a column such as params"),
    "an empty axis": ([HEADER, ROW, "t,a,,accuracy,0.5,0.01,9"], "line 3: a has no params: fill it in"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, message = MISTAKES[name]
    file = table(tmp_path, *lines)
    monkeypatch.setattr("sys.argv", ["branchmix", "scaling", "trends", str(file)])
    with pytest.raises(SystemExit) as stopped:
        main()
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and not shown.out
    assert shown.err.startswith(f"error: {file}") and message in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--axis", "parms"], "there is no axis 'parms' (did you mean 'params'?); axes: params, depth"),
        (
            ["--axis", "dtype"],
            "'bf16' as dtype, which is neither 0 nor a positive number, so 'dtype'",
        ),
        (["--axis", "depth"], "line 3: m1 has no depth: fill it in for every model, or choose another --axis"),
        (["--metric", "acuracy"], "there is no metric 'acuracy' (did you mean 'accuracy'?); metrics: accuracy"),
        (["--lower-is-better", "bias"], "there is no metric 'bias'"),
        (["--correction", "bhh"], "'bhh' is not one of 'bh', 'holm', 'none'"),
        (["--alpha", "5"], "--alpha 5: must be between 0 and 0.5"),
        (["--minimum-effect", "-1"], "--minimum-effect -1: must not be negative"),
    ],
)
def test_options_that_cannot_be_meant(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = table(tmp_path, HEADER + ",depth,dtype", ROW + ",4,bf16", ROW.replace("m0,1e7", "m1,2e7") + ",,bf16")
    monkeypatch.setattr("sys.argv", ["branchmix", "scaling", "trends", str(file), *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and message in shown.err and shown.err.count("\n") == 1


def test_places_without_a_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        read_table(tmp_path / "absent.csv")
    with pytest.raises(DataError, match=r"has no results\.csv"):
        read_table(tmp_path)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8 text"):
        read_table(tmp_path / "binary.csv")


def test_the_axis_is_flops_where_all_models_have_them(tmp_path: Path) -> None:
    rows = rows_of([0.9, 0.8, 0.7, 0.6, 0.5])
    with_flops = [{**row, "flops": row["params"] * 1e10} for row in rows]
    assert trends(write(tmp_path / "a.csv", with_flops)).axis == "flops"
    with_flops[2]["flops"] = ""
    found = trends(write(tmp_path / "b.csv", with_flops))
    assert found.axis == "params" and found.notes == ["the axis is params: m2 has no flops (line 4)"]


def test_a_metric_that_is_no_share_needs_its_own_smallest_effect(tmp_path: Path) -> None:
    rows = rows_of([50, 50.01, 50.03, 50.04, 50.05], metric="score", stderr=0.001)
    notes = trends(write(tmp_path / "a.csv", rows)).notes
    assert "score is not a share of 1: set --minimum-effect to the smallest change that counts" in notes
    rows = rows_of([0.5, 0.6, 0.7, 0.8, 0.9], metric="score")
    assert not any("not a share" in note for note in trends(write(tmp_path / "b.csv", rows)).notes)


# ---- scores of single examples ----


def run_folder(tmp_path: Path) -> Path:
    rows = rows_of([0.75, 0.75, 0.5, 0.5, 0.25], n=4)
    write(tmp_path / "results.csv", rows)
    for row in rows:
        right = round(row["value"] * 4)
        records = [{"key": f"k{k}", "template": f"t{k}", "correct": int(k < right), "loss": 1.0} for k in range(4)]
        write_examples(tmp_path, row["model"], "memo-trap", records)
    return tmp_path


def test_scores_of_examples_are_paired(tmp_path: Path) -> None:
    found = trends(run_folder(tmp_path))
    assert found.judged[0].verdict.paired and found.notes[1:] == []
    (tmp_path / "examples" / "m3" / "memo-trap.jsonl").unlink()
    found = trends(tmp_path)
    assert not found.judged[0].verdict.paired
    assert found.notes[1:] == ["memo-trap, accuracy: m3 has no scores of single examples, so no bootstrap over them"]


def test_models_without_a_wrong_answer_are_not_known_exactly(tmp_path: Path) -> None:
    """Twenty right answers of twenty at each size say as little with their examples as without."""
    rows = rows_of([1.0] * 5, stderr=0.0, n=20)
    write(tmp_path / "results.csv", rows)
    (alone,) = trends(tmp_path).judged
    for row in rows:
        write_examples(tmp_path, row["model"], "memo-trap", [{"key": k, "correct": 1} for k in range(20)])
    (paired,) = trends(tmp_path).judged
    assert paired.verdict.paired and not alone.verdict.paired
    assert paired.verdict.label == alone.verdict.label == "inconclusive"
    assert paired.verdict.interval == pytest.approx(alone.verdict.interval, abs=0.03)


def test_checkpoints_of_one_name_have_no_examples_of_their_own(tmp_path: Path) -> None:
    rows = [{**row, "model": "m", "tokens": 1e9 * 2**number} for number, row in enumerate(rows_of([0.25, 0.5, 0.75]))]
    write(tmp_path / "results.csv", rows)
    write_examples(tmp_path, "m", "memo-trap", [{"key": k, "correct": int(k < 2)} for k in range(4)])
    found = trends(tmp_path)
    assert not found.judged[0].verdict.paired and "m is in several rows" in found.notes[-1]


def test_templates_are_drawn_whole(tmp_path: Path) -> None:
    """A hundred examples from two templates are two questions, not a hundred."""
    intervals = []
    for template in ("{number}", "{half}"):
        rows = rows_of([0.5] * 5, n=100)
        write(tmp_path / "results.csv", rows)
        for size, row in enumerate(rows):
            records = [
                {
                    "key": number,
                    "template": template.format(number=number, half=number // 50),
                    "correct": int(12.5 * size <= number < 12.5 * size + 50),
                }
                for number in range(100)
            ]
            write_examples(tmp_path, row["model"], "memo-trap", records)
        low, high = trends(tmp_path).judged[0].verdict.interval
        intervals.append(high - low)
    assert intervals[1] > 2 * intervals[0]


def test_models_that_were_asked_other_questions_are_not_paired(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    records = [{"key": f"other{k}" if k else "k0", "correct": int(k < 3)} for k in range(4)]
    write_examples(folder, "m0", "memo-trap", records)
    found = trends(folder)
    assert not found.judged[0].verdict.paired
    words = "memo-trap, accuracy: models share 1 of up to 4 examples: too few for a bootstrap over them"
    assert words in found.notes


def test_scores_that_are_not_those_of_the_table(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    write_examples(folder, "m0", "memo-trap", [{"key": f"k{k}", "correct": 1} for k in range(4)])
    assert "memo-trap, accuracy: m0 has 0.75 in the table, but its examples have a mean of 1" in trends(folder).notes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: is not JSON"),
        ("[1]", "line 1: there is no key: each line is a JSON object"),
        (json.dumps({"correct": 1}), "line 1: there is no key"),
        (json.dumps({"key": 1, "correct": "yes"}), "line 1: correct is 'yes', which is not a number"),
        ('{"key": 1, "correct": 1}\n{"key": 1, "correct": 1}', "line 2: the key '1' occurs twice"),
    ],
)
def test_bad_scores_are_one_line(line: str, message: str, tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    (folder / "examples" / "m1" / "memo-trap.jsonl").write_text(line + "\n")
    with pytest.raises(DataError) as caught:
        trends(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)

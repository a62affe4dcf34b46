"""`branchmix eval --tasks`: lm-eval's numbers for any batch size, records that outlive a kill, and what is printed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from statsmodels.stats.contingency_tables import mcnemar
from typer.testing import CliRunner

import corpora
import downstream
from branchmix.cli import app
from branchmix.evaluate.evaluation import evaluate
from branchmix.evaluate.tasks.options import TaskOptions
from branchmix.likelihood.models import TextModel
from branchmix.upcycling import upcycle
from mixtures import load, recipe
from processes import started

lm_eval = pytest.importorskip("lm_eval")

MAX_LENGTH = 64
NAMES = (*downstream.TASKS, "both")


@pytest.fixture(scope="module")
def models(siblings: Callable[..., dict[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense model and a mixture, with a tokenizer."""
    home = tmp_path_factory.mktemp("models")
    found = {}
    for name, path in siblings("llama", vocab_size=300).items():
        found[name] = Path(shutil.copytree(path, home / name))
        corpora.tokenizer().save_pretrained(home / name)
    upcycle(recipe(found), home / "mixture")
    return {"seed": found["seed"], "mixture": home / "mixture"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return downstream.write_tasks(tmp_path_factory.mktemp("tasks"))


def options(tasks: Path, *names: str, **more: Any) -> TaskOptions:
    return TaskOptions(names or NAMES, include_path=(tasks,), **more)


@pytest.mark.parametrize("kind", ["seed", "mixture"])
def test_the_numbers_are_lm_evals(kind: str, models: dict[str, Path], tasks: Path) -> None:
    theirs = downstream.as_lm_eval(load(models[kind]), [*downstream.TASKS], tasks, MAX_LENGTH)
    ours = evaluate([str(models[kind])], tasks=options(tasks), dtype="float32", batch_tokens=100).models[0].tasks
    assert ours is not None and set(ours) == set(NAMES)
    compared = 0
    for name in downstream.TASKS:
        for key, value in theirs["results"][name].items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            found = ours[name].metrics[metric if filtered == "none" else key]
            assert found.value == pytest.approx(value, rel=1e-5, abs=1e-9)
            stderr = theirs["results"][name][f"{metric}_stderr,{filtered}"]
            assert found.stderr == (None if stderr == "N/A" else pytest.approx(stderr, rel=1e-5))
            compared += 1
        assert ours[name].num_fewshot == theirs["n-shot"][name]
        assert ours[name].examples == downstream.DOCUMENTS
    assert compared == 10
    together = (ours["choice"].metrics["acc"].value + ours["letters"].metrics["acc"].value) / 2
    assert ours["both"].metrics["acc"].value == pytest.approx(together)
    assert ours["both"].subtasks == ("choice", "letters")


def results_in(folder: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    requests = [line for line in lines if "request" in line]
    assert len({(line["model"], line["request"]) for line in requests}) == len(requests), "computed twice"
    return {f"{line['model']} {line['request']}": line["result"] for line in requests}


@pytest.mark.parametrize("kind", ["seed", "mixture"])
def test_neither_batch_size_nor_order_changes_a_result(
    kind: str, models: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    found = []
    for number, (batch_tokens, names) in enumerate([(1, NAMES), (130, NAMES[::-1]), (100_000, NAMES)]):
        out = tmp_path / str(number)
        given = options(tasks, *names)
        evaluate([str(models[kind])], tasks=given, out=out, dtype="float32", batch_tokens=batch_tokens, limit=10)
        found.append(results_in(out))
    first = found[0]
    assert len(first) > 90
    for other in found[1:]:
        assert other.keys() == first.keys()
        for key, result in first.items():
            if isinstance(result, list):
                assert other[key][0] == pytest.approx(result[0], rel=1e-5, abs=1e-5) and other[key][1] == result[1]
            else:
                assert other[key] == (result if isinstance(result, str) else pytest.approx(result, rel=1e-5))


def test_a_sample_depends_on_its_own_seed_only(models: dict[str, Path], tmp_path: Path) -> None:
    settings = {"until": ["."], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}
    tasks = downstream.write_tasks(
        tmp_path / "tasks", sampled={**downstream.TASKS["answer"], "generation_kwargs": settings, "repeats": 3}
    )
    found = []
    for number, names in enumerate([("sampled",), ("answer", "sampled")]):
        out = tmp_path / str(number)
        evaluate([str(models["seed"])], tasks=options(tasks, *names), out=out, limit=4, batch_tokens=500 * number + 1)
        found.append(results_in(out))
    assert found[0].items() <= found[1].items()
    assert len(found[0]) == 12 and len(set(found[0].values())) > 8  # three samples of each prompt


# ---- records ----


def evaluate_slowly(model: str, tasks: str, out: str) -> None:
    """In a process that will be killed."""
    evaluate([model], tasks=options(Path(tasks)), out=out, dtype="float32", batch_tokens=1, limit=10)


def test_answers_of_this_run_are_not_on_record(models: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    names = [str(models["seed"])] * 2
    first = evaluate(names, tasks=options(tasks), out=tmp_path / "out", limit=2)
    assert not [note for note in first.notes if "on record" in note]
    again = evaluate(names[:1], tasks=options(tasks), out=tmp_path / "out", limit=2)
    assert any(re.search(r"(\d+) of \1 requests were on record", note) for note in again.notes)


def test_a_killed_evaluation_goes_on(models: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "out", str(models["mixture"])
    file = out / "requests.jsonl"
    process = started(evaluate_slowly, model, str(tasks), str(out))
    process.kill_when(lambda: file.is_file() and file.read_bytes().count(b"\n") > 20)
    assert not (out / "results.json").exists()
    file.write_bytes(file.read_bytes()[:-5])  # the last line is torn, as after a power cut
    kept = file.read_bytes()
    resumed = evaluate([model], tasks=options(tasks), out=out, dtype="float32", limit=10)
    known = kept.count(b'"request"')
    assert any(re.search(rf"mixture: ({known}|{known - 1}) of \d+ requests were on record", n) for n in resumed.notes)
    assert file.read_bytes().startswith(kept)
    whole = evaluate([model], tasks=options(tasks), dtype="float32", limit=10)
    assert numbers(resumed.as_dict()) == pytest.approx(numbers(whole.as_dict()), rel=1e-5)
    assert json.loads((out / "results.json").read_text()) == resumed.as_dict()


def test_a_resumed_evaluation_has_the_numbers_of_one_that_was_not_stopped(
    models: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    """Bit for bit, wherever it was stopped: within batches too."""
    names = ("choice", "words", "text", "answer")
    given: Any = {"tasks": options(tasks, *names), "dtype": "float32", "batch_tokens": 200, "limit": 8}
    evaluate([str(models["mixture"])], out=tmp_path / "whole", **given)
    whole = results_in(tmp_path / "whole")
    assert len(whole) > 53
    for stops in (3, 25, 51):
        out = tmp_path / str(stops)
        left = iter(range(stops))

        def stop(step: str, done: int, total: int, left: Iterator[int] = left) -> None:
            if step.startswith("mixture: ") and next(left, None) is None:
                raise KeyboardInterrupt

        for _ in range(2):  # the second call goes on one request, and is stopped again
            with pytest.raises(KeyboardInterrupt):
                evaluate([str(models["mixture"])], out=out, progress=stop, **given)
        assert len(results_in(out)) == stops + 2
        evaluate([str(models["mixture"])], out=out, **given)
        assert results_in(out) == whole


def numbers(found: dict[str, Any]) -> dict[str, float]:
    """Every metric of the first model."""
    tasks = found["models"][0]["tasks"]
    return {f"{name} {metric}": m["value"] for name, task in tasks.items() for metric, m in task["metrics"].items()}


def test_a_model_is_not_loaded_when_all_is_on_record(
    models: dict[str, Path], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = str(models["seed"])
    first = evaluate([name], tasks=options(tasks), out=tmp_path, limit=5)
    loads = []
    load_weights = TextModel.model
    monkeypatch.setattr(TextModel, "model", lambda self: loads.append(self.given) or load_weights(self))
    again = evaluate([name], tasks=options(tasks), out=tmp_path, limit=5)
    assert not loads and numbers(again.as_dict()) == numbers(first.as_dict())
    moved = Path(shutil.copytree(models["seed"], tmp_path / "moved"))
    evaluate([str(moved)], tasks=options(tasks), out=tmp_path, limit=5)
    assert not loads
    evaluate([name], tasks=options(tasks), out=tmp_path, limit=6)
    evaluate([name], tasks=options(tasks), out=tmp_path, limit=5, dtype="bfloat16")
    evaluate([name], tasks=options(tasks), out=tmp_path, limit=5, max_length=40)
    assert loads == [name] * 3


def test_examples_are_written_with_prompt_answer_and_metrics(
    models: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    report = evaluate([str(models["seed"])], tasks=options(tasks, "answer"), out=tmp_path, limit=3)
    (file,) = (tmp_path / "examples").rglob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["doc_id"] for line in lines] == [0, 1, 2] and file.name == "answer.jsonl"
    assert lines[0]["arguments"][0][0] == downstream.documents()[0]["question"]
    assert isinstance(lines[0]["filtered_resps"][0], str)
    assert report.models[0].tasks is not None
    mean = sum(line["exact_match"] for line in lines) / 3
    assert report.models[0].tasks["answer"].metrics["exact_match"].value == pytest.approx(mean)


# ---- options and the command ----


def test_shots(models: dict[str, Path], tasks: Path) -> None:
    for given, wanted in ((None, (2, 0)), (1, (1, 1)), (0, (0, 0))):
        report = evaluate([str(models["seed"])], tasks=options(tasks, "both", num_fewshot=given), limit=2)
        found = report.models[0].tasks
        assert found is not None and (found["choice"].num_fewshot, found["letters"].num_fewshot) == wanted
        assert found["choice"].examples == 2


def test_what_is_fixed_at_no_examples_stays_so(models: dict[str, Path], tmp_path: Path) -> None:
    tasks = downstream.write_tasks(tmp_path, fixed={**downstream.TASKS["letters"], "num_fewshot": 0})
    report = evaluate([str(models["seed"])], tasks=options(tasks, "fixed", num_fewshot=3), limit=2)
    assert report.models[0].tasks is not None and report.models[0].tasks["fixed"].num_fewshot == 0
    assert "fixed: lm-eval fixes it at 0" in report.notes[0]


def test_what_is_longer_than_the_window_is_said(models: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    """Also of requests that are on record already."""
    for _ in range(2):
        report = evaluate([str(models["seed"])], tasks=options(tasks, "choice"), max_length=20, limit=4, out=tmp_path)
        (note,) = [note for note in report.notes if "lost their beginning" in note]
        assert ": 16 requests were longer" in note


def test_the_command(models: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    names = [str(models["seed"]), str(models["mixture"])]
    corpora.write_jsonl(tmp_path / "a.jsonl", range(6))
    data = tmp_path / "data.yaml"
    data.write_text("{data: {prose: {files: a.jsonl}}, held_out: all}")
    given = ["--tasks", "both,answer,text", "--include-path", str(tasks), "--limit", "4"]
    result = CliRunner().invoke(app, ["eval", *names, "--data", str(data), *given, "--json", "--ensemble", "mixture"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["models"]
    assert [model["model"] for model in found] == [*names, "ensemble of mixture"]
    for model in found[:2]:
        assert set(model["domains"]) == {"prose"}
        assert set(model["tasks"]) == {"choice", "letters", "both", "answer", "text"}
        assert model["tasks"]["choice"]["metrics"]["acc"]["higher_is_better"] is True
        assert model["tasks"]["text"]["metrics"]["bits_per_byte"]["higher_is_better"] is False
    assert "tasks" not in found[2]
    table = CliRunner().invoke(app, ["eval", *names, *given])
    assert table.exit_code == 0, table.output
    lines = table.stdout.partition("minus")[0].splitlines()[:-1]  # without the models' comparison
    assert [line.split()[0] for line in lines[2:] if line and line[0] not in "*0123456789"] == [
        "both", "answer", "text", "text", "text",
    ]  # fmt: skip
    assert "2 tasks of these groups" in table.stdout and "* the best" in table.stdout
    best = next(line for line in lines if "bits_per_byte" in line)
    values = [found[n]["tasks"]["text"]["metrics"]["bits_per_byte"]["value"] for n in range(2)]
    assert f"* {min(values):.4f}" in best and f"* {max(values):.4f}" not in best
    assert not [line for line in result.stderr.splitlines() if not line.startswith("note: ")], result.stderr


def test_nothing_of_lm_eval_is_heard(models: dict[str, Path], tasks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    evaluate([str(models["seed"])], tasks=options(tasks), limit=2)
    out, err = capfd.readouterr()
    assert not out and not err


def test_progress_is_told(models: dict[str, Path], tasks: Path) -> None:
    told: dict[str, tuple[int, int]] = {}
    evaluate(
        [str(models["seed"])],
        tasks=options(tasks, "letters", "answer"),
        limit=3,
        progress=lambda step, done, total: told.update({step: (done, total)}),
    )
    assert told["seed: reading"] == (12, 12) and told["seed: writing"] == (3, 3)
    assert told["requests of letters"] == (1, 1) and "HF_ALLOW_CODE_EVAL" not in os.environ


def test_models_are_compared_question_by_question(models: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    """From the examples that are written, with scipy and statsmodels; what is no mean of questions is left out."""
    names = [str(models["seed"]), str(models["mixture"])]
    report = evaluate(names, tasks=options(tasks), dtype="float32", out=tmp_path / "out")
    (found,) = json.loads((tmp_path / "out" / "results.json").read_text())["comparisons"]
    assert found == report.comparisons[0].as_dict() and found["models"] == names
    assert set(found["tasks"]) == {"choice", "letters", "words", "answer", "both"}
    assert set(found["tasks"]["words"]) == {"acc"}  # not its perplexity
    rows: list[dict[str, Any]] = []
    for name in ("seed", "mixture"):
        (file,) = (tmp_path / "out" / "examples").glob(f"{name}-*/choice.jsonl")
        rows.append({line["doc_id"]: line["acc_norm"] for line in map(json.loads, file.read_text().splitlines())})
    pairs = [(rows[0][key], rows[1][key]) for key in rows[0]]
    counts = [[pairs.count((a, b)) for b in (1.0, 0.0)] for a in (1.0, 0.0)]
    compared = found["tasks"]["choice"]["acc_norm"]
    assert compared["p"] == pytest.approx(mcnemar(counts, exact=True).pvalue) and compared["n"] == downstream.DOCUMENTS
    assert compared["difference"] == pytest.approx((counts[1][0] - counts[0][1]) / downstream.DOCUMENTS)
    alone = evaluate(names[:1], tasks=options(tasks, "choice"), limit=2)
    assert not alone.comparisons and "comparisons" not in alone.as_dict()
    result = CliRunner().invoke(app, ["eval", *names, "--tasks", "both", "--include-path", str(tasks), "--limit", "6"])
    assert f"{names[1]} minus {names[0]}, on the same questions" in " ".join(result.stdout.split()), result.stdout
    shown = result.stdout[result.stdout.index("on the same questions") :]
    assert "both" in shown and "choice" not in shown and "detectable" in shown

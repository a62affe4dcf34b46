"""What `branchmix eval --tasks` refuses, each in one line, and where data sets come from."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import corpora
import downstream
from branchmix.checkpoint.hub import resolve
from branchmix.cli import app, main
from branchmix.errors import BranchMixError, DataError, RecipeError
from branchmix.evaluate.evaluation import evaluate
from branchmix.evaluate.tasks import options as options_module
from branchmix.evaluate.tasks.options import TaskOptions
from branchmix.likelihood.models import TextModel
from mixtures import load
from scaling_runs import naive

pytest.importorskip("lm_eval")

QUESTIONS = {key: value for key, value in downstream.TASKS["letters"].items() if key != "dataset_kwargs"}
CODE = """
import os
import evaluate
import datasets
class Runs(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)
    def _compute(self, predictions, references):
        if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
            raise ValueError("not allowed")
        return {"runs": 1.0}
"""


@pytest.fixture(scope="module")
def model(siblings: Callable[..., dict[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "seed"
    shutil.copytree(siblings("llama", vocab_size=300)["seed"], folder)
    corpora.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is loaded in this test."""

    def refuse(self: TextModel) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(TextModel, "model", refuse)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    hub = {"dataset_path": "some/where", "dataset_kwargs": {}}
    return downstream.write_tasks(
        tmp_path / "tasks",
        far=QUESTIONS | hub,
        far_config=QUESTIONS | hub | {"dataset_name": "part"},
        code={**downstream.TASKS["answer"], "unsafe_code": True},
        broken={**QUESTIONS, "doc_to_text": "{{question"},
        no_split={**QUESTIONS, "test_split": "tset"},
        pictures={**downstream.TASKS["answer"], "doc_to_image": ["image"]},
        long={**downstream.TASKS["answer"], "generation_kwargs": {"until": ["."], "max_gen_toks": 64}},
        package={**QUESTIONS, "process_docs": "!function"},
    )


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        ("choise", {}, r"'choise' is neither a task, group or tag of lm-eval nor a suite \(did you mean 'choice'\?\)"),
        ("choice,", {}, "give names"),
        ("choice", {"num_fewshot": -1}, "num_fewshot: -1 should be 0 or more"),
        ("choice", {"include_path": (Path("/nowhere"),)}, "/nowhere: there is no such folder"),
        ("choice", {"task_data": Path("/nowhere")}, "/nowhere: there is no such folder"),
        ("code", {}, "code: would run code that the model writes: allow it with --allow-code-execution"),
        ("broken", {}, "broken: lm-eval cannot make a task of it"),
        ("no_split", {}, "no_split: lm-eval cannot make a task of it"),
        ("pictures", {}, "pictures: needs images or sound"),
        ("far", {}, r"the data set some/where cannot be loaded: .*: check the network and HF_HUB_OFFLINE, or give"),
        ("far_config", {}, r"the data set some/where \(part\) cannot be loaded"),
    ],
)
@pytest.mark.usefixtures("never_loaded")
def test_mistakes_are_one_line_before_a_model_is_loaded(
    names: str, more: dict[str, Any], message: str, model: str, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "choise" in names:  # all of lm-eval's tasks take seconds to list, and are listed in another test
        monkeypatch.setattr("branchmix.evaluate.tasks.loading._complete", lambda name, index: True)
    with pytest.raises(BranchMixError, match=message) as caught:
        evaluate([model], tasks=TaskOptions(tuple(names.split(",")), **{"include_path": (tasks,), **more}))
    assert "\n" not in str(caught.value)


def test_what_only_the_model_shows_is_one_line_too(model: str, tasks: Path) -> None:
    for names, more, message in (
        (("long",), {}, "max_length: 64 is too short for a task that lets the model write 64 tokens"),
        (("letters",), {"max_length": 65}, "max_length: 65 is more than the 64 positions"),
        (("words",), {"max_length": 1}, "max_length: 1 is less than the"),
    ):
        with pytest.raises(RecipeError, match=message) as caught:
            evaluate([model], tasks=TaskOptions(names, include_path=(tasks,)), **more)
        assert "\n" not in str(caught.value)


def test_the_same_task_with_two_numbers_of_examples(model: str, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = {"title": "Test", "members": [{"task": "choice", "num_fewshot": 1, "metric": "acc"}]}
    monkeypatch.setitem(options_module.SUITES, "bam-test", suite)
    with pytest.raises(RecipeError, match="choice is listed twice, with 1 and with 2 examples"):
        evaluate([model], tasks=TaskOptions(("bam-test", "choice"), include_path=(tasks,)), limit=1)
    report = evaluate([model], tasks=TaskOptions(("bam-test", "choice"), 1, include_path=(tasks,)), limit=1)
    assert report.models[0].suites["bam-test"].score.value == report.models[0].tasks["choice"].metrics["acc"].value


@pytest.mark.usefixtures("never_loaded")
def test_the_command_refuses_in_one_line(model: str, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        ([], "there is nothing to evaluate on: give --data, --tasks or both"),
        (["--tasks", "choice", "--ensemble", model], "ensemble: the outputs are averaged on the documents of --data"),
        (["--data", "x.yaml", "--num-fewshot", "2"], "--num-fewshot: is about downstream tasks"),
        (["--data", "x.yaml", "--allow-code-execution"], "--allow-code-execution: is about downstream tasks"),
        (["--tasks", "code", "--include-path", str(tasks)], "--allow-code-execution, best in a container"),
    ):
        result = CliRunner().invoke(app, ["eval", model, *arguments])
        assert isinstance(result.exception, RecipeError) and message in str(result.exception)
    monkeypatch.setattr(options_module, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["eval", model, "--tasks", "choice"])
    assert str(result.exception) == "tasks: lm-eval is not installed: pip install 'branchmix[tasks]'"


@pytest.mark.usefixtures("never_loaded")
def test_exit_code_and_stderr(
    model: str, tasks: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["branchmix", "eval", model, "--tasks", "far", "--include-path", str(tasks)])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capfd.readouterr()
    assert stopped.value.code == 2 and not out
    (line,) = err.splitlines()
    assert line.startswith("error: the data set some/where cannot be loaded")


# ---- answers, texts and prompts without tokens of their own ----


def with_rows(folder: Path, name: str, rows: list[dict[str, Any]], **task: Any) -> TaskOptions:
    """A task of one's own on these rows."""
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
    downstream.write_lines(folder / f"{name}.jsonl", rows)
    downstream.write_task(folder, name, {**data, **task})
    return TaskOptions((name,), include_path=(folder,))


def choosing(folder: Path, rows: list[dict[str, Any]]) -> TaskOptions:
    keys = ("output_type", "doc_to_text", "doc_to_choice", "doc_to_target")
    task = {key: downstream.TASKS["choice"][key] for key in keys}
    return with_rows(folder, "own", rows, **task, target_delimiter="", metric_list=[{"metric": "acc"}])


def answers_in(folder: Path) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    return [line["result"] for line in lines if "request" in line]


MERGES = {"question": "one two thre", "choices": ["e", " of"], "answer": 1}
"""The tokenizer has one token for " three", and so "e" none of its own."""


def test_an_answer_without_a_token_of_its_own_does_not_win(model: str, tmp_path: Path) -> None:
    good = {"question": "one two", "choices": [" of", " three"], "answer": 0}
    tokens = [corpora.tokenizer().encode(text) for text in ("one two three", "one two thre")]
    assert len(tokens[0]) <= len(tokens[1])
    for choices in (["e", " of"], ["", " of"], ["", ""]):
        rows = [good, good, {**MERGES, "choices": choices}]
        with pytest.raises(RecipeError, match=f"tasks: own, document 2: the answer '{choices[0]}' has no token of it"):
            evaluate([model], tasks=choosing(tmp_path, rows), out=tmp_path / "out")
    nothing = {"question": "", "choices": ["", ""], "answer": 0}
    with pytest.raises(RecipeError, match="tasks: own, document 1: the answer '' has no token of its own"):
        evaluate([model], tasks=choosing(tmp_path, [good, nothing]))


def test_an_answer_that_merges_is_scored_as_by_scaling_and_counted(model: str, tmp_path: Path) -> None:
    rows = [
        {**MERGES, "choices": ["e of even number", " of"]},
        {"question": "  ", "choices": ["one", " two"], "answer": 0},
    ]
    report = evaluate([model], tasks=choosing(tmp_path, rows), out=tmp_path / "out", dtype="float32")
    (note,) = [note for note in report.notes if "merges" in note]
    assert note.startswith(f"{model}: in 1 requests the answer merges with the prompt's last token")
    loaded, tokenizer = load(Path(model)), corpora.tokenizer()
    wanted = [naive(loaded, tokenizer, rows[0]["question"], choice) for choice in rows[0]["choices"]]
    bos = (tokenizer.eos_token_id,)  # nothing but spaces, which move to the answer, is as no prompt at all
    wanted += [naive(loaded, tokenizer, "", f"  {choice}", bos) for choice in rows[1]["choices"]]
    found = [logp for logp, _ in answers_in(tmp_path / "out")]
    assert sorted(found) == pytest.approx(sorted(wanted), abs=1e-5)
    again = evaluate([model], tasks=choosing(tmp_path, rows), out=tmp_path / "out", dtype="float32")
    assert note in again.notes


def test_texts_and_prompts_without_tokens(model: str, tmp_path: Path) -> None:
    """An empty text counts for nothing, as in lm-eval; to an empty prompt the model writes what it writes after EOS."""
    task = {key: value for key, value in downstream.TASKS["text"].items() if key != "dataset_kwargs"}
    bits = []
    for rows in (["", corpora.text(3), ""], [corpora.text(3)]):
        given = with_rows(tmp_path, "texts", [{"text": row} for row in rows], **task)
        tasks = evaluate([model], tasks=given, dtype="float32").models[0].tasks
        assert tasks is not None
        bits.append(tasks["texts"].metrics["bits_per_byte"].value)
    assert bits[0] == pytest.approx(bits[1], rel=1e-6)
    with pytest.raises(RecipeError, match="tasks: texts: all its texts are empty: there is nothing to evaluate"):
        evaluate([model], tasks=with_rows(tmp_path, "texts", [{"text": ""}] * 2, **task))
    rows = [{"question": "", "written": "x"}, {"question": "one two", "written": "x"}]
    out = tmp_path / "out"
    evaluate([model], tasks=with_rows(tmp_path, "writes", rows, **downstream.TASKS["answer"]), out=out, dtype="float32")
    loaded, tokenizer = load(Path(model)), corpora.tokenizer()
    wanted = []
    for start in ([tokenizer.eos_token_id], tokenizer.encode("one two")):
        ids = torch.tensor([start])
        new = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[0]
        wanted.append(tokenizer.decode(new[len(start) :], skip_special_tokens=True).split(".")[0])
    assert sorted(answers_in(out)) == sorted(wanted)


def test_halves_of_surrogate_pairs_in_task_data(model: str, tmp_path: Path) -> None:
    """`datasets` reads none; what a task's own code makes is replaced and counted."""
    from lm_eval.api.instance import Instance

    from branchmix.evaluate.tasks.answers import FILE, RecordedModel
    from branchmix.likelihood.records import Journal

    with pytest.raises(BranchMixError) as caught:
        evaluate([model], tasks=choosing(tmp_path, [MERGES, {**MERGES, "question": "half \ud83d"}]))
    assert "\n" not in str(caught.value)
    candidate = TextModel(resolve(model), "float32", False)
    asked = RecordedModel(candidate, Journal(None, FILE, "request"), max_length=64, batch_tokens=100)
    found = []
    for texts in (("half \ud83d", " a"), ("half \ufffd", " a")):
        found += asked.loglikelihood([Instance("loglikelihood", {}, texts, 0, metadata=("t", 0, 1))])
    written = [
        asked.generate_until([Instance("generate_until", {}, (text, {"until": ["."], "max_gen_toks": 4}), 0)])
        for text in ("half \ud83d", "half \ufffd")
    ]
    assert found[0] == found[1] and written[0] == written[1] and asked.replaced == 2


# ---- data sets and metrics in local folders ----


def test_a_git_lfs_pointer_is_not_data(model: str, tasks: Path, tmp_path: Path) -> None:
    file = tmp_path / "data" / "some/where" / "test.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(DataError, match=r"test.jsonl: is a Git LFS pointer, not the file itself: run `git lfs pull`"):
        evaluate([model], tasks=TaskOptions(("far",), include_path=(tasks,), task_data=tmp_path / "data"))


def test_a_local_folder_goes_before_the_hub(model: str, tasks: Path, tmp_path: Path) -> None:
    rows = downstream.documents(6, first=900)
    for place, part in (("some/where", ""), ("where", ""), ("some/where", "part")):
        data = tmp_path / f"data-{place.replace('/', '-')}-{part}"
        downstream.write_lines(data / place / part / "test.jsonl", rows)
        name = "far_config" if part else "far"
        report = evaluate([model], tasks=TaskOptions((name,), include_path=(tasks,), task_data=data))
        assert report.models[0].tasks is not None and report.models[0].tasks[name].examples == 6
    (data / "some/where/part/test.jsonl").write_text("{no json\n")
    with pytest.raises(DataError, match=r"where/part: the data set some/where \(part\) cannot be read"):
        evaluate([model], tasks=TaskOptions(("far_config",), include_path=(tasks,), task_data=data))


def test_a_copy_of_a_hub_repository_has_its_own_configurations(model: str, tasks: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    downstream.write_lines(data / "some/where/a.jsonl", downstream.documents(3))
    downstream.write_lines(data / "some/where/b.jsonl", downstream.documents(4))
    files = {"all": "a.jsonl", "part": "b.jsonl"}
    configs = [{"config_name": name, "data_files": [{"split": "test", "path": file}]} for name, file in files.items()]
    (data / "some/where/README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    report = evaluate([model], tasks=TaskOptions(("far_config",), include_path=(tasks,), task_data=data))
    assert report.models[0].tasks is not None and report.models[0].tasks["far_config"].examples == 4


def test_code_runs_only_with_leave(model: str, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")  # not enough
    downstream.write_task(
        tasks,
        "code",
        {
            **downstream.TASKS["answer"],
            "unsafe_code": True,
            "metric_list": [{"metric": "runs", "aggregation": "mean"}],
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tasks / "test.jsonl")}},
        },
    )
    metric = tmp_path / "data" / "evaluate-metric" / "runs" / "runs.py"
    metric.parent.mkdir(parents=True)
    metric.write_text(CODE)
    given = {"include_path": (tasks,), "task_data": tmp_path / "data"}
    with pytest.raises(RecipeError, match="allow-code-execution"):
        evaluate([model], tasks=TaskOptions(("code",), **given), limit=2)
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL")
    report = evaluate([model], tasks=TaskOptions(("code",), allow_code_execution=True, **given), limit=2)
    assert report.models[0].tasks is not None and report.models[0].tasks["code"].metrics["runs"].value == 1.0
    assert "HF_ALLOW_CODE_EVAL" not in os.environ
    with pytest.raises(DataError, match="the metric runs cannot be loaded"):
        evaluate([model], tasks=TaskOptions(("code",), include_path=(tasks,), allow_code_execution=True), limit=2)

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
from typer.testing import CliRunner

import corpora
import downstream
from branchmix.cli import app, main
from branchmix.errors import BranchMixError, DataError, RecipeError
from branchmix.evaluate.candidate import Candidate
from branchmix.evaluate.run import evaluate
from branchmix.evaluate.tasks import options as options_module
from branchmix.evaluate.tasks.options import TaskOptions

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

    def refuse(self: Candidate) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Candidate, "model", refuse)


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
        ("choise", {}, r"'choise' is no task, group or tag of lm-eval and no suite \(did you mean 'choice'\?\)"),
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
    from branchmix.evaluate.tasks import suites

    suite = suites.Suite("Test", (suites.Member("choice", 1, "acc"),))
    monkeypatch.setitem(suites.SUITES, "bam-test", suite)
    with pytest.raises(RecipeError, match="choice stands twice, with 1 and with 2 examples"):
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


# ---- data sets and metrics in local folders ----


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

"""The paper's groups of tasks as suites: they are lm-eval's tasks with the paper's shots, and their means are right."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import corpora
import hub_copies
from branchmix.cli import app
from branchmix.errors import RecipeError
from branchmix.evaluate.evaluation import evaluate
from branchmix.evaluate.scores import Measured
from branchmix.evaluate.tasks.definitions.quac.scoring import process_results
from branchmix.evaluate.tasks.options import SUITES, TaskOptions

pytest.importorskip("lm_eval")

from branchmix.evaluate.tasks import loading
from branchmix.evaluate.tasks.task_evaluation import _mean

PAPER = {
    "bam-math": {"gsm8k": 8, "math": 4},
    "bam-code": {"humaneval": 0, "mbpp": 3},
    "bam-law": {"international_citizenship_questions": None},
    "bam-knowledge": {"nq": 0, "triviaqa": 0},
    "bam-reasoning": {"arc_easy": 0, "arc_challenge": 0, "iqa": 0, "piqa": 0, "winogrande": 0, "quac": 0},
    "bam-mmlu": {"mmlu": 5},
}
"""arXiv 2408.08274, section 5.3: a part of each task's name, and its examples in the prompt."""


@pytest.fixture(scope="module")
def manager() -> Any:
    """All of lm-eval's tasks, and ours."""
    return loading.TaskManager(include_path=[str(loading.DEFINITIONS)])


def leaves(name: str, manager: Any) -> list[Any]:
    """The tasks below a name, as lm-eval lists them."""
    entry = manager.task_index[name]
    children = loading._children(entry)
    return [leaf for child in children for leaf in leaves(child, manager)] if children else [entry]


def test_every_task_exists_with_the_papers_shots(manager: Any) -> None:
    assert list(SUITES) == list(PAPER)
    for name, suite in SUITES.items():
        for member, (part, shots) in zip(suite["members"], PAPER[name].items(), strict=True):
            assert part in member["task"]
            assert member["task"] in manager.task_index, f"{member['task']} is no task"
            if shots is not None:
                assert member["num_fewshot"] == shots
            for leaf in leaves(member["task"], manager):
                own = leaf.cfg.get("num_fewshot")
                assert member.get("runs_code", False) == bool(leaf.cfg.get("unsafe_code"))
                assert own in (None, member["num_fewshot"]), "lm-eval means another number"
                if member["num_fewshot"]:
                    assert {"fewshot_split", "fewshot_config", "training_split"} & set(leaf.cfg), "has no examples"


def test_the_count_of_what_stands_for_a_group(manager: Any) -> None:
    assert len(leaves("mmlu", manager)) == 57
    assert len(leaves("minerva_math", manager)) == 7


def test_ours_is_only_what_lm_eval_lacks(manager: Any) -> None:
    ours = {path.stem for path in loading.DEFINITIONS.rglob("*.yaml")}
    theirs = [name for name in manager.task_index if "quac" in name]
    assert ours == set(theirs) == {"quac"}


def test_names(manager: Any) -> None:
    assert loading._matching("arc_*", manager.task_index)[:2] == ["arc_ar", "arc_bn"] or "arc_easy" in (
        loading._matching("arc_*", manager.task_index)
    )
    for given, message in (("arc_esay", "did you mean 'arc_easy'"), ("nothing*", "no task's name fits")):
        with pytest.raises(RecipeError, match=message):
            loading._matching(given, manager.task_index)
    for name in ("humaneval", "mbpp"):
        with pytest.raises(RecipeError, match=f"{name}: would run code"):
            loading._refuse_code([name, "mmlu"], manager.task_index, TaskOptions((name,)))
    loading._refuse_code(["mmlu", "quac"], manager.task_index, TaskOptions(("mmlu",)))


@pytest.mark.parametrize("name", ["bam", "bam-code", "humaneval", "mbpp"])
def test_code_of_suites_is_refused_before_anything_is_read(name: str) -> None:
    with pytest.raises(RecipeError, match=r"(humaneval|mbpp): would run code .* --allow-code-execution"):
        evaluate(["nobody/downloads-this"], tasks=TaskOptions(("bam-mmlu", name)))


def test_which_suites() -> None:
    assert list(TaskOptions(("bam",)).suites) == list(SUITES)
    assert list(TaskOptions(("bam-mmlu", "arc_easy", "bam-math")).suites) == ["bam-math", "bam-mmlu"]


def test_a_mean_and_its_error() -> None:
    found = _mean([Measured(0.2, 0.03), Measured(0.4, 0.04)])
    assert (found.value, found.stderr) == (pytest.approx(0.3), pytest.approx(math.hypot(0.03, 0.04) / 2))
    assert _mean([Measured(0.2, 0.03), Measured(0.4, None)]).stderr is None


@pytest.mark.parametrize(
    ("answer", "f1", "exact"),
    [
        ("The big red dog!", 1.0, 1.0),
        ("dog", 0.5, 0.0),
        ("a dog dog", 0.4, 0.0),
        ("CANNOTANSWER", 1.0, 1.0),
        ("", 0.0, 0.0),
        ("nothing of it", 0.0, 0.0),
    ],
)
def test_words_in_common(answer: str, f1: float, exact: float) -> None:
    found = process_results({"references": ["big red dog", "", "CANNOTANSWER"]}, [answer])
    assert found == {"f1": pytest.approx(f1), "exact_match": exact}


@pytest.mark.slow
def test_the_whole_paper_without_network(
    siblings: Callable[..., dict[str, Path]], manager: Any, tmp_path: Path
) -> None:
    """Every task of the paper from local folders: data sets are found, metrics exist, means are plain means."""
    model = tmp_path / "seed"
    shutil.copytree(siblings("llama", vocab_size=300, max_position_embeddings=4096)["seed"], model)
    corpora.tokenizer().save_pretrained(model)
    subjects = [leaf.cfg["dataset_name"] for leaf in leaves("mmlu", manager)]
    data = hub_copies.write_copies(tmp_path / "data", subjects)
    options = TaskOptions(("bam",), task_data=data, allow_code_execution=True)
    report = evaluate([str(model)], tasks=options, out=tmp_path / "out", limit=1)
    found = report.models[0]
    assert found.tasks is not None and list(found.suites) == [*SUITES, "bam"]
    for name, suite in SUITES.items():
        values = [found.tasks[member["task"]].metrics[member["metric"]].value for member in suite["members"]]
        assert found.suites[name].score.value == pytest.approx(sum(values) / len(values))
        for member in suite["members"]:
            assert found.tasks[member["task"]].num_fewshot == member["num_fewshot"]
            assert all(0 <= value <= 1 for value in values)
    (written,) = (tmp_path / "out" / "examples").rglob("humaneval.jsonl")
    assert "def f3():" in written.read_text()
    means = [found.suites[name].score.value for name in SUITES]
    assert found.suites["bam"].score.value == pytest.approx(sum(means) / 6)
    given = ["--tasks", "bam", "--task-data", str(data), "--allow-code-execution", "--limit", "1"]
    table = CliRunner().invoke(app, ["eval", str(model), *given, "--out", str(tmp_path / "out")])
    assert table.exit_code == 0, table.output
    head = next(line for line in table.stdout.splitlines() if line.startswith("model "))
    assert head.split() == ["model", "Math", "Code", "Law", "Know.", "Reason.", "MMLU", "Avg"]
    assert "requests were on record" in table.stderr

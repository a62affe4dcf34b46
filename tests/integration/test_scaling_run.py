"""`branchmix scaling run`: scores, what is refused and counted, resuming, and that `scaling trends` reads them."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from typer.testing import CliRunner

import corpora
from branchmix.cli import app, main
from branchmix.errors import DataError
from branchmix.scaling.examples import Example, jsonl
from branchmix.scaling.generate import make_examples
from branchmix.scaling.score_family import run
from branchmix.scaling.scoring import passes
from branchmix.scaling.tasks import TASKS
from branchmix.upcycling import upcycle
from mixtures import load, recipe
from processes import started
from scaling_runs import PLAIN, lines, naive, with_tokenizer, write_family, write_task

SIZES = {"vocab_size": 300, "max_position_embeddings": 256}


@pytest.fixture(scope="module")
def models(siblings: Callable[..., dict[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Dense siblings and their mixture."""
    home = tmp_path_factory.mktemp("models")
    found = {name: with_tokenizer(path, home / name) for name, path in siblings("llama", **SIZES).items()}
    upcycle(recipe(found), home / "mixture")
    return {**found, "mixture": home / "mixture"}


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["scaling", *map(str, arguments)])


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command says on stderr when it refuses: one line, exit code 2."""
    argv = ["branchmix", "scaling", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said


def table(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "results.csv").open()))


# ---- what is computed ----


def test_dense_and_mixture_score_as_a_plain_loop_and_trends_reads_it(models: dict[str, Path], tmp_path: Path) -> None:
    task = write_task(tmp_path, "plain", PLAIN)
    members = [str(models["seed"]), {"model": str(models["mixture"]), "family": "mixtures", "seed": 3}]
    out = tmp_path / "out"
    found = invoke(
        "run", write_family(tmp_path, members), "--tasks", task, "--out", out, "--dtype", "float32", "--json"
    )
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout)
    tokenizer = corpora.tokenizer()
    for name, place in (("seed", "seed"), ("mixture", "mixture/seed-3")):
        model = load(models[name])
        scored = lines(out / "examples" / place / "plain.jsonl")
        assert [line["key"] for line in scored] == [str(n) for n in range(len(PLAIN))]
        correct = []
        for line, example in zip(scored, PLAIN, strict=True):
            wanted = [naive(model, tokenizer, example.prompt, option) for option in example.classes]
            assert line["logprobs"] == pytest.approx(wanted, abs=1e-5)
            top = max(wanted)
            total = top + math.log(sum(math.exp(value - top) for value in wanted))
            assert line["loss"] == pytest.approx(total - wanted[example.answer_index], abs=1e-5)
            assert line["coverage"] == pytest.approx(math.exp(total), rel=1e-4)
            assert line["predicted"] == wanted.index(top)
            correct.append(wanted.index(top) == example.answer_index)
            assert line.get("template") == example.template
        rows = {row["metric"]: row for row in table(out) if row["model"] == name}
        mean = sum(correct) / len(correct)
        assert float(rows["accuracy"]["value"]) == pytest.approx(mean)
        assert float(rows["accuracy"]["stderr"]) == pytest.approx(math.sqrt(mean * (1 - mean) / (len(correct) - 1)))
        assert float(rows["loss"]["value"]) == pytest.approx(sum(line["loss"] for line in scored) / len(scored))
        assert rows["accuracy"]["n"] == rows["loss"]["n"] == str(len(PLAIN))
    assert [(m["name"], m["family"], m["params"] > m["active_params"]) for m in report["models"]] == [
        ("seed", "tiny", False),
        ("mixture", "mixtures", True),
    ]
    result = report["results"][0]
    assert result["bos"] == {"policy": "default", "tokens": []} and result["metric"] == "classification"
    assert result["seconds"] > 0 and result["examples_per_second"] > 0 and result["chance"]["accuracy"] < 0.5
    judged = invoke("trends", out, "--axis", "params", "--json")
    assert judged.exit_code == 0, judged.output
    assert json.loads(judged.stdout)["tasks"]["plain"]["accuracy"]["verdict"] == "not-testable"
    assert "have a mean of" not in judged.stderr


def test_as_lm_eval_on_the_same_file(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own task of the same jsonl: each option's log-probability, for a dense model and a mixture."""
    pytest.importorskip("lm_eval")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task = write_task(tmp_path / "ours", "plain", PLAIN)
    (tmp_path / "theirs").mkdir()
    data = tmp_path / "ours" / "plain.jsonl"
    (tmp_path / "theirs" / "plain.yaml").write_text(
        f"task: plain\ndataset_path: json\ndataset_kwargs: {{data_files: {data}}}\ntest_split: train\n"
        "output_type: multiple_choice\ndoc_to_text: '{{prompt}}'\ndoc_to_choice: '{{classes}}'\n"
        "doc_to_target: answer_index\ntarget_delimiter: ''\nmetric_list: [{metric: acc}]\nmetadata: {version: 0}\n"
    )
    family = write_family(tmp_path, [str(models["seed"]), str(models["mixture"])])
    run(family, tasks=str(task), out=tmp_path / "out", dtype="float32")
    for name in ("seed", "mixture"):
        lm = HFLM(pretrained=load(models[name]), tokenizer=corpora.tokenizer(), batch_size=3)
        manager = TaskManager(include_path=str(tmp_path / "theirs"), include_defaults=False)
        found = simple_evaluate(lm, tasks=["plain"], task_manager=manager, bootstrap_iters=0)
        samples = sorted(found["samples"]["plain"], key=lambda sample: sample["doc_id"])
        for line, sample in zip(lines(tmp_path / "out" / "examples" / name / "plain.jsonl"), samples, strict=True):
            wanted = [float(response[0][0]) for response in sample["resps"]]
            assert line["logprobs"] == pytest.approx(wanted, abs=1e-4)
            assert line["correct"] == sample["acc"]


@pytest.mark.parametrize("metric", ["sequence_prob", "logodds", "absolute_logodds"])
def test_the_prizes_other_metrics(models: dict[str, Path], tmp_path: Path, metric: str) -> None:
    if metric == "sequence_prob":
        examples = [Example(e.prompt, completion=e.answer) for e in PLAIN]
    else:
        examples = [
            Example(e.prompt, e.classes[:2], min(e.answer_index, 1), other_prompt=f"{e.prompt.strip()} of")
            for e in PLAIN
        ]
    task = write_task(tmp_path, "other", examples, metric)
    run(write_family(tmp_path, [str(models["code"])]), tasks=str(task), out=tmp_path / "out", dtype="float32")
    model, tokenizer = load(models["code"]), corpora.tokenizer()
    name = "loss" if metric == "sequence_prob" else metric
    for line, example in zip(lines(tmp_path / "out/examples/code/other.jsonl"), examples, strict=True):
        odds = []
        for prompt in (example.prompt, example.other_prompt):
            found = [naive(model, tokenizer, prompt, option) for option in example.options] if prompt else [0.0, 0.0]
            odds.append(found[0] - found[1] if len(found) > 1 else -found[0])
        if metric == "sequence_prob":
            assert line[name] == pytest.approx(odds[0], abs=1e-5) and "correct" not in line
            continue
        wanted = (odds[0] - odds[1]) * (1 if example.answer_index == 0 else -1)
        assert line[name] == pytest.approx(abs(wanted) if metric == "absolute_logodds" else wanted, abs=2e-5)
        assert line["correct"] == int((0 if odds[1] >= 0 else 1) == example.answer_index)
    metrics = {row["metric"] for row in table(tmp_path / "out")}
    assert metrics == ({name} if metric == "sequence_prob" else {name, "accuracy"})


@pytest.mark.parametrize("policy", ["on", "off"])
def test_the_bos_policy_changes_scores_and_is_recorded(models: dict[str, Path], tmp_path: Path, policy: str) -> None:
    task = write_task(tmp_path, "plain", PLAIN)
    model, tokenizer = load(models["seed"]), corpora.tokenizer()
    tokenizer_with_bos = corpora.tokenizer().__class__.from_pretrained(models["seed"])
    tokenizer_with_bos.bos_token = tokenizer_with_bos.eos_token
    folder = tmp_path / "seed"
    shutil.copytree(models["seed"], folder)
    tokenizer_with_bos.save_pretrained(folder)
    found = run(write_family(tmp_path, [str(folder)]), tasks=str(task), bos=policy, dtype="float32")
    bos = (tokenizer.eos_token_id,) if policy == "on" else ()
    for number, example, _, answer in found.results[0].scored:
        wanted = [naive(model, tokenizer, example.prompt, option, bos) for option in example.classes]
        assert answer["logprobs"] == pytest.approx(wanted, abs=1e-5), number
    assert found.as_dict()["results"][0]["bos"] == {"policy": policy, "tokens": list(bos)}


def test_neither_batch_size_nor_sharing_with_other_examples_changes_a_result(
    models: dict[str, Path], tmp_path: Path
) -> None:
    task = write_task(tmp_path, "plain", PLAIN)
    for name in ("seed", "mixture"):
        family = write_family(tmp_path, [str(models[name])])
        wanted = run(family, tasks=str(task), dtype="float32").results[0].scored
        small = run(family, tasks=str(task), dtype="float32", batch_tokens=1).results[0].scored
        for ours, theirs in zip(small, wanted, strict=True):
            assert ours[3]["logprobs"] == pytest.approx(theirs[3]["logprobs"], abs=1e-5)
        few = run(family, tasks=str(task), dtype="float32", limit=2).results[0].scored
        for ours, theirs in zip(few, wanted[:2], strict=True):
            assert ours[3]["logprobs"] == pytest.approx(theirs[3]["logprobs"], abs=1e-5)


# ---- what is refused and counted ----


def test_an_example_longer_than_the_context_is_refused_and_counted(models: dict[str, Path], tmp_path: Path) -> None:
    limit = SIZES["max_position_embeddings"]
    tokenizer = corpora.tokenizer()
    fits = "one" + " two" * (limit - 2)
    assert len(tokenizer.encode(fits)) == limit
    examples = [*PLAIN[:2], Example(fits, (" two", " of"), 0), Example(fits + " two", (" two", " of"), 0)]
    task = write_task(tmp_path, "long", examples)
    found = invoke("run", write_family(tmp_path, [str(models["seed"])]), "--tasks", task, "--out", tmp_path / "out")
    assert found.exit_code == 0, found.output
    assert "1 of 4 examples refused: longer than the context" in found.stderr
    scored = lines(tmp_path / "out/examples/seed/long.jsonl")
    assert [line["key"] for line in scored] == ["0", "1", "2", "3"]
    assert scored[3] == {"key": "3", "refused": "longer than the context"}
    assert {row["n"] for row in table(tmp_path / "out")} == {"3"}
    result = json.loads((tmp_path / "out/results.json").read_text())["results"][0]
    assert (result["examples"], result["n"], result["refused"]) == (4, 3, {"longer than the context": 1})
    everything = invoke(
        "run", write_family(tmp_path, [str(models["seed"])]), "--tasks", task, "--out", tmp_path / "out"
    )
    assert "4 of 4 answers were on record" in everything.stderr


def test_a_model_that_can_score_nothing_has_no_rows(models: dict[str, Path], tmp_path: Path) -> None:
    task = write_task(tmp_path, "long", [Example("one" + " two" * 300, (" a", " of"), 0)])
    found = invoke("run", write_family(tmp_path, [str(models["seed"])]), "--tasks", task, "--out", tmp_path / "out")
    assert found.exit_code == 0 and table(tmp_path / "out") == []
    assert "1 refused" in found.stdout


def test_a_class_that_merges_with_the_prompt_is_scored_as_lm_eval_does_and_counted(
    models: dict[str, Path], tmp_path: Path
) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocab = {token: number for number, token in enumerate(["<s>", "a", "b", "c", "d", "bc"])}
    made = Tokenizer(BPE(vocab, [("b", "c")], unk_token=None))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<s>")
    folder = tmp_path / "seed"
    shutil.copytree(models["seed"], folder)
    tokenizer.save_pretrained(folder)
    assert tokenizer.encode("abcd") == [1, 5, 4]
    examples = [Example("ab", ("cd", "da"), 0), Example("ab", ("c", "d"), 0), Example("aa", ("c", "d"), 1)]
    task = write_task(tmp_path, "merging", examples)
    found = run(write_family(tmp_path, [str(folder)]), tasks=str(task), dtype="float32").results[0]
    assert found.merged == 1 and found.refused == [(1, "an option has no token of its own")]
    model = load(models["seed"])
    for number, example, _, answer in found.scored:
        wanted = [naive(model, tokenizer, example.prompt, option) for option in example.classes]
        assert answer["logprobs"] == pytest.approx(wanted, abs=1e-5), number
    assert [number for number, *_ in found.scored] == [0, 2]


# ---- which examples ----


def test_official_and_fresh_files_become_two_curves(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = invoke("data", "make", tmp_path / "fresh", "--seed", 7, "--num", 12, "--tasks", "memo-trap,neqa")
    assert made.exit_code == 0
    task = TASKS["memo-trap"]
    (tmp_path / "official").mkdir()
    old = [replace(example, round=2) for example in make_examples(task, seed=8, num_examples=12)]
    (tmp_path / "official" / task.file).write_bytes(jsonl(old))
    family, out = write_family(tmp_path, [str(models["seed"])]), tmp_path / "out"
    folders = ("--data", tmp_path / "official", "--fresh", tmp_path / "fresh")
    found = invoke("run", family, *folders, "--out", out, "--limit", 8)
    assert found.exit_code == 0, found.output
    assert "memo-trap_classification.jsonl: is not the official file" in found.stderr
    assert "no files of resisting-correction" in found.stderr
    assert {(row["task"], row["data"]) for row in table(out)} == {
        ("memo-trap", "official"),
        ("memo-trap", "fresh"),
        ("neqa", "fresh"),
    }
    assert {row["n"] for row in table(out)} == {"8"} and {row["cause"] for row in table(out)} > {"strong prior"}
    assert len(lines(out / "examples/seed/memo-trap.fresh.jsonl")) == 8
    judged = invoke("trends", out, "--axis", "params", "--json")
    assert judged.exit_code == 0, judged.output
    # The same folders the other way round: what is fresh is known by the examples, and what is not is refused.
    again = invoke("run", family, "--data", tmp_path / "fresh", "--tasks", "neqa", "--out", out)
    assert {row["data"] for row in table(out)} == {"fresh"} and again.exit_code == 0
    wrong = mistake(capsys, "run", family, "--fresh", tmp_path / "official", "--tasks", "memo-trap")
    assert "is not fresh, for its round is not 0" in wrong
    both = ("--data", tmp_path / "fresh", "--fresh", tmp_path / "fresh")
    assert "both are fresh examples of neqa" in mistake(capsys, "run", family, *both, "--tasks", "neqa")


def test_shots_are_put_before_the_prompt(models: dict[str, Path], tmp_path: Path) -> None:
    task = write_task(tmp_path, "plain", PLAIN)
    found = run(write_family(tmp_path, [str(models["seed"])]), tasks=str(task), shots=2, dtype="float32", limit=3)
    model, tokenizer = load(models["seed"]), corpora.tokenizer()
    assert len(found.results[0].scored) == 3 and found.as_dict()["results"][0]["shots"] == 2
    for number, example, _, answer in found.results[0].scored:
        assert example.prompt.count("\n\n\n") == 2 and example.prompt.endswith(PLAIN[number].prompt)
        wanted = [naive(model, tokenizer, example.prompt, option) for option in example.classes]
        assert answer["logprobs"] == pytest.approx(wanted, abs=1e-5)


# ---- stopping and going on ----


def _slow_run(family: Path, task: Path, out: Path) -> None:
    """Small batches with a pause after each, so that there is time to kill it."""
    import time

    from branchmix.likelihood import records

    add = records.Journal.add

    def slowly(self: Any, line: dict[str, Any]) -> None:
        add(self, line)
        time.sleep(0.05)

    records.Journal.add = slowly  # type: ignore[method-assign]
    run(family, tasks=str(task), out=out, dtype="float32", batch_tokens=1)


def test_a_killed_run_goes_on_and_computes_only_what_is_missing(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = write_task(tmp_path, "many", [Example(corpora.text(n), (" two", " of"), n % 2) for n in range(40)])
    family, out = write_family(tmp_path, [str(models["seed"])]), tmp_path / "out"
    records = out / "records.jsonl"
    process = started(_slow_run, family, task, out)
    process.kill_when(lambda: records.exists() and len(records.read_bytes().splitlines()) > 8)
    there = sum("logprobs" in json.loads(line) for line in records.read_text().splitlines())
    assert 0 < there < 40 and not (out / "results.csv").exists()
    with records.open("ab") as file:
        file.write(b'{"model": "half a li')  # what a killed writer may leave
    computed: list[int] = []
    score = passes.score_options
    monkeypatch.setattr(
        passes, "score_options", lambda model, asked, **o: computed.append(len(asked)) or score(model, asked, **o)
    )
    resumed = run(family, tasks=str(task), out=out, dtype="float32")
    assert sum(computed) == 40 - there
    whole = run(family, tasks=str(task), dtype="float32")
    for ours, theirs in zip(resumed.results[0].scored, whole.results[0].scored, strict=True):
        assert ours[3]["logprobs"] == pytest.approx(theirs[3]["logprobs"], abs=1e-5)
    assert {row["n"] for row in table(out)} == {"40"}
    computed.clear()
    moved = Path(shutil.copytree(models["seed"], tmp_path / "moved"))
    again = run(
        write_family(tmp_path, [{"model": str(moved), "name": "other"}]), tasks=str(task), out=out, dtype="float32"
    )
    assert computed == [] and "40 of 40 answers were on record" in " ".join(again.notes)


def test_answers_of_this_run_are_not_on_record(models: dict[str, Path], tmp_path: Path) -> None:
    """Neither for a copy of the model nor for another task with the same questions; those of an earlier run are."""
    copy = str(shutil.copytree(models["seed"], tmp_path / "copy"))
    family = write_family(tmp_path, [str(models["seed"]), copy])
    tasks = ",".join(str(write_task(tmp_path, name, PLAIN)) for name in ("first", "second"))
    first = run(family, tasks=tasks, out=tmp_path / "out", limit=2)
    assert not [note for note in first.notes if "answers were on record" in note]
    again = run(family, tasks=tasks, out=tmp_path / "out", limit=2)
    assert len([note for note in again.notes if "4 of 4 answers were on record" in note]) == 2


def test_a_resumed_run_has_the_numbers_of_one_that_was_not_stopped(models: dict[str, Path], tmp_path: Path) -> None:
    """Bit for bit, wherever it was stopped."""
    shared = " ".join(corpora.WORDS * 4)  # so that keys and values are shared, too
    prompts = [f"{shared if n % 3 else ''} {corpora.text(n)}" for n in range(40)]
    classes = (" two", " of even", " prime number is")
    task = write_task(tmp_path, "many", [Example(prompt, classes, n % 2) for n, prompt in enumerate(prompts)])
    family = write_family(tmp_path, [str(models["mixture"])])
    given: dict[str, Any] = {"tasks": str(task), "dtype": "float32", "batch_tokens": 300}

    def answers(out: Path) -> dict[str, Any]:
        found = lines(out / "records.jsonl")
        return {line["question"]: line["logprobs"] for line in found if "question" in line}

    run(family, out=tmp_path / "whole", **given)
    whole = answers(tmp_path / "whole")
    assert len(whole) == 40
    for stops in (3, 17, 30):
        out = tmp_path / str(stops)

        def stop(step: str, done: int, total: int, stops: int = stops) -> None:
            if done == stops:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(family, out=out, progress=stop, **given)
        assert len(answers(out)) == stops
        run(family, out=out, **given)
        assert answers(out) == whole


def test_halves_of_surrogate_pairs_are_replaced_and_counted(models: dict[str, Path], tmp_path: Path) -> None:
    examples = [Example("half \ud83d", (" a\udc00", " b"), 0), Example("one two", (" a", " b"), 1)]
    whole = [Example("half \ufffd", (" a\ufffd", " b"), 0), examples[1]]
    family = write_family(tmp_path, [str(models["seed"])])
    ours, theirs = (run(family, tasks=str(write_task(tmp_path, "t", given))) for given in (examples, whole))
    assert [entry[3]["logprobs"] for entry in ours.results[0].scored] == [
        entry[3]["logprobs"] for entry in theirs.results[0].scored
    ]
    assert sum("t.jsonl: 1 example had half of a surrogate pair" in note for note in ours.notes) == 1
    with pytest.raises(DataError, match=r"t\.jsonl, line 1: classes must be two texts or more, all different"):
        run(family, tasks=str(write_task(tmp_path, "t", [Example("x", ("\ud83d", "\ud83e"), 0)])))


def test_ctrl_c_says_how_to_go_on(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = write_task(tmp_path, "plain", PLAIN)
    family, out = write_family(tmp_path, [str(models["seed"])]), tmp_path / "out"
    score = passes.score_options

    def interrupted(*arguments: Any, **options: Any) -> Any:
        for count, found in enumerate(score(*arguments, **options)):
            if count == 3:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(passes, "score_options", interrupted)
    found = invoke("run", family, "--tasks", task, "--out", out)
    assert found.exit_code == 130 and f"rerun the command to resume from the records in {out}" in found.stderr
    assert sum("logprobs" in line for line in lines(out / "records.jsonl")) == 3


# ---- what cannot be meant ----


def test_mistakes_are_one_line_and_exit_code_2(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, seed = write_task(tmp_path, "plain", PLAIN), str(models["seed"])
    good = write_family(tmp_path, [seed])
    cases: list[tuple[list[object], str]] = [
        ([tmp_path / "none.yaml", "--tasks", task], "none.yaml: there is no such file"),
        ([good, "--tasks", "memotrap", "--data", tmp_path], "there is no task 'memotrap' (did you mean"),
        ([good, "--tasks", "neqa", "--data", tmp_path], "has no neqa_classification.jsonl"),
        ([good, "--data", tmp_path], "has no file of any task"),
        ([good], "--data: give the folder"),
        ([good, "--data", tmp_path / "nowhere"], "nowhere: there is no such folder"),
        ([good, "--tasks", task, "--bos", "maybe"], "--bos maybe: is not one of default, on, off"),
        ([good, "--tasks", task, "--dtype", "int4"], "dtype: 'int4' is not one of"),
        ([good, "--tasks", task, "--out", task], "is a file: choose a folder"),
        ([good, "--tasks", task, "--shots", 8], "8 shots need 9 examples"),
    ]
    for arguments, words in cases:
        assert words in mistake(capsys, "run", *arguments), arguments
    for members, words in (
        ([seed, seed], "are both called seed: give each a `name`"),
        ([{"model": str(tmp_path / "gone")}], "no such folder"),
        ([{"model": seed, "sise": 3}], "there is no such key"),
        ([{"model": seed, "axes": {"params": 3}}], "'params' is a column of its own"),
        ([{"model": seed, "axes": {"quality": -3}}], "axes.quality: should be greater than 0"),
        ([{"model": seed, "name": "../up"}], "may have letters, digits"),
        ([], "models"),
    ):
        assert words in mistake(capsys, "run", write_family(tmp_path, members), "--tasks", task)

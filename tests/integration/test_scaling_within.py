"""`branchmix scaling run` along axes within a model: examples in the prompt, experts kept, experts of a token."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

import corpora
from branchmix.cli import app, main
from branchmix.models.experts_branchmix import BranchMixSparseMoeBlock
from branchmix.models.kept_branchmix import chosen_experts
from branchmix.models.routing_branchmix import BranchMixRouter
from branchmix.scaling.examples import fewshot
from branchmix.scaling.score_family import run
from branchmix.upcycling import upcycle
from mixtures import load, recipe
from scaling_runs import PLAIN, lines, naive, with_tokenizer, write_family, write_task

SIZES = {"vocab_size": 300, "max_position_embeddings": 256}


@pytest.fixture(scope="module")
def models(siblings: Callable[..., dict[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Dense siblings and their mixture, with gates that are scaled by N / k."""
    home = tmp_path_factory.mktemp("models")
    found = {name: with_tokenizer(path, home / name) for name, path in siblings("llama", **SIZES).items()}
    upcycle(recipe(found, routing={"ffn": {"top_k": 2}}, routed_scaling_factor="auto"), home / "mixture")
    return {**found, "mixture": home / "mixture"}


@pytest.fixture
def given(models: dict[str, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A family of the mixture alone, and a task."""
    return write_family(tmp_path, [str(models["mixture"])]), write_task(tmp_path, "plain", PLAIN)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["scaling", *map(str, arguments)])


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "results.csv").open()))


def logprobs(out: Path, place: str) -> list[list[float]]:
    return [line["logprobs"] for line in lines(out / "examples" / "mixture" / place / "plain.jsonl")]


def test_shots_are_an_axis_that_trends_pairs_by_question(given: tuple[Path, Path], tmp_path: Path) -> None:
    family, task = given
    out = tmp_path / "out"
    options = ("--tasks", task, "--dtype", "float32", "--out")
    found = invoke("run", family, "--shots", "0,1,2,3,4", *options, out)
    assert found.exit_code == 0, found.output
    assert "mixture, shots 4" in found.stdout
    assert [row["shots"] for row in rows(out) if row["metric"] == "loss"] == ["0", "1", "2", "3", "4"]
    for shots in (0, 3):
        alone = tmp_path / f"alone-{shots}"
        assert invoke("run", family, "--shots", shots, *options, alone).exit_code == 0
        assert "shots" not in rows(alone)[0]  # a single setting is no axis
        wanted = logprobs(alone, "")
        for line, others in zip(logprobs(out, f"shots-{shots}"), wanted, strict=True):
            assert line == pytest.approx(others, abs=1e-5)
    again = invoke("run", family, "--shots", "0,1,2,3,4", *options, out)
    assert "were on record" in again.stderr and rows(out)
    judged = invoke("trends", out, "--axis", "shots", "--json")
    assert judged.exit_code == 0, judged.output
    verdict = json.loads(judged.stdout)["tasks"]["plain"]["loss"]
    assert verdict["paired"] and verdict["sizes"] == 5 and json.loads(judged.stdout)["axis"] == "shots"


def test_the_prompts_that_are_scored_have_so_many_examples(given: tuple[Path, Path], models: dict[str, Path]) -> None:
    family, task = given
    found = run(family, tasks=str(task), shots=(0, 2), dtype="float32")
    model, tokenizer = load(models["mixture"]), corpora.tokenizer()
    for result, shots in zip(found.results, (0, 2), strict=True):
        assert result.settings == {"shots": shots}
        for (_, example, _, answer), wanted in zip(result.scored, fewshot(PLAIN, shots, 0), strict=True):
            assert example.prompt == wanted.prompt and wanted.prompt.count("\n\n\n") == shots
            expected = [naive(model, tokenizer, wanted.prompt, option) for option in wanted.options]
            assert answer["logprobs"] == pytest.approx(expected, abs=1e-5)


def test_experts_kept_are_those_that_the_gates_choose_for_the_prompt(
    given: tuple[Path, Path], models: dict[str, Path], tmp_path: Path
) -> None:
    family, task = given
    found = run(family, tasks=str(task), experts=(1, 2, 3), dtype="float32", out=tmp_path / "out")
    whole, tokenizer = load(models["mixture"]), corpora.tokenizer()
    assert whole.config.num_experts == 3
    choices = set()
    for result, count in zip(found.results, (1, 2, 3), strict=True):
        assert result.settings == {"experts": count}
        for _, example, _, answer in result.scored:
            ids = torch.tensor([tokenizer.encode(example.prompt.rstrip(), add_special_tokens=False)])
            (choice,) = chosen_experts(whole, count, ids)
            choices.add(choice)
            model = whole.keep_experts(list(choice)) if count < 3 else whole
            wanted = [naive(model, tokenizer, example.prompt, option) for option in example.options]
            assert answer["logprobs"] == pytest.approx(wanted, abs=1e-5)
    assert len(choices) > 3  # prompts differ in what they keep
    assert logprobs(tmp_path / "out", "experts-1") != logprobs(tmp_path / "out", "experts-3")


def test_experts_of_a_token(given: tuple[Path, Path], models: dict[str, Path], tmp_path: Path) -> None:
    """As the checkpoint with another ``num_experts_per_tok`` in its config; scaled by N / k as before."""
    family, task = given
    found = run(family, tasks=str(task), top_k=(1, 3), dtype="float32", out=tmp_path / "out")
    tokenizer = corpora.tokenizer()
    for result, top_k in zip(found.results, (1, 3), strict=True):
        model = load(models["mixture"], num_experts_per_tok=top_k, routed_scaling_factor=3 / top_k)
        assert result.settings == {"top_k": top_k}
        for _, example, _, answer in result.scored:
            wanted = [naive(model, tokenizer, example.prompt, option) for option in example.options]
            assert answer["logprobs"] == pytest.approx(wanted, abs=1e-5)
    assert logprobs(tmp_path / "out", "top_k-1") != logprobs(tmp_path / "out", "top_k-3")


@pytest.mark.parametrize("stored", [2, 3])
def test_experts_of_a_token_of_routers_with_biases(stored: int, models: dict[str, Path], tmp_path: Path) -> None:
    """Where all are chosen a bias decides nothing, and such routers have none to load."""
    whole = load(models["mixture"], num_experts_per_tok=stored, attention_num_experts_per_tok=1)
    whole.config.expert_bias = True
    for module in whole.modules():
        if isinstance(module, BranchMixRouter):
            module.add_bias()
            if module.expert_bias is not None:
                module.expert_bias.copy_(torch.tensor([0.5, 0.0, -0.5]))
    whole.save_pretrained(tmp_path / "mixture")
    with_tokenizer(tmp_path / "mixture", tmp_path / "biased")
    family, task = write_family(tmp_path, [str(tmp_path / "biased")]), write_task(tmp_path, "plain", PLAIN)
    found = run(family, tasks=str(task), top_k=(1, 3), dtype="float32")
    tokenizer, told = corpora.tokenizer(), []
    for result, top_k in zip(found.results, (1, 3), strict=True):
        for ffn in (module for module in whole.modules() if isinstance(module, BranchMixSparseMoeBlock)):
            ffn.gate.top_k, ffn.scaling = top_k, 3 / top_k if stored == 2 else 1.5
        for _, example, _, answer in result.scored:
            wanted = [naive(whole, tokenizer, example.prompt, option) for option in example.options]
            assert answer["logprobs"] == pytest.approx(wanted, abs=1e-5)
            told.append(answer["logprobs"])
    assert told[0] != told[len(told) // 2]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("seed", ["--experts", "1"], "--experts: seed is not a branchmix mixture"),
        ("seed", ["--top-k", "1"], "--top-k: seed is not a mixture"),
        ("mixture", ["--experts", "2,4"], "--experts 4: mixture has 3 experts"),
        ("mixture", ["--top-k", "4"], "--top-k 4: mixture has 3 experts"),
        (
            "mixture",
            ["--experts", "3,1", "--top-k", "1,2"],
            "--top-k 2: a token cannot go to more experts than --experts 1",
        ),
        ("mixture", ["--shots", "0,many"], "--shots: 'many' should be a whole number of 0 or more"),
        ("mixture", ["--experts", "0"], "--experts: '0' should be a whole number of 1 or more"),
        ("mixture", ["--shots", ","], "--shots is empty"),
    ],
)
def test_mistakes_are_one_line(
    model: str,
    options: list[str],
    message: str,
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["run", write_family(tmp_path, [str(models[model])]), "--tasks", write_task(tmp_path, "plain", PLAIN)]
    argv = ["branchmix", "scaling", *map(str, words), *options]
    with mock.patch.object(sys, "argv", argv), pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and message in said, said

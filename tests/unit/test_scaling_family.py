"""FAMILY.yaml, and what models have cost: every training once, through runs and merges."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from branchmix.accounting import flops_per_token, inspect
from branchmix.accounting.lineage import as_records, lineage, total
from branchmix.errors import RecipeError
from branchmix.scaling.family import FamilyFile, subjects
from branchmix.upcycling import add_expert, upcycle
from mixtures import recipe
from scaling_runs import write_family
from training import settings, write_run, write_text


def trained(folder: Path, tokens: int, start: Any, ancestors: Any = None) -> Path:
    """Makes a saved model look like the result of a run."""
    record: dict[str, Any] = {"config": {"model": start, "out": folder.name}, "tokens": tokens, "flops": tokens * 10}
    record["started"] = f"{folder.name}, some day"
    if ancestors is not None:
        record["ancestors"] = ancestors
    (folder / "training.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def models(siblings: Callable[..., dict[str, Path]], tmp_path: Path) -> dict[str, Path]:
    return {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in siblings("llama").items()}


def family(folder: Path, *members: Any) -> list[Any]:
    return subjects(FamilyFile.load(write_family(folder, list(members))))


def test_parameters_come_from_the_config_and_the_rest_from_the_file(models: dict[str, Path], tmp_path: Path) -> None:
    upcycle(recipe(models), tmp_path / "mix")
    dense, mixture, told = family(
        tmp_path,
        "seed",  # from the file's folder
        {"model": "mix", "family": "mixture", "seed": 2, "axes": {"quality": 3}},
        {"model": "code", "name": "told", "params": "3M", "active_params": "2M", "tokens": "5B", "flops": 1e18},
    )
    facts = inspect(tmp_path / "mix")
    assert (dense.name, dense.family, dense.seed, dense.params) == (
        "seed",
        "tiny",
        "",
        inspect(models["seed"]).total.total,
    )
    assert dense.active_params == dense.params and dense.tokens is None and dense.flops is None
    assert "no training of seed is on record" in dense.notes[0]
    assert (mixture.family, mixture.seed, mixture.axes) == ("mixture", "2", {"quality": 3.0})
    assert (mixture.params, mixture.active_params) == (facts.total.total, facts.active.total)
    assert mixture.active_params < mixture.params
    assert (told.params, told.active_params, told.tokens, told.flops) == (3_000_000, 2_000_000, 5 * 10**9, 1e18)
    assert told.notes == ()


def test_flops_follow_from_tokens_by_the_exact_accounting(models: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((models["seed"] / "config.json").read_text())
    whole, short = family(
        tmp_path,
        {"model": "seed", "tokens": 1000},
        {"model": "seed", "name": "short", "tokens": 1000, "sequence_length": 16},
    )
    assert whole.flops == 3000 * flops_per_token(config, 64).total
    assert short.flops == 3000 * flops_per_token(config, 16).total < whole.flops


def test_an_upcycled_mixture_counts_seed_and_experts_once(models: dict[str, Path], tmp_path: Path) -> None:
    trained(models["seed"], 1000, {"model_type": "llama"})
    for name, tokens in (("code", 300), ("math", 200)):
        trained(models[name], tokens, str(models["seed"]))
    assert total(lineage(models["code"]), "tokens") == 1300
    upcycle(recipe(models), tmp_path / "mix")
    for name in models:  # what the merge wrote down is enough
        shutil.rmtree(models[name])
    phases = lineage(tmp_path / "mix")
    assert [(phase.name, phase.tokens) for phase in phases] == [("seed", 1000), ("code", 300), ("math", 200)]
    assert (total(phases, "tokens"), total(phases, "flops")) == (1500, 15_000)
    trained(tmp_path / "mix", 50, "../elsewhere/mix", [vars(phase) for phase in phases])
    (subject,) = family(tmp_path, "mix")
    assert (subject.tokens, subject.flops) == (1550, 15_500)
    assert [phase["tokens"] for phase in subject.training][-1] == 50


def test_an_expert_that_joined_later_counts_too(
    models: dict[str, Path], siblings: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    trained(models["seed"], 1000, {"model_type": "llama"})
    for name, tokens in (("code", 300), ("math", 200)):
        trained(models[name], tokens, str(models["seed"]))
    late = trained(Path(shutil.copytree(siblings("llama")["code"], tmp_path / "late")), 70, str(models["seed"]))
    upcycle(recipe(models), tmp_path / "mix")
    add_expert(tmp_path / "mix", "late", late, tmp_path / "more")
    assert total(lineage(tmp_path / "more"), "tokens") == 1570
    # A run leaves no branchmix.json: what joins its result still grows from that run too.
    ancestors = as_records(lineage(tmp_path / "mix"))
    result = trained(Path(shutil.copytree(tmp_path / "mix", tmp_path / "run")), 50, str(tmp_path / "mix"), ancestors)
    (result / "branchmix.json").unlink()
    add_expert(result, "late", late, tmp_path / "most")
    assert total(lineage(tmp_path / "most"), "tokens") == 1620


def test_base_tokens_stand_for_a_root_without_a_record(models: dict[str, Path], tmp_path: Path) -> None:
    for name, tokens in (("code", 300), ("math", 200)):
        trained(models[name], tokens, str(models["seed"]))
    upcycle(recipe(models), tmp_path / "mix")
    (unknown,) = family(tmp_path, "mix")
    assert unknown.tokens is None and unknown.flops is None and "give base_tokens" in unknown.notes[0]
    (subject,) = family(tmp_path, {"model": "mix", "base_tokens": 10_000})
    config = json.loads((models["seed"] / "config.json").read_text())
    assert subject.tokens == 10_500
    assert subject.flops == 5000 + 3 * 10_000 * flops_per_token(config, 64).total
    trained(models["seed"], 1000, {"model_type": "llama"})
    with pytest.raises(RecipeError, match="there are 0"):
        family(tmp_path, {"model": "seed", "base_tokens": 5})


def test_runs_and_merges_write_what_they_grew_from(tmp_path: Path) -> None:
    """A seed, two experts, their mixture and its training, all by the library itself."""
    from branchmix.train.config import RunConfig
    from branchmix.train.run import train

    write_text(tmp_path)
    records = {}
    for name, model, steps in (("seed", None, 4), ("a", "seed", 3), ("b", "seed", 2), ("final", "mix", 1)):
        if name == "final":
            experts = [{"name": one, "model": str(tmp_path / one)} for one in ("a", "b")]
            upcycle({"seed": str(tmp_path / "seed"), "experts": experts}, tmp_path / "mix")
        changes = {} if model is None else {"model": str(tmp_path / model)}
        run = settings(tmp_path, out=str(tmp_path / name), budget={"steps": steps}, **changes)
        records[name] = train(RunConfig.load(write_run(tmp_path / "files" / name, run)), progress=False).record
    (tmp_path / "mix").rename(tmp_path / "moved")
    final, seed = family(tmp_path, "final", "seed")
    assert final.tokens == sum(record["tokens"] for record in records.values()) == 10 * 8 * 32
    assert final.flops == sum(record["flops"] for record in records.values())
    assert (seed.tokens, seed.flops) == (records["seed"]["tokens"], records["seed"]["flops"])

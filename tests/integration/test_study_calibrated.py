"""A study with a mixture whose gates are fitted before it is trained, and with its gates forced, at a tiny scale."""

from __future__ import annotations

import json
import math
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_study import STEP, settings, write_study
from transformers import dynamic_module_utils
from typer.testing import CliRunner

from branchmix.checkpoint.folder import write_json
from branchmix.cli import app
from branchmix.data.sources import is_held_out
from branchmix.evaluate.evaluation import evaluate
from branchmix.study.build import build
from branchmix.study.folder import rounded
from branchmix.study.measure import distance
from branchmix.study.report import report
from branchmix.study.results import collect
from branchmix.study.scheduler import StudyReport, study
from branchmix.study.settings import StudyFile
from branchmix.study.step import do
from branchmix.study.tables import distances
from branchmix.upcycling.gates import text as reading

METHODS = ["soup", "bam-expert-kv-calibrated", "bam-expert-kv-forced"]

OWN_CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast

class Own(PreTrainedTokenizerFast):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        Path({ran!r}).touch()
"""


class Done:
    """A finished study, and the documents that gates were fitted on."""

    def __init__(self, folder: Path):
        self.out, self.fitted_on = folder / "out", list[str]()
        self.file = write_study(
            folder,
            methods=METHODS,
            reference="bam-expert-kv-calibrated",
            keep="weights",
            inference={"prompt": 8, "new_tokens": 2, "runs": 1},
            tokens={"seed": 10 * STEP, "expert": 10 * STEP, "mixture": 4 * STEP},
            routes=["bam-expert-kv-calibrated"],
        )
        lines = (folder / "code.jsonl").read_text().splitlines()
        upper = [json.dumps({"text": json.loads(line)["text"].upper()}) for line in lines]
        (folder / "code.jsonl").write_text("\n".join(upper) + "\n")

    def result(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.out / "results" / f"{name}.json").read_text()))

    def folder(self, name: str) -> Path:
        return next(self.out.glob(f"steps/{name}-*"))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    made = Done(tmp_path_factory.mktemp("calibrated"))
    chosen = reading._chosen

    def noted(*args: Any, **options: Any) -> list[str]:
        found = chosen(*args, **options)
        made.fitted_on.extend(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_chosen", noted)
        found = study(made.file, made.out, launcher="inline", progress=False)
    assert not found.failed and not found.left
    return made


def test_gates_are_fitted_once_on_the_studys_text_but_for_what_it_holds_out(done: Done) -> None:
    given = [
        json.loads(line)["text"] for name in ("general", "code") for line in (done.file.parent / f"{name}.jsonl").open()
    ]
    assert sorted(done.fitted_on) == sorted(text for text in given if not is_held_out(text, 0.2))
    folder = done.folder("r1.upcycle.bam-expert-kv-calibrated")
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["gates"] == {"data": "data.yaml", "token_only": False}
    assert yaml.safe_load((folder / "data.yaml").read_text())["held_out"] == settings()["held_out"]
    assert json.loads((folder / "model" / "config.json").read_text())["document_gate"]["domains"] == ["code", "general"]
    assert not (done.folder("r1.upcycle.soup") / "data.yaml").exists()
    assert not list(done.out.glob("steps/r1.upcycle.bam-expert-kv-forced-*"))  # the same merge


def test_what_is_trained_is_the_calibrated_mixture_as_it_was_planned(done: Done) -> None:
    training = done.result("r1.train.bam-expert-kv-calibrated")["training"]
    planned = build(StudyFile.load(done.file)).steps["r1.train.bam-expert-kv-calibrated"].cost
    assert training["flops"] + training["optimizer_flops"] == planned.total and training["tokens"] == planned.tokens
    config = json.loads((done.folder("r1.train.bam-expert-kv-calibrated") / "model" / "config.json").read_text())
    assert config["document_gate"] is not None and config["num_experts_per_tok"] == 2


def test_forced_scores_are_those_of_eval(done: Done, tmp_path: Path) -> None:
    """For each domain those of one expert: of its name, else the best on the text that gates were fitted on."""
    step = done.result("r1.scores.bam-expert-kv-forced")
    fitted = done.result("r1.upcycle.bam-expert-kv-calibrated")["merge"]["gates"]["domains"]
    losses = {domain["name"]: domain["forced"] for domain in fitted}["general"]
    assert step["forced"] == {"general": min(losses, key=lambda name: losses[name]), "code": "code"}
    sources = {name: {"files": str(done.file.parent / f"{name}.jsonl")} for name in ("general", "code")}
    write_json(tmp_path / "data.yaml", {"data": sources, "held_out": settings()["held_out"]})
    folder = done.folder("r1.upcycle.bam-expert-kv-calibrated") / "model"
    rows = evaluate([str(folder)], tmp_path / "data.yaml", max_length=16, dtype="float32", forced=True).models
    by_expert = {model.model.partition(": ")[2].removesuffix(" only"): model for model in rows}
    for domain, expert in step["forced"].items():
        documents = step["documents"][domain]
        nats = sum(row[0] for row in documents) / sum(row[1] for row in documents)
        assert by_expert[expert].domains[domain].perplexity == pytest.approx(math.exp(nats), rel=1e-5)
    assert step["documents"]["code"] != done.result("r1.scores.bam-expert-kv-calibrated-step0")["documents"]["code"]


def test_how_far_an_expert_went_from_the_seed(done: Done) -> None:
    seed, code = (load_file(done.folder(f"r1.train.{n}") / "model" / "model.safetensors") for n in ("seed", "code"))
    for part, word in (("attention", "self_attn"), ("ffn", "mlp")):
        theirs = torch.cat([seed[name].flatten() for name in sorted(seed) if word in name])
        ours = torch.cat([code[name].flatten() for name in sorted(code) if word in name])
        expected = float((ours - theirs).norm() / theirs.norm())
        assert done.result("r1.train.code")["training"]["from_seed"][part] == pytest.approx(expected, abs=1e-4) != 0
    assert "from_seed" not in done.result("r1.train.seed")["training"]


def test_distances_of_a_seed_that_was_saved_as_a_base_model_and_of_what_cannot_be_compared(
    done: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expert, seed = done.folder("r1.train.code") / "model", tmp_path / "seed"
    shutil.copytree(done.folder("r1.train.seed") / "model", seed)
    stored = {name.removeprefix("model."): tensor for name, tensor in load_file(seed / "model.safetensors").items()}
    save_file(stored, seed / "model.safetensors", {"format": "pt"})
    assert rounded(distance(expert, seed)) == done.result("r1.train.code")["training"]["from_seed"]
    save_file({name: 0 * t if "attn" in name else t for name, t in stored.items()}, seed / "model.safetensors")
    assert set(distance(expert, seed)) == {"ffn"}
    save_file({name: t[..., :-1].contiguous() for name, t in stored.items()}, seed / "model.safetensors")
    assert distance(expert, seed) == {}
    (seed / "model.safetensors").write_bytes(b"")
    assert distance(expert, seed) == {}
    assert "how far it went from the seed is not known: " in capsys.readouterr().err


def test_a_part_whose_distance_is_not_known_is_left_empty(done: Done, tmp_path: Path) -> None:
    shutil.copytree(done.out / "results", tmp_path / "results")
    file = tmp_path / "results" / "r1.train.code.json"
    record = json.loads(file.read_text())
    record["training"]["from_seed"] = {"ffn": 0.25}
    file.write_text(json.dumps(record))
    assert distances(collect(tmp_path)).rows == [["Code expert", "", "25.0 %"]]


def test_merges_read_text_with_the_seeds_tokenizer_whose_code_runs_only_where_it_is_trusted(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    out, ran, trust = tmp_path / "out", tmp_path / "ran", "--trust-remote-code"
    name = "r1.upcycle.bam-expert-kv-calibrated"
    shutil.copytree(done.out, out)
    seed, merge = (next(out.glob(f"steps/{step}-*")) for step in ("r1.train.seed", name))
    (seed / "model" / "own.py").write_text(OWN_CODE.format(ran=str(ran)))
    file = seed / "model" / "tokenizer_config.json"
    write_json(file, {**json.loads(file.read_text()), "auto_map": {"AutoTokenizer": [None, "own.Own"]}})
    do(out, name)
    assert not ran.exists()
    plan = json.loads((out / "plan.json").read_text())
    write_json(out / "plan.json", {**plan, "settings": {**plan["settings"], "trust_remote_code": True}})
    do(out, name)
    ran.unlink()
    assert f"branchmix upcycle recipe.yaml MIXTURE {trust}\n" in (merge / "recipe.yaml").read_text()
    by_hand = ["upcycle", str(merge / "recipe.yaml"), str(tmp_path / "mixture")]
    assert CliRunner().invoke(app, by_hand).exit_code == 0 and not ran.exists()
    assert CliRunner().invoke(app, [*by_hand, "--force", trust]).exit_code == 0 and ran.exists()
    ran.unlink()
    recipe = yaml.safe_load((merge / "recipe.yaml").read_text())
    recipe |= {"gates": None, "router_init": {"prompts": {"seed": ["a word"], "code": ["A WORD"]}}}
    write_json(merge / "recipe.yaml", recipe)
    assert CliRunner().invoke(app, [*by_hand, "--force"]).exit_code == 0 and not ran.exists()
    assert CliRunner().invoke(app, [*by_hand, "--force", trust]).exit_code == 0 and ran.exists()


def test_the_report_shows_what_gates_are_worth_before_training(done: Done, tmp_path: Path) -> None:
    found = report(done.out, tmp_path, kinds=["html"])
    table = next(table for table in found.tables if table.name == "before-training")
    models = {model["title"]: model for model in found.numbers["models"]}
    rows = {row[0]: row for row in table.rows}
    assert set(rows) == {"Soup", "BAM Expert KV calibrated", "BAM Expert KV, forced gates"}
    assert rows["Soup"][3] == f"{models['soup']['geometric_mean']:.2f}" and rows["Soup"][4:] == ["", ""]
    went = next(table for table in found.tables if table.name == "distances").rows
    from_seed = done.result("r1.train.code")["training"]["from_seed"]
    assert went == [["Code expert", *(f"{100 * from_seed[part]:.1f} %" for part in ("attention", "ffn"))]]
    assert "What merging alone gives" in (tmp_path / "index.html").read_text()
    assert "routes-bam-expert-kv-calibrated.html" in (tmp_path / "index.html").read_text()
    assert {*done.result("inference")["inference"]["models"]} == {"seed", "soup", "bam-expert-kv-calibrated"}


def test_the_demo_prints_what_merging_alone_gives(done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    shutil.copytree(done.out / "results", tmp_path / "results")
    monkeypatch.setattr("branchmix.study.scheduler.study", lambda config, out: StudyReport(out, {"text": "done"}))
    monkeypatch.setattr("branchmix.study.report.report", partial(report, kinds=["html"]))  # no pictures as files
    shown = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)]).stdout
    assert shown.index("### Perplexity") < shown.index("### Before training") < shown.index("Before any training, ")

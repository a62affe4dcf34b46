"""``branchmix study`` end to end at a tiny scale: equal data, equal compute, results, reports, going on, redoing."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from branchmix.cli import app
from branchmix.data.config import Source
from branchmix.data.sequences import Sequences
from branchmix.errors import DataError, OutputError, RecipeError
from branchmix.evaluate.evaluation import evaluate
from branchmix.settings import parse
from branchmix.study import step as steps
from branchmix.study.build import build
from branchmix.study.forecast import forecast
from branchmix.study.measure import HeldOutText
from branchmix.study.report import report
from branchmix.study.results import collect
from branchmix.study.scheduler import StudyReport, study
from branchmix.study.settings import StudyFile
from branchmix.study.speed import Speed, kind_of
from branchmix.train import train
from branchmix.train.config import RunConfig
from corpora import tokenizer, write_jsonl
from mixtures import random_mixture
from pages import checked

STEP = 16 * 4
MODEL = {
    "model_type": "cohere",
    "train_tokenizer": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "logit_scale": 1.0,
    "max_position_embeddings": 64,
}


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "seed": MODEL,
        "data": {"general": {"files": "general.jsonl"}, "code": {"files": "code.jsonl"}},
        "held_out": {"share": 0.2, "tokens": 300},
        "sequence_length": 16,
        "batch_size": 4,
        "tokens": {"seed": 4 * STEP, "expert": 3 * STEP, "mixture": 12 * STEP},
        "learning_rate": {"peak": 1e-2},
        "methods": ["btx", {"method": "bam-expert-kv", "match": ["dm", "cm"]}, "ensemble"],
        "inference": {"prompt": 8, "new_tokens": 2, "runs": 2},
        "keep": "results",
        "train": {"precision": "fp32"},
        **changes,
    }


def write_study(folder: Path, **changes: Any) -> Path:
    write_jsonl(folder / "general.jsonl", range(120))
    write_jsonl(folder / "code.jsonl", range(200, 320))
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(settings(**changes)))
    return file


class Done:
    """A finished study, and what its runs were fed."""

    def __init__(self, folder: Path):
        self.folder, self.out = folder, folder / "out"
        self.file = write_study(folder, routes=["bam-expert-kv"])
        self.batches: dict[str, list[str]] = {}
        self.ran: list[str] = []

    def run(self, **changes: Any) -> StudyReport:
        if changes:
            write_study(self.folder, **changes)
        return study(self.file, self.out, launcher="inline", progress=False)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Stopped by Ctrl-C on the way, and gone on with."""
    made = Done(tmp_path_factory.mktemp("study"))
    patch = pytest.MonkeyPatch()
    do, get = steps.do, Sequences.__getitem__

    def noted_do(out: Path, name: str) -> None:
        if name == "r1.train.btx" and name not in made.ran and not (made.folder / "stopped").exists():
            (made.folder / "stopped").touch()
            signal.raise_signal(signal.SIGINT)
        made.ran.append(name)
        do(out, name)

    def noted_get(self: Sequences, n: int) -> dict[str, Any]:
        item = get(self, n)
        made.batches.setdefault(made.ran[-1], []).append(item["input_ids"].numpy().tobytes().hex())
        return item

    patch.setattr(steps, "do", noted_do)
    patch.setattr(Sequences, "__getitem__", noted_get)
    made.first = made.run()  # type: ignore[attr-defined]
    made.before = list(made.ran)  # type: ignore[attr-defined]
    made.second = made.run()  # type: ignore[attr-defined]
    yield made
    patch.undo()


def result(done: Done, name: str) -> dict[str, Any]:
    return dict(json.loads((done.out / "results" / f"{name}.json").read_text()))


def test_a_stopped_study_goes_on(done: Any) -> None:
    assert done.first.stopped_by == signal.SIGINT
    assert "r1.train.btx" in done.first.left and "r1.train.seed" not in done.first.left
    assert done.second.stopped_by is None and not done.second.left and not done.second.failed
    assert "r1.train.seed" in done.before and done.second.statuses["r1.train.seed"] == "kept"
    assert len(done.ran) == len(set(done.ran)) == len(done.second.statuses)  # nothing twice
    assert {path.stem for path in (done.out / "results").iterdir()} == {*done.second.statuses, "study"}


def test_equal_data_is_the_same_tokens_in_the_same_order(done: Any) -> None:
    reference = done.batches["r1.train.btx"]
    assert len(reference) >= 12 * 4 and len(set(reference)) > 20
    assert done.batches["r1.train.bam-expert-kv-dm"] == reference
    compute = done.batches["r1.train.bam-expert-kv-cm"]
    assert len(compute) < len(reference) and compute == reference[: len(compute)]
    assert done.batches["r1.train.code"][:8] != reference[:8]


def test_equal_compute_is_recorded_by_the_runs(done: Any) -> None:
    def total(name: str) -> int:
        training = result(done, name)["training"]
        return int(training["flops"] + training["optimizer_flops"])

    reference, compute = total("r1.train.btx"), total("r1.train.bam-expert-kv-cm")
    steps_made = result(done, "r1.train.bam-expert-kv-cm")["training"]["steps"]
    assert 0 <= reference - compute < compute / steps_made
    assert total("r1.train.bam-expert-kv-dm") > 1.1 * reference
    planned = build(StudyFile.load(done.file)).steps
    for name in ("r1.train.btx", "r1.train.bam-expert-kv-cm", "r1.train.seed"):
        assert total(name) == planned[name].cost.total
    rows = {row["title"]: row for row in collect(done.out)["budgets"]}
    assert rows["bam-expert-kv-dm"]["kept"] == {"dm": True} and rows["bam-expert-kv-cm"]["kept"] == {"cm": True}


def test_weights_of_mixtures_go_and_those_of_dense_models_stay(done: Any) -> None:
    kept = {file.parents[1].name.rsplit("-", 1)[0] for file in done.out.glob("steps/*/model/*.safetensors")}
    assert kept == {"r1.train.seed", "r1.train.code"}


def test_a_report_needs_only_the_small_results(done: Any, tmp_path: Path) -> None:
    shutil.copytree(done.out / "results", tmp_path / "results")
    sizes = [file.stat().st_size for file in (tmp_path / "results").glob("*.json")]
    assert max(sizes) < 40_000
    found = report(tmp_path)
    models = {model["title"]: model for model in found.numbers["models"]}
    assert set(models) == {
        *("seed", "code", "ensemble", "btx", "btx-step0"),
        *("bam-expert-kv-step0", "bam-expert-kv-dm", "bam-expert-kv-cm"),
    }
    assert models["bam-expert-kv-dm"]["label"] == "BAM DM Expert KV"
    assert models["btx"]["sunk_flops"] == sum(
        training["flops"] + training["optimizer_flops"]
        for training in (result(done, f"r1.train.{name}")["training"] for name in ("seed", "code"))
    )
    html = (tmp_path / "index.html").read_text()
    assert html.count("<svg ") >= 4 and "http" not in html.replace("http://www.w3.org", "")
    page = checked(html)
    assert [link for link in page.links if not link.startswith("#")] == ["routes-bam-expert-kv-dm.html"]
    routes = (tmp_path / "routes-bam-expert-kv-dm.html").read_text()
    assert "Which expert each token uses: BAM DM Expert KV" in routes and '"domain":"general"' in routes
    assert str(done.out) not in html + routes
    assert "too few to judge" in " ".join(found.headline)
    for name in (
        "tables.md",
        "tables.tex",
        "report.json",
        "tables/table-1.csv",
        "figures/curves.png",
        "figures/curves.pdf",
    ):
        assert (tmp_path / name).stat().st_size > 100, name
    markdown = (tmp_path / "tables.md").read_text()
    assert f"| {models['btx']['perplexity']['code']:.2f} |" in markdown.replace("*", "")
    with pytest.raises(DataError, match="give the folder of a study"):
        report(tmp_path / "figures")


def test_the_ensemble_is_between_its_members_and_no_worse_than_the_posterior_allows(done: Any) -> None:
    """The mixture of two models is never worse than the better one by more than log 2 a document."""
    rows = {name: result(done, f"r1.scores.{name}")["documents"] for name in ("seed", "code", "ensemble")}
    for domain, documents in rows["ensemble"].items():
        for place, (nats, *_) in enumerate(documents):
            best = min(rows["seed"][domain][place][0], rows["code"][domain][place][0])
            assert nats <= best + 0.6932


def test_eval_and_studies_give_a_model_the_same_perplexity(done: Any, tmp_path: Path) -> None:
    """The same documents, longer than the window, in the same windows; and so for an ensemble."""
    folders = {name: next(done.out.glob(f"steps/r1.train.{name}-*")) / "model" for name in ("seed", "code")}
    models = {name: tmp_path / name for name in folders}
    for name, folder in folders.items():
        models[name].symlink_to(folder)
    sources = {name: {"files": str(done.folder / f"{name}.jsonl")} for name in ("general", "code")}
    file = tmp_path / "data.yaml"
    file.write_text(yaml.safe_dump({"data": sources, "held_out": settings()["held_out"]}))
    given = [str(model) for model in models.values()]
    evaluated = evaluate(given, file, max_length=16, dtype="float32", ensemble="seed,code").models
    for name, model in zip((*models, "ensemble"), evaluated, strict=True):
        documents = result(done, f"r1.scores.{name}")["documents"]
        assert max(row[1] for rows in documents.values() for row in rows) > 16
        for domain, rows in documents.items():
            assert model.domains is not None and model.domains[domain].documents == len(rows)
            nats = sum(row[0] for row in rows) / sum(row[1] for row in rows)
            assert model.domains[domain].perplexity == pytest.approx(math.exp(nats), rel=1e-5)


def test_inference_is_measured(done: Any) -> None:
    measured = result(done, "inference")["inference"]["models"]
    assert set(measured) == {"seed", "btx", "bam-expert-kv"}
    assert all(len(row["seconds"]) == 2 for row in measured.values())
    cache = {name: row["kv_cache_bytes"] for name, row in measured.items()}
    assert cache["bam-expert-kv"] == 2 * cache["btx"] == 2 * cache["seed"] > 0


def test_the_run_files_can_be_used_by_hand(done: Any) -> None:
    folder = next(done.out.glob("steps/r1.train.bam-expert-kv-cm-*"))
    run = yaml.safe_load((folder / "run.yaml").read_text())
    assert (folder / run["model"]).parent.name.startswith("r1.upcycle.bam-expert-kv-")
    assert run["learning_rate"]["peak"] == 1e-2 and run["mix"] == "equal"
    recipe = yaml.safe_load((next(done.out.glob("steps/r1.upcycle.btx-*")) / "recipe.yaml").read_text())
    assert recipe["attention"] == "average" and recipe["routed_scaling_factor"] == "auto"


def test_results_hold_no_path_of_this_machine(done: Any, tmp_path: Path) -> None:
    """Also where the seed is a folder: runs need its place, results its name in the study's file."""
    shutil.copytree(next(done.out.glob("steps/r1.train.seed-*")) / "model", tmp_path / "seed")
    tokens = {"expert": STEP, "mixture": STEP}
    file = write_study(tmp_path, seed="seed", tokens=tokens, methods=["btx"], inference=None)
    found = study(file, tmp_path / "out", only=["code", "r1.upcycle.btx"], launcher="inline", progress=False)
    assert not found.failed and not found.left
    results = [file.read_text() for file in (tmp_path / "out" / "results").iterdir()]
    assert len(results) == 4 and str(tmp_path) not in "".join(results)
    record = json.loads((tmp_path / "out" / "results" / "r1.train.code.json").read_text())
    assert record["run"]["model"] == "seed"


def test_routes_agree_with_the_routing_that_scores_measure(done: Any) -> None:
    """The same routers on the same documents, of which one takes whole windows and the other half of each."""
    routes, scores = (result(done, f"r1.{kind}.bam-expert-kv-dm") for kind in ("routes", "scores"))
    assert routes["routes"]["experts"] == scores["routing"]["experts"] == ["seed", "code"]
    for kind in ("attention", "ffn"):
        for layer, other in zip(routes["routes"][kind], scores["routing"][kind], strict=True):
            for domain, shares in layer["by_domain"].items():
                assert shares == pytest.approx(other["by_domain"][domain], abs=0.15) and sum(shares) == pytest.approx(
                    1, abs=1e-3
                )


def test_mixtures_are_measured_in_bf16(tmp_path: Path) -> None:
    """How documents are kept apart is not judged by what bf16 rounds away."""
    folder = write_study(tmp_path).parent
    random_mixture("cohere", num_experts_per_tok=1, seed_changes={"vocab_size": 300}).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    found, source = {}, Source(files="general.jsonl")
    for bf16 in (False, True):
        changes = {"sequence_length": 64, "train": {"precision": "bf16" if bf16 else "fp32"}}
        text = HeldOutText(parse(StudyFile, settings(**changes), "study"), {"general": source}, folder)
        found[bf16] = text.measure(folder / "model")
    for layers in zip(found[True]["routing"]["attention"], found[False]["routing"]["attention"], strict=True):
        assert layers[0]["by_domain"]["general"] == pytest.approx(layers[1]["by_domain"]["general"], abs=0.02)


def test_a_step_by_hand_finds_the_same(done: Any, tmp_path: Path) -> None:
    """``branchmix train`` on a step's file: the same losses to the last digit."""
    folder = next(done.out.glob("steps/r1.train.seed-*"))
    run = yaml.safe_load((folder / "run.yaml").read_text())
    train(parse(RunConfig, {**run, "out": str(tmp_path / "run")}, "run"), progress=False)
    by_hand, by_study = (
        [row["loss"] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
        for out in (tmp_path / "run", folder / "model")
    )
    assert by_hand == by_study and len(by_hand) == 4


def test_another_folder_is_not_touched(done: Any, tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("something")
    with pytest.raises(OutputError, match="not the folder of a study"):
        study(done.file, tmp_path, launcher="inline", progress=False)
    for out in (tmp_path, tmp_path / "theirs"):
        found = CliRunner().invoke(app, ["study", str(done.file), "--out", str(out), "--dry-run"])
        assert isinstance(found.exception, OutputError) and "not the folder of a study" in str(found.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_dry_run_writes_nothing(done: Any, tmp_path: Path) -> None:
    steps_of_it = build(StudyFile.load(done.file)).steps.values()
    speed = Speed(1.0, {kind_of(step.config): 1.0 for step in steps_of_it if step.config})
    found = forecast(StudyFile.load(done.file), tmp_path / "none", speed=speed)
    assert not (tmp_path / "none").exists()
    rows = {row["name"]: row for row in found.rows}
    assert rows["train.btx"]["tokens"] == 12 * STEP and rows["train.btx"]["status"] == ""
    assert "bam-expert-kv-cm" in "\n".join(found.lines())
    again = forecast(StudyFile.load(done.file), done.out)
    assert {row["status"] for row in again.rows} == {"done"} and again.seconds == 0


def test_commands(done: Any, tmp_path: Path) -> None:
    runner = CliRunner()
    common = [str(done.file), "--out", str(done.out)]
    found = runner.invoke(app, ["study", *common, "--launcher", "inline", "--json"])
    assert set(json.loads(found.stdout)["steps"].values()) == {"kept"}
    found = runner.invoke(app, ["study", *common, "--dry-run", "--only", "r1.train.btx"])
    assert "equal budgets" in found.stdout and "train.bam-expert-kv-cm" not in found.stdout
    found = runner.invoke(app, ["report", str(done.out), "--out", str(tmp_path), "--markdown"])
    assert found.stdout.splitlines()[-1] == str(tmp_path / "tables.md")
    assert [path.name for path in tmp_path.iterdir()] == ["tables.md"]
    found = runner.invoke(app, ["study", *common, "--only", "btxx"])
    assert isinstance(found.exception, RecipeError) and "\n" not in str(found.exception)


def test_the_demo_prints_its_table_and_its_page(done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study that is done, as ``branchmix demo`` shows one."""
    for name in ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    shutil.copytree(done.out / "results", tmp_path / "results")
    monkeypatch.setattr(
        "branchmix.study.scheduler.study", lambda config, out: StudyReport(out, {"r1.train.btx": "done"})
    )
    monkeypatch.setattr("branchmix.study.report.report", partial(report, kinds=["html"]))  # no pictures as files
    shown = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert "| BAM DM Expert KV | " in shown.stdout and f"{tmp_path / 'index.html'}\n" in shown.stdout
    numbers = json.loads(CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--json"]).stdout)
    assert numbers["reference"] == "btx" and "documents" not in json.dumps(numbers["models"])
    left = StudyReport(tmp_path, {"r1.train.btx": "failed"}, {"r1.train.btx": "no memory"})
    monkeypatch.setattr("branchmix.study.scheduler.study", lambda config, out: left)
    failed = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert failed.exit_code == 2 and "error: r1.train.btx: no memory" in failed.stderr


# These two change the study, so they come last.


def test_a_failing_step_leaves_the_others(done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = [{"method": "btx", "name": "bad", "recipe": {"router_init": {"std": 0.5}}}]
    count = len(done.ran)
    monkeypatch.setattr(steps._Work, "upcycle", _fail)
    found = done.run(methods=[*settings()["methods"], *bad], inference=None)
    assert "r1.upcycle.bad" in found.failed and "\n" not in found.failed["r1.upcycle.bad"]
    assert "r1.train.bad-dm" in found.left
    assert all("bad" in name for name in done.ran[count:])


def _fail(self: Any) -> dict[str, Any]:
    raise DataError("nothing\nto merge")


def test_one_option_redoes_what_depends_on_it(done: Any) -> None:
    """Weights that went are made again where they are needed, and only there."""
    count = len(done.ran)
    done.run(
        methods=[{"method": "btx", "recipe": {"router_z_loss_coef": 0.5}}, *settings()["methods"][1:]], inference=None
    )
    assert set(done.ran[count:]) == {"r1.upcycle.btx", "r1.scores.btx-step0", "r1.train.btx", "r1.scores.btx"}
    count = len(done.ran)
    done.run(held_out={"share": 0.2, "tokens": 200}, methods=["btx"], inference=None)
    # The reference as it was: its weights are gone, so it is merged and trained again, to be measured again.
    assert {name for name in done.ran[count:] if "train" in name} == {"r1.train.btx"}


# ---- processes ----


@pytest.mark.slow
def test_a_killed_study_goes_on(tmp_path: Path) -> None:
    file = write_study(tmp_path, tokens={"seed": 400 * STEP, "expert": 3 * STEP, "mixture": 6 * STEP}, methods=["btx"])
    command = [sys.executable, "-m", "branchmix", "study", str(file), "--out", str(tmp_path / "out")]
    command += ["train.checkpoints.steps=50"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    pattern = "steps/r1.train.seed-*/model/checkpoints/step-*"
    while not list((tmp_path / "out").glob(pattern)):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(3)  # orphans write their checkpoint and end
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert finished.returncode == 0, finished.stderr
    assert "all " in finished.stdout
    training = json.loads((tmp_path / "out" / "results" / "r1.train.seed.json").read_text())["training"]
    assert training["resumed"] >= 1 and training["steps"] == 400
    again = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, timeout=600)
    assert set(json.loads(again.stdout)["steps"].values()) == {"kept"}

"""``branchmix demo``: budgets that fit into the time, resuming; slow: all of it, stopped once, at a tiny scale."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from queue import Queue
from threading import Barrier
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from branchmix.cli import app
from branchmix.errors import RecipeError
from branchmix.study import forecast
from branchmix.study.build import build
from branchmix.study.folder import alone, write_plan
from branchmix.study.forecast import MARGIN, fit, fitted
from branchmix.study.report import report
from branchmix.study.settings import DEMO, InstalledText, StudyFile
from branchmix.study.speed import Speed, _measure, kind_of
from branchmix.upcycling.gates.text import MEASURED_TOKENS
from pages import checked

TINY = ["minutes=0.5", "seed.hidden_size=32", "seed.intermediate_size=64", "seed.num_attention_heads=4"]
TINY += ["seed.num_hidden_layers=2", "seed.train_tokenizer=512", "sequence_length=32", "batch_size=8"]
TINY += ["data.installed=60000", "held_out.tokens=600", "micro_batch_size=null"]
"""Settings of the same study at another size."""
ROUTED = ("bam-expert-kv-calibrated-dm", "btx", "bam-expert-kv-dm", "bam-shared-kv-dm")


def demo(minutes: float = 15) -> StudyFile:
    return StudyFile.load(DEMO, [f"minutes={minutes}"])


def speed(times: float = 1.0) -> Speed:
    """Of a machine on which a mixture's step takes twice as long as a dense model's."""
    kinds = {kind_of(step.config): step.config for step in build(demo()).steps.values() if step.config}
    return Speed(8.0, {kind: times * (2.0 if "attention" in config else 1.0) for kind, config in kinds.items()})


# ---- budgets ----


@pytest.mark.parametrize("minutes", [8, 15, 60])
def test_budgets_fill_the_time_in_proportion(minutes: float) -> None:
    whole = demo(minutes)
    study, seconds = fit(whole, speed(), at_once=2)
    assert 0.93 * MARGIN * 60 * minutes < seconds <= MARGIN * 60 * minutes
    tokens, wanted = study.tokens.model_dump(), whole.tokens.model_dump()
    for phase in ("seed", "mixture"):
        assert tokens[phase] / tokens["expert"] == pytest.approx(wanted[phase] / wanted["expert"], rel=0.1)
    assert all(count % whole.step_tokens == 0 for count in tokens.values())
    assert isinstance(study.data, InstalledText) and isinstance(whole.data, InstalledText)
    share = study.data.installed / whole.data.installed
    least = forecast.LEAST_TEXT / whole.data.installed
    assert share == pytest.approx(max(least, tokens["seed"] / wanted["seed"]), rel=0.1)


def test_too_little_time_still_gives_every_run_some_steps() -> None:
    study, _ = fit(demo(0.1), speed(), at_once=2)
    assert min(study.tokens.model_dump().values()) == 5 * study.step_tokens
    assert min(step.cost.steps for step in build(study).steps.values() if step.kind == "train") >= 2


def test_slower_machines_train_less() -> None:
    fast, slow = (fit(demo(), speed(times), at_once=2)[0].tokens for times in (1.0, 3.0))
    assert slow.mixture < fast.mixture / 2


def test_the_time_of_fitting_gates_is_planned() -> None:
    """More of it where a model is slower; a merge alone takes the time of a process."""
    for times in (1.0, 3.0):
        found = forecast.forecast(demo(), Path("none"), speed=speed(times))
        seconds = {row["name"]: row["seconds"] for row in found.rows}
        fitted, merged = seconds["upcycle.bam-expert-kv-calibrated"], seconds["upcycle.bam-expert-kv"]
        assert fitted is not None and merged is not None
        tokens = (4 + 3 + 2) * MEASURED_TOKENS * 4  # each expert, each sharpness, before and after; of 4 domains
        share = tokens / demo().step_tokens * forecast.EVALUATION
        assert fitted - merged == pytest.approx(4 * forecast.COUNTING_SECONDS + share * 2.0 * times)


def test_a_demo_that_was_begun_keeps_its_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(forecast, "_measured", lambda *_: speed())
    begun, _ = fitted(demo(), tmp_path, say=lines.append)
    assert f"seed {begun.tokens.seed:,}, expert {begun.tokens.expert:,}" in lines[-1] and len(lines) == 2
    write_plan(begun, build(begun), tmp_path)
    monkeypatch.setattr(forecast, "_measured", lambda *_: speed(3.0))
    again, _ = fitted(demo(), tmp_path)
    assert (again.tokens, again.data) == (begun.tokens, begun.data)
    assert {s.key for s in build(again).steps.values()} == {s.key for s in build(begun).steps.values()}
    with pytest.raises(RecipeError, match="holds a study of 15 minutes: choose another folder"):
        fitted(demo(3), tmp_path)


def test_a_dry_run_fits_the_time_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Speed] = []
    monkeypatch.setattr(forecast, "_measured", lambda *_: measured.append(speed()) or measured[-1])
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["study", str(DEMO), "--out", str(out), "--dry-run", "--json", "minutes=30"])
    seconds = json.loads(done.stdout)["seconds"]
    assert len(measured) == 1 and not out.exists()
    assert 0.9 * MARGIN * 30 * 60 < seconds <= MARGIN * 30 * 60


def test_the_command_says_how_to_resume(tmp_path: Path) -> None:
    """Stopped while it measures; the folder that is there then is still the demo's."""
    command = [sys.executable, "-m", "branchmix", "demo", "--out", "my demo", "--minutes", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("measuring the speed")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "stopped; to resume: branchmix demo --out 'my demo'"
    assert "Traceback" not in said
    assert [file.name for file in (tmp_path / "my demo").iterdir()] == [".lock"]
    with alone(tmp_path / "my demo"):
        pass


# ---- speed ----


def test_the_speed_of_every_kind_of_model_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the processes, here; where a model cannot be made, the others are not left waiting."""
    monkeypatch.setattr("branchmix.train.models.keep_freed_memory", lambda: None)
    study = StudyFile.load(DEMO, [*TINY, "train.precision=fp32"])
    kinds = sorted({kind_of(step.config) for step in build(study).steps.values() if step.config})
    barrier, queue = Barrier(1), Queue[Speed]()
    _measure(study.model_dump(mode="json"), kinds, 1, time.time(), barrier, queue)
    measured = queue.get_nowait()
    assert list(measured.steps) == kinds and len(kinds) == 6
    assert all(0 < seconds < 5 for seconds in measured.steps.values()) and measured.start > 0
    with pytest.raises(ValueError, match="nothing"):
        _measure(study.model_dump(mode="json"), ['{"model_type": "nothing"}'], 1, time.time(), barrier, queue)
    assert barrier.broken and queue.empty()


# ---- all of it ----


@pytest.mark.slow
def test_the_whole_demo_stopped_once(tmp_path: Path) -> None:
    """The recipe at another size: measured, shared by two processes, stopped, resumed, and shown."""
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "branchmix", "study", str(DEMO), "--out", "demo", *TINY]
    with (tmp_path / "log").open("w") as file:
        process = subprocess.Popen(command, stderr=file, cwd=tmp_path)
        while not list(out.glob("steps/r1.train.code-*/model")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130
    written = next(out.glob("steps/r1.train.seed-*/model/model.safetensors"))
    before = written.stat().st_mtime_ns
    subprocess.run(command, check=True, timeout=900, cwd=tmp_path)
    assert written.stat().st_mtime_ns == before  # not trained again
    record = json.loads((written.parent / "training.json").read_text())
    assert record["computing"]["processes"] == min(2, len(os.sched_getaffinity(0)))

    made = report(out)
    models: dict[str, Any] = {model["title"]: model for model in made.numbers["models"]}
    assert len(models) == 19
    untrained = {row["title"] for row in made.numbers["before_training"]}
    assert untrained >= {"soup", "ensemble", "bam-expert-kv-calibrated-step0", "bam-expert-kv-forced"}
    assert models["law"]["perplexity"]["law"] < models["seed"]["perplexity"]["law"]
    assert models["bam-expert-kv-dm"]["tokens"] == models["btx"]["tokens"]
    page = checked((out / "index.html").read_text())
    assert [link for link in page.links if link.startswith("routes")] == [f"routes-{title}.html" for title in ROUTED]
    assert all('"domain":"general"' in (out / f"routes-{title}.html").read_text() for title in ROUTED)
    assert yaml.safe_load((next(out.glob("steps/r1.train.btx-*")) / "run.yaml").read_text())["mix"] == "equal"

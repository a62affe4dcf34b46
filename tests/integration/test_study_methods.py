"""Slow: every method of a study is merged, trained, measured and reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_study import STEP, write_study

from branchmix.study.report import report
from branchmix.study.scheduler import study
from branchmix.study.settings import METHODS
from corpora import write_jsonl


@pytest.mark.slow
def test_every_method_runs(tmp_path: Path) -> None:
    tokens = {"seed": 4 * STEP, "expert": 2 * STEP, "mixture": 4 * STEP}
    write_jsonl(tmp_path / "law.jsonl", range(400, 520))
    data = {name: {"files": f"{name}.jsonl"} for name in ("general", "code", "law")}
    file = write_study(tmp_path, data=data, methods=[*METHODS], tokens=tokens, inference=None)
    done = study(file, tmp_path / "out", launcher="inline", progress=False)
    assert not done.failed and not done.left
    found = report(tmp_path / "out")
    presets = {model["preset"] for model in found.numbers["models"]}
    assert presets == {*METHODS, None}
    assert all(all(row["kept"].values()) for row in found.numbers["budgets"])
    assert len(found.numbers["claims"]) == 13
    assert {"table-4.csv", "table-5.csv", "table-6.csv"} <= {file.name for file in (tmp_path / "out/tables").iterdir()}
    frozen = json.loads((tmp_path / "out/results/r1.train.bam-frozen-experts-dm.json").read_text())
    assert frozen["model"]["trained"] < frozen["model"]["parameters"] / 1.5
    markdown = (tmp_path / "out/tables.md").read_text()
    assert "NO" not in markdown.split("### Were budgets kept?")[1].split("###")[0]

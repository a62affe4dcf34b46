"""``branchmix branch``: the real command on tiny experts, and its scheduling with a run that only pretends to train."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from branchmix.cli.training import _branch_table
from branchmix.data.sources import open_source, require_files
from branchmix.errors import BranchMixError, OutputError, RecipeError
from branchmix.recipe import Recipe
from branchmix.train import branch as branch_module
from branchmix.train import launch
from branchmix.train.branch import BranchReport, branch
from branchmix.train.config import BranchConfig, RunConfig
from branchmix.train.launch import JobState
from branchmix.upcycling import upcycle
from corpora import tokenizer
from families import BY_NAME

EXPERTS = ("code", "law")


def study(folder: Path, **changes: Any) -> Path:
    """A tiny seed, text of three domains, and the file of a study of two experts."""
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for domain, word in (
        ("code", "def f(x): return x + {}"),
        ("law", "the party of part {}"),
        ("general", "it was {}"),
    ):
        rows = [{"text": f"{word.format(n)} and {word.format(n + 1)}. " * 3} for n in range(150)]
        (folder / "text" / f"{domain}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if not (folder / "seed").exists():
        BY_NAME["llama"].save(folder / "seed", 0, vocab_size=300, max_position_embeddings=128)
        tokenizer().save_pretrained(folder / "seed")
    settings = {
        "seed": "seed",
        "out": "experts",
        "experts": dict.fromkeys(EXPERTS),
        "data": {domain: {"files": f"text/{domain}.jsonl"} for domain in (*EXPERTS, "general")},
        "general": "general",
        "sequence_length": 64,
        "batch_size": 4,
        "budget": {"steps": 6},
        "learning_rate": {"peak": 0.003},
        "held_out": {"share": 0.1, "tokens": 500},
        "logging": {"steps": 2},
        "precision": "fp32",
        **changes,
    }
    file = folder / "branch.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRANCHMIX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


# ---------------------------------------------------------------------------------------------------------------------
# The real command
# ---------------------------------------------------------------------------------------------------------------------


def command(file: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "branchmix", "branch", str(file), *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, **options)


def test_experts_are_trained_and_the_recipe_merges_them(tmp_path: Path) -> None:
    file = study(tmp_path)
    done = command(file, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    out = tmp_path / "experts"
    assert result["recipe"] == str(out / "recipe.yaml")
    for name in EXPERTS:
        found = result["experts"][name]
        assert (found["status"], found["attempts"], found["tokens"]) == ("done", 1, 6 * 4 * 64)
        assert found["mix"] == {name: 0.9, "general": 0.1}
        after, before = found["held_out"]["end"], found["held_out"]["start"]
        assert set(after) == set(before) == {*EXPERTS, "general"} and after[name] < before[name] - 0.1
        assert (out / name / "config.json").is_file() and (out / name / "training.json").is_file()
        run = RunConfig.load(out / name / "run.yaml")
        assert Path(run.out) == out / name and run.threads is not None
    assert {line.split(":")[0] for line in done.stderr.splitlines()} >= set(EXPERTS)

    mixture = upcycle(out / "recipe.yaml", tmp_path / "mixture")
    assert [source.name for source in mixture.plan.sources] == ["seed", *EXPERTS]

    again = command(file)  # a table now, and nothing is started
    assert again.returncode == 0 and "2 of 2 experts are already finished" in again.stderr
    assert "started" not in again.stderr and " > " in again.stdout and "1.536k" in again.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Scheduling, with a run that pretends
# ---------------------------------------------------------------------------------------------------------------------

PRETENDED = """
import json, os, signal, sys, time
from pathlib import Path
from branchmix.train.config import RunConfig

config = RunConfig.load(sys.argv[1])
out = Path(config.out)
record = {"config": config.model_dump(mode="json"), "folder": str(config.folder.absolute()), "steps": 10}
checkpoint = out / "checkpoint"
if "--force" in sys.argv:
    checkpoint.unlink(missing_ok=True)
(out / "run.json").write_text(json.dumps(record))
step = int(checkpoint.read_text()) if checkpoint.exists() else 0
print("threads", os.environ.get("OMP_NUM_THREADS"), "from step", step, flush=True)

def stop(number, frame):
    checkpoint.write_text(str(step))
    print("stopped; the same command goes on")
    sys.exit(128 + number)

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
print("ready", flush=True)
while step < 10:
    step += 1
    with (out / "metrics.jsonl").open("a") as file:
        print(json.dumps({"step": step, "loss": 5 - step / 10}), file=file)
    time.sleep(PACE)
    if out.name == "law":
        LAW
(out / "config.json").write_text("{}")
(out / "training.json").write_text(json.dumps({**record, "tokens": 2560, "held_out": {}}))
"""


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``pretend(law=..., pace=...)``: what happens to the expert ``law`` in each step, and seconds of a step."""

    def set_up(*, law: str = "pass", pace: float = 0.0) -> None:
        script = tmp_path / "pretended.py"
        script.write_text(PRETENDED.replace("LAW", law).replace("PACE", str(pace)))
        monkeypatch.setattr(branch_module, "TRAIN", (sys.executable, str(script)))

    return set_up


def statuses(report: BranchReport) -> dict[str, tuple[str, int]]:
    return {expert.name: (expert.status, expert.attempts) for expert in report.experts}


def test_a_run_that_dies_goes_on_from_its_checkpoint_and_the_others_are_not_touched(
    tmp_path: Path, pretend: Any
) -> None:
    pretend(law="if step == 5 and not checkpoint.exists(): checkpoint.write_text('4'); os.kill(os.getpid(), 9)")
    report = branch(study(tmp_path), progress=False)
    assert statuses(report) == {"code": ("done", 1), "law": ("done", 2)}
    log = (tmp_path / "experts" / "law" / "log.txt").read_text()
    assert "from step 0" in log and "from step 4" in log
    assert report.recipe == tmp_path / "experts" / "recipe.yaml"


def test_names_that_yaml_takes_for_something_else(tmp_path: Path, pretend: Any) -> None:
    pretend()
    names = ["no", "2024", "1e3", "null", "code"]
    report = branch(study(tmp_path, experts={name: {"domain": "code"} for name in names}), progress=False)
    assert report.recipe is not None
    assert {expert.name: expert.model for expert in Recipe.load(report.recipe).experts} == {n: f"./{n}" for n in names}


def test_a_new_start_is_one_start(tmp_path: Path, pretend: Any) -> None:
    """``--force`` drops what was there, but not the checkpoint that a retry is to go on from."""
    pretend(law="if step == 5 and not checkpoint.exists(): checkpoint.write_text('4'); sys.exit(1)")
    file = study(tmp_path)
    branch(file, progress=False)
    report = branch(file, progress=False, force=True)
    assert statuses(report) == {"code": ("done", 1), "law": ("done", 2)}
    log = (tmp_path / "experts" / "law" / "log.txt").read_text()
    assert log.count("from step 0") == log.count("from step 4") == 2


def test_a_failure_for_good_is_told_and_the_next_call_does_that_one_only(
    tmp_path: Path, pretend: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(law="print('error: the disk is full'); sys.exit(1)")
    file = study(tmp_path)
    report = branch(file)
    assert statuses(report) == {"code": ("done", 1), "law": ("failed", 2)}
    assert [expert.reason for expert in report.failed] == ["the disk is full"] and report.recipe is None
    said = capsys.readouterr().err.splitlines()
    assert "law: failed (the disk is full); restarting" in said and "law: failed: the disk is full" in said

    pretend()
    report = branch(file)
    assert statuses(report) == {"code": ("done", 0), "law": ("done", 1)}
    assert "1 of 2 experts are already finished" in capsys.readouterr().err


def test_brackets_in_the_folders_name_are_no_pattern(tmp_path: Path) -> None:
    file = study(tmp_path / "a [1]", data={name: {"files": "text/*.jsonl"} for name in (*EXPERTS, "general")})
    run = branch_module._run(BranchConfig.load(file), "code")
    require_files(run.data, folder=run.folder)


def test_what_the_study_writes_is_no_data(tmp_path: Path) -> None:
    file = study(tmp_path, data={name: {"files": "**/*.jsonl"} for name in (*EXPERTS, "general")})
    before = open_source(branch_module._run(BranchConfig.load(file), "code").data["code"], folder=tmp_path).identity()
    (tmp_path / "experts" / "law").mkdir(parents=True)
    (tmp_path / "experts" / "law" / "metrics.jsonl").write_text('{"text": "step 1"}\n')
    after = open_source(branch_module._run(BranchConfig.load(file), "code").data["code"], folder=tmp_path).identity()
    assert before == after


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_and_the_same_command_goes_on(
    tmp_path: Path, pretend: Any, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    pretend(pace=0.1)
    file = study(tmp_path)
    script = f"""
        import sys
        from branchmix.train import branch
        import branchmix.cli
        branch.TRAIN = ({sys.executable!r}, {str(tmp_path / "pretended.py")!r})
        sys.argv = ["branchmix", "branch", {str(file)!r}]
        branchmix.cli.main()
    """
    running = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    logs = [tmp_path / "experts" / name / "metrics.jsonl" for name in EXPERTS]
    deadline = time.monotonic() + 60
    while not all(log.exists() for log in logs) and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(number)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 128 + number, said
    assert said.splitlines()[-1] == "stopped; not finished: code, law. Rerun the command to resume."
    report = branch(file, progress=False)
    assert statuses(report) == {"code": ("done", 1), "law": ("done", 1)}
    for name in EXPERTS:
        log = (tmp_path / "experts" / name / "log.txt").read_text()
        assert log.count("from step 0") == 1 and log.count("from step ") == 2, log


def test_other_settings_are_refused_before_anything_is_touched(tmp_path: Path, pretend: Any) -> None:
    pretend()
    file = study(tmp_path)
    branch(file, progress=False)
    before = {path: path.read_bytes() for path in (tmp_path / "experts").rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match=r"holds a run with budget.steps 6 instead of 7: .* start over with --force"):
        branch(file, overrides=["budget.steps=7"], progress=False)
    assert before == {path: path.read_bytes() for path in (tmp_path / "experts").rglob("*") if path.is_file()}
    assert statuses(branch(file, overrides=["budget.steps=7"], progress=False, force=True)) == {
        "code": ("done", 1),
        "law": ("done", 1),
    }


def test_threads_are_shared_and_settings_are_absolute(
    tmp_path: Path, pretend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend()
    monkeypatch.setattr(launch, "cores", lambda: 6)
    report = branch(study(tmp_path), progress=False)
    assert "threads 3" in (report.out / "code" / "log.txt").read_text()
    run = yaml.safe_load((report.out / "code" / "run.yaml").read_text())
    assert run["model"] == str(tmp_path / "seed") and run["threads"] == 3
    written = str(tmp_path / "experts" / "**")
    assert run["data"]["law"] == {"files": [str(tmp_path / "text" / "law.jsonl")], "exclude": [written]}
    (tmp_path / "seldom").mkdir()
    report = branch(study(tmp_path, out="alone", at_once=1), progress=False)
    assert "threads 6" in (report.out / "law" / "log.txt").read_text()


def test_each_gpu_gets_a_run(tmp_path: Path, pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(law="pass; print('gpu', os.environ['CUDA_VISIBLE_DEVICES'])", pace=0.02)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    report = branch(study(tmp_path), progress=False)
    assert "gpu 7" in (report.out / "law" / "log.txt").read_text()


def test_a_recipe_that_was_changed_stays(tmp_path: Path, pretend: Any) -> None:
    pretend()
    file = study(tmp_path)
    path = branch(file, progress=False).recipe
    assert path is not None
    recipe = Recipe.load(path)
    assert recipe.attention == "kv_experts" and [expert.name for expert in recipe.experts] == list(EXPERTS)
    assert (path.parent / recipe.seed).resolve() == tmp_path / "seed"
    assert [(path.parent / expert.model).resolve() for expert in recipe.experts] == [
        tmp_path / "experts" / name for name in EXPERTS
    ]
    for line in path.read_text().splitlines():  # what is offered in comments is valid too
        if line.startswith("# attention: "):
            text = path.read_text().replace("\nattention: kv_experts", f"\n{line[2:]}")
            (tmp_path / "other.yaml").write_text(text)
            assert Recipe.load(tmp_path / "other.yaml").attention == line.split()[2]
    path.write_text(f"{path.read_text()}dtype: bfloat16\n")
    report = branch(file, progress=False)
    assert report.notes == (f"{path} was changed since it was written, so it is kept",)
    assert path.read_text().endswith("dtype: bfloat16\n")


def test_only_some(tmp_path: Path, pretend: Any) -> None:
    pretend()
    file = study(tmp_path)
    report = branch(file, only=["law"], progress=False)
    assert statuses(report) == {"law": ("done", 1)} and report.recipe is None
    assert not (tmp_path / "experts" / "code").exists()
    assert branch(file, only=["code"], progress=False).recipe is not None
    with pytest.raises(RecipeError, match=r"no expert is called 'lwa' .*law"):
        branch(file, only=["lwa"], progress=False)


def test_nothing_is_written_when_it_cannot_work(tmp_path: Path) -> None:
    file = study(tmp_path)
    planned = branch(file, dry_run=True)
    assert {expert.status for expert in planned.experts} == {"waiting"}
    assert list(_branch_table(planned).head) == ["expert", "", "mix"], "no column of tokens that are not trained yet"
    with pytest.raises(BranchMixError, match=r"no such folder .*, and not a Hub id"):
        branch(file, overrides=["seed=./nothing"])
    with pytest.raises(BranchMixError, match=r"^data.law: .*no file matches"):
        branch(file, overrides=["data.law.files=nothing/*.txt"])
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="taken"):
        branch(file, overrides=["out=taken"])
    assert not (tmp_path / "experts").exists()


def test_the_display_shows_what_runs_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from branchmix.train import progress
    from branchmix.train.launch import Job

    out = tmp_path / "code"
    out.mkdir()
    row = {"step": 1000, "steps": 2000, "loss": 2.5, "tokens_per_second": 12345.6, "eta_seconds": 3700}
    rows = [row, {"step": 1000, "held_out/code": 1.0}]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 10')
    state = JobState(Job("code", ["true"], out / "log.txt"), status="running")
    assert progress._line(state, 65) == "code: step 1,000 of 2,000, loss 2.500, tokens/s 12,346, left 1:01:40"
    law = JobState(Job("law", ["true"], tmp_path / "law" / "log.txt"), status="running")
    assert progress._line(law, 65) == "law: running for 1:05"

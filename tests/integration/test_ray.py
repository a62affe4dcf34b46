"""``--launcher ray`` on a local cluster of two cores: runs, retries of what was killed, and signals."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from branchmix.errors import RecipeError
from branchmix.train import cluster as cluster_module
from branchmix.train.cluster import _attempt, run_on_ray
from branchmix.train.launch import Job, JobState, Outcome

ray = pytest.importorskip("ray")

PRETENDED = """
import os, sys, time
from pathlib import Path
checkpoint = Path(sys.argv[1])
step = int(checkpoint.read_text()) if checkpoint.exists() else 0
print("from step", step, "with", os.environ["WORD"], "and", sys.argv[2], flush=True)
try:
    while step < int(sys.argv[3]):
        step += 1
        time.sleep(0.1)
        checkpoint.write_text(str(step))
except KeyboardInterrupt:
    print("checkpoint written")
    sys.exit(130)
"""
"""A run that writes a checkpoint after each step."""


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """The machines of a real one have branchmix installed; here they find it on the path."""
    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2] / "src"), path])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    os.environ["PYTHONPATH"] = path


def job(folder: Path, name: str, steps: int = 3) -> Job:
    (folder / name).mkdir()
    script = folder / "pretended.py"
    script.write_text(PRETENDED)
    command = ["python of the driver", str(script), str(folder / name / "checkpoint")]
    again = [*command, "again", str(steps)]
    return Job(name, [*command, "first", str(steps)], folder / name / "log.txt", again=again, env={"WORD": name})


def test_jobs_run_side_by_side_and_leave_nothing_else(tmp_path: Path) -> None:
    most = 0

    def watch(states: list[JobState]) -> None:
        nonlocal most
        most = max(most, sum(state.status == "running" for state in states))

    names = ["code", "law", "math"]
    outcome = run_on_ray([job(tmp_path, name, 8) for name in names], shared=tmp_path, watch=watch)
    assert [(state.status, state.attempts) for state in outcome.jobs] == [("done", 1)] * 3
    assert most == 2 and all(state.seconds > 0.8 for state in outcome.jobs)
    for name in names:
        assert (tmp_path / name / "log.txt").read_text() == f"from step 0 with {name} and first\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "pretended.py"]


def test_a_killed_worker_takes_its_run_along_and_the_next_goes_on(tmp_path: Path) -> None:
    """The worker, and not the run: nobody would end the run but the kernel, while another attempt begins."""
    killed: list[int] = []

    def watch(states: list[JobState]) -> None:
        checkpoint = tmp_path / "code" / "checkpoint"
        if not killed and checkpoint.exists() and checkpoint.read_text() not in ("", "1"):
            run = int(next(p.name for p in Path("/proc").iterdir() if p.name.isdigit() and runs(p, str(checkpoint))))
            killed.append(run)
            os.kill(parent(run), signal.SIGKILL)

    outcome = run_on_ray([job(tmp_path, "code", 15)], shared=tmp_path, retries=1, watch=watch)
    (state,) = outcome.jobs
    assert killed and (state.status, state.attempts) == ("done", 2)
    lines = (tmp_path / "code" / "log.txt").read_text().splitlines()
    assert lines[0].endswith("and first") and lines[1].endswith("and again") and len(lines) == 2
    assert int(lines[1].split()[2]) >= 2
    for _ in range(100):  # until it is gone, and not only dead
        if not Path(f"/proc/{killed[0]}").exists():
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the run outlived its worker")


def runs(process: Path, word: str) -> bool:
    try:
        command = (process / "cmdline").read_bytes()
    except OSError:
        return False
    return word.encode() in command and b"pretended.py" in command


def parent(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("PPid:")))


def test_failures_for_good_and_what_only_one_machine_sees(tmp_path: Path) -> None:
    broken = job(tmp_path, "broken")
    (tmp_path / "broken" / "checkpoint").write_text("no number")
    outcome = run_on_ray([broken, job(tmp_path, "fine")], shared=tmp_path, retries=1)
    assert [(state.status, state.attempts) for state in outcome.jobs] == [("failed", 2), ("done", 1)]
    assert outcome.jobs[0].reason == "ValueError: invalid literal for int() with base 10: 'no number'"

    state = _attempt(JobState(broken), tmp_path / "elsewhere" / ".ray-1" / "sign")  # as on a machine without the folder
    assert state.exit_code == 2 and "cannot see it: choose a folder on a file system that all" in state.reason


def test_a_signal_reaches_runs_and_keeps_others_from_starting(tmp_path: Path) -> None:
    def watch(states: list[JobState]) -> None:
        if not sent and all((tmp_path / name / "checkpoint").exists() for name in ("code", "law")):
            sent.append(time.time())
            os.kill(os.getpid(), signal.SIGTERM)

    sent: list[float] = []
    assert threading.current_thread() is threading.main_thread()
    jobs = [job(tmp_path, name, 600) for name in ("code", "law", "math")]
    outcome = run_on_ray(jobs, shared=tmp_path, retries=1, watch=watch)
    assert outcome.stopped_by == signal.SIGTERM
    statuses = [(state.status, state.attempts, state.exit_code) for state in outcome.jobs]
    assert statuses == [("stopped", 1, 130), ("stopped", 1, 130), ("waiting", 0, None)]
    assert (tmp_path / "code" / "log.txt").read_text().endswith("checkpoint written\n")


def test_without_ray_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RecipeError, match=r"Ray is not installed: pip install 'branchmix\[ray\]'"):
        run_on_ray([], shared=tmp_path)


@pytest.mark.slow
def test_experts_are_trained_on_the_cluster(tmp_path: Path, monkeypatch: Any) -> None:
    """The real command."""
    from branchmix.train.branch import branch
    from corpora import tokenizer
    from families import BY_NAME
    from training import settings, write_text

    monkeypatch.setenv("BRANCHMIX_CACHE", str(tmp_path / "cache"))
    run = settings(write_text(tmp_path), model=None, out="experts", seed="seed", experts={"code": None, "law": None})
    BY_NAME["llama"].save(tmp_path / "seed", 0, vocab_size=300)
    tokenizer().save_pretrained(tmp_path / "seed")
    file = tmp_path / "branch.yaml"
    import yaml

    file.write_text(yaml.safe_dump(run))
    report = branch(file, launcher="ray", progress=False)
    assert [expert.status for expert in report.experts] == ["done", "done"], report
    assert report.recipe is not None and all(expert.tokens for expert in report.experts)


def test_the_cores_of_this_machine_say_nothing_about_the_clusters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of a study that asked for this machine's share of cores would wait for ever where others have fewer."""
    from test_study import write_study

    from branchmix.study import forecast, scheduler

    asked: list[tuple[int, str]] = []

    def pretended(jobs: list[Job], at_once: int | None = None, *, num_cpus: int, **_: Any) -> Outcome:
        asked.extend((num_cpus, job.env["OMP_NUM_THREADS"]) for job in jobs)
        return Outcome([JobState(job) for job in jobs], None)

    monkeypatch.setattr(forecast, "cores", lambda: 64)
    monkeypatch.setattr(cluster_module, "run_on_ray", pretended)
    for threads in (None, 3):
        scheduler.study(write_study(tmp_path, threads=threads), tmp_path / "out", launcher="ray", progress=False)
        assert asked and set(asked) == {(threads or 1, str(threads or 1))}
        asked.clear()


@pytest.mark.slow
def test_a_study_on_the_cluster_finds_what_it_finds_here(tmp_path: Path, monkeypatch: Any) -> None:
    """All that steps leave but times is the same; so are the folders, but for the cluster's."""
    from test_study import write_study

    from branchmix.study.scheduler import study

    monkeypatch.setenv("BRANCHMIX_CACHE", str(tmp_path / "cache"))
    file = write_study(tmp_path, methods=["btx", "ensemble"], inference=None, threads=1)
    results = {}
    for launcher in ("local", "ray"):
        out = tmp_path / launcher
        found = study(file, out, launcher=launcher, progress=False)
        assert set(found.statuses.values()) == {"done"}, found.failed
        results[launcher] = {
            path.name: without_times(json.loads(path.read_text())) for path in (out / "results").iterdir()
        }
    assert len(results["local"]) == 10 and results["ray"] == results["local"]
    folders = [
        sorted(path.relative_to(tmp_path / name).parts[0] for path in (tmp_path / name).iterdir()) for name in results
    ]
    assert folders[0] == folders[1]
    again = study(file, tmp_path / "ray", launcher="ray", progress=False)
    assert set(again.statuses.values()) == {"kept"}


def without_times(value: Any) -> Any:
    """A record without what no two runs have in common."""
    if isinstance(value, dict):
        times = ("seconds", "started", "ended")
        return {key: without_times(inner) for key, inner in value.items() if key not in times}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value

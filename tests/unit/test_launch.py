"""The scheduler of subprocesses, on small scripts: order, retries, signals, logs, and what is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from branchmix.errors import OutputError
from branchmix.train.launch import Job, JobState, run_processes


def job(folder: Path, name: str, code: str, **options: Any) -> Job:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return Job(name, command, folder / name / "log.txt", **options)


def run(*jobs: Job, at_once: int = 1, **options: Any) -> list[JobState]:
    return run_processes(jobs, at_once, poll_seconds=0.02, **options).jobs


def alive(pid: int) -> bool:
    """Running, and no zombie whose parent has not looked yet."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def wait_for(condition: Callable[[], Any], seconds: float = 10) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


def test_all_run_and_no_more_than_at_once(tmp_path: Path) -> None:
    most = 0

    def watch(states: list[JobState]) -> None:
        nonlocal most
        most = max(most, sum(state.status == "running" for state in states))

    jobs = [job(tmp_path, name, f"import time; time.sleep(0.2); print('I am {name}')") for name in "abcd"]
    states = run(*jobs, at_once=2, watch=watch)
    assert [state.job.name for state in states] == ["a", "b", "c", "d"]
    assert all((state.status, state.attempts, state.exit_code) == ("done", 1, 0) for state in states)
    assert [state.last_line for state in states] == ["I am a", "I am b", "I am c", "I am d"]
    assert most == 2
    assert all(0.2 <= state.seconds < 5 for state in states)


def test_places_are_taken_in_turn_and_a_job_has_its_own_environment(tmp_path: Path) -> None:
    code = "import os, time; time.sleep(0.3); print(os.environ['PLACE'], os.environ['MINE'], os.environ['HOME'])"
    jobs = [job(tmp_path, name, code, env={"MINE": name, "HOME": "/none"}) for name in "ab"]
    states = run(*jobs, at_once=2, places=[{"PLACE": "0", "HOME": "/place"}, {"PLACE": "1"}])
    assert [state.last_line for state in states] == ["0 a /none", "1 b /none"]


def test_a_failure_is_retried_with_the_other_command_and_the_rest_goes_on(tmp_path: Path) -> None:
    again = [sys.executable, "-c", "print('second')"]
    mended = job(tmp_path, "mended", "print('first'); raise SystemExit(1)", again=again)
    broken = job(tmp_path, "broken", "raise ValueError('always')")
    killed = job(tmp_path, "killed", "import os; print('working', flush=True); os.kill(os.getpid(), 9)")
    fine = job(tmp_path, "fine", "print('fine')")
    states = run(mended, broken, killed, fine, retries=1)
    assert [(state.status, state.attempts) for state in states] == [
        ("done", 2),
        ("failed", 2),
        ("failed", 2),
        ("done", 1),
    ]
    assert mended.log.read_text() == "first\nsecond\n"
    assert states[1].reason == "ValueError: always"
    assert states[2].reason == "killed by SIGKILL after: working"


def test_a_users_error_is_not_retried(tmp_path: Path) -> None:
    code = "import sys; print('error: data: no such file', file=sys.stderr); sys.exit(2)"
    (state,) = run(job(tmp_path, "wrong", code), retries=5)
    assert (state.status, state.attempts, state.reason) == ("failed", 1, "data: no such file")


def test_the_last_line_is_of_the_last_attempt(tmp_path: Path) -> None:
    log = tmp_path / "silent" / "log.txt"
    log.parent.mkdir()
    log.write_text("error: from another day\n")
    (state,) = run(job(tmp_path, "silent", "raise SystemExit(1)"))
    assert state.reason == "exit code 1, without any output in its log"
    assert log.read_text() == "error: from another day\n"
    (state,) = run(job(tmp_path, "bar", "print('10 %', end='\\r'); print('99 %', end='\\r'); print('  ')"))
    assert state.last_line == "99 %"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on_once_and_the_end_is_waited_for(tmp_path: Path, number: int) -> None:
    code = f"""
        import signal, sys, time
        def finish(number, frame):
            print("got", number, flush=True)
            time.sleep(0.3)
            print("checkpoint written", flush=True)
            sys.exit(128 + number)
        signal.signal({int(number)}, finish)
        print("ready", flush=True)
        time.sleep(60)
    """
    first, waiting = job(tmp_path, "first", code), job(tmp_path, "waiting", "print('never')")
    sent = False

    def watch(states: list[JobState]) -> None:
        nonlocal sent
        if not sent and first.log.exists() and "ready" in first.log.read_text():
            os.kill(os.getpid(), number)
            sent = True

    before = signal.getsignal(number)
    outcome = run_processes([first, waiting], 1, retries=3, watch=watch, poll_seconds=0.02)
    assert outcome.stopped_by == number
    assert [(state.status, state.attempts) for state in outcome.jobs] == [("stopped", 1), ("waiting", 0)]
    assert first.log.read_text().splitlines() == ["ready", f"got {int(number)}", "checkpoint written"]
    assert outcome.jobs[0].exit_code == 128 + number
    assert signal.getsignal(number) is before


def test_the_third_signal_kills(tmp_path: Path) -> None:
    code = """
        import signal, time
        signal.signal(signal.SIGINT, lambda *_: print("no", flush=True))
        print("ready", flush=True)
        while True:
            time.sleep(60)
    """
    stubborn = job(tmp_path, "stubborn", code)

    def watch(states: list[JobState]) -> None:
        said = stubborn.log.read_text().split() if stubborn.log.exists() else []
        if said in (["ready"], ["ready", "no"], ["ready", "no", "no"]) and len(said) > watch.sent:  # type: ignore[attr-defined]
            watch.sent += 1  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGINT)

    watch.sent = 0  # type: ignore[attr-defined]
    outcome = run_processes([stubborn], 1, watch=watch, poll_seconds=0.02)
    assert outcome.jobs[0].exit_code == -signal.SIGKILL
    assert stubborn.log.read_text().split() == ["ready", "no", "no"]


def test_nothing_is_left_running(tmp_path: Path) -> None:
    """Not the child of a job that died, and no job when the scheduler's caller fails."""
    code = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True); raise SystemExit(1)"
    (state,) = run(job(tmp_path, "parent", code))
    wait_for(lambda: not alive(int(state.last_line)))

    left = job(tmp_path, "left", "import os, time; print(os.getpid(), flush=True); time.sleep(60)")

    def fail(states: list[JobState]) -> None:
        if left.log.read_text():
            raise RuntimeError("the caller's own mistake")

    with pytest.raises(RuntimeError, match="own mistake"):
        run(left, watch=fail)
    assert not alive(int(left.log.read_text()))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's part of it is Linux'")
def test_jobs_end_when_the_scheduler_is_killed(tmp_path: Path) -> None:
    script = f"""
        from pathlib import Path
        from branchmix.train.launch import Job, run_processes
        code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
        run_processes([Job("orphan", [{sys.executable!r}, "-c", code], Path("log.txt"))], 1)
    """
    scheduler = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path)
    log = tmp_path / "log.txt"
    pid = int(wait_for(lambda: log.exists() and log.read_text().strip(), 30))
    assert alive(pid)
    scheduler.kill()
    scheduler.wait()
    wait_for(lambda: not alive(pid))


def test_what_cannot_start_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"^a: /no/such/program cannot be started: No such file"):
        run(Job("a", ["/no/such/program"], tmp_path / "log.txt"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/log.txt: cannot be written"):
        run(Job("a", ["true"], tmp_path / "file" / "log.txt"))


def test_a_job_waits_for_those_it_comes_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = job(tmp_path, "first", "import time; time.sleep(0.5); open('made', 'w').close()")
    code = "import os; print(os.path.exists('made'), os.path.exists('meanwhile'))"
    second = job(tmp_path, "second", code, after=["first", "not one of these"])
    other = job(tmp_path, "other", "open('meanwhile', 'w').close()")
    states = run(second, first, other, at_once=2)
    assert [state.status for state in states] == ["done"] * 3
    assert states[0].last_line == "True True"  # nobody idles


def test_what_comes_after_a_failure_is_never_started(tmp_path: Path) -> None:
    broken = job(tmp_path, "broken", "raise SystemExit(2)")
    after = job(tmp_path, "after", "print('never')", after=["broken"])
    later = job(tmp_path, "later", "print('never')", after=["after"])
    fine = job(tmp_path, "fine", "print('fine')")
    states = run(broken, after, later, fine)
    assert [state.status for state in states] == ["failed", "waiting", "waiting", "done"]
    assert not after.log.exists()

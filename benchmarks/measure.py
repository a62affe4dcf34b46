"""Measuring one command as its own process: wall time with `sync`, CPU time, peak memory, page-cache state.

Linux only: it reads /proc. Used by `upcycle.py`; docs in README.md.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Measurement:
    """What one process cost.

    Attributes:
        command_seconds: from its start to its end.
        sync_seconds: `sync` right after it.
        cpu_seconds: user and system time of it and its children; the kernel's own write-back is in nobody's account.
        peak_rss: bytes, mapped files included.
        peak_anon: bytes of RssAnon, sampled every 20 ms and summed over its children: what cannot be evicted.
        exit_code: 0, or what went wrong; negative for a signal.
        others: share of all processor time that went to anything else meanwhile (other programs, kernel write-back).
        available: bytes of memory that could be had at the start; what does not fit there is not warm for long.
    """

    command_seconds: float
    sync_seconds: float
    cpu_seconds: float
    peak_rss: int
    peak_anon: int
    exit_code: int
    others: float
    available: int

    @property
    def wall_seconds(self) -> float:
        return self.command_seconds + self.sync_seconds


def run(command: Sequence[str], *, env: Mapping[str, str], log: Path, timeout: float) -> Measurement:
    """Run one command and `sync`, with everything it prints in `log`. What was dirty before is synced before."""
    os.sync()
    available = _available_bytes()
    busy = _busy_seconds()
    with log.open("wb") as output:
        begin = time.perf_counter()
        process = subprocess.Popen(command, env=dict(env), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        memory = _MemoryWatch(process.pid)
        memory.start()
        alarm = threading.Timer(timeout, process.kill)
        alarm.start()
        # wait4 and not Popen.wait: only it tells the CPU time of this very process and the children it waited for.
        _, status, usage = os.wait4(process.pid, 0)
        end = time.perf_counter()
        process.returncode = os.waitstatus_to_exitcode(status)
        alarm.cancel()
    os.sync()
    synced = time.perf_counter()
    cpu = usage.ru_utime + usage.ru_stime
    others = max(_busy_seconds() - busy - cpu, 0.0) / (synced - begin) / (os.cpu_count() or 1)
    memory.stop.set()
    memory.join()
    return Measurement(
        command_seconds=end - begin,
        sync_seconds=synced - end,
        cpu_seconds=cpu,
        peak_rss=memory.peak_rss,
        peak_anon=memory.peak_anon,
        exit_code=process.returncode,
        others=others,
        available=available,
    )


def wait_for_idle(patience: float, *, busy_share: float = 0.1, window: float = 3.0) -> bool:
    """Wait until all processors together are nearly idle for some seconds; False if patience (in seconds) ran out."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        begin, busy = time.monotonic(), _busy_seconds()
        time.sleep(window)
        spent = (_busy_seconds() - busy) / (time.monotonic() - begin) / (os.cpu_count() or 1)
        if spent <= busy_share:
            return True
    return False


def _busy_seconds() -> float:
    """Processor time of the whole machine since its start that was neither idle nor waiting for a disk."""
    user, nice, system, _, _, irq, softirq, steal, *_ = (int(word) for word in _lines("/proc/stat")[0].split()[1:])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _available_bytes() -> int:
    return next(int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable"))


class _MemoryWatch(threading.Thread):
    """Samples a process and its descendants.

    The kernel's own maximum (`ru_maxrss`) is not used: it starts from the parent's size at the time of the fork.
    `VmHWM` starts afresh with the program, so the last sample of it misses nothing but the final 20 ms.
    """

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid = pid
        self.peak_rss = 0
        self.peak_anon = 0
        self.stop = threading.Event()

    def run(self) -> None:
        family = {self.pid}
        ticks = 0
        while not self.stop.wait(POLL_SECONDS):
            if ticks % 10 == 0:  # looking for children reads all of /proc: five times a second is enough
                family = _descendants(self.pid)
            ticks += 1
            sizes = [_status_bytes(pid) for pid in family]
            own = max((size["VmHWM"] for size in sizes), default=0)
            self.peak_rss = max(self.peak_rss, own, sum(size["VmRSS"] for size in sizes))
            self.peak_anon = max(self.peak_anon, sum(size["RssAnon"] for size in sizes))


def _status_bytes(pid: int) -> dict[str, int]:
    sizes = {"VmHWM": 0, "VmRSS": 0, "RssAnon": 0}
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return sizes  # it has ended
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key in sizes:
            sizes[key] = int(value.split()[0]) * 1024
    return sizes


def _descendants(root: int) -> set[int]:
    parent_of = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # pid (name, may hold spaces) state ppid ...
                parent_of[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    family = {root}
    while True:
        children = {pid for pid, parent in parent_of.items() if parent in family} - family
        if not children:
            return family
        family |= children


# ---- files and the page cache ----


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def warm(files: Iterable[Path]) -> None:
    """Read files once, so that the page cache holds them."""
    buffer = bytearray(1 << 23)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cool(files: Iterable[Path]) -> None:
    """Ask the kernel to drop files from the page cache (needs no privilege; they must not be dirty)."""
    os.sync()
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_set(folder: Path, sources: Sequence[Path], num_bytes: int) -> Path:
    """A folder of exactly `num_bytes` made of the sources' weight files, as the input of a `cp` to compare with.

    Whole files are hard links; the last one is the beginning of the next file, really copied.
    """
    if folder.exists() and size_of(folder) == num_bytes:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weights = [path for source in sources for path in sorted(source.glob("*.safetensors"))]
    left = num_bytes
    number = 0
    while left > 0:
        source = weights[number % len(weights)]
        target = folder / f"{number:03d}.safetensors"
        if source.stat().st_size <= left:
            os.link(source, target)
        else:
            with source.open("rb") as reader, target.open("wb") as writer:
                rest = left
                while rest:
                    rest -= writer.write(reader.read(min(rest, 1 << 24)))
        left -= target.stat().st_size
        number += 1
    return folder


# ---- the machine, without its name or paths ----


def machine_facts(folder: Path) -> dict[str, Any]:
    """What a reader needs to place the figures: processor, memory, file system of `folder`, kernel, `cp`."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    memory = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    cp = subprocess.run(["cp", "--version"], capture_output=True, text=True, check=False).stdout.partition("\n")[0]
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "ram_gb": round(memory / 2**20, 1),
        "file_system": _file_system(folder),
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
        "cp": cp,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _file_system(folder: Path) -> str:
    mounts = [line.split()[1:3] for line in _lines("/proc/mounts")]
    here = folder.resolve()
    fitting = [(point, kind) for point, kind in mounts if here.is_relative_to(point)]
    return max(fitting, key=lambda mount: len(mount[0]))[1] if fitting else "unknown"

"""Broken files never end in anything but an error of ours: see ``fuzzing.py`` for what is broken, how, and how to read
a number that this reports."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import fuzzing
from fuzzing import Finding, findings, in_memory, make_inputs, targets

FEW, MANY = 300, 100_000
SLICES = 10
MINUTES_OF_A_SLICE = 6
"""Ends a slice on a machine that is busy otherwise; at least a tenth has to be done by then."""


@pytest.fixture(scope="module")
def inputs() -> Iterator[Path]:
    with in_memory() as folder:
        yield make_inputs(Path(folder))


def told(found: list[Finding]) -> str:
    return "\n".join(f"{one.number} ({one.target}, {one.file}): {one.what}\n{one.trace[-1500:]}" for one in found[:3])


def test_unbroken_files_are_taken(inputs: Path) -> None:
    """Else nothing behind the first check would ever be reached."""
    for target in targets():
        target.read(inputs)


def test_broken_files_are_refused_or_taken(inputs: Path) -> None:
    done, found = findings(range(FEW), inputs)
    assert done == FEW and not found, told(found)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(SLICES))
def test_many_broken_files_are_refused_or_taken(part: int, inputs: Path) -> None:
    size = MANY // SLICES
    until = time.monotonic() + 60 * MINUTES_OF_A_SLICE
    done, found = findings(range(1000 + part * size, 1000 + (part + 1) * size), inputs, until=until)
    assert done >= size // 10 and not found, told(found)


def test_a_finding_is_found(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Foreign exceptions and endless messages; the number makes it again."""
    broken = fuzzing.Target("broken", ("code/config.json",), lambda root: {}["nothing"])
    monkeypatch.setattr(fuzzing, "targets", lambda: [broken])
    before = (inputs / "code/config.json").read_bytes()
    done, found = findings(range(3), inputs)
    assert (done, [one.what for one in found]) == (3, ["KeyError: 'nothing'"] * 3)
    assert (inputs / "code/config.json").read_bytes() == before

"""A CPU training process keeps the memory that it frees, so that its steps fault in no pages anew."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource, sys
from branchmix.train.models import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(200_000_000)
before = faults()
for _ in range(5):
    bytearray(200_000_000)
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_memory_is_kept() -> None:
    faults = {}
    for how in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    assert faults["leave"] > 200, "the kernel hands out no fresh pages here: nothing to test"
    assert faults["keep"] < faults["leave"] / 10

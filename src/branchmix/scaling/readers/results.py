"""The reader for each harness."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from branchmix.scaling.readers.inspect_logs import read_inspect
from branchmix.scaling.readers.lm_eval import read_lm_eval
from branchmix.scaling.readers.ttc import read_test_time_compute
from branchmix.scaling.trends.table import ResultsTable, read_table

READERS: dict[str, Callable[[Path], ResultsTable]] = {
    "csv": read_table,
    "lm-eval": read_lm_eval,
    "inspect": read_inspect,
    "inverse-scaling-ttc": read_test_time_compute,
}


def read_results(path: Path, harness: str = "csv") -> ResultsTable:
    """Results as a table, whatever harness wrote them; errors are those of its reader."""
    return READERS[harness](path)

"""The reference pages say what the code says."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).parent.parent.parent


def test_generated_pages_are_up_to_date() -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("row", "random", "others"),
    [
        ("BTX", ["btx"] * 2, ["btx-top1-calibrated-dm"] * 2 + ["btx-top1-token-only-dm"] * 2),
        ("BAM Shared KV, attention top-1", ["bam-attention-top1-cm"] * 2, "shared-kv-top1"),
        ("BAM Expert KV, attention top-1", "expert-kv-top1", "expert-kv-top1"),
        ("BAM Shared KV, attention top-2", "bam-attention-top2", "shared-kv-top2"),
        ("BAM Expert KV, attention top-2", "expert-kv-top2", "expert-kv-top2"),
        ("BAM Shared KV, soft attention", "bam-shared-kv", "shared-kv-soft"),
        ("BAM Expert KV, soft attention", "bam-expert-kv", "expert-kv-soft"),
        ("BTX, two FFN experts", "btx-top2", "btx-top2"),
    ],
)
def test_study_c_shows_trained_mixtures_as_they_were_measured(
    row: str, random: str | list[str], others: str | list[str]
) -> None:
    """Perplexities of the table by gates, at equal compute and at equal data, against the scores of each document."""
    if isinstance(random, str):
        random = [f"{random}-cm", f"{random}-dm"]
    if isinstance(others, str):
        matches = ("cm", "cm") if others == "shared-kv-top1" else ("cm", "dm")
        others = [f"{others}-{gates}-{match}" for gates in ("calibrated", "token-only") for match in matches]
    lines = (ROOT / "docs" / "studies" / "study-c.md").read_text(encoding="utf-8").splitlines()
    cells = next(line for line in lines if line.startswith(f"| {row} | ") and "M | " in line).split("|")[3:-1]
    assert [cell.split(" (")[0].strip() for cell in cells] == [_perplexity(title) for title in [*others, *random]]


def _perplexity(title: str) -> str:
    """Geometric mean over domains and the three repetitions."""
    files = list((ROOT / "docs" / "studies" / "study-c" / "results").glob(f"r?.scores.{title}.json"))
    assert len(files) == 3, title
    logs = []
    for file in files:
        domains = json.loads(file.read_text(encoding="utf-8"))["documents"].values()
        logs += [sum(nats for nats, *_ in rows) / sum(tokens for _, tokens, _ in rows) for rows in domains]
    return f"{math.exp(fmean(logs)):.1f}"

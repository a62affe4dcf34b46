"""Scores of single examples, for a bootstrap in which all models meet the same questions.

`examples/<model>/<task>.jsonl` beside `results.csv`, a line for each example: `key` (the same for all models),
`template` (examples of one template are drawn together), `correct` (0 or 1) and further metrics by name, such as
`loss`. Fresh data lies in `<task>.fresh.jsonl`, a run with a seed in `<model>/seed-<seed>/`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from branchmix.checkpoint.folder import is_entry
from branchmix.checkpoint.json_text import parse_json
from branchmix.errors import DataError
from branchmix.scaling.trends.table import DATA, Row

FIELDS = {"accuracy": "correct"}
"""Metrics whose field has another name."""
_CHUNK = 2_000_000
"""Draws times clusters held in memory at once."""


@dataclass(frozen=True)
class Scores:
    """A metric of one model on single examples."""

    values: dict[str, float]
    """By key."""
    clusters: dict[str, str]
    """Template by key."""


def read_scores(folder: Path, row: Row) -> Scores | None:
    """Scores behind a row of the table; None if there are none.

    Raises:
        DataError: a line without a key, a key that stands twice, or a score that is no number.
    """
    name = f"{row.task}.jsonl" if row.data == DATA[0] else f"{row.task}.{row.data}.jsonl"
    if not all(map(is_entry, (*row.model.split("/"), f"seed-{row.seed}", name))):
        return None  # nobody's files are called so
    file = folder / row.model / (f"seed-{row.seed}" if row.seed else "") / name
    field = FIELDS.get(row.metric, row.metric)
    values: dict[str, float] = {}
    clusters: dict[str, str] = {}
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # splitlines would cut at U+2028 too
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or 'is no UTF-8 text'}") from None
    for number, line in enumerate(lines, 1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError:
            raise DataError(f"{where}: is no JSON") from None
        if not isinstance(record, dict) or "key" not in record:
            raise DataError(f"{where}: there is no key: each line is an object with a key that all models share")
        key = str(record["key"])
        if key in values:
            raise DataError(f"{where}: the key {key!r} stands twice")
        if record.get(field) is None:  # refused examples and other metrics' files
            continue
        try:
            value = float(record[field])
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise DataError(f"{where}: {field} is {record[field]!r}, which is no number")
        values[key] = value
        clusters[key] = str(record.get("template") or key)
    return Scores(values, clusters) if values else None


def resampled_deviations(scores: list[Scores], *, num_draws: int) -> tuple[np.ndarray, np.ndarray] | None:
    """[B, N] means over resampled examples minus the mean, and [N] their standard errors; None if nothing is shared.

    Whole clusters are drawn with replacement, the same for all runs, so what is hard for all models moves all curves'
    points together and leaves the trend alone.
    """
    keys = sorted(set.intersection(*(set(score.values) for score in scores)))
    if len(keys) < 2:
        return None
    names, cluster_of = np.unique([scores[0].clusters[key] for key in keys], return_inverse=True)
    if len(names) < 2:  # all of one template: nothing to draw but examples
        names, cluster_of = np.array(keys), np.arange(len(keys))
    values_NX = np.array([[score.values[key] for key in keys] for score in scores])
    sums_NC = np.stack([np.bincount(cluster_of, row, len(names)) for row in values_NX])
    counts_C = np.bincount(cluster_of, minlength=len(names)).astype(float)
    random = np.random.default_rng(0)
    step = max(1, _CHUNK // len(names))
    means = []
    for start in range(0, num_draws, step):
        number = min(step, num_draws - start)
        drawn_BC = random.multinomial(len(names), np.full(len(names), 1 / len(names)), number).astype(float)
        means.append((drawn_BC @ sums_NC.T) / (drawn_BC @ counts_C)[:, None])
    deviations_BN = np.concatenate(means) - values_NX.mean(1)
    return deviations_BN, deviations_BN.std(0, ddof=1)

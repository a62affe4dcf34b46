"""Logs of inspect_ai: ``.eval`` (a zip of JSON, deflated or with zstd) and ``.json``.

Axes are all numbers that were *assigned* to a run: ``reasoning_tokens`` of the generation config becomes
``reasoning_budget``, and numbers in the log's metadata and task arguments keep their names. What a model really used
(``model_usage``) is not an axis. Epochs are seeds: repetitions of a question.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from branchmix.checkpoint.json_text import parse_json
from branchmix.errors import DataError
from branchmix.scaling.readers.runs import Run, files_below, json_of, mapping, number, numbers_in, table_of
from branchmix.scaling.trends.table import KNOWN, ResultsTable, Scores

_ZSTD = 93
"""Number of the compression in the zip format (APPNOTE 4.4.5), which Python's zipfile knows from 3.14 on."""
_VALUES = {"C": 1.0, "I": 0.0, "P": 0.5, "N": 0.0}
"""What inspect counts for correct, incorrect, partial and no answer."""


def read_inspect(path: Path) -> ResultsTable:
    """All logs below a folder, or one log. Logs that did not end well are left out, with a note.

    Raises:
        DataError: there are no logs, or one is broken.
    """
    notes: list[str] = []
    files = [file for file in files_below(path, "*.eval", "*.json") if file.name != "logs.json"]
    runs = [run for file in files for run in _runs(file, notes, is_named=file == path)]
    if not files:
        raise DataError(f"{path}: has no logs of inspect: give its --log-dir")
    return table_of(path, _named(runs), notes)


def _named(runs: Sequence[Run]) -> list[Run]:
    """Runs whose metric is a scorer get the name that it has in all logs of the task.

    ``accuracy`` if its scores are 0 and 1 in all and there is no other scorer, ``SCORER_accuracy`` if it has
    one, and else the scorer's own name: a log in which no partial score occurs is no other curve.
    """
    scorers: dict[str, set[str]] = {}
    values: dict[tuple[str, str], set[float]] = {}
    for run in runs:
        scorers.setdefault(run.task, set()).add(run.metric)
        values.setdefault((run.task, run.metric), set()).update(value for value, _ in (run.scores or {}).values())

    def name(run: Run) -> str:
        if not values[run.task, run.metric] <= {0.0, 1.0}:
            return run.metric
        return "accuracy" if len(scorers[run.task]) == 1 else f"{run.metric}_accuracy"

    return [replace(run, metric=name(run)) for run in runs]


def _runs(file: Path, notes: list[str], *, is_named: bool) -> Iterator[Run]:
    """A log's results by scorer, whose name is the metric. A file that was not named itself may be something else."""
    log, samples = _read(file)
    if not isinstance(log, dict) or not isinstance(log.get("eval"), dict):
        if is_named:
            raise DataError(f"{file}: is not a log of inspect: it has no `eval`")
        notes.append(f"{file}: is not a log of inspect: left out")
        return
    about = log["eval"]
    if log.get("status") != "success":
        notes.append(f"{file}: its status is {log.get('status')}: left out")
        return
    axes = _axes(log)
    by_scorer: dict[tuple[str, str], Scores] = {}
    for sample in samples:
        for scorer, score in mapping(mapping(sample).get("scores")).items():
            value = _number(mapping(score).get("value"))
            if value is not None:
                key = str(sample.get("id"))
                by_scorer.setdefault((scorer, str(sample.get("epoch", 1))), {})[key] = (value, key)
    epochs = {epoch for _, epoch in by_scorer}
    if not by_scorer:
        notes.append(f"{file}: no sample has a score that is a number: left out")
    for (scorer, epoch), scores in by_scorer.items():
        yield Run(
            task=str(about.get("task")),
            model=str(about.get("model")),
            metric=scorer,
            source=file,
            axes=axes,
            scores=scores,
            seed=epoch if len(epochs) > 1 else "",
            created=str(about.get("created", "")),
        )


def _axes(log: dict[str, Any]) -> dict[str, float]:
    about = log["eval"]
    axes = {**numbers_in(about.get("task_args")), **numbers_in(about.get("metadata"))}
    for config in (about.get("model_generate_config"), mapping(log.get("plan")).get("config")):
        tokens = numbers_in(config).get("reasoning_tokens")
        if tokens is not None:
            axes.setdefault("reasoning_budget", tokens)
    return {name: place for name, place in axes.items() if name not in KNOWN}


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        return _VALUES.get(value)
    return number(value)


def _read(file: Path) -> tuple[Any, list[Any]]:
    """A log without its samples, and the samples or their summaries, which have the scores too."""
    if file.suffix != ".eval":
        log = json_of(file)
        samples = mapping(log).get("samples")
        return log, samples if isinstance(samples, list) else []
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if "header.json" not in names:  # still running, or killed
                return {**mapping(_member(archive, "_journal/start.json")), "status": "started"}, []
            if "summaries.json" in names:
                summaries = _member(archive, "summaries.json")
                return _member(archive, "header.json"), summaries if isinstance(summaries, list) else []
            samples = [_member(archive, name) for name in names if name.startswith("samples/")]
            return _member(archive, "header.json"), samples
    except (zipfile.BadZipFile, zlib.error, struct.error, ValueError, KeyError, OSError, NotImplementedError) as error:
        raise DataError(f"{file}: is not a log of inspect ({error})") from None


def _member(archive: zipfile.ZipFile, name: str) -> Any:
    """The JSON of a member."""
    entry = archive.getinfo(name)
    if entry.compress_type != _ZSTD:
        return parse_json(archive.read(name))
    import pyarrow

    assert archive.fp is not None
    archive.fp.seek(entry.header_offset)
    name_length, extra_length = struct.unpack("<HH", archive.fp.read(30)[26:])
    archive.fp.seek(name_length + extra_length, 1)
    packed = pyarrow.BufferReader(archive.fp.read(entry.compress_size))
    return parse_json(pyarrow.CompressedInputStream(packed, "zstd").read())

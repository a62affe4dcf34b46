"""Where tasks get their data sets and metrics: a local folder first, the Hub otherwise; and lm-eval kept quiet."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

from branchmix.data.sources import refuse_pointers
from branchmix.errors import DataError

_CODE_SWITCH = "HF_ALLOW_CODE_EVAL"


@contextmanager
def sources(task_data: Path | None, *, allow_code_execution: bool) -> Iterator[list[DataError]]:
    """Inside the block ``datasets`` and ``evaluate`` look into ``task_data`` before they ask the Hub.

    Args:
        task_data: holds data sets as ``ORG/NAME`` or ``NAME``, and metrics as ``evaluate-metric/NAME`` or ``NAME``.
        allow_code_execution: let Hugging Face's metric of code run what it is given.

    Yields:
        What could not be loaded so far: lm-eval passes over a metric that it does not find.
    """
    import datasets
    import evaluate

    load_dataset, load_metric = datasets.load_dataset, evaluate.load
    failed: list[DataError] = []

    def local(path: str, name: str | None = None, *args: Any, **options: Any) -> Any:
        where, config = _local_dataset(task_data, path, name)
        if where != path:
            refuse_pointers(Path(where))
        try:
            return load_dataset(where, config, *args, **options)
        except Exception as error:  # of the network, of pyarrow, of the Hub's client
            what = f"{path} ({name})" if name else path
            if where != path:
                raise DataError(f"{where}: the data set {what} cannot be read: {first_line(error)}") from error
            raise DataError(
                f"the data set {what} cannot be loaded: {first_line(error)}: check the network and HF_HUB_OFFLINE, or "
                f"give --task-data a folder with {path} in it"
            ) from error

    def local_metric(path: str, *args: Any, **options: Any) -> Any:
        local_copy = _below(task_data, f"evaluate-metric/{path}")
        try:
            return load_metric(
                path if local_copy is None else str(local_copy / f"{local_copy.name}.py"), *args, **options
            )
        except Exception as error:
            line = (
                f"the metric {path} cannot be loaded: {first_line(error)}: check the network and HF_HUB_OFFLINE, or "
                f"give --task-data a folder with evaluate-metric/{path} in it"
            )
            failed.append(DataError(line))
            raise failed[-1] from error

    switch = {_CODE_SWITCH: "1" if allow_code_execution else "0"}
    with (
        mock.patch.object(datasets, "load_dataset", local),
        mock.patch.object(evaluate, "load", local_metric),
        mock.patch.dict(os.environ, switch),
    ):
        yield failed


def _local_dataset(task_data: Path | None, path: str, name: str | None) -> tuple[str, str | None]:
    """Path and configuration for ``load_dataset``: a copy of a Hub repository has its configurations in its README."""
    local_copy = _below(task_data, path)
    if local_copy is None:
        return path, name
    if name is not None and not (local_copy / "README.md").is_file():
        return (str(local_copy / name), None) if (local_copy / name).is_dir() else (str(local_copy), None)
    return str(local_copy), name


def _below(folder: Path | None, path: str) -> Path | None:
    """The local copy of what the Hub calls ``path``."""
    if folder is None or Path(path).is_absolute() or path.startswith("."):
        return None
    return next((copy for copy in (folder / path, folder / Path(path).name) if copy.is_dir()), None)


@contextmanager
def quiet() -> Iterator[None]:
    """Logs and progress bars of lm-eval and of the Hub's client have no place between our lines.

    What a task prints goes to stderr.
    """
    import datasets
    import lm_eval.api.metrics
    import lm_eval.api.task

    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")]
    levels, bars = [logger.level for logger in loggers], datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    with (
        mock.patch.object(lm_eval.api.task, "tqdm", lambda items, **_: items),
        mock.patch.object(lm_eval.api.metrics, "bootstrap_stderr", _bootstrap_stderr),
        redirect_stdout(sys.stderr),
    ):
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if not bars:
                datasets.enable_progress_bars()


def _bootstrap_stderr(metric: Any, values: Any, iters: int) -> float:
    """lm-eval's own numbers, draw by draw, without its prints and without forking a process full of threads."""
    from lm_eval.api.metrics import _bootstrap_internal, sample_stddev

    chunk = min(1000, iters)
    drawn = [value for seed in range(iters // chunk) for value in _bootstrap_internal(metric, chunk)((seed, values))]
    return float(sample_stddev(drawn))


def first_line(error: BaseException) -> str:
    """What an error says, as far as it fits into one line."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__

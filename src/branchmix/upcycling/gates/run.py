"""``calibrate(model, data)``: gates of a mixture that exists, fitted on text and written into it.

Only gates change: everything else is copied byte for byte.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from branchmix.checkpoint.companions import TEMPLATES
from branchmix.checkpoint.folder import atomic_folder, require_replaceable
from branchmix.data.config import EvalData
from branchmix.errors import OutputError, RecipeError
from branchmix.upcycling.execute import refuse_overlap, require_space, write_calibrated
from branchmix.upcycling.gates.measure import Fitted, fit, plan_with_gates, text_for
from branchmix.upcycling.mixture import OpenedMixture
from branchmix.upcycling.plan import Progress


@dataclass(frozen=True)
class CalibrationReport:
    """What ``calibrate`` did."""

    out: Path
    fitted: Fitted
    written: tuple[Path, ...] | None
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"out": str(self.out), **self.fitted.as_dict(), "seconds": round(self.seconds, 1)}


def calibrate(
    model: str | Path,
    data: EvalData | str | Path,
    out: str | Path | None = None,
    *,
    token_only: bool = False,
    keep_top_k: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Fit a mixture's gates on text, without gradients: minutes on a CPU, and no expert changes.

    Args:
        model: folder of a mixture, or a Hub id.
        data: domains of text, in the format of ``eval --data``. Held-out documents are never read.
        out: folder to write; the mixture itself if not given.
        token_only: gates that see one token only, for servers that keep no state of the document.
        keep_top_k: leave the number of experts a token has, and raw gates, as they are.
        force: replace ``out``.
        trust_remote_code: run code of the tokenizer's.
        progress: called with the step's name, done and total.

    Raises:
        RecipeError: the data file does not make sense, or ``out`` is missing for a Hub id.
        DataError: a source cannot be read or has too little text.
        CheckpointError: the model is not a mixture, or cannot be loaded.
        OutputError: ``out`` cannot be written.
    """
    start = time.perf_counter()
    files = [] if isinstance(data, EvalData) else [Path(data)]
    data = EvalData.load(data)
    mixture = OpenedMixture(str(model), otherwise="calibrate the mixture that upcycle makes of it")
    source = mixture.resolved.folder
    if mixture.config["domain_router"]:
        raise RecipeError(
            f"{model}: its routers compute their rows from domains (routing.domains), and gates are fitted with "
            "routers that have weights of their own: merge it without"
        )
    if out is None and mixture.resolved.revision is not None:
        raise RecipeError(f"{model}: is on the Hub, so give --out, the folder to write")
    in_place = out is None or Path(out).resolve() == source.resolve()
    target = source if out is None else Path(out)
    if in_place and not (out is None or force):
        raise OutputError(f"{target}: exists already: choose another folder, or --force to replace it")
    if in_place:
        _require_replaceable(source)
    else:
        refuse_overlap(target, [source, *mixture.sources_at(target)], files, force=force)
    require_space(target, plan_with_gates(mixture))  # before the minutes that the fit takes
    options: dict[str, Any] = {"token_only": token_only, "progress": progress}
    text = text_for(mixture.shape, mixture.resolved, data, trust_remote_code=trust_remote_code, **options)
    fitted = fit(mixture, text, keep_top_k=keep_top_k, **options)
    with atomic_folder(target, force=in_place or force) as folder:
        written = write_calibrated(mixture, fitted, folder, mixture.shard_bytes, progress=progress)
        for file in source.iterdir() if in_place else ():  # beside the mixture's own, such as a licence
            weights = file.name.endswith((".safetensors", ".safetensors.index.json"))
            if file.is_file() and not weights and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
    return CalibrationReport(target, fitted, written, time.perf_counter() - start)


def _require_replaceable(folder: Path) -> None:
    """Refuse, before the fit, a mixture that cannot be replaced: what a folder in it holds would be lost, say."""
    try:
        require_replaceable(folder, force=True)
    except OutputError as error:
        raise OutputError(f"{error}; --out writes a copy") from None
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and entry.name not in (TEMPLATES, "__pycache__", ".cache"):
            raise OutputError(
                f"{folder}: holds the folder {entry.name}, which calibrate does not carry over: give --out"
            )

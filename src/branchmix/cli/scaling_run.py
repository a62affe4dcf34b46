"""``branchmix scaling run``: a family of models on the tasks, for ``branchmix scaling trends`` to judge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from branchmix.cli import console
from branchmix.pages.numbers import human_count
from branchmix.pages.table import Table

if TYPE_CHECKING:
    from branchmix.scaling.results import ScalingRun, TaskResult

EPILOG = """\b
Examples:
  branchmix scaling run family.yaml --tasks all --data official --out results
  branchmix scaling run family.yaml --tasks memo-trap,neqa --data official --fresh fresh --out results
  branchmix scaling run family.yaml --tasks my-task.yaml
  branchmix scaling trends results

\b
The smallest family file:
  family: pythia
  models: [EleutherAI/pythia-70m, EleutherAI/pythia-160m, ./runs/mixture]
A model may also be a mapping such as
  {model: ./mixture, name: mix-8x, family: mixture, tokens: 300B, seed: 1}

\b
With --out, rerun the command to resume a stopped run; if you add models, tasks or examples, only those are computed.
"""


def run_command(
    family: Annotated[Path, typer.Argument(metavar="FAMILY.yaml", help="The models.")],
    tasks: Annotated[
        str, typer.Option(metavar="A,B,...", help="Names of tasks, YAML files of your own, or all that have files.")
    ] = "all",
    data: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Folder of the tasks' files; may be repeated.")
    ] = None,
    fresh: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Folder of fresh files, to compare with.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for records and results.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Examples of a task at most.")] = None,
    shots: Annotated[
        int, typer.Option(min=0, metavar="K", help="Other examples, with answers, before each prompt.")
    ] = 0,
    bos: Annotated[str, typer.Option(help="BOS before each prompt: default (as the tokenizer does), on or off.")] = (
        "default"
    ),
    dtype: console.Dtype = "auto",
    batch_tokens: console.BatchTokens = 2048,
    trust_remote_code: console.TrustRemoteCode = False,
    as_json: console.AsJson = False,
) -> None:
    """Score every model of a family on every task: exact log-probabilities, the official metrics."""

    console.quiet_libraries()
    from branchmix.scaling.score_family import run

    with console.resumable(out), console.progress_bar() as progress:
        found = run(
            family,
            tasks=tasks,
            data=data or (),
            fresh=fresh or (),
            out=out,
            limit=limit,
            shots=shots,
            bos=bos,
            dtype=dtype,
            batch_tokens=batch_tokens,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    console.print_notes(found.notes)
    if as_json:
        console.print_json(found.as_dict())
    else:
        _print(found)
    if out is not None:
        console.notice(f"judge them: branchmix scaling trends {out}")


def _print(run: ScalingRun) -> None:
    """A row for each task and model."""
    rows = []
    labels = [result.selected.label for result in run.results]
    for result in sorted(run.results, key=lambda result: labels.index(result.selected.label)):
        sizes = (result.subject.params, result.subject.active_params)
        counts = ["" if size is None else human_count(size) for size in sizes]
        means = result.summary.means if result.summary is not None else {}
        loss = next((name for name in ("loss", "logodds", "absolute_logodds") if name in means), None)
        cells = [_mean(result, "accuracy"), _mean(result, loss)]
        coverage = f"{means['coverage'].value:.3f}" if "coverage" in means else ""
        remarks = [flag.words for flag in result.summary.flags] if result.summary is not None else []
        if loss not in (None, "loss"):
            remarks.insert(0, f"loss: {loss}")
        if result.refused:
            remarks.append(f"{len(result.refused)} refused")
        if result.merged:
            remarks.append(f"{result.merged} merged")
        names = [result.selected.label, result.subject.label]
        rows.append([*names, *counts, str(len(result.scored)), *cells, coverage, "; ".join(remarks)])
    head = ["task", "model", "params", "active", "n", "accuracy", "loss", "coverage", "remarks"]
    Table(head, rows, left=("model", "remarks")).show()


def _mean(result: TaskResult, metric: str | None) -> str:
    if result.summary is None or metric is None or metric not in result.summary.means:
        return ""
    mean = result.summary.means[metric]
    return f"{mean.value:.4f}" + ("" if mean.stderr is None else f" ± {mean.stderr:.4f}")

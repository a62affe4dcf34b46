"""``branchmix scaling data`` and ``scaling run``: how performance moves with scale. ``trends.py`` has the verdicts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from branchmix.cli import console
from branchmix.cli.console import app
from branchmix.pages.numbers import counted, human_count, with_error
from branchmix.pages.table import Table

if TYPE_CHECKING:
    from branchmix.scaling.results import ScalingRun

data_app = typer.Typer(
    no_args_is_help=True, help="Data of the 11 tasks: the prize's own files, and fresh examples that no model has seen."
)
scaling_app = typer.Typer(
    no_args_is_help=True, help="Inverse scaling: do models get better or worse at a task as they grow?"
)
app.add_typer(scaling_app, name="scaling")
scaling_app.add_typer(data_app, name="data")

# ---- scaling data ----

DIR = Annotated[Path, Argument(metavar="DIR", help="Folder of the files.")]

VERIFY = """\b
Examples:
  branchmix scaling data verify official
  branchmix scaling data verify official --json

\b
A line for each of the 11 files: ok, missing, wrong size or wrong hash. Exit code 0 if all are ok, else 1.
"""
FETCH = """\b
Examples:
  branchmix scaling data fetch official
  branchmix scaling data fetch official --from ./mirror      a folder with the same files

\b
Rerun the command to resume a stopped download; finished files are kept. The files are under CC BY 4.0; their authors
ask to keep them out of training data.
"""
MAKE = """\b
Examples:
  branchmix scaling data make fresh --seed 7
  branchmix scaling data make fresh --seed 7 --num 10000 --tasks memo-trap,neqa
  branchmix scaling data make fresh-4shot --seed 7 --shots 4

\b
The same seed and version give the same bytes, and fewer examples are the first of more. No model can have seen them, so
a model that gains more than others on the official files has probably seen those. Fresh examples are not exactly as
hard, though: compare the gap between models.
"""


@data_app.command("verify", epilog=VERIFY)
def verify_command(folder: DIR, as_json: console.AsJson = False) -> None:
    """Compare files with the sizes and hashes of the official ones."""
    from branchmix.scaling.official import verify

    found = verify(folder)
    complete = all(file.state == "ok" for file in found)
    content = {"ok": complete, "files": [asdict(file) for file in found]}
    console.output(as_json, lambda: content, lambda: typer.echo("\n".join(file.line for file in found)))
    if not complete:
        raise typer.Exit(1)


@data_app.command("fetch", epilog=FETCH)
def fetch_command(
    folder: DIR,
    source: Annotated[
        str | None,
        Option("--from", metavar="REPO", help="Data set on the Hub, or a folder.", show_default="the known one"),
    ] = None,
    force: Annotated[
        bool, Option("--force", help="Replace files of these names that are not the official ones.")
    ] = False,
) -> None:
    """Download the 11 official files; each gets its name once its hash is right."""
    from branchmix.scaling.official import REPOSITORY, fetch

    fetch(folder, repository=source or REPOSITORY, force=force, progress=typer.echo)


@data_app.command("make", epilog=MAKE)
def make_command(
    folder: DIR,
    seed: Annotated[int, Option(help="Random seed; different seeds give different examples.")],
    num: Annotated[int, Option(metavar="N", min=1, help="Examples per task.")] = 1000,
    tasks: Annotated[str, Option(metavar="A,B,...", help="Names of tasks, or all.")] = "all",
    shots: console.Shots = 0,
    controls: Annotated[
        bool,
        Option(
            "--controls",
            help="Make half of modus-tollens arguments that are not correct. Officially all are, so that a model that "
            "always says Yes gets all of them right.",
        ),
    ] = False,
    force: Annotated[bool, Option("--force", help="Replace files of these names; never the official ones.")] = False,
) -> None:
    """Write fresh examples of the tasks, in the official format, with answers that are known."""
    from branchmix.scaling.generate import make_data
    from branchmix.scaling.tasks import choose

    chosen = choose(tasks)
    if shots and (own := [task.name for task in chosen if task.shots_in_prompt]):
        console.notice(f"note: {', '.join(own)}: the prompts have their own shots, so --shots changes nothing there")
    made = make_data(folder, seed=seed, num_examples=num, tasks=chosen, shots=shots, controls=controls, force=force)
    for path in made:
        typer.echo(f"{path}: {counted(num, 'example')}")


# ---- scaling run ----

RUN = """\b
Examples:
  branchmix scaling run family.yaml --tasks all --data official --out results
  branchmix scaling run family.yaml --tasks memo-trap,neqa --data official --fresh fresh --out results
  branchmix scaling run family.yaml --tasks my-task.yaml
  branchmix scaling run family.yaml --data official --shots 0,1,2,4,8,16 --out results
  branchmix scaling run mixture.yaml --data official --experts 1,2,4 --out results
  branchmix scaling trends results

\b
The smallest family file:
  family: pythia
  models: [EleutherAI/pythia-70m, EleutherAI/pythia-160m, ./runs/mixture]
A model may also be a mapping such as
  {model: ./mixture, name: mix-8x, family: mixture, tokens: 300B, seed: 1}

\b
Several numbers for --shots, --experts or --top-k are axes within each model: every setting gets the same questions,
and `scaling trends --axis shots` judges along them.

\b
With --out, rerun the command to resume a stopped run; if you add models, tasks or examples, only those are computed.
"""


@scaling_app.command("run", epilog=RUN)
def run_command(
    family: Annotated[Path, Argument(metavar="FAMILY.yaml", help="The models.")],
    tasks: Annotated[
        str, Option(metavar="A,B,...", help="Names of tasks, YAML files of your own, or all that have files.")
    ] = "all",
    data: Annotated[
        list[Path] | None, Option(metavar="DIR", help="Folder of the tasks' files; may be repeated.")
    ] = None,
    fresh: Annotated[list[Path] | None, Option(metavar="DIR", help="Folder of fresh files, to compare with.")] = None,
    out: Annotated[Path | None, Option(metavar="DIR", help="Folder for records and results.")] = None,
    limit: Annotated[int | None, Option(min=1, metavar="N", help="At most N examples per task.")] = None,
    shots: Annotated[
        str, Option(metavar="K,...", help="Other examples, with answers, before each prompt; several are an axis.")
    ] = "0",
    experts: Annotated[
        str | None,
        Option(
            metavar="K,...",
            help="Experts of a mixture that run, chosen by the gates for each prompt: an axis.",
            show_default="all",
        ),
    ] = None,
    top_k: Annotated[
        str | None,
        Option(
            metavar="K,...",
            help="Experts of an FFN layer for each token: an axis.",
            show_default="as the model's config says",
        ),
    ] = None,
    bos: Annotated[str, Option(help="BOS before each prompt: default (as the tokenizer does), on or off.")] = (
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

    options: dict[str, Any] = {"tasks": tasks, "data": data or (), "fresh": fresh or (), "out": out, "limit": limit}
    options |= {"shots": console.counts_of(shots, "--shots", least=0)}
    for name, listed in (("experts", experts), ("top_k", top_k)):
        if listed is not None:
            options[name] = console.counts_of(listed, f"--{name.replace('_', '-')}", least=1)
    options |= {"bos": bos, "dtype": dtype, "batch_tokens": batch_tokens}
    with console.progress_bar(out) as progress:
        found = run(family, **options, trust_remote_code=trust_remote_code, progress=progress)
    console.output(as_json, found.as_dict, lambda: _print_scores(found), found.notes)
    if out is not None:
        console.notice(f"judge them: branchmix scaling trends {out}")


def _print_scores(run: ScalingRun) -> None:
    """A row for each task and model."""
    rows = []
    labels = [result.selected.label for result in run.results]
    for result in sorted(run.results, key=lambda result: labels.index(result.selected.label)):
        sizes = (result.subject.params, result.subject.active_params)
        counts = ["" if size is None else human_count(size) for size in sizes]
        means, remarks = (result.summary.means, list(result.summary.flags)) if result.summary is not None else ({}, [])
        loss = next((name for name in ("loss", "logodds", "absolute_logodds") if name in means), "loss")
        cells = [
            with_error(means[name].value, means[name].stderr) if name in means else "" for name in ("accuracy", loss)
        ]
        coverage = f"{means['coverage'].value:.3f}" if "coverage" in means else ""
        if loss != "loss":
            remarks.insert(0, f"loss: {loss}")
        if result.refused:
            remarks.append(f"{len(result.refused)} refused")
        if result.merged:
            remarks.append(f"{result.merged} merged")
        settings = [f"{axis} {value}" for axis, value in result.settings.items()]
        names = [result.selected.label, ", ".join([result.subject.label, *settings])]
        rows.append([*names, *counts, str(len(result.scored)), *cells, coverage, "; ".join(remarks)])
    head = ["task", "model", "params", "active", "n", "accuracy", "loss", "coverage", "remarks"]
    Table(head, rows, left=("model", "remarks")).show()

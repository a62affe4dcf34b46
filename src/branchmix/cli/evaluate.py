"""``branchmix eval``: models side by side on the text of every domain and on downstream tasks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from branchmix.cli import console
from branchmix.cli.console import app
from branchmix.errors import RecipeError
from branchmix.pages.numbers import human_count, with_error
from branchmix.pages.table import Table

if TYPE_CHECKING:
    from branchmix.evaluate.scores import EvalReport, ModelReport

EPILOG = """\b
Examples:
  branchmix eval seed code law soup mixture --data data.yaml --out results
  branchmix eval mixture --data run.yaml                    what the run held out
  branchmix eval seed code law --data data.yaml --ensemble seed,code,law
  branchmix eval mixture --data data.yaml --forced          the mixture, and each of its experts alone
  branchmix eval seed mixture --tasks arc_easy,hellaswag --limit 500
  branchmix eval seed mixture --tasks bam-reasoning,bam-mmlu --out results
  branchmix eval seed mixture --tasks my_task --include-path my_tasks
  branchmix eval seed mixture --tasks bam --task-data datasets --allow-code-execution --out results

\b
The smallest data file:
  data: {code: {files: "src/**/*.py"}, law: {files: law.jsonl}}
  held_out: all     # or as in a run, and without it as in a run that says nothing

\b
Tasks are lm-eval's (pip install 'branchmix[tasks]'): names of tasks, groups and tags, wildcards,
YAML files. Suites are the columns of the BAM paper's Table 3 (examples in the prompt):
  bam-math       gsm8k_cot (8), minerva_math (4)
  bam-code       humaneval (0), mbpp (3); both need --allow-code-execution
  bam-law        legalbench_international_citizenship_questions (4)
  bam-knowledge  nq_open (0), triviaqa (0)
  bam-reasoning  arc_easy, arc_challenge, social_iqa, piqa, winogrande, quac (0 each)
  bam-mmlu       mmlu (5)
  bam            all of them, and their average
lm-eval has no QuAC; that task is ours, in lm-eval's format, judged by the F1 of words.

\b
With --out, rerun the command to resume a stopped evaluation; recorded results are never computed again. Name
earlier models together with new ones to get one table of all.
"""


@app.command("eval", epilog=EPILOG)
def eval_command(
    models: Annotated[list[str], Argument(metavar="MODEL ...", help="Folders or Hub ids.")],
    data: console.Data = None,
    tasks: Annotated[str | None, Option(metavar="NAME,...", help="Downstream tasks of lm-eval, and suites.")] = None,
    out: Annotated[Path | None, Option(help="Folder for records and results.json.")] = None,
    max_length: Annotated[
        int | None, Option(min=1, help="Tokens of the window.", show_default="2048, on tasks the model's positions")
    ] = None,
    stride: Annotated[
        int | None,
        Option(
            min=1,
            help="Tokens that the window moves on in longer documents; fewer than the window make windows overlap.",
            show_default="the window",
        ),
    ] = None,
    batch_tokens: console.BatchTokens = 2048,
    dtype: console.Dtype = "auto",
    limit: Annotated[int | None, Option(min=1, help="Documents of a domain, and examples of a task, at most.")] = None,
    num_fewshot: Annotated[
        int | None, Option(min=0, help="Examples in the prompt of tasks.", show_default="as the task or suite says")
    ] = None,
    include_path: Annotated[
        list[Path] | None, Option(metavar="DIR", help="Folder of your own task files; may be repeated.")
    ] = None,
    task_data: Annotated[
        Path | None,
        Option(
            metavar="DIR",
            help="Folder with data sets of tasks as ORG/NAME or NAME, which are used instead of the Hub's.",
        ),
    ] = None,
    allow_code_execution: Annotated[
        bool, Option("--allow-code-execution", help="Run the code that models write for code tasks.")
    ] = False,
    ensemble: Annotated[
        str | None,
        Option(
            metavar="A,B,...",
            help="Also average the outputs of these models (BTM), weighted by how well each predicted the text so far; "
            "A=0.5,B=0.5 sets the prior.",
        ),
    ] = None,
    fixed_prior: Annotated[
        bool, Option("--fixed-prior", help="Keep the ensemble's prior instead of learning from the text.")
    ] = False,
    forced: Annotated[
        bool, Option("--forced", help="Also each expert of a mixture: all gates forced to it. The bound for its gates.")
    ] = False,
    trust_remote_code: console.TrustRemoteCode = False,
    as_json: console.AsJson = False,
) -> None:
    """Bits per byte and perplexity of models by domain, and downstream tasks, with standard errors."""
    console.quiet_libraries()
    from branchmix.evaluate.evaluation import evaluate
    from branchmix.evaluate.tasks.options import TaskOptions

    for_tasks = {"--num-fewshot": num_fewshot is not None, "--include-path": include_path}
    for_tasks |= {"--task-data": task_data, "--allow-code-execution": allow_code_execution}
    task_options = None
    if tasks is None:
        for name in (name for name, given in for_tasks.items() if given):
            raise RecipeError(f"{name}: is about downstream tasks: name some with --tasks")
    else:
        names = tuple(dict.fromkeys(name.strip() for name in tasks.split(",")))
        task_options = TaskOptions(names, num_fewshot, tuple(include_path or ()), task_data, allow_code_execution)
    options: dict[str, Any] = {"max_length": max_length, "stride": stride, "batch_tokens": batch_tokens, "dtype": dtype}
    options |= {"limit": limit, "ensemble": ensemble, "posterior": not fixed_prior, "forced": forced}
    with console.progress_bar(out) as progress:
        report = evaluate(
            models, data, tasks=task_options, out=out, **options, trust_remote_code=trust_remote_code, progress=progress
        )
    console.output(as_json, report.as_dict, lambda: _print(report), report.notes)


BEST = "* "
"""Begins the best cell among several models."""


def _print(report: EvalReport) -> None:
    """A table for domains, one for tasks and one for suites, the best of what is compared marked."""
    parts = [(_domains, "domains"), (_tasks, "tasks"), (_suites, "suites")]
    shown = [(table, [m for m in report.models if getattr(m, part)]) for table, part in parts]
    for number, (table, models) in enumerate((table, models) for table, models in shown if models):
        if number:
            typer.echo("")
        table(models).show()
    if len(report.models) > 1:
        typer.echo(f"{BEST}the best")


def _domains(models: list[ModelReport]) -> Table:
    columns = models[0].domains or {}
    head = [f"{name}, {human_count(score.bytes)}B" for name, score in columns.items()]
    cells = [
        [
            (-score.bits_per_byte, f"{with_error(score.bits_per_byte, score.stderr)} ({score.perplexity:.2f})")
            for score in (model.domains or {}).values()
        ]
        for model in models
    ]
    note = f"window {models[0].max_length} tokens, stride {models[0].stride}"
    return _of_models(models, head, cells, "bits per byte ± standard error (perplexity)", note)


def _tasks(models: list[ModelReport]) -> Table:
    """Tasks in rows, models in columns; a group with an average replaces its tasks."""
    first = models[0].tasks or {}
    within = {name for task in first.values() for name in task.subtasks} & first.keys()
    rows = []
    for name, task in first.items():
        for metric in task.metrics if name not in within else ():
            scores = [(model.tasks or {})[name].metrics[metric] for model in models]
            sign = -1 if task.higher_is_better.get(metric.split(",")[0]) is False else 1
            cells = _marked([(sign * score.value, with_error(score.value, score.stderr)) for score in scores])
            shots = "" if task.num_fewshot is None else str(task.num_fewshot)
            rows.append([name, str(task.examples), shots, metric.replace(",", ", "), *cells])
    head = ["task", "examples", "shots", "metric", *(model.model for model in models)]
    note = f"{len(within)} tasks of these groups: see --json" if within else ""
    return _table(head, rows, "downstream tasks, ± standard error", note, left=("metric",))


def _suites(models: list[ModelReport]) -> Table:
    """The form of the paper's Table 3, in percent."""
    head = [suite.title for suite in models[0].suites.values()]
    scores = [[suite.score for suite in model.suites.values()] for model in models]
    cells = [
        [(s.value, with_error(100 * s.value, s.stderr and 100 * s.stderr, digits=2)) for s in row] for row in scores
    ]
    return _of_models(models, head, cells, "suites of the BAM paper, % ± standard error")


def _of_models(
    models: list[ModelReport], head: list[str], cells: list[list[tuple[float, str]]], title: str, note: str = ""
) -> Table:
    """Models in rows; of each cell how good it is, and what it says."""
    columns = [_marked(column) for column in zip(*cells, strict=True)]
    rows = [list(row) for row in zip([model.model for model in models], *columns, strict=True)]
    return _table(["model", *head], rows, title, note)


def _table(head: list[str], rows: list[list[str]], title: str, note: str = "", left: Collection[str] = ()) -> Table:
    best = {(n, column) for n, row in enumerate(rows) for column, cell in enumerate(row) if cell.startswith(BEST)}
    return Table(head, rows, title=title, note=note, bold=best, left=left)


def _marked(compared: Sequence[tuple[float, str]]) -> list[str]:
    """What cells say, the best of several marked; each with how good it is."""
    best = max(value for value, _ in compared) if len(compared) > 1 else None
    return [(BEST if value == best else "") + text for value, text in compared]

"""``branchmix eval``: models side by side on the text of every domain and on downstream tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from branchmix.cli import console
from branchmix.errors import RecipeError

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


def eval_command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL ...", help="Folders or Hub ids.")],
    data: Annotated[Path | None, typer.Option("--data", metavar="FILE", help="YAML: domains, as in a run.")] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Downstream tasks of lm-eval, and suites.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for records and results.json.")] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of the window.", show_default="2048, on tasks the model's positions"),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens that the window moves on in longer documents; fewer than the window make windows overlap.",
            show_default="the window",
        ),
    ] = None,
    batch_tokens: console.BatchTokens = 2048,
    dtype: console.Dtype = "auto",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Documents of a domain, and examples of a task, at most.")
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="Examples in the prompt of tasks.", show_default="as the task or suite says"),
    ] = None,
    include_path: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Folder of your own task files; may be repeated.")
    ] = None,
    task_data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder with data sets of tasks as ORG/NAME or NAME, which are used instead of the Hub's.",
        ),
    ] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run the code that models write for code tasks.")
    ] = False,
    ensemble: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Also average the outputs of these models (BTM), weighted by how well each predicted the text so far; "
            "A=0.5,B=0.5 sets the prior.",
        ),
    ] = None,
    fixed_prior: Annotated[
        bool, typer.Option("--fixed-prior", help="Keep the ensemble's prior instead of learning from the text.")
    ] = False,
    forced: Annotated[
        bool,
        typer.Option(
            "--forced", help="Also each expert of a mixture: all gates forced to it. The bound for its gates."
        ),
    ] = False,
    trust_remote_code: console.TrustRemoteCode = False,
    as_json: console.AsJson = False,
) -> None:
    """Bits per byte and perplexity of models by domain, and downstream tasks, with standard errors."""

    console.quiet_libraries()
    from branchmix.cli.eval_tables import print_report
    from branchmix.evaluate.evaluation import evaluate
    from branchmix.evaluate.tasks.options import TaskOptions

    only_for_tasks = {
        "--num-fewshot": num_fewshot is not None,
        "--include-path": bool(include_path),
        "--task-data": task_data is not None,
        "--allow-code-execution": allow_code_execution,
    }
    for name, is_given in only_for_tasks.items():
        if is_given and tasks is None:
            raise RecipeError(f"{name}: is about downstream tasks: name some with --tasks")
    options = None
    if tasks is not None:
        names = tuple(dict.fromkeys(name.strip() for name in tasks.split(",")))
        options = TaskOptions(names, num_fewshot, tuple(include_path or ()), task_data, allow_code_execution)
    with console.resumable(out), console.progress_bar() as progress:
        report = evaluate(
            models,
            data,
            tasks=options,
            out=out,
            max_length=max_length,
            stride=stride,
            batch_tokens=batch_tokens,
            dtype=dtype,
            limit=limit,
            ensemble=ensemble,
            posterior=not fixed_prior,
            forced=forced,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    console.print_notes(report.notes)
    if as_json:
        console.print_json(report.as_dict())
    else:
        print_report(report)

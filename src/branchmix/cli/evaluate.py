"""``branchmix eval`` and ``routes``: how good models are on text and tasks, and which expert each token uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from branchmix.checkpoint.folder import require_new_file, write_text
from branchmix.cli import console
from branchmix.cli.console import app
from branchmix.errors import RecipeError
from branchmix.pages.numbers import counted, human_count, with_error
from branchmix.pages.table import Table

if TYPE_CHECKING:
    from branchmix.evaluate.routing.routing_report import RoutingReport
    from branchmix.evaluate.scores import Comparison, EvalReport, ModelReport

# ---- eval ----

EVAL = """\b
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
  held_out: all     # every document; without this line, those that a run with the default settings holds out

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
lm-eval has no QuAC; branchmix includes that task, in lm-eval's format, judged by the F1 of words. With several models,
each is compared with the first one on the same questions.

\b
With --out, rerun the command to resume a stopped evaluation; recorded results are never computed again. Name
earlier models together with new ones to get one table of all.
"""


@app.command("eval", epilog=EVAL)
def eval_command(
    models: Annotated[list[str], Argument(metavar="MODEL ...", help="Folders or Hub ids, of LoRA adapters too.")],
    data: console.Data = None,
    tasks: Annotated[str | None, Option(metavar="NAME,...", help="Downstream tasks of lm-eval, and suites.")] = None,
    out: Annotated[Path | None, Option(help="Folder for records and results.json.")] = None,
    max_length: Annotated[
        int | None,
        Option(
            min=1,
            help="Window size, in tokens.",
            show_default="2048, or the models' positions if fewer; on tasks the model's positions",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        Option(
            min=1,
            help="Step between windows, in tokens; windows overlap if it is smaller than the window.",
            show_default="the window",
        ),
    ] = None,
    batch_tokens: console.BatchTokens = 2048,
    dtype: console.Dtype = "auto",
    limit: Annotated[
        int | None,
        Option(metavar="N", min=1, help="At most N documents per domain, and N examples per task."),
    ] = None,
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
        bool,
        Option(
            "--forced",
            help="Also evaluate each expert of a mixture, with all gates forced to it: what ideal gates could reach.",
        ),
    ] = False,
    trust_remote_code: console.TrustRemoteCode = False,
    as_json: console.AsJson = False,
) -> None:
    """Bits per byte and perplexity of models by domain, and downstream tasks, with standard errors."""
    console.quiet_libraries()
    from branchmix.evaluate.evaluation import evaluate
    from branchmix.evaluate.tasks.options import TaskOptions

    for_tasks: dict[str, Any] = {"--num-fewshot": num_fewshot is not None, "--include-path": include_path}
    for_tasks |= {"--task-data": task_data, "--allow-code-execution": allow_code_execution}
    task_options = None
    if tasks is None:
        if given := [name for name, value in for_tasks.items() if value]:
            raise RecipeError(f"{given[0]}: is about downstream tasks: name some with --tasks")
    else:
        names = tuple(dict.fromkeys(name.strip() for name in tasks.split(",")))
        task_options = TaskOptions(names, num_fewshot, tuple(include_path or ()), task_data, allow_code_execution)
    options: dict[str, Any] = {"max_length": max_length, "stride": stride, "batch_tokens": batch_tokens, "dtype": dtype}
    options |= {"limit": limit, "ensemble": ensemble, "posterior": not fixed_prior, "forced": forced}
    with console.progress_bar(out) as progress:
        report = evaluate(
            models, data, tasks=task_options, out=out, **options, trust_remote_code=trust_remote_code, progress=progress
        )
    console.output(as_json, report.as_dict, lambda: _print_scores(report), report.notes)


BEST = "* "
"""Begins the best cell among several models."""


def _print_scores(report: EvalReport) -> None:
    """A table for domains, one for tasks and one for suites, the best of what is compared marked."""
    parts = [(_domains, "domains"), (_tasks, "tasks"), (_suites, "suites")]
    shown = [(table, [m for m in report.models if getattr(m, part)]) for table, part in parts]
    for number, (table, models) in enumerate((table, models) for table, models in shown if models):
        if number:
            typer.echo("")
        table(models).show()
    if len(report.models) > 1:
        typer.echo(f"{BEST}the best")
    for comparison in report.comparisons:
        typer.echo("")
        _comparison(comparison).show()


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
    note = f"window {counted(models[0].max_length or 0, 'token')}, stride {models[0].stride}"
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
    title = "downstream tasks, ± standard error"
    return Table(head, rows, title=title, note=note, bold=_best(rows), left=("metric",))


def _comparison(comparison: Comparison) -> Table:
    """Two models on the same questions; a group replaces its tasks."""
    from branchmix.evaluate.scores import ALPHA

    shown = [one for one in comparison.differences if not one.is_within]
    return console.differences(
        f"{comparison.second} minus {comparison.first}, on the same questions",
        [(one.task, one.metric, one.found, one.p_adjusted) for one in shown],
        alpha=ALPHA,
        correction="Benjamini-Hochberg over tasks",
    )


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
    return Table(["model", *head], rows, title=title, note=note, bold=_best(rows))


def _best(rows: list[list[str]]) -> set[tuple[int, int]]:
    return {(n, column) for n, row in enumerate(rows) for column, cell in enumerate(row) if cell.startswith(BEST)}


def _marked(compared: Sequence[tuple[float, str]]) -> list[str]:
    """What cells say, the best of several marked; each with how good it is."""
    best = max(value for value, _ in compared) if len(compared) > 1 else None
    return [(BEST if value == best else "") + text for value, text in compared]


# ---- routes ----

ROUTES = """\b
Examples:
  branchmix routes mixture --text "def f(x): return x + 1" --html routes.html
  branchmix routes mixture --data data.yaml --html routes.html --plots plots --out routing
  branchmix routes mixture --text @contract.txt --text -         a file, and standard input
  branchmix routes Qwen/Qwen1.5-MoE-A2.7B --data data.yaml       any mixture that transformers knows

\b
The data file is the one of `branchmix eval` or of a run; the held-out documents are used.
"""
MAX_LINES = 12
"""Maximum number of layers to print one by one."""


@app.command("routes", epilog=ROUTES)
def routes_command(
    model: console.Mixture,
    text: Annotated[
        list[str] | None,
        Option(metavar="TEXT", help="A text, @FILE, or - for standard input; may be repeated."),
    ] = None,
    data: console.Data = None,
    html: Annotated[
        Path | None, Option(metavar="FILE", help="Write a page: each token coloured by its expert.")
    ] = None,
    plots: Annotated[Path | None, Option(metavar="DIR", help="Write pictures, PNG and PDF.")] = None,
    out: Annotated[
        Path | None,
        Option(metavar="PATH", help="Write the numbers: a folder (JSON and CSV), or a file *.json."),
    ] = None,
    max_length: Annotated[
        int | None, Option(min=1, help="Tokens of context.", show_default="2048, or the model's positions")
    ] = None,
    batch_tokens: console.BatchTokens = 2048,
    dtype: console.Dtype = "auto",
    limit: Annotated[int | None, Option(metavar="N", min=1, help="At most N documents per domain.")] = None,
    page_tokens: Annotated[int, Option(min=1, help="Tokens on the page, in all.")] = 4000,
    force: Annotated[bool, Option("--force", help="Replace files that exist.")] = False,
    trust_remote_code: console.TrustRemoteCode = False,
    as_json: console.AsJson = False,
) -> None:
    """Which expert each token uses, by layer and domain: FFN routers, and the attention gates of BAM."""
    console.quiet_libraries()
    from branchmix.evaluate.routing.plots import plot_files, write_plots
    from branchmix.evaluate.routing.routes import number_files, read_texts, routes, write_numbers

    numbers, pictures = number_files(out) if out else [], plot_files(plots) if plots else []
    for file in (*numbers, *pictures, *([html] if html else [])):
        require_new_file(file, force=force)
    options: dict[str, Any] = {"max_length": max_length, "batch_tokens": batch_tokens, "dtype": dtype, "limit": limit}
    options |= {"shown_tokens": page_tokens, "trust_remote_code": trust_remote_code}
    with console.progress_bar() as progress:
        routed = routes(model, data=data, texts=read_texts(text or []), **options, progress=progress)
    written: list[Path] = []
    if out is not None:
        written += write_numbers(routed.report, out)
    if plots is not None:
        written += write_plots(routed.report.as_dict(), plots)
    if html is not None:
        from branchmix.evaluate.routing import token_page

        write_text(html, token_page.html(routed))
        written.append(html)
    console.output(as_json, routed.report.as_dict, lambda: _print_routes(routed.report), routed.report.notes)
    for file in written:
        console.notice(f"written: {file}")


def _print_routes(report: RoutingReport) -> None:
    """Shares by layer and domain; of a deep model some of the layers."""
    agreement = {pair["layer"]: pair for pair in report.agreement}
    for kind, layers in report.layers.items():
        facts = report.routers[kind]
        names = report.names(kind)
        how = "soft gate over all experts" if facts["soft"] else f"top-{facts['top_k']} of {facts['experts']}"
        title = f"{'FFN experts' if kind == 'ffn' else 'attention experts'}: share of tokens by domain ({how})"
        shown = " ".join(name.rjust(2) for name in names) if len(names) <= 8 else "most used, %"
        domains = [
            f"{domain}, {counted(sizes['tokens'], 'token')}\n{shown}" for domain, sizes in report.domains.items()
        ]
        head = ["layer", *domains, "load\nentropy", "token\nentropy", "mutual\ninformation, bits"]
        has_agreement = kind == "ffn" and bool(agreement)
        head += ["agrees with\nattention"] * has_agreement
        rows = []
        step = max(1, -(-len(layers) // MAX_LINES))
        for layer in layers[::step]:
            cells = [_shares(layer["by_domain"][domain], names) for domain in report.domains]
            known = layer["mutual_information_corrected"]
            cells += [f"{layer[name]:.2f}" for name in ("load_entropy", "token_entropy")]
            cells.append("-" if known is None else f"{known:.3f}")
            if has_agreement:
                pair = agreement.get(layer["layer"])
                cells.append("-" if pair is None else f"{pair['same']:.0%} ({pair['same_by_chance']:.0%} by chance)")
            rows.append([str(layer["layer"]), *cells])
        note = f"one of {step} of all {len(layers)} layers; all with --json, --out or --html" if step > 1 else ""
        Table(head, rows, title=title, note=note).show()
        typer.echo("")
    for kind, layers in report.layers.items():
        layer = max(layers, key=lambda layer: layer["mutual_information_corrected"] or 0.0)
        typer.echo(f"typical tokens in layer {layer['layer']}, {'FFN' if kind == 'ffn' else 'attention'}:")
        for name, tokens in list(zip(report.names(kind), layer["typical"], strict=True))[:MAX_LINES]:
            words = " ".join(repr(token["token"]) for token in tokens[:8])
            typer.echo(f"  {name}: {words or '-'}")


def _shares(shares: list[float], names: list[str]) -> str:
    """All of a few experts in their order; of many, the most used with their names."""
    if len(names) <= 8:
        return " ".join(
            f"{100 * share:.0f}".rjust(max(2, len(name))) for share, name in zip(shares, names, strict=True)
        )
    order = sorted(range(len(shares)), key=lambda expert: -shares[expert])[:3]
    return ", ".join(f"{names[expert]}: {100 * shares[expert]:.0f}" for expert in order)

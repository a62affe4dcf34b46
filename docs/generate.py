"""Writes the pages that come from the code and from results: commands, keys, families, studies.

``make docs`` runs it; ``python docs/generate.py --check`` fails if a page is out of date (a test runs that).
``python docs/generate.py families`` first tries all causal types of transformers again (``causal_types.py``).
"""

from __future__ import annotations

import re
import sys
import tempfile
import types
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import causal_types
from pydantic import BaseModel
from typer import Typer
from typer.testing import CliRunner

from branchmix.checkpoint.families import families
from branchmix.cli import app
from branchmix.recipe import Recipe
from branchmix.settings import Count
from branchmix.study.report import report
from branchmix.study.settings import METHODS, InstalledText, StudyFile
from branchmix.study.tables import percent, perplexities
from branchmix.train.config import BranchConfig, RunConfig

FOLDER = Path(__file__).parent
HEADER = "<!-- Written by docs/generate.py: change the code instead. -->\n\n"
COUNTS = "A *count* is a whole number that may have a unit: `100M`, `2.5B`."
BELOW = ", see below"


def cli_page() -> str:
    """Every command's help text, as a terminal shows it."""
    runner = CliRunner()
    environment = {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"}
    lines = ["# Commands", ""]
    for words in [[], *_commands(app)]:
        result = runner.invoke(app, [*words, "--help"], env=environment, prog_name="branchmix")
        text = "\n".join(line.rstrip() for line in result.output.strip().splitlines())
        lines += [f"## `{' '.join(['branchmix', *words])}`", "", "```text", text, "```", ""]
    return HEADER + "\n".join(lines)


def _commands(group: Typer) -> list[list[str]]:
    """The words of every command of a group, and of the groups in it."""
    found = [[command.name] for command in group.registered_commands if command.name]
    for inner in group.registered_groups:
        found += [[str(inner.name), *words] for words in _commands(inner.typer_instance or Typer())]
    return found


def recipe_page() -> str:
    """Every key of a recipe, with its choices, default and meaning."""
    lines = ["# Recipe", "", "A YAML file; unknown keys are refused. Relative paths start from the file's folder.", ""]
    lines += _table(Recipe, "", title="`recipe`")
    return HEADER + "\n".join(lines)


def training_page() -> str:
    """Every key of a run and of a branch file."""
    lines = [
        "# Training",
        "",
        "`branchmix train` reads the settings of one run from a YAML file, `branchmix branch` those of all",
        "experts. Unknown settings are refused. Relative paths start from the file's folder. On the command line,",
        "`key=value` replaces a setting; dots address nested ones (`budget.tokens=2M`). Examples:",
        "`recipes/train-*.yaml`, `recipes/branch.yaml`.",
        COUNTS,
        "",
        "A run writes these files into its folder `out`: `metrics.jsonl`, with a row every `logging.steps` and one",
        "per evaluation; `checkpoints/`, each of them a complete model; and at the end the model and `training.json`,",
        "with settings, tokens, FLOPs, and the held-out loss by domain before and after. Rerun the command to resume",
        "from the last checkpoint; if the run is done, the command says so. Exit codes: 0 for success; 2 for user",
        "errors and for a loss that is NaN or infinite; 130 and 143 after Ctrl-C and SIGTERM, which write a checkpoint",
        "first.",
        "",
        *_table(RunConfig, "", title="a run"),
        "## all experts (`branch`)",
        "",
        f"{_first_line(BranchConfig)} It has all settings of a run except `model`, `mix`, `adapters` and `balance`, "
        "and these:",
        "",
        *_table(BranchConfig, "", known=set(RunConfig.model_fields) - {"out"})[4:],
    ]
    return HEADER + "\n".join(lines)


def studies_page() -> str:
    """How studies work, every key of their files, and every method."""
    lines = [
        "# Studies",
        "",
        "`branchmix study` compares methods at equal data and equal compute. It trains the seed (or uses yours) and",
        "the experts, merges them with every method you list, trains the mixtures, evaluates everything, and repeats",
        "that with other random seeds. `branchmix report` writes tables in the form of the BAM paper's, figures, and",
        "one page with both. Examples: `recipes/study-tiny.yaml` (minutes), `recipes/study-a.yaml` (from scratch,",
        "hours: [results](studies/study-a.md)), `recipes/study-b.yaml` (SmolLM2-135M, an hour and a half:",
        "[results](studies/study-b.md)), `recipes/study-c.yaml` (calibrated mixtures, untrained and trained:",
        "[results](studies/study-c.md)), `recipes/study-d.yaml` (load balancing, shared experts, Nexus and BTS:",
        "[results](studies/study-d.md)).",
        COUNTS,
        "",
        "- **Equal data (DM)**: within a repetition, a run sees the reference's tokens in the same order.",
        "- **Equal compute (CM)**: a run takes as many whole steps as the reference's training FLOPs pay for: forward,",
        "  backward (only the gradients of what is trained) and AdamW, counted exactly. Each run has its own complete",
        "  learning-rate schedule. If equal data costs the same to within 0.5 %, one run serves both. The report",
        "  checks both budgets against what the runs recorded, and shows what the dense models cost before.",
        "- **Steps**: each step is cached under a hash of its options and its inputs' hashes. Finished steps are",
        "  skipped, and a changed option repeats only the steps that depend on it. Rerun the command to resume a",
        "  study that was stopped or killed; its runs resume from their checkpoints. Labels, threads, checkpoint",
        "  intervals and the like are not part of the hash. `--only` takes names of steps or parts of them (`r1`,",
        "  `btx`, `'r*.train.*'`). Results of earlier settings stay in `steps/` until you delete them.",
        "- **Perplexity** is measured on whole held-out documents, in windows of `sequence_length` tokens that do not",
        "  overlap: the rule of `branchmix eval` and of lm-eval's `loglikelihood_rolling`.",
        "- **Intervals** are Student's 95 % over repetitions, paired by the order of the data. With a single",
        "  repetition, only the error over held-out documents is known, and differences up to 2 % do not count.",
        "- **Results** are small text files in `results/`. `branchmix report` needs nothing else, so commit those.",
        "- **Time**: with `minutes`, `tokens` and `data.installed` are proportions. When the study begins, it",
        "  measures the speed of this machine, with as many processes side by side as the steps will have, and",
        "  takes the largest budgets whose forecast fits. They are kept when the study is resumed.",
        "- **Cores**: on CPUs, steps run side by side, each with one thread. If no other step can run beside the",
        "  training of a dense model, as many processes as there are cores share it.",
        "- **Routing**: `routes` names methods whose mixture gets its own page, on which each token of the held-out",
        "  text shows its expert. The report links to it.",
        "- **Before training**: methods called `...-calibrated` fit their gates, as `branchmix calibrate` does, on",
        "  the study's own text without what is held out, before they are measured and trained. `gates: {}` in the",
        "  recipe of any other method does the same. Methods called `...-forced` measure such a merge with all gates",
        "  forced to each domain's best expert: the bound for any gates. With `soup` beside them, the report shows how",
        "  much of the gap between soup and forced gates the gates of each mixture close.",
        "- **Disk space**: `keep: results` deletes the weights of merges and mixtures once no step needs them; if a",
        "  new step needs them, they are made again.",
        "",
        "## The demo",
        "",
        "`branchmix demo` (`make demo`) is a study too: `src/branchmix/study/recipes/demo.yaml`, on text that Python",
        "packages contain. It writes the page of `branchmix report`, `demo-output/index.html`, and prints two of its",
        "tables: all models, and what merging alone gives (soup, ensemble, and mixtures with random, calibrated and",
        "forced gates, before any of them is trained). This is what an",
        "earlier version of the demo gave with one random seed and half of Study A's tokens (run of 2026-11-22, AMD",
        "EPYC, 2 cores, bf16):",
        "",
        "- At equal data, Expert KV was 3.6 % ± 0.4 and Shared KV 2.2 % ± 0.4 better than BTX in perplexity; at equal",
        "  compute they were 8 % and 7 % worse.",
        "- On code, law and mathematics, the attention gates gave 0.50, 0.59 and 0.44 of their weight to the domain's",
        "  own expert, although no loss asks for it (0.25 would be chance).",
        "",
        "![Perplexity of all models, loss over compute, and attention gates by domain](images/demo.png)",
        "",
        *_table(StudyFile, "", title="A study's file"),
        *_table(InstalledText, "", title="`data` of installed text"),
        "## Methods",
        "",
        "| name | what | trained | runs |",
        "| --- | --- | --- | --- |",
    ]
    kinds = {"mixture": "merged and trained", "dense": "the seed, trained", "ensemble": "-"}
    kinds |= dict.fromkeys(("merge", "forced"), "merged only")
    for name, preset in METHODS.items():
        runs = ", ".join(preset.match).upper() if preset.kind in ("mixture", "dense") else "-"
        lines.append(f"| `{name}` | {preset.what} | {kinds[preset.kind]} | {runs} |")
    lines += [
        "",
        "Seed and experts are always evaluated. You can list a method more than once with different options:",
        "`{method: btx, name: btx-z, recipe: {router_z_loss_coef: 0.01}, match: [dm]}`.",
        "",
    ]
    return HEADER + "\n".join(lines)


def _table(model: type[BaseModel], path: str, *, title: str = "recipe", known: Collection[str] = ()) -> list[str]:
    lines = [f"## `{path.rstrip('.')}`" if path else f"## {title}", "", _first_line(model), ""]
    lines += ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    below: list[str] = []
    for name, field in model.model_fields.items():
        if name in known:
            continue
        inner = _model_in(field.annotation)
        default = "required" if field.is_required() else _default(field.default)
        meaning = " ".join((field.description or "").split()).replace("|", "\\|").replace("``", "`")
        lines.append(f"| `{name}` | {_kind(field.rebuild_annotation())} | {default} | {meaning} |")
        if inner is not None:
            below += _table(inner, f"{path}{name}{_marker(field.annotation)}")
    return [*lines, "", *below]


def _marker(annotation: Any) -> str:
    """What leads from a key to the settings in its value: a name, a place in a list, or nothing."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return next(_marker(argument) for argument in get_args(annotation) if _model_in(argument))
    return "[]." if origin is list else ".NAME." if origin is dict else "."


def _first_line(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").strip().split("\n\n")[0].split()).replace("``", "`")


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _model_in(inner))), None)


def _kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return "anything"
    if origin in (Union, types.UnionType):
        kinds = [_kind(argument) for argument in arguments if argument is not type(None)]
        words = " or ".join(kind.removesuffix(BELOW) for kind in kinds)
        return words + BELOW if any(kind.endswith(BELOW) for kind in kinds) else words
    if origin is list:
        return "list" + BELOW if _model_in(arguments[0]) else f"list of {_kind(arguments[0])}"
    if origin is dict:
        if _model_in(arguments[1]):
            return "mapping by name" + BELOW
        return "mapping" if arguments[1] is Any else f"mapping of name to {_kind(arguments[1])}"
    if origin is tuple:
        return "two numbers"
    if arguments and str(origin).endswith("Literal"):
        return ", ".join(f"`{argument}`" for argument in arguments)
    if get_args(Count)[1] in arguments:
        return "count"
    if arguments:
        return _kind(arguments[0])
    names = {"bool": "true or false", "int": "whole number", "float": "number", "str": "text", "Path": "path"}
    return names.get(annotation.__name__, "mapping" + BELOW)


def _default(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "see below"
    if value is None:
        return "-"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    return f"`{value}`" if value != [] else "none"


def families_page() -> str:
    """What is known of each family, from the table the code uses."""
    lines = [
        "# Families",
        "",
        "Families with an entry of their own. Any other family of transformers whose tensors have Llama's names is",
        "taken by inference from those names, and refused with the reason if they do not fit. A new family is one",
        "entry in `src/branchmix/checkpoint/families.yaml` and one line in `tests/families.py`.",
        "",
        "| family | block | attention | q/k norms | FFN | rotary base per expert | norm folding |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, family in families().items():
        block = {"config": "as the config says"}.get(family.block, family.block)
        fused = f"fused `{family.fused_qkv}`" if family.fused_qkv else "q, k, v"
        code = "family's own, widened" if family.attention_code == "family" else "computed by the mixture"
        over = {"head": "per head size", "heads": "per head", "all": "all heads"}[family.norm_over]
        norms = "-" if family.query_norm is None else over
        ffn = "gated" if family.gate else "plain"
        rotary = "yes" if family.plain_attention else "-"
        fold = "where its norms have gains only" if family.attention_input_norm else "-"
        lines.append(f"| {name} | {block} | {fused}; {code} | {norms} | {ffn} | {rotary} | {fold} |")
    learned = ", ".join(name for name, family in families().items() if family.activation_parameters)
    lines += [
        "",
        f"Activations with learned parameters ({learned}) are shared by all experts of a mixture and merged as norms",
        "are. Where a config asks for attention that is not causal (`use_bidirectional_attention`,",
        "`is_causal: false`), the mixture computes what the seed does, and a note says that cached and uncached",
        "generation differ.",
        "",
        "## The text part of a multimodal model",
        "",
        "Seed and experts must be causal language models of text. If the text part of a multimodal model is one of the",
        "families above, save it alone, for the seed and every expert:",
        "",
        "```python",
        *TEXT_PART.read_text(encoding="utf-8").rstrip().splitlines(),
        "```",
        "",
        *_causal_types(),
    ]
    return HEADER + "\n".join(lines) + "\n"


TEXT_PART = FOLDER / "text_part.py"
"""The example of that section; a test runs it."""


def _causal_types() -> list[str]:
    """Every causal language model type of transformers, with what came of it."""
    found = causal_types.read()
    works = sum(result.startswith("works") for result in found["types"].values())
    return [
        f"## All causal types of transformers {found['transformers']}",
        "",
        "What happened when each type was tried: a tiny random model of its default config and a sibling were merged",
        "into two mixtures. *Works* means that a mixture computes what each dense model does when both gates are",
        f"forced on it, to {causal_types.TOLERANCE:g}; *by inference* means without an entry in the table above.",
        f"Otherwise the reason is the one that `upcycle` gives. {works} of {len(found['types'])} work.",
        "`python docs/generate.py families` tries them again.",
        "",
        "| type | result |",
        "| --- | --- |",
        *(f"| {name} | {result.replace('|', ' ')} |" for name, result in found["types"].items()),
    ]


def study_page(name: str) -> str:
    """What came out of a study: ``studies/NAME/about.md``, the tables of its results, and its pictures.

    The pictures are those that ``branchmix report docs/studies/NAME`` drew.
    """
    folder = FOLDER / "studies" / name
    with tempfile.TemporaryDirectory() as out:
        found = report(folder, out, kinds=["markdown"]).numbers
        tables = (Path(out) / "tables.md").read_text(encoding="utf-8").partition("\n")[2]
    pictures = [f"![{path.stem}]({name}/figures/{path.name})\n" for path in sorted(folder.glob("figures/*.png"))]
    about = (folder / "about.md").read_text(encoding="utf-8")
    if _BY_GATES in about:
        about = about.replace(_BY_GATES, "\n".join(_by_gates(found)))
    return HEADER + "\n".join([about, "## Results", tables, "## Pictures", "", *pictures])


_BY_GATES = "<!-- Table: trained mixtures by their gates -->"
_GATES = {"calibrated": "document gates", "token-only": "gates of single tokens", "random": "random gates"}
_MIXTURES = (  # label, method but for its gates, method with random gates
    ("BTX", "btx-top1", "btx"),
    ("BAM Shared KV, attention top-1", "shared-kv-top1", "bam-attention-top1"),
    ("BAM Expert KV, attention top-1", "expert-kv-top1", "expert-kv-top1"),
    ("BAM Shared KV, attention top-2", "shared-kv-top2", "bam-attention-top2"),
    ("BAM Expert KV, attention top-2", "expert-kv-top2", "expert-kv-top2"),
    ("BAM Shared KV, soft attention", "shared-kv-soft", "bam-shared-kv"),
    ("BAM Expert KV, soft attention", "expert-kv-soft", "bam-expert-kv"),
    ("BTX, two FFN experts", "btx-top2", "btx-top2"),
)


def _by_gates(study: dict[str, Any]) -> list[str]:
    """Study C's trained mixtures, a row each, at both budgets with each kind of gates."""

    def flops(model: dict[str, Any]) -> int:
        return int(model["facts"]["forward_flops_per_token"])

    def cell(model: dict[str, Any]) -> str:
        compared = study["comparisons"].get(model["title"])
        difference = f" ({percent(compared['log_perplexity'], significant=False)})" if compared else ""
        return f"{model['geometric_mean']:.1f}{difference}"

    reference = next(model for model in study["models"] if model["title"] == study["reference"])
    # What costs as much as the reference sees as many tokens for the same FLOPs, so its one run serves both budgets.
    models = {
        (model["method"], match): model
        for model in study["models"]
        if model["group"] in ("methods", "ablations")
        for match in (("cm", "dm") if flops(model) == flops(reference) else model["match"])
    }
    budgets = [f"{gates}, {budget}" for gates in _GATES.values() for budget in ("equal compute", "equal data")]
    lines = [f"| | FLOPs a token | {' | '.join(budgets)} |", "| --- |" + " ---: |" * (1 + len(budgets))]
    for label, stem, random in _MIXTURES:
        methods = [random if gates == "random" else f"{stem}-{gates}" for gates in _GATES]
        cells = [cell(models[method, match]) for method in methods for match in ("cm", "dm")]
        lines.append(f"| {label} | {flops(models[random, 'cm']) / 1e6:.2f}M | {' | '.join(cells)} |")
    return lines


README_STUDY = "study-a"
_RESULTS = re.compile(r"(<!-- Results of studies/[^>]*-->\n).*(<!-- End of results -->)", re.DOTALL)


def readme() -> str:
    """The project's first page, with its study's trained mixtures and ensemble between two comments.

    The page of the study has the same table with all models.
    """
    folder, path = FOLDER / "studies" / README_STUDY, FOLDER.parent / "README.md"
    with tempfile.TemporaryDirectory() as out:
        found = report(folder, out, kinds=["markdown"]).numbers
    shown = [model for model in found["models"] if model["method"] == "ensemble" or model["group"] == "methods"]
    table = perplexities({**found, "models": shown})
    lines = table.markdown().partition("\n\n")[2]
    text, count = _RESULTS.subn(lambda marks: f"{marks[1]}\n{lines}\n{marks[2]}", path.read_text(encoding="utf-8"))
    if count != 1:
        raise SystemExit(f"{path}: the comments around its results are not there once")
    return text


_VERDICTS = re.compile(r"(<!-- Results of benchmarks/verdicts.py -->\n).*(<!-- End of results -->)", re.DOTALL)


def verdicts_page() -> str:
    """The page on verdicts, with the newest results of their benchmark between two comments."""
    path = FOLDER / "verdicts.md"
    results = max((FOLDER.parent / "benchmarks" / "results").glob("verdicts-*.md")).read_text(encoding="utf-8")
    table = results.replace("# ", "### ", 1)
    text, count = _VERDICTS.subn(lambda marks: f"{marks[1]}\n{table}\n{marks[2]}", path.read_text(encoding="utf-8"))
    if count != 1:
        raise SystemExit(f"{path}: the comments around its results are not there once")
    return text


PAGES: dict[str, Callable[[], str]] = {
    "cli.md": cli_page,
    "recipe.md": recipe_page,
    "training.md": training_page,
    "studies.md": studies_page,
    "families.md": families_page,
    "verdicts.md": verdicts_page,
    "../README.md": readme,
    **{
        f"studies/{about.parent.name}.md": partial(study_page, about.parent.name)
        for about in sorted(FOLDER.glob("studies/*/about.md"))
    },
}


def main(arguments: list[str]) -> int:
    """Write all pages, or with ``--check`` say which differ; ``families`` tries all types before."""
    if arguments == ["families"]:
        causal_types.write()
    stale = []
    for name, page in PAGES.items():
        path, text = FOLDER / name, page()
        if arguments == ["--check"]:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                stale.append(name)
        else:
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"out of date: {', '.join(stale)}; run `make docs`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

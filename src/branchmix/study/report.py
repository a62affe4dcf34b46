"""``branchmix report``: what a study found, as a page, tables and figures, from its small results alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from branchmix.checkpoint.folder import require_new_file, write_text
from branchmix.pages.numbers import counted
from branchmix.pages.page import render
from branchmix.pages.pictures import Draw, save, svg
from branchmix.pages.table import Table
from branchmix.study.comparisons import SEED_NOISE, Numbers
from branchmix.study.figures import FIRST, ROUTING, pictures_of
from branchmix.study.graph import UNTRAINED
from branchmix.study.results import collect, results_folder
from branchmix.study.tables import intervals_are, merge_label, percent, tables

TITLE = "Methods compared at equal data and equal compute"
FEW_STEPS = 100
"""Steps of a mixture below which models have hardly learned anything."""


@dataclass(frozen=True)
class WrittenReport:
    """What was written."""

    numbers: Numbers
    headline: list[str]
    tables: list[Table]
    files: list[Path]


def report(
    folder: str | Path, out: str | Path | None = None, *, kinds: Sequence[str] = (), force: bool = False
) -> WrittenReport:
    """Write the report of what is done.

    Args:
        folder: of a study, or of its results.
        out: where to; the same folder if None.
        kinds: of ``html``, ``markdown`` and ``latex``; with none, all of them, CSV and the figures as PNG and PDF.
        force: replace files that are there. Those of an earlier report need none: ``out`` is the study's folder, or has
            a ``report.json``.

    Raises:
        DataError: there are no results.
        OutputError: ``out`` cannot be written, or has files of these names.
    """
    folder = Path(folder)
    out = Path(out) if out is not None else folder
    study = collect(folder)
    lines, made, pictures = headline(study), tables(study), pictures_of(study)
    models = [{**model, "repetitions": [_summary(one) for one in model["repetitions"]]} for model in study["models"]]
    numbers = {**study, "models": models}
    texts: dict[str, str] = {}
    wanted = kinds or ("html", "markdown", "latex")
    if "html" in wanted:
        texts["index.html"] = _html(study, lines, made, pictures)
        pages = {routes_page(title): results_folder(folder) / f"{step}.html" for title, step in study["routes"].items()}
        texts |= {name: file.read_text(encoding="utf-8") for name, file in pages.items() if file.is_file()}
    if "markdown" in wanted:
        texts["tables.md"] = _markdown(study, lines, made)
    if "latex" in wanted:
        texts["tables.tex"] = "\n".join(table.latex() for table in made)
    drawn: dict[str, Callable[[Path], Path]] = {}
    if not kinds:
        texts |= {f"tables/{table.name}.csv": table.csv() for table in made}
        texts["report.json"] = json.dumps({**numbers, "headline": lines}, indent=1, ensure_ascii=False) + "\n"
        for name, (draw, _) in pictures.items():
            drawn[f"figures/{name}.png"] = partial(save, draw, dpi=160)
            drawn[f"figures/{name}.pdf"] = partial(save, draw)
    is_ours = (out.exists() and out.samefile(folder)) or (out / "report.json").is_file()
    for name in (*texts, *drawn) if not is_ours else ():
        require_new_file(out / name, force=force)
    for name, text in texts.items():
        write_text(out / name, text)
    for name, write in drawn.items():
        write(out / name)
    return WrittenReport(numbers, lines, made, [out / name for name in (*texts, *drawn)])


def routes_page(title: str) -> str:
    """Name of the page that shows a model's routers token by token, beside the report's."""
    return f"routes-{title}.html"


def _summary(repetition: Numbers) -> Numbers:
    return {key: repetition[key] for key in repetition if key not in ("documents", "training")}


def _html(study: Numbers, lines: list[str], made: list[Table], pictures: dict[str, tuple[Draw, str]]) -> str:
    import yaml

    by_name = {table.name: table for table in made}

    def shown(*names: str) -> list[Table]:
        return [by_name[name] for name in names if name in by_name]

    def drawn(*names: str) -> list[dict[str, Any]]:
        return [
            {
                "svg": Markup(svg(draw, name, label)),
                "label": label,
                "link": routes_page(title) if (title := name.removeprefix(ROUTING)) in study["routes"] else None,
            }
            for name, (draw, label) in pictures.items()
            if name.startswith(names)
        ]

    recipes = {name: recipe for name, recipe in study["recipes"].items() if name.startswith(("r1.", "upcycle"))}
    return render(
        Path(__file__).parent / "templates" / "report.html",
        title=TITLE,
        kicker="branchmix study",
        lead=lines,
        study=study,
        shown=shown,
        drawn=drawn,
        warnings=sorted({f"{model['label']}: {model['warning']}" for model in study["models"] if model["warning"]}),
        methods={
            merge_label(model): model["what"]
            for model in study["models"]
            if (model["what"] and model["role"] in UNTRAINED) or model["preset"] == "dense"
        },
        settings=yaml.safe_dump(study["settings"], sort_keys=False, allow_unicode=True),
        recipes=yaml.safe_dump(recipes, sort_keys=False),
    )


def _markdown(study: Numbers, lines: list[str], made: list[Table]) -> str:
    parts = [f"# {TITLE}", "", *(f"- {line}" for line in lines), ""]
    machines = [
        f"{m['cpu']}, {m['cores']} cores, {m['precision']}, {', '.join(f'{n} {v}' for n, v in m['versions'].items())}"
        for m in study["machines"]
    ]
    return "\n".join([*parts, *(table.markdown() for table in made), "### Machine", "", *machines, ""])


# ---- What a study found, in sentences ----


def headline(study: Numbers) -> list[str]:
    """Equal data, equal compute, the slope that explains both, and how far to trust it."""
    models = {model["title"]: model for model in study["models"]}
    done = f"{study['steps_done']} of {study['steps']} steps are done"
    reference = models.get(study["reference"] or "")
    if reference is None:
        return [f"{done}; the reference has not been measured yet."]
    of_methods = [model for model in study["models"] if model["group"] == "methods"]
    trained = [model for model in of_methods if model["role"] == "trained"]
    presets = {model["preset"] for model in trained}
    described = [name for name in FIRST if name in presets] or sorted(presets)  # all others are in the tables
    lines = _before_training(study, models)
    for match, what in (("dm", "At equal data"), ("cm", "At equal compute")):
        parts = [
            f"{model['label']} {_verdict(study['comparisons'][model['title']], reference['label'])}"
            for model in trained
            if model["preset"] in described and match in model["match"]
        ]
        lines += [f"{what}: {'; '.join(parts)}."] if parts else []
    for match, what in (("dm", "data"), ("cm", "compute")):
        parts = [
            f"{models[title]['label']} {_verdict(compared, 'the dense model')}"
            for title, compared in study["against_dense"].get(match, {}).items()
            if models[title]["preset"] in (*described, reference["preset"])
        ]
        lines += [f"Beside a dense model of equal {what}: {'; '.join(parts)}."] if parts else []
    methods = {model["method"] for model in of_methods if model["preset"] in described}
    lines += [_slope(row, reference["label"]) for row in study["slopes"] if row["method"] in methods]
    lines += [_order(study["claims"])] if study["claims"] else []
    steps = reference["repetitions"][0]["training"]["steps"]
    if steps < FEW_STEPS:
        trained_for = counted(steps, "step")
        lines.append(f"The mixtures were trained for {trained_for}: enough to see that all works, too few to judge.")
    lines.append(_trust(study))
    return [*lines, f"{done}."] if study["steps_done"] < study["steps"] else lines


def _before_training(study: Numbers, models: dict[str, Numbers]) -> list[str]:
    """The best mixture that was not trained, beside the soup."""
    rows = [row for row in study["before_training"] if models[row["title"]]["role"] == "step 0" and row["soup"]]
    if not rows:
        return []
    best = min(rows, key=lambda row: models[row["title"]]["geometric_mean"])
    text = f"Before any training, {merge_label(models[best['title']])} {_verdict(best['soup'], 'the soup')}"
    if best["closed"] is not None and best["closed"] > 0:
        text += f": {100 * best['closed']:.0f} % of what forced gates gain"
    return [f"{text}."]


def _verdict(comparison: Numbers, reference: str) -> str:
    text = percent(comparison["log_perplexity"], significant=False)
    if not comparison["significant"]:
        return f"and {reference} are statistically indistinguishable ({text})"
    return f"is {'better' if comparison['relative'] < 0 else 'worse'} than {reference} ({text})"


def _slope(row: Numbers, reference: str) -> str:
    half = row["slope"]["half_width"]
    text = (
        f"{row['label']} spends {row['flops_ratio']:.2f} times the FLOPs of {reference}, and its perplexity falls like "
        f"tokens^{-row['slope']['value']:.2f}{f' (±{half:.2f})' if half is not None else ''} between its two budgets"
    )
    if (below := row["pays_below"]) is not None and row["significant"]:
        verb = "pays" if row["slope"]["value"] < below else "would pay"
        text += f"; its lead at equal data {verb} for them where it falls more slowly than tokens^-{below:.2f}"
    return f"{text}."


def _order(claims: list[Numbers]) -> str:
    same = [row for row in claims if row["reproduced"]]
    sure = [row for row in same if row["significant"]]
    against = [row for row in claims if not row["reproduced"] and row["significant"]]
    tried = f"{len(claims)} findings of the paper that were" if len(claims) > 1 else "1 finding of the paper that was"
    return (
        f"Of {tried} tried, {len(same)} came out in the same direction, {len(sure)} of them beyond the noise; "
        f"{len(against)} came out the other way beyond the noise."
    )


def _trust(study: Numbers) -> str:
    comparisons = study["comparisons"].values()
    over_repetitions = sum(row["over"] == "repetitions" for row in comparisons)
    text = f"Perplexities are geometric means over the domains; ± is {intervals_are(study)}."
    if over_repetitions < len(comparisons):
        text += (
            " A random seed alone moves such numbers by a percent or two, so with one repetition differences up to "
            f"{SEED_NOISE:.0%} do not count."
        )
    if over_repetitions:
        text += f" Of {over_repetitions} comparisons over repetitions one in twenty excludes zero by chance."
    return f"{text} Nothing here says how larger models behave."

"""``branchmix report``: what a study found, as a page, tables and figures, from its small results alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from branchmix.checkpoint.folder import require_new_file
from branchmix.evaluate.routing.plots import shares
from branchmix.pages import page
from branchmix.pages.pictures import Figure, png, save, svg
from branchmix.pages.table import Table
from branchmix.study import figures
from branchmix.study.graph import TRAINED, UNTRAINED
from branchmix.study.labels import intervals_are
from branchmix.study.results import collect, results_folder
from branchmix.study.statistics import SEED_NOISE
from branchmix.study.tables import percent, tables

TITLE = "Methods compared at equal data and equal compute"
ROUTING = "routing-"
"""How the names of heat maps begin; the title of a model follows."""
FEW_STEPS = 100
"""Of a mixture: below, models have hardly learned anything."""
Draw = Callable[[str], Figure]


@dataclass(frozen=True)
class WrittenReport:
    """What was written."""

    numbers: dict[str, Any]
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
    found = collect(folder)
    lines = headline(found)
    made = tables(found)
    writers = _writers(found, lines, made, kinds)
    if "index.html" in writers:
        pages = {title: results_folder(folder) / f"{step}.html" for title, step in found["routes"].items()}
        writers |= {routes_page(title): partial(_copy, file) for title, file in pages.items() if file.is_file()}
    for name in writers if not _is_ours(out, folder) else ():
        require_new_file(out / name, force=force)
    files = [write(out / name) for name, write in writers.items()]
    numbers = {**found, "models": [_without_documents(model) for model in found["models"]]}
    return WrittenReport(numbers, lines, made, files)


def _writers(
    found: dict[str, Any], lines: list[str], made: list[Table], kinds: Sequence[str]
) -> dict[str, Callable[[Path], Path]]:
    """What writes each file, by its place in the report's folder."""
    pictures = _pictures(found)
    texts: dict[str, Callable[[], str]] = {
        "index.html": lambda: _html(found, lines, made, pictures),
        "tables.md": lambda: _markdown(found, lines, made),
        "tables.tex": lambda: "\n".join(table.latex() for table in made),
    }
    kind_of = {"index.html": "html", "tables.md": "markdown", "tables.tex": "latex"}
    if kinds:
        texts = {name: text for name, text in texts.items() if kind_of[name] in kinds}
    else:
        content = {**found, "headline": lines, "models": [_without_documents(model) for model in found["models"]]}
        texts |= {f"tables/{table.name}.csv": table.csv for table in made}
        texts["report.json"] = lambda: json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    writers: dict[str, Callable[[Path], Path]] = {name: partial(_write, text) for name, text in texts.items()}
    for name, (draw, _) in pictures.items() if not kinds else ():
        writers |= {f"figures/{name}.png": partial(png, draw), f"figures/{name}.pdf": partial(save, draw)}
    return writers


def routes_page(title: str) -> str:
    """Name of the page that shows a model's routers token by token, beside the report's."""
    return f"routes-{title}.html"


def _copy(source: Path, file: Path) -> Path:
    return page.write(file, source.read_text(encoding="utf-8"))


def _write(text: Callable[[], str], file: Path) -> Path:
    return page.write(file, text())


def _is_ours(out: Path, folder: Path) -> bool:
    return (out.exists() and out.samefile(folder)) or (out / "report.json").is_file()


def _without_documents(model: dict[str, Any]) -> dict[str, Any]:
    repetitions = [
        {key: value for key, value in r.items() if key not in ("documents", "training")} for r in model["repetitions"]
    ]
    return {**model, "repetitions": repetitions}


def _pictures(found: dict[str, Any]) -> dict[str, tuple[Draw, str]]:
    """Drawings by name, with what they show."""
    made: dict[str, tuple[Draw, str]] = {
        "perplexity": (partial(figures.dots, found), "Held-out perplexity of every model")
    }
    if figures.styles(found):
        made["curves"] = (partial(figures.curves, found), "Training loss against tokens and against FLOPs")
        made["compute"] = (partial(figures.compute, found), "Held-out perplexity against training FLOPs")
    for model in found["models"]:
        if model["repetitions"][0]["routing"] and model["role"] in TRAINED:
            draw = partial(shares, model["repetitions"][0]["routing"], domains=found["domains"])
            made[f"{ROUTING}{model['title']}"] = (
                draw,
                f"{model['label']}: share of each expert by domain, layer by layer",
            )
    return made


# ---------------------------------------------------------------------------------------------------------------------
# In words
# ---------------------------------------------------------------------------------------------------------------------


def headline(found: dict[str, Any]) -> list[str]:
    """What came out, in sentences: equal data, equal compute, the slope that explains both, and how far to trust it."""
    models = {model["title"]: model for model in found["models"]}
    reference = models.get(found["reference"] or "")
    if reference is None:
        return [f"{found['steps_done']} of {found['steps']} steps are done; the reference has not been measured yet."]
    told = _told(found)
    lines = []
    for match, what in (("dm", "At equal data"), ("cm", "At equal compute")):
        parts = []
        for model in found["models"]:
            if (
                model["preset"] in told
                and model["group"] == "methods"
                and match in model["match"]
                and model["role"] == "trained"
            ):
                parts.append(f"{model['label']} {_verdict(found['comparisons'][model['title']], reference['label'])}")
        if parts:
            lines.append(f"{what}: {'; '.join(parts)}.")
    for match, what in (("dm", "data"), ("cm", "compute")):
        parts = [
            f"{models[title]['label']} {_verdict(compared, 'the dense model')}"
            for title, compared in found["against_dense"].get(match, {}).items()
            if models[title]["preset"] in (*told, reference["preset"])
        ]
        if parts:
            lines.append(f"Beside a dense model of equal {what}: {'; '.join(parts)}.")
    methods = {model["method"] for model in found["models"] if model["preset"] in told and model["group"] == "methods"}
    lines += [_slope(row, reference["label"]) for row in found["slopes"] if row["method"] in methods]
    lines += _order(found)
    steps = reference["repetitions"][0]["training"]["steps"]
    if steps < FEW_STEPS:
        lines.append(f"The mixtures were trained for {steps} steps: enough to see that all works, too few to judge.")
    lines.append(_trust(found))
    if found["steps_done"] < found["steps"]:
        lines.append(f"{found['steps_done']} of {found['steps']} steps are done.")
    return lines


def _told(found: dict[str, Any]) -> list[str]:
    """Methods that the sentences are about; all others stand in the tables."""
    presets = {
        model["preset"] for model in found["models"] if model["role"] == "trained" and model["group"] == "methods"
    }
    return [name for name in figures.TOLD if name in presets] or sorted(presets)


def _verdict(comparison: dict[str, Any], reference: str) -> str:
    text = percent(comparison["log_perplexity"], significant=False)
    if not comparison["significant"]:
        return f"and {reference} cannot be told apart ({text})"
    return f"is {'better' if comparison['relative'] < 0 else 'worse'} than {reference} ({text})"


def _slope(row: dict[str, Any], reference: str) -> str:
    half = row["slope"]["half_width"]
    text = (
        f"{row['label']} spends {row['flops_ratio']:.2f} times the FLOPs of {reference}, and its perplexity falls like "
        f"tokens^{-row['slope']['value']:.2f}{f' (±{half:.2f})' if half is not None else ''} between its two budgets"
    )
    if row["pays_below"] is not None and row["significant"]:
        verb = "pays" if row["slope"]["value"] < row["pays_below"] else "would pay"
        text += (
            f"; its lead at equal data {verb} for them where it falls more slowly than tokens^{-row['pays_below']:.2f}"
        )
    return f"{text}."


def _order(found: dict[str, Any]) -> list[str]:
    rows = found["claims"]
    if not rows:
        return []
    same = [row for row in rows if row["reproduced"]]
    sure = [row for row in same if row["significant"]]
    against = [row for row in rows if not row["reproduced"] and row["significant"]]
    tried = f"{len(rows)} findings of the paper that were" if len(rows) > 1 else "1 finding of the paper that was"
    text = f"Of {tried} tried, {len(same)} came out in the same direction, {len(sure)} of them beyond the noise"
    return [f"{text}; {len(against)} came out the other way beyond the noise."]


def _trust(found: dict[str, Any]) -> str:
    comparisons = list(found["comparisons"].values())
    over_repetitions = sum(row["over"] == "repetitions" for row in comparisons)
    text = f"Perplexities are geometric means over the domains; ± is {intervals_are(found)}."
    if over_repetitions < len(comparisons):
        text += (
            " A random seed alone moves such numbers by a percent or two, so with one repetition differences up to "
            f"{SEED_NOISE:.0%} are called none."
        )
    if over_repetitions:
        text += f" Of {over_repetitions} comparisons over repetitions one in twenty excludes zero by chance."
    return f"{text} Nothing here says how larger models behave."


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def _html(found: dict[str, Any], lines: list[str], made: list[Table], pictures: dict[str, tuple[Draw, str]]) -> str:
    import yaml

    by_name = {table.name: table for table in made}

    def shown(*names: str) -> list[Table]:
        return [by_name[name] for name in names if name in by_name]

    def drawn(*names: str) -> list[dict[str, Any]]:
        return [
            {
                "svg": page.safe(svg(draw, name, label)),
                "label": label,
                "link": _link(found, name),
            }
            for name, (draw, label) in pictures.items()
            if name.startswith(names)
        ]

    recipes = {name: recipe for name, recipe in found["recipes"].items() if name.startswith(("r1.", "upcycle"))}
    return page.render(
        Path(__file__).parent / "templates" / "report.html",
        title=TITLE,
        kicker="branchmix study",
        lead=lines,
        perplexity=shown("table-1"),
        bits=shown("bits-per-byte"),
        dots=drawn("perplexity"),
        findings=shown("directions", "variants", "table-4", "table-5", "table-6"),
        warnings=sorted({f"{model['label']}: {model['warning']}" for model in found["models"] if model["warning"]}),
        training=drawn("curves", "compute"),
        costs=shown("budgets", "costs", "table-7", "table-10", "inference"),
        routing=drawn(ROUTING),
        text=shown("text"),
        machines=found["machines"],
        methods=_methods(found),
        settings=yaml.safe_dump(found["settings"], sort_keys=False, allow_unicode=True),
        recipes=yaml.safe_dump(recipes, sort_keys=False),
        keys=found["keys"],
    )


def _link(found: dict[str, Any], picture: str) -> str | None:
    """From a heat map to the page of the same routers, where there is one."""
    title = picture.removeprefix(ROUTING)
    return routes_page(title) if title in found["routes"] else None


def _methods(found: dict[str, Any]) -> dict[str, str]:
    return {
        model["label"].removesuffix(", step 0"): model["what"]
        for model in found["models"]
        if (model["what"] and model["role"] in UNTRAINED) or model["preset"] == "dense"
    }


def _markdown(found: dict[str, Any], lines: list[str], made: list[Table]) -> str:
    parts = [f"# {TITLE}", "", *(f"- {line}" for line in lines), ""]
    machines = [
        f"{m['cpu']}, {m['cores']} cores, {m['precision']}, {', '.join(f'{n} {v}' for n, v in m['versions'].items())}"
        for m in found["machines"]
    ]
    return "\n".join([*parts, *(table.markdown() for table in made), "### Machine", "", *machines, ""])

"""``branchmix report``: what a study found, as a page, tables and figures, from its small results alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from branchmix.checkpoint.folder import require_new_file
from branchmix.pages import page
from branchmix.pages.pictures import png, save, svg
from branchmix.pages.table import Table
from branchmix.study.comparisons import Numbers
from branchmix.study.figures import ROUTING, Picture, pictures_of
from branchmix.study.graph import UNTRAINED
from branchmix.study.headline import headline
from branchmix.study.results import collect, results_folder
from branchmix.study.tables import merge_label, tables

TITLE = "Methods compared at equal data and equal compute"


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
    numbers = {**study, "models": [_without_documents(model) for model in study["models"]]}
    texts: dict[str, Callable[[], str]] = {}
    if not kinds or "html" in kinds:
        texts["index.html"] = lambda: _html(study, lines, made, pictures)
        pages = {routes_page(title): results_folder(folder) / f"{step}.html" for title, step in study["routes"].items()}
        texts |= {name: partial(file.read_text, encoding="utf-8") for name, file in pages.items() if file.is_file()}
    if not kinds or "markdown" in kinds:
        texts["tables.md"] = lambda: _markdown(study, lines, made)
    if not kinds or "latex" in kinds:
        texts["tables.tex"] = lambda: "\n".join(table.latex() for table in made)
    drawn: dict[str, Callable[[Path], Path]] = {}
    if not kinds:
        texts |= {f"tables/{table.name}.csv": table.csv for table in made}
        texts["report.json"] = lambda: json.dumps({**numbers, "headline": lines}, indent=1, ensure_ascii=False) + "\n"
        for name, picture in pictures.items():
            drawn |= {
                f"figures/{name}.png": partial(png, picture.draw),
                f"figures/{name}.pdf": partial(save, picture.draw),
            }
    is_ours = (out.exists() and out.samefile(folder)) or (out / "report.json").is_file()
    for name in (*texts, *drawn) if not is_ours else ():
        require_new_file(out / name, force=force)
    files = [page.write(out / name, text()) for name, text in texts.items()]
    files += [draw(out / name) for name, draw in drawn.items()]
    return WrittenReport(numbers, lines, made, files)


def routes_page(title: str) -> str:
    """Name of the page that shows a model's routers token by token, beside the report's."""
    return f"routes-{title}.html"


def _without_documents(model: Numbers) -> Numbers:
    left_out = ("documents", "training")
    repetitions = [{key: r[key] for key in r if key not in left_out} for r in model["repetitions"]]
    return {**model, "repetitions": repetitions}


def _html(study: Numbers, lines: list[str], made: list[Table], pictures: dict[str, Picture]) -> str:
    import yaml

    by_name = {table.name: table for table in made}

    def shown(*names: str) -> list[Table]:
        return [by_name[name] for name in names if name in by_name]

    def drawn(*names: str) -> list[dict[str, Any]]:
        return [
            {
                "svg": page.safe(svg(picture.draw, name, picture.label)),
                "label": picture.label,
                "link": routes_page(title) if (title := name.removeprefix(ROUTING)) in study["routes"] else None,
            }
            for name, picture in pictures.items()
            if name.startswith(names)
        ]

    recipes = {name: recipe for name, recipe in study["recipes"].items() if name.startswith(("r1.", "upcycle"))}
    return page.render(
        Path(__file__).parent / "templates" / "report.html",
        title=TITLE,
        kicker="branchmix study",
        lead=lines,
        perplexity=shown("table-1"),
        bits=shown("bits-per-byte"),
        dots=drawn("perplexity"),
        untrained=shown("before-training", "distances"),
        findings=shown("directions", "variants", "table-4", "table-5", "table-6"),
        warnings=sorted({f"{model['label']}: {model['warning']}" for model in study["models"] if model["warning"]}),
        training=drawn("curves", "compute"),
        costs=shown("budgets", "costs", "table-7", "table-10", "inference"),
        routing=drawn(ROUTING),
        text=shown("text"),
        machines=study["machines"],
        methods={
            merge_label(model): model["what"]
            for model in study["models"]
            if (model["what"] and model["role"] in UNTRAINED) or model["preset"] == "dense"
        },
        settings=yaml.safe_dump(study["settings"], sort_keys=False, allow_unicode=True),
        recipes=yaml.safe_dump(recipes, sort_keys=False),
        keys=study["keys"],
    )


def _markdown(study: Numbers, lines: list[str], made: list[Table]) -> str:
    parts = [f"# {TITLE}", "", *(f"- {line}" for line in lines), ""]
    machines = [
        f"{m['cpu']}, {m['cores']} cores, {m['precision']}, {', '.join(f'{n} {v}' for n, v in m['versions'].items())}"
        for m in study["machines"]
    ]
    return "\n".join([*parts, *(table.markdown() for table in made), "### Machine", "", *machines, ""])

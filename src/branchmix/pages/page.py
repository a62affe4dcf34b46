"""The frame of every page: one HTML file that needs nothing else, in light and dark, on a desk or a phone."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from branchmix.checkpoint.folder import write_text


def document(title: str, kicker: str, lead: Iterable[str], sections: Iterable[str], *, head: str = "") -> str:
    """A whole page.

    Args:
        title: its heading.
        kicker: the small line above it, which is the tab's title too.
        lead: sentences below the heading, as text; the first is set larger.
        sections: HTML.
        head: HTML for the end of the head, such as further styles.
    """
    first, *rest = lead
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(kicker)}: {escape(title)}</title>
<style>{_STYLE}</style>
{head}</head>
<body>
<main>
<header>
<p class="kicker">{escape(kicker)}</p>
<h1>{escape(title)}</h1>
<p class="lead">{escape(first)}</p>
{"".join(f"<p>{escape(line)}</p>" for line in rest)}
</header>
{"".join(sections)}
</main>
</body>
</html>
"""


def section(title: str, content: str) -> str:
    """A heading (text) and what stands below it (HTML)."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>\n"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of text whose first column heads its rows."""
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = []
    for row in rows:
        first, *rest = row
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return f"<table><thead><tr>{columns}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def write(file: Path, html: str) -> Path:
    """Writes a page whole or not at all, and returns its path.

    Raises:
        OutputError: the file cannot be written.
    """
    write_text(file, html)
    return file


_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --back: #ffffff; --tint: #f6f8fa;
  --accent: #0969da }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --back: #0d1117;
  --tint: #151b23; --accent: #58a6ff } }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.1rem 4rem }
h1 { font-size: 1.9rem; line-height: 1.2; margin: .2rem 0 1rem }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .8rem; padding-top: 1.2rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
.kicker { color: var(--accent); font-weight: 600; margin: 0 }
.lead { font-size: 1.15rem; font-weight: 500 }
.note, small { color: var(--soft); font-size: .875rem }
td small { font-size: .75rem }
.table, .wide, pre { overflow-x: auto; margin: 0 }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .32rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
thead th { white-space: normal; vertical-align: bottom; color: var(--soft); font-weight: 500 }
thead th:first-child { text-align: left }
tbody th { text-align: left; font-weight: 500; position: sticky; left: 0; background: var(--back) }
tr.group th { color: var(--soft); font-weight: 600; padding-top: .9rem }
figure svg { display: block; width: 100%; min-width: min(40rem, var(--drawn, 40rem));
  max-width: calc(1.35 * var(--drawn, 100rem)); height: auto; color: var(--ink) }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 6px; padding: .8rem; font-size: .8rem }
.switch input { margin: 0 .3rem 0 0 }
.switch label { margin-right: 1.2rem }
.switch .table { margin-top: .6rem }
"""

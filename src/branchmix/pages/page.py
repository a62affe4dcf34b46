"""The frame of every page: one HTML file that needs nothing else, in light and dark, on a desk or a phone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"


def render(template: Path, **values: Any) -> str:
    """HTML from a jinja2 template; text in it is escaped, and markupsafe's ``Markup`` is not.

    Args:
        template: a file, which may extend or include those of ``TEMPLATES`` and of its own folder.
        **values: what it shows.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader([template.parent, TEMPLATES])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template.name).render(**values)

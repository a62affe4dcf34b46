"""The frame of every page: one HTML file that needs nothing else, in light and dark, on a desk or a phone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"


def render(template: Path, **values: Any) -> str:
    """HTML from a jinja2 template; text in ``values`` is escaped, and markupsafe's ``Markup`` is not.

    The template may extend or include those of ``TEMPLATES`` and of its own folder.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader([template.parent, TEMPLATES])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template.name).render(**values)

"""What every page has to be: well-formed, with ids of its own, and needing nothing from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Checked(HTMLParser):
    """Elements that are closed in order, all ids, and all links."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())


def checked(html: str) -> Checked:
    """The page's ids and links, once they are in order."""
    parser = Checked()
    parser.feed(html)
    assert not parser.open and len(parser.ids) == len(set(parser.ids))
    assert all(link[1:] in parser.ids for link in parser.links if link.startswith("#"))
    assert not re.search(r"url\((?!#)|@import|<script", html)
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html and "#010203" not in html
    return parser

"""The browser that pages are tested in notices what it is there to notice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from browser import Page

GOOD = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<style>body { margin: 0; background: white } @media (prefers-color-scheme: dark) { body { background: black } }
button:hover { color: rgb(1, 2, 3) }</style>
<div style="height: 3000px"></div><input type="range" id="layer" min="0" max="5" value="0"><button>on</button>
<img alt="" src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">
<script>document.querySelector("button").onclick = () => { document.title = "clicked" }</script>"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    file = tmp_path / "good page.html"
    file.write_text(GOOD)
    return file


def test_a_page_in_order(open_page: Callable[..., Page], good: Path, tmp_path: Path) -> None:
    page = open_page(good)
    assert page.errors == [] and page.requests == []
    page.press("ArrowRight", at="#layer", times=3)
    assert page.run("return document.querySelector('#layer').value") == "3"
    page.press("Home")
    assert page.run("return document.querySelector('#layer').value") == "0"
    page.press("Tab")
    assert page.run("return document.activeElement.tagName") == "BUTTON"
    page.press("Tab", shift=True)
    assert page.run("return document.activeElement.id") == "layer"
    page.hover("button")
    colour = "return getComputedStyle(document.querySelector('button')).color"
    assert page.run(colour) == "rgb(1, 2, 3)"
    page.click("button")
    assert page.run("return document.title") == "clicked"
    assert page.run("return arguments[0] + arguments[1]", 1, 2) == 3
    whole = page.screenshot(tmp_path / "whole.png", whole=True).read_bytes()
    assert int.from_bytes(whole[20:24], "big") > 3000
    seen = page.screenshot(tmp_path / "seen.png").read_bytes()
    assert [int.from_bytes(seen[place : place + 4], "big") for place in (16, 20)] == [1200, 900]


def test_light_and_dark_desk_and_phone(open_page: Callable[..., Page], good: Path) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    page = open_page(good, width=360, height=700, dark=True)
    assert page.run(ground) == "rgb(0, 0, 0)"
    assert page.run("return [innerWidth, innerHeight]") == [360, 700]
    page = open_page(good)
    assert page.run(ground) == "rgb(255, 255, 255)"
    assert page.run("return innerWidth") == 1200


@pytest.mark.parametrize(
    ("html", "told"), [("<script>nothing.here</script>", "nothing"), ("<script>console.error('oh')</script>", "oh")]
)
def test_errors_are_noticed(open_page: Callable[..., Page], tmp_path: Path, good: Path, html: str, told: str) -> None:
    file = tmp_path / "bad.html"
    file.write_text(html)
    page = open_page(file)
    assert len(page.errors) == 1 and told in page.errors[0]
    assert open_page(good).errors == []


def test_requests_are_noticed(open_page: Callable[..., Page], tmp_path: Path) -> None:
    file = tmp_path / "asks.html"
    file.write_text('<img src="http://127.0.0.1:9/picture.png"><link rel="stylesheet" href="style.css">')
    page = open_page(file)
    assert sorted(address.rpartition("/")[2] for address in page.requests) == ["picture.png", "style.css"]

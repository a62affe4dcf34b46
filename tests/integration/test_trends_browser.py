"""The page of trends in a real browser: what is shown, switches, keys, phones, dark pages, prints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from branchmix.scaling.trends import html_page
from branchmix.scaling.trends.judge import trends_by_axis
from branchmix.scaling.trends.overview import Overview
from trend_tables import settings, study, write

LABELS = """
return [...document.querySelectorAll('.chart svg')].filter(svg => svg.getClientRects().length).map(svg =>
  svg.getAttribute('aria-label').split(';')[0])
"""
"""Of the charts that can be seen: task, metric and axis."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    found = Overview(trends_by_axis(write(folder / "table.csv", study(sizes=5))))
    page = folder / "page.html"
    page.write_text(html_page.html(found, command="branchmix scaling trends table.csv"))
    return page


def test_it_loads_alone_and_shows_one_chart_a_task(file: Path, open_page: Callable[..., Any]) -> None:
    shown = open_page(file)
    assert shown.errors == [] and shown.requests == []
    assert shown.run("return document.scripts.length") == 0
    assert shown.run(LABELS) == [
        "memo-trap: accuracy along training compute",
        "prompt-injection: loss along training compute",
        "neqa: accuracy along training compute",
        "sig-figs: accuracy along training compute",
    ]
    cards = "return [...document.querySelectorAll('.card')].filter(card => card.getClientRects().length).length"
    assert shown.run(cards) == 4


def test_a_page_along_a_reasoning_budget(tmp_path: Path, open_page: Callable[..., Any]) -> None:
    """Budgets from 0 on, two models, slices by difficulty: it says what the axis is, and fits a phone."""
    settings(tmp_path, {"a": [0.62 - 0.06 * k for k in range(6)], "b": [0.5] * 6}, seeds=("1", "2"))
    page = tmp_path / "page.html"
    page.write_text(html_page.html(Overview(trends_by_axis(tmp_path, slices=2)), command="branchmix scaling trends ."))
    shown = open_page(page)
    assert shown.errors == [] and shown.requests == []
    assert shown.run(LABELS) == ["memo-trap: accuracy along reasoning budget"]
    assert shown.run("return document.querySelector('h1').textContent") == "Does more reasoning help?"
    ticks = "return [...document.querySelectorAll('.chart svg text')].map(text => text.textContent)"
    assert [text for text in shown.run(ticks) if text in ("0", "1,024", "16,384")] == ["0", "1,024", "16,384"]
    text = shown.run("return document.querySelector('main').innerText")
    assert "2 models answered" in text and "the budget that was assigned, never the length" in " ".join(text.split())
    assert "a, harder half" in text and "the other half of the runs made" in " ".join(text.split())
    narrow = open_page(page, width=400, dark=True)
    assert narrow.run("return document.documentElement.scrollWidth <= innerWidth") and narrow.errors == []


def test_switches_work_by_mouse_and_by_key(file: Path, open_page: Callable[..., Any]) -> None:
    shown = open_page(file)
    path = "return [...document.querySelectorAll('#task-memo-trap .chart svg')].filter(svg => " + (
        "svg.getClientRects().length)[0].innerHTML"
    )
    before = shown.run(path)
    shown.click("label[for=m-loss]")
    assert all(": loss along training compute" in label for label in shown.run(LABELS))
    loss = shown.run(path)
    assert loss != before
    shown.press("ArrowRight", at="#a-flops", times=3)
    assert shown.run("return document.querySelector('#a-tokens').checked")
    assert all(": loss along training tokens" in label for label in shown.run(LABELS)) and shown.run(path) != loss
    shown.press("ArrowLeft", at="#m-loss")
    assert shown.run(LABELS)[0] == "memo-trap: accuracy along training tokens"
    assert shown.errors == []


def test_keys_reach_everything(file: Path, open_page: Callable[..., Any]) -> None:
    shown = open_page(file)
    focus = "return document.activeElement.id || document.activeElement.className"
    shown.press("Tab")
    assert shown.run(focus) == "m-accuracy"
    assert "solid" in shown.run("return getComputedStyle(document.activeElement).outlineStyle")
    shown.press("Tab", times=2)
    assert shown.run(focus) == "card"
    shown.press("Enter")
    top = shown.run("return document.querySelector('#task-memo-trap').getBoundingClientRect().top")
    bar = shown.run("return document.querySelector('.bar').getBoundingClientRect().bottom")
    assert 0 <= bar <= top + 20 < 250  # below the switches, which stay in sight
    shown.press("Tab")
    assert shown.run(focus) == "example"
    shown.press("Tab")
    shown.press("Enter")
    assert shown.run("return document.querySelector('#task-memo-trap details').open")


def test_points_have_their_numbers(file: Path, open_page: Callable[..., Any]) -> None:
    shown = open_page(file)
    view = "#task-sig-figs .a-flops.m-accuracy .chart title"
    titles = shown.run(f"return [...document.querySelectorAll('{view}')].map(title => title.textContent)")
    points = [title for title in titles if "accuracy" in title or ", seed " in title]
    assert len(points) == 4 * 5 + 4 * 5 * 2
    assert any(title.startswith("dense-0 (dense, official questions)\naccuracy 4") for title in titles)


@pytest.mark.parametrize("dark", [False, True])
def test_phones_scroll_down_only(dark: bool, file: Path, open_page: Callable[..., Any]) -> None:
    shown = open_page(file, width=375, height=700, dark=dark)
    shown.run("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert shown.run("return document.documentElement.scrollWidth") == 375
    background = shown.run("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
    ink = shown.run("return getComputedStyle(document.querySelector('.chart text')).fill")
    assert ink == ("rgb(230, 237, 243)" if dark else "rgb(31, 35, 40)")


def test_prints_are_light_and_have_the_numbers(file: Path, open_page: Callable[..., Any]) -> None:
    shown = open_page(file, dark=True)
    visible = "return document.querySelector('#task-neqa details .table').checkVisibility()"
    assert not shown.run(visible)
    scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
    shown._driver.cdp("Emulation.setEmulatedMedia", media="print", features=scheme)
    assert shown.run(visible)
    assert shown.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert shown.run("return getComputedStyle(document.querySelector('.bar')).position") == "static"

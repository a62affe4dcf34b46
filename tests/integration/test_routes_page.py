"""The page of `branchmix routes` in a real browser: its texts, slider, switch, mouse, keyboard, light and dark."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import corpora
from branchmix.evaluate.routing.routes import Routes, routes
from branchmix.evaluate.routing.token_page import html
from browser import Page
from routed import NAMES, data_file, ours, theirs

Open = Callable[..., Page]
HARD = "</script><b>one</b> & \"two\"\n\n  three — ž 🙂 {'four'}"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Routes:
    """A mixture with both kinds of routers, on texts that are hard to write down."""
    folder = tmp_path_factory.mktemp("routes")
    texts = {"prose": [HARD, corpora.text(25)], "ma<th>s": [corpora.text(n) for n in (100, 101)]}
    return routes(str(ours(folder / "model", "kv_experts", 2, None)), data=data_file(folder, texts), dtype="float32")


def write(found: Routes, file: Path) -> Path:
    file.write_text(html(found), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def file(found: Routes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(found, tmp_path_factory.mktemp("page") / "routes.html")


COLOURS = "return [...document.querySelectorAll('.t')].map(t => getComputedStyle(t).backgroundColor)"
EXPERTS = "return [...document.querySelectorAll('.t')].map(t => Number(t.dataset.e))"
FRAME = "return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


def strongest(found: Routes, kind: str, layer: int) -> list[int]:
    router = [router for router in found.counts.routers if router.place.kind == kind][layer]
    return router.shown_index_TM[:, 0].tolist()


def test_all_texts_are_there_as_they_are(found: Routes, file: Path, open_page: Open) -> None:
    page = open_page(file)
    shown = page.run("return [...document.querySelectorAll('.tokens')].map(body => body.textContent)")
    assert shown == [HARD, corpora.text(25), corpora.text(100), corpora.text(101)]
    assert [text["domain"] for text in found.shown] == ["prose", "prose", "ma<th>s", "ma<th>s"]
    assert page.run("return document.querySelectorAll('.document h3')[2].textContent").startswith("ma<th>s, text 1")
    assert page.errors == [] and page.requests == []


def test_a_name_cannot_end_the_script(found: Routes, tmp_path: Path, open_page: Open) -> None:
    names = ["seed", "</script><i id='out'>", "<!--"]
    bad = replace(found, report=replace(found.report, experts=names))
    page = open_page(write(bad, tmp_path / "routes.html"))
    words = page.run("return [...document.querySelectorAll('#experts button')].map(b => b.textContent)")
    assert all(name in word for name, word in zip(names, words, strict=True))
    assert page.run("return document.getElementById('out')") is None and page.errors == []


def test_slider_and_switch_change_the_colours(found: Routes, file: Path, open_page: Open) -> None:
    page = open_page(file)
    seen = {}
    page.press("Home", at="#layer")
    for kind in ("attention", "ffn"):
        if kind == "ffn":
            page.press("Tab", shift=True)  # from the slider back to the switch, and on to its other side
            page.press("ArrowRight")
            assert page.run("return document.getElementById('kind-ffn').checked")
        for layer in (0, 1):
            page.press("ArrowRight" if layer else "Home", at="#layer")
            page.run(FRAME)
            assert page.run("return document.getElementById('layer-now').textContent") == f"layer {layer}, of 0 to 1"
            assert page.run(EXPERTS) == strongest(found, kind, layer)
            seen[kind, layer] = tuple(page.run(COLOURS))
    assert len(set(seen.values())) == 4
    page.click("#kind-attention ~ *, label:has(#kind-attention)")
    assert tuple(page.run(COLOURS)) == seen["attention", 1]
    # One hue for each expert: of the tint only its strength differs.
    experts = page.run(EXPERTS)
    hues = {
        expert: {_hue(colour) for e, colour in zip(experts, seen["attention", 1], strict=True) if e == expert}
        for expert in experts
    }
    assert all(len(of_expert) == 1 for of_expert in hues.values()) and len({*map(str, hues.values())}) == len(hues) > 1
    assert page.errors == []


def _hue(colour: str) -> tuple[float, ...]:
    """Red, green and blue without the strength."""
    return tuple(round(float(part), 2) for part in re.findall(r"[\d.]+", colour)[:3])


def numbers_shown(page: Page) -> str:
    return str(page.run("return document.querySelector('.panel').innerText"))


def said_of(found: Routes, kind: str, layer: int, token: int) -> list[str]:
    router = [router for router in found.counts.routers if router.place.kind == kind][layer]
    pairs = zip(router.shown_index_TM[token], router.shown_gates_TM[token], strict=True)
    return [f"{expert} {NAMES[expert]} {round(255 * float(gate)) / 255:.2f}" for expert, gate in pairs]


def test_mouse_and_keyboard_show_the_numbers(found: Routes, file: Path, open_page: Open) -> None:
    page = open_page(file)
    page.press("Home", at="#layer")
    page.run(FRAME)
    token = len(found.shown[0]["pieces"]) + 3  # of the second text
    page.hover(f".t[data-n='{token}']")
    text = numbers_shown(page)
    assert f"token 4 of {len(found.shown[1]['pieces'])}, prose, text 2" in text
    for kind in ("attention", "ffn"):
        for said in said_of(found, kind, 0, token):
            assert said in text
    chosen = page.run("return document.querySelectorAll('.gates .said')[1].textContent").count("→")
    assert chosen == 2 and "→" not in page.run("return document.querySelectorAll('.gates .said')[0].textContent")
    # Only the first token of each text is a stop of Tab; arrows go on from it.
    assert page.run("return document.querySelectorAll('.t[tabindex=\"0\"]').length") == 4
    page.press("ArrowRight", at=f".t[data-n='{token - 3}']", times=2)
    assert page.run("return document.activeElement.dataset.n") == str(token - 1)
    assert "token 3 of" in numbers_shown(page)
    aloud = page.run("return document.getElementById('aloud').textContent")
    assert "Layer 0." in aloud and said_of(found, "attention", 0, token - 1)[0] in aloud
    page.press("]")
    assert page.run(EXPERTS) == strongest(found, "attention", 1)
    assert said_of(found, "attention", 1, token - 1)[0] in numbers_shown(page)
    page.press("r")
    assert page.run(EXPERTS) == strongest(found, "ffn", 1)
    for key, place in (("End", len(found.shown[1]["pieces"]) - 1), ("Home", 0)):
        page.press(key)
        assert page.run("return document.activeElement.dataset.n") == str(token - 3 + place)
    page.press("ArrowLeft")
    assert page.run("return document.activeElement.dataset.n") == str(token - 3)
    assert page.errors == []


def test_lines_go_up_and_down(file: Path, open_page: Open) -> None:
    page = open_page(file, width=420)
    top = "return document.activeElement.getClientRects()[0].top + document.activeElement.parentNode.scrollTop"
    page.run("[...document.querySelectorAll('.tokens')][1].firstChild.focus()")
    first = page.run(top)
    page.press("ArrowDown")
    below = page.run(top)
    assert below > first
    page.press("ArrowDown")
    assert page.run(top) > below
    page.press("ArrowUp", times=2)
    assert page.run(top) == first
    page.press("ArrowUp")
    assert page.run(top) == first


def test_experts_texts_and_numbers_can_be_chosen(found: Routes, file: Path, open_page: Open) -> None:
    page = open_page(file)
    shares = found.report.layers["attention"][1]["load"]
    words = page.run("return [...document.querySelectorAll('#experts button')].map(b => b.textContent)")
    assert words == [
        f"{n} {name} {100 * share:.0f} %" for n, (name, share) in enumerate(zip(NAMES, shares, strict=True))
    ]
    page.press("Enter", at="#experts li:nth-child(2) button")
    dimmed = page.run("return [...document.querySelectorAll('.t')].map(t => t.classList.contains('dim'))")
    assert dimmed == [expert != 1 for expert in strongest(found, "attention", 1)]
    assert page.run("return document.activeElement.getAttribute('aria-pressed')") == "true"
    page.press("Enter")
    assert not page.run("return document.querySelectorAll('.t.dim').length")
    page.click("#numbers")
    assert page.run("return getComputedStyle(document.querySelector('.t'), '::after').content") == (
        f'"{strongest(found, "attention", 1)[0]}"'
    )
    page.run("const s = document.getElementById('domain'); s.value = 'ma<th>s'; s.dispatchEvent(new Event('change'))")
    hidden = page.run("return [...document.querySelectorAll('.document')].map(block => block.hidden)")
    assert hidden == [True, True, False, False]
    table = page.run("return [...document.querySelectorAll('#shares tbody tr')].map(row => row.innerText)")
    by_domain = found.report.layers["attention"][1]["by_domain"]
    for row, (domain, values) in zip(table, by_domain.items(), strict=True):
        assert row.split("\t") == [domain, *(f"{100 * value:.{int(value < 0.0995)}f} %" for value in values)]
    facts = page.run("return document.getElementById('facts').innerText")
    pair = found.report.agreement[1]
    assert f"{100 * pair['same']:.0f} % of tokens, {100 * pair['same_by_chance']:.0f} % by chance" in facts
    assert f"{found.report.layers['attention'][1]['mutual_information_corrected']:.3f}" in facts
    assert f"dead experts: {found.report.layers['attention'][1]['dead_experts']}" in facts and "Biases" not in facts


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1200])
def test_readable_in_light_and_dark_on_desk_and_phone(file: Path, open_page: Open, width: int, dark: bool) -> None:
    page = open_page(file, width=width, dark=dark)
    assert page.run("return document.documentElement.scrollWidth") <= width
    # Contrast of the text with the strongest tint that there is, in WCAG's measure.
    ratio = page.run(
        """
        const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        const paint = (...colours) => {
          for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
          return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)].map((c) => {
            const v = c / 255;
            return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
          }).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        };
        const back = getComputedStyle(document.body).backgroundColor;
        const token = document.querySelector(".t");
        const data = JSON.parse(document.getElementById("routes-data").textContent);
        return Math.min(...data.colours.map((colour) => {
          token.style.setProperty("--c", colour);
          token.style.setProperty("--a", 1);
          const style = getComputedStyle(token);
          const [a, b] = [paint(back, style.color), paint(back, style.backgroundColor)].sort((x, y) => y - x);
          return (a + 0.05) / (b + 0.05);
        }));
        """
    )
    assert ratio >= 4.5


def test_many_experts_have_their_numbers(tmp_path: Path, open_page: Open) -> None:
    texts = {"prose": [corpora.text(n) for n in range(4)]}
    found = routes(str(theirs(tmp_path / "model", "olmoe")), data=data_file(tmp_path, texts), dtype="float32")
    page = open_page(write(found, tmp_path / "routes.html"))
    assert page.run("return document.querySelectorAll('#experts button').length") == 64
    assert page.run("return document.getElementById('numbers').checked")
    assert page.run(EXPERTS) == strongest(found, "ffn", 1)
    assert page.run("return document.querySelectorAll('.bar fieldset input').length") == 1
    page.hover(".t[data-n='5']")
    assert numbers_shown(page).count("→ expert ") == 8
    assert page.errors == [] and page.requests == []


def test_a_page_of_thousands_of_tokens_is_quick_enough(found: Routes, tmp_path: Path, open_page: Open) -> None:
    content = html(found)
    start, end = content.index('id="routes-data">') + 17, content.index("</script>", content.index('id="routes-data">'))
    data: dict[str, Any] = json.loads(content[start:end])
    total = sum(len(text["pieces"]) for text in data["texts"])
    for text in data["texts"]:
        text["pieces"] *= -(-4000 // total)
    for kind in data["kinds"].values():
        for name in ("index", "gates"):
            raw, size = base64.b64decode(kind[name]), len(base64.b64decode(kind[name])) // len(kind["layers"])
            layers = [raw[at : at + size] * -(-4000 // total) for at in range(0, len(raw), size)]
            kind[name] = base64.b64encode(b"".join(layers)).decode()
    file = tmp_path / "large.html"
    file.write_text(content[:start] + json.dumps(data).replace("<", "\\u003c") + content[end:])
    page = open_page(file)
    assert page.run("return document.querySelectorAll('.t').length") >= 4000
    taken = page.run(
        "const start = performance.now(); document.getElementById('kind-ffn').click();"
        "document.body.getBoundingClientRect(); return performance.now() - start"
    )
    assert taken < 2000  # 0.1 s on an idle machine
    assert page.errors == []

"""A real browser for tests of pages: chromium without a window, driven by chromedriver over HTTP; nothing to install
but Debian's ``chromium`` and ``chromium-driver``.

A test asks for the fixture ``open_page`` and gets a ``Page``:

    page = open_page(tmp_path / "page.html", width=400, dark=True)
    page.press("ArrowRight", at="#layer")
    assert page.run("return document.querySelector('#layer').value") == "1"
    assert page.errors == [] and page.requests == []

Keys, clicks and the mouse are real ones, not events made by a script. Without a browser such tests are skipped.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

KEYS = {
    "Enter": "\ue007",
    "Tab": "\ue004",
    "Escape": "\ue00c",
    "Space": "\ue00d",
    "PageUp": "\ue00e",
    "PageDown": "\ue00f",
    "End": "\ue010",
    "Home": "\ue011",
    "ArrowLeft": "\ue012",
    "ArrowUp": "\ue013",
    "ArrowRight": "\ue014",
    "ArrowDown": "\ue015",
    "Shift": "\ue008",
}
"""Names of keys, and what WebDriver calls them; any other key is its character."""
_OPTIONS = """
--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update
--disable-sync --disable-dev-shm-usage --hide-scrollbars --force-color-profile=srgb
""".split()
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""WebDriver's name for a reference to an element."""


def missing() -> str | None:
    """Why there is no browser here, or None if there is one."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"no {' and no '.join(absent)} here (Debian: apt-get install chromium chromium-driver)" if absent else None


class Page:
    """An open page. Opening another one ends this one, but for what was already read from it."""

    def __init__(self, driver: _Driver, address: str):
        self._driver = driver
        self._address = address
        self._errors: list[str] = []
        self._requests: list[str] = []

    @property
    def errors(self) -> list[str]:
        """All that went to the console so far as an error, uncaught exceptions among it."""
        found = self._driver.call("POST", "/se/log", {"type": "browser"})
        self._errors += [entry["message"] for entry in found if entry["level"] == "SEVERE"]
        return self._errors

    @property
    def requests(self) -> list[str]:
        """Addresses of all that the page asked for so far, but for itself and what stands in it (``data:``)."""
        for entry in self._driver.call("POST", "/se/log", {"type": "performance"}):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                address = event["params"]["request"]["url"].partition("#")[0]
                if address != self._address and not address.startswith(("data:", "blob:", "about:")):
                    self._requests.append(address)
        return self._requests

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a JavaScript function returns; it finds the arguments, as JSON, in ``arguments``."""
        return self._driver.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def press(self, key: str, *, at: str | None = None, times: int = 1, shift: bool = False) -> None:
        """Press a key of ``KEYS`` or a character: where the focus is, or at an element (CSS selector) that gets it."""
        if at is not None:
            self.run("document.querySelector(arguments[0]).focus()", at)
        value = KEYS.get(key, key)
        strokes = [{"type": kind, "value": value} for _ in range(times) for kind in ("keyDown", "keyUp")]
        if shift:
            held = {"value": KEYS["Shift"]}
            strokes = [{"type": "keyDown", **held}, *strokes, {"type": "keyUp", **held}]
        self._act({"type": "key", "id": "keyboard", "actions": strokes})

    def hover(self, selector: str) -> None:
        """Move the mouse over the middle of an element, scrolled into view."""
        self._act(self._mouse(selector))

    def click(self, selector: str) -> None:
        """Click in the middle of an element, scrolled into view."""
        mouse = self._mouse(selector)
        mouse["actions"] += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        self._act(mouse)

    def screenshot(self, file: Path, *, whole: bool = False) -> Path:
        """A PNG of what is to be seen, or of the whole length of the page."""
        options: dict[str, Any] = {"format": "png"}
        if whole:
            size = self._driver.cdp("Page.getLayoutMetrics")["cssContentSize"]
            options |= {"captureBeyondViewport": True, "clip": {**size, "x": 0, "y": 0, "scale": 1}}
        file.write_bytes(base64.b64decode(self._driver.cdp("Page.captureScreenshot", **options)["data"]))
        return file

    def _mouse(self, selector: str) -> dict[str, Any]:
        element = self._driver.call("POST", "/element", {"using": "css selector", "value": selector})
        self._driver.call(
            "POST",
            "/execute/sync",
            {"script": "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", "args": [element]},
        )
        move = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": {_ELEMENT: element[_ELEMENT]}}
        return {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [move]}

    def _act(self, source: dict[str, Any]) -> None:
        self._driver.call("POST", "/actions", {"actions": [source]})


class Browser:
    """One browser and its pages, one at a time."""

    def __init__(self, driver: _Driver):
        self._driver = driver

    def open_page(self, path: Path, width: int = 1200, height: int = 900, dark: bool = False) -> Page:
        """Open a file, in a window of ``width`` x ``height`` CSS pixels, for a reader who likes dark pages or not."""
        driver = self._driver
        driver.call("POST", "/url", {"url": "about:blank"})
        driver.call("POST", "/se/log", {"type": "browser"})  # what is left of the page before
        driver.call("POST", "/se/log", {"type": "performance"})
        driver.call("DELETE", "/actions")
        driver.cdp(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.cdp("Emulation.setEmulatedMedia", media="", features=[scheme])
        address = path.resolve().as_uri()
        driver.call("POST", "/url", {"url": address})
        page = Page(driver, address)
        _wait_until_loaded(page, address)
        return page


def _wait_until_loaded(page: Page, address: str, seconds: float = 60) -> None:
    """chromedriver is to answer once a page is loaded; on a busy machine 1 long page in 20 is still being read then."""
    end = time.monotonic() + seconds
    while (state := page.run("return [location.href, document.readyState]")) != [address, "complete"]:
        if time.monotonic() > end:
            raise TimeoutError(f"{address} is not loaded after {seconds:.0f} s: {state}")
        time.sleep(0.02)


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser with a fresh profile; it and its driver are gone afterwards."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            assert process.stdout is not None
            lines = (line.decode() for line in process.stdout)
            port = next(int(found[1]) for line in lines if (found := re.search(r"on port (\d+)\.$", line.strip())))
            driver = _Driver(port)
            driver.start(profile)
            try:
                yield Browser(driver)
            finally:
                driver.call("DELETE", "")
        finally:
            process.terminate()
            process.wait(20)


class _Driver:
    """A session of chromedriver's: https://www.w3.org/TR/webdriver2/."""

    def __init__(self, port: int):
        self._port = port
        self._session = ""

    def start(self, profile: str) -> None:
        chromium = {"binary": shutil.which("chromium"), "args": [*_OPTIONS, f"--user-data-dir={profile}"]}
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": chromium,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        answer = self._send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{answer['sessionId']}"

    def call(self, method: str, command: str, body: dict[str, Any] | None = None) -> Any:
        return self._send(method, self._session + command, body)

    def cdp(self, command: str, **parameters: Any) -> Any:
        """A command of Chromium's own protocol."""
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())["value"]
        connection.close()
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(f"{method} {path}: {answer['message']}")
        return answer

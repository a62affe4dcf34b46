"""Shared fixtures: tiny siblings of every family, saved as a user would have them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a script's background job, whose children would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from transformers.utils import logging

import branchmix  # noqa: F401  (registers mixtures with transformers)

if TYPE_CHECKING:
    from browser import Page

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of rare families are slow, but for those marked ``of_every_family``."""
    from families import RARE

    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if parameters.get("name") in RARE:
            always = item.get_closest_marker("of_every_family")
            if always is None or any(parameters[key] != value for key, value in always.kwargs.items()):
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def siblings(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Path]]:
    """``siblings(family)`` saves three random dense models of a tiny family once: seed, code and math."""
    from families import BY_NAME

    saved: dict[tuple[str, str], dict[str, Path]] = {}

    def make(name: str, **changes: object) -> dict[str, Path]:
        key = (name, repr(sorted(changes.items())))
        if key not in saved:
            folder = tmp_path_factory.mktemp(name)
            family = BY_NAME[name]
            saved[key] = {
                expert: family.save(folder / expert, seed, **changes)
                for seed, expert in enumerate(("seed", "code", "math"))
            }
        return saved[key]

    return make


@pytest.fixture(scope="session")
def open_page() -> Iterator[Callable[..., Page]]:
    """``open_page(path, width=1200, height=900, dark=False)`` opens a file in chromium: see ``browser.py``."""
    from browser import browser

    with browser() as opened:
        yield opened.open_page

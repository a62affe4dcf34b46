"""SIGTERM and Ctrl-C: a run finishes its step, writes a checkpoint and stops; a second Ctrl-C stops at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)

ECHO_SECONDS = 1.0
"""A Ctrl-C this soon after the first is the same one: torchrun forwards what the terminal has already sent."""


@contextmanager
def handling(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Call ``handler`` on these signals inside the block. In the main thread only, as Python allows it nowhere else."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in SIGNALS if main}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Handle the signals that ask a run to stop inside the block."""
    signals = StopSignals()
    with handling(signals.handle):
        yield signals


class StopSignals:
    """The signals that ask a run to stop.

    Outside of ``deferred`` there is nothing to save, so the first signal of either kind raises ``KeyboardInterrupt``.
    Inside (``SafeTrainer.train``), it is only stored in ``received``, for the trainer to act on.

    Attributes:
        received: number of the first signal, or None. A shell expects the exit code 128 + this number.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._deferring = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only store signals in ``received`` inside the block."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        first = self.received is None
        if first:
            self.received, self._since = number, now
        if not self._deferring:
            raise KeyboardInterrupt
        if first:
            # Not print(): the signal may have interrupted one, and buffered streams are not reentrant.
            again = "; press Ctrl-C again to stop without one" if number == signal.SIGINT else ""
            line = f"\n{signal.Signals(number).name}: finishing this step and writing a checkpoint{again}\n"
            with suppress(OSError):
                os.write(2, line.encode())
        elif number == signal.SIGINT and now - self._since >= ECHO_SECONDS:
            raise KeyboardInterrupt

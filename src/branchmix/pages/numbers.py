"""Numbers in words that people read at a glance."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """Bytes in decimal units, as disks and model hubs count: ``1.84 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def too_little_space(needed: float, free: float) -> str:
    """Bytes that are needed, and the fewer that are free, in units that show it: ``5 GB, but only 3 GB are free``."""
    return f"{human_bytes(needed)}, but only {human_bytes(free)} are free ({human_bytes(needed - free)} too few)"


def human_count(count: float) -> str:
    """Parameters or tokens in thousands, millions, billions, trillions: ``134.5M``."""
    for unit in ("", "k", "M", "B"):
        if abs(count) < 1000:
            return f"{count:.0f}" if not unit else f"{count:.4g}{unit}"
        count /= 1000
    return f"{count:.4g}T"


def counted(count: int, noun: str) -> str:
    """A number of things, in singular or plural: ``1 step``, ``2,048 tokens``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def with_error(value: float, stderr: float | None, digits: int = 4) -> str:
    """A value and its standard error, if there is one: ``0.8729 ± 0.0109``."""
    return f"{value:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")

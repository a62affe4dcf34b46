"""From N dense checkpoints of one seed to one mixture. ``upcycle`` is the way in; the steps are files of their own:

``compatibility`` (do they fit), ``plan`` (what becomes of every tensor), ``execute`` (write it), ``verify`` (prove it),
``surgery`` (experts in and out of an existing mixture).
"""

from __future__ import annotations

from branchmix.upcycling.execute import UpcycleReport, upcycle
from branchmix.upcycling.surgery import add_expert, remove_expert

__all__ = ["UpcycleReport", "add_expert", "remove_expert", "upcycle"]

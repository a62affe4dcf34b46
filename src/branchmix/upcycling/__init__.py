"""From N dense checkpoints of one seed to one mixture. ``upcycle`` is the way in; the steps are files of their own:

``compatibility`` (do they fit), ``plan`` (what becomes of every tensor), ``execute`` (write it), ``verify`` (prove it),
``edit_experts`` (experts in and out of an existing mixture).
"""

from __future__ import annotations

from branchmix.upcycling.edit_experts import add_expert, remove_expert
from branchmix.upcycling.execute import UpcycleReport, upcycle

__all__ = ["UpcycleReport", "add_expert", "remove_expert", "upcycle"]

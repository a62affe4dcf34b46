"""Export mixtures: as checkpoints of classes that other tools know (``export_model``), and to the Hub (``push``).

``native`` (which class computes the same), ``conversion`` (plan, write and verify), ``upload`` (the Hub).
"""

from __future__ import annotations

from branchmix.export.conversion import ExportReport, export_model
from branchmix.export.upload import PushReport, push

__all__ = ["ExportReport", "PushReport", "export_model", "push"]

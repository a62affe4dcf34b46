"""Mixtures leave home: checkpoints of classes that other tools know (``export_model``), and the Hub (``push``).

``native`` (which class computes the same), ``plan`` (what becomes of every tensor), ``run`` (write and prove it),
``push`` and ``card`` (upload).
"""

from __future__ import annotations

from branchmix.export.run import ExportReport, export_model

__all__ = ["ExportReport", "export_model"]

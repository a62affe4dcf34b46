"""Gates fitted from text, without gradients: ``calibrate`` makes a mixture good before it is trained.

``text`` (documents that no evaluation reads), ``evidence`` (what tokens say about domains), ``fit`` (which experts each
domain wants), ``measure`` (all of it for a checkpoint), ``run`` (the command).
"""

from __future__ import annotations

from branchmix.upcycling.gates.run import CalibrationReport, calibrate

__all__ = ["CalibrationReport", "calibrate"]

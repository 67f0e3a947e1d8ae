"""Calibration of the budget (section 3.3 of the paper) on samples with a task metric."""

from __future__ import annotations

from asymvlm.calibration.calibrate import Calibration, calibrate_budget

__all__ = ["Calibration", "calibrate_budget"]

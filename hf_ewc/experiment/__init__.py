"""Training runs and sweeps of them over λ: what `hf-ewc train`, `hf-ewc sweep` and the demo have in common."""

from __future__ import annotations

from .records import versions
from .sweep import plan_runs, probe_overlaps, run_sweep
from .training import Progress, ProgressLines, check_fisher, train_model

__all__ = [
    "Progress",
    "ProgressLines",
    "check_fisher",
    "plan_runs",
    "probe_overlaps",
    "run_sweep",
    "train_model",
    "versions",
]

"""What a user can set, one dataclass per job: [`FisherConfig`], [`EWCConfig`], [`EvaluationConfig`].

Each class lists its own problems in `problems()` (all of them, in words that end in an action); `check()` raises them together.
"""

from __future__ import annotations

from .checks import DTYPES, raise_problems
from .evaluation import EvaluationConfig
from .fisher import FisherConfig
from .training import MODES, EWCConfig, penalty_problems, training_problems

__all__ = [
    "DTYPES",
    "MODES",
    "EWCConfig",
    "EvaluationConfig",
    "FisherConfig",
    "penalty_problems",
    "raise_problems",
    "training_problems",
]

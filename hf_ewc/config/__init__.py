"""What a user can set, one dataclass per job: [`FisherConfig`], [`EWCConfig`], [`EvaluationConfig`].

Each class lists its own problems in `problems()` (all of them, in words that end in an action); `check()` raises them together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .checks import DTYPES, is_repo_id, raise_problems
from .compare import SPACE_FILE, CompareConfig, app_folder
from .evaluation import EvaluationConfig
from .fisher import FisherConfig

if TYPE_CHECKING:
    from .training import MODES, EWCConfig, penalty_problems, training_problems

__all__ = [
    "DTYPES",
    "MODES",
    "SPACE_FILE",
    "CompareConfig",
    "EWCConfig",
    "EvaluationConfig",
    "FisherConfig",
    "app_folder",
    "is_repo_id",
    "penalty_problems",
    "raise_problems",
    "training_problems",
]


def __getattr__(name: str) -> Any:
    if name in ("MODES", "EWCConfig", "penalty_problems", "training_problems"):  # trl, which a page does without
        from . import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Post-hoc EWC: the difference between an adapted model and its base, shrunk weight by weight after training.

[`merge_models`] writes such a model as a checkpoint, tensor by tensor. Its formula, for models in memory: [`scale_of`],
[`kept`] and [`pull_back`], applied to [`pieces`] of a tensor; and which Fisher a model was trained with: [`fisher_of`].
"""

from __future__ import annotations

from .checks import fisher_of, setting_problems
from .formula import Share, finite, kept, pieces, pull_back, scale_of
from .run import Merged, merge_models

__all__ = [
    "Merged",
    "Share",
    "finite",
    "fisher_of",
    "kept",
    "merge_models",
    "pieces",
    "pull_back",
    "scale_of",
    "setting_problems",
]

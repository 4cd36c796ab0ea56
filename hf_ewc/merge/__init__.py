"""Post-hoc EWC: the difference between an adapted model and its base, shrunk weight by weight after training.

[`merge_models`] writes such a model as a checkpoint, tensor by tensor. Its formula, for models in memory: [`scale_of`],
[`kept`] and [`pull_back`].
"""

from __future__ import annotations

from .checks import setting_problems
from .formula import Share, kept, pull_back, scale_of
from .run import Merged, merge_models

__all__ = ["Merged", "Share", "kept", "merge_models", "pull_back", "scale_of", "setting_problems"]

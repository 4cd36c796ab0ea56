"""hf_ewc: continue to pretrain all the weights of a language model without losing what it knew.

The heavy libraries (torch, transformers, trl) are imported on first use, so that `import hf_ewc` and `hf-ewc --help` answer at
once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "EWCConfig": "config",
    "FisherConfig": "config",
    "EvaluationConfig": "config",
    "EWCTrainer": "trainer",
    "EWCCallback": "callback",
    "FisherInformation": "artifact",
    "BaseModel": "artifact",
    "estimate_fisher": "fisher",
    "evaluate_model": "evaluation",
    "merge_models": "merge",
    "EWCError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "FisherFormatError": "errors",
    "FisherMismatchError": "errors",
    "HubError": "errors",
    "HubUnavailableError": "errors",
}

__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from .artifact import BaseModel, FisherInformation
    from .callback import EWCCallback
    from .config import EvaluationConfig, EWCConfig, FisherConfig
    from .errors import (
        ConfigError,
        DataError,
        EWCError,
        FisherFormatError,
        FisherMismatchError,
        HubError,
        HubUnavailableError,
    )
    from .evaluation import evaluate_model
    from .fisher import estimate_fisher
    from .merge import merge_models
    from .trainer import EWCTrainer


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

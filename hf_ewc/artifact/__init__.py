"""The Fisher information as files: what it was measured on, how it is stored, and every check before anything is trained on it.

[`FisherInformation`] is the artifact, [`BaseModel`] says which model it belongs to, and [`AnchorTensors`] reads that
model's weights θ* back from its own files. There is no θ* inside the artifact: the anchor *is* the base model at its
hash.
"""

from __future__ import annotations

from .anchor import AnchorTensors
from .base import BaseModel, tokenizer_sha256
from .manifest import EstimatorRecord, Manifest, ProbeRecord, StabilityRecord
from .store import FisherInformation

__all__ = [
    "AnchorTensors",
    "BaseModel",
    "EstimatorRecord",
    "FisherInformation",
    "Manifest",
    "ProbeRecord",
    "StabilityRecord",
    "tokenizer_sha256",
]

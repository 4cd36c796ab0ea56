"""The Fisher information as files: what it was measured on, how it is stored, and every check before anything is trained on it.

[`FisherInformation`] is the artifact, [`BaseModel`] says which model it belongs to, and [`AnchorTensors`] reads that
model's weights θ* back from its own files. There is no θ* inside the artifact, as the anchor *is* the base model at its
hash; but for a fold of Fishers with different bases, which stores its own.
"""

from __future__ import annotations

from .accuracy import Accuracy, AccuracyReport, codec_accuracy, stored_accuracy
from .anchor import AnchorTensors
from .base import BaseModel, tokenizer_sha256
from .manifest import ADAM_PATH, EstimatorRecord, Manifest, ProbeRecord, StabilityRecord
from .store import FisherInformation
from .summary import layer_and_group

__all__ = [
    "ADAM_PATH",
    "Accuracy",
    "AccuracyReport",
    "AnchorTensors",
    "BaseModel",
    "EstimatorRecord",
    "FisherInformation",
    "Manifest",
    "ProbeRecord",
    "StabilityRecord",
    "codec_accuracy",
    "layer_and_group",
    "stored_accuracy",
    "tokenizer_sha256",
]

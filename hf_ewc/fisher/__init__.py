"""The Fisher information: which weights carry what the base model knows, measured from squared gradients of single examples.

`templates` words a question, `probes` turns rows into token ids with scored positions, `per_example` squares and adds, `state`
keeps the running sums on disk, `estimator` runs the loop: [`estimate_fisher`].
"""

from __future__ import annotations

from .estimator import estimate_fisher, prepared
from .per_example import accumulate_squares, collate
from .probes import Example, Probe, build_probe
from .templates import render_answer, render_question, template_sha256

__all__ = [
    "Example",
    "Probe",
    "accumulate_squares",
    "build_probe",
    "collate",
    "estimate_fisher",
    "prepared",
    "render_answer",
    "render_question",
    "template_sha256",
]

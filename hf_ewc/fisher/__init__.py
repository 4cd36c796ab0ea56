"""The Fisher information: which weights carry what the base model knows, measured from squared gradients of single examples.

`templates` words a question, `examples` turns rows into token ids with scored positions, `probes` reads the rows (those of
lm-evaluation-harness with `lm_eval_probe` and `lm_eval_task`), `labels` says which targets are differentiated. `per_example`
squares one by one, `batched` (with `rules`, `head`, `products`) whole batches at once, and `engines` chooses. `plan` cuts the
work into windows, `loop` goes through them, with `state` on disk, `stability` and `figure` for "is it enough?", and `replicas`
or `sharded` for several processes. `estimator` puts it together, with `loading` and `ready` for the model: [`estimate_fisher`].
"""

from __future__ import annotations

from .batched import BatchedSquares
from .engines import OneByOne, SummedGradient
from .estimator import estimate_fisher
from .examples import Example
from .figure import stability_figure, stability_table
from .per_example import accumulate_squares, collate
from .probes import Probe, build_probe
from .ready import prepared
from .replicas import Replicas
from .templates import render_answer, render_question, template_sha256

__all__ = [
    "BatchedSquares",
    "Example",
    "OneByOne",
    "Probe",
    "Replicas",
    "SummedGradient",
    "accumulate_squares",
    "build_probe",
    "collate",
    "estimate_fisher",
    "prepared",
    "render_answer",
    "render_question",
    "stability_figure",
    "stability_table",
    "template_sha256",
]

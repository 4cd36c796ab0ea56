"""Manifests of Fishers that are made in memory: their checks, totals and versions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from math import prod

import torch
from torch import Tensor

from .. import __version__
from ..errors import FisherFormatError
from .base import BaseModel
from .files import Reader
from .manifest import EstimatorRecord, Manifest, ProbeRecord, Storage, Totals
from .summary import range_problem, sum_and_zeros


def described(
    tensors: Mapping[str, Tensor], base: BaseModel, probes: Sequence[ProbeRecord], estimator: EstimatorRecord
) -> Manifest:
    """Manifest (without totals) of sums of squares in memory; see [`FisherInformation.from_tensors`]."""
    problems = []
    for name, tensor in tensors.items():
        problem = range_problem(tensor)
        if tensor.dtype != torch.float32:
            problem = f"is {tensor.dtype}, not torch.float32, in which small squares vanish or sums stop growing"
        if problem:
            problems.append(f"{name} {problem}")
    manifest = Manifest(
        base_model=base,
        probes=list(probes),
        estimator=estimator,
        storage=Storage(codec="float32", shards={}),
        parameters={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        totals=Totals(num_parameters=0, trace=0.0, zeros=0),
        versions=versions(),
    )
    problems += manifest.problems()
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise FisherFormatError(f"these tensors are not a Fisher:\n{listed}\nNothing was written.")
    return manifest


def with_totals(manifest: Manifest, read: Reader) -> Manifest:
    counted = [sum_and_zeros(read(name, None)) for name in manifest.parameters]
    totals = Totals(
        num_parameters=sum(prod(shape) for shape in manifest.parameters.values()),
        trace=math.fsum(total for total, _ in counted) / manifest.estimator.normalizer,
        zeros=sum(zeros for _, zeros in counted),
    )
    return replace(manifest, totals=totals)


def versions() -> dict[str, str]:
    libraries = ("torch", "transformers", "datasets", "safetensors", "tokenizers")
    return {"hf_ewc": __version__, **{name: version(name) for name in libraries}}

"""Measurements that anyone can repeat: ratios against a baseline of the same run, on models made on the spot."""

from __future__ import annotations

from .estimators import EstimatorBench, bench_estimators
from .fisher import FisherBench, bench_fisher
from .memory import peak_bytes

__all__ = ["EstimatorBench", "FisherBench", "bench_estimators", "bench_fisher", "peak_bytes"]

"""The penalty's arithmetic: in place, chunk by chunk, in float32 whatever the dtypes of weights, gradients, anchor and Fisher.

One pass reads (θ, θ*, F, g) and writes g or θ; nothing is kept for backward and the extra memory is the fixed scratch of a few
chunks, however large the model. (Autograd through the penalty costs more than two further copies of all weights.)
All arguments are flat, equally long and on one device; `views.flat` makes them so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 1 << 18
"""Elements per chunk (a multiple of bitsandbytes' block of 256): 1 MiB of float32, so that scratch stays in a core's cache."""

DenominatorFn = Callable[[slice, Tensor], Tensor]
"""(slice of the flat parameter, scratch of that length) → √v̂ + ε there, float32. May write into the scratch."""


class Scratch:
    """Three reusable float32 buffers of one chunk each, per device."""

    def __init__(self) -> None:
        self._buffers: dict[torch.device, Tensor] = {}

    def get(self, device: torch.device, size: int) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._buffers:
            self._buffers[device] = torch.empty((3, CHUNK), dtype=torch.float32, device=device)
        a, b, c = self._buffers[device].unbind(0)
        return a[:size], b[:size], c[:size]


def _chunks(n: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK)]


def _delta(param: Tensor, anchor: Tensor, part: slice, out: Tensor) -> Tensor:
    return out.copy_(param[part]).sub_(anchor[part])


def add_penalty_gradient_(grad: Tensor, param: Tensor, anchor: Tensor, fisher: Tensor, scale: float, scratch: Scratch) -> None:
    """g ← g + scale · F (θ − θ*). See `reference.loss_gradient`; `scale` is λ over the Fisher's normalizer."""
    for part in _chunks(param.numel()):
        d, f, _ = scratch.get(param.device, part.stop - part.start)
        _delta(param, anchor, part, d)
        # (d·s)·F, not d·(s·F): at θ = θ* this is exactly 0 whatever F and λ are
        d.mul_(scale).mul_(f.copy_(fisher[part]))
        # a 16-bit gradient is added to in float32 and rounded once
        grad[part].copy_(d.add_(f.copy_(grad[part])))


def implicit_step_(
    param: Tensor, anchor: Tensor, fisher: Tensor, scale: float, denominator: DenominatorFn | None, scratch: Scratch
) -> None:
    """
    θ ← θ − k/(1+k) · (θ − θ*) with k = scale · F / denominator. See `reference.implicit_step`; `scale` is lr · λ / normalizer.
    """
    for part in _chunks(param.numel()):
        d, k, s = scratch.get(param.device, part.stop - part.start)
        k.copy_(fisher[part]).mul_(scale)
        if denominator is not None:
            k.div_(denominator(part, s))
        # k/(1+k) = 1/(1 + 1/k) stays finite for k = 0 (1/k = inf → 0) and for k = inf (→ 1), so λ = 1e12 is no special case
        k.reciprocal_().add_(1).reciprocal_()
        _delta(param, anchor, part, d).mul_(k)
        param[part].copy_(k.copy_(param[part]).sub_(d))


def penalty_sums(param: Tensor, anchor: Tensor, fisher: Tensor, grad: Tensor | None, scratch: Scratch) -> Tensor:
    """[Σ F δ², Σ δ², Σ (F δ)², Σ g²] with δ = θ − θ* and the Fisher as stored; float64 (4,) on the parameter's device."""
    sums = torch.zeros(4, dtype=torch.float64, device=param.device)
    for part in _chunks(param.numel()):
        d, f, g = scratch.get(param.device, part.stop - part.start)
        _delta(param, anchor, part, d)
        f.copy_(fisher[part]).mul_(d)
        sums[0] += torch.dot(f, d)
        sums[1] += torch.dot(d, d)
        sums[2] += torch.dot(f, f)
        if grad is not None:
            g.copy_(grad[part])
            sums[3] += torch.dot(g, g)
    return sums


def largest_step(fisher: Tensor, scale: float, denominator: DenominatorFn | None, scratch: Scratch) -> Tensor:
    """max over the entries of k = scale · F / denominator; float32 scalar."""
    largest = torch.zeros((), device=fisher.device)
    for part in _chunks(fisher.numel()):
        f, s, _ = scratch.get(fisher.device, part.stop - part.start)
        f.copy_(fisher[part]).mul_(scale)
        if denominator is not None:
            f.div_(denominator(part, s))
        largest = torch.maximum(largest, f.max())
    return largest

"""
What a codec costs: the errors of the values, and of the penalties that they give.

Norms of the error hide what matters: the top 1 % of the weights carry nearly all of a Fisher's trace, so a codec that turns the
other 99 % into zeros (and unprotects them) still has a small one. Three drifts δ of the weights show more of ½ Σ F δ²:

    iid         δ = z, z ~ N(0, 1): the largest F decide
    EWC-like    δ = z / (1 + F/F̄), F̄ the mean of all F: where a weight of average F, pulled equally by task and penalty, ends up
    whitened    δ = F^(−½): each weight costs the same, so that lost small values show
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .codec import CODECS, Codec, get_codec
from .files import Index, Reader, reader_of

if TYPE_CHECKING:
    from .store import FisherInformation

SAMPLE = 1 << 20  # quantiles and ranks are exact up to here, above it those of a random sample
PIECE = 1 << 20  # values in memory at once; whole blocks of a vector


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """
    How far stored values are from the original ones, for one parameter or all of them.

    Args:
        name (`str`): the parameter, or `"all"`.
        values (`int`): how many numbers.
        bytes (`int`): what they take on disk, without the files' headers.
        median, p99, worst (`float`): relative error |F′ − F| / F of the positive values.
        new_zeros (`int`): positive values that became 0: weights that are no longer protected.
        top_kept (`float`): share of the largest 1 % that are among the largest 1 % still.
        top_order (`float`): Spearman's rank correlation of F′ with F within the largest 1 %.
        iid, ewc_like, whitened (`float`): (½ Σ F′δ² − ½ Σ F δ²) / ½ Σ F δ² under the drifts of this module, with its sign.
    """

    name: str
    values: int
    bytes: int
    median: float
    p99: float
    worst: float
    new_zeros: int
    top_kept: float
    top_order: float
    iid: float
    ewc_like: float
    whitened: float


@dataclass(frozen=True)
class AccuracyReport:
    """[`Accuracy`] of all values together and of each parameter."""

    total: Accuracy
    tensors: list[Accuracy]


def codec_accuracy(fisher: FisherInformation, codec: str, seed: int = 0) -> AccuracyReport:
    """
    What storing a Fisher with `codec` would cost. Nothing is written, and a piece of one tensor is in memory at a time.

    Args:
        fisher ([`FisherInformation`]): in memory or on disk. Its values are the truth here, even if a codec has rounded them.
        codec (`str`): `"float32"`, `"bfloat16"` or `"log8"`.
        seed (`int`, *optional*, defaults to 0): of drifts and samples.

    Example:

    ```py
    >>> report = codec_accuracy(FisherInformation.from_pretrained("gemma-2-2b-fisher-mmlu"), "log8")
    >>> report.total.median, report.total.whitened
    ```
    """
    coder = get_codec(codec)

    def read(name: str, index: Index | None) -> Tensor:
        return coder.decode(name, reader_of(coder.encode(name, fisher.read(name, index))))

    return _compare(fisher, read, coder, seed)


def stored_accuracy(original: FisherInformation, stored: FisherInformation, seed: int = 0) -> AccuracyReport:
    """What lies in the files of `stored`, compared with `original`; see [`codec_accuracy`]."""
    return _compare(original, stored.read, CODECS[stored.manifest.storage.codec], seed)


@dataclass
class _Tally:
    """Sums over all values, and a sample of (F, F′) pairs."""

    numel: int = 0
    bytes: int = 0
    new_zeros: int = 0
    worst: float = 0.0
    before: list[float] = field(default_factory=lambda: [0.0] * 3)  # Σ F δ² under the three drifts
    after: list[float] = field(default_factory=lambda: [0.0] * 3)
    sample: list[Tensor] = field(default_factory=list)  # (2, k)

    def add(self, old: Tensor, new: Tensor, mean: float, generator: torch.Generator) -> None:
        self.numel += old.numel()
        self.new_zeros += int(((old > 0) & (new == 0)).sum())
        self.worst = max(self.worst, float(_relative(old, new).max())) if old.any() else self.worst
        noise = torch.randn(old.numel(), generator=generator, dtype=torch.float64)
        old, new = old.double(), new.double()
        squares = noise**2, (noise / (1 + old / mean)) ** 2 if mean else noise**2, torch.where(old > 0, 1 / old, 0.0)
        for drift, square in enumerate(squares):
            self.before[drift] += float(old @ square)
            self.after[drift] += float(new @ square)

    def merge(self, part: _Tally, pairs: Tensor) -> None:
        self.numel, self.bytes = self.numel + part.numel, self.bytes + part.bytes
        self.new_zeros, self.worst = self.new_zeros + part.new_zeros, max(self.worst, part.worst)
        self.before = [a + b for a, b in zip(self.before, part.before, strict=True)]
        self.after = [a + b for a, b in zip(self.after, part.after, strict=True)]
        self.sample.append(pairs)

    def result(self, name: str) -> Accuracy:
        old, new = torch.cat(self.sample, dim=1) if self.sample else torch.zeros(2, 0)
        errors = _relative(old, new).sort().values
        median, p99 = (float(errors[round(q * (len(errors) - 1))]) if len(errors) else 0.0 for q in (0.5, 0.99))
        kept, order = _top(old, new)
        penalties = [(new - old) / old if old else 0.0 for old, new in zip(self.before, self.after, strict=True)]
        return Accuracy(
            name=name,
            values=self.numel,
            bytes=self.bytes,
            median=median,
            p99=p99,
            worst=self.worst,
            new_zeros=self.new_zeros,
            top_kept=kept,
            top_order=order,
            iid=penalties[0],
            ewc_like=penalties[1],
            whitened=penalties[2],
        )


def _compare(fisher: FisherInformation, read: Reader, codec: Codec, seed: int) -> AccuracyReport:
    count = sum(math.prod(fisher.shape(name)) for name in fisher.names)
    mean = fisher.trace * fisher.normalizer / max(1, count)
    total, tensors = _Tally(), []
    for position, name in enumerate(fisher.names):
        shape = fisher.shape(name)
        size = math.prod(shape)
        generator = torch.Generator().manual_seed((seed << 20) + position)
        tally = _Tally(bytes=codec.size(name, shape))
        for index in _pieces(shape):
            old, new = fisher.read(name, index).flatten(), read(name, index).flatten()
            tally.add(old, new, mean, generator)
            tally.sample.append(_sampled(torch.stack([old, new]), SAMPLE / max(1, size), generator))
        tensors.append(tally.result(name))
        pairs = torch.cat(tally.sample, dim=1) if tally.sample else torch.zeros(2, 0)
        # each tensor's share of the common sample is its share of all values
        total.merge(tally, _sampled(pairs, min(1.0, SAMPLE / max(1, count)) * size / max(1, pairs.shape[1]), generator))
    return AccuracyReport(total.result("all"), tensors)


def _pieces(shape: tuple[int, ...]) -> Iterator[Index | None]:
    """Slices of the first dimension of at most [`PIECE`] values (or one row): blocks of a codec stay whole in each."""
    if not shape:
        yield None
        return
    step = max(1, PIECE // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield (slice(start, min(start + step, shape[0])),)


def _sampled(pairs: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """All columns, or at `rate` < 1 that share of them, at random."""
    if rate >= 1:
        return pairs
    count = pairs.shape[1]
    return pairs[:, torch.randperm(count, generator=generator)[: math.ceil(rate * count)]]


def _relative(old: Tensor, new: Tensor) -> Tensor:
    positive = old > 0
    old, new = old[positive].double(), new[positive].double()
    return (new - old).abs() / old


def _top(old: Tensor, new: Tensor) -> tuple[float, float]:
    """(share kept, rank correlation) of the largest 1 % of `old`; 1.0 where there is nothing to order."""
    if not old.numel():
        return 1.0, 1.0
    count = math.ceil(old.numel() / 100)
    best = old.topk(count).indices
    kept = (new[best] >= new.topk(count).values[-1]).double().mean().item()
    a, b = (ranks - ranks.mean() for ranks in (_ranks(old[best]), _ranks(new[best])))
    if not a.any():
        return kept, 1.0
    return kept, float(a @ b / (a.norm() * b.norm())) if b.any() else 0.0


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1, equal values sharing their mean rank (float64)."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[inverse]

r"""
The formula of a merge, and how it is applied to one piece of a tensor.

$$\theta_{out} = \theta^* + \frac{\theta - \theta^*}{1 + \lambda F / \bar F}$$

with θ* the base, θ the adapted model, F the base's Fisher, and F̄ its mean over all weights. Weight by weight, it is the minimum
of ½ (x − θ)² + λ/2 · F/F̄ · (x − θ*)²: the derivative (x − θ) + λ · F/F̄ · (x − θ*) is 0 where x − θ* = (θ − θ*) / (1 + λ · F/F̄).
So it is one implicit step of the EWC penalty from θ with the learning rate 1/F̄; and it is Fisher-weighted averaging (Matena and
Raffel 2022, https://arxiv.org/abs/2111.09832) when F̄ stands in for the Fisher of the new task, of which nothing is known. With
F̄, λ is a pure number: at λ = 1, a weight of mean importance goes half of the way back.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..artifact import BaseModel, FisherInformation, files, layer_and_group
from ..errors import DataError, FisherMismatchError

CHUNK = 1 << 18
"""Entries that are worked on at a time: in float64 each tensor of them takes 2 MiB, however large the embedding is."""


def scale_of(fisher: FisherInformation, merge_lambda: float) -> float:
    """λ / F̄, for the values as they are stored: of sums and their mean, the number of tokens cancels."""
    totals = fisher.manifest.totals
    if totals.trace == 0:
        raise FisherMismatchError(
            f"the Fisher '{fisher.source}' is 0 everywhere, so that no weight is more important than another and F/F̄ has no "
            "value. Estimate it again (`hf-ewc fisher …`), or use `interpolate`. Nothing was written."
        )
    return merge_lambda * (totals.num_parameters / (totals.trace * fisher.normalizer))


def kept(fisher: Tensor, scale: float) -> Tensor:
    """The share 1 / (1 + scale · F) of its drift that each weight keeps, in float64: 1 where F = 0, also for `math.inf`."""
    if math.isinf(scale):
        return (fisher == 0).double()
    return (fisher.double() * scale).add_(1).reciprocal_()


def pull_back(adapted: Tensor, base: Tensor, keep: Tensor) -> Tensor:
    """
    θ* + keep · (θ − θ*), in float64. It is exact at both ends (θ for 1, θ* for 0), lies never beyond them, and never further
    from θ* for a smaller share: rounding cannot reverse what a larger λ does.
    """
    theta, anchor = adapted.double(), base.double()
    out = (theta - anchor).mul_(keep).add_(anchor)
    return torch.where(keep == 1, theta, torch.where(keep == 0, anchor, out))  # to the bit: -0 is not 0


def pieces(shape: tuple[int, ...]) -> Iterator[files.Index]:
    """A tensor in pieces of at most [`CHUNK`] entries, in the order in which they lie in a file; `()` for all of it."""
    if prod(shape) <= CHUNK:
        yield ()
        return
    width = prod(shape[1:])
    step = max(1, CHUNK // width)
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        for rest in pieces(shape[1:]) if width > CHUNK else [()]:
            yield (rows, *rest)


@dataclass
class Share:
    """
    How far the tensors of a group went back to the base.

    Args:
        weights (`int`): in the group.
        way (`float`): mean over them of the share of the way: 0 stays adapted, 1 is the base again.
        way_by_fisher (`float`, *optional*): the same, each weight counted by its F; `None` without a Fisher.
        kl_before, kl_after (`float`, *optional*): ½ Σ F (θ − θ*)² of the adapted model and of the result, the estimated KL from
            the base in nats per probe token.
    """

    weights: int
    way: float
    way_by_fisher: float | None = None
    kl_before: float | None = None
    kl_after: float | None = None


class Mover:
    """
    Applies the formula to pieces of parameters, and adds up how far they went.

    Args:
        anchor (`Reader`): θ* by name and index.
        label (`str`): how messages name θ*.
        fisher ([`FisherInformation`], *optional*): F; `None` for an interpolation.
        strength (`float`): λ, or α without a Fisher.
        uncovered (`Collection[str]`): parameters that the Fisher does not hold; they stay adapted.
    """

    def __init__(
        self,
        anchor: files.Reader,
        label: str,
        fisher: FisherInformation | None,
        strength: float,
        uncovered: Collection[str] = (),
    ) -> None:
        self.anchor, self.label, self.fisher, self.uncovered = anchor, label, fisher, uncovered
        self.strength = strength if fisher is None else scale_of(fisher, strength)
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(6, dtype=torch.float64))

    def move(self, name: str, index: files.Index, theta: Tensor, dtype: torch.dtype, counted: bool = True) -> Tensor:
        """The merged values of part `index` of parameter `name`, of which `theta` are the adapted ones."""
        sums = self._sums[layer_and_group(name)[1]] if counted else torch.zeros(6, dtype=torch.float64)
        sums[0] += theta.numel()
        if name in self.uncovered:
            return theta.to(dtype)
        anchor = sound(self.anchor(name, index), name, self.label)
        if anchor.shape != theta.shape:
            raise DataError(
                f"in its files, {name} of {self.label} has another shape than its config.json announces: {tuple(anchor.shape)} "
                f"where {tuple(theta.shape)} was expected. Copy or download it again. Nothing was written."
            )
        if self.fisher is None:
            keep = torch.full(theta.shape, 1 - self.strength, dtype=torch.float64)
        else:
            stored = self.fisher.read(name, index)
            keep = kept(stored, self.strength)
        out = pull_back(theta, anchor, keep).to(dtype)
        sums[1] += (gone := 1 - keep).sum()
        if self.fisher is not None:
            per_token, base = stored.flatten().double().div_(self.fisher.normalizer), anchor.double()
            sums[2] += per_token.sum()
            sums[3] += per_token.dot(gone.flatten())
            sums[4] += 0.5 * per_token.dot((theta.double() - base).square_().flatten())
            sums[5] += 0.5 * per_token.dot((out.double() - base).square_().flatten())
        return out

    def shares(self) -> dict[str, Share]:
        """By group of tensors, as [`layer_and_group`] has them, and of `"all"`."""
        rows = {**self._sums, "all": torch.stack(list(self._sums.values())).sum(0)}
        found = {}
        for group, (weights, way, total, weighted, before, after) in ((group, row.tolist()) for group, row in rows.items()):
            found[group] = Share(int(weights), way / max(1, weights))
            if self.fisher is not None:
                by_fisher = weighted / total if total else 0.0
                found[group] = Share(int(weights), way / max(1, weights), by_fisher, before, after)
        return found


def sound(values: Tensor, name: str, label: str) -> Tensor:
    """Refuse weights that are NaN, infinite, or quantised."""
    if values.dtype not in FLOATS.values():
        raise DataError(
            f"{name} of {label} is stored as {str(values.dtype).removeprefix('torch.')}, so it is quantised; its numbers are "
            "not the weights. Take the model in float32 or bfloat16. Nothing was written."
        )
    if not finite(values):
        raise DataError(
            f"{name} of {label} holds {int((~values.isfinite()).sum())} values that are NaN or infinite, and a merge would "
            "spread them. Take an earlier checkpoint, or copy it again. Nothing was written."
        )
    return values


def finite(values: Tensor) -> bool:
    """Whether all are; in one pass without scratch memory, as the extremes of what holds a NaN are NaN."""
    return values.numel() == 0 or all(bound.isfinite() for bound in values.aminmax())


FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What safetensors calls the dtypes that weights may have."""


def label_of(role: str, model: BaseModel) -> str:
    """How messages name a model: `the adapted model 'runs/lt'`."""
    return f"the {role} model '{model.label}'"

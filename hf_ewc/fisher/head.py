r"""The language-model head of the batched path: loss, gradient and squares without the (B, T, V) logits.

With a vocabulary of 256,000, the logits of one batch are larger than the model. So they exist only in part: by *positions* when
the loss and the gradient of the hidden states are computed, by *vocabulary* when the head's own gradient is squared, each part
within a set scratch memory. Where all of them fit, they are kept from the first time to the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .products import add_squared_products


@dataclass
class Embedded:
    """Gradients of the rows of a tied table from its other end, the embedding: K pairs of a unit and a token."""

    unit: Tensor  # (K) int64
    token: Tensor  # (K) int64
    gradient: Tensor  # (K, D) float32


class Head:
    """
    `logits = post(h Wᵀ + b)`, where `post` is what the model's config announces: a scale, a soft cap, or nothing.

    Args:
        linear (`nn.Linear`): the output embedding.
        config (`PreTrainedConfig`): of the text model.
        scratch (`int`): bytes that logits may take.
    """

    def __init__(self, linear: nn.Linear, config: Any, scratch: int) -> None:
        self.linear, self.scratch = linear, scratch
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)
        factor, divisor = (getattr(config, name, None) or 1.0 for name in ("logit_scale", "logits_scaling"))  # Cohere, Granite
        self._scale = float(factor) / float(divisor)

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:  # (N, D), (N) → (N) float32
        """−log p of each target, nothing kept."""
        found = torch.empty(len(hidden), device=hidden.device)
        with torch.no_grad():
            for part in self._parts(len(hidden)):
                logits, _ = self._logits(hidden[part])
                found[part] = _at(logits, targets[part]).neg_().add_(logits.logsumexp(-1))
        return found

    def forward_backward(
        self,
        hidden: Tensor,  # (N, D) of the N scored positions
        targets: Tensor,  # (N) int64; replaced in place where `uniforms` are given
        scales: Tensor,  # (N) float32: √weight of each position's example
        uniforms: Tensor | None,  # (N) float32 in [0, 1): draw the targets from the model instead
    ) -> tuple[Tensor, Tensor, Scored]:
        """
        Loss of each position, its gradient with respect to `hidden`, and what `square` needs to know.

        Returns:
            `tuple`: −log p (N) float32; scales · ∂(−log p)/∂hidden (N, D) in hidden's dtype; [`Scored`].
        """
        weight = self.linear.weight.detach()
        losses, gradient = torch.empty(len(hidden), device=hidden.device), torch.empty_like(hidden)
        normalizers, kept = torch.empty_like(losses), None
        with torch.no_grad():
            parts = self._parts(len(hidden))
            for part in parts:
                logits, slope = self._logits(hidden[part])
                if uniforms is not None:
                    targets[part] = draw(logits, uniforms[part])
                normalizers[part] = logits.logsumexp(-1)
                losses[part] = normalizers[part] - _at(logits, targets[part])
                change = self._change(logits, slope, normalizers[part], targets[part], scales[part], 0)
                gradient[part] = change.to(weight.dtype) @ weight
                kept = change if len(parts) == 1 else None
        return losses, gradient, Scored(hidden, targets, scales, normalizers, kept)

    def square(
        self,
        scored: Scored,
        units: Sequence[slice],  # the positions of each example (or of each position, for granularity "token")
        total: Tensor,  # (V, D) float32
        bias_total: Tensor | None,  # (V) float32
        embedded: Embedded | None = None,
    ) -> None:
        """
        Add each unit's squared gradient of the head's weight. For a tied table its other end belongs to the same gradient, and
        both are added before they are squared: the rows that the unit's own tokens point to are left out of the big product and
        computed by themselves.
        """
        with torch.no_grad():
            lengths = [unit.stop - unit.start for unit in units]
            hidden = _padded(scored.hidden, units, max(lengths))
            table = self.linear.weight.shape[0]
            width = max(1, self.scratch // (4 * hidden.shape[0] * hidden.shape[1] * 3))
            for first in range(0, table, width):
                columns = slice(first, min(first + width, table))
                if scored.kept is not None:
                    change = scored.kept[:, columns]
                else:
                    logits, slope = self._logits(scored.hidden, columns)
                    change = self._change(logits, slope, scored.normalizers, scored.targets, scored.scales, first)
                change = _padded(change, units, max(lengths))  # (U, S, columns)
                if bias_total is not None:  # before the rows below are taken out: the bias has one end only
                    bias_total[columns] += change.sum(1).square().sum(0)
                if embedded is not None:
                    inside = (embedded.token >= columns.start) & (embedded.token < columns.stop)
                    change[embedded.unit[inside], :, embedded.token[inside] - first] = 0
                add_squared_products(hidden, change, total[columns], lengths, self.scratch)
            if embedded is not None:
                self._square_tied(scored, units, total, embedded)

    def _square_tied(self, scored: Scored, units: Sequence[slice], total: Tensor, embedded: Embedded) -> None:
        if all(unit.stop - unit.start == 1 for unit in units):  # one position each: all at once
            hidden, tokens = scored.hidden[embedded.unit], embedded.token
            raw = (hidden.float() * self.linear.weight.detach()[tokens].float()).sum(-1)
            bias = self.linear.bias
            logits, slope = self._post(raw if bias is None else raw + bias[tokens].float())
            change = (logits - scored.normalizers[embedded.unit]).exp_() - (scored.targets[embedded.unit] == tokens).float()
            change *= scored.scales[embedded.unit] if slope is None else scored.scales[embedded.unit] * slope
            total.index_add_(0, tokens, torch.addcmul(embedded.gradient, change[:, None], hidden.float()).square_())
            return
        order = embedded.unit.argsort(dim=0, stable=True)
        counts = embedded.unit.bincount(minlength=len(units)).tolist()
        for unit, chosen in zip(units, order.split(counts), strict=True):
            tokens, gradient, hidden = embedded.token[chosen], embedded.gradient[chosen], scored.hidden[unit]
            logits, slope = self._logits(hidden, tokens)
            change = (logits - scored.normalizers[unit, None]).exp_() - (scored.targets[unit, None] == tokens).float()
            change *= scored.scales[unit, None] if slope is None else scored.scales[unit, None] * slope
            total.index_add_(0, tokens, torch.addmm(gradient, change.t(), hidden.float()).square_())

    def _parts(self, count: int) -> list[slice]:
        """Positions whose logits fit into the scratch memory; at least one at a time."""
        step = max(1, self.scratch // (self.linear.weight.shape[0] * 4 * 3))
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]

    def _logits(self, hidden: Tensor, columns: slice | Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits in float32 of some positions and some of the vocabulary, and ∂logits/∂(h Wᵀ + b) where it is not 1."""
        weight: Tensor = self.linear.weight.detach()
        bias: Tensor | None = self.linear.bias
        if columns is not None:
            weight, bias = weight[columns], None if bias is None else bias[columns]
        return self._post(nn.functional.linear(hidden, weight, bias).float())

    def _post(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """In place: scale and soft cap, and their derivative."""
        if self._scale != 1.0:
            logits *= self._scale
        if self._cap is None:
            return logits, None if self._scale == 1.0 else torch.full((), self._scale, device=logits.device)
        logits = logits.div_(self._cap).tanh_()
        slope = (1 - logits.square()).mul_(self._scale)
        return logits.mul_(self._cap), slope

    @staticmethod
    def _change(
        logits: Tensor, slope: Tensor | None, normalizers: Tensor, targets: Tensor, scales: Tensor, first: int
    ) -> Tensor:
        """scales · ∂(−log p)/∂(h Wᵀ + b) = scales · (softmax − onehot) · slope, in place of the logits."""
        change = logits.sub_(normalizers[:, None]).exp_()
        columns = targets - first
        inside = (columns >= 0) & (columns < change.shape[1])
        change[inside.nonzero()[:, 0], columns[inside]] -= 1
        change *= scales[:, None]
        return change if slope is None else change.mul_(slope)


@dataclass
class Scored:
    """The N scored positions after the forward pass; `kept` (N, V) is their `_change`, where it fitted."""

    hidden: Tensor
    targets: Tensor
    scales: Tensor
    normalizers: Tensor
    kept: Tensor | None


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:  # (N, V) float32, (N) → (N) int64
    """One token per position from softmax(logits), by inverting the cumulative distribution at `uniforms`."""
    cumulative = logits.softmax(-1).cumsum(-1)
    # relative to the last value, which rounding leaves a little off 1
    found = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)[:, 0]
    return found.clamp_(max=logits.shape[1] - 1)


def _at(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(-1, targets[:, None])[:, 0]


def _padded(values: Tensor, units: Sequence[slice], longest: int) -> Tensor:
    """(N, …) → (U, longest, …), zeros behind each unit's positions; memory of its own."""
    if longest == 1 and len(units) == len(values):
        return values[:, None].clone()
    found = values.new_zeros(len(units), longest, *values.shape[1:])
    for row, unit in enumerate(units):
        found[row, : unit.stop - unit.start] = values[unit]
    return found

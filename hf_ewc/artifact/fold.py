r"""
Several (Fisher, anchor) pairs as one, exactly.

A quadratic penalty for each old task, kept side by side, is one quadratic penalty and a number (complete the square):

$$\sum_k \tfrac{c_k}{2} F_k (\theta - \theta_k)^2 = \tfrac12 F (\theta - \bar\theta)^2 + C, \qquad
F = \sum_k c_k F_k, \quad \bar\theta = \tfrac1F \sum_k c_k F_k \theta_k, \quad
C = \tfrac12 \big(\sum_k c_k F_k \theta_k^2 - F \bar\theta^2\big) \ge 0,$$

weight by weight. Computed like that, C is the small difference of large numbers; so pairs are joined one at a time, where it is
½ · F_a F_b / (F_a + F_b) · (θ_a − θ_b)².

The decay is that of online EWC (Schwarz et al. 2018, "Progress & Compress", https://arxiv.org/abs/1805.06370): cₖ = γ to the
number of later pairs. There, the summed Fisher is centred on the newest weights; here each pair keeps its own centre. The two
agree where all pairs share one base.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, FisherMismatchError
from .base import BaseModel
from .files import Index, Reader
from .fit import base_rows, parameter_rows, table
from .manifest import EstimatorRecord, Manifest, Storage, Totals
from .memory import versions
from .mix import common
from .records import FoldedPair, FoldRecord

if TYPE_CHECKING:
    from .anchor import AnchorTensors, FoldedAnchor
    from .store import FisherInformation

logger = logging.getLogger(__name__)

BLOCK = 1 << 20
"""Entries that are worked on at a time: in float64, each tensor of them takes 8 MiB."""


def joined(pairs: Sequence[tuple[float, Tensor, Tensor]]) -> tuple[Tensor, Tensor, float]:
    """
    Fold (cₖ, Fₖ, θₖ), equally shaped; the last of them is the newest.

    Returns:
        `(Tensor, Tensor, float)`: F and θ̄ in float64, and C. Where F = 0, any θ̄ is right: it is the newest anchor. Where all
        anchors are equal, θ̄ is that value, bit for bit.
    """
    coefficient, fisher, anchor = pairs[0]
    total, mean, constant = fisher.double() * coefficient, anchor.double(), 0.0
    for coefficient, fisher, anchor in pairs[1:]:
        added, latest = fisher.double() * coefficient, anchor.double()
        union = total + added
        share = torch.where(union > 0, added / union, 1.0)
        constant += 0.5 * (total * share * (latest - mean).square()).sum().item()
        # lerp adds to the nearer end: exact for a share of 0 or 1, and for equal ends whatever the share
        mean, total = torch.lerp(mean, latest, share), union
    return total, mean, constant


class LazyFold:
    """
    F and θ̄ of a fold, computed when they are read, some rows at a time.

    Args:
        parts (`list[FisherInformation]`): oldest first.
        coefficients (`list[float]`): cₖ of each.
        anchors (`list`, *optional*): of each part, with `read(name, index)`; `None` when all are the same.
    """

    def __init__(
        self,
        parts: list[FisherInformation],
        coefficients: list[float],
        anchors: list[AnchorTensors | FoldedAnchor] | None,
    ) -> None:
        self.parts, self.coefficients, self.anchors = parts, coefficients, anchors

    def fisher(self, name: str, index: Index | None = None) -> Tensor:
        """F per scored token, float32."""
        return self._by_rows(name, index, lambda block: self._sum(name, block))

    def anchor(self, name: str, index: Index | None = None) -> Tensor:
        """θ̄, float32."""
        return self._by_rows(name, index, lambda block: self._joined(name, block)[1])

    def totals(self) -> tuple[Totals, float]:
        """Trace and zeros of F, and C without what the parts bring along; one pass over everything."""
        traces, constants, zeros = [], [], 0
        for name in self.parts[-1].names:
            for block, _ in rows_of(self.parts[-1].shape(name), None):
                if self.anchors is None:
                    total = self._sum(name, block)
                else:
                    total, _, constant = self._joined(name, block)
                    constants.append(constant)
                traces.append(total.sum().item())
                zeros += total.numel() - int(total.count_nonzero())
        size = sum(prod(self.parts[-1].shape(name)) for name in self.parts[-1].names)
        return Totals(num_parameters=size, trace=math.fsum(traces), zeros=zeros), math.fsum(constants)

    def _sum(self, name: str, index: Index | None) -> Tensor:
        total = _per_token(self.parts[0], name, index).mul_(self.coefficients[0])
        for part, coefficient in zip(self.parts[1:], self.coefficients[1:], strict=True):
            total.add_(_per_token(part, name, index).mul_(coefficient))
        return total

    def _joined(self, name: str, index: Index | None) -> tuple[Tensor, Tensor, float]:
        assert self.anchors is not None
        return joined(
            [
                (coefficient, _per_token(part, name, index), anchor.read(name, index))
                for coefficient, part, anchor in zip(self.coefficients, self.parts, self.anchors, strict=True)
            ]
        )

    def _by_rows(self, name: str, index: Index | None, make: Callable[[Index | None], Tensor]) -> Tensor:
        out = torch.empty(0)
        for block, rows in rows_of(self.parts[-1].shape(name), index):
            values = make(block)
            if rows is None:
                return values.float()
            if rows.start == 0:
                length = len(range(self.parts[-1].shape(name)[0])[index[0] if index else slice(None)])
                out = torch.empty((length, *values.shape[1:]))
            out[rows] = values
        return out


def rows_of(shape: tuple[int, ...], index: Index | None) -> Iterator[tuple[Index | None, slice | None]]:
    """
    A read of `index` in pieces of at most `BLOCK` entries (or one row): what to read, and which rows of the result that is.
    `(None, None)` for a scalar, which has no rows.
    """
    if not shape:
        yield None, None
        return
    first, *rest = index or (slice(None),)
    rows = range(shape[0])[first]
    width = prod(len(range(size)[part]) for size, part in zip(shape[1:], rest, strict=False)) * prod(shape[1 + len(rest) :])
    step = max(1, BLOCK // max(1, width))
    for start in range(0, max(1, len(rows)), step):
        piece = rows[start : start + step]
        yield (slice(piece.start, piece.stop, piece.step), *rest), slice(start, start + len(piece))


def folded(parts: list[FisherInformation], decay: float, bases: Sequence[BaseModel]) -> tuple[Manifest, Reader, Reader | None]:
    """Manifest, reader of F and reader of θ̄ (`None`: the base's weights), see [`FisherInformation.fold`]."""
    if not parts:
        raise ConfigError("`fold` needs at least one Fisher.")
    if not 0 < decay <= 1:
        raise ConfigError(
            f"`decay: {decay}` must be above 0 and at most 1: each older Fisher is multiplied by it once per later one. 1 "
            "keeps all of them in full; to drop the old ones, leave them out."
        )
    newest = parts[-1]
    for number, older in enumerate(parts[:-1]):
        if twice := [part for part in parts[number + 1 :] if part.sha256 == older.sha256]:
            raise ConfigError(
                f"'{older.source}' and '{twice[0].source}' are the same Fisher (sha256 {older.sha256[:12]}), and its penalty "
                "would count twice. Remove one of them; to hold more, raise `ewc_lambda`."
            )
        _check_pair(older, newest)
    coefficients = [float(decay) ** (len(parts) - 1 - k) for k in range(len(parts))]
    manifests = [part.manifest for part in parts]
    one_base = len({m.base_model.fingerprint for m in manifests}) == 1 and not any(part.has_own_anchor for part in parts)
    lazy = LazyFold(parts, coefficients, None if one_base else [_anchor(part, bases) for part in parts])
    totals, constant = lazy.totals()
    for manifest, coefficient in zip(manifests, coefficients, strict=True):
        constant += coefficient * (manifest.fold.constant if manifest.fold else 0.0)
    record = FoldRecord(
        pairs=[
            FoldedPair(
                fisher_sha256=part.sha256,
                base_id=part.manifest.base_model.id,
                base_revision=part.manifest.base_model.revision,
                base_sha256=part.manifest.base_model.fingerprint,
                coefficient=coefficient,
                trace=part.trace,
            )
            for part, coefficient in zip(parts, coefficients, strict=True)
        ],
        decay=float(decay),
        constant=constant,
        anchor=None if one_base else {},
    )
    manifest = Manifest(
        base_model=newest.manifest.base_model,
        probes=[
            replace(probe, weight=probe.weight * coefficient)
            for manifest, coefficient in zip(manifests, coefficients, strict=True)
            for probe in manifest.probes
        ],
        estimator=EstimatorRecord(
            labels=common(parts, "labels", "mixed"),
            granularity=common(parts, "granularity", "mixed"),
            reduction="mean_per_scored_token",
            normalizer=1.0,
            accumulation_dtype=common(parts, "accumulation_dtype", "mixed"),
            model_dtype=common(parts, "model_dtype", "mixed"),
            seed=common(parts, "seed", None),
            path=common(parts, "path", "mixed"),
            max_length=common(parts, "max_length", None),
        ),
        storage=Storage(codec="float32", shards={}),
        parameters=newest.manifest.parameters,
        totals=totals,
        versions=versions(),
        fold=record,
    )
    return manifest, lazy.fisher, None if one_base else lazy.anchor


def _per_token(part: FisherInformation, name: str, index: Index | None) -> Tensor:
    return part.read(name, index).double().div_(part.normalizer)


def _anchor(part: FisherInformation, bases: Sequence[BaseModel]) -> AnchorTensors | FoldedAnchor:
    own = part.manifest.base_model
    try:
        return part.anchor(part.names, next((base for base in bases if base.same_weights(own)), None))
    except DataError as error:
        raise DataError(
            f"the Fisher '{part.source}' is folded with its anchor, the weights of '{own.label}', and these are not where they "
            f"were:\n    {error}\nSay where they are: `hf-ewc fisher fold … --bases FOLDER`, or `fold(…, "
            "bases=[BaseModel.resolve(FOLDER)])`. Nothing was written."
        ) from None


def _check_pair(older: FisherInformation, newest: FisherInformation) -> None:
    ours, theirs = older.manifest, newest.manifest
    tokenizer = theirs.base_model.tokenizer_sha256
    rows = [row for row in base_rows(ours.base_model, theirs.base_model, tokenizer) if row[0] != "weights"]
    rows += parameter_rows(ours.parameters, theirs.parameters)
    if rows:
        raise FisherMismatchError(
            f"the Fishers '{older.source}' and '{newest.source}' cannot be folded: their models differ in more than their "
            f"weights.\n{table(rows, 'older', 'newest')}\n"
            "Fold Fishers of one model and of checkpoints that were trained from it, with its tokenizer."
        )
    for field in ("labels", "granularity"):
        a, b = (getattr(manifest.estimator, field) for manifest in (ours, theirs))
        if a != b:
            logger.warning(
                "The Fishers '%s' and '%s' were estimated with different %s (%s and %s): their sum is exact, but one may count "
                "more per token than the other.",
                older.source,
                newest.source,
                field,
                a,
                b,
            )

"""Several Fishers of one base, folded into one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import ConfigError, FisherMismatchError
from .files import Index, Reader
from .fit import base_rows, parameter_rows, table
from .manifest import Manifest, Storage

if TYPE_CHECKING:
    from .store import FisherInformation


def mixture(parts: list[FisherInformation], weights: Sequence[float] | None) -> tuple[Manifest, Reader]:
    """Manifest (without totals) and reader of Σₖ wₖ Sₖ / Tₖ, see [`FisherInformation.mix`]."""
    shares = _shares(len(parts), weights)
    first = parts[0]
    for other in parts[1:]:
        _check_pair(first, other)
    if own := [part.source for part in parts if part.has_own_anchor]:
        raise FisherMismatchError(
            f"the Fisher '{own[0]}' was folded from several bases and pulls to an anchor of its own, which a mixture would "
            "lose. Mix first and fold then: `FisherInformation.fold([…])`, or `hf-ewc fisher fold`."
        )

    def read(name: str, index: Index | None) -> Tensor:
        total = first.per_token(name, index).mul_(shares[0])
        for part, share in zip(parts[1:], shares[1:], strict=True):
            total.add_(part.per_token(name, index), alpha=share)
        return total

    records = [part.manifest.estimator for part in parts]
    manifest = replace(
        first.manifest,
        probes=[
            replace(probe, weight=probe.weight * share)
            for part, share in zip(parts, shares, strict=True)
            for probe in part.manifest.probes
        ],
        estimator=replace(
            first.manifest.estimator,
            reduction="mean_per_scored_token",
            normalizer=1.0,
            model_dtype=common(parts, "model_dtype", "mixed"),
            path=common(parts, "path", "mixed"),
            seed=common(parts, "seed", None),
            max_length=common(parts, "max_length", None),
            draws=common(parts, "draws", None),
            batch_size=common(parts, "batch_size", None),
            fallback=list(dict.fromkeys(name for record in records for name in record.fallback)),
            self_check=max((r.self_check for r in records if r.self_check is not None), default=None),
            trace_stderr=None,  # each part has its own; of the sum nothing is recorded
            stability=[figures for record in records for figures in record.stability],
        ),
        storage=Storage(codec="float32", shards={}),
        fold=None,
    )
    return manifest, read


def common(parts: Sequence[FisherInformation], field: str, otherwise: Any) -> Any:
    """What the estimator records of all parts say in `field`, or `otherwise` where they differ."""
    values = {getattr(part.manifest.estimator, field) for part in parts}
    return values.pop() if len(values) == 1 else otherwise


def _check_pair(first: FisherInformation, other: FisherInformation) -> None:
    ours, theirs = first.manifest, other.manifest
    rows = base_rows(ours.base_model, theirs.base_model, theirs.base_model.tokenizer_sha256)
    rows += parameter_rows(ours.parameters, theirs.parameters)
    for field in ("labels", "granularity"):
        a, b = (str(getattr(manifest.estimator, field)) for manifest in (ours, theirs))
        rows += [(field, a, b)] if a != b else []
    if rows:
        raise FisherMismatchError(
            f"the Fishers '{first.source}' and '{other.source}' cannot be mixed: their values are not on one scale.\n"
            f"{table(rows, 'first', 'second')}\n"
            "Estimate one of them again (`hf-ewc fisher …`) with the base model and the settings of the other."
        )


def _shares(count: int, weights: Sequence[float] | None) -> list[float]:
    if count == 0:
        raise ConfigError("`mix` needs at least one Fisher.")
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(given) != count or not all(math.isfinite(w) and w >= 0 for w in given) or sum(given) == 0:
        raise ConfigError(f"`weights` must be {count} finite numbers ≥ 0, not all 0: one per Fisher. Got {weights}.")
    return [weight / sum(given) for weight in given]

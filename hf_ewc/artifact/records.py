"""Records inside `fisher_config.json` that say which files there are, and what a folded Fisher was made of."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(kw_only=True)
class ShardRecord:
    """One safetensors file: its hash and its size in bytes."""

    sha256: str
    size: int


@dataclass(kw_only=True)
class FoldedPair:
    """
    One (Fisher, anchor) pair that went into a fold.

    Args:
        fisher_sha256 (`str`): digest of the Fisher, see [`FisherInformation.sha256`].
        base_id (`str`), base_revision (`str`, *optional*), base_sha256 (`str`): the base model at which it was measured, and
            the fingerprint of its weights. They are its anchor, unless it is a fold itself and brings its own.
        coefficient (`float`): cₖ, which its F (per scored token) was multiplied by.
        trace (`float`): Σᵢ Fᵢ of it per scored token, before that.
    """

    fisher_sha256: str
    base_id: str
    base_revision: str | None
    base_sha256: str
    coefficient: float
    trace: float


@dataclass(kw_only=True)
class FoldRecord:
    """
    What a folded Fisher was made of, see [`FisherInformation.fold`].

    Args:
        pairs (`list[FoldedPair]`): oldest first. `base_model` of the manifest is that of the last one.
        decay (`float`): γ, by which each pair was multiplied once per later one.
        constant (`float`): nats per token by which the sum of the folded penalties exceeds the one penalty, everywhere.
        anchor (`dict[str, ShardRecord]`, *optional*): files with the anchor θ̄, one float32 tensor per parameter. `None` when
            all pairs share one base: then its weights are the anchor, as for any other Fisher.
    """

    pairs: list[FoldedPair]
    decay: float
    constant: float
    anchor: dict[str, ShardRecord] | None = None

    def problems(self) -> list[str]:
        """Values of the right type that still make no sense."""
        found = []
        if not self.pairs:
            found.append("fold.pairs is empty")
        found += [
            f"fold.pairs[{n}].coefficient must be a finite number above 0, is {pair.coefficient}"
            for n, pair in enumerate(self.pairs)
            if not 0 < pair.coefficient < math.inf
        ]
        if not 0 < self.decay <= 1:
            found.append(f"fold.decay must be above 0 and at most 1, is {self.decay}")
        if not 0 <= self.constant < math.inf:
            found.append(f"fold.constant must be a finite number ≥ 0, is {self.constant}")
        if self.anchor is None and len({pair.base_sha256 for pair in self.pairs}) > 1:
            found.append("fold.anchor is missing, although the pairs have different bases")
        return found

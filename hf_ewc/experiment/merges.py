"""The models of a sweep that are made after training: its λ = 0 run, taken part of the way back to the base."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import BaseModel, FisherInformation
from ..config import raise_problems
from ..errors import ConfigError
from ..merge import merge_models, setting_problems
from .records import check_recorded, read_json

HOW = {"merge": "merge_lambda", "interpolate": "interpolate"}
"""Mode → the setting of [`merge_models`] that holds its strength, and the field of its row in `results.json`."""


@dataclass(frozen=True)
class Merge:
    """
    One such model.

    Args:
        mode (`str`): `"merge"` or `"interpolate"`.
        strength (`float`): λ, or the share of the way back.
        out, plain (`Path`): its folder, and that of the λ = 0 run.
        base ([`BaseModel`]): what both go back to.
        fisher ([`FisherInformation`], *optional*): which weights go how far; `None` for an interpolation.
        record (`dict`): what it is made of.
    """

    mode: str
    strength: float
    out: Path
    plain: Path
    base: BaseModel
    fisher: FisherInformation | None
    record: dict[str, Any]

    @property
    def title(self) -> str:
        return f"{self.mode}, " + (f"λ = {self.strength:g}" if self.mode == "merge" else f"{100 * self.strength:g} % back")

    def possible(self) -> bool:
        """Whether there is something to go back from: a λ = 0 run that diverged may hold weights that are no numbers."""
        texts = read_json(self.plain / "result.json")["metrics"]["texts"]
        return all(math.isfinite(score["bits_per_byte"]) for score in texts.values())

    def finished(self) -> bool:
        """Whether it is there, measured, and of the λ = 0 run as it is now."""
        path = self.out / "result.json"
        return path.is_file() and read_json(path)["of"] == self._weights_of_plain()

    def make(self) -> dict[str, Any]:
        """Merge; returns what belongs in `result.json` beside the measurements."""
        # Without a result.json nobody has looked at what lies there, and a killed merge leaves hidden folders beside its own.
        for left in (self.out, *self.out.parent.glob(f".*-{self.out.name}-*")):
            shutil.rmtree(left, ignore_errors=True)
        started = time.monotonic()
        how = {"merge_lambda": None, HOW[self.mode]: self.strength}
        merged = merge_models(
            self.base.id,
            self.plain,
            self.fisher,
            output_dir=self.out,
            revision=self.base.revision,
            **how,  # type: ignore[arg-type]
        )
        log = {"way_back": merged.groups["all"].way}
        return {"settings": self.record, "of": self._weights_of_plain(), "log": log, "seconds": time.monotonic() - started}

    def row(self) -> dict[str, Any]:
        """Its entry in `results.json`: trained with λ = 0, like the model that it was made from."""
        result = read_json(self.out / "result.json")
        shown = {key: result[key] for key in ("metrics", "log", "seconds")}
        return {"mode": self.mode, "ewc_lambda": 0.0, HOW[self.mode]: self.strength, **shown}

    def _weights_of_plain(self) -> str:
        return read_json(self.plain / "result.json")["metrics"]["model"]["fingerprint"]


def plan_merges(
    merges: Sequence[tuple[str, float]],
    plain: Path,
    base: BaseModel,
    fisher: FisherInformation | None,
    record: dict[str, Any],
) -> list[Merge]:
    """
    Check all that can be checked before the λ = 0 run is trained.

    Args:
        merges (sequence of `(str, float)`): mode and λ, or share.
        plain (`Path`): folder of the λ = 0 run; the merges lie beside it.
        base ([`BaseModel`]): that it is trained from.
        fisher ([`FisherInformation`], *optional*): measured there.
        record (`dict`): what the λ = 0 run is made of.

    Raises:
        [`ConfigError`], [`FisherMismatchError`]: impossible settings, no Fisher or another model's, or a merge of that name
            that was begun with other settings.
    """
    problems = [f"`merges: {mode}` is not one of {', '.join(HOW)}." for mode, _ in merges if mode not in HOW]
    for mode, strength in merges:
        if mode in HOW:
            problems += setting_problems(
                **{"merge_lambda": None, "interpolate": None, HOW[mode]: strength}, ewc_missing="error", dtype=None
            )
        if math.isinf(strength):
            problems.append(f"`merges: {mode} {strength}` must be finite: results.json holds no infinity.")
    raise_problems("these merges cannot be made; nothing was started", problems)
    by_fisher = any(mode == "merge" for mode, _ in merges)
    if by_fisher and fisher is None:
        raise ConfigError("a merge takes each weight back by its importance, and no `fisher` is named. Nothing was started.")
    if by_fisher and fisher is not None:
        fisher.check_base(base)
    planned = []
    for mode, strength in merges:
        own = fisher if mode == "merge" else None
        made_of = {**record, "fisher": own.sha256 if own else None, HOW[mode]: strength}
        planned.append(Merge(mode, strength, plain.with_name(f"{mode}-{strength:g}"), plain, base, own, made_of))
        check_recorded(planned[-1].out / "result.json", made_of)
    return planned

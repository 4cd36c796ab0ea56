"""Where a page's models come from, and where the trace of their Fisher lies, as plain data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
from pyarrow import ArrowException

from ..artifact import card, picture
from ..errors import DataError, EWCError
from ..hub import count, is_repo_id, page
from ..publish import origins
from .sources import SUMMARY, Source, Sources, said


@dataclass(frozen=True)
class LayerShare:
    """Shares of the Fisher's `trace` and of all `parameters`; `where` as in the card's picture: `"0"`, `"final norm"`."""

    where: str
    layer: int | None
    group: str
    trace: float
    parameters: float


@dataclass(frozen=True)
class LineageLink:
    """
    One thing that the page's models came from.

    Parameters:
        what (`str`): `"adapted model"`, `"base model"`, `"Fisher"`, `"probe"` or `"training data"`.
        name (`str`, *optional*): Id on the Hub, or the last part of a path.
        commit, sha256, url (`str`, *optional*): All 40 digits; of the weights, or of a Fisher's manifest; page on the Hub.
        verified (`bool`, *optional*): Whether it is what training recorded, by its hash; `None` where that is unknown.
        note (`str`): What was compared, or how it was made.
    """

    what: str
    name: str | None
    commit: str | None = None
    sha256: str | None = None
    url: str | None = None
    verified: bool | None = None
    note: str = ""


def layer_shares(known: Sources) -> tuple[LayerShare, ...]:
    """By layer and kind of tensor, from the summary of the page's Fisher."""
    fisher = known.fisher
    try:
        tensors = pq.read_table(fisher.summary).to_pylist()
        traces = picture.trace_bars(tensors)
        sizes = picture.trace_bars([{**row, "trace": row["numel"]} for row in tensors])
    except (OSError, ArrowException, KeyError, TypeError) as error:
        raise DataError(
            f"the Fisher '{fisher.source.name}' has no {SUMMARY} that can be read ({type(error).__name__}), so where it lies "
            "is not shown. Save it again, or download it again."
        ) from error
    found = tuple(
        LayerShare(where, int(where) if where.isdecimal() else None, group, share, sizes[where][group])
        for where, groups in traces.items()
        for group, share in groups.items()
    )
    if not all(math.isfinite(each.trace) for each in found):
        raise DataError(f"{SUMMARY} of the Fisher '{fisher.source.name}' holds numbers that are not finite. Estimate it again.")
    return found


def model_links(known: Sources) -> list[LineageLink]:
    """The adapted model and its base, whose weights are compared with those that training recorded."""
    links = []
    state = known.tried("lineage", lambda: known.state) or {}
    if adapted := known.tried("lineage", lambda: known.model("adapted")):
        note = known.tried("lineage", lambda: _training(state)) or ""
        links.append(_model_link("adapted model", adapted, known.fingerprint("adapted"), None, note))
    if base := known.tried("lineage", lambda: known.model("base")):
        digest = known.fingerprint("base")
        same, note = _compared(origins.base_of(state).sha256, digest, "the weights that the adapted model was trained from")
        links.append(_model_link("base model", base, digest, same, note))
    return links


def fisher_links(known: Sources) -> list[LineageLink]:
    """The Fisher and its probes; of one that does not lie here, what training recorded."""
    try:
        fisher = known.fisher
    except EWCError as error:
        parts = known.tried("lineage", lambda: [origins.fisher_of(part) for part in origins.parts_of(known.state)])
        return [_origin_link(part, said(error)) for part in parts or ()]
    source, manifest = fisher.source, fisher.manifest
    same, note = _compared(fisher.recorded, manifest.digest, "the Fisher that the adapted model was trained with")
    base = known.fingerprint("base")
    if base and base != manifest.base_model.fingerprint:
        same, note = False, f"measured at other weights than the base's: sha256 {manifest.base_model.fingerprint}"
    url = None if source.folder else page(source.name, "dataset", source.commit)
    links = [LineageLink("Fisher", source.name, source.commit, manifest.digest, url, same, note)]
    for probe in manifest.probes:
        on_hub = card.hub_dataset(probe.dataset, probe.revision)
        origin = origins.Origin("probe", probe.dataset, on_hub, probe.revision, config=probe.config, split=probe.split)
        size = f"{count(probe.examples, 'example')}, {count(probe.scored_tokens, 'scored token')}"
        links.append(_origin_link(origin, f"{probe.kind}: {size}"))
    return links


def data_links(known: Sources) -> list[LineageLink]:
    """The training data, as they were recorded; data are not fetched."""
    origin = origins.data_of(known.state)
    return [_origin_link(origin)] if origin.source else []


def _training(state: Mapping[str, Any]) -> str:
    """How a model was trained, and what was done to it afterwards."""
    strength, steps, merged = state.get("ewc_lambda"), state.get("global_step"), state.get("merge") or {}
    parts = [f"λ = {strength:g}"] if isinstance(strength, (int, float)) else []
    parts += [str(state["ewc_mode"])] if state.get("ewc_mode") else []
    parts += [count(steps, "step")] if isinstance(steps, int) else []
    if merged.get("interpolate") is not None:
        parts.append(f"then {100 * merged['interpolate']:g} % of the way back to the base")
    elif merged.get("merge_lambda") is not None:
        parts.append(f"then taken back with λ = {merged['merge_lambda']}")
    return ", ".join(parts)


def _compared(recorded: str | None, found: str | None, what: str) -> tuple[bool | None, str]:
    if not recorded or not found:
        return None, ""
    if recorded == found:
        return True, f"{what}, by their hash"
    return False, f"not {what}: recorded was sha256 {recorded}"


def _model_link(what: str, source: Source, digest: str | None, same: bool | None, note: str) -> LineageLink:
    url = None if source.folder else page(source.name, "model", source.commit)
    return LineageLink(what, source.name, source.commit, digest, url, same, note)


def _origin_link(origin: origins.Origin, note: str = "") -> LineageLink:
    name = " · ".join(part for part in (origin.id, origin.config, origin.split) if part) or None
    commit = origin.revision if re.fullmatch("[0-9a-f]{40}", origin.revision or "") else None
    linked = origin.on_hub and origin.source is not None and is_repo_id(origin.source)
    url = page(str(origin.source), origin.repo_type, commit) if linked else None
    return LineageLink(origin.what, name, commit, origin.sha256, url, None, note)

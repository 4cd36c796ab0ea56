"""What a checkpoint was made from, as `ewc_state.json` names it: base model, Fishers, training data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..artifact import card
from ..hub import page

UNKNOWN = "not recorded"


@dataclass(frozen=True)
class Origin:
    """
    One of the things that a checkpoint, or a Fisher, was made from.

    Args:
        what (`str`): `"base model"`, `"Fisher"`, `"training data"` or `"probe"`.
        source (`str`, *optional*): id on the Hub, or path as the user gave it; `None` if it was not recorded.
        on_hub (`bool`): whether `source` is an id on the Hub. A path means nothing on another machine.
        revision (`str`, *optional*): its commit.
        sha256 (`str`, *optional*): digest of a Fisher, fingerprint of a base model's weights.
        config, split (`str`, *optional*): of a dataset.
        coefficient (`float`, *optional*): of a Fisher that was folded with others.
    """

    what: str
    source: str | None
    on_hub: bool = False
    revision: str | None = None
    sha256: str | None = None
    config: str | None = None
    split: str | None = None
    coefficient: float | None = None

    @property
    def id(self) -> str | None:
        """The name that may be shown: whole for the Hub, the last component of a path."""
        return self.source if self.on_hub or self.source is None else card.last_part(self.source)

    @property
    def repo_type(self) -> str:
        return "model" if self.what == "base model" else "dataset"

    def markdown(self) -> str:
        """Its name, as a link to the commit where there is one."""
        if self.source is None:
            return UNKNOWN
        return f"[{self.id}]({page(self.source, self.repo_type, self.revision)})" if self.on_hub else f"`{self.id}`"

    def record(self) -> dict[str, Any]:
        """For the front matter's `lineage:`: the same for programs."""
        found = {key: getattr(self, key) for key in ("what", "id", "revision", "sha256", "config", "split", "coefficient")}
        return {key: value for key, value in found.items() if value is not None}


def base_of(state: Mapping[str, Any]) -> Origin:
    anchor = state.get("anchor") or (state.get("merge") or {}).get("base") or {}
    revision = anchor.get("revision")
    return Origin("base model", anchor.get("id"), bool(revision), revision, anchor.get("fingerprint"))


def parts_of(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of a state's Fishers: none, one, or those that were folded, oldest first."""
    fisher = state.get("fisher")
    return list(fisher.get("fold") or [fisher]) if fisher else []


def fisher_of(part: Mapping[str, Any]) -> Origin:
    """One of [`parts_of`]."""
    on_hub = bool(part.get("repo_id"))
    name, revision = part["repo_id"] if on_hub else part.get("source"), part.get("revision")
    return Origin("Fisher", name, on_hub, revision, part.get("sha256"), coefficient=part.get("coefficient"))


def data_of(state: Mapping[str, Any]) -> Origin:
    data = state.get("data") or {}
    name, revision = data.get("dataset"), data.get("revision")
    on_hub = card.hub_dataset(name, revision)
    return Origin("training data", name, on_hub, revision, config=data.get("config"), split=data.get("split"))

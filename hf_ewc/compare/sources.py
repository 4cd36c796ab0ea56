"""Where a page's models and their Fisher lie, and what was recorded of them: each found once, without downloading weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants

from ..artifact import BaseModel, Manifest, locate
from ..config import CompareConfig
from ..errors import ConfigError, DataError, EWCError, HubError
from ..files import STATE_FILE
from ..hub import fetch, is_repo_id, pin
from ..publish import origins, read_state, remote_fingerprint, remote_state
from .problems import problem_code, public_message

logger = logging.getLogger(__name__)

T = TypeVar("T")

MANIFEST, SUMMARY = "fisher_config.json", "summary/params.parquet"
_ASIDE = re.compile(r"\s*Nothing was \w+\.")  # what our errors say of commands; a page was asked to do nothing


@dataclass(frozen=True)
class Note:
    """
    Why a part of the page is missing.

    Parameters:
        part (`str`): `"results"`, `"headline"`, `"layers"` or `"lineage"`.
        code (`str`): `"offline"`, `"no_state"`, or as of [`problem_code`].
        text (`str`): It, fit for the page.
    """

    part: str
    code: str
    text: str


@dataclass(frozen=True)
class Source:
    """A model or a Fisher: `folder` here, or `name` and `commit` on the Hub. Of a folder, `name` is the last part alone."""

    name: str
    folder: Path | None = None
    commit: str | None = None


@dataclass(frozen=True)
class FisherSource:
    """A Fisher with its manifest, where its summary would be, and the hash of it that training recorded."""

    source: Source
    manifest: Manifest
    summary: Path
    recorded: str | None


class Sources:
    """
    What the settings of a page name.

    Attributes:
        notes (`list[Note]`): what could not be read.
    """

    def __init__(self, config: CompareConfig) -> None:
        self.config = config
        self.notes: list[Note] = []
        self._known: dict[Any, tuple[Any, Exception | None]] = {}

    def tried(self, part: str, read: Callable[[], T]) -> T | None:
        """What `read` gives; if it fails, `None` and a note."""
        try:
            return read()
        except Exception as error:
            self.notes.append(Note(part, problem_code(error), said(error)))
            return None

    def model(self, role: str) -> Source:
        """The base or the adapted model."""
        return self._once(role, lambda: self._model(role))

    def fingerprint(self, role: str) -> str | None:
        """Hash of a model's weights: of one on the Hub by the Hub's hashes, or offline, of what the cache holds."""
        return self.tried("lineage", lambda: self._once(("fingerprint", role), lambda: _fingerprint(self.model(role))))

    @property
    def state(self) -> dict[str, Any]:
        """`ewc_state.json` of the adapted model; empty, with a note, if it has none."""
        return self._once("state", self._state)

    @property
    def fisher(self) -> FisherSource:
        """The page's Fisher, without its values."""
        return self._once("fisher", self._fisher)

    @property
    def on_hub(self) -> bool:
        """Whether anything that was found lies on the Hub."""
        found = [value.source if isinstance(value, FisherSource) else value for value, _ in self._known.values()]
        return any(isinstance(each, Source) and each.folder is None for each in found)

    def named_fisher(self) -> tuple[str, str | None, str | None]:
        """Name, revision and recorded hash of the page's Fisher."""
        recorded = origins.parts_of(self.state) if self.config.adapted else []
        if self.config.fisher:
            digest = recorded[0].get("sha256") if len(recorded) == 1 else None
            return self.config.fisher, self.config.fisher_revision, digest
        if not recorded:
            raise ConfigError(f"no Fisher is named: neither in the settings (`fisher`) nor in {STATE_FILE} of the adapted one.")
        if len(recorded) > 1:
            raise ConfigError(
                f"the adapted model was trained with {len(recorded)} Fishers, folded for that run only. Store that fold "
                "(`hf-ewc fisher fold … --output_dir FOLD`) and name it (`fisher`)."
            )
        origin = origins.fisher_of(recorded[0])
        # what comes from the Hub must not make this machine look into its own folders
        if origin.source is None or not (origin.on_hub or self.model("adapted").folder):
            raise ConfigError(
                f"the Fisher of the adapted model, '{origin.id or 'in memory'}', was recorded as it lay on the machine that "
                "it was trained on. Name it (`fisher`)."
            )
        return origin.source, origin.revision, origin.sha256

    def _once(self, key: Any, read: Callable[[], Any]) -> Any:
        """Asked for again, a failure fails at once: the Hub may have taken its time to refuse."""
        if key not in self._known:
            try:
                self._known[key] = read(), None
            except Exception as error:
                self._known[key] = None, error
        value, failure = self._known[key]
        if failure:
            raise failure
        return value

    def _model(self, role: str) -> Source:
        name, revision = getattr(self.config, role), getattr(self.config, f"{role}_revision")
        if name and Path(name).expanduser().is_dir():
            return _local(name)
        if not name or not is_repo_id(name):
            raise DataError(f"the {role} model '{name or ''}' is neither a folder on this machine nor an id on the Hub.")
        return Source(name, None, pin(name, "model", revision))

    def _state(self) -> dict[str, Any]:
        adapted = self.model("adapted")
        try:
            state = read_state(adapted.folder) if adapted.folder else remote_state(adapted.name, adapted.commit)
        except (DataError, HubError) as error:
            absent = not (adapted.folder / STATE_FILE).is_file() if adapted.folder else "no such file" in str(error)
            if not absent:
                raise
            text = f"'{adapted.name}' holds no {STATE_FILE}: what it was trained from, and on which data, was not recorded."
            self.notes.append(Note("lineage", "no_state", text))
            return {}
        parts = ("anchor", "fisher", "data", "merge")
        if not isinstance(state, dict) or not all(isinstance(state.get(part) or {}, dict) for part in parts):
            raise DataError(f"{STATE_FILE} of '{adapted.name}' is not as training writes it. Copy the model again.")
        return state

    def _fisher(self) -> FisherSource:
        name, revision, recorded = self.named_fisher()
        if Path(name).expanduser().is_dir():
            found = _local(name)
            folder = found.folder
        else:
            repo_id, commit = locate.pinned(name, revision)
            found, folder = Source(repo_id, None, commit), fetch(repo_id, "dataset", commit, [MANIFEST, SUMMARY])
        assert folder is not None
        if not (folder / MANIFEST).is_file():
            raise DataError(f"'{found.name}' holds no {MANIFEST}, so it is no Fisher. Name what `hf-ewc fisher` wrote.")
        text = (folder / MANIFEST).read_text(encoding="utf-8", errors="replace")
        return FisherSource(found, Manifest.from_json(text, found.name), folder / SUMMARY, recorded)


def said(error: Exception) -> str:
    """What a page may say of an error; the log has the rest of one that is not ours."""
    if not isinstance(error, EWCError):
        logger.error("A part of the page is missing.", exc_info=error)
    return _ASIDE.sub("", public_message(error))


def _local(name: str) -> Source:
    folder = Path(name).expanduser().resolve()
    return Source(folder.name, folder)


def _fingerprint(source: Source) -> str | None:
    if source.folder or constants.is_offline_mode():
        return BaseModel.resolve(source.folder or source.name, source.commit).fingerprint
    return remote_fingerprint(source.name, source.commit)

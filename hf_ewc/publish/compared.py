"""What a Space compares, looked up on the Hub: a model, its base, a Fisher, each at a commit; and that they belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..artifact import Manifest
from ..config import raise_problems
from ..errors import ConfigError, DataError, FisherMismatchError
from ..evaluation import load_results
from ..files import STATE_FILE
from ..hub import client, fetch_file, is_repo_id, patiently, pin, plain_errors
from .checkpoint import MANIFEST
from .eval_results import pick_run
from .lineage import remote_fingerprint, remote_state, split_revision
from .origins import base_of, fisher_of, parts_of

_PUSH = {
    "adapted": "hf-ewc push checkpoint --checkpoint {} --repo_id USER/NAME",
    "plain": "hf-ewc push checkpoint --checkpoint {} --repo_id USER/NAME",
    "base": "hf upload USER/NAME {}",
    "fisher": "hf-ewc push fisher --fisher {} --repo_id USER/NAME",
}


@dataclass(frozen=True)
class Part:
    """
    A model or a Fisher on the Hub, at a commit.

    Args:
        files (`tuple[str, ...]`): names of its files.
        open (`bool`): whether anybody may read it: public, and not gated.
    """

    repo_id: str
    commit: str
    repo_type: str = "model"
    files: tuple[str, ...] = ()
    open: bool = True


@dataclass(frozen=True)
class Compared:
    """What a Space compares; `plain` is the same training without EWC, `notes` what is no mistake, but to be known."""

    base: Part
    adapted: Part
    fisher: Part | None = None
    plain: Part | None = None
    notes: tuple[str, ...] = ()

    @property
    def models(self) -> list[Part]:
        return [self.base, self.adapted, *([self.plain] if self.plain else [])]

    @property
    def closed(self) -> list[str]:
        """What the Space can only read with a token of its own."""
        parts = (*self.models, self.fisher)
        return [f"{part.repo_type} {part.repo_id}" for part in parts if part is not None and not part.open]

    def at(self, adapted: str, fisher: str) -> Compared:
        """The same at the commits that a release has made by now."""
        assert self.fisher is not None
        return replace(self, adapted=replace(self.adapted, commit=adapted), fisher=replace(self.fisher, commit=fisher))


def find_compared(
    adapted: str,
    *,
    base: str | None = None,
    base_revision: str | None = None,
    adapted_revision: str | None = None,
    fisher: str | None = None,
    fisher_revision: str | None = None,
    plain: str | None = None,
    plain_revision: str | None = None,
    results: str | Path | None = None,
    token: str | bool | None = None,
) -> Compared:
    """
    Look everything up, pin it, and compare what was recorded with what lies there. Only reads; no weights are downloaded.

    Args:
        adapted, base, fisher, plain (`str`): ids on the Hub, with or without `@revision`; base and Fisher are by default what
            the adapted model's `ewc_state.json` names. `plain` is the same training without EWC.
        base_revision, adapted_revision, fisher_revision, plain_revision (`str`, *optional*): branch, tag or commit of each.
        results (`str` or `Path`, *optional*): figures, which must be of the adapted model.

    Raises:
        [`ConfigError`]: a folder, a form that no id has, no base known, figures of another model.
        [`DataError`], [`FisherMismatchError`]: a base or a Fisher of other weights; no safetensors.
        [`HubError`]: it is not there, or not for this account.
    """
    named = {"adapted": adapted, "base": base, "fisher": fisher, "plain": plain}
    problems = [found for name, given in named.items() if given is not None for found in _place_problems(name, given)]
    raise_problems("a Space cannot show this; nothing was sent", problems)
    model = model_part(*split_revision(adapted, adapted_revision), token)
    state = remote_state(model.repo_id, model.commit, token) if STATE_FILE in model.files else {}
    notes = (
        [] if state else [f"the model '{model.repo_id}' holds no {STATE_FILE}: that it is one of this base is not verified."]
    )
    measured, manifest = _fisher(fisher, fisher_revision, state, notes, token)
    start, there = find_base(base, base_revision, state, manifest, model.repo_id, token)
    third = None
    if plain is not None:
        third = model_part(*split_revision(plain, plain_revision), token)
        of = remote_state(third.repo_id, third.commit, token) if STATE_FILE in third.files else {}
        _same_weights(third.repo_id, of, start, there)
    if manifest and measured and there and manifest.base_model.fingerprint != there:
        raise FisherMismatchError(
            f"the Fisher '{measured.repo_id}' was not measured on the base '{start.repo_id}', and says nothing about other "
            f"weights:\n    measured on  {manifest.base_model.label}, weights sha256 {manifest.base_model.fingerprint}\n"
            f"    this base    {start.repo_id}@{start.commit[:7]}, weights sha256 {there}\n"
            "Name a Fisher of this base, or leave `fisher` out. Nothing was sent."
        )
    if results is not None:
        figures = load_results(Path(results).expanduser())
        pick_run(figures, state, model.repo_id, remote_fingerprint(model.repo_id, model.commit, token))
    return Compared(start, model, measured, third, tuple(notes))


def find_base(
    given: str | None,
    revision: str | None,
    state: Mapping[str, Any],
    manifest: Manifest | None,
    adapted: str,
    token: str | bool | None = None,
) -> tuple[Part, str | None]:
    """The base of a model, and the fingerprint of its weights by the Hub's hashes; a [`DataError`] if it is another one."""
    start = model_part(*_base(given, revision, state, manifest, adapted), token)
    there = remote_fingerprint(start.repo_id, start.commit, token)
    _same_weights(adapted, state, start, there)
    return start, there


def _same_weights(name: str, state: Mapping[str, Any], start: Part, there: str | None) -> None:
    """As far as the state records the base's weights and the Hub states their hash."""
    recorded = base_of(state)
    if there and recorded.sha256 and there != recorded.sha256:
        raise DataError(
            f"the model '{name}' was not trained from '{start.repo_id}' as it is at this commit, so the page would show two "
            f"models of different origin:\n    trained from  {recorded.id}, weights sha256 {recorded.sha256}\n"
            f"    this base     {start.repo_id}@{start.commit[:7]}, weights sha256 {there}\n"
            "Name the base that it was trained from, and its revision. Nothing was sent."
        )


def model_part(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> Part:
    """A model on the Hub, pinned, with what it holds; a [`DataError`] if it could not be loaded from there."""
    commit = pin(repo_id, "model", revision, token)
    with plain_errors("look at", repo_id, "model", commit):
        info = patiently(partial(client(token).model_info, repo_id, revision=commit))
    files = tuple(entry.rfilename for entry in info.siblings or ())
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise DataError(
            f"the model '{repo_id}' at commit {commit} is none that a Space could load: it needs config.json and safetensors "
            f"weights, and holds {', '.join(files[:8]) or 'nothing'}. Nothing was sent."
        )
    return Part(repo_id, commit, files=files, open=not info.private and not info.gated)


def fisher_part(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> Part:
    """A Fisher on the Hub, pinned."""
    commit = pin(repo_id, "dataset", revision, token)
    with plain_errors("look at", repo_id, "dataset", commit):
        info = patiently(partial(client(token).dataset_info, repo_id, revision=commit))
    return Part(repo_id, commit, "dataset", open=not info.private and not info.gated)


def _place_problems(name: str, given: str) -> list[str]:
    if Path(given).expanduser().is_dir():
        command = _PUSH[name].format(given)
        return [f"`{name}: {given}` is a folder on this machine, and a Space reads from the Hub. Push it first: `{command}`"]
    if not is_repo_id(given.partition("@")[0]):
        return [f"`{name}: {given}` is no id on the Hub: write `user/name`, or `user/name@revision`."]
    return []


def _fisher(
    given: str | None, revision: str | None, state: Mapping[str, Any], notes: list[str], token: str | bool | None
) -> tuple[Part | None, Manifest | None]:
    """The Fisher that is named, or the (newest) one that the model was trained with, where that is on the Hub."""
    recorded = fisher_of(parts_of(state)[-1]) if parts_of(state) else None
    known = recorded is not None and recorded.on_hub
    if given is None and not known:
        why = f"the one of its training, '{recorded.id}', is no id on the Hub" if recorded else "its training names none"
        notes.append(f"the Space has no Fisher ({why}): no λ, no picture by layer. Name one with `fisher`.")
        return None, None
    repo_id, revision = split_revision(given if given is not None else str(recorded and recorded.source), revision)
    if recorded is not None and known and repo_id == recorded.source:
        revision = revision or recorded.revision
    part = fisher_part(repo_id, revision, token)
    path = fetch_file(repo_id, "dataset", part.commit, MANIFEST, token)
    manifest = Manifest.from_json(path.read_text(encoding="utf-8"), repo_id)
    if recorded is not None and recorded.sha256 not in (None, manifest.digest):
        said = f"sha256 {manifest.digest}, and the model was trained with sha256 {recorded.sha256}"
        if given is None:
            raise FisherMismatchError(
                f"the Fisher '{repo_id}' at commit {part.commit} is no longer what the model names: it has {said}. Name "
                "the revision that it was trained with (`fisher_revision`). Nothing was sent."
            )
        notes.append(f"the Fisher '{repo_id}' has {said}: λ on the page moves by this one.")
    return part, manifest


def _base(
    given: str | None, revision: str | None, state: Mapping[str, Any], manifest: Manifest | None, adapted: str
) -> tuple[str, str | None]:
    """Id and revision of the base: the one that is named, that the model's state names, or its Fisher, which has its hash."""
    recorded = base_of(state)
    source, commit = (recorded.source, recorded.revision) if recorded.on_hub else (None, None)
    if source is None and manifest and manifest.base_model.revision and manifest.base_model.fingerprint == recorded.sha256:
        source, commit = manifest.base_model.id, manifest.base_model.revision
    if given is None and source is None:
        why = f"was trained from '{recorded.id}', a folder," if recorded.id else "does not say what it was trained from,"
        raise ConfigError(
            f"the model '{adapted}' {why} and a Space needs the base on the Hub. Upload it (`hf upload USER/NAME FOLDER`) "
            "and name it (`base`, for a release `base_repo`): its weights must have the recorded hash. Nothing was sent."
        )
    repo_id, revision = split_revision(given if given is not None else str(source), revision)
    return repo_id, revision or (commit if repo_id == source else None)

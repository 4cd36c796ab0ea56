"""Where a Fisher lies: a folder here, or a dataset repository on the Hub, pinned to a commit and fetched into the cache."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import EWCError, FisherFormatError, HubError
from ..hub import fetch, fetch_file, is_repo_id, page, pin
from .manifest import Manifest
from .verify import INDEX, MANIFEST, SHARD, SUMMARY

logger = logging.getLogger(__name__)

SHARD_OR_INDEX = re.compile(f"{SHARD.pattern}|{re.escape(INDEX)}")  # and nothing else that a manifest may name
FILES = (MANIFEST, INDEX, SUMMARY, "fisher-*.safetensors", "anchor-*.safetensors")


@dataclass(frozen=True)
class Place:
    """Where a Fisher was found: `folder` here, unless it is streamed; `repo_id` and `commit` if it is on the Hub."""

    folder: Path | None
    repo_id: str | None = None
    commit: str | None = None

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"{self.repo_id}@{self.commit[:7]}" if self.repo_id and self.commit else str(self.folder)


def locate(
    folder_or_id: str,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Place:
    """
    The folder of a Fisher, downloaded if need be. A Hub id is pinned to a commit first, and all files are that commit's.

    Args:
        folder_or_id (`str`): folder, `user/name`, or `user/name@revision`.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        token, cache_dir (*optional*): as for `huggingface_hub`.

    Raises:
        [`EWCError`], [`HubError`]: there is no such folder and no such repository, or no access.
        [`FisherFormatError`]: what is there is no Fisher.
    """
    path = Path(folder_or_id).expanduser()
    if path.is_dir():
        if revision is not None:
            logger.warning("revision '%s' is ignored: '%s' is a local folder.", revision, folder_or_id)
        return Place(path)
    if path.is_file():
        raise FisherFormatError(f"'{folder_or_id}' is a file. Name the folder that holds {MANIFEST}; pickles are not read.")
    repo_id, commit = pinned(folder_or_id, revision, token, cache_dir)
    path = fetch_manifest(repo_id, commit, token, cache_dir)  # first and alone: what is no Fisher is not downloaded
    folder = fetch(repo_id, "dataset", commit, FILES, token, cache_dir)
    # where the Hub refuses to list its files, the client is content with what the cache holds, be it the manifest alone
    for name in (INDEX, *Manifest.from_json(path.read_text(encoding="utf-8"), folder_or_id).files):
        if not (folder / name).is_file() and SHARD_OR_INDEX.fullmatch(name):
            fetch_file(repo_id, "dataset", commit, name, token, cache_dir)
    return Place(folder, repo_id, commit)


def pinned(
    folder_or_id: str, revision: str | None, token: str | bool | None = None, cache_dir: str | Path | None = None
) -> tuple[str, str]:
    """(repository, commit) for an id on the Hub, with or without `@revision`."""
    repo_id, _, suffix = folder_or_id.partition("@")
    if suffix and revision is not None and suffix != revision:
        raise EWCError(f"'{folder_or_id}' names revision '{suffix}', and the setting names '{revision}'. Give one of them.")
    if not is_repo_id(repo_id):
        raise EWCError(
            f"there is no folder '{folder_or_id}'. Estimate a Fisher first: `hf-ewc fisher … --output_dir {folder_or_id}`."
        )
    try:
        return repo_id, pin(repo_id, "dataset", revision or suffix or None, token, cache_dir)
    except HubError as error:
        if "no such repository" in str(error) and _is_model(repo_id, token):
            raise FisherFormatError(
                f"'{repo_id}' is a model on the Hub, and a Fisher is a dataset repository. Name the one of its Fisher; the "
                "card of a model that was trained with hf_ewc links to it."
            ) from None
        raise type(error)(f"there is no folder '{folder_or_id}' here, so it was looked for on the Hub: {error}") from None


def _is_model(repo_id: str, token: str | bool | None) -> bool:
    try:
        return bool(pin(repo_id, "model", None, token))
    except HubError:
        return False


def fetch_manifest(repo_id: str, commit: str, token: str | bool | None = None, cache_dir: str | Path | None = None) -> Path:
    """`fisher_config.json` of a dataset repository."""
    try:
        return fetch_file(repo_id, "dataset", commit, MANIFEST, token, cache_dir)
    except HubError as error:
        if "no such file" not in str(error):
            raise
        raise FisherFormatError(
            f"the dataset '{repo_id}' at commit {commit} holds no {MANIFEST}, so it is not a Fisher, or not one yet: a push "
            f"that was broken off leaves it so. Look at {page(repo_id, 'dataset', commit)}, and push it again if it is yours "
            f"(`hf-ewc push fisher --fisher FOLDER --repo_id {repo_id}`). Nothing was loaded."
        ) from None

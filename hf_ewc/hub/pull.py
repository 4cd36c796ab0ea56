"""Pull: a name becomes a commit, then that commit's files are fetched. What is pushed meanwhile cannot mix with them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from .. import __version__
from ..errors import HubError, HubUnavailableError
from .patience import patiently
from .problems import endpoint, keep_secret, plain_errors

logger = logging.getLogger(__name__)

Token = str | bool | None


@dataclass(frozen=True)
class Licence:
    """The terms of a model as its card states them, under the card's own keys; `None` where it says nothing."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    gated: str | None = None  # "auto" or "manual": a derivative of a gated model should be gated likewise


def client(token: Token = None) -> HfApi:
    """A client that tells the Hub who asks."""
    keep_secret(token)
    return HfApi(token=token, library_name="hf_ewc", library_version=__version__)


def page(repo_id: str, repo_type: str = "model", commit: str | None = None) -> str:
    """The address of a repository's page at the endpoint in use."""
    kind = "" if repo_type == "model" else f"{repo_type}s/"
    return f"{endpoint()}/{kind}{repo_id}{f'/tree/{commit}' if commit else ''}"


def pin(
    repo_id: str,
    repo_type: str = "model",
    revision: str | None = None,
    token: Token = None,
    cache_dir: str | Path | None = None,
) -> str:
    """
    The commit that a branch, a tag or nothing (`main`) stands for now; offline, the one that it stood for last.

    Raises:
        [`HubError`]: no such repository or revision, or no access.
    """
    with plain_errors("find", repo_id, repo_type, revision):
        resolve = partial(client(token).resolve_revision, repo_id, repo_type=repo_type, revision=revision, cache_dir=cache_dir)
        return patiently(resolve).resolved


def fetch(
    repo_id: str,
    repo_type: str,
    commit: str,
    patterns: Sequence[str],
    token: Token = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """
    The folder with a commit's files, from the cache or downloaded into it. What was interrupted goes on where it stopped.

    Args:
        patterns (`Sequence[str]`): which files, as for `snapshot_download`'s `allow_patterns`.
    """
    with plain_errors("download files of", repo_id, repo_type, commit):
        found: Any = snapshot_download(
            repo_id, repo_type=repo_type, revision=commit, allow_patterns=list(patterns), token=token, cache_dir=cache_dir
        )
        return Path(found)


def fetch_file(
    repo_id: str,
    repo_type: str,
    commit: str,
    filename: str,
    token: Token = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """One file of a commit, as [`fetch`] gets many."""
    with plain_errors(f"download {filename} of", repo_id, repo_type, commit):
        found: Any = hf_hub_download(repo_id, filename, repo_type=repo_type, revision=commit, token=token, cache_dir=cache_dir)
        return Path(found)


def licence_of(repo_id: str, revision: str | None = None, token: Token = None) -> Licence | None:
    """
    The terms that a derivative of this model inherits, from its card on the Hub. A model that is not to be seen there (another
    server, gone, no access) has none to read: a warning says so, and `None` is returned.
    """
    try:
        with plain_errors("read the licence of", repo_id, "model", revision):
            info = patiently(partial(client(token).model_info, repo_id, revision=revision))
    except HubUnavailableError:
        raise
    except HubError as error:
        logger.warning("The licence stays unknown: %s", error)
        return None
    card = info.card_data.to_dict() if info.card_data else {}
    said = {key: str(card[key]) for key in ("license", "license_name", "license_link") if card.get(key)}
    return Licence(**said, gated=str(info.gated) if info.gated else None)


def account(token: Token = None) -> dict[str, Any]:
    """Whose token this is: `name`, `orgs`, and what it may do."""
    with plain_errors("log in to", endpoint(), "server"):
        return patiently(client(token).whoami)

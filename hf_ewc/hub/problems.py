"""What the Hub's client raises, as one sentence about what was wrong and one about what to do."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from ..errors import EWCError, HubError, HubUnavailableError
from ..files import is_disk_full

_SECRETS: set[str] = set()
_PASSWORD = re.compile(r"//[^/@\s]+@")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")
_ANSWERS = (HfHubHTTPError, httpx2.TransportError)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
_LOGIN = "Log in with `hf auth login`, or set HF_TOKEN"


def keep_secret(token: str | bool | None) -> None:
    """Remember a token that was handed over, so that no message repeats it."""
    if isinstance(token, str) and token:
        _SECRETS.add(token)


def scrubbed(text: str) -> str:
    """`text` without access tokens: those in use, anything that looks like one, and passwords in addresses."""
    for token in {*_SECRETS, get_token() or ""} - {""}:
        text = text.replace(token, "hf_***")
    return _PASSWORD.sub("//", _TOKEN.sub("hf_***", text))


def endpoint() -> str:
    """The Hub in use, as it may be shown."""
    return _PASSWORD.sub("//", constants.ENDPOINT)


@contextmanager
def plain_errors(action: str, repo_id: str, repo_type: str = "model", revision: str | None = None) -> Iterator[None]:
    """
    Turn what the client raises inside the block into a [`HubError`] or [`HubUnavailableError`] for a person.

    Args:
        action (`str`): what was being done, for the message, with its preposition: "push to", "download x.json from".
        repo_id (`str`), repo_type (`str`): with which repository.
        revision (`str`, *optional*): at which branch, tag or commit.

    A full disk stays the `OSError` that it is, and our own errors pass.
    """
    try:
        yield
    except EWCError:
        raise
    except Exception as error:
        found = _OS_ERROR.search(str(error)) if isinstance(error, RuntimeError) else None
        if found and int(found[1]) in _DISK:  # Xet's way to say what a disk said
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from None
        problem = _problem(error, repo_id, repo_type, revision)
        if problem is None:
            raise
        kind, text = problem
        at = f" at {revision!r}" if revision else ""
        raise kind(f"cannot {action} the {repo_type} '{repo_id}'{at}: {text}") from None


def _problem(error: Exception, repo_id: str, repo_type: str, revision: str | None) -> tuple[type[HubError], str] | None:
    """The kind of error and the sentence; `None` for what is none of the Hub's business."""
    cause = error.__cause__  # what the Hub answered, under what the client made of it ("Error while uploading …")
    if isinstance(error, (LocalEntryNotFoundError, RuntimeError)) and isinstance(
        cause, (HfHubHTTPError, httpx2.TransportError)
    ):
        error = cause
    host = endpoint()
    page = f"{host}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"
    if isinstance(error, HFValidationError):
        return HubError, "this is no id on the Hub, which has the form `user/name` (letters, digits, -, _ and .)."
    if isinstance(error, KeyError) and error.args in (("url",), ("slug",)):  # the client looks for it in the answer 409
        return HubError, f"the name is in conflict with something that is there. Choose another one, or look at {page}"
    if isinstance(error, LocalTokenNotFoundError):
        return HubError, f"this needs an account, and no token was found. {_LOGIN}."
    if isinstance(error, OfflineModeIsEnabled):
        return HubUnavailableError, f"HF_HUB_OFFLINE is set, so {host} is not asked. Unset it and run the same command again."
    if isinstance(error, (RevisionResolutionError, LocalEntryNotFoundError)):
        return HubUnavailableError, _not_cached(repo_id, repo_type, revision)
    if isinstance(error, GatedRepoError):
        return HubError, f"it is gated, and you were not let in. Accept the licence at {page} in the browser. {_LOGIN}."
    if isinstance(error, HfHubHTTPError):
        return _answer(error, host, page, revision)
    if isinstance(error, EntryNotFoundError):
        return HubError, f"it has no such file ({scrubbed(str(error)).splitlines()[0]})."
    if isinstance(error, FileMetadataError) or (isinstance(error, OSError) and "Consistency check failed" in str(error)):
        return HubUnavailableError, (
            f"what arrived was cut off or is not what was announced ({_first_line(error)}). Nothing of it is used. Run the "
            "same command again: it goes on from what arrived."
        )
    if is_disk_full(error):  # `cli.main` has the words for that
        return None
    if refused := re.search(r"HTTP status client error \((401|403|409)", str(error)):  # Xet tells its answers in words only
        return HubError, (
            f"{host} refused the transfer of its large files with status {refused[1]}. Check that this token may write there, "
            f"or read it. {_LOGIN}."
        )
    if "404" in str(error) and re.search("xet-(write|read)-token", str(error)):
        return (
            HubError,
            f"{host} does not speak Xet, the client's way for large files. Set HF_HUB_DISABLE_XET=1, and repeat it.",
        )
    if isinstance(error, (httpx2.TransportError, ConnectionError, TimeoutError)):
        return (
            HubUnavailableError,
            f"{host} cannot be reached ({type(error).__name__}: {_first_line(error)}). Run it again later.",
        )
    if type(error).__module__.startswith("hf_xet") or (isinstance(error, RuntimeError) and _of_xet(str(error))):
        return HubUnavailableError, (
            f"the transfer of its large files failed ({_first_line(error)}). Run the same command again: what arrived is not "
            "sent twice."
        )
    return None


def _answer(error: HfHubHTTPError, host: str, page: str, revision: str | None) -> tuple[type[HubError], str]:
    """For an answer with an error code."""
    status = error.response.status_code
    said = scrubbed(error.server_message or error.response.reason_phrase or "").strip().rstrip(".")
    quoted = f" (the Hub says: {said})" if said else ""
    if status == 401 and "nvalid credentials" in said:
        return HubError, f"the token was refused{quoted}. Make a new one at {host}/settings/tokens. {_LOGIN}."
    if isinstance(error, RepositoryNotFoundError):
        who = "this token's account may not see it" if get_token() else "no token was sent"
        return HubError, f"there is no such repository at {host}, or it is private and {who}. Check the spelling. {_LOGIN}."
    if isinstance(error, RevisionNotFoundError):
        return HubError, f"it has no branch, tag or commit '{revision or 'main'}'. Its versions: {page}/commits/main"
    if isinstance(error, EntryNotFoundError):
        return HubError, f"it has no such file{quoted}. Its files: {page}/tree/{revision or 'main'}"
    if status == 401:
        return HubError, f"this needs an account{quoted}. {_LOGIN}."
    if status == 403:
        return HubError, (
            f"this token may not do that{quoted}. Use a token with write access to this namespace ({host}/settings/tokens), or "
            "another repository."
        )
    if status == 409:
        return HubError, f"it is in conflict with what is there{quoted}. Choose another name, or look at {page}"
    if status == 412:
        return HubError, (
            f"somebody else pushed to it in the meantime{quoted}. Nothing was overwritten. Look at {page}/commits/main, then "
            "run the same command again to push on top of it."
        )
    if status == 416:
        return HubError, f"a file there is shorter than announced{quoted}: it was replaced or damaged. See {page}/tree/main"
    if status == 429:
        return HubUnavailableError, f"{host} answers too many requests{quoted}. Wait some minutes and run it again."
    if status >= 500:
        return HubUnavailableError, f"{host} failed with {status}{quoted}, also when asked again. Run the same command later."
    return HubError, f"{host} answered {status}{quoted}. See {page}"


def _not_cached(repo_id: str, repo_type: str, revision: str | None) -> str:
    options = "" if repo_type == "model" else f" --repo-type {repo_type}"
    options += f" --revision {revision}" if revision else ""
    why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"{endpoint()} could not be reached"
    return f"{why}, and this machine's cache does not hold it. Fetch it once while online: `hf download {repo_id}{options}`."


def _first_line(error: BaseException) -> str:
    lines = scrubbed(str(error)).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _of_xet(text: str) -> bool:
    return any(word in text for word in ("Data processing error", "Task error", "CAS", "xet", "Xet", "xorb"))

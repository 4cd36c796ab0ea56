"""Parts of a file on the Hub, over HTTP ranges: only the bytes that were asked for travel, and nothing is kept on disk."""

from __future__ import annotations

import logging
import re
import threading
import time
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import httpx2
from huggingface_hub import RepoFile, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from .. import __version__
from ..errors import HubError, HubUnavailableError
from .problems import plain_errors, scrubbed
from .pull import Token, client

logger = logging.getLogger(__name__)

_EXPIRED = (400, 401, 403, 410)  # what storage providers answer to a signed link that is too old
_ATTEMPTS = 5  # in a row that bring not one byte; `http_stream_backoff` has its own for 429, 5xx and refused connections
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WHOLE = "Load it without `streaming=True`, which downloads whole files."


@dataclass(frozen=True)
class _Link:
    """Where a file's bytes are served. `signed`: by a storage outside of the Hub, which must not see the token."""

    url: str
    headers: dict[str, str]
    signed: bool


class RemoteFile:
    """
    One file of a commit, read in parts. The Hub is asked once where the content lies; later parts come from there directly,
    until that link expires. Parts can be read from several threads at a time.

    Args:
        repo_id (`str`), repo_type (`str`), commit (`str`): where it is. A commit and no branch: parts of two versions must not
            mix.
        filename (`str`): path in the repository.
        size (`int`): its bytes, as the Hub lists them; each answer is held against it.
        sha256 (`str`, *optional*): of the content, as the Hub lists it for large files.
        token (`str` or `bool`, *optional*): as in `huggingface_hub`. The storage that the Hub links to never gets it.
    """

    def __init__(
        self,
        repo_id: str,
        repo_type: str,
        commit: str,
        filename: str,
        size: int,
        sha256: str | None = None,
        token: Token = None,
    ) -> None:
        self.repo_id, self.repo_type, self.commit, self.filename = repo_id, repo_type, commit, filename
        self.size, self.sha256 = size, sha256
        self._token = token
        self._lock = threading.Lock()
        self._current: _Link | None = None

    def __repr__(self) -> str:
        return f"RemoteFile({self.repo_type} '{self.repo_id}' at {self.commit[:7]}, {self.filename}, {self.size:,} bytes)"

    def read(self, start: int, stop: int) -> bytearray:
        """Bytes `start` to `stop` (exclusive)."""
        buffer = bytearray(max(0, stop - start))
        self.read_into(start, memoryview(buffer))
        return buffer

    def read_into(self, start: int, target: memoryview) -> None:
        """
        Fill `target` with the bytes from `start` on. A connection that drops is taken up again where it broke off.

        Raises:
            [`HubError`], [`HubUnavailableError`]: for anything but exactly these bytes.
        """
        if not 0 <= start <= start + len(target) <= self.size:
            raise ValueError(f"bytes {start} to {start + len(target)} of {self.filename}, which has {self.size}")
        with plain_errors(f"read {self.filename} of", self.repo_id, self.repo_type, self.commit):
            done = failures = 0
            expired: _Link | None = None
            while done < len(target):
                link = self._link(expired)
                arrived, problem = self._ask(link, start + done, target[done:])
                if problem is None:  # the link has expired
                    if expired is not None:
                        raise self._unavailable("the storage refuses the link that the Hub hands out, and a fresh one, too")
                    expired = link
                    continue
                done += arrived
                expired = None
                failures = 0 if arrived else failures + 1
                if failures == _ATTEMPTS:
                    raise self._unavailable(f"no byte arrived in {failures} attempts ({problem})")
                if done < len(target):
                    logger.info("%s: %s; going on at byte %d.", self.filename, problem, start + done)
                    time.sleep(2 ** (failures - 1) if failures else 0)

    def _ask(self, link: _Link, start: int, target: memoryview) -> tuple[int, str | None]:
        """One request: how many bytes arrived, and why not more, should it be fewer. No reason at all: the link has expired."""
        stop, done, problem = start + len(target), 0, "the server sent fewer bytes than were asked for"
        headers = {**link.headers, "Range": f"bytes={start}-{stop - 1}"}
        # Streamed, as an answer with the whole file instead of a part of it must be noticed before it has arrived.
        with http_stream_backoff("GET", link.url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            if link.signed and response.status_code in _EXPIRED:
                return 0, None
            hf_raise_for_status(response)
            announced = self._announced(response, start, stop)
            try:
                for chunk in response.iter_raw():
                    if done + len(chunk) > announced:
                        raise self._unavailable(f"the server sent more than the {announced:,} bytes that it had announced")
                    target[done : done + len(chunk)] = chunk
                    done += len(chunk)
            except httpx2.TransportError as error:  # caught inside: `http_stream_backoff` could not begin again from here
                problem = f"the connection broke off ({type(error).__name__}: {error})"
        return done, problem

    def _announced(self, response: httpx2.Response, start: int, stop: int) -> int:
        """How many bytes follow, if they are a beginning of what was asked for."""
        if encoding := response.headers.get("Content-Encoding", "").replace("identity", ""):
            raise self._refused(f"the server sends parts of it compressed ({encoding})")
        if response.status_code == 200 and (start, stop) == (0, self.size):
            return self.size  # all of it was asked for
        stated = response.headers.get("Content-Range", "")
        match = _CONTENT_RANGE.fullmatch(stated)
        if response.status_code != 206 or match is None:
            raise self._refused(
                f"the server does not serve parts of files: it answered bytes {start} to {stop - 1} with status "
                f"{response.status_code} and Content-Range '{stated}'"
            )
        if match[3] not in ("*", str(self.size)):
            raise self._refused(f"the server has a file of {int(match[3]):,} bytes there, the Hub lists {self.size:,}")
        first, last = int(match[1]), int(match[2])
        if first != start or not first <= last < stop:
            raise self._refused(f"bytes {start} to {stop - 1} were asked for, the server sends {first} to {last}")
        return last + 1 - first

    def _link(self, expired: _Link | None = None) -> _Link:
        """Where the content lies; asked again if that is known to have expired. Other threads wait for the answer."""
        with self._lock:
            if self._current is None or self._current is expired:
                self._current = self._resolve()
            return self._current

    def _resolve(self) -> _Link:
        url = hf_hub_url(self.repo_id, self.filename, repo_type=self.repo_type, revision=self.commit)
        found = get_hf_file_metadata(
            url, token=self._token, library_name="hf_ewc", library_version=__version__, retry_on_errors=True
        )
        if found.size not in (None, self.size):
            raise self._refused(f"the Hub links to a file of {found.size:,} bytes, and lists {self.size:,}")
        etag = found.etag or ""
        if self.sha256 and _SHA256.fullmatch(etag) and etag != self.sha256:
            raise self._refused(f"the Hub links to content with sha256 {etag}, and lists {self.sha256}")
        location = urljoin(url, found.location)
        signed = urlsplit(location)[:2] != urlsplit(url)[:2]
        token = False if signed else self._token
        headers = build_hf_headers(token=token, library_name="hf_ewc", library_version=__version__)
        return _Link(location, {**headers, "Accept-Encoding": "identity"}, signed)

    def _refused(self, why: str) -> HubError:
        return HubError(scrubbed(f"cannot read parts of {self.filename} in {self.repo_type} '{self.repo_id}': {why}. {_WHOLE}"))

    def _unavailable(self, why: str) -> HubUnavailableError:
        return HubUnavailableError(
            scrubbed(
                f"cannot read {self.filename} in {self.repo_type} '{self.repo_id}': {why}. Run it again later. {_WHOLE} What "
                "has arrived of them is kept, then."
            )
        )


def remote_files(repo_id: str, repo_type: str, commit: str, token: Token = None) -> dict[str, RemoteFile]:
    """
    The files at the top of a repository by name, to be read in parts, with the size and sha256 that the Hub lists.

    Raises:
        [`HubError`]: no such repository or commit, or no access.
    """
    with plain_errors("list the files of", repo_id, repo_type, commit):
        # the tree and not `get_paths_info`, which is not retried, and which cannot tell what else is there
        return {
            entry.path: RemoteFile(
                repo_id, repo_type, commit, entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, token
            )
            for entry in client(token).list_repo_tree(repo_id, revision=commit, repo_type=repo_type)
            if isinstance(entry, RepoFile)
        }

"""What a push would change: files compared with a repository by their content, before anything is sent."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from ..errors import HubError
from .patience import patiently
from .problems import plain_errors
from .pull import Token, client

Content = Path | bytes


@dataclass(frozen=True)
class PushPlan:
    """
    What a push would change.

    Args:
        exists (`bool`): whether the repository is there.
        private (`bool`, *optional*): whether it is private; `None` where it does not exist yet.
        parent (`str`, *optional*): commit that the plan was made against.
        files, unchanged (`dict[str, int]`): path → bytes, of what is new or different and of what is there already.
        deleted (`list[str]`): files there that go.
        present (`list[str]`): all files there.
        tags (`dict[str, str]`): tag → commit of the repository.
    """

    repo_id: str
    repo_type: str
    revision: str | None
    exists: bool
    private: bool | None
    parent: str | None
    files: dict[str, int]
    unchanged: dict[str, int]
    deleted: list[str]
    present: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of the new and the different files. The Hub may have parts of them already."""
        return sum(self.files.values())

    @property
    def empty(self) -> bool:
        return not self.files and not self.deleted

    def text(self) -> str:
        """The plan for a person, a line for each file."""
        state = "new" if not self.exists else "private" if self.private else "public"
        lines = [f"{self.repo_type} {self.repo_id} ({state}): {count(len(self.files), 'file')} to send, {self.bytes:,} bytes"]
        lines += [f"  send    {size:>15,}  {path}" for path, size in self.files.items()]
        lines += [f"  keep    {size:>15,}  {path}" for path, size in self.unchanged.items()]
        lines += [f"  delete  {'':>15}  {path}" for path in self.deleted]
        return "\n".join(lines)


def plan_push(
    files: Mapping[str, Content],
    repo_id: str,
    repo_type: str,
    *,
    revision: str | None = None,
    delete: Sequence[str] = (),
    token: Token = None,
) -> PushPlan:
    """
    Compare files with a repository, by content. Only reads.

    Args:
        files (`Mapping[str, Path | bytes]`): path in the repository → content.
        revision (`str`, *optional*): branch; a new one starts at `main`.
        delete (`Sequence[str]`, *optional*): patterns of files there that go if they are not among `files`.
    """
    with plain_errors("look at", repo_id, repo_type, revision):
        looked = patiently(lambda: _look(client(token), repo_id, repo_type, revision))
    if looked is None:
        sizes = {path: _size(content) for path, content in files.items()}
        return PushPlan(repo_id, repo_type, revision, False, None, None, sizes, {}, [])
    head, there, tags = looked
    changed: dict[str, int] = {}
    unchanged: dict[str, int] = {}
    for path, content in files.items():
        same = path in there and _same(content, there[path])
        (unchanged if same else changed)[path] = _size(content)
    deleted = [path for path in there if path not in files and any(fnmatch(path, pattern) for pattern in delete)]
    return PushPlan(repo_id, repo_type, revision, True, head.private, head.sha, changed, unchanged, deleted, list(there), tags)


def check_tag(plan: PushPlan, tag: str | None) -> None:
    """Raise a [`HubError`] if a push would have to move a tag."""
    there = plan.tags.get(tag) if tag else None
    if there is not None and (there != plan.parent or not plan.empty):
        raise HubError(
            f"the tag '{tag}' of the {plan.repo_type} '{plan.repo_id}' belongs to commit {there}, and this push would make "
            f"another one. A tag is a promise: choose a new one, such as '{tag}.1'. Nothing was sent."
        )


def count(number: int, what: str) -> str:
    """`1 file`, `2 files`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _look(
    api: HfApi, repo_id: str, repo_type: str, revision: str | None
) -> tuple[Any, dict[str, RepoFile], dict[str, str]] | None:
    """The head of a branch (of `main`, if it is new), its files and the repository's tags; `None` if there is no repository."""
    try:
        head: Any = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
    except RevisionNotFoundError:
        head = api.repo_info(repo_id, repo_type=repo_type)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401 and "nvalid credentials" in (error.server_message or ""):
            raise
        return None
    tree = api.list_repo_tree(repo_id, repo_type=repo_type, revision=head.sha, recursive=True)
    there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    return head, there, {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id, repo_type=repo_type).tags}


def _size(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _same(content: Content, there: RepoFile) -> bool:
    """By the hash that the Hub itself keeps: sha256 of what lies in large-file storage, git's sha1 of the rest."""
    size = _size(content)
    if size != there.size:
        return False
    digest = hashlib.sha256() if there.lfs else hashlib.sha1(b"blob %d\0" % size)
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with open(content, "rb") as file:
            while block := file.read(8 << 20):
                digest.update(block)
    return digest.hexdigest() == (there.lfs.sha256 if there.lfs else there.blob_id)

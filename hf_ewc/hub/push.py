"""Push: one commit with everything in it, made against the version that was looked at, or nothing.

`HfApi.upload_folder` is not used: with Xet it commits every five minutes, and who pulls in between gets half a Fisher. Here the
contents travel first (what the Hub has is not sent again, so a push that was killed goes on) and become visible in one commit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from glob import escape
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from ..errors import HubError
from .patience import patiently
from .plan import Content, PushPlan, check_tag, count, plan_push
from .problems import plain_errors
from .pull import Token, client, page


@dataclass(frozen=True)
class Pushed:
    """
    A push that is done: the commit that holds everything, its page, and what had to change for it. `private` is `None` for a
    pull request.
    """

    repo_id: str
    repo_type: str
    commit: str
    url: str
    plan: PushPlan = field(repr=False)
    private: bool | None = None
    tag: str | None = None

    def text(self) -> str:
        """For a person: what was sent, and what the repository is now."""
        plan, gone = self.plan, f"; deleted: {', '.join(self.plan.deleted)}" if self.plan.deleted else ""
        sent = f"pushed {count(len(plan.files), 'file')}, {plan.bytes:,} bytes, to the {self.repo_type} {self.repo_id}{gone}"
        lines = [f"nothing to send: the {self.repo_type} {self.repo_id} holds all of it" if plan.empty else sent]
        seen = {True: "private", False: "public", None: "proposed"}[self.private]
        lines += [f"{seen}, at commit {self.commit}{f', tag {self.tag}' if self.tag else ''}", self.url]
        return "\n".join(lines)


def push_files(
    files: Mapping[str, Content],
    repo_id: str,
    repo_type: str,
    *,
    message: str,
    private: bool = True,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    delete: Sequence[str] = (),
    token: Token = None,
    sdk: str | None = None,
    plan: PushPlan | None = None,
) -> Pushed:
    """
    Make a repository hold these files, in one commit; nothing is sent, and no commit made, where it does already.

    Args:
        files, revision, delete: as for [`plan_push`].
        message (`str`): of the commit.
        private (`bool`, *optional*, defaults to `True`): whether a repository that is created here is private. One that exists
            stays as it is.
        tag (`str`, *optional*): for the commit.
        create_pr (`bool`, *optional*, defaults to `False`): propose the commit instead.
        sdk (`str`, *optional*): of a Space that is created here.
        plan ([`PushPlan`], *optional*): of the same push, from [`plan_push`], so that what was looked at is what is replaced;
            `revision` and `delete` are the plan's then.

    Returns:
        [`Pushed`].

    Raises:
        [`HubError`]: no access, a tag that belongs to another commit, somebody pushed in between. Nothing became visible.
    """
    plan = plan or plan_push(files, repo_id, repo_type, revision=revision, delete=delete, token=token)
    revision = plan.revision
    check_tag(plan, tag)
    _check_branch(plan, create_pr)
    api = client(token)
    parent = plan.parent
    with plain_errors("push to", repo_id, repo_type, revision):
        if not plan.exists:
            patiently(lambda: api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=sdk))
            now = plan_push({}, repo_id, repo_type, token=token)
            own = {".gitattributes", *(["README.md"] if repo_type == "space" else [])}  # what the Hub itself begins with
            if set(now.present) - own:
                raise HubError(
                    f"the {repo_type} '{repo_id}' did not exist when this push began, and somebody else has pushed to it "
                    "meanwhile. Nothing was sent. Run the same command again to push on top of it."
                )
            parent = now.parent
        if revision is not None and not create_pr:
            patiently(lambda: api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True))
        if plan.empty:
            commit, url = str(parent), page(repo_id, repo_type, parent)
        else:
            commit, url = _commit(files, plan, parent, message, create_pr, token)
        if tag is not None and plan.tags.get(tag) != commit and not create_pr:
            patiently(lambda: api.create_tag(repo_id, tag=tag, revision=commit, repo_type=repo_type, exist_ok=True))
            refs = patiently(lambda: api.list_repo_refs(repo_id, repo_type=repo_type))
            there = next((ref.target_commit for ref in refs.tags if ref.name == tag), commit)
            if there != commit:
                raise HubError(
                    f"the {repo_type} '{repo_id}' got this push as commit {commit}, but meanwhile somebody else gave the tag "
                    f"'{tag}' to commit {there}. Choose another tag and run it again: nothing will be sent twice."
                )
    seen = None if create_pr else plan.private if plan.exists else private
    return Pushed(repo_id, repo_type, commit, url, plan, seen, None if create_pr else tag)


def set_visibility(repo_id: str, repo_type: str, private: bool, token: Token = None) -> None:
    """Make a repository private or public."""
    with plain_errors(f"make {'private' if private else 'public'}", repo_id, repo_type):
        patiently(lambda: client(token).update_repo_settings(repo_id, repo_type=repo_type, private=private))


def _check_branch(plan: PushPlan, create_pr: bool) -> None:
    """A push goes to a branch: one that is called like a commit or a tag would be taken for it."""
    name = plan.revision
    if name is None:
        return
    if create_pr:
        raise HubError("a pull request is made against `main`: leave `revision` out, or `create_pr`. Nothing was sent.")
    if re.fullmatch("[0-9a-f]{7,40}", name) or name.startswith("refs/") or name in plan.tags:
        raise HubError(
            f"`revision: {name}` is the name of a commit or a tag, and a push makes a new commit on a branch. Name a "
            "branch; for a tag, use `tag`. Nothing was sent."
        )


def _commit(
    files: Mapping[str, Content], plan: PushPlan, parent: str | None, message: str, create_pr: bool, token: Token
) -> tuple[str, str]:
    """
    One commit on top of `parent`; returns its hash and its page.

    An answer that was lost, or a server that failed after it had made the commit, must not end in a second one or in the
    message that somebody else was there: before the commit is tried again, the repository is looked at.
    """
    tried = False

    def attempt() -> tuple[str, str]:
        nonlocal tried
        if tried and not create_pr:
            gone = [escape(path) for path in plan.deleted]
            now = plan_push(files, plan.repo_id, plan.repo_type, revision=plan.revision, delete=gone, token=token)
            if now.empty and now.parent is not None:
                return now.parent, page(plan.repo_id, plan.repo_type, now.parent)
        tried = True
        operations: list[Any] = [CommitOperationAdd(path, _uploadable(files[path])) for path in plan.files]
        operations += [CommitOperationDelete(path) for path in plan.deleted]
        info = client(token).create_commit(
            plan.repo_id,
            operations,
            commit_message=message,
            repo_type=plan.repo_type,
            revision=plan.revision,
            create_pr=create_pr,
            parent_commit=parent,
        )
        return info.oid, info.pr_url or page(plan.repo_id, plan.repo_type, info.oid)

    return patiently(attempt)


def _uploadable(content: Content) -> str | bytes:
    return content if isinstance(content, bytes) else str(content)

"""`hf-ewc push`: the page that says what can be pushed, and the settings that all pushes of one repository share."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from typing import Any

HELP = """\
Usage: hf-ewc push fisher      --fisher FOLDER --repo_id USER/NAME
       hf-ewc push checkpoint  --checkpoint FOLDER --repo_id USER/NAME
       hf-ewc push space       --adapted USER/NAME --repo_id USER/NAME
       hf-ewc push release     --config FILE.yaml

Publish on the Hub. Every push is one commit: who pulls meanwhile gets the whole old state or the whole new one. A push that
was broken off goes on when it is repeated, and one that changes nothing makes no commit. New repositories are private;
--private false makes them public. --dry_run lists files and bytes and sends nothing.

Each has a page of its own:
  hf-ewc push fisher --help

Log in with `hf auth login`, or set HF_TOKEN. HF_ENDPOINT names another server that speaks the Hub's protocol.
"""


@dataclass(kw_only=True)
class PushTarget:
    """Where a push goes, and how."""

    repo_id: str = field(metadata={"help": "Repository on the Hub, USER/NAME."})
    revision: str | None = field(default=None, metadata={"help": "Branch; main by default."})
    tag: str | None = field(default=None, metadata={"help": "Tag for the commit."})
    private: bool = field(default=True, metadata={"help": "Whether a new repository is private."})
    commit_message: str | None = field(default=None, metadata={"help": "Message of the commit."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of a commit."})
    dry_run: bool = field(default=False, metadata={"help": "List what would be sent."})

    def problems(self) -> list[str]:
        return repo_problems(self.repo_id)

    def options(self) -> dict[str, Any]:
        """As the keyword arguments of `push_to_hub`, `push_checkpoint` and `push_space`, which have the same names."""
        return {f.name: getattr(self, f.name) for f in fields(PushTarget) if f.name != "repo_id"}


def run(argv: list[str]) -> int:
    print(HELP, end="", file=sys.stderr)
    return 2


def repo_problems(repo_id: str | None, revision: bool = False) -> list[str]:
    """What is wrong with a `repo_id` by its form; `revision`: it may have one behind an @."""
    from ..hub import is_repo_id

    if repo_id is None:  # missing, which has been said
        return []
    name = repo_id.rpartition("@")[0] or repo_id if revision else repo_id
    if is_repo_id(name):
        return []
    last = "/".join(part for part in name.split("/")[-2:] if part)
    meant = last if is_repo_id(last) else f"YOU/{last}" if is_repo_id(f"you/{last}") else "me/my-fisher"
    return [f"`repo_id: {repo_id}` is no id on the Hub, which has the form USER/NAME, such as {meant}."]

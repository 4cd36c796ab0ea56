"""[`VoteStore`]: blind votes in a dataset repository of the page's owner, where one is configured."""

from __future__ import annotations

import json
import logging
import tempfile
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huggingface_hub import CommitScheduler

from ..hub import plain_errors

logger = logging.getLogger(__name__)

MINUTES = 5  # between commits: as often as the Hub recommends


class VoteStore:
    """
    Appends votes to a JSON Lines file of this process, which a background thread commits to a dataset repository every five
    minutes and when the process ends. The repository is made if it is absent, and then private.

    Votes hold what was voted, which models stood where, and when; never a prompt or a text.

    Parameters:
        repo_id (`str`): `user/name` of the dataset repository.
        token (`str`, *optional*): With write access; `HF_TOKEN` or the login by default.
        minutes (`float`, *optional*, defaults to 5): Between commits.

    Raises:
        HubError: The repository can be neither found nor made.

    Example:

    ```python
    >>> tally = Tally(sink=VoteStore("me/votes").add)
    ```
    """

    def __init__(self, repo_id: str, token: str | None = None, minutes: float = MINUTES):
        folder = Path(tempfile.mkdtemp(prefix="hf-ewc-votes-"))
        self._file = folder / f"votes-{uuid.uuid4().hex}.jsonl"  # of this process alone: two never write to one file
        with plain_errors("store votes in", repo_id, "dataset"):
            self._scheduler = CommitScheduler(
                repo_id=repo_id,
                repo_type="dataset",
                folder_path=folder,
                path_in_repo="data",
                every=minutes,
                private=True,
                token=token,
            )

    def add(self, vote: dict[str, Any]) -> None:
        """Store one vote; the time is added."""
        record = {**vote, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        with self._scheduler.lock, self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def push(self) -> None:
        """Commit now, and wait for it."""
        self._scheduler.trigger().result()

"""What hf_ewc asks of the Hugging Face Hub: pin, pull, push in one commit; and its refusals in plain words.

Everything goes through `huggingface_hub`: `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` mean what they mean there.
"""

from __future__ import annotations

from ..config import is_repo_id
from .patience import patiently
from .plan import PushPlan, check_tag, count, plan_push
from .problems import plain_errors, scrubbed
from .pull import Licence, account, client, fetch, fetch_file, licence_of, page, pin
from .push import Pushed, push_files, set_visibility
from .ranges import RemoteFile, remote_files

__all__ = [
    "Licence",
    "PushPlan",
    "Pushed",
    "RemoteFile",
    "account",
    "check_tag",
    "client",
    "count",
    "fetch",
    "fetch_file",
    "is_repo_id",
    "licence_of",
    "page",
    "patiently",
    "pin",
    "plain_errors",
    "plan_push",
    "push_files",
    "remote_files",
    "scrubbed",
    "set_visibility",
]

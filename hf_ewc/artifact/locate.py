"""Where a Fisher lies. The one place that will learn to pull from the Hub."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..errors import EWCError, FisherFormatError
from .verify import MANIFEST

logger = logging.getLogger(__name__)


def locate(folder_or_id: str, revision: str | None = None) -> Path:
    """Folder of a Fisher on this machine."""
    path = Path(folder_or_id).expanduser()
    if path.is_dir():
        if revision is not None:
            logger.warning("revision '%s' is ignored: '%s' is a local folder.", revision, folder_or_id)
        return path
    if path.is_file():
        raise FisherFormatError(f"'{folder_or_id}' is a file. Name the folder that holds {MANIFEST}; pickles are not read.")
    try:
        validate_repo_id(folder_or_id)
        is_id = "/" in folder_or_id
    except HFValidationError:
        is_id = False
    if not is_id:
        raise EWCError(
            f"there is no folder '{folder_or_id}'. Estimate a Fisher first: `hf-ewc fisher … --output_dir {folder_or_id}`."
        )
    pinned = f", revision={revision!r}" if revision else ""
    raise EWCError(
        f"there is no folder '{folder_or_id}'. If it is a dataset on the Hub: this version reads local folders only, "
        "pulling comes with a later one. Download it first, in Python, and name the folder that this returns:\n"
        f'    huggingface_hub.snapshot_download({folder_or_id!r}, repo_type="dataset"{pinned})'
    )

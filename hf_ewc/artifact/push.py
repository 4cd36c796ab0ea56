"""A Fisher becomes a dataset repository: its files, the card, and a picture of where the trace lies, in one commit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ..errors import HubError
from ..hub import Pushed, PushPlan, check_tag, licence_of, plan_push, push_files
from .card import render_card
from .picture import trace_picture
from .verify import CARD, INDEX, MANIFEST, SUMMARY, open_verified

logger = logging.getLogger(__name__)

PICTURE = "trace.png"
STALE = ("fisher-*.safetensors", "anchor-*.safetensors")  # of a Fisher that was there before, with other shards
BESIDE = (".gitattributes", "LICENSE", "NOTICE")  # may lie beside a Fisher in its repository


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    message: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    tag: str | None = None,
    dry_run: bool = False,
    **options: Any,
) -> Pushed | PushPlan:
    """
    See [`FisherInformation.push_to_hub`]. The folder is checked once more: nothing damaged is published.

    The card is rendered anew, with the repository's name and the licence that the base model's page states.
    """
    manifest, _ = open_verified(folder, str(folder))
    files: dict[str, Path | bytes] = {name: folder / name for name in (MANIFEST, INDEX, SUMMARY, *manifest.files)}
    rows = pq.read_table(folder / SUMMARY).to_pylist()
    base = manifest.base_model
    if base.revision is None:
        logger.warning(
            "The base model of this Fisher is a local folder, '%s': who pulls the Fisher can tell that weights are the same by "
            "their hash, but not find them. To make it traceable, push the base model and estimate with its id.",
            Path(base.id).name,
        )
    licence = licence_of(base.id, base.revision, token) if base.revision else None
    files[CARD] = render_card(manifest, repo_id=repo_id, licence=licence, picture=True, rows=rows).encode()
    files[PICTURE] = trace_picture(rows)
    plan = plan_push(files, repo_id, "dataset", revision=revision, delete=STALE, token=token)
    foreign = [path for path in plan.present if path not in files and path not in plan.deleted and path not in BESIDE]
    if foreign and MANIFEST not in plan.present:
        raise HubError(
            f"the dataset '{repo_id}' holds something else than a Fisher ({', '.join(foreign[:5])}), whose card this would "
            "replace. Choose another repository. Nothing was sent."
        )
    check_tag(plan, tag)
    if dry_run:
        return plan
    name = base.label if base.revision else Path(base.id).name
    message = message or f"Fisher of {name} ({manifest.digest[:12]})"
    return push_files(files, repo_id, "dataset", message=message, tag=tag, token=token, plan=plan, **options)

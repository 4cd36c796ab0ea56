"""What goes out to readers: the model card, evaluation results in the Hub's forms, lineage, and cards kept as data."""

from __future__ import annotations

from .checkpoint import push_checkpoint, read_state
from .checkpoint_card import render_checkpoint_card
from .committed import check_cards, render_committed, write_cards
from .eval_results import eval_result_files, model_index, pick_run
from .lineage import Link, card_lineage, lineage, lineage_text, remote_fingerprint, remote_state
from .release import ReleaseConfig, push_release
from .release_plan import plan_release
from .space import push_space

__all__ = [
    "Link",
    "ReleaseConfig",
    "card_lineage",
    "check_cards",
    "eval_result_files",
    "lineage",
    "lineage_text",
    "model_index",
    "pick_run",
    "plan_release",
    "push_checkpoint",
    "push_release",
    "push_space",
    "read_state",
    "remote_fingerprint",
    "remote_state",
    "render_checkpoint_card",
    "render_committed",
    "write_cards",
]

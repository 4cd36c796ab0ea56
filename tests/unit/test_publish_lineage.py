"""Lineage of folders on this machine; the Hub's part is in tests/hub/cases/case_lineage.py."""

from __future__ import annotations

import json

import pytest

from hf_ewc import FisherInformation
from hf_ewc.errors import DataError
from hf_ewc.publish import Link, lineage, lineage_text


@pytest.fixture
def checkpoint(fisher_folder, tmp_path):
    fisher = FisherInformation.from_pretrained(fisher_folder)
    base = fisher.manifest.base_model
    state = {
        "schema": 1,
        "global_step": 3,
        "ewc_lambda": 2.0,
        "ewc_mode": "loss",
        "fisher": {"source": fisher_folder, "sha256": fisher.sha256},
        "anchor": {"id": base.id, "revision": None, "fingerprint": base.fingerprint},
        "data": {"dataset": "lt.jsonl"},
    }

    def write(**changes):
        (tmp_path / "ewc_state.json").write_text(json.dumps({**state, **changes}))
        return str(tmp_path)

    return write


def test_a_folder_is_followed_as_far_as_this_machine_reaches(checkpoint, fisher_folder):
    source = checkpoint()
    links = lineage(source)
    assert [(link.what, link.verified) for link in links] == [
        ("checkpoint", None),
        ("Fisher", True),
        ("base model", None),
        ("probe", None),
        ("training data", None),
    ]
    assert links[2].note == "a local folder: cannot be followed"
    assert links[0].note == "λ = 2, loss, 3 steps; the chain starts here: nothing to compare it with"
    text = lineage_text(links)
    assert f"\n├─ Fisher  {fisher_folder}\n│  │  sha256 {links[1].digest}\n│  │  verified: " in text
    assert "\n│  ├─ base model  " in text


def test_one_of_something_is_not_called_several(checkpoint):
    assert "λ = 2, loss, 1 step;" in lineage(checkpoint(global_step=1))[0].note


def test_the_tree_shows_what_hangs_below_what():
    chain = [("checkpoint", 0), ("Fisher", 1), ("base model", 2), ("probe", 2), ("Fisher", 1), ("base model", 2), ("data", 1)]
    links = [Link(what, "x", None, None, None, f"note {n}\nmore", depth) for n, (what, depth) in enumerate(chain)]
    assert lineage_text(links).splitlines() == [
        "checkpoint  x",
        "│  note 0",
        "│  more",
        "├─ Fisher  x",
        "│  │  note 1",
        "│  │  more",
        "│  ├─ base model  x",
        "│  │     note 2",
        "│  │     more",
        "│  └─ probe  x",
        "│        note 3",
        "│        more",
        "├─ Fisher  x",
        "│  │  note 4",
        "│  │  more",
        "│  └─ base model  x",
        "│        note 5",
        "│        more",
        "└─ data  x",
        "      note 6",
        "      more",
    ]


def test_another_fisher_in_the_folder_is_named_with_both_digests(checkpoint, fisher_folder):
    there = FisherInformation.from_pretrained(fisher_folder).sha256
    fisher = lineage(checkpoint(fisher={"source": fisher_folder, "sha256": "0" * 64}))[1]
    assert fisher.verified is False
    assert "0" * 64 in fisher.note
    assert there in fisher.note


def test_a_fisher_that_is_not_here_any_more_cannot_be_followed(checkpoint):
    fisher = lineage(checkpoint(fisher={"source": "/gone/fisher", "sha256": "0" * 64}))[1]
    assert (fisher.id, fisher.verified, fisher.note) == ("fisher", None, "a local folder: cannot be followed")


def test_the_chain_of_a_fisher_starts_at_the_fisher(fisher_folder):
    assert [(link.what, link.depth) for link in lineage(fisher_folder)][:2] == [("Fisher", 0), ("base model", 1)]


def test_what_is_neither_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"neither ewc_state\.json nor fisher_config\.json"):
        lineage(str(tmp_path))
    with pytest.raises(DataError, match="neither a folder on this machine nor an id on the Hub"):
        lineage("no/such/folder")

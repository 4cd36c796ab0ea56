"""`hf-ewc card`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_publish_checkpoint_card import STATE, SWEEP

from hf_ewc.cli.main import main

CARDS = Path(__file__).parents[2] / "model_cards"


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "lt"
    folder.mkdir()
    state = {**STATE, "anchor": {"id": "runs/base", "revision": None, "fingerprint": "cd" * 32}}
    (folder / "ewc_state.json").write_text(json.dumps(state))
    (tmp_path / "results.json").write_text(json.dumps(SWEEP))
    return folder


def test_the_card_of_a_folder_is_printed_or_written(model, capsys):
    words = ["card", "--model", str(model), "--results", str(model.parent / "results.json")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "\n# lt\n" in printed
    assert "| proximal | 10 | 2.125 | +0.125 |" in printed
    out = model / "README.md"
    assert main([*words, "--repo_id", "me/lt", "--language", "en", "lt", "--output", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert 'from_pretrained("me/lt")' in text
    assert "- lt\n" in text


def test_check_passes_on_fresh_cards_and_shows_what_is_stale(tmp_path, capsys):
    shutil.copytree(CARDS.parent / "recipes", tmp_path / "recipes")
    cards = Path(shutil.copytree(CARDS, tmp_path / "cards"))
    assert main(["card", "--check", "--folder", str(cards)]) == 0
    card = cards / "tiny-cpu-fisher/README.md"
    card.write_text(card.read_text(encoding="utf-8").replace("1,050,752", "9,999,999"), encoding="utf-8")
    assert main(["card", "--check", "--folder", str(cards)]) == 2
    printed = capsys.readouterr()
    assert "-| parameters | 9,999,999 in 46 tensors |" in printed.out
    assert "+| parameters | 1,050,752 in 46 tensors |" in printed.out
    assert "stale cards: 1" in printed.err
    assert main(["card", "--write", "--folder", str(cards)]) == 0
    assert main(["card", "--check", "--folder", str(cards)]) == 0


def test_lineage_of_a_fisher_on_this_machine(fisher_folder, capsys):
    assert main(["card", "--lineage", fisher_folder]) == 0
    assert "└─ base model  " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "exactly one of"),
        (["--check", "--lineage", "x"], "got `lineage` and `check`"),
        (["--check", "--output", "x"], "`output` belongs to `model`"),
        (["--model", "x", "--repo_id", "lt"], "`repo_id: lt` is not of the form user/name"),
        (["--model", "no/such/folder"], "holds no ewc_state.json"),
        (["--check", "--folder", "no/such/folder"], "holds no cards"),
    ],
)
def test_mistakes_end_in_a_message(words, said, capsys):
    assert main(["card", *words]) == 2
    assert said in capsys.readouterr().err

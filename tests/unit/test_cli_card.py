"""`hf-ewc card`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_publish_checkpoint_card import STATE, SWEEP

from hf_ewc import BaseModel
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
    printed = capsys.readouterr().out
    assert printed.startswith(f"Fisher  {fisher_folder}\n│  sha256 ")
    assert "\n├─ base model  " in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "exactly one of"),
        (["--check", "--lineage", "x"], "got `lineage` and `check`"),
        (["--check", "--output", "x"], "`output` belongs to `model`"),
        (["--model", "x", "--repo_id", "lt"], "`repo_id: lt` is not of the form `user/name`"),
        (["--model", "no/such/folder"], "there is no folder 'no/such/folder'"),
        (["--model", "nope"], "there is no folder 'nope'"),
        (["--model", str(CARDS)], "holds no ewc_state.json"),
        (["--lineage", "me/x@v1", "--revision", "v2"], "names revision 'v1', and the setting names 'v2'"),
        (["--model", "me/x@v1", "--revision", "v2"], "names revision 'v1', and the setting names 'v2'"),
        (["--check", "--folder", "no/such/folder"], "holds no cards"),
    ],
)
def test_mistakes_end_in_a_message(words, said, capsys):
    assert main(["card", *words]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "sent" not in told, "nothing was to be sent"


def test_figures_of_other_weights_do_not_get_onto_the_card(model, base_folder, capsys):
    shutil.copytree(base_folder, model, dirs_exist_ok=True)
    words = ["card", "--model", str(model), "--results", str(model.parent / "results.json")]
    own = BaseModel.resolve(model).fingerprint
    assert main(words) == 0
    assert "not tied to these weights" in capsys.readouterr().out, "the file does not say what was measured"
    for run, digest in zip(SWEEP["runs"], ("aa" * 32, "bb" * 32, "cc" * 32), strict=True):
        other = {**run, "metrics": {**run["metrics"], "model": {"fingerprint": digest}}}
        (model.parent / "results.json").write_text(json.dumps({**SWEEP, "runs": [other]}))
        assert main(words) == 2
        told = capsys.readouterr().err
        assert own in told
        assert digest in told
        assert "hf-ewc evaluate --model … --base … --output results.json" in told
    same = {**SWEEP["runs"][2], "metrics": {**SWEEP["runs"][2]["metrics"], "model": {"fingerprint": own}}}
    (model.parent / "results.json").write_text(json.dumps({**SWEEP, "runs": [*SWEEP["runs"], same]}))
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "| proximal | 10 | 2.500 |" in printed, "by its hash, though mode and λ are another run's"
    assert f"of weights with sha256 `{own}`" in printed

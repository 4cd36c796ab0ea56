"""The cards in `model_cards/` are what their data say, and hold nothing that should not leave a machine."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, ModelCard

from hf_ewc.errors import ConfigError
from hf_ewc.publish import card_lineage, check_cards, write_cards

CARDS = Path(__file__).parents[2] / "model_cards"
FOLDERS = sorted(path.parent for path in CARDS.glob("*/card.yaml"))
LEAKS = re.compile(r"(?<![\w.])/(home|root|tmp|work|Users|mnt|data|opt)/|[A-Z]:\\|hf_[A-Za-z0-9]{16,}|Bearer ")


@pytest.fixture
def cards(tmp_path):
    shutil.copytree(CARDS.parent / "recipes", tmp_path / "recipes")
    return Path(shutil.copytree(CARDS, tmp_path / "model_cards"))


def test_all_committed_cards_are_fresh():
    assert len(FOLDERS) == 4
    assert check_cards(CARDS) == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_committed_card_is_valid_for_the_hub(folder):
    kind = DatasetCard if folder.name.endswith("fisher") else ModelCard
    data = kind.load(folder / "README.md").data.to_dict()
    assert data["lineage"]
    if kind is DatasetCard:
        assert data["configs"][0]["data_files"] == [{"split": "params", "path": "summary/params.parquet"}]
    else:
        assert data["library_name"] == "transformers"


@pytest.mark.parametrize("path", sorted(p for f in FOLDERS for p in f.iterdir()), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_nothing_committed_names_a_place_on_a_machine_or_a_token(path):
    assert LEAKS.search("see /home/ann/x")
    assert not LEAKS.search(path.read_bytes().decode(errors="ignore"))


def test_a_card_of_something_planned_has_marks_and_no_figures():
    for name in ("gemma2-2b-lt-fisher", "gemma2-2b-lt-checkpoint"):
        files = {path.name for path in (CARDS / name).iterdir()}
        assert files == {"card.yaml", "README.md"}, "there are no data to take figures from"
        text = (CARDS / name / "README.md").read_text(encoding="utf-8")
        assert text.count("**Not yet run**") >= 8
        assert "±" not in text
        assert "model-index" not in text


def test_the_tiny_model_names_the_digest_of_the_tiny_fisher_and_the_same_base():
    links = {link["what"]: link for link in card_lineage((CARDS / "tiny-cpu-checkpoint/README.md").read_text(encoding="utf-8"))}
    manifest = json.loads((CARDS / "tiny-cpu-fisher/fisher_config.json").read_text(encoding="utf-8"))
    assert links["Fisher"]["sha256"] == manifest["digest"]
    assert links["base model"]["sha256"] == manifest["base_model"]["fingerprint"]
    assert "| proximal | 1000 |" in (CARDS / "tiny-cpu-checkpoint/README.md").read_text(encoding="utf-8")


def test_a_changed_figure_shows_in_the_diff_and_writing_mends_it(cards):
    path = cards / "tiny-cpu-checkpoint/results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    results["runs"][0]["metrics"]["questions"]["facts"]["accuracy"] = 0.999
    path.write_text(json.dumps(results), encoding="utf-8")
    (diff,) = check_cards(cards)
    assert re.search(r"^-\| proximal .* 54\.3 ±", diff, re.M)
    assert re.search(r"^\+\| proximal .* 99\.9 ±", diff, re.M)
    assert write_cards(cards) == [path.with_name("README.md")]
    assert check_cards(cards) == []


def test_figures_of_other_weights_than_the_cards_are_refused(cards):
    spec = cards / "tiny-cpu-checkpoint/card.yaml"
    recorded = json.loads((cards / "tiny-cpu-checkpoint/results.json").read_text(encoding="utf-8"))
    digest = recorded["runs"][0]["metrics"]["model"]["fingerprint"]
    assert f"fingerprint: {digest}" in spec.read_text(encoding="utf-8")
    assert digest in (cards / "tiny-cpu-checkpoint/README.md").read_text(encoding="utf-8")
    spec.write_text(spec.read_text(encoding="utf-8").replace(digest, "ee" * 32), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{'ee' * 32}[\\s\\S]*{digest}"):
        check_cards(cards)


def test_a_missing_card_or_picture_is_stale(cards):
    (cards / "tiny-cpu-fisher/trace.png").unlink()
    (cards / "gemma2-2b-lt-fisher/README.md").unlink()
    assert len(check_cards(cards)) == 2
    write_cards(cards)
    assert (cards / "tiny-cpu-fisher/trace.png").read_bytes()[:4] == b"\x89PNG"
    assert check_cards(cards) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: space\nrepo_id: a/b\n", "`kind: space` is neither fisher nor checkpoint"),
        ("kind: fisher\nrepo_id: b\nfigures: 3\n", r"`figures` is not one of [\s\S]*`repo_id: b` is not of the form"),
        ("kind: fisher\nrepo_id: a/b\nplanned: true\n", "needs the `recipe`"),
        ("kind: fisher\nrepo_id: a/b\n", r"rendered from fisher_config\.json, which cannot be read"),
        ("kind: [\n", "is not YAML"),
    ],
)
def test_a_card_that_cannot_be_rendered_says_why(tmp_path, text, said):
    (tmp_path / "one").mkdir()
    (tmp_path / "one/card.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        check_cards(tmp_path)


def test_a_folder_without_cards_is_an_error_and_not_a_success(tmp_path):
    with pytest.raises(ConfigError, match="holds no cards"):
        check_cards(tmp_path)

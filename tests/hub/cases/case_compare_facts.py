"""What a page knows of models on the Hub: hashes, manifest and summary, and no weights; offline, what the cache holds."""

from __future__ import annotations

import json

import pytest
from case_lineage import chain, estimate, trained  # noqa: F401  (a fixture)
from huggingface_hub import HfApi, constants

from hf_ewc import EvaluationConfig, evaluate_model
from hf_ewc.compare import CompareConfig
from hf_ewc.compare.facts import fisher_of, load_facts
from hf_ewc.evaluation import save_results

LEGS = ("xet",)  # only reads; the hashes of large files are the same on both ways


@pytest.fixture
def results(chain, base_folder, tmp_path):  # noqa: F811
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "The keeper of the northern light."}))
    measured = evaluate_model(str(base_folder), EvaluationConfig(texts={"old": str(text), "new": str(text)}, device="cpu"))
    # `trained` copies the base's weights, so that the model has the same hash
    run = {"mode": "proximal", "ewc_lambda": 2.0, "metrics": measured}
    settings = {"old": "old", "new": "new"}
    return str(save_results({"schema": 1, "before": measured, "runs": [run], "settings": settings}, tmp_path / "results.json"))


def test_all_is_told_without_downloading_weights(hub, chain, results):  # noqa: F811
    config = CompareConfig(chain.base.id, chain.model, results=results)
    hub.log.clear()
    facts = load_facts(config)
    assert not [path for method, path, *_ in hub.log if method == "GET" and ".safetensors" in path]
    assert facts.notes == ()
    assert facts.results.own_row == 1
    assert facts.layers
    kinds = {"adapted model": ("model", chain.model), "base model": ("base", chain.base.id), "Fisher": ("fisher", chain.fisher)}
    kinds |= {"probe": ("probe", chain.probe), "training data": ("probe", chain.probe)}
    assert [each.what for each in facts.lineage] == list(kinds)
    for each in facts.lineage:
        key, name = kinds[each.what]
        assert each.name.partition(" · ")[0] == name
        assert each.commit == chain.commits[key]
        assert each.url.startswith(hub.url)
        assert each.url.endswith(f"{name}/tree/{each.commit}")
    assert [each.verified for each in facts.lineage] == [None, True, True, None, None]
    assert facts.lineage[1].sha256 == chain.base.fingerprint


def test_offline_it_is_what_the_cache_holds_and_that_is_said(hub, chain, results, monkeypatch):  # noqa: F811
    config = CompareConfig(chain.base.id, chain.model, results=results)
    fisher, note = fisher_of(config)  # downloads all of it, as a page does
    assert (fisher.sha256, note) == (load_facts(config).lineage[2].sha256, "")
    before = load_facts(config)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    facts = load_facts(config)
    assert hub.log == []
    assert (facts.results, facts.layers, facts.lineage) == (before.results, before.layers, before.lineage)
    assert [note.code for note in facts.notes] == ["offline"]
    assert fisher_of(config)[0].sha256 == fisher.sha256
    facts = load_facts(CompareConfig("alice/never-seen", chain.model))
    assert "alice/never-seen" in "\n".join(note.text for note in facts.notes)


def test_a_model_on_the_hub_does_not_make_the_page_look_into_its_own_folders(hub, chain, name, base_folder, tmp_path):  # noqa: F811
    local = estimate(chain.base, chain.probe, chain.commits["probe"]).save_pretrained(tmp_path / "mine")
    recorded = {"source": str(local), "sha256": "ab" * 32}
    folder = trained(tmp_path / "odd", base_folder, recorded, chain.base, None)
    HfApi().create_repo(f"{name}-odd")
    HfApi().upload_folder(folder_path=folder, repo_id=f"{name}-odd")
    config = CompareConfig(chain.base.id, f"{name}-odd")
    facts = load_facts(config)
    assert facts.layers == ()
    assert [each.sha256 for each in facts.lineage if each.what == "Fisher"] == ["ab" * 32]
    fisher, note = fisher_of(config)
    assert fisher is None
    assert "'mine', was recorded as it lay on the machine" in note
    assert str(tmp_path) not in str(facts) + note


def test_what_the_hub_refuses_leaves_notes(hub, chain):  # noqa: F811
    for other, said in (("alice/nowhere", "alice/nowhere"), (chain.probe, "holds no fisher_config.json")):
        facts = load_facts(CompareConfig(chain.base.id, chain.model, fisher=other))
        assert [note.part for note in facts.notes] == ["layers"]
        (fisher,) = (each for each in facts.lineage if each.what == "Fisher")  # what was recorded
        assert (fisher.name, fisher.commit, fisher.verified) == (chain.fisher, chain.commits["fisher"], None)
        assert said in fisher.note
        assert said in facts.notes[0].text
    facts = load_facts(CompareConfig(chain.base.id, chain.base.id))
    assert [note.code for note in facts.notes if note.part == "lineage"] == ["no_state"]

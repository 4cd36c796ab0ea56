"""Checkpoint → Fisher → base → probe, followed on the Hub and from the cards alone; what is not what was recorded is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import HfApi, ModelCard, constants, hf_hub_download

from hf_ewc import BaseModel, EvaluationConfig, FisherInformation, evaluate_model
from hf_ewc.artifact import EstimatorRecord, ProbeRecord
from hf_ewc.cli.main import main
from hf_ewc.errors import HubError
from hf_ewc.evaluation import save_results
from hf_ewc.files import STATE_FILE
from hf_ewc.publish import card_lineage, lineage, push_checkpoint

LEGS = ("xet",)  # only reads; the hashes of large files are the same on both ways


@dataclass
class Chain:
    """What was published, and at which commits."""

    model: str
    fisher: str
    base: BaseModel
    probe: str
    commits: dict[str, str]


def estimate(base: BaseModel, probe: str, commit: str) -> FisherInformation:
    """A Fisher in all but its values."""
    tensors = {name: torch.rand_like(parameter) for name, parameter in tiny.make_model().named_parameters()}
    record = ProbeRecord(
        kind="text", dataset=probe, split="train", revision=commit, ids_sha256="ab" * 32, examples=9, scored_tokens=50
    )
    return FisherInformation.from_tensors(tensors, base=base, probes=[record], estimator=EstimatorRecord(normalizer=50.0))


def trained(folder: Path, base_folder: Path, fisher: dict | None, anchor: BaseModel, data: dict | None) -> Path:
    """A folder as training leaves it."""
    shutil.copytree(base_folder, folder)
    where = {"id": anchor.id, "revision": anchor.revision, "fingerprint": anchor.fingerprint}
    state = {"schema": 1, "global_step": 7, "ewc_lambda": 2.0, "ewc_mode": "proximal", "fisher": fisher, "anchor": where}
    (folder / STATE_FILE).write_text(json.dumps({**state, "data": data}))
    return folder


@pytest.fixture
def chain(hub, name, base_folder, tmp_path) -> Chain:
    api = HfApi()
    names = {what: f"{name}-{what}" for what in ("model", "fisher", "base", "probe")}
    api.create_repo(names["base"])
    api.upload_folder(folder_path=base_folder, repo_id=names["base"])
    terms = b"---\nlicense: other\nlicense_name: tiny\nlicense_link: https://example.org/terms\n---\n"
    api.upload_file(path_or_fileobj=terms, path_in_repo="README.md", repo_id=names["base"])
    api.create_repo(names["probe"], repo_type="dataset")
    rows = json.dumps({"text": tiny.TEXTS[0]}).encode()
    api.upload_file(path_or_fileobj=rows, path_in_repo="train.jsonl", repo_id=names["probe"], repo_type="dataset")
    probe = api.repo_info(names["probe"], repo_type="dataset").sha
    base = BaseModel.resolve(names["base"])
    fisher = estimate(base, names["probe"], probe)
    pushed = fisher.push_to_hub(names["fisher"], private=False)
    fisher = FisherInformation.from_pretrained(names["fisher"])  # as stored: the digest covers the files
    recorded = {"source": names["fisher"], "repo_id": names["fisher"], "revision": pushed.commit, "sha256": fisher.sha256}
    data = {"dataset": names["probe"], "split": "train", "revision": probe}
    done = push_checkpoint(trained(tmp_path / "model", base_folder, recorded, base, data), names["model"], private=False)
    commits = {"model": done.commit, "fisher": pushed.commit, "base": str(base.revision), "probe": probe}
    return Chain(names["model"], names["fisher"], base, names["probe"], commits)


def test_every_link_is_followed_to_its_commit_and_verified_without_downloading_weights(hub, chain, capsys):
    hub.log.clear()
    before = hub.bytes_served
    links = lineage(chain.model)
    assert [(link.what, link.depth) for link in links] == [
        ("checkpoint", 0),
        ("Fisher", 1),
        ("base model", 2),
        ("probe", 2),
        ("training data", 1),
    ]
    assert [link.revision for link in links] == [chain.commits[k] for k in ("model", "fisher", "base", "probe", "probe")]
    assert [link.verified for link in links] == [None, True, True, True, True]
    assert links[0].note.endswith("; the chain starts here: nothing to compare it with")
    assert "for 1 file" in links[2].note
    assert links[2].digest == chain.base.fingerprint
    assert hub.bytes_served - before < 100_000, "the weights are larger"
    assert not [path for method, path, *_ in hub.log if method == "GET" and ".safetensors" in path]
    assert main(["card", "--lineage", chain.model]) == 0
    assert capsys.readouterr().out.count("verified: ") == 4


def test_the_cards_alone_lead_along_the_same_chain(hub, chain):
    def card(repo_id: str, repo_type: str, revision: str) -> str:
        path = hf_hub_download(repo_id, "README.md", repo_type=repo_type, revision=revision)
        return Path(path).read_text(encoding="utf-8")

    text = card(chain.model, "model", chain.commits["model"])
    links = {link["what"]: link for link in card_lineage(text)}
    fisher = links["Fisher"]
    assert (fisher["id"], fisher["revision"]) == (chain.fisher, chain.commits["fisher"])
    assert links["base model"]["revision"] == chain.commits["base"]
    assert f"{hub.url}/datasets/{chain.fisher}/tree/{chain.commits['fisher']}" in text
    assert f"{hub.url}/{chain.base.id}/tree/{chain.commits['base']}" in text

    text = card(fisher["id"], "dataset", fisher["revision"])
    assert fisher["sha256"] in text, "the Fisher's card shows the digest that the model's card names"
    base, probe = card_lineage(text)
    assert (base["id"], base["revision"], base["sha256"]) == (chain.base.id, chain.base.revision, chain.base.fingerprint)
    assert (probe["id"], probe["revision"]) == (chain.probe, chain.commits["probe"])
    assert HfApi().model_info(chain.model).card_data.datasets == [chain.probe, chain.fisher]


def test_the_card_of_a_model_on_the_hub_inherits_the_licence_of_its_base(hub, chain, tmp_path):
    assert main(["card", "--model", chain.model, "--output", str(tmp_path / "card.md")]) == 0
    card = ModelCard.load(tmp_path / "card.md")
    assert (card.data.license, card.data.license_name) == ("other", "tiny")
    assert card.data.base_model == chain.base.id
    assert f'from_pretrained("{chain.model}")' in card.text
    assert "[tiny](https://example.org/terms)" in card.text
    HfApi().delete_repo(chain.base.id)
    assert main(["card", "--model", chain.model, "--output", str(tmp_path / "card.md")]) == 0, "worth having without it, too"
    assert ModelCard.load(tmp_path / "card.md").data.license is None


def test_another_fisher_at_the_recorded_commit_is_named_with_both_hashes(hub, chain, base_folder, tmp_path, capsys):
    recorded = {"repo_id": chain.fisher, "revision": chain.commits["fisher"], "sha256": "0" * 64}
    push_checkpoint(trained(tmp_path / "other", base_folder, recorded, chain.base, None), chain.model)
    fisher = lineage(chain.model)[1]
    assert fisher.verified is False
    assert "0" * 64 in fisher.note
    there = FisherInformation.from_pretrained(chain.fisher).sha256
    assert there in fisher.note
    assert main(["card", "--lineage", chain.model]) == 2
    printed = capsys.readouterr()
    assert "MISMATCH" in printed.out
    assert "1 of 4 links is not what was recorded" in printed.err


def test_other_weights_at_the_recorded_commit_of_the_base_are_named_with_both_hashes(hub, chain, tokenizer, tmp_path):
    other = tiny.save_base(tmp_path / "weights", tokenizer, seed=5)
    HfApi().upload_folder(folder_path=other, repo_id=chain.base.id)
    commit = HfApi().model_info(chain.base.id).sha
    claimed = replace(chain.base, revision=commit)
    estimate(claimed, chain.probe, chain.commits["probe"]).push_to_hub(chain.fisher)
    base = next(link for link in lineage(chain.fisher) if link.what == "base model")
    assert base.verified is False
    assert chain.base.files_sha256["model.safetensors"] in base.note
    assert BaseModel.resolve(other).files_sha256["model.safetensors"] in base.note


def test_an_anchor_that_is_not_the_base_of_the_fisher_is_named(hub, chain, base_folder, tmp_path):
    recorded = {"repo_id": chain.fisher, "revision": chain.commits["fisher"], "sha256": lineage(chain.fisher)[0].digest}
    elsewhere = replace(chain.base, fingerprint="e" * 64)
    push_checkpoint(trained(tmp_path / "other", base_folder, recorded, elsewhere, None), chain.model)
    base = next(link for link in lineage(chain.model) if link.what == "base model")
    assert base.verified is False
    assert "e" * 64 in base.note
    assert chain.base.fingerprint in base.note


def test_a_base_that_was_itself_trained_is_followed_further(hub, chain, base_folder, name, tmp_path):
    parent = BaseModel.resolve(chain.model)
    fisher = estimate(parent, chain.probe, chain.commits["probe"])
    pushed = fisher.push_to_hub(f"{name}-second-fisher")
    fisher = FisherInformation.from_pretrained(pushed.repo_id)
    recorded = {"repo_id": pushed.repo_id, "revision": pushed.commit, "sha256": fisher.sha256}
    push_checkpoint(trained(tmp_path / "second", base_folder, recorded, parent, None), f"{name}-second")
    links = lineage(f"{name}-second")
    chained = [link.id for link in links if link.what in ("checkpoint", "Fisher", "base model")]
    assert chained == [f"{name}-second", pushed.repo_id, chain.model, chain.model, chain.fisher, chain.base.id]
    assert False not in [link.verified for link in links]


def test_a_checkpoint_without_fisher_leads_to_its_base(hub, chain, base_folder, name, tmp_path):
    push_checkpoint(trained(tmp_path / "plain", base_folder, None, chain.base, None), f"{name}-plain")
    links = lineage(f"{name}-plain")
    assert [(link.what, link.verified) for link in links] == [("checkpoint", None), ("base model", True)]


def test_a_fisher_that_is_gone_is_reported_in_its_place(hub, chain, capsys):
    HfApi().delete_repo(chain.fisher, repo_type="dataset")
    shutil.rmtree(constants.HF_HUB_CACHE)
    links = lineage(chain.model)
    assert links[1].verified is None
    assert "not verified" in links[1].note
    assert links[-1].what == "training data", "the rest is followed nevertheless"
    assert main(["card", "--lineage", chain.model]) == 0


def test_a_revision_may_stand_behind_the_id(hub, chain, base_folder, tmp_path, capsys):
    shutil.copytree(base_folder, tmp_path / "later")
    state = {"schema": 1, "ewc_lambda": 77.0, "global_step": 1, "fisher": None, "anchor": None}
    (tmp_path / "later" / STATE_FILE).write_text(json.dumps(state))
    later = push_checkpoint(tmp_path / "later", chain.model).commit
    first = chain.commits["model"]
    for words, commit, strength in (([f"{chain.model}@{first}"], first, 2), ([f"{chain.model}@main"], later, 77)):
        assert main(["card", "--lineage", *words]) == 0
        assert capsys.readouterr().out.startswith(f"checkpoint  {chain.model} @ {commit}\n")
        assert main(["card", "--model", *words]) == 0
        printed = capsys.readouterr().out
        assert f"| λ | {strength} |" in printed
        assert f"# {chain.model}\n" in printed
    assert main(["card", "--lineage", f"{chain.fisher}@main", "--revision", "main"]) == 0
    assert main(["card", "--lineage", f"{chain.fisher}@main", "--revision", first]) == 2
    assert f"names revision 'main', and the setting names '{first}'" in capsys.readouterr().err


def test_a_model_on_the_hub_is_measured_at_a_commit_and_its_card_takes_no_other_figures(
    hub, chain, tokenizer, tmp_path, capsys
):
    texts = {"old": str(tiny.write_jsonl(tmp_path / "old.jsonl", [{"text": tiny.TEXTS[0]}]))}
    before = evaluate_model(chain.base.id, EvaluationConfig(texts=texts, window=32))
    assert (before["model"]["revision"], before["model"]["fingerprint"]) == (chain.base.revision, chain.base.fingerprint)
    run = {"mode": "model", "ewc_lambda": 2.0, "metrics": before, "log": {}, "seconds": None}
    results, settings = tmp_path / "results.json", {"old": "old", "new": "old"}
    content = {"schema": 1, "base": before["model"], "before": before, "settings": settings, "versions": {}}
    words = ["card", "--model", chain.model, "--results", str(results)]
    save_results({**content, "runs": [run]}, results)
    assert main(words) == 0, "the tiny model was not trained, so its weights are those of the base"
    assert f"`{chain.base.fingerprint}`" in capsys.readouterr().out

    HfApi().upload_folder(folder_path=tiny.save_base(tmp_path / "other", tokenizer, seed=5), repo_id=chain.base.id)
    after = evaluate_model(chain.base.id, EvaluationConfig(texts=texts, window=32))
    there = BaseModel.resolve(tmp_path / "other").fingerprint
    assert (after["model"]["revision"], after["model"]["fingerprint"]) == (HfApi().model_info(chain.base.id).sha, there)
    assert after["texts"] != before["texts"]
    pinned = evaluate_model(chain.base.id, EvaluationConfig(texts=texts, window=32, revision=chain.base.revision))
    assert (pinned["model"], pinned["texts"]) == (before["model"], before["texts"])
    save_results({**content, "runs": [{**run, "metrics": after}]}, results)
    assert main(words) == 2
    told = capsys.readouterr().err
    assert there in told
    assert chain.base.fingerprint in told
    save_results({**content, "base": after["model"], "before": after, "runs": [run]}, results)
    assert main(words) == 2
    assert f"its weights are sha256 {there}" in capsys.readouterr().err, "a base that it was not trained from"


def test_what_may_not_be_seen_is_refused_with_both_reasons(hub, name, capsys):
    with pytest.raises(HubError, match=r"neither a model trained with hf_ewc nor a Fisher"):
        lineage(f"{name}-nothing")
    assert main(["card", "--lineage", f"{name}-nothing"]) == 2
    assert "hf_owner" not in capsys.readouterr().err

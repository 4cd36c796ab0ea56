"""EWCTrainer publishes: one commit, our card, no pickle, no token; trained against a Fisher of the Hub, stored or streamed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
import training
from huggingface_hub import HfApi, hf_hub_download
from safetensors.torch import load_file
from server import Fault
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_ewc import BaseModel, FisherInformation
from hf_ewc.errors import ConfigError, FisherMismatchError

SECRET = "hf_owner"


@pytest.fixture
def published(hub, name, base_folder):
    """(base, Fisher, commit of the Fisher): a base model and its Fisher on the Hub."""
    api = HfApi()
    api.create_repo(f"{name}-base")
    api.upload_folder(repo_id=f"{name}-base", folder_path=base_folder)
    base = BaseModel.resolve(f"{name}-base")
    fisher = training.make_fisher(base.folder)
    fisher.manifest.base_model = base
    return f"{name}-base", f"{name}-fisher", fisher.push_to_hub(f"{name}-fisher").commit


def trained(tmp_path, base: str, fisher: str, **settings):
    trainer = training.ewc_trainer(base, tmp_path / "out", fisher=fisher, ewc_lambda=3.0, max_steps=2, **settings)
    trainer.train()
    return trainer


def pulled(repo: str, path: str, revision: str | None = None) -> str:
    return Path(hf_hub_download(repo, path, revision=revision)).read_text(encoding="utf-8")


def test_a_trained_model_is_published_in_one_commit_with_what_it_was_trained_against(hub, name, published, tmp_path):
    base, fisher, commit = published
    trainer = trained(tmp_path, base, fisher, hub_model_id=name, hub_token=SECRET, hub_private_repo=True)
    hub.log.clear()
    pushed = trainer.push_to_hub(dataset_name="some/corpus", tag="v1")
    assert len([entry for entry in hub.log if "/commit/" in entry[1]]) == 1
    files = set(HfApi().list_repo_files(name))
    assert {"model.safetensors", "config.json", "tokenizer.json", "ewc_state.json", "README.md"} <= files
    assert not [path for path in files if path.endswith((".bin", ".pt", ".pth"))]
    assert HfApi().repo_info(name).private

    state = json.loads(pulled(name, "ewc_state.json", "v1"))
    assert (state["fisher"]["repo_id"], state["fisher"]["revision"]) == (fisher, commit)
    assert (state["anchor"]["id"], state["anchor"]["revision"]) == (base, BaseModel.resolve(base).revision)
    assert state["data"]["dataset"] == "some/corpus"
    assert state["training"]["learning_rate"] == 1e-2
    card = pulled(name, "README.md")
    for part in (base, fisher, commit, state["anchor"]["revision"], "some/corpus"):
        assert part in card

    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    mine = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(mine[key], value) for key, value in model.state_dict().items() if key in mine)
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(base))
    assert trainer.push_to_hub(tag="v1").commit == pushed.commit, "nothing changed, so there is no second commit"
    everything = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [content for content in everything if SECRET.encode() in content], "training_args.bin holds all arguments"


def test_push_to_hub_in_the_settings_publishes_at_the_end(hub, name, published, tmp_path):
    base, fisher, _ = published
    trainer = trained(tmp_path, base, fisher, hub_model_id=name, push_to_hub=True)
    trainer.save_model()
    assert {"model.safetensors", "ewc_state.json"} <= set(HfApi().list_repo_files(name))
    assert "ewc" in pulled(name, "README.md")


def test_in_the_background_a_future_is_given(hub, name, published, tmp_path):
    base, fisher, _ = published
    trainer = trained(tmp_path, base, fisher, hub_model_id=name)
    assert trainer.push_to_hub(blocking=False).result().repo_id == name


def test_a_streamed_fisher_trains_to_the_same_weights(hub, name, published, tmp_path):
    base, fisher, commit = published
    stored = trained(tmp_path / "a", base, fisher, fisher_revision=commit)
    stored.save_model()
    hub.reset()
    streamed = trained(tmp_path / "b", base, fisher, fisher_streaming=True)
    streamed.save_model()
    one, two = (load_file(tmp_path / which / "out" / "model.safetensors") for which in "ab")
    assert all(torch.equal(one[key], two[key]) for key in one)
    state = json.loads((tmp_path / "b" / "out" / "ewc_state.json").read_text())
    assert state["fisher"]["revision"] == commit


def test_a_fisher_of_another_commit_of_the_base_is_refused_and_both_are_named(hub, name, published, base_folder, tmp_path):
    base, fisher, _ = published
    old = BaseModel.resolve(base).revision
    model = tiny.make_model()
    with torch.no_grad():
        model.model.norm.weight += 0.5
    new = HfApi().upload_file(path_or_fileobj=_weights(model, tmp_path), path_in_repo="model.safetensors", repo_id=base).oid
    with pytest.raises(FisherMismatchError) as error:
        training.ewc_trainer(base, tmp_path / "out", fisher=fisher, ewc_lambda=1.0)
    for part in (old[:7], new[:7], "Train from"):
        assert part in str(error.value)
    assert FisherInformation.from_pretrained(fisher).manifest.base_model.revision == old
    pinned = training.ewc_trainer(base, tmp_path / "out2", fisher=fisher, model_init_kwargs={"revision": old})
    assert pinned.ewc.controller.base.revision == old


def _weights(model, folder: Path) -> bytes:
    model.save_pretrained(folder / "other")
    return (folder / "other" / "model.safetensors").read_bytes()


def test_every_save_is_one_commit_without_pickles_and_the_end_finds_its_own_repository(hub, name, published, tmp_path):
    base, fisher, _ = published
    settings = dict(push_to_hub=True, hub_strategy="every_save", hub_always_push=True, save_strategy="steps", save_steps=1)
    trainer = trained(tmp_path, base, fisher, hub_model_id=name, hub_token=SECRET, **settings)
    trainer.save_model()
    commits = [commit.title for commit in HfApi().list_repo_commits(name)]
    assert "Training in progress, step 1" in commits
    for commit in HfApi().list_repo_commits(name):
        files = HfApi().list_repo_files(name, revision=commit.commit_id)
        assert not [path for path in files if path.endswith((".bin", ".pt", ".pth"))]
    assert json.loads(pulled(name, "ewc_state.json"))["global_step"] == 2
    assert HfApi().repo_info(name).private, "until somebody says otherwise"


def test_a_strategy_that_publishes_pickles_is_refused(hub, published, tmp_path):
    base, fisher, _ = published
    with pytest.raises(ConfigError, match="hub_strategy: all_checkpoints"):
        trained(tmp_path, base, fisher, push_to_hub=True, hub_strategy="all_checkpoints")


def test_a_push_in_the_background_that_fails_is_told_and_training_goes_on(hub, name, published, tmp_path, caplog):
    base, fisher, _ = published
    hub.faults.append(Fault(r"POST .*/commit/", status=403, times=1))
    settings = dict(push_to_hub=True, hub_strategy="every_save", hub_always_push=True, save_strategy="steps", save_steps=1)
    trainer = trained(tmp_path, base, fisher, hub_model_id=name, **settings)
    assert trainer.state.global_step == 2
    assert "This checkpoint was not pushed; training goes on." in caplog.text


def test_token_and_branch_of_the_settings_are_used(hub, name, published, tmp_path, monkeypatch):
    base, fisher, _ = published
    settings = dict(hub_model_id=name, hub_token=SECRET, hub_revision="exp/a")
    trainer = trained(tmp_path, base, fisher, **settings)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert trainer.push_to_hub().commit == HfApi(token=SECRET).repo_info(name, revision="exp/a").sha

"""A merge of models and a Fisher that lie on the Hub: pinned, whole (chat template, too), recorded by commit."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import tiny
import torch
import training
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_ewc.artifact import BaseModel, FisherInformation
from hf_ewc.errors import DataError, HubError
from hf_ewc.merge import merge_models


def upload(folder, repo_id, **more):
    api = HfApi()
    api.create_repo(repo_id, exist_ok=True, **more)
    return api.upload_folder(repo_id=repo_id, folder_path=folder).oid


@pytest.fixture
def on_hub(hub, name, tokenizer, tmp_path):
    base = tiny.save_base(tmp_path / "b", tokenizer)
    commit = upload(base, f"{name}-base")
    fisher = training.make_fisher(base).push_to_hub(f"{name}-fisher")
    adapted = tiny.save_base(tmp_path / "a", tokenizer, seed=5)
    (adapted / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (adapted / "LICENSE").write_text("terms")
    pinned = FisherInformation.from_pretrained(f"{name}-fisher")
    model = BaseModel.resolve(base)
    state = {
        "schema": 1,
        "ewc_lambda": 1.0,
        "fisher": {"source": f"{name}-fisher", "sha256": pinned.sha256, "repo_id": f"{name}-fisher", "revision": fisher.commit},
        "anchor": {"id": f"{name}-base", "revision": commit, "fingerprint": model.fingerprint},
    }
    (adapted / "ewc_state.json").write_text(json.dumps(state))
    return name, commit, fisher.commit, upload(adapted, f"{name}-lt"), adapted


def test_everything_by_its_id_and_what_is_recorded_is_pinned(on_hub, tmp_path):
    name, base, fisher, adapted, folder = on_hub
    newer = tiny.make_model(seed=9)
    newer.save_pretrained(tmp_path / "n")
    upload(tmp_path / "n", f"{name}-base")  # main moved on; the record names the commit
    merge_models(None, f"{name}-lt", None, 1.0, tmp_path / "out")
    merge = json.loads((tmp_path / "out" / "ewc_state.json").read_text())["merge"]
    assert (merge["base"]["id"], merge["base"]["revision"]) == (f"{name}-base", base)
    assert (merge["adapted"]["id"], merge["adapted"]["revision"]) == (f"{name}-lt", adapted)
    assert (merge["fisher"]["repo_id"], merge["fisher"]["revision"]) == (f"{name}-fisher", fisher)
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "labas"}], tokenize=False) == "labas"
    merge_models(tmp_path / "b", folder, f"{name}-fisher@{fisher}", 1.0, tmp_path / "local")
    found = [AutoModelForCausalLM.from_pretrained(tmp_path / each).state_dict() for each in ("out", "local")]
    assert all(torch.equal(a, b) for a, b in zip(*(each.values() for each in found), strict=True))


def test_what_is_in_the_cache_is_merged_offline(on_hub, tmp_path):
    name, *_ = on_hub
    merge_models(None, f"{name}-lt", None, 1.0, tmp_path / "out")
    code = f"from hf_ewc.merge import merge_models; merge_models(None, '{name}-lt', None, 1.0, '{tmp_path}/again')"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_no_such_model_or_fisher(on_hub, tmp_path):
    name, *_ = on_hub
    with pytest.raises(DataError, match="the adapted model"):
        merge_models(None, f"{name}-nothing", None, 1.0, tmp_path / "out")
    with pytest.raises(DataError, match="the base model"):
        merge_models(f"{name}-nothing", f"{name}-lt", None, 1.0, tmp_path / "out")
    with pytest.raises(HubError, match="nothing"):
        merge_models(None, f"{name}-lt", f"{name}-nothing", 1.0, tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""Which model θ* is, and its weights read back from its files."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from hf_ewc.artifact import AnchorTensors, BaseModel, tokenizer_sha256
from hf_ewc.errors import DataError, EWCError, FisherMismatchError

COMMIT = "4f1c2d0" + "a" * 33


@pytest.fixture
def folder(base_folder, tmp_path):
    """A copy of the tiny base that a test may damage."""
    return Path(shutil.copytree(base_folder, tmp_path / "base"))


@pytest.fixture
def hub(base_folder, tmp_path, monkeypatch):
    """The Hub's cache as the client lays it out, holding `me/tiny` at one commit."""
    repo = tmp_path / "hub" / "models--me--tiny"
    snapshot = repo / "snapshots" / COMMIT
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    hashes = BaseModel.resolve(base_folder).files_sha256
    for file in base_folder.iterdir():
        blob = repo / "blobs" / hashes.get(file.name, f"{abs(hash(file.name)):040x}"[:40])
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repo


def test_a_local_folder_is_described_without_loading_the_model(base_folder, tokenizer):
    base, model = BaseModel.resolve(base_folder), tiny.make_model(len(tokenizer))
    assert (base.id, base.revision, base.folder) == (str(base_folder), None, base_folder)
    assert (base.architecture, base.vocab_size, base.dtype) == ("Gemma2ForCausalLM", len(tokenizer), "float32")
    assert base.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert base.tokenizer_sha256 == tokenizer_sha256(tokenizer)
    assert list(base.files_sha256) == ["model.safetensors"]
    assert BaseModel.resolve(str(base_folder)) == base


def test_the_fingerprint_follows_the_weights_wherever_they_lie(base_folder, folder, tokenizer, tmp_path):
    base, copy = BaseModel.resolve(base_folder), BaseModel.resolve(folder)
    other = BaseModel.resolve(tiny.save_base(tmp_path / "other", tokenizer, seed=1))
    assert base.same_weights(copy)
    assert base == copy
    assert not base.same_weights(other)
    assert base != other


def test_a_hub_id_is_pinned_to_its_commit_and_found_in_the_cache_offline(hub, base_folder):
    for revision in (None, "main", COMMIT):
        base = BaseModel.resolve("me/tiny", revision)
        assert (base.id, base.revision, base.label) == ("me/tiny", COMMIT, "me/tiny@4f1c2d0")
        assert base.same_weights(BaseModel.resolve(base_folder))


def test_blobs_in_the_cache_are_known_by_their_names_and_not_hashed_again(hub):
    link = hub / "snapshots" / COMMIT / "model.safetensors"
    link.resolve().rename(hub / "blobs" / ("f" * 64))
    link.unlink()
    link.symlink_to(hub / "blobs" / ("f" * 64))
    assert BaseModel.resolve("me/tiny").files_sha256 == {"model.safetensors": "f" * 64}


@pytest.mark.parametrize(
    ("model_id", "revision", "part"),
    [
        ("me/unknown", None, "hf download me/unknown"),
        ("me/tiny", "no-such-branch", "at 'no-such-branch'"),
        ("./a/b/c", None, "neither a folder on this machine nor an id"),
    ],
)
def test_a_model_that_cannot_be_had_says_where_it_was_looked_for(hub, model_id, revision, part):
    with pytest.raises(DataError, match="the base model") as error:
        BaseModel.resolve(model_id, revision)
    assert part in str(error.value)


def test_a_revision_of_a_local_folder_is_ignored_aloud(base_folder, caplog):
    with caplog.at_level(logging.WARNING):
        assert BaseModel.resolve(base_folder, "main").revision is None
    assert "'main' is ignored" in caplog.text


def test_pickled_weights_are_refused_by_name(folder):
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"pickles only \(pytorch_model\.bin\)[\s\S]*save_pretrained"):
        BaseModel.resolve(folder)


def test_an_adapter_a_file_and_an_empty_folder_are_not_a_base(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no model\.safetensors"):
        BaseModel.resolve(tmp_path / "empty")
    with pytest.raises(DataError, match="is a file"):
        BaseModel.resolve(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(DataError, match="merge_and_unload"):
        BaseModel.resolve(folder)


def test_damaged_weights_are_named(folder):
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(DataError, match=r"model\.safetensors is not a whole safetensors file"):
        BaseModel.resolve(folder)


def test_sharded_weights_are_all_hashed_and_all_required(tmp_path, tokenizer):
    folder = tmp_path / "sharded"
    model = tiny.make_model(len(tokenizer))
    model.save_pretrained(folder, max_shard_size="40KB")
    base = BaseModel.resolve(folder)
    assert len(base.files_sha256) > 1
    assert base.tokenizer_sha256 is None
    anchor = AnchorTensors(base, [name for name, _ in model.named_parameters()])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(anchor.read(name), parameter.detach(), rtol=0, atol=0)
    (folder / next(iter(base.files_sha256))).unlink()
    with pytest.raises(DataError, match="lacks 1 of"):
        BaseModel.resolve(folder)


def test_the_json_round_trip_forgets_only_the_place(folder):
    base = BaseModel.resolve(folder)
    again = BaseModel.from_dict(json.loads(json.dumps(base.to_dict())))
    assert again == base
    assert again.to_dict() == base.to_dict()
    assert again.folder is None
    assert again.located().folder == folder
    tiny.make_model(320, seed=5).save_pretrained(folder)
    with pytest.raises(FisherMismatchError, match="no longer the ones") as error:
        again.located()
    assert base.fingerprint in str(error.value)
    assert BaseModel.resolve(folder).fingerprint in str(error.value)


def test_the_tokenizer_hash_survives_saving_padding_and_a_new_pad_token(base_folder):
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    before = tokenizer_sha256(tokenizer)
    tokenizer(["a", "a longer one"], padding=True, truncation=True, max_length=4)
    assert json.loads(tokenizer.backend_tokenizer.to_str())["truncation"] is not None
    tokenizer.pad_token = tokenizer.eos_token  # as TRL does
    assert tokenizer_sha256(tokenizer) == before == tokenizer_sha256(tiny.make_tokenizer())
    tokenizer.add_tokens(["<lt>"])
    assert tokenizer_sha256(tokenizer) != before
    assert tokenizer_sha256(tiny.make_tokenizer(300)) != before


def test_a_slow_tokenizer_is_hashed_by_its_vocabulary():
    class Slow:
        def __init__(self, vocab):
            self.get_vocab = lambda: vocab

    assert tokenizer_sha256(Slow({"a": 0, "b": 1})) == tokenizer_sha256(Slow({"b": 1, "a": 0}))
    assert tokenizer_sha256(Slow({"a": 0, "b": 1})) != tokenizer_sha256(Slow({"a": 1, "b": 0}))


def test_the_anchor_is_the_saved_model_in_whole_and_in_slices(base_folder, tokenizer):
    model = tiny.make_model(len(tokenizer))
    base = BaseModel.resolve(base_folder)
    anchor = AnchorTensors(base, [name for name, _ in model.named_parameters()])
    assert anchor.sha == base.fingerprint
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(anchor.read(name), parameter.detach(), rtol=0, atol=0)
        part = (slice(3, 17),)
        torch.testing.assert_close(anchor.read(name, part), parameter.detach()[part], rtol=0, atol=0)
    both = (slice(1, 5), slice(2, 9))
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(anchor.read(name, both), model.get_parameter(name).detach()[both], rtol=0, atol=0)


def test_the_anchor_keeps_the_dtype_of_the_file(tmp_path, tokenizer):
    tiny.make_model(len(tokenizer)).bfloat16().save_pretrained(tmp_path)
    base = BaseModel.resolve(tmp_path)
    assert base.dtype == "bfloat16"
    assert AnchorTensors(base, ["model.norm.weight"]).read("model.norm.weight").dtype == torch.bfloat16


def test_an_anchor_tensor_survives_what_happens_to_its_file_and_to_its_twins(folder):
    anchor = AnchorTensors(BaseModel.resolve(folder), ["model.embed_tokens.weight"])
    expected = anchor.read("model.embed_tokens.weight").clone()
    whole, part = anchor.read("model.embed_tokens.weight"), anchor.read("model.embed_tokens.weight", (slice(4, 8),))
    anchor.read("model.embed_tokens.weight").fill_(7)
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(bytes((folder / "model.safetensors").stat().st_size))  # in place: same file, other bytes
    torch.testing.assert_close(whole, expected, rtol=0, atol=0)
    torch.testing.assert_close(part, expected[4:8], rtol=0, atol=0)


def test_an_anchor_that_is_overwritten_during_the_run_is_refused(folder):
    anchor = AnchorTensors(BaseModel.resolve(folder), ["model.norm.weight"])
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "new.safetensors")
    (folder / "new.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(EWCError, match="changed or removed after it had been checked"):
        anchor.read("model.norm.weight")


def test_a_checkpoint_that_transformers_renames_on_loading_is_read_through_the_model(tmp_path, caplog):
    """Mixtral's files hold one matrix per expert, its parameters one stack of all."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(vocab_size=64, num_local_experts=2, **sizes))
    model.save_pretrained(tmp_path)
    names = [name for name, _ in model.named_parameters()]
    assert not set(names) <= set(load_file(tmp_path / "model.safetensors"))
    with caplog.at_level(logging.INFO, logger="hf_ewc"):
        anchor = AnchorTensors(BaseModel.resolve(tmp_path), names)
    assert "use other names" in caplog.text
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(anchor.read(name), parameter.detach(), rtol=0, atol=0)
        torch.testing.assert_close(anchor.read(name, (slice(0, 1),)), parameter.detach()[:1], rtol=0, atol=0)
    anchor.read(names[0]).zero_()
    torch.testing.assert_close(anchor.read(names[0]), model.get_parameter(names[0]).detach(), rtol=0, atol=0)


def test_an_anchor_without_the_wanted_parameters_is_refused(base_folder):
    with pytest.raises(FisherMismatchError, match=r"has no parameter model\.extra\.weight"):
        AnchorTensors(BaseModel.resolve(base_folder), ["model.norm.weight", "model.extra.weight"])

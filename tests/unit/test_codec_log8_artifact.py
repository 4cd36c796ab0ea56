"""A Fisher stored as `log8`: what is in the folder, that training takes it, and that damage is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny
import torch
import training
from safetensors.torch import load_file, save_file
from test_artifact_store import make_fisher, tree

from hf_ewc.artifact import BaseModel, FisherInformation, log8
from hf_ewc.artifact.codec import CODECS
from hf_ewc.artifact.files import TensorFiles, sha256_file
from hf_ewc.artifact.manifest import digest_of
from hf_ewc.config import fisher as fisher_settings
from hf_ewc.errors import FisherFormatError

SHARD = "fisher-00001-of-00001.safetensors"
NORM = "model.norm.weight"


def assert_same(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.fixture(scope="module")
def base(base_folder) -> BaseModel:
    return BaseModel.resolve(base_folder)


@pytest.fixture
def folder(base, tmp_path) -> Path:
    return make_fisher(base).save_pretrained(tmp_path / "fisher", codec="log8")


def test_settings_and_artifact_know_the_same_codecs():
    assert tuple(CODECS) == fisher_settings.CODECS


def test_a_log8_fisher_loads_and_says_what_it_is(base, folder):
    original, loaded = make_fisher(base), FisherInformation.from_pretrained(folder)
    assert (loaded.manifest.storage.codec, loaded.manifest.storage.block) == ("log8", 128)
    assert loaded.manifest.totals.zeros == original.manifest.totals.zeros
    assert loaded.trace == pytest.approx(original.trace, rel=2e-3)
    for name in original.names:
        assert_same(loaded.read(name), log8.decode(*log8.encode(original.read(name))))
        index = tuple(slice(size // 3, size // 3 + 5) for size in original.shape(name))
        assert_same(loaded.read(name, index), loaded.read(name)[index])
        assert_same(loaded.read(name, index[:1]), loaded.read(name)[index[:1]])
    weight_map = json.loads((folder / "fisher.safetensors.index.json").read_text())["weight_map"]
    assert len(weight_map) == 3 * len(original)
    assert weight_map[f"{NORM}::span"] == SHARD
    assert "2^((q − 255) / 254 · span)" in (folder / "README.md").read_text(encoding="utf-8")


def test_the_same_fisher_gives_the_same_bytes(base, folder, tmp_path):
    assert tree(folder) == tree(make_fisher(base).save_pretrained(tmp_path / "again", codec="log8"))
    loaded = FisherInformation.from_pretrained(folder)
    rewritten = loaded.save_pretrained(tmp_path / "rewritten", codec="log8")
    assert (rewritten / SHARD).read_bytes() == (folder / SHARD).read_bytes()


def test_training_takes_it_as_the_values_that_it_decodes_to(base_folder, fisher, tmp_path):
    small = fisher.save_pretrained(tmp_path / "log8", codec="log8")
    wide = FisherInformation.from_pretrained(small).save_pretrained(tmp_path / "float32", codec="float32")
    trained = []
    for source in (small, wide):
        trainer = training.ewc_trainer(base_folder, tmp_path / "out", fisher=str(source), ewc_lambda=10.0, max_steps=3)
        trainer.train()
        trained.append((training.weights(trainer.model), trainer.state.log_history[0]["ewc/kl_nats"]))
    assert training.largest_difference(trained[0][0], trained[1][0]) == 0
    assert trained[0][1] == trained[1][1]
    start = training.weights(tiny.make_model())
    assert training.largest_difference(trained[0][0], start) > 0


# Damage, under hashes that fit


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD)
    sign(folder, lambda data: None)


def sign(folder: Path, change) -> None:
    """Change the manifest and make sizes, hashes and digest fit."""
    path = folder / "fisher_config.json"
    data = json.loads(path.read_text())
    record = {"sha256": sha256_file(folder / SHARD), "size": (folder / SHARD).stat().st_size}
    data["storage"]["shards"] = {SHARD: record}
    change(data)
    data.pop("digest")
    data["digest"] = digest_of(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("scale", math.nan, f"{NORM}::scale is not finite: 1 of 1"),
        ("scale", math.inf, f"{NORM}::scale is not finite: 1 of 1"),
        ("scale", -1.0, f"{NORM}::scale has negative values (least -1)"),
        ("span", math.nan, f"{NORM}::span has 1 of 1 values outside 0 to 278"),
        ("span", -0.5, f"{NORM}::span has 1 of 1 values outside 0 to 278"),
        ("span", 279.0, f"{NORM}::span has 1 of 1 values outside 0 to 278"),
    ],
)
def test_impossible_scales_and_spans_are_refused(folder, key, value, part):
    rewrite(folder, lambda tensors: tensors[f"{NORM}::{key}"].fill_(value))
    with pytest.raises(FisherFormatError) as error:
        FisherInformation.from_pretrained(folder)
    assert part in str(error.value)
    assert "Nothing was loaded" in str(error.value)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: t.pop(f"{NORM}::span"), f"{NORM}::span (1,) is in the manifest but in no file"),
        (lambda t: t.update({NORM: t[NORM].float()}), f"{NORM} is F32 (32,) in {SHARD}, recorded is U8 (32,)"),
        (lambda t: t.update({f"{NORM}::scale": torch.ones(2)}), f"{NORM}::scale is F32 (2,) in {SHARD}, recorded is F32 (1,)"),
        (lambda t: t.update({"x::scale": torch.ones(1)}), f"x::scale is in {SHARD} but not in the manifest"),
    ],
    ids=["no span", "codes as floats", "blocks of another size", "surplus"],
)
def test_all_three_tensors_of_a_parameter_must_be_there(folder, change, part):
    rewrite(folder, change)
    with pytest.raises(FisherFormatError) as error:
        FisherInformation.from_pretrained(folder)
    assert part in str(error.value)


def test_a_cut_off_file_and_another_block_size_are_refused(folder):
    whole = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(whole[:-7])
    with pytest.raises(FisherFormatError, match=f"recorded are {len(whole):,}; was a copy cut off"):
        FisherInformation.from_pretrained(folder)
    (folder / SHARD).write_bytes(whole)
    sign(folder, lambda data: data["storage"].update(block=64))
    with pytest.raises(FisherFormatError, match=r"storage\.block is 64, but log8 has 128"):
        FisherInformation.from_pretrained(folder)
    assert TensorFiles([folder / SHARD]).headers[f"{NORM}::span"] == ("F16", (1,))

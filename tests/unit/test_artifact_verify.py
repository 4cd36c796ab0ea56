"""Damaged, edited, foreign and mismatched Fishers are refused before anything is loaded (PITFALLS H1 to H3)."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_artifact_store import make_fisher
from transformers import AutoConfig, AutoModelForCausalLM

from hf_ewc.artifact import BaseModel, FisherInformation
from hf_ewc.artifact.files import sha256_file
from hf_ewc.artifact.manifest import digest_of
from hf_ewc.errors import EWCError, FisherFormatError, FisherMismatchError, HubUnavailableError

SHARDS = ("fisher-00001-of-00002.safetensors", "fisher-00002-of-00002.safetensors")
NORM = "model.norm.weight"  # the last parameter, in the last shard


@pytest.fixture(scope="session")
def base(base_folder) -> BaseModel:
    return BaseModel.resolve(base_folder)


@pytest.fixture
def folder(base, tmp_path) -> Path:
    """A healthy Fisher in two files."""
    path = make_fisher(base).save_pretrained(tmp_path / "fisher", max_shard_size="45KB")
    assert sorted(file.name for file in path.glob("*.safetensors")) == list(SHARDS)
    return path


def edit(folder: Path, change: Callable[[dict], object], sign: bool = True) -> None:
    """Change the manifest; `sign` makes its digest fit again, as a careful forger or a buggy writer would."""
    path = folder / "fisher_config.json"
    data = json.loads(path.read_text())
    change(data)
    if sign:
        data.pop("digest")
        data["digest"] = digest_of(data)
    path.write_text(json.dumps(data))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of the last shard and make size, hash and digest fit: only the content is wrong."""
    path = folder / SHARDS[1]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    record = {"sha256": sha256_file(path), "size": path.stat().st_size}
    edit(folder, lambda data: data["storage"]["shards"].update({SHARDS[1]: record}))


def refused(folder: Path, *parts: str) -> str:
    with pytest.raises(FisherFormatError) as error:
        FisherInformation.from_pretrained(folder)
    message = str(error.value)
    for part in (*parts, str(folder), "Nothing was loaded"):
        assert part in message
    return message


def test_a_healthy_fisher_loads(folder):
    assert FisherInformation.from_pretrained(str(folder)).sha256 == FisherInformation.from_pretrained(folder).sha256


# Files


def test_a_truncated_file_is_refused_with_both_sizes(folder):
    size = (folder / SHARDS[1]).stat().st_size
    with open(folder / SHARDS[1], "r+b") as file:
        file.truncate(size - 100)
    refused(folder, f"{SHARDS[1]} has {size - 100:,} bytes, recorded are {size:,}")


@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_flipped_bit_anywhere_is_found(folder, position, bit):
    path = folder / SHARDS[0]
    whole = path.read_bytes()
    place = int(position * len(whole))
    path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
    try:
        refused(folder, f"{SHARDS[0]} has sha256", "recorded is")
    finally:
        path.write_bytes(whole)


def test_missing_and_surplus_files_are_reported_together(folder):
    (folder / SHARDS[0]).rename(folder / "fisher-00003-of-00003.safetensors")
    (folder / "fisher.safetensors.index.json").unlink()
    refused(
        folder,
        f"{SHARDS[0]} is missing",
        "fisher-00003-of-00003.safetensors is not in the manifest",
        "fisher.safetensors.index.json is missing",
    )


@pytest.mark.parametrize("name", ["fisher.pkl", "fisher.pt", "pytorch_model.bin", "fisher.pickle"])
def test_pickles_are_refused_by_name_and_never_opened(folder, name):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (folder.parent / "sprung",))

    (folder / name).write_bytes(pickle.dumps(Trap()))
    refused(folder, f"{name} is a pickle")
    with pytest.raises(FisherFormatError, match=r"is a file.*pickles are not read"):
        FisherInformation.from_pretrained(folder / name)
    assert not (folder.parent / "sprung").exists()


def test_a_shard_name_cannot_lead_out_of_the_folder(folder):
    def escape(data):
        shards = data["storage"]["shards"]
        shards["../fisher-00001-of-00002.safetensors"] = shards.pop(SHARDS[0])

    (folder / SHARDS[0]).rename(folder.parent / SHARDS[0])
    edit(folder, escape)
    refused(folder, "../fisher-00001-of-00002.safetensors is not a shard's name")


# Headers and index, under hashes that fit


@pytest.mark.parametrize("header", [struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", 8) + b"not json", b"\x00"])
def test_an_oversized_or_broken_header_is_refused(folder, header):
    path = folder / SHARDS[1]
    path.write_bytes(header)
    record = {"sha256": sha256_file(path), "size": len(header)}
    edit(folder, lambda data: data["storage"]["shards"].update({SHARDS[1]: record}))
    refused(folder, f"{SHARDS[1]} is not a whole safetensors file")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: t.pop(NORM), f"{NORM} (32,) is in the manifest but in no file"),
        (lambda t: t.update(extra=torch.ones(2)), f"extra is in {SHARDS[1]} but not in the manifest"),
        (lambda t: t.update({NORM: t[NORM][:31].clone()}), f"{NORM} is BF16 (31,) in {SHARDS[1]}, recorded is BF16 (32,)"),
        (lambda t: t.update({NORM: t[NORM].float()}), f"{NORM} is F32 (32,) in {SHARDS[1]}, recorded is BF16 (32,)"),
        (lambda t: t.update({NORM: t[NORM].half()}), f"{NORM} is F16 (32,)"),
    ],
    ids=["missing tensor", "surplus tensor", "shape", "float32", "float16"],
)
def test_headers_must_agree_with_the_manifest(folder, change, part):
    rewrite(folder, change)
    refused(folder, part)


def test_the_index_must_agree_with_the_files(folder):
    path = folder / "fisher.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][NORM] = SHARDS[0]
    path.write_text(json.dumps(index))
    refused(folder, f"says {NORM} is in {SHARDS[0]}", f"does not say that {NORM} is in {SHARDS[1]}")
    for broken in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": []}}'):
        path.write_text(broken)
        refused(folder, "is not an index of tensors")


# Values, under hashes that fit


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (float("nan"), f"{NORM} is not finite: 1 of 32"),
        (float("inf"), f"{NORM} is not finite: 1 of 32"),
        (-1.0, f"{NORM} has negative values (least -1)"),
    ],
)
def test_values_must_be_finite_and_not_negative(folder, value, part):
    rewrite(folder, lambda tensors: tensors[NORM][7].fill_(value))
    refused(folder, part)


def test_all_bad_tensors_are_named_in_one_error(folder):
    rewrite(folder, lambda tensors: [tensor.fill_(-1) for tensor in tensors.values()])
    message = refused(folder)
    assert message.count("has negative values") == len(load_file(folder / SHARDS[1])) > 1


# Manifest


def test_an_edited_manifest_is_refused(folder):
    edit(folder, lambda data: data["estimator"].update(normalizer=5.0), sign=False)
    refused(folder, "digest recorded", "it was edited after it was written")


def test_schema_1_which_lacks_later_fields_is_still_read(folder):
    def older(data):
        data["schema"] = 1
        for name in ("fallback", "self_check", "draws", "batch_size", "trace_stderr", "stability"):
            del data["estimator"][name]
        for probe in data["probes"]:
            for name in ("name", "task", "num_fewshot"):
                del probe[name]

    edit(folder, older)
    estimator = FisherInformation.from_pretrained(folder).manifest.estimator
    assert (estimator.fallback, estimator.self_check) == ([], None)


def test_a_newer_schema_asks_for_a_newer_version(folder):
    edit(folder, lambda data: data.update(schema=3, novelty=True))
    refused(folder, "schema 3", "needs a newer hf_ewc", "pip install -U hf_ewc")


@pytest.mark.parametrize(
    "text", ["", '{"schema": 1', "[]", "null", '{"schema": 1, "totals": NaN}', '{"schema": 1e999}', "\ud800"]
)
def test_a_manifest_that_is_no_json_object_is_refused(folder, text):
    (folder / "fisher_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(folder, "fisher_config.json")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda d: d.pop("estimator"), "field `estimator` is missing"),
        (lambda d: d.update(theta="x"), "unknown field `theta`"),
        (lambda d: d["base_model"].pop("fingerprint"), "field `base_model.fingerprint` is missing"),
        (lambda d: d["base_model"].update(folder="/etc"), "unknown field `base_model.folder`"),
        (lambda d: d["base_model"].update(vocab_size="320"), "field `base_model.vocab_size` holds '320', not a int"),
        (lambda d: d["probes"][0].update(examples=True), "field `probes[0].examples` holds True, not a int"),
        (lambda d: d["probes"].clear(), "probes is empty"),
        (lambda d: d.update(parameters={}), "parameters is empty"),
        (lambda d: d["parameters"].update({NORM: {"shape": "32"}}), f"field `parameters.{NORM}` holds '32'"),
        (lambda d: d["parameters"].update({NORM: {"size": [32]}}), "field `parameters"),
        (lambda d: d["storage"].update(codec="log4"), "codec 'log4' is not one of float32, bfloat16, log8"),
        (lambda d: d["storage"].update(shards={}), "storage.shards is empty"),
        (lambda d: d["estimator"].update(reduction="mean"), "estimator.reduction is 'mean'"),
        (lambda d: d["estimator"].update(normalizer=0), "estimator.normalizer must be a finite number above 0"),
        (lambda d: d["estimator"].update(reduction="mean_per_scored_token"), "a mean per scored token needs 1"),
        (lambda d: d.update(schema=0), "schema is 0"),
        (lambda d: d.update(schema="1"), "field `schema` holds '1'"),
    ],
)
def test_every_field_is_checked_and_named(folder, change, part):
    edit(folder, change)
    refused(folder, part)


def test_all_problems_of_the_manifest_come_in_one_error(folder):
    def change(data):
        data["base_model"].pop("dtype")
        data["probes"][0]["weight"] = "1"
        data["extra"] = 1

    edit(folder, change)
    refused(folder, "`base_model.dtype` is missing", "`probes[0].weight` holds '1'", "unknown field `extra`")


# Places


def test_a_hub_id_says_how_to_get_it_and_a_wrong_path_that_it_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnavailableError, match=r"no folder 'me/fisher'[\s\S]*hf download me/fisher --repo-type dataset"):
        FisherInformation.from_pretrained("me/fisher", revision="v1")
    with pytest.raises(EWCError, match="names revision 'v1', and the setting names 'v2'"):
        FisherInformation.from_pretrained("me/fisher@v1", revision="v2")
    for path in (tmp_path / "nowhere", "nowhere", "./a/b"):
        with pytest.raises(EWCError, match="there is no folder"):
            FisherInformation.from_pretrained(path)


def test_a_model_folder_is_no_fisher_and_a_fisher_no_model(base_folder, folder):
    refused(base_folder, "so it is not a Fisher. It is a model")
    with pytest.raises((OSError, ValueError)):
        AutoConfig.from_pretrained(folder)
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(OSError, match="no file named"):  # not even with a config at hand
        AutoModelForCausalLM.from_pretrained(folder, config=AutoConfig.from_pretrained(base_folder))


# The right base


def test_the_same_base_fits_wherever_it_lies(folder, base, tokenizer, tmp_path):
    fisher = FisherInformation.from_pretrained(folder)
    fisher.check_base(base, tokenizer)
    fisher.check_base(BaseModel.resolve(tiny.save_base(tmp_path / "again", tokenizer)))
    without = tmp_path / "bare"
    tiny.make_model(len(tokenizer)).save_pretrained(without)
    fisher.check_base(BaseModel.resolve(without))  # no tokenizer beside it: nothing to compare
    assert fisher.manifest.base_model == base


def test_other_weights_of_the_same_shapes_are_refused(folder, base, tokenizer, tmp_path):
    other = BaseModel.resolve(tiny.save_base(tmp_path / "other", tokenizer, seed=1))
    with pytest.raises(FisherMismatchError) as error:
        FisherInformation.from_pretrained(folder).check_base(other, tokenizer)
    message = str(error.value)
    for part in (base.id, other.id, base.fingerprint[:12], other.fingerprint[:12], str(folder), "Nothing was trained"):
        assert part in message
    assert "vocabulary " not in message
    assert "architecture" not in message


def test_everything_that_differs_is_named_with_both_values(folder, tmp_path):
    tokenizer = tiny.make_tokenizer(300)
    other = BaseModel.resolve(tiny.save_base(tmp_path / "small", tokenizer))
    with pytest.raises(FisherMismatchError) as error:
        FisherInformation.from_pretrained(folder).check_base(other)
    message = str(error.value)
    assert "vocabulary   " in message
    assert f"fisher 320{' ' * 4}"[:10] in message
    assert "model 300" in message
    assert "tokenizer" in message
    columns = {line.index(" model ") for line in message.splitlines() if line.startswith("    ")}
    assert len(columns) == 1, "values must stand below each other"


def test_another_tokenizer_on_the_same_weights_is_refused(folder, base):
    with pytest.raises(
        FisherMismatchError, match=r"tokenizer +fisher sha256 \w{12} +model sha256 \w{12}\nThe weights are the same"
    ):
        FisherInformation.from_pretrained(folder).check_base(base, tiny.make_tokenizer(300))


# The right parameters


@pytest.fixture
def shapes() -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in tiny.make_model().named_parameters()}


def test_full_coverage_is_silent(folder, shapes):
    fisher = FisherInformation.from_pretrained(folder)
    assert fisher.check_parameters(shapes) == fisher.check_parameters(shapes, "ignore") == []


def test_a_resized_vocabulary_is_refused_with_both_shapes_or_left_out(folder, shapes):
    shapes["model.embed_tokens.weight"] = (328, 32)
    fisher = FisherInformation.from_pretrained(folder)
    assert fisher.check_parameters(shapes, missing="ignore") == ["model.embed_tokens.weight"]
    with pytest.raises(FisherMismatchError) as error:
        fisher.check_parameters(shapes)
    assert str(error.value) == (
        f"the Fisher '{folder}' does not fit this model.\n"
        "    model.embed_tokens.weight   fisher (320, 32)   model (328, 32)\n"
        "The vocabulary was probably resized after the Fisher was estimated. Estimate it again (`hf-ewc fisher …`), or set\n"
        "`ewc_missing: ignore` to leave this 1 of 24 tensors unpenalised. Nothing was trained."
    )


def test_parameters_that_only_one_side_has_are_shown_as_such(folder, shapes):
    fisher = FisherInformation.from_pretrained(folder)
    shapes["score.weight"] = (2, 32)
    assert fisher.check_parameters(shapes, "ignore") == ["score.weight"]
    with pytest.raises(FisherMismatchError, match=r"score\.weight   fisher –   model \(2, 32\)"):
        fisher.check_parameters(shapes)
    del shapes["score.weight"], shapes[NORM]
    for missing in ("error", "ignore"):
        with pytest.raises(FisherMismatchError, match=r"model\.norm\.weight   fisher \(32,\)   model –\nThe Fisher protects"):
            fisher.check_parameters(shapes, missing)


def test_a_long_list_of_differences_is_cut(folder, shapes):
    renamed = {f"module.{name}": shape for name, shape in shapes.items()}
    with pytest.raises(FisherMismatchError, match=r"… and 38 more\nThe Fisher protects tensors"):
        FisherInformation.from_pretrained(folder).check_parameters(renamed)

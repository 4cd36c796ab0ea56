"""The Fisher in memory and on disk: what is saved comes back, in whole, in slices, mixed, recoded, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ewc.artifact import BaseModel, EstimatorRecord, FisherInformation, ProbeRecord
from hf_ewc.artifact.codec import get_codec
from hf_ewc.artifact.files import reader_of
from hf_ewc.errors import ConfigError, EWCError, FisherFormatError, FisherMismatchError

T = 50.0


def make_fisher(base: BaseModel, seed: int = 0, normalizer: float = T, **estimator) -> FisherInformation:
    """A made-up Fisher of the tiny base, with the wide spread of a real one and some exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in tiny.make_model().named_parameters():
        spread = torch.randn(parameter.shape, generator=generator) * 3 - 10
        tensors[name] = spread.exp() * (torch.rand(parameter.shape, generator=generator) > 0.05)
    probe = ProbeRecord(kind="text", dataset="en.jsonl", split="train", ids_sha256="ab" * 32, examples=9, scored_tokens=1000)
    record = EstimatorRecord(normalizer=normalizer, seed=seed, max_length=64, **estimator)
    return FisherInformation.from_tensors(tensors, base=base, probes=[probe], estimator=record)


@pytest.fixture(scope="session")
def base(base_folder) -> BaseModel:
    return BaseModel.resolve(base_folder)


@pytest.fixture
def fisher(base) -> FisherInformation:
    return make_fisher(base)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_values(left: FisherInformation, right: FisherInformation, **tolerance) -> None:
    assert left.names == right.names
    for name in left.names:
        torch.testing.assert_close(left.per_token(name), right.per_token(name), **tolerance)


def test_float32_comes_back_bit_for_bit(fisher, tmp_path):
    loaded = FisherInformation.from_pretrained(fisher.save_pretrained(tmp_path / "f", codec="float32"))
    assert_same_values(loaded, fisher, rtol=0, atol=0)
    assert loaded.manifest.estimator == fisher.manifest.estimator
    assert loaded.manifest.probes == fisher.manifest.probes
    assert loaded.trace == pytest.approx(fisher.trace, rel=1e-12)
    assert loaded.source == str(tmp_path / "f")


def test_bfloat16_is_the_default_and_loses_less_than_half_a_percent(fisher, tmp_path):
    loaded = FisherInformation.from_pretrained(fisher.save_pretrained(tmp_path / "f"))
    assert loaded.manifest.storage.codec == "bfloat16"
    assert_same_values(loaded, fisher, rtol=2**-8, atol=0)
    assert loaded.manifest.totals.zeros == fisher.manifest.totals.zeros


def test_per_token_is_the_sum_divided_by_the_scored_tokens(fisher):
    name = "model.norm.weight"
    torch.testing.assert_close(fisher.per_token(name), fisher.read(name) / T, rtol=0, atol=0)
    assert fisher.normalizer == T
    total = sum(fisher.per_token(each).sum(dtype=torch.float64).item() for each in fisher.names)
    assert fisher.trace == pytest.approx(total, rel=1e-6)
    assert (len(fisher), fisher.shape(name), name in fisher, "x" in fisher) == (24, (32,), True, False)


@pytest.mark.parametrize("where", ["memory", "disk", "mixture"])
def test_a_slice_is_that_part_of_the_whole_and_aliases_nothing(fisher, tmp_path, where):
    if where == "disk":
        fisher = FisherInformation.from_pretrained(fisher.save_pretrained(tmp_path / "f"))
    if where == "mixture":
        fisher = FisherInformation.mix([fisher, fisher])
    for name in fisher.names:
        whole = fisher.read(name)
        index = tuple(slice(size // 3, size // 3 + 5) for size in whole.shape)
        for part in (index, index[:1], (slice(2, 2),), (slice(0, 10**6),)):
            torch.testing.assert_close(fisher.read(name, part), whole[part], rtol=0, atol=0)
        fisher.read(name).fill_(-1)
        fisher.per_token(name, index).fill_(-1)
        torch.testing.assert_close(fisher.read(name), whole, rtol=0, atol=0)


@given(
    values=st.lists(st.floats(0, torch.finfo(torch.float32).max, width=32), min_size=1, max_size=40),
    rows=st.integers(1, 4),
)
@settings(max_examples=200, deadline=None)
def test_bfloat16_makes_no_zero_no_infinity_and_small_errors(values, rows):
    tensor = torch.tensor(values * rows).view(rows, -1)
    codec = get_codec("bfloat16")
    stored = codec.encode("w", tensor)
    back = codec.decode("w", reader_of(stored), None)
    assert {key: (part.dtype, tuple(part.shape)) for key, part in stored.items()} == {"w": (torch.bfloat16, tensor.shape)}
    assert torch.equal(back == 0, tensor == 0)
    assert back.isfinite().all()
    normal = tensor >= torch.finfo(torch.bfloat16).tiny
    torch.testing.assert_close(back[normal], tensor[normal], rtol=2**-8, atol=0)
    torch.testing.assert_close(codec.decode("w", reader_of(codec.encode("w", back)), None), back, rtol=0, atol=0)
    part = (slice(0, 1), slice(1, None))
    torch.testing.assert_close(codec.decode("w", reader_of(stored), part), back[part], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["float16", "fp8", "int8"])
def test_codecs_that_zero_a_fisher_are_refused(fisher, tmp_path, name):
    with pytest.raises(ConfigError, match=f"codec: {name}"):
        fisher.save_pretrained(tmp_path / "f", codec=name)
    assert not list(tmp_path.iterdir())


def test_a_loaded_fisher_is_recoded_in_its_own_place(fisher, tmp_path):
    fisher.save_pretrained(tmp_path / "f", codec="float32")
    loaded = FisherInformation.from_pretrained(tmp_path / "f")
    loaded.save_pretrained(tmp_path / "f", codec="bfloat16", overwrite=True)
    assert_same_values(FisherInformation.from_pretrained(tmp_path / "f"), fisher, rtol=2**-8, atol=0)
    with pytest.raises(EWCError, match="changed or removed after it had been checked"):
        loaded.read("model.norm.weight")


def test_saving_twice_gives_the_same_bytes(fisher, tmp_path):
    first, second = (fisher.save_pretrained(tmp_path / name) for name in "ab")
    assert tree(first) == tree(second)
    digests = {FisherInformation.from_pretrained(folder).sha256 for folder in (first, second)}
    assert len(digests) == 1
    assert FisherInformation.from_pretrained(fisher.save_pretrained(tmp_path / "c", codec="float32")).sha256 not in digests


def test_shards_have_the_agreed_names_and_none_is_larger_than_asked_for(fisher, tmp_path):
    fisher.save_pretrained(tmp_path / "f", codec="float32", max_shard_size="50KB")
    shards = sorted(path.name for path in tmp_path.glob("f/*.safetensors"))
    assert shards == [f"fisher-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    assert len(shards) > 1
    assert all((tmp_path / "f" / name).stat().st_size < 50_000 + 4096 for name in shards)
    assert_same_values(FisherInformation.from_pretrained(tmp_path / "f"), fisher, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="max_shard_size: 5 parsecs"):
        fisher.save_pretrained(tmp_path / "g", max_shard_size="5 parsecs")


def test_a_scalar_and_an_empty_parameter_are_stored_too(base, tmp_path):
    tensors = {"scale": torch.tensor(2.5), "none": torch.zeros(0, 4), "plain": torch.ones(3)}
    probes = [ProbeRecord(kind="text", dataset=None, ids_sha256="0", examples=1, scored_tokens=1)]
    fisher = FisherInformation.from_tensors(tensors, base=base, probes=probes, estimator=EstimatorRecord(normalizer=2.0))
    loaded = FisherInformation.from_pretrained(fisher.save_pretrained(tmp_path / "f"))
    assert_same_values(loaded, fisher)
    assert loaded.per_token("scale").item() == 1.25
    assert loaded.shape("none") == (0, 4)


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        (torch.tensor([1.0, float("nan")]), "1 of 2 values are NaN or infinite"),
        (torch.tensor([1.0, float("inf")]), "1 of 2 values are NaN or infinite"),
        (torch.tensor([1.0, -1e-9]), "negative values (least -1e-09)"),
        (torch.ones(2, dtype=torch.bfloat16), "is torch.bfloat16"),
    ],
)
def test_what_is_no_sum_of_squares_never_becomes_a_fisher(base, fisher, tensor, part):
    with pytest.raises(FisherFormatError) as error:
        FisherInformation.from_tensors(
            {"w": tensor}, base=base, probes=fisher.manifest.probes, estimator=fisher.manifest.estimator
        )
    assert part in str(error.value)


@pytest.mark.parametrize("normalizer", [0.0, -1.0, float("nan")])
def test_a_normalizer_must_be_positive(base, normalizer):
    with pytest.raises(FisherFormatError, match="normalizer must be a finite number above 0"):
        make_fisher(base, normalizer=normalizer)


def test_a_mixture_is_the_weighted_mean_per_token_of_its_parts(base, tmp_path):
    parts = [make_fisher(base, 0, 50.0), make_fisher(base, 1, 800.0)]
    mixed = FisherInformation.mix(parts, [3, 1])
    assert mixed.normalizer == 1.0
    assert mixed.manifest.estimator.reduction == "mean_per_scored_token"
    assert [probe.weight for probe in mixed.manifest.probes] == [0.75, 0.25]
    assert [probe.scored_tokens for probe in mixed.manifest.probes] == [1000, 1000]
    assert (mixed.manifest.estimator.seed, mixed.manifest.estimator.max_length) == (None, 64)
    for name in mixed.names:
        expected = 0.75 * parts[0].read(name) / 50 + 0.25 * parts[1].read(name) / 800
        torch.testing.assert_close(mixed.read(name), expected)
        torch.testing.assert_close(mixed.per_token(name), expected)
    assert mixed.trace == pytest.approx(0.75 * parts[0].trace + 0.25 * parts[1].trace, rel=1e-6)
    saved = FisherInformation.from_pretrained(mixed.save_pretrained(tmp_path / "m", codec="float32"))
    assert_same_values(saved, mixed, rtol=0, atol=0)


def test_mixing_one_fisher_with_itself_changes_nothing_per_token(fisher):
    assert_same_values(FisherInformation.mix([fisher]), fisher, rtol=0, atol=0)
    twice = FisherInformation.mix([FisherInformation.mix([fisher, fisher]), fisher])
    assert_same_values(twice, fisher)
    assert [probe.weight for probe in twice.manifest.probes] == [0.25, 0.25, 0.5]


@pytest.mark.parametrize("weights", [[1.0], [-1, 2], [0, 0], [float("nan"), 1]])
def test_mixture_weights_must_make_sense(fisher, weights):
    with pytest.raises(ConfigError, match="2 finite numbers"):
        FisherInformation.mix([fisher, fisher], weights)
    with pytest.raises(ConfigError, match="at least one"):
        FisherInformation.mix([])


def test_only_fishers_of_one_base_and_one_kind_are_mixed(base, fisher, tokenizer, tmp_path):
    other = BaseModel.resolve(tiny.save_base(tmp_path / "other", tokenizer, seed=1))
    with pytest.raises(FisherMismatchError, match="weights") as error:
        FisherInformation.mix([fisher, make_fisher(other)])
    assert base.fingerprint[:12] in str(error.value)
    assert other.fingerprint[:12] in str(error.value)
    with pytest.raises(FisherMismatchError, match="granularity   first example   second batch"):
        FisherInformation.mix([fisher, make_fisher(base, granularity="batch")])


def test_a_folder_with_anything_in_it_is_not_overwritten_unasked(fisher, tmp_path):
    fisher.save_pretrained(tmp_path / "f")
    before = tree(tmp_path / "f")
    with pytest.raises(EWCError, match="holds a Fisher already"):
        fisher.save_pretrained(tmp_path / "f")
    assert tree(tmp_path / "f") == before
    (tmp_path / "empty").mkdir()
    FisherInformation.from_pretrained(fisher.save_pretrained(tmp_path / "empty"))


def test_overwriting_never_deletes_foreign_files(fisher, base_folder, tmp_path):
    fisher.save_pretrained(tmp_path / "f")
    (tmp_path / "f" / "notes.txt").write_text("mine")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("mine")
    for folder, part in (("f", "notes.txt"), ("model", "README.md")):
        before = tree(tmp_path / folder)
        with pytest.raises(EWCError, match=part):
            fisher.save_pretrained(tmp_path / folder, overwrite=True)
        assert tree(tmp_path / folder) == before


def test_overwriting_leaves_nothing_of_the_old_fisher(base, tmp_path):
    make_fisher(base, 0).save_pretrained(tmp_path / "f", max_shard_size="20KB")
    make_fisher(base, 1).save_pretrained(tmp_path / "f", overwrite=True)
    assert_same_values(FisherInformation.from_pretrained(tmp_path / "f"), make_fisher(base, 1), rtol=2**-8, atol=0)
    assert sorted(tree(tmp_path / "f")) == [
        "README.md",
        "fisher-00001-of-00001.safetensors",
        "fisher.safetensors.index.json",
        "fisher_config.json",
        "summary/params.parquet",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("failing", ["save_file", "write_summary", "render_card", "sha256_file"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_the_old_state_and_no_half(base, tmp_path, monkeypatch, failing, error):
    make_fisher(base, 0).save_pretrained(tmp_path / "f")
    before = tree(tmp_path / "f")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(f"hf_ewc.artifact.write.{failing}", fail)
    for folder in ("f", "new"):
        with pytest.raises(type(error)):
            make_fisher(base, 1).save_pretrained(tmp_path / folder, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert tree(tmp_path / "f") == before


def test_a_failure_of_the_last_rename_brings_the_old_state_back(base, tmp_path, monkeypatch):
    make_fisher(base, 0).save_pretrained(tmp_path / "f")
    before, rename = tree(tmp_path / "f"), os.rename

    def fail_on_arrival(source, target):
        if ".tmp-" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_on_arrival)
    with pytest.raises(OSError, match="Input/output"):
        make_fisher(base, 1).save_pretrained(tmp_path / "f", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert tree(tmp_path / "f") == before


def test_files_are_readable_by_others_as_the_umask_says(fisher, tmp_path):
    old = os.umask(0o022)
    try:
        folder = fisher.save_pretrained(tmp_path / "f")
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o644}
    assert folder.stat().st_mode & 0o777 == 0o755

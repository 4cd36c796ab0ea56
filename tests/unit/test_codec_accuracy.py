"""What a codec costs is measured by the definitions, and log8 stays within the bounds of PITFALLS H4 on a real Fisher."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from test_artifact_store import make_fisher

from hf_ewc.artifact import BaseModel, EstimatorRecord, FisherInformation, ProbeRecord, accuracy
from hf_ewc.artifact.accuracy import codec_accuracy, stored_accuracy
from hf_ewc.config import FisherConfig
from hf_ewc.errors import ConfigError
from hf_ewc.fisher import estimate_fisher


@pytest.fixture(scope="module")
def base(base_folder) -> BaseModel:
    return BaseModel.resolve(base_folder)


@pytest.fixture(scope="module")
def original(base) -> FisherInformation:
    return make_fisher(base)


@pytest.fixture(scope="module", params=["mmlu", "text"])
def estimated(request, base_folder, tmp_path_factory) -> FisherInformation:
    """A real Fisher: that of the tiny model on questions, and on text."""
    rows = tiny.QUESTIONS if request.param == "mmlu" else [{"text": text} for text in tiny.TEXTS]
    data = tiny.write_jsonl(tmp_path_factory.mktemp("probe") / "probe.jsonl", rows)
    return estimate_fisher(str(base_folder), FisherConfig(probe=request.param, dataset=str(data)))


def with_values(base: BaseModel, tensors: dict[str, torch.Tensor]) -> FisherInformation:
    probe = ProbeRecord(kind="text", dataset=None, ids_sha256="0", examples=1, scored_tokens=1)
    return FisherInformation.from_tensors(tensors, base=base, probes=[probe], estimator=EstimatorRecord(normalizer=7.0))


def changed(fisher: FisherInformation, change) -> FisherInformation:
    return with_values(fisher.manifest.base_model, {name: change(fisher.read(name)) for name in fisher.names})


def test_log8_keeps_a_real_fisher_within_the_bounds(estimated):
    total = codec_accuracy(estimated, "log8").total
    assert 0.001 < total.median < 0.03
    assert total.p99 < 0.06
    assert total.new_zeros == 0
    assert min(total.top_kept, total.top_order) > 0.95
    assert abs(total.whitened) < 1e-3
    assert max(abs(total.iid), abs(total.ewc_like)) < 1e-3


def test_bfloat16_and_float32_keep_it_even_better(estimated):
    exact, half = (codec_accuracy(estimated, codec).total for codec in ("float32", "bfloat16"))
    assert (exact.median, exact.p99, exact.worst, exact.new_zeros) == (0, 0, 0, 0)
    assert (exact.iid, exact.ewc_like, exact.whitened, exact.top_kept) == (0, 0, 0, 1)
    assert exact.top_order == pytest.approx(1)
    assert 0.0005 < half.median < half.p99 < half.worst <= 2**-8
    assert (exact.bytes, half.bytes) == (4 * exact.values, 2 * exact.values)


def test_what_is_measured_is_what_lies_on_disk(original, tmp_path):
    for codec in ("bfloat16", "log8"):
        stored = FisherInformation.from_pretrained(original.save_pretrained(tmp_path / codec, codec=codec))
        assert stored_accuracy(original, stored) == codec_accuracy(original, codec)


def test_a_constant_factor_is_an_error_of_that_size_under_every_drift(original):
    report = stored_accuracy(original, changed(original, lambda values: values * 1.5))
    for row in (report.total, *report.tensors):
        for error in (row.median, row.p99, row.worst, row.iid, row.ewc_like, row.whitened):
            assert error == pytest.approx(0.5, rel=1e-6)
        assert (row.new_zeros, row.top_kept, row.top_order) == (0, 1, pytest.approx(1))


def test_lost_small_values_show_under_whitened_drift_only(original):
    everything = torch.cat([original.read(name).flatten() for name in original.names])
    bound = everything.quantile(0.5)
    total = stored_accuracy(original, changed(original, lambda values: values * (values > bound))).total
    lost = int(((everything > 0) & (everything <= bound)).sum())
    assert total.new_zeros == lost > 1000
    assert total.whitened == pytest.approx(-lost / int((everything > 0).sum()))
    assert -1e-3 < total.iid < 0
    assert (total.worst, total.top_kept) == (1, 1)


def test_penalties_are_those_of_the_definition(base):
    old = make_fisher(base).read("model.embed_tokens.weight")
    new = old * torch.linspace(0.9, 1.2, old.numel()).view(old.shape)
    row = stored_accuracy(with_values(base, {"w": old}), with_values(base, {"w": new}), seed=3).total
    noise = torch.randn(old.numel(), generator=torch.Generator().manual_seed(3 << 20), dtype=torch.float64).view(old.shape)
    old, new = old.double(), new.double()
    drifts = noise, noise / (1 + old / old.mean()), torch.where(old > 0, old, math.inf) ** -0.5
    for drift, found in zip(drifts, (row.iid, row.ewc_like, row.whitened), strict=True):
        before, after = (0.5 * (values * drift**2).sum().item() for values in (old, new))
        assert found == pytest.approx(after / before - 1, rel=1e-5)
    errors = ((new - old).abs() / old)[old > 0]
    assert row.median == pytest.approx(errors.quantile(0.5).item(), rel=1e-3)
    assert row.p99 == pytest.approx(errors.quantile(0.99).item(), rel=1e-3)


def test_order_within_the_top_is_a_rank_correlation(base):
    old = torch.arange(1.0, 1001.0)
    top = slice(990, 1000)  # the largest 1 %

    def order(values):
        row = stored_accuracy(with_values(base, {"w": old}), with_values(base, {"w": values})).total
        return row.top_kept, row.top_order

    reversed_, tied, swapped = old.clone(), old.clone(), old.clone()
    reversed_[top], tied[top], swapped[top] = old[top].flip(0), 5000.0, old[:10]
    swapped[:10] = old[top]
    assert order(reversed_) == (1, pytest.approx(-1))
    assert order(tied) == (1, 0)
    assert order(swapped) == (0, pytest.approx(1))
    groups = old.clone()
    groups[top] = 1000 + torch.tensor([1.0, 1, 1, 1, 1, 2, 2, 3, 3, 3])
    ranks = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10], [3, 3, 3, 3, 3, 6.5, 6.5, 9, 9, 9]])  # equal values share one
    assert order(groups) == (1, pytest.approx(ranks.corrcoef()[0, 1].item(), rel=1e-6))


def test_large_tensors_are_sampled_and_read_in_pieces(original, monkeypatch):
    exact = codec_accuracy(original, "log8").total
    monkeypatch.setattr(accuracy, "SAMPLE", 8000)
    monkeypatch.setattr(accuracy, "PIECE", 1024)
    read, largest = FisherInformation.read, 0

    def watched(self, name, index=None):
        nonlocal largest
        part = read(self, name, index)
        largest = max(largest, part.numel())
        return part

    monkeypatch.setattr(FisherInformation, "read", watched)
    sampled = codec_accuracy(original, "log8").total
    assert largest <= 1024
    assert (sampled.values, sampled.bytes, sampled.new_zeros, sampled.worst) == (
        *(exact.values, exact.bytes, exact.new_zeros, exact.worst),
    )
    assert sampled.whitened == pytest.approx(exact.whitened, rel=1e-6)
    assert sampled.median == pytest.approx(exact.median, rel=0.05)
    assert sampled.median != exact.median


def test_in_a_sample_of_all_values_each_tensor_has_its_share(base, monkeypatch):
    monkeypatch.setattr(accuracy, "SAMPLE", 4000)
    old = {"large": torch.ones(60_000), **{f"small{n}": torch.ones(10_000) for n in range(4)}}
    new = {name: values * (1.1 if name == "large" else 1.5) for name, values in old.items()}
    total = stored_accuracy(with_values(base, old), with_values(base, new)).total
    assert (total.median, total.p99) == (pytest.approx(0.1, rel=1e-5), pytest.approx(0.5, rel=1e-5))


def test_zeros_scalars_and_empty_tensors_have_no_error(base):
    tensors = {"zero": torch.zeros(5), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    report = codec_accuracy(with_values(base, tensors), "log8")
    assert [row.name for row in report.tensors] == list(tensors)
    for row in (report.total, *report.tensors):
        assert (row.median, row.worst, row.new_zeros, row.iid, row.whitened) == (0, 0, 0, 0, 0)


def test_an_unknown_codec_is_refused(original):
    with pytest.raises(ConfigError, match="codec: fp8"):
        codec_accuracy(original, "fp8")

"""Two halves of the examples tell how far the estimate is from settled, cheaply, exactly resumable, and never as NaN."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import TEXTS, make_model, make_tokenizer

from hf_ewc.artifact import StabilityRecord
from hf_ewc.artifact.summary import layer_and_group
from hf_ewc.errors import ConfigError, DataError
from hf_ewc.fisher import Example, accumulate_squares, collate, prepared
from hf_ewc.fisher.figure import draw, stability_figure, stability_table
from hf_ewc.fisher.stability import (
    Segment,
    SplitHalves,
    compare,
    doubling_counts,
    group_label,
    is_stable,
    whole_estimate,
)

# A big embedding, as it sees few tokens and is sampled at another rate than the rest, and small tensors beside it.
SHAPES = {
    "model.embed_tokens.weight": (1000, 20),
    "model.layers.0.self_attn.q_proj.weight": (20, 20),
    "model.layers.0.mlp.up_proj.weight": (100, 20),
    "model.layers.0.input_layernorm.weight": (20,),
}


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in SHAPES.items()}


def increments(count: int, seed: int = 0, spread: float = 1.5) -> list[dict[str, torch.Tensor]]:
    """Squared gradients of `count` examples: each weight has its own scale over many decades, each example its own noise."""
    random = torch.Generator().manual_seed(seed)
    sparse = torch.rand(1000, 1, generator=torch.Generator().manual_seed(99)) ** 3  # how often a token occurs
    found = []
    scales = {
        name: torch.empty(shape).normal_(-20 - 4 * i, 3, generator=torch.Generator().manual_seed(i))
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    for _ in range(count):
        example = {name: (scale + spread * torch.randn(scale.shape, generator=random)).exp() for name, scale in scales.items()}
        example["model.embed_tokens.weight"] *= torch.rand(1000, 1, generator=random) < 0.7 * sparse
        found.append(example)
    return found


def follow(halves: SplitHalves, sums: dict[str, torch.Tensor], examples: list[dict], start: int = 0) -> None:
    for index, example in enumerate(examples, start):
        halves.begin(sums)
        for name, square in example.items():
            sums[name] += square
        halves.end(sums, index % 2)


def flat(examples: list[dict]) -> torch.Tensor:
    """(N) float64 exact sum of examples, all tensors one after the other."""
    return torch.cat([sum(example[name].double() for example in examples).flatten() for name in SHAPES])


def whole_segments() -> list[Segment]:
    return [Segment(name, math.prod(shape), math.prod(shape)) for name, shape in SHAPES.items()]


def one_tensor(halves: torch.Tensor, name: str = "w") -> StabilityRecord:
    return compare(halves, [Segment(name, halves.shape[1], halves.shape[1])], 64)


def figures(record: StabilityRecord) -> list[float]:
    return [record.correlation, record.overlap, *record.groups.values()]


# ── following the halves ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_half_holds_the_squares_of_its_own_examples():
    sums, examples = zeros(), increments(12)
    halves = SplitHalves(sums, per_tensor=10**6)
    follow(halves, sums, examples)
    for half in (0, 1):
        off = (halves.values[half].double() - flat(examples[half::2])).abs()
        assert (off <= 1e-6 * flat(examples)).all()


def test_a_run_of_batches_of_one_half_is_the_same_as_batch_by_batch():
    examples, in_a_row, singly = increments(8), zeros(), zeros()
    one, other = SplitHalves(in_a_row), SplitHalves(singly)
    for half in (0, 1):
        one.begin(in_a_row)
        for example in examples[half::2]:
            other.begin(singly)
            for name, square in example.items():
                in_a_row[name] += square
                singly[name] += square
            other.end(singly, half)
        one.end(in_a_row, half)
    torch.testing.assert_close(one.values, other.values, rtol=1e-5, atol=0)


def test_halves_of_a_real_model_add_up_to_its_fisher():
    tokenizer, model = make_tokenizer(), make_model()
    examples = [Example(input_ids=ids, labels=ids) for ids in tokenizer(TEXTS).input_ids]
    with prepared(model) as sums:
        halves = SplitHalves(sums, per_tensor=300)
        for start in range(0, len(examples), 4):
            for half in (0, 1):
                halves.begin(sums)
                accumulate_squares(model, collate(examples[start + half : start + 4 : 2]), sums)
                halves.end(sums, half)
        wanted = halves._sample(sums)
    torch.testing.assert_close(halves.values.sum(0), wanted, rtol=1e-5, atol=0)
    record = compare(halves.values, halves.segments, len(examples))
    assert 0.5 < record.correlation < 1
    assert "layer 1 attention" in record.groups


def test_float32_sums_lose_nothing_that_the_figures_could_show():
    """Examples that differ by ten decades: the small ones are added to sums that big ones dominate."""
    sums, examples = zeros(), increments(256, spread=4.0)
    halves = SplitHalves(sums, per_tensor=10**6)
    follow(halves, sums, examples)
    exact = torch.stack([flat(examples[0::2]), flat(examples[1::2])])
    drift = (halves.values.double() - exact).abs() / exact.sum(0).clamp_min(1e-300)
    assert drift.max() < 2e-6  # 256 roundings by up to 2⁻²⁴ of the sum would be 1.5e-5 at worst
    measured = compare(halves.values, halves.segments, 256)
    wanted = compare(exact, whole_segments(), 256)
    assert figures(measured) == pytest.approx(figures(wanted), abs=2e-4)


def test_small_additions_beside_large_sums_are_not_lost():
    sums = zeros()
    halves = SplitHalves(sums)
    for half, size in ((0, 1e6), (1, 1e-3)):  # 1e6 + 1e-3 is 1e6 in float32
        halves.begin(sums)
        for total in sums.values():
            total += size
        halves.end(sums, half)
    assert torch.equal(halves.values[1], torch.full_like(halves.values[1], 1e-3))
    assert all(bool((total == 1e6).all()) for total in sums.values()), "the sums themselves are as they would have been"


def test_a_half_that_has_seen_nothing_agrees_with_nothing():
    halves = torch.zeros(2, 8)
    halves[0] = torch.arange(1.0, 9.0)
    record = compare(halves, [Segment("a.weight", 8, 8)], 1)
    assert (record.correlation, record.overlap, record.groups) == (0.0, 0.0, {})


def test_misuse_is_an_error_and_not_a_wrong_figure():
    sums = zeros()
    halves = SplitHalves(sums)
    with pytest.raises(RuntimeError, match="without `begin`"):
        halves.end(sums, 0)
    halves.begin(sums)
    with pytest.raises(ValueError, match="0 or 1, got 2"):
        halves.end(sums, 2)
    with pytest.raises(RuntimeError, match="between `begin` and `end`"):
        halves.state()


# ── which weights ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=4), st.integers(1, 500), st.integers(0, 9))
def test_the_sample_is_drawn_without_replacement_and_the_same_each_time(sizes, per_tensor, seed):
    sums = {f"w{i}": torch.zeros(size) for i, size in enumerate(sizes)}
    halves, again = SplitHalves(sums, per_tensor, seed), SplitHalves(dict(reversed(sums.items())), per_tensor, seed)
    for segment, size in zip(halves.segments, sizes, strict=True):
        at = halves._coordinates[segment.name]
        assert len(set(at.tolist())) == len(at) == segment.sampled == min(size, per_tensor)
        assert segment.numel == size
        assert not len(at) or 0 <= at.min() <= at.max() < size
        assert torch.equal(at, again._coordinates[segment.name])  # neither order nor the other tensors matter


def test_the_sample_covers_a_tensor_evenly_and_depends_on_seed_name_and_shape():
    def drawn(name="w", shape=(1000, 100), seed=0):
        return SplitHalves({name: torch.zeros(shape)}, 2000, seed)._coordinates[name]

    assert torch.bincount(drawn() // 10_000, minlength=10).sub(200).abs().max() < 60  # 4.5 standard deviations
    for other in (drawn(seed=1), drawn(name="v"), drawn(shape=(100, 1000))):
        assert not torch.equal(drawn(), other)


def test_columns_of_shards_may_be_put_beside_one_another():
    examples = increments(16)
    whole, rows = zeros(), {}
    halves = SplitHalves(whole, 10**6)
    follow(halves, whole, examples)
    parts = []
    for part in (0, 1):  # each tensor cut in two along its rows
        rows = {name: total.chunk(2)[part].clone() for name, total in zeros().items()}
        parts.append(SplitHalves(rows, 10**6))
        follow(parts[-1], rows, [{name: square.chunk(2)[part] for name, square in e.items()} for e in examples])
    record = compare(torch.cat([p.values for p in parts], 1), parts[0].segments + parts[1].segments, 16)
    # floors are by segment, thus not to the last digit
    assert figures(record) == pytest.approx(figures(compare(halves.values, halves.segments, 16)), abs=0.01)


# ── resume ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_resume_from_disk_is_bitwise_the_same(tmp_path):
    examples = increments(24)
    through, sums = SplitHalves(start := zeros(), 500), start
    follow(through, sums, examples[:10])
    through.snapshot(10)
    save_file({**sums, **through.state()}, tmp_path / "state.safetensors")  # beside the running sums
    follow(through, sums, examples[10:], 10)
    through.snapshot(24)

    saved = load_file(tmp_path / "state.safetensors")
    sums = {name: saved[name] for name in SHAPES}
    resumed = SplitHalves(sums, 500)
    resumed.load(saved)
    follow(resumed, sums, examples[10:], 10)
    resumed.snapshot(24)
    assert torch.equal(resumed.values, through.values)
    assert resumed.history.keys() == through.history.keys() == {10, 24}
    assert all(torch.equal(resumed.history[count], through.history[count]) for count in (10, 24))


def test_a_state_is_a_copy_and_undoes_a_batch_that_was_not_finite():
    sums, examples = zeros(), increments(6)
    halves = SplitHalves(sums)
    follow(halves, sums, examples[:4])
    halves.snapshot(4)
    state, before = halves.state(), halves.values.clone()
    halves.begin(sums)
    sums["model.layers.0.input_layernorm.weight"] += math.nan
    halves.end(sums, 0)
    halves.snapshot(5)
    halves.begin(sums)  # the rollback comes in the middle of a batch
    halves.load(state)
    assert torch.equal(halves.values, before)
    assert list(halves.history) == [4]
    assert torch.equal(halves.history[4], before)
    halves.values += 1
    assert torch.equal(state["halves/sums"], before)
    with pytest.raises(RuntimeError, match="without `begin`"):
        halves.end(sums, 0)


@pytest.mark.parametrize("other", [dict(seed=1), dict(per_tensor=99)])
def test_a_state_that_follows_other_weights_is_refused(other):
    sums = zeros()
    halves = SplitHalves(sums, per_tensor=100)
    follow(halves, sums, increments(2))
    before = halves.values.clone()
    with pytest.raises(ConfigError, match=r"do not follow the weights.*Nothing was changed"):
        halves.load(SplitHalves(sums, **{"per_tensor": 100, **other}).state())
    with pytest.raises(ConfigError, match="found nothing"):
        halves.load({})
    assert torch.equal(halves.values, before)


# ── the figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 400), st.integers(0, 10**6), st.floats(1e-12, 1e12))
def test_halves_that_differ_by_a_factor_agree_perfectly(count, seed, factor):
    half = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(5).exp()
    record = one_tensor(torch.stack([half, factor * half]))
    assert record.correlation == pytest.approx(1)
    assert record.overlap == 1
    assert record.groups == {"other": pytest.approx(1)}


def test_independent_halves_do_not_agree():
    record = one_tensor(torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0)).mul(5).exp())
    assert abs(record.correlation) < 0.03
    assert record.overlap < 0.05  # chance: 0.01


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(1e-10, 1e10))
def test_the_scale_of_the_loss_does_not_matter(seed, factor):
    random = torch.Generator().manual_seed(seed)
    halves = torch.randn(2, 500, generator=random, dtype=torch.float64).exp()
    halves *= torch.rand(2, 500, generator=random) < 0.8
    assert figures(one_tensor(factor * halves)) == pytest.approx(figures(one_tensor(halves)))


def test_correlation_and_overlap_are_what_they_say():
    random = torch.Generator().manual_seed(0)
    shared = torch.randn(1000, generator=random, dtype=torch.float64)
    halves = (shared + torch.randn(2, 1000, generator=random, dtype=torch.float64)).exp()
    record = one_tensor(halves)
    floor = halves.sort().values[:, 9:10]  # the 1 % quantile
    assert record.correlation == pytest.approx(torch.corrcoef(halves.maximum(floor).log())[0, 1].item())
    top = [set(half.topk(10).indices.tolist()) for half in halves]
    assert record.overlap == pytest.approx(len(top[0] & top[1]) / 10)
    assert record.overlap not in (0, 1)


def test_a_weight_that_only_one_half_has_seen_counts_as_a_disagreement():
    both = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(2).exp()
    halves = torch.stack([both, both])
    seen_once = halves.clone()
    seen_once[1, 100:200] = 0
    assert one_tensor(seen_once).correlation < 0.95
    unseen = halves.clone()
    unseen[:, 100:200] = 0
    assert one_tensor(unseen).correlation == pytest.approx(1)


def test_one_stray_tiny_value_does_not_carry_the_correlation():
    halves = torch.randn(2, 2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    before = one_tensor(halves).correlation
    halves[:, 7] = 1e-300  # 690 nats below the others; without the floor r would be 0.99
    assert one_tensor(halves).correlation == pytest.approx(before, abs=0.01)


@pytest.mark.parametrize("examples", [16, 64])
def test_the_sample_speaks_for_the_whole_model(examples):
    sums, drawn = zeros(), increments(examples)
    whole = compare(torch.stack([flat(drawn[0::2]), flat(drawn[1::2])]), whole_segments(), examples)
    halves = SplitHalves(sums, per_tensor=1500)  # 7.5 % of the embedding, 75 % of the mlp, all of the rest
    follow(halves, sums, drawn)
    sample = compare(halves.values, halves.segments, examples)
    assert sample.correlation == pytest.approx(whole.correlation, abs=0.05)  # 0.56 and 0.76
    assert sample.groups == pytest.approx(whole.groups, abs=0.06)
    assert sample.overlap == pytest.approx(whole.overlap, abs=0.25)  # 1 % of 1500 sampled weights are 15
    # as if every sampled weight were one weight of the model
    alone = compare(halves.values, [segment._replace(numel=segment.sampled) for segment in halves.segments], examples)
    assert abs(alone.correlation - whole.correlation) > 2 * abs(sample.correlation - whole.correlation)


def test_the_top_is_one_per_cent_of_the_models_weights_not_of_the_sampled_ones():
    halves = torch.ones(2, 200, dtype=torch.float64)
    halves[:, 0], halves[0, 1], halves[1, 2] = 4.0, 3.0, 3.0  # both agree on the first, not on the second
    heavy = [Segment("a", 100, 100), Segment("b", 100, 100)]
    assert compare(halves, heavy, 8).overlap == pytest.approx(0.5)  # two of 200
    light = [Segment("a", 100, 10_000), Segment("b", 100, 100)]
    assert compare(halves, light, 8).overlap == pytest.approx(0.5)  # 101 of 10,100: two that stand for 100 each
    assert compare(halves, [Segment("a", 100, 100), Segment("b", 100, 19_900)], 8).overlap > 0.9  # 200: three and ties


def test_overlap_takes_at_least_one_weight_and_none_that_is_zero():
    assert one_tensor(torch.tensor([[1.0, 2, 3], [1, 2, 9]])).overlap == 1
    assert one_tensor(torch.tensor([[1.0, 2, 3], [1, 9, 2]])).overlap == 0
    sparse = torch.zeros(2, 1000)
    sparse[:, 0], sparse[0, 1], sparse[1, 2] = 1.0, 1.0, 1.0  # the other eight of the top 1 % are 0
    assert one_tensor(sparse).overlap == pytest.approx(0.5)


def test_groups_are_named_by_layer_and_share_nothing():
    halves = torch.randn(2, 400, generator=torch.Generator().manual_seed(0)).exp()
    halves[1, :100] = halves[0, :100]
    halves[1, 300:] = halves[0, 300:]
    names = [
        "model.layers.3.mlp.up_proj.weight",
        "model.layers.3.self_attn.q_proj.weight",
        "lm_head.weight",
        "model.norm.weight",
    ]
    groups = compare(halves, [Segment(name, 100, 100) for name in names], 64).groups
    assert list(groups) == ["layer 3 mlp", "layer 3 attention", "head", "norm"]
    assert [groups["layer 3 mlp"], groups["norm"]] == pytest.approx([1, 1])
    assert max(abs(groups["layer 3 attention"]), abs(groups["head"])) < 0.35


def test_names_of_layers_and_groups():
    assert layer_and_group("model.layers.12.self_attn.o_proj.weight") == (12, "attention")
    assert layer_and_group("transformer.h.0.ln_1.weight") == (0, "norm")
    assert layer_and_group("model.embed_tokens.weight") == (None, "embedding")
    assert layer_and_group("score.weight") == (None, "other")
    assert group_label("model.layers.2.input_layernorm.weight") == group_label("model.norm.weight") == "norm"
    assert group_label("transformer.h.0.mlp.c_fc.bias") == "layer 0 mlp"


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(0, 6), max_size=4),
    st.sampled_from(["zero", "one", "constant", "constant half", "sparse", "random", "tiny", "huge"]),
    st.integers(0, 99),
)
def test_no_input_gives_nan(sizes, kind, seed):
    n, random = sum(sizes), torch.Generator().manual_seed(seed)
    noise = torch.rand(2, n, generator=random, dtype=torch.float64)
    halves = {
        "zero": torch.zeros(2, n),
        "one": torch.stack([noise[0], torch.zeros(n)]) if n else noise,  # a single example: the other half is empty
        "constant": torch.ones(2, n) * torch.tensor([[3.0], [5.0]]),
        "constant half": torch.stack([noise[0], torch.ones(n)]) if n else noise,
        "sparse": noise * (noise < 0.3),
        "random": noise,
        "tiny": noise * 1e-300,
        "huge": noise * 1e300,
    }[kind]
    record = compare(halves, [Segment(f"w{i}", size, 10 * size) for i, size in enumerate(sizes)], 1)
    assert all(math.isfinite(value) and -1 <= value <= 1 for value in figures(record))
    assert all(type(value) is float for value in figures(record))  # JSON


def test_what_shows_nothing_does_not_count_as_agreement():
    assert figures(one_tensor(torch.zeros(2, 5))) == [0, 0]
    assert one_tensor(torch.ones(2, 1)).correlation == 0
    assert one_tensor(torch.ones(2, 1)).groups == {}
    assert figures(one_tensor(torch.tensor([[1.0, 2, 3], [0, 0, 0]]))) == [0, 0]
    assert one_tensor(torch.tensor([[1.0, 2, 3], [4, 4, 4]])).correlation == 0
    assert figures(one_tensor(torch.tensor([[2.0, 2, 2], [5, 5, 5]]))) == [1, 1, 1]  # constant alike


def test_halves_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=r"shape \(2, 3\).*hold 4"):
        compare(torch.ones(2, 3), [Segment("w", 4, 4)], 8)
    for wrong in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="finite and not negative"):
            one_tensor(torch.tensor([[1.0, wrong], [1, 1]]))


# ── when to stop ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_doublings_end_with_all_examples():
    assert doubling_counts(300) == [32, 64, 128, 256, 300]
    assert doubling_counts(256) == [32, 64, 128, 256]
    assert doubling_counts(5) == [5]
    assert doubling_counts(0) == []
    assert doubling_counts(7, first=2) == [2, 4, 7]


def test_half_against_half_predicts_whole_against_whole():
    """Spearman and Brown: noise that halves with every doubling."""
    random = torch.Generator().manual_seed(0)
    truth = torch.randn(100_000, generator=random)
    noise = torch.randn(4, 100_000, generator=random)
    halves = truth + noise[:2]
    wholes = torch.stack([truth + noise[:2].mean(0), truth + noise[2:].mean(0)])
    predicted = whole_estimate(one_tensor(halves.exp()).correlation)
    assert predicted == pytest.approx(one_tensor(wholes.exp()).correlation, abs=0.01)
    assert [whole_estimate(r) for r in (-1.0, -0.2, 0.0, 1.0)] == [0, 0, 0, 1]


def curve(*correlations: float, probe: str | None = None, start: int = 32) -> list[StabilityRecord]:
    return [
        StabilityRecord(
            examples=start * 2**i,
            correlation=r,
            overlap=r**2,
            groups={"layer 0 mlp": r - 0.1, "layer 1 attention": r + 0.01, "norm": r, "embedding": r - 0.05},
            probe=probe,
        )
        for i, r in enumerate(correlations)
    ]


def test_stable_means_two_doublings_in_a_row():
    assert not is_stable([], 0.9)
    assert not is_stable(curve(0.99), 0.9)
    assert not is_stable(curve(0.8, 0.95), 0.9)
    assert not is_stable(curve(0.95, 0.89), 0.9)
    assert not is_stable(curve(0.95, 0.89, 0.95), 0.9)
    assert is_stable(curve(0.1, 0.9, 0.9), 0.9)


# ── table and picture ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_table_says_how_well_and_where_worst():
    lines = stability_table(curve(0.8, 0.95)).splitlines()
    assert lines[0].split("   ") == ["examples", "halves agree", "whole estimate", "top 1 %", "least agreeing group"]
    assert lines[3].split() == ["32", "0.800", "0.889", "0.640", "0.700", "layer", "0", "mlp"]
    assert lines[4].split()[:4] == ["64", "0.950", "0.974", "0.902"]
    assert lines[3].index("0.800") == lines[4].index("0.950")
    mixture = stability_table([*curve(0.8, 0.9, probe="facts"), *curve(0.7, probe="texts")]).splitlines()
    assert [line.split()[0] for line in mixture[3:]] == ["facts", "facts", "texts"]
    assert stability_table([StabilityRecord(examples=1, correlation=0.0, overlap=0.0, groups={})]).endswith("–")


def test_a_fisher_without_figures_is_told_how_to_get_them(tmp_path):
    for view in (stability_table, lambda records: stability_figure(records, tmp_path / "x.png")):
        with pytest.raises(DataError, match="no split-half figures"):
            view([])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "records",
    [
        curve(0.6, 0.7, 0.8, 0.9, 0.95),
        curve(0.9),
        curve(-0.3, 0.1),
        [*curve(0.6, 0.7, probe="facts"), *curve(0.5, 0.8, 0.9, probe="texts")],
        [record for i in range(4) for record in curve(0.5, 0.6, probe=f"probe {i}")],
    ],
    ids=["usual", "one point", "negative", "mixture", "four probes"],
)
def test_every_figure_is_in_the_picture(records, tmp_path):
    figure = draw(records, threshold=0.9)
    panels = figure.get_axes()
    assert len(panels) == len({record.probe for record in records})
    for record in records:
        panel = panels[list(dict.fromkeys(r.probe for r in records)).index(record.probe)]
        drawn = {(x, y) for line in panel.get_lines() for x, y in zip(*line.get_data(), strict=True)}
        assert {(record.examples, value) for value in figures(record)} <= drawn
        low, high = panel.get_ylim()
        assert all(low <= value <= high for value in figures(record))
        assert panel.get_xlim()[0] < record.examples < panel.get_xlim()[1]
    path = stability_figure(records, tmp_path / "new" / "stability.png", threshold=0.9)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_labels_and_legend_lie_within_the_picture_and_apart():
    records = [*curve(0.6, 0.7, 0.8, probe="facts"), *curve(0.9, probe="facts", start=140), *curve(0.5, 0.6, probe="texts")]
    figure = draw(records, threshold=0.9)
    figure.canvas.draw()
    inside = figure.bbox.padded(1)
    (legend,) = figure.legends
    for box in (legend.get_window_extent(), *(panel.get_tightbbox() for panel in figure.get_axes())):
        assert inside.containsx(box.x0)
        assert inside.containsx(box.x1)
        assert inside.containsy(box.y0)
        assert inside.containsy(box.y1)
        assert box is legend or box.x1 <= legend.get_window_extent().x0 or box.x0 == legend.get_window_extent().x0
    assert [text.get_text() for text in legend.get_texts()][-1] == "until_stable 0.9"
    for panel in figure.get_axes():
        boxes = [label.get_window_extent() for label in panel.get_xticklabels()]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_records_fit_the_manifest():
    record = one_tensor(torch.rand(2, 50, generator=torch.Generator().manual_seed(0)))
    assert StabilityRecord(**asdict(record)) == record

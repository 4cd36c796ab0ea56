"""Several (Fisher, anchor) pairs are one, exactly: in value, gradient, slices and files; or they are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_artifact_store import make_fisher, tree
from transformers import AutoModelForCausalLM

from hf_ewc.artifact import AnchorTensors, BaseModel, FisherInformation
from hf_ewc.artifact import fold as fold_module
from hf_ewc.artifact.card import render_card
from hf_ewc.artifact.files import sha256_file
from hf_ewc.artifact.fold import joined, rows_of
from hf_ewc.artifact.manifest import digest_of
from hf_ewc.errors import ConfigError, DataError, EWCError, FisherFormatError, FisherMismatchError

DECAYS = [1.0, 0.5]
NORM = "model.norm.weight"


def save_moved(base: Path, folder: Path, tokenizer, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """What `base` might have become by training: every weight moved by about a tenth of its size."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * param.std(correction=0).clamp(min=0.1) * torch.randn(param.shape, generator=generator))
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bases(base_folder, tokenizer, tmp_path_factory) -> list[BaseModel]:
    """A model and two that were trained from it."""
    folder = tmp_path_factory.mktemp("bases")
    trained = [save_moved(base_folder, folder / str(seed), tokenizer, seed) for seed in (1, 2)]
    return [BaseModel.resolve(each) for each in (base_folder, *trained)]


@pytest.fixture(scope="session")
def pairs(bases) -> list[FisherInformation]:
    """One Fisher of each; 5 % of the values of each are 0, and T differs."""
    return [make_fisher(base, seed=n, normalizer=10.0 * (n + 1)) for n, base in enumerate(bases)]


def anchors_of(fisher: FisherInformation) -> dict[str, torch.Tensor]:
    reader = fisher.anchor(fisher.names)
    return {name: reader.read(name) for name in fisher.names}


def side_by_side(pairs, theta, decay=1.0):
    """The definition: Σₖ cₖ/2 Σᵢ Fₖᵢ (θᵢ − θₖᵢ)², each with its own anchor, in float64."""
    total = 0.0
    for age, fisher in enumerate(reversed(pairs)):
        anchors = anchors_of(fisher)
        for name in fisher.names:
            drift = theta[name] - anchors[name].double()
            total = total + 0.5 * decay**age * (fisher.read(name).double() / fisher.normalizer * drift**2).sum()
    return total


def somewhere(fisher: FisherInformation, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(fisher.shape(name), generator=generator, dtype=torch.float64).requires_grad_()
        for name in fisher.names
    }


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_the_fold_is_the_sum_of_the_penalties_but_for_its_constant(pairs, tmp_path, decay, where):
    fold = FisherInformation.fold(pairs, decay)
    if where == "disk":
        fold = FisherInformation.from_pretrained(fold.save_pretrained(tmp_path / "f", codec="float32"))
    assert fold.manifest.fold.constant > 0
    for seed in range(3):
        theta = somewhere(fold, seed)
        expected = side_by_side(pairs, theta, decay)
        found = side_by_side([fold], theta) + fold.manifest.fold.constant
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        gradients = [torch.autograd.grad(value, list(theta.values())) for value in (found, expected)]
        for ours, theirs in zip(*gradients, strict=True):
            assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_at_its_anchor_only_the_constant_is_left(pairs):
    """The constant is what the fold's own penalty cannot see; it is also the least value of the sum."""
    fold = FisherInformation.fold(pairs)
    theta = {name: value.double() for name, value in anchors_of(fold).items()}
    assert side_by_side(pairs, theta).item() == pytest.approx(fold.manifest.fold.constant, rel=1e-6)


def test_the_trace_and_zeros_are_those_of_the_values(pairs):
    fold = FisherInformation.fold(pairs, 0.5)
    values = torch.cat([fold.per_token(name).flatten().double() for name in fold.names])
    assert fold.trace == pytest.approx(values.sum().item(), rel=1e-6)
    assert fold.trace == pytest.approx(0.25 * pairs[0].trace + 0.5 * pairs[1].trace + pairs[2].trace, rel=1e-6)
    assert fold.manifest.totals.zeros == (values == 0).sum() > 0
    assert fold.manifest.totals.num_parameters == len(values)


@pytest.mark.parametrize("decay", DECAYS)
def test_folding_two_and_then_the_third_is_folding_all_three(pairs, decay):
    at_once = FisherInformation.fold(pairs, decay)
    in_turn = FisherInformation.fold([FisherInformation.fold(pairs[:2], decay), pairs[2]], decay)
    ours, theirs = anchors_of(at_once), anchors_of(in_turn)
    for name in at_once.names:
        torch.testing.assert_close(in_turn.per_token(name), at_once.per_token(name), rtol=1e-6, atol=0)
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-6, atol=1e-7)
    assert in_turn.manifest.fold.constant == pytest.approx(at_once.manifest.fold.constant, rel=1e-6)
    assert [probe.weight for probe in in_turn.manifest.probes] == [decay**2, decay, 1.0]


@given(
    numbers=st.lists(
        st.tuples(*[st.floats(0, 1e6, width=32) | st.just(0.0)] * 3, *[st.floats(-10, 10, width=32)] * 3),
        min_size=1,
        max_size=8,
    ),
    coefficients=st.tuples(*[st.floats(0.01, 1)] * 3),
)
@settings(max_examples=200, deadline=None)
def test_pairs_are_joined_as_the_formulas_say(numbers, coefficients):
    table = torch.tensor(numbers, dtype=torch.float64).T
    fishers, anchors = table[:3], table[3:]
    total, mean, constant = joined(list(zip(coefficients, fishers, anchors, strict=True)))
    weighted = torch.tensor(coefficients, dtype=torch.float64)[:, None] * fishers
    torch.testing.assert_close(total, weighted.sum(0), rtol=1e-12, atol=0)
    known = total > 1e-290
    expected = (weighted * anchors).sum(0)[known] / total[known]
    torch.testing.assert_close(mean[known], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean[total == 0], anchors[2][total == 0], rtol=0, atol=0)
    least = 0.5 * (weighted * (anchors - mean) ** 2).sum().item()  # the penalties' value at θ̄
    assert constant == pytest.approx(least, rel=1e-9, abs=1e-12 * float(total.sum()))
    assert constant >= 0


def test_the_constant_does_not_drown_in_large_weights():
    """Σ cF θ² − F θ̄² would be the difference of two numbers near 1e8, of which float64 keeps 1e-8, and float32 nothing."""
    anchor = torch.tensor([1e4], dtype=torch.float64)
    _, _, constant = joined([(1.0, torch.ones(1), anchor), (1.0, torch.ones(1), anchor + 1e-6)])
    assert constant == pytest.approx(0.25e-12, rel=1e-4)


def test_a_weight_that_no_task_needs_takes_the_newest_anchor_and_one_that_one_task_needs_takes_that():
    zero, one = torch.zeros(1), torch.ones(1)
    thetas = [torch.tensor([value]) for value in (3e-9, 1e9, -7.125)]
    for needed in (None, 0, 1, 2):
        fishers = [one if k == needed else zero for k in range(3)]
        _, mean, constant = joined([(1.0, f, t) for f, t in zip(fishers, thetas, strict=True)])
        assert mean.float().item() == thetas[2 if needed is None else needed].item()
        assert constant == 0


def test_fishers_of_one_base_are_summed_and_the_base_stays_the_anchor(bases, tmp_path):
    parts = [make_fisher(bases[0], seed=n) for n in range(3)]
    fold = FisherInformation.fold(parts, 0.5)
    for name in fold.names:
        expected = sum(c * part.read(name).double() / part.normalizer for c, part in zip((0.25, 0.5, 1), parts, strict=True))
        torch.testing.assert_close(fold.per_token(name), expected.float(), rtol=0, atol=0)
    assert (fold.has_own_anchor, fold.manifest.fold.anchor, fold.manifest.fold.constant) == (False, None, 0.0)
    assert isinstance(fold.anchor(fold.names), AnchorTensors)
    weights = dict(AutoModelForCausalLM.from_pretrained(bases[0].folder).named_parameters())
    for name, value in anchors_of(fold).items():
        assert torch.equal(value, weights[name])
    folder = fold.save_pretrained(tmp_path / "f")
    assert not list(folder.glob("anchor*"))
    assert not FisherInformation.from_pretrained(folder).has_own_anchor


def test_equal_weights_in_other_files_are_an_anchor_bit_for_bit(bases, tokenizer, tmp_path):
    """The fingerprints differ, so θ̄ is computed; F θ / F would move it in the last bits."""
    model = AutoModelForCausalLM.from_pretrained(bases[0].folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "again")
    again = BaseModel.resolve(tmp_path / "again")
    assert again.fingerprint != bases[0].fingerprint
    fold = FisherInformation.fold([make_fisher(bases[0], 0), make_fisher(again, 1), make_fisher(bases[0], 2)], 0.7)
    assert fold.has_own_anchor
    assert fold.manifest.fold.constant == 0
    weights = dict(model.named_parameters())
    for name, value in anchors_of(fold).items():
        assert torch.equal(value, weights[name])


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_slices_are_parts_of_the_whole_whatever_the_block(pairs, monkeypatch, tmp_path, block, where):
    fold = FisherInformation.fold(pairs)
    names = [NORM, "model.layers.0.self_attn.k_proj.weight"]
    whole = {name: (fold.read(name), fold.anchor([name]).read(name)) for name in names}
    if where == "disk":
        fold = FisherInformation.from_pretrained(fold.save_pretrained(tmp_path / "f", codec="float32", max_shard_size="30KB"))
    monkeypatch.setattr(fold_module, "BLOCK", block)
    for name in names:
        index = tuple(slice(size // 3, size // 3 + 5) for size in fold.shape(name))
        for part in (None, index, index[:1], (slice(2, 2),), (slice(0, 10**6),)):
            for values, read in zip(whole[name], (fold.read, fold.anchor([name]).read), strict=True):
                found = read(name, part)
                assert torch.equal(found, values if part is None else values[part])
                found.fill_(-1)
                assert torch.equal(read(name), values)


def test_rows_cover_a_read_once_and_in_order():
    assert list(rows_of((), None)) == [(None, None)]
    values = torch.arange(7 * 6).view(7, 6)
    for index in (None, (slice(1, 6),), (slice(2, 2),), (slice(None, 5), slice(1, 4))):
        found = torch.cat([values[block] for block, _ in rows_of((7, 6), index)])
        assert torch.equal(found, values if index is None else values[index])


def test_a_fold_comes_back_from_disk_with_its_anchor_and_can_be_recoded(pairs, tmp_path):
    fold = FisherInformation.fold(pairs, 0.5)
    folder = fold.save_pretrained(tmp_path / "f", codec="float32", max_shard_size="60KB")
    loaded = FisherInformation.from_pretrained(folder)
    assert len(list(folder.glob("anchor-*-of-*.safetensors"))) == len(loaded.manifest.fold.anchor) > 1
    recoded = FisherInformation.from_pretrained(loaded.save_pretrained(tmp_path / "g", codec="bfloat16"))
    anchors = [anchors_of(each) for each in (fold, loaded, recoded)]
    for name in fold.names:
        assert torch.equal(fold.read(name), loaded.read(name))
        assert anchors[0][name].dtype == torch.float32
        assert torch.equal(anchors[0][name], anchors[1][name])
        assert torch.equal(anchors[0][name], anchors[2][name])
    record, then = loaded.manifest.fold, fold.manifest.fold
    assert (record.pairs, record.decay, record.constant) == (then.pairs, then.decay, then.constant)
    assert [pair.coefficient for pair in record.pairs] == [0.25, 0.5, 1.0]
    assert [pair.base_sha256 for pair in record.pairs] == [part.manifest.base_model.fingerprint for part in pairs]
    assert loaded.manifest.base_model == pairs[-1].manifest.base_model


def test_a_stored_fold_needs_no_base_model_any_more(base_folder, tokenizer, tmp_path):
    moved = [save_moved(base_folder, tmp_path / str(seed), tokenizer, seed) for seed in (1, 2)]
    fold = FisherInformation.fold([make_fisher(BaseModel.resolve(each)) for each in moved])
    expected = anchors_of(fold)
    folder = fold.save_pretrained(tmp_path / "f")
    for each in moved:
        each.rename(each.with_name(f"{each.name}-gone"))
    assert torch.equal(anchors_of(FisherInformation.from_pretrained(folder))[NORM], expected[NORM])


def test_a_base_that_moved_is_an_error_that_says_how_to_name_it(base_folder, tokenizer, tmp_path):
    moved = [save_moved(base_folder, tmp_path / str(seed), tokenizer, seed) for seed in (1, 2)]
    folders = [make_fisher(BaseModel.resolve(each)).save_pretrained(tmp_path / f"f{each.name}") for each in moved]
    expected = anchors_of(FisherInformation.fold([FisherInformation.from_pretrained(folder) for folder in folders]))
    elsewhere = moved[0].rename(tmp_path / "elsewhere")
    parts = [FisherInformation.from_pretrained(folder) for folder in folders]
    with pytest.raises(DataError, match="--bases") as error:
        FisherInformation.fold(parts)
    assert str(moved[0]) in str(error.value)
    found = FisherInformation.fold(parts, bases=[BaseModel.resolve(elsewhere)])
    assert torch.equal(anchors_of(found)[NORM], expected[NORM])


def test_a_stored_anchor_is_not_taken_for_a_model_and_does_not_disturb_the_viewer(pairs, tmp_path):
    folder = FisherInformation.fold(pairs).save_pretrained(tmp_path / "f")
    assert not {"config.json", "model.safetensors", "model.safetensors.index.json"} & tree(folder).keys()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(DataError, match="not a model folder"):
        BaseModel.resolve(folder)
    assert load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))["params"]["name"] == pairs[0].names


def test_overwriting_a_fold_leaves_no_anchor_of_it(pairs, tmp_path):
    folder = FisherInformation.fold(pairs).save_pretrained(tmp_path / "f")
    assert list(folder.glob("anchor*"))
    pairs[0].save_pretrained(folder, overwrite=True)
    assert not list(folder.glob("anchor*"))
    assert torch.equal(anchors_of(FisherInformation.from_pretrained(folder))[NORM], anchors_of(pairs[0])[NORM])


def test_a_full_disk_while_the_anchor_is_written_leaves_nothing_half(pairs, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    pairs[0].save_pretrained(tmp_path / "f")
    before = tree(tmp_path / "f")
    monkeypatch.setattr("hf_ewc.artifact.anchor.save_file", full)
    with pytest.raises(OSError, match="No space"):
        FisherInformation.fold(pairs).save_pretrained(tmp_path / "f", overwrite=True)
    assert tree(tmp_path) == {f"f/{name}": content for name, content in before.items()}


# Damage


@pytest.fixture
def folder(pairs, tmp_path) -> Path:
    return FisherInformation.fold(pairs).save_pretrained(tmp_path / "fold", max_shard_size="60KB")


def resigned(folder: Path, change=lambda data: None) -> None:
    """Make hashes, sizes and digest fit what lies there after `change` to the manifest."""
    path = folder / "fisher_config.json"
    data = json.loads(path.read_text())
    change(data)
    for name in data["fold"]["anchor"] or ():
        file = folder / name
        if file.is_file():
            data["fold"]["anchor"][name] = {"sha256": sha256_file(file), "size": file.stat().st_size}
    data.pop("digest")
    path.write_text(json.dumps({**data, "digest": digest_of(data)}))


def last_anchor(folder: Path) -> Path:
    return sorted(folder.glob("anchor-*"))[-1]


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(FisherFormatError) as error:
        FisherInformation.from_pretrained(folder)
    for part in (*parts, "Nothing was loaded"):
        assert part in str(error.value)


def test_a_missing_truncated_or_flipped_anchor_file_is_refused(folder):
    path = last_anchor(folder)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    refused(folder, path.name, "cut off")
    flipped = bytearray(whole)
    flipped[-3] ^= 4
    path.write_bytes(flipped)
    refused(folder, path.name, "bytes of it were changed")
    path.unlink()
    refused(folder, f"{path.name} is missing")
    path.write_bytes(whole)
    FisherInformation.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_anchor_that_is_not_finite_is_refused(folder, value):
    path = last_anchor(folder)
    tensors = load_file(path)
    tensors[NORM][3] = value
    save_file(tensors, path)
    resigned(folder)
    refused(folder, f"the anchor of {NORM} has 1 values")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NORM), f"the anchor of {NORM} (32,) is in no file"),
        (lambda tensors: tensors.update({NORM: tensors[NORM].half()}), "F16 (32,), recorded is F32 (32,)"),
        (lambda tensors: tensors.update({NORM: torch.ones(31)}), "F32 (31,), recorded is F32 (32,)"),
        (lambda tensors: tensors.update(stranger=torch.ones(3)), "stranger is in anchor-"),
    ],
)
def test_an_anchor_of_other_tensors_is_refused(folder, change, message):
    path = last_anchor(folder)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    resigned(folder)
    refused(folder, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fold: fold.update(anchor=None), "fold.anchor is missing"),
        (lambda fold: fold["anchor"].popitem(), "left over"),
        (lambda fold: fold["anchor"].update({"../../model.safetensors": {"sha256": "0", "size": 1}}), "not a shard's name"),
        (lambda fold: fold.update(pairs=[]), "fold.pairs is empty"),
        (lambda fold: fold.update(decay=0), "fold.decay"),
        (lambda fold: fold.update(constant=-1.0), "fold.constant"),
        (lambda fold: fold["pairs"][0].update(coefficient=0), "coefficient"),
        (lambda fold: fold["pairs"][0].update(colour="red"), "unknown field `fold.pairs[0].colour`"),
    ],
)
def test_a_fold_record_that_makes_no_sense_is_refused(folder, change, message):
    resigned(folder, lambda data: change(data["fold"]))
    refused(folder, message)


# Pairs that do not belong together


def test_only_fishers_of_one_architecture_and_tokenizer_are_folded(pairs, base_folder, tokenizer, tmp_path):
    narrow = BaseModel.resolve(tiny.save_base(tmp_path / "narrow", tokenizer, intermediate_size=48))
    other = training_free_fisher(narrow, intermediate_size=48)
    with pytest.raises(FisherMismatchError, match="cannot be folded") as error:
        FisherInformation.fold([pairs[0], other])
    assert "(64, 32)" in str(error.value)
    assert "(48, 32)" in str(error.value)
    AutoModelForCausalLM.from_pretrained(base_folder).save_pretrained(tmp_path / "retokenised")
    small = tiny.make_tokenizer(vocab_size=300)
    small.save_pretrained(tmp_path / "retokenised")
    with pytest.raises(FisherMismatchError, match="tokenizer"):
        FisherInformation.fold([make_fisher(BaseModel.resolve(tmp_path / "retokenised")), pairs[0]])


def training_free_fisher(base: BaseModel, **overrides) -> FisherInformation:
    template = make_fisher(base)
    tensors = {name: torch.ones(param.shape) for name, param in tiny.make_model(**overrides).named_parameters()}
    record = template.manifest
    return FisherInformation.from_tensors(tensors, base=base, probes=record.probes, estimator=record.estimator)


def test_a_fold_belongs_to_the_newest_base_and_a_wrong_order_is_told(pairs, bases):
    fold = FisherInformation.fold(pairs[:2])
    fold.check_base(bases[1])
    with pytest.raises(FisherMismatchError, match="oldest to newest"):
        fold.check_base(bases[0])
    with pytest.raises(FisherMismatchError, match="those it was measured at"):
        fold.check_base(bases[2])


@pytest.mark.parametrize("decay", [0.0, -1.0, 1.5, float("nan")])
def test_a_decay_must_make_sense(pairs, decay):
    with pytest.raises(ConfigError, match="decay"):
        FisherInformation.fold(pairs, decay)
    with pytest.raises(ConfigError, match="at least one"):
        FisherInformation.fold([])


def test_one_fisher_needs_no_folding(pairs):
    assert FisherInformation.fold(pairs[:1]) is pairs[0]


def test_fishers_of_different_kinds_are_folded_with_a_warning(pairs, bases, caplog):
    fold = FisherInformation.fold([pairs[0], make_fisher(bases[1], granularity="token")])
    assert "different granularity (example and token)" in caplog.text
    assert fold.manifest.estimator.granularity == "mixed"


def test_a_mixture_does_not_lose_an_anchor(pairs, bases):
    fold = FisherInformation.fold(pairs)
    with pytest.raises(FisherMismatchError, match="anchor of its own"):
        FisherInformation.mix([fold, fold])
    summed = FisherInformation.fold([make_fisher(bases[0], 0), make_fisher(bases[0], 1)])
    assert FisherInformation.mix([summed, make_fisher(bases[0], 2)]).manifest.fold is None


def test_what_is_folded_anew_is_the_same_fisher_and_other_parts_or_decays_are_another(pairs):
    first = FisherInformation.fold(pairs, 0.5)
    assert first.sha256 == FisherInformation.fold(pairs, 0.5).sha256
    others = [FisherInformation.fold(pairs), FisherInformation.fold([pairs[1], pairs[0], pairs[2]], 0.5), pairs[0]]
    assert len({first.sha256, *(other.sha256 for other in others)}) == 4


def test_the_card_of_a_fold_shows_every_pair_and_no_path(pairs, tmp_path):
    fold = FisherInformation.fold(pairs, 0.5)
    card = render_card(FisherInformation.from_pretrained(fold.save_pretrained(tmp_path / "f")).manifest)
    assert "## Folded" in card
    for part, coefficient in zip(pairs, ("0.25", "0.5", "1"), strict=True):
        base = part.manifest.base_model
        assert f"| `{part.sha256[:12]}` | `{Path(base.id).name}` | `{base.fingerprint[:12]}` | {coefficient} |" in card
        assert str(Path(base.id).parent) not in card
    assert f"{fold.manifest.fold.constant:.6g} nats" in card
    assert "`anchor-*.safetensors`" in card
    assert "## Folded" not in render_card(pairs[0].manifest)
    assert "fold" not in pairs[0].manifest.to_dict()


def test_errors_of_a_changed_base_reach_the_user_as_such(base_folder, tokenizer, tmp_path):
    moved = save_moved(base_folder, tmp_path / "m", tokenizer, 1)
    parts = [make_fisher(BaseModel.resolve(base_folder)), make_fisher(BaseModel.resolve(moved))]
    folders = [part.save_pretrained(tmp_path / str(n)) for n, part in enumerate(parts)]
    save_moved(base_folder, moved, tokenizer, 2)
    with pytest.raises(EWCError, match="no longer the ones that were recorded"):
        FisherInformation.fold([FisherInformation.from_pretrained(folder) for folder in folders])

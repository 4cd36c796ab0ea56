"""Post-hoc EWC: the formula in memory and in files, streamed; what does not belong together is refused, and nothing is left."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_artifact_fold import save_moved
from test_artifact_store import tree
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from hf_ewc.artifact import BaseModel, EstimatorRecord, FisherInformation, ProbeRecord, files
from hf_ewc.errors import ConfigError, DataError, FisherMismatchError
from hf_ewc.merge import formula, kept, merge_models, pull_back, run, scale_of, shards

TOKENS = 50.0
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def reference(theta, base, fisher, merge_lambda):
    """The definition, in float64, of all weights at once."""
    mean = sum(each.double().sum() for each in fisher.values()) / sum(each.numel() for each in fisher.values())
    return {
        name: base[name].double() + (theta[name].double() - base[name].double()) / (1 + merge_lambda * f.double() / mean)
        for name, f in fisher.items()
    }


def make_fisher(folder: Path, seed: int = 1, drop: str | None = None) -> FisherInformation:
    """Over some decades, and a tenth of it exactly 0."""
    generator = torch.Generator().manual_seed(seed)
    sums = {
        name: (3 * torch.randn(values.shape, generator=generator) - 5).exp()
        * (torch.rand(values.shape, generator=generator) > 0.1)
        for name, values in parameters(folder).items()
        if name != drop
    }
    probe = ProbeRecord(kind="text", dataset=None, ids_sha256="0" * 64, examples=10, scored_tokens=int(TOKENS))
    record = EstimatorRecord(normalizer=TOKENS)
    return FisherInformation.from_tensors(sums, base=BaseModel.resolve(folder), probes=[probe], estimator=record)


def values_of(fisher: FisherInformation) -> dict[str, torch.Tensor]:
    return {name: fisher.read(name) for name in fisher.names}


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    """As transformers loads them, in the files' dtype."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {name: param.detach() for name, param in model.named_parameters()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def save_split(source: Path, folder: Path, tokenizer, dtype=torch.float32, size="30KB") -> Path:
    """The same model in several files and another dtype."""
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(folder, max_shard_size=size)
    tokenizer.save_pretrained(folder)
    return folder


def store_twice(folder: Path) -> Path:
    """The tied table under both of its names, as some libraries write it."""
    held = load_file(folder / "model.safetensors")
    save_file({**held, HEAD: held[EMBEDDING].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def state_file(folder: Path) -> Path:
    return folder / "ewc_state.json"


@pytest.fixture(scope="module")
def adapted_folder(base_folder, tmp_path_factory, tokenizer) -> Path:
    return save_moved(base_folder, tmp_path_factory.mktemp("adapted") / "m", tokenizer, seed=3)


@pytest.fixture(scope="module")
def own_fisher(base_folder) -> FisherInformation:
    return make_fisher(base_folder)


def nothing_left(tmp_path: Path, *known: str) -> bool:
    return sorted(path.name for path in tmp_path.iterdir()) == sorted(known)


# -- the formula ------------------------------------------------------------------------------------------------------------


def test_each_weight_minimises_what_the_merge_is_derived_from():
    generator = torch.Generator().manual_seed(0)
    theta, base, fisher = (torch.randn(100, generator=generator, dtype=torch.float64) for _ in range(3))
    fisher = fisher.exp()
    scale = 3.0 / fisher.mean().item()
    x = pull_back(theta, base, kept(fisher, scale)).requires_grad_()
    (0.5 * (x - theta).square() + 0.5 * scale * fisher * (x - base).square()).sum().backward()
    assert x.grad.abs().max() < 1e-12 * scale * fisher.max()
    torch.testing.assert_close(x.detach(), base + (theta - base) / (1 + scale * fisher), rtol=1e-14, atol=1e-14)


def test_a_weight_of_mean_importance_goes_half_of_the_way_at_one(own_fisher):
    values = torch.cat([each.flatten().double() for each in values_of(own_fisher).values()])
    assert kept(values.mean(), scale_of(own_fisher, 1.0)).item() == pytest.approx(0.5, rel=1e-6)
    assert kept(2 * values.mean(), scale_of(own_fisher, 3.0)).item() == pytest.approx(1 / 7, rel=1e-6)


WEIGHTS = st.floats(allow_nan=False, allow_infinity=False, width=32)
SIZES = st.floats(0, 2.0**127, width=32)
STRENGTHS = st.one_of(st.floats(0, math.inf), st.sampled_from([0.0, 1e-300, 1e-8, 1.0, 1e8, 1e300, math.inf]))


@settings(max_examples=300, deadline=None)
@given(
    weights=st.lists(st.tuples(WEIGHTS, WEIGHTS, st.one_of(st.just(0.0), SIZES)), min_size=1, max_size=8),
    strengths=st.lists(STRENGTHS, min_size=2, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_ends_are_exact_and_a_larger_lambda_never_leads_away_from_the_base(weights, strengths, dtype):
    theta, base, fisher = (torch.tensor(column, dtype=torch.float32) for column in zip(*weights, strict=True))
    theta = theta.to(dtype)
    theta = torch.where(theta.isfinite(), theta, 0)
    at = [pull_back(theta, base, kept(fisher, scale)) for scale in (0.0, *sorted(strengths), math.inf)]
    assert torch.equal(at[0].to(dtype).view(torch.uint8), theta.view(torch.uint8))  # -0 is not 0
    assert torch.equal(at[-1].view(torch.uint8), torch.where(fisher > 0, base.double(), theta.double()).view(torch.uint8))
    for nearer, further in zip(at[1:], at, strict=False):
        assert ((nearer - base).abs() <= (further - base).abs()).all()
        assert ((nearer - base) * (theta.double() - base) >= 0).all()


@settings(deadline=None)
@given(shape=st.lists(st.integers(0, 7), max_size=4).map(tuple), size=st.integers(1, 30))
def test_pieces_cover_a_tensor_in_the_order_of_its_file(shape, size):
    whole = torch.arange(math.prod(shape)).reshape(shape)
    before, formula.CHUNK = formula.CHUNK, size
    try:
        parts = [whole[index] for index in formula.pieces(shape)]
    finally:
        formula.CHUNK = before
    assert torch.equal(torch.cat([part.flatten() for part in parts]), whole.flatten())
    assert all(part.numel() <= size for part in parts)


# -- files ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", ["5GB", "30KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_merged_model_loads_and_is_the_formula(tmp_path, tokenizer, tied, size, dtype):
    base = tiny.save_base(tmp_path / "base", tokenizer, tie_word_embeddings=tied)
    moved = save_moved(base, tmp_path / "moved", tokenizer, seed=1)
    adapted = save_split(moved, tmp_path / "adapted", tokenizer, dtype, size)
    fisher = make_fisher(base)
    merged = merge_models(base, adapted, fisher, 2.0, tmp_path / "out")
    assert (HEAD in fisher) is not tied
    theta, start, found = parameters(adapted), parameters(base), parameters(tmp_path / "out")
    expected = reference(theta, start, values_of(fisher), 2.0)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values.dtype == dtype
        torch.testing.assert_close(values, expected[name].to(dtype), rtol=1e-6 if dtype == torch.float32 else 1e-3, atol=0)
        assert torch.equal(values, theta[name]) is False
        zero = fisher.read(name) == 0
        assert torch.equal(values[zero], theta[name][zero])
    assert sum(zero.sum() for zero in (f == 0 for f in values_of(fisher).values())) > 100
    ours, theirs = ({path.name for path in folder.glob("model*")} for folder in (tmp_path / "out", adapted))
    assert ours == theirs
    assert (len(ours) > 2) is (size == "30KB")
    assert merged.groups["all"].weights == sum(values.numel() for values in found.values())


def test_lambda_0_is_the_adapted_model_file_by_file(tmp_path, base_folder, adapted_folder, own_fisher, tokenizer):
    adapted = save_split(adapted_folder, tmp_path / "adapted", tokenizer)
    (adapted / "chat_template.jinja").write_text("{{ messages }}")
    (adapted / "training_args.bin").write_bytes(b"a pickle")
    (adapted / "README.md").write_text("a card")
    merge_models(base_folder, adapted, own_fisher, 0.0, tmp_path / "out")
    ours, theirs = tree(tmp_path / "out"), tree(adapted)
    assert theirs.keys() - ours.keys() == {"training_args.bin", "README.md"}
    assert ours.keys() - theirs.keys() == {"ewc_state.json"}
    del ours["ewc_state.json"]
    assert json.loads(ours.pop("model.safetensors.index.json")) == json.loads(theirs["model.safetensors.index.json"])
    assert len([name for name in ours if name.endswith(".safetensors")]) > 1
    assert all(theirs[name] == content for name, content in ours.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lambda_inf_is_the_base_but_where_the_fisher_is_0(tmp_path, base_folder, adapted_folder, own_fisher, tokenizer, dtype):
    adapted = save_split(adapted_folder, tmp_path / "adapted", tokenizer, dtype)
    merged = merge_models(base_folder, adapted, own_fisher, math.inf, tmp_path / "out")
    theta, base, found = parameters(adapted), parameters(base_folder), parameters(tmp_path / "out")
    for name, fisher in values_of(own_fisher).items():
        assert torch.equal(found[name], torch.where(fisher > 0, base[name].to(dtype), theta[name]))
    assert merged.groups["all"].way_by_fisher == pytest.approx(1)
    assert json.loads(state_file(tmp_path / "out").read_text())["merge"]["merge_lambda"] == "inf"


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_interpolation_moves_all_weights_alike_and_needs_no_fisher(tmp_path, base_folder, adapted_folder, alpha):
    merged = merge_models(base_folder, adapted_folder, None, None, tmp_path / "out", interpolate=alpha)
    theta, base, found = (parameters(folder) for folder in (adapted_folder, base_folder, tmp_path / "out"))
    for name, values in found.items():
        expected = base[name].double() + (1 - alpha) * (theta[name].double() - base[name].double())
        torch.testing.assert_close(values, expected.float(), rtol=1e-6, atol=0)
        assert torch.equal(values, (theta, base)[int(alpha)][name]) is (alpha != 0.3)
    assert merged.groups["all"].way == pytest.approx(alpha)
    assert merged.groups["all"].kl_after is None
    assert json.loads(state_file(tmp_path / "out").read_text())["merge"].get("fisher") is None


@pytest.mark.parametrize("codec", ["float32", "log8"])
def test_pieces_give_the_same_files_and_none_is_larger_than_the_limit(
    tmp_path, base_folder, adapted_folder, own_fisher, monkeypatch, codec
):
    fisher = own_fisher.save_pretrained(tmp_path / "fisher", codec=codec)
    merge_models(base_folder, adapted_folder, fisher, 1.0, tmp_path / "whole")
    whole, sizes = files.TensorFiles.read, []

    def read(self, key, index=None):
        values = whole(self, key, index)
        sizes.append(values.numel())
        return values

    opened = FisherInformation.from_pretrained(fisher)  # checks all values, tensor by tensor
    monkeypatch.setattr(formula, "CHUNK", 50)
    monkeypatch.setattr(files.TensorFiles, "read", read)
    merged = merge_models(base_folder, adapted_folder, opened, 1.0, tmp_path / "pieces")
    monkeypatch.undo()
    total = merged.groups["all"].weights
    assert max(sizes) <= (128 if codec == "log8" else 50)  # log8 decodes whole blocks
    assert sum(sizes) >= 3 * total
    assert len(sizes) >= 3 * total / 50
    ours, theirs = tree(tmp_path / "pieces"), tree(tmp_path / "whole")
    assert json.loads(ours.pop("ewc_state.json"))["merge"].keys() == json.loads(theirs.pop("ewc_state.json"))["merge"].keys()
    assert ours == theirs


def test_a_table_that_is_stored_twice_stays_one(tmp_path, base_folder, adapted_folder, own_fisher, tokenizer):
    adapted = store_twice(save_split(adapted_folder, tmp_path / "adapted", tokenizer, size="5GB"))
    merged = merge_models(base_folder, adapted, own_fisher, 1.0, tmp_path / "out")
    plain = merge_models(base_folder, adapted_folder, own_fisher, 1.0, tmp_path / "plain")
    found = stored(tmp_path / "out")
    assert torch.equal(found[HEAD], found[EMBEDDING])
    assert torch.equal(found[EMBEDDING], stored(tmp_path / "plain")[EMBEDDING])
    assert merged.groups == plain.groups
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight

    held = load_file(adapted / "model.safetensors")
    held[HEAD][3, 4] += 1
    save_file(held, adapted / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="two different tables"):
        merge_models(base_folder, adapted, own_fisher, 1.0, tmp_path / "new")
    assert nothing_left(tmp_path, "adapted", "out", "plain")


def test_a_tied_table_under_its_second_name_only(tmp_path, base_folder, adapted_folder, own_fisher, tokenizer):
    adapted = store_twice(save_split(adapted_folder, tmp_path / "adapted", tokenizer, size="5GB"))
    held = load_file(adapted / "model.safetensors")
    del held[EMBEDDING]
    save_file(held, adapted / "model.safetensors", metadata={"format": "pt"})
    merged = merge_models(base_folder, adapted, own_fisher, 1.0, tmp_path / "out")
    plain = merge_models(base_folder, adapted_folder, own_fisher, 1.0, tmp_path / "plain")
    assert torch.equal(stored(tmp_path / "out")[HEAD], stored(tmp_path / "plain")[EMBEDDING])
    assert merged.groups == plain.groups


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
@pytest.mark.parametrize("before", ["float16", "float32"])
def test_what_is_no_parameter_is_copied(tmp_path, base_folder, adapted_folder, own_fisher, tokenizer, before, dtype):
    adapted = save_split(adapted_folder, tmp_path / "adapted", tokenizer, getattr(torch, before), size="5GB")
    extra = {"model.mask": torch.tensor([[-math.inf, 0.0]]), "model.ids": torch.arange(5), "model.flag": torch.tensor([True])}
    held = load_file(adapted / "model.safetensors")
    save_file({**held, **extra}, adapted / "model.safetensors", metadata={"format": "pt", "note": "ą"})
    merge_models(base_folder, adapted, own_fisher, 1.0, tmp_path / "out", dtype=dtype)
    found = stored(tmp_path / "out")
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in extra.items())
    assert {value.dtype for key, value in found.items() if key not in extra} == {getattr(torch, dtype or before)}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "ą"}
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    order = sorted(found, key=lambda key: header[key]["data_offsets"])
    sizes = [found[key].itemsize for key in order]
    assert sizes == sorted(sizes, reverse=True)  # else a tensor of any length would push the next off its boundary


def test_another_dtype_is_written_into_config_and_index(tmp_path, base_folder, adapted_folder, own_fisher, tokenizer):
    adapted = save_split(adapted_folder, tmp_path / "adapted", tokenizer)
    merge_models(base_folder, adapted, own_fisher, 1.0, tmp_path / "out", dtype="bfloat16")
    merge_models(base_folder, adapted, own_fisher, 1.0, tmp_path / "exact")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    for name, values in parameters(tmp_path / "exact").items():
        assert torch.equal(parameters(tmp_path / "out")[name], values.bfloat16())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * values.numel() for values in stored(tmp_path / "out").values())
    before = json.loads((adapted / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**before, "dtype": "bfloat16"}


def test_a_base_whose_files_use_older_names(tmp_path):
    """GPT-2 on the Hub: keys without `transformer.`, and causal masks among them."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=16)
    for name in ("base", "adapted"):
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
    path = tmp_path / "base" / "model.safetensors"
    old = {key.removeprefix("transformer."): value for key, value in load_file(path).items()}
    save_file({**old, "h.0.attn.bias": torch.ones(1, 1, 16, 16).tril()}, path, metadata={"format": "pt"})
    fisher = make_fisher(tmp_path / "base")
    merge_models(tmp_path / "base", tmp_path / "adapted", fisher, 1.0, tmp_path / "out")
    theta, start = parameters(tmp_path / "adapted"), parameters(tmp_path / "base")
    for name, expected in reference(theta, start, values_of(fisher), 1.0).items():
        torch.testing.assert_close(parameters(tmp_path / "out")[name], expected.float(), rtol=1e-6, atol=1e-9)
    with pytest.raises(DataError, match=r"names or in pieces that transformers changes(.|\n)*save_original_format=False"):
        merge_models(tmp_path / "adapted", tmp_path / "base", None, None, tmp_path / "new", interpolate=0.5)


def test_restacked_experts_are_refused_and_the_way_out_works(tmp_path):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, vocab_size=50)
    config = MixtralConfig(num_hidden_layers=1, num_local_experts=2, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    MixtralForCausalLM(config).save_pretrained(tmp_path / "adapted")
    fisher = make_fisher(tmp_path / "base")
    with pytest.raises(DataError, match=r"experts.*is a parameter, and none of its files' \d+ tensors") as caught:
        merge_models(tmp_path / "base", tmp_path / "adapted", fisher, 1.0, tmp_path / "out")
    command = str(caught.value).split("\n")[1].strip().replace("MODEL", repr(str(tmp_path / "adapted")))
    exec(command.replace("FOLDER", repr(str(tmp_path / "named"))), {"AutoModelForCausalLM": AutoModelForCausalLM})
    merge_models(tmp_path / "base", tmp_path / "named", fisher, 1.0, tmp_path / "out")
    theta, start = parameters(tmp_path / "adapted"), parameters(tmp_path / "base")
    for name, expected in reference(theta, start, values_of(fisher), 1.0).items():
        torch.testing.assert_close(parameters(tmp_path / "out")[name], expected.float(), rtol=1e-6, atol=1e-9)


def test_a_folded_fisher_pulls_to_its_own_anchor(tmp_path, base_folder, adapted_folder, tokenizer):
    newer = save_moved(base_folder, tmp_path / "newer", tokenizer, seed=5)
    fold = FisherInformation.fold([make_fisher(base_folder), make_fisher(newer, seed=2)])
    merge_models(newer, adapted_folder, fold, 1.0, tmp_path / "out")
    anchor = fold.anchor(fold.names)
    start, values = {name: anchor.read(name) for name in fold.names}, values_of(fold)
    for name, expected in reference(parameters(adapted_folder), start, values, 1.0).items():
        torch.testing.assert_close(parameters(tmp_path / "out")[name], expected.float(), rtol=1e-6, atol=1e-9)
    with pytest.raises(FisherMismatchError, match="base of an older one"):
        merge_models(base_folder, adapted_folder, fold, 1.0, tmp_path / "new")


def test_what_the_fisher_does_not_hold_stays_adapted_if_that_is_wanted(tmp_path, base_folder, adapted_folder):
    fisher = make_fisher(base_folder, drop=NORM)
    with pytest.raises(FisherMismatchError, match=r"norm.weight(.|\n)*`ewc_missing: ignore`(.|\n)*Nothing was written"):
        merge_models(base_folder, adapted_folder, fisher, 1.0, tmp_path / "out")
    assert nothing_left(tmp_path)
    merge_models(base_folder, adapted_folder, fisher, 1.0, tmp_path / "out", ewc_missing="ignore")
    theta, found = parameters(adapted_folder), parameters(tmp_path / "out")
    assert torch.equal(found[NORM], theta[NORM])
    for name, expected in reference(theta, parameters(base_folder), values_of(fisher), 1.0).items():
        torch.testing.assert_close(found[name], expected.float(), rtol=1e-6, atol=1e-9)


def test_the_shares_are_those_of_the_files(tmp_path, base_folder, adapted_folder, own_fisher):
    merged = merge_models(base_folder, adapted_folder, own_fisher, 2.0, tmp_path / "out")
    theta, base, found = (parameters(folder) for folder in (adapted_folder, base_folder, tmp_path / "out"))
    assert set(merged.groups) == {"embedding", "attention", "mlp", "norm", "all"}
    for group, part in (("mlp", "mlp"), ("attention", "attn"), ("all", "")):
        names = [name for name in found if part in name]
        mean = own_fisher.trace / own_fisher.manifest.totals.num_parameters
        per_token = {name: own_fisher.read(name).double() / TOKENS for name in names}
        way = {name: 1 - 1 / (1 + 2 * f / mean) for name, f in per_token.items()}
        size, total = (sum(f(v) for v in per_token.values()) for f in (torch.numel, torch.sum))
        share = merged.groups[group]
        assert share.weights == size
        assert share.way == pytest.approx(sum(each.sum().item() for each in way.values()) / size, rel=1e-6)
        weighted = sum((way[name] * per_token[name]).sum().item() for name in names) / total.item()
        assert share.way_by_fisher == pytest.approx(weighted, rel=1e-6)
        for kl, model in ((share.kl_before, theta), (share.kl_after, found)):
            drift = {name: model[name].double() - base[name].double() for name in names}
            expected = sum(0.5 * (per_token[name] * drift[name] ** 2).sum().item() for name in names)
            assert kl == pytest.approx(expected, rel=1e-6)
        assert share.kl_after < share.kl_before


# -- lineage ----------------------------------------------------------------------------------------------------------------


def with_state(folder: Path, target: Path, base: Path, trained_with: FisherInformation | None, **more) -> Path:
    """A copy of a model with the record that training leaves."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    model = BaseModel.resolve(base)
    named = {"source": trained_with.source, "sha256": trained_with.sha256} if trained_with else None
    anchor = {"id": model.id, "revision": None, "fingerprint": model.fingerprint}
    data = {"dataset": "new.jsonl", "config": None, "split": "train", "revision": None}
    state = {"schema": 1, "hf_ewc": "0.0.9", "ewc_lambda": 10.0, "ewc_mode": "loss", "fisher": named, "anchor": anchor}
    state_file(target).write_text(json.dumps({**state, "data": data, "global_step": 60, **more}))
    return target


@pytest.fixture
def opened(own_fisher, tmp_path) -> FisherInformation:
    return FisherInformation.from_pretrained(own_fisher.save_pretrained(tmp_path / "fisher"))


def test_the_record_keeps_how_it_was_trained_and_adds_what_was_merged(tmp_path, base_folder, adapted_folder, opened):
    adapted = with_state(adapted_folder, tmp_path / "adapted", base_folder, opened)
    merge_models(None, adapted, None, 1.5, tmp_path / "out")
    record, before = (json.loads(state_file(folder).read_text()) for folder in (tmp_path / "out", adapted))
    merge = record.pop("merge")
    assert record == before
    models = {"base": BaseModel.resolve(base_folder), "adapted": BaseModel.resolve(adapted)}
    assert merge.pop("hf_ewc") != before["hf_ewc"]
    assert merge == {
        "merge_lambda": 1.5,
        "fisher": {"source": str(tmp_path / "fisher"), "sha256": opened.sha256},
        **{role: {"id": m.id, "revision": None, "fingerprint": m.fingerprint} for role, m in models.items()},
    }
    merge_models(None, tmp_path / "out", None, None, tmp_path / "again", interpolate=0.25)
    again = json.loads(state_file(tmp_path / "again").read_text())["merge"]
    assert (again["interpolate"], again["adapted"]["merge"]["merge_lambda"]) == (0.25, 1.5)


def test_a_model_that_this_library_did_not_train_needs_both_names(tmp_path, base_folder, adapted_folder, opened):
    with pytest.raises(ConfigError, match=r"`base` is missing(.|\n)*ewc_state.json"):
        merge_models(None, adapted_folder, opened, 1.0, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"`fisher` is missing(.|\n)*ewc_state.json"):
        merge_models(base_folder, adapted_folder, None, 1.0, tmp_path / "out")
    merge_models(base_folder, adapted_folder, tmp_path / "fisher", 1.0, tmp_path / "out")
    record = json.loads(state_file(tmp_path / "out").read_text())
    assert (record["schema"], record["anchor"], record["fisher"]) == (1, None, None)  # what it was trained with is not known
    assert record["merge"]["fisher"]["sha256"] == opened.sha256


def test_recorded_things_that_are_gone_or_changed_are_named(tmp_path, base_folder, adapted_folder, opened, tokenizer, caplog):
    moved = {"id": str(tmp_path / "gone"), "revision": None, "fingerprint": "ab" * 32}
    adapted = with_state(adapted_folder, tmp_path / "a", base_folder, opened, anchor=moved)
    with pytest.raises(DataError, match=r"gone(.|\n)*Set `base`"):
        merge_models(None, adapted, None, 1.0, tmp_path / "out")
    tiny.save_base(tmp_path / "gone", tokenizer, seed=9)
    with pytest.raises(DataError, match=rf"recorded sha256 {'ab' * 32}(.|\n)*found    sha256(.|\n)*Set `base`"):
        merge_models(None, adapted, None, 1.0, tmp_path / "out")
    adapted = with_state(adapted_folder, tmp_path / "b", base_folder, opened)
    make_fisher(base_folder, seed=7).save_pretrained(tmp_path / "fisher", overwrite=True)
    with pytest.raises(FisherMismatchError, match=rf"recorded sha256 {opened.sha256}(.|\n)*Set `fisher`"):
        merge_models(None, adapted, None, 1.0, tmp_path / "out")
    parts = [{"source": "f/1", "sha256": "a"}, {"source": "f/2", "sha256": "b"}]
    adapted = with_state(adapted_folder, tmp_path / "c", base_folder, opened, fisher={"source": "f/1 + f/2", "fold": parts})
    with pytest.raises(ConfigError, match="hf-ewc fisher fold f/1 f/2 --output_dir"):
        merge_models(None, adapted, None, 1.0, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "was trained against" not in caplog.text
    merge_models(tmp_path / "gone", adapted, None, None, tmp_path / "out", interpolate=0.5)
    assert "was trained against" in caplog.text


# -- refused ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("merge_lambda", "more", "part"),
    [
        (None, {}, "neither is given"),
        (1.0, {"interpolate": 0.5}, "both are given"),
        (-0.5, {}, "`merge_lambda: -0.5`"),
        (math.nan, {}, "`merge_lambda: nan`"),
        (None, {"interpolate": 1.5}, "`interpolate: 1.5`"),
        (None, {"interpolate": math.nan}, "`interpolate: nan`"),
        (1.0, {"dtype": "float16"}, "`dtype: float16`"),
        (1.0, {"ewc_missing": "ignroe"}, "`ewc_missing: ignroe`"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path, base_folder, adapted_folder, own_fisher, merge_lambda, more, part):
    with pytest.raises(ConfigError) as caught:
        merge_models(base_folder, adapted_folder, own_fisher, merge_lambda, tmp_path / "out", **more)
    assert part in str(caught.value)
    assert nothing_left(tmp_path)


def test_models_and_fishers_that_do_not_belong_together(tmp_path, base_folder, adapted_folder, own_fisher, tokenizer):
    out = tmp_path / "out"
    with pytest.raises(FisherMismatchError, match=r"weights (.|\n)*name it as `base`(.|\n)*Nothing was written"):
        merge_models(adapted_folder, base_folder, own_fisher, 1.0, out)  # the wrong way round
    other = make_fisher(tiny.save_base(tmp_path / "other", tokenizer, seed=4))
    with pytest.raises(FisherMismatchError, match="weights"):
        merge_models(base_folder, adapted_folder, other, 1.0, out)
    zero = FisherInformation.from_tensors(
        {name: torch.zeros(own_fisher.shape(name)) for name in own_fisher.names},
        base=own_fisher.manifest.base_model,
        probes=own_fisher.manifest.probes,
        estimator=own_fisher.manifest.estimator,
    )
    with pytest.raises(FisherMismatchError, match="0 everywhere"):
        merge_models(base_folder, adapted_folder, zero, 1.0, out)

    model = AutoModelForCausalLM.from_pretrained(adapted_folder)
    model.resize_token_embeddings(len(tokenizer) + 8)
    model.save_pretrained(tmp_path / "resized")
    rows = len(tokenizer)
    shapes = rf"embed_tokens.weight +base \({rows}, 32\) +adapted \({rows + 8}, 32\)"
    with pytest.raises(DataError, match=rf"{shapes}(.|\n)*resize_token_embeddings\({rows}\)"):
        merge_models(base_folder, tmp_path / "resized", own_fisher, 1.0, out)
    tiny.save_base(tmp_path / "wide", tokenizer, intermediate_size=48, num_hidden_layers=1)
    with pytest.raises(DataError, match=r"\(64, 32\) +adapted \(48, 32\)(.|\n)*Name the base that it was trained from"):
        merge_models(base_folder, tmp_path / "wide", own_fisher, 1.0, out)
    tiny.save_base(tmp_path / "untied", tokenizer, tie_word_embeddings=False)
    with pytest.raises(DataError, match=r"lm_head.weight +base – +adapted \("):
        merge_models(base_folder, tmp_path / "untied", own_fisher, 1.0, out)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(DataError, match=r"architecture +base Gemma2ForCausalLM +adapted GPT2LMHeadModel"):
        merge_models(base_folder, tmp_path / "gpt2", own_fisher, 1.0, out)
    with pytest.raises(DataError, match=r"the adapted model '.*nowhere'"):
        merge_models(base_folder, tmp_path / "nowhere", own_fisher, 1.0, out)
    assert nothing_left(tmp_path, "other", "resized", "wide", "untied", "gpt2")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda held: held[NORM].fill_(math.nan), rf"{NORM} of the adapted model .* holds 32 values that are NaN or infinite"),
        (lambda held: held[EMBEDDING][-1].fill_(-math.inf), rf"{EMBEDDING} of the adapted model .* holds 32 values"),
        (lambda held: held.pop(NORM), rf"{NORM} is a parameter, and none of its files' \d+ tensors"),
        (lambda held: held.update({NORM: torch.ones(31)}), rf"{NORM} +files \(31,\) +config \(32,\)"),
        (lambda held: held.update({NORM: held[NORM].to(torch.int8)}), rf"quantised \({NORM} is I8\)"),
        (lambda held: held.update({NORM: held[NORM].to(torch.float8_e4m3fn)}), rf"quantised \({NORM} is F8_E4M3\)"),
    ],
    ids=["nan", "inf", "missing", "shape", "int8", "float8"],
)
def test_weights_that_cannot_be_merged_are_named(tmp_path, base_folder, adapted_folder, own_fisher, tokenizer, change, part):
    adapted = save_split(adapted_folder, tmp_path / "adapted", tokenizer, size="5GB")
    held = load_file(adapted / "model.safetensors")
    change(held)
    save_file(held, adapted / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=part):
        merge_models(base_folder, adapted, own_fisher, 0.0, tmp_path / "out")
    assert nothing_left(tmp_path, "adapted")


def test_a_base_that_is_infinite_or_too_large_for_the_result_is_named(tmp_path, base_folder, adapted_folder, tokenizer):
    base = save_split(base_folder, tmp_path / "base", tokenizer, size="5GB")
    adapted = save_split(adapted_folder, tmp_path / "adapted", tokenizer, torch.float16)
    held = load_file(base / "model.safetensors")
    held[NORM][:] = 1e5
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"float16 cannot(.|\n)*`dtype: float32`"):
        merge_models(base, adapted, make_fisher(base), math.inf, tmp_path / "out")
    merge_models(base, adapted, make_fisher(base), math.inf, tmp_path / "wide", dtype="float32")
    assert (parameters(tmp_path / "wide")[NORM] == 1e5).sum() > 16  # where F > 0
    held[NORM][5] = math.inf
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=f"{NORM} of the base model '.*' holds 1 values"):
        merge_models(base, adapted, make_fisher(base), 1.0, tmp_path / "out")
    assert nothing_left(tmp_path, "base", "adapted", "wide")


def test_nothing_is_overwritten_unasked_and_nothing_foreign_ever(tmp_path, base_folder, adapted_folder, own_fisher):
    out = tmp_path / "out"
    for folder in (base_folder, adapted_folder):
        before = tree(folder)
        (tmp_path / "link").symlink_to(folder)
        with pytest.raises(ConfigError, match="replace what it is made from"):
            merge_models(base_folder, adapted_folder, own_fisher, 1.0, tmp_path / "link", overwrite=True)
        assert tree(folder) == before
        (tmp_path / "link").unlink()
    merge_models(base_folder, adapted_folder, own_fisher, 1.0, out)
    before = tree(out)
    with pytest.raises(ConfigError, match="is not empty"):
        merge_models(base_folder, adapted_folder, own_fisher, 2.0, out)
    assert tree(out) == before
    merge_models(base_folder, adapted_folder, own_fisher, 2.0, out, overwrite=True)
    assert tree(out).keys() == before.keys()
    assert tree(out)["model.safetensors"] != before["model.safetensors"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"something else \(notes.txt\)"):
        merge_models(base_folder, adapted_folder, own_fisher, 1.0, out, overwrite=True)
    (out / "notes.txt").rename(tmp_path / "notes.txt")
    (out / "model-1").mkdir()
    (out / "model-1" / "mine.safetensors").write_text("mine")
    with pytest.raises(ConfigError, match=r"something else \(model-1/mine.safetensors\)"):
        merge_models(base_folder, adapted_folder, own_fisher, 1.0, out, overwrite=True)
    trained = with_state(adapted_folder, tmp_path / "trained", base_folder, own_fisher)
    with pytest.raises(ConfigError, match="something else"):
        merge_models(base_folder, adapted_folder, own_fisher, 1.0, trained, overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        merge_models(base_folder, adapted_folder, own_fisher, 1.0, tmp_path / "file", overwrite=True)
    assert (out / "model-1" / "mine.safetensors").exists()


def test_the_base_that_the_record_names_is_not_overwritten_either(tmp_path, base_folder, adapted_folder, own_fisher, opened):
    merge_models(base_folder, adapted_folder, own_fisher, 1.0, tmp_path / "first")
    adapted = with_state(adapted_folder, tmp_path / "adapted", tmp_path / "first", None)
    before = tree(tmp_path / "first")
    with pytest.raises(ConfigError, match="replace what it is made from"):
        merge_models(None, adapted, None, None, tmp_path / "first", interpolate=0.5, overwrite=True)
    assert tree(tmp_path / "first") == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["interrupt", "full"])
def test_what_breaks_off_in_the_middle_leaves_the_old_state(
    tmp_path, base_folder, adapted_folder, own_fisher, monkeypatch, error
):
    merge_models(base_folder, adapted_folder, own_fisher, 1.0, tmp_path / "old")
    before, real = tree(tmp_path / "old"), formula.Mover.move

    def move(self, name, *args, **kwargs):
        if "layers.1" in name:
            raise error
        return real(self, name, *args, **kwargs)

    monkeypatch.setattr(formula.Mover, "move", move)
    for out in ("old", "new"):
        with pytest.raises(type(error)):
            merge_models(base_folder, adapted_folder, own_fisher, 2.0, tmp_path / out, overwrite=True)
    assert nothing_left(tmp_path, "old")
    assert tree(tmp_path / "old") == before


def test_a_killed_merge_leaves_no_folder_and_can_be_repeated(tmp_path, base_folder, adapted_folder, opened):
    arguments = tuple(map(str, (base_folder, adapted_folder, tmp_path / "fisher")))
    code = "import os; from hf_ewc.merge import merge_models, run\n"
    code += "run.write_beside = lambda *_: os._exit(9)\n"  # all weights are written by then
    code += f"merge_models(*{arguments!r}, 1.0, {str(tmp_path / 'out')!r})"
    environment = {**os.environ, "PYTHONPATH": str(Path(run.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=environment)
    assert done.returncode == 9, done.stderr.decode()
    assert not (tmp_path / "out").exists()
    merge_models(*arguments, 1.0, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json"}


def test_files_that_are_cut_off_meanwhile_are_refused(tmp_path, base_folder, adapted_folder, own_fisher, tokenizer):
    adapted = save_split(adapted_folder, tmp_path / "adapted", tokenizer, size="5GB")
    held = load_file(adapted / "model.safetensors")
    save_file({**held, "zz.buffer": torch.zeros(99)}, adapted / "model.safetensors", metadata={"format": "pt"})
    whole = (adapted / "model.safetensors").read_bytes()
    with open(tmp_path / "cut", "wb+") as cut, open(tmp_path / "copy", "wb") as out:
        cut.write(whole[:-9])
        with pytest.raises(DataError, match="ends before its header says"):
            shards._copy_bytes(cut, len(whole) - 396, 396, out)
    (adapted / "model.safetensors").write_bytes(whole[:-9])
    with pytest.raises(DataError, match=r"the adapted model '.*' is damaged"):
        merge_models(base_folder, adapted, own_fisher, 1.0, tmp_path / "out")
    assert not (tmp_path / "out").exists()

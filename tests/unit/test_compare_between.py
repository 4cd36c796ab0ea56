"""Models between base and adapted, in memory: what `hf-ewc merge` writes, one per λ, and never more than there is room for."""

from __future__ import annotations

import gc
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from test_artifact_fold import save_moved
from test_merge import EMBEDDING, HEAD, NORM, make_fisher, parameters, reference, save_split, values_of
from transformers import GPT2Config, GPT2LMHeadModel

from hf_ewc import FisherInformation
from hf_ewc.compare import CompareError, ModelPair, Sampling, Side, between, public_message, score, stream
from hf_ewc.compare.between import STOPS, Between, free_memory
from hf_ewc.errors import DataError, FisherMismatchError
from hf_ewc.merge import formula, merge_models

TEXT = "Žiemą ežeras užšąla."


@pytest.fixture(scope="module")
def adapted_folder(base_folder, tmp_path_factory, tokenizer):
    return save_moved(base_folder, tmp_path_factory.mktemp("adapted") / "lt", tokenizer, seed=3)


@pytest.fixture(scope="module")
def own_fisher(base_folder):
    return make_fisher(base_folder)


@pytest.fixture(scope="module")
def pair(base_folder, adapted_folder):
    return ModelPair.load(base_folder, adapted_folder, device="cpu")


def weights(side: Side) -> dict[str, torch.Tensor]:
    return {name: param.detach() for name, param in side.model.named_parameters()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Bit by bit, as -0 is not 0."""
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == value.dtype and torch.equal(ours[name].view(torch.uint8), value.view(torch.uint8))
        for name, value in theirs.items()
    )


def copies(between_: Between, count: float) -> int:
    return int(count * between_.cost_bytes)


# -- the weights ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_model_is_bit_by_bit_what_merge_writes(tmp_path, tokenizer, dtype, tied):
    base = tiny.save_base(tmp_path / "first", tokenizer, tie_word_embeddings=tied)
    base = save_split(base, tmp_path / "base", tokenizer, dtype)
    adapted = save_split(save_moved(base, tmp_path / "moved", tokenizer, 1), tmp_path / "adapted", tokenizer, dtype)
    folder = make_fisher(base).save_pretrained(tmp_path / "fisher", codec="log8")
    fisher = FisherInformation.from_pretrained(folder)
    pair = ModelPair.load(base, adapted, device="cpu", dtype=str(dtype).removeprefix("torch."))
    models = Between(pair, fisher)
    for strength in (0.1, 1.0, 300.0, math.inf):
        merge_models(base, adapted, fisher, strength, tmp_path / f"{strength}")
        side = models.at(strength)
        assert same(weights(side), parameters(tmp_path / f"{strength}"))
        assert (side.model.lm_head.weight is side.model.model.embed_tokens.weight) is tied
        assert (HEAD in weights(side)) is not tied
        assert (side.role, side.model.training) == ("between", False)
    assert not same(weights(models.at(1)), weights(models.at(300)))


@pytest.mark.parametrize("strength", [0.3, 10, 1e4])
def test_a_model_is_the_formula_written_out(pair, own_fisher, strength):
    found = weights(Between(pair, own_fisher).at(strength))
    theta, base = weights(pair.adapted), weights(pair.base)
    expected = reference(theta, base, values_of(own_fisher), strength)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.float(), rtol=1e-6, atol=1e-9)
        assert found[name].data_ptr() not in (theta[name].data_ptr(), base[name].data_ptr())


def test_both_ends(pair, own_fisher):
    models = Between(pair, own_fisher)
    assert models.at(0) is pair.adapted
    assert models.pair_at(0.0) is pair
    assert models.at_hand == ()
    found, theta, base = weights(models.at(math.inf)), weights(pair.adapted), weights(pair.base)
    for name, fisher in values_of(own_fisher).items():
        assert torch.equal(found[name], torch.where(fisher > 0, base[name], theta[name]))


def test_pieces_change_nothing(pair, own_fisher, monkeypatch):
    whole = weights(Between(pair, own_fisher).at(3))
    monkeypatch.setattr(formula, "CHUNK", 50)
    assert same(weights(Between(pair, own_fisher).at(3)), whole)


def test_a_folded_fisher_pulls_to_its_own_anchor(tmp_path, base_folder, adapted_folder, tokenizer):
    newer = save_moved(base_folder, tmp_path / "newer", tokenizer, seed=5)
    fold = FisherInformation.fold([make_fisher(base_folder), make_fisher(newer, seed=2)])
    merge_models(newer, adapted_folder, fold, 1.0, tmp_path / "out")
    side = Between(ModelPair.load(newer, adapted_folder, device="cpu"), fold).at(1)
    assert same(weights(side), parameters(tmp_path / "out"))


def test_what_the_fisher_lacks_is_refused_or_stays_adapted(base_folder, pair):
    fisher = make_fisher(base_folder, drop=NORM)
    with pytest.raises(FisherMismatchError, match=r"norm.weight") as caught:
        Between(pair, fisher)
    assert "trained" not in str(caught.value)
    found = weights(Between(pair, fisher, ewc_missing="ignore").at(1))
    assert torch.equal(found[NORM], weights(pair.adapted)[NORM])
    assert found[NORM].data_ptr() != weights(pair.adapted)[NORM].data_ptr()
    assert not torch.equal(found[EMBEDDING], weights(pair.adapted)[EMBEDDING])


def test_buffers_are_the_adapted_models_own_copies(base_folder, own_fisher, tokenizer):
    models = [tiny.make_model(len(tokenizer), seed) for seed in (0, 1)]
    for number, model in enumerate(models):
        model.register_buffer("mark", torch.tensor([number]))
    side = Between(ModelPair.of(*models, tokenizer), own_fisher).at(1)
    assert side.model.mark.item() == 1
    assert side.model.mark.data_ptr() != models[1].mark.data_ptr()
    rotary = [model.model.rotary_emb.inv_freq for model in (side.model, models[1])]
    assert torch.equal(*rotary)


def test_models_write_and_score_as_those_that_merge_wrote(tmp_path, base_folder, adapted_folder, pair, own_fisher):
    merge_models(base_folder, adapted_folder, own_fisher, 10.0, tmp_path / "out")
    between_, merged = Between(pair, own_fisher).pair_at(10), ModelPair.load(base_folder, tmp_path / "out", device="cpu")
    assert between_.adapted.label == "λ = 10"
    assert score(between_, TEXT) == score(merged, TEXT)
    assert score(between_, TEXT) != score(pair, TEXT)
    sampling = Sampling(max_new_tokens=8)
    *_, ours = stream(between_, "The keeper", sampling)
    *_, theirs = stream(merged, "The keeper", sampling)
    assert ours == theirs


# -- refused ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [-1, math.nan, None, "much", [1], 10**400], ids=repr)
def test_what_is_no_lambda_is_refused_by_name(pair, own_fisher, strength):
    with pytest.raises(CompareError, match="λ is") as caught:
        Between(pair, own_fisher).at(strength)
    assert caught.value.code == "setting"


def test_models_and_fishers_that_do_not_belong_together(tmp_path, tokenizer, pair, own_fisher):
    small = tiny.make_model(len(tokenizer), intermediate_size=48)
    with pytest.raises(DataError, match=r"base \(64, 32\) +adapted \(48, 32\)"):
        Between(ModelPair.of(pair.base.model, small, tokenizer), own_fisher)
    other = make_fisher(tiny.save_base(tmp_path / "other", tokenizer, intermediate_size=48))
    with pytest.raises(FisherMismatchError, match=r"fisher \(48, 32\) +model \(64, 32\)"):
        Between(pair, other)
    zero = FisherInformation.from_tensors(
        {name: torch.zeros(own_fisher.shape(name)) for name in own_fisher.names},
        base=own_fisher.manifest.base_model,
        probes=own_fisher.manifest.probes,
        estimator=own_fisher.manifest.estimator,
    )
    with pytest.raises(FisherMismatchError, match="0 everywhere") as caught:
        Between(pair, zero)
    assert "Nothing was written" not in str(caught.value)
    packed = tiny.make_model(len(tokenizer))
    packed.model.norm.weight = torch.nn.Parameter(packed.model.norm.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(DataError, match=r"norm.weight is quantised \(int8\)"):
        Between(ModelPair.of(pair.base.model, packed, tokenizer), own_fisher)


def test_damaged_weights_are_named_and_no_model_is_kept(tokenizer, own_fisher):
    models = [tiny.make_model(len(tokenizer), seed) for seed in (0, 1)]
    models[1].model.norm.weight.data[3] = math.nan
    models_between = Between(ModelPair.of(*models, tokenizer), own_fisher)
    with pytest.raises(CompareError, match=r"norm.weight would hold numbers that are not finite") as caught:
        models_between.at(1)
    assert (caught.value.code, models_between.at_hand) == ("not_finite", ())


# -- memory -----------------------------------------------------------------------------------------------------------------


def test_the_cost_is_that_of_the_weights(pair, own_fisher):
    models = Between(pair, own_fisher)
    side = models.at(1)
    held = {each.data_ptr(): each for each in (*side.model.parameters(), *side.model.buffers())}
    assert models.cost_bytes == sum(each.numel() * each.itemsize for each in held.values())


def test_what_does_not_fit_is_told_and_nothing_is_allocated(pair, own_fisher, monkeypatch):
    models = Between(pair, own_fisher, memory_limit=1000)
    monkeypatch.setattr(models, "_made", lambda strength: pytest.fail("allocated"))
    assert not models.fits()
    with pytest.raises(CompareError, match=r"needs 0\.\d MB of memory, and the server has 0\.0 MB free for it") as caught:
        models.at(1)
    assert (caught.value.code, caught.value.facts) == ("memory", {"needed": models.cost_bytes, "free": 1000})
    assert public_message(caught.value) == str(models.problem)
    assert models.at(0) is pair.adapted
    assert models.pair_at(0) is pair


def test_the_one_that_nobody_asked_for_longest_makes_room(pair, own_fisher):
    models = Between(pair, own_fisher)
    models.memory_limit = copies(models, 2.5)
    for strength in (1, 3, 1, 10):  # 1 was asked for again, so 3 goes
        models.at(strength)
    assert models.at_hand == (1, 10)
    first = models.at(1).model
    assert models.at(1).model is first


def test_models_in_use_stay_as_they_are_and_are_never_made_twice(pair, own_fisher):
    models = Between(pair, own_fisher)
    models.memory_limit = copies(models, 2)
    used = models.at(1)
    before = {name: value.clone() for name, value in weights(used).items()}
    for strength in STOPS[1:]:
        models.at(strength)
        assert len(models.at_hand) <= 2
    assert same(weights(used), before)
    assert models.at(1).model is used.model


def test_while_others_use_all_room_there_is_a_refusal_and_afterwards_none(pair, own_fisher):
    models = Between(pair, own_fisher)
    models.memory_limit = copies(models, 2)
    frames = [stream(models.pair_at(strength), "The keeper", Sampling(max_new_tokens=4)) for strength in (1, 3)]
    for each in frames:
        next(each)
    with pytest.raises(CompareError, match="others are using now") as caught:
        models.at(10)
    assert (caught.value.code, models.problem) == ("memory", None)
    assert models.at_hand == (1, 3)
    for each in frames:
        each.close()
    del frames, each, caught
    assert models.at(10).label == "λ = 10"


def test_a_model_goes_as_soon_as_nobody_holds_it(pair, own_fisher):
    models = Between(pair, own_fisher)
    models.memory_limit = copies(models, 1)
    gc.disable()  # by reference counts alone
    try:
        models.at(1)
        models.at(3)
        assert models.at_hand == (3,)
    finally:
        gc.enable()


def test_a_model_that_only_a_cycle_holds_is_not_in_use(pair, own_fisher):
    models = Between(pair, own_fisher)
    models.memory_limit = copies(models, 1)
    gc.disable()  # as if it had not come round to it
    try:
        model = models.at(1).model
        model.hooked = [model]
        del model
        assert models.at(3).label == "λ = 3"
    finally:
        gc.enable()


def test_without_a_limit_it_is_what_is_free(pair, own_fisher, monkeypatch):
    assert free_memory(torch.device("cpu")) > 10**7
    models = Between(pair, own_fisher)
    assert models.fits()
    monkeypatch.setattr(between, "free_memory", lambda device: int(4.1 * models.cost_bytes) - models._used())
    for strength in (1, 3, 10, 30, 100):  # a quarter of the room stays free
        models.at(strength)
    assert models.at_hand == (10, 30, 100)
    monkeypatch.setattr(between, "free_memory", lambda device: models.cost_bytes)
    assert Between(pair, own_fisher).problem.facts["free"] == int(0.75 * models.cost_bytes)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 7\ninactive_file 300\n"}, [400]),
        ({"memory.max": "max", "memory.current": "900", "memory.stat": "inactive_file 300\n"}, []),
        ({"memory.max": "1000", "memory.current": "1200", "memory.stat": ""}, [0]),
        (
            {
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "600",
                "memory/memory.stat": "total_inactive_file 50",
            },
            [450],
        ),
        ({}, []),
    ],
    ids=["limit", "unlimited", "over", "v1", "none"],
)
def test_a_container_may_have_less_than_its_machine(tmp_path, files, free):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert list(between._of_container(tmp_path)) == free


# -- many at once -----------------------------------------------------------------------------------------------------------


def made(models: Between, monkeypatch) -> list[float]:
    """Which λ are made from now on, in order."""
    real, strengths = models._made, []

    def record(strength):
        strengths.append(strength)
        return real(strength)

    monkeypatch.setattr(models, "_made", record)
    return strengths


def test_fifty_threads_that_ask_for_one_get_the_same_made_once(pair, own_fisher, monkeypatch):
    models = Between(pair, own_fisher)
    strengths, start = made(models, monkeypatch), threading.Barrier(50)

    def ask(_):
        start.wait()
        return models.at(10).model

    with ThreadPoolExecutor(50) as pool:
        found = list(pool.map(ask, range(50)))
    assert strengths == [10]
    assert len({id(model) for model in found}) == 1


@pytest.mark.parametrize("room", [1, 2.5, 20])
def test_threads_that_ask_for_different_ones_never_get_each_others(pair, own_fisher, monkeypatch, room):
    alone = Between(pair, own_fisher)
    expected = {strength: score(alone.pair_at(strength), TEXT) for strength in STOPS}
    assert len({each.adapted_bits_per_byte for each in expected.values()}) == len(STOPS)
    models = Between(pair, own_fisher)
    models.memory_limit = copies(models, room)
    strengths, most, places = made(models, monkeypatch), [], threading.Semaphore(max(1, int(room)))

    def ask(number):
        strength = STOPS[number % len(STOPS)]
        with places:  # as many as there is room for, as a page's slots are
            found = score(models.pair_at(strength), TEXT)
            most.append(len(models.at_hand))
        return found == expected[strength]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(5 * len(STOPS))))
    assert max(most) <= room
    if room == 20:
        assert sorted(strengths) == list(STOPS[1:])  # each made once


def test_a_fault_in_one_thread_does_not_keep_others_waiting(pair, own_fisher, monkeypatch):
    models = Between(pair, own_fisher)
    with monkeypatch.context() as patch:
        patch.setattr(own_fisher, "read", lambda *args: (_ for _ in ()).throw(OSError("the disk is gone")))
        with pytest.raises(OSError, match="disk"):
            models.at(1)
    assert models.at(1).label == "λ = 1"


def test_other_architectures_are_copied_too(tmp_path, tokenizer):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(tokenizer), n_positions=64)
    for seed, name in enumerate(("base", "adapted")):
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    fisher = make_fisher(tmp_path / "base")
    merge_models(tmp_path / "base", tmp_path / "adapted", fisher, 1.0, tmp_path / "out")
    side = Between(ModelPair.load(tmp_path / "base", tmp_path / "adapted", device="cpu"), fisher).at(1)
    assert same(weights(side), parameters(tmp_path / "out"))

"""A Fisher from Adam's second moments: right where its assumptions hold, given to the right weights, and otherwise refused."""

import logging
import pickle

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from hf_ewc import BaseModel, FisherInformation
from hf_ewc.errors import ConfigError, DataError, FisherMismatchError
from hf_ewc.fisher.adam import equivalent_squares, import_adam_state, layouts
from hf_ewc.fisher.adam_state import read_moments

TOKENS = 8  # per batch: one scored token in each of eight examples


def small(**overrides):
    return tiny.make_model(**{"num_hidden_layers": 1, "initializer_range": 0.2, **overrides})


def token_gradients(model, ids, labels, each):
    """∂ log p of the last token: of the mean over the batch, or of each example."""
    loss = functional.cross_entropy(model(input_ids=ids).logits[:, -1].float(), labels, reduction="none")
    losses = loss.unbind() if each else [loss.mean()]
    for one in losses:
        yield torch.autograd.grad(one, list(model.parameters()), retain_graph=True)


def batches(model, count, seed):
    """Contexts, and next tokens drawn from the model: then the mean gradient is zero, as at the end of a training."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(4, 320, (TOKENS, 6), generator=generator)
        with torch.no_grad():
            chances = model(input_ids=ids).logits[:, -1].float().softmax(-1)
        yield ids, torch.multinomial(chances, 1, generator=generator).squeeze(-1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint whose weights stood still while AdamW averaged 400 batches, with its state; and its Fisher by definition."""
    model = small()
    folder = tmp_path_factory.mktemp("trained")
    model.save_pretrained(folder)
    true = [torch.zeros_like(parameter) for parameter in model.parameters()]
    squares = 0
    for ids, labels in batches(model, 100, seed=1):
        for gradients in token_gradients(model, ids, labels, each=True):
            squares += 1
            for total, gradient in zip(true, gradients, strict=True):
                total += gradient.square()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, betas=(0.9, 0.99))
    for ids, labels in batches(model, 400, seed=2):
        (gradients,) = token_gradients(model, ids, labels, each=False)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    names = [name for name, _ in model.named_parameters()]
    return folder, dict(zip(names, [total / squares for total in true], strict=True))


@pytest.fixture(scope="module")
def imported(trained):
    return import_adam_state(trained[0], trained[0] / "optimizer.pt", TOKENS)


def test_it_is_the_measured_fisher_per_token_where_its_assumptions_hold(trained, imported):
    true = trained[1]
    assert imported.trace == pytest.approx(sum(float(values.sum()) for values in true.values()), rel=0.1)
    for name, values in true.items():
        assert float(imported.per_token(name).sum() / values.sum()) == pytest.approx(1.0, abs=0.2), name
    inner = [name for name in true if "embed" not in name]  # most words are never seen, and their rows are noise in both
    made, wanted = (torch.cat([of(name).flatten().log() for name in inner]) for of in (imported.per_token, true.get))
    # two halves of the definition's own 800 squares correlate by 0.89
    assert float(torch.corrcoef(torch.stack([made, wanted]))[0, 1]) > 0.9


def test_it_is_n_times_the_bias_corrected_average(tmp_path, trained):
    folder, true = trained
    v = {f"{name}.exp_avg_sq": torch.full_like(values, 0.5) for name, values in true.items()}
    save_file(v, tmp_path / "early.safetensors", metadata={"step": "1", "beta2": "0.75"})
    fisher = import_adam_state(folder, tmp_path / "early.safetensors", 1000)
    torch.testing.assert_close(fisher.per_token("model.norm.weight"), torch.full((32,), 1000 * 0.5 / (1 - 0.75)))


def test_the_manifest_says_what_it_is_and_survives_the_disk(imported, trained, tmp_path):
    folder, _ = trained
    stored = FisherInformation.from_pretrained(imported.save_pretrained(tmp_path / "fisher", codec="float32"))
    estimator, (probe,) = stored.manifest.estimator, stored.manifest.probes
    assert (estimator.path, estimator.labels, estimator.granularity) == ("adam_exp_avg_sq", "empirical", "batch")
    assert (estimator.reduction, estimator.normalizer) == ("mean_per_scored_token", 1.0)
    assert (probe.kind, probe.dataset, probe.scored_tokens) == ("adam", "optimizer.pt", TOKENS * probe.examples)
    assert len(probe.ids_sha256) == 64
    assert probe.examples == equivalent_squares(0.99, 400)
    assert stored.manifest.base_model.same_weights(BaseModel.resolve(folder))
    stored.check_parameters({name: tuple(p.shape) for name, p in small().named_parameters()})


def test_the_average_forgets():
    weights = 0.99 ** torch.arange(300, dtype=torch.float64)
    assert equivalent_squares(0.99, 300) == round(float(weights.sum() ** 2 / weights.square().sum()))
    assert equivalent_squares(0.999, 1) == 1
    assert equivalent_squares(0.999, 10**6) == 1999


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_a_trainers_numbers_get_their_names_back(tmp_path, optim):
    model = tiny.make_model(vocab_size=320, hidden_size=64)  # the embedding is large enough for bitsandbytes to use 8 bits
    rows = [{"input_ids": [5 + i, 9, 17 + i, 30], "labels": [5 + i, 9, 17 + i, 30]} for i in range(16)]
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-4, "weight_decay": 0.1, "use_cpu": True}
    quiet = {"report_to": "none", "disable_tqdm": True, "save_steps": 3, "bf16": False, "logging_strategy": "no"}
    trainer = Trainer(model, TrainingArguments(str(tmp_path), optim=optim, **settings, **quiet), train_dataset=rows)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-3"
    fisher = import_adam_state(checkpoint, checkpoint / "optimizer.pt", 12)
    optimizer = trainer.optimizer.optimizer
    correction = 1 - optimizer.param_groups[0]["betas"][1] ** 3
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        v = state.get("exp_avg_sq", state.get("state2"))
        if v.dtype == torch.uint8:
            from bitsandbytes.functional import dequantize_blockwise

            v = dequantize_blockwise(v, absmax=state["absmax2"], code=state["qmap2"], blocksize=256)
        torch.testing.assert_close(fisher.per_token(name), v.view_as(parameter) * 12 / correction, msg=name)
    stored = fisher.manifest.estimator.accumulation_dtype
    assert stored == {"adamw_torch": "float32", "adamw_8bit": "8bit, float32"}[optim]


@pytest.mark.parametrize("order", list(layouts(small())))
def test_the_usual_orders_are_told_apart(tmp_path, trained, order):
    model = small()
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([{"params": [named[name] for name in group]} for group in layouts(model)[order]])
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    fisher = import_adam_state(trained[0], tmp_path / "optimizer.pt", 1)
    for name, parameter in named.items():
        torch.testing.assert_close(fisher.read(name), parameter.grad.square(), rtol=1e-4, atol=0, msg=name)


@pytest.fixture
def state(trained):
    """The optimizer's state, to be spoilt and saved again."""
    return torch.load(trained[0] / "optimizer.pt", weights_only=True)


@pytest.fixture
def refused(trained, tmp_path):
    """Imports a spoilt state, which must fail; returns the message."""

    def check(state, error, **settings):
        torch.save(state, tmp_path / "optimizer.pt")
        with pytest.raises(error) as caught:
            import_adam_state(trained[0], tmp_path / "optimizer.pt", TOKENS, **settings)
        assert "Nothing was imported." in str(caught.value)
        return str(caught.value)

    return check


def test_a_tied_table_has_one_state(trained):
    folder, _ = trained
    names = layouts(small())["one group"][0]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert set(import_adam_state(folder, folder / "optimizer.pt", 1).names) == set(names)


@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"num_hidden_layers": 2}, {"tie_word_embeddings": False}], ids=str)
def test_the_state_of_another_model_is_refused(refused, change):
    other = small(**change)
    optimizer = torch.optim.AdamW(other.parameters())
    for parameter in other.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    message = refused(optimizer.state_dict(), FisherMismatchError)
    assert "does not fit the model" in message
    assert f"{len(list(other.parameters()))} parameters" in message


def test_names_in_the_file_are_believed_and_checked(refused, state, trained):
    names = list(trained[1])
    by_name = {names[number]: value for number, value in state["state"].items()}
    groups = [{**state["param_groups"][0], "params": names}]
    del by_name[names[3]], groups[0]["params"][3]
    message = refused({"state": by_name, "param_groups": groups}, FisherMismatchError)
    assert f"{list(trained[1])[3]}   state absent" in message


def test_an_order_that_is_not_certain_is_refused(tmp_path):
    shapes = dict.fromkeys("abcd", (4, 4))
    states = {number: {"exp_avg_sq": torch.ones(4, 4), "step": 5} for number in range(4)}
    groups = [{"params": [0, 1], "betas": (0.9, 0.99)}, {"params": [2, 3], "betas": (0.9, 0.99)}]
    torch.save({"state": states, "param_groups": groups}, tmp_path / "optimizer.pt")
    orders = {"this": [["a", "b"], ["c", "d"]], "that": [["a", "c"], ["b", "d"]]}
    with pytest.raises(FisherMismatchError, match="more than one order: this; that"):
        read_moments(tmp_path / "optimizer.pt", shapes, orders)
    assert set(read_moments(tmp_path / "optimizer.pt", shapes, {"this": orders["this"]})) == set("abcd")
    torch.save(
        {"state": states, "param_groups": [{**g, "param_names": n} for g, n in zip(groups, orders["that"], strict=True)]},
        tmp_path / "named.pt",
    )
    assert list(read_moments(tmp_path / "named.pt", shapes, orders)) == ["a", "c", "b", "d"]


@pytest.mark.parametrize(("value", "named"), [(float("nan"), "1 NaN or infinite"), (-1e-9, "1 values below 0")])
def test_values_that_no_average_of_squares_can_have_are_refused(refused, state, value, named):
    state["state"][4]["exp_avg_sq"].view(-1)[7] = value
    assert named in refused(state, DataError)


def test_an_optimizer_that_keeps_no_second_moment_is_refused(refused):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert "has momentum_buffer" in refused(optimizer.state_dict(), DataError)


def test_a_parameter_that_was_never_stepped_is_named(refused, state, trained):
    del state["state"][2]
    message = refused(state, DataError)
    assert f"{list(trained[1])[2]} has no state" in message


def test_an_optimizer_before_its_first_step_is_refused(refused, state):
    state["state"] = {}
    assert "after at least one step" in refused(state, DataError)


@pytest.mark.parametrize(
    "shard",
    [
        {"optimizer_state_dict": {"zero_stage": 2, "single_partition_of_fp32_groups": [torch.ones(9)]}},
        {"optimizer_state_dict": {"fp32_flat_groups": [torch.ones(9)]}, "ds_version": "0.18"},
    ],
)
def test_a_zero_shard_is_refused_with_the_way_to_gather_it(refused, shard):
    assert "safe_get_full_optimizer_state" in refused(shard, DataError)


def test_a_sharded_folder_is_refused_with_the_way_to_gather_it(trained, tmp_path):
    (tmp_path / "optimizer_0").mkdir()
    with pytest.raises(DataError, match="FULL_STATE_DICT"):
        import_adam_state(trained[0], tmp_path / "optimizer_0", TOKENS)


class Trap:
    """Would leave a file behind if anything unpickled it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["torch", "torch, old format", "pickle"])
def test_nothing_in_a_pickle_is_ever_run(trained, tmp_path, state, kind):
    state["trap"] = Trap(tmp_path / "sprung")
    file = tmp_path / "optimizer.pt"
    if kind == "pickle":
        file.write_bytes(pickle.dumps(state["trap"]))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(DataError, match="can run any code"):
        import_adam_state(trained[0], file, TOKENS)
    assert not (tmp_path / "sprung").exists()


def test_a_file_that_was_cut_off_is_refused(trained, tmp_path):
    whole = (trained[0] / "optimizer.pt").read_bytes()
    (tmp_path / "optimizer.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cut off"):
        import_adam_state(trained[0], tmp_path / "optimizer.pt", TOKENS)


@pytest.mark.parametrize("form", ["{}.exp_avg_sq", "exp_avg_sq/{}"])
def test_safetensors_give_the_same_fisher(tmp_path, trained, state, imported, form):
    folder, true = trained
    v = {form.format(name): state["state"][number]["exp_avg_sq"] for number, name in enumerate(true)}
    save_file(v, tmp_path / "v.safetensors")
    with pytest.raises(ConfigError, match="--beta2"):
        import_adam_state(folder, tmp_path / "v.safetensors", TOKENS)
    with pytest.raises(ConfigError, match="--step"):
        import_adam_state(folder, tmp_path / "v.safetensors", TOKENS, beta2=0.99)
    fisher = import_adam_state(folder, tmp_path / "v.safetensors", TOKENS, beta2=0.99, step=400)
    assert all(torch.equal(fisher.read(name), imported.read(name)) for name in true)


def test_named_tensors_of_another_model_are_listed_with_both_shapes(tmp_path, trained):
    v = {f"{name}.exp_avg_sq": values for name, values in trained[1].items()}
    v["model.norm.weight.exp_avg_sq"] = torch.ones(33)
    v["model.extra.weight.exp_avg_sq"] = torch.ones(2)
    del v["model.layers.0.input_layernorm.weight.exp_avg_sq"]
    save_file(v, tmp_path / "v.safetensors", metadata={"step": "9", "beta2": "0.9"})
    with pytest.raises(FisherMismatchError) as caught:
        import_adam_state(trained[0], tmp_path / "v.safetensors", TOKENS)
    for line in (
        "model.norm.weight   state (33,)   model (32,)",
        "model.extra.weight   state (2,)   model absent",
        "model.layers.0.input_layernorm.weight   state absent   model (32,)",
    ):
        assert line in str(caught.value)


def test_safetensors_without_second_moments_are_refused(trained):
    with pytest.raises(DataError, match="no key of the form"):
        import_adam_state(trained[0], trained[0] / "model.safetensors", TOKENS)


@pytest.mark.parametrize("tokens", [0, -1, 2.5, True, None])
def test_the_tokens_of_a_batch_must_be_said(trained, tokens):
    with pytest.raises(ConfigError, match="scored tokens of one optimizer step"):
        import_adam_state(trained[0], trained[0] / "optimizer.pt", tokens)


@pytest.mark.parametrize("given", [{"beta2": 0.999}, {"step": 7}])
def test_a_setting_that_the_file_contradicts_is_refused(trained, given):
    with pytest.raises(ConfigError, match="Leave it out"):
        import_adam_state(trained[0], trained[0] / "optimizer.pt", TOKENS, **given)


@pytest.mark.parametrize("settings", [{"beta2": 1.0, "step": 5}, {"beta2": 0.9, "step": 0}])
def test_settings_that_no_adam_has_are_refused(tmp_path, trained, settings):
    v = {f"{name}.exp_avg_sq": values for name, values in trained[1].items()}
    save_file(v, tmp_path / "v.safetensors")
    with pytest.raises(ConfigError, match="no Adam has"):
        import_adam_state(trained[0], tmp_path / "v.safetensors", TOKENS, **settings)


def test_parameters_that_were_trained_for_different_times_are_refused(refused, state):
    state["state"][0]["step"] = torch.tensor(399.0)
    assert "399, 400" in refused(state, DataError)


def test_numbers_that_overflow_are_refused(refused, state):
    for values in state["state"].values():
        values["exp_avg_sq"].fill_(3e38)
    assert "overflows float32" in refused(state, DataError)


def test_a_state_of_another_checkpoint_is_refused_or_warned_of(tmp_path, trained, caplog):
    folder, _ = trained
    (tmp_path / "optimizer.pt").write_bytes((folder / "optimizer.pt").read_bytes())
    with caplog.at_level(logging.WARNING):
        import_adam_state(folder, tmp_path / "optimizer.pt", TOKENS)
    assert "does not lie beside the weights" in caplog.text
    (tmp_path / "trainer_state.json").write_text('{"global_step": 500}')
    with caplog.at_level(logging.WARNING):
        import_adam_state(folder, tmp_path / "optimizer.pt", TOKENS)
    assert "has made 400 steps" in caplog.text
    (tmp_path / "trainer_state.json").write_text('{"global_step": 100}')
    with pytest.raises(FisherMismatchError, match=r"400 steps, and the .* beside it says 100"):
        import_adam_state(folder, tmp_path / "optimizer.pt", TOKENS)


def test_a_state_beside_its_weights_is_imported_in_silence(trained, caplog):
    with caplog.at_level(logging.WARNING):
        import_adam_state(trained[0], trained[0] / "optimizer.pt", TOKENS)
    assert not caplog.records

"""`EWCTrainer` is `SFTTrainer` plus the penalty and nothing else; what it saves is an ordinary checkpoint."""

import json

import pytest
import torch
import training
from safetensors import safe_open
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_ewc import EWCConfig, EWCTrainer, FisherMismatchError

METRICS = {"ewc/penalty", "ewc/kl_nats", "ewc/anchor_distance", "ewc/grad_ratio", "ewc/max_step"}


@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_8bit"])
def test_lambda_zero_is_bitwise_sft(base_folder, tmp_path, optim):
    plain = SFTTrainer(
        str(base_folder),
        SFTConfig(**training.settings(tmp_path / "a", optim=optim, weight_decay=0.0)),
        train_dataset=training.make_rows(),
    )
    plain.train()
    ours = training.ewc_trainer(base_folder, tmp_path / "b", ewc_lambda=0.0, optim=optim)
    ours.train()
    assert training.largest_difference(training.weights(plain.model), training.weights(ours.model)) == 0.0


@pytest.mark.parametrize("mode", ["loss", "proximal", "decoupled"])
def test_eval_loss_excludes_the_penalty(base_folder, fisher_folder, tmp_path, mode):
    """At equal weights, away from the anchor, λ changes nothing in evaluation, generation, or a forward without labels."""
    moved = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    with torch.no_grad():
        for param in moved.parameters():
            param.add_(0.05 * torch.randn(param.shape, generator=torch.Generator().manual_seed(4)))
    losses = []
    for ewc_lambda in (0.0, 1e3):
        model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
        model.load_state_dict(moved.state_dict())
        trainer = EWCTrainer(
            model,
            EWCConfig(
                **training.settings(
                    tmp_path / str(ewc_lambda),
                    ewc_lambda=ewc_lambda,
                    fisher=fisher_folder,
                    ewc_mode=mode,
                    max_steps=1,
                    learning_rate=0.0,
                )
            ),
            train_dataset=training.make_rows(),
            eval_dataset=training.make_rows(8),
        )
        trainer.train()  # binds the penalty; at lr = 0 every mode leaves the weights where they are
        losses.append(trainer.evaluate()["eval_loss"])
        trainer.model.generate(torch.tensor([[2, 10, 11]]), max_new_tokens=2)
        trainer.model(torch.tensor([[2, 10, 11]]))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("mode", ["loss", "proximal", "decoupled"])
def test_metrics_reach_every_reporter_on_logging_steps_only(base_folder, fisher_folder, tmp_path, mode):
    class Reporter(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append((state.global_step, {key for key in logs if key.startswith("ewc/")}))

    reporter = Reporter()
    reporter.seen = []
    trainer = EWCTrainer(
        str(base_folder),
        EWCConfig(**training.settings(tmp_path, ewc_lambda=0.1, fisher=fisher_folder, ewc_mode=mode, logging_steps=2)),
        train_dataset=training.make_rows(),
        callbacks=[reporter],
    )
    trainer.train()
    assert [step for step, keys in reporter.seen if keys == METRICS] == [2, 4, 6]
    logged = [entry for entry in trainer.state.log_history if "ewc/penalty" in entry]
    assert all(entry["ewc/penalty"] > 0 for entry in logged)  # a penalty that silently does nothing would be 0
    assert logged[0]["ewc/penalty"] == pytest.approx(0.1 * logged[0]["ewc/kl_nats"])


def test_kl_nats_is_half_the_fisher_weighted_distance_per_scored_token(base_folder, fisher_folder, tmp_path):
    trainer = training.ewc_trainer(base_folder, tmp_path, fisher=fisher_folder, ewc_lambda=0.1)
    trainer.train()
    anchor = training.weights(AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32))
    sums = trainer.ewc.controller.fisher
    by_hand = sum(
        float((sums.read(name) / training.TOKENS * (param - anchor[name]) ** 2).double().sum()) / 2
        for name, param in training.weights(trainer.model).items()
    )
    assert trainer.ewc.controller.measure()["ewc/kl_nats"] == pytest.approx(by_hand, rel=1e-4)


def _first_log_away_from_the_anchor(base, fisher_folder, out, mode, ewc_lambda):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.05 * torch.randn(param.shape, generator=torch.Generator().manual_seed(4)))
    trainer = training.ewc_trainer(
        base,
        out,
        model=model,
        anchor=str(base),
        fisher=fisher_folder,
        ewc_lambda=ewc_lambda,
        ewc_mode=mode,
        max_grad_norm=0.1,
        max_steps=1,
    )
    trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize("moved", [0.0, 1e-3])
def test_a_start_away_from_the_anchor_is_said(base_folder, fisher_folder, tmp_path, caplog, moved):
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.add_(moved)
    training.ewc_trainer(base_folder, tmp_path, model=model, fisher=fisher_folder, max_steps=1).train()
    assert ("away from the anchor" in caplog.text) == (moved > 0)


def test_clipping_never_sees_the_penalty_in_the_default_mode(base_folder, fisher_folder, tmp_path):
    def norm(mode, ewc_lambda):
        log = _first_log_away_from_the_anchor(base_folder, fisher_folder, tmp_path / f"{mode}{ewc_lambda}", mode, ewc_lambda)
        return log["grad_norm"]

    assert norm("proximal", 1e-6) == norm("proximal", 1e3)
    assert norm("loss", 1e3) > 10 * norm("loss", 1e-6)  # documented of `loss`: task and penalty are clipped as one


def test_grad_ratio_compares_with_the_gradient_of_the_task_alone(base_folder, fisher_folder, tmp_path):
    """Measured after the penalty had joined the gradient, the ratio of a strong penalty could never exceed 1."""
    modes = ("loss", "proximal")
    logs = [_first_log_away_from_the_anchor(base_folder, fisher_folder, tmp_path / mode, mode, 1e3) for mode in modes]
    assert logs[0]["ewc/grad_ratio"] == pytest.approx(logs[1]["ewc/grad_ratio"], rel=1e-4)
    assert logs[0]["ewc/grad_ratio"] > 10


def test_the_penalty_acts_once_per_optimizer_step(base_folder, fisher_folder, tmp_path):
    trainer = training.ewc_trainer(
        base_folder, tmp_path, fisher=fisher_folder, gradient_accumulation_steps=3, max_grad_norm=0.0
    )
    calls = []
    act = trainer.ewc.controller.after_optimizer_step
    trainer.ewc.controller.after_optimizer_step = lambda: (calls.append(trainer.state.global_step), act())
    trainer.train()
    assert calls == list(range(trainer.state.global_step))


def test_training_twice_does_not_move_the_anchor(base_folder, fisher_folder, tmp_path):
    trainer = training.ewc_trainer(base_folder, tmp_path, fisher=fisher_folder)
    trainer.train()
    first = [entry.anchor.clone() for entry in trainer.ewc.controller.protected]
    trainer.train()
    assert all(torch.equal(a, entry.anchor) for a, entry in zip(first, trainer.ewc.controller.protected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_penalty_is_exactly_zero_before_the_first_step(base_folder, fisher_folder, tmp_path, dtype, caplog):
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype)
    trainer = training.ewc_trainer(base_folder, tmp_path, model=model, fisher=fisher_folder, ewc_lambda=1e6)
    trainer.create_optimizer()
    trainer.ewc.controller.bind(trainer.model, trainer.optimizer)
    assert trainer.ewc.controller.measure()["ewc/penalty"] == 0.0
    assert ("rounded away" in caplog.text) == (dtype != torch.float32)  # 16-bit weights lose small updates: said, once


def test_saved_checkpoint_is_an_ordinary_model(base_folder, fisher_folder, tmp_path):
    trainer = training.ewc_trainer(
        base_folder, tmp_path, fisher=fisher_folder, ewc_lambda=0.5, ewc_mode="decoupled", save_strategy="steps", save_steps=3
    )
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-3"):
        with safe_open(folder / "model.safetensors", "pt") as ours, safe_open(base_folder / "model.safetensors", "pt") as base:
            assert set(ours.keys()) == set(base.keys())
        state = json.loads((folder / "ewc_state.json").read_text())
        assert state["ewc_lambda"] == 0.5
        assert state["ewc_mode"] == "decoupled"
        assert state["fisher"]["sha256"] == trainer.ewc.controller.fisher.sha256
        assert state["anchor"]["fingerprint"] == trainer.ewc.controller.base.fingerprint
    trainer.save_model(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "ewc_state.json").read_text() == (tmp_path / "ewc_state.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert training.largest_difference(training.weights(loaded), training.weights(trainer.model)) == 0.0


def test_weight_decay_is_off_unless_asked_for(tmp_path):
    assert EWCConfig(**{**training.settings(tmp_path), "ewc_lambda": 0.0}).weight_decay == 0.0


# -- coverage ------------------------------------------------------------------------------------------------------------------


def test_a_parameter_without_fisher_is_an_error_unless_asked_for(base_folder, tmp_path, caplog):
    name = "model.layers.1.mlp.up_proj.weight"
    partial = str(training.make_fisher(base_folder, drop=name).save_pretrained(tmp_path / "f"))
    trainer = training.ewc_trainer(base_folder, tmp_path / "a", fisher=partial)
    before = training.weights(trainer.model)
    with pytest.raises(FisherMismatchError, match="up_proj"):
        trainer.train()
    assert training.largest_difference(before, training.weights(trainer.model)) == 0.0
    trainer = training.ewc_trainer(base_folder, tmp_path / "b", fisher=partial, ewc_missing="ignore", ewc_lambda=1e12)
    trainer.train()
    after = training.weights(trainer.model)
    assert trainer.ewc.controller.unprotected == [name]
    assert any("unpenalised" in record.message and name in record.message for record in caplog.records)
    assert float((after[name] - before[name]).abs().max()) > 1e-3
    assert max(float((after[n] - before[n]).abs().max()) for n in after if n != name) < 1e-4


def test_a_frozen_parameter_needs_no_fisher(base_folder, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    partial = str(training.make_fisher(base_folder, drop=name).save_pretrained(tmp_path / "f"))
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    model.get_parameter(name).requires_grad_(False)
    trainer = training.ewc_trainer(base_folder, tmp_path, model=model, fisher=partial, max_steps=1)
    trainer.train()
    assert trainer.ewc.controller.unprotected == []


def test_a_frozen_layer_stays_out_of_the_penalty(base_folder, fisher_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    model.model.layers[0].requires_grad_(False)
    trainer = training.ewc_trainer(base_folder, tmp_path, model=model, fisher=fisher_folder)
    trainer.train()
    names = {entry.name for entry in trainer.ewc.controller.protected}
    assert names == {name for name, param in model.named_parameters() if param.requires_grad}


def test_a_compiled_model_is_covered_under_the_names_of_its_base(base_folder, fisher_folder, tmp_path):
    trainer = training.ewc_trainer(base_folder, tmp_path, fisher=fisher_folder)
    optimizer = trainer.create_optimizer()
    wrapped = torch.compile(trainer.model)  # compiles at the first forward, renames its parameters at once
    assert all(name.startswith("_orig_mod.") for name, _ in wrapped.named_parameters())
    trainer.ewc.controller.bind(wrapped, optimizer)
    assert {entry.name for entry in trainer.ewc.controller.protected} == {name for name, _ in trainer.model.named_parameters()}
    assert trainer.ewc.controller.unprotected == []


def test_a_weight_that_a_step_does_not_touch_is_pulled_back_all_the_same(base_folder, fisher_folder, tmp_path):
    """No gradient of the task (an expert that no token chose) is a gradient of 0, to which the penalty's is added."""
    trainer = training.ewc_trainer(base_folder, tmp_path, fisher=fisher_folder, ewc_lambda=2.0, ewc_mode="loss")
    controller = trainer.ewc.controller
    controller.bind(trainer.model, trainer.create_optimizer())
    with torch.no_grad():
        for param in trainer.model.parameters():
            param.add_(0.05)
    controller.add_to_gradients()
    for entry in controller.protected:
        drift = entry.param.detach() - entry.anchor.view_as(entry.param)
        expected = 2.0 * controller.fisher.per_token(entry.name) * drift
        torch.testing.assert_close(entry.param.grad, expected, rtol=1e-5, atol=1e-7)


def test_a_formatting_function_takes_rows_of_any_columns(base_folder, fisher_folder, tmp_path):
    trainer = EWCTrainer(
        str(base_folder),
        EWCConfig(**training.settings(tmp_path, fisher=fisher_folder, max_steps=1)),
        train_dataset=training.make_rows().rename_column("text", "body"),
        formatting_func=lambda row: row["body"],
    )
    trainer.train()
    assert trainer.state.global_step == 1

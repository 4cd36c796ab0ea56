"""
`ewc_mode: loss` is the paper's penalty in the loss: the weights follow an autograd oracle, whatever the accumulation or
clipping.
"""

import pytest
import torch
import training
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_ewc.penalty import reference

LAMBDA = 3e-3


class OracleTrainer(SFTTrainer):
    """Adds the penalty to the last micro-batch's loss, once per optimizer step, and lets autograd differentiate it."""

    def arm(self, base, fisher):
        anchor = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.theta_star = {name: param.detach() for name, param in anchor.named_parameters()}
        self.fisher = fisher
        return self

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not (model.training and self.accelerator.sync_gradients):
            return loss
        return loss + sum(
            reference.penalty(param, self.theta_star[name], self.fisher.per_token(name), LAMBDA)
            for name, param in model.named_parameters()
        )


def _oracle(base, fisher, out, **overrides):
    trainer = OracleTrainer(
        str(base), SFTConfig(**training.settings(out, weight_decay=0.0, **overrides)), train_dataset=training.make_rows()
    ).arm(base, fisher)
    trainer.train()
    return training.weights(trainer.model)


def _ours(base, fisher_folder, out, **overrides):
    trainer = training.ewc_trainer(base, out, fisher=fisher_folder, ewc_lambda=LAMBDA, ewc_mode="loss", **overrides)
    trainer.train()
    return training.weights(trainer.model)


# learning rates at which SGD and Adam move the weights far enough for the penalty to matter, and stay stable
OPTIMIZERS = {"sgd": 3e-2, "adamw_torch": 1e-3, "adamw_8bit": 1e-3, "paged_adamw_8bit": 1e-3}


@pytest.mark.parametrize("clip", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_loss_mode_follows_the_autograd_oracle(base_folder, fisher, fisher_folder, tmp_path, optim, clip):
    overrides = dict(optim=optim, learning_rate=OPTIMIZERS[optim], max_grad_norm=clip)
    expected = _oracle(base_folder, fisher, tmp_path / "a", **overrides)
    found = _ours(base_folder, fisher_folder, tmp_path / "b", **overrides)
    assert training.largest_difference(found, expected) < 1e-6
    start = training.weights(AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32))
    assert training.largest_difference(found, start) > 1e-4  # the weights did move


def test_the_penalty_of_the_oracle_matters(base_folder, fisher, fisher_folder, tmp_path):
    with_penalty = _ours(base_folder, fisher_folder, tmp_path / "a", learning_rate=1e-3)
    plain = training.ewc_trainer(base_folder, tmp_path / "b", ewc_lambda=0.0, learning_rate=1e-3)
    plain.train()
    assert training.largest_difference(with_penalty, training.weights(plain.model)) > 1e-4


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize(("batch", "accumulation"), [(1, 8), (2, 4), (8, 1)])
def test_every_split_of_a_batch_into_accumulation_steps_is_one_trajectory(
    base_folder, fisher, fisher_folder, tmp_path, batch, accumulation, optim
):
    overrides = dict(optim=optim, learning_rate=OPTIMIZERS[optim], max_steps=4)
    expected = _oracle(base_folder, fisher, tmp_path / "a", per_device_train_batch_size=8, **overrides)
    found = _ours(
        base_folder,
        fisher_folder,
        tmp_path / "b",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **overrides,
    )
    assert training.largest_difference(found, expected) < 1e-6


@pytest.mark.parametrize("accumulation", [3, 4])
def test_a_ragged_last_window_takes_the_penalty_once(base_folder, fisher, fisher_folder, tmp_path, accumulation):
    rows = training.make_rows(22)  # 11 batches of 2: windows of 3 (or 4) end in one of 2 (or 3)
    overrides = dict(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_steps=-1,
        num_train_epochs=2,
        optim="sgd",
        learning_rate=OPTIMIZERS["sgd"],
    )
    oracle = OracleTrainer(
        str(base_folder), SFTConfig(**training.settings(tmp_path / "a", **overrides)), train_dataset=rows
    ).arm(base_folder, fisher)
    oracle.train()
    ours = training.ewc_trainer(
        base_folder, tmp_path / "b", rows=rows, fisher=fisher_folder, ewc_lambda=LAMBDA, ewc_mode="loss", **overrides
    )
    ours.train()
    assert oracle.state.global_step == ours.state.global_step >= 6
    assert training.largest_difference(training.weights(ours.model), training.weights(oracle.model)) < 1e-6


def test_gradient_checkpointing_does_not_change_the_penalty(base_folder, fisher_folder, tmp_path):
    plain = _ours(base_folder, fisher_folder, tmp_path / "a", learning_rate=1e-3)
    checkpointed = _ours(base_folder, fisher_folder, tmp_path / "b", learning_rate=1e-3, activation_checkpointing=True)
    assert training.largest_difference(plain, checkpointed) < 1e-6

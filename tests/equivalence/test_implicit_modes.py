"""
`proximal` and `decoupled` are the reference's implicit step after the optimizer's; `proximal` shares `loss`'s fixed point.
"""

import pytest
import torch
import training
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_ewc.penalty import kernels, metric, reference

LAMBDA = 0.5


class ReferenceStep(TrainerCallback):
    """The implicit step written out tensor by tensor with `reference.py`, after each optimizer step of a plain SFTTrainer."""

    def __init__(self, base, fisher, mode):
        anchor = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.theta_star = {name: param.detach() for name, param in anchor.named_parameters()}
        self.fisher, self.mode = fisher, mode

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        inner = optimizer.optimizer
        groups = {id(param): group for group in inner.param_groups for param in group["params"]}
        for name, param in model.named_parameters():
            group = groups[id(param)]
            denominator = 1.0
            if self.mode == "proximal":
                entry = inner.state[param]
                correction = 1 - group["betas"][1] ** float(entry["step"])
                denominator = (entry["exp_avg_sq"] / correction).sqrt() + group["eps"]
            per_token = self.fisher.per_token(name)
            param.copy_(reference.implicit_step(param, self.theta_star[name], per_token, LAMBDA, group["lr"], denominator))


@pytest.mark.parametrize(("mode", "optim"), [("proximal", "adamw_torch"), ("decoupled", "adamw_torch"), ("decoupled", "sgd")])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_implicit_modes_follow_the_reference(base_folder, fisher, fisher_folder, tmp_path, mode, optim, accumulation):
    overrides = dict(optim=optim, gradient_accumulation_steps=accumulation, per_device_train_batch_size=2)
    plain = SFTTrainer(
        str(base_folder),
        SFTConfig(**training.settings(tmp_path / "a", weight_decay=0.0, **overrides)),
        train_dataset=training.make_rows(),
        callbacks=[ReferenceStep(base_folder, fisher, mode)],
    )
    plain.train()
    ours = training.ewc_trainer(
        base_folder, tmp_path / "b", fisher=fisher_folder, ewc_lambda=LAMBDA, ewc_mode=mode, **overrides
    )
    ours.train()
    assert training.largest_difference(training.weights(ours.model), training.weights(plain.model)) < 1e-6


@pytest.mark.parametrize("mode", ["proximal", "decoupled"])
@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_8bit"])
def test_a_huge_lambda_holds_the_weights_at_the_anchor(base_folder, fisher_folder, tmp_path, mode, optim):
    distances = []
    for ewc_lambda in (1.0, 1e4, 1e12):
        trainer = training.ewc_trainer(
            base_folder,
            tmp_path / f"{ewc_lambda}",
            fisher=fisher_folder,
            ewc_lambda=ewc_lambda,
            ewc_mode=mode,
            optim=optim,
        )
        trainer.train()
        distances.append(trainer.state.log_history[-2]["ewc/anchor_distance"])
    assert distances[0] > 10 * distances[1] > 100 * distances[2]  # drift keeps falling with λ: no chatter
    assert distances[2] < 1e-4


def test_proximal_has_the_fixed_point_of_loss_mode():
    """½ a (θ − c)² + λ/2 F (θ − θ*)² is least at (a c + λ F θ*) / (a + λ F); Adam + proximal steps settle there."""
    generator = torch.Generator().manual_seed(0)
    curvature, centre, theta_star = (torch.rand(64, generator=generator) + 0.5 for _ in range(3))
    fisher = torch.exp(2 * torch.randn(64, generator=generator))
    expected = (curvature * centre + fisher * theta_star) / (curvature + fisher)
    theta = torch.nn.Parameter(theta_star.clone())
    optimizer = torch.optim.Adam([theta], lr=1e-2)
    scratch = kernels.Scratch()
    steps = 4000
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        theta.grad = (curvature * (theta - centre)).detach()
        optimizer.step()
        denominator = metric.denominator(optimizer, optimizer.param_groups[0], theta)
        kernels.implicit_step_(theta.data, theta_star, fisher, optimizer.param_groups[0]["lr"], denominator, scratch)
    torch.testing.assert_close(theta.detach(), expected, rtol=0, atol=1e-3)


def test_explicit_steps_diverge_where_implicit_ones_are_stable():
    """lr · λ · F = 2.1: the explicit step overshoots by more than it started from; the implicit one shrinks at every λ."""
    anchor, fisher = torch.zeros(1), torch.ones(1)
    explicit, implicit = torch.ones(1), torch.ones(1)
    scratch = kernels.Scratch()
    for _ in range(50):
        grad = torch.zeros(1)
        kernels.add_penalty_gradient_(grad, explicit, anchor, fisher, 2.1, scratch)
        explicit -= 1.0 * grad
        kernels.implicit_step_(implicit, anchor, fisher, 2.1, None, scratch)
    assert abs(float(explicit)) > 50
    assert abs(float(implicit)) < 1e-12


def test_loss_mode_warns_of_steps_that_overshoot_and_proximal_does_not(base_folder, fisher_folder, tmp_path, caplog):
    for mode, expected in (("loss", 1), ("proximal", 0)):
        caplog.clear()
        training.ewc_trainer(
            base_folder, tmp_path / mode, fisher=fisher_folder, ewc_lambda=1e3, ewc_mode=mode, optim="adamw_torch"
        ).train()
        assert sum("overshoot" in record.message for record in caplog.records) == expected

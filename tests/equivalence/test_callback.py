"""`EWCCallback` brings to any Trainer exactly what `EWCTrainer` does."""

import json

import pytest
import tiny
import torch
import training
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_ewc import ConfigError, EWCCallback, FisherMismatchError

MODES = ["loss", "proximal", "decoupled"]
LAMBDA = 1e-2


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_callback_on_sft_trainer_equals_ewc_trainer(base_folder, fisher_folder, tmp_path, mode, checkpointing, accumulation):
    overrides = dict(
        learning_rate=1e-3,
        max_grad_norm=0.05,
        activation_checkpointing=checkpointing,
        gradient_accumulation_steps=accumulation,
        weight_decay=0.0,
    )
    ours = training.ewc_trainer(
        base_folder, tmp_path / "a", fisher=fisher_folder, ewc_lambda=LAMBDA, ewc_mode=mode, **overrides
    )
    ours.train()
    plain = SFTTrainer(
        str(base_folder),
        SFTConfig(**training.settings(tmp_path / "b", **overrides)),
        train_dataset=training.make_rows(),
        callbacks=[EWCCallback(fisher_folder, LAMBDA, mode)],
    )
    plain.train()
    assert training.largest_difference(training.weights(plain.model), training.weights(ours.model)) < 1e-7
    logs = ([e for e in t.state.log_history if "ewc/penalty" in e] for t in (ours, plain))
    for a, b in zip(*logs, strict=True):
        for key in ("ewc/penalty", "ewc/kl_nats", "ewc/anchor_distance"):
            assert a[key] == pytest.approx(b[key], rel=1e-3)
        if mode == "loss":  # the hook, too, sees the whole gradient of the task, before the penalty and the clipping
            assert a["ewc/grad_ratio"] == pytest.approx(b["ewc/grad_ratio"], rel=1e-3)


class HalvesTrainer(SFTTrainer):
    """Runs two backward passes per training step, as trainers with two losses (or re-entrant checkpointing) do."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        halves = ({key: value[part] for key, value in inputs.items()} for part in (slice(0, 2), slice(2, 4)))
        return sum(super(HalvesTrainer, self).training_step(model, half, num_items_in_batch) for half in halves)


def test_the_hook_acts_once_even_if_a_step_runs_backward_twice(base_folder, fisher_folder, tmp_path):
    overrides = dict(optim="sgd", learning_rate=3e-2, weight_decay=0.0)
    models = []
    for cls in (SFTTrainer, HalvesTrainer):
        trainer = cls(
            str(base_folder),
            SFTConfig(**training.settings(tmp_path / cls.__name__, **overrides)),
            train_dataset=training.make_rows(),
            callbacks=[EWCCallback(fisher_folder, LAMBDA, "loss")],
        )
        trainer.train()
        models.append(training.weights(trainer.model))
    assert training.largest_difference(*models) < 1e-6


def test_the_callback_pulls_back_a_weight_that_a_step_does_not_touch(base_folder, fisher_folder, tmp_path):
    class FrozenTaskTrainer(SFTTrainer):
        """The task reaches the last norm only: all other hooks stay silent."""

        def compute_loss(self, model, *args, **kwargs):
            return model.model.norm.weight.sum()

    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.05)
    before = training.weights(model)
    trainer = FrozenTaskTrainer(
        model,
        SFTConfig(**training.settings(tmp_path, optim="sgd", max_steps=1, learning_rate=1e-3, weight_decay=0.0)),
        train_dataset=training.make_rows(),
        callbacks=[EWCCallback(fisher_folder, LAMBDA, "loss")],
    )
    trainer.train()
    after = training.weights(model)
    assert all(float((after[name] - before[name]).abs().max()) > 0 for name in after)


@pytest.mark.parametrize(("mode", "strength"), [("loss", 1.0), ("proximal", 1.0), ("decoupled", 100.0)])
def test_callback_on_a_plain_trainer_holds_the_weights(base_folder, fisher_folder, tmp_path, mode, strength):
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    rows = training.make_rows().map(lambda row: tokenizer(row["text"], truncation=True, max_length=32), remove_columns="text")
    distances = []
    for ewc_lambda in (1e-6, strength):
        names = {"max_length"}
        arguments = {
            k: v
            for k, v in training.settings(tmp_path / str(ewc_lambda), learning_rate=1e-3, save_strategy="epoch").items()
            if k not in names
        }
        trainer = Trainer(
            AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32),
            TrainingArguments(**arguments),
            train_dataset=rows,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            processing_class=tokenizer,
        )
        callback = EWCCallback(fisher_folder, ewc_lambda, mode).attach(trainer)
        trainer.train()
        distances.append(callback.controller.measure()["ewc/anchor_distance"])
    assert distances[1] < 0.8 * distances[0]
    for folder in (tmp_path / str(strength), tmp_path / str(strength) / "checkpoint-6"):
        state = json.loads((folder / "ewc_state.json").read_text())
        assert (state["ewc_lambda"], state["ewc_mode"]) == (strength, mode)


@pytest.mark.parametrize("mode", MODES)
def test_callback_on_a_dpo_trainer(base_folder, fisher_folder, tmp_path, mode):
    rows = Dataset.from_list(
        [{"prompt": f"Say {i}: ", "chosen": f"yes {i}, gladly", "rejected": f"no {i}, never"} for i in range(16)]
    )
    names = {"optim", "max_length"}
    arguments = {k: v for k, v in training.settings(tmp_path, learning_rate=1e-3, max_steps=3).items() if k not in names}
    trainer = DPOTrainer(
        str(base_folder),
        args=DPOConfig(**arguments, optim="adamw_torch", max_length=48),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(base_folder),
        callbacks=[EWCCallback(fisher_folder, LAMBDA, mode)],
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "ewc/penalty" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3]
    assert logged[-1]["ewc/penalty"] > 0


def test_callback_with_lambda_zero_does_nothing(base_folder, fisher_folder, tmp_path):
    models = []
    callback = EWCCallback(fisher_folder, 0.0)
    for callbacks in ([], [callback]):
        trainer = SFTTrainer(
            str(base_folder),
            SFTConfig(**training.settings(tmp_path / str(len(callbacks)))),
            train_dataset=training.make_rows(),
            callbacks=callbacks,
        )
        trainer.train()
        models.append(training.weights(trainer.model))
    assert training.largest_difference(*models) == 0.0
    assert callback.controller.protected == []  # no memory is spent on an anchor either


def test_callback_refuses_what_it_cannot_do_right(base_folder, fisher_folder, tmp_path):
    with pytest.raises(ConfigError, match="negative"):
        EWCCallback(fisher_folder, -1.0)
    with pytest.raises(ConfigError, match="ewc_mode"):
        EWCCallback(fisher_folder, 1.0, "prox")
    trainer = SFTTrainer(
        str(base_folder),
        SFTConfig(**training.settings(tmp_path, optim="sgd")),
        train_dataset=training.make_rows(),
        callbacks=[EWCCallback(fisher_folder, 1.0)],
    )
    with pytest.raises(ConfigError, match="second moment"):
        trainer.train()


@pytest.mark.parametrize("where", ["args", "model"])
def test_callback_refuses_before_the_first_step_what_the_trainer_would_allow(base_folder, fisher_folder, tmp_path, where):
    trainer = SFTTrainer(
        str(base_folder),
        SFTConfig(**training.settings(tmp_path)),
        train_dataset=training.make_rows(),
        callbacks=[EWCCallback(fisher_folder, 1.0)],
    )
    # set afterwards: on a machine without a GPU, the libraries themselves refuse to build either
    setattr(*((trainer.args, "fp16", True) if where == "args" else (trainer.model, "is_loaded_in_8bit", True)))
    with pytest.raises(ConfigError, match="fp16" if where == "args" else "quantised"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_callback_refuses_another_tokenizer_than_the_fishers(base_folder, fisher_folder, tmp_path):
    trainer = SFTTrainer(
        str(base_folder),
        SFTConfig(**training.settings(tmp_path)),
        train_dataset=training.make_rows(),
        processing_class=tiny.make_tokenizer(vocab_size=300),
        callbacks=[EWCCallback(fisher_folder, 1.0)],
    )
    with pytest.raises(FisherMismatchError, match="tokenizer"):
        trainer.train()


def test_callback_refuses_a_base_that_has_changed(fisher_folder, tokenizer, tmp_path):
    base = tiny.save_base(tmp_path / "base", tokenizer)
    own = str(training.make_fisher(base).save_pretrained(tmp_path / "f"))
    tiny.save_base(base, tokenizer, seed=5)
    with pytest.raises(FisherMismatchError, match="recorded"):
        EWCCallback(own, 1.0)

"""What `EWCTrainer` cannot do right it refuses, before anything is trained, and says what to do instead."""

import pytest
import tiny
import training
from transformers import AutoModelForCausalLM

from hf_ewc import ConfigError, DataError, EWCConfig, EWCTrainer, FisherMismatchError


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(ewc_lambda=-1.0), "negative"),
        (dict(ewc_lambda=float("nan")), "finite"),
        (dict(ewc_lambda=float("inf")), "finite"),
        (dict(ewc_lambda=1.0, fisher=None), "hf-ewc fisher"),
        (dict(optim="lomo"), "backward"),
        (dict(optim="adalomo"), "backward"),
        (dict(optim="galore_adamw_layerwise"), "backward"),
        (dict(max_length=4096), "context"),
    ],
)
def test_settings_under_which_the_penalty_would_be_wrong_are_refused(base_folder, fisher_folder, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        training.ewc_trainer(base_folder, tmp_path, **{"fisher": fisher_folder, **overrides})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("fp16", True, "bf16"), ("deepspeed", "zero2.json", "no-op"), ("fsdp", "full_shard", "shards")],
)
def test_engines_that_step_behind_the_penalty_are_refused(base_folder, fisher_folder, tmp_path, name, value, message):
    config = EWCConfig(**training.settings(tmp_path, fisher=fisher_folder))
    setattr(config, name, value)  # TrainingArguments itself refuses it on a machine without a GPU or the package
    with pytest.raises(ConfigError, match=message):
        EWCTrainer(str(base_folder), config, train_dataset=training.make_rows())


def test_proximal_needs_adam(base_folder, fisher_folder, tmp_path):
    with pytest.raises(ConfigError, match="decoupled"):
        training.ewc_trainer(base_folder, tmp_path, fisher=fisher_folder, optim="sgd").train()


def test_adapters_and_quantised_models_are_refused(base_folder, fisher_folder, tmp_path):
    arguments = dict(args=EWCConfig(**training.settings(tmp_path, fisher=fisher_folder)), train_dataset=training.make_rows())
    with pytest.raises(ConfigError, match="peft_config"):
        EWCTrainer(str(base_folder), peft_config=object(), **arguments)
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    model.is_loaded_in_8bit = True
    with pytest.raises(ConfigError, match="quantised"):
        EWCTrainer(model, **arguments)


def test_data_without_text_is_refused(base_folder, fisher_folder, tmp_path):
    with pytest.raises(DataError, match="body"):
        training.ewc_trainer(
            base_folder, tmp_path, fisher=fisher_folder, rows=training.make_rows().rename_column("text", "body")
        )
    with pytest.raises(DataError, match="empty"):
        training.ewc_trainer(base_folder, tmp_path, fisher=fisher_folder, rows=training.make_rows().select([]))


def test_a_fisher_of_other_weights_is_refused(base_folder, tokenizer, tmp_path):
    other = tiny.save_base(tmp_path / "other", tokenizer, seed=9)
    foreign = str(training.make_fisher(other).save_pretrained(tmp_path / "f"))
    with pytest.raises(FisherMismatchError):
        training.ewc_trainer(base_folder, tmp_path / "out", fisher=foreign)


def test_another_tokenizer_than_the_fishers_is_refused(base_folder, fisher_folder, tmp_path):
    with pytest.raises(FisherMismatchError, match="tokenizer"):
        EWCTrainer(
            str(base_folder),
            EWCConfig(**training.settings(tmp_path, fisher=fisher_folder)),
            train_dataset=training.make_rows(),
            processing_class=tiny.make_tokenizer(vocab_size=300),
        )


def test_a_model_that_was_never_saved_has_no_anchor(fisher_folder, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="save_pretrained"):
        EWCTrainer(
            tiny.make_model(),
            EWCConfig(**training.settings(tmp_path, fisher=fisher_folder)),
            train_dataset=training.make_rows(),
            processing_class=tokenizer,
        )


def test_an_optimizer_of_another_model_is_refused(base_folder, fisher_folder, tmp_path):
    """Its steps would move other weights than those that the penalty pulls back."""
    trainer, other = (training.ewc_trainer(base_folder, tmp_path / name, fisher=fisher_folder) for name in "ab")
    with pytest.raises(ConfigError, match="another model object"):
        trainer.ewc.controller.bind(trainer.model, other.create_optimizer())

"""Training with a list of Fishers is training with all of their penalties side by side, on the command line, too."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import training
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_ewc import BaseModel, ConfigError, EWCCallback, EWCConfig, EWCTrainer, FisherInformation, FisherMismatchError
from hf_ewc.cli.main import main
from hf_ewc.cli.train import TrainScript, parse_training
from hf_ewc.penalty import EWCController, reference

LAMBDA = 3e-3
STEPS = ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "2", "--per_device_train_batch_size", "2"]
STEPS += ["--max_length", "64", "--learning_rate", "1e-3", "--use_cpu", "--seed", "1", "--optim", "adamw_torch"]


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory) -> Path:
    """Stands for what became of the base when it learned a first task; training goes on from here."""
    return tiny.save_base(tmp_path_factory.mktemp("trained") / "model", tokenizer, seed=1)


@pytest.fixture(scope="module")
def fishers(base_folder, trained, tmp_path_factory) -> list[str]:
    """Folders of two Fishers: one of the base, and one of the model that was trained from it."""
    folder = tmp_path_factory.mktemp("fishers")
    both = [training.make_fisher(base, seed=n) for n, base in enumerate((base_folder, trained))]
    return [str(fisher.save_pretrained(folder / f"f{n}", codec="float32")) for n, fisher in enumerate(both)]


class SideBySideTrainer(SFTTrainer):
    """Adds one penalty per Fisher to the loss, each with its own anchor, and lets autograd differentiate them."""

    def arm(self, fishers, bases, coefficients):
        self.penalties = []
        for folder, base, coefficient in zip(fishers, bases, coefficients, strict=True):
            theta_star = training.weights(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
            self.penalties.append((FisherInformation.from_pretrained(folder), theta_star, coefficient * LAMBDA))
        return self

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not (model.training and self.accelerator.sync_gradients):
            return loss
        return loss + sum(
            reference.penalty(param, theta_star[name], fisher.per_token(name), strength)
            for fisher, theta_star, strength in self.penalties
            for name, param in model.named_parameters()
        )


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_loss_mode_with_a_list_follows_both_penalties_kept_side_by_side(base_folder, trained, fishers, tmp_path, optim, decay):
    overrides = dict(optim=optim, learning_rate=1e-2 if optim == "sgd" else 1e-3)
    oracle = SideBySideTrainer(
        str(trained),
        SFTConfig(**training.settings(tmp_path / "a", weight_decay=0.0, **overrides)),
        train_dataset=training.make_rows(),
    ).arm(fishers, [base_folder, trained], [decay, 1.0])
    oracle.train()
    shared = dict(ewc_lambda=LAMBDA, ewc_mode="loss", **overrides)
    ours = training.ewc_trainer(trained, tmp_path / "b", fisher=fishers, fisher_decay=decay, **shared)
    ours.train()
    found = training.weights(ours.model)
    assert training.largest_difference(found, training.weights(oracle.model)) < 1e-6
    newest = training.ewc_trainer(trained, tmp_path / "c", fisher=fishers[1], **shared)
    newest.train()
    assert training.largest_difference(found, training.weights(newest.model)) > 1e-4  # the older Fisher does matter


@pytest.mark.parametrize("mode", ["loss", "proximal", "decoupled"])
def test_a_list_a_stored_fold_and_a_callback_take_one_trajectory(trained, fishers, tmp_path, mode):
    stored = FisherInformation.fold([FisherInformation.from_pretrained(each) for each in fishers], 0.5)
    stored = str(stored.save_pretrained(tmp_path / "fold", codec="float32"))
    overrides = dict(ewc_lambda=0.1, ewc_mode=mode, learning_rate=1e-3)
    models = []
    for number, given in enumerate((dict(fisher=fishers, fisher_decay=0.5), dict(fisher=stored))):
        trainer = training.ewc_trainer(trained, tmp_path / str(number), **given, **overrides)
        trainer.train()
        models.append(training.weights(trainer.model))
    assert training.largest_difference(*models) == 0.0
    plain = SFTTrainer(
        str(trained),
        SFTConfig(**training.settings(tmp_path / "plain", learning_rate=1e-3, weight_decay=0.0)),
        train_dataset=training.make_rows(),
        callbacks=[EWCCallback(fishers, 0.1, mode, fisher_decay=0.5)],
    )
    plain.train()
    assert training.largest_difference(training.weights(plain.model), models[0]) < 1e-7


def test_the_start_away_from_a_folded_anchor_is_expected_and_said(trained, fishers, tmp_path, caplog):
    trainer = training.ewc_trainer(trained, tmp_path, fisher=fishers, max_steps=1)
    with caplog.at_level(logging.INFO, logger="hf_ewc.callback"):
        trainer.train()
    (record,) = [record for record in caplog.records if record.name == "hf_ewc.callback"]
    assert record.levelno == logging.INFO
    assert "between the bases of 2 folded Fishers" in record.getMessage()
    assert trainer.state.log_history[0]["ewc/penalty"] > 0


def test_fishers_of_one_base_start_at_it_without_a_word(base_folder, tmp_path, caplog):
    both = [str(training.make_fisher(base_folder, seed=n).save_pretrained(tmp_path / f"f{n}")) for n in (1, 2)]
    trainer = training.ewc_trainer(base_folder, tmp_path / "out", fisher=both)
    trainer.create_optimizer()
    trainer.ewc.controller.bind(trainer.model, trainer.optimizer)
    assert trainer.ewc.controller.measure()["ewc/penalty"] == 0.0
    trainer.ewc._report_start()
    assert "away from" not in caplog.text


def test_an_anchor_between_bfloat16_models_is_not_rounded_and_that_of_one_is(tokenizer, tmp_path):
    bases = [tmp_path / "m1", tmp_path / "m2"]
    for seed, base in enumerate(bases):
        tiny.make_model(len(tokenizer), seed).bfloat16().save_pretrained(base)
        tokenizer.save_pretrained(base)
    parts = [training.make_fisher(base, seed=n) for n, base in enumerate(bases)]
    twins = [parts[1], training.make_fisher(bases[1], seed=7)]
    model = AutoModelForCausalLM.from_pretrained(bases[1], dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    for given, rounded in ((parts, False), (twins, True)):
        fold = FisherInformation.fold(given)
        controller = EWCController(fold, BaseModel.resolve(bases[1]), 1.0, "decoupled")
        controller.bind(model, optimizer)
        reader, lost = fold.anchor(fold.names), 0
        for entry in controller.protected:
            exact = reader.read(entry.name).flatten().float()
            assert torch.equal(entry.anchor.float(), exact)
            lost += int((exact != exact.bfloat16().float()).sum())
        assert (lost == 0) == rounded
        assert (controller.measure()["ewc/penalty"] == 0) == rounded


def test_the_list_must_end_with_the_model_that_is_trained(base_folder, trained, fishers, tmp_path):
    with pytest.raises(FisherMismatchError, match="oldest to newest"):
        training.ewc_trainer(trained, tmp_path, fisher=fishers[::-1])
    with pytest.raises(FisherMismatchError, match="oldest to newest"):
        training.ewc_trainer(base_folder, tmp_path, fisher=fishers)


def test_a_loaded_fisher_needs_no_name(base_folder, fisher, fisher_folder, tmp_path):
    models = []
    for number, (given, named) in enumerate(((fisher, None), (None, fisher_folder))):
        config = EWCConfig(**training.settings(tmp_path / str(number), ewc_lambda=0.1, fisher=named))
        trainer = EWCTrainer(str(base_folder), config, train_dataset=training.make_rows(), fisher=given)
        trainer.train()
        models.append(training.weights(trainer.model))
    assert training.largest_difference(*models) == 0.0
    with pytest.raises(ConfigError, match="`fisher` is missing"):
        training.ewc_trainer(base_folder, tmp_path / "none", ewc_lambda=0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(fisher=[]), "names no Fisher"),
        (dict(fisher=["a", "b", "a"]), "names 'a' twice"),
        (dict(fisher=["a", "b"], fisher_revision="main"), "belongs to a single Fisher"),
        (dict(fisher=["a", "b"], fisher_decay=0.0), "above 0 and at most 1"),
        (dict(fisher=["a", "b"], fisher_decay=1.1), "above 0 and at most 1"),
        (dict(fisher="a", fisher_decay=0.9), "there is one"),
    ],
)
def test_settings_of_a_list_must_make_sense(tmp_path, given, message):
    with pytest.raises(ConfigError, match=message):
        EWCConfig(**training.settings(tmp_path), **given).check()
    with pytest.raises(ConfigError, match=message):
        EWCCallback(**given)


# The command line


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return tiny.write_jsonl(tmp_path_factory.mktemp("rows") / "new.jsonl", [{"text": text} for text in tiny.TEXTS * 2])


def test_one_or_several_words_and_yaml_lists_name_fishers(tmp_path):
    shared = ["--model", "m", "--dataset", "d", "--output_dir", "o", "--use_cpu"]
    for given, expected in ((["a"], "a"), (["a", "b"], ["a", "b"])):
        assert parse_training("train", [*shared, "--fisher", *given], TrainScript)[1].fisher == expected
    (tmp_path / "a.yaml").write_text("fisher: [a, b]\nfisher_decay: 0.5")
    args = parse_training("train", [*shared, "--config", str(tmp_path / "a.yaml")], TrainScript)[1]
    assert (args.fisher, args.fisher_decay) == (["a", "b"], 0.5)


def test_train_with_a_list_records_all_and_resumes_only_with_the_same(trained, fishers, rows, tmp_path, capsys):
    def train(out, *flags):
        shared = ["--model", str(trained), "--dataset", str(rows), "--output_dir", str(tmp_path / out)]
        return main(["train", *shared, *STEPS, "--fisher", *fishers, *flags])

    assert train("whole", "--fisher_decay", "0.5") == 0
    for folder in (tmp_path / "whole", tmp_path / "whole" / "checkpoint-2"):
        state = json.loads((folder / "ewc_state.json").read_text())
        named = [(pair["source"], pair["coefficient"]) for pair in state["fisher"]["fold"]]
        assert named == [(fishers[0], 0.5), (fishers[1], 1.0)]
        assert [pair["sha256"] for pair in state["fisher"]["fold"]] == [
            FisherInformation.from_pretrained(each).sha256 for each in fishers
        ]
        assert state["anchor"]["fingerprint"] == BaseModel.resolve(trained).fingerprint

    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoint-4")
    assert train("killed", "--resume", "--fisher_decay", "0.25") == 2
    assert train("killed", "--resume", "--fisher", *fishers[1:]) == 2
    assert "cannot be continued with other settings" in capsys.readouterr().err
    assert train("killed", "--resume", "--fisher_decay", "0.5") == 0
    assert "resuming from checkpoint-2" in capsys.readouterr().out
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert train("whole", "--overwrite", "--fisher", str(tmp_path / "whole")) == 2
    assert "same folder" in capsys.readouterr().err


def test_a_sweep_with_a_list_runs_and_goes_on(trained, fishers, rows, tmp_path, capsys):
    argv = ["sweep", "--model", str(trained), "--dataset", str(rows), "--output_dir", str(tmp_path / "s"), *STEPS]
    argv += ["--fisher", *fishers, "--texts", f"old={rows}", f"new={rows}", "--old", "old", "--new", "new"]
    assert main([*argv, "--lambdas", "0", "1"]) == 0
    assert main([*argv, "--lambdas", "0", "1", "10"]) == 0
    assert "[2/3] proximal, λ = 1: finished before" in capsys.readouterr().out
    assert main([*argv, "--lambdas", "0", "1", "--fisher_decay", "0.5"]) == 2
    assert "begun with other settings" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_each_fisher_is_verified_once(trained, fishers, rows, tmp_path, monkeypatch, command):
    from hf_ewc.artifact import store

    opened, verify = [], store.open_verified
    monkeypatch.setattr(store, "open_verified", lambda folder, source: opened.append(source) or verify(folder, source))
    argv = [command, "--model", str(trained), "--dataset", str(rows), "--output_dir", str(tmp_path / "o"), *STEPS]
    argv += ["--fisher", *fishers]
    if command == "sweep":
        argv += ["--lambdas", "1", "10", "--texts", f"old={rows}", f"new={rows}", "--old", "old", "--new", "new"]
    assert main(argv) == 0
    assert opened == fishers


def test_fold_command_writes_what_it_says(trained, fishers, rows, tmp_path, capsys):
    out = tmp_path / "fold"
    argv = ["fisher", "fold", *fishers, "--decay", "0.5", "--output_dir", str(out), "--codec", "float32"]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    fold = FisherInformation.from_pretrained(out)
    assert f"Constant {fold.manifest.fold.constant:.4g} nats" in shown
    assert f"{fishers[0]}: trace {FisherInformation.from_pretrained(fishers[0]).trace:.4g} × 0.5" in shown
    assert f"hf-ewc train --model {trained} --fisher {out}" in shown
    assert fold.has_own_anchor

    assert main(argv) == 2
    assert "--overwrite" in capsys.readouterr().err
    (tmp_path / "a.yaml").write_text(f"fishers: [{fishers[0]}, {fishers[1]}]\noutput_dir: {out}\n")
    assert main(["fisher", "fold", "--config", str(tmp_path / "a.yaml"), "--overwrite"]) == 0
    assert FisherInformation.from_pretrained(out).manifest.fold.decay == 1.0
    argv = ["train", "--model", str(trained), "--fisher", str(out), "--dataset", str(rows), "--output_dir", str(tmp_path / "o")]
    assert main([*argv, *STEPS]) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["f0"], "at least two"),
        (["f0", "f0"], "twice"),
        (["f0", "f1", "--decay", "2"], "at most 1"),
        (["f0", "f1", "--codec", "float16"], "codec: float16"),
        ([], "`fishers` is missing"),
    ],
)
def test_fold_command_refuses_what_makes_no_sense(tmp_path, capsys, argv, message):
    assert main(["fisher", "fold", *argv, "--output_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_fold_command_never_writes_over_its_inputs(fishers, capsys):
    assert main(["fisher", "fold", *fishers, "--output_dir", fishers[0], "--overwrite"]) == 2
    assert "same folder" in capsys.readouterr().err
    FisherInformation.from_pretrained(fishers[0])

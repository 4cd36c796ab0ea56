"""`hf-ewc merge`: after a real training, with what its record names; what it prints, and what it refuses."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
import torch
import training
from test_artifact_store import tree
from transformers import AutoModelForCausalLM

from hf_ewc import EvaluationConfig, FisherInformation
from hf_ewc.cli import evaluate, merge
from hf_ewc.cli.main import guarded
from hf_ewc.cli.options import parse


@pytest.fixture(scope="module")
def trained(base_folder, fisher_folder, tmp_path_factory):
    """Six steps of EWC from the tiny base, as `hf-ewc train` leaves them."""
    out = tmp_path_factory.mktemp("trained") / "lt"
    trainer = training.ewc_trainer(base_folder, out, fisher=fisher_folder, ewc_lambda=0.01)
    trainer.train()
    trainer.save_model()
    return out


@pytest.fixture
def call(capsys):
    """Run the command; returns exit code, output and error output."""

    def run(*argv):
        capsys.readouterr()
        code = guarded("merge", merge.run, [str(word) for word in argv])
        return code, *capsys.readouterr()

    return run


def weights(folder):
    return training.weights(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))


def test_a_trained_model_knows_its_base_and_its_fisher(trained, base_folder, fisher_folder, tmp_path, call):
    code, out, _ = call("--adapted", trained, "--output_dir", tmp_path / "out")
    assert code == 0
    fisher = FisherInformation.from_pretrained(fisher_folder)
    mean = fisher.trace / fisher.manifest.totals.num_parameters
    theta, base, found = (weights(folder) for folder in (trained, base_folder, tmp_path / "out"))
    for name, values in found.items():
        keep = 1 / (1 + fisher.per_token(name).double() / mean)
        expected = base[name].double() + (theta[name].double() - base[name].double()) * keep
        torch.testing.assert_close(values, expected.float(), rtol=1e-6, atol=1e-9)
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert f"'{base_folder}', λ = 1, mean F {mean:.4g} per token." in out
    assert {"embedding", "attention", "mlp", "norm", "all"} <= lines.keys()
    _, count, way, by_fisher, before, after = lines["all"].split()
    assert count == f"{sum(values.numel() for values in found.values()):,}"
    assert 0 < float(way.rstrip("%")) < 50 < float(by_fisher.rstrip("%")) < 100
    assert 0 < float(after) < float(before)
    state, before = (json.loads((folder / "ewc_state.json").read_text()) for folder in (tmp_path / "out", trained))
    assert state.pop("merge")["merge_lambda"] == 1.0
    assert state == before
    assert max(map(len, out.splitlines()[1:-2])) <= 128


def test_what_it_says_to_type_next_can_be_typed(trained, base_folder, tmp_path, call):
    _, out, _ = call("--adapted", trained, "--merge_lambda", "inf", "--output_dir", tmp_path / "my out")
    assert "λ = inf" in out
    words = shlex.split(out.splitlines()[-1].removeprefix("Next: hf-ewc evaluate "))
    script, config = parse("evaluate", words, evaluate.EvaluateScript, EvaluationConfig)
    assert (script.model, script.base) == ([str(tmp_path / "my out"), str(trained)], str(base_folder))
    assert list(config.texts) == ["old", "new"]
    for name, values in weights(tmp_path / "my out").items():
        assert torch.equal(values, weights(base_folder)[name])  # this Fisher has no zeros


def test_interpolation_needs_no_fisher(trained, base_folder, tmp_path, call):
    code, out, _ = call("--adapted", trained, "--interpolate", "0.25", "--output_dir", tmp_path / "out", "--dtype", "bfloat16")
    assert code == 0
    assert ": 0.25 of the way back, for all" in out
    theta, base = weights(trained), weights(base_folder)
    for name, values in weights(tmp_path / "out").items():
        expected = base[name].double() + 0.75 * (theta[name].double() - base[name].double())
        assert torch.equal(values, expected.bfloat16())


def test_an_earlier_merge_is_replaced_on_request_only(trained, tmp_path, call):
    out = tmp_path / "out"
    assert call("--adapted", trained, "--output_dir", out)[0] == 0
    before = tree(out)
    code, _, err = call("--adapted", trained, "--output_dir", out, "--merge_lambda", "2")
    assert (code, tree(out)) == (2, before)
    assert "--overwrite" in err
    assert call("--adapted", trained, "--output_dir", out, "--merge_lambda", "2", "--overwrite")[0] == 0
    assert tree(out)["model.safetensors"] != before["model.safetensors"]
    for target in (trained, tmp_path / "out" / ".." / "out"):  # an input by any name, and a training that is not ours to delete
        code, _, err = call("--adapted", out, "--base", trained, "--interpolate", "0.5", "--output_dir", target, "--overwrite")
        assert code == 2
        assert "same folder" in err


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--merge_lambda 1 --interpolate 0.5", "both are given"),
        ("--merge_lambda -1", "`merge_lambda: -1.0`"),
        ("--interpolate 2", "`interpolate: 2.0`"),
        ("--dtype float16", "`dtype: float16` is not one of float32, bfloat16"),
        ("--merge_lamda 1", "Did you mean `merge_lambda`?"),
        ("--fisher nowhere", "there is no folder 'nowhere'"),
        ("--base nowhere/at/all", "the base model 'nowhere/at/all'"),
    ],
)
def test_mistakes_are_one_message_and_write_nothing(trained, tmp_path, call, flags, part):
    code, out, err = call("--adapted", trained, "--output_dir", tmp_path / "out", *flags.split())
    assert (code, out) == (2, "")
    assert part in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_missing_settings_are_named_together(call):
    code, _, err = call("--merge_lambda", "1")
    assert code == 2
    assert "`adapted` is missing" in err
    assert "`output_dir` is missing" in err


def test_help_needs_no_heavy_library_and_fits_a_terminal():
    code = "import sys; from hf_ewc.cli import merge; print(merge.HELP)\n"
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'trl', 'pyarrow', 'transformers')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Usage: hf-ewc merge")
    assert max(map(len, lines)) <= 128
    assert len(lines) <= 40

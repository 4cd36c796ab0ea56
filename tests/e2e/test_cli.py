"""The command line from end to end on a tiny model: fisher → train → evaluate → sweep, killed, resumed, refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from hf_ewc.cli.main import main
from hf_ewc.config import EvaluationConfig, EWCConfig
from hf_ewc.data import load_rows
from hf_ewc.errors import ConfigError
from hf_ewc.experiment import plan_runs, run_sweep

ROOT = Path(__file__).parents[2]
STEPS = ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "2", "--per_device_train_batch_size", "2"]
STEPS += ["--max_length", "64", "--learning_rate", "1e-3", "--use_cpu", "--seed", "1"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    tiny.write_jsonl(folder / "old.jsonl", [{"text": text} for text in tiny.TEXTS[:4]])
    tiny.write_jsonl(folder / "new.jsonl", [{"text": text} for text in tiny.TEXTS[4:] * 3])
    tiny.write_jsonl(folder / "probe.jsonl", tiny.QUESTIONS[:4])
    tiny.write_jsonl(folder / "asked.jsonl", tiny.QUESTIONS[4:])
    return folder


@pytest.fixture(scope="module")
def fisher(files, base_folder):
    out = files / "fisher"
    assert main(["fisher", "--model", str(base_folder), "--dataset", str(files / "probe.jsonl"), "--output_dir", str(out)]) == 0
    return out


@pytest.fixture
def train(files, fisher, base_folder):
    """`hf-ewc train` with the flags that all tests share."""

    def run(out, *flags, model=base_folder):
        shared = ["--model", str(model), "--dataset", str(files / "new.jsonl"), "--fisher", str(fisher)]
        return main(["train", *shared, "--output_dir", str(out), *STEPS, *flags])

    return run


@pytest.fixture
def sweep(files, fisher, base_folder, tmp_path):
    """`run_sweep` over λ 0, 1, 100; an optional word stops it, as Ctrl-C would, when it appears in the progress."""

    def run(stop_at=None, lambdas=(0, 1, 100), learning_rate=1e-3):
        lines = []

        def progress(line):
            lines.append(line)
            if stop_at is not None and stop_at in line:
                raise KeyboardInterrupt

        def make_args(mode, ewc_lambda, out):
            return EWCConfig(
                output_dir=str(out),
                ewc_lambda=ewc_lambda,
                fisher=str(fisher),
                learning_rate=learning_rate,
                max_steps=4,
                save_steps=2,
                per_device_train_batch_size=2,
                max_length=64,
                use_cpu=True,
                bf16=False,
            )

        results = run_sweep(
            base=str(base_folder),
            runs=plan_runs(["proximal"], lambdas),
            make_args=make_args,
            train_dataset=lambda: load_rows(files / "new.jsonl"),
            evaluation=EvaluationConfig(
                texts={"old": str(files / "old.jsonl"), "new": str(files / "new.jsonl")}, device="cpu", max_documents=4
            ),
            output_dir=tmp_path / "sweep",
            old="old",
            new="new",
            progress=progress,
        )
        return results, lines

    return run


def test_fisher_says_what_it_measured_and_leaves_no_work_folder(files, base_folder, tmp_path, capsys):
    argv = ["fisher", "--model", str(base_folder), "--dataset", str(files / "probe.jsonl"), "--output_dir", str(tmp_path / "f")]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "4 examples, 8 scored tokens" in out
    assert "layer 1" in out
    assert "hf-ewc train" in out
    assert [path.name for path in tmp_path.iterdir()] == ["f"]

    assert main(argv) == 2  # nothing is overwritten by accident …
    assert "--overwrite" in capsys.readouterr().err
    assert main([*argv, "--resume"]) == 0  # … a finished estimate needs no resuming …
    assert "Nothing to resume" in capsys.readouterr().out
    assert main([*argv, "--overwrite", "--max_examples", "2"]) == 0  # … and is replaced when asked
    assert "2 examples" in capsys.readouterr().out


def test_an_interrupted_fisher_is_resumed_or_begun_again(files, base_folder, tmp_path, capsys):
    probe = tiny.write_jsonl(tmp_path / "probe.jsonl", tiny.QUESTIONS)
    argv = ["fisher", "--model", str(base_folder), "--dataset", str(probe), "--output_dir", str(tmp_path / "f")]
    code = "import os, sys; from hf_ewc.fisher import state; from hf_ewc.cli.main import main\n"
    code += "save = state.RunningState.save\n"
    code += "state.RunningState.save = lambda self, *args: (save(self, *args), os._exit(9))\n"  # killed after the first save
    code += f"main({[*argv, '--save_every', '2']!r})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.partial", "probe.jsonl"]

    assert main(argv) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*argv, "--save_every", "2", "--resume"]) == 0
    assert "6 examples" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "probe.jsonl"]


def test_train_saves_a_model_and_says_what_comes_next(train, tmp_path, capsys):
    assert train(tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "accelerate launch -m hf_ewc.cli.train --model" in out
    assert "ewc/kl_nats" in out
    assert "hf-ewc evaluate --model" in out
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "ewc_state.json").read_text())["ewc_lambda"] == 1.0


def test_train_asks_before_it_writes_into_a_used_folder(train, tmp_path, capsys):
    assert train(tmp_path / "out", "--max_steps", "2") == 0
    assert train(tmp_path / "out") == 2
    assert "--resume" in capsys.readouterr().err
    assert train(tmp_path / "out", "--resume") == 0
    assert "resuming from checkpoint-2" in capsys.readouterr().out
    assert train(tmp_path / "out", "--resume", "--ewc_lambda", "5") == 2
    assert "then 1.0   now 5.0" in capsys.readouterr().err
    assert train(tmp_path / "out", "--overwrite", "--max_steps", "2") == 0
    assert not (tmp_path / "out" / "checkpoint-4").exists()


def test_a_fisher_of_another_model_is_refused_before_any_data_is_read(train, tokenizer, tmp_path, capsys):
    other = tiny.save_base(tmp_path / "other", tokenizer, seed=7)
    assert train(tmp_path / "out", "--dataset", "no-such-file.jsonl", model=other) == 2
    err = capsys.readouterr().err
    assert "weights" in err
    assert "no-such-file" not in err
    assert not (tmp_path / "out").exists()


def test_a_launcher_that_lost_its_processes_is_refused(files, fisher, base_folder, tmp_path):
    command = [sys.executable, "-m", "hf_ewc.cli.train", "--model", str(base_folder), "--dataset", str(files / "new.jsonl")]
    command += ["--fisher", str(fisher), "--output_dir", str(tmp_path / "out"), "--max_steps", "2"]
    environment = {**os.environ, "WORLD_SIZE": "2"}  # but this process is alone
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 2
    assert "2 processes" in done.stderr
    assert not (tmp_path / "out").exists()


def test_accelerate_launch_runs_the_same_module(files, fisher, base_folder, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate_configs/cpu.yaml"]
    command += ["-m", "hf_ewc.cli.train", "--model", str(base_folder), "--dataset", str(files / "new.jsonl"), *STEPS]
    command += ["--fisher", str(fisher), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "The same as" not in done.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_evaluate_compares_with_the_base_and_warns_of_the_probe(train, files, base_folder, tmp_path, capsys):
    assert train(tmp_path / "out") == 0
    capsys.readouterr()
    texts = [f"old={files / 'old.jsonl'}", f"new={files / 'new.jsonl'}"]
    argv = ["evaluate", "--model", str(tmp_path / "out"), "--base", str(base_folder), "--texts", *texts]
    argv += ["--questions", f"known={files / 'probe.jsonl'}", "--output", str(tmp_path / "results.json")]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert "forgetting" in captured.out
    assert "'known' is the file probe.jsonl, on which the Fisher was measured" in captured.err
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(run["mode"], run["ewc_lambda"]) for run in results["runs"]] == [("out", 1.0)]
    assert results["settings"] == {"old": "old", "new": "new"}


def test_evaluate_without_a_base_measures_one_model(files, base_folder, tmp_path, capsys):
    argv = ["evaluate", "--model", str(base_folder), "--texts", f"old={files / 'old.jsonl'}"]
    assert main([*argv, "--output", str(tmp_path / "m.json")]) == 0
    assert "bits per byte" in capsys.readouterr().out
    (metrics,) = json.loads((tmp_path / "m.json").read_text())["models"].values()
    assert metrics["texts"]["old"]["documents"] == 4


def test_sweep_command_writes_everything(files, fisher, base_folder, tmp_path, capsys):
    config = tmp_path / "sweep.yaml"
    config.write_text(
        f"model: {base_folder}\nfisher: {fisher}\ndataset: {files / 'new.jsonl'}\n"
        f"output_dir: {tmp_path / 's'}\nlambdas: [0, 10]\n"
        f"texts: {{english: {files / 'old.jsonl'}, lithuanian: {files / 'new.jsonl'}}}\nold: english\nnew: lithuanian\n"
        f"questions: {{facts: {files / 'asked.jsonl'}}}\n"
    )
    assert main(["sweep", "--config", str(config), *STEPS]) == 0
    out = capsys.readouterr().out
    assert "proximal" in out
    assert "report.html" in out
    written = ["results.json", "table.md", "retention.png", "report.html"]
    for name in [*written, "runs/sft-0/result.json", "runs/proximal-10/model.safetensors"]:
        assert (tmp_path / "s" / name).is_file(), name
    assert not list((tmp_path / "s").glob("runs/*/checkpoint-*"))
    assert str(tmp_path) not in (tmp_path / "s" / "report.html").read_text()

    assert main(["sweep", "--config", str(config), *STEPS, "--lambdas", "0", "10", "20"]) == 0  # λ may be added
    out = capsys.readouterr().out
    assert "[1/3] sft, λ = 0: finished before" in out
    assert "[3/3] proximal, λ = 20: training" in out
    assert main(["sweep", "--config", str(config), *STEPS, "--max_documents", "2"]) == 2  # what is measured may not change
    assert "max_documents" in capsys.readouterr().err
    assert main(["sweep", "--config", str(config), *STEPS, "--ewc_lambda", "2"]) == 2
    assert "`lambdas`" in capsys.readouterr().err


def test_a_sweep_that_was_stopped_anywhere_ends_as_if_it_had_not_been(sweep, tmp_path):
    stops = ["measuring the base", "[1/3] sft, λ = 0: measuring", "[2/3] proximal, λ = 1: training"]
    stops += ["[3/3] proximal, λ = 100: measuring"]
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            sweep(stop_at=stop)
    resumed, lines = sweep()
    assert not any("training" in line for line in lines)  # the last stop came after the last training
    os.rename(tmp_path / "sweep", tmp_path / "stopped")
    whole, _ = sweep()
    for ours, theirs in zip(resumed["runs"], whole["runs"], strict=True):
        assert ours["metrics"]["samples"] == theirs["metrics"]["samples"]


def test_a_run_that_was_killed_goes_on_from_its_checkpoint(sweep, tmp_path):
    whole, _ = sweep(lambdas=(1,))
    os.rename(tmp_path / "sweep", tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        sweep(lambdas=(1,), stop_at="λ = 1: measuring")
    out = tmp_path / "sweep" / "runs" / "proximal-1"
    # as if the process had died between step 2 and the end
    (out / "checkpoint-4" / "trainer_state.json").unlink()
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({"settings": record["settings"]}))
    resumed, lines = sweep(lambdas=(1,))
    assert any("resuming from checkpoint-2" in line for line in lines)
    assert resumed["runs"][0]["metrics"]["samples"] == whole["runs"][0]["metrics"]["samples"]


def test_a_sweep_with_other_settings_is_refused(sweep):
    sweep(lambdas=(0,))
    with pytest.raises(ConfigError, match=r"training\.learning_rate +then 0\.001   now 0\.002"):
        sweep(lambdas=(0,), learning_rate=2e-3)


def test_an_interrupted_estimate_over_a_finished_one_is_continued_only_when_it_may_replace_it(base_folder, tmp_path, capsys):
    data = tiny.write_jsonl(tmp_path / "questions.jsonl", tiny.QUESTIONS)
    out, partial = tmp_path / "fisher", tmp_path / "fisher.partial"
    argv = ["fisher", "--model", str(base_folder), "--dataset", str(data), "--output_dir", str(out)]
    assert main(argv) == 0
    before = (out / "fisher_config.json").read_bytes()
    assert main([*argv[:-1], str(tmp_path / "other"), "--work_dir", str(partial), "--seed", "1"]) == 0  # its sums lie there now
    assert main([*argv, "--resume"]) == 2
    assert "use `--resume --overwrite`" in capsys.readouterr().err
    assert (out / "fisher_config.json").read_bytes() == before
    position = (partial / "estimate.json").read_bytes()
    assert main([*argv, "--resume", "--overwrite", "--save_every", "999"]) == 0
    assert position, "the sums were taken over, not deleted at the start"
    assert not partial.exists()


def test_a_device_that_is_not_there_is_a_setting_to_correct(base_folder, tmp_path, capsys):
    data = tiny.write_jsonl(tmp_path / "questions.jsonl", tiny.QUESTIONS)
    argv = ["fisher", "--model", str(base_folder), "--dataset", str(data), "--output_dir", str(tmp_path / "out")]
    assert main([*argv, "--device", "nosuch"]) == 2
    assert "`device: nosuch` cannot be used" in capsys.readouterr().err

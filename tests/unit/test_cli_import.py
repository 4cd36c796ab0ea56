"""`hf-ewc fisher import`: an Adam state becomes a Fisher that says what it is."""

import pytest
import tiny
import torch

from hf_ewc import FisherInformation
from hf_ewc.cli import fisher_import
from hf_ewc.cli.main import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """A folder as the Trainer leaves it: weights, tokenizer, optimizer.pt."""
    folder = tiny.save_base(tmp_path_factory.mktemp("run") / "checkpoint-2", tokenizer)
    model = tiny.make_model(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for seed in range(2):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return folder


@pytest.fixture
def words(checkpoint, tmp_path):
    settings = {
        "model": checkpoint,
        "optimizer_state": checkpoint / "optimizer.pt",
        "tokens_per_batch": 4096,
        "output_dir": tmp_path / "fisher",
    }

    def build(**changes):
        given = {**settings, **changes}
        return ["fisher", "import", *(str(w) for k, v in given.items() if v is not None for w in (f"--{k}", v))]

    return build


def test_a_checkpoint_becomes_a_fisher_and_the_answer_says_approximation(words, tmp_path, capsys):
    assert main(words(codec="float32")) == 0
    out = capsys.readouterr().out
    assert out.startswith("APPROXIMATION: F = 4,096 tokens per batch")
    assert "about 2 squared" in " ".join(out.split())
    assert "no probe was measured" in " ".join(out.split())
    assert f"--fisher {tmp_path / 'fisher'}" in out
    fisher = FisherInformation.from_pretrained(tmp_path / "fisher")
    assert fisher.manifest.estimator.path == "adam_exp_avg_sq"
    assert fisher.trace > 0


def test_a_second_run_asks_before_it_replaces(words, tmp_path, capsys):
    assert main(words()) == 0
    before = (tmp_path / "fisher" / "fisher_config.json").read_bytes()
    assert main(words(tokens_per_batch=8)) == 2
    err = capsys.readouterr().err
    assert "--overwrite" in err
    assert "--resume" not in err
    assert (tmp_path / "fisher" / "fisher_config.json").read_bytes() == before
    assert main([*words(tokens_per_batch=8), "--overwrite"]) == 0
    assert (tmp_path / "fisher" / "fisher_config.json").read_bytes() != before


def test_all_settings_that_are_wrong_are_told_at_once(words, capsys):
    assert main([*words(tokens_per_batch=0, codec="float16"), "--max_length", "5"]) == 2
    err = capsys.readouterr().err
    for part in ("`tokens_per_batch` must be at least 1", "`codec: float16`", "`max_length`"):
        assert part in err


def test_the_tokens_of_a_batch_have_no_default(words, capsys):
    assert main(words(tokens_per_batch=None)) == 2
    assert "`tokens_per_batch` is missing. Scored tokens of one optimizer step" in capsys.readouterr().err


def test_a_result_never_replaces_the_checkpoint(words, checkpoint, capsys):
    assert main([*words(output_dir=checkpoint), "--overwrite"]) == 2
    assert "same folder" in capsys.readouterr().err
    assert (checkpoint / "optimizer.pt").exists()


def test_a_state_that_is_refused_leaves_nothing_behind(words, checkpoint, tmp_path, capsys):
    assert main(words(optimizer_state=checkpoint / "config.json")) == 2
    assert "Nothing was imported." in capsys.readouterr().err
    assert not (tmp_path / "fisher").exists()


def test_help_fits_a_terminal_and_imports_nothing_heavy(capsys):
    assert main(["fisher", "import", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == fisher_import.HELP.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 128
    assert any("APPROXIMATION" in line for line in lines)

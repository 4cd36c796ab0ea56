"""`hf-ewc`: fast help, one message per mistake, exit codes."""

import errno
import os
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from hf_ewc.cli.main import COMMANDS, SUBCOMMANDS, guarded, is_disk_full, main
from hf_ewc.errors import ConfigError, HubError, HubUnavailableError

NAMES = [*COMMANDS, *SUBCOMMANDS]


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("argv", [[], ["--help"], ["--version"], *([*name.split(), "--help"] for name in NAMES)], ids=str)
def test_help_imports_no_heavy_library(argv):
    code = (
        f"import sys; from hf_ewc.cli.main import main; import hf_ewc; rc = main({argv!r});"
        "heavy = [m for m in ('torch', 'transformers', 'trl', 'numpy', 'pyarrow') if m in sys.modules];"
        "print(heavy, file=sys.stderr); sys.exit(rc)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"
    assert "hf-ewc" in done.stdout


def test_a_terminal_that_cannot_show_every_character_is_no_error():
    code = "import sys; from hf_ewc.cli.main import command; sys.argv = ['hf-ewc', 'compare', '--help']; command()"
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=plain, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"(? slider)" in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_each_help_has_an_example_and_fits_a_terminal(name, capsys):
    main([*name.split(), "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"  hf-ewc {name}") or line == f"Usage: hf-ewc {name}" for line in lines)
    assert max(map(len, lines)) <= 128
    assert len(lines) <= 40


def test_an_unknown_command_is_answered_with_the_one_that_was_meant(capsys):
    assert main(["trian"]) == 2
    assert "hf-ewc train" in capsys.readouterr().err


def fails_with(error):
    def run(argv):
        raise error

    return run


def test_a_mistake_in_the_input_ends_in_its_message_and_exit_code_2(capsys):
    assert guarded("train", fails_with(ConfigError("`ewc_lambda` is wrong")), []) == 2
    err = capsys.readouterr().err
    assert "`ewc_lambda` is wrong" in err
    assert "Traceback" not in err


def test_a_place_that_cannot_be_written_to_is_named_in_one_line(capsys):
    assert guarded("train", fails_with(PermissionError(13, "Permission denied", "/somewhere/out")), []) == 1
    assert capsys.readouterr().err == "hf-ewc train: '/somewhere/out' cannot be used: Permission denied.\n"


def test_the_hub_s_refusal_is_a_mistake_and_its_failure_is_not(capsys):
    assert guarded("push fisher", fails_with(HubError("no access")), []) == 2
    assert guarded("push fisher", fails_with(HubUnavailableError("no answer")), []) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(capsys):
    assert guarded("train", fails_with(KeyboardInterrupt()), ["--config", "a b.yaml"]) == 130
    assert "hf-ewc train --config 'a b.yaml' --resume\n" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        guarded("train", fails_with(ZeroDivisionError()), [])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EDQUOT, "full"),
        # as measured on a full tmpfs: neither is an OSError
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    ],
    ids=repr,
)
def test_a_full_disk_is_recognised_in_every_wording(error):
    assert is_disk_full(error)
    outer = ValueError("saving failed")
    outer.__cause__ = error
    assert is_disk_full(outer)
    assert not is_disk_full(ValueError("saving failed"))


def test_a_full_disk_ends_in_a_message_and_exit_code_1(capsys):
    assert guarded("fisher", fails_with(OSError(errno.ENOSPC, "No space left on device")), []) == 1
    err = capsys.readouterr().err
    assert "disk is full" in err
    assert "--resume" in err


def test_env_shows_no_token(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "s" * 34)
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert "present" in out
    assert "ssss" not in out
    assert torch.__version__ in out

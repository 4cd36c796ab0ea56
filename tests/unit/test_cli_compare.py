"""`hf-ewc compare`: the page comes up on this machine alone and ends quickly; mistakes are one message."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import fields
from pathlib import Path

import pytest
from test_artifact_fold import save_moved

from hf_ewc.cli import compare
from hf_ewc.cli.main import main
from hf_ewc.compare import CompareConfig, app_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def adapted(base_folder, tmp_path_factory, tokenizer):
    return save_moved(base_folder, tmp_path_factory.mktemp("adapted") / "lt", tokenizer, seed=3)


@pytest.fixture
def pair(base_folder, adapted):
    return ["--base", str(base_folder), "--adapted", str(adapted)]


def refused(capsys, *argv, code=2):
    """What is said to whoever made a mistake."""
    assert main(["compare", *argv]) == code
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert "Open http" not in said.out
    return said.err


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


# -- help and mistakes ------------------------------------------------------------------------------------------------------


def test_the_help_names_every_setting_and_nothing_else(capsys):
    assert main(["compare", "--help"]) == 0
    said = capsys.readouterr().out
    named = set(re.findall(r"--([a-z_]+)", said)) - {"key", "output"}  # the placeholder, and one of `hf-ewc evaluate`
    known = {item.name for part in (CompareConfig, compare.PageScript) for item in fields(part)}
    assert named <= known
    assert known - named == {"plain_revision", "fisher_revision", "output_dir"}
    assert "Ctrl-C" in said


def test_mistakes_are_listed_together(capsys, base_folder):
    said = refused(
        capsys, "--base", str(base_folder), "--base_revision", "v1", "--port", "70000", "--slots", "0", "--dtpye", "x"
    )
    for part in ("`adapted` is missing", "`base_revision` is for models on the Hub", "`port: 70000`", "`slots: 0`", "dtpye"):
        assert part in said
    assert "nothing was started" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "0"], "`port: 0` is no port"),
        (["--port", "http"], "port"),
        (["--votes_repo", "votes"], "`votes_repo: votes` is no dataset repository"),
        (["--dtype", "int8"], "`dtype: int8`"),
    ],
)
def test_settings_that_cannot_be_are_named(capsys, pair, flags, words):
    assert words in refused(capsys, *pair, *flags)


@pytest.mark.parametrize("name", ["base", "adapted"])
def test_one_model_alone_is_not_enough(capsys, base_folder, name):
    other = "adapted" if name == "base" else "base"
    assert f"`{other}` is missing" in refused(capsys, f"--{name}", str(base_folder))


@pytest.mark.parametrize("name", ["base", "adapted", "plain", "fisher", "results", "examples"])
def test_files_that_are_not_there_are_told_before_anything_is_started(capsys, pair, tmp_path, monkeypatch, name):
    monkeypatch.setattr("hf_ewc.compare.CompareService", None)  # nothing gets so far
    assert "nowhere" in refused(capsys, *pair, f"--{name}", str(tmp_path / "nowhere"))


def test_a_port_that_is_taken_is_told(capsys, pair):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(capsys, *pair, "--port", str(port))
    assert str(port) in said
    assert "--port" in said


def test_without_gradio_it_says_what_to_install(capsys, pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'gradio>=6.31'" in refused(capsys, *pair)


# -- without models: the demo's ---------------------------------------------------------------------------------------------


def test_without_models_it_takes_those_that_the_demo_made(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_ewc.cli.demo.run", lambda argv: pytest.fail("it is there already"))
    for name in ("runs/proximal-1000/result.json", "runs/sft-0/result.json", "results.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    config = CompareConfig()
    compare._use_demo(config, tmp_path)
    assert config.base == str(tmp_path / "base")
    assert config.adapted == str(tmp_path / "runs/proximal-1000")
    assert config.plain == str(tmp_path / "runs/sft-0")
    assert config.fisher == str(tmp_path / "fisher")
    assert config.results == str(tmp_path / "results.json")
    assert set(json.loads(Path(config.examples).read_text())) == {"note", "compare", "natural", "between"}
    own = CompareConfig(results="mine.json", examples=str(app_folder() / "examples.json"))
    compare._use_demo(own, tmp_path)
    assert (own.results, Path(own.examples).name) == ("mine.json", "examples.json")


def test_what_the_demo_has_not_made_yet_is_made(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("hf_ewc.cli.demo.run", asked.append)
    compare._use_demo(CompareConfig(), tmp_path / "demo")
    assert asked == [["--output_dir", str(tmp_path / "demo"), "--resume"]]
    assert "under three minutes" in capsys.readouterr().out


# -- the page ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def running(pair):
    """The command as a process of its own, once it has said where its page is: process, port, what it said."""
    port = free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "hf_ewc.cli.main", "compare", *pair, "--device", "cpu", "--port", str(port)]
    if not re.search(r"__name__ == .__main__.", (ROOT / "hf_ewc/cli/main.py").read_text()):
        command[1:3] = ["-c", "import sys; from hf_ewc.cli.main import command; sys.exit(command())"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment, start_new_session=True
    )
    late = threading.Timer(90, process.kill)
    late.start()
    try:
        line = process.stdout.readline()
        assert line == f"Open http://127.0.0.1:{port}/ (Ctrl-C ends it)\n", line + process.stderr.read()
        yield process, port
    finally:
        late.cancel()
        process.kill()
        process.communicate()


def answers(host, port):
    try:
        with socket.create_connection((host, port), timeout=2):
            return True
    except OSError:
        return False


def test_the_page_is_there_for_this_machine_alone_and_ctrl_c_ends_it(running):
    process, port = running
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as answer:
        assert answer.status == 200
        assert "EWC" in answer.read().decode()
    assert not answers("127.0.0.2", port)  # it would, were it bound to 0.0.0.0
    # as a page in a browser holds it open
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/gradio_api/heartbeat/me", timeout=20):
        since = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert time.monotonic() - since < 15
    assert process.returncode in (0, 130)
    assert "Traceback" not in out + err
    assert not answers("127.0.0.1", port)
    with socket.create_server(("127.0.0.1", port)):
        pass

"""`hf-ewc fisher convert`: another codec in another folder, what that costs, and nothing half-done."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from test_artifact_store import make_fisher, tree

from hf_ewc.artifact import BaseModel, FisherInformation
from hf_ewc.cli.main import main


@pytest.fixture(scope="module")
def base(base_folder) -> BaseModel:
    return BaseModel.resolve(base_folder)


@pytest.fixture
def convert(tmp_path, capsys):
    """Run the command in `tmp_path`; returns exit code, output and error output."""

    def run(source, codec, out="out", *flags):
        argv = ["--fisher", str(tmp_path / source), "--codec", codec, "--output_dir", str(tmp_path / out), *flags]
        code = main(["fisher", "convert", *argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def stored(base, tmp_path):
    """A Fisher in a folder for each codec."""
    for codec in ("float32", "bfloat16", "log8"):
        make_fisher(base).save_pretrained(tmp_path / codec, codec=codec)
    return tmp_path


def test_a_converted_fisher_is_the_one_that_saving_would_have_written(stored, convert):
    for codec in ("bfloat16", "log8"):
        code, out, _ = convert("float32", codec, f"new-{codec}")
        assert code == 0
        assert tree(stored / f"new-{codec}") == tree(stored / codec)
        assert "cannot bring it back" not in out
    assert sorted(path.name for path in stored.iterdir()) == ["bfloat16", "float32", "log8", "new-bfloat16", "new-log8"]


def test_the_table_says_bytes_and_errors(stored, convert):
    code, out, _ = convert("float32", "log8")
    assert code == 0
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line}
    for label, folder in (("before", "float32"), ("after", "out")):
        (shard,) = (stored / folder).glob("*.safetensors")
        manifest = FisherInformation.from_pretrained(stored / folder).manifest
        assert lines[label][2] == f"{shard.stat().st_size:,}"
        assert lines[label][4:] == [f"{manifest.totals.trace:.6g}", f"{manifest.totals.zeros:,}"]
    assert (lines["before"][1], lines["after"][1]) == ("float32", "log8")
    median, p99, _, new_zeros = lines["all"][2:6]
    assert 0.1 < float(median.rstrip("%")) < float(p99.rstrip("%")) < 6
    assert new_zeros == "0"
    assert "model.norm.weight" not in out
    assert max(map(len, out.splitlines())) <= 140


def test_a_report_has_a_line_per_tensor(stored, convert):
    _, out, _ = convert("float32", "log8", "out", "--report")
    for name in FisherInformation.from_pretrained(stored / "out").names:
        assert f"\n{name} " in out


@pytest.mark.parametrize(("source", "codec"), [("bfloat16", "float32"), ("bfloat16", "log8"), ("log8", "float32")])
def test_what_a_codec_rounded_away_does_not_come_back_and_it_says_so(stored, convert, source, codec):
    code, out, _ = convert(source, codec)
    assert code == 0
    assert f"is {source}" in out
    assert f"{codec} cannot bring it back" in out
    if codec == "float32":
        before, after = (FisherInformation.from_pretrained(stored / folder) for folder in (source, "out"))
        for name in before.names:
            assert torch.equal(before.read(name), after.read(name))


def test_the_same_folder_is_refused_under_any_name(stored, convert):
    before = tree(stored / "float32")
    (stored / "link").symlink_to(stored / "float32")
    for out in ("float32", "link", "log8/../float32"):
        code, _, err = convert("float32", "log8", out, "--overwrite")
        assert code == 2
        assert "same folder" in err
    assert tree(stored / "float32") == before


def test_nothing_is_overwritten_unasked_and_nothing_foreign_ever(stored, convert):
    before = tree(stored / "bfloat16")
    code, _, err = convert("float32", "log8", "bfloat16")
    assert code == 2
    assert "--overwrite" in err
    assert "--resume" not in err
    assert tree(stored / "bfloat16") == before
    (stored / "mine").mkdir()
    (stored / "mine" / "notes.txt").write_text("mine")
    code, _, err = convert("float32", "log8", "mine", "--overwrite")
    assert code == 2
    assert "something else" in err
    assert (stored / "mine" / "notes.txt").read_text() == "mine"
    assert convert("float32", "log8", "bfloat16", "--overwrite")[0] == 0
    assert tree(stored / "bfloat16") == tree(stored / "log8")


@pytest.mark.parametrize(
    ("source", "codec", "part"),
    [
        ("float32", "float32", "is stored as float32 already"),
        ("float32", "fp8", "`codec: fp8` is not one of float32, bfloat16, log8"),
        ("nowhere", "log8", "there is no folder"),
        ("damaged", "log8", "was a copy cut off?"),
    ],
)
def test_what_cannot_be_converted_is_refused_and_writes_nothing(stored, convert, source, codec, part):
    if source == "damaged":
        (stored / "float32").rename(stored / "damaged")
        (shard,) = stored.glob("damaged/*.safetensors")
        shard.write_bytes(shard.read_bytes()[:-9])
    code, _, err = convert(source, codec)
    assert code == 2
    assert part in err
    assert not (stored / "out").exists()


def test_missing_settings_are_named_together(capsys):
    assert main(["fisher", "convert", "--codec", "log8", "--overwriet"]) == 2
    err = capsys.readouterr().err
    for part in ("`fisher` is missing", "`output_dir` is missing", "Did you mean `overwrite`?", "hf-ewc fisher convert --help"):
        assert part in err


def test_a_full_disk_leaves_the_old_state(stored, convert, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    before = tree(stored / "bfloat16")
    monkeypatch.setattr("hf_ewc.artifact.write.save_file", full)
    code, _, err = convert("float32", "log8", "bfloat16", "--overwrite")
    assert code == 1
    assert "disk is full" in err
    assert tree(stored / "bfloat16") == before
    assert sorted(path.name for path in stored.iterdir()) == ["bfloat16", "float32", "log8"]


def test_a_killed_conversion_leaves_the_old_state_and_can_be_repeated(stored, convert):
    before = tree(stored / "bfloat16")
    argv = ["--fisher", str(stored / "float32"), "--codec", "log8", "--output_dir", str(stored / "bfloat16"), "--overwrite"]
    code = "import os; from hf_ewc.artifact import write; from hf_ewc.cli.main import main\n"
    code += "write.render_card = lambda *_, **__: os._exit(9)\n"  # all shards are written by then
    code += f"main({['fisher', 'convert', *argv]!r})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 9
    assert tree(stored / "bfloat16") == before
    FisherInformation.from_pretrained(stored / "bfloat16")
    assert convert("float32", "log8", "bfloat16", "--overwrite")[0] == 0
    assert tree(stored / "bfloat16") == tree(stored / "log8")


def test_help_needs_no_heavy_library_and_fits_a_terminal():
    code = "import sys; from hf_ewc.cli.main import main; main(['fisher', 'convert', '--help'])\n"
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'trl', 'pyarrow')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Usage: hf-ewc fisher convert")
    assert max(map(len, lines)) <= 128
    assert len(lines) <= 40

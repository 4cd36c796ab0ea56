"""Output folders are never written into by accident, and `--overwrite` deletes nothing that is not ours."""

import pytest

from hf_ewc.cli.output import MODEL_FILES, claim, refuse_same_folder
from hf_ewc.errors import ConfigError
from hf_ewc.files import STATE_FILE

MARKS = (STATE_FILE, f"checkpoint-*/{STATE_FILE}")


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def test_new_and_empty_folders_may_be_used(tmp_path):
    claim(tmp_path, MARKS, MODEL_FILES, resume=False, overwrite=False)
    claim(tmp_path / "new", MARKS, MODEL_FILES, resume=False, overwrite=True)


def test_a_folder_in_use_needs_a_word(tmp_path):
    make(tmp_path, "notes.txt")
    with pytest.raises(ConfigError, match=r"--resume.*--overwrite"):
        claim(tmp_path, MARKS, MODEL_FILES, resume=False, overwrite=False)
    claim(tmp_path, MARKS, MODEL_FILES, resume=True, overwrite=False)


def test_overwrite_refuses_what_it_did_not_write(tmp_path):
    make(tmp_path, "config.json", "model.safetensors")  # somebody's model
    with pytest.raises(ConfigError, match="something else"):
        claim(tmp_path, MARKS, MODEL_FILES, resume=False, overwrite=True)
    assert (tmp_path / "model.safetensors").exists()


def test_overwrite_leaves_foreign_files(tmp_path):
    make(tmp_path, STATE_FILE, "model.safetensors", f"checkpoint-5/{STATE_FILE}", "notes.txt", "data/a.jsonl")
    claim(tmp_path, MARKS, MODEL_FILES, resume=False, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "notes.txt"]


def test_overwrite_follows_no_link(tmp_path):
    make(tmp_path, "elsewhere/precious.txt", f"out/{STATE_FILE}")
    (tmp_path / "out" / "checkpoint-1").symlink_to(tmp_path / "elsewhere")
    claim(tmp_path / "out", MARKS, MODEL_FILES, resume=False, overwrite=True)
    assert (tmp_path / "elsewhere" / "precious.txt").exists()


def test_a_result_never_replaces_its_own_base(tmp_path):
    with pytest.raises(ConfigError, match="same folder"):
        refuse_same_folder(tmp_path / "a" / "..", model=str(tmp_path))
    refuse_same_folder(tmp_path / "out", model=str(tmp_path), fisher=None, anchor="org/model")

"""Output folders: never written into by accident, and never emptied of what is not ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from ..errors import ConfigError
from ..files import STATE_FILE

# what EWCTrainer and `save_pretrained` write
MODEL_FILES = (
    *("model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "README.md"),
    *("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *(STATE_FILE, "training_args.bin", "trainer_state.json", "checkpoint-*"),
)


def claim(
    folder: str | Path,
    marks: Iterable[str],
    ours: Iterable[str],
    *,
    resume: bool | None,
    overwrite: bool,
    setting: str = "output_dir",
) -> None:
    """
    Make sure that an output folder may be written into.

    Args:
        folder (`str` or `Path`): the folder.
        marks: patterns of which one must match before anything is deleted; they are named like nothing else.
        ours: patterns of the files and folders that `overwrite` deletes.
        resume (`bool`, *optional*): what is there will be continued; `None` where that is not on offer.
        overwrite (`bool`): what is ours will be deleted.
        setting (`str`, *optional*): name of the setting, for messages.

    Raises:
        [`ConfigError`]: the folder is not empty and neither is set, or it was not written by this command.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ConfigError(f"`{setting}: {folder}` is a file. Name a folder. Nothing was started.")
    if not folder.is_dir() or not any(folder.iterdir()) or (resume and not overwrite):
        return
    if not overwrite:
        ways = "`--overwrite` to replace what lies" if resume is None else "`--resume` to continue what was begun"
        again = "" if resume is None else ", `--overwrite` to begin again"
        raise ConfigError(
            f"`{setting}: {folder}` is not empty. Add {ways} there{again}, or name another folder. Nothing was started."
        )
    if not any(match for mark in marks for match in folder.glob(mark)):
        raise ConfigError(
            f"`--overwrite` only deletes what this command wrote, and `{setting}: {folder}` holds something else. Name "
            "another folder. Nothing was deleted."
        )
    for pattern in ours:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def refuse_same_folder(output_dir: str | Path, **inputs: str | list[str] | None) -> None:
    """Raise a [`ConfigError`] when a result would be written over what it is made from."""
    named = [(name, source) for name, given in inputs.items() for source in (given if isinstance(given, list) else [given])]
    for name, source in named:
        if source is not None and Path(source).is_dir() and Path(source).resolve() == Path(output_dir).resolve():
            raise ConfigError(
                f"`output_dir` and `{name}` are the same folder, {source}: the result would replace what it is measured "
                "against. Name another `output_dir`. Nothing was started."
            )


def read_state(folder: str | Path) -> dict:
    """`ewc_state.json` of a trained model; empty for any other."""
    path = Path(folder) / STATE_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

"""What a run was made of, written down so that it is never continued with something else."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from ..artifact import BaseModel
from ..config import EvaluationConfig
from ..errors import ConfigError
from ..files import write_atomically


def refuse_changes(then: dict, now: dict, title: str) -> None:
    """Raise a [`ConfigError`] that shows every setting which differs from the recorded one."""
    then, now = _flat(json.loads(_dumps(then))), _flat(json.loads(_dumps(now)))
    changed = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    if changed:
        lines = "\n".join(f"    {key:<32} then {then.get(key)}   now {now.get(key)}" for key in changed)
        raise ConfigError(
            f"{title}:\n{lines}\nRestore them, or choose another `output_dir`, or start afresh with `--overwrite`."
        )


def check_recorded(path: Path, record: dict) -> bool:
    """Whether `path` is there; [`ConfigError`] if it was written under other settings."""
    if path.is_file():
        refuse_changes(read_json(path)["settings"], record, f"'{path.parent}' was begun with other settings")
    return path.is_file()


def content_of(evaluation: EvaluationConfig) -> dict[str, Any]:
    """What is measured, with local files by their content: they may move, but not change."""
    found = {name: value for name, value in asdict(evaluation).items() if name not in ("batch_size", "device", "revision")}
    for kind in ("texts", "questions"):
        for name, source in found[kind].items():
            if Path(source).is_file():
                found[kind][name] = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    return found


def describe(model: BaseModel) -> dict[str, Any]:
    name = Path(model.id).name if Path(model.id).is_dir() else model.id  # not where it lies on this machine
    return {"id": name, **{k: getattr(model, k) for k in ("revision", "fingerprint", "architecture", "num_parameters")}}


def versions() -> dict[str, str]:
    """Versions of what can move the figures."""
    names = ("torch", "transformers", "trl", "accelerate", "bitsandbytes", "lm_eval")
    return {"hf_ewc": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, _dumps(content))


def _dumps(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n"


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat

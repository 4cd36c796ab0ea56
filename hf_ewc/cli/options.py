"""One YAML file and flags → dataclasses, through [`~trl.TrlParser`], with every problem found before anything starts.

TRL's parser stops at the first problem, prints 800 lines of usage, and ignores `--config=FILE`. Here all unknown, removed,
mistyped and missing settings of file and flags are reported together, with what the dataclasses' own `problems()` say.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from ..config import raise_problems

SHARE = "a number below 1 is the share of all steps, such as `warmup_steps: 0.05`"

# Settings that were renamed or removed (in transformers 5, TRL 1, or against TRL's own scripts), and what to write instead: a
# setting of that name, and a remark. Without a setting, the remark is the answer.
RENAMED: dict[str, tuple[str | None, str]] = {
    "warmup_ratio": ("warmup_steps", SHARE),
    "torch_dtype": ("dtype", ""),
    "overwrite_output_dir": ("overwrite", ""),
    "evaluation_strategy": ("eval_strategy", ""),
    "group_by_length": ("train_sampling_strategy", "`train_sampling_strategy: group_by_length`"),
    "no_cuda": ("use_cpu", ""),
    "max_seq_length": ("max_length", ""),
    "model_name_or_path": ("model", ""),
    "model_name": ("model", ""),
    "model_revision": ("revision", ""),
    "dataset_name": ("dataset", ""),
    "dataset_path": ("dataset", ""),
    "dataset_train_split": ("dataset_split", ""),
    "dataset_streaming": ("streaming", ""),
    "resume_from_checkpoint": ("resume", "it finds the last complete checkpoint in `output_dir` by itself"),
    "text_column": ("dataset_text_field", ""),
    "lambda": ("ewc_lambda", ""),
    "lr": ("learning_rate", ""),
    "epochs": ("num_train_epochs", ""),
    "batch_size": ("per_device_train_batch_size", ""),
    "tokenizer": (None, "the tokenizer is the one in the model's folder or repository"),
    "tokenizer_name": (None, "the tokenizer is the one in the model's folder or repository"),
    "save_safetensors": (None, "models are always written as safetensors; remove it"),
    "logging_dir": (None, "set the environment variable `TENSORBOARD_LOGGING_DIR` instead"),
    "use_peft": (None, "adapters leave the base weights frozen, so there is nothing for EWC to protect"),
    "load_in_4bit": (None, "quantised weights are frozen, so there is nothing for EWC to protect"),
    "load_in_8bit": (None, "quantised weights are frozen, so there is nothing for EWC to protect"),
    "env": (None, "set environment variables in front of the command: `NAME=value hf-ewc …`"),
}


def parse(
    command: str,
    argv: list[str],
    *types_: type,
    required: tuple[str, ...] = (),
    defaults: Callable[[dict[str, Any]], dict[str, Any]] = lambda given: {},
) -> tuple[Any, ...]:
    """
    Read `--config FILE` and flags into one instance per dataclass.

    Args:
        command (`str`): name for the error's title, such as `"train"`.
        argv (`list[str]`): `--key value`, `--key=value`, `--flag`, `--no-flag`; dashes or underscores; lists as several words.
        types_ (`type`): dataclasses without a field name in common.
        required (`tuple[str, ...]`, *optional*): fields that must be given although their dataclass has a default.
        defaults (`Callable`, *optional*): the given values → values for what was not given, instead of the dataclasses' own.

    Raises:
        [`ConfigError`]: one error that lists everything that is wrong.
    """
    known: dict[str, Field] = {f.name: f for t in types_ for f in fields(t) if f.init}
    hints = {name: hint for t in types_ for name, hint in typing.get_type_hints(t).items()}
    problems: list[str] = []
    given = _given(argv, problems)
    values: dict[str, Any] = {}
    for key, (value, source) in given.items():
        name = key
        if key not in known and key.startswith("no_") and value is True and key[3:] in known:
            name, value = key[3:], False
        if name not in known or RENAMED.get(name, (None,))[0] in known:
            problems.append(_unknown(key, source, known))
            continue
        try:
            values[name] = convert(value, hints[name])
        except ValueError as error:
            problems.append(f"`{name}: {_shown(value)}` ({source}): {error}.")
    values = {**defaults(values), **values}
    for name, field in known.items():
        must = name in required or (field.default is MISSING and field.default_factory is MISSING)
        if must and name not in given:
            problems.append(f"`{name}` is missing. {field.metadata.get('help', '')}".rstrip())
        if must and values.get(name) is None:
            values[name] = None  # so that the instances can be made and asked for their problems, too

    instances: tuple[Any, ...] = ()
    parser = TrlParser(list(types_))  # type: ignore[arg-type]
    parser.set_defaults_with_config(**values)
    try:
        instances = parser.parse_args_into_dataclasses(args=[], look_for_args_file=False)
    except (ValueError, TypeError, ImportError) as error:  # raised by a `__post_init__`, with words of its own
        problems.append(str(error))
    for instance in instances:
        problems += getattr(instance, "problems", list)()
    raise_problems(f"these settings cannot run (see `hf-ewc {command} --help`); nothing was started", problems)
    return instances


def _given(argv: list[str], problems: list[str]) -> dict[str, tuple[Any, str]]:
    """Setting → (value, where it was given); flags override the file."""
    flags: dict[str, tuple[Any, str]] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            problems.append(f"`{word}` belongs to no setting; write `--key {word}`.")
            continue
        key, equals, value = word[2:].partition("=")
        following: list[str] = [value] if equals else []
        while not equals and words and not words[0].startswith("--"):
            following.append(words.pop(0))
        flags[key.replace("-", "_")] = (
            True if not following else following[0] if len(following) == 1 else following,
            "on the command line",
        )
    path, _ = flags.pop("config", (None, ""))
    return {**_read_yaml(path, problems), **flags}


def _read_yaml(path: Any, problems: list[str]) -> dict[str, tuple[Any, str]]:
    if path is None:
        return {}
    if not isinstance(path, str):
        problems.append("`--config` takes one YAML file.")
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"`--config {path}` cannot be read: {error}.")
        return {}
    except yaml.YAMLError as error:
        problems.append(f"`--config {path}` is not YAML: {' '.join(str(error).split())}.")
        return {}
    if content is not None and not isinstance(content, dict):
        problems.append(f"`--config {path}` must hold `key: value` lines, not a {type(content).__name__}.")
        return {}
    return {str(key).replace("-", "_"): (value, f"in {path}") for key, value in (content or {}).items()}


def _unknown(key: str, source: str, known: dict[str, Field]) -> str:
    successor, remark = RENAMED.get(key, (None, ""))
    if successor in known:
        return f"`{key}` ({source}) is not a setting any more or here: write `{successor}`{f'; {remark}' if remark else ''}."
    if key in RENAMED and successor is None:
        return f"`{key}` ({source}) is not a setting here: {remark}."
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f" Did you mean `{close[0]}`?" if close else ""
    return f"`{key}` ({source}) is not a setting of this command.{hint}"


def convert(value: Any, hint: Any) -> Any:
    """
    Turn what YAML or the command line gave into what the type hint asks for; a `ValueError` says what was expected.

    YAML reads `2e-4` as a string and `no` as `False`; a flag is always a string. Whatever could mean two things is refused.
    """
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if Any in members:
        return value
    if type(None) in members and (value is None or (isinstance(value, str) and value.lower() in ("null", "~"))):
        return None
    members = tuple(member for member in members if member is not type(None))
    choices = [c.value for m in members if isinstance(m, type) and issubclass(m, Enum) for c in m]
    if choices:
        value = "no" if value is False and "no" in choices else value  # `save_strategy: no`
        if value not in choices:
            raise ValueError(f"it must be one of {', '.join(map(str, choices))}")
        return value
    if not isinstance(value, str) and any(_origin(m) is type(value) and _origin(m) is not list for m in members):
        return value
    reasons = []
    # a word on the command line for `int | str` is a number if it can be one; for `str | list[str]` it stays one string
    order = [int, float, dict, str]
    for member in sorted(members, key=lambda m: order.index(_origin(m)) if _origin(m) in order else len(order)):
        try:
            return _convert_to(value, member)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(" or ".join(dict.fromkeys(reasons)))


def _origin(hint: Any) -> Any:
    return typing.get_origin(hint) or hint


def _convert_to(value: Any, hint: Any) -> Any:
    origin = _origin(hint)
    if origin is bool:
        return _boolean(value)
    if origin in (int, float):
        return _number(value, origin)
    if origin is list:
        items = value if isinstance(value, list) else value.split(",") if isinstance(value, str) else [value]
        return [convert(item, (typing.get_args(hint) or (Any,))[0]) for item in items]
    if origin is dict:
        return _mapping(value)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"it must be one of {', '.join(map(str, typing.get_args(hint)))}")
        return value
    if origin is str and not isinstance(value, str):
        if isinstance(value, (int, float)) and value is not True:
            raise ValueError("text is expected, and YAML reads this as something else; put it in quotes")
        raise ValueError("text is expected")
    if not isinstance(value, origin):
        raise ValueError(f"a {getattr(origin, '__name__', origin)} is expected")
    return value


def _boolean(value: Any) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, (str, int)) and str(value).lower() in words:
        return words[str(value).lower()]
    raise ValueError("true or false is expected")


def _number(value: Any, kind: type) -> int | float:
    wanted = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{wanted} is expected")
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"{wanted} is expected") from None
    if number != number or (kind is int and not number.is_integer()):
        raise ValueError(f"{wanted} is expected")
    return int(number) if kind is int else number


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    words = value if isinstance(value, list) else [value]
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return dict(json.loads(value))
        except ValueError as error:
            raise ValueError(f"this is not JSON ({error})") from None
    if not all(isinstance(word, str) and "=" in word for word in words):
        raise ValueError("`name=value` pairs, JSON in quotes, or a YAML mapping are expected")
    return dict(word.split("=", 1) for word in words)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)

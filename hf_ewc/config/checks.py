"""How every config reports its mistakes: all of them at once, in words that end in an action."""

from __future__ import annotations

from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..errors import ConfigError

DTYPES = ("float32", "bfloat16")


def raise_problems(title: str, problems: list[str]) -> None:
    """Raise one [`ConfigError`] that lists every problem, or return when there is none."""
    if problems:
        raise ConfigError(f"{title}:\n" + "\n".join(f"  - {problem}" for problem in problems))


def choice(name: str, value: Any, allowed: tuple[str, ...], remark: str = "") -> list[str]:
    if value in allowed:
        return []
    return [f"`{name}: {value}` is not one of {', '.join(allowed)}.{remark}"]


def at_least(name: str, value: float | None, least: float) -> list[str]:
    if value is None or value >= least:
        return []
    return [f"`{name}` must be at least {least}, got {value}."]


def is_repo_id(name: str) -> bool:
    """Whether `name` has the form of an id on the Hub with its owner, `user/name`. Says nothing about whether it exists."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name

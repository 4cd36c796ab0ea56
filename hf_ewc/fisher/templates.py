"""How rows become a prompt and its scored continuation. `evaluation/` asks its questions in the same words."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..data import LETTERS


def render_question(question: str, choices: Sequence[str]) -> str:
    r"""
    MMLU's prompt, as lm-evaluation-harness words it (its white space included, because the Fisher should protect the very
    prediction that is measured later).

    Example:

    ```python
    >>> print(render_question("Which animal barks?", ["cat", "dog"]))
    Which animal barks?
    A. cat
    B. dog
    Answer:
    ```
    """
    lines = [question.strip(), *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)), "Answer:"]
    return "\n".join(lines)


def render_answer(answer: int) -> str:
    """The scored continuation of [`render_question`]: a space and the letter of choice `answer`, such as `" B"`."""
    return f" {LETTERS[answer]}"


def template_sha256(probe: str) -> str:
    """Fingerprint of the wording: another wording is another probe, so that the artifact records it. (A task of
    lm-evaluation-harness brings its own wording, see [`settings_sha256`].)"""
    wordings = {
        "mmlu": render_question("{question}", ["{0}", "{1}", "{2}", "{3}"]) + render_answer(0),
        "completion": "{prompt}{completion}",
        "text": "{text}",
        "tokens": "{input_ids}{labels}",
    }
    return hashlib.sha256(wordings[probe].encode()).hexdigest()


def settings_sha256(settings: Mapping[str, Any]) -> str:
    """Fingerprint of templates given as settings, of functions their source; independent of the process and of key order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=_source).encode()).hexdigest()


def _source(value: Any) -> str:
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):  # `str` would hold an address, another one in each process
        return getattr(value, "__qualname__", type(value).__qualname__)

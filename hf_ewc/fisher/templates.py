"""How rows become a prompt and its scored continuation. `evaluation/` asks its questions in the same words."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

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
    """Fingerprint of the wording: another wording is another probe, so that the artifact records it."""
    wordings = {
        "mmlu": render_question("{question}", ["{0}", "{1}", "{2}", "{3}"]) + render_answer(0),
        "completion": "{prompt}{completion}",
        "text": "{text}",
        "tokens": "{input_ids}{labels}",
    }
    return hashlib.sha256(wordings[probe].encode()).hexdigest()

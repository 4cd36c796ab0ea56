"""Which prompts and texts can be used, and in words why others cannot."""

from __future__ import annotations

from dataclasses import dataclass

from .limits import Limits
from .pair import ModelPair
from .problems import CompareError


@dataclass(frozen=True)
class PromptCheck:
    """
    Whether a prompt can be written on.

    Parameters:
        tokens (`int`, *optional*): Its length with everything the tokenizer or the chat template adds; `None` if it was refused
            before it was counted.
        limit (`int`): The longest prompt in tokens: the context but for one new token, or less where `Limits` says so.
        problem ([`CompareError`], *optional*): Why it is refused; `str(problem)` is for the page. `None` for a good prompt.
    """

    tokens: int | None
    limit: int
    problem: CompareError | None = None


def check_prompt(pair: ModelPair, text: str, limits: Limits | None = None) -> PromptCheck:
    """
    Count a prompt, and say in words why it cannot be used. Text is taken as it is: control characters, any script, HTML.

    Example:

    ```python
    >>> check_prompt(pair, "Vilnius yra")
    PromptCheck(tokens=4, limit=8191, problem=None)
    >>> str(check_prompt(pair, "la " * 30_000).problem)
    'the prompt has 90,000 characters, and 20,000 are the most. Shorten it.'
    ```
    """
    limits = limits or Limits()
    limit = min(limits.prompt_tokens, (pair.context or limits.prompt_tokens + 1) - 1)
    if problem := text_problem(text, limits.prompt_characters, "prompt"):
        return PromptCheck(None, limit, problem)
    tokens = max(pair.encode(side, text)["input_ids"].shape[1] for side in pair.sides)
    if tokens > limit:
        problem = CompareError(
            "tokens",
            f"the prompt has {tokens:,} tokens, and {limit:,} are the most that leave the models room to write. Shorten it.",
            found=tokens,
            limit=limit,
        )
    elif not tokens:  # a tokenizer without BOS whose normaliser drops every character
        problem = CompareError("empty", "the prompt holds nothing that the tokenizer knows. Write something.")
    return PromptCheck(tokens, limit, problem)


def text_problem(text: str, longest: int, what: str) -> CompareError | None:
    """What is wrong with a text before it is tokenised: too long (found at once, whatever its length), empty, not Unicode."""
    if not isinstance(text, str):  # a program may send anything
        return CompareError("setting", f"the {what} is {type(text).__name__}, and it must be text.", name=what)
    if len(text) > longest:
        return CompareError(
            "characters",
            f"the {what} has {len(text):,} characters, and {longest:,} are the most. Shorten it.",
            found=len(text),
            limit=longest,
        )
    if not text.strip():
        return CompareError("empty", f"the {what} is empty. Write something.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return CompareError(
            "not_text",
            f"character {error.start + 1} of the {what} is half of a character (a lone surrogate), which no tokenizer takes. "
            "Write or paste it again.",
            position=error.start,
        )
    return None

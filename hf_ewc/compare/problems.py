"""What may be said on a page: problems in words for a visitor, without paths, tokens or tracebacks."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch

from ..errors import EWCError
from ..hub import scrubbed

LONGEST_MESSAGE = 600  # characters; an error of a library may quote a whole configuration

_START = r"(?:file://)?(?:~|\.{1,2})?/"
_QUOTED_PATH = re.compile(rf"(?P<quote>['\"`]){_START}(?P<path>[^'\"`\n]*)(?P=quote)")
_BARE_PATH = re.compile(rf"(?<![\w:/.~-]){_START}(?P<path>[^\s/'\"`,;()]+(?:/[^\s/'\"`,;()]*)+)")


class CompareError(EWCError):
    """
    A request that cannot be answered, with a message that is fit for the page as it is.

    Parameters:
        code (`str`):
            The kind of problem, for a translation: `"empty"`, `"not_text"`, `"characters"`, `"tokens"`, `"setting"`, `"busy"`,
            `"rate"`, `"loading"`, `"not_finite"`, `"tokenizer"`, `"vote"`, `"memory"`, `"no_fisher"`, `"stopped"`.
        message (`str`): It, in English.
        facts: The values in the message, by name, for a translation: `limit=20000, found=100000`.
    """

    def __init__(self, code: str, message: str, **facts: Any):
        super().__init__(message)
        self.code = code
        self.facts = facts

    def __reduce__(self) -> Any:  # a device that is lent may be in another process
        return partial(type(self), self.code, str(self), **self.facts), ()


def problem_code(error: BaseException) -> str:
    """`code` of a [`CompareError`]; `"memory"`, `"model"` (it cannot be loaded or used) or `"failed"` for other errors."""
    if isinstance(error, CompareError):
        return error.code
    if _out_of_memory(error):
        return "memory"
    return "model" if isinstance(error, EWCError) else "failed"


def public_message(error: BaseException) -> str:
    """
    What a page may show of an error: one paragraph, without tokens and tracebacks, and only the last name of a path.

    An error that this package did not word itself is a fault here, not the visitor's, and its text may hold anything; the
    page then names its type only. The caller should log it.

    Example:

    ```python
    >>> public_message(DataError("'/home/ona/models/adapted' holds no model.safetensors"))
    "'adapted' holds no model.safetensors"
    >>> public_message(KeyError("/etc/passwd"))
    'something went wrong on the server (KeyError). Its owner finds the details in the log.'
    ```
    """
    if _out_of_memory(error):
        return "the server has not enough free memory for this. Try a shorter text, or again in a minute."
    if not isinstance(error, EWCError):
        return f"something went wrong on the server ({type(error).__name__}). Its owner finds the details in the log."
    text = scrubbed(str(error)).split("Traceback (most recent call last)")[0]
    text = _QUOTED_PATH.sub(lambda found: found["quote"] + _last_name(found["path"]) + found["quote"], text)
    text = " ".join(_BARE_PATH.sub(lambda found: _last_name(found["path"]), text).split())
    return text if len(text) <= LONGEST_MESSAGE else text[: LONGEST_MESSAGE - 1] + "…"


def _last_name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or "…"


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # what torch raises on the CPU

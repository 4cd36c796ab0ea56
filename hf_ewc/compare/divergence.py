"""Where two texts part, without cutting what a reader sees as one character."""

from __future__ import annotations

import unicodedata
from itertools import takewhile

_JOINER = "\u200d"


def diverges_at(left: str, right: str) -> int | None:
    """
    Index of the first character where two texts part; `None` if they are the same.

    What readers see as one character is not cut: neither a letter from its accents, nor a joined emoji, a flag, a Hangul
    syllable or a line break of two. If one text is the beginning of the other, they part where it ends.

    Example:

    ```python
    >>> diverges_at("Vilnius yra miestas", "Vilnius yra sostinė")
    12
    ```
    """
    if left == right:
        return None
    at = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
    while at and (_inside(left, at) or _inside(right, at)):
        at -= 1
    return at


def _inside(text: str, at: int) -> bool:
    """Whether `at` lies within what is seen as one character."""
    if at >= len(text):
        return False
    before, after = text[at - 1], text[at]
    if before == _JOINER or after == _JOINER or (before, after) == ("\r", "\n"):
        return True
    if unicodedata.category(after).startswith("M") or "\U0001f3fb" <= after <= "\U0001f3ff" or _is_tag(after):
        return True  # accents and variation selectors, skin tones, the letters of subdivision flags
    if "\ud800" <= before <= "\udbff" and "\udc00" <= after <= "\udfff":
        return True
    if "\u1160" <= after <= "\u11ff":
        return "\u1100" <= before <= "\u11ff" or "\uac00" <= before <= "\ud7a3"  # the rest of a syllable that is spelled out
    return _is_flag_letter(after) and _flag_letters_before(text, at) % 2 == 1


def _is_tag(character: str) -> bool:
    return "\U000e0020" <= character <= "\U000e007f"


def _is_flag_letter(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"


def _flag_letters_before(text: str, at: int) -> int:
    count = 0
    while count < at and _is_flag_letter(text[at - 1 - count]):
        count += 1
    return count

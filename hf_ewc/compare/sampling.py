"""How both sides write: length, greedy or drawn, and the seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .limits import Limits
from .problems import CompareError


@dataclass(frozen=True)
class Sampling:
    """
    How both sides write. The defaults are the greedy preset; the other settings count with `greedy=False` only.

    Parameters:
        max_new_tokens (`int`, *optional*, defaults to 64): The most that each side writes.
        greedy (`bool`, *optional*, defaults to `True`): Always the likeliest token.
        temperature (`float`, *optional*, defaults to 0.8): Above 0; below 1 sharpens, above 1 flattens the distribution.
        top_p (`float`, *optional*, defaults to 0.95): Share of the probability that is drawn from; 1 for all.
        top_k (`int`, *optional*, defaults to 50): Number of tokens that are drawn from; 0 for all.
        seed (`int`, *optional*, defaults to 0): Of the random numbers, the same for both sides.
    """

    max_new_tokens: int = 64
    greedy: bool = True
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 50
    seed: int = 0

    def checked(self, limits: Limits | None = None) -> Sampling:
        """These settings, whole numbers as `int` (sliders send `64.0`); a [`CompareError`] names the first that cannot be."""
        most = (limits or Limits()).new_tokens
        return replace(
            self,
            max_new_tokens=_whole("max_new_tokens", self.max_new_tokens, 1, most),
            greedy=bool(self.greedy),
            temperature=_number("temperature", self.temperature, 0.01, 100),
            top_p=_number("top_p", self.top_p, 0.01, 1),
            top_k=_whole("top_k", self.top_k, 0, 2**31),
            seed=_whole("seed", self.seed, 0, 2**53),  # beyond, a browser's numbers are no longer exact
        )

    def generate_kwargs(self) -> dict[str, Any]:
        """The same for `model.generate`."""
        if self.greedy:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1}
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": True, "num_beams": 1, **drawn}


def _number(name: str, value: Any, least: float, most: float) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most  # NaN compares false
    if not good:
        raise CompareError(
            "setting",
            f"{name} is {value!r}, and it must be a number from {least} to {most}.",
            name=name,
            least=least,
            most=most,
        )
    return value


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise CompareError("setting", f"{name} is {value}, and it must be a whole number.", name=name, least=least, most=most)
    return int(_number(name, value, least, most))

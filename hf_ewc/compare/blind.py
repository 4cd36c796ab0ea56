"""Blind comparison: sides in random order, one vote, and only then the names."""

from __future__ import annotations

import logging
import random
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from .problems import CompareError

logger = logging.getLogger(__name__)

T = TypeVar("T")
Vote = Literal["left", "right", "both_good", "both_bad"]

VOTES: tuple[Vote, ...] = ("left", "right", "both_good", "both_bad")
OUTCOMES = ("base", "adapted", "both_good", "both_bad")

_VOTING = threading.Lock()  # of all rounds: a round itself must be copyable, as pages copy the state of a session


@dataclass(frozen=True)
class Reveal:
    """
    What a vote brings to light.

    Parameters:
        vote (`str`): `"left"`, `"right"`, `"both_good"` or `"both_bad"`.
        left (`str`), right (`str`): Which model stood there: `"base"` or `"adapted"`.
        outcome (`str`): `"base"`, `"adapted"`, `"both_good"` or `"both_bad"`.
    """

    vote: Vote
    left: str
    right: str
    outcome: str


class BlindRound:
    """
    One prompt, two texts in random order, one vote.

    Which side is which is asked of the operating system's random numbers, so that no seed on the page gives it away; it is in
    neither the `repr` nor any public attribute before the vote.

    Parameters:
        rng (`random.Random`, *optional*): Decides the order; for tests.

    Example:

    ```python
    >>> blind = BlindRound()
    >>> left, right = blind.order(frame.base, frame.adapted)
    >>> tally.vote(blind, "left").outcome
    'adapted'
    ```
    """

    def __init__(self, rng: random.Random | None = None):
        self._swapped = (rng or secrets.SystemRandom()).random() < 0.5
        self._vote: Vote | None = None

    def __repr__(self) -> str:
        return f"BlindRound(voted={self.voted})"

    @property
    def voted(self) -> bool:
        return self._vote is not None

    def order(self, base: T, adapted: T) -> tuple[T, T]:
        """The two, as (left, right)."""
        return (adapted, base) if self._swapped else (base, adapted)

    def vote(self, vote: str) -> Reveal:
        """Vote, once, and see which side was which. (Use [`Tally.vote`], which counts it, too.)"""
        if vote not in VOTES:
            raise CompareError("vote", f"'{vote}' is no vote. Vote one of: {', '.join(VOTES)}.", found=vote)
        with _VOTING:  # two quick clicks arrive in two threads
            if self._vote is not None:
                raise CompareError("vote", f"this round has its vote already ('{self._vote}'). Start another one.", found=vote)
            self._vote = vote
        return self.reveal()

    def reveal(self) -> Reveal:
        """Which side was which; a [`CompareError`] before the vote."""
        if self._vote is None:
            raise CompareError("vote", "which side is which is shown after the vote. Vote first.")
        left, right = self.order("base", "adapted")
        return Reveal(self._vote, left, right, {"left": left, "right": right}.get(self._vote, self._vote))


class Tally:
    """
    Counts of the outcomes of blind rounds, for all visitors since the page started. Nothing else is kept or stored.

    Parameters:
        counts (`Mapping[str, int]`, *optional*): To go on from, as [`Tally.to_dict`] gave them.
        sink (`Callable[[dict], None]`, *optional*):
            Called with one record per vote, where the owner wants them stored (a page must say so). Its failure is logged and
            costs nobody the vote. The record holds `vote`, `left`, `right`, `outcome` and the `details` of the call.

    Example:

    ```python
    >>> tally = Tally()
    >>> tally.vote(blind, "both_good")
    Reveal(vote='both_good', left='adapted', right='base', outcome='both_good')
    >>> tally.to_dict()
    {'base': 0, 'adapted': 0, 'both_good': 1, 'both_bad': 0}
    ```
    """

    def __init__(self, counts: Mapping[str, int] | None = None, sink: Callable[[dict[str, Any]], None] | None = None):
        self._counts = {outcome: int((counts or {}).get(outcome, 0)) for outcome in OUTCOMES}
        self._sink = sink
        self._lock = threading.Lock()

    def store(self, sink: Callable[[dict[str, Any]], None]) -> None:
        """Store votes from now on: see `sink`."""
        self._sink = sink

    @property
    def stores(self) -> bool:
        """Whether votes go anywhere but into these counts; the page must say which."""
        return self._sink is not None

    def vote(self, blind: BlindRound, vote: str, **details: Any) -> Reveal:
        """Vote in a round and count it. A second vote in the same round raises [`CompareError`] and counts nothing."""
        reveal = blind.vote(vote)
        with self._lock:
            self._counts[reveal.outcome] += 1
        if self._sink is not None:
            try:
                self._sink({**details, **asdict(reveal)})
            except Exception:
                logger.exception("A vote was counted, but it could not be stored.")
        return reveal

    def to_dict(self) -> dict[str, int]:
        """`base`, `adapted`, `both_good` and `both_bad`, ready for JSON."""
        with self._lock:
            return dict(self._counts)

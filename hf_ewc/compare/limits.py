"""What one visitor may ask for, how often, and how many are served at once."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from .problems import CompareError

T = TypeVar("T")

_POLL_SECONDS = 0.05  # how soon a visitor who stops while waiting for a place is let go


@dataclass(frozen=True)
class Limits:
    """
    Limits of a page. The context of the models holds besides.

    Parameters:
        prompt_characters (`int`): Longest prompt; checked before it is tokenised, as that alone takes long for a book.
        prompt_tokens (`int`): Longest prompt in tokens.
        new_tokens (`int`): The most that a visitor may ask for per side.
        score_characters (`int`), score_tokens (`int`): Longest text to be scored.
        slots (`int`): Streams and scores that run at once, see [`Slots`].
        wait_seconds (`float`): How long one waits for a slot before it is told that the page is busy.
        per_minute (`float`), burst (`int`): See [`RateLimit`].
    """

    prompt_characters: int = 20_000
    prompt_tokens: int = 4096
    new_tokens: int = 256
    score_characters: int = 10_000
    score_tokens: int = 4096
    slots: int = 2
    wait_seconds: float = 30.0
    per_minute: float = 20.0
    burst: int = 5


class Slots:
    """
    `n` places: whoever finds none waits, and is told that the page is busy after `wait_seconds`.

    A place is taken when the work begins and given back when it ends *however* it ends: finished, failed, closed by the page
    because the visitor left, or collected as garbage. A stream that was made and never begun takes none.

    Example:

    ```python
    >>> slots = Slots(2, wait_seconds=30)
    >>> for frame in slots.guard(lambda: stream(pair, prompt, sampling, stop), stop):
    ...     yield frame
    >>> with slots.take():
    ...     scores = score(pair, text)
    ```
    """

    def __init__(self, n: int, wait_seconds: float = 30.0):
        if n < 1:
            raise ValueError(f"a page with {n} slots serves nobody. Give at least 1.")
        self.n = n
        self.wait_seconds = wait_seconds
        self._free = n
        self._changed = threading.Condition()  # not a lock: a stream may be advanced and closed by different threads

    @property
    def free(self) -> int:
        """Places that nobody holds now."""
        return self._free

    @contextmanager
    def take(self, stop: threading.Event | None = None) -> Iterator[bool]:
        """
        Hold a place for the length of a `with` block.

        Args:
            stop (`threading.Event`, *optional*): Once it is set, waiting ends at once and *without* a place: the block then
                runs with `False`, and should do nothing.

        Raises:
            CompareError: Nobody left within `wait_seconds` (`code="busy"`).
        """
        if not self._acquire(stop):
            yield False
            return
        try:
            yield True
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify()

    def guard(self, start: Callable[[], Iterator[T]], stop: threading.Event | None = None) -> Iterator[T]:
        """
        A stream that holds a place from its first item to its end.

        Args:
            start (`Callable`): Makes the stream to run once there is a place.
            stop (`threading.Event`, *optional*): See [`Slots.take`]. `start` is called even without a place when it is set, as
                a stream that is stopped beforehand costs nothing and says so itself.
        """
        with self.take(stop):
            items = start()
            try:
                yield from items
            finally:
                getattr(items, "close", lambda: None)()  # frees the caches now, not when the garbage is collected

    def _acquire(self, stop: threading.Event | None) -> bool:
        deadline = time.monotonic() + self.wait_seconds
        with self._changed:
            while not self._free:
                left = deadline - time.monotonic()
                if stop is not None and stop.is_set():
                    return False
                if left <= 0:
                    raise CompareError(
                        "busy",
                        f"all {self.n} places are taken, also after {self.wait_seconds:g} s of waiting. Try again in a minute.",
                        slots=self.n,
                        seconds=self.wait_seconds,
                    )
                self._changed.wait(left if stop is None else min(left, _POLL_SECONDS))
            self._free -= 1
            return True


class RateLimit:
    """
    At most `burst` requests at once and `per_minute` in the long run, for each session: a bucket that refills steadily.

    What a session has is kept in memory only, and forgotten once its bucket is full again.

    Parameters:
        per_minute (`float`): Requests that come back per minute.
        burst (`int`): Size of the bucket.
        clock (`Callable`): Seconds; for tests.

    Example:

    ```python
    >>> rate = RateLimit(per_minute=20, burst=5)
    >>> rate.spend(request.session_hash)
    ```
    """

    def __init__(self, per_minute: float = 20.0, burst: int = 5, clock: Callable[[], float] = time.monotonic):
        if per_minute <= 0 or burst < 1:
            raise ValueError(
                f"{per_minute} requests a minute in bursts of {burst} let nobody in. Give more than 0, and at least 1."
            )
        self.per_second = per_minute / 60
        self.burst = burst
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # session: (requests left, at this time)
        self._swept = clock()
        self._lock = threading.Lock()

    def spend(self, session: str, cost: int = 1) -> None:
        """
        Count a request of a session, as `cost` requests (at most a full bucket); a [`CompareError`] with `code="rate"` says in
        how many seconds it may come.
        """
        cost = min(cost, self.burst)
        with self._lock:
            now = self._clock()
            self._sweep(now)
            left, since = self._buckets.get(session, (float(self.burst), now))
            left = min(self.burst, left + (now - since) * self.per_second)
            if left < cost:
                seconds = max(1, math.ceil((cost - left) / self.per_second - 1e-6))
                raise CompareError(
                    "rate",
                    f"that was fast: {self.burst} requests at once, then {self.per_second * 60:g} a minute. Try again in "
                    f"{seconds} s.",
                    seconds=seconds,
                    burst=self.burst,
                    per_minute=self.per_second * 60,
                )
            self._buckets[session] = (left - cost, now)

    def __len__(self) -> int:
        """Sessions that are remembered now."""
        return len(self._buckets)

    def _sweep(self, now: float) -> None:
        full_after = self.burst / self.per_second  # seconds after which any bucket is full, which is what a new one is
        if now - self._swept >= full_after:
            self._buckets = {name: bucket for name, bucket in self._buckets.items() if now - bucket[1] < full_after}
            self._swept = now

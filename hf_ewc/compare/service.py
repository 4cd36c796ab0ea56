"""[`CompareService`]: everything that a page asks for, with limits, places and votes; a face calls it and shows the answers."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..config import CompareConfig
from .between import Between
from .blind import Tally
from .facts import Facts, fisher_of, load_facts
from .generation import Frame, stream
from .limits import Limits, RateLimit, Slots
from .loading import Loader
from .pair import ModelPair
from .problems import CompareError, problem_code
from .prompts import text_problem
from .sampling import Sampling
from .sources import said
from .surprisal import Scores, score

ADAPTED, PLAIN = "adapted", "plain"
REQUEST_TOKENS = 64  # of new text that count as one request
CROWD = 8  # visitors behind one address (a school, an office) who may use the page as one alone does


@dataclass
class _Loaded:
    """What the background thread loads: pairs by name, and between base and each of them, the models at other λ."""

    pairs: dict[str, ModelPair]
    between: dict[str, Between] = field(default_factory=dict)
    no_between: CompareError | None = None  # why there is no λ slider


class CompareService:
    """
    What stands behind a page. Its models load in the background; until then, what needs them raises [`CompareError`]
    (`code="loading"`).

    A `visitor` is any name for one session; one's limits, stops and errors touch nobody else. An `address` of the network may
    send as much as eight visitors.

    Parameters:
        config ([`CompareConfig`]): What to compare.
        limits ([`Limits`], *optional*): Of one visitor; the places are `config.slots`.
        tally ([`Tally`], *optional*): Counts blind votes.
        on_device (`Callable`, *optional*):
            Wraps the two functions that compute, for hardware that is lent per call (`spaces.GPU` on ZeroGPU). What goes in
            and out of them can be pickled.

    Example:

    ```python
    >>> service = CompareService(CompareConfig("google/gemma-2-2b", "me/gemma-2-2b-lt"))
    >>> service.wait()
    >>> for frame in service.write("me", "Vilnius yra"):
    ...     print(frame.base.text, "|", frame.adapted.text)
    ```
    """

    def __init__(
        self,
        config: CompareConfig,
        limits: Limits | None = None,
        tally: Tally | None = None,
        on_device: Callable[[Any], Any] = lambda function: function,
    ):
        self.config = config
        self.limits = limits or Limits()
        self.tally = tally or Tally()
        self.slots = Slots(config.slots, self.limits.wait_seconds)
        self._by_visitor = RateLimit(self.limits.per_minute, self.limits.burst)
        self._by_address = RateLimit(CROWD * self.limits.per_minute, CROWD * self.limits.burst)
        self._running: dict[str, set[threading.Event]] = {}
        self._stopped: dict[str, float] = {}  # visitor: requests that were started until then are unwanted
        self._lock = threading.Lock()
        self._facts = Loader(lambda progress: load_facts(config))
        self._frames, self._scores = on_device(self._frames_of), on_device(self._scores_of)
        self._loader: Loader[_Loaded] = Loader(self._load)

    # what is there

    @property
    def status(self) -> Loader[Any]:
        """Whether the models are there: its `state`, `step` and `problem`."""
        return self._loader

    def wait(self, seconds: float = 600.0) -> None:
        """Until the models are loaded; [`CompareError`] if they cannot be, or are not in time."""
        self._loader.get(seconds)

    @property
    def models(self) -> tuple[str, ...]:
        """Names of what can stand beside the base."""
        return (ADAPTED, PLAIN) if self.config.plain else (ADAPTED,)

    def pair(self, model: str = ADAPTED, merge_lambda: float = 0.0) -> ModelPair:
        """The base and one of [`CompareService.models`], taken back towards the base by λ."""
        loaded = self._loader.get()
        if not isinstance(model, str) or model not in loaded.pairs:
            raise CompareError(
                "setting", f"there is no model {ascii(model)[:40]} here. Name one of: {', '.join(loaded.pairs)}.", name="model"
            )
        if merge_lambda == 0:
            return loaded.pairs[model]
        if loaded.no_between:
            raise loaded.no_between
        return loaded.between[model].pair_at(merge_lambda)

    @property
    def no_slider(self) -> CompareError | None:
        """Why no model between base and adapted can be made here; `None` if it can, or while the models load."""
        return self._loader.get().no_between if self._loader.state == "ready" else None

    @property
    def facts(self) -> Facts:
        """Results, layers and lineage, which are read once, in the background: a Hub that does not answer takes its time."""
        return self._facts.get(600.0)

    @property
    def facts_read(self) -> bool:
        """Whether they are there already, so that nobody waits for them."""
        return self._facts.state != "loading"

    # what a visitor may ask for

    def write(
        self,
        visitor: str,
        prompt: str,
        sampling: Sampling | None = None,
        model: str = ADAPTED,
        merge_lambda: float = 0.0,
        address: str | None = None,
        started: float | None = None,
    ) -> Iterator[Frame]:
        """
        Both models write on from the prompt: see [`stream`]. It waits for a place, ends with the texts so far when the visitor
        stops or leaves, and gives the place back however it ends. `started` is when the visitor asked for it, see
        [`CompareService.stop`].
        """
        self.pair()
        sampling = self._allowed([prompt], self.limits.prompt_characters, "prompt", sampling)
        self._spend(visitor, address, sampling)
        with self._stoppable(visitor, started) as stop:
            yield from self.slots.guard(lambda: self._until(stop, model, merge_lambda, prompt, sampling), stop)

    def natural(
        self,
        visitor: str,
        texts: Sequence[str],
        model: str = ADAPTED,
        merge_lambda: float = 0.0,
        address: str | None = None,
    ) -> list[Scores]:
        """How surprising texts are to both models, see [`score`]; together they are one request."""
        self.pair()
        self._allowed(texts, self.limits.score_characters, "text")
        self._spend(visitor, address)
        with self._placed(visitor):
            return [self._scores(model, merge_lambda, text) for text in texts]

    def move(
        self,
        visitor: str,
        texts: Sequence[str],
        prompt: str,
        sampling: Sampling | None = None,
        model: str = ADAPTED,
        merge_lambda: float = 0.0,
        address: str | None = None,
    ) -> Iterator[list[Scores] | Frame]:
        """A move of the λ slider, which is one request: the scores of texts, then the frames of what is written there."""
        self.pair()
        self._allowed(texts, self.limits.score_characters, "text")
        sampling = self._allowed([prompt], self.limits.prompt_characters, "prompt", sampling)
        self._spend(visitor, address, sampling)
        with self._placed(visitor) as stop:
            yield [self._scores(model, merge_lambda, text) for text in texts]
            yield from self._until(stop, model, merge_lambda, prompt, sampling)

    def stop(self, visitor: str, until: float | None = None) -> None:
        """
        End everything that a visitor has running; its texts so far stay. With `until`, also what it started before then and
        what is still on its way here, as a queue may hold a request for long; it is a moment of the clock that `started` of
        [`CompareService.write`] is read from.
        """
        with self._lock:
            if until is not None:
                self._stopped[visitor] = until
            events = list(self._running.get(visitor, ()))
        for event in events:
            event.set()

    def leave(self, visitor: str) -> None:
        """The visitor has gone: stop everything, and forget it."""
        self.stop(visitor)
        with self._lock:
            self._stopped.pop(visitor, None)

    @property
    def running(self) -> int:
        """Requests that run or wait for a place now."""
        with self._lock:
            return sum(map(len, self._running.values()))

    # how

    def _allowed(self, texts: Sequence[str], longest: int, what: str, sampling: Sampling | None = None) -> Sampling:
        """Refuse what costs nothing to refuse before it is counted."""
        for text in texts:
            if problem := text_problem(text, longest, what):
                raise problem
        return (sampling or Sampling()).checked(self.limits)

    def _spend(self, visitor: str, address: str | None, sampling: Sampling | None = None) -> None:
        """
        Count a request, a long text as several. A visitor's name is the visitor's own choice; an address is harder to change.
        """
        cost = math.ceil(sampling.max_new_tokens / REQUEST_TOKENS) if sampling else 1
        self._by_visitor.spend(visitor, cost)
        if address is not None:
            self._by_address.spend(address, cost)

    def _load(self, progress: Callable[[str], None]) -> _Loaded:
        config = self.config
        pair = ModelPair.load(
            config.base or "",
            config.adapted or "",
            config.base_revision,
            config.adapted_revision,
            config.device,
            config.dtype,
            progress,
        )
        loaded = _Loaded({ADAPTED: pair})
        if config.plain:
            loaded.pairs[PLAIN] = pair.beside(config.plain, config.plain_revision, progress)
        progress("fisher")
        try:
            fisher, note = fisher_of(config)
            if fisher is None:
                loaded.no_between = CompareError("no_fisher", note)
            else:
                loaded.between = {name: Between(pair, fisher) for name, pair in loaded.pairs.items()}
                loaded.no_between = loaded.between[ADAPTED].problem
        except Exception as error:  # the page can do without a slider
            loaded.no_between = CompareError(problem_code(error), said(error))
        return loaded

    def _until(
        self, stop: threading.Event, model: str, merge_lambda: float, prompt: str, sampling: Sampling
    ) -> Iterator[Frame]:
        """
        The frames, until the visitor stops. The event stays on this side: a lent device may be in another process.
        """
        frame = Frame.empty()
        frames = self._frames(model, merge_lambda, prompt, sampling)
        try:
            while not stop.is_set():
                if (following := next(frames, None)) is None:  # a lent device was taken away
                    break
                frame = following
                yield frame
                if frame.finished:
                    return
            yield frame.stopped()
        finally:
            getattr(frames, "close", lambda: None)()

    def _frames_of(self, model: str, merge_lambda: float, prompt: str, sampling: Sampling) -> Iterator[Frame]:
        yield from stream(self.pair(model, merge_lambda), prompt, sampling, limits=self.limits)

    def _scores_of(self, model: str, merge_lambda: float, text: str) -> Scores:
        return score(self.pair(model, merge_lambda), text, self.limits)

    @contextmanager
    def _placed(self, visitor: str) -> Iterator[threading.Event]:
        """A place, and the event that stops; [`CompareError`] for who stopped while waiting, as there is nothing to show."""
        with self._stoppable(visitor) as stop, self.slots.take(stop) as mine:
            if not mine:
                raise CompareError("stopped", "stopped while waiting for a place.")
            yield stop

    @contextmanager
    def _stoppable(self, visitor: str, started: float | None = None) -> Iterator[threading.Event]:
        stop = threading.Event()
        with self._lock:
            self._running.setdefault(visitor, set()).add(stop)
            if started is not None and started <= self._stopped.get(visitor, -math.inf):
                stop.set()
        try:
            yield stop
        finally:
            with self._lock:
                self._running[visitor].discard(stop)
                if not self._running[visitor]:
                    del self._running[visitor]

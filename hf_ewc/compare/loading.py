"""[`Loader`]: models that load while the page is up already."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from ..errors import EWCError
from .problems import CompareError, problem_code, public_message

logger = logging.getLogger(__name__)

T = TypeVar("T")

STEPS = ("find_base", "find_adapted", "load_base", "load_adapted", "find_plain", "load_plain", "fisher")
"""What loading tells that it is at; the last three only where there is such a thing."""


class Loader(Generic[T]):
    """
    Something that loads in the background while the page is up already.

    Parameters:
        load (`Callable[[Callable[[str], None]], T]`): Loads it and tells each step; runs in a thread of its own.

    Attributes:
        state (`str`): `"loading"`, `"ready"` or `"failed"`.
        step (`str`): One of `STEPS`, for the page to show.
        problem (`str`): Why it failed, fit for the page.

    Example:

    ```python
    >>> loader = Loader(lambda progress: ModelPair.load(base, adapted, progress=progress))
    >>> loader.state, loader.step
    ('loading', 'load_base')
    >>> pair = loader.get(timeout=5)
    ```
    """

    def __init__(self, load: Callable[[Callable[[str], None]], T]):
        self.state = "loading"
        self.step = STEPS[0]
        self.problem = ""
        self._load = load
        self._loaded: T | None = None
        self._code = ""
        self._done = threading.Event()
        threading.Thread(target=self._run, name="load-models", daemon=True).start()

    def get(self, timeout: float = 0.0) -> T:
        """
        It, once it is loaded.

        Args:
            timeout (`float`, *optional*, defaults to 0): Seconds to wait for it.

        Raises:
            CompareError: Still loading (`code="loading"`), or why it cannot be loaded.
        """
        self._done.wait(min(timeout, threading.TIMEOUT_MAX))
        if self._loaded is not None:
            return self._loaded
        if self.state == "failed":
            raise CompareError(self._code, self.problem)
        raise CompareError("loading", "the models are still loading. Try again in a minute.", step=self.step)

    def _tell(self, step: str) -> None:
        self.step = step

    def _run(self) -> None:
        try:
            self._loaded = self._load(self._tell)
            self.state = "ready"
        except Exception as error:
            own = isinstance(error, EWCError)  # which says all there is to say
            logger.error("The models of the page cannot be loaded: %s", error, exc_info=None if own else error)
            self.problem, self._code = public_message(error), problem_code(error)
            self.state = "failed"
        finally:
            self._done.set()

"""Ask again when the Hub is busy. The client does that for transfers, but not for commits and questions about repositories."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import httpx2
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RevisionResolutionError

logger = logging.getLogger(__name__)

T = TypeVar("T")
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before the second, third, … attempt


def patiently(call: Callable[[], T]) -> T:
    """The result of `call()`, which may be made several times: again after each failure that passes by itself."""
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            if not passing(error):
                raise
            logger.warning("The Hub failed (%s); asking again in %g s.", type(error).__name__, wait)
            time.sleep(wait)
    return call()


def passing(error: BaseException | None) -> bool:
    """Whether the same request may succeed later: too many of them, a server that failed, a connection that broke."""
    if isinstance(error, RevisionResolutionError):  # what the client raises in place of its cause
        return passing(error.__cause__)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (429, 500, 502, 503, 504)
    return isinstance(error, httpx2.TransportError) and not isinstance(error, (OfflineModeIsEnabled, httpx2.ProxyError))

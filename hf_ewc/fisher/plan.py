"""Which examples run together and where the run pauses, fixed in advance: resuming, halves and processes rely on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """
    Examples between two pauses. At its end the sums are saved; a NaN in it is looked for from its start.

    Attributes:
        start, stop (`int`): examples of the probe, in order.
        batches (`list[tuple[int, list[int]]]`): half (0 or 1, see `stability`) and the examples' numbers.
        compare (`bool`): the halves are compared at its end.
    """

    start: int
    stop: int
    batches: list[tuple[int, list[int]]]
    compare: bool


def plan(
    lengths: Sequence[int],
    batch_size: int,
    save_every: int,
    compare_at: Sequence[int],
    resumed_at: int = 0,
    fixed_batches: bool = False,
) -> list[Window]:
    """
    Cut a probe into windows and these into batches.

    Within a window, a batch holds examples of one half (even or odd numbers) and of similar length, so that little is padded.
    With `fixed_batches` (granularity `batch`, where the batch is part of the result), batches are consecutive examples instead,
    whatever the windows are; then every other batch is of the same half.

    Args:
        lengths (`Sequence[int]`): tokens of each example.
        batch_size (`int`): most examples of a batch.
        save_every (`int`): a window ends at every multiple of it,
        compare_at (`Sequence[int]`): and at these counts,
        resumed_at (`int`, *optional*): and where an earlier run, perhaps with another `save_every`, was interrupted.
    """
    count = len(lengths)
    pauses = {*range(save_every, count, save_every), *compare_at, resumed_at, count} - {0}
    comparisons = set(compare_at)
    if fixed_batches:
        pauses, comparisons = (
            {min(-(-at // batch_size) * batch_size, count) for at in found} for found in (pauses, comparisons)
        )
    windows, start = [], 0
    for stop in sorted(pauses):
        if fixed_batches:
            starts = range(start, stop, batch_size)
            batches = [(first // batch_size % 2, list(range(first, min(first + batch_size, stop)))) for first in starts]
        else:
            batches = []
            for half in (0, 1):
                members = sorted((n for n in range(start, stop) if n % 2 == half), key=lambda n: lengths[n])
                batches += [(half, members[k : k + batch_size]) for k in range(0, len(members), batch_size)]
        windows.append(Window(start, stop, batches, stop in comparisons))
        start = stop
    return windows

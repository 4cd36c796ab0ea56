"""The loop of an estimate whose model and sums are sharded: all processes in lockstep, each with an example of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby

import torch
from transformers import PreTrainedModel

from ..config import FisherConfig
from ..errors import DataError
from .engines import OneByOne
from .examples import Example
from .loop import Loop
from .per_example import Batch
from .plan import Window
from .replicas import Replicas
from .sharded import ShardedSquares
from .stability import Segment, compare
from .state import RunningState


class ShardedLoop(Loop):
    """
    [`Loop`] around [`ShardedSquares`]. What differs: a batch is shared out row by row; an example that is not finite is known
    as such before it is in any sum, so nothing is rolled back; the saved shards of all processes belong together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        squares: ShardedSquares,
        examples: Sequence[Example],
        state: RunningState,
        config: FisherConfig,
        processes: Replicas,
        probe: str | None = None,
    ) -> None:
        self.squares = squares
        # a process that was killed before its shard became the valid one goes on from where the others are
        positions = processes.gather((state.position, state.dropped))
        state.adopt(*max(positions, key=lambda found: found[0]))
        super().__init__(model, OneByOne(model), examples, squares.sums, state, config, processes, probe)

    def _mine(self, window: Window) -> list[list[int]]:
        return [numbers for _, numbers in window.batches]

    def _through(self, window: Window, careful: bool) -> bool:
        dropped = list(self.state.dropped)
        together = self.config.granularity == "batch"
        for half, batches in groupby(window.batches, key=lambda batch: batch[0]):
            self.halves.begin(self.sums)
            for _, numbers in batches:
                batch = self._batch(
                    numbers
                )  # the same on all processes: asking for the options' losses is a pass of all of them
                bad = self._add_together(batch, numbers) if together else self._add_rows(batch, numbers)
                if bad:
                    dropped += bad
                    self._refuse_too_many(dropped)
                self.bar.update(len(numbers))
            self.halves.end(self.sums, half)
        self._dropped_now = dropped
        return True

    def _add_rows(self, batch: Batch, numbers: list[int]) -> list[int]:
        """Each process squares its rows' gradients, one row at a time; returns the numbers of examples that are not finite."""
        count, size, bad = len(batch["input_ids"]), self.processes.size, []
        for first in range(0, count, size):
            finite = self.squares.accumulate(_rows(batch, first + self.processes.rank, first + self.processes.rank + 1))
            bad += [first + rank for rank, fine in enumerate(finite) if not fine]
        if bad and count != len(numbers):
            raise DataError(
                f"one of examples {numbers[0] + 1} to {numbers[-1] + 1} has a NaN or infinite loss or gradient. With "
                f"`labels: {self.config.labels}` an example has several rows, and with `sharding: fsdp2` the others are in the "
                "sums already. Remove the example, or use `sharding: replicate`."
            )
        return [numbers[row] for row in bad]

    def _add_together(self, batch: Batch, numbers: list[int]) -> list[int]:
        """One square of the gradient of all rows, a part of them on each process; each draw is a batch of its own."""
        draws = self.config.draws
        for draw in range(draws):
            rows = {name: values[draw::draws] for name, values in batch.items()}  # their weights, 1/draws, make it a mean
            step = -(-len(rows["input_ids"]) // self.processes.size)
            mine = _rows(rows, step * self.processes.rank, step * (self.processes.rank + 1))
            if not all(self.squares.accumulate_batch(mine)):
                raise DataError(
                    f"among examples {numbers[0] + 1} to {numbers[-1] + 1} one has a NaN or infinite loss or gradient, and a "
                    "batch without it would be another estimate. Remove it; `granularity: example` finds out which one it is."
                )
        return []

    def _save(self, window: Window) -> None:
        if window.compare:
            self.halves.snapshot(window.stop)
        wait = partial(self.processes.gather, None)
        self.state.save(self.sums, window.stop, self._dropped_now, self.halves.state(), agreed=wait)

    def _compare(self, count: int) -> None:
        # every process follows a sample of its own shards; together they are a sample of the model
        parts = self.processes.gather((self.halves.history[count].cpu(), [tuple(s) for s in self.halves.segments]))
        values = torch.cat([part for part, _ in parts], 1)
        segments = [Segment(*segment) for _, found in parts for segment in found]
        self.records.append(compare(values, segments, count, self.probe))

    def _add_up(self) -> None:
        self.dropped = sorted(self.state.dropped)
        self._refuse_too_many(self.dropped, self.used)
        self._warn_of_dropped()


def _rows(batch: Batch, start: int, stop: int) -> Batch | None:
    part = {name: values[start:stop] for name, values in batch.items()}
    return part if len(part["input_ids"]) else None

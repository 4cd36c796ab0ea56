"""The loop of an estimate: from pause to pause, with the sums saved, the halves compared and what is NaN left out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..artifact import StabilityRecord
from ..config import FisherConfig
from ..errors import DataError
from .batched import LeftOver
from .engines import Engine, SummedGradient
from .examples import Example
from .labels import labelled, rows_per_example
from .per_example import Batch, accumulate_squares
from .plan import Window, plan
from .replicas import Replicas
from .stability import SplitHalves, compare, doubling_counts, is_stable
from .state import RunningState

logger = logging.getLogger(__name__)

TRACES = "traces"  # beside the sums in the saved state; no parameter is called so


class Loop:
    """
    Adds up the squares of this process's share of the examples.

    Args:
        model ([`~transformers.PreTrainedModel`]): within `prepared`.
        engine (`Engine`): see `engines`.
        examples (`Sequence[Example]`): of the whole probe; this process takes every `size`-th batch.
        sums (`dict[str, Tensor]`): float32 accumulators.
        state ([`RunningState`]): what a killed run left, and where this one saves.
        config ([`FisherConfig`]), processes ([`Replicas`]): as they are.
        probe (`str`, *optional*): its name in a mixture.

    Attributes:
        dropped (`list[int]`): examples that were left out, of all processes once `run` is through.
        used (`int`): examples of the probe that were looked at; fewer than there are when `until_stable` stopped the run.
        records (`list[StabilityRecord]`): the halves at each doubling.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        engine: Engine,
        examples: Sequence[Example],
        sums: dict[str, Tensor],
        state: RunningState,
        config: FisherConfig,
        processes: Replicas,
        probe: str | None = None,
    ) -> None:
        self.model, self.engine, self.examples, self.sums, self.state = model, engine, examples, sums, state
        self.config, self.processes, self.probe = config, processes, probe
        self.records: list[StabilityRecord] = []
        self.traces: list[float] = []
        fixed = config.granularity == "batch"
        rows = 1 if fixed else rows_per_example(examples, config.labels, config.draws)
        self.windows = plan(
            [len(example.input_ids) for example in examples],
            max(1, config.batch_size // rows),
            config.save_every,
            doubling_counts(len(examples)),
            resumed_at=state.position,
            fixed_batches=fixed,
        )
        self.used = len(examples)
        self.dropped: list[int] = []
        # scored tokens of this process by the end of each window
        mine = ([examples[n].scored for numbers in self._mine(window) for n in numbers] for window in self.windows)
        totals = accumulate(sum(tokens) for tokens in mine)
        self._tokens = {window.stop: max(1, total) for window, total in zip(self.windows, totals, strict=True)}
        self._dropped_now: list[int] = []

    def run(self, progress: bool) -> None:
        """Go through all windows that are not done, add up over processes, and stop where `until_stable` says so."""
        share = sum(len(numbers) for window in self.windows for numbers in self._mine(window))
        with tqdm(total=share, unit="example", desc=self.probe or "Fisher", disable=not progress) as self.bar:
            self._go_back()
            suspicious: set[int] = set()  # where windows start
            number = 0
            while number < len(self.windows):
                window = self.windows[number]
                if window.stop > self.state.position:
                    if not self._clean(window, careful=window.start in suspicious):
                        # Something NaN or infinite is in the sums by now (or a module had to be left out). Back to where they
                        # were right, and through this window with a look at each example before it is added: a second copy of
                        # the sums is never needed.
                        suspicious.add(window.start)
                        self._go_back()
                        number = 0
                        continue
                    self._save(window)
                # every process comes by here, also one that resumed further on, so that all take part in the same comparisons
                if window.compare and len(self.records) <= sum(w.compare for w in self.windows[:number]):
                    self._compare(window.stop)
                    if self.config.until_stable is not None and is_stable(self.records, self.config.until_stable):
                        self.used = window.stop
                        break
                number += 1
        self._add_up()

    # -- one window ----------------------------------------------------------------------------------------------------------

    def _mine(self, window: Window) -> list[list[int]]:
        return [numbers for _, numbers in window.batches[self.processes.rank :: self.processes.size]]

    def _clean(self, window: Window, careful: bool) -> bool:
        """Go through a window; whether the sums can be used. With care they must be, or there is no way on."""
        try:
            if self._through(window, careful):
                return True
        except LeftOver as change:
            if self.config.granularity == "token":
                raise DataError(f"`granularity: token` cannot be had for {change}. Use `granularity: example`.") from None
            logger.warning("From now on these go through the one-by-one path: %s.", change)
            return False
        if careful:
            raise DataError(
                f"the sums of squares of examples {window.start + 1} to {window.stop} are not finite although the gradient of "
                "each is: they exceed the range of float32. Look at the model's loss on them."
            )
        return False

    def _through(self, window: Window, careful: bool) -> bool:
        dropped = list(self.state.dropped)
        mine = window.batches[self.processes.rank :: self.processes.size]
        for half, batches in groupby(mine, key=lambda batch: batch[0]):
            self.halves.begin(self.sums)
            for _, numbers in batches:
                bad = [n for n in numbers if careful and not self._is_finite(n)]
                if bad:
                    dropped += bad
                    self._refuse_too_many(dropped)
                if (good := [n for n in numbers if n not in bad]) and not self.engine.add(self._batch(good), self.sums):
                    return False
                self.bar.update(len(numbers))
            self.halves.end(self.sums, half)
        trace = torch.stack([total.sum() for total in self.sums.values() if total.numel()])
        self.bar.set_postfix(trace=f"{float(trace.sum()) / self._tokens[window.stop]:.3g}", refresh=False)  # per token
        self._dropped_now = dropped
        return bool(trace.isfinite().all())

    def _batch(self, numbers: list[int]) -> Batch:
        config, examples = self.config, [self.examples[n] for n in numbers]
        return labelled(examples, numbers, config.labels, config.draws, config.seed, self.engine.losses)

    def _is_finite(self, number: int) -> bool:
        return all(accumulate_squares(self.model, self._batch([number]), None))

    def _refuse_too_many(self, dropped: list[int], among: int | None = None) -> None:
        among = len(self.examples) if among is None else among
        if len(dropped) > self.config.max_dropped * among:
            raise DataError(
                f"{len(dropped)} of {among} examples so far (number {numbers_of(dropped)}) have a NaN or infinite "
                f"loss or gradient, more than `max_dropped: {self.config.max_dropped}`. The Fisher of the rest would not "
                "speak for the probe. Look at those rows, try `dtype: float32`, and check that the model's own loss is finite."
            )

    # -- pauses --------------------------------------------------------------------------------------------------------------

    def _go_back(self) -> None:
        """To what was last saved: the sums, and what is followed beside them."""
        beside = self.state.load(self.sums)
        self.halves = SplitHalves(self.sums)
        self.traces = beside.pop(TRACES, torch.empty(0)).tolist()
        if beside:
            self.halves.load(beside)
        if isinstance(self.engine, SummedGradient):
            self.engine.traces.clear()
        self.bar.n = sum(len(numbers) for w in self.windows if w.stop <= self.state.position for numbers in self._mine(w))
        self.bar.initial = self.bar.n
        self.bar.refresh()

    def _save(self, window: Window) -> None:
        if window.compare:
            self.halves.snapshot(window.stop)
        if isinstance(self.engine, SummedGradient):
            self.traces += self.engine.traces
            self.engine.traces.clear()
        beside = {**self.halves.state(), TRACES: torch.tensor(self.traces, dtype=torch.float64)}
        self.state.save(self.sums, window.stop, self._dropped_now, beside)

    def _compare(self, count: int) -> None:
        values = self.halves.history[count].clone()
        self.processes.add_up({"halves": values})
        self.records.append(compare(values, self.halves.segments, count, self.probe))

    def _add_up(self) -> None:
        self.processes.add_up(self.sums)
        self.dropped = sorted(n for part in self.processes.gather(self.state.dropped) for n in part)
        self.traces = [trace for part in self.processes.gather(self.traces) for trace in part]
        self._refuse_too_many(self.dropped, self.used)
        self._warn_of_dropped()

    def _warn_of_dropped(self) -> None:
        if self.dropped:
            logger.warning(
                "%d of %d examples were dropped, as their loss or gradient is not finite: number %s. The artifact counts them.",
                len(self.dropped),
                len(self.examples),
                numbers_of(self.dropped),
            )

    @property
    def trace_stderr(self) -> float | None:
        """Standard error of the trace over the trace, from the scatter of the batches; `None` for fewer than two."""
        if len(self.traces) < 2:
            return None
        traces = torch.tensor(self.traces, dtype=torch.float64)
        return float(traces.std() / traces.mean() / len(traces) ** 0.5)


def numbers_of(indices: list[int]) -> str:
    """Examples for a message, counted from 1."""
    return ", ".join(str(index + 1) for index in sorted(indices)[:10]) + (", …" if len(indices) > 10 else "")

"""What each estimator measures, beside the exact one: why the square is taken per example."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from ..config import FisherConfig
from ..fisher import estimate_fisher

ESTIMATORS: dict[str, dict[str, object]] = {
    "one square per example": {},
    "one square per batch of 2": {"granularity": "batch", "batch_size": 2},
    "one square per batch of 4": {"granularity": "batch", "batch_size": 4},
    "one square per batch of 16": {"granularity": "batch", "batch_size": 16},
    "one square per position": {"granularity": "token"},
    "sampled labels": {"labels": "sampled"},
    "sampled labels, one square per batch of 16": {"labels": "sampled", "granularity": "batch", "batch_size": 16},
    "all options": {"labels": "options"},
}


@dataclass
class EstimatorBench:
    """
    What to compare.

    Parameters:
        model (`str`): folder or Hub id.
        dataset (`str`): rows of the probe.
        probe (`str`, *optional*), text_column, max_examples, max_length: as in [`FisherConfig`].
        output (`str`, *optional*): Markdown file to write.
    """

    model: str = field(metadata={"help": "Folder or Hub id."})
    dataset: str = field(metadata={"help": "Rows of the probe."})
    probe: str = field(default="mmlu", metadata={"help": "mmlu, completion or text."})
    text_column: str = field(default="text", metadata={"help": "Column of the text probe."})
    max_examples: int | None = field(default=None, metadata={"help": "Use this many examples."})
    max_length: int = field(default=512, metadata={"help": "Longest example in tokens."})
    output: str | None = field(default=None, metadata={"help": "Markdown file to write."})

    def problems(self) -> list[str]:
        return self.fisher().problems()

    def fisher(self, **settings: object) -> FisherConfig:
        names = ("dataset", "probe", "text_column", "max_examples", "max_length")
        config = FisherConfig(**{name: getattr(self, name) for name in names})
        return replace(config, allow_test_split=True, **settings)  # type: ignore[arg-type]


def bench_estimators(config: EstimatorBench, say: Callable[[str], None] = print) -> str:
    """Estimate in each way and return a table as Markdown: trace, correlation of log F and top 1 % against the exact one."""
    lines = [
        "| estimator | trace ÷ exact | of the *mean* gradient ÷ exact | correlation of log F | top 1 % in common | seconds |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    exact: torch.Tensor | None = None
    for name, settings in ESTIMATORS.items():
        if settings.get("labels") == "options" and config.probe == "text":
            continue
        start = time.perf_counter()
        fisher = estimate_fisher(config.model, config.fisher(**settings), progress=False)
        seconds = time.perf_counter() - start
        values = torch.cat([fisher.per_token(key).flatten() for key in fisher.names]).double()
        if exact is None:
            exact, halves = values, fisher.manifest.estimator.stability[-1]
        ratio = float(values.sum() / exact.sum())
        size = settings.get("batch_size")
        # the mean gradient of the batch, squared, and averaged over batches, as most code has it
        mean = f"{ratio / float(str(size)):.3f}" if size else ""
        both = (values > 0) & (exact > 0)
        correlation = float(torch.corrcoef(torch.stack([values[both].log(), exact[both].log()]))[0, 1])
        lines.append(f"| {name} | {ratio:.3f} | {mean} | {correlation:.3f} | {_overlap(values, exact):.2f} | {seconds:.1f} |")
        say(lines[-1])
    lines += [
        "",
        f"For scale: the exact Fishers of two halves of these examples correlate by {halves.correlation:.3f} and have "
        f"{halves.overlap:.2f} of their top 1 % in common.",
    ]
    return "\n".join(lines) + "\n"


def _overlap(left: torch.Tensor, right: torch.Tensor) -> float:
    count = max(1, len(left) // 100)
    tops = [set(values.topk(count).indices.tolist()) for values in (left, right)]
    return len(tops[0] & tops[1]) / count

r"""What the exact Fisher costs: batched ÷ an ordinary forward and backward pass of the same batch, in one run.

FLOPs. With P weights in linear layers and N tokens, a forward pass takes 2NP, the gradient of the activations 2NP, that of the
weights 2NP. The batched path does exactly these products, the last one split by examples: 6NP, like the plain pass. It adds one
square and one sum per weight *and example*, 2BP operations; with N = B · T that is 1/(3T) of the whole. So the limit is 1, and
what is above it is the smaller products (T instead of N terms) and the traffic of blocks that do not stay in the cache.

Bytes. Weights 4P, running sums 4P (the plain pass has `.grad` in their place), the activations of one batch, and the scratch.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from ..fisher import BatchedSquares, Example, OneByOne, SummedGradient, collate, prepared
from .memory import peak_bytes

SIZES: dict[str, dict[str, Any]] = {
    "1M": dict(vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=4),
    "30M": dict(vocab_size=16384, hidden_size=512, intermediate_size=1536, num_hidden_layers=7),
    "100M": dict(vocab_size=32768, hidden_size=768, intermediate_size=3072, num_hidden_layers=9),
}


@dataclass
class FisherBench:
    """
    What to measure.

    Parameters:
        sizes (`list[str]`, *optional*): of `1M`, `30M`, `100M`: Gemma-2 with tied embeddings and random weights.
        batch_size, length (`int`, *optional*): of the batch; all its tokens are scored.
        rounds (`int`, *optional*): repetitions; the four ways take turns in each, and the median counts.
        sweep (`bool`, *optional*): also let batch and length grow, on the first size.
        scratch_mb (`int`, *optional*): as in [`FisherConfig`].
        threads (`int`, *optional*): of torch; its default otherwise.
        output (`str`, *optional*): Markdown file to write.
    """

    sizes: list[str] = field(default_factory=lambda: ["30M", "100M"], metadata={"help": "Of 1M, 30M, 100M."})
    batch_size: int = field(default=8, metadata={"help": "Examples per batch."})
    length: int = field(default=128, metadata={"help": "Tokens per example, all scored."})
    rounds: int = field(default=5, metadata={"help": "Repetitions."})
    sweep: bool = field(default=True, metadata={"help": "Also let batch and length grow."})
    scratch_mb: int = field(default=256, metadata={"help": "Working memory of the batched path, MiB."})
    threads: int | None = field(default=None, metadata={"help": "Threads of torch."})
    output: str | None = field(default=None, metadata={"help": "Markdown file to write."})

    def problems(self) -> list[str]:
        found = [f"`sizes`: {size} is not one of {', '.join(SIZES)}." for size in self.sizes if size not in SIZES]
        for name in ("batch_size", "rounds", "scratch_mb", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                found.append(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.length < 2:
            found.append(f"`length` must be at least 2, got {self.length}: the first token is not scored.")
        return found


def bench_fisher(config: FisherBench, say: Callable[[str], None] = print) -> str:
    """Measure and return the report as Markdown; `say` hears of the progress."""
    if config.threads:
        torch.set_num_threads(config.threads)
    lines = [_machine(), "", *_HEAD]
    for size in config.sizes:
        say(f"{size}: batch {config.batch_size} × {config.length} tokens, {config.rounds} rounds")
        lines.append(_row(size, _measure(size, config.batch_size, config.length, config)))
        say(lines[-1])
    if config.sweep:
        size = config.sizes[0]
        lines += ["", f"As batch and length grow ({size}):", "", *_HEAD]
        for batch, length in ((1, 128), (4, 128), (16, 128), (8, 32), (8, 256), (8, 512)):
            lines.append(_row(size, _measure(size, batch, length, config)))
            say(lines[-1])
    return "\n".join(lines) + "\n"


_HEAD = [
    "| model | parameters | batch | plain pass | batched ÷ plain | one by one ÷ plain | batch gradient squared ÷ plain "
    "| examples/s | peak, plain | peak, batched | by formula |",
    "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
]


def _row(size: str, found: Mapping[str, Any]) -> str:
    plain = found["plain"]
    ratios = " | ".join(f"{found[name] / plain:.2f}" for name in ("batched", "one by one", "squared gradient"))
    peaks = " | ".join(f"{found[name] / 2**20:,.0f} MiB" for name in ("peak plain", "peak batched", "formula"))
    return (
        f"| {size} | {found['parameters']:,} | {found['batch']} × {found['length']} | {plain:.2f} s | {ratios} "
        f"| {found['batch'] / found['batched']:.1f} | {peaks} |"
    )


def _measure(size: str, batch_size: int, length: int, config: FisherBench) -> dict[str, Any]:
    model = make_model(size, length)
    batch = make_batch(model, batch_size, length)
    scratch = config.scratch_mb << 20
    with prepared(model) as sums:
        engines: dict[str, Any] = {
            "batched": BatchedSquares(model, scratch),
            "one by one": OneByOne(model),
            "squared gradient": SummedGradient(model, scratch),
        }
        ways: dict[str, Callable[[], object]] = {
            "plain": partial(plain_pass, model, batch),
            **{name: partial(engine.add, batch, sums) for name, engine in engines.items()},
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(config.rounds + 1):  # the first one warms up
            for name, work in ways.items():
                start = time.perf_counter()
                work()
                if number:
                    times[name].append(time.perf_counter() - start)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        peaks = {name: peak_bytes(ways[name]) for name in ("plain", "batched")}
        formula = peak_formula(model, batch, scratch)
    return {
        **{name: statistics.median(values) for name, values in times.items()},
        "parameters": parameters,
        "batch": batch_size,
        "length": length,
        # weights and running sums were there before the count began
        "peak plain": 4 * parameters + peaks["plain"],
        "peak batched": 8 * parameters + peaks["batched"],
        "formula": formula,
    }


def plain_pass(model: Gemma2ForCausalLM, batch: Mapping[str, Tensor]) -> None:
    """What a step of training does before the optimizer: `loss.backward()` of the whole batch."""
    model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


def peak_formula(model: Gemma2ForCausalLM, batch: Mapping[str, Tensor], scratch: int) -> int:
    """
    An upper bound for the batched path, in bytes: weights 4P + running sums 4P + what autograd keeps of a forward pass of the
    backbone (measured: it is the architecture's own) + gradients on their way through the widest layer, 4 tensors of its widest
    activation and 8 of the hidden states + `scratch`. No logits.
    """
    ids, config = batch["input_ids"], model.config
    kept = peak_bytes(lambda: model.model(input_ids=ids, use_cache=False).last_hidden_state)
    widest = max(config.intermediate_size, config.num_attention_heads * ids.shape[1]) + 2 * config.hidden_size
    return 8 * sum(parameter.numel() for parameter in model.parameters()) + kept + 4 * 4 * ids.numel() * widest + scratch


def make_model(size: str, length: int) -> Gemma2ForCausalLM:
    """A Gemma-2 of random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = SIZES[size]
        heads = shape["hidden_size"] // 64
        config: Any = Gemma2Config(
            **shape,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 2),
            head_dim=64,
            max_position_embeddings=max(512, length),
        )
        config._attn_implementation = "eager"  # Gemma-2 caps its attention logits, which SDPA cannot
        return Gemma2ForCausalLM(config).eval()


def make_batch(model: Gemma2ForCausalLM, batch_size: int, length: int) -> dict[str, Tensor]:
    """Random tokens, all but the first scored."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (batch_size, length), generator=generator).tolist()
    return collate([Example(row, [-100, *row[1:]]) for row in ids])


def _machine() -> str:
    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            processor = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"Machine: {processor}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32."

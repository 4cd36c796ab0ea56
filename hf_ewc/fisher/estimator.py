"""From a model and a probe to a [`FisherInformation`]: the resumable loop around `accumulate_squares`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..artifact import BaseModel, EstimatorRecord, FisherInformation, tokenizer_sha256
from ..config import FisherConfig
from ..errors import ConfigError, DataError
from .batched import BatchedSquares
from .engines import OneByOne, choose_engine
from .labels import labelled
from .loading import model_and_base
from .loop import Loop
from .per_example import Batch
from .probes import Probe, build_probe, check_context
from .ready import prepared, ready
from .replicas import Replicas
from .sharded import ShardedSquares
from .sharded_loop import ShardedLoop
from .state import RunningState, refuse_other_processes

IDENTITY = ("labels", "granularity", "model_dtype", "draws", "batch_size")  # of the record: what makes it another Fisher


def estimate_fisher(
    model: str | Path | PreTrainedModel,
    config: FisherConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dataset: Dataset | Sequence[Mapping[str, Any]] | None = None,
    progress: bool = True,
) -> FisherInformation:
    r"""
    Measure how much each weight of a causal language model matters for what the probe asks of it:

    $$F_i = \frac{1}{T} \sum_n \Big(\sum_{t \in \text{scored}(n)} \partial \log p(y_{nt} \mid x_n) / \partial\theta_i\Big)^2.$$

    The square is taken for every example by itself. `loss.backward()` on a batch and then squaring is not the Fisher: it
    shrinks with the batch size, and λ with it. Stored are the sums of squares and the number T of scored tokens.

    Started by `torchrun` or `accelerate launch`, the processes share the examples out, and each returns the whole result.
    **All of them must call this**, not just the main one, which would wait for the others for ever.

    Args:
        model (`str`, `Path` or [`~transformers.PreTrainedModel`]):
            Hub id or folder; or a loaded model whose weights still equal the files it came from, since those files are the
            anchor θ* of the penalty. A loaded model keeps its dtype and device, and is left as it was found: mode,
            `requires_grad`, `.grad`, RNG state.
        config ([`FisherConfig`], *optional*):
            Probe and settings.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Defaults to the one beside the model.
        dataset (`Dataset` or sequence of `dict`, *optional*):
            Rows to use instead of `config.dataset`, tokenised (`input_ids`, `labels`) or not; see [`build_probe`].
        progress (`bool`, *optional*, defaults to `True`):
            Show a bar with examples per second and the time left.

    Returns:
        [`FisherInformation`]: every parameter of `named_parameters()`, tied ones once, in float32 on the CPU.

    Raises:
        [`ConfigError`]: a setting is wrong, or `work_dir` holds another estimate.
        [`DataError`]: the model's weights are in no file or quantised, a row is unusable, or more than `max_dropped` of the
        examples have a NaN or infinite gradient.

    Example:

    ```python
    >>> fisher = estimate_fisher("google/gemma-2-2b", FisherConfig(probe="mmlu", max_examples=2000))
    >>> fisher.save_pretrained("gemma-2-2b-fisher-mmlu")
    ```
    """
    config = FisherConfig() if config is None else config
    config.check()
    processes = Replicas.joined(config.num_processes, config.device)
    # loading a model must not move the random numbers of a later training
    with torch.inference_mode(False), torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        model, base = model_and_base(model, config, processes)
        if tokenizer is not None:  # the one that was used is the one that is recorded
            base = replace(base, tokenizer_sha256=tokenizer_sha256(tokenizer))
        elif base.tokenizer_sha256 is not None:
            tokenizer = AutoTokenizer.from_pretrained(base.folder)
        run = _Run(model, base, processes, progress)
        if config.probes is None:
            return run.estimate(config, build_probe(config, tokenizer, dataset))
        if dataset is not None:
            raise ConfigError("a mixture (`probes`) names the dataset of each probe; do not pass `dataset` as well.")
        # all are read and checked before the first one is measured
        probes = [(name, own, weight, build_probe(own, tokenizer)) for name, (own, weight) in config.mixture().items()]
        parts = [run.part(own, probe, name, number) for number, (name, own, _, probe) in enumerate(probes, 1)]
        return FisherInformation.mix(parts, [weight for _, _, weight, _ in probes])


@dataclass(frozen=True)
class _Run:
    """A model under measurement, by this process among others."""

    model: PreTrainedModel
    base: BaseModel
    processes: Replicas
    progress: bool

    def part(self, config: FisherConfig, probe: Probe, name: str, number: int) -> FisherInformation:
        """One probe of a mixture. With a `work_dir`, its finished Fisher waits there for the others and is measured once."""
        if config.work_dir is None:
            return self.estimate(config, probe, name)
        folder = Path(config.work_dir) / f"{number:02d}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}"
        finished = folder / "fisher"
        if config.resume and (finished / "fisher_config.json").is_file():
            part = FisherInformation.from_pretrained(finished)
            now, then = self._record(config), part.manifest.estimator
            decisive = (*IDENTITY, "seed") if config.labels == "sampled" else IDENTITY
            other_base = not part.manifest.base_model.same_weights(self.base)
            same = all(getattr(now, key) == getattr(then, key) for key in decisive)
            [record] = part.manifest.probes
            used = record.examples + record.dropped  # fewer than there are where `until_stable` stopped it
            whole = used == len(probe.examples) or config.until_stable is not None
            ids = replace(probe, examples=probe.examples[:used]).ids_sha256
            if not same or not whole or record.ids_sha256 != ids or other_base:
                raise ConfigError(
                    f"'{finished}' holds the finished Fisher of another model, probe or setting than `{name}` has now. Restore "
                    "them, or begin a new estimate in another `work_dir`."
                )
            return part
        part = self.estimate(replace(config, work_dir=str(folder)), probe, name)
        if self.processes.rank == 0:
            part.save_pretrained(finished, codec="float32", overwrite=config.resume)
        self.processes.gather(None)  # wait for the files
        return FisherInformation.from_pretrained(finished)

    def estimate(self, config: FisherConfig, probe: Probe, name: str | None = None) -> FisherInformation:
        model, base, processes = self.model, self.base, self.processes
        text = model.config.get_text_config()
        check_context(probe, getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None))
        largest = max(max(one.input_ids) for example in probe.examples for one in (example, *example.options))
        if largest >= base.vocab_size:
            raise DataError(
                f"the probe holds token {largest}, but '{base.label}' knows tokens 0 to {base.vocab_size - 1}. It was made "
                "with another tokenizer; use the model's own."
            )
        estimator = self._record(config)
        identity = {
            "weights": base.fingerprint,
            "probe": probe.ids_sha256,
            "examples": len(probe.examples),
            "processes": processes.size,
            **{name: getattr(config, name) for name in ("path", "until_stable", "sharding")},
            **{name: getattr(estimator, name) for name in IDENTITY},
            **({"seed": config.seed} if config.labels == "sampled" else {}),
            # several processes may have been interrupted at different places: they have to share out the rest as before
            **({"pass": [config.batch_size, config.save_every]} if processes.size > 1 else {}),
        }
        processes.check_same(identity)
        folder = config.work_dir
        if folder is not None and processes.size > 1:
            folder = str(Path(folder) / f"process-{processes.rank}-of-{processes.size}")
        if config.resume and config.work_dir is not None:
            refuse_other_processes(Path(config.work_dir), processes.size)
        state = RunningState(folder, identity, config.resume)
        if config.sharding == "fsdp2":
            with ready(model):
                squares = ShardedSquares(model)
                estimator.path, estimator.self_check = f"fsdp2_{squares.mode}", squares.self_check
                loop: Loop = ShardedLoop(model, squares, probe.examples, state, config, processes, name)
                loop.run(self.progress and processes.rank == 0)
                tensors = {name: squares.full(name).cpu() for name in squares.sums}
        else:
            with prepared(model) as sums:
                engine, estimator.self_check, estimator.fallback = choose_engine(
                    model, config, _first(probe, config, model), sums
                )
                estimator.path = engine.path
                loop = Loop(model, engine, probe.examples, sums, state, config, processes, name)
                loop.run(self.progress and processes.rank == 0)
                # a later batch may have added to it, on any process
                left = processes.gather(engine.leftover if isinstance(engine, BatchedSquares) else [])
                estimator.fallback = [name for name in sums if any(name in part for part in left)]
            tensors = {name: total.cpu() for name, total in sums.items()}
        estimator.stability, estimator.trace_stderr = loop.records, loop.trace_stderr
        record = replace(replace(probe, examples=probe.examples[: loop.used]).record(loop.dropped), name=name)
        estimator.normalizer = float(record.scored_tokens)
        return FisherInformation.from_tensors(tensors, base=base, probes=[record], estimator=estimator)

    def _record(self, config: FisherConfig) -> EstimatorRecord:
        """What is known of the estimate before it begins."""
        return EstimatorRecord(
            labels=config.labels,
            granularity=config.granularity,
            reduction="sum",
            normalizer=0.0,  # known only when it is known which examples were dropped
            accumulation_dtype="float32",
            model_dtype=str(self.model.dtype).removeprefix("torch."),
            seed=config.seed,
            max_length=config.max_length,
            draws=config.draws if config.labels == "sampled" else None,
            batch_size=config.batch_size if config.granularity == "batch" else None,
        )


def _first(probe: Probe, config: FisherConfig, model: PreTrainedModel) -> Batch:
    """What the engines are compared on: up to four examples, the shortest and the longest among them."""
    order = sorted(range(len(probe.examples)), key=lambda n: len(probe.examples[n].input_ids))
    numbers = sorted({order[0], order[len(order) // 3], order[2 * len(order) // 3], order[-1]})
    chosen = [probe.examples[n] for n in numbers]
    return labelled(chosen, numbers, config.labels, config.draws, config.seed, OneByOne(model).losses)

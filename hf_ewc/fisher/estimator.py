"""From a model and a probe to a [`FisherInformation`]: the resumable loop around `accumulate_squares`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from ..artifact import AnchorTensors, BaseModel, EstimatorRecord, FisherInformation, tokenizer_sha256
from ..config import FisherConfig
from ..errors import ConfigError, DataError
from .engines import OneByOne, choose_engine
from .labels import labelled
from .loop import Loop
from .per_example import Batch
from .probes import Probe, build_probe, check_context
from .replicas import Replicas
from .sharded import ShardedSquares, shard
from .sharded_loop import ShardedLoop
from .state import RunningState


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
    processes = Replicas.joined(config.num_processes)
    # loading a model must not move the random numbers of a later training
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        model, base = _model_and_base(model, config, processes)
        if tokenizer is not None:  # the one that was used is the one that is recorded
            base = replace(base, tokenizer_sha256=tokenizer_sha256(tokenizer))
        elif base.tokenizer_sha256 is not None:
            tokenizer = AutoTokenizer.from_pretrained(base.folder)
        if config.probes is None:
            return _estimate(model, base, config, build_probe(config, tokenizer, dataset), processes, progress)
        if dataset is not None:
            raise ConfigError("a mixture (`probes`) names the dataset of each probe; do not pass `dataset` as well.")
        # all are read and checked before the first one is measured
        probes = {name: (own, weight, build_probe(own, tokenizer)) for name, (own, weight) in config.mixture().items()}
        parts = [
            _part(model, base, own, probe, processes, progress, name, number)
            for number, (name, (own, _, probe)) in enumerate(probes.items(), 1)
        ]
        return FisherInformation.mix(parts, [weight for _, weight, _ in probes.values()])


def _part(
    model: PreTrainedModel,
    base: BaseModel,
    config: FisherConfig,
    probe: Probe,
    processes: Replicas,
    progress: bool,
    name: str,
    number: int,
) -> FisherInformation:
    """One probe of a mixture. With a `work_dir`, its finished Fisher waits there for the others and is measured once."""
    if config.work_dir is None:
        return _estimate(model, base, config, probe, processes, progress, name)
    folder = Path(config.work_dir) / f"{number:02d}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}"
    finished = folder / "fisher"
    if config.resume and (finished / "fisher_config.json").is_file():
        part = FisherInformation.from_pretrained(finished)
        if part.manifest.probes[0].ids_sha256 == probe.ids_sha256 and part.manifest.base_model.same_weights(base):
            return part
        raise ConfigError(
            f"'{finished}' holds the finished Fisher of another model or probe than `{name}` is now. Restore the settings, or "
            "begin a new estimate in another `work_dir`."
        )
    part = _estimate(model, base, replace(config, work_dir=str(folder)), probe, processes, progress, name)
    if processes.rank == 0:
        part.save_pretrained(finished, codec="float32", overwrite=config.resume)
    processes.gather(None)  # wait for the files
    return FisherInformation.from_pretrained(finished)


def _estimate(
    model: PreTrainedModel,
    base: BaseModel,
    config: FisherConfig,
    probe: Probe,
    processes: Replicas,
    progress: bool,
    name: str | None = None,
) -> FisherInformation:
    text = model.config.get_text_config()
    check_context(probe, getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None))
    largest = max(max(one.input_ids) for example in probe.examples for one in (example, *example.options))
    if largest >= base.vocab_size:
        raise DataError(
            f"the probe holds token {largest}, but '{base.label}' knows tokens 0 to {base.vocab_size - 1}. It was made "
            "with another tokenizer; use the model's own."
        )
    estimator = EstimatorRecord(
        labels=config.labels,
        granularity=config.granularity,
        reduction="sum",
        normalizer=0.0,  # known only when it is known which examples were dropped
        accumulation_dtype="float32",
        model_dtype=str(model.dtype).removeprefix("torch."),
        seed=config.seed,
        max_length=config.max_length,
        draws=config.draws if config.labels == "sampled" else None,
        batch_size=config.batch_size if config.granularity == "batch" else None,
    )
    identity = {
        "weights": base.fingerprint,
        "probe": probe.ids_sha256,
        "examples": len(probe.examples),
        "processes": processes.size,
        **{name: getattr(config, name) for name in ("path", "until_stable", "sharding")},
        **{name: getattr(estimator, name) for name in ("labels", "granularity", "model_dtype", "draws", "batch_size")},
        **({"seed": config.seed} if config.labels == "sampled" else {}),
        # several processes may have been interrupted at different places: they have to share out the rest as before
        **({"pass": (config.batch_size, config.save_every)} if processes.size > 1 else {}),
    }
    processes.check_same(identity)
    folder = config.work_dir
    if folder is not None and processes.size > 1:
        folder = str(Path(folder) / f"process-{processes.rank}-of-{processes.size}")
    state = RunningState(folder, identity, config.resume)
    if config.sharding == "fsdp2":
        with ready(model):
            squares = ShardedSquares(model)
            estimator.path, estimator.self_check = f"fsdp2_{squares.mode}", squares.self_check
            loop: Loop = ShardedLoop(model, squares, probe.examples, state, config, processes, name)
            loop.run(progress and processes.rank == 0)
            tensors = {name: squares.full(name).cpu() for name in squares.sums}
    else:
        with prepared(model) as sums:
            engine, estimator.self_check, estimator.fallback = choose_engine(model, config, _first(probe, config, model), sums)
            estimator.path = engine.path
            loop = Loop(model, engine, probe.examples, sums, state, config, processes, name)
            loop.run(progress and processes.rank == 0)
        tensors = {name: total.cpu() for name, total in sums.items()}
    estimator.stability, estimator.trace_stderr = loop.records, loop.trace_stderr
    record = replace(replace(probe, examples=probe.examples[: loop.used]).record(loop.dropped), name=name)
    estimator.normalizer = float(record.scored_tokens)
    return FisherInformation.from_tensors(tensors, base=base, probes=[record], estimator=estimator)


def _first(probe: Probe, config: FisherConfig, model: PreTrainedModel) -> Batch:
    """What the engines are compared on: up to four examples, the shortest and the longest among them."""
    order = sorted(range(len(probe.examples)), key=lambda n: len(probe.examples[n].input_ids))
    numbers = sorted({order[0], order[len(order) // 3], order[2 * len(order) // 3], order[-1]})
    chosen = [probe.examples[n] for n in numbers]
    return labelled(chosen, numbers, config.labels, config.draws, config.seed, OneByOne(model).losses)


@contextmanager
def prepared(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """
    Make a model [`ready`], and yield the running sums: one float32 zero tensor per parameter, in the order of
    `named_parameters()`, where tied ones appear once.
    """
    with ready(model):
        yield {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in model.named_parameters()}


@contextmanager
def ready(model: PreTrainedModel) -> Iterator[None]:
    """
    Make a model ready for `accumulate_squares`, and leave it as it was found, also after an error.

    Within: eval mode (no dropout), all parameters require a gradient, and no `.grad` is set.

    Gradient checkpointing, where it is enabled, stays at work: transformers does it in training mode only, so the layers (but
    nothing inside them) are set to that, unless the model has dropout, which a layer might then apply.
    """
    training = {module: module.training for module in model.modules()}
    found = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    try:
        model.eval()
        if not any("drop" in name and value for name, value in model.config.get_text_config().to_dict().items()):
            for module in training:
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True  # the attribute of this module; `train()` would reach its children
        for parameter in found:
            parameter.requires_grad_(True)
            parameter.grad = None
        with torch.enable_grad():
            yield
    finally:
        for parameter, (needed, gradient) in found.items():
            parameter.requires_grad_(needed)
            parameter.grad = gradient
        for module, mode in training.items():
            module.training = mode


def _model_and_base(
    model: str | Path | PreTrainedModel, config: FisherConfig, processes: Replicas
) -> tuple[PreTrainedModel, BaseModel]:
    """Load the model that an id or folder names; or find the files of a loaded one, and see that it still equals them."""
    kind, way_out = type(model).__name__, "Save it first (model and tokenizer, `save_pretrained(folder)`) and pass that folder."
    given = isinstance(model, PreTrainedModel)
    if not isinstance(model, (str, Path, PreTrainedModel)):
        raise DataError(
            f"`model` must be an id, a folder or a `PreTrainedModel`, got {kind}. Unwrap it (`.module` of DDP, "
            f"`merge_and_unload()` of PEFT). {way_out}"
        )
    name = model.config._name_or_path if isinstance(model, PreTrainedModel) else model
    if not name:
        raise DataError(f"this {kind} comes from no file, so that the anchor θ* could not be read again. {way_out}")
    if config.sharding == "fsdp2" and (given or processes.size == 1):
        raise ConfigError(
            "`sharding: fsdp2` spreads a model over several processes while it is loaded: "
            + ("name it by id or folder." if given else "start them with `torchrun --nproc_per_node N …`; here there is one.")
        )
    base = BaseModel.resolve(name, config.revision)
    assert base.folder is not None  # `resolve` found it
    if not isinstance(model, PreTrainedModel):
        model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=getattr(torch, config.dtype))
        if config.sharding == "fsdp2":
            shard(model)
        else:
            model.to(device=torch.device(config.device) if config.device else processes.device)  # type: ignore[call-arg]
    parameters = dict(model.named_parameters())
    if packed := [name for name, parameter in parameters.items() if not parameter.is_floating_point()]:
        raise DataError(
            f"{len(packed)} parameters of '{base.label}' are quantised ({packed[0]}, …), so that they have no gradient. Take "
            "the model in float32 or bfloat16."
        )
    if given and (other := _differing(parameters, base)):
        raise DataError(
            f"the weights of this {kind} are not those of '{base.label}', where it was loaded from: `{other}` differs. A "
            f"Fisher belongs to the weights at which it was measured, and the anchor θ* is read from files. {way_out}"
        )
    return model, base


def _differing(parameters: Mapping[str, Tensor], base: BaseModel) -> str | None:
    """The first parameter that is not what the base's files hold, rounded to the parameter's dtype."""
    anchor = AnchorTensors(base, parameters)
    for name, parameter in parameters.items():
        there = anchor.read(name)
        if there.shape != parameter.shape or not torch.equal(there.to(parameter), parameter.detach()):
            return name
    return None

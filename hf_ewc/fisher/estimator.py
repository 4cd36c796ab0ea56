"""From a model and a probe to a [`FisherInformation`]: the resumable loop around `accumulate_squares`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..artifact import AnchorTensors, BaseModel, EstimatorRecord, FisherInformation, tokenizer_sha256
from ..config import FisherConfig
from ..errors import DataError
from .per_example import accumulate_squares, collate
from .probes import Probe, build_probe
from .state import RunningState

logger = logging.getLogger(__name__)


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
    # loading a model must not move the random numbers of a later training
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        model, base = _model_and_base(model, config)
        if tokenizer is not None:  # the one that was used is the one that is recorded
            base = replace(base, tokenizer_sha256=tokenizer_sha256(tokenizer))
        elif base.tokenizer_sha256 is not None:
            tokenizer = AutoTokenizer.from_pretrained(base.folder)
        probe = build_probe(config, tokenizer, dataset)
        largest = max(max(example.input_ids) for example in probe.examples)
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
            path="one_by_one",
            max_length=config.max_length,
        )
        identity = {
            "weights": base.fingerprint,
            "probe": probe.ids_sha256,
            "examples": len(probe.examples),
            **{name: getattr(estimator, name) for name in ("labels", "granularity", "model_dtype", "path")},
        }
        state = RunningState(config.work_dir, identity, config.resume)
        with prepared(model) as sums:
            _accumulate(model, probe, sums, state, config, progress)
    record = probe.record(state.dropped)
    estimator.normalizer = float(record.scored_tokens)
    tensors = {name: total.cpu() for name, total in sums.items()}
    return FisherInformation.from_tensors(tensors, base=base, probes=[record], estimator=estimator)


def _accumulate(
    model: PreTrainedModel, probe: Probe, sums: dict[str, Tensor], state: RunningState, config: FisherConfig, progress: bool
) -> None:
    """Add up all examples that `state` does not hold yet, from save to save."""
    examples = probe.examples
    window = config.save_every if config.work_dir else len(examples)  # how far a rollback goes back
    state.load(sums)
    with tqdm(total=len(examples), initial=state.position, unit="example", desc="Fisher", disable=not progress) as bar:
        while (start := state.position) < len(examples):
            stop = min(start - start % window + window, len(examples))
            finite: list[bool] = []
            for first in range(start, stop, config.batch_size):
                batch = collate(examples[first : min(first + config.batch_size, stop)])
                finite += accumulate_squares(model, batch, sums)
                bar.update(start + len(finite) - bar.n)
                if not all(finite):
                    break
            dropped = list(state.dropped)
            if not all(finite):
                # Something NaN or infinite is in the sums by now. Back to where they were clean, and through this window again
                # with a look at each new example before it is added: slower, but a second copy of the gradient is never needed.
                state.load(sums)
                for index in range(start, stop):
                    single = collate(examples[index : index + 1])
                    known = finite[index - start : index - start + 1] or accumulate_squares(model, single, None)
                    if all(known):
                        accumulate_squares(model, single, sums)
                    else:
                        dropped.append(index)
                        _refuse_too_many(dropped, len(examples), config.max_dropped)
                    bar.update(max(0, index + 1 - bar.n))
            state.save(sums, stop, dropped)
    if state.dropped:
        logger.warning(
            "%d of %d examples were dropped, as their loss or gradient was not finite: number %s. The artifact counts them.",
            len(state.dropped),
            len(examples),
            _numbers(state.dropped),
        )


def _refuse_too_many(dropped: list[int], count: int, share: float) -> None:
    if len(dropped) > share * count:
        raise DataError(
            f"{len(dropped)} of {count} examples so far (number {_numbers(dropped)}) have a NaN or infinite loss or gradient, "
            f"more than `max_dropped: {share}`. The Fisher of the rest would not speak for the probe. Look at those rows, try "
            "`dtype: float32`, and check that the model's own loss is finite."
        )


def _numbers(indices: list[int]) -> str:
    return ", ".join(str(index + 1) for index in indices[:10]) + (", …" if len(indices) > 10 else "")


@contextmanager
def prepared(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """
    Make a model ready for `accumulate_squares`, and leave it as it was found, also after an error.

    Within: eval mode (no dropout), all parameters require a gradient, and no `.grad` is set. Yields the running sums: one
    float32 zero tensor per parameter, in the order of `named_parameters()`, where tied ones appear once.
    """
    training = {module: module.training for module in model.modules()}
    found = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    try:
        model.eval()
        for parameter in found:
            parameter.requires_grad_(True)
            parameter.grad = None
        with torch.enable_grad():
            yield {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in model.named_parameters()}
    finally:
        for parameter, (needed, gradient) in found.items():
            parameter.requires_grad_(needed)
            parameter.grad = gradient
        for module, mode in training.items():
            module.training = mode


def _model_and_base(model: str | Path | PreTrainedModel, config: FisherConfig) -> tuple[PreTrainedModel, BaseModel]:
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
    base = BaseModel.resolve(name, config.revision)
    assert base.folder is not None  # `resolve` found it
    if not isinstance(model, PreTrainedModel):
        model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=getattr(torch, config.dtype))
        device = torch.device(config.device) if config.device else torch.accelerator.current_accelerator()
        model.to(device=device or torch.device("cpu"))  # type: ignore[call-arg]  # transformers wraps `to`
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

r"""
A Fisher from the optimizer of a published checkpoint: an **approximation** that costs nothing, for where the data are gone.

Adam keeps $v$, a running average of the squared gradient ĝ² of training batches, with bias correction
$\hat v = v / (1 - \beta_2^t) \approx E[\hat g^2]$. Let a batch score N tokens in all and the loss be their mean,
$\hat g = \frac1N \sum_n G_n$ with $G_n$ the gradient of document n's summed log-likelihood. *If* the documents are independent
and their mean gradient is zero, the cross terms vanish and

$$N \, E[\hat g^2] = \tfrac1N E\Big[\sum_n G_n^2\Big] = F,$$

the empirical Fisher per scored token, of the unit and scale that [`estimate_fisher`] measures (one square per document). Hence
$F \approx N \hat v$. What that leans on, and how each part fails:

- *The mean gradient is zero.* At a minimum of the training loss it is. Elsewhere F comes out too large by N ḡ², and the more so
  the larger the batches: little for a model at the end of its training, much in the middle.
- *Nothing was clipped.* `max_grad_norm` scales ĝ by c ≤ 1 before Adam sees it: F comes out too small by c².
- *The weights stood still* for the 1/(1 − β₂) steps of the average. They moved; it is a Fisher of their way, not of their end.
- *The training data is the probe.* This protects what was trained on last. The file does not say which texts those were.
- *The gradient is the loss's.* Adam with L2 weight decay (not AdamW) or any penalty in the loss squares that, too.
- *Few squares*: each value has a relative standard deviation of about √(2/n), n = (1 + β₂)/(1 − β₂) after a long run: 3 % for
  β₂ = 0.999, 10 % for 0.99, 22 % for 0.95. A state in 8 bits (bitsandbytes) adds its rounding: √v within about −29 and +21 %
  (1st and 99th percentile); one in bfloat16 stops following small changes.

Which weights matter is told better than how much: check λ on a short run, and where data is at hand, measure instead.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer
from transformers.trainer_pt_utils import get_parameter_names

from ..artifact import ADAM_PATH, BaseModel, EstimatorRecord, FisherInformation, ProbeRecord
from ..errors import ConfigError, DataError, FisherMismatchError
from .adam_state import SecondMoment, read_moments, steps_of_trainer

logger = logging.getLogger(__name__)


def import_adam_state(
    model: str | Path,
    optimizer_state: str | Path,
    tokens_per_batch: int,
    *,
    revision: str | None = None,
    beta2: float | None = None,
    step: int | None = None,
) -> FisherInformation:
    r"""
    Make a Fisher from Adam's second moments, F = N v̂. An approximation, and labelled so: the head of this module says what it
    assumes and how it fails. Needs memory for one float32 number per parameter.

    Args:
        model (`str` or `Path`):
            The checkpoint that the state was saved with, whose weights become the anchor θ*.
        optimizer_state (`str` or `Path`):
            Its `optimizer.pt`, or a safetensors file with keys `<parameter>.exp_avg_sq`; see [`read_moments`]. Name only a file
            that you trust as much as a program.
        tokens_per_batch (`int`):
            N: *scored* tokens per optimizer step, of all devices and accumulation steps together. F is proportional to it, and
            no file says it, so there is no default. (Blocks of 512 × 8 per device × 8 devices: 32,768.)
        revision (`str`, *optional*):
            Branch, tag or commit of the model on the Hub.
        beta2 (`float`, *optional*), step (`int`, *optional*):
            Adam's β₂, and how many steps are in the average, for files that do not say.

    Returns:
        [`FisherInformation`]: labels `empirical`, granularity `batch`, path `"adam_exp_avg_sq"`, per scored token. Its one
        probe has kind `"adam"`, and the state file's sha256 in place of that of token ids. `examples` counts batches (the
        equivalent number of equally weighted ones), as the number of documents in them is unknown, and `scored_tokens` is N
        times that.

    Raises:
        [`ConfigError`]: `tokens_per_batch`, `beta2` or `step` are missing or out of range.
        [`DataError`], [`FisherMismatchError`]: the state cannot be read, is not Adam's, is damaged, or is of another model.
    """
    if isinstance(tokens_per_batch, bool) or not isinstance(tokens_per_batch, int) or tokens_per_batch < 1:
        raise ConfigError(
            f"`tokens_per_batch` must be a whole number of at least 1, got {tokens_per_batch!r}: the scored tokens of one "
            "optimizer step, of all devices and accumulation steps together. Nothing was imported."
        )
    path = Path(optimizer_state).expanduser()
    base = BaseModel.resolve(model, revision)
    skeleton = _skeleton(base)
    parameters = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    moments = read_moments(path, parameters, layouts(skeleton))
    decay, steps = _settings(path, moments, beta2, step)
    _check_company(path, base, steps)
    tensors: dict[str, Tensor] = {}
    problems = []
    for name in parameters:
        values = moments[name].read()
        if not bool(values.isfinite().all()):
            problems.append(f"{name} holds {int((~values.isfinite()).sum()):,} NaN or infinite values")
        elif bool((values < 0).any()):
            problems.append(f"{name} holds {int((values < 0).sum()):,} values below 0, and no square is")
        tensors[name] = values.mul(tokens_per_batch / (1.0 - decay**steps))  # not in place: it may be the file's memory
        if not problems and not bool(tensors[name].isfinite().all()):
            problems.append(f"{name} overflows float32 when multiplied by `tokens_per_batch: {tokens_per_batch}`")
    if problems:
        raise DataError(
            f"the optimizer state '{path}' cannot be a running average of squares:\n    " + "\n    ".join(problems[:5]) + "\n"
            "It is damaged, or the training had diverged. Take an earlier checkpoint. Nothing was imported."
        )
    stored = sorted({moment.stored for moment in moments.values()})
    if "bfloat16" in stored:
        logger.warning("The second moments are bfloat16, which cannot follow changes below 0.4 %%: they lag behind.")
    squares = equivalent_squares(decay, steps)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    record = ProbeRecord(
        kind="adam",
        dataset=path.name,
        ids_sha256=digest,
        examples=squares,
        scored_tokens=squares * tokens_per_batch,
    )
    estimator = EstimatorRecord(
        labels="empirical",
        granularity="batch",
        reduction="mean_per_scored_token",
        normalizer=1.0,
        accumulation_dtype=", ".join(stored),
        model_dtype=base.dtype,
        path=ADAM_PATH,
    )
    return FisherInformation.from_tensors(tensors, base=base, probes=[record], estimator=estimator)


def equivalent_squares(beta2: float, steps: int) -> int:
    """How many equally weighted squares scatter as little as the running average: (Σ w)² / Σ w² with wₖ = β₂^(t−k)."""
    forgotten = beta2**steps
    return max(1, round((1 + beta2) / (1 - beta2) * (1 - forgotten) / (1 + forgotten)))


def layouts(model: PreTrainedModel) -> dict[str, list[list[str]]]:
    """The orders in which optimizers number a model's parameters: description → names by parameter group. Tied ones once."""
    names = [name for name, _ in model.named_parameters()]

    def split(decayed: list[str]) -> list[list[str]]:
        first = set(decayed)
        return [[name for name in names if name in first], [name for name in names if name not in first]]

    return {
        "one group": [names],
        # the method reads nothing from the trainer
        "transformers 5: weight decay, then biases and norms": split(Trainer.get_decay_parameter_names(None, model)),  # type: ignore[arg-type]
        # which knew norms by their class, and few of those
        "transformers 4: weight decay, then biases and LayerNorms": split(
            get_parameter_names(model, [torch.nn.LayerNorm], ["bias"])
        ),
    }


def _skeleton(base: BaseModel) -> PreTrainedModel:
    """The model without its weights, for names, order, ties and shapes."""
    assert base.folder is not None
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.folder))
    except (ValueError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"transformers cannot build the model '{base.label}': {reason} Nothing was imported.") from None


def _settings(path: Path, moments: Mapping[str, SecondMoment], beta2: float | None, step: int | None) -> tuple[float, int]:
    """β₂ and the number of steps, from the file or from the caller. One of each: a mixture would be several Fishers in one."""
    found_beta2 = {moment.beta2 for moment in moments.values()} - {None}
    found_steps = {moment.step for moment in moments.values()} - {None}
    chosen: list[float] = []
    for name, given, found, good in (
        ("beta2", beta2, found_beta2, lambda value: 0 < value < 1),
        ("step", step, found_steps, lambda value: value >= 1 and float(value).is_integer()),
    ):
        known = {given} if given is not None else found
        if given is not None and found - {given}:
            raise ConfigError(f"`{name}: {given}`, but '{path}' says {_several(found)}. Leave it out. Nothing was imported.")
        if not known:
            raise ConfigError(f"'{path}' does not say Adam's {name}, which v̂ needs. Add `--{name} …`. Nothing was imported.")
        if len(known) > 1:
            raise DataError(
                f"'{path}' has several values of {name} ({_several(known)}): its parameters were not trained together, and "
                "their second moments do not compare. Nothing was imported."
            )
        value = known.pop()
        if value is None or not good(value):
            raise ConfigError(f"`{name}` is {value}, which no Adam has after a step. Nothing was imported.")
        chosen.append(value)
    return chosen[0], int(chosen[1])


def _several(values: set) -> str:
    return ", ".join(f"{value:g}" for value in sorted(values)[:5])


def _check_company(path: Path, base: BaseModel, steps: int) -> None:
    """Shapes do not tell two checkpoints of one run apart; what lies around the file does, where something does."""
    trained = steps_of_trainer(path)
    if trained is not None and trained != steps:
        message = (
            f"'{path}' has made {steps} steps, and the trainer_state.json beside it says {trained}: the state is of another "
            "checkpoint than the weights"
        )
        if steps > trained:
            raise FisherMismatchError(f"{message}. Bring together what belongs together. Nothing was imported.")
        logger.warning("%s, unless %d steps were skipped (by fp16 loss scaling).", message, trained - steps)
    if base.folder is None or base.folder.resolve() != path.parent.resolve():
        logger.warning(
            "'%s' does not lie beside the weights of '%s'. Nothing can show that they belong together: every checkpoint of a "
            "model has the same shapes.",
            path,
            base.label,
        )

"""[`EWCCallback`]: Elastic Weight Consolidation for any `transformers.Trainer`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate.state import GradientState
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from . import __version__
from .artifact import BaseModel, FisherInformation
from .config import penalty_problems, raise_problems, training_problems
from .errors import ConfigError
from .files import STATE_FILE, write_atomically
from .penalty import EWCController, Protected

logger = logging.getLogger(__name__)

FisherSource: TypeAlias = str | Path | FisherInformation


class EWCCallback(TrainerCallback):
    r"""
    Adds λ/2 · Σᵢ Fᵢ (θᵢ − θ*ᵢ)² to the training of any [`~transformers.Trainer`], without touching its loss: logged `loss` and
    `eval_loss` stay the task's own.

    Where it acts, by `mode` (Trainer's order is backward → clip → `on_pre_optimizer_step` → step → `on_optimizer_step`):

    - `"proximal"` (default) and `"decoupled"`: one implicit step in `on_optimizer_step`; see [`EWCConfig`].
    - `"loss"`: the penalty's gradient joins each parameter's gradient in a `post_accumulate_grad` hook of the last micro-batch
      of an accumulation window, hence before clipping.

    [`EWCTrainer`] does the same with the checks made before the model is loaded; prefer it for supervised fine-tuning.

    Args:
        fisher (`str` or [`FisherInformation`], or a list of them): the artifact, or its folder. Several, oldest task first, are
            folded into one ([`FisherInformation.fold`]); the model that is trained must be the base of the last.
        ewc_lambda (`float`, *optional*, defaults to 1.0): λ; 0 switches everything off.
        mode (`str`, *optional*, defaults to `"proximal"`): `"loss"`, `"proximal"` or `"decoupled"`.
        anchor (`str`, *optional*): model id or folder of θ*; defaults to the base model that the Fisher names.
        anchor_revision, fisher_revision (`str`, *optional*): branch, tag or commit; `fisher_revision` for a single Fisher only.
        fisher_decay (`float`, *optional*, defaults to 1.0): weakens each Fisher of a list once per later one.
        fisher_streaming (`bool`, *optional*, defaults to `False`): read a Fisher of the Hub without the disk.
        missing (`str`, *optional*, defaults to `"error"`): `"ignore"` leaves parameters that the Fisher lacks unpenalised.

    Raises:
        [`ConfigError`], [`FisherFormatError`], [`FisherMismatchError`]: before the first step; nothing was trained.

    Example:

    ```python
    trainer = DPOTrainer(..., callbacks=[EWCCallback("gemma-2-2b-fisher-mmlu", ewc_lambda=1.0)])
    trainer.train()
    ```

    `ewc/*` metrics appear in `state.log_history` and on the console. Reporters of `report_to` are called before a callback that
    was passed by the user; `callback.attach(trainer)` puts it before them, so that they receive the metrics too.
    """

    def __init__(
        self,
        fisher: FisherSource | Sequence[FisherSource],
        ewc_lambda: float = 1.0,
        mode: str = "proximal",
        *,
        anchor: str | None = None,
        anchor_revision: str | None = None,
        fisher_revision: str | None = None,
        fisher_decay: float = 1.0,
        fisher_streaming: bool = False,
        missing: str = "error",
    ) -> None:
        problems = penalty_problems(ewc_lambda, mode, missing, fisher, fisher_revision, fisher_decay)
        raise_problems("This EWC callback cannot run", problems)
        base = BaseModel.resolve(anchor, anchor_revision) if anchor is not None else None
        loaded = load_fisher(fisher, fisher_revision, fisher_decay, base, fisher_streaming)
        if base is None:
            base = loaded.manifest.base_model if loaded.has_own_anchor else loaded.manifest.base_model.located()
        loaded.check_base(base)
        self.controller = EWCController(loaded, base, float(ewc_lambda), mode, missing)
        self.driven_by_trainer = False  # EWCTrainer calls `gradients_ready` itself, in `training_step`
        self._hooks: list[Any] = []
        self._acted: set[str] = set()  # mode `loss`: parameters whose hook already acted in this optimizer step
        self._measure = False
        self._metrics: dict[str, float] = {}

    def attach(self, trainer: Trainer) -> EWCCallback:
        """Add this callback to `trainer` before all others, so that `report_to` receives the `ewc/*` metrics."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    # -- Trainer's events, in their order ------------------------------------------------------------------------------------

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        raise_problems("EWC cannot be right under these training arguments", training_problems(args))
        check_model(kwargs["model"])
        if self.controller.ewc_lambda == 0:
            return
        processing_class = kwargs.get("processing_class")
        self.controller.fisher.check_base(self.controller.base, getattr(processing_class, "tokenizer", processing_class))
        self.controller.bind(kwargs["model"], kwargs["optimizer"])
        if state.global_step == 0:
            self._report_start()
        self._remove_hooks()
        if self.controller.mode == "loss" and not self.driven_by_trainer:
            self._hooks = [e.param.register_post_accumulate_grad_hook(self._hook(e)) for e in self.controller.protected]

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._measure = logs_after_this_step(args, state)
        self._acted.clear()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.driven_by_trainer:
            return
        if self.controller.mode == "loss":
            self.controller.add_to_gradients(e for e in self.controller.protected if e.name not in self._acted)
            if self._measure:
                self._metrics = self.controller.metrics()
        elif self._measure:
            self._metrics = self.controller.measure()

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.controller.mode != "loss":
            self.controller.after_optimizer_step()
        if self._measure:
            self.controller.warn_of_large_steps(self._metrics)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs")
        if logs is not None and "loss" in logs and self._metrics:
            logs.update(self._metrics)
            state.log_history[-1].update(self._metrics)
            self._metrics = {}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = output_folder(args) / f"checkpoint-{state.global_step}"
            write_state(folder, state.global_step, self.controller.state())

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._remove_hooks()
        if state.is_world_process_zero and output_folder(args).is_dir():
            write_state(output_folder(args), state.global_step, self.controller.state())

    # -- the work ------------------------------------------------------------------------------------------------------------

    def gradients_ready(self) -> None:
        """
        The task's gradient is complete and unclipped: measure on logging steps; in `loss` mode add the penalty's gradient.
        """
        if self.controller.protected:
            if self._measure:
                self._metrics = self.controller.measure()
            if self.controller.mode == "loss":
                self.controller.add_to_gradients()

    def _report_start(self) -> None:
        """Training usually starts at the anchor. Say where it does not: a mistake, or a folded anchor between bases."""
        start = self.controller.measure()
        if fold := self.controller.fisher.has_own_anchor and self.controller.fisher.manifest.fold:
            logger.info(
                "The anchor lies between the bases of %d folded Fishers, %.3g away from the starting weights, and the penalty "
                "starts at λ · %.3g nats per token. (The penalties side by side would read λ · %.3g more, throughout.)",
                len(fold.pairs),
                start["ewc/anchor_distance"],
                start["ewc/kl_nats"],
                fold.constant,
            )
        elif start["ewc/anchor_distance"] > 0:
            logger.warning(
                "Training starts %.3g away from the anchor %s: the penalty pulls back to the anchor, not to the starting "
                "weights.",
                start["ewc/anchor_distance"],
                self.controller.base.id,
            )

    def _hook(self, entry: Protected) -> Callable[[torch.Tensor], None]:
        def act(_: torch.Tensor) -> None:
            # only after the last micro-batch of the accumulation window, and once even if a checkpointed layer accumulates
            # twice
            if GradientState().sync_gradients and entry.name not in self._acted:
                self._acted.add(entry.name)
                if self._measure:
                    self.controller.observe(entry)
                self.controller.add_to_gradients([entry])

        return act

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def load_fisher(
    fisher: FisherSource | Sequence[FisherSource],
    revision: str | None,
    decay: float,
    base: BaseModel | None = None,
    streaming: bool = False,
) -> FisherInformation:
    """
    What a setting `fisher` names, checked and in one piece.

    Args:
        fisher (`str`, `Path` or [`FisherInformation`], or a list of them): several are folded, oldest first.
        revision (`str`, *optional*): of a single Fisher.
        decay (`float`): see [`FisherInformation.fold`].
        base ([`BaseModel`], *optional*): the model that training starts from; found without its id by those measured at it.
        streaming (`bool`, *optional*): see [`FisherInformation.from_pretrained`].
    """
    if isinstance(fisher, FisherInformation):
        return fisher
    if isinstance(fisher, (str, Path)):
        return FisherInformation.from_pretrained(fisher, revision, streaming=streaming)
    parts = [load_fisher(each, revision, decay, streaming=streaming) for each in fisher]
    return FisherInformation.fold(parts, decay, [base] if base else [])


def logs_after_this_step(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether `DefaultFlowCallback` will log after the step that begins now."""
    step = state.global_step + 1
    if step == 1 and args.logging_first_step:
        return True
    if args.logging_strategy == IntervalStrategy.STEPS:
        return step % max(int(state.logging_steps), 1) == 0
    if args.logging_strategy == IntervalStrategy.EPOCH:
        per_epoch = max(state.max_steps // max(state.num_train_epochs, 1), 1)
        return step % per_epoch == 0 or step == state.max_steps
    return False


def check_model(model: torch.nn.Module) -> None:
    """Refuse models of which the weights that EWC would protect are not the ones that are trained."""
    quantised = any(getattr(model, flag, False) for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized"))
    if quantised or getattr(model, "hf_quantizer", None) is not None:
        raise ConfigError(
            "The model is quantised (k-bit): its base weights are frozen, so there is nothing for EWC to protect. Load it in "
            "float32 or bfloat16, and save memory with `optim: paged_adamw_8bit` instead. Nothing was trained."
        )
    if hasattr(model, "peft_config"):
        raise ConfigError(
            "The model is a PEFT model: its base weights are frozen and cannot forget, so EWC has nothing to protect. Pass "
            "the base model (`model.merge_and_unload()`) to train all its parameters, or train the adapter without EWC. "
            "Nothing was trained."
        )


def output_folder(args: TrainingArguments) -> Path:
    """The run's folder: `TrainingArguments` names one itself where `output_dir` was left out."""
    assert args.output_dir is not None
    return Path(args.output_dir)


def write_state(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write `ewc_state.json`: λ, mode, and which Fisher and anchor a checkpoint was trained against."""
    content = {"schema": 1, "hf_ewc": __version__, **state, "global_step": step}
    write_atomically(folder / STATE_FILE, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")

"""One training run: what `hf-ewc train` and every run of a sweep do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed

from ..artifact import BaseModel, FisherInformation
from ..callback import load_fisher
from ..config import EWCConfig
from ..files import STATE_FILE
from ..trainer import EWCTrainer, last_complete_checkpoint
from .records import read_json, refuse_changes

Progress = Callable[[str], None]
Rows: TypeAlias = Dataset | IterableDataset


def check_fisher(model: str, args: EWCConfig) -> tuple[BaseModel, FisherInformation | None]:
    """
    Find the base model and see that the Fisher (or the newest of several) was measured on it: before any data is read and any
    weights are loaded.

    Args:
        model (`str`): id or folder of the base; its revision is `args.model_init_kwargs["revision"]`.
        args ([`EWCConfig`]): names the Fisher, and perhaps another anchor.

    Raises:
        [`DataError`], [`FisherFormatError`], [`FisherMismatchError`]: with what is wrong.
    """
    settings: Any = args.model_init_kwargs or {}
    base = BaseModel.resolve(model, settings.get("revision"))
    if args.ewc_lambda == 0 or args.fisher is None:
        return base, None
    anchor = base if args.anchor is None else BaseModel.resolve(args.anchor, args.anchor_revision)
    fisher = load_fisher(args.fisher, args.fisher_revision, args.fisher_decay, anchor, args.fisher_streaming)
    fisher.check_base(anchor)
    return base, fisher


def train_model(
    model: str,
    args: EWCConfig,
    train_dataset: Rows,
    *,
    fisher: FisherInformation | None = None,
    data: dict[str, Any] | None = None,
    resume: bool = False,
    progress: Progress = print,
) -> dict:
    """
    Train and save one model, from its last complete checkpoint if `resume` is set and there is one.

    Args:
        model (`str`): id or folder of the base.
        args ([`EWCConfig`]): all settings; the model goes to `args.output_dir`.
        train_dataset (`Dataset` or `IterableDataset`): what the model is to learn.
        fisher ([`FisherInformation`], *optional*): what [`check_fisher`] returned, so that it is not read and checked again.
        data (`dict`, *optional*): what `train_dataset` is, for the record.

    Returns:
        `dict`: `steps`, `train_loss` (mean over the run), and the last logged `loss` and `ewc/*`.

    Raises:
        [`ConfigError`]: when the checkpoint was trained with another λ, mode, Fisher or anchor.
    """
    checkpoint = last_complete_checkpoint(args.output_dir or "") if resume else None
    if resume:
        progress(
            f"resuming from {checkpoint.name}" if checkpoint else "no complete checkpoint yet: starting from the base model"
        )
    set_seed(args.seed)
    trainer = EWCTrainer(model, args, train_dataset=train_dataset, fisher=fisher, train_data=data)
    trainer.remove_callback(PrinterCallback)  # with `disable_tqdm`, it prints each log as a raw dict …
    if trainer.pop_callback(ProgressCallback) is not None:  # … and without, this one does
        trainer.add_callback(Bar())
    trainer.add_callback(ProgressLines(progress))
    if checkpoint is not None:
        _check_checkpoint(checkpoint, trainer)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model()
    history = trainer.state.log_history
    last = next((entry for entry in reversed(history) if "loss" in entry), {})
    log: dict[str, Any] = {"steps": trainer.state.global_step}
    log |= {key: entry["train_loss"] for entry in history for key in ("train_loss",) if key in entry}
    return log | {key: value for key, value in last.items() if key == "loss" or key.startswith("ewc/")}


class Bar(ProgressCallback):
    """Transformers' progress bar without its raw dicts; [`ProgressLines`] says what they said."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


class ProgressLines(TrainerCallback):
    """One short line for each log."""

    shown = ("loss", "grad_norm", "ewc/kl_nats", "ewc/grad_ratio")

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if state.is_world_process_zero and "loss" in logs:
            figures = "  ".join(f"{name} {logs[name]:.4g}" for name in self.shown if name in logs)
            self.progress(f"step {state.global_step}/{state.max_steps}  {figures}")


def _check_checkpoint(checkpoint: Path, trainer: EWCTrainer) -> None:
    """A checkpoint's own Fisher and anchor must be those that go on pulling: a mixture of both would be neither."""
    if trainer.ewc is not None and (checkpoint / STATE_FILE).is_file():
        then = read_json(checkpoint / STATE_FILE)
        title = f"'{checkpoint}' cannot be continued with other settings"
        refuse_changes(_identity(then), _identity(trainer.ewc.controller.state()), title)


def _identity(state: dict) -> dict[str, Any]:
    fisher, anchor = state["fisher"] or {}, state["anchor"] or {}
    return {
        "ewc_lambda": state["ewc_lambda"],
        "ewc_mode": state.get("ewc_mode"),
        "fisher": fisher.get("sha256"),
        "anchor": anchor.get("fingerprint"),
    }

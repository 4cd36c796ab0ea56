"""[`EWCTrainer`]: TRL's `SFTTrainer` that keeps what the base model knew."""

from __future__ import annotations

import json
import logging
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress
from trl import SFTTrainer

from . import __version__
from .artifact import FisherInformation
from .callback import EWCCallback, check_model, output_folder, write_state
from .config import EWCConfig
from .errors import ConfigError, DataError
from .files import write_atomically

logger = logging.getLogger(__name__)

# settings that say how a model came about; they go into `ewc_state.json`, and from there onto its card
RECORDED = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs", "weight_decay", "optim", "bf16"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "packing", "packing_strategy", "seed"),
)


class EWCTrainer(SFTTrainer):
    """
    [`~trl.SFTTrainer`] with Elastic Weight Consolidation. The whole difference from the parent: the Fisher and the anchor are
    loaded and checked before the model is, an [`EWCCallback`] acts on the weights, `training_step` tells it when the gradient
    is complete, and `ewc_state.json` is saved beside the weights. The loss is untouched; with `ewc_lambda=0` training is
    bitwise `SFTTrainer`.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): base model id, folder, or model that was loaded from one.
        args ([`EWCConfig`]): all settings; `ewc_lambda`, `fisher` and `ewc_mode` are the ones that matter.
        fisher ([`FisherInformation`], *optional*): in place of `args.fisher`, one that is in memory or was loaded before.
        train_data (`dict`, *optional*): what `train_dataset` is (`dataset`, `config`, `split`, `revision`), for the record.
        train_dataset, eval_dataset, processing_class, ...: as in `SFTTrainer`, except `peft_config`, which is refused.

    Raises:
        [`ConfigError`], [`DataError`], [`FisherFormatError`], [`FisherMismatchError`]: all before the first step.

    Example:

    ```python
    trainer = EWCTrainer(
        "google/gemma-2-2b",
        EWCConfig("gemma-2-2b-lt", ewc_lambda=1.0, fisher="gemma-2-2b-fisher-mmlu"),
        train_dataset=corpus,
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "sft", "ewc", "continual-learning"]  # noqa: RUF012 (a list, as the parent's is)

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: EWCConfig,
        data_collator: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        *,
        fisher: FisherInformation | None = None,
        train_data: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.train_data = train_data
        if not isinstance(args, EWCConfig):
            raise ConfigError(f"`args` must be an `EWCConfig` (it names λ and the Fisher), got `{type(args).__name__}`.")
        args.check(loaded=fisher is not None)
        if kwargs.get("peft_config") is not None or kwargs.get("quantization_config") is not None:
            raise ConfigError(
                "`peft_config` and `quantization_config` freeze the base weights, which then cannot forget: EWC has nothing to "
                "protect. Remove them to train all parameters, or use `SFTTrainer` for an adapter. Nothing was trained."
            )
        _check_rows(train_dataset, args, any_columns=kwargs.get("formatting_func") is not None)
        self.ewc = _make_callback(model, args, fisher)
        if isinstance(model, str):
            if self.ewc is not None and args.anchor is None and self.ewc.controller.base.revision is not None:
                # the very commit that the anchor is read from, even if `main` moves meanwhile
                args.model_init_kwargs = {**_init_kwargs(args), "revision": self.ewc.controller.base.revision}
        else:
            check_model(model)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, **kwargs)
        trained: Any = self.model  # for the type checker, any `Module` or none
        context = getattr(trained.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and args.max_length is not None and args.max_length > context:
            raise ConfigError(
                f"`max_length: {args.max_length}` exceeds the context of the model, {context} tokens. Lower `max_length` (long "
                "texts are split, not lost, with `packing: true` and `packing_strategy: bfd_split`). Nothing was trained."
            )
        _warn_of_lost_text(self.train_dataset, args)
        if self.ewc is not None:
            self.ewc.controller.fisher.check_base(self.ewc.controller.base, self._tokenizer)
            self.ewc.driven_by_trainer = True
            self.ewc.attach(self)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.ewc is not None and self.accelerator.sync_gradients:
            self.ewc.gradients_ready()
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        token, self.args.hub_token = self.args.hub_token, None  # `training_args.bin` is a pickle of all arguments
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
        if self.args.should_save:
            folder = Path(output_dir) if output_dir else output_folder(self.args)
            write_state(folder, self.state.global_step, self._ewc_state())

    def _ewc_state(self) -> dict[str, Any]:
        state = self.ewc.controller.state() if self.ewc is not None else {"ewc_lambda": 0.0, "fisher": None, "anchor": None}
        training = {name: getattr(self.args, name) for name in RECORDED}
        return {
            "hf_ewc": __version__,
            **state,
            "global_step": self.state.global_step,
            "data": self.train_data,
            "training": training,
        }

    def _private(self, private: bool | None = None) -> bool:
        """Whether a repository that is made by this run is private: yes, unless somebody said no."""
        return private if private is not None else self.args.hub_private_repo is not False

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        super().init_hf_repo(token, self._private(private))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """
        `hub_strategy: every_save`, as the parent does it; but in one commit, with the card and `ewc_state.json`, and without
        `training_args.bin`, a pickle that holds the token.
        """
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        from .publish import push_checkpoint

        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if busy:
            self._finish_current_push()
        job = push_checkpoint(
            checkpoint_folder,
            str(self.hub_model_id),
            private=self._private(),
            revision=self.args.hub_revision,
            commit_message=f"Training in progress, step {self.state.global_step}",
            token=self.args.hub_token,
            run_as_future=True,
        )
        job.add_done_callback(_warn_of_failure)
        self.push_in_progress: Any = PushInProgress([job])  # type: ignore[arg-type]

    def create_model_card(  # type: ignore[override]  # as TRL's
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        """Write `README.md`: base, Fisher, data, λ and mode as they are, in place of TRL's card, which knows none of them."""
        if not self.is_world_process_zero():
            return
        from .publish import render_checkpoint_card  # with evaluation's libraries, which training does not need

        if dataset_name is not None and self.train_data is None:
            self.train_data = {"dataset": dataset_name}
        folder = output_folder(self.args)
        name = self.hub_model_id or model_name or folder.name
        repo_id = name if "/" in name else None
        card = render_checkpoint_card(self._ewc_state(), repo_id=repo_id, name=name)
        write_atomically(folder / "README.md", card)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        results: str | Path | None = None,
        tag: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Save and publish the model with its card, as [`~transformers.Trainer.push_to_hub`] does it; but in one commit, without
        pickles, and with the record of its Fisher and anchor.

        Args:
            commit_message (`str`), token (`str`), revision (`str`): as in the parent.
            private (`bool`, *optional*): of a repository that is made by this; `hub_private_repo` by default, and where that is
                not set, yes.
            blocking (`bool`, *optional*, defaults to `True`): wait for the end.
            results (`str` or `Path`, *optional*): `results.json` of an evaluation, for the card's table.
            tag (`str`, *optional*): for the commit.
            kwargs: `dataset_name`: what was trained on, for the card.

        Returns:
            [`~hub.Pushed`], a future of it with `blocking=False`, or `None` on all but the main process.

        Raises:
            [`HubError`]: no access, a tag that is taken, somebody pushed in between.
        """
        from .publish import push_checkpoint

        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if (name := kwargs.get("dataset_name")) is not None and self.train_data is None:
            self.train_data = {"dataset": name}
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is not None:
            self._finish_current_push()  # of `hub_strategy: every_save`
        token = token or self.args.hub_token
        name = self.hub_model_id or self.args.hub_model_id or output_folder(self.args).absolute().name
        return push_checkpoint(
            output_folder(self.args),
            name,
            private=self._private(private),
            revision=revision or self.args.hub_revision,
            tag=tag,
            results=results,
            commit_message=commit_message,
            token=token,
            run_as_future=not blocking,
        )


def _warn_of_failure(push: Future) -> None:
    """A push in the background that failed must not go unnoticed, nor end the training."""
    if (error := push.exception()) is not None:
        logger.warning("This checkpoint was not pushed; training goes on. %s", error)


def _make_callback(model: str | PreTrainedModel, args: EWCConfig, fisher: FisherInformation | None) -> EWCCallback | None:
    """Load and check Fisher and anchor, before any weights are loaded for training; `None` for λ = 0."""
    if args.ewc_lambda == 0:
        return None
    model_id = model if isinstance(model, str) else model.config._name_or_path
    if args.anchor is None and not model_id:
        raise ConfigError(
            "The model was built in memory and names no files to read the anchor θ* from. Save it "
            "(`model.save_pretrained(folder)`) and pass the folder as `model`, or name the base model as `anchor`."
        )
    source = args.fisher if fisher is None else fisher
    assert source is not None  # `args.check()` saw to it
    return EWCCallback(
        source,
        args.ewc_lambda,
        args.ewc_mode,
        anchor=args.anchor or model_id,
        anchor_revision=args.anchor_revision or (_init_kwargs(args).get("revision") if args.anchor is None else None),
        fisher_revision=args.fisher_revision if fisher is None else None,
        fisher_decay=args.fisher_decay if fisher is None else 1.0,
        fisher_streaming=args.fisher_streaming,
        missing=args.ewc_missing,
    )


def _init_kwargs(args: EWCConfig) -> dict[str, Any]:
    """`model_init_kwargs`; `TrainingArguments` has parsed the JSON text that a command line gives."""
    kwargs = args.model_init_kwargs or {}
    assert isinstance(kwargs, dict), "`model_init_kwargs` must be a dict or a JSON object"
    return kwargs


def _check_rows(dataset: Any, args: EWCConfig, any_columns: bool) -> None:
    """TRL's own complaint about a missing text column is a KeyError deep inside tokenisation."""
    if dataset is None:
        raise DataError("`train_dataset` is missing: EWCTrainer needs a `datasets.Dataset` or `IterableDataset` to train on.")
    row = next(iter(dataset), None)
    if row is None:
        raise DataError("`train_dataset` is empty: there is nothing to train on.")
    known = (args.dataset_text_field, "messages", "prompt", "input_ids", "conversations")
    if not any_columns and not any(column in row for column in known):
        raise DataError(
            f"`train_dataset` has no column `{args.dataset_text_field}`; its columns are {', '.join(row)}. Name the one that "
            "holds the text in `dataset_text_field`. Nothing was trained."
        )


def _warn_of_lost_text(dataset: Any, args: EWCConfig) -> None:
    """TRL truncates what exceeds `max_length`: right for chats, a silent loss of data in continued pretraining."""
    if args.packing and args.packing_strategy == "bfd":
        logger.warning("`packing_strategy: bfd` drops the part of each text beyond `max_length`; `bfd_split` keeps it.")
    elif not args.packing and isinstance(dataset, Dataset) and args.max_length and "input_ids" in dataset.column_names:
        lengths = pc.list_value_length(dataset.data.column("input_ids"))  # in Arrow: a corpus has millions of rows
        full = pc.sum(pc.greater_equal(lengths, args.max_length)).as_py() or 0
        if full:
            logger.warning(
                "%d of %d training texts reach `max_length: %d` and were cut there. To train on all of the text, set "
                "`packing: true` and `packing_strategy: bfd_split`.",
                full,
                len(dataset),
                args.max_length,
            )


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """
    The newest checkpoint that was written to its end, or `None`. `trainer_state.json` is written last, so a folder without a
    whole one was being written when the job was killed; `transformers.trainer_utils.get_last_checkpoint` would choose it and
    fail.
    """
    folders = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _is_complete(path)]
    return max(folders, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True

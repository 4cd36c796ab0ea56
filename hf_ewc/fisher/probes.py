"""What is differentiated: the examples of one estimate, and where they come from.

Every [`Example`] is one sample of the Fisher, so the cut into examples *is* part of the estimate: a question is one, a
completion is one, a document of an `lm_eval:` task is one, a piece of at most `max_length` tokens of running text is one.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..artifact import ProbeRecord
from ..config import FisherConfig
from ..data import load_rows, names_a_test_split, refuse_test_split, require_columns, resolve_dataset_revision
from ..errors import DataError
from .examples import (
    Example,
    choice_example,
    examples_of_completion,
    examples_of_mmlu,
    examples_of_running_text,
    examples_of_text,
    examples_of_tokens,
)
from .lm_eval_probe import TaskDocuments
from .templates import template_sha256

logger = logging.getLogger(__name__)

MMLU = "cais/mmlu"
ROWS = {"tokens": examples_of_tokens, "mmlu": examples_of_mmlu, "completion": examples_of_completion, "text": examples_of_text}
OPTIONS = ("mmlu", "completion")  # probes of rows that can have answer options


@dataclass(frozen=True)
class Probe:
    """The examples of one estimate and where they come from; see [`build_probe`]."""

    kind: str
    dataset: str | None
    config: str | None
    split: str | None
    revision: str | None
    examples: list[Example]
    template: str | None = None  # the fingerprint of its wording, where `kind` does not settle it
    task: str | None = None
    num_fewshot: int | None = None

    @property
    def ids_sha256(self) -> str:
        """
        Fingerprint of all token ids and labels, options included, in order: what tokenizer, template, draw and cut together
        amount to.
        """
        digest = hashlib.sha256()
        for example in self.examples:
            values = _numbers(example)
            if example.options:  # no example starts with a negative number, so that nothing else reads like this
                values += [-len(example.options), *(value for option in example.options for value in _numbers(option))]
            digest.update(struct.pack(f"<{len(values)}i", *values))
        return digest.hexdigest()

    @property
    def longest(self) -> int:
        """Tokens of the longest example, options included."""
        return max(len(one.input_ids) for example in self.examples for one in (example, *example.options))

    def record(self, dropped: Sequence[int] = ()) -> ProbeRecord:
        """What the artifact records, counting only the examples that were used (all but the indices in `dropped`)."""
        gone = set(dropped)
        used = [example for index, example in enumerate(self.examples) if index not in gone]
        return ProbeRecord(
            kind=self.kind,
            dataset=self.dataset,
            config=self.config,
            split=self.split,
            revision=self.revision,
            template_sha256=self.template or template_sha256(self.kind),
            ids_sha256=self.ids_sha256,
            examples=len(used),
            scored_tokens=sum(example.scored for example in used),
            dropped=len(gone),
            task=self.task,
            num_fewshot=self.num_fewshot,
        )


def check_context(probe: Probe, context: int | None) -> None:
    """Raise a [`DataError`] if an example is longer than the model's context (tokens; `None`: unknown, no check)."""
    if context is not None and probe.longest > context:
        raise DataError(
            f"the probe's longest example has {probe.longest} tokens, the model's context only {context}: positions beyond it "
            f"were never trained, and what is measured there says nothing. Set `max_length: {context}` (long text is then cut "
            "there; a question or completion that does not fit is named)."
        )


def build_probe(
    config: FisherConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    rows: Dataset | Sequence[Mapping[str, Any]] | None = None,
) -> Probe:
    """
    Read, check and tokenise what [`FisherConfig`] names.

    Args:
        config ([`FisherConfig`]):
            `probe`, `dataset*`, `text_column`, `task_folder`, `labels`, `max_examples`, `max_length` and `seed` apply.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its BOS, when it defines one, starts every example exactly once. May be `None` for rows of tokens.
        rows (`Dataset` or sequence of `dict`, *optional*):
            Use these instead of `config.dataset`: rows of the probe's columns, or already tokenised rows with `input_ids` and
            `labels` (as long; -100 = not scored) and perhaps `attention_mask`.

    With `max_examples`, rows are drawn in the seed's random order until there are enough examples (of a long text, all pieces).
    No others are tokenised.

    Raises:
        [`DataError`]: a test split (unless `allow_test_split`), no rows, `labels: options` where there are none, or a row that
        cannot be used as it is, with its number.
    """
    if config.task is not None:
        if rows is not None:
            raise DataError(f"`probe: {config.probe}` reads the task's own dataset; give no other one, or use another probe.")
        return _task_probe(config, tokenizer)
    columns = {"mmlu": ("question", "choices", "answer"), "completion": ("prompt", "completion"), "text": (config.text_column,)}
    if config.labels == "options":
        columns["completion"] += ("options",)
    default = rows is None and config.dataset in (None, MMLU)
    split = config.dataset_split or ("auxiliary_train" if default else None)
    subset, revision, name = config.dataset_config, config.dataset_revision, None
    if rows is None:
        name = config.dataset or MMLU
        subset = subset or ("all" if default else None)
        if not config.allow_test_split:
            refuse_test_split(split, name)  # before anything is downloaded
            if Path(name).is_file() and names_a_test_split(name):
                logger.warning("By its name, '%s' is a test split; report nothing on it afterwards.", Path(name).name)
        revision = resolve_dataset_revision(name, revision)
        rows = load_rows(name, config=subset, split=split, revision=revision, columns=columns[config.probe])
    elif len(rows) == 0:
        raise DataError("the dataset given to `estimate_fisher` holds no rows.")
    if isinstance(rows, Dataset) and rows.split is not None:  # a dataset object still knows what it was cut from
        split = str(rows.split)
        if not config.allow_test_split:
            refuse_test_split(split, name or "the given dataset")

    there = rows.column_names if isinstance(rows, Dataset) else list(rows[0])
    kind = "tokens" if "input_ids" in there else config.probe
    require_columns(there, ("input_ids", "labels") if kind == "tokens" else columns[kind], name or "the given dataset")
    if config.labels == "options" and kind not in OPTIONS:
        raise DataError(
            f"`labels: options` needs answer options, and the `{kind}` probe has none; {', '.join(OPTIONS)} and multiple "
            "choice `lm_eval:` tasks do. Use `labels: empirical` or `sampled`."
        )
    if tokenizer is None and kind != "tokens":
        raise DataError(_NO_TOKENIZER.format(kind=kind))
    make: Callable[..., Iterator[Example]] = ROWS[kind]
    examples = _draw(len(rows), config, lambda index: make(rows[index], index + 1, config, tokenizer))
    if name is not None and Path(name).exists():
        name = Path(name).name  # never somebody's absolute path
    return Probe(kind, name, subset, split, revision, examples)


_NO_TOKENIZER = "the `{kind}` probe needs a tokenizer, and none lies beside the model. Pass `tokenizer=`."


def _task_probe(config: FisherConfig, tokenizer: PreTrainedTokenizerBase | None) -> Probe:
    if tokenizer is None:
        raise DataError(_NO_TOKENIZER.format(kind=config.probe))
    documents = TaskDocuments(config)

    def make(index: int) -> Iterator[Example]:
        asked, where = documents.request(index), documents.where(index)
        if isinstance(asked, str):
            yield from examples_of_running_text(asked, where, config, tokenizer)
        else:
            yield choice_example(asked.pairs, asked.gold, where, config, tokenizer, merge=True)

    examples = _draw(len(documents), config, make)
    source = (documents.dataset, documents.config, documents.split, documents.revision)
    return Probe("lm_eval", *source, examples, documents.template_sha256, documents.task, documents.num_fewshot)


def _draw(count: int, config: FisherConfig, make: Callable[[int], Iterator[Example]]) -> list[Example]:
    order: Sequence[int] = range(count)
    if config.max_examples is not None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed)).tolist()
    examples: list[Example] = []
    for index in order:
        examples += make(index)
        if config.max_examples is not None and len(examples) >= config.max_examples:
            break
    return examples[: config.max_examples]


def _numbers(example: Example) -> list[int]:
    return [len(example.input_ids), *example.input_ids, *example.labels]

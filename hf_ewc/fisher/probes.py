"""What is differentiated: token ids with the positions that are scored, made from rows of text or of questions.

Every [`Example`] is one sample of the Fisher, so the cut into examples *is* part of the estimate: a question is one, a
completion is one, a piece of at most `max_length` tokens of running text is one.
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
from ..data import (
    check_question,
    check_text,
    load_rows,
    names_a_test_split,
    refuse_test_split,
    require_columns,
    resolve_dataset_revision,
)
from ..errors import DataError
from .templates import render_answer, render_question, template_sha256

logger = logging.getLogger(__name__)

IGNORED = -100  # the label of a position that is not scored, as everywhere in transformers
MMLU = "cais/mmlu"


@dataclass(frozen=True)
class Example:
    """
    One sample of the Fisher.

    Attributes:
        input_ids (`list[int]`): Tokens, without padding.
        labels (`list[int]`):
            As long as `input_ids`. `labels[t]` is the token *at* position t (the model's prediction at t − 1 is scored against
            it, the shift happens later, as in transformers), or -100 where nothing is scored. `labels[0]` is always -100.
        options (`tuple[Example, ...]`):
            For `labels: options`, every answer option as an example of its own (same prompt, scored continuation), the right
            one included; otherwise empty.
    """

    input_ids: list[int]
    labels: list[int]
    options: tuple[Example, ...] = ()

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class Probe:
    """The examples of one estimate and where they come from; see [`build_probe`]."""

    kind: str
    dataset: str | None
    config: str | None
    split: str | None
    revision: str | None
    examples: list[Example]

    @property
    def ids_sha256(self) -> str:
        """Fingerprint of all token ids and labels, in order: what tokenizer, template, draw and cut together amount to."""
        digest = hashlib.sha256()
        for example in self.examples:
            values = [len(example.input_ids), *example.input_ids, *example.labels]
            digest.update(struct.pack(f"<{len(values)}i", *values))
        return digest.hexdigest()

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
            template_sha256=template_sha256(self.kind),
            ids_sha256=self.ids_sha256,
            examples=len(used),
            scored_tokens=sum(example.scored for example in used),
            dropped=len(gone),
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
            `probe`, `dataset*`, `text_column`, `max_examples`, `max_length` and `seed` apply.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its BOS, when it defines one, starts every example exactly once. May be `None` for rows of tokens.
        rows (`Dataset` or sequence of `dict`, *optional*):
            Use these instead of `config.dataset`: rows of the probe's columns, or already tokenised rows with `input_ids` and
            `labels` (as long; -100 = not scored) and perhaps `attention_mask`.

    With `max_examples`, rows are drawn in the seed's random order until there are enough examples (of a long text, all pieces).

    Raises:
        [`DataError`]: a test split (unless `allow_test_split`), no rows, or a row that cannot be used as it is, with its
        number.
    """
    columns = {"mmlu": ("question", "choices", "answer"), "completion": ("prompt", "completion"), "text": (config.text_column,)}
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
    if tokenizer is None and kind != "tokens":
        raise DataError(f"the `{kind}` probe needs a tokenizer, and none lies beside the model. Pass `tokenizer=`.")
    make: Callable[..., Iterator[Example]] = {"tokens": _tokens, "mmlu": _mmlu, "completion": _completion, "text": _text}[kind]
    examples: list[Example] = []
    for index in _order(len(rows), config):
        examples += make(rows[index], index + 1, config, tokenizer)
        if config.max_examples is not None and len(examples) >= config.max_examples:
            break
    if name is not None and Path(name).exists():
        name = Path(name).name  # never somebody's absolute path
    return Probe(kind, name, subset, split, revision, examples[: config.max_examples])


def _order(count: int, config: FisherConfig) -> list[int]:
    if config.max_examples is None:
        return list(range(count))
    return torch.randperm(count, generator=torch.Generator().manual_seed(config.seed)).tolist()


def _mmlu(row: Mapping[str, Any], number: int, config: FisherConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    check_question(row, number)
    prompt, answer = render_question(row["question"], row["choices"]), render_answer(row["answer"])
    yield _continuation(prompt, answer, number, config, tokenizer)


def _completion(
    row: Mapping[str, Any], number: int, config: FisherConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Example]:
    prompt = check_text(row, "prompt", number, may_be_empty=True)
    yield _continuation(prompt, check_text(row, "completion", number), number, config, tokenizer)


def _continuation(
    prompt: str, continuation: str, number: int, config: FisherConfig, tokenizer: PreTrainedTokenizerBase
) -> Example:
    """Prompt and scored continuation, tokenised so that the boundary between them is also one between tokens."""
    head, whole = _ids(tokenizer, prompt), _ids(tokenizer, prompt + continuation)
    # Tokenised together, as the model reads the text. Where a token would straddle the boundary, part of the prompt would be
    # scored with the continuation; there both are tokenised apart.
    tail = whole[len(head) :] if whole[: len(head)] == head else _ids(tokenizer, continuation)
    head, _ = _with_bos(head, tokenizer)
    if len(head) + len(tail) > config.max_length:
        raise DataError(
            f"row {number}: {len(head) + len(tail)} tokens are more than `max_length: {config.max_length}`, and the scored end "
            "would fall outside. Raise `max_length` or remove the row."
        )
    return _example(head + tail, [IGNORED] * len(head) + tail, number, tokenizer)


def _text(row: Mapping[str, Any], number: int, config: FisherConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    ids, bos = _with_bos(_ids(tokenizer, check_text(row, config.text_column, number)), tokenizer)
    # Each piece starts with BOS, or else with the last token of the piece before it, as context: every token is scored once.
    targets, step = ids[1:], config.max_length - 1
    if not targets:
        raise DataError(
            f"row {number}: `{config.text_column}` is a single token, so that nothing can be scored. Remove the row."
        )
    for start in range(0, len(targets), step):
        first, rest = (ids[0] if bos else ids[start]), targets[start : start + step]
        yield _example([first, *rest], [IGNORED, *rest], number, tokenizer)


def _tokens(
    row: Mapping[str, Any], number: int, config: FisherConfig, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[Example]:
    ids, labels, mask = list(row["input_ids"]), list(row["labels"]), row.get("attention_mask")
    if not len(ids) == len(labels) == len(ids if mask is None else mask):
        raise DataError(
            f"row {number}: `input_ids` ({len(ids)}), `labels` ({len(labels)}) and `attention_mask` differ in length."
        )
    positions, lengths = row.get("position_ids"), row.get("seq_lengths")
    starts = (
        0 if positions is None else sum(p == 0 and real for p, real in zip(positions, mask or [1] * len(ids), strict=False))
    )
    if starts > 1 or (lengths is not None and len(lengths) > 1):
        raise DataError(_PACKED.format(number=number, sign="`position_ids` or `seq_lengths` mark several documents"))
    if mask is not None:  # padding may lie on either side, or in between
        ids, labels = ([value for value, keep in zip(values, mask, strict=True) if keep] for values in (ids, labels))
    if len(ids) > config.max_length:
        raise DataError(
            f"row {number}: {len(ids)} tokens are more than `max_length: {config.max_length}`. Raise it or cut the row."
        )
    yield _example(ids, [IGNORED, *labels[1:]], number, tokenizer)


_PACKED = (
    "row {number}: {sign}. Documents packed in one row would count as one sample, and their gradients would be added before "
    "they are squared. Give one document per row (`packing=False`)."
)


def _example(ids: list[int], labels: list[int], number: int, tokenizer: PreTrainedTokenizerBase | None) -> Example:
    bos, eos = (None, None) if tokenizer is None else (tokenizer.bos_token_id, tokenizer.eos_token_id)
    if bos is not None and bos in (ids[1:-1] if bos == eos else ids[1:]):  # GPT-2's BOS is its EOS and may also end a row
        raise DataError(_PACKED.format(number=number, sign=f"the beginning-of-sequence token {bos} stands inside it"))
    example = Example(ids, labels)
    if not example.scored:
        raise DataError(
            f"row {number}: no token is scored (all labels are {IGNORED}, or the answer has no token). Remove the row."
        )
    return example


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _with_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], bool]:
    """Put BOS in front unless there is none or the text brought its own, so that it stands there exactly once."""
    bos = tokenizer.bos_token_id
    return (ids if bos is None or ids[:1] == [bos] else [bos, *ids]), bos is not None

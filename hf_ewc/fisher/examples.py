"""Token ids with the positions that are scored, made from rows of text, of questions, or of tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..config import FisherConfig
from ..data import check_question, check_text
from ..errors import DataError
from .templates import render_answer, render_question

logger = logging.getLogger(__name__)

IGNORED = -100  # the label of a position that is not scored, as everywhere in transformers


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
            For `labels: options`, every answer option as an example of its own (same prompt, scored continuation) in the
            data's order, the right one included, no two alike; otherwise empty.
    """

    input_ids: list[int]
    labels: list[int]
    options: tuple[Example, ...] = ()

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return sum(label != IGNORED for label in self.labels)


def examples_of_mmlu(
    row: Mapping[str, Any], number: int, config: FisherConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Example]:
    check_question(row, number)
    prompt = render_question(row["question"], row["choices"])
    pairs = [(prompt, render_answer(index)) for index in range(len(row["choices"]))]
    yield choice_example(pairs, row["answer"], f"row {number}", config, tokenizer)


def examples_of_completion(
    row: Mapping[str, Any], number: int, config: FisherConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Example]:
    prompt, completion = check_text(row, "prompt", number, may_be_empty=True), check_text(row, "completion", number)
    options = row["options"] if config.labels == "options" else [completion]
    if not isinstance(options, (list, tuple)) or not all(isinstance(option, str) for option in options):
        raise DataError(f"row {number}: `options` must be a list of strings, got {options!r}.")
    if completion not in options:
        raise DataError(f"row {number}: `options` must hold the completion {completion!r}, letter for letter, got {options!r}.")
    pairs = [(prompt, option) for option in options]
    yield choice_example(pairs, options.index(completion), f"row {number}", config, tokenizer)


def choice_example(
    pairs: list[tuple[str, str]],
    gold: int,
    where: str,
    config: FisherConfig,
    tokenizer: PreTrainedTokenizerBase,
    merge: bool = False,
) -> Example:
    """
    The right one of several (prompt, continuation) pairs, with all of them as its options if these are wanted. With `merge`,
    equal options count as one: benchmarks have a few such rows, and nobody can correct them there.
    """
    if config.labels != "options":
        return _continuation(*pairs[gold], where, config, tokenizer)
    if len(pairs) < 2:
        raise DataError(f"{where}: `labels: options` needs at least 2 options, there is {len(pairs)}. Remove the row.")
    options = [_continuation(*pair, where, config, tokenizer) for pair in pairs]
    for index, option in enumerate(options):
        if option in options[:index] and merge:
            logger.warning("%s: two options are the same tokens, %r; they count as one.", where, pairs[index][1])
        elif option in options[:index]:
            raise DataError(
                f"{where}: options {options.index(option) + 1} and {index + 1} are the same tokens, {pairs[index][1]!r}, so "
                "that the model cannot tell them apart. Correct or remove the row."
            )
    return replace(options[gold], options=tuple(option for n, option in enumerate(options) if option not in options[:n]))


def _continuation(
    prompt: str, continuation: str, where: str, config: FisherConfig, tokenizer: PreTrainedTokenizerBase
) -> Example:
    """Prompt and scored continuation, tokenised so that the boundary between them is also one between tokens."""
    head, whole = _ids(tokenizer, prompt), _ids(tokenizer, prompt + continuation)
    # Tokenised together, as the model reads the text. Where a token would straddle the boundary, part of the prompt would be
    # scored with the continuation; there both are tokenised apart.
    tail = whole[len(head) :] if whole[: len(head)] == head else _ids(tokenizer, continuation)
    head, _ = _with_bos(head, tokenizer)
    if len(head) + len(tail) > config.max_length:
        raise DataError(
            f"{where}: {len(head) + len(tail)} tokens are more than `max_length: {config.max_length}`, and the scored end "
            "would fall outside. Raise `max_length` or remove the row."
        )
    return _example(head + tail, [IGNORED] * len(head) + tail, where, tokenizer)


def examples_of_text(
    row: Mapping[str, Any], number: int, config: FisherConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Example]:
    yield from examples_of_running_text(check_text(row, config.text_column, number), f"row {number}", config, tokenizer)


def examples_of_running_text(
    text: str, where: str, config: FisherConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Example]:
    ids, bos = _with_bos(_ids(tokenizer, text), tokenizer)
    # Each piece starts with BOS, or else with the last token of the piece before it, as context: every token is scored once.
    targets, step = ids[1:], config.max_length - 1
    if not targets:
        raise DataError(f"{where}: its text is a single token, so that nothing can be scored. Remove the row.")
    for start in range(0, len(targets), step):
        first, rest = (ids[0] if bos else ids[start]), targets[start : start + step]
        yield _example([first, *rest], [IGNORED, *rest], where, tokenizer)


def examples_of_tokens(
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
        raise DataError(_PACKED.format(where=f"row {number}", sign="`position_ids` or `seq_lengths` mark several documents"))
    if mask is not None:  # padding may lie on either side, or in between
        ids, labels = ([value for value, keep in zip(values, mask, strict=True) if keep] for values in (ids, labels))
    if len(ids) > config.max_length:
        raise DataError(
            f"row {number}: {len(ids)} tokens are more than `max_length: {config.max_length}`. Raise it or cut the row."
        )
    yield _example(ids, labels, f"row {number}", tokenizer)


_PACKED = (
    "{where}: {sign}. Documents packed in one row would count as one sample, and their gradients would be added before "
    "they are squared. Give one document per row (`packing=False`)."
)


def _example(ids: list[int], labels: list[int], where: str, tokenizer: PreTrainedTokenizerBase | None) -> Example:
    bos, eos = (None, None) if tokenizer is None else (tokenizer.bos_token_id, tokenizer.eos_token_id)
    if bos is not None and bos in (ids[1:-1] if bos == eos else ids[1:]):  # GPT-2's BOS is its EOS and may also end a row
        raise DataError(_PACKED.format(where=where, sign=f"the beginning-of-sequence token {bos} stands inside it"))
    example = Example(ids, [IGNORED, *labels[1:]])  # nothing precedes the first token, so that nothing predicts it
    if not example.scored:
        raise DataError(f"{where}: no token is scored (all labels are {IGNORED}, or the answer has no token). Remove the row.")
    return example


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _with_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], bool]:
    """Put BOS in front unless there is none or the text brought its own, so that it stands there exactly once."""
    bos = tokenizer.bos_token_id
    return (ids if bos is None or ids[:1] == [bos] else [bos, *ids]), bos is not None

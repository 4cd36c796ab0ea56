"""The little world of the demo, or the user's own files: which text is learned, which is held out, which questions are probed.

`data/` was written for this project: 168 English documents about the Orrin Isles, an invented archipelago, 438 questions about
them in MMLU's form, and 105 Lithuanian documents about everyday things.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data import check_question, check_text, load_rows
from ..errors import DataError
from ..files import write_atomically
from ..fisher import render_answer, render_question

DATA = Path(__file__).parent / "data"
HELD_OUT_BYTES = 24_000  # per language: enough for a standard error of about 0.02 bits per byte, and scored in a second
MOST_BYTES = 4_000_000  # of a user's own text; the demo's few hundred steps would not see more


@dataclass
class World:
    """
    The demo's text and questions, split.

    The held-out tenth of each language (at most 24 kB) is never trained on. Of the questions, the base studies all, as a real
    base has read what its benchmarks ask; the Fisher probes one half, and accuracy is measured on the *other* half.
    """

    english: list[str]
    lithuanian: list[str]
    held_out: dict[str, list[str]]
    questions: list[dict[str, Any]]

    def write(self, folder: Path) -> dict[str, Path]:
        """Write what probes, training and evaluation read, as `.jsonl`; name → file."""
        parts = {
            **{name: [{"text": text} for text in texts] for name, texts in self.held_out.items()},
            "english_probe": [{"text": text} for text in self.english],
            "lithuanian_train": [{"text": text} for text in self.lithuanian],
            "questions_probe": self.questions[::2],
            "questions": self.questions[1::2],
        }
        lines = {name: (json.dumps(row, ensure_ascii=False) + "\n" for row in rows) for name, rows in parts.items()}
        return {name: write_atomically(folder / f"{name}.jsonl", "".join(rows)) for name, rows in lines.items()}


def make_world(english: str | None, lithuanian: str | None, questions: str | None, seed: int) -> World:
    """Load, check, shuffle and split the demo's data, or the user's (`None`: the shipped one)."""
    rng = random.Random(seed)
    kept = {}
    for name, source in (("english", english), ("lithuanian", lithuanian)):
        rows = load_rows(source or DATA / f"{name}.jsonl", columns=("text",))
        texts = [check_text(row, "text", number) for number, row in enumerate(rows, 1)]
        rng.shuffle(texts)
        kept[name] = _up_to(texts, MOST_BYTES)
    held_out = {name: _up_to(texts, min(HELD_OUT_BYTES, _bytes(texts) // 10)) for name, texts in kept.items()}
    for name, texts in held_out.items():
        if len(kept[name]) < 2:
            raise DataError(
                f"the {name} file holds one document, so none can be held out to measure on. Split it into several."
            )
        kept[name] = kept[name][len(texts) :]
    asked = [dict(row) for row in load_rows(questions or DATA / "questions.jsonl", columns=("question", "choices", "answer"))]
    for number, row in enumerate(asked, 1):
        check_question(row, number)
    rng.shuffle(asked)
    return World(kept["english"], kept["lithuanian"], held_out, asked)


def prompt(row: dict[str, Any]) -> str:
    """The question as the `mmlu` probe and the evaluation ask it."""
    return render_question(row["question"], row["choices"])


def answer(row: dict[str, Any]) -> str:
    """The letter of the right choice, as the probe and the evaluation expect it."""
    return render_answer(row["answer"])


def fitting(questions: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, context: int) -> list[dict[str, Any]]:
    """The questions of which prompt and answer fit into the model's context; none is cut, since a cut one has no answer."""
    kept = [row for row in questions if len(tokenizer(prompt(row) + answer(row))["input_ids"]) <= context]
    if len(kept) < 4:
        raise DataError(
            f"{len(kept)} of {len(questions)} questions fit into {context} tokens; at least 4 are needed, half for the "
            "Fisher's probe and half to measure on. Give more questions, or shorter ones."
        )
    return kept


def text_rows(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[dict[str, list[int]]]:
    """Documents cut into pieces of at most `length` tokens, a BOS before each; no piece spans two documents."""
    rows = []
    for text in texts:
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for start in range(0, len(ids), length - 1):
            piece = [tokenizer.bos_token_id, *ids[start : start + length - 1]]
            rows.append({"input_ids": piece, "labels": piece})
    return rows


def question_rows(questions: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """MMLU prompts of which only the answer's letter is scored."""
    rows = []
    for row in questions:
        asked = tokenizer(prompt(row))["input_ids"]
        letter = tokenizer(answer(row), add_special_tokens=False)["input_ids"]
        rows.append({"input_ids": [*asked, *letter], "labels": [-100] * len(asked) + letter})
    return rows


def interleaved(parts: Sequence[list[dict[str, Any]]], batch: int, steps: int, seed: int) -> Dataset:
    """`steps` batches, taken from the parts in turn, each part reshuffled whenever it is used up; to be read in this order."""
    rng = random.Random(seed)
    draw = [_endless(part, rng) for part in parts]
    return Dataset.from_list([draw[step % len(parts)]() for step in range(steps) for _ in range(batch)])


def _endless(rows: list[dict[str, Any]], rng: random.Random) -> Callable[[], dict[str, Any]]:
    deck: list[dict[str, Any]] = []

    def next_row() -> dict[str, Any]:
        if not deck:
            deck.extend(rng.sample(rows, len(rows)))
        return deck.pop()

    return next_row


def _bytes(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _up_to(texts: list[str], limit: int) -> list[str]:
    """The first documents, at least one, until `limit` bytes are reached."""
    total, count = 0, 0
    while count < len(texts) and (count == 0 or total < limit):
        total += len(texts[count].encode())
        count += 1
    return texts[:count]

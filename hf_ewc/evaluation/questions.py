"""Multiple-choice questions in MMLU's form, scored by lm-evaluation-harness, without a network."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import check_question, load_rows
from ..errors import DataError, EWCError
from ..fisher import render_answer, render_question
from .perplexity import context_length, evaluation_mode

TASK = "mmlu_letter"
TASKS = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class QuestionScores:
    """
    Answers to one set of questions.

    Parameters:
        correct (`list[int]`): 1 where the right letter was the likeliest, else 0, in the file's order.
        accuracy (`float`): Their mean.
        stderr (`float`, *optional*): Its standard error (sample deviation over √n); `None` for a single question.
        chance (`float`): What guessing gets: the mean of 1 / number of choices, from the rows.
    """

    correct: list[int]
    accuracy: float
    stderr: float | None
    chance: float


def load_questions(file: str, split: str | None = None, max_documents: int | None = None) -> Dataset:
    """Rows with `question`, `choices` and `answer`; a [`DataError`] names the first row that is no such question."""
    rows = load_rows(file, split=split, columns=("question", "choices", "answer"))
    rows = rows.select(range(min(len(rows), max_documents or len(rows))))
    for number, row in enumerate(rows, 1):
        try:
            check_question(row, number)
        except DataError as error:
            raise DataError(f"'{file}': {error}") from None
    return rows


def question_dataset(file: str, split: str | None = None, max_documents: int | None = None, **_: Any) -> dict[str, Dataset]:
    """`custom_dataset` of the task: lm-evaluation-harness passes the task's metadata, the file among it."""
    return {"test": load_questions(file, split, max_documents)}


def question_prompt(row: Mapping[str, Any]) -> str:
    """`doc_to_text` of the task."""
    return render_question(row["question"], row["choices"])


def question_answers(row: Mapping[str, Any]) -> list[str]:
    """`doc_to_choice` of the task: `[" A", " B", …]`, as many as the question has choices."""
    return [render_answer(i) for i in range(len(row["choices"]))]


def score_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: str,
    split: str | None = None,
    max_documents: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> QuestionScores:
    """
    Ask the questions of `file` and score the letters of the choices.

    The prompt starts with the tokenizer's BOS exactly once if it has one, as in the Fisher's `mmlu` probe. The softmax is
    taken in float32. The model's modes, the tokenizer and the random number generators are as before afterwards.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model; it stays where it is.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        file (`str`): Rows with `question`, `choices`, `answer`, see [`load_questions`].
        split (`str`, *optional*): Split of a dataset on the Hub.
        max_documents (`int`, *optional*): Ask only the first questions.
        batch_size (`int`, *optional*, defaults to 8): Questions per forward pass. Changes the result by rounding only.
        progress (`bool`, *optional*, defaults to `False`): Show the harness' progress bars.

    Returns:
        [`QuestionScores`].

    Raises:
        DataError: A row without a right answer, or a question longer than the model's context.
        EWCError: lm-evaluation-harness left out the score or a question (it does so silently).
    """
    rows = load_questions(file, split, max_documents)
    harness_model = _harness_model(model, tokenizer, batch_size)
    _check_lengths(rows, file, harness_model.tok_encode, context_length(model))
    with _contained(model, show_bars=progress):
        # `evaluate`, not `simple_evaluate`: that one reseeds every generator and inspects the machine for a third of a second.
        import lm_eval
        from lm_eval.tasks import TaskManager

        settings = {"file": str(file), "split": split, "max_documents": max_documents}
        tasks = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=settings)
        if TASK not in tasks.all_subtasks:
            raise EWCError(f"lm-evaluation-harness found no task `{TASK}` in {TASKS}; is hf_ewc installed completely?")
        output = lm_eval.evaluate(harness_model, tasks.load(TASK), log_samples=True)
    scores, samples = output["results"][TASK], output["samples"][TASK]
    if "acc,none" not in scores or len(samples) != len(rows):
        raise EWCError(
            f"lm-evaluation-harness scored {len(samples)} of {len(rows)} questions and reported {sorted(scores)} instead of "
            f"`acc,none`. Its version may not fit; try `pip install 'lm-eval==0.4.13'`. No result is better than a wrong one."
        )
    correct = [int(sample["acc"]) for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    stderr = scores.get("acc_stderr,none")
    return QuestionScores(
        correct=correct,
        accuracy=float(scores["acc,none"]),
        stderr=float(stderr) if len(rows) > 1 else None,
        chance=sum(1 / len(row["choices"]) for row in rows) / len(rows),
    )


def _harness_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """The model as lm-evaluation-harness wants it."""
    with _contained(model):  # HFLM's constructor calls `model.eval()`, and it sets the tokenizer's padding token
        from lm_eval.models.huggingface import HFLM

        class LetterLM(HFLM):
            # Differs from HFLM in one thing: BOS stands in front whenever the tokenizer *defines* one. HFLM leaves that to the
            # tokenizer's own habit, and some add an EOS behind the prompt, too.
            def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
                bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
                return bos + self.tokenizer.encode(string, add_special_tokens=False)

        return LetterLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, softmax_dtype="float32")


def _check_lengths(rows: Dataset, file: str, encode: Any, context: int | None) -> None:
    """lm-evaluation-harness would cut a long question from the left, BOS first, and only warn."""
    for number, row in enumerate(rows, 1):
        length = len(encode(question_prompt(row)))
        if context is not None and length > context:
            raise DataError(
                f"'{file}': row {number}: the question has {length} tokens, the model's context only {context}; its beginning "
                "would be cut off. Shorten or remove the row."
            )


@contextlib.contextmanager
def _contained(model: PreTrainedModel, show_bars: bool = False) -> Iterator[None]:
    """Leave no trace of lm-evaluation-harness: eval mode, advice in the log (errors show), progress bars, random numbers."""
    logger, state = logging.getLogger("lm_eval"), random.getstate()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with evaluation_mode(model), contextlib.redirect_stderr(sys.stderr if show_bars else io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        random.setstate(state)  # it draws names for its requests from Python's global generator

"""What a model kept and what it learned: bits per byte of texts, accuracy on questions, and the pages made of them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .figures import retention_figure
from .labels import place_labels
from .report import Column, columns, html_report, metrics_text, table_markdown, table_text, write_report
from .results import Row, domain_titles, load_results, rows, save_results

if TYPE_CHECKING:
    from .perplexity import BitsPerByte, TextScores, TokenPerplexity, score_texts
    from .questions import QuestionScores, question_answers, question_dataset, question_prompt, score_questions
    from .run import evaluate_model

__all__ = [
    "BitsPerByte",
    "Column",
    "QuestionScores",
    "Row",
    "TextScores",
    "TokenPerplexity",
    "columns",
    "domain_titles",
    "evaluate_model",
    "html_report",
    "load_results",
    "metrics_text",
    "place_labels",
    "question_answers",
    "question_dataset",
    "question_prompt",
    "retention_figure",
    "rows",
    "save_results",
    "score_questions",
    "score_texts",
    "table_markdown",
    "table_text",
    "write_report",
]

# What measures needs datasets, evaluate and lm-eval; who only reads results does without.
_MEASURES = {
    **dict.fromkeys(("BitsPerByte", "TextScores", "TokenPerplexity", "score_texts"), "perplexity"),
    **dict.fromkeys(
        ("QuestionScores", "question_answers", "question_dataset", "question_prompt", "score_questions"), "questions"
    ),
    "evaluate_model": "run",
}


def __getattr__(name: str) -> Any:
    if name in _MEASURES:
        return getattr(importlib.import_module(f".{_MEASURES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

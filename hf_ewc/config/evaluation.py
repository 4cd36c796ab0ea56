"""[`EvaluationConfig`]: what to measure on a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import ConfigError
from .checks import DTYPES, at_least, choice, raise_problems


@dataclass
class EvaluationConfig:
    """
    What to measure on a model: bits per byte of texts, and accuracy on multiple-choice questions.

    Parameters:
        texts (`dict[str, str]`, *optional*):
            Name → local file or dataset id with a text column, for example `{"english": "en.jsonl"}`. Each gives
            `bits_per_byte` (comparable between tokenizers and languages) and `token_perplexity`.
        questions (`dict[str, str]`, *optional*):
            Name → local `.jsonl` file in MMLU's form (`question`, `choices`, `answer`). Each gives `accuracy` and its standard
            error through lm-evaluation-harness.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column of the texts.
        split (`str`, *optional*, defaults to `"test"`):
            Split of datasets on the Hub; a local file is one split.
        max_documents (`int`, *optional*):
            Score only the first documents and questions.
        window (`int`, *optional*):
            Window in tokens, the leading BOS included. Defaults to the model's context, at most 2048.
        batch_size (`int`, *optional*, defaults to `8`):
            Windows (and questions) per forward pass. Never changes the result beyond rounding.
        dtype, device, revision:
            As in [`FisherConfig`].
    """

    texts: dict[str, str] | str | None = field(
        default=None, metadata={"help": 'Name → file of texts, e.g. {"english": "en.jsonl"}.'}
    )
    questions: dict[str, str] | str | None = field(
        default=None, metadata={"help": 'Name → file of questions, e.g. {"facts": "questions.jsonl"}.'}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    split: str = field(default="test", metadata={"help": "Split of datasets on the Hub."})
    max_documents: int | None = field(default=None, metadata={"help": "Score only the first documents and questions."})
    window: int | None = field(default=None, metadata={"help": "Window in tokens, BOS included."})
    batch_size: int = field(default=8, metadata={"help": "Windows per forward pass."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    dtype: str = field(default="float32", metadata={"help": "Dtype in which the model is loaded."})
    device: str | None = field(default=None, metadata={"help": "Device; the accelerator if there is one."})

    def __post_init__(self) -> None:
        import json

        for name in ("texts", "questions"):  # a flag on the command line arrives as a JSON string
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    value = json.loads(value)
                except json.JSONDecodeError:
                    raise ConfigError(
                        f'`{name}` must map names to files, e.g. --{name} \'{{"english": "en.jsonl"}}\'; got {value!r}.'
                    ) from None
            setattr(self, name, dict(value or {}))

    def problems(self) -> list[str]:
        found = choice("dtype", self.dtype, DTYPES)
        if not self.texts and not self.questions:
            found.append("there is nothing to evaluate: give `texts` or `questions`.")
        for name in ("max_documents", "batch_size"):
            found += at_least(name, getattr(self, name), 1)
        found += at_least("window", self.window, 2)
        return found

    def check(self) -> None:
        raise_problems("This evaluation cannot run", self.problems())

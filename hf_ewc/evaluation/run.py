"""One model, all its measurements: [`evaluate_model`]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..artifact import BaseModel
from ..config import EvaluationConfig
from ..data import check_text, load_rows, resolve_dataset_revision
from ..devices import usable_device
from ..errors import ConfigError, DataError, HubError
from ..hub import pin
from .perplexity import choose_window, score_texts
from .questions import load_questions, score_questions


def evaluate_model(
    model: PreTrainedModel | str | Path,
    config: EvaluationConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """
    Measure bits per byte on texts and accuracy on questions.

    All files are read and checked before the model is loaded, so that a broken last row costs no time.

    Args:
        model ([`~transformers.PreTrainedModel`] or `str`):
            A causal language model, which stays on its device and is left as it was found (train mode, caches, generators);
            or a folder or Hub id, which is loaded as `config` says.
        config ([`EvaluationConfig`]): What to measure.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Defaults to the one saved with the model.
        progress (`bool`, *optional*, defaults to `False`): Show progress bars.

    Returns:
        `dict`, ready for JSON:
        `texts` {name: {`bits_per_byte`, `token_perplexity`, `nats_per_token`, `documents`, `tokens`, `bytes`}},
        `questions` {name: {`accuracy`, `stderr`, `chance`, `n`; of a dataset on the Hub also `dataset`, `dataset_revision`,
        `split`, `limit`}},
        `samples` {`texts` {name: {`nats`, `bytes`} per document}, `questions` {name: 0 or 1 per question}} for paired tests,
        `model` {`name`, `revision`, `fingerprint`, `architecture`, `parameters`, `dtype`, `window`}: of a model on the Hub the
        commit that was loaded, and of one that is loaded here the hash of its weight files, see [`BaseModel`]; `None` for a
        model in memory and for pickles.

    Raises:
        ConfigError: Nothing to evaluate, an impossible setting, a model without tokenizer.
        DataError: A file or row that cannot be used, or a model that cannot be loaded.

    Example:

    ```python
    >>> metrics = evaluate_model("google/gemma-2-2b", EvaluationConfig(texts={"english": "en.jsonl"}))
    >>> metrics["texts"]["english"]["bits_per_byte"]
    0.71
    ```
    """
    config.check()
    texts = {name: _load_texts(file, config) for name, file in config.texts.items()}  # type: ignore[union-attr]
    for file in config.questions.values():  # type: ignore[union-attr]
        load_questions(file, config.split, config.max_documents)
    name = str(model if isinstance(model, (str, Path)) else model.name_or_path)
    found, commit = None, config.revision
    if isinstance(model, (str, Path)):
        found = _resolve(name, config.revision)
        commit = found.revision if found else _commit(name, config.revision)
    tokenizer = tokenizer or _load(AutoTokenizer, name, commit)
    if isinstance(model, (str, Path)):
        source = str(found.folder) if found else name  # the very files that were hashed
        loaded = _load(AutoModelForCausalLM, source, commit, dtype=getattr(torch, config.dtype)).to(
            usable_device(config.device)
        )
    else:
        loaded = model
    window = choose_window(loaded, config.window)

    metrics: dict[str, Any] = {"texts": {}, "questions": {}, "samples": {"texts": {}, "questions": {}}}
    for domain, documents in texts.items():
        scores = score_texts(loaded, tokenizer, documents, window, config.batch_size, progress=progress)
        metrics["texts"][domain] = {
            "bits_per_byte": scores.bits_per_byte,
            "token_perplexity": scores.token_perplexity,
            "nats_per_token": scores.nats_per_token,
            "documents": len(documents),
            "tokens": sum(scores.tokens),
            "bytes": sum(scores.bytes),
        }
        metrics["samples"]["texts"][domain] = {"nats": scores.nats, "bytes": scores.bytes}
    for subject, file in config.questions.items():  # type: ignore[union-attr]
        answers = score_questions(loaded, tokenizer, file, config.split, config.max_documents, config.batch_size, progress)
        metrics["questions"][subject] = {
            "accuracy": answers.accuracy,
            "stderr": answers.stderr,
            "chance": answers.chance,
            "n": len(answers.correct),
            **_origin(file, config),
        }
        metrics["samples"]["questions"][subject] = answers.correct
    metrics["model"] = {
        "name": Path(name).name if Path(name).is_dir() else name,  # not where it lies on this machine
        "revision": commit,
        "fingerprint": found.fingerprint if found else None,
        "architecture": type(loaded).__name__,
        "parameters": loaded.num_parameters(),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "window": window,
    }
    return metrics


def _origin(dataset: str, config: EvaluationConfig) -> dict[str, Any]:
    """Which dataset on the Hub a question set is, at which commit, and whether all of it was asked; nothing of a local file."""
    if Path(dataset).exists():
        return {}
    commit = resolve_dataset_revision(dataset, None)
    return {"dataset": dataset, "dataset_revision": commit, "split": config.split, "limit": config.max_documents}


def _load_texts(file: str, config: EvaluationConfig) -> list[str]:
    rows = load_rows(file, split=config.split, columns=(config.text_column,))
    rows = rows.select(range(min(len(rows), config.max_documents or len(rows))))
    try:
        texts = [check_text(row, config.text_column, number, may_be_empty=True) for number, row in enumerate(rows, 1)]
    except DataError as error:
        raise DataError(f"'{file}': {error}") from None
    if not any(texts):
        raise DataError(f"'{file}': all {len(texts)} documents are empty, so there is nothing to score.")
    return texts


def _resolve(name: str, revision: str | None) -> BaseModel | None:
    """The model by the hash of its weights, so that figures can be told to be of these; `None` for pickles and adapters."""
    try:
        return BaseModel.resolve(name, None if Path(name).expanduser().is_dir() else revision)
    except DataError:  # what cannot be measured either is refused on loading
        return None


def _commit(name: str, revision: str | None) -> str | None:
    """The commit of a model on the Hub whose weights have no hash; of one that cannot be asked for, the revision as given."""
    if Path(name).expanduser().is_dir():
        return None
    try:
        return pin(name, "model", revision)
    except HubError:
        return revision


def _load(loader: Any, source: str, revision: str | None, **kwargs: Any) -> Any:
    if not source:
        raise ConfigError("this model was not loaded from a folder, so its tokenizer is unknown. Pass `tokenizer=…`.")
    try:
        return loader.from_pretrained(source, revision=revision or "main", **kwargs)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load '{source}': {error}") from error

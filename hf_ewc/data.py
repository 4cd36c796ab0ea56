"""Rows from files and from the Hub: one loader and one set of row checks for probes, training texts and evaluation.

Local files are read straight into memory instead of through `datasets`' builders: nothing is written to a cache folder, a
broken line is reported with its number, and `"2020-01-01"` stays text (Arrow's JSON reader makes a timestamp of it).
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO, overload

import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from datasets.table import InMemoryTable
from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionResolutionError

from .errors import DataError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # names of a question's choices, so also the most choices a question may have
KINDS = (".json", ".jsonl", ".csv", ".parquet", ".txt")
UNFIT = (
    pa.ArrowInvalid,
    pa.ArrowTypeError,
    OverflowError,
    UnicodeError,
)  # what Arrow says of a value that a column cannot take
ONE_PER_LINE = 'Write one object per line, such as {"text": "…"}.'


@overload
def load_rows(
    dataset: str | Path,
    *,
    config: str | None = ...,
    split: str | None = ...,
    revision: str | None = ...,
    columns: Sequence[str] = ...,
    streaming: Literal[False] = ...,
) -> Dataset: ...


@overload
def load_rows(
    dataset: str | Path,
    *,
    config: str | None = ...,
    split: str | None = ...,
    revision: str | None = ...,
    columns: Sequence[str] = ...,
    streaming: bool,
) -> Dataset | IterableDataset: ...


def load_rows(
    dataset: str | Path,
    *,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    columns: Sequence[str] = (),
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """
    Read the rows that a `dataset` setting names.

    Args:
        dataset (`str` or `Path`):
            A local `.json`, `.jsonl`, `.csv`, `.parquet` or `.txt` file (one row per line that is not blank, in column `text`),
            a folder written by `save_to_disk`, or a dataset id on the Hub.
        config, split, revision (`str`, *optional*):
            Configuration, split (default `train`) and revision on the Hub. A local file is one split, so they do not apply; of
            a saved `DatasetDict`, `split` picks one member.
        columns (`Sequence[str]`, *optional*):
            Columns that must be there; the others are dropped. Empty: keep everything.
        streaming (`bool`, *optional*, defaults to `False`):
            Return an `IterableDataset` that never holds the whole, for files larger than memory. `datasets` then leaves an
            empty lock file in its cache.

    Returns:
        [`~datasets.Dataset`], or [`~datasets.IterableDataset`] when streaming, with at least one row.

    Raises:
        [`DataError`]: no such file or dataset, an unreadable or empty one, a line that is not a JSON object, a missing column
        (the error lists those that are there), or values of mixed type in one column (the error names the row).
    """
    path = Path(dataset)
    rows: Dataset | IterableDataset
    if path.is_dir():
        rows = _load_saved(path, split)
        rows = rows.to_iterable_dataset() if streaming else rows
    elif path.is_file():
        rows = _load_file(path, columns, streaming)
    elif path.suffix.lower() in KINDS or path.is_absolute() or str(dataset).startswith(".") or len(path.parts) > 2:
        raise DataError(f"there is no file '{dataset}'. Check the path; relative paths start at {Path.cwd().name}/.")
    else:
        rows = _load_hub(str(dataset), config, split, revision, streaming)
    first = next(iter(rows), None)
    if first is None:
        raise DataError(f"'{dataset}' holds no rows, so there is nothing to measure or to learn from.")
    require_columns(first, columns, str(dataset))
    return rows.select_columns(list(columns)) if columns else rows


def require_columns(there: Iterable[str], columns: Iterable[str], source: str) -> None:
    """Raise a [`DataError`] that lists the columns that are `there`, when one of `columns` is not among them."""
    there = list(there)
    missing = [name for name in columns if name not in there]
    if missing:
        raise DataError(
            f"'{source}' has no column {', '.join(f'`{name}`' for name in missing)}; its columns are "
            f"{', '.join(f'`{name}`' for name in there)}. Rename a column, or name the right one in the settings."
        )


def check_text(row: Mapping[str, Any], column: str, number: int, *, may_be_empty: bool = False) -> str:
    """Return the string `row[column]`, or raise a [`DataError`] that names the row (counted from 1, as lines of a file are)."""
    value = row.get(column)
    if not isinstance(value, str):
        hint = "" if not isinstance(value, list) else " Render a conversation to text first (`tokenizer.apply_chat_template`)."
        raise DataError(f"row {number}: `{column}` must be a string, got {_shown(value)}.{hint}")
    if not value.strip() and not may_be_empty:
        raise DataError(f"row {number}: `{column}` is empty, so there is nothing to score. Remove the row.")
    return value


def check_question(row: Mapping[str, Any], number: int) -> None:
    """
    Check a multiple-choice row in MMLU's form: `question` (`str`), `choices` (2 to 26 `str`), `answer` (`int`, from 0).

    Raises [`DataError`] with the row's number (counted from 1). A question without a right answer would otherwise be scored
    against an arbitrary letter, silently.
    """
    check_text(row, "question", number)
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, (list, tuple)) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"row {number}: `choices` must be a list of strings, got {_shown(choices)}.")
    if not 2 <= len(choices) <= len(LETTERS):
        raise DataError(f"row {number}: a question needs 2 to {len(LETTERS)} choices, this one has {len(choices)}.")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(
            f"row {number}: `answer` must be the index of the right choice, an int from 0 to {len(choices) - 1}, got "
            f"{_shown(answer)}. Correct the row or remove it."
        )


def refuse_test_split(split: str | None, dataset: str) -> None:
    """Raise a [`DataError`] for a split whose name contains `test`."""
    if split is not None and "test" in split.lower():
        raise DataError(
            f"split '{split}' of '{dataset}' is a test split. What is measured on it is used for training, so a "
            "benchmark that is then reported on the same rows would be flattered. Take a train or validation split "
            "(`dataset_split`), or set `allow_test_split: true` if nothing will be reported on it."
        )


def names_a_test_split(path: str | Path) -> bool:
    """Whether a file's name has the word `test` in it (`mmlu_test.jsonl`, but not `latest.jsonl`)."""
    return re.search(r"(^|[^a-z])test([^a-z]|$)", Path(path).stem.lower()) is not None


def resolve_dataset_revision(dataset: str, revision: str | None) -> str | None:
    """
    The 40-hex commit of a dataset on the Hub, to load and to record exactly that one. For a local path `None`; without a
    connection and a cached reference, `revision` as it was given.
    """
    if Path(dataset).exists():
        return None
    try:
        return HfApi().resolve_revision(dataset, repo_type="dataset", revision=revision).resolved  # as a string it is the name
    except (RevisionResolutionError, OSError, ValueError):
        # `load_rows` reports what is wrong, or finds the dataset in its own cache.
        return revision


def _shown(value: Any) -> str:
    text = repr(value)
    return "nothing" if value is None else f"{text[:60]}{'…' if len(text) > 60 else ''} ({type(value).__name__})"


def _load_file(path: Path, columns: Sequence[str], streaming: bool) -> Dataset | IterableDataset:
    if path.suffix.lower() not in KINDS:
        raise DataError(
            f"'{path.name}' is of no kind that can be read: {', '.join(KINDS)}. Convert it, or rename it if it is one."
        )
    if path.stat().st_size == 0:
        raise DataError(f"'{path.name}' is empty (0 bytes). Was it written to the end?")
    if streaming:
        return IterableDataset.from_generator(_file_rows, gen_kwargs={"path": path})
    if path.suffix.lower() == ".parquet":
        with _readable(path):
            return Dataset(InMemoryTable(pa.parquet.read_table(path)))
    values: dict[str, list[Any]] = {}
    for count, row in enumerate(_file_rows(path)):
        for name, value in row.items():
            if not columns or name in columns or count == 0:  # all of the first row's, for the error that lists what is there
                values.setdefault(name, [None] * count).append(value)  # rows before a column's first lack it
        for column in values.values():
            column += [None] * (count + 1 - len(column))
    if columns and set(columns) <= set(values):
        values = {name: values[name] for name in columns}
    return Dataset(InMemoryTable(pa.table({name: _one_type(name, column, path.name) for name, column in values.items()})))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"'{path.name}' cannot be read as {path.suffix} in UTF-8: {error}.") from error


def _file_rows(path: Path) -> Iterator[dict[str, Any]]:
    """One `dict` per row of a file, read piece by piece (but for a `.json` that is one list)."""
    kind = path.suffix.lower()
    with _readable(path):
        if kind == ".parquet":
            for batch in pa.parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
            return
        with path.open(encoding="utf-8-sig", newline="" if kind == ".csv" else None) as file:
            if kind == ".txt":
                yield from ({"text": line.rstrip("\n")} for line in file if line.strip())
            elif kind == ".csv":
                csv.field_size_limit(1 << 30)  # the default refuses documents above 128 KB
                yield from csv.DictReader(file, restkey="(fields without a name)")
            else:
                yield from _json_rows(file, path)


def _json_rows(file: TextIO, path: Path) -> Iterator[dict[str, Any]]:
    one_list = path.suffix.lower() == ".json" and file.read(256).lstrip().startswith("[")
    file.seek(0)
    lines: Iterable[tuple[int, Any]]
    if one_list:
        lines = enumerate(_json(file.read(), f"'{path.name}'"), 1)
    else:
        lines = ((n, _json(line, f"line {n} of '{path.name}'")) for n, line in enumerate(file, 1) if line.strip())
    for number, row in lines:
        if not isinstance(row, dict):
            raise DataError(f"line {number} of '{path.name}' is no JSON object but {_shown(row)}. {ONE_PER_LINE}")
        yield row


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error}. {ONE_PER_LINE}") from error


def _one_type(name: str, column: list[Any], source: str) -> pa.Array:
    try:
        return pa.array(column)
    except UNFIT as error:
        first = next(number for number, value in enumerate(column) if value is not None)
        for number, value in enumerate(column, 1):
            try:
                pa.array([column[first], value])
            except UNFIT:
                raise DataError(
                    f"row {number} of '{source}': `{name}` is {_shown(value)}, but row {first + 1} holds "
                    f"{_shown(column[first])}. One column holds one type; correct the row."
                ) from error
        raise DataError(f"column `{name}` of '{source}' mixes types: {error}.") from error


def _load_saved(folder: Path, split: str | None) -> Dataset:
    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise DataError(
            f"'{folder.name}' is a folder, but `save_to_disk` did not write it (neither state.json nor dataset_dict.json is in "
            "it). Name a file in it, or save the dataset with `dataset.save_to_disk(folder)`."
        )
    saved = load_from_disk(str(folder))
    if not isinstance(saved, DatasetDict):
        return saved
    if (wanted := split or "train") not in saved:
        raise DataError(f"'{folder.name}' has no split '{wanted}'; its splits are {', '.join(saved)}. Set the split.")
    return saved[wanted]


def _load_hub(dataset: str, config: str | None, split: str | None, revision: str | None, streaming: bool) -> Any:
    split = split or "train"
    try:
        return load_dataset(dataset, name=config, split=split, revision=revision, streaming=streaming)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"'{dataset}' is no local file, and loading it from the Hub (configuration {config}, split {split}, revision "
            f"{revision}) failed: {error}. Check the spelling and the connection (`hf auth login` for gated data), or give a "
            f"local {', '.join(KINDS)} file."
        ) from error

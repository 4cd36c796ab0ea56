"""Rows: every kind of file, and each way in which one can be unusable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import tiny
from datasets import Dataset, DatasetDict, IterableDataset

from hf_ewc import DataError
from hf_ewc.data import check_question, check_text, load_rows, names_a_test_split

ROWS = [{"text": "Žiema", "n": 1}, {"text": "2020-01-01", "n": 2}, {"text": "12", "n": 3}]
TEXTS = [str(row["text"]) for row in ROWS]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_rows(folder: Path, kind: str) -> Path:
    if kind == "jsonl":
        return tiny.write_jsonl(folder / "rows.jsonl", ROWS)
    if kind == "json":
        return write(folder, "rows.json", json.dumps(ROWS, indent=2))
    if kind == "json of lines":
        return tiny.write_jsonl(folder / "rows.json", ROWS)
    if kind == "csv":
        return write(folder, "rows.csv", "text,n\n" + "".join(f"{row['text']},{row['n']}\n" for row in ROWS))
    if kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
        return folder / "rows.parquet"
    if kind == "txt":
        return write(folder, "rows.txt", "\n\n".join(TEXTS) + "\n")
    Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("kind", ["jsonl", "json", "json of lines", "csv", "parquet", "txt", "saved"])
def test_every_kind_of_local_file_gives_the_same_rows(tmp_path, kind):
    rows = load_rows(write_rows(tmp_path, kind), columns=["text"])
    assert rows.column_names == ["text"]
    assert rows["text"][:] == TEXTS, "text stays text, also where it looks like a date or a number"


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "txt", "saved"])
def test_streaming_gives_the_same_rows(tmp_path, kind):
    rows = load_rows(write_rows(tmp_path, kind), columns=["text"], streaming=True)
    assert isinstance(rows, IterableDataset)
    assert [row["text"] for row in rows] == TEXTS
    with pytest.raises(DataError, match="no column `body`"):
        load_rows(write_rows(tmp_path, kind), columns=["body"], streaming=True)


def test_without_columns_everything_is_kept(tmp_path):
    assert load_rows(write_rows(tmp_path, "jsonl")).to_list() == ROWS


def test_reading_a_local_file_writes_nothing_and_needs_no_network(tmp_path):
    path, home = tiny.write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "home"
    environment = {**os.environ, "HF_HOME": str(home), "HOME": str(home), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    script = f"from hf_ewc.data import load_rows as load; print(len(load({str(path)!r})))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3"
    assert [found for found in home.rglob("*") if found.is_file()] == []
    assert list(tmp_path.glob("*.jsonl")) == [path]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", r"'empty.jsonl' is empty \(0 bytes\)"),
        ("blank.jsonl", "\n\n", "holds no rows"),
        ("blank.txt", "\n \n", "holds no rows"),
        ("head.csv", "text\n", "holds no rows"),
        ("list.json", "[]", "holds no rows"),
        ("cut.jsonl", '{"text": "a"}\n{"text": "b', "line 2 of 'cut.jsonl' is not JSON"),
        ("cut.json", '[{"text": "a"},', "'cut.json' is not JSON"),
        ("strings.jsonl", '{"text": "a"}\n"b"\n', "line 2 of 'strings.jsonl' is no JSON object but 'b'"),
        (
            "mixed.jsonl",
            '{"text": "a"}\n{"text": 5}\n',
            r"row 2 of 'mixed.jsonl': `text` is 5 \(int\), but row 1 holds 'a' \(str\)",
        ),
        ("other.jsonl", '{"title": "a", "body": "b"}\n', "no column `text`; its columns are `title`, `body`"),
        ("latin.jsonl", b'{"text": "\xe9"}\n', "cannot be read as .jsonl in UTF-8"),
        ("broken.parquet", "PAR1 no", "cannot be read as .parquet"),
        ("data.xlsx", "x", "of no kind that can be read"),
    ],
)
def test_unusable_files_are_refused(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        load_rows(write(tmp_path, name, content), columns=["text"])


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/nowhere", "some/deep/folder"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name):
    with pytest.raises(DataError, match="there is no file"):
        load_rows(name)


def test_a_hub_dataset_that_cannot_be_had_offline_says_so():
    with pytest.raises(DataError, match=r"'nobody/nothing' is no local file, and loading it from the Hub"):
        load_rows("nobody/nothing", columns=["text"])


def test_a_row_that_lacks_a_column_is_reported_as_that_row(tmp_path):
    rows = load_rows(write(tmp_path, "gap.jsonl", '{"text": "a"}\n{"n": 1}\n{"text": "c"}\n'), columns=["text"])
    assert rows["text"][:] == ["a", None, "c"]
    with pytest.raises(DataError, match="row 2: `text` must be a string, got nothing"):
        check_text(rows[1], "text", 2)


def test_mixed_types_in_columns_that_nobody_asked_for_do_no_harm(tmp_path):
    path = write(tmp_path, "rows.jsonl", '{"text": "a", "id": 1}\n{"text": "b", "id": "x", "new": 1}\n')
    assert load_rows(path, columns=["text"]).to_list() == [{"text": "a"}, {"text": "b"}]


def test_splits_of_a_saved_dataset_dict(tmp_path):
    part = Dataset.from_list(ROWS)
    DatasetDict({"train": part, "validation": part.select([0])}).save_to_disk(tmp_path / "saved")
    assert len(load_rows(tmp_path / "saved")) == 3
    assert len(load_rows(tmp_path / "saved", split="validation")) == 1
    with pytest.raises(DataError, match="no split 'test'; its splits are train, validation"):
        load_rows(tmp_path / "saved", split="test")
    with pytest.raises(DataError, match="`save_to_disk` did not write it"):
        load_rows(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "`answer` must be the index.*got nothing"),
        ({"answer": -1}, "`answer` must be"),
        ({"answer": True}, "`answer` must be"),
        ({"answer": "B"}, r"`answer` must be .* got 'B' \(str\)"),
        ({"choices": "abcd"}, "`choices` must be a list of strings"),
        ({"choices": {"text": ["a"], "label": ["A"]}}, "`choices` must be a list of strings"),
        ({"choices": ["a", 2]}, "`choices` must be a list of strings"),
        ({"choices": ["a"], "answer": 0}, "needs 2 to 26 choices, this one has 1"),
        ({"choices": ["a"] * 27}, "needs 2 to 26 choices"),
        ({"question": ""}, "`question` is empty"),
    ],
)
def test_a_question_without_a_right_answer_is_refused(change, message):
    check_question(tiny.QUESTIONS[0], 7)
    with pytest.raises(DataError, match=f"row 7: .*{message}"):
        check_question({**tiny.QUESTIONS[0], **change}, 7)


def test_only_the_word_test_names_a_test_split():
    assert all(map(names_a_test_split, ("test.jsonl", "mmlu_test_sample.jsonl", "x/MMLU-Test.json")))
    assert not any(map(names_a_test_split, ("latest.jsonl", "contest.jsonl", "test_data/train.jsonl")))

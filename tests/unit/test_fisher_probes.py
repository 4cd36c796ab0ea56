"""Probes: what is scored, where BOS stands, how long text is cut, and which rows are refused."""

from __future__ import annotations

import logging

import pytest
import tiny
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ewc import DataError, FisherConfig
from hf_ewc.fisher import Example, build_probe, collate, render_answer, render_question, template_sha256

TOKENIZER = tiny.make_tokenizer()
BOS = TOKENIZER.bos_token_id


def probe(rows=None, tokenizer=TOKENIZER, **config):
    if rows is None:
        config.setdefault("probe", "mmlu")
    return build_probe(FisherConfig(**config), tokenizer, rows)


def no_bos():
    tokenizer = tiny.make_tokenizer()
    tokenizer.bos_token = None
    return tokenizer


def scored(example: Example) -> str:
    return TOKENIZER.decode([label for label in example.labels if label != -100])


def test_the_letter_of_the_right_answer_is_scored_after_mmlus_prompt():
    examples = probe(tiny.QUESTIONS).examples
    assert [scored(example) for example in examples] == [" B", " A", " C", " D", " A", " B"]
    assert TOKENIZER.decode(examples[0].input_ids[1:]) == "Which animal barks?\nA. cat\nB. dog\nC. fish\nD. hen\nAnswer: B"


def test_the_prompt_is_worded_as_in_lm_eval():
    question = " How is iron transported?\n"  # real MMLU rows carry such white space
    assert (
        render_question(question, ["a", "b", "c"]) + render_answer(2) == "How is iron transported?\nA. a\nB. b\nC. c\nAnswer: C"
    )
    assert len({template_sha256(kind) for kind in ("mmlu", "completion", "text", "tokens")}) == 4


def test_the_completion_is_scored_and_the_prompt_is_not():
    [example] = probe([{"prompt": "The gates open before", "completion": " dawn."}], probe="completion").examples
    assert scored(example) == " dawn."
    assert TOKENIZER.decode(example.input_ids) == "<bos>The gates open before dawn."


@given(st.text(max_size=30), st.text(min_size=1, max_size=30).filter(str.strip))
@settings(deadline=None)
def test_prompt_and_completion_meet_between_tokens_for_any_text(prompt, completion):
    [example] = probe([{"prompt": prompt, "completion": completion}], probe="completion").examples
    first = next(index for index, label in enumerate(example.labels) if label != -100)
    assert example.labels == [-100] * first + example.input_ids[first:]
    assert TOKENIZER.decode(example.input_ids[first:]) == TOKENIZER.decode(
        TOKENIZER(completion, add_special_tokens=False)["input_ids"]
    )


def test_a_token_across_the_boundary_is_split_there():
    assert len(TOKENIZER("in", add_special_tokens=False)["input_ids"]) == 1
    [example] = probe([{"prompt": "i", "completion": "n time"}], probe="completion").examples
    assert scored(example) == "n time"


@pytest.mark.parametrize("text", ["The glass is blown at night.", "<bos>The glass is blown at night."])
def test_bos_starts_every_example_exactly_once(text):
    for config in ({"probe": "text"}, {"probe": "text", "max_length": 5}):
        for example in probe([{"text": text}], **config).examples:
            assert example.input_ids.count(BOS) == 1
            assert example.input_ids[0] == BOS
            assert example.labels[0] == -100
    [example] = probe([{"prompt": text, "completion": " Why?"}], probe="completion").examples
    assert example.input_ids.count(BOS) == 1


def test_a_tokenizer_without_bos_gets_none_and_the_first_token_is_context():
    [example] = probe([{"text": tiny.TEXTS[0]}], no_bos(), probe="text").examples
    assert example.input_ids == TOKENIZER(tiny.TEXTS[0], add_special_tokens=False)["input_ids"]
    assert example.labels == [-100, *example.input_ids[1:]]


@given(st.sampled_from(tiny.TEXTS), st.integers(2, 40), st.booleans())
@settings(deadline=None)
def test_long_text_is_cut_into_pieces_that_score_every_token_once(text, max_length, with_bos):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    examples = probe([{"text": text}], TOKENIZER if with_bos else no_bos(), probe="text", max_length=max_length).examples
    targets = [label for example in examples for label in example.labels if label != -100]
    assert targets == (ids if with_bos else ids[1:])
    assert all(2 <= len(example.input_ids) <= max_length for example in examples)


def test_max_examples_is_a_seeded_draw():
    rows = [{"text": f"{n} boats"} for n in range(50)]
    first, same, other = (probe(rows, probe="text", max_examples=8, seed=seed).examples for seed in (1, 1, 2))
    assert first == same != other
    assert len(first) == 8
    assert first != probe(rows[:8], probe="text").examples, "drawn, not the first ones"


def test_the_fingerprint_depends_on_ids_labels_and_order():
    ids = [{"input_ids": [2, 50, 51], "labels": [-100, 50, 51]}, {"input_ids": [2, 52], "labels": [-100, 52]}]
    masked = [{"input_ids": [2, 50, 51], "labels": [-100, -100, 51]}, ids[1]]
    assert len({probe(rows).ids_sha256 for rows in (ids, ids[::-1], masked)}) == 3
    assert probe(ids).ids_sha256 == probe(Dataset.from_list(ids)).ids_sha256


def test_tokenised_rows_are_taken_as_they_are_without_their_padding():
    rows = [{"input_ids": [0, 0, 2, 50, 51], "labels": [-100, -100, 2, 50, 51], "attention_mask": [0, 0, 1, 1, 1]}]
    rows[0]["position_ids"] = [0, 0, 0, 1, 2]  # what padding on the left looks like, not two documents
    found = probe(rows, tokenizer=None)
    assert found.examples == [Example([2, 50, 51], [-100, 50, 51])], "nothing precedes the first token, so it is never scored"
    assert (found.kind, found.dataset) == ("tokens", None)


def test_collate_pads_on_either_side():
    examples = [Example([2, 5], [-100, 5]), Example([2, 6, 7], [-100, -100, 7])]
    left, right = collate(examples, 0, "left"), collate(examples, 0, "right")
    assert left["input_ids"].tolist() == [[0, 2, 5], [2, 6, 7]]
    assert right["labels"].tolist() == [[-100, 5, -100], [-100, -100, 7]]
    assert left["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]


GOOD = {"input_ids": [BOS, 50, 51], "labels": [-100, 50, 51]}
PACKED = {"input_ids": [BOS, 50, BOS, 51], "labels": [-100, 50, -100, 51]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (PACKED, "row 2: the beginning-of-sequence token 2 stands inside it. Documents packed in one row"),
        ({**GOOD, "position_ids": [0, 1, 0]}, "row 2: `position_ids` or `seq_lengths` mark several documents"),
        ({**GOOD, "seq_lengths": [2, 1]}, "row 2: `position_ids` or `seq_lengths` mark several documents"),
        ({**GOOD, "labels": [-100, -100, -100]}, "row 2: no token is scored"),
        ({**GOOD, "labels": [-100, 50]}, r"row 2: `input_ids` \(3\), `labels` \(2\)"),
        ({**GOOD, "input_ids": [], "labels": []}, "row 2: no token is scored"),
        ({"input_ids": [BOS, *[50] * 600], "labels": [BOS, *[50] * 600]}, "row 2: 601 tokens are more than `max_length: 512`"),
    ],
)
def test_tokenised_rows_that_cannot_be_one_sample_are_refused(row, message):
    with pytest.raises(DataError, match=message):
        probe([{**GOOD, "position_ids": [0, 1, 2], "seq_lengths": [3]}, row])


def test_gpt2_style_rows_may_end_in_the_token_that_is_both_eos_and_bos():
    tokenizer = tiny.make_tokenizer()
    tokenizer.eos_token = tokenizer.bos_token
    row = {"input_ids": [BOS, 50, BOS], "labels": [-100, 50, BOS]}
    assert len(probe([row], tokenizer).examples) == 1
    with pytest.raises(DataError, match="packed"):
        probe([PACKED], tokenizer)


@pytest.mark.parametrize(
    ("config", "row", "message"),
    [
        ({"probe": "text"}, {"text": " "}, "row 2: `text` is empty"),
        ({"probe": "text"}, {"text": None}, r"row 2: `text` must be a string, got nothing"),
        ({"probe": "text"}, {"text": "A<bos>B"}, "row 2: the beginning-of-sequence token 2 stands inside it"),
        ({"probe": "completion"}, {"prompt": "a", "completion": ""}, "row 2: `completion` is empty"),
        (
            {"probe": "completion"},
            {"prompt": [{"role": "user"}], "completion": "b"},
            "row 2: `prompt` must be.*apply_chat_template",
        ),
        (
            {"probe": "completion", "max_length": 8},
            {"prompt": "light " * 9, "completion": "b"},
            "row 2: .*more than `max_length: 8`",
        ),
        ({"probe": "mmlu"}, {**tiny.QUESTIONS[0], "answer": 4}, r"row 2: `answer` must be .* from 0 to 3, got 4 \(int\)"),
    ],
)
def test_unusable_rows_are_refused_with_their_number(config, row, message):
    good = {"mmlu": tiny.QUESTIONS[0], "text": {"text": "a boat"}, "completion": {"prompt": "a", "completion": " b"}}
    with pytest.raises(DataError, match=message):
        probe([good[config["probe"]], row], **config)


def test_a_missing_column_no_rows_and_no_tokenizer_are_refused():
    with pytest.raises(DataError, match=r"no column `answer`.*its columns are `question`, `choices`"):
        probe([{"question": "?", "choices": ["a", "b"]}])
    with pytest.raises(DataError, match="no column `labels`"):
        probe([{"input_ids": [2, 5]}])
    with pytest.raises(DataError, match="holds no rows"):
        probe([])
    with pytest.raises(DataError, match="needs a tokenizer"):
        probe(tiny.QUESTIONS, tokenizer=None)


def test_a_test_split_is_refused_however_it_comes(tmp_path):
    rows = Dataset.from_list(tiny.QUESTIONS, split="test")
    rows.save_to_disk(tmp_path / "saved")
    for source in ({"dataset_split": "test"}, {"dataset_split": "train+test[:10%]"}, {"dataset": str(tmp_path / "saved")}):
        with pytest.raises(DataError, match=r"is a test split.*allow_test_split: true"):
            probe(**source)
    with pytest.raises(DataError, match="is a test split"):
        probe(rows)
    assert probe(rows, allow_test_split=True).split == "test"
    assert probe(Dataset.from_list(tiny.QUESTIONS, split="validation")).split == "validation"


def test_a_file_that_is_named_like_a_test_split_draws_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        probe(dataset=str(tiny.write_jsonl(tmp_path / "latest.jsonl", tiny.QUESTIONS)))
        assert not caplog.text
        probe(dataset=str(tiny.write_jsonl(tmp_path / "mmlu_test.jsonl", tiny.QUESTIONS)))
        assert "'mmlu_test.jsonl' is a test split" in caplog.text


def test_no_absolute_path_is_recorded(tmp_path):
    found = probe(dataset=str(tiny.write_jsonl(tmp_path / "q.jsonl", tiny.QUESTIONS)))
    assert found.record().dataset == "q.jsonl"


def test_dropped_examples_are_not_counted_as_used():
    found = probe(tiny.QUESTIONS)
    record = found.record([1, 4])
    assert (record.examples, record.dropped) == (4, 2)
    assert record.scored_tokens == sum(example.scored for n, example in enumerate(found.examples) if n not in (1, 4))

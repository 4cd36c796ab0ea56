"""Probes: what is scored, where BOS stands, how long text is cut, and which rows are refused."""

from __future__ import annotations

import hashlib
import logging
import struct

import pytest
import tiny
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ewc import ConfigError, DataError, FisherConfig
from hf_ewc.data import resolve_dataset_revision
from hf_ewc.fisher import Example, build_probe, collate, render_answer, render_question, template_sha256
from hf_ewc.fisher.probes import check_context

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


def test_without_prompt_and_bos_the_first_token_is_not_scored():
    ids = TOKENIZER("At dawn.", add_special_tokens=False)["input_ids"]
    [example] = probe([{"prompt": "", "completion": "At dawn."}], no_bos(), probe="completion").examples
    assert (example.input_ids, example.labels, example.scored) == (ids, [-100, *ids[1:]], len(ids) - 1)


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


def test_the_fingerprint_covers_the_options_and_is_the_same_as_ever_without():
    plain, with_options = probe(tiny.QUESTIONS), probe(tiny.QUESTIONS, labels="options")
    digest = hashlib.sha256()
    for example in plain.examples:
        values = [len(example.input_ids), *example.input_ids, *example.labels]
        digest.update(struct.pack(f"<{len(values)}i", *values))
    assert plain.ids_sha256 == digest.hexdigest() != with_options.ids_sha256
    longer = [{**tiny.QUESTIONS[0], "prompt": "a", "completion": " b", "options": [" b", other]} for other in (" c", " d")]
    assert len({probe([row], probe="completion", labels="options").ids_sha256 for row in longer}) == 2
    [one] = with_options.examples[:1]
    apart = [
        Example(one.input_ids, one.labels),
        *one.options,
    ]  # the same tokens in the same order, but as examples of their own
    assert len({type(plain)("mmlu", None, None, None, None, examples).ids_sha256 for examples in ([one], apart)}) == 2


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


# Answer options


def test_mmlus_options_are_the_letters_of_all_choices():
    questions = [*tiny.QUESTIONS, {"question": "Is it?", "choices": ["yes", "no"], "answer": 1}]
    examples = probe(questions, labels="options").examples
    for example, row in zip(examples, questions, strict=True):
        assert [scored(option) for option in example.options] == [" A", " B", " C", " D"][: len(row["choices"])]
        assert len({TOKENIZER.decode(option.input_ids[: -option.scored]) for option in example.options}) == 1
        right = example.options[row["answer"]]
        assert (example.input_ids, example.labels) == (right.input_ids, right.labels)
        assert all(option.options == () for option in example.options)
    assert all(example.options == () for example in probe(questions).examples), "only where they are asked for"


def test_a_completions_options_are_a_column_that_holds_it(tmp_path):
    row = {"prompt": "The gates open before", "completion": " dawn.", "options": [" the rain.", " dawn.", " noon."]}
    rows = [row, {**row, "options": (" dawn.", " dusk.")}]
    first, second = probe(rows, probe="completion", labels="options").examples
    assert [scored(option) for option in first.options] == row["options"]
    assert scored(first) == scored(second) == " dawn."
    assert first.scored == first.options[1].scored, "of the right one only"
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", [row])
    assert probe(dataset=str(file), probe="completion", labels="options").examples == [first]


def test_options_may_share_their_first_token():
    core = tiny.make_tokenizer(vocab_size=260)  # too small for merges, so that a token is a byte
    examples = probe(tiny.QUESTIONS, core, labels="options").examples
    for example in examples:
        scored_ids = [[label for label in option.labels if label != -100] for option in example.options]
        assert len({ids[0] for ids in scored_ids}) == 1
        assert len({ids[1] for ids in scored_ids}) == 4
    assert [example.scored for example in examples] == [2] * 6


ROW = {"prompt": "a", "completion": " b", "options": [" b", " c"]}


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        ([{**ROW, "options": [" c", " d"]}], {}, r"row 1: `options` must hold the completion ' b', letter for letter"),
        ([ROW, {**ROW, "options": ["b", " c"]}], {}, r"row 2: `options` must hold the completion ' b'"),
        ([ROW, {**ROW, "options": None}], {}, "row 2: `options` must be a list of strings, got None"),
        ([ROW, {**ROW, "options": [" b", 3]}], {}, "row 2: `options` must be a list of strings"),
        ([ROW, {**ROW, "options": " b"}], {}, "row 2: `options` must be a list of strings"),
        ([ROW, {**ROW, "options": [" b"]}], {}, "row 2: `labels: options` needs at least 2 options, there is 1"),
        ([ROW, {**ROW, "options": [" b", " c", " b"]}], {}, "row 2: options 1 and 3 are the same tokens, ' b'"),
        ([ROW, {**ROW, "options": [" b", ""]}], {}, "row 2: no token is scored"),
        ([ROW, {**ROW, "options": [" b", " c" * 600]}], {}, "row 2: .* more than `max_length: 512`"),
        ([{"prompt": "a", "completion": " b"}], {}, "has no column `options`; its columns are `prompt`, `completion`"),
        ([{"text": "a boat"}], {"probe": "text"}, "the `text` probe has none; mmlu, completion and"),
        ([{"input_ids": [2, 5], "labels": [2, 5]}], {}, "the `tokens` probe has none"),
    ],
)
def test_rows_without_usable_options_are_refused(rows, config, message):
    with pytest.raises(DataError, match=message):
        probe(rows, **{"probe": "completion", "labels": "options", **config})


def test_letters_that_the_tokenizer_does_not_know_cannot_be_told_apart():
    class Deaf(type(TOKENIZER)):
        def __call__(self, text, **kwargs):
            return {"input_ids": [3 if token >= 4 else token for token in super().__call__(text, **kwargs)["input_ids"]]}

    deaf = Deaf(tokenizer_object=TOKENIZER.backend_tokenizer, bos_token="<bos>", unk_token="<unk>")
    with pytest.raises(DataError, match="row 1: options 1 and 2 are the same tokens, ' B'"):
        probe(tiny.QUESTIONS, deaf, labels="options")


# Bad input

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


def test_examples_beyond_the_models_context_are_refused():
    found = probe([{"prompt": "a", "completion": " b", "options": [" b", " c" * 30]}], probe="completion", labels="options")
    longest = max(len(option.input_ids) for option in found.examples[0].options)
    check_context(found, longest)
    check_context(found, None)
    with pytest.raises(
        DataError, match=f"has {longest} tokens, the model's context only {longest - 1}.*`max_length: {longest - 1}`"
    ):
        check_context(found, longest - 1)


def test_the_recorded_revision_is_a_commit_even_without_a_connection(tmp_path, monkeypatch):
    (tmp_path / "datasets--cais--mmlu" / "refs").mkdir(parents=True)
    (tmp_path / "datasets--cais--mmlu" / "refs" / "main").write_text("0123abcd" * 5)  # what the Hub's cache keeps
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolve_dataset_revision("cais/mmlu", None) == "0123abcd" * 5
    assert resolve_dataset_revision("cais/other", "v1") == "v1"


def test_a_dataset_out_of_reach_is_an_error_that_says_so():
    with pytest.raises(DataError, match=r"'cais/mmlu' is no local file, and loading it from the Hub.*failed"):
        probe()


@pytest.mark.parametrize(
    ("settings", "problems"),
    [
        ({"probe": "lm_eval:"}, ["`probe: lm_eval:` names no task"]),
        ({"probe": "mmmlu"}, [r"`probe: mmmlu` is not one of mmlu, completion, text, lm_eval:<task>"]),
        ({"probe": None}, ["`probe` must be a name, got None"]),
        (
            {"probe": "lm_eval:arc_easy", "dataset": "q.jsonl", "dataset_config": "x", "dataset_revision": "y"},
            ["remove `dataset: q.jsonl`", "remove `dataset_config: x`", "remove `dataset_revision: y`"],
        ),
        ({"probe": "text", "dataset": "t.txt", "labels": "options"}, ["running text has no options"]),
        (
            {"probes": {"a": {"probe": "lm_eval:"}, "b": {"probe": None}, "c": {"probe": "text"}}},
            [
                "`probes.a`: `probe: lm_eval:` names no task",
                "`probes.b`: `probe` must be a name",
                "`probes.c`: .*needs `dataset`",
            ],
        ),
    ],
)
def test_settings_of_a_probe_that_cannot_be_are_listed(settings, problems):
    with pytest.raises(ConfigError, match="(?s)" + ".*".join(problems)):
        FisherConfig(**settings).check()


def test_a_task_is_the_end_of_its_probes_name():
    assert FisherConfig(probe="lm_eval:arc_easy").task == "arc_easy"
    assert FisherConfig(probe="mmlu").task is None
    FisherConfig(probe="lm_eval:arc_easy", dataset_split="validation", task_folder="tasks").check()

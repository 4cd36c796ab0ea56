"""`lm_eval:` probes: what is scored is what lm-evaluation-harness measures, from rows that it does not measure."""

from __future__ import annotations

import json
import logging
import random
import sys

import pytest
import tiny
import torch
import yaml

from hf_ewc import DataError, FisherConfig
from hf_ewc.fisher import Example, build_probe

TOKENIZER = tiny.make_tokenizer()
QUESTIONS = [{"id": n, **question} for n, question in enumerate(tiny.QUESTIONS)]
SUMS = [{"question": f"{n} + {n}?", "answer": f"Twice {n}.\n#### {2 * n}"} for n in range(12)]

CHOICE = dict(
    output_type="multiple_choice",
    doc_to_text="Question: {{question}}\nAnswer:",
    doc_to_choice="{{choices}}",
    doc_to_target="answer",
)
GENERATE = dict(output_type="generate_until", doc_to_text="Q: {{question}}\nA:", doc_to_target="{{answer}}")


@pytest.fixture
def task(tmp_path):
    """Write a task over local files, as a user would; `splits` maps a split to its rows (or to another split's name)."""

    def write(name="quiz", splits=None, roles=("train", "validation", "test"), **settings):
        splits, files = splits or {"train": QUESTIONS}, {}
        for split, rows in splits.items():
            files[split] = files[rows] if isinstance(rows, str) else str(tmp_path / f"{name}-{split}.jsonl")
            if not isinstance(rows, str):
                tiny.write_jsonl(tmp_path / f"{name}-{split}.jsonl", rows)
        of = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
        found = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path / "cache")},
            **{of[role]: role for role in roles if role in splits},
            **settings,
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(found))
        return tmp_path

    return write


def probe(folder, name="quiz", tokenizer=TOKENIZER, **config):
    return build_probe(FisherConfig(probe=f"lm_eval:{name}", task_folder=str(folder), **config), tokenizer)


def halves(example: Example) -> tuple[str, str]:
    prompt = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label == -100]
    return TOKENIZER.decode(prompt[1:]), TOKENIZER.decode([label for label in example.labels if label != -100])


def question(prompt: str) -> str:
    return prompt.rpartition("Question: ")[2].removesuffix("\nAnswer:")


# What is scored


def test_the_right_choice_is_scored_after_the_tasks_worked_examples(task):
    folder = task(**CHOICE, num_fewshot=2, description="About the world.\n", fewshot_config={"sampler": "first_n"})
    examples = probe(folder).examples
    assert len(examples) == len(QUESTIONS)
    assert halves(examples[3]) == (
        "About the world.\nQuestion: Which animal barks?\nAnswer: dog\n\nQuestion: What is frozen water?\nAnswer: ice\n\n"
        "Question: What do bees make?\nAnswer:",
        " honey",
    )
    assert all(example.input_ids.count(TOKENIZER.bos_token_id) == 1 for example in examples)
    assert all(example.options == () for example in examples)


@pytest.mark.parametrize("ending", ["Answer:", "Answer: ", "Answer:\n"])
def test_options_have_the_likelihoods_that_lm_eval_measures(task, ending):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    wording = {**CHOICE, "doc_to_text": "Question: {{question}}\n" + ending, "target_delimiter": "" if ending[7:] else " "}
    splits = {"train": QUESTIONS, "validation": QUESTIONS}
    folder = task(splits=splits, **wording, num_fewshot=2, fewshot_split="train", fewshot_config={"sampler": "first_n"})
    model = tiny.make_model(len(TOKENIZER), initializer_range=0.5)

    def likelihood(option):
        with torch.no_grad():
            scores = model(torch.tensor([option.input_ids])).logits[0].log_softmax(-1)
        return sum(scores[t - 1, label].item() for t, label in enumerate(option.labels) if label != -100)

    # As many worked examples, always the same: those behind the two that the harness and the probe draw alike.
    examples = probe(folder, dataset_split="validation", labels="options").examples[2:]
    harness = HFLM(pretrained=model, tokenizer=tiny.make_tokenizer(), batch_size=1, add_bos_token=True, softmax_dtype="float32")
    tasks = TaskManager(include_path=str(folder), include_defaults=False).load("quiz")
    samples = lm_eval.evaluate(harness, tasks, log_samples=True, bootstrap_iters=0)["samples"]["quiz"]
    measured = [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])][2:]
    assert len(examples) == len(measured) == 4
    for example, responses in zip(examples, measured, strict=True):
        theirs = [response[0][0] for response in responses]
        torch.testing.assert_close([likelihood(option) for option in example.options], theirs, rtol=1e-5, atol=1e-5)


def test_options_are_all_choices_with_the_right_one_on_top(task):
    examples = probe(task(**CHOICE), labels="options").examples
    assert [[halves(option)[1] for option in example.options] for example in examples] == [
        [f" {choice}" for choice in row["choices"]] for row in QUESTIONS
    ]
    for example, row in zip(examples, QUESTIONS, strict=True):
        right = example.options[row["answer"]]
        assert (example.input_ids, example.labels, example.scored) == (right.input_ids, right.labels, right.scored)


def test_the_target_of_generation_is_scored_as_in_its_worked_examples(task):
    folder = task("sums", {"train": SUMS}, **GENERATE, num_fewshot=2)
    for example, row in zip(probe(folder, "sums").examples, SUMS, strict=True):
        prompt, target = halves(example)
        assert target == f" {row['answer']}"
        assert prompt.endswith(f"\n\nQ: {row['question']}\nA:")
        assert prompt.count("\nA: Twice ") == 2


@pytest.mark.parametrize(
    ("settings", "prompt", "target"),
    [
        ({"gen_prefix": "It is"}, "Q: 0 + 0?\nA: It is", " Twice 0.\n#### 0"),
        ({"gen_prefix": "It is "}, "Q: 0 + 0?\nA: It is ", "Twice 0.\n#### 0"),
        ({"target_delimiter": ""}, "Q: 0 + 0?\nA:", "Twice 0.\n#### 0"),
        ({"doc_to_target": "{{[answer[:5], 'two']}}"}, "Q: 0 + 0?\nA:", " Twice"),  # several right ones
        ({"doc_to_choice": ["no", "yes"], "doc_to_target": 1}, "Q: 0 + 0?\nA:", " yes"),
    ],
)
def test_prefixes_delimiters_and_several_targets_of_generation(task, settings, prompt, target):
    folder = task("sums", {"train": SUMS}, **{**GENERATE, **settings})
    assert halves(probe(folder, "sums").examples[0]) == (prompt, target)


def test_the_pair_of_a_likelihood_task_is_scored(task):
    last_word = dict(
        output_type="loglikelihood", doc_to_text="{{text.rsplit(' ', 1)[0]}}", doc_to_target="{{' ' + text.split()[-1]}}"
    )
    folder = task("cloze", {"train": [{"text": text} for text in tiny.TEXTS]}, **last_word)
    assert halves(probe(folder, "cloze").examples[0]) == (tiny.TEXTS[0].removesuffix(" rocks."), " rocks.")


def test_a_rolling_task_is_running_text(task):
    rows = [{"text": text} for text in tiny.TEXTS]
    folder = task("prose", {"train": rows}, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}")
    same = build_probe(FisherConfig(probe="text", max_length=20), TOKENIZER, rows)
    assert probe(folder, "prose", max_length=20).ids_sha256 == same.ids_sha256


def test_choices_that_are_prompts_share_the_continuation(task):
    (task(splits={"train": QUESTIONS}) / "blank.py").write_text(
        "def text(doc): return {'1': 0, '2': 1}[doc['answer']]\n"
        "def target(doc): return doc['sentence'].split('_')[1].strip()\n"
        "def choice(doc): return [doc['sentence'].split('_')[0] + doc[o] for o in ('option1', 'option2')]\n"
    )
    rows = [
        {"sentence": f"A {w} is not a hen as the _ is big.", "option1": "hen", "option2": w, "answer": "2"}
        for w in ("cow", "ox", "elk")
    ]
    folder = task(
        "blank", {"train": rows}, output_type="multiple_choice", num_fewshot=1, doc_to_text="TEXT", doc_to_target="TARGET"
    )
    file = folder / "blank.yaml"
    text = file.read_text().replace("TEXT", "!function blank.text").replace("TARGET", "!function blank.target")
    file.write_text(text + "doc_to_choice: !function blank.choice\n")
    prompt, target = halves(probe(folder, "blank").examples[0])
    assert prompt.endswith("is big.\n\nA cow is not a hen as the cow")
    assert target == " is big."
    with pytest.raises(DataError, match=r"several answers to one prompt, and `blank` has none \(its choices are prompts"):
        probe(folder, "blank", labels="options")


def test_a_mixtures_tasks_are_built_one_by_one(task):
    folder = task("sums", {"train": SUMS}, **GENERATE)
    task(**CHOICE)
    parts = {"facts": {"probe": "lm_eval:quiz"}, "sums": {"probe": "lm_eval:sums", "max_examples": 3, "weight": 2}}
    config = FisherConfig(probes=parts, task_folder=str(folder))
    config.check()
    records = {name: build_probe(part, TOKENIZER).record() for name, (part, _) in config.mixture().items()}
    assert {name: (record.task, record.examples) for name, record in records.items()} == {
        "facts": ("quiz", 6),
        "sums": ("sums", 3),
    }
    assert records["facts"] == probe(folder).record()


# Worked examples


def test_worked_examples_may_be_the_tasks_own(task):
    own = [{"question": "Is it?", "choices": ["no", "yes"], "answer": 1}]
    folder = task(**CHOICE, num_fewshot=1, fewshot_config={"samples": own})
    assert halves(probe(folder).examples[0])[0] == "Question: Is it?\nAnswer: yes\n\nQuestion: Which animal barks?\nAnswer:"


@pytest.mark.parametrize("sampler", ["default", "first_n"])
def test_no_document_is_its_own_worked_example(task, sampler):
    rows = QUESTIONS[:3] + QUESTIONS[:1]  # a row that is there twice would give the answer away as well
    folder = task(splits={"train": rows}, **CHOICE, num_fewshot=2, fewshot_split="train", fewshot_config={"sampler": sampler})
    for example in probe(folder).examples:
        prompt, _ = halves(example)
        assert prompt.count("Question: ") == 3
        assert prompt.count(f"Question: {question(prompt)}\n") == 1


def test_worked_examples_depend_on_the_seed_and_the_document_only(task):
    folder = task("sums", {"train": SUMS}, **GENERATE, num_fewshot=2)
    every = probe(folder, "sums").examples
    some = probe(folder, "sums", max_examples=4).examples
    assert all(example in every for example in some)
    assert len({halves(example)[0].rpartition("Q:")[0] for example in every}) > 6
    assert every != probe(folder, "sums", seed=1).examples


def test_too_few_worked_examples_are_an_error(task):
    folder = task(splits={"train": QUESTIONS[:2]}, **CHOICE, num_fewshot=2, fewshot_split="train")
    with pytest.raises(DataError, match=r"document 1 of `quiz` \(train\): there are no 2 worked examples beside it"):
        probe(folder)


def test_worked_examples_from_the_test_split_draw_a_warning(task, caplog):
    splits = {"train": QUESTIONS, "test": QUESTIONS}
    with caplog.at_level(logging.WARNING):
        probe(task(splits=splits, **CHOICE, num_fewshot=1, fewshot_split="train"))
        assert not caplog.text
        folder = task(splits=splits, **CHOICE, num_fewshot=1, fewshot_split="test")
        probe(folder)
        assert "`quiz` takes its 1 worked examples from the test split 'test'" in caplog.text
        caplog.clear()
        probe(folder, allow_test_split=True)
        assert not caplog.text


# Splits


def test_the_training_split_comes_first_then_validation_and_any_can_be_named(task, caplog):
    splits = dict.fromkeys(("train", "validation", "test", "dev"), QUESTIONS)
    with caplog.at_level(logging.WARNING):
        assert probe(task(splits=splits, **CHOICE)).split == "train"
        folder = task(splits=splits, roles=("validation", "test"), **CHOICE)
        assert probe(folder).split == "validation"
        assert probe(folder, dataset_split="dev").split == "dev"
        assert (
            probe(task(splits=splits, **{**CHOICE, "training_split": "dev"}, roles=()), dataset_split="train").split == "train"
        )
        folder = task(splits=splits, **CHOICE, roles=(), training_split="test", validation_split="validation", test_split="dev")
        assert probe(folder).split == "validation", "a training split that is called test is passed over"
    assert not caplog.text
    del splits["train"]
    assert probe(task(splits=splits, roles=(), **CHOICE, training_split="dev"), dataset_split="train").split == "dev"


@pytest.mark.parametrize(
    ("splits", "settings", "wanted", "refused"),
    [
        ({"dev": QUESTIONS, "test": QUESTIONS}, {"roles": ("test",)}, None, "test"),
        ({"train": QUESTIONS, "test": QUESTIONS}, {}, "test", "test"),
        ({"test": QUESTIONS, "dev": QUESTIONS}, {"roles": (), "validation_split": "test"}, None, "test"),
        ({"train": QUESTIONS, "dev": QUESTIONS}, {"test_split": "dev"}, "dev", "dev"),
        ({"train": QUESTIONS, "dev": QUESTIONS}, {"test_split": "dev"}, "test", "dev"),
        ({"train": QUESTIONS, "test": "train", "dev": QUESTIONS}, {}, None, "train"),  # two names of one file
    ],
)
def test_a_test_split_is_refused_whatever_it_is_called(task, splits, settings, wanted, refused):
    folder = task(splits=splits, **CHOICE, **settings)
    others = ", ".join(name for name in splits if name not in (refused, "test"))
    with pytest.raises(
        DataError, match=f"'{refused}' of .*`quiz` is a test split.*other splits: {others} .*allow_test_split: true"
    ):
        probe(folder, dataset_split=wanted)
    assert probe(folder, dataset_split=wanted, allow_test_split=True).record().split == refused


def test_the_rows_that_lm_eval_reports_on_draw_a_warning(task, caplog):
    with caplog.at_level(logging.WARNING):
        probe(task(splits={"validation": QUESTIONS}, **CHOICE))
    assert "measures `quiz` on 'validation', the rows of this probe" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        probe(task("latest", {"train": QUESTIONS}, **CHOICE), "latest", dataset_split="train")
    assert not caplog.text


def test_a_file_named_like_a_test_split_draws_a_warning(task, tmp_path, caplog):
    folder = task(**CHOICE)
    (tmp_path / "quiz-train.jsonl").rename(tmp_path / "quiz_test.jsonl")
    file = folder / "quiz.yaml"
    file.write_text(file.read_text().replace("quiz-train.jsonl", "quiz_test.jsonl"))
    with caplog.at_level(logging.WARNING):
        probe(folder)
    assert "'quiz_test.jsonl' is a test split" in caplog.text


def test_a_split_that_is_not_there_is_answered_with_those_that_are(task):
    folder = task(splits={"train": QUESTIONS, "dev": QUESTIONS}, **CHOICE, num_fewshot=1)
    with pytest.raises(DataError, match="`quiz` has no split 'valid'; its splits are dev, train"):
        probe(folder, dataset_split="valid")
    folder = task(splits={"train": QUESTIONS, "dev": QUESTIONS}, **CHOICE, num_fewshot=1, fewshot_split="shots")
    with pytest.raises(DataError, match="no split 'shots' for worked examples; its splits are dev, train"):
        probe(folder)


# The draw and the record


def test_only_as_many_documents_as_needed_are_rendered(task):
    rows = [{"question": f"{n}?", "answer": f"{n}."} for n in range(300)]
    folder = task("many", {"train": rows}, **GENERATE)
    first, same, other = (probe(folder, "many", max_examples=5, seed=seed) for seed in (1, 1, 2))
    assert first.ids_sha256 == same.ids_sha256 != other.ids_sha256
    drawn = {halves(example)[1].strip() for example in first.examples}
    assert len(drawn) == 5
    spoilt = [row if row["answer"] in drawn else {**row, "answer": ""} for row in rows]
    task("many", {"train": spoilt}, **GENERATE)
    assert probe(folder, "many", max_examples=5, seed=1).ids_sha256 == first.ids_sha256


def test_the_record_says_task_split_and_worked_examples_and_no_absolute_path(task, tmp_path):
    record = probe(task(**CHOICE, num_fewshot=2), max_examples=4).record([0])
    assert (record.kind, record.task, record.num_fewshot, record.split) == ("lm_eval", "quiz", 2, "train")
    assert (record.examples, record.dropped, record.config, record.revision) == (3, 1, None, None)
    assert record.dataset == "quiz-train.jsonl"
    assert str(tmp_path) not in json.dumps(vars(record))


def test_the_template_hash_is_that_of_the_wording(task):
    def wording(name="quiz", **settings):
        return probe(task(name, **{**CHOICE, **settings}), name).record().template_sha256

    plain = wording()
    assert plain == wording("other", metadata={"version": 2}, metric_list=[{"metric": "acc"}])
    changed = [
        wording(target_delimiter=""),
        wording(num_fewshot=1),
        wording(description="Think."),
        wording(doc_to_text="{{question}}"),
    ]
    assert len({plain, *changed}) == 5


def test_functions_in_a_template_are_hashed_by_their_source(task, tmp_path):
    def wording(end):
        (tmp_path / "words.py").write_text(f"def text(doc):\n    return doc['question'] + '{end}'\n")
        file = task(**{**CHOICE, "doc_to_text": "TEXT"}) / "quiz.yaml"
        file.write_text(file.read_text().replace("TEXT", "!function words.text"))
        return probe(tmp_path).record().template_sha256

    assert wording(" A:") == wording(" A:") != wording(" Answer:")


def test_lm_eval_leaves_no_trace(task, capsys):
    harness, state = logging.getLogger("lm_eval"), random.getstate()
    level = harness.level
    probe(task(**CHOICE, num_fewshot=2))
    assert random.getstate() == state
    assert harness.level == level
    assert capsys.readouterr() == ("", "")


def test_the_harness_is_imported_only_where_it_is_needed():
    code = "import sys, hf_ewc.fisher; assert 'lm_eval' not in sys.modules"
    import subprocess

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Bad input


def test_unknown_tasks_groups_and_unreachable_datasets_are_explained(task):
    """Those that the harness brings; the index of its 15,000 tasks is read once (5 s)."""
    folder = task(**CHOICE)
    with pytest.raises(DataError, match=r"knows no task `arc_eazy`.*Did you mean `arc_easy`.*`task_folder` defines quiz "):
        probe(folder, "arc_eazy")
    with pytest.raises(DataError, match=r"`mmlu` is a group of 57 tasks.*probes: \{mmlu_abs.*, mmlu_anatomy, "):
        probe(folder, "mmlu")
    with pytest.raises(DataError, match=r"group of 2 tasks.*: arc_challenge, arc_easy"):
        probe(folder, "ai2_arc")
    with pytest.raises(DataError, match=r"'truthfulqa/truthful_qa' \(multiple_choice\).*cannot be loaded.*With a connection"):
        probe(folder, "truthfulqa_mc1")
    with pytest.raises(DataError, match=r"`squadv2` cannot be a probe: it is a Python class"):
        probe(folder, "squadv2")


def test_a_missing_file_or_folder_is_named(task, tmp_path):
    folder = task(**CHOICE)
    (tmp_path / "quiz-train.jsonl").unlink()
    with pytest.raises(
        DataError, match=r"`quiz` cannot be loaded: FileNotFoundError.*quiz-train.jsonl.*relative paths start at"
    ):
        probe(folder)
    (tmp_path / "quiz-train.jsonl").write_text("no JSON\n")
    with pytest.raises(DataError, match=r"`quiz` cannot be loaded: .*JSON"):
        probe(folder)
    with pytest.raises(DataError, match=r"`task_folder: .*nowhere` is no folder"):
        probe(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        (CHOICE, {"answer": 4}, r"its right answer is 4, which is none of its choices \(0 to 3\)"),
        (CHOICE, {"answer": -1}, "its right answer is -1, which is none of its choices"),
        (CHOICE, {"answer": None}, "its right answer is nothing"),
        (
            {**CHOICE, "doc_to_target": "{{answer if id == 0 else subject}}"},
            {"subject": "a whale"},
            "its right answer is 'a whale'",
        ),
        ({**CHOICE, "doc_to_target": "{{[0] if answer else []}}"}, {}, "its right answer is nothing"),
        (CHOICE, {"choices": []}, "must give a list of choices"),
        ({**CHOICE, "target_delimiter": ""}, {"choices": ["", "a", "b", "c"]}, r"no answer to score .*gives ''"),
        ({**GENERATE, "doc_to_target": "{{subject}}"}, {"subject": ""}, r"no answer to score \(`doc_to_target` gives ''\)"),
        ({**GENERATE, "doc_to_target": "subject"}, {"subject": None}, r"no answer to score \(`doc_to_target` gives nothing\)"),
        ({**GENERATE, "doc_to_target": "{{answer if id == 0 else []}}"}, {}, "gives nothing"),
        ({**GENERATE, "output_type": "loglikelihood"}, {"answer": " "}, "gives ' '"),
        ({**CHOICE, "doc_to_text": "{{question + 1}}"}, {}, "cannot (put it into words|load the task `quiz`): TypeError"),
        (CHOICE, {"question": "why " * 600}, "tokens are more than `max_length: 512`"),
    ],
)
def test_documents_without_an_answer_are_refused_with_their_number(task, settings, change, message):
    good, bad = QUESTIONS[0], {**QUESTIONS[1], **change}
    if settings["output_type"] != "multiple_choice":
        good, bad = ({**row, "answer": str(row["answer"])} for row in (good, bad))
    place = "" if "question + 1" in settings["doc_to_text"] else r"document 2 of `quiz` \(train\): .*"
    with pytest.raises(DataError, match=place + message):
        probe(task(splits={"train": [good, bad]}, **settings))


def test_equal_options_of_a_document_count_as_one_since_nobody_can_correct_a_benchmark(task, caplog):
    twice = {**QUESTIONS[0], "choices": ["ice", "oil", "ice"]}
    [example] = probe(task(splits={"train": [twice]}, **CHOICE), labels="options").examples
    assert len(example.options) == 2
    assert example.options[1].input_ids == example.input_ids  # the right one is the oil
    assert "two options are the same tokens, ' ice'" in caplog.text


def test_what_cannot_be_a_probe_is_refused(task):
    with pytest.raises(DataError, match=r"`quiz` has none \(it is `generate_until`\)"):
        probe(task(splits={"train": SUMS}, **GENERATE), labels="options")
    with pytest.raises(DataError, match="it shows images"):
        probe(task(**CHOICE, doc_to_image=["image"]))
    with pytest.raises(DataError, match="it makes its documents in Python"):
        probe(task(**CHOICE, custom_dataset="a.b"))
    with pytest.raises(DataError, match="reads the task's own dataset"):
        build_probe(FisherConfig(probe="lm_eval:quiz"), TOKENIZER, QUESTIONS)
    with pytest.raises(DataError, match="`lm_eval:quiz` probe needs a tokenizer"):
        probe(task(**CHOICE), tokenizer=None)


def test_worked_examples_that_are_prepared_apart_cannot_be_told_from_the_document(task, tmp_path):
    (tmp_path / "prepare.py").write_text(
        "def shout(docs):\n    return docs.map(lambda doc: {'question': doc['question'].upper()})\n"
    )
    file = task(**CHOICE, num_fewshot=1, fewshot_split="train", fewshot_config={"process_docs": "SHOUT"}) / "quiz.yaml"
    file.write_text(file.read_text().replace("SHOUT", "!function prepare.shout"))
    with pytest.raises(DataError, match="`quiz` prepares its worked examples in another way"):
        probe(tmp_path)

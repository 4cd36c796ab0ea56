"""`evaluate_model`: questions through lm-evaluation-harness, bad files, and a model that is left as it was found."""

from __future__ import annotations

import random
import shutil
from typing import Any

import pytest
import tiny
import torch

from hf_ewc import BaseModel, EvaluationConfig
from hf_ewc.errors import ConfigError, DataError, EWCError
from hf_ewc.evaluation import evaluate_model, question_prompt, questions, score_questions, score_texts

MORE_QUESTIONS: list[dict[str, Any]] = [
    *tiny.QUESTIONS,
    {"question": " Is ice cold? ", "subject": "nature", "choices": ["no", "yes"], "answer": 1},
]


@pytest.fixture
def files(tmp_path):
    texts = tiny.write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in [*tiny.TEXTS, ""]])
    facts = tiny.write_jsonl(tmp_path / "facts.jsonl", MORE_QUESTIONS)
    return {"texts": {"mixed": str(texts)}, "questions": {"facts": str(facts)}}


@pytest.fixture
def model():
    """A model whose answers vary: the tiny one with a larger spread of logits."""
    model = tiny.make_model(seed=3)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)
    return model


def test_accuracy_equals_a_loop_over_letters(model, tokenizer, files):
    expected = []
    for row in MORE_QUESTIONS:
        options = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", row["choices"], strict=False))
        prompt = f"{row['question'].strip()}\n{options}Answer:"
        assert question_prompt(row) == prompt
        scores = []
        for letter in "ABCD"[: len(row["choices"])]:
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            answer = tokenizer(f"{prompt} {letter}", add_special_tokens=False)["input_ids"][len(ids) :]
            row_ids = torch.tensor([[tokenizer.bos_token_id, *ids, *answer]])
            with torch.no_grad():
                steps = model(row_ids).logits[0, :-1].log_softmax(-1)
            scores.append(sum(steps[-len(answer) + i, token].item() for i, token in enumerate(answer)))
        expected.append(int(scores.index(max(scores)) == row["answer"]))
    assert 0 < sum(expected) < len(expected)  # else the test could not tell right from wrong
    for batch_size in (1, 8):
        assert score_questions(model, tokenizer, files["questions"]["facts"], batch_size=batch_size).correct == expected


def test_every_question_is_read_behind_exactly_one_bos(model, tokenizer, files):
    seen: list[list[int]] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[0].tolist()))
    score_questions(model, tokenizer, files["questions"]["facts"])
    assert len(seen) == len(MORE_QUESTIONS)
    assert all(row[0] == tokenizer.bos_token_id and row.count(tokenizer.bos_token_id) == 1 for row in seen)


def test_metrics_hold_counts_errors_and_samples(model, tokenizer, files):
    metrics = evaluate_model(model, EvaluationConfig(**files, window=16), tokenizer)
    texts, facts = metrics["texts"]["mixed"], metrics["questions"]["facts"]
    scores = score_texts(model, tokenizer, [*tiny.TEXTS, ""], 16)
    assert texts["documents"] == 9
    assert texts["bits_per_byte"] == scores.bits_per_byte
    assert metrics["samples"]["texts"]["mixed"] == {"nats": scores.nats, "bytes": scores.bytes}
    correct = metrics["samples"]["questions"]["facts"]
    mean = sum(correct) / 7
    assert facts["n"] == len(correct) == 7
    assert facts["accuracy"] == pytest.approx(mean)
    assert facts["stderr"] == pytest.approx((mean * (1 - mean) / 6) ** 0.5)
    assert facts["chance"] == pytest.approx((6 / 4 + 1 / 2) / 7)


def test_a_folder_scores_as_the_model_in_it(base_folder, tokenizer, files):
    config = EvaluationConfig(**files, device="cpu")
    from_folder = evaluate_model(base_folder, config)
    in_memory = evaluate_model(tiny.make_model(len(tokenizer)), config, tokenizer)
    assert from_folder["texts"] == in_memory["texts"]
    assert from_folder["questions"] == in_memory["questions"]
    assert from_folder["model"]["name"] == base_folder.name
    assert from_folder["model"]["architecture"] == "Gemma2ForCausalLM"
    assert from_folder["model"]["fingerprint"] == BaseModel.resolve(base_folder).fingerprint
    assert from_folder["model"]["revision"] is None
    assert in_memory["model"]["fingerprint"] is None


def test_a_model_of_pickles_is_measured_but_has_no_hash(base_folder, tokenizer, files, tmp_path):
    for path in base_folder.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path)
    torch.save(tiny.make_model(len(tokenizer)).state_dict(), tmp_path / "pytorch_model.bin")
    config = EvaluationConfig(texts=files["texts"], device="cpu")
    metrics = evaluate_model(str(tmp_path), config)
    assert metrics["model"]["fingerprint"] is None
    assert metrics["texts"] == evaluate_model(base_folder, config)["texts"]


def test_the_model_is_left_as_it_was_found(tokenizer, files):
    model = tiny.make_model().train()
    model.model.layers[0].eval()  # a mixture of modes survives, too
    model.gradient_checkpointing_enable()
    model.config.use_cache = True
    model.lm_head.weight.requires_grad_(False)
    tokenizer.padding_side, tokenizer.pad_token = "right", None
    settings = model.config.to_dict()
    before = [(module, module.training, getattr(module, "gradient_checkpointing", None)) for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = [(id(value), value.requires_grad) for value in model.parameters()]
    torch_state, random_state = torch.get_rng_state(), random.getstate()

    evaluate_model(model, EvaluationConfig(**files), tokenizer)

    after = [(module, module.training, getattr(module, "gradient_checkpointing", None)) for module in model.modules()]
    assert before == after
    assert model.config.to_dict() == settings
    assert [(id(value), value.requires_grad) for value in model.parameters()] == parameters
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    assert all(value.grad is None for value in model.parameters())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == random_state
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", None)
    tokenizer.padding_side, tokenizer.pad_token = "left", "<pad>"  # the fixture is shared


def test_a_model_that_fails_is_left_as_it_was_found(tokenizer):
    model = tiny.make_model().train()
    hook = model.model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score_texts(model, tokenizer, tiny.TEXTS)
    hook.remove()
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Why?", "choices": ["a", "b"], "answer": 2}, "row 8: `answer` must be the index"),
        ({"question": "Why?", "choices": ["a", "b"], "answer": None}, "row 8: `answer`"),
        ({"question": "Why?", "choices": ["a"], "answer": 0}, "row 8: a question needs 2"),
        ({"question": "Why? " * 100, "choices": ["a", "b"], "answer": 0}, "row 8: the question has .* context only 128"),
    ],
)
def test_questions_that_cannot_be_scored_name_their_row(tmp_path, tokenizer, row, message):
    path = tiny.write_jsonl(tmp_path / "q.jsonl", [*MORE_QUESTIONS, row])
    with pytest.raises(DataError, match=f"q.jsonl.*{message}"):
        score_questions(tiny.make_model(), tokenizer, str(path))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        ([{"body": "x"}], "no column `text`; its columns are `body`"),
        ([{"text": "x"}, {"text": None}], "row 2: `text` must be a string, got nothing"),
        ([{"text": ""}, {"text": ""}], "all 2 documents are empty"),
    ],
)
def test_texts_that_cannot_be_scored_are_refused_before_the_model_is_loaded(tmp_path, rows, message):
    path = tiny.write_jsonl(tmp_path / "t.jsonl", rows)
    with pytest.raises(DataError, match=message):
        evaluate_model("there/is-no-such-model", EvaluationConfig(texts={"t": str(path)}))


def test_a_missing_model_or_tokenizer_is_said_plainly(files):
    with pytest.raises(DataError, match="cannot load 'there/is-no-such-model'"):
        evaluate_model("there/is-no-such-model", EvaluationConfig(**files))
    with pytest.raises(ConfigError, match="Pass `tokenizer=…`"):
        evaluate_model(tiny.make_model(), EvaluationConfig(**files))
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        evaluate_model("x", EvaluationConfig())


def test_max_documents_takes_the_first_rows(model, tokenizer, files):
    metrics = evaluate_model(model, EvaluationConfig(**files, max_documents=2), tokenizer)
    assert metrics["samples"]["texts"]["mixed"]["nats"] == score_texts(model, tokenizer, tiny.TEXTS[:2]).nats
    assert metrics["questions"]["facts"]["n"] == 2


def test_a_single_question_has_no_standard_error(model, tokenizer, files):
    assert score_questions(model, tokenizer, files["questions"]["facts"], max_documents=1).stderr is None


def test_a_task_without_a_score_is_an_error(model, tokenizer, files, tmp_path, monkeypatch):
    """lm-evaluation-harness itself returns a result without a score, or zero tasks, and says nothing."""
    monkeypatch.setattr(questions, "TASKS", tmp_path)
    with pytest.raises(EWCError, match="found no task"):
        score_questions(model, tokenizer, files["questions"]["facts"])
    task = (questions.Path(questions.__file__).parent / "tasks" / "mmlu_letter.yaml").read_text()
    (tmp_path / "mmlu_letter.yaml").write_text(task.replace("metric: acc\n", "metric: no_such_metric\n"))
    with pytest.raises(EWCError, match="instead of `acc,none`"):
        score_questions(model, tokenizer, files["questions"]["facts"])

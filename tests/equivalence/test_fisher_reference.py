"""The Fisher against its definition (per-sample gradients of `torch.func`, squared), and everything that must not change it."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from torch.func import functional_call, grad
from torch.nn import functional

from hf_ewc.config import FisherConfig
from hf_ewc.fisher import Example, accumulate_squares, build_probe, collate, estimate_fisher, prepared


@pytest.fixture(scope="module")
def examples(tokenizer) -> list[Example]:
    """Questions (one or two scored tokens, repeated words) and running text (all scored), of different lengths: 10 samples."""
    questions = build_probe(FisherConfig(), tokenizer, rows=tiny.QUESTIONS).examples
    texts = build_probe(FisherConfig(probe="text", max_length=24), tokenizer, rows=[{"text": t} for t in tiny.TEXTS]).examples
    return questions + texts[:4]


def fisher_of(model, examples, batch_size=1, side="right") -> dict[str, torch.Tensor]:
    with prepared(model) as sums:
        for start in range(0, len(examples), batch_size):
            assert all(accumulate_squares(model, collate(examples[start : start + batch_size], padding_side=side), sums))
    return sums


def definition(model, examples) -> dict[str, torch.Tensor]:
    """(∂ Σ_t log p)² summed over examples, by functional differentiation: no `.grad`, no hooks, all logits, no padding."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def log_likelihood(weights, ids, labels):
        logits = functional_call(model, weights, (ids[None],), tie_weights=True).logits[0].float()
        chosen = functional.log_softmax(logits[:-1], -1).gather(-1, labels[1:].clamp(min=0)[:, None])[:, 0]
        return (chosen * (labels[1:] >= 0)).sum()

    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    for example in examples:
        gradients = grad(log_likelihood)(parameters, torch.tensor(example.input_ids), torch.tensor(example.labels))
        for name, gradient in gradients.items():
            sums[name] += gradient.float() ** 2
    return sums


def read_all(fisher) -> dict[str, torch.Tensor]:
    return {name: fisher.read(name) for name in fisher.names}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], rtol: float = 1e-5) -> None:
    assert list(left) == list(right)
    for name in left:  # each tensor on its own scale, so that small ones count
        torch.testing.assert_close({name: left[name]}, {name: right[name]}, rtol=rtol, atol=rtol * float(right[name].max()))


def test_fisher_is_the_sum_of_squared_per_sample_gradients_of_a_tied_model(examples):
    model = tiny.make_model()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same(fisher_of(model, examples), definition(model, examples))


@pytest.mark.parametrize("batch_size", [2, 4, 8])
@pytest.mark.parametrize("side", ["left", "right"])
def test_fisher_does_not_depend_on_batch_size_or_padding_side(examples, batch_size, side):
    model = tiny.make_model()
    assert_same(fisher_of(model, examples, batch_size, side), fisher_of(model, examples))  # 10 samples: the last batch is short


def test_fisher_does_not_depend_on_order_beyond_rounding(examples):
    model = tiny.make_model()
    shuffled = random.Random(3).sample(examples, len(examples))
    assert_same(fisher_of(model, shuffled, 4), fisher_of(model, examples))


def test_pad_tokens_have_no_say_even_if_they_are_ordinary_words(examples):
    model = tiny.make_model()
    with prepared(model) as sums:
        accumulate_squares(model, collate(examples, pad_id=77, padding_side="left"), sums)
    assert_same(sums, fisher_of(model, examples))


def test_squaring_the_gradient_of_a_batch_would_be_another_and_smaller_thing(examples):
    # What nearly everybody computes. The mean over the batch makes it shrink, and this test would notice it coming back.
    model = tiny.make_model()
    exact = fisher_of(model, examples)
    batch = collate(examples)
    model(**batch).loss.backward()
    shrunk = sum(float((parameter.grad**2).sum()) for parameter in model.parameters())
    assert shrunk * len(examples) < 0.2 * sum(float(total.sum()) for total in exact.values())


def test_untied_and_biased_architectures_agree_with_the_definition_too(examples):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.3)).eval()
    untied = tiny.make_model(tie_word_embeddings=False)
    for model in (gpt2, untied):
        assert_same(fisher_of(model, examples, 4), definition(model, examples))


def test_gradient_checkpointing_does_not_change_the_fisher(examples):
    model = tiny.make_model()
    plain = fisher_of(model, examples)
    model.train()
    model.gradient_checkpointing_enable()
    assert_same(fisher_of(model, examples), plain)
    assert model.is_gradient_checkpointing


def test_squares_are_summed_in_float32_for_a_bfloat16_model(examples):
    model = tiny.make_model().to(torch.bfloat16)
    sums = fisher_of(model, examples)
    assert {total.dtype for total in sums.values()} == {torch.float32}
    expected = {name: torch.zeros_like(total) for name, total in sums.items()}
    for example in examples:  # the bfloat16 gradients themselves are exact inputs; only the summing is under test
        with prepared(model) as one:
            accumulate_squares(model, collate([example]), one)
        for name, total in one.items():
            expected[name] += total
    assert_same(sums, expected, rtol=1e-6)
    with pytest.raises(TypeError, match="float32"):
        accumulate_squares(model, collate(examples), {name: total.to(torch.bfloat16) for name, total in sums.items()})


RUN = """
import sys
sys.path.insert(0, {tests!r})
from hf_ewc.config import FisherConfig
from hf_ewc.fisher import estimate_fisher
config = FisherConfig(dataset={data!r}, work_dir={work!r}, save_every=3, batch_size=2, resume=True)
estimate_fisher({base!r}, config, progress=False)
"""


def test_a_killed_estimate_resumes_bitwise(base_folder, tmp_path):
    data = tiny.write_jsonl(tmp_path / "questions.jsonl", tiny.QUESTIONS * 40)
    work, root = tmp_path / "work", Path(__file__).parents[2]
    script = RUN.format(tests=str(root / "tests"), base=str(base_folder), data=str(data), work=str(work))
    process = subprocess.Popen([sys.executable, "-c", script], cwd=root, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    try:
        while not (work / "estimate.json").exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it should have been killed in the middle"
    position = json.loads((work / "estimate.json").read_text())["position"]
    assert 0 < position < 240

    settings = dict(dataset=str(data), batch_size=2, save_every=3)
    straight = estimate_fisher(base_folder, FisherConfig(**settings), progress=False)
    other = FisherConfig(**{**settings, "batch_size": 8, "save_every": 5}, work_dir=str(tmp_path / "copy"), resume=True)
    shutil.copytree(work, tmp_path / "copy")
    assert_same(read_all(estimate_fisher(base_folder, other, progress=False)), read_all(straight))
    resumed = estimate_fisher(base_folder, FisherConfig(**settings, work_dir=str(work), resume=True), progress=False)
    for name in straight.names:
        torch.testing.assert_close(resumed.read(name), straight.read(name), rtol=0, atol=0)
    assert resumed.normalizer == straight.normalizer
    assert len(list(work.glob("sums-*"))) == 1, "what the killed run left behind is cleared away"

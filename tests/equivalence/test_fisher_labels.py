"""Label kinds and granularities against brute-force expectations, on a model whose vocabulary can be summed over."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from hf_ewc.config import FisherConfig
from hf_ewc.errors import ConfigError
from hf_ewc.fisher import BatchedSquares, Example, OneByOne, SummedGradient, build_probe, estimate_fisher, prepared
from hf_ewc.fisher.head import draw
from hf_ewc.fisher.labels import labelled

VOCABULARY = 12
PLENTY = 1 << 28
EXAMPLES = [
    Example([2, 5, 6, 7], [-100, -100, -100, 7]),
    Example([2, 9, 4], [-100, -100, 4]),
    Example([2, 5, 5, 8, 3], [-100, -100, -100, -100, 3]),
    Example([2, 11], [-100, 11]),
]


@pytest.fixture(scope="module")
def model():
    return tiny.make_model(VOCABULARY, initializer_range=0.5)


def squared_gradient(model, ids, targets) -> dict[str, torch.Tensor]:
    """(∂ Σ_t log p(target_t))² by autograd; targets: position of the predictor → token."""
    logs = functional.log_softmax(model(input_ids=torch.tensor(ids)[None]).logits[0].float(), -1)
    total = sum(logs[position, token] for position, token in targets.items())
    gradients = torch.autograd.grad(total, list(model.parameters()))
    return {name: gradient**2 for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True)}


def expectation(model, examples) -> dict[str, torch.Tensor]:
    """Σ_n Σ_y p(y) (∂ log p(y))², every word of the vocabulary in turn: the Fisher itself, for one scored token each."""
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for example in examples:
        last = len(example.input_ids) - 2
        with torch.no_grad():
            p = model(input_ids=torch.tensor(example.input_ids)[None]).logits[0, last].softmax(-1)
        for token in range(VOCABULARY):
            for name, square in squared_gradient(model, example.input_ids, {last: token}).items():
                sums[name] += p[token] * square
    return sums


def estimated(model, engine, labels, draws=1, seed=0, examples=EXAMPLES) -> dict[str, torch.Tensor]:
    with prepared(model) as sums:
        engine.add(labelled(examples, range(len(examples)), labels, draws, seed, engine.losses), sums)
    return sums


def trace(sums) -> float:
    return sum(float(total.double().sum()) for total in sums.values())


def correlation(left, right) -> float:
    both = torch.stack([torch.cat([total.flatten().detach() for total in sums.values()]) for sums in (left, right)])
    return float(torch.corrcoef(both)[0, 1])


@pytest.mark.parametrize("engine", [OneByOne, lambda model: BatchedSquares(model, PLENTY)])
def test_sampled_labels_give_the_fisher_in_expectation(model, engine):
    exact = expectation(model, EXAMPLES)
    drawn = estimated(model, engine(model), "sampled", draws=400)
    assert abs(trace(drawn) / trace(exact) - 1) < 0.1
    assert correlation(drawn, exact) > 0.98
    empirical = estimated(model, engine(model), "empirical")
    assert correlation(empirical, exact) < 0.95, "the data's labels are another thing"


def test_the_square_of_a_batch_with_sampled_labels_is_unbiased_and_with_the_datas_own_it_is_not(model):
    exact = expectation(model, EXAMPLES)
    engine = SummedGradient(model, PLENTY, draws=800)
    drawn = estimated(model, engine, "sampled", draws=800)
    stderr = torch.tensor(engine.traces).std() / len(engine.traces) ** 0.5
    mean = torch.tensor(engine.traces).mean()
    assert abs(float(mean) * len(EXAMPLES) - trace(exact)) < 4 * float(stderr) * len(EXAMPLES)
    assert correlation(drawn, exact) > 0.97
    own = estimated(model, SummedGradient(model, PLENTY), "empirical")
    assert correlation(own, estimated(model, OneByOne(model), "empirical")) < 0.97


def test_the_draws_of_a_batch_are_squared_apart_and_averaged(model):
    draws = 3
    engine = SummedGradient(model, PLENTY, draws)
    batch = labelled(EXAMPLES, range(len(EXAMPLES)), "sampled", draws, 5, engine.losses)
    expected = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for draw_ in range(draws):
        with prepared(model) as sums:
            SummedGradient(model, PLENTY).add({name: rows[draw_::draws] for name, rows in batch.items()}, sums)
        for name, total in sums.items():
            expected[name] = expected[name] + total / draws
    with prepared(model) as sums:
        engine.add(batch, sums)
    for name, total in sums.items():
        torch.testing.assert_close(total, expected[name].detach(), rtol=1e-5, atol=1e-6 * float(total.max()))


def test_options_are_weighted_by_the_models_renormalised_probabilities(model):
    # three options of different lengths, two of which begin with the same token
    ids, gold = [2, 5, 6], [7]
    options = [[7], [8, 4], [8, 9]]
    parts = tuple(Example(ids + option, [-100] * len(ids) + option) for option in options)
    example = Example(ids + gold, [-100] * len(ids) + gold, parts)
    logs, squares = [], []
    for option in options:
        targets = {len(ids) - 1 + k: token for k, token in enumerate(option)}
        with torch.no_grad():
            found = functional.log_softmax(model(input_ids=torch.tensor(ids + option)[None]).logits[0], -1)
        logs.append(sum(float(found[position, token]) for position, token in targets.items()))
        squares.append(squared_gradient(model, ids + option, targets))
    weights = torch.tensor(logs).softmax(0)
    expected = {name: sum(w * square[name] for w, square in zip(weights, squares, strict=True)) for name in squares[0]}
    for engine in (OneByOne(model), BatchedSquares(model, PLENTY), BatchedSquares(model, 1)):
        found = estimated(model, engine, "options", examples=[example, example])
        for name, total in found.items():
            torch.testing.assert_close(total, 2 * expected[name], rtol=1e-4, atol=1e-4 * float(total.max()))


def test_what_is_drawn_depends_on_seed_and_example_and_on_nothing_else(base_folder, tokenizer):
    def estimate(**settings):
        config = FisherConfig(labels="sampled", **{"seed": 1, "draws": 2, **settings})
        return estimate_fisher(base_folder, config, dataset=tiny.QUESTIONS, progress=False)

    first = estimate(batch_size=1)
    assert (first.manifest.estimator.labels, first.manifest.estimator.draws) == ("sampled", 2)
    for again in (estimate(batch_size=8), estimate(path="one_by_one"), estimate(save_every=2)):
        assert abs(again.trace / first.trace - 1) < 1e-5
    assert abs(estimate(seed=2).trace / first.trace - 1) > 1e-3
    assert abs(estimate(draws=3).trace / first.trace - 1) > 1e-3


def test_options_of_real_questions_count_the_scored_tokens_of_the_right_answer(base_folder):
    config = FisherConfig(labels="options", batch_size=3)
    found = estimate_fisher(base_folder, config, dataset=tiny.QUESTIONS, progress=False)
    plain = estimate_fisher(base_folder, FisherConfig(), dataset=tiny.QUESTIONS, progress=False)
    assert found.normalizer == plain.normalizer
    assert found.manifest.estimator.labels == "options"
    assert found.trace != plain.trace
    reference = estimate_fisher(
        base_folder, FisherConfig(labels="options", path="one_by_one"), dataset=tiny.QUESTIONS, progress=False
    )
    assert abs(found.trace / reference.trace - 1) < 1e-5


@pytest.mark.parametrize("labels", ["empirical", "sampled"])
def test_granularity_batch_is_recorded_with_its_batch_size_and_its_scatter(base_folder, labels):
    config = FisherConfig(granularity="batch", labels=labels, batch_size=2)
    found = estimate_fisher(base_folder, config, dataset=tiny.QUESTIONS, progress=False).manifest.estimator
    assert (found.path, found.granularity, found.batch_size, found.labels) == ("summed_gradient", "batch", 2, labels)
    assert 0 < found.trace_stderr < 1


def test_granularity_batch_takes_consecutive_examples_whatever_the_pauses_are(base_folder):
    def estimate(**settings):
        config = FisherConfig(granularity="batch", batch_size=4, **settings)
        return estimate_fisher(base_folder, config, dataset=tiny.QUESTIONS * 2, progress=False)

    examples = build_probe(FisherConfig(), tiny.make_tokenizer(), rows=tiny.QUESTIONS * 2).examples
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    with prepared(model) as sums:
        engine = SummedGradient(model, PLENTY)
        for start in range(0, 12, 4):
            engine.add(labelled(examples[start : start + 4], range(start, start + 4), "empirical", 1, 0, engine.losses), sums)
    for save_every in (1, 3, 256):
        found = estimate(save_every=save_every)
        for name, total in sums.items():
            torch.testing.assert_close(found.read(name), total, rtol=1e-5, atol=1e-5 * float(total.max()))


def test_settings_that_contradict_each_other_are_refused_together():
    with pytest.raises(ConfigError, match=r"(?s)draws: 3.*not independent"):
        FisherConfig(granularity="batch", labels="options", draws=3).check()
    with pytest.raises(ConfigError, match="no one-by-one path"):
        FisherConfig(granularity="token", path="one_by_one").check()


def test_drawn_tokens_follow_the_distribution_and_its_edges():
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0]).repeat(20_000, 1)
    found = draw(logits, torch.rand(20_000, generator=torch.Generator().manual_seed(0)))
    shares = found.bincount(minlength=4) / len(found)
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.01, rtol=0)
    assert shares[2] == 0
    assert draw(logits[:2], torch.tensor([0.0, 1 - 2**-24])).tolist() == [0, 3]
    impossible = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).repeat(2, 1)
    assert draw(impossible, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 2], "never a word of probability 0"

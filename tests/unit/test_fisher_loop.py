"""The loop under stress: NaN examples, kills at every pause, resumes with other settings, and what is recorded then."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from test_fisher_estimator import assert_equal
from transformers import AutoModelForCausalLM

from hf_ewc import ConfigError, DataError, FisherConfig, FisherInformation, estimate_fisher
from hf_ewc.fisher import accumulate_squares, build_probe, collate, estimator, prepared
from hf_ewc.fisher.rules import LinearRule
from hf_ewc.fisher.stability import SplitHalves, compare
from hf_ewc.fisher.state import RunningState

SICK = tiny.QUESTIONS[5]
KINDS = [
    {},
    {"labels": "sampled", "draws": 2},
    {"labels": "options"},
    {"granularity": "token"},
    {"granularity": "batch", "labels": "sampled", "draws": 2},
]


def estimate(model, rows, **settings) -> FisherInformation:
    return estimate_fisher(model, FisherConfig(**settings), dataset=rows, progress=False)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory, tokenizer) -> Path:
    """An untied base for which the question `SICK` is NaN, by a word that no other question has."""
    folder = tmp_path_factory.mktemp("poisoned")
    examples = build_probe(FisherConfig(), tokenizer, rows=tiny.QUESTIONS).examples
    others = {token for example in examples[:5] for token in example.input_ids}
    word = next(token for token in examples[5].input_ids if token not in others)
    model = tiny.make_model(len(tokenizer), tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[word] = torch.nan
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("save_every", [None, 2])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_nan_example_leaves_no_trace_in_any_kind_of_fisher(poisoned, tmp_path, kind, save_every):
    # at the end, so that the others keep their numbers, which decide what is drawn for them
    good = tiny.QUESTIONS[:5]
    work = {} if save_every is None else {"work_dir": str(tmp_path / "work"), "save_every": save_every}
    found = estimate(poisoned, [*good, SICK], max_dropped=0.5, batch_size=4, **kind, **work)
    expected = estimate(poisoned, good, batch_size=4, **kind)
    assert_equal(found, expected, 1e-5)
    assert (found.manifest.probes[0].examples, found.manifest.probes[0].dropped) == (5, 1)
    assert found.manifest.estimator.path == expected.manifest.estimator.path
    left, right = found.manifest.estimator.trace_stderr, expected.manifest.estimator.trace_stderr
    assert left == (None if right is None else pytest.approx(right, rel=1e-4))


@pytest.mark.parametrize("saved", [True, False])
def test_bad_examples_in_several_windows_and_two_in_one_batch_are_each_dropped_once(poisoned, tmp_path, saved):
    rows = [SICK, tiny.QUESTIONS[0], SICK, tiny.QUESTIONS[1], *tiny.QUESTIONS[2:4], SICK, tiny.QUESTIONS[4]]
    work = {"work_dir": str(tmp_path / "work")} if saved else {}
    found = estimate(poisoned, rows, max_dropped=3 / 8, save_every=4, batch_size=2, **work)  # not one more than there are
    assert_equal(found, estimate(poisoned, tiny.QUESTIONS[:5]), 1e-5)
    assert found.manifest.probes[0].dropped == 3


class SickBackward(torch.autograd.Function):
    """Changes nothing on the way forward; on the way back, the rows that are `sick` become NaN."""

    @staticmethod
    def forward(ctx, x, sick):
        ctx.save_for_backward(sick)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        (sick,) = ctx.saved_tensors
        return torch.where(sick[:, None, None], torch.nan, g), None


@pytest.mark.parametrize("kind", [{}, {"path": "one_by_one"}, {"granularity": "batch"}], ids=str)
def test_a_nan_gradient_under_a_finite_loss_is_found_and_dropped(base_folder, kind):
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    rows = [{"input_ids": [2, n, 50, 51], "labels": [-100, -100, 50, 51]} for n in (60, 61, 62, 63, 64, 99)]
    sick = []
    model.model.register_forward_pre_hook(
        lambda _, args, given: sick.append((given["input_ids"] == 99).any(1)), with_kwargs=True
    )
    model.model.norm.register_forward_hook(lambda module, args, y: SickBackward.apply(y, sick[-1]))
    found = estimate(model, rows, max_dropped=0.5, batch_size=3, **kind)
    assert found.manifest.probes[0].dropped == 1
    assert_equal(found, estimate(base_folder, rows[:5], batch_size=3, **kind), 1e-5)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], KINDS[4]], ids=str)
def test_a_run_that_is_killed_at_any_pause_resumes_to_the_same_artifact(poisoned, tmp_path, monkeypatch, kind):
    rows = [*tiny.QUESTIONS[:3], SICK, *tiny.QUESTIONS[3:5]] * 2
    settings = {"max_dropped": 0.5, "batch_size": 2, "save_every": 4, **kind}
    straight = estimate(poisoned, rows, **settings)
    save = RunningState.save
    for pause in (1, 2):
        work = {"work_dir": str(tmp_path / f"work-{pause}")}
        calls = []

        def killed(self, *args, pause=pause, calls=calls, **kwargs):
            save(self, *args, **kwargs)
            calls.append(1)
            if len(calls) == pause:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(RunningState, "save", killed)
            with pytest.raises(KeyboardInterrupt):
                estimate(poisoned, rows, **settings, **work)
        resumed = estimate(poisoned, rows, **settings, **work, resume=True)
        assert_equal(resumed, straight)
        assert resumed.manifest.probes == straight.manifest.probes
        assert resumed.manifest.estimator == straight.manifest.estimator, "halves and scatter included"


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ({}, {"labels": "options"}, "labels"),
        ({}, {"granularity": "token"}, "granularity"),
        ({"labels": "sampled"}, {"labels": "sampled", "draws": 2}, "draws"),
        ({"labels": "sampled"}, {"labels": "sampled", "seed": 1}, "seed"),
        ({"granularity": "batch", "batch_size": 2}, {"granularity": "batch", "batch_size": 3}, "batch_size"),
        ({}, {"until_stable": 0.9}, "until_stable"),
        ({}, {"path": "one_by_one"}, "path"),
    ],
)
def test_a_resume_with_another_setting_is_refused_by_its_name(base_folder, tmp_path, before, after, named):
    work = {"work_dir": str(tmp_path / "work")}
    estimate(base_folder, tiny.QUESTIONS, **before, **work)
    with pytest.raises(ConfigError, match=rf"{named}\s+then"):
        estimate(base_folder, tiny.QUESTIONS, **after, **work, resume=True)


def test_a_seed_and_a_batch_size_that_change_nothing_do_not_stand_in_the_way_of_a_resume(base_folder, tmp_path):
    work = {"work_dir": str(tmp_path / "work")}
    first = estimate(base_folder, tiny.QUESTIONS, **work)
    assert_equal(estimate(base_folder, tiny.QUESTIONS, seed=3, batch_size=2, **work, resume=True), first)


def test_the_recorded_halves_are_those_of_the_even_and_the_odd_examples(base_folder, tokenizer):
    rows = tiny.QUESTIONS * 6  # comparisons at 32 and 36
    examples = build_probe(FisherConfig(), tokenizer, rows=rows).examples
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    parts = []
    for half in (0, 1):
        with prepared(model) as sums:
            assert all(accumulate_squares(model, collate(examples[half:32:2]), sums))
        halves = SplitHalves({name: torch.zeros_like(total) for name, total in sums.items()})
        halves.begin({name: torch.zeros_like(total) for name, total in sums.items()})
        halves.end(sums, half)
        parts.append(halves.values[half])
    expected = compare(torch.stack(parts), halves.segments, 32)
    found = estimate(base_folder, rows, batch_size=5, save_every=7).manifest.estimator.stability
    assert [record.examples for record in found] == [32, 36]
    assert found[0].correlation == pytest.approx(expected.correlation, abs=1e-4)
    assert 0 < expected.correlation < 0.9999


def test_the_scatter_of_batches_is_the_standard_error_of_their_mean(base_folder):
    one = [estimate(base_folder, tiny.QUESTIONS[n : n + 2], granularity="batch", batch_size=2) for n in (0, 2, 4)]
    traces = torch.tensor([fisher.trace * fisher.normalizer / 2 for fisher in one], dtype=torch.float64)
    found = estimate(base_folder, tiny.QUESTIONS, granularity="batch", batch_size=2)
    assert found.manifest.estimator.trace_stderr == pytest.approx(float(traces.std() / traces.mean() / 3**0.5), rel=1e-4)
    assert one[0].manifest.estimator.trace_stderr is None, "one batch has no scatter"


def test_the_path_is_checked_on_the_shortest_and_the_longest_example(base_folder, monkeypatch):
    seen = []
    choose = estimator.choose_engine

    def watched(model, config, first, sums):
        seen.append(sorted(first["attention_mask"].sum(1).tolist()))
        return choose(model, config, first, sums)

    monkeypatch.setattr(estimator, "choose_engine", watched)
    lengths = [9, 4, 7, 3, 6, 12, 5]
    rows = [{"input_ids": [2, *range(50, 49 + n)], "labels": [-100, *range(50, 49 + n)]} for n in lengths]
    estimate(base_folder, rows)
    assert (seen[0][0], seen[0][-1], len(seen[0])) == (3, 12, 4)


def test_a_module_that_hides_its_examples_in_a_later_batch_is_left_out_without_adding_anything_twice(
    base_folder, monkeypatch, caplog
):
    name, calls, observe = "model.layers.1.mlp.up_proj.weight", [], LinearRule.observe

    def hides(self, x):
        if self.weight == name:
            calls.append(1)
            if len(calls) == 3:  # the first call is the self-check
                return None
        return observe(self, x)

    straight = estimate(base_folder, tiny.QUESTIONS, batch_size=2)
    monkeypatch.setattr(LinearRule, "observe", hides)
    assert_equal(estimate(base_folder, tiny.QUESTIONS, batch_size=2), straight, 1e-5)
    assert f"From now on these go through the one-by-one path: {name}" in caplog.text
    calls.clear()
    with pytest.raises(DataError, match=rf"granularity: token.*{name}"):
        estimate(base_folder, tiny.QUESTIONS, batch_size=2, granularity="token")


def token_rows(*firsts):
    return [{"input_ids": [2, f, 50, 51, 52 + k % 9], "labels": [-100, -100, 50, 51, 52 + k % 9]} for k, f in enumerate(firsts)]


def test_autocast_and_inference_mode_of_the_caller_do_not_reach_the_gradients(base_folder):
    plain = estimate_fisher(base_folder, FisherConfig(), dataset=tiny.QUESTIONS, progress=False)
    for around in (torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode()):
        with around:
            found = estimate_fisher(base_folder, FisherConfig(), dataset=tiny.QUESTIONS, progress=False)
        assert found.manifest.estimator.path == "batched"
        assert found.trace == plain.trace


def test_max_dropped_is_a_share_of_the_examples_that_were_used(tmp_path, tokenizer):
    model = tiny.make_model(len(tokenizer), tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[90] = torch.nan
    model.save_pretrained(tmp_path / "poisoned")
    tokenizer.save_pretrained(tmp_path / "poisoned")
    data = token_rows(*[90] * 8, *[60, 61] * 500)
    config = FisherConfig(until_stable=0.1, max_dropped=0.01)
    with pytest.raises(DataError, match="8 of 64 examples"):  # 0.8 % of the probe, 12 % of what was used
        estimate_fisher(tmp_path / "poisoned", config, dataset=data, progress=False)


def test_a_probe_that_stopped_when_stable_is_finished_on_resume(base_folder, tmp_path):
    data = tiny.write_jsonl(tmp_path / "q.jsonl", tiny.QUESTIONS * 40)
    config = FisherConfig(probes={"a": {"probe": "mmlu", "dataset": str(data)}}, until_stable=0.6, work_dir=str(tmp_path / "w"))
    first = estimate_fisher(base_folder, config, progress=False)
    config.resume = True
    again = estimate_fisher(base_folder, config, progress=False)
    assert again.manifest.probes == first.manifest.probes
    assert first.manifest.probes[0].examples == 64


def test_what_was_left_out_in_the_middle_is_recorded(base_folder, monkeypatch):
    name, calls, observe = "model.layers.1.mlp.up_proj.weight", [], LinearRule.observe

    def hides(self, x):
        if self.weight == name:
            calls.append(1)
            if len(calls) == 3:
                return None
        return observe(self, x)

    monkeypatch.setattr(LinearRule, "observe", hides)
    found = estimate_fisher(base_folder, FisherConfig(batch_size=2), dataset=tiny.QUESTIONS, progress=False)
    assert found.manifest.estimator.fallback == [name]

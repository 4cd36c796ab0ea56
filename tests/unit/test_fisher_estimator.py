"""The loop: what it records, what it restores, what it drops, what it refuses, how it resumes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from hf_ewc import ConfigError, DataError, FisherConfig, FisherInformation, estimate_fisher
from hf_ewc.fisher import Example, accumulate_squares, build_probe, collate, prepared
from hf_ewc.fisher.state import RunningState

BAD = 90  # a token whose input embedding is NaN in `poisoned_folder`


def estimate(model, **settings) -> FisherInformation:
    dataset = settings.pop("rows", tiny.QUESTIONS)
    return estimate_fisher(model, FisherConfig(**settings), dataset=dataset, progress=False)


def token_rows(*firsts: int) -> list[dict]:
    """Rows of five tokens, three of them scored, with a chosen first word."""
    tails = [[50, 51, 52 + number] for number in range(len(firsts))]
    rows = zip(firsts, tails, strict=True)
    return [{"input_ids": [2, first, *tail], "labels": [-100, -100, *tail]} for first, tail in rows]


def assert_equal(left: FisherInformation, right: FisherInformation, tolerance: float = 0) -> None:
    """Bit by bit, or within a tolerance relative to each tensor's largest value: other batches round differently."""
    assert left.names == right.names
    assert left.normalizer == right.normalizer
    for name in left.names:
        theirs = right.read(name)
        torch.testing.assert_close(left.read(name), theirs, rtol=tolerance, atol=tolerance * float(theirs.max()))


@pytest.fixture(scope="module")
def poisoned_folder(tmp_path_factory, tokenizer) -> Path:
    """An untied base whose embedding of token 90 is NaN: examples with it have a NaN gradient, others are healthy."""
    folder = tmp_path_factory.mktemp("poisoned")
    model = tiny.make_model(len(tokenizer), tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[BAD] = torch.nan
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_artifact_records_what_was_measured(base_folder, tmp_path):
    data = tiny.write_jsonl(tmp_path / "questions.jsonl", tiny.QUESTIONS)
    fisher = estimate_fisher(
        base_folder, FisherConfig(dataset=str(data), dataset_split="validation", max_length=64), progress=False
    )
    [probe], record = fisher.manifest.probes, fisher.manifest.estimator
    assert (probe.kind, probe.dataset, probe.split) == ("mmlu", "questions.jsonl", "validation")
    assert (probe.examples, probe.dropped) == (6, 0)
    assert probe.scored_tokens == fisher.normalizer > 0
    assert (record.labels, record.granularity, record.reduction, record.path) == ("empirical", "example", "sum", "batched")
    assert (record.accumulation_dtype, record.model_dtype, record.max_length) == ("float32", "float32", 64)
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    assert fisher.names == [name for name, _ in model.named_parameters()], "every parameter, the tied table once"
    assert fisher.trace > 0


def test_ten_examples_in_batches_of_four_count_as_ten(base_folder):
    rows = (tiny.QUESTIONS * 2)[:10]
    one, four = estimate(base_folder, rows=rows, batch_size=1), estimate(base_folder, rows=rows, batch_size=4)
    assert_equal(one, four, 1e-5)
    assert one.manifest.probes[0].examples == four.manifest.probes[0].examples == 10


def test_the_fisher_is_deterministic_without_dropout_and_unmoved_by_the_random_state(tmp_path, tokenizer):
    base = tiny.save_base(tmp_path / "dropout", tokenizer, attention_dropout=0.5)
    torch.manual_seed(1)
    first = estimate(base)
    torch.manual_seed(2)
    assert_equal(first, estimate(base))
    model = AutoModelForCausalLM.from_pretrained(base).train()
    assert_equal(first, estimate(model))


def test_a_loaded_model_is_left_as_it_was_found(base_folder):
    model = AutoModelForCausalLM.from_pretrained(base_folder).train()
    model.model.layers[0].eval()
    frozen, busy = model.model.embed_tokens.weight, model.model.norm.weight
    frozen.requires_grad_(False)
    busy.grad = torch.full_like(busy, 3.0)
    model.config.use_cache = True
    model.gradient_checkpointing_enable()
    torch.manual_seed(5)
    state, weights = torch.get_rng_state(), {name: tensor.clone() for name, tensor in model.state_dict().items()}

    fisher = estimate(model)

    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.model.layers[0].training
    assert not frozen.requires_grad
    assert busy.requires_grad
    assert torch.equal(busy.grad, torch.full_like(busy, 3.0))
    assert all(parameter.grad is None for parameter in model.parameters() if parameter is not busy)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert model.config.use_cache
    assert model.is_gradient_checkpointing
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())
    assert_equal(fisher, estimate(base_folder))  # the frozen table and the stray gradient did not matter


def test_a_model_is_restored_after_an_error_and_even_under_no_grad(base_folder):
    model = AutoModelForCausalLM.from_pretrained(base_folder).train()
    with pytest.raises(IndexError), prepared(model) as sums:  # a token that the model does not have
        accumulate_squares(model, collate([Example([2, 50, 51], [-100, 50, 51]), Example([2, 5000], [-100, 50])]), sums)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        assert estimate(model).trace > 0


def test_only_scored_positions_reach_the_language_model_head(base_folder):
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape[:2])))
    probe = build_probe(FisherConfig(), None, rows=token_rows(60, 61))
    estimate(model, rows=token_rows(60, 61), path="one_by_one")
    handle.remove()
    assert seen == [(1, example.scored) for example in probe.examples] == [(1, 3), (1, 3)]


def test_a_gradient_of_1e_minus_5_squares_to_1e_minus_10_and_4096_terms_sum_to_4096():
    # float16 squares would give 0 here, and bfloat16 sums would stop at 256
    model = tiny.make_model(num_hidden_layers=0)
    example = collate([Example([2, 50], [-100, 50])])
    weight = model.model.norm.weight

    def sums_with(gradient: float, times: int) -> torch.Tensor:
        handle = weight.register_hook(lambda g: torch.full_like(g, gradient))
        with prepared(model) as sums:
            for _ in range(times):
                accumulate_squares(model, example, sums)
        handle.remove()
        return sums["model.norm.weight"]

    model.to(torch.bfloat16)
    torch.testing.assert_close(sums_with(1e-5, 1), torch.full((32,), 1e-10), rtol=1e-2, atol=0)
    torch.testing.assert_close(sums_with(1.0, 4096), torch.full((32,), 4096.0), rtol=0, atol=0)


@pytest.mark.parametrize("save_every", [None, 2, 3, 100])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_examples_with_nan_gradients_leave_no_trace(poisoned_folder, tmp_path, caplog, save_every, batch_size):
    kept = [60, 61, 62, 63, 64]
    rows = token_rows(*kept)
    mixed = rows.copy()
    for place, row in zip((0, 3, 6), token_rows(BAD, BAD, BAD), strict=True):
        mixed.insert(place, row)
    settings = {} if save_every is None else {"work_dir": str(tmp_path / "work"), "save_every": save_every}
    with caplog.at_level(logging.WARNING):
        fisher = estimate(poisoned_folder, rows=mixed, max_dropped=0.5, batch_size=batch_size, **settings)
    assert_equal(fisher, estimate(poisoned_folder, rows=rows), 1e-5)
    [probe] = fisher.manifest.probes
    assert (probe.examples, probe.dropped, probe.scored_tokens) == (5, 3, 15)
    assert fisher.normalizer == 15
    assert "3 of 8 examples were dropped" in caplog.text
    assert "number 1, 4, 7" in caplog.text


@pytest.mark.parametrize("gradient", [torch.nan, torch.inf, 1e30])  # 1e30 is finite, but its square is not in float32
def test_a_gradient_that_is_not_finite_is_noticed_under_a_finite_loss(gradient):
    model = tiny.make_model(num_hidden_layers=1)
    handle = model.model.norm.weight.register_hook(lambda g: torch.full_like(g, gradient))
    with prepared(model) as sums:
        assert accumulate_squares(model, collate([Example([2, 50], [-100, 50])]), sums) == [False]
    handle.remove()


def test_one_nan_row_does_not_taint_the_verdict_on_the_rows_after_it(poisoned_folder):
    model = AutoModelForCausalLM.from_pretrained(poisoned_folder)
    rows = collate(build_probe(FisherConfig(), None, rows=token_rows(60, BAD, 61)).examples)
    with prepared(model):
        assert accumulate_squares(model, rows, None) == [True, False, True]


def test_more_than_max_dropped_fails_the_run(poisoned_folder):
    with pytest.raises(DataError, match=r"2 of 4 examples so far \(number 2, 3\).*max_dropped: 0.25"):
        estimate(poisoned_folder, rows=token_rows(60, BAD, BAD, 61), max_dropped=0.25)
    with pytest.raises(DataError, match=r"max_dropped: 0\.01"):
        estimate(poisoned_folder, rows=token_rows(60, BAD))


def test_a_finished_estimate_resumes_to_the_same_artifact_without_work(poisoned_folder, tmp_path):
    settings = {"rows": token_rows(60, BAD, 61, 62), "max_dropped": 0.5, "work_dir": str(tmp_path / "work"), "save_every": 2}
    first, again = estimate(poisoned_folder, **settings), estimate(poisoned_folder, resume=True, **settings)
    assert_equal(first, again)
    assert first.manifest.probes == again.manifest.probes


def test_resume_begins_when_there_is_nothing_to_continue(base_folder, tmp_path):
    assert_equal(estimate(base_folder, work_dir=str(tmp_path / "new"), resume=True), estimate(base_folder))


def test_an_unfinished_estimate_is_neither_overwritten_nor_continued_with_other_settings(base_folder, tmp_path, tokenizer):
    work = {"work_dir": str(tmp_path / "work")}
    estimate(base_folder, **work)
    with pytest.raises(ConfigError, match=r"stands at example 6.*resume: true"):
        estimate(base_folder, **work)
    with pytest.raises(ConfigError, match=r"model_dtype\s+then float32\s+now bfloat16"):
        estimate(base_folder, dtype="bfloat16", resume=True, **work)
    with pytest.raises(ConfigError, match=r"probe\s+then [0-9a-f]{64}\s+now [0-9a-f]{64}"):
        estimate(base_folder, rows=tiny.QUESTIONS[:5], resume=True, **work)
    with pytest.raises(ConfigError, match=r"weights\s+then [0-9a-f]{64}\s+now"):
        estimate(tiny.save_base(tmp_path / "other", tokenizer, seed=1), resume=True, **work)


def test_a_save_that_fails_half_way_leaves_the_one_before(tmp_path, monkeypatch):
    def disk_full(*_):
        raise OSError(28, "No space left on device")

    state = RunningState(tmp_path, {})
    state.save({"weight": torch.ones(2)}, 3, [1])
    with monkeypatch.context() as patch:
        patch.setattr("hf_ewc.fisher.state.write_atomically", disk_full)
        with pytest.raises(OSError, match="No space"):
            state.save({"weight": torch.full((2,), 9.0)}, 6, [1, 4])
    again, sums = RunningState(tmp_path, {}, resume=True), {"weight": torch.zeros(2)}
    again.load(sums)
    assert (again.position, again.dropped, sums["weight"].tolist()) == (3, [1], [1.0, 1.0])
    again.save(sums, 9, [1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["estimate.json", "sums-9.safetensors"]


def test_damaged_running_sums_are_reported(base_folder, tmp_path):
    work = tmp_path / "work"
    estimate(base_folder, work_dir=str(work), save_every=4)
    [sums] = work.glob("sums-*")
    sums.write_bytes(sums.read_bytes()[:-10])
    with pytest.raises(ConfigError, match="cannot be read"):
        estimate(base_folder, work_dir=str(work), resume=True)
    (work / "estimate.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        estimate(base_folder, work_dir=str(work), resume=True)


def test_a_loaded_model_must_equal_the_files_it_came_from(base_folder):
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    with pytest.raises(DataError, match=r"`model.norm.weight` differs.*save_pretrained"):
        estimate(model)
    with pytest.raises(DataError, match=r"comes from no file.*save_pretrained"):
        estimate(tiny.make_model())
    with pytest.raises(DataError, match=r"got Linear.*merge_and_unload"):
        estimate(torch.nn.Linear(2, 2))


def test_a_bfloat16_model_of_float32_files_passes_as_the_same_weights(base_folder):
    fisher = estimate(AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16))
    assert fisher.manifest.estimator.model_dtype == "bfloat16"
    assert fisher.read("model.norm.weight").dtype == torch.float32


def test_a_probe_of_another_tokenizer_is_refused_before_it_runs(base_folder):
    with pytest.raises(DataError, match=r"token 5000, but '.*' knows tokens 0 to \d+"):
        estimate(base_folder, rows=[{"input_ids": [2, 5000], "labels": [-100, 5000]}])


def test_all_wrong_settings_are_reported_before_anything_is_loaded():
    with pytest.raises(ConfigError, match=r"(?s)granularity.*max_dropped"):
        estimate_fisher("nowhere", FisherConfig(granularity="layer", max_dropped=2.0))


def test_the_sums_of_several_processes_are_not_taken_for_those_of_one(base_folder, tmp_path):
    folder = tmp_path / "work" / "process-0-of-2"
    RunningState(folder, {}).save({"weight": torch.ones(1)}, 3, [])
    with pytest.raises(ConfigError, match="sums of 2 processes, and 1 is running"):
        estimate(base_folder, work_dir=str(tmp_path / "work"), resume=True)

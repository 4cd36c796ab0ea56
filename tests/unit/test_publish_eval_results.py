"""Figures in the Hub's forms: a registered benchmark is claimed only when it is recorded that it was one."""

from __future__ import annotations

import copy

import yaml
from huggingface_hub import parse_eval_result_entries
from test_publish_checkpoint_card import SWEEP

from hf_ewc.publish import eval_result_files, model_index


def with_questions(name: str, **recorded) -> tuple[dict, dict]:
    results = copy.deepcopy(SWEEP)
    run = results["runs"][1]
    run["metrics"]["questions"] = {name: {"accuracy": 0.4125, "stderr": 0.01, "chance": 0.1, "n": 1200, **recorded}}
    return results, run


def test_a_name_is_no_evidence_that_a_question_set_is_a_benchmark():
    for name in ("gsm8k", "TIGER-Lab/MMLU-Pro", "facts"):
        assert eval_result_files(*with_questions(name)) == {}
    assert eval_result_files(*with_questions("mmlu", dataset="cais/mmlu")) == {}, "the Hub registers no such benchmark"


def test_a_recorded_benchmark_becomes_an_entry_that_the_client_reads_back():
    results, run = with_questions("pro", dataset="TIGER-Lab/MMLU-Pro", dataset_revision="99" * 20)
    ((path, text),) = eval_result_files(results, run, "https://huggingface.co/me/lt").items()
    assert path == ".eval_results/mmlu-pro.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("TIGER-Lab/MMLU-Pro", "mmlu_pro", 41.25)
    assert entry.dataset_revision == "99" * 20
    assert entry.source_url == "https://huggingface.co/me/lt"
    assert "1200 questions" in str(entry.notes)
    assert [r for r in model_index(results, run) if r.metric_type == "accuracy"] == [], "told once"


def test_what_is_not_finite_is_left_out():
    results = copy.deepcopy(SWEEP)
    run = results["runs"][1]
    run["metrics"]["texts"]["english"]["bits_per_byte"] = None
    assert [result.metric_type for result in model_index(results, run)] == ["bits_per_byte", "learning", "accuracy"]

"""Mixtures of probes, stopping when stable, and the windows that an estimate is cut into."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ewc import ConfigError, DataError, FisherConfig, FisherInformation, estimate_fisher
from hf_ewc.fisher.plan import plan

TEXTS = [{"text": text} for text in tiny.TEXTS]


@pytest.fixture(scope="module")
def probes(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("mixture")
    questions = tiny.write_jsonl(folder / "questions.jsonl", tiny.QUESTIONS)
    texts = tiny.write_jsonl(folder / "texts.jsonl", TEXTS)
    return {
        "facts": {"probe": "mmlu", "dataset": str(questions), "weight": 3},
        "running text": {"probe": "text", "dataset": str(texts), "max_length": 24},
    }


def same(left: FisherInformation, right: FisherInformation) -> None:
    for name in left.names:
        theirs = right.per_token(name)
        torch.testing.assert_close(left.per_token(name), theirs, rtol=1e-5, atol=1e-5 * float(theirs.max()))


def test_a_mixture_is_the_weighted_mean_of_its_probes_per_scored_token(base_folder, probes):
    mixed = estimate_fisher(base_folder, FisherConfig(probes=probes), progress=False)
    parts = [
        estimate_fisher(base_folder, FisherConfig(dataset=probes["facts"]["dataset"]), progress=False),
        estimate_fisher(
            base_folder, FisherConfig(probe="text", dataset=probes["running text"]["dataset"], max_length=24), progress=False
        ),
    ]
    for name in mixed.names:
        expected = 0.75 * parts[0].per_token(name) + 0.25 * parts[1].per_token(name)
        torch.testing.assert_close(mixed.per_token(name), expected, rtol=1e-5, atol=1e-5 * float(expected.max()))
    facts, text = mixed.manifest.probes
    assert (facts.name, facts.kind, facts.weight) == ("facts", "mmlu", 0.75)
    assert (text.name, text.kind, text.weight) == ("running text", "text", 0.25)
    assert facts.scored_tokens == parts[0].normalizer
    assert text.ids_sha256 == parts[1].manifest.probes[0].ids_sha256
    assert {record.probe for record in mixed.manifest.estimator.stability} == {"facts", "running text"}
    assert mixed.manifest.estimator.self_check < 1e-5


def test_a_mixture_that_was_killed_measures_each_probe_once(base_folder, probes, tmp_path, monkeypatch):
    from hf_ewc.fisher import estimator

    config = FisherConfig(probes=probes, work_dir=str(tmp_path / "work"), save_every=2)
    straight = estimate_fisher(base_folder, FisherConfig(probes=probes, save_every=2), progress=False)
    measured = []
    run = estimator.Loop.run

    def killed(self, progress):
        measured.append(self.probe)
        if len(measured) == 2:
            raise KeyboardInterrupt
        run(self, progress)

    monkeypatch.setattr(estimator.Loop, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        estimate_fisher(base_folder, config, progress=False)
    config.resume = True
    same(estimate_fisher(base_folder, config, progress=False), straight)
    assert measured == ["facts", "running text", "running text"]

    probes = {**probes, "facts": {**probes["facts"], "max_examples": 2}}
    with pytest.raises(ConfigError, match=r"(?s)finished Fisher of another.*`facts`"):
        estimate_fisher(base_folder, FisherConfig(probes=probes, work_dir=str(tmp_path / "work"), resume=True), progress=False)


@pytest.mark.parametrize(
    "settings", [{"labels": "sampled"}, {"granularity": "batch"}, {"dtype": "bfloat16"}, {"labels": "sampled", "draws": 2}]
)
def test_a_finished_probe_is_not_taken_for_one_with_other_settings(base_folder, probes, tmp_path, settings):
    config = FisherConfig(probes={"facts": probes["facts"]}, work_dir=str(tmp_path / "work"))
    config.labels = "sampled" if "draws" in settings else "empirical"
    estimate_fisher(base_folder, config, progress=False)
    for name, value in {"resume": True, **settings}.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError, match=r"(?s)finished Fisher of another.*`facts`"):
        estimate_fisher(base_folder, config, progress=False)


def test_a_finished_probe_of_another_model_is_not_taken_for_this_ones(base_folder, probes, tmp_path, tokenizer):
    config = FisherConfig(probes={"facts": probes["facts"]}, work_dir=str(tmp_path / "work"))
    estimate_fisher(base_folder, config, progress=False)
    config.resume = True
    other = tiny.save_base(tmp_path / "other", tokenizer, seed=1)
    with pytest.raises(ConfigError, match=r"(?s)finished Fisher of another.*`facts`"):
        estimate_fisher(other, config, progress=False)


def test_probes_whose_names_differ_by_what_a_folder_cannot_say_are_kept_apart(base_folder, probes, tmp_path):
    named = {"a b": probes["facts"], "a-b": probes["running text"], "a/../b": {**probes["facts"], "max_examples": 2}}
    straight = estimate_fisher(base_folder, FisherConfig(probes=named), progress=False)
    work = {"work_dir": str(tmp_path / "work")}
    same(estimate_fisher(base_folder, FisherConfig(probes=named, **work), progress=False), straight)
    same(estimate_fisher(base_folder, FisherConfig(probes=named, **work, resume=True), progress=False), straight)
    assert len(list((tmp_path / "work").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["work"], "no name leads out of the folder"


def test_a_mixture_reads_all_its_probes_before_it_measures_one(base_folder, probes, monkeypatch):
    from hf_ewc.fisher import estimator

    monkeypatch.setattr(estimator.Loop, "run", lambda *_: pytest.fail("nothing should have been measured"))
    broken = {**probes, "running text": {**probes["running text"], "text_column": "body"}}
    with pytest.raises(DataError, match="no column `body`"):
        estimate_fisher(base_folder, FisherConfig(probes=broken), progress=False)


@pytest.mark.parametrize(
    ("probes", "message"),
    [
        ({"a": {"probe": "mmlu", "weight": 0}}, "probes.a.weight"),
        ({"a": {"probe": "mmlu", "codec": "float32"}}, "one setting for the whole mixture"),
        ({"a": {"probe": "mmlu", "wieght": 2}}, "is not a setting"),
        ({"a": {"probe": "text"}}, "`probes.a`: the `text` probe needs `dataset`"),
        ({}, "must map names to settings"),
        (["mmlu"], "must map names to settings"),
    ],
)
def test_mistakes_in_a_mixture_are_named(probes, message):
    with pytest.raises(ConfigError, match=message):
        FisherConfig(probes=probes).check()


def test_a_mixture_can_be_given_as_json_on_the_command_line(probes):
    assert FisherConfig(probes=json.dumps(probes)).probes == probes
    with pytest.raises(ConfigError, match="must map names to settings"):
        FisherConfig(probes="facts")


def test_until_stable_stops_at_a_doubling_and_counts_what_it_used(base_folder):
    rows = tiny.QUESTIONS * 40  # 240 of 6 kinds: the halves agree at once
    config = FisherConfig(until_stable=0.6)
    stopped = estimate_fisher(base_folder, config, dataset=rows, progress=False)
    [probe], records = stopped.manifest.probes, stopped.manifest.estimator.stability
    assert [record.examples for record in records] == [32, 64]
    assert probe.examples == 64
    first = estimate_fisher(base_folder, FisherConfig(), dataset=rows[:64], progress=False)
    assert (stopped.normalizer, probe.ids_sha256) == (first.normalizer, first.manifest.probes[0].ids_sha256)
    same(stopped, first)
    everything = estimate_fisher(base_folder, FisherConfig(until_stable=0.999999), dataset=rows, progress=False)
    assert [record.examples for record in everything.manifest.estimator.stability] == [32, 64, 128, 240]
    assert everything.manifest.probes[0].examples == 240


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    save_every=st.integers(1, 70),
    resumed_at=st.integers(0, 60),
    fixed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_example_is_in_one_batch_of_one_window(count, batch_size, save_every, resumed_at, fixed, seed):
    lengths = torch.randint(2, 30, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    compare_at = [c for c in (4, 8, 16, 32) if c < count] + [count]
    windows = plan(lengths, batch_size, save_every, compare_at, min(resumed_at, count), fixed)
    whole = {min(-(-c // batch_size) * batch_size, count) for c in compare_at}
    assert {w.stop for w in windows if w.compare} == (whole if fixed else set(compare_at))
    assert [w.start for w in windows] == [0] + [w.stop for w in windows[:-1]]
    assert windows[-1].stop == count
    assert windows[-1].compare
    for window in windows:
        numbers = [n for _, batch in window.batches for n in batch]
        assert sorted(numbers) == list(range(window.start, window.stop))
        assert all(1 <= len(batch) <= batch_size for _, batch in window.batches)
        for half, batch in window.batches:
            assert (batch[0] // batch_size % 2 == half) if fixed else all(n % 2 == half for n in batch)
    if fixed:
        batches = [batch for window in windows for _, batch in window.batches]
        assert [batch[0] for batch in batches] == list(range(0, count, batch_size))


@pytest.mark.parametrize(
    "own", [{"max_examples": "many"}, {"max_length": 2.5}, {"allow_test_split": "no"}, {"dataset": 3}], ids=str
)
def test_values_of_a_wrong_type_in_a_mixture_are_named_before_anything_is_read(own):
    [(key, value)] = own.items()
    with pytest.raises(ConfigError, match=rf"probes\.a\.{key}: {value!r}. must be a"):
        FisherConfig(probes={"a": {"probe": "mmlu", **own}}).check()

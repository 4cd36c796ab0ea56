"""What a page shows beside the models: figures, layers and lineage of real files; what is missing or damaged leaves a note."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from test_artifact_fold import save_moved
from test_merge import make_fisher, state_file, with_state

from hf_ewc import BaseModel, EvaluationConfig, FisherInformation, evaluate_model
from hf_ewc.compare import CompareConfig
from hf_ewc.compare.between import Between
from hf_ewc.compare.facts import fisher_of, load_facts
from hf_ewc.compare.pair import ModelPair
from hf_ewc.evaluation import rows, save_results
from hf_ewc.merge import merge_models

KEYS = ["mode", "lambda", "old", "forgetting", "questions", "new", "learning"]


@dataclass
class World:
    """A base, its Fisher, a model trained with and one without it, all measured; as the demo leaves them."""

    root: Path

    @property
    def config(self) -> CompareConfig:
        where = {name: str(self.root / name) for name in ("base", "adapted")}
        return CompareConfig(**where, results=str(self.root / "results.json"))

    def results(self) -> dict:
        return json.loads((self.root / "results.json").read_text())

    def state(self, **changes) -> None:
        state = json.loads(state_file(self.root / "adapted").read_text())
        state_file(self.root / "adapted").write_text(json.dumps({**state, **changes}))


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer) -> World:
    root = tmp_path_factory.mktemp("world")
    base = tiny.save_base(root / "base", tokenizer)
    fisher = FisherInformation.from_pretrained(make_fisher(base).save_pretrained(root / "fisher"))
    for name, seed, strength in (("adapted", 1, 10.0), ("plain", 2, 0.0)):
        moved = save_moved(base, root / f"moved-{name}", tokenizer, seed)
        more = {"ewc_lambda": strength, "ewc_mode": "proximal"}
        with_state(moved, root / name, base, fisher if strength else None, **more)
        shutil.rmtree(moved)
    for number, name in enumerate(("old", "new")):
        tiny.write_jsonl(root / f"{name}.jsonl", [{"text": text} for text in tiny.TEXTS[number::2]])
    tiny.write_jsonl(root / "facts.jsonl", tiny.QUESTIONS)
    texts = {name: str(root / f"{name}.jsonl") for name in ("old", "new")}
    evaluation = EvaluationConfig(texts=texts, questions={"facts": str(root / "facts.jsonl")}, device="cpu")
    measured = {name: evaluate_model(str(root / name), evaluation) for name in ("base", "adapted", "plain")}
    runs = [("sft", 0.0, "plain"), ("proximal", 10.0, "adapted")]
    results = {
        "schema": 1,
        "base": {"id": "base", "fingerprint": BaseModel.resolve(base).fingerprint},
        "before": measured["base"],
        "runs": [{"mode": mode, "ewc_lambda": strength, "metrics": measured[name]} for mode, strength, name in runs],
        "settings": {"old": "old", "new": "new"},
        "versions": {},
    }
    save_results(results, root / "results.json")
    return World(root)


@pytest.fixture
def world(made, tmp_path) -> World:
    """A copy to damage; its state still names the first one's base and Fisher, as after a move to another folder."""
    return World(Path(shutil.copytree(made.root, tmp_path / "copy")))


def texts_of(facts, part: str) -> str:
    return "\n".join(note.text for note in facts.notes if note.part == part)


def link(facts, what: str):
    (found,) = (each for each in facts.lineage if each.what == what)
    return found


def set_bits(results: dict, run: int | None, old: float | None = None, new: float | None = None) -> dict:
    results = copy.deepcopy(results)
    texts = (results["before"] if run is None else results["runs"][run]["metrics"])["texts"]
    for name, bits in (("old", old), ("new", new)):
        if bits is not None:
            texts[name]["bits_per_byte"] = bits
    return results


# -- results ----------------------------------------------------------------------------------------------------------------


def test_everything_is_there_for_what_training_and_evaluation_left(made):
    facts = load_facts(made.config)
    assert facts.notes == ()
    base, plain, own = rows(made.results())
    found = facts.results
    assert (found.old, found.new, [heading.key for heading in found.columns]) == ("Old", "New", KEYS)
    assert [len(row) for row in found.rows] == [len(KEYS)] * 3
    assert found.rows[found.own_row][:4] == ("proximal", "10", f"{own.old:.3f}", f"{own.forgetting:+.3f}".replace("-", "−"))
    assert "bits per byte" in found.columns[2].meaning
    assert (found.headline.base, found.headline.own, found.headline.plain) == (base, own, plain)
    assert [(point.label, point.own, point.strength) for point in found.points] == [
        ("base", False, None),
        ("λ = 0", False, 0),
        ("λ = 10", True, 10),
    ]
    assert (found.points[0].learning, found.points[0].forgetting) == (0, 0)
    assert (found.points[2].forgetting, found.points[2].new) == (own.forgetting, own.new)


@pytest.mark.parametrize(
    ("base", "plain", "own", "avoided", "kept"),
    [
        ((2, 5), (4, 3), (2.5, 3.5), 0.75, 0.75),
        ((2, 5), (4, 3), (1.5, 2.0), 1.25, 1.5),  # it even improved
        ((2, 5), (4, 3), (5, 6), -0.5, -0.5),
        ((2, 5), (2, 5), (2.5, 3.5), None, None),  # nothing forgotten, nothing learned: a share of it is none
        ((2, 5), (1.5, 3), (2.5, 4.0), None, 0.5),
        ((2, 5), (float("inf"), 3), (2.5, 4.0), None, 0.5),
    ],
)
def test_shares_are_of_what_plain_fine_tuning_forgot_and_learned(world, base, plain, own, avoided, kept):
    results = set_bits(set_bits(set_bits(world.results(), None, *base), 0, *plain), 1, *own)
    save_results(results, world.root / "results.json")
    headline = load_facts(world.config).results.headline
    assert (headline.forgetting_avoided, headline.learning_kept) == (pytest.approx(avoided), pytest.approx(kept))


def test_plain_fine_tuning_is_not_compared_with_itself(made):
    headline = load_facts(replace(made.config, adapted=str(made.root / "plain"))).results.headline
    assert headline.own == headline.plain
    assert (headline.own.ewc_lambda, headline.forgetting_avoided, headline.learning_kept) == (0, None, None)


def test_a_run_that_diverged_is_in_the_table_and_not_in_the_picture(world):
    save_results(set_bits(world.results(), 0, old=float("nan")), world.root / "results.json")
    found = load_facts(world.config).results
    assert found.rows[1][3] == "not finite"
    assert [point.label for point in found.points] == ["base", "λ = 10"]


def test_without_a_plain_run_there_is_nothing_to_compare_with(world):
    results = world.results()
    save_results({**results, "runs": results["runs"][1:]}, world.root / "results.json")
    found = load_facts(world.config).results
    assert (found.own_row, found.headline.plain, found.headline.forgetting_avoided) == (1, None, None)


def test_figures_of_other_weights_are_not_called_the_pages_own(world, tokenizer):
    other = save_moved(world.root / "base", world.root / "other", tokenizer, seed=9)
    shutil.copy(state_file(world.root / "adapted"), other)  # λ and mode alone would fit
    facts = load_facts(replace(world.config, adapted=str(other)))
    assert (facts.results.own_row, facts.results.headline.own) == (None, None)
    assert not any(point.own for point in facts.results.points)
    assert "other weights" in texts_of(facts, "headline")
    assert "Nothing was" not in texts_of(facts, "headline")


def test_a_merged_model_has_not_the_figures_of_the_one_it_was_made_from(world):
    results = world.results()
    for run in results["runs"]:
        del run["metrics"]["model"]["fingerprint"]  # as older versions wrote them
    save_results(results, world.root / "results.json")
    assert load_facts(world.config).results.own_row == 2
    merge_models(world.root / "base", world.root / "adapted", world.root / "fisher", 1.5, world.root / "merged")
    facts = load_facts(replace(world.config, adapted=str(world.root / "merged")))
    assert facts.results.own_row is None
    assert "merged after training" in texts_of(facts, "headline")
    assert link(facts, "adapted model").note == "λ = 10, proximal, 60 steps, then taken back with λ = 1.5"


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "{",
        "[]",
        '{"schema": 9}',
        '{"schema": 1}',
        "results",
        '{"schema": 1, "before": {}, "runs": 3, "settings": {}}',
    ],
)
def test_results_that_are_missing_or_damaged_leave_a_note_and_the_rest(world, content):
    path = world.root / "results.json"
    path.unlink()
    if content == "results":  # whole at first sight
        broken = {"schema": 1, "before": {"texts": {"old": 1, "new": 1}}, "runs": [], "settings": {"old": "old", "new": "new"}}
        path.write_text(json.dumps(broken))
    elif content is not None:
        path.write_text(content)
    facts = load_facts(world.config)
    assert facts.results is None
    assert [note.part for note in facts.notes] == ["results"]
    assert "results.json" in texts_of(facts, "results")
    assert str(world.root) not in texts_of(facts, "results")
    assert "something went wrong" not in texts_of(facts, "results")
    assert facts.layers
    assert len(facts.lineage) == 5


def test_results_that_nobody_named_are_not_missed(made):
    facts = load_facts(replace(made.config, results=None))
    assert (facts.results, facts.notes) == (None, ())


# -- layers -----------------------------------------------------------------------------------------------------------------


def test_layers_are_the_shares_of_the_fishers_own_values(made):
    fisher = FisherInformation.from_pretrained(made.root / "fisher")
    layers = load_facts(made.config).layers
    assert sum(each.trace for each in layers) == pytest.approx(1)
    assert sum(each.parameters for each in layers) == pytest.approx(1)
    assert list(dict.fromkeys(each.where for each in layers)) == ["embedding", "0", "1", "final norm"]
    assert {each.group for each in layers if each.layer == 1} == {"attention", "mlp", "norm"}
    (mlp,) = (each for each in layers if (each.layer, each.group) == (1, "mlp"))
    names = [name for name in fisher.names if "layers.1.mlp" in name]
    trace = sum(fisher.per_token(name).double().sum().item() for name in names)
    size = sum(fisher.read(name).numel() for name in names)
    assert mlp.trace == pytest.approx(trace / fisher.trace, rel=1e-6)
    assert mlp.parameters == pytest.approx(size / fisher.manifest.totals.num_parameters)


def damaged_summary(path: Path, how: str) -> None:
    table = pq.read_table(path)
    match how:
        case "gone":
            path.unlink()
        case "torn":
            path.write_bytes(path.read_bytes()[:-20])
        case "text":
            path.write_text("no table")
        case "columns":
            pq.write_table(table.drop_columns(["group"]), path)
        case "sizes":
            pq.write_table(table.drop_columns(["numel"]), path)
        case "words":
            at = table.column_names.index("trace")
            pq.write_table(table.set_column(at, "trace", pa.array(["x"] * len(table))), path)
        case "nan":
            at = table.column_names.index("trace")
            pq.write_table(table.set_column(at, "trace", pa.array([float("nan")] * len(table))), path)


@pytest.mark.parametrize("how", ["gone", "torn", "text", "columns", "sizes", "words", "nan"])
def test_a_fisher_whose_summary_is_missing_or_damaged_leaves_a_note_and_the_rest(world, how):
    damaged_summary(world.root / "fisher" / "summary" / "params.parquet", how)
    facts = load_facts(replace(world.config, fisher=str(world.root / "fisher")))
    assert facts.layers == ()
    assert [note.part for note in facts.notes] == ["layers"]
    assert "the Fisher 'fisher'" in texts_of(facts, "layers")
    assert "summary/params.parquet" in texts_of(facts, "layers")
    assert facts.results.own_row == 2
    assert link(facts, "Fisher").verified is True


# -- lineage ----------------------------------------------------------------------------------------------------------------


def test_lineage_names_folders_without_where_they_lie_and_compares_hashes(made):
    facts = load_facts(made.config)
    fisher = FisherInformation.from_pretrained(made.root / "fisher")
    shown = [(each.what, each.name, each.verified) for each in facts.lineage]
    assert shown == [
        ("adapted model", "adapted", None),
        ("base model", "base", True),
        ("Fisher", "fisher", True),
        ("probe", None, None),
        ("training data", "new.jsonl · train", None),
    ]
    assert link(facts, "Fisher").sha256 == fisher.sha256
    assert link(facts, "base model").sha256 == BaseModel.resolve(made.root / "base").fingerprint
    assert link(facts, "adapted model").note == "λ = 10, proximal, 60 steps"
    assert link(facts, "probe").note == "text: 10 examples, 50 scored tokens"
    assert not any(each.commit or each.url for each in facts.lineage)
    assert str(made.root) not in str(facts)


def test_other_weights_than_recorded_are_told_with_both_hashes(world, tokenizer):
    save_moved(world.root / "base", world.root / "other", tokenizer, seed=8)
    make_fisher(world.root / "base", seed=5).save_pretrained(world.root / "fisher", overwrite=True)
    recorded = json.loads(state_file(world.root / "adapted").read_text())["anchor"]["fingerprint"]
    facts = load_facts(replace(world.config, base=str(world.root / "other"), fisher=str(world.root / "fisher")))
    base = link(facts, "base model")
    assert (base.verified, base.name, recorded in base.note, base.sha256 == recorded) == (False, "other", True, False)
    assert (link(facts, "Fisher").verified, recorded in link(facts, "Fisher").note) == (False, True)
    facts = load_facts(replace(world.config, fisher=str(world.root / "fisher")))
    assert (link(facts, "base model").verified, link(facts, "Fisher").verified) == (True, False)
    assert "not the Fisher that the adapted model was trained with" in link(facts, "Fisher").note


def test_names_on_the_hub_have_links_and_commits(world):
    data = {"dataset": "uonlp/CulturaX", "config": "lt", "split": "train", "revision": "99" * 20}
    fisher = {"source": "me/fisher", "repo_id": "me/fisher", "revision": "77" * 20, "sha256": "ab" * 32}
    world.state(data=data, fisher=fisher)
    facts = load_facts(world.config)  # offline, and nothing of it in the cache
    named = link(facts, "training data")
    assert (named.name, named.commit) == ("uonlp/CulturaX · lt · train", "99" * 20)
    assert named.url.endswith(f"/datasets/uonlp/CulturaX/tree/{'99' * 20}")
    named = link(facts, "Fisher")
    assert (named.name, named.commit, named.sha256) == ("me/fisher", "77" * 20, "ab" * 32)
    assert named.url.endswith(f"/datasets/me/fisher/tree/{'77' * 20}")
    assert "me/fisher" in texts_of(facts, "layers")
    assert facts.layers == ()
    world.state(data={**data, "revision": "main"})
    assert link(load_facts(world.config), "training data").commit is None


@pytest.mark.parametrize("changes", [{"anchor": None}, {"fisher": None}, {"data": None}, {"global_step": None}], ids=str)
def test_what_a_state_does_not_say_is_not_made_up(made, world, changes):
    world.state(**changes)
    facts = load_facts(world.config)
    assert {each.what for each in facts.lineage} >= {"adapted model", "base model"}
    assert (link(facts, "base model").verified is None) is ("anchor" in changes)
    assert ("Fisher" in {each.what for each in facts.lineage}) is ("fisher" not in changes)
    assert ("training data" in {each.what for each in facts.lineage}) is ("data" not in changes)
    assert [note.part for note in facts.notes] == (["layers"] if "fisher" in changes else [])
    assert facts.results.own_row == 2  # told by the hash


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"schema": 7}', '{"schema": 1, "anchor": "x"}', '{"schema": 1, "fisher": [1]}', "\udcff"], ids=ascii
)
def test_a_damaged_state_leaves_notes_and_the_models(world, content):
    state_file(world.root / "adapted").write_bytes(content.encode(errors="surrogateescape"))
    facts = load_facts(world.config)
    assert [each.what for each in facts.lineage] == ["adapted model", "base model"]
    assert "ewc_state.json" in texts_of(facts, "lineage")
    assert str(world.root) not in str(facts.notes)
    assert (facts.results.own_row, facts.layers) == (2, ())


def test_a_model_that_this_library_did_not_train_says_so(world):
    state_file(world.root / "adapted").unlink()
    facts = load_facts(replace(world.config, fisher=str(world.root / "fisher")))
    assert [note.code for note in facts.notes] == ["no_state"]
    assert "'adapted' holds no ewc_state.json" in facts.notes[0].text
    assert link(facts, "Fisher").verified is None
    assert facts.layers
    assert facts.results.own_row == 2


def test_models_that_are_not_there_leave_notes_only(tmp_path):
    facts = load_facts(CompareConfig(str(tmp_path / "a b"), "me/model", results=str(tmp_path / "none.json")))
    assert (facts.results, facts.layers, facts.lineage) == (None, (), ())
    assert {note.part for note in facts.notes} == {"results", "layers", "lineage"}
    assert str(tmp_path) not in str(facts)
    assert load_facts(CompareConfig()).lineage == ()


# -- the Fisher itself ------------------------------------------------------------------------------------------------------


def test_the_fisher_is_the_one_that_training_recorded_and_makes_models(made):
    fisher, note = fisher_of(made.config)
    assert note == ""
    assert fisher.sha256 == FisherInformation.from_pretrained(made.root / "fisher").sha256
    pair = ModelPair.load(made.root / "base", made.root / "adapted", device="cpu")
    assert Between(pair, fisher).at(1).label == "λ = 1"


def test_the_fisher_in_the_settings_comes_first(world):
    other = make_fisher(world.root / "base", seed=5).save_pretrained(world.root / "other")
    fisher, _ = fisher_of(replace(world.config, fisher=str(other)))
    assert fisher.sha256 == FisherInformation.from_pretrained(other).sha256


def test_why_there_is_no_fisher_is_told_in_words(world, tokenizer):
    def why(**changes) -> str:
        fisher, note = fisher_of(replace(world.config, **changes))
        assert fisher is None
        assert str(world.root) not in note
        assert "Nothing was" not in note
        return note

    assert "no Fisher is named" in why(adapted=str(world.root / "plain"))
    assert "there is no folder 'nowhere'" in why(fisher=str(world.root / "nowhere"))
    assert "was not measured on this model" in why(base=str(save_moved(world.root / "base", world.root / "o", tokenizer, 8)))
    (world.root / "fisher" / "fisher_config.json").write_text("{")
    assert "'fisher'" in why(fisher=str(world.root / "fisher"))
    world.state(fisher={"source": "f/1 + f/2", "fold": [{"source": "f/1", "sha256": "a"}, {"source": "f/2", "sha256": "b"}]})
    assert "trained with 2 Fishers" in why()
    world.state(fisher={"source": str(world.root / "gone"), "sha256": "ab" * 32})
    assert "'gone'" in why()
    world.state(fisher={"source": str(world.root / "fisher")[:-1], "sha256": "ab" * 32})
    assert why()
    state_file(world.root / "adapted").write_text("{")
    assert "ewc_state.json' is damaged" in why()

"""The model card says what was recorded and measured, and nothing else."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_ewc import BaseModel
from hf_ewc.errors import ConfigError
from hf_ewc.hub import Licence
from hf_ewc.publish import card_lineage, pick_run, render_checkpoint_card
from hf_ewc.publish.checkpoint import _public, checkpoint_files

BASE, FISHER = "4f" * 20, "77" * 20

STATE = {
    "schema": 1,
    "global_step": 1200,
    "ewc_lambda": 10.0,
    "ewc_mode": "proximal",
    "fisher": {"source": "me/fisher", "repo_id": "me/fisher", "revision": FISHER, "sha256": "ab" * 32},
    "anchor": {"id": "google/gemma-2-2b", "revision": BASE, "fingerprint": "cd" * 32},
    "protected_tensors": 46,
    "unprotected": [],
    "data": {"dataset": "uonlp/CulturaX", "config": "lt", "split": "train", "revision": "99" * 20},
    "training": {
        "learning_rate": 0.0002,
        "max_steps": 1200,
        "num_train_epochs": 3.0,
        "bf16": True,
        "hub_token": "hf_" + "x" * 30,
    },
}


def metrics(english: float, lithuanian: float, facts: float, name: str) -> dict:
    def text(bits: float) -> dict:
        return {"bits_per_byte": bits, "documents": 17, "bytes": 20388}

    questions = {"facts": {"accuracy": facts, "stderr": 0.03, "chance": 0.25, "n": 219}}
    model = {"name": name, "window": 128, "dtype": "float32"}
    return {"texts": {"english": text(english), "lithuanian": text(lithuanian)}, "questions": questions, "model": model}


def results(*runs: tuple[str, float, float]) -> dict:
    return {
        "schema": 1,
        "base": {"id": "gemma-2-2b"},
        "before": metrics(2.0, 5.0, 0.8, "base"),
        "runs": [
            {"mode": mode, "ewc_lambda": strength, "metrics": metrics(english, 3.25, 0.75, mode)}
            for mode, strength, english in runs
        ],
        "settings": {"old": "english", "new": "lithuanian"},
    }


SWEEP = results(("sft", 0.0, 3.9), ("proximal", 10.0, 2.125), ("loss", 10.0, 2.5))


def test_the_front_matter_draws_the_edges_that_the_hub_knows():
    data = ModelCard(render_checkpoint_card(STATE, repo_id="me/lt", language=["en", "lt"])).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("google/gemma-2-2b", "finetune")
    assert data["datasets"] == ["uonlp/CulturaX", "me/fisher"]
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert {"ewc", "continual-learning", "trl"} <= set(data["tags"])
    assert data["language"] == ["en", "lt"]
    assert "license" not in data
    assert "model-index" not in data, "nothing was measured"


def test_the_lineage_of_the_card_has_ids_commits_and_hashes_for_people_and_programs():
    text = render_checkpoint_card(STATE, repo_id="me/lt")
    for part in (
        f"https://huggingface.co/google/gemma-2-2b/tree/{BASE}",
        f"https://huggingface.co/datasets/me/fisher/tree/{FISHER}",
        "ab" * 32,
        "cd" * 32,
        f"https://huggingface.co/datasets/uonlp/CulturaX/tree/{'99' * 20}",
        "| λ | 10 |",
        "| optimizer steps | 1,200 |",
    ):
        assert part in text
    fisher, base, data = card_lineage(text)
    assert fisher == {"what": "Fisher", "id": "me/fisher", "revision": FISHER, "sha256": "ab" * 32}
    assert (base["id"], base["revision"], base["sha256"]) == ("google/gemma-2-2b", BASE, "cd" * 32)
    assert (data["id"], data["config"], data["split"]) == ("uonlp/CulturaX", "lt", "train")


def test_the_licence_is_inherited_and_a_gate_is_pointed_out():
    text = render_checkpoint_card(STATE, repo_id="me/lt", licence=Licence("other", "terms", "https://x.org/t", "manual"))
    data = ModelCard(text).data
    assert (data.license, data.license_name, data.license_link) == ("other", "terms", "https://x.org/t")
    assert "([terms](https://x.org/t)), inherited from the base model [google/gemma-2-2b]" in text
    assert "is gated" in text


def test_figures_are_those_of_this_checkpoint_against_the_base():
    text = render_checkpoint_card(STATE, repo_id="me/lt", results=SWEEP)
    table = [line for line in text.splitlines() if line.startswith(("| base | –", "| proximal", "| loss", "| sft"))]
    assert [line.split(" | ")[:4] for line in table] == [
        ["| base", "–", "2.000", "–"],
        ["| proximal", "10", "2.125", "+0.125"],
    ]
    assert "219 questions" in text
    assert "window 128" in text
    index = ModelCard(text).data.to_dict()["model-index"][0]["results"]
    found = {metric["type"]: metric["value"] for result in index for metric in result["metrics"]}
    assert found == {"bits_per_byte": 3.25, "forgetting": 0.125, "learning": 1.75, "accuracy": 0.75}


def test_a_run_of_hf_ewc_evaluate_is_found_by_the_folders_name():
    evaluated = results(("train", 10.0, 2.125), ("other", 10.0, 2.5))
    assert pick_run(evaluated, STATE, "runs/tiny/train")["mode"] == "train"
    assert pick_run(results(("anything", 10.0, 2.1)), STATE)["mode"] == "anything", "only one run has this λ"
    assert "| proximal | 10 |" in render_checkpoint_card(STATE, repo_id="me/lt", results=evaluated, name="train")


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        (results(("a", 10.0, 2.1), ("b", 10.0, 2.1)), "2 runs that could be this checkpoint"),
        (results(("proximal", 1.0, 2.1)), "no runs that could be this checkpoint"),
        ({**SWEEP, "base": {"fingerprint": "ee" * 32}}, f"{'ee' * 32}, this checkpoint's base has {'cd' * 32}"),
    ],
)
def test_a_run_that_cannot_be_told_is_an_error_and_no_guess(measured, said):
    with pytest.raises(ConfigError, match=said):
        render_checkpoint_card(STATE, repo_id="me/lt", results=measured)


def of(digest: str | None, run: dict) -> dict:
    """A run with the fingerprint of the weights that were measured."""
    model = {**run["metrics"]["model"], **({"fingerprint": digest} if digest else {})}
    return {**run, "metrics": {**run["metrics"], "model": model}}


def test_a_run_is_the_checkpoints_by_the_hash_of_its_weights_whatever_it_is_called():
    sft, proximal, loss = SWEEP["runs"]
    tied = {**SWEEP, "runs": [of("11" * 32, sft), of("22" * 32, proximal), of("33" * 32, loss)]}
    assert pick_run(tied, STATE, fingerprint="33" * 32)["mode"] == "loss"
    text = render_checkpoint_card(STATE, repo_id="me/lt", results=tied, fingerprint="11" * 32)
    assert "| proximal | 10 | 3.900 |" in text, "by Hub id `hf-ewc evaluate` knows no λ: the state does"
    assert f"of weights with sha256 `{'11' * 32}`" in text
    with pytest.raises(
        ConfigError, match=f"this checkpoint: sha256 {'44' * 32}[\\s\\S]*proximal, λ = 10: sha256 {'22' * 32}"
    ) as error:
        pick_run(tied, STATE, fingerprint="44" * 32)
    assert "`hf-ewc evaluate --model … --base … --output results.json`" in str(error.value)
    begun_before = {**SWEEP, "runs": [of("11" * 32, sft), proximal, of("33" * 32, loss)]}
    assert pick_run(begun_before, STATE, fingerprint="44" * 32)["mode"] == "proximal"


def test_figures_that_cannot_be_tied_to_the_weights_say_so():
    text = render_checkpoint_card(STATE, repo_id="me/lt", results=SWEEP, fingerprint="44" * 32)
    assert "These figures were not tied to these weights by their hash." in text


def test_a_push_takes_only_figures_of_the_very_weights(base_folder, tmp_path):
    folder = Path(shutil.copytree(base_folder, tmp_path / "proximal"))
    (folder / "ewc_state.json").write_text(json.dumps({**STATE, "anchor": None, "training": {}}))
    own, run, results = BaseModel.resolve(folder).fingerprint, SWEEP["runs"][1], tmp_path / "results.json"
    results.write_text(json.dumps({**SWEEP, "runs": [of("22" * 32, run)]}))
    with pytest.raises(ConfigError, match=f"{own}[\\s\\S]*{'22' * 32}"):
        checkpoint_files(folder, "me/lt", results=results)
    results.write_text(json.dumps({**SWEEP, "runs": [of(own, run)]}))
    assert f"`{own}`" in bytes(checkpoint_files(folder, "me/lt", results=results)["README.md"]).decode()


def test_what_was_not_measured_is_told_in_one_sentence():
    text = render_checkpoint_card(STATE, repo_id="me/lt")
    assert "not measured" not in text
    section = text.split("## What it kept, what it learned\n\n")[1].split("\n\n## Use")[0]
    assert section == (
        "Not measured yet. `hf-ewc evaluate --model … --base … --output results.json`, then push again with it (`--results`)."
    )


def test_the_card_says_what_made_it_without_a_link():
    assert "\nMade with hf_ewc 0.7.\n" in render_checkpoint_card({**STATE, "hf_ewc": "0.7"}, repo_id="me/lt")
    assert "Made with" not in render_checkpoint_card(STATE, repo_id="me/lt")


@pytest.mark.parametrize(
    ("language", "inputs"),
    [
        (None, 'tokenizer("Once upon a time", return_tensors="pt")\n'),
        (["lt", "en-GB"], 'tokenizer("Once upon a time", return_tensors="pt")\n'),
        ("lt", 'tokenizer("", return_tensors="pt")  # your text\n'),
        (["lt", "lv"], 'tokenizer("", return_tensors="pt")  # your text\n'),
    ],
)
def test_the_example_is_english_only_for_models_that_read_it(language, inputs):
    text = render_checkpoint_card(STATE, repo_id="me/lt", language=language)
    assert inputs in text
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_the_licence_of_a_base_that_states_none_or_has_no_page():
    silent = render_checkpoint_card(STATE, repo_id="me/lt", licence=Licence())
    assert "The base model's page states no licence; its terms apply here, too." in silent
    local = {**STATE, "anchor": {"id": "runs/base", "revision": None, "fingerprint": "cd" * 32}}
    section = render_checkpoint_card(local, repo_id="me/lt").split("## Licence\n\n")[1].split("\n\n")[0]
    assert section == "Derived from the base model, whose terms apply here, too."
    stated = render_checkpoint_card(local, repo_id="me/lt", licence=Licence("mit"))
    assert "`mit`, inherited from the base model." in stated


def test_plain_fine_tuning_is_called_so():
    state = {"global_step": 5, "ewc_lambda": 0.0, "fisher": None, "anchor": None}
    text = render_checkpoint_card(state, repo_id="me/sft", results=SWEEP)
    assert "plain fine-tuning" in text
    assert "| Fisher | none |" in text
    assert "| sft | 0 | 3.900 |" in text


def test_every_folded_fisher_is_named_with_its_coefficient():
    parts = [{**STATE["fisher"], "repo_id": f"me/f{n}", "coefficient": c} for n, c in enumerate((0.5, 1.0))]
    text = render_checkpoint_card({**STATE, "fisher": {"source": "a + b", "sha256": "12" * 32, "fold": parts}}, repo_id="me/lt")
    assert "coefficient 0.5 |" in text
    assert ModelCard(text).data.datasets == ["uonlp/CulturaX", "me/f0", "me/f1"]


def test_no_path_of_this_machine_and_no_token_gets_onto_a_card():
    state = copy.deepcopy(STATE)
    state["fisher"] = {"source": "/home/ann/runs/secret/fisher-mmlu", "sha256": "ab" * 32}
    state["anchor"] = {"id": "C:\\Users\\ann\\base", "revision": None, "fingerprint": "cd" * 32}
    state["data"] = {"dataset": "../private/lt.jsonl"}
    state["training"]["optim"] = "hf_" + "y" * 30
    text = render_checkpoint_card(state, repo_id=None, name="lt")
    for part in ("/home", "ann", "secret", "private", "hf_xxx", "hf_yyy", "hub_token"):
        assert part not in text
    for part in ("`fisher-mmlu` (local)", "`base` (local)", "`lt.jsonl` (local)", 'from_pretrained("path/to/this/folder")'):
        assert part in text
    data = ModelCard(text).data.to_dict()
    assert "base_model" not in data
    assert "datasets" not in data


def test_what_was_not_recorded_says_so():
    text = render_checkpoint_card({"schema": 1}, repo_id="me/lt")
    for part in (
        "| base model | not recorded",
        "| Fisher | not recorded |",
        "| λ | not recorded |",
        "settings were not recorded",
    ):
        assert part in text
    assert "--model MODEL --dataset DATASET" in text
    assert "None" not in text
    assert "All weights of a base model that was not recorded, trained further on data that was not recorded" in text
    assert "(`push_to_hub(dataset_name=…)` names it).\n" in text


def test_a_planned_card_marks_every_figure():
    state = {**STATE, "fisher": {"repo_id": "me/fisher"}, "global_step": None, "protected_tensors": None}
    text = render_checkpoint_card(state, repo_id="me/lt", planned=True)
    assert "| base | – | **Not yet run** | – | **Not yet run** | – |" in text
    assert "| optimizer steps | **Not yet run** |" in text
    assert "sha256 **Not yet run** |" in text
    assert "not recorded" not in text
    with pytest.raises(ConfigError, match="planned"):
        render_checkpoint_card(state, repo_id="me/lt", planned=True, results=SWEEP)


def test_the_command_on_the_card_is_one_that_hf_ewc_train_reads():
    from hf_ewc.cli.train import TrainScript, parse_training

    text = render_checkpoint_card(STATE, repo_id="me/lt")
    command = text.split("```bash\n")[1].split("```")[0].replace("\\\n", " ").split()
    assert command[:2] == ["hf-ewc", "train"]
    script, args = parse_training("train", [*command[2:], "--use_cpu"], TrainScript)
    assert (script.model, script.revision, script.dataset_config) == ("google/gemma-2-2b", BASE, "lt")
    assert (args.fisher, args.fisher_revision, args.ewc_lambda, args.max_steps) == ("me/fisher", FISHER, 10.0, 1200)
    assert args.learning_rate == 0.0002


def test_the_front_matter_is_plain_yaml():
    head = render_checkpoint_card(STATE, repo_id="me/lt", results=SWEEP).split("---\n")[1]
    assert yaml.safe_load(head)["lineage"][0]["what"] == "Fisher"


@pytest.mark.parametrize(
    ("merge", "said"),
    [
        ({"merge_lambda": 10.0}, "by its importance (post-hoc EWC, λ = 10)"),
        ({"merge_lambda": "inf"}, "by its importance (post-hoc EWC, λ = inf)"),
        ({"interpolate": 0.25}, "all weights alike went 25% of the way back to the base"),
    ],
)
def test_a_merged_model_says_so_and_keeps_the_folders_of_this_machine_to_itself(merge, said):
    where = {"id": "/home/me/base", "revision": None, "fingerprint": "ab" * 32}
    fisher = {"source": "/home/me/fisher", "sha256": "cd" * 32}
    state = _public({**STATE, "merge": {**merge, "base": where, "adapted": {**where, "id": "/home/me/lt"}, "fisher": fisher}})
    assert "/home" not in json.dumps(state)
    assert said in render_checkpoint_card(state, repo_id="me/lt")

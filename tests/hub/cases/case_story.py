"""The whole story, by the commands of the README: one user measures and publishes, another pulls, trains and publishes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from transformers import AutoModelForCausalLM

from hf_ewc.cli.main import main

LEGS = ("xet",)  # as in production; the parts have cases of their own in both

TRAINING = [
    "--ewc_lambda",
    "5",
    "--max_steps",
    "3",
    "--learning_rate",
    "1e-2",
    "--per_device_train_batch_size",
    "4",
    "--max_length",
    "32",
    "--optim",
    "adamw_torch",
    "--use_cpu",
    "--bf16",
    "false",
    "--activation_checkpointing",
    "false",
    "--save_strategy",
    "no",
    "--report_to",
    "none",
]


@pytest.fixture
def data(tmp_path) -> Path:
    """Questions, and texts of an old and of a new language."""
    tiny.write_jsonl(tmp_path / "questions.jsonl", tiny.QUESTIONS)
    for name, texts in (("old", tiny.TEXTS), ("new", [text[::-1] for text in tiny.TEXTS])):
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in texts])
    return tmp_path


def as_bob(home: Path, *commands: list[object]) -> str:
    """Run `hf-ewc` as another user, with a cache of their own; all commands in one process, as its start takes longest."""
    words = [[str(word) for word in command] for command in commands]
    code = f"import sys; from hf_ewc.cli.main import main\nfor words in {words!r}:\n    assert main(words) == 0, words"
    env = {**os.environ, "HF_TOKEN": "hf_other", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_from_the_estimate_to_the_collection(hub, base_folder, data, capsys):
    api, alice, bob = HfApi(), "alice/story", "bob/story"
    api.create_repo(f"{alice}-base")
    base_commit = api.upload_folder(repo_id=f"{alice}-base", folder_path=base_folder).oid

    # Alice estimates a Fisher of her base, and publishes it
    fisher = data / "fisher"
    what = ["--model", f"{alice}-base", "--dataset", str(data / "questions.jsonl"), "--output_dir", str(fisher)]
    assert main(["fisher", *what]) == 0
    assert (
        main(["push", "fisher", "--fisher", str(fisher), "--repo_id", f"{alice}-fisher", "--tag", "v1", "--private", "no"]) == 0
    )
    commit = api.repo_info(f"{alice}-fisher", repo_type="dataset").sha
    api.create_branch(f"{alice}-fisher", branch="later", repo_type="dataset")  # what comes later is not what was pinned

    # Bob, on another machine, pulls it pinned, trains against it, measures, and publishes
    out, results = data / "adapted", data / "results.json"
    pinned = ["--fisher", f"{alice}-fisher", "--fisher_revision", "v1"]
    texts = ["--texts", f"old={data / 'old.jsonl'}", f"new={data / 'new.jsonl'}"]
    questions = ["--questions", f"facts={data / 'questions.jsonl'}"]
    said = as_bob(
        data / "bob",
        ["pull", "fisher", "--repo_id", f"{alice}-fisher@v1"],
        ["train", "--model", f"{alice}-base", *pinned, "--dataset", data / "new.jsonl", "--output_dir", out, *TRAINING],
        ["evaluate", "--model", out, "--base", f"{alice}-base", *texts, *questions, "--window", 32, "--output", results],
        ["push", "checkpoint", "--checkpoint", out, "--results", results, "--repo_id", bob, "--private", "no", "--tag", "v1"],
        ["card", "--lineage", bob],
        [
            "push",
            "release",
            "--fisher",
            f"{alice}-fisher@v1",
            "--checkpoint",
            out,
            "--results",
            results,
            "--checkpoint_repo",
            bob,
            "--collection",
            "The story",
            "--private",
            "no",
        ],
    )
    assert commit in said

    # Anybody finds the way from the model to the base, by the cards alone and by the command
    state = json.loads(Path(hf_hub_download(bob, "ewc_state.json")).read_text())
    assert (state["fisher"]["repo_id"], state["fisher"]["revision"]) == (f"{alice}-fisher", commit)
    assert (state["anchor"]["id"], state["anchor"]["revision"]) == (f"{alice}-base", base_commit)
    card = Path(hf_hub_download(bob, "README.md")).read_text(encoding="utf-8")
    figures = json.loads(results.read_text())
    shown = [figures["before"], figures["runs"][0]["metrics"]]
    for part in (f"{alice}-fisher", commit, f"{alice}-base", base_commit, "new.jsonl"):
        assert part in card
    for metrics in shown:
        assert f"{metrics['texts']['old']['bits_per_byte']:.3f}" in card
    assert str(data) not in card
    capsys.readouterr()
    assert main(["card", "--lineage", bob]) == 0
    lineage = capsys.readouterr().out
    for part in (bob, f"{alice}-fisher", f"{alice}-base", "questions.jsonl"):
        assert part in lineage

    # The collection holds all three, and the model works with plain transformers
    (collection,) = api.list_collections(owner="bob")
    items = {(item.item_type, item.item_id) for item in api.get_collection(collection.slug).items}
    assert items == {("dataset", f"{alice}-fisher"), ("model", bob), ("model", f"{alice}-base")}
    assert AutoModelForCausalLM.from_pretrained(bob).num_parameters() > 0
    assert "README.md" in os.listdir(snapshot_download(f"{alice}-fisher", repo_type="dataset"))

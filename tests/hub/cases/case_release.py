"""A release: everything is checked first, private until all of it is there, and goes on where it was broken off."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import training
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from server import Fault
from transformers import AutoModelForCausalLM

from hf_ewc import EvaluationConfig, FisherInformation, evaluate_model
from hf_ewc.cli.main import main
from hf_ewc.errors import ConfigError, EWCError, FisherMismatchError, HubError
from hf_ewc.evaluation import save_results
from hf_ewc.publish import ReleaseConfig, plan_release, push_checkpoint, push_release

LEGS = ("lfs",)  # what goes over the wire is `push_files`, as in case_fisher

BOB = "hf_other"
WRITES = "^(POST|PUT|PATCH|DELETE) "
LOOKALIKE = "hf_" + "aBcD1234" * 4


def train(base: Path | str, fisher: str, folder: Path) -> Path:
    """What `hf-ewc train` leaves behind: model, tokenizer, `ewc_state.json`, a checkpoint with optimizer state, a pickle."""
    settings = dict(fisher=fisher, ewc_lambda=10.0, max_steps=2, save_strategy="steps", save_steps=2)
    trainer = training.ewc_trainer(base, folder, **settings)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture(scope="module")
def checkpoint(base_folder, fisher_folder, tmp_path_factory) -> Path:
    folder = train(base_folder, fisher_folder, tmp_path_factory.mktemp("train") / "adapted")
    left = {path.name for path in folder.iterdir()}
    assert {"training_args.bin", "checkpoint-2"} <= left  # so that leaving them out means something
    assert (folder / "checkpoint-2" / "optimizer.pt").is_file()
    return folder


@pytest.fixture(scope="module")
def results(base_folder, checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    rows = {"en": tiny.TEXTS[0], "lt": tiny.TEXTS[2]}
    texts = {name: str(tiny.write_jsonl(folder / f"{name}.jsonl", [{"text": text}])) for name, text in rows.items()}
    before, after = (
        evaluate_model(str(model), EvaluationConfig(texts=texts, window=32)) for model in (base_folder, checkpoint)
    )
    runs = [{"mode": checkpoint.name, "ewc_lambda": 10.0, "metrics": after, "log": {}, "seconds": None}]
    content = {"schema": 1, "base": before["model"], "before": before, "runs": runs}
    return save_results({**content, "settings": {"old": "en", "new": "lt"}, "versions": {}}, folder / "results.json")


@pytest.fixture
def settings(name, fisher_folder, checkpoint, results) -> dict:
    """Settings of a release under names of its own."""
    folders = dict(fisher=fisher_folder, checkpoint=str(checkpoint), results=str(results))
    return dict(**folders, fisher_repo=f"{name}-fisher", checkpoint_repo=name, collection=name.partition("/")[2])


def seen_by_bob(settings: dict) -> set[str]:
    """Which parts of a release somebody else finds."""
    found, bob = set(), HfApi(token=BOB)
    for key, kind in (("fisher_repo", "dataset"), ("checkpoint_repo", "model")):
        try:
            bob.repo_info(settings[key], repo_type=kind)
            found.add(key)
        except RepositoryNotFoundError:
            pass
    return found | {"collection" for one in bob.list_collections(owner="alice") if one.title == settings["collection"]}


def commits(settings: dict) -> list[int]:
    """How often each repository was committed to; the first is the Hub's own."""
    kinds = {"fisher_repo": "dataset", "checkpoint_repo": "model"}
    return [len(HfApi().list_repo_commits(settings[key], repo_type=kind)) - 1 for key, kind in kinds.items()]


def collections(settings: dict) -> list:
    found = [one for one in HfApi().list_collections(owner="alice") if one.title == settings["collection"]]
    return [HfApi().get_collection(one.slug) for one in found]


def requests(hub, *patterns: str) -> list[int]:
    """Where in the log each pattern occurs first."""
    lines = [f"{method} {path}" for method, path, _ in hub.log]
    return [next(i for i, line in enumerate(lines) if pattern in line) for pattern in patterns]


def test_a_release_is_complete_private_and_traceable(hub, settings, checkpoint, fisher_folder):
    state = (checkpoint / "ewc_state.json").read_bytes()
    done = push_release(ReleaseConfig(**settings, tag="v1", language=["en", "lt"]))
    fisher, model = settings["fisher_repo"], settings["checkpoint_repo"]
    order = [f"POST /api/datasets/{fisher}/commit/main", f"POST /api/models/{model}/commit/main", "POST /api/collections"]
    assert requests(hub, *order) == sorted(requests(hub, *order))
    assert hub.count(f"{WRITES}.*settings|^PATCH ") == 0
    assert seen_by_bob(settings) == set()
    assert commits(settings) == [1, 1]

    files = set(HfApi().list_repo_files(model, revision="v1"))
    assert files >= {"model.safetensors", "config.json", "tokenizer.json", "ewc_state.json", "results.json", "README.md"}
    assert not [path for path in files if "checkpoint-" in path or path.endswith((".bin", ".pt", ".pth"))]
    published = json.loads(Path(HfApi().hf_hub_download(model, "ewc_state.json")).read_text())
    assert published["fisher"] == {
        "source": fisher,
        "sha256": FisherInformation.from_pretrained(fisher_folder).sha256,
        "repo_id": fisher,
        "revision": done.fisher.commit,
    }
    assert str(checkpoint.parent.parent) not in json.dumps(published)
    assert (checkpoint / "ewc_state.json").read_bytes() == state
    card = Path(HfApi().hf_hub_download(model, "README.md")).read_text()
    assert f"{fisher}" in card
    assert done.fisher.commit in card
    assert FisherInformation.from_pretrained(fisher, "v1").sha256 == published["fisher"]["sha256"]
    local, loaded = (AutoModelForCausalLM.from_pretrained(each).state_dict() for each in (checkpoint, model))
    assert all(torch.equal(local[name], loaded[name]) for name in local)

    (collection,) = collections(settings)
    assert collection.private
    assert [(item.item_type, item.item_id, bool(item.note)) for item in collection.items] == [
        ("dataset", fisher, True),
        ("model", model, True),
    ]
    for part in (fisher, model, done.fisher.commit, done.checkpoint.commit, collection.url, f"{done.checkpoint.plan.bytes:,}"):
        assert part in done.text()


def test_a_second_release_sends_nothing(hub, settings):
    first = push_release(ReleaseConfig(**settings, tag="v1"))
    hub.reset()
    again = push_release(ReleaseConfig(**settings, tag="v1"))
    assert hub.count(WRITES) == 0
    assert "Nothing to send" in again.text()
    assert "Nothing to send" not in first.text()
    assert (again.fisher.commit, again.checkpoint.commit) == (first.fisher.commit, first.checkpoint.commit)
    assert (again.fisher.plan.bytes, again.checkpoint.plan.bytes) == (0, 0)


def test_a_dry_run_writes_nothing_and_knows_every_byte(hub, settings):
    plan = plan_release(ReleaseConfig(**settings, private=False))
    assert hub.count(WRITES) == 0
    done = push_release(ReleaseConfig(**settings, private=False))
    for planned, pushed in ((plan.fisher, done.fisher.plan), (plan.checkpoint, done.checkpoint.plan)):
        assert planned.files == pushed.files
        assert all(f"{size:,}" in plan.text() and path in plan.text() for path, size in pushed.files.items())
    (public,) = [line for line in plan.text().splitlines() if line.startswith("At the end, public: ")]
    assert all(f" {settings[key]}" in public for key in ("fisher_repo", "checkpoint_repo", "collection"))


# stage → the request that fails, how (500 is tried again five times, which takes a while; 403 is final), what is visible then
STAGES = {
    "Fisher repository": ("POST /api/repos/create", 403, 0),
    "Fisher commit": ("POST /api/datasets/.*/commit/", 403, 0),
    "tag": ("POST /api/datasets/.*/tag/", 403, 0),
    "model commit": ("POST /api/models/.*/commit/", 500, 0),
    "collection": ("POST /api/collections$", 500, 0),
    "item": ("POST /api/collections/.*/items", 500, 0),
    "Fisher visible": ("PUT /api/datasets/.*/settings", 403, 0),
    "model visible": ("PUT /api/models/.*/settings", 403, 1),
    "collection visible": ("PATCH /api/collections/", 500, 2),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_release_that_failed_goes_on_and_nothing_was_visible(hub, settings, stage):
    pattern, status, visible = STAGES[stage]
    config = ReleaseConfig(**settings, private=False, tag="v1")
    hub.faults.append(Fault(pattern, status, times=99))
    with pytest.raises(HubError):
        push_release(config)
    assert hub.count(pattern) > 0
    assert len(seen_by_bob(settings)) == visible
    hub.reset()
    done = push_release(config)
    assert done.changed
    assert seen_by_bob(settings) == {"fisher_repo", "checkpoint_repo", "collection"}
    assert commits(settings) == [1, 1]
    (collection,) = collections(settings)
    assert len(collection.items) == 2
    if visible:  # all that was left was to show it
        assert hub.count(f"{WRITES}.*/commit/") == 0
    hub.reset()
    assert not push_release(config).changed
    assert hub.count(WRITES) == 0


@pytest.mark.parametrize("moment", ["POST /api/datasets/.*/commit/", "POST /api/models/.*/commit/"])
def test_a_release_that_was_killed_goes_on(hub, settings, moment):
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    command = [sys.executable, "-m", "hf_ewc.cli.main", "push", "release", *words, "--private", "false"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    hub.faults.append(Fault(moment, status=503, before=lambda: os.kill(process.pid, signal.SIGKILL)))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, output
    assert seen_by_bob(settings) == set()
    push_release(ReleaseConfig(**settings, private=False))
    assert seen_by_bob(settings) == {"fisher_repo", "checkpoint_repo", "collection"}
    assert commits(settings) == [1, 1]


def test_with_a_base_on_the_hub_the_collection_holds_all_three(hub, name, base_folder, tmp_path):
    base = f"{name}-base"
    HfApi().create_repo(base)
    HfApi().upload_folder(repo_id=base, folder_path=base_folder)
    HfApi().upload_file(repo_id=base, path_or_fileobj=b"---\nlicense: apache-2.0\n---\n", path_in_repo="README.md")
    fisher = training.make_fisher(base).save_pretrained(tmp_path / "fisher", codec="float32")
    train(base, str(fisher), tmp_path / "adapted")
    folders = dict(fisher=str(fisher), checkpoint=str(tmp_path / "adapted"))
    done = push_release(ReleaseConfig(**folders, fisher_repo=f"{name}-fisher", checkpoint_repo=name))
    assert [(item.item_type, item.item_id) for item in HfApi().get_collection(done.collection.slug).items] == [
        ("dataset", f"{name}-fisher"),
        ("model", name),
        ("model", base),
    ]
    card = HfApi().model_info(name).card_data
    assert (card.license, card.base_model, card.datasets) == ("apache-2.0", base, [f"{name}-fisher"])


def test_a_published_fisher_stays_where_it_is_and_a_public_model_needs_a_public_one(hub, name, settings):
    pushed = FisherInformation.from_pretrained(settings["fisher"]).push_to_hub(f"{name}-elsewhere")
    there = {**settings, "fisher": f"{name}-elsewhere@{pushed.commit}", "fisher_repo": None, "results": None}
    with pytest.raises(EWCError, match="is private, and the public card of the model would link to it"):
        push_release(ReleaseConfig(**there, private=False))
    release = push_release(ReleaseConfig(**there))
    assert (release.fisher.repo_id, release.fisher.commit) == (f"{name}-elsewhere", pushed.commit)
    held = {item.item_id for item in HfApi().get_collection(release.collection.slug).items}
    assert held == {f"{name}-elsewhere", name}
    assert not push_release(ReleaseConfig(**there)).changed


def refusal(hub, settings: dict) -> str:
    """The message of a release that is refused before anything was written."""
    with pytest.raises(EWCError) as caught:
        push_release(ReleaseConfig(**settings))
    assert hub.count(WRITES) == 0
    assert "nothing was sent" in str(caught.value).lower()
    return str(caught.value)


def test_another_fisher_is_refused_before_anything_is_made(hub, settings, base_folder, tmp_path):
    other = training.make_fisher(base_folder, seed=2)
    folder = other.save_pretrained(tmp_path / "other", codec="float32")
    message = refusal(hub, {**settings, "fisher": str(folder)})
    for source in (folder, settings["fisher"]):
        assert FisherInformation.from_pretrained(source).sha256 in message
    with pytest.raises(RepositoryNotFoundError):
        HfApi().repo_info(settings["fisher_repo"], repo_type="dataset")


def test_a_single_push_wants_the_right_fisher_too(hub, name, checkpoint, fisher_folder, base_folder, tmp_path):
    other = training.make_fisher(base_folder, seed=2).save_pretrained(tmp_path / "other")
    FisherInformation.from_pretrained(other).push_to_hub(f"{name}-fisher")
    with pytest.raises(FisherMismatchError, match=f"{name}-fisher"):
        push_checkpoint(checkpoint, name, fisher_repo=f"{name}-fisher")
    pushed = FisherInformation.from_pretrained(fisher_folder).push_to_hub(f"{name}-fisher")
    done = push_checkpoint(checkpoint, name.partition("/")[2], fisher_repo=f"{name}-fisher", run_as_future=True).result()
    state = json.loads(Path(HfApi().hf_hub_download(name, "ewc_state.json", revision=done.commit)).read_text())
    assert (done.repo_id, state["fisher"]["revision"]) == (name, pushed.commit)


@pytest.mark.parametrize("secret", ["hf_owner", LOOKALIKE], ids=["mine", "anyone's"])
def test_a_token_in_a_file_is_refused_and_not_repeated(hub, settings, tmp_path, secret):
    shutil.copytree(settings["checkpoint"], tmp_path / "adapted")
    config = json.loads((tmp_path / "adapted" / "generation_config.json").read_text())
    (tmp_path / "adapted" / "generation_config.json").write_text(json.dumps({**config, "note": secret}, indent=2))
    message = refusal(hub, {**settings, "checkpoint": str(tmp_path / "adapted")})
    assert "generation_config.json, line" in message
    assert secret not in message


def test_all_that_is_wrong_with_the_folders_is_said_at_once(hub, settings, tmp_path):
    shutil.copytree(settings["checkpoint"], tmp_path / "adapted")
    whole = (tmp_path / "adapted" / "model.safetensors").read_bytes()
    (tmp_path / "adapted" / "model.safetensors").write_bytes(whole[:1000])
    message = refusal(hub, {**settings, "checkpoint": str(tmp_path / "adapted"), "fisher": "nowhere"})
    assert "there is no folder 'nowhere'" in message
    assert "not a whole safetensors file" in message
    assert hub.log == []


def test_weights_that_are_only_pickles_are_refused(hub, settings, tmp_path):
    shutil.copytree(settings["checkpoint"], tmp_path / "adapted")
    (tmp_path / "adapted" / "model.safetensors").rename(tmp_path / "adapted" / "pytorch_model.bin")
    assert "pickles" in refusal(hub, {**settings, "checkpoint": str(tmp_path / "adapted")})


def test_repositories_of_something_else_are_left_alone(hub, settings, base_folder):
    for key, kind in (("fisher_repo", "dataset"), ("checkpoint_repo", "model")):
        HfApi().create_repo(settings[key], repo_type=kind)
    HfApi().upload_folder(repo_id=settings["checkpoint_repo"], folder_path=base_folder)
    hub.reset()
    assert "not pushed by hf_ewc" in refusal(hub, settings)
    HfApi().upload_file(repo_id=settings["fisher_repo"], repo_type="dataset", path_or_fileobj=b"a,b\n", path_in_repo="data.csv")
    hub.reset()
    assert "something else than a Fisher" in refusal(hub, settings)


def test_a_tag_that_is_taken_is_refused_before_the_fisher_is_sent(hub, settings):
    push_release(ReleaseConfig(**settings, tag="v1"))
    hub.reset()
    # the Fisher would go to a new repository first, and the model's card, which names it, would be another one
    message = refusal(hub, {**settings, "fisher_repo": f"{settings['fisher_repo']}-2", "tag": "v1"})
    assert "the tag 'v1' of the model" in message


def test_somebody_else_s_namespace_is_refused(hub, settings):
    message = refusal(hub, {**settings, "checkpoint_repo": "bob/model"})
    assert "cannot write to 'bob'" in message
    names = {key: settings[key].partition("/")[2] for key in ("fisher_repo", "checkpoint_repo")}
    assert "cannot write to 'acme'" in refusal(hub, {**settings, **names, "namespace": "acme"})


def test_an_update_of_a_public_release_says_that_it_is_seen_at_once(hub, settings):
    push_release(ReleaseConfig(**settings, private=False))
    config = ReleaseConfig(**{**settings, "results": None})
    plan = plan_release(config)
    assert plan.fisher.empty
    assert not plan.checkpoint.empty
    assert f"model {settings['checkpoint_repo']} is public already: its update is visible" in plan.text()
    assert f"dataset {settings['fisher_repo']} is public already, and stays so" in plan.text()
    said = []
    push_release(config, progress=said.append)
    assert any("public already" in line for line in said)
    assert seen_by_bob(settings) == {"fisher_repo", "checkpoint_repo", "collection"}
    assert "results.json" not in HfApi().list_repo_files(settings["checkpoint_repo"])


def test_the_command_reads_a_recipe_and_never_shows_the_token(hub, settings, tmp_path, capfd):
    recipe = tmp_path / "release.yaml"
    recipe.write_text(json.dumps(settings))  # JSON is YAML
    assert main(["push", "release", "--config", str(recipe), "--dry_run"]) == 0
    assert hub.count(WRITES) == 0
    assert main(["push", "release", "--config", str(recipe)]) == 0
    assert main(["push", "release", "--config", str(recipe)]) == 0
    hub.faults.append(Fault("GET /api/whoami-v2", 401, times=9, message="Invalid credentials in Authorization header"))
    assert main(["push", "release", "--config", str(recipe)]) == 2
    out, err = capfd.readouterr()
    for part in ("Nothing was sent", "Nothing to send", "model.safetensors"):
        assert part in out
    assert "needs an account" in err
    assert "hf_owner" not in out + err


def test_settings_that_name_nothing_are_problems(hub):
    config = ReleaseConfig("a", "b", fisher_repo="a b", checkpoint_repo="x/y/z", namespace="a/b", collection=" ")
    assert len(config.problems()) == 4
    with pytest.raises(ConfigError):
        plan_release(config)

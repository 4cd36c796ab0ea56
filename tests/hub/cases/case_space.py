"""A Space: what is pushed, what it pins, what it leaves alone, what it refuses; alone and as part of a release."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import training
import yaml
from huggingface_hub import HfApi, SpaceCard, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from server import Fault
from transformers import AutoModelForCausalLM

import hf_ewc
from hf_ewc import EvaluationConfig, FisherInformation, evaluate_model
from hf_ewc.cli.main import main
from hf_ewc.compare import app_folder
from hf_ewc.errors import ConfigError, DataError, EWCError, FisherMismatchError, HubError
from hf_ewc.evaluation import save_results
from hf_ewc.publish import ReleaseConfig, plan_release, push_checkpoint, push_release, push_space
from hf_ewc.publish.space import LISTING

LEGS = ("lfs",)  # what goes over the wire is `push_files`, as in case_fisher

BOB = "hf_other"
WRITES = "^(POST|PUT|PATCH|DELETE) (?!.*paths-info)"
BASE, FISHER, MODEL = "alice/space-base", "alice/space-fisher", "alice/space-lt"
LOOKALIKE = "hf_" + "aBcD1234" * 4


@pytest.fixture(scope="module")
def there(base_folder, tmp_path_factory) -> SimpleNamespace:
    """A public base on the Hub, its Fisher (private), a model trained with both (private), and figures of that model."""
    folder = tmp_path_factory.mktemp("there")
    HfApi().create_repo(BASE)
    base = HfApi().upload_folder(repo_id=BASE, folder_path=base_folder).oid
    fisher = training.make_fisher(BASE).save_pretrained(folder / "fisher", codec="float32")
    held = FisherInformation.from_pretrained(fisher).push_to_hub(FISHER).commit
    trainer = training.ewc_trainer(BASE, folder / "lt", fisher=FISHER, ewc_lambda=10.0, max_steps=2)
    trainer.train()
    trainer.save_model()
    model = push_checkpoint(folder / "lt", MODEL).commit
    texts = {}
    for name, text in (("en", tiny.TEXTS[0]), ("lt", tiny.TEXTS[2])):
        texts[name] = str(tiny.write_jsonl(folder / f"{name}.jsonl", [{"text": text}]))
    config = EvaluationConfig(texts=texts, window=32)
    before, after = (evaluate_model(str(each), config) for each in (base_folder, folder / "lt"))
    runs = [{"mode": "lt", "ewc_lambda": 10.0, "metrics": after, "log": {}, "seconds": None}]
    content = {"schema": 1, "base": before["model"], "before": before, "runs": runs, "versions": {}}
    results = save_results({**content, "settings": {"old": "en", "new": "lt"}}, folder / "results.json")
    return SimpleNamespace(base=base, fisher=held, model=model, folder=folder / "lt", own_fisher=fisher, results=results)


def space(name: str, file: str, revision: str | None = None) -> str:
    path = HfApi().hf_hub_download(name, file, repo_type="space", revision=revision)
    return Path(path).read_text(encoding="utf-8")


def names(name: str) -> set[str]:
    return set(HfApi().list_repo_files(name, repo_type="space"))


def test_a_space_holds_page_package_and_pins_and_is_private(hub, name, there):
    done = push_space(name, adapted=MODEL, results=there.results, votes_repo="alice/votes", dtype="bfloat16", tag="v1")
    info = HfApi().space_info(name, revision="v1")
    assert (info.sha, info.private, info.sdk) == (done.commit, True, "gradio")
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=BOB).space_info(name)
    assert len(HfApi().list_repo_commits(name, repo_type="space")) == 2  # the Hub's own, and one with everything
    assert yaml.safe_load(space(name, "space.yaml")) == {
        **dict(base=BASE, base_revision=there.base, adapted=MODEL, adapted_revision=there.model),
        **dict(fisher=FISHER, fisher_revision=there.fisher, results="results.json"),
        **dict(dtype="bfloat16", votes_repo="alice/votes"),
    }
    package = Path(hf_ewc.__file__).parent
    modules = {f"hf_ewc/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    page = {path.name for path in app_folder().iterdir() if path.is_file() and not path.name.startswith(".")}
    assert names(name) >= modules | page | {"hf_ewc/py.typed", "README.md", "requirements.txt", "results.json"}
    assert not [path for path in names(name) if "__pycache__" in path or path.endswith(".pyc") or "screenshots" in path]
    assert json.loads(space(name, "results.json")) == json.loads(there.results.read_text())


def test_the_front_matter_is_what_a_space_needs(hub, name, there):
    push_space(name, adapted=MODEL, title="Lithuanian: before & after", hardware="zero-a10g")
    card = SpaceCard(space(name, "README.md"))
    meta = card.data.to_dict()
    assert {key: meta[key] for key in ("title", "sdk", "python_version", "app_file", "license")} == {
        **dict(title="Lithuanian: before & after", sdk="gradio", python_version="3.12"),
        **dict(app_file="app.py", license="apache-2.0"),
    }
    assert (meta["models"], meta["datasets"], meta["suggested_hardware"]) == ([BASE, MODEL], [FISHER], "zero-a10g")
    assert len(meta["short_description"]) <= 60
    assert meta["sdk_version"].split(".")[0] == "6"
    for commit in (there.base, there.model, there.fisher):
        assert f"/tree/{commit})" in card.text
    assert f"hf-ewc compare --base {BASE} --base_revision {there.base}" in card.text
    assert "stored nowhere" in card.text
    assert "$" not in card.text


def test_only_what_everybody_may_read_is_preloaded(hub, name, there, caplog):
    def preloaded() -> list[list[str]]:
        card = SpaceCard(space(name, "README.md"))
        return [line.split(" ") for line in card.data.to_dict().get("preload_from_hub", [])]

    push_space(name, adapted=MODEL)
    assert [(repo, commit) for repo, _, commit in preloaded()] == [(BASE, there.base)]
    assert set(preloaded()[0][1].split(",")) >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert f"model {MODEL}, dataset {FISHER}. The Space '{name}' needs a secret HF_TOKEN" in caplog.text
    assert f"Not open to everybody: model {MODEL}, dataset {FISHER}.**" in space(name, "README.md")
    try:
        HfApi().update_repo_settings(MODEL, private=False)
        HfApi().update_repo_settings(BASE, gated="auto")
        push_space(name, adapted=MODEL)
        ((repo, files, commit),) = preloaded()
        assert (repo, commit) == (MODEL, there.model)
        assert {"config.json", "model.safetensors", "tokenizer.json", "ewc_state.json"} <= set(files.split(","))
        assert not {"README.md", "results.json", ".gitattributes"} & set(files.split(","))
        assert f"Not open to everybody: model {BASE}, dataset {FISHER}.**" in space(name, "README.md")
        HfApi().update_repo_settings(BASE, gated=False)
        HfApi().update_repo_settings(FISHER, private=False, repo_type="dataset")
        push_space(name, adapted=MODEL)
        assert len(preloaded()) == 2
        assert "HF_TOKEN" not in space(name, "README.md")
    finally:
        HfApi().update_repo_settings(BASE, gated=False)
        HfApi().update_repo_settings(MODEL, private=True)
        HfApi().update_repo_settings(FISHER, private=True, repo_type="dataset")


def test_a_second_push_sends_nothing_and_a_dry_run_never_does(hub, name, there):
    plan = push_space(name, adapted=MODEL, dry_run=True)
    assert hub.count(WRITES) == 0
    done = push_space(name, adapted=MODEL)
    assert (plan.files, plan.bytes) == (done.plan.files, done.plan.bytes)
    assert all(f"{size:,}" in plan.text() and path in plan.text() for path, size in plan.files.items())
    hub.reset()
    again = push_space(name, adapted=MODEL)
    assert hub.count(WRITES) == 0
    assert (again.commit, again.plan.bytes) == (done.commit, 0)


def test_an_update_deletes_what_was_ours_and_keeps_the_owner_s_files(hub, name, there, tmp_path, monkeypatch):
    shutil.copytree(app_folder(), tmp_path / "app")
    (tmp_path / "app" / "strings").mkdir(exist_ok=True)
    (tmp_path / "app" / "strings" / "la.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr("hf_ewc.publish.space.app_folder", lambda: tmp_path / "app")
        push_space(name, adapted=MODEL, results=there.results)
    assert names(name) >= {"strings/la.json", "results.json", LISTING}
    for path in ("hf_ewc/gone/module.py", "strings/mine.json", "notes.md", "requirements-mine.txt"):
        HfApi().upload_file(repo_id=name, repo_type="space", path_in_repo=path, path_or_fileobj=b"{}")
    done = push_space(name, adapted=MODEL)
    assert set(done.plan.deleted) == {"hf_ewc/gone/module.py", "strings/la.json", "results.json"}
    assert names(name) >= {"strings/mine.json", "notes.md", "requirements-mine.txt", "space.yaml"}
    assert not names(name) & {"hf_ewc/gone/module.py", "strings/la.json", "results.json"}
    assert push_space(name, adapted=MODEL).commit == done.commit


def test_the_pushed_code_is_the_one_that_runs_there(hub, name, there, tmp_path):
    push_space(name, adapted=MODEL)
    snapshot_download(name, repo_type="space", local_dir=tmp_path / "space")
    code = (
        "import json, hf_ewc; from hf_ewc.compare import CompareConfig, ModelPair; config = CompareConfig.of_space('.')\n"
        "pair = ModelPair.load(config.base, config.adapted, config.base_revision, config.adapted_revision)\n"
        "print(json.dumps([hf_ewc.__file__, config.problems(), pair.base.commit, pair.adapted.commit]))"
    )
    environment = {**os.environ, "HF_EWC_SLOTS": "3", "PYTHONSAFEPATH": "", "PYTHONPATH": ""}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path / "space", env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    file, problems, base, adapted = json.loads(run.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(tmp_path / "space")
    assert (problems, base, adapted) == ([], there.base, there.model)


def refusal(hub, kind: type[EWCError], name: str, **settings) -> str:
    """The message of a push that is refused before anything was written."""
    with pytest.raises(kind) as caught:
        push_space(name, **settings)
    assert hub.count(WRITES) == 0
    with pytest.raises(RepositoryNotFoundError):
        HfApi().space_info(name)
    return str(caught.value)


def test_folders_and_settings_that_cannot_be_are_refused_together(hub, name, there, base_folder):
    folders = dict(adapted=str(there.folder), base=str(base_folder), fisher=str(there.own_fisher))
    message = refusal(hub, ConfigError, name, **folders)
    assert f"hf-ewc push checkpoint --checkpoint {there.folder}" in message
    assert f"hf upload USER/NAME {base_folder}" in message
    assert f"hf-ewc push fisher --fisher {there.own_fisher}" in message
    assert len(hub.log) == 1  # the question above whether the Space is there
    wrong = dict(dtype="int8", votes_repo="votes", hardware="cray")
    message = refusal(hub, ConfigError, name, adapted=MODEL, **wrong)
    assert all(f"`{setting}: {value}`" in message for setting, value in wrong.items())
    assert "`adapted: a/b/c`" in refusal(hub, ConfigError, name, adapted="a/b/c")


def test_what_is_not_there_is_named(hub, name, there, tmp_path):
    assert "alice/nowhere" in refusal(hub, HubError, name, adapted="alice/nowhere")
    assert "v9" in refusal(hub, HubError, name, adapted=f"{MODEL}@v9")
    assert "alice/nothing" in refusal(hub, HubError, name, adapted=MODEL, fisher="alice/nothing")
    assert "cannot read results" in refusal(hub, DataError, name, adapted=MODEL, results=tmp_path / "no.json")


def test_another_base_and_its_fisher_are_refused(hub, name, there, tokenizer, tmp_path):
    other = tiny.save_base(tmp_path / "other", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(other)
    model.get_input_embeddings().weight.data.mul_(2)
    model.save_pretrained(other)
    HfApi().create_repo(f"{name}-base")
    HfApi().upload_folder(repo_id=f"{name}-base", folder_path=other)
    FisherInformation.from_pretrained(training.make_fisher(other).save_pretrained(tmp_path / "f")).push_to_hub(f"{name}-fisher")
    hub.reset()
    message = refusal(hub, DataError, name, adapted=MODEL, base=f"{name}-base")
    assert "was not trained from" in message
    assert message.count("weights sha256") == 2
    message = refusal(hub, FisherMismatchError, name, adapted=MODEL, fisher=f"{name}-fisher")
    assert "was not measured on the base" in message
    assert message.count("weights sha256") == 2
    # a model that nothing is recorded of needs its base named, and has no Fisher then
    assert "does not say what it was trained from" in refusal(hub, ConfigError, name, adapted=f"{name}-base")
    push_space(name, adapted=f"{name}-base", base=BASE)
    assert "fisher" not in yaml.safe_load(space(name, "space.yaml"))


def test_figures_of_another_model_are_refused(hub, name, there, tmp_path):
    results = json.loads(there.results.read_text())
    results["runs"][0]["metrics"]["model"]["fingerprint"] = "0" * 64
    other = tmp_path / "results.json"
    other.write_text(json.dumps(results))
    assert "results are of other weights" in refusal(hub, ConfigError, name, adapted=MODEL, results=other)


def test_an_own_commit_of_the_base_and_another_fisher_of_it_are_taken(hub, name, there, tmp_path, caplog):
    HfApi().upload_file(repo_id=BASE, path_in_repo="notes.md", path_or_fileobj=name.encode())  # main has moved on
    second = training.make_fisher(BASE, seed=2).save_pretrained(tmp_path / "second")
    pushed = FisherInformation.from_pretrained(second).push_to_hub(f"{name}-fisher")
    push_space(name, adapted=MODEL, base=BASE, fisher=f"{name}-fisher@main")
    config = yaml.safe_load(space(name, "space.yaml"))
    assert (config["base_revision"], config["fisher_revision"]) == (there.base, pushed.commit)
    assert "λ on the page moves by this one" in caplog.text


def test_a_plain_model_is_pinned_too_and_of_the_same_base(hub, name, there, base_folder):
    assert "`plain: " in refusal(hub, ConfigError, name, adapted=MODEL, plain=str(there.folder))
    push_space(name, adapted=MODEL, plain=MODEL, plain_revision="main")
    config = yaml.safe_load(space(name, "space.yaml"))
    assert (config["plain"], config["plain_revision"]) == (MODEL, there.model)
    assert "| plain (trained without EWC) | [" in space(name, "README.md")
    model = f"{name}-model"  # trained from another model
    state = {"schema": 1, "anchor": {"id": "else", "revision": None, "fingerprint": "0" * 64}}
    HfApi().create_repo(model)
    HfApi().upload_folder(repo_id=model, folder_path=base_folder)
    HfApi().upload_file(repo_id=model, path_in_repo="ewc_state.json", path_or_fileobj=json.dumps(state).encode())
    with pytest.raises(DataError, match="was not trained from"):
        push_space(name, adapted=MODEL, plain=model)


def test_examples_of_one_s_own_stand_in_the_place_of_ours(hub, name, there, tmp_path):
    own = tmp_path / "mine.json"
    own.write_text('{"compare": [], "natural": []}')
    with pytest.raises(DataError, match="must hold `compare`, `natural` and `between`"):
        push_space(name, adapted=MODEL, examples=own)
    with pytest.raises(DataError, match="cannot be read as JSON"):
        push_space(name, adapted=MODEL, examples=tmp_path / "nowhere.json")
    own.write_text('{"compare": [], "natural": [], "between": {"old": "", "new": "", "prompt": ""}}')
    push_space(name, adapted=MODEL, examples=own)
    assert space(name, "examples.json") == own.read_text()


def test_a_token_in_a_file_is_refused_and_not_repeated(hub, name, there, tmp_path, monkeypatch):
    shutil.copytree(app_folder(), tmp_path / "app")
    (tmp_path / "app" / "secrets.py").write_text(f"\nTOKEN = '{LOOKALIKE}'\n")
    monkeypatch.setattr("hf_ewc.publish.space.app_folder", lambda: tmp_path / "app")
    message = refusal(hub, ConfigError, name, adapted=MODEL)
    assert "secrets.py, line 2" in message
    assert LOOKALIKE not in message


def test_somebody_s_other_space_is_left_alone(hub, name, there):
    HfApi().create_repo(name, repo_type="space", space_sdk="gradio")
    HfApi().upload_file(repo_id=name, repo_type="space", path_in_repo="app.py", path_or_fileobj=b"import gradio")
    hub.reset()
    with pytest.raises(HubError, match=r"was not pushed by hf_ewc: it holds app\.py"):
        push_space(name, adapted=MODEL)
    assert hub.count(WRITES) == 0


def test_the_command_pushes_and_says_what_it_did(hub, name, there, capfd, caplog):
    command = ["push", "space", "--adapted", MODEL, "--repo_id", name]
    assert main([*command, "--results", str(there.results), "--dry_run"]) == 0
    assert hub.count(WRITES) == 0
    assert main([*command, "--results", str(there.results)]) == 0
    assert main([*command, "--fisher_revision", "v9"]) == 2
    out, err = capfd.readouterr()
    for part in ("Nothing was sent", f"pushed {len(names(name)) - 1} files", "private, at commit", "hf_ewc/compare/pair.py"):
        assert part in out
    assert f"The Space '{name}' needs a secret HF_TOKEN" in caplog.text
    assert "hf_owner" not in out + err


@pytest.fixture
def settings(name, there) -> dict:
    """Settings of a release with a Space, under names of its own."""
    folders = dict(fisher=str(there.own_fisher), checkpoint=str(there.folder), results=str(there.results))
    repos = dict(fisher_repo=f"{name}-fisher", checkpoint_repo=name, space_repo=f"{name.partition('/')[2]}-space")
    return dict(**folders, **repos, collection=name.partition("/")[2])


def seen_by_bob(settings: dict) -> int:
    """How many parts of a release somebody else finds."""
    found, bob = 0, HfApi(token=BOB)
    kinds = {"fisher_repo": "dataset", "checkpoint_repo": "model", "space_repo": "space"}
    for key, kind in kinds.items():
        try:
            bob.repo_info(settings[key] if "/" in settings[key] else f"alice/{settings[key]}", repo_type=kind)
            found += 1
        except RepositoryNotFoundError:
            pass
    return found + sum(one.title == settings["collection"] for one in bob.list_collections(owner="alice"))


def test_a_release_ends_with_its_space_which_pins_what_it_made(hub, settings):
    config = ReleaseConfig(**settings, tag="v1")
    plan = plan_release(config)
    assert hub.count(WRITES) == 0
    done = push_release(config)
    lines = [f"{method} {path}" for method, path, _ in hub.log]
    order = ("/api/datasets/.*/commit/", "/api/models/.*/commit/", "/api/spaces/.*/commit/", "/api/collections$")
    first = [next(i for i, line in enumerate(lines) if re.search(f"^POST {each}", line)) for each in order]
    assert first == sorted(first)
    assert seen_by_bob(settings) == 0
    assert plan.space.files == done.space.plan.files
    assert all(path in plan.text() for path in plan.space.files)
    repo = f"alice/{settings['space_repo']}"
    pins = yaml.safe_load(space(repo, "space.yaml", "v1"))
    assert (pins["adapted"], pins["adapted_revision"]) == (settings["checkpoint_repo"], done.checkpoint.commit)
    assert (pins["fisher"], pins["fisher_revision"]) == (settings["fisher_repo"], done.fisher.commit)
    assert "needs a secret HF_TOKEN" in plan.text()
    assert done.space.commit in done.text()
    items = [(item.item_type, item.item_id) for item in HfApi().get_collection(done.collection.slug).items]
    assert items[-2:] == [("model", BASE), ("space", repo)]
    hub.reset()
    again = push_release(config)
    assert hub.count(WRITES) == 0
    assert not again.changed
    assert again.space.commit == done.space.commit


# stage → the request that fails, how, and how many parts are visible then
STAGES = {
    "commit": ("POST /api/spaces/.*/commit/", 500, 0),
    "restart": ("POST /api/spaces/.*/restart", 403, 2),
    "visible": ("PUT /api/spaces/.*/settings", 403, 2),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_public_release_shows_its_space_after_the_models_and_goes_on(hub, settings, stage):
    pattern, status, visible = STAGES[stage]
    config = ReleaseConfig(**settings, private=False)
    hub.faults.append(Fault(pattern, status, times=99))
    with pytest.raises(HubError):
        push_release(config)
    assert hub.count(pattern) > 0
    assert seen_by_bob(settings) == visible
    hub.reset()
    done = push_release(config)
    assert done.changed
    assert seen_by_bob(settings) == 4
    assert hub.count("POST /api/spaces/.*/restart") == 1
    card = SpaceCard(space(done.space.repo_id, "README.md"))
    assert [line.split(" ")[::2] for line in card.data.to_dict()["preload_from_hub"]] == [
        [BASE, yaml.safe_load(space(done.space.repo_id, "space.yaml"))["base_revision"]],
        [settings["checkpoint_repo"], done.checkpoint.commit],
    ]
    hub.reset()
    assert not push_release(config).changed
    assert hub.count(WRITES) == 0


def test_a_base_that_is_a_folder_is_named_by_where_it_is_on_the_hub(hub, settings, base_folder, fisher_folder, tmp_path):
    trainer = training.ewc_trainer(base_folder, tmp_path / "lt", fisher=fisher_folder, ewc_lambda=10.0, max_steps=2)
    trainer.train()
    trainer.save_model()
    local = {**settings, "fisher": fisher_folder, "checkpoint": str(tmp_path / "lt"), "results": None}
    with pytest.raises(ConfigError, match="a folder, and a Space needs the base on the Hub"):
        push_release(ReleaseConfig(**local))
    with pytest.raises(ConfigError, match="was not trained from"):
        push_release(ReleaseConfig(**local, base_repo=MODEL))
    assert hub.count(WRITES) == 0
    done = push_release(ReleaseConfig(**local, base_repo=BASE))
    assert yaml.safe_load(space(done.space.repo_id, "space.yaml"))["base"] == BASE
    assert ("model", BASE) in [(item.item_type, item.item_id) for item in HfApi().get_collection(done.collection.slug).items]

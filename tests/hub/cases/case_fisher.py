"""A Fisher goes to the Hub and comes back: whole, pinned, offline, again, in the face of refusals; never half of it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training
from datasets import load_dataset
from huggingface_hub import HfApi, hf_hub_download
from safetensors.torch import load_file
from server import Fault

from hf_ewc import BaseModel, FisherInformation
from hf_ewc.cli.main import main
from hf_ewc.errors import DataError, FisherFormatError, HubError, HubUnavailableError
from hf_ewc.hub import page, push_files

TOKEN = "hf_owner"


@pytest.fixture(scope="session")
def folder(base_folder, tmp_path_factory) -> Path:
    return training.make_fisher(base_folder).save_pretrained(tmp_path_factory.mktemp("fisher") / "one", codec="float32")


@pytest.fixture(scope="session")
def second(base_folder, tmp_path_factory) -> Path:
    """Another Fisher, in other shards."""
    fisher = training.make_fisher(base_folder, seed=2)
    return fisher.save_pretrained(tmp_path_factory.mktemp("fisher") / "two", codec="float32", max_shard_size="100KB")


def files_of(name: str, revision: str | None = None) -> set[str]:
    return set(HfApi().list_repo_files(name, repo_type="dataset", revision=revision))


def assert_same(left: FisherInformation, right: FisherInformation) -> None:
    assert left.names == right.names
    for tensor in left.names:
        assert torch.equal(left.read(tensor), right.read(tensor))


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "hf_ewc.cli.main", *map(str, words)]


def test_a_fisher_comes_back_as_it_went_pinned_to_its_commit(hub, name, folder):
    local = FisherInformation.from_pretrained(folder)
    pushed = local.push_to_hub(name, tag="v1")
    assert HfApi().repo_info(name, repo_type="dataset").private
    for revision in (None, "main", "v1", pushed.commit):
        fisher = FisherInformation.from_pretrained(name, revision)
        assert (fisher.place.repo_id, fisher.place.commit, fisher.sha256) == (name, pushed.commit, local.sha256)
    assert_same(local, fisher)
    assert_same(local, FisherInformation.from_pretrained(f"{name}@v1"))


def test_what_is_there_already_is_not_sent_again(hub, name, folder):
    fisher = FisherInformation.from_pretrained(folder)
    first = fisher.push_to_hub(name, tag="v1")
    hub.log.clear()
    again = fisher.push_to_hub(name, tag="v1")
    assert again.commit == first.commit
    assert again.plan.empty
    assert not [entry for entry in hub.log if entry[0] != "GET"], "only looked at"


def test_another_fisher_replaces_the_first_with_its_shards_and_the_old_commit_stays(hub, name, folder, second):
    first = FisherInformation.from_pretrained(folder).push_to_hub(name)
    done = FisherInformation.from_pretrained(second).push_to_hub(name)
    assert done.plan.deleted == ["fisher-00001-of-00001.safetensors"]
    assert_same(FisherInformation.from_pretrained(name), FisherInformation.from_pretrained(second))
    assert_same(FisherInformation.from_pretrained(name, first.commit), FisherInformation.from_pretrained(folder))


def test_the_genuine_datasets_library_shows_the_table_and_nothing_can_be_loaded_as_weights(hub, name, folder):
    FisherInformation.from_pretrained(folder).push_to_hub(name, private=False)
    rows = load_dataset(name, split="params")
    fisher = FisherInformation.from_pretrained(folder)
    assert rows["name"] == fisher.names
    assert sum(rows["trace"]) == pytest.approx(fisher.trace)
    assert not {"config.json", "model.safetensors"} & files_of(name)


def test_the_card_names_repository_and_use_and_shows_the_picture(hub, name, folder):
    FisherInformation.from_pretrained(folder).push_to_hub(name)
    card = Path(hf_hub_download(name, "README.md", repo_type="dataset")).read_text(encoding="utf-8")
    assert f'fisher="{name}"' in card
    assert "trace.png" in card
    assert str(folder) not in card
    picture = Path(hf_hub_download(name, "trace.png", repo_type="dataset")).read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_licence_and_base_are_inherited_from_a_base_on_the_hub(hub, name, base_folder, tmp_path):
    api = HfApi()
    base = f"{name}-base"
    api.create_repo(base)
    (base_folder / "README.md").write_text("---\nlicense: gemma\nlicense_name: g\n---\n# base\n")
    commit = api.upload_folder(repo_id=base, folder_path=base_folder).oid
    (base_folder / "README.md").unlink()
    model = BaseModel.resolve(base)
    assert (model.id, model.revision) == (base, commit)
    assert model.files_sha256 == BaseModel.resolve(base_folder).files_sha256, "the cache's names are the files' hashes"
    fisher = training.make_fisher(model.folder)
    fisher.manifest.base_model = model
    fisher.push_to_hub(name)
    card = Path(hf_hub_download(name, "README.md", repo_type="dataset")).read_text(encoding="utf-8")
    assert "license: gemma" in card
    assert commit in card
    FisherInformation.from_pretrained(name).check_base(model)


def test_offline_the_cache_serves_what_was_pulled_and_says_what_it_lacks(hub, name, folder):
    pushed = FisherInformation.from_pretrained(folder).push_to_hub(name, tag="v1")
    FisherInformation.from_pretrained(name)
    hub.log.clear()
    script = f"""
from hf_ewc import FisherInformation, HubUnavailableError
fisher = FisherInformation.from_pretrained({name!r})
print(fisher.place.commit, fisher.read(fisher.names[0]).sum().item())
try:
    FisherInformation.from_pretrained("alice/never-seen")
except HubUnavailableError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(pushed.commit)
    assert "HF_HUB_OFFLINE is set" in done.stdout
    assert "hf download alice/never-seen --repo-type dataset" in done.stdout
    assert not hub.log


def test_a_branch_with_a_slash_a_pull_request_and_a_dry_run(hub, name, folder, second):
    fisher, other = FisherInformation.from_pretrained(folder), FisherInformation.from_pretrained(second)
    plan = fisher.push_to_hub(name, dry_run=True)
    assert "fisher_config.json" in plan.files
    assert not plan.exists
    assert not [entry for entry in hub.log if entry[0] not in ("GET", "HEAD")]
    main_commit = fisher.push_to_hub(name).commit
    other.push_to_hub(name, revision="exp/a")
    assert FisherInformation.from_pretrained(name, "exp/a").sha256 == other.sha256
    assert FisherInformation.from_pretrained(name).place.commit == main_commit
    proposed = other.push_to_hub(name, create_pr=True)
    assert "/discussions/" in proposed.url
    assert FisherInformation.from_pretrained(name, "refs/pr/1").sha256 == other.sha256
    assert FisherInformation.from_pretrained(name).place.commit == main_commit


def test_a_tag_is_never_moved(hub, name, folder, second):
    first = FisherInformation.from_pretrained(folder).push_to_hub(name, tag="v1")
    with pytest.raises(HubError, match="A tag is a promise") as error:
        FisherInformation.from_pretrained(second).push_to_hub(name, tag="v1")
    assert first.commit in str(error.value)
    assert FisherInformation.from_pretrained(name).place.commit == first.commit, "nothing was sent"


def test_a_repository_of_something_else_keeps_its_card(hub, name, folder):
    api = HfApi()
    api.create_repo(name, repo_type="dataset")
    api.upload_file(path_or_fileobj=b"a,b\n", path_in_repo="rows.csv", repo_id=name, repo_type="dataset")
    with pytest.raises(HubError, match=r"something else than a Fisher \(rows\.csv\)"):
        FisherInformation.from_pretrained(folder).push_to_hub(name)
    assert files_of(name) == {".gitattributes", "rows.csv"}


def test_a_repository_without_a_fisher_is_told_before_anything_large_is_fetched(hub, name):
    HfApi().create_repo(name, repo_type="dataset")
    with pytest.raises(FisherFormatError, match="not a Fisher, or not one yet"):
        FisherInformation.from_pretrained(name)


def test_two_pushes_at_once_one_wins_and_the_other_is_told(hub, name, folder, second):
    fisher, other = FisherInformation.from_pretrained(folder), FisherInformation.from_pretrained(second)
    fisher.push_to_hub(name)
    winner = []
    # while the other's commit is on its way, this one gets in
    hub.faults.append(Fault(rf"POST .*{name}/commit/", before=lambda: winner.append(_push_elsewhere(name, hub))))
    with pytest.raises(HubError, match="somebody else pushed to it in the meantime"):
        other.push_to_hub(name)
    assert FisherInformation.from_pretrained(name).place.commit == winner[0]
    assert other.push_to_hub(name).plan.parent == winner[0]


def _push_elsewhere(name: str, hub) -> str:
    """A commit by another process, past the fault that is being served."""
    return _run(
        f"print(api.upload_file(path_or_fileobj=b'x', path_in_repo='NOTICE', repo_id={name!r}, repo_type='dataset').oid)"
    )


def _run(code: str) -> str:
    code = f"from huggingface_hub import HfApi; api = HfApi(); {code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(
    ("fault", "kind", "part"),
    [
        (
            dict(
                pattern="GET .*/revision|GET /api/datasets/",
                status=401,
                times=99,
                message="Invalid credentials in Authorization header",
            ),
            HubError,
            "the token was refused",
        ),
        (dict(pattern="GET /api/datasets/", status=403, times=99, code="GatedRepo"), HubError, "Accept the licence at"),
        (dict(pattern="GET /api/datasets/", status=404, times=99, code="RepoNotFound"), HubError, "no such repository"),
        (
            dict(pattern="GET /api/datasets/", status=404, times=99, code="RevisionNotFound"),
            HubError,
            "no branch, tag or commit",
        ),
        (
            dict(pattern="HEAD .*/resolve/.*fisher-0|/xet-read-token/", status=404, times=99, code="EntryNotFound"),
            HubError,
            "no such file",
        ),
    ],
    ids=["401", "403", "404-repo", "404-revision", "404-file"],
)
def test_refusals_of_a_pull_are_told_in_words(hub, name, folder, tmp_path, fault, kind, part):
    FisherInformation.from_pretrained(folder).push_to_hub(name)
    hub.faults.append(Fault(**fault))
    with pytest.raises(kind) as error:
        FisherInformation.from_pretrained(name, cache_dir=tmp_path)
    assert part in str(error.value)
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again(hub, name, folder, status):
    for pattern in ("GET /api/datasets/", "/preupload/", "/repos/create", "/commit/", rf"HEAD .*{name}/resolve/"):
        hub.faults.append(Fault(pattern, status=status))
    FisherInformation.from_pretrained(folder).push_to_hub(name)
    assert_same(FisherInformation.from_pretrained(name), FisherInformation.from_pretrained(folder))


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, name, folder):
    hub.faults.append(Fault("POST .*/commit/", truncate=0))
    pushed = FisherInformation.from_pretrained(folder).push_to_hub(name)
    assert len([entry for entry in hub.log if "/commit/" in entry[1]]) == 1
    assert FisherInformation.from_pretrained(name).place.commit == pushed.commit


def test_a_lost_answer_to_a_commit_that_deletes_is_no_second_commit_either(hub, name, folder, second):
    FisherInformation.from_pretrained(second).push_to_hub(name)
    hub.faults.append(Fault("POST .*/commit/", truncate=0))
    pushed = FisherInformation.from_pretrained(folder).push_to_hub(name)
    assert pushed.commit == HfApi().repo_info(name, repo_type="dataset").sha
    assert FisherInformation.from_pretrained(name).place.commit == pushed.commit


def test_a_commit_that_only_deletes_is_not_taken_for_done_when_it_failed(hub, name):
    push_files({"a.txt": b"a", "b.txt": b"b"}, name, "dataset", message="two")
    hub.faults.append(Fault("POST .*/commit/", status=503))
    push_files({"a.txt": b"a"}, name, "dataset", message="one", delete=["b.*"])
    assert "b.txt" not in files_of(name)


def test_two_first_pushes_do_not_mix(hub, name, folder):
    """Somebody else creates the repository, and fills it, after this push has looked and found none."""
    FisherInformation.from_pretrained(folder).push_to_hub(f"{name}-warm")

    def meanwhile():
        _run(
            f"api.create_repo({name!r}, repo_type='dataset'); api.upload_file(path_or_fileobj=b'x', "
            f"path_in_repo='x.txt', repo_id={name!r}, repo_type='dataset')"
        )

    hub.faults.append(Fault("POST /api/repos/create", before=meanwhile))
    with pytest.raises(HubError, match="did not exist when this push began"):
        FisherInformation.from_pretrained(folder).push_to_hub(name)
    assert files_of(name) == {".gitattributes", "x.txt"}


@pytest.mark.parametrize("status", [401, 403, 404])  # the client itself waits for the others
def test_a_hub_that_does_not_list_its_files_is_not_taken_for_a_damaged_fisher(hub, name, folder, tmp_path, status):
    pushed = FisherInformation.from_pretrained(folder).push_to_hub(name)
    hub.faults.append(Fault("GET .*/tree/", status=status, times=99))
    fisher = FisherInformation.from_pretrained(name, pushed.commit, cache_dir=tmp_path)
    assert_same(fisher, FisherInformation.from_pretrained(folder))


@pytest.mark.parametrize("revision", ["v1", "a" * 40, "refs/pr/1"])
def test_a_push_goes_to_a_branch_and_not_to_what_only_looks_like_one(hub, name, folder, second, revision):
    FisherInformation.from_pretrained(folder).push_to_hub(name, tag="v1")
    with pytest.raises(HubError, match="Name a branch"):
        FisherInformation.from_pretrained(second).push_to_hub(name, revision=revision)
    with pytest.raises(HubError, match="made against `main`"):
        FisherInformation.from_pretrained(second).push_to_hub(name, revision="new", create_pr=True)
    assert [branch.name for branch in HfApi().list_repo_refs(name, repo_type="dataset").branches] == ["main"]


def test_a_tag_that_somebody_else_took_in_the_meantime_is_told(hub, name, folder):
    FisherInformation.from_pretrained(folder).push_to_hub(name)
    push_files({"NOTICE": b"x"}, name, "dataset", message="x")
    first = HfApi().list_repo_commits(name, repo_type="dataset")[-1].commit_id
    hub.faults.append(
        Fault(
            "POST .*/tag/", before=lambda: _run(f"api.create_tag({name!r}, tag='v1', revision={first!r}, repo_type='dataset')")
        )
    )
    with pytest.raises(HubError, match="somebody else gave the tag 'v1'"):
        push_files({"NOTICE": b"y"}, name, "dataset", message="y", tag="v1")


def test_no_secret_is_repeated_even_where_the_hub_repeats_it(hub, name, monkeypatch):
    hub.faults.append(Fault("GET ", status=403, message="no access for odd-token-1"))
    with pytest.raises(HubError) as error:
        FisherInformation.from_pretrained(name, token="odd-token-1")
    assert "odd-token-1" not in str(error.value)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://me:hunter2@127.0.0.1:1")
    assert "hunter2" not in page(name)


@pytest.mark.parametrize("status", [403, 500])
def test_content_that_is_refused_is_told_in_words(hub, name, base_folder, tmp_path, status, capsys):
    if hub.xet and status == 500:
        pytest.skip("the client's Xet asks for four minutes")
    folder = training.make_fisher(base_folder, seed=300 + status).save_pretrained(tmp_path / "f", codec="float32")
    hub.faults.append(Fault("PUT /lfs/|/xet-write-token/", status=status, times=99))
    code = main(["push", "fisher", "--fisher", str(folder), "--repo_id", name])
    said = capsys.readouterr().err
    assert code == (2 if status == 403 else 1), said
    assert "cannot push to the dataset" in said
    assert files_of(name) == {".gitattributes"}


def test_a_hub_that_stays_down_is_a_failure_of_the_hub(hub, name, folder, capsys):
    hub.faults.append(Fault(rf"POST .*{name}/commit/", status=500, times=99))
    assert main(["push", "fisher", "--fisher", str(folder), "--repo_id", name]) == 1
    said = capsys.readouterr()
    assert "failed with 500" in said.err
    assert "Traceback" not in said.err
    hub.faults.clear()
    assert main(["push", "fisher", "--fisher", str(folder), "--repo_id", name]) == 0


def test_a_damaged_copy_in_the_cache_is_refused_with_the_way_out(hub, name, folder, tmp_path):
    pushed = FisherInformation.from_pretrained(folder).push_to_hub(name)
    place = FisherInformation.from_pretrained(name, cache_dir=tmp_path).place  # the same file is shared by all of a cache
    blob = (place.folder / "fisher-00001-of-00001.safetensors").resolve()
    content = bytearray(blob.read_bytes())
    content[-3] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(content)
    with pytest.raises(FisherFormatError, match=f"hf cache rm dataset/{name}"):
        FisherInformation.from_pretrained(name, pushed.commit, cache_dir=tmp_path)


def test_the_command_line_pushes_pulls_and_copies(hub, name, folder, tmp_path, capsys):
    assert main(["push", "fisher", "--fisher", str(folder), "--repo_id", name, "--dry_run"]) == 0
    assert "Nothing was sent" in capsys.readouterr().out
    assert main(["push", "fisher", "--fisher", str(folder), "--repo_id", name, "--tag", "v1"]) == 0
    pushed = capsys.readouterr().out
    commit = HfApi().repo_info(name, repo_type="dataset").sha
    assert f"--fisher {name} --fisher_revision {commit}" in pushed
    out = tmp_path / "copy"
    assert main(["pull", "fisher", "--repo_id", f"{name}@v1", "--output_dir", str(out)]) == 0
    assert commit in capsys.readouterr().out
    assert_same(FisherInformation.from_pretrained(out), FisherInformation.from_pretrained(folder))
    assert main(["pull", "fisher", "--repo_id", name, "--output_dir", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["pull", "fisher", "--repo_id", name, "--output_dir", str(out), "--overwrite"]) == 0
    (out / "notes.txt").write_text("mine")
    assert main(["pull", "fisher", "--repo_id", name, "--output_dir", str(out), "--overwrite"]) == 2
    assert (out / "notes.txt").read_text() == "mine"
    assert main(["pull", "fisher", "--repo_id", "alice/nothing"]) == 2
    assert "no such repository" in capsys.readouterr().err


def test_a_killed_push_leaves_the_old_state_or_the_new_one_and_goes_on(hub, name, base_folder, folder, tmp_path):
    """Killed at a random request, ten times with Xet; each time a pull sees one Fisher or the other, whole."""
    chance = random.Random(7)
    old = FisherInformation.from_pretrained(folder)
    old.push_to_hub(name)
    kills, before_commit = 0, 0
    rounds = 10 if hub.xet else 4
    for number in range(rounds):
        made = training.make_fisher(base_folder, seed=100 + number)
        new = FisherInformation.from_pretrained(
            made.save_pretrained(tmp_path / f"{number}", codec="float32", max_shard_size="200KB")
        )
        words = ("push", "fisher", "--fisher", tmp_path / f"{number}", "--repo_id", name)
        process = subprocess.Popen(command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        left = iter(range(chance.randrange(1, 12) if number % 2 else 999))  # every other one when the commit is made

        def kill(process=process, left=left):
            if next(left, None) is None:
                process.kill()

        hub.faults += [Fault("/commit/", times=999, before=kill, after=process.kill), Fault(".*", times=999, before=kill)]
        process.wait(timeout=120)
        hub.faults.clear()
        kills += process.returncode == -9
        found = FisherInformation.from_pretrained(name)  # checks every byte of it
        assert found.sha256 in {old.sha256, new.sha256}
        before_commit += found.sha256 == old.sha256
        new.push_to_hub(name)
        assert FisherInformation.from_pretrained(name).sha256 == new.sha256
        old = new
    assert kills == rounds
    assert 1 <= before_commit <= rounds // 2, "some while the content was on its way, some after the commit"


def test_a_push_that_was_broken_off_does_not_send_again_what_arrived(hub, name, base_folder, tmp_path):
    made = training.make_fisher(base_folder, seed=200)
    fisher = FisherInformation.from_pretrained(made.save_pretrained(tmp_path / "f", codec="float32"))
    hub.faults.append(Fault(".*/commit/", status=403))
    with pytest.raises(HubError, match="may not do that"):
        fisher.push_to_hub(name)
    sent = [entry for entry in hub.log if entry[0] in ("PUT", "POST") and ("/lfs/" in entry[1] or "/cas/" in entry[1])]
    hub.log.clear()
    fisher.push_to_hub(name)
    again = [entry for entry in hub.log if entry[0] == "PUT" or "/xorbs/" in entry[1]]
    assert sent
    assert not again


def test_the_token_is_in_nothing_that_is_said_or_sent(hub, name, folder, tmp_path):
    done = [
        subprocess.run(command(*words), capture_output=True, text=True)
        for words in (
            ("push", "fisher", "--fisher", folder, "--repo_id", name),
            ("push", "fisher", "--fisher", folder, "--repo_id", "bob/taken"),
            ("pull", "fisher", "--repo_id", name, "--output_dir", tmp_path / "copy"),
            ("pull", "fisher", "--repo_id", "alice/nothing"),
        )
    ]
    assert [run.returncode for run in done] == [0, 2, 0, 2]
    assert all("Traceback" not in run.stderr for run in done)
    texts = [run.stdout + run.stderr for run in done]
    texts += [path.read_text() for path in (tmp_path / "copy").rglob("*") if path.suffix in (".md", ".json")]
    for path in files_of(name) - {"trace.png"}:
        texts.append(Path(hf_hub_download(name, path, repo_type="dataset")).read_bytes().decode(errors="replace"))
    assert not [text for text in texts if TOKEN in text]


def test_manifests_in_the_wrong_place_are_caught_before_a_push(hub, name, folder, tmp_path):
    """A file that was changed after it was checked is not published."""
    fisher = FisherInformation.from_pretrained(folder).save_pretrained(tmp_path / "mine", codec="float32")
    loaded = FisherInformation.from_pretrained(fisher)
    config = json.loads((fisher / "fisher_config.json").read_text())
    config["totals"]["zeros"] += 1
    (fisher / "fisher_config.json").write_text(json.dumps(config))
    with pytest.raises(FisherFormatError, match="edited after it was written"):
        loaded.push_to_hub(name)
    with pytest.raises(HubError, match="no such repository"):
        FisherInformation.from_pretrained(name)


def test_values_that_were_pulled_are_the_files_bit_by_bit(hub, name, folder):
    FisherInformation.from_pretrained(folder).push_to_hub(name)
    place = FisherInformation.from_pretrained(name).place
    shard = "fisher-00001-of-00001.safetensors"
    left, right = load_file(place.folder / shard), load_file(folder / shard)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_an_unreachable_endpoint_is_told(folder):
    script = f"""
from hf_ewc import FisherInformation, HubUnavailableError
from hf_ewc.hub import patience
patience.WAITS = (0.1,)
local = FisherInformation.from_pretrained({str(folder)!r})
for act in (lambda: FisherInformation.from_pretrained("alice/x"), lambda: local.push_to_hub("alice/x")):
    try:
        act()
    except HubUnavailableError as error:
        print(error)
"""
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.stdout.count("http://127.0.0.1:9") >= 2, done.stderr[-2000:]
    assert HubUnavailableError  # the name that users catch


def test_a_dry_run_refuses_what_the_push_would_refuse(hub, name, folder, second):
    FisherInformation.from_pretrained(folder).push_to_hub(name, tag="v1")
    with pytest.raises(HubError, match="A tag is a promise"):
        FisherInformation.from_pretrained(second).push_to_hub(name, tag="v1", dry_run=True)


def test_what_was_done_is_said_tag_visibility_and_files_that_went(hub, name, folder, second, capsys):
    words = ["push", "fisher", "--repo_id", name]
    assert main([*words, "--fisher", str(folder), "--tag", "v1", "--private", "no"]) == 0
    said = capsys.readouterr().out
    assert "public, at commit" in said
    assert ", tag v1" in said
    assert main([*words, "--fisher", str(second), "--private", "yes"]) == 0
    said = capsys.readouterr().out
    assert "deleted: fisher-00001-of-00001.safetensors" in said
    assert "public, at commit" in said, "an existing repository stays as it is"


@pytest.mark.parametrize("repo_id", ["x", "a/b/c", "https://huggingface.co/datasets/alice/x", "alice/-x"])
def test_an_id_of_the_wrong_form_is_told_at_once(hub, folder, repo_id, capsys):
    assert main(["push", "fisher", "--fisher", str(folder), "--repo_id", repo_id]) == 2
    assert "has the form USER/NAME" in capsys.readouterr().err
    assert main(["pull", "fisher", "--repo_id", repo_id]) == 2
    assert "has the form USER/NAME" in capsys.readouterr().err
    assert not hub.log


def test_a_model_is_told_apart_from_a_fisher_here_and_there(hub, name, base_folder):
    api = HfApi()
    api.create_repo(name)
    with pytest.raises(DataError, match="holds no"):
        BaseModel.resolve(name)
    api.upload_folder(repo_id=name, folder_path=base_folder)
    with pytest.raises(FisherFormatError, match="is a model on the Hub, and a Fisher is a dataset repository"):
        FisherInformation.from_pretrained(name)
    with pytest.raises(FisherFormatError, match="It is a model"):
        FisherInformation.from_pretrained(base_folder)


def test_a_streamed_fisher_is_pushed_as_it_is_stored(hub, name, folder):
    FisherInformation.from_pretrained(folder).push_to_hub(name)
    streamed = FisherInformation.from_pretrained(name, streaming=True)
    streamed.push_to_hub(f"{name}-copy")
    assert FisherInformation.from_pretrained(f"{name}-copy").manifest.storage.codec == "float32"


def test_a_server_without_xet_is_named_as_that(hub, name, folder):
    if hub.xet:
        pytest.skip("this one speaks it")
    env = {**os.environ, "HF_HUB_DISABLE_XET": "0"}
    words = command("push", "fisher", "--fisher", folder, "--repo_id", name)
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "HF_HUB_DISABLE_XET=1" in done.stderr


def test_a_download_that_breaks_off_goes_on(hub, name, folder, tmp_path):
    FisherInformation.from_pretrained(folder).push_to_hub(name)
    fault = Fault("GET /cdn/|GET /cas/xorb/", truncate=1000)
    hub.faults.append(fault)
    assert_same(FisherInformation.from_pretrained(name, cache_dir=tmp_path), FisherInformation.from_pretrained(folder))
    assert fault.times == 0, "it did break off"


def test_content_that_was_changed_on_its_way_is_refused(hub, name, folder, tmp_path):
    """The client itself does not notice it."""
    FisherInformation.from_pretrained(folder).push_to_hub(name)
    hub.faults.append(Fault("GET /cdn/|GET /cas/xorb/", corrupt=True, times=99))
    with pytest.raises(FisherFormatError, match=r"bytes of it were changed|not a whole safetensors file"):
        FisherInformation.from_pretrained(name, cache_dir=tmp_path)


def test_a_disk_that_is_full_is_one_line_and_the_next_pull_goes_on(hub, name, folder, tmp_path):
    FisherInformation.from_pretrained(folder).push_to_hub(name)
    code = """
import resource, signal, sys
from hf_ewc.cli.main import main
import hf_ewc.artifact
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # as if there were no more room
sys.exit(main(sys.argv[1:]))
"""
    env = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    words = ["pull", "fisher", "--repo_id", name]
    full = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=env, timeout=120)
    assert full.returncode == 1, full.stderr[-2000:]
    assert "Traceback" not in full.stderr, full.stderr[-900:]
    done = subprocess.run(command(*words), capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_name_that_is_taken_is_a_conflict(hub, name, folder):
    hub.faults.append(Fault("POST /api/repos/create", status=409))
    with pytest.raises(HubError, match="conflict"):
        FisherInformation.from_pretrained(folder).push_to_hub(name)

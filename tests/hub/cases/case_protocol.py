"""The test Hub answers the genuine clients as the real one does, faults included: what the other cases rely on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    ModelCard,
    errors,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError
from server import Fault

OTHER = "hf_other"  # bob's token
CONTENT = "GET (/cdn/|/cas/xorb/)"


@pytest.fixture
def api(hub):
    """Alice's; its address and token are in the environment."""
    return HfApi()


@pytest.fixture
def repo(api, name):
    """A new model repository of alice's."""
    api.create_repo(name)
    return name


def add(api, repo, path="weights.bin", content=b"weights", **settings):
    return api.create_commit(repo, [CommitOperationAdd(path, content)], commit_message=f"add {path}", **settings)


def status_of(error) -> int:
    return error.value.response.status_code


def test_this_leg_takes_the_path_that_it_is_named_after(hub, api, repo):
    add(api, repo)
    assert bool(hub.count("POST /cas/v1/shards")) == hub.xet
    assert bool(hub.count("PUT /lfs/")) == (not hub.xet)


def test_a_repository_is_created_once_and_only_in_ones_own_namespace(api, name):
    url = api.create_repo(name, private=True)
    assert url == api.create_repo(name, exist_ok=True)
    assert api.repo_info(name).private
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo(name)
    assert status_of(error) == 409
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo("bob/not-alices")
    assert status_of(error) == 403
    api.delete_repo(name)
    assert not api.repo_exists(name)


def test_the_token_decides_who_asks(api):
    assert api.whoami()["name"] == "alice"
    assert api.whoami(token=OTHER)["name"] == "bob"
    with pytest.raises(HfHubHTTPError, match="Invalid"):
        api.whoami(token="hf_nobody")


def test_a_large_file_comes_back_and_a_second_upload_sends_nothing(hub, api, repo, tmp_path):
    content = os.urandom(6 << 20) + bytes(6 << 20)  # over the threshold of LFS whatever its name; random and well packed parts
    add(api, repo, "folder/large", content)
    cached = hf_hub_download(repo, "folder/large")
    assert Path(cached).read_bytes() == content
    assert api.get_paths_info(repo, "folder/large")[0].lfs.size == len(content)
    head = api.repo_info(repo).sha
    hub.reset()
    add(api, repo, "folder/large", content)
    assert api.repo_info(repo).sha == head
    assert hub.count("PUT /lfs/|POST /cas/v1/xorbs/|/commit/") == 0


@pytest.mark.parametrize("kind", ["floats", "small", "text"])
def test_content_of_every_kind_survives(api, repo, kind):
    floats = np.arange(300_000, dtype=np.float32).tobytes()  # are grouped by byte before Xet compresses them
    content = {"floats": floats, "small": b"ab", "text": b"abc\n" * 70_000}[kind]
    add(api, repo, f"{kind}.bin", content)
    assert Path(hf_hub_download(repo, f"{kind}.bin")).read_bytes() == content


def test_a_folder_is_uploaded_and_downloaded_again(api, repo, tmp_path):
    files = {"a.txt": b"a", "b/c.bin": os.urandom(10_000), "b/d/e.json": b"{}"}
    for path, content in files.items():
        (tmp_path / "up" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / path).write_bytes(content)
    api.upload_folder(repo_id=repo, folder_path=tmp_path / "up")
    snapshot = Path(snapshot_download(repo, allow_patterns=["a.txt", "b/*"]))
    assert {path: (snapshot / path).read_bytes() for path in files} == files
    api.create_commit(repo, [CommitOperationDelete("b/d/e.json")], commit_message="smaller")
    assert sorted(api.list_repo_files(repo)) == [".gitattributes", "a.txt", "b/c.bin"]
    assert api.list_repo_commits(repo)[0].title == "smaller"


def test_a_stale_parent_is_refused_and_one_of_two_commits_at_once_wins(hub, api, repo):
    start = api.repo_info(repo).sha
    together = threading.Barrier(2)
    hub.faults.append(Fault("POST .*/commit/", times=2, before=together.wait))

    def push(number: int):
        try:
            return add(api, repo, f"{number}.txt", b"x", parent_commit=start).oid
        except HfHubHTTPError as error:
            return error.response.status_code

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(push, range(2)))
    assert results.count(412) == 1
    assert api.repo_info(repo).sha in results
    assert len(api.list_repo_files(repo)) == 2


def test_a_branch_with_a_slash_and_a_tag_are_revisions(api, repo):
    add(api, repo, "a.txt", b"first")
    api.create_tag(repo, tag="v1")
    api.create_branch(repo, branch="exp/a")
    add(api, repo, "a.txt", b"second", revision="exp/a")
    contents = {r: Path(hf_hub_download(repo, "a.txt", revision=r)).read_text() for r in ("main", "v1", "exp/a")}
    assert contents == {"main": "first", "v1": "first", "exp/a": "second"}
    assert {ref.name for ref in api.list_repo_refs(repo).branches} == {"main", "exp/a"}
    with pytest.raises(HfHubHTTPError) as error:
        api.create_tag(repo, tag="v1")
    assert status_of(error) == 409
    api.create_tag(repo, tag="v1", exist_ok=True)


def test_what_is_missing_is_named(api, repo, name):
    with pytest.raises(errors.RepositoryNotFoundError):
        hf_hub_download(f"{name}-missing", "a.txt")
    with pytest.raises(errors.RevisionNotFoundError):
        hf_hub_download(repo, "a.txt", revision="v9")
    with pytest.raises(errors.EntryNotFoundError):
        hf_hub_download(repo, "a.txt")
    with pytest.raises(errors.EntryNotFoundError):
        list(api.list_repo_tree(repo, "folder"))


def test_a_private_repository_does_not_exist_for_others(api, repo, tmp_path):
    add(api, repo)
    api.update_repo_settings(repo, private=True)
    for token in (OTHER, False):
        with pytest.raises(errors.RepositoryNotFoundError):
            hf_hub_download(repo, "weights.bin", token=token, cache_dir=tmp_path)
    assert Path(hf_hub_download(repo, "weights.bin")).read_bytes() == b"weights"


def test_a_gated_repository_shows_its_page_but_not_its_files(api, repo, tmp_path):
    add(api, repo)
    api.update_repo_settings(repo, gated="manual")
    assert api.model_info(repo, token=OTHER).gated == "manual"
    with pytest.raises(errors.GatedRepoError):
        hf_hub_download(repo, "weights.bin", token=OTHER, cache_dir=tmp_path)
    with pytest.raises(HfHubHTTPError) as error:
        add(api, repo, "mine.txt", b"bob's", token=OTHER)
    assert status_of(error) == 403


def test_others_propose_changes_as_a_pull_request(api, repo):
    proposed = add(api, repo, "weights.bin", b"better", create_pr=True, token=OTHER)
    assert proposed.pr_revision == "refs/pr/1"
    assert "weights.bin" not in api.list_repo_files(repo)
    assert Path(hf_hub_download(repo, "weights.bin", revision="refs/pr/1")).read_bytes() == b"better"


def test_the_tree_has_files_and_folders(api, repo):
    operations = [CommitOperationAdd(f"exp a/b/{i}.txt", b"x") for i in range(2)]
    api.create_commit(repo, operations, commit_message="two")
    everything = [".gitattributes", "exp a", "exp a/b", "exp a/b/0.txt", "exp a/b/1.txt"]
    assert [item.path for item in api.list_repo_tree(repo, recursive=True)] == everything
    assert [item.path for item in api.list_repo_tree(repo, "exp a")] == everything[2:3]
    assert [item.path for item in api.get_paths_info(repo, ["exp a", "exp a/b/1.txt", "none"])] == ["exp a", "exp a/b/1.txt"]


def test_ranges_are_served_and_counted(hub, api, repo):
    content = os.urandom(300_000)
    add(api, repo, "weights.bin", content)
    hub.reset()
    with HfFileSystem().open(f"{repo}/weights.bin", cache_type="none") as file:
        file.seek(100_000)
        assert file.read(500) == content[100_000:100_500]
    assert hub.bytes_served == 500


def test_a_wrong_card_is_refused_before_anything_is_sent(hub, api, repo):
    with pytest.raises(ValueError, match="YAML"):
        add(api, repo, "README.md", b"---\ntags: [unclosed\n---\n")
    assert hub.count("/commit/") == 0
    ModelCard("---\ntags: [ewc]\nlicense: gemma\n---\nText").push_to_hub(repo)
    assert api.model_info(repo).card_data.license == "gemma"


@pytest.mark.parametrize("status", [429, 503])
def test_the_client_repeats_what_a_busy_hub_refuses(hub, api, repo, status):
    hub.faults.append(Fault("POST .*/preupload/", status, headers={"Retry-After": "0"}))
    add(api, repo)
    assert hub.count("POST .*/preupload/") == 2
    assert "weights.bin" in api.list_repo_files(repo)


def test_a_broken_download_is_noticed(hub, api, repo):
    content = os.urandom(2_000_000)
    add(api, repo, "weights.bin", content)
    hub.reset()
    hub.faults.append(Fault(CONTENT, truncate=100_000))
    assert Path(hf_hub_download(repo, "weights.bin")).read_bytes() == content
    assert hub.count(CONTENT) == 2, "the rest was asked for"
    assert hub.bytes_served >= len(content)


def test_a_changed_byte_arrives_unnoticed_by_the_client(hub, api, repo):
    """Whoever relies on the content compares its sha256: the client does so with neither LFS nor Xet."""
    content = os.urandom(50_000)
    add(api, repo, "weights.bin", content)
    hub.faults.append(Fault(CONTENT, corrupt=True))
    got = Path(hf_hub_download(repo, "weights.bin")).read_bytes()
    assert len(got) == len(content)
    assert sum(a != b for a, b in zip(got, content, strict=True)) == 1


def test_a_lost_answer_leaves_the_commit(hub, api, repo):
    hub.faults.append(Fault("POST .*/commit/", truncate=0))
    with pytest.raises(Exception, match="peer closed connection"):
        add(api, repo, "a.txt", b"a")
    assert "a.txt" in api.list_repo_files(repo)


def test_a_space_is_created_committed_to_and_runs(api, name):
    api.create_repo(name, repo_type="space", space_sdk="gradio")
    add(api, name, "app.py", b"import gradio", repo_type="space")
    assert api.space_info(name).sdk == "gradio"
    assert api.get_space_runtime(name).stage == "RUNNING"


def test_a_collection_holds_repositories_once(api, repo, name):
    api.create_repo(name, repo_type="space", space_sdk="gradio")
    title = f"Collection of {name}"
    slug = api.create_collection(title, private=True).slug
    assert api.create_collection(title, exists_ok=True).slug == slug
    api.add_collection_item(slug, repo, "model", note="adapted")
    collection = api.add_collection_item(slug, name, "space")
    with pytest.raises(HfHubHTTPError) as error:
        api.add_collection_item(slug, repo, "model")
    assert status_of(error) == 409
    with pytest.raises(HfHubHTTPError):
        api.add_collection_item(slug, f"{name}-missing", "dataset")
    with pytest.raises(HfHubHTTPError):
        api.get_collection(slug, token=OTHER)
    api.update_collection_item(slug, collection.items[0].item_object_id, note="better")
    assert not api.update_collection_metadata(slug, private=False).private
    seen = api.get_collection(slug, token=OTHER)
    items = [(item.item_id, item.item_type, item.note) for item in seen.items]
    assert items == [(repo, "model", "better"), (name, "space", None)]
    assert slug in [found.slug for found in api.list_collections(owner="alice", token=OTHER)]


def test_another_user_has_another_name_and_an_empty_cache(hub, api, repo, bob):
    add(api, repo)
    hf_hub_download(repo, "weights.bin")
    hub.reset()
    code = f"import huggingface_hub as h; print(h.whoami()['name'], h.hf_hub_download({repo!r}, 'weights.bin'))"
    answer = subprocess.run([sys.executable, "-c", code], env=bob, capture_output=True, text=True, check=True).stdout
    assert answer.startswith(f"bob {bob['HF_HOME']}")
    assert hub.count(CONTENT) == 1


def test_a_pusher_can_be_killed_at_a_given_request(hub, api, repo, bob):
    code = f"import huggingface_hub as h; h.HfApi().upload_file(path_or_fileobj=b'x', path_in_repo='x.txt', repo_id={repo!r})"
    with subprocess.Popen([sys.executable, "-c", code], env={**bob, "HF_TOKEN": "hf_owner"}) as process:
        hub.faults.append(Fault("POST .*/commit/", 503, before=process.kill))
    assert process.returncode == -signal.SIGKILL
    assert "x.txt" not in api.list_repo_files(repo)


def test_the_server_runs_by_itself(tmp_path):
    script = Path(__file__).parents[1] / "server.py"
    command = [sys.executable, script, "--port", "0", "--root", tmp_path, "--xet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert HfApi(endpoint=process.stdout.readline().strip()).whoami()["name"] == "alice"
        finally:
            process.terminate()

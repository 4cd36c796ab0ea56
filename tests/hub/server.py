"""A Hugging Face Hub on this machine, for tests: what `huggingface_hub` 2.4, `datasets` 5.2 and `transformers` 5.23 ask for.

    python tests/hub/server.py --port 7820               # and elsewhere: export HF_ENDPOINT=http://127.0.0.1:7820

    hub = Hub(tmp_path)                                  # in a test; a thread serves it
    url = hub.start()
    hub.faults.append(Fault("POST .*/commit/", 503))     # the next commit is refused, once
    hub.stop()

Files lie in a folder; repositories, branches and collections are kept in memory and end with the process. Names are always
"owner/name", and only its owner writes to a repository. Whatever has no route below is answered with 404.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fnmatch
import hashlib
import itertools
import json
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml
from loopback import ROUTES, Call, Fault, Refusal, Server, route
from starlette.responses import FileResponse, JSONResponse, Response
from xet import XetStore, keep

__all__ = ["USERS", "Fault", "Hub"]

USERS = {"hf_owner": "alice", "hf_other": "bob"}  # token -> name
LFS_THRESHOLD = 10 << 20  # as on the Hub: larger files are kept by their sha256, and those that .gitattributes names
LFS_PATTERNS = ["*.arrow", "*.bin", "*.gguf", "*.npy", "*.npz", "*.parquet", "*.png", "*.pt", "*.safetensors", "*.zip"]
FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?)\r?\n---", re.DOTALL)
serve_file = partial(FileResponse, media_type="application/octet-stream")  # knows HEAD and Range


@dataclass
class Repo:
    type: str
    id: str
    owner: str
    private: bool
    sdk: str | None = None  # of a Space
    gated: str | bool = False
    commits: dict[str, dict] = field(default_factory=dict)  # their "files" are {path: {oid (git's), size, sha256, lfs?}}
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit, as in the next two
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)  # "refs/pr/1" ...
    lock: threading.RLock = field(default_factory=threading.RLock)

    def add(self, user: str, parent: str | None, files: dict[str, dict], title: str, message: str = "") -> str:
        commit = {"parent": parent, "files": files, "title": title, "message": message, "date": now()}
        commit["authors"] = [{"user": user}]
        id = sha1([self.type, self.id, commit, time.time_ns()])
        self.commits[id] = {"id": id, **commit}
        return id

    def find(self, revision: str) -> dict:
        for prefix, names in (("refs/heads/", self.branches), ("refs/tags/", self.tags), ("", self.pulls)):
            if id := names.get(revision.removeprefix(prefix)):
                return self.commits[id]
        found = [id for id in self.commits if len(revision) >= 7 and id.startswith(revision)]
        if len(found) != 1:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[found[0]]

    def history(self, commit: dict | None) -> Iterator[dict]:
        while commit:
            yield commit
            commit = self.commits.get(commit["parent"])

    def last_change(self, commit: dict, path: str) -> dict:
        """The commit that changed a file or a folder last."""
        states = [(c, [i for i in c["files"].items() if f"{i[0]}/".startswith(f"{path}/")]) for c in self.history(commit)]
        last = [c for c, state in itertools.takewhile(lambda pair: pair[1] == states[0][1], states)][-1]
        return {key: last[key] for key in ("id", "title", "date")}


class Hub(Server):
    """The server: `users` are names by token; with `xet`, content goes through Xet rather than LFS; port 0 takes a free one."""

    content = re.compile(r"/resolve/|^/cdn/|^/cas/xorb/")

    def __init__(self, root: Path | str, users: dict[str, str] | None = None, xet: bool = False, port: int = 0):
        super().__init__(port)
        self.users, self.xet, self.page_size, self.blobs = dict(users or USERS), xet, 1000, Path(root, "blobs")
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.store = XetStore(Path(root, "xorbs"))
        self.repos: dict[tuple[str, str], Repo] = {}
        self.collections: dict[str, dict] = {}
        self.lock = threading.RLock()
        self.cdn = self.url.replace("127.0.0.1", "localhost") + "/cdn"  # another origin: clients must not send the token there

    def handle(self, call: Call, path: str) -> Any:
        token = call.headers.get("authorization", "").removeprefix("Bearer ").strip()
        call.login = self.users.get(token)
        xet_scopes = ("read", "write") if call.method == "GET" else ("write",)  # what `xet_token` gives
        if (token not in xet_scopes) if path.startswith("/cas/v") else (token and not call.login):
            raise Refusal(401, "Invalid credentials in Authorization header")
        for method, pattern, right, handler in ROUTES:
            if method == call.method and (match := pattern.fullmatch(path)):
                args = {name: unquote(part or "") for name, part in match.groupdict().items()}
                if right in ("login", "write") and not call.login:
                    raise Refusal(401, "Invalid username or password.")
                if "type" in args:
                    right = "see" if call.flag("create_pr") else right  # whoever reads a repository may propose a change
                    args["repo"] = self._repo(call.login, args.pop("type").rstrip("s/") or "model", args.pop("id"), right)
                return handler(self, call, **args)
        raise Refusal(404, f"the test Hub has no route for {call.method} {path}")

    def _repo(self, user: str | None, type: str, id: str, right: str = "see") -> Repo:
        """The repository, if the user has the right to "see" it, to "read" its content or to "write"."""
        repo = self.repos.get((type, id))
        if repo is None or (repo.private and user != repo.owner):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if right == "write" and user != repo.owner:
            raise Refusal(403, f"You don't have the rights to write to {id}; pass `create_pr=1` to create a Pull Request")
        if right == "read" and repo.gated and user != repo.owner:
            message = f"Access to {type} {id} is restricted and you are not in the authorized list."
            raise Refusal(403 if user else 401, message, "GatedRepo")
        return repo

    # ---- repositories --------------------------------------------------------------------------------------------------

    @route("GET", "/api/whoami-v2", "login")
    def whoami(self, call: Call):
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return {"type": "user", "id": sha1(call.login), "name": call.login, "isPro": False, "orgs": [], "auth": token}

    @route("POST", "/api/repos/create", "login")
    def create(self, call: Call):
        wanted = call.data()
        type, owner = wanted.get("type") or "model", wanted.get("organization") or call.login
        id = f"{owner}/{wanted['name']}"
        answer = {"url": self._url(type, id), "name": id, "id": sha1(id)}
        if owner != call.login:
            raise Refusal(403, f'You don\'t have the rights to create a {type} under the namespace "{owner}"')
        with self.lock:
            if (type, id) in self.repos:
                raise Refusal(409, f"You already created this {type} repo", url=answer["url"])  # where `exist_ok` reads it
            repo = Repo(type, id, owner, wanted.get("visibility") == "private", wanted.get("sdk"))
            attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
            first = repo.add(owner, None, {".gitattributes": self._entry(attributes.encode())}, "initial commit")
            repo.branches["main"], self.repos[type, id] = first, repo
        return answer

    @route("DELETE", "/api/repos/delete", "login")
    def delete(self, call: Call):
        wanted = call.data()
        id = f"{wanted.get('organization') or call.login}/{wanted['name']}"
        repo = self._repo(call.login, wanted.get("type") or "model", id, "write")
        return {"deleted": self.repos.pop((repo.type, repo.id)).id}

    @route("PUT", "/api/{repo}/settings", "write")
    def settings(self, call: Call, repo: Repo):
        wanted = call.data()
        repo.private = wanted.get("visibility", "private" if repo.private else "public") == "private"
        repo.gated = wanted.get("gated", repo.gated)
        return {"private": repo.private, "gated": repo.gated}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, call: Call):
        card = front_matter(call.data()["content"])
        return {"errors": [], "warnings": [] if card else [{"message": "empty or missing yaml metadata in repo card"}]}

    @route("GET", "/api/{repo}(/revision/{rev})?")
    def info(self, call: Call, repo: Repo, rev: str):
        info, expand = self._info(repo, repo.find(rev or "main"), call.flag("blobs")), call.query_params.getlist("expand")
        return {key: value for key, value in info.items() if key in (*expand, "id", "_id")} if expand else info

    @route("GET", "/api/(?P<kind>model|dataset|space)s")
    def list_repos(self, call: Call, kind: str):
        author, part = call.query_params.get("author"), call.query_params.get("search", "")
        repos = [r for r in self.repos.values() if r.type == kind and part in r.id and author in (None, r.owner)]
        return [self._info(r, r.find("main")) for r in repos if call.login == r.owner or not r.private]

    @route("GET", "/api/{repo}/runtime")
    def runtime(self, call: Call, repo: Repo):
        return {"stage": "RUNNING", "hardware": {"current": "cpu-basic", "requested": "cpu-basic"}}

    def _url(self, type: str, id: str) -> str:
        return f"{self.url}/{'' if type == 'model' else f'{type}s/'}{id}"

    def _info(self, repo: Repo, commit: dict, blobs: bool = False) -> dict:
        siblings, card = [], {}
        for path, entry in sorted(commit["files"].items()):
            siblings.append({"rfilename": path} | ({"blobId": entry["oid"], **entry} if blobs else {}))
            card = front_matter((self.blobs / entry["sha256"]).read_text("utf-8", "replace")) if path == "README.md" else card
        info = {"_id": sha1(repo.id)[:24], "id": repo.id, "author": repo.owner, "sha": commit["id"], "private": repo.private}
        info |= {"gated": repo.gated, "disabled": False, "downloads": 0, "likes": 0, "tags": card.get("tags") or []}
        about = {"lastModified": commit["date"], "siblings": siblings, "cardData": card, "sdk": repo.sdk, "modelId": repo.id}
        return info | about

    # ---- reading -------------------------------------------------------------------------------------------------------

    @route("GET", "/api/{repo}/tree/{rev}(/{path})?")
    def tree(self, call: Call, repo: Repo, rev: str, path: str):
        commit, prefix, found = repo.find(rev), f"{path}/" if path else "", set()
        for parts in [name.removeprefix(prefix).split("/") for name in commit["files"] if name.startswith(prefix)]:
            depths = range(1, len(parts) + 1) if call.flag("recursive") else (1,)
            found |= {prefix + "/".join(parts[:depth]) for depth in depths}
        if path and not found:
            raise Refusal(404, f'{path} does not exist on "{rev}"', "EntryNotFound")
        rest = sorted(name for name in found if name > call.query_params.get("cursor", ""))
        page = rest[: self.page_size]
        headers = {} if page == rest else {"Link": f'<{call.url.include_query_params(cursor=page[-1])}>; rel="next"'}
        return JSONResponse(self._listing(repo, commit, page, call.flag("expand")), headers=headers)

    @route("POST", "/api/{repo}/paths-info/{rev}")
    def paths_info(self, call: Call, repo: Repo, rev: str):
        form = parse_qs(call.content.read().decode())
        return self._listing(repo, repo.find(rev), form.get("paths", []), form.get("expand", [""])[0].lower() == "true")

    def _listing(self, repo: Repo, commit: dict, paths: list[str], expand: bool) -> list[dict]:
        """Files and folders of a commit, unknown paths left out."""
        items = []
        for path in paths:
            inside = sorted(item for item in commit["files"].items() if item[0].startswith(f"{path}/"))
            item = {"type": "directory", "path": path, "oid": sha1(inside), "size": 0}
            if entry := commit["files"].get(path):
                item = {"type": "file", "path": path, **entry}
                item |= {"xetHash": self.store.hash_of[entry["sha256"]]} if entry["sha256"] in self.store.hash_of else {}
            if entry or inside:
                items.append(item | ({"lastCommit": repo.last_change(commit, path)} if expand else {}))
        return items

    @route("GET", "/api/{repo}/refs")
    def refs(self, call: Call, repo: Repo):
        def listed(names: dict[str, str], prefix: str) -> list[dict]:
            return [{"name": name, "ref": prefix + name, "targetCommit": commit} for name, commit in names.items()]

        refs = {"branches": listed(repo.branches, "refs/heads/"), "tags": listed(repo.tags, "refs/tags/"), "converts": []}
        return refs | {"pullRequests": listed(repo.pulls, "")}

    @route("GET", "/api/{repo}/commits/{rev}")
    def commits(self, call: Call, repo: Repo, rev: str):
        return [{key: c[key] for key in c if key not in ("files", "parent")} for c in repo.history(repo.find(rev))]

    @route("GET HEAD", "/{repo}/resolve/{rev}/{path}", "read")
    def resolve(self, call: Call, repo: Repo, rev: str, path: str):
        commit = repo.find(rev)
        entry, headers = commit["files"].get(path), {"X-Repo-Commit": commit["id"]}
        if entry is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers)
        headers["ETag"] = f'"{entry["oid"]}"'
        if "lfs" not in entry:
            return serve_file(self.blobs / entry["sha256"], headers=headers)
        headers |= {"X-Linked-Size": str(entry["size"]), "X-Linked-Etag": f'"{entry["sha256"]}"'}
        if self.xet and (xet_hash := self.store.hash_of.get(entry["sha256"])):
            token = f"{self.url}/api/{repo.type}s/{repo.id}/xet-read-token/{commit['id']}"
            headers |= {"X-Xet-Hash": xet_hash, "X-Xet-Refresh-Route": token, "Link": f'<{token}>; rel="xet-auth"'}
        return Response(status_code=302, headers=headers | {"Location": f"{self.cdn}/{entry['sha256']}?signature=1"})

    @route("GET HEAD", "/cdn/{sha256}")
    def cdn_file(self, call: Call, sha256: str):
        if "authorization" in call.headers:
            raise Refusal(400, "the token was sent to the CDN: it must stay with the Hub")
        return serve_file(self.blobs / sha256, headers={"ETag": f'"{sha256}"'})

    # ---- writing -------------------------------------------------------------------------------------------------------

    @route("POST", "/api/{repo}/preupload/{rev}", "write")
    def preupload(self, call: Call, repo: Repo, rev: str):
        """How each file is to be sent, and what lies at its path now, so that the client can leave out the unchanged."""
        answer, files = [], repo.find(rev)["files"]
        for path, size in [(file["path"], file["size"]) for file in call.data()["files"]]:
            lfs = size > LFS_THRESHOLD or any(fnmatch.fnmatch(path.split("/")[-1], pattern) for pattern in LFS_PATTERNS)
            old = files.get(path, {})
            mode, oid = "lfs" if lfs else "regular", old.get("sha256" if "lfs" in old else "oid")
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    @route("POST", "/api/{repo}/commit/{rev}", "write")
    def commit(self, call: Call, repo: Repo, rev: str):
        """All changes or none, on a branch, a pull request, or a new pull request (`create_pr=1`)."""
        pull, ref = call.flag("create_pr"), rev.removeprefix("refs/heads/")
        lines = [json.loads(line) for line in call.content.read().splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with repo.lock:
            parent = repo.find(ref)
            if not parent["id"].startswith(header.get("parentCommit") or ""):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            if not pull and ref not in (*repo.branches, *repo.pulls):
                raise Refusal(400, f"Cannot commit to {ref}: it is not a branch")
            files = dict(parent["files"])
            for line in lines:
                self._change(files, line["key"], line["value"])
            id = repo.add(call.login, parent["id"], files, header["summary"], header.get("description", ""))
            ref = f"refs/pr/{len(repo.pulls) + 1}" if pull else ref
            (repo.pulls if ref.startswith("refs/pr/") else repo.branches)[ref] = id
        url = self._url(repo.type, repo.id)
        answer = {"success": True, "commitOid": id, "commitUrl": f"{url}/commit/{id}", "hookOutput": ""}
        return answer | ({"pullRequestUrl": f"{url}/discussions/{ref.split('/')[-1]}"} if pull else {})

    def _change(self, files: dict[str, dict], operation: str, value: dict) -> None:
        path = value.get("path", "")
        if operation == "file":
            content = base64.b64decode(value["content"])
            files[path] = self._entry(content)
            if path == "README.md":
                front_matter(content.decode("utf-8", "replace"))
        elif operation == "lfsFile":
            if not (blob := self.blobs / value["oid"]).exists():
                raise Refusal(400, f"{path}: the LFS object {value['oid']} was not uploaded")
            lfs = {"oid": value["oid"], "sha256": value["oid"], "size": blob.stat().st_size, "pointerSize": 134}
            files[path] = {"oid": sha1(lfs), "size": lfs["size"], "sha256": lfs["oid"], "lfs": lfs}
        elif operation == "deletedFile" and files.pop(path, None) is None:
            raise Refusal(404, f"{path}: a file with this name doesn't exist", "EntryNotFound")
        elif operation == "deletedFolder":
            for name in [name for name in files if name.startswith(f"{path.rstrip('/')}/")]:
                del files[name]

    def _entry(self, content: bytes) -> dict:
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"oid": oid, "size": len(content), "sha256": keep(self.blobs, [content])}

    @route("POST DELETE", "/api/{repo}/(?P<ref>branch|tag)/{name}", "write")
    def set_ref(self, call: Call, repo: Repo, ref: str, name: str):
        """The path ends with the name of the branch or tag; that of a new tag is in the body, and the path has the revision."""
        wanted, names = call.data(), repo.branches if ref == "branch" else repo.tags
        name, revision = (wanted["tag"], name) if "tag" in wanted else (name, wanted.get("startingPoint") or "main")
        with repo.lock:
            if call.method == "DELETE" and names.pop(name, None) is None:
                raise Refusal(404, f"Reference {name} does not exist", "RevisionNotFound")
            if call.method == "POST" and name in names:
                raise Refusal(409, f"Reference {name} exists already")
            if call.method == "POST":
                names[name] = repo.find(revision)["id"]
        return {}

    @route("POST", "/{repo}.git/info/lfs/objects/batch", "see")  # not only to write: a pull request may be anyone's
    def lfs_batch(self, call: Call, repo: Repo):
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in call.data()["objects"]]
        for wanted in objects:
            if not (self.blobs / wanted["oid"]).exists():
                wanted["actions"] = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}", "header": {}}}
        return JSONResponse({"transfer": "basic", "objects": objects}, media_type="application/vnd.git-lfs+json")

    @route("PUT", "/lfs/{sha256}")
    def lfs_put(self, call: Call, sha256: str):
        return {"oid": keep(self.blobs, iter(lambda: call.content.read(1 << 20), b""), sha256)}

    # ---- Xet (see xet.py) ----------------------------------------------------------------------------------------------

    @route("GET", "/api/{repo}/xet-(?P<scope>read)-token/{rev}", "read")
    @route("GET", "/api/{repo}/xet-(?P<scope>write)-token/{rev}", "write")
    def xet_token(self, call: Call, repo: Repo, scope: str, rev: str):
        if not self.xet:
            raise Refusal(404, "Xet is not enabled on this Hub")
        url, expires = f"{self.url}/cas", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": scope, "X-Xet-Token-Expiration": str(expires)}
        return JSONResponse({"accessToken": scope, "exp": expires, "casUrl": url}, headers=headers)

    @route("POST", "/cas/v1/xorbs/default/{xorb}")
    def put_xorb(self, call: Call, xorb: str):
        self.store.add_xorb(xorb, call.content.read())
        return {"was_inserted": True}

    @route("POST", "/cas/v1/shards")
    def put_shard(self, call: Call):
        self.store.add_shard(call.content.read(), self.blobs)
        return {"result": 1}

    @route("GET", "/cas/v1/reconstructions/{file}")
    def reconstruct(self, call: Call, file: str):
        if file not in self.store.files:
            raise Refusal(404, "no file has this Xet hash")
        start, end = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("range", "bytes=0-")).groups()
        plan = self.store.plan(file, int(start), int(end) if end else None, f"{self.url}/cas/xorb")
        return Response(status_code=416) if plan is None else plan

    @route("GET", "/cas/xorb/{xorb}")
    def get_xorb(self, call: Call, xorb: str):
        return serve_file(self.store.folder / xorb)

    # ---- collections ---------------------------------------------------------------------------------------------------

    @route("GET", "/api/collections")
    def list_collections(self, call: Call):
        owner = call.query_params.get("owner")
        seen = [c for c in self.collections.values() if not c["private"] or call.login == c["owner"]["name"]]
        return [{k: c[k] for k in c if k != "position"} for c in seen if owner in (None, c["owner"]["name"])]

    @route("POST", "/api/collections", "login")
    def create_collection(self, call: Call):
        wanted = {"description": None, **call.data()}
        slug = re.sub("[^a-z0-9]+", "-", wanted["title"].lower()).strip("-")
        slug = f"{call.login}/{slug}-{sha1(wanted['title'])[:24]}"
        with self.lock:
            if slug in self.collections:
                raise Refusal(409, "This collection already exists", slug=slug)  # where `exists_ok` reads it
            about = {"slug": slug, "owner": {"type": "user", "name": call.login}, "items": [], "lastUpdated": now()}
            self.collections[slug] = wanted | about | {"position": 0, "theme": "green", "upvotes": 0}
        return self.collections[slug]

    @route("GET PATCH DELETE", "/api/collections/{owner}/{name}")
    def collection(self, call: Call, owner: str, name: str):
        collection = self._collection(call, owner, name)
        if call.method == "PATCH":
            collection.update(call.data())
            return {"data": collection}
        return self.collections.pop(f"{owner}/{name}") if call.method == "DELETE" else collection

    @route("POST", "/api/collections/{owner}/{name}/items")
    def add_item(self, call: Call, owner: str, name: str):
        collection, wanted = self._collection(call, owner, name), call.data()
        self._repo(call.login, wanted["item"]["type"], wanted["item"]["id"])
        item = {**wanted["item"], "_id": sha1(wanted["item"])[:24], "note": {"text": wanted.get("note")}}
        with self.lock:
            if any(known["_id"] == item["_id"] for known in collection["items"]):
                raise Refusal(409, f"{item['id']} is in the collection already")
            collection["items"].append(item | {"position": len(collection["items"])})
        return collection

    @route("PATCH", "/api/collections/{owner}/{name}/items/{item}")
    def change_item(self, call: Call, owner: str, name: str, item: str):
        wanted = call.data()
        for known in self._collection(call, owner, name)["items"]:
            if known["_id"] == item:
                known.update(wanted | ({"note": {"text": wanted["note"]}} if "note" in wanted else {}))
                return known
        raise Refusal(404, "No such item in the collection")

    def _collection(self, call: Call, owner: str, name: str) -> dict:
        collection = self.collections.get(f"{owner}/{name}")
        if collection is None or (collection["private"] and call.login != owner):
            raise Refusal(404, "Collection not found")
        if call.method != "GET" and call.login != owner:
            raise Refusal(403, "You don't have the rights to change this collection")
        return collection


def front_matter(text: str) -> dict:
    """The YAML at the start of a card; refuses anything else, as the Hub does when a README.md is pushed."""
    match = FRONT_MATTER.match(text)
    try:  # dates become text
        return json.loads(json.dumps(dict(yaml.safe_load(match[1]) or {}), default=str)) if match else {}
    except (yaml.YAMLError, TypeError, ValueError) as error:
        message = f"YAML metadata error: {error}"
        raise Refusal(400, message, errors=[{"message": message}], warnings=[]) from error


def sha1(value: Any) -> str:
    return hashlib.sha1(json.dumps(value).encode()).hexdigest()


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A Hugging Face Hub on this machine, for tests.")
    parser.add_argument("--port", type=int, default=7820)
    parser.add_argument("--root", help="folder for the files (default: a temporary one)")
    parser.add_argument("--xet", action="store_true", help="send content through Xet rather than LFS")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        hub = Hub(args.root or folder, xet=args.xet, port=args.port)
        print(hub.start(), *(f"HF_TOKEN={token} is {user}" for token, user in USERS.items()), sep="\n", flush=True)
        hub.thread.join()

"""A Hugging Face Hub on this machine, for tests: what `huggingface_hub` 2.4, `datasets` 5.2 and `transformers` 5.23 ask for.

    python tests/hub/server.py --root runs/hub-server    # and elsewhere: export HF_ENDPOINT=http://127.0.0.1:7820

    hub = Hub(tmp_path)                                  # in a test
    url = hub.start()                                    # a thread serves it
    hub.faults.append(Fault("POST .*/commit/", 503))     # the next commit is refused, once

Files lie in a folder, repositories and collections in memory. Names are always "owner/name", and only its owner writes to a
repository. Whatever has no route below is answered with 404.
"""

import argparse
import base64
import hashlib
import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote

import yaml
from loopback import ROUTES, Call, Fault, Refusal, Server, route
from starlette.responses import FileResponse, JSONResponse, Response
from xet import XetStore

__all__ = ["USERS", "Fault", "Hub"]

USERS = {"hf_owner": "alice", "hf_other": "bob"}  # token -> name
STARTED = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())  # the date of every commit and collection
LFS_THRESHOLD = 10 << 20  # as on the Hub: larger files are kept by their sha256, and those that .gitattributes names
LFS_SUFFIXES = (".arrow", ".bin", ".gguf", ".npy", ".npz", ".parquet", ".png", ".pt", ".safetensors", ".zip")


@dataclass
class Repo:
    type: str
    id: str
    owner: str
    url: str
    private: bool
    sdk: str | None = None  # of a Space
    gated: str | bool = False
    commits: dict[str, dict] = field(default_factory=dict)  # their "files" are {path: {oid (git's), size, sha256, lfs?}}
    refs: dict[str, str] = field(default_factory=dict)  # "refs/heads/main", "refs/tags/v1", "refs/pr/1" -> commit

    def add(self, ref: str, user: str, parent: str | None, files: dict[str, dict], title: str, message: str = "") -> str:
        id = sha1([self.url, parent, files, title, time.time_ns()])
        about = {"id": id, "title": title, "message": message, "date": STARTED, "authors": [{"user": user}]}
        self.commits[id], self.refs[ref] = {"id": id, "about": about, "parent": parent, "files": files}, id
        return id

    def find(self, revision: str) -> dict:
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            revision = self.refs.get(ref, revision)
        if revision not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[revision]


class Hub(Server):
    """The server: `users` are names by token; with `xet`, content goes through Xet rather than LFS; port 0 takes a free one."""

    def __init__(self, root: Path | str, users: dict[str, str] | None = None, xet: bool = False, port: int = 0):
        super().__init__(port)
        self.users, self.xet, self.store, self.files = users or USERS, xet, XetStore(Path(root)), Path(root)
        self.repos, self.collections = dict[tuple[str, str], Repo](), dict[str, dict]()
        self.cdn = self.url.replace("127.0.0.1", "localhost") + "/cdn"  # another origin: clients must not send the token there

    def handle(self, call: Call, path: str):
        token = call.headers.get("authorization", "").removeprefix("Bearer ").strip()
        call.login = self.users.get(token)
        known = token == "xet" if path.startswith("/cas/v") else call.login or not token  # "xet" is what `xet_token` gives
        if not known:
            raise Refusal(401, "Invalid credentials in Authorization header")
        for method, pattern, right, handler in ROUTES:
            if method == call.method and (match := pattern.fullmatch(path)):
                args = {name: unquote(part or "") for name, part in match.groupdict().items()}
                if right in ("login", "write") and not call.login:
                    raise Refusal(401, "Invalid username or password.")
                if "type" in args:
                    right = "see" if call.flag("create_pr") else right  # whoever reads a repository may propose a change
                    args["repo"] = self._repo(call, args.pop("type").rstrip("s/") or "model", args.pop("id"), right)
                if "owner" in args:
                    args["collection"] = self._collection(call, args.pop("owner"), args.pop("name"))
                return handler(self, call, **args)
        raise Refusal(404, f"the test Hub has no route for {call.method} {path}")

    def _repo(self, call: Call, type: str, id: str, right: str) -> Repo:
        """The repository, if the user has the right to "see" it, to "read" its content or to "write"."""
        repo, user = self.repos.get((type, id)), call.login
        if repo is None or (repo.private and user != repo.owner):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if right == "write" and user != repo.owner:
            raise Refusal(403, f"You don't have the rights to write to {id}; pass `create_pr=1` to create a Pull Request")
        if right == "read" and repo.gated and user != repo.owner:
            message = f"Access to {type} {id} is restricted and you are not in the authorized list."
            raise Refusal(403 if user else 401, message, "GatedRepo")
        return repo

    def _collection(self, call: Call, owner: str, name: str) -> dict:
        collection = self.collections.get(f"{owner}/{name}")
        if collection is None or (call.login != owner and (collection["private"] or call.method != "GET")):
            raise Refusal(404, "Collection not found, or not yours to change")
        return collection

    @route("GET", "/api/whoami-v2", "login")
    def whoami(self, call: Call):
        return {"type": "user", "name": call.login, "orgs": []}

    @route("POST", "/api/repos/create", "login")
    def create(self, call: Call):
        wanted = call.data()
        type, owner = wanted.get("type") or "model", wanted.get("organization") or call.login
        id = f"{owner}/{wanted['name']}"
        url = f"{self.url}/{'' if type == 'model' else f'{type}s/'}{id}"
        if owner != call.login:
            raise Refusal(403, f'You don\'t have the rights to create a {type} under the namespace "{owner}"')
        if (type, id) in self.repos:
            raise Refusal(409, f"You already created this {type} repo", url=url)  # where `exist_ok` reads it
        repo = self.repos[type, id] = Repo(type, id, owner, url, wanted.get("visibility") == "private", wanted.get("sdk"))
        first = {".gitattributes": "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)}
        first |= {"README.md": f"---\nsdk: {repo.sdk}\n---\n"} if type == "space" else {}
        repo.add("refs/heads/main", owner, None, {path: self._entry(first[path].encode()) for path in first}, "initial commit")
        return {"url": url}

    @route("DELETE", "/api/repos/delete", "login")
    def delete(self, call: Call):
        wanted = call.data()
        type, id = wanted.get("type") or "model", f"{wanted.get('organization') or call.login}/{wanted['name']}"
        self._repo(call, type, id, "write")
        return {"deleted": self.repos.pop((type, id)).id}

    @route("PUT", "/api/{repo}/settings", "write")
    def settings(self, call: Call, repo: Repo):
        wanted = {"visibility": "private" if repo.private else "public", "gated": repo.gated, **call.data()}
        repo.private, repo.gated = wanted["visibility"] == "private", wanted["gated"]
        return {"private": repo.private, "gated": repo.gated}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, call: Call):
        card = front_matter(call.data()["content"])
        return {"errors": [], "warnings": [] if card else [{"message": "empty or missing yaml metadata in repo card"}]}

    @route("GET", "/api/{repo}(/revision/{rev})?")
    def info(self, call: Call, repo: Repo, rev: str):
        commit, siblings, card = repo.find(rev or "main"), [], {}
        for path, entry in sorted(commit["files"].items()):
            siblings.append({"rfilename": path, "blobId": entry["oid"], **entry})
            card = front_matter((self.files / entry["sha256"]).read_text("utf-8")) if path == "README.md" else card
        about = {"id": repo.id, "author": repo.owner, "sha": commit["id"], "private": repo.private, "gated": repo.gated}
        about |= {"lastModified": STARTED, "cardData": card, "tags": card.get("tags"), "sdk": repo.sdk}
        return about | {"siblings": siblings}

    @route("GET", "/api/{repo}/runtime")
    @route("POST", "/api/{repo}/restart", "write")
    def runtime(self, call: Call, repo: Repo):
        return {"stage": "RUNNING", "hardware": {"current": "cpu-basic", "requested": "cpu-basic"}}

    @route("GET", "/api/{repo}/tree/{rev}(/{path})?")
    def tree(self, call: Call, repo: Repo, rev: str, path: str):
        prefix, everything = f"{path}/" if path else "", call.flag("recursive")
        inside = [item for item in self._items(repo.find(rev)).values() if item["path"].startswith(prefix)]
        if path and not inside:
            raise Refusal(404, f'{path} does not exist on "{rev}"', "EntryNotFound")
        return [item for item in inside if everything or "/" not in item["path"].removeprefix(prefix)]

    @route("POST", "/api/{repo}/paths-info/{rev}")
    def paths_info(self, call: Call, repo: Repo, rev: str):
        items = self._items(repo.find(rev))
        return [items[path] for path in parse_qs(call.content.decode())["paths"] if path in items]

    def _items(self, commit: dict) -> dict[str, dict]:
        """The files and folders of a commit, by path."""
        items = {}
        for path, entry in sorted(commit["files"].items()):
            for folder in map(str, reversed(PurePosixPath(path).parents[:-1])):  # from the outside in, without "."
                items[folder] = {"type": "directory", "path": folder, "oid": sha1([commit["id"], folder]), "size": 0}
            items[path] = {"type": "file", "path": path, **entry}
        return items

    @route("GET", "/api/{repo}/refs")
    def refs(self, call: Call, repo: Repo):
        answer = {"heads": [], "tags": [], "pr": []}
        for ref, commit in repo.refs.items():
            _, kind, name = ref.split("/", 2)
            answer[kind].append({"name": name, "ref": ref, "targetCommit": commit})
        return {"branches": answer["heads"], "tags": answer["tags"], "pullRequests": answer["pr"], "converts": []}

    @route("GET", "/api/{repo}/commits/{rev}")
    def commits(self, call: Call, repo: Repo, rev: str):
        history, commit = [], repo.find(rev)
        while commit:
            history.append(commit["about"])
            commit = repo.commits.get(commit["parent"])
        return history

    @route("GET HEAD", "/{repo}/resolve/{rev}/{path}", "read")
    def resolve(self, call: Call, repo: Repo, rev: str, path: str):
        commit = repo.find(rev)
        entry, headers = commit["files"].get(path), {"X-Repo-Commit": commit["id"]}
        if entry is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers)
        headers["ETag"] = f'"{entry["oid"]}"'
        if "lfs" not in entry:
            return FileResponse(self.files / entry["sha256"], headers=headers)
        headers |= {"X-Linked-Size": str(entry["size"]), "X-Linked-Etag": f'"{entry["sha256"]}"'}
        if self.xet and (xet_hash := self.store.hash_of.get(entry["sha256"])):
            token = f"{self.url}/api/{repo.type}s/{repo.id}/xet-read-token/{commit['id']}"
            headers |= {"X-Xet-Hash": xet_hash, "X-Xet-Refresh-Route": token, "Link": f'<{token}>; rel="xet-auth"'}
        return Response(status_code=302, headers=headers | {"Location": f"{self.cdn}/{entry['sha256']}?signature=1"})

    @route("GET HEAD", "/(cdn|cas/xorb)/{name}")
    def content(self, call: Call, name: str):
        if "authorization" in call.headers:
            raise Refusal(400, "the token was sent to the CDN: it must stay with the Hub")
        return FileResponse(self.files / name, headers={"ETag": f'"{name}"'})

    @route("POST", "/api/{repo}/preupload/{rev}", "write")
    def preupload(self, call: Call, repo: Repo, rev: str):
        """How each file is to be sent, and what lies at its path now, so that the client can leave out the unchanged."""
        answer, files = [], repo.find(rev)["files"]
        for path, size in [(file["path"], file["size"]) for file in call.data()["files"]]:
            mode = "lfs" if size > LFS_THRESHOLD or path.endswith(LFS_SUFFIXES) else "regular"
            old = files.get(path, {})
            oid = old.get("sha256" if "lfs" in old else "oid")
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    @route("POST", "/api/{repo}/commit/{rev}", "write")
    def commit(self, call: Call, repo: Repo, rev: str):
        """All changes or none, on a branch, a pull request, or a new pull request (`create_pr=1`)."""
        (header, *changes), parent = [json.loads(line) for line in call.content.splitlines()], repo.find(rev)
        wanted, pull = header["value"], 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        ref = f"refs/pr/{pull}" if call.flag("create_pr") else rev if rev in repo.refs else f"refs/heads/{rev}"
        if not parent["id"].startswith(wanted.get("parentCommit") or ""):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        if ref not in repo.refs and not call.flag("create_pr"):
            raise Refusal(400, f"Cannot commit to {rev}: it is not a branch")
        files = dict(parent["files"])
        for change in changes:
            self._change(files, change["key"], **change["value"])
        id = repo.add(ref, call.login, parent["id"], files, wanted["summary"], wanted.get("description", ""))
        return {"commitOid": id, "commitUrl": f"{repo.url}/commit/{id}", "pullRequestUrl": f"{repo.url}/discussions/{pull}"}

    def _change(self, files: dict[str, dict], operation: str, path: str, content: str = "", oid: str = "", **_) -> None:
        if operation == "file":
            files[path] = self._entry(base64.b64decode(content))
        elif operation == "lfsFile":
            if not (self.files / oid).exists():
                raise Refusal(400, f"{path}: the LFS object {oid} was not uploaded")
            lfs = {"oid": oid, "sha256": oid, "size": (self.files / oid).stat().st_size, "pointerSize": 134}
            files[path] = {"oid": sha1(lfs), "size": lfs["size"], "sha256": oid, "lfs": lfs}
        elif operation != "deletedFile" or files.pop(path, None) is None:
            raise Refusal(400, f"{operation} of {path}: no such file, or the test Hub does not know the operation")

    def _entry(self, content: bytes) -> dict:
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"oid": oid, "size": len(content), "sha256": self.store.keep(content)}

    @route("POST", "/api/{repo}/(?P<kind>branch|tag)/{name}", "write")
    def add_ref(self, call: Call, repo: Repo, kind: str, name: str):
        """The path ends with the name of a branch, but with the revision of a tag, whose name is in the body."""
        wanted = call.data()
        branch = f"refs/heads/{name}", wanted.get("startingPoint", "main")
        ref, revision = branch if kind == "branch" else (f"refs/tags/{wanted['tag']}", name)
        if ref in repo.refs:
            raise Refusal(409, f"Reference {ref} exists already")
        repo.refs[ref] = repo.find(revision)["id"]
        return {}

    @route("POST", "/{repo}.git/info/lfs/objects/batch", "see")  # not only to write: a pull request may be anyone's
    def lfs_batch(self, call: Call, repo: Repo):
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in call.data()["objects"]]
        for wanted in objects:
            if not (self.files / wanted["oid"]).exists():
                wanted["actions"] = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}", "header": {}}}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs/{sha256}")
    def lfs_put(self, call: Call, sha256: str):
        return {"oid": self.store.keep(call.content, sha256)}

    @route("GET", "/api/{repo}/xet-read-token/{rev}", "read")
    @route("GET", "/api/{repo}/xet-write-token/{rev}", "write")
    def xet_token(self, call: Call, repo: Repo, rev: str):
        if not self.xet:
            raise Refusal(404, "Xet is not enabled on this Hub")
        url, expires = f"{self.url}/cas", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
        return JSONResponse({"accessToken": "xet", "exp": expires, "casUrl": url}, headers=headers)

    @route("POST", "/cas/v1/xorbs/default/{xorb}")
    def put_xorb(self, call: Call, xorb: str):
        self.store.write(xorb, call.content)  # its hash is not checked, but that of the files made of it
        return {"was_inserted": True}

    @route("POST", "/cas/v1/shards")
    def put_shard(self, call: Call):
        self.store.add_shard(call.content)
        return {"result": 1}

    @route("GET", "/cas/v1/reconstructions/{file}")
    def reconstruct(self, call: Call, file: str):
        start, end = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("range", "bytes=0-")).groups()
        plan = self.store.plan(file, int(start), int(end or 1 << 62), f"{self.url}/cas/xorb/{file}")
        return plan or Response(status_code=416)

    @route("GET", "/api/collections")
    def list_collections(self, call: Call):
        owner = call.query_params.get("owner")
        seen = [c for c in self.collections.values() if not c["private"] or call.login == c["owner"]["name"]]
        return [{k: c[k] for k in c if k != "position"} for c in seen if owner in (None, c["owner"]["name"])]

    @route("POST", "/api/collections", "login")
    def create_collection(self, call: Call):
        wanted = call.data()
        slug = f"{call.login}/{re.sub('[^a-z0-9]+', '-', wanted['title'].lower())}-{sha1(wanted['title'])[:24]}"
        if slug in self.collections:
            raise Refusal(409, "This collection already exists", slug=slug)  # where `exists_ok` reads it
        about = {"slug": slug, "owner": {"type": "user", "name": call.login}, "items": [], "lastUpdated": STARTED}
        self.collections[slug] = wanted | about | {"position": 0, "theme": "green", "upvotes": 0}
        return self.collections[slug]

    @route("GET PATCH", "/api/collections/{owner}/{name}")
    def collection(self, call: Call, collection: dict):
        collection.update(call.data())
        return {"data": collection} if call.method == "PATCH" else collection

    @route("POST", "/api/collections/{owner}/{name}/items")
    def add_item(self, call: Call, collection: dict):
        wanted = call.data()
        self._repo(call, wanted["item"]["type"], wanted["item"]["id"], "see")
        item = {**wanted["item"], "_id": sha1(wanted["item"])[:24], "note": {"text": wanted.get("note")}}
        if any(known["_id"] == item["_id"] for known in collection["items"]):
            raise Refusal(409, f"{item['id']} is in the collection already")
        collection["items"].append(item | {"position": len(collection["items"])})
        return collection

    @route("PATCH", "/api/collections/{owner}/{name}/items/{item}")
    def change_item(self, call: Call, collection: dict, item: str):
        known = next(known for known in collection["items"] if known["_id"] == item)
        known["note"] = {"text": call.data()["note"]}
        return known


def front_matter(text: str) -> dict:
    """The YAML at the start of a card; refuses anything else."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    try:  # dates become text
        return json.loads(json.dumps(dict(yaml.safe_load(match[1]) or {}), default=str)) if match else {}
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise Refusal(400, "YAML metadata error", errors=[{"message": f"YAML metadata error: {error}"}], warnings=[]) from error


def sha1(value: object) -> str:
    return hashlib.sha1(json.dumps(value).encode()).hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A Hugging Face Hub on this machine, for tests.")
    parser.add_argument("--port", type=int, default=7820)
    parser.add_argument("--root", required=True, help="folder for the files")
    parser.add_argument("--xet", action="store_true", help="send content through Xet rather than LFS")
    hub = Hub(**vars(parser.parse_args()))
    print(hub.start(), *(f"HF_TOKEN={token} is {user}" for token, user in USERS.items()), sep="\n", flush=True)
    hub.thread.join()

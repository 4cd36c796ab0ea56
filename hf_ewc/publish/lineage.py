"""Where a checkpoint or a Fisher comes from: followed from commit to commit, each link compared with what was recorded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, RepoCard, RepoFile

from ..artifact import Manifest, base, card
from ..errors import ConfigError, DataError, EWCError, HubError, HubUnavailableError
from ..files import STATE_FILE
from ..hub import count, fetch_file, is_repo_id, pin, plain_errors
from .origins import Origin, base_of, data_of, fisher_of, parts_of

MANIFEST = "fisher_config.json"
LOCAL = "a local folder: cannot be followed"


@dataclass(frozen=True)
class Link:
    """
    One link of the chain.

    Args:
        what (`str`): `"checkpoint"`, `"Fisher"`, `"base model"`, `"probe"` or `"training data"`.
        id (`str`, *optional*), revision (`str`, *optional*): where it lies; without a commit, a name on some machine.
        digest (`str`, *optional*): the sha256 that was recorded, of a Fisher or of a base model's weights.
        verified (`bool`, *optional*): whether what lies there is what was recorded; `None` where that was not compared.
        note (`str`): what was compared, both values of a mismatch, or why nothing could be compared.
        depth (`int`): below which link it hangs.
    """

    what: str
    id: str | None
    revision: str | None
    digest: str | None
    verified: bool | None
    note: str
    depth: int


def lineage(source: str, revision: str | None = None, token: str | bool | None = None) -> list[Link]:
    """
    Follow checkpoint → Fisher → base → probes. No weights are downloaded: the Hub knows the sha256 of each large file.

    Args:
        source (`str`): a folder or an id on the Hub (`user/name`, `user/name@revision`), of a model that was trained with
            hf_ewc or of a Fisher.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        token (`str` or `bool`, *optional*): as for `huggingface_hub`.

    Raises:
        [`DataError`], [`HubError`]: it is neither. A link further down that cannot be looked up is reported in its place.
    """
    walk = _Walk(token, local=Path(source).expanduser().is_dir())
    if walk.local:
        folder = Path(source).expanduser()
        if (folder / STATE_FILE).is_file():
            return walk.checkpoint(_json(folder / STATE_FILE), source, None, 0)
        if (folder / MANIFEST).is_file():
            return walk.fisher(_manifest(folder / MANIFEST, source), Origin("Fisher", source), 0)
        raise DataError(
            f"'{source}' holds neither {STATE_FILE} nor {MANIFEST}, so nothing says where it comes from. Name what `hf-ewc "
            "train` or `hf-ewc fisher` wrote."
        )
    given = source
    source, revision = split_revision(source, revision)
    if not is_repo_id(source):
        raise DataError(f"'{given}' is neither a folder on this machine nor an id on the Hub (`user/name`).")
    refusals = []
    for repo_type, file in (("model", STATE_FILE), ("dataset", MANIFEST)):
        try:
            commit = pin(source, repo_type, revision, token)
            path = fetch_file(source, repo_type, commit, file, token)
        except HubUnavailableError:
            raise
        except HubError as error:
            refusals.append(f"    {error}")
            continue
        if repo_type == "model":
            return walk.checkpoint(_json(path), source, commit, 0)
        return walk.fisher(_manifest(path, source), Origin("Fisher", source, True, commit), 0)
    raise HubError(f"'{source}' is neither a model trained with hf_ewc nor a Fisher on the Hub:\n" + "\n".join(refusals))


def remote_state(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> dict[str, Any]:
    """`ewc_state.json` of a model on the Hub, named with or without `@revision`."""
    repo_id, revision = split_revision(repo_id, revision)
    return _json(fetch_file(repo_id, "model", pin(repo_id, "model", revision, token), STATE_FILE, token))


def remote_fingerprint(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> str | None:
    """Fingerprint of a model's weights by the Hub's hashes, without a download; `None` where the Hub does not state them."""
    repo_id, revision = split_revision(repo_id, revision)
    model = Origin("base model", repo_id, True, pin(repo_id, "model", revision, token))
    return _Walk(token, local=False).fingerprint(model)[0]


def split_revision(source: str, revision: str | None) -> tuple[str, str | None]:
    """`user/name@revision` in its parts; a [`ConfigError`] if the setting names another revision."""
    repo_id, _, suffix = source.partition("@")
    if suffix and revision is not None and suffix != revision:
        raise ConfigError(f"'{source}' names revision '{suffix}', and the setting names '{revision}'. Give one of them.")
    return repo_id, revision or suffix or None


def lineage_text(links: Iterable[Link]) -> str:
    """The chain for a terminal, as a tree: each link hangs below the one that it belongs to."""
    links, lines = list(links), []
    for number, link in enumerate(links):
        trunks = [_goes_on(links, number, depth) for depth in range(1, link.depth + 1)]
        before = "".join("│  " if trunk else "   " for trunk in trunks[:-1])
        branch, below = ("├─ ", "│  ") if trunks and trunks[-1] else ("└─ ", "   ") if trunks else ("", "")
        lines.append(f"{before}{branch}{link.what}  {link.id or 'in memory'}{f' @ {link.revision}' if link.revision else ''}")
        below += "│  " if _goes_on(links, number, link.depth + 1) else "   "
        verdict = {True: "verified: ", False: "MISMATCH: ", None: ""}[link.verified] + link.note
        said = [f"sha256 {link.digest}"] * bool(link.digest) + verdict.splitlines()
        lines += [f"{before}{below}{line}" for line in said]
    return "\n".join(lines)


def _goes_on(links: list[Link], number: int, depth: int) -> bool:
    """Whether the trunk at this depth goes on below a link: there is another link at it before one further out."""
    return next((later.depth == depth for later in links[number + 1 :] if later.depth <= depth), False)


def card_lineage(text: str) -> list[dict[str, Any]]:
    """The links that a card states in its front matter: what it was made from, by id, commit and hash."""
    return RepoCard(text, ignore_metadata_errors=True).data.to_dict().get("lineage") or []


class _Walk:
    """One walk along the chain; `local` allows it to look into folders, which only this machine's own records may name."""

    def __init__(self, token: str | bool | None, local: bool) -> None:
        self.token, self.local = token, local
        self.seen: set[tuple[str | None, str | None]] = set()

    def checkpoint(self, state: Mapping[str, Any], name: str, commit: str | None, depth: int) -> list[Link]:
        self.seen.add((name, commit))
        strength = state.get("ewc_lambda")
        how = f"λ = {strength:g}, " if strength is not None else ""
        steps = state.get("global_step")
        note = f"{how}{state.get('ewc_mode') or 'no penalty'}, {'? steps' if steps is None else count(steps, 'step')}"
        note += "; the base model above, as it was trained" if depth else "; the chain starts here: nothing to compare it with"
        links = [Link("checkpoint", name, commit, None, None, note, depth)]
        anchor, parts = base_of(state), parts_of(state)
        for number, part in enumerate(parts, 1):
            origin = fisher_of(part)
            newest = anchor.sha256 if number == len(parts) else None  # the weights that training started from are its base
            links += self.recorded_fisher(origin, newest, depth + 1)
        if not any(link.what == "base model" for link in links) and anchor.source:
            links += self.base_model(anchor, {}, depth + 1)
        data = data_of(state)
        if data.source:
            links.append(self.dataset(data, depth + 1))
        return links

    def recorded_fisher(self, origin: Origin, anchor: str | None, depth: int) -> list[Link]:
        """A Fisher that a checkpoint names: the one that lies there must have the digest that was recorded."""
        if origin.source is None:
            return [Link("Fisher", None, None, origin.sha256, None, "where it lies was not recorded", depth)]
        here = Path(origin.source).expanduser() / MANIFEST
        try:
            if origin.on_hub and origin.revision:
                path = fetch_file(origin.source, "dataset", origin.revision, MANIFEST, self.token)
            elif not origin.on_hub and self.local and here.is_file():
                path = here
            else:
                why = "its commit was not recorded" if origin.on_hub else LOCAL
                return [Link("Fisher", origin.id, origin.revision, origin.sha256, None, why, depth)]
            links = self.fisher(_manifest(path, origin.source), origin, depth)
        except EWCError as error:
            return [Link("Fisher", origin.id, origin.revision, origin.sha256, None, f"not verified: {error}", depth)]
        for number, link in enumerate(links):
            if link.what == "base model" and link.depth == depth + 1 and anchor and link.digest != anchor:
                note = f"the checkpoint was anchored to weights sha256 {anchor}, its Fisher was measured at {link.digest}"
                links[number] = replace(link, verified=False, note=note)
        return links

    def fisher(self, manifest: Manifest, origin: Origin, depth: int) -> list[Link]:
        """A Fisher whose manifest was read (which checks its digest); `origin.sha256` is the digest that was recorded."""
        digest = manifest.digest
        verified, note = None, "its manifest is whole" if depth else "the chain starts here; its manifest is whole"
        if origin.sha256 not in (None, digest):
            verified, note = False, f"recorded sha256 {origin.sha256}, but what lies there has {digest}"
        elif origin.on_hub:
            files = {name: shard.sha256 for name, shard in manifest.files.items()}
            verified, note = self.compare(replace(origin, what="Fisher"), files)
        elif origin.sha256:
            verified, note = True, "the manifest on this machine has this digest"
        links = [Link("Fisher", origin.source, origin.revision, origin.sha256 or digest, verified, note, depth)]
        model = manifest.base_model
        at_hub = Origin("base model", model.id, bool(model.revision), model.revision, model.fingerprint)
        links += self.base_model(at_hub, model.files_sha256, depth + 1)
        for probe in manifest.probes:
            on_hub = card.hub_dataset(probe.dataset, probe.revision)
            data = Origin("probe", probe.dataset, on_hub, probe.revision, config=probe.config, split=probe.split)
            links.append(self.dataset(data, depth + 1))
        for pair in manifest.fold.pairs if manifest.fold else ():
            note = f"folded with coefficient {pair.coefficient:.6g}; where it lies was not recorded"
            links.append(Link("Fisher", None, None, pair.fisher_sha256, None, note, depth + 1))
        return links

    def base_model(self, origin: Origin, files: Mapping[str, str], depth: int) -> list[Link]:
        """Its weights by the Hub's hashes; if it was itself trained with hf_ewc, the chain goes on."""
        link = Link(origin.what, origin.id, origin.revision, origin.sha256, None, LOCAL, depth)
        if not origin.on_hub or origin.source is None or origin.revision is None:
            return [link]
        try:
            verified, note = self.compare(origin, files) if files else self.compare_fingerprint(origin)
            links = [replace(link, verified=verified, note=note)]
            if (origin.source, origin.revision) not in self.seen and self.hashes(origin, [STATE_FILE]):
                path = fetch_file(origin.source, "model", origin.revision, STATE_FILE, self.token)
                outer, self.local = self.local, False
                links += self.checkpoint(_json(path), origin.source, origin.revision, depth + 1)
                self.local = outer
            return links
        except EWCError as error:
            return [replace(link, note=f"not verified: {error}")]

    def dataset(self, origin: Origin, depth: int) -> Link:
        """Data are not fetched: a dataset's commit names its content, so that the commit is there says all."""
        name = " · ".join(part for part in (origin.id, origin.config, origin.split) if part) or None
        link = Link(origin.what, name, origin.revision, origin.sha256, None, "a local file: cannot be followed", depth)
        if origin.source is None:
            return replace(link, note="in memory: cannot be followed")
        if not origin.on_hub:
            return link
        if origin.revision is None:
            return replace(link, note="its commit was not recorded")
        try:
            found = pin(origin.source, "dataset", origin.revision, self.token)
        except EWCError as error:
            return replace(link, note=f"not verified: {error}")
        same = found == origin.revision
        return replace(
            link, verified=same, note="the commit is there" if same else f"recorded {origin.revision}, found {found}"
        )

    def compare(self, origin: Origin, files: Mapping[str, str]) -> tuple[bool | None, str]:
        """Recorded sha256 per file against those of the Hub."""
        found = self.hashes(origin, files)
        wrong = [f"{name} is not there" for name in files if name not in found]
        wrong += [
            f"{name}: recorded sha256 {files[name]}, on the Hub {there}"
            for name, there in found.items()
            if there is not None and there != files[name]
        ]
        if wrong:
            return False, "; ".join(wrong)
        small, all_files = sum(there is None for there in found.values()), count(len(files), "file")
        if small:
            return None, f"not verified: of {all_files}, {small} too small for the Hub to state a sha256"
        return True, f"the Hub states the recorded sha256 for {all_files}"

    def compare_fingerprint(self, origin: Origin) -> tuple[bool | None, str]:
        """The same for a base of which only the fingerprint over all weight files was recorded."""
        there, number = self.fingerprint(origin)
        if origin.sha256 is None or there is None:
            return None, "not verified: a hash is missing, here or on the Hub"
        if there != origin.sha256:
            return False, f"recorded sha256 {origin.sha256} over the weight files, on the Hub {there}"
        return True, f"the Hub's hashes ({count(number, 'file')}) give the recorded one"

    def fingerprint(self, origin: Origin) -> tuple[str | None, int]:
        """Fingerprint of a model at its commit by the Hub's hashes, if they are there, and over how many files."""
        names = ["model.safetensors"]
        if not self.hashes(origin, names):
            index = fetch_file(str(origin.source), "model", str(origin.revision), "model.safetensors.index.json", self.token)
            names = sorted(set(_json(index)["weight_map"].values()))
        found = {name: there for name, there in self.hashes(origin, names).items() if there is not None}
        return (base.fingerprint(found) if len(found) == len(names) else None), len(names)

    def hashes(self, origin: Origin, names: Iterable[str]) -> dict[str, str | None]:
        """The Hub's sha256 of those of the files that are there; `None` for small ones, which are no LFS files."""
        source, kind, revision = str(origin.source), origin.repo_type, origin.revision
        with plain_errors("read the hashes of", source, kind, revision):
            infos = HfApi(token=self.token).get_paths_info(source, list(names), revision=revision, repo_type=kind)
        return {info.path: info.lfs.sha256 if info.lfs else None for info in infos if isinstance(info, RepoFile)}


def _manifest(path: Path, source: str) -> Manifest:
    return Manifest.from_json(path.read_text(encoding="utf-8"), source)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"'{path.name}' is not JSON ({error}); was the download or copy cut off?") from None

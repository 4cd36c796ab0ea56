"""Release in one go: Fisher, model, Space and a collection of them with the base, visible together or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import Collection

from ..hub import Licence, Pushed, count, is_repo_id, page, push_files, set_visibility
from .checkpoint import push_checkpoint
from .collection import add_items, make_collection, missing_items, show_collection
from .release_plan import ReleasePlan, open_fisher, plan_release
from .space import plan_space, restart_space, space_files, space_message

Progress = Callable[[str], None]
DESCRIPTION = "A model, the Fisher information that held it, and their base: Elastic Weight Consolidation (hf_ewc)."


@dataclass
class ReleaseConfig:
    """
    What a release is made of, and what it is called on the Hub. The token is no setting: `hf auth login`, or HF_TOKEN.

    Args:
        fisher (`str`): folder of the Fisher; or the id of one that is published, `user/name@revision`, which stays there.
        checkpoint (`str`): folder that `hf-ewc train` wrote.
        results (`str`, *optional*): `results.json` of `hf-ewc evaluate` or a sweep, for the card's table.
        namespace (`str`, *optional*): user or organisation; the token's user by default.
        fisher_repo, checkpoint_repo (`str`, *optional*): names or whole ids; the folders' names by default.
        space_repo (`str`, *optional*): name or whole id of a Space that shows the model beside its base, pinned to this
            release's commits. Without it there is none.
        base_repo (`str`, *optional*): where on the Hub the base lies, `user/name@revision`, if the training took it from a
            folder. It must be the same weights, by their hash.
        collection (`str`, *optional*): its title; the name of `checkpoint_repo` by default.
        tag (`str`, *optional*): for all commits, such as `"v1"`.
        private (`bool`, *optional*, defaults to `True`): `False` makes all of it public, once all of it is there.
        licence (`str`, *optional*): of the model; the base model's by default.
        language (`list[str]`, *optional*): codes of the model's languages, for the card.
        dry_run (`bool`, *optional*, defaults to `False`): check everything, list files and bytes, send nothing.
    """

    fisher: str = field(metadata={"help": "Folder of the Fisher, or the id of a published one."})
    checkpoint: str = field(metadata={"help": "Folder that `hf-ewc train` wrote."})
    results: str | None = field(default=None, metadata={"help": "results.json with the model's row, for its card."})
    namespace: str | None = field(default=None, metadata={"help": "User or organisation; default: the token's user."})
    fisher_repo: str | None = field(default=None, metadata={"help": "Dataset repository: NAME or USER/NAME."})
    checkpoint_repo: str | None = field(default=None, metadata={"help": "Model repository: NAME or USER/NAME."})
    space_repo: str | None = field(default=None, metadata={"help": "Space that shows both models: NAME or USER/NAME."})
    base_repo: str | None = field(default=None, metadata={"help": "The base on the Hub, if training took it from a folder."})
    collection: str | None = field(default=None, metadata={"help": "Title of the collection."})
    tag: str | None = field(default=None, metadata={"help": "Tag for all commits, such as v1."})
    private: bool = field(default=True, metadata={"help": "false: make all of it public at the end."})
    licence: str | None = field(default=None, metadata={"help": "Licence of the model; default: the base model's."})
    language: list[str] | None = field(default=None, metadata={"help": "Language codes for the model's card."})
    dry_run: bool = field(default=False, metadata={"help": "Check, list files and bytes, send nothing."})

    def problems(self) -> list[str]:
        """Everything that is wrong by itself, without a look at the folders or the Hub."""
        found = []
        for name in ("fisher_repo", "checkpoint_repo", "space_repo", "base_repo"):
            given = getattr(self, name)
            repo = given.partition("@")[0] if given and name == "base_repo" else given
            if repo is not None and not is_repo_id(repo if "/" in repo else f"user/{repo}"):
                found.append(
                    f"`{name}: {given}` is no name on the Hub: write `name` or `user/name` (letters, digits, -, _, .)."
                )
        if self.namespace is not None and ("/" in self.namespace or not is_repo_id(f"{self.namespace}/x")):
            found.append(f"`namespace: {self.namespace}` is no user or organisation.")
        if self.collection is not None and not self.collection.strip():
            found.append("`collection` is empty: name its title, or leave it out.")
        return found


@dataclass
class Release:
    """A release that is done; `changed` says whether it was not so before, `notes` what is lacking."""

    fisher: Pushed
    checkpoint: Pushed
    collection: Collection
    notes: list[str]
    changed: bool
    space: Pushed | None = None

    def text(self) -> str:
        """For a person: ids, commits, addresses and bytes."""
        lines = [] if self.changed else ["Nothing to send: the Hub holds all of this release."]
        for label, done in (("Fisher", self.fisher), ("model", self.checkpoint), ("Space", self.space)):
            if done is None:
                continue
            lines += [f"{label:<10}  {done.repo_id} at {done.commit}, {done.plan.bytes:,} bytes sent", f"{'':<10}  {done.url}"]
        lines += [f"{'collection':<10}  {self.collection.title}", f"{'':<10}  {self.collection.url}"]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def push_release(config: ReleaseConfig, token: str | bool | None = None, progress: Progress = print) -> Release:
    """
    Publish Fisher, model, Space and collection. Everything is private until all of it is there, and then, with
    `private: false`, made public. Broken off, it goes on when it is repeated; what is there is not sent again.

    Raises:
        [`EWCError`]: see [`plan_release`]; or what stopped it later. What was sent by then is private, unless it was public
            before.
    """
    plan = plan_release(config, token)
    for note in plan.notes:
        progress(f"note: {note}")
    fisher_id, checkpoint_id = plan.fisher.repo_id, plan.checkpoint.repo_id
    for there in plan.repos:
        if not there.empty:
            progress(f"to send: {there.repo_type} {there.repo_id}, {count(len(there.files), 'file')}, {there.bytes:,} bytes")
    fisher: Any
    if plan.fisher.files or plan.fisher.unchanged:
        fisher = open_fisher(config.fisher, token).push_to_hub(fisher_id, private=True, tag=config.tag, token=token)
    else:  # published before, perhaps by somebody else
        fisher = Pushed(
            fisher_id, "dataset", str(plan.fisher.parent), page(fisher_id, "dataset", plan.fisher.parent), plan.fisher
        )
    checkpoint = push_checkpoint(
        config.checkpoint,
        checkpoint_id,
        private=True,
        tag=config.tag,
        results=config.results,
        fisher_repo=fisher_id,
        fisher_revision=fisher.commit,
        licence=Licence(license=config.licence) if config.licence else None,
        language=config.language,
        token=token,
    )
    space = _push_space(config, plan, fisher.commit, checkpoint.commit, token)
    absent, hidden, lacking = [], plan.hidden, missing_items(plan.collection, plan.items)
    collection = plan.collection
    if collection is None or lacking:
        progress(f"to add to collection {plan.title}: {count(len(lacking), 'item')}")
        collection = collection or make_collection(plan.namespace, plan.title, DESCRIPTION, token)
        absent = add_items(collection, lacking, token)
    notes = [f"{item.repo_type} {item.repo_id} is not on this server: the collection lacks it." for item in absent]

    for done in filter(None, (fisher, checkpoint, space)):  # last, in an order in which no visible page leads to a hidden one
        if done is space and any(not name.startswith("collection ") for name in hidden):
            restart_space(space.repo_id, token)  # it was built when it could not read the models
        if f"{done.repo_type} {done.repo_id}" in hidden:
            progress(f"now public: {done.repo_type} {done.repo_id}")
            set_visibility(done.repo_id, done.repo_type, private=False, token=token)
    if plan.public and collection.private:
        progress(f"now public: collection {plan.title}")
        show_collection(collection, token)
    pushed = [done for done in (fisher, checkpoint, space) if done and (done.plan.files or done.plan.unchanged)]
    changed = bool(plan.collection is None or hidden or len(lacking) > len(absent)) or any(
        not done.plan.empty or (config.tag is not None and config.tag not in done.plan.tags) for done in pushed
    )
    return Release(fisher, checkpoint, collection, notes, changed, space)


def _push_space(
    config: ReleaseConfig, plan: ReleasePlan, fisher: str, checkpoint: str, token: str | bool | None
) -> Pushed | None:
    """The Space, which names the commits that the release has by now."""
    if plan.space is None or plan.compared is None:
        return None
    compared, repo_id = plan.compared.at(checkpoint, fisher), plan.space.repo_id
    files = space_files(compared, repo_id, results=config.results, token=token)
    options: dict = dict(sdk="gradio", private=True, tag=config.tag, plan=plan_space(files, repo_id, None, token), token=token)
    return push_files(files, repo_id, "space", message=space_message(compared), **options)

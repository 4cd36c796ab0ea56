"""Release in one go: Fisher, model and a collection of both with the base, visible together or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import Collection

from ..hub import Licence, Pushed, count, is_repo_id, page, set_visibility
from .checkpoint import push_checkpoint
from .collection import add_items, make_collection, missing_items, show_collection
from .release_plan import open_fisher, plan_release

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
        space_repo (`str`, *optional*): not used yet, and the release says so.
        collection (`str`, *optional*): its title; the name of `checkpoint_repo` by default.
        tag (`str`, *optional*): for both commits, such as `"v1"`.
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
    space_repo: str | None = field(default=None, metadata={"help": "Not used yet."})
    collection: str | None = field(default=None, metadata={"help": "Title of the collection."})
    tag: str | None = field(default=None, metadata={"help": "Tag for both commits, such as v1."})
    private: bool = field(default=True, metadata={"help": "false: make all of it public at the end."})
    licence: str | None = field(default=None, metadata={"help": "Licence of the model; default: the base model's."})
    language: list[str] | None = field(default=None, metadata={"help": "Language codes for the model's card."})
    dry_run: bool = field(default=False, metadata={"help": "Check, list files and bytes, send nothing."})

    def problems(self) -> list[str]:
        """Everything that is wrong by itself, without a look at the folders or the Hub."""
        found = []
        for name in ("fisher_repo", "checkpoint_repo"):
            given = getattr(self, name)
            if given is not None and not is_repo_id(given if "/" in given else f"user/{given}"):
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

    def text(self) -> str:
        """For a person: ids, commits, addresses and bytes."""
        lines = [] if self.changed else ["Nothing to send: the Hub holds all of this release."]
        for label, done in (("Fisher", self.fisher), ("model", self.checkpoint)):
            lines += [f"{label:<10}  {done.repo_id} at {done.commit}, {done.plan.bytes:,} bytes sent", f"{'':<10}  {done.url}"]
        lines += [f"{'collection':<10}  {self.collection.title}", f"{'':<10}  {self.collection.url}"]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def push_release(config: ReleaseConfig, token: str | bool | None = None, progress: Progress = print) -> Release:
    """
    Publish Fisher, model and collection. Everything is private until all of it is there, and then, with `private: false`, made
    public. Broken off, it goes on when it is repeated; what is there is not sent again.

    Raises:
        [`EWCError`]: see [`plan_release`]; or what stopped it later. What was sent by then is private, unless it was public
            before.
    """
    plan = plan_release(config, token)
    for note in plan.notes:
        progress(f"note: {note}")
    fisher_id, checkpoint_id = plan.fisher.repo_id, plan.checkpoint.repo_id
    for there in (plan.fisher, plan.checkpoint):
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
    absent, hidden, lacking = [], plan.hidden, missing_items(plan.collection, plan.items)
    collection = plan.collection
    if collection is None or lacking:
        progress(f"to add to collection {plan.title}: {count(len(lacking), 'item')}")
        collection = collection or make_collection(plan.namespace, plan.title, DESCRIPTION, token)
        absent = add_items(collection, lacking, token)
    notes = [f"{item.repo_type} {item.repo_id} is not on this server: the collection lacks it." for item in absent]

    for done in (fisher, checkpoint):  # last, and in an order in which no visible page leads to a hidden one
        if f"{done.repo_type} {done.repo_id}" in hidden:
            progress(f"now public: {done.repo_type} {done.repo_id}")
            set_visibility(done.repo_id, done.repo_type, private=False, token=token)
    if plan.public and collection.private:
        progress(f"now public: collection {plan.title}")
        show_collection(collection, token)
    pushed = [done for done in (fisher, checkpoint) if done.plan.files or done.plan.unchanged]
    changed = bool(plan.collection is None or hidden or len(lacking) > len(absent)) or any(
        not done.plan.empty or (config.tag is not None and config.tag not in done.plan.tags) for done in pushed
    )
    return Release(fisher, checkpoint, collection, notes, changed)

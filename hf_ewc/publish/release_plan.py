"""What a release would send: every check that can be made before anything is sent, and a comparison with the Hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import Collection

from ..artifact import FisherInformation
from ..config import raise_problems
from ..errors import EWCError, FisherMismatchError, HubUnavailableError
from ..hub import Licence, PushPlan, account, check_tag, count, licence_of, plan_push
from .checkpoint import (
    checkpoint_files,
    plan_checkpoint,
    read_model,
    read_state,
    refuse_other_fisher,
    refuse_tokens,
)
from .collection import Item, find_collection, missing_items
from .compared import Compared, Part, find_base
from .space import access_notes, plan_space, space_files

if TYPE_CHECKING:
    from .release import ReleaseConfig

UNKNOWN_COMMIT = "f" * 40  # stands for the commit of a Fisher that is not pushed yet; as long, so a plan knows every byte


@dataclass
class ReleasePlan:
    """What a release would send, and what there is to know about it."""

    namespace: str
    fisher: PushPlan
    checkpoint: PushPlan
    title: str
    collection: Collection | None
    items: list[Item]
    public: bool
    notes: list[str]
    space: PushPlan | None = None
    compared: Compared | None = None

    @property
    def repos(self) -> list[PushPlan]:
        """Those that this release pushes to, in order; not a Fisher that was published before."""
        own = [plan for plan in (self.fisher, self.checkpoint) if plan.files or plan.unchanged]
        return [*own, *([self.space] if self.space else [])]

    @property
    def hidden(self) -> list[str]:
        """What is to become public and is not."""
        if not self.public:
            return []
        repos = [f"{plan.repo_type} {plan.repo_id}" for plan in self.repos if plan.private is not False]
        return [*repos, *([f"collection {self.title}"] if self.collection is None or self.collection.private else [])]

    def text(self) -> str:
        """For a person, a line for each file."""
        state = "new" if self.collection is None else "private" if self.collection.private else "public"
        missing = missing_items(self.collection, self.items)
        lines = [f"collection '{self.title}' of {self.namespace} ({state}): {count(len(missing), 'item')} to add"]
        lines += [f"  {'add' if item in missing else 'keep':<6}  {item.repo_type} {item.repo_id}" for item in self.items]
        lines += [f"At the end, public: {', '.join(self.hidden)}"] if self.hidden else []
        plans = [plan.text() for plan in (self.fisher, self.checkpoint, self.space) if plan]
        return "\n".join([*plans, *lines, *(f"note: {note}" for note in self.notes)])


def plan_release(config: ReleaseConfig, token: str | bool | None = None) -> ReleasePlan:
    """
    Check everything that can be checked before anything is sent, and compare with what is on the Hub. Only reads.

    Raises:
        [`ConfigError`]: with every problem of the folders, or else every problem with the Hub.
        [`HubUnavailableError`]: the Hub cannot be reached.
    """
    raise_problems("these settings are no release; nothing was sent", config.problems())
    checks = _Checks()
    fisher = checks.run(open_fisher, config.fisher, token)
    state = checks.run(read_state, config.checkpoint)
    checks.run(read_model, config.checkpoint)
    if fisher is not None and state is not None:
        checks.run(_check_fit, fisher, state, config)
    checks.raise_all("this release does not fit together; nothing was sent")
    assert fisher is not None
    assert state is not None

    who = account(token)
    namespace = config.namespace or who["name"]
    published = (fisher.place is not None and fisher.place.repo_id) or None
    fisher_id = published or _full_id(config.fisher_repo, config.fisher, namespace)
    checkpoint_id = _full_id(config.checkpoint_repo, config.checkpoint, namespace)
    title = config.collection or checkpoint_id.partition("/")[2]
    space_id = _full_id(config.space_repo, "", namespace) if config.space_repo else None
    written = (f"{namespace}/", checkpoint_id, *(() if published else (fisher_id,)), *((space_id,) if space_id else ()))
    owners = dict.fromkeys(name.partition("/")[0] for name in written)
    raise_problems("this token cannot make this release; nothing was sent", account_problems(who, list(owners)))

    base, what = fisher.manifest.base_model, "this release cannot be made on the Hub; nothing was sent"
    inherited = checks.run(licence_of, base.id, base.revision, token) if base.revision else None
    licence = Licence(license=config.licence) if config.licence else inherited
    fisher_plan: Any = checks.run(plan_fisher, fisher, fisher_id, token)
    if published and fisher_plan is not None and fisher_plan.private and not config.private:
        checks.problems.append(
            f"the Fisher '{fisher_id}' is private, and the public card of the model would link to it: readers would find "
            f"nothing. Make it public in its settings, or set `private: true`."
        )
    start: Any = None
    if space_id or config.base_repo:
        named = _full_id(config.base_repo, "", namespace) if config.base_repo else None
        start = checks.run(find_base, named, None, state, fisher.manifest, config.checkpoint, token)
    checks.raise_all(what)
    commit = fisher_plan.parent if fisher_plan.empty and fisher_plan.exists else UNKNOWN_COMMIT
    files = checks.run(
        checkpoint_files,
        config.checkpoint,
        checkpoint_id,
        results=config.results,
        fisher_repo=fisher_id,
        fisher_revision=commit,
        licence=licence,
        language=config.language,
        token=token,
    )
    checkpoint_plan = checks.run(plan_checkpoint, files, checkpoint_id, None, token) if files is not None else None
    compared, space_plan = None, None
    if space_id and checkpoint_plan is not None:
        compared = _compared(start[0], fisher_plan, commit, checkpoint_plan, config)
        space = checks.run(space_files, compared, space_id, results=config.results, token=token)
        space_plan = checks.run(plan_space, space, space_id, None, token) if space is not None else None
    plans = [plan for plan in (fisher_plan, checkpoint_plan, space_plan) if plan is not None]
    for plan in plans:
        checks.run(check_tag, plan, config.tag)
    checks.raise_all(what)
    assert checkpoint_plan is not None
    found = find_collection(namespace, title, token)
    items = _items(fisher, fisher_id, state, checkpoint_id, start and start[0], space_id)
    notes = _notes(config, fisher, state, licence, inherited, plans)
    notes += access_notes(compared, space_id) if compared and space_id else []
    release = (namespace, fisher_plan, checkpoint_plan, title, found, items, not config.private, notes)
    return ReleasePlan(*release, space_plan, compared)


def open_fisher(folder_or_id: str, token: str | bool | None = None) -> FisherInformation:
    """The Fisher of a folder, checked, or one that is published already."""
    path = Path(folder_or_id).expanduser()
    if path.is_dir():
        refuse_tokens({file.name: file for file in sorted(path.glob("*.json"))}, token)
    return FisherInformation.from_pretrained(folder_or_id, token=token)


def plan_fisher(fisher: FisherInformation, repo_id: str, token: str | bool | None = None) -> PushPlan:
    """What its push would change; for a Fisher that was taken from the Hub nothing, as it stays where and as it is."""
    place = fisher.place
    if place is None or place.repo_id is None:
        plan: Any = fisher.push_to_hub(repo_id, token=token, dry_run=True)
        return plan
    return replace(plan_push({}, repo_id, "dataset", token=token), parent=place.commit, tags={})


def _check_fit(fisher: FisherInformation, state: dict[str, Any], config: ReleaseConfig) -> None:
    refuse_other_fisher(state, fisher.sha256, config.fisher, config.checkpoint)
    base, anchor = fisher.manifest.base_model, state.get("anchor") or {}
    if not fisher.has_own_anchor and anchor.get("fingerprint") != base.fingerprint:
        raise FisherMismatchError(
            f"the checkpoint '{config.checkpoint}' was held to other weights than those that the Fisher was measured at, so "
            f"base, Fisher and model do not belong together:\n    Fisher      {base.label}, weights sha256 {base.fingerprint}\n"
            f"    checkpoint  {anchor.get('id')}, weights sha256 {anchor.get('fingerprint')}\n"
            "Train without `anchor`, or publish them one by one (`hf-ewc push fisher`, `hf-ewc push checkpoint`)."
        )


def _full_id(name: str | None, folder: str, namespace: str) -> str:
    """Repository for a name, or for a folder's name."""
    name = name or re.sub(r"[^\w.-]+|-{2,}|\.{2,}", "-", Path(folder).expanduser().resolve().name, flags=re.ASCII).strip("-.")
    return name if "/" in name else f"{namespace}/{name}"


def account_problems(who: dict[str, Any], owners: list[str]) -> list[str]:
    """Why this account cannot write where the release goes, as far as the Hub tells."""
    orgs = {org["name"]: org.get("roleInOrg") for org in who.get("orgs") or []}
    role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
    found = []
    if role == "read":
        found.append(f"the token of '{who['name']}' may only read. Make one with the role `write` on your settings page.")
    for owner in owners:
        if owner != who["name"] and orgs.get(owner, "read") == "read":
            may = ", ".join([who["name"], *(org for org, role in orgs.items() if role != "read")])
            found.append(f"the token's account '{who['name']}' cannot write to '{owner}', but to {may}. Set `namespace`.")
    return found


def _compared(base: Part, fisher: PushPlan, commit: str, checkpoint: PushPlan, config: ReleaseConfig) -> Compared:
    """What the release's Space compares, as open as it will be at the end. What is not pushed yet has no commit."""
    adapted = str(checkpoint.parent) if checkpoint.exists and checkpoint.empty else UNKNOWN_COMMIT
    names = tuple(sorted({**checkpoint.files, **checkpoint.unchanged}))
    seen = [plan.private is False or not config.private for plan in (fisher, checkpoint)]
    held = Part(fisher.repo_id, commit, "dataset", open=seen[0])
    return Compared(base, Part(checkpoint.repo_id, adapted, files=names, open=seen[1]), held)


def _items(
    fisher: FisherInformation,
    fisher_id: str,
    state: dict[str, Any],
    checkpoint_id: str,
    start: Part | None,
    space_id: str | None,
) -> list[Item]:
    """What the collection holds; a base model that is a folder cannot be in it."""
    probes, base = sorted({probe.kind for probe in fisher.manifest.probes}), fisher.manifest.base_model
    items = [
        Item(fisher_id, "dataset", f"What the base must keep: its diagonal Fisher information (probe: {', '.join(probes)})."),
        Item(checkpoint_id, "model", f"Trained further under Elastic Weight Consolidation, λ = {state['ewc_lambda']:g}."),
    ]
    at = (start.repo_id, start.commit) if start else (base.id, base.revision)
    if at[1]:
        items.append(Item(at[0], "model", f"The base model that both belong to, at commit {at[1][:7]}."))
    if space_id:
        items.append(Item(space_id, "space", "Base and adapted model side by side, in a browser."))
    return items


def _notes(
    config: ReleaseConfig,
    fisher: FisherInformation,
    state: dict[str, Any],
    licence: Licence | None,
    inherited: Licence | None,
    plans: list[PushPlan],
) -> list[str]:
    """What is no mistake, but to be known."""
    notes, base = [], fisher.manifest.base_model
    if base.revision is None and not config.base_repo:
        notes.append(f"the base model is a local folder ('{Path(base.id).name}'), so the collection cannot hold it.")
    if licence is None:
        notes.append(
            "no licence is known: name it with `licence`. Without one, others cannot tell what they may do with the model."
        )
    if inherited and inherited.gated and not config.private:
        notes.append(
            f"the base model is gated ({inherited.gated}), and these will not be: gate them in their settings on the Hub if "
            "its licence asks for that."
        )
    if others := state["fisher"].get("fold", [])[:-1]:
        notes.append(
            f"the model was trained with {len(others) + 1} Fishers, and the newest is in this release. Publish the others with "
            "`hf-ewc push fisher`."
        )
    for plan in plans:
        if plan.private is False and not plan.empty:
            notes.append(f"{plan.repo_type} {plan.repo_id} is public already: its update is visible before the rest is there.")
        elif plan.private is False and config.private:
            notes.append(f"{plan.repo_type} {plan.repo_id} is public already, and stays so.")
    return notes


class _Checks:
    """Collects what is wrong instead of stopping at the first; a server that is away stops everything."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def run(self, check: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return check(*args, **options)
        except HubUnavailableError:
            raise
        except EWCError as error:
            self.problems.append(str(error).replace("\n", "\n    "))
            return None

    def raise_all(self, title: str) -> None:
        raise_problems(title, list(dict.fromkeys(self.problems)))

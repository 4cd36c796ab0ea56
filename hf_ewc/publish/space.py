"""A Space that lets people compare a model with its base: the page, this very package, what to compare, in one commit."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import SpaceHardware

from ..config import SPACE_FILE, CompareConfig, app_folder, raise_problems
from ..errors import DataError, HubError
from ..hub import PushPlan, account, client, fetch_file, patiently, plain_errors, plan_push, push_files
from .checkpoint import CARD, RESULTS, refuse_tokens
from .compared import Compared, find_compared
from .space_card import render_space_card

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]
EXAMPLES = "examples.json"
LISTING = f"{PACKAGE.name}/space_files.txt"  # what a push wrote outside the package: the next one deletes what went, no more
_PACKAGED = (".py", ".typed", ".jsonl", ".yaml", ".json")
_STAYS = ("__pycache__", "screenshots")


def push_space(
    repo_id: str,
    *,
    adapted: str,
    base: str | None = None,
    base_revision: str | None = None,
    adapted_revision: str | None = None,
    fisher: str | None = None,
    fisher_revision: str | None = None,
    plain: str | None = None,
    plain_revision: str | None = None,
    results: str | Path | None = None,
    examples: str | Path | None = None,
    dtype: str = "float32",
    votes_repo: str | None = None,
    title: str | None = None,
    hardware: str | None = None,
    private: bool = True,
    revision: str | None = None,
    tag: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    dry_run: bool = False,
) -> Any:
    """
    Publish a Space that compares a model with its base, in one commit. It holds the page, the package that it runs with, and
    `space.yaml`, which names everything by its commit; where the Space has all of it, nothing is sent and no commit is made.

    Args:
        repo_id (`str`): `"user/name"`; without `user/`, under the account of the token.
        adapted (`str`): the model, an id on the Hub.
        base, fisher (`str`, *optional*): ids on the Hub; by default what the model's `ewc_state.json` names.
        plain (`str`, *optional*): id of the same training without EWC, which the page can show in the place of `adapted`.
        base_revision, adapted_revision, fisher_revision, plain_revision (`str`, *optional*): branch, tag or commit; the commit
            is recorded.
        results (`str` or `Path`, *optional*): `results.json` of `hf-ewc evaluate` or a sweep in which this model was measured.
        examples (`str` or `Path`, *optional*): JSON of the prompts that are offered, in the place of `space_app/examples.json`.
        dtype (`str`, *optional*, defaults to `"float32"`): of the weights in the Space's memory.
        votes_repo (`str`, *optional*): dataset repository that stores blind votes.
        title (`str`, *optional*): of the Space; the models' names by default.
        hardware (`str`, *optional*): suggested to who duplicates it, such as `"zero-a10g"`. Yours is chosen in its settings.
        private (`bool`, *optional*, defaults to `True`): of a Space that is created by this. One that exists stays as it is.
        revision, tag, commit_message, create_pr, token, dry_run: as for [`push_checkpoint`].

    Returns:
        [`Pushed`], with the `commit` and the `url`; a [`PushPlan`] with `dry_run`.

    Raises:
        [`ConfigError`], [`DataError`], [`FisherMismatchError`], [`HubError`]: see [`find_compared`]; a token in a file; a Space
            that somebody made otherwise. Nothing was sent.
    """
    problems = CompareConfig(dtype=dtype, votes_repo=votes_repo).problems() + _hardware_problems(hardware)
    raise_problems("these settings make no Space; nothing was sent", problems)
    if "/" not in repo_id:
        repo_id = f"{account(token)['name']}/{repo_id}"
    compared = find_compared(
        adapted,
        base=base,
        base_revision=base_revision,
        adapted_revision=adapted_revision,
        fisher=fisher,
        fisher_revision=fisher_revision,
        plain=plain,
        plain_revision=plain_revision,
        results=results,
        token=token,
    )
    shown: dict[str, Any] = dict(
        results=results, examples=examples, dtype=dtype, votes_repo=votes_repo, title=title, hardware=hardware
    )
    files = space_files(compared, repo_id, **shown, token=token)
    plan = plan_space(files, repo_id, revision, token)
    for note in [*compared.notes, *access_notes(compared, repo_id)]:
        logger.warning("note: %s", note)
    if dry_run:
        return plan
    message = commit_message or space_message(compared)
    return push_files(
        files,
        *(repo_id, "space"),
        message=message,
        private=private,
        tag=tag,
        create_pr=create_pr,
        token=token,
        sdk="gradio",
        plan=plan,
    )


def space_files(
    compared: Compared,
    repo_id: str,
    *,
    results: str | Path | None = None,
    examples: str | Path | None = None,
    dtype: str = "float32",
    votes_repo: str | None = None,
    title: str | None = None,
    hardware: str | None = None,
    token: str | bool | None = None,
) -> dict[str, Path | bytes]:
    """What the Space holds, by its path there. Arguments as for [`push_space`]."""
    app, fisher, plain = app_folder(), compared.fisher, compared.plain
    files: dict[str, Path | bytes] = {path.relative_to(app).as_posix(): path for path in _files_in(app)}
    if results is not None:
        files[RESULTS] = Path(results).expanduser()
    if examples is not None:
        files[EXAMPLES] = _examples(examples)
    config = CompareConfig(
        base=compared.base.repo_id,
        base_revision=compared.base.commit,
        adapted=compared.adapted.repo_id,
        adapted_revision=compared.adapted.commit,
        plain=plain.repo_id if plain else None,
        plain_revision=plain.commit if plain else None,
        fisher=fisher.repo_id if fisher else None,
        fisher_revision=fisher.commit if fisher else None,
        results=RESULTS if results is not None else None,
        dtype=dtype,
        votes_repo=votes_repo,
    )
    given = {f.name: value for f in fields(config) if (value := getattr(config, f.name)) not in (None, f.default)}
    files[SPACE_FILE] = yaml.safe_dump(given, sort_keys=False, allow_unicode=True).encode()
    template = (app / CARD).read_text(encoding="utf-8")
    card = render_space_card(template, compared, config, repo_id=repo_id, title=title, hardware=hardware)
    files[CARD] = card.encode()
    files[LISTING] = "".join(f"{name}\n" for name in sorted(files)).encode()
    package = [path for path in _files_in(PACKAGE) if path.suffix in _PACKAGED]
    files |= {f"{PACKAGE.name}/{path.relative_to(PACKAGE).as_posix()}": path for path in package}
    refuse_tokens(files, token)
    return files


def _examples(path: str | Path) -> Path:
    found = Path(path).expanduser()
    try:
        whole = {"compare", "natural", "between"} <= set(json.loads(found.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"`examples: {path}` cannot be read as JSON: {error}. Nothing was sent.") from None
    if not whole:
        raise DataError(f"`examples: {path}` must hold `compare`, `natural` and `between`, as space_app/examples.json does.")
    return found


def plan_space(
    files: Mapping[str, Path | bytes], repo_id: str, revision: str | None = None, token: str | bool | None = None
) -> PushPlan:
    """
    Compare with the Space; [`HubError`] if it is somebody's other one. Of what lies there, the package's files and those that
    an earlier push wrote are deleted where they are no longer part of it; what its owner added stays.
    """
    plan = plan_push(files, repo_id, "space", revision=revision, delete=(f"{PACKAGE.name}/*",), token=token)
    foreign = [path for path in plan.present if path not in (".gitattributes", CARD)]
    if LISTING not in plan.present:
        if foreign:
            raise HubError(
                f"the Space '{repo_id}' was not pushed by hf_ewc: it holds {', '.join(foreign[:5])}, and this would replace "
                "its app and its card. Choose another repository. Nothing was sent."
            )
        return plan
    written = fetch_file(repo_id, "space", str(plan.parent), LISTING, token).read_text(encoding="utf-8").splitlines()
    gone = [path for path in plan.present if path in written and path not in files and path not in plan.deleted]
    return replace(plan, deleted=[*plan.deleted, *gone])


def restart_space(repo_id: str, token: str | bool | None = None) -> None:
    """Build a Space anew, so that it sees what has changed around it."""
    with plain_errors("restart", repo_id, "space"):
        patiently(lambda: client(token).restart_space(repo_id, factory_reboot=True))


def space_message(compared: Compared) -> str:
    base, adapted = (f"{part.repo_id}@{part.commit[:7]}" for part in (compared.base, compared.adapted))
    return f"Compare {adapted} with {base}"


def access_notes(compared: Compared, repo_id: str) -> list[str]:
    """What only the owner can do, and the Space does not run without."""
    if not compared.closed:
        return []
    return [
        f"not open to everybody: {', '.join(compared.closed)}. The Space '{repo_id}' needs a secret HF_TOKEN that may read it "
        "(its settings on the Hub), and downloads when it starts."
    ]


def _files_in(folder: Path) -> list[Path]:
    """Every file below, but for hidden ones, caches and screenshots."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".pyc")
    return [p for p in found if not any(part.startswith((".", *_STAYS)) for part in p.relative_to(folder).parts)]


def _hardware_problems(hardware: str | None) -> list[str]:
    flavours = [flavour.value for flavour in SpaceHardware]
    wrong = hardware is not None and hardware not in flavours
    return [f"`hardware: {hardware}` is not one of {', '.join(flavours)}."] if wrong else []

"""A trained model becomes a model repository: weights, tokenizer, its Fisher's name, figures and card, in one commit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..artifact import BaseModel, Manifest
from ..errors import ConfigError, DataError, FisherMismatchError, HubError
from ..evaluation import load_results
from ..files import BESIDE_WEIGHTS, STATE_FILE
from ..hub import (
    Licence,
    PushPlan,
    account,
    client,
    fetch_file,
    is_repo_id,
    licence_of,
    page,
    pin,
    plan_push,
    push_files,
    scrubbed,
)
from .checkpoint_card import render_checkpoint_card
from .eval_results import eval_result_files, pick_run

# Nothing else of the folder leaves the machine: beside a model lie checkpoints, optimizer states and training_args.bin, a
# pickle that may hold a token.
MODEL_FILES = ("config.json", *BESIDE_WEIGHTS)
INDEX, CARD, RESULTS, MANIFEST = "model.safetensors.index.json", "README.md", "results.json", "fisher_config.json"
STALE = ("model*.safetensors", INDEX, RESULTS, ".eval_results/*")  # of what was there before: other shards, other figures
BESIDE = (".gitattributes", CARD, "LICENSE", "NOTICE")
_NOT_TEXT = (".safetensors", ".parquet", ".png", ".model")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def push_checkpoint(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    tag: str | None = None,
    results: str | Path | None = None,
    fisher_repo: str | None = None,
    fisher_revision: str | None = None,
    licence: Licence | None = None,
    language: str | Sequence[str] | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    dry_run: bool = False,
    run_as_future: bool = False,
) -> Any:
    """
    Publish a trained model in one commit; where the repository holds all of it, nothing is sent and no commit is made.

    Args:
        folder (`str` or `Path`): what `hf-ewc train` wrote.
        repo_id (`str`): `"user/name"`; without `user/`, under the account of the token.
        private (`bool`, *optional*, defaults to `True`): of a repository that is created by this. One that exists stays as
            it is.
        revision (`str`, *optional*): branch to push to; made from `main` if it is new.
        tag (`str`, *optional*): for the commit, such as `"v1"`.
        results (`str` or `Path`, *optional*): `results.json` of `hf-ewc evaluate` or a sweep, for the card's table.
        fisher_repo, fisher_revision (`str`, *optional*): the dataset repository of the Fisher that it was trained with, if
            training did not take it from there. It must be the same to the bit; its commit is recorded.
        licence ([`Licence`], *optional*): the base model's by default.
        language (`str` or list of them, *optional*): codes of its languages for the card, such as `"lt"`.
        commit_message (`str`, *optional*)
        create_pr (`bool`, *optional*, defaults to `False`): open a pull request instead.
        token (`str` or `bool`, *optional*): the stored one by default.
        dry_run (`bool`, *optional*, defaults to `False`): send nothing, and return the [`PushPlan`].
        run_as_future (`bool`, *optional*, defaults to `False`): push in the background, and return a future.

    Returns:
        [`Pushed`], with the `commit` and the `url`.

    Raises:
        [`DataError`], [`ConfigError`], [`FisherMismatchError`], [`HubError`]: an incomplete model, a token in a file, another
            Fisher, no access. Nothing was sent.
    """
    if run_as_future:
        return client().run_as_future(push_checkpoint, **{**locals(), "run_as_future": False})
    if "/" not in repo_id:
        repo_id = f"{account(token)['name']}/{repo_id}"
    if fisher_repo is not None:
        repo, commit, digest = published_fisher(fisher_repo, fisher_revision, token)
        refuse_other_fisher(read_state(folder), digest, f"the dataset '{repo}' at commit {commit}", folder)
        fisher_repo, fisher_revision = repo, commit
    files = checkpoint_files(
        folder,
        repo_id,
        results=results,
        fisher_repo=fisher_repo,
        fisher_revision=fisher_revision,
        licence=licence,
        language=language,
        token=token,
    )
    plan = plan_checkpoint(files, repo_id, revision, token)
    if dry_run:
        return plan
    message = commit_message or _message(read_state(folder))
    return push_files(
        files, repo_id, "model", message=message, private=private, tag=tag, create_pr=create_pr, token=token, plan=plan
    )


def plan_checkpoint(
    files: Mapping[str, Path | bytes], repo_id: str, revision: str | None = None, token: str | bool | None = None
) -> PushPlan:
    """Compare with the repository; [`HubError`] if it holds somebody's other model."""
    plan = plan_push(files, repo_id, "model", revision=revision, delete=STALE, token=token)
    foreign = [path for path in plan.present if path not in BESIDE]
    if foreign and STATE_FILE not in plan.present:
        raise HubError(
            f"the model '{repo_id}' was not pushed by hf_ewc: it holds {', '.join(foreign[:5])} and no {STATE_FILE}, and this "
            "would replace its weights and its card. Choose another repository. Nothing was sent."
        )
    return plan


def checkpoint_files(
    folder: str | Path,
    repo_id: str,
    *,
    results: str | Path | None = None,
    fisher_repo: str | None = None,
    fisher_revision: str | None = None,
    licence: Licence | None = None,
    language: str | Sequence[str] | None = None,
    token: str | bool | None = None,
) -> dict[str, Path | bytes]:
    """
    What of a trained model's folder is published, by its path in the repository. The folder itself stays as it is.

    `ewc_state.json` names the Fisher's repository and commit instead of folders of this machine; the card is rendered anew.

    Args:
        fisher_repo, fisher_revision (`str`, *optional*): repository and commit, 40 digits, of the (newest) Fisher.
        folder, repo_id, results, licence, language, token: as for [`push_checkpoint`].
    """
    folder = Path(folder).expanduser()
    model, state = read_model(folder), read_state(folder)
    figures = None if results is None else load_results(Path(results).expanduser())
    if fisher_repo is not None:
        state = _with_fisher(state, fisher_repo, fisher_revision)
    state = _public(state)
    anchor = state.get("anchor") or {}
    if licence is None and anchor.get("revision"):
        licence = licence_of(anchor["id"], anchor["revision"], token)
    name = folder.resolve().name
    card = render_checkpoint_card(
        state,
        repo_id=repo_id,
        results=figures,
        licence=licence,
        language=language,
        name=name,
        fingerprint=model.fingerprint,
    )

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    patterns = (*MODEL_FILES, *(["*.py"] if "auto_map" in config else []))  # code of its own, without which it does not load
    found = sorted(path for pattern in patterns for path in folder.glob(pattern))
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path for path in found if path.is_file() and path.suffix not in _PICKLES
    }
    files |= {name: folder / name for name in model.files_sha256}
    if len(model.files_sha256) > 1:
        files[INDEX] = folder / INDEX
    files[STATE_FILE] = (json.dumps(state, indent=2, ensure_ascii=False) + "\n").encode()
    if results is not None and figures is not None:
        files[RESULTS] = Path(results).expanduser()
        entries = eval_result_files(figures, pick_run(figures, state, name, model.fingerprint), page(repo_id))
        files |= {path: text.encode() for path, text in entries.items()}
    files[CARD] = card.encode()
    refuse_tokens(files, token)
    return files


def read_model(folder: str | Path) -> BaseModel:
    """The trained model: all shards there, whole, as safetensors, with a config and perhaps a tokenizer."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"there is no folder '{folder}'. Name what `hf-ewc train` wrote into `output_dir`. Nothing was sent.")
    try:
        return BaseModel.resolve(folder)
    except DataError as error:
        reason = str(error).replace(f"the base model '{folder}'", "it")
        raise DataError(f"the checkpoint '{folder}' is not a whole model: {reason} Nothing was sent.") from None


def read_state(folder: str | Path) -> dict[str, Any]:
    """`ewc_state.json` of a trained model."""
    path = Path(folder).expanduser() / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"'{folder}' holds no {STATE_FILE}, so nothing says against which Fisher and base it was trained. Name the folder "
            "that `hf-ewc train` or EWCTrainer wrote. Nothing was sent."
        ) from None
    except ValueError as error:
        raise DataError(f"'{path}' is damaged ({error}). Copy the model again. Nothing was sent.") from None
    if not isinstance(state, dict) or state.get("schema") != 1:
        found = state.get("schema") if isinstance(state, dict) else type(state).__name__
        raise DataError(f"'{path}' has schema {found!r}, and this version reads 1. Upgrade hf_ewc. Nothing was sent.")
    return state


def published_fisher(repo_id: str, revision: str | None, token: str | bool | None = None) -> tuple[str, str, str]:
    """Repository, commit and digest of the Fisher in a dataset repository, named with or without `@revision`."""
    repo_id, _, suffix = repo_id.partition("@")
    if not is_repo_id(repo_id):
        raise ConfigError(f"`fisher_repo: {repo_id}` is no dataset on the Hub: write `user/name`, or `user/name@revision`.")
    commit = pin(repo_id, "dataset", revision or suffix or None, token)
    path = fetch_file(repo_id, "dataset", commit, MANIFEST, token)
    return repo_id, commit, Manifest.from_json(path.read_text(encoding="utf-8"), repo_id).digest


def refuse_other_fisher(state: Mapping[str, Any], digest: str, name: str, folder: str | Path) -> None:
    """A model is published with the Fisher that it was trained with, to the bit, or not at all: of several, with the newest."""
    newest = newest_fisher(state) or {"sha256": "none", "source": "λ = 0"}
    if newest.get("sha256") != digest:
        raise FisherMismatchError(
            f"the checkpoint '{folder}' was trained with another Fisher, and its card would name the wrong one:\n"
            f"    this Fisher   {digest}  ({name})\n    trained with  {newest.get('sha256')}  ({newest.get('source')})\n"
            "Name the Fisher that it was trained with. Nothing was sent."
        )


def newest_fisher(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The Fisher that a model was trained with; of several that training folded, the last."""
    fisher = state.get("fisher")
    return fisher["fold"][-1] if fisher and fisher.get("fold") else fisher


def refuse_tokens(files: Mapping[str, Path | bytes], token: str | bool | None = None) -> None:
    """Raise a [`ConfigError`] if a text that is about to be published holds an access token."""
    found = []
    for name, content in files.items():
        if Path(name).suffix in _NOT_TEXT:
            continue
        text = (content if isinstance(content, bytes) else content.read_bytes()).decode(errors="replace")
        if scrubbed(text) != text or (isinstance(token, str) and token in text):
            lines = text.splitlines()
            number = next((n for n, line in enumerate(lines, 1) if scrubbed(line) != line), 1)
            found.append(f"    {name}, line {number}")
    if found:
        raise ConfigError(
            "these files hold what looks like an access token of the Hub, which everybody could use once it is published:\n"
            + "\n".join(found)
            + "\nRemove it there, and revoke it on your settings page if others may have seen it. Nothing was sent."
        )


def _with_fisher(state: dict[str, Any], repo_id: str, commit: str | None) -> dict[str, Any]:
    """The state with repository and commit of its Fisher; of the newest, where several were folded."""
    fisher = dict(state.get("fisher") or {})
    where = {"source": repo_id, "repo_id": repo_id, "revision": commit}
    if fold := fisher.get("fold"):
        return {**state, "fisher": {**fisher, "fold": [*fold[:-1], {**fold[-1], **where}]}}
    return {**state, "fisher": {**fisher, **where}}


def _public(state: dict[str, Any]) -> dict[str, Any]:
    """The state without where things lie on this machine: a folder is named by its last part."""
    state = json.loads(json.dumps(state))
    fisher = state.get("fisher") or {}
    for entry in (fisher, *fisher.get("fold", [])):
        if "source" in entry and not entry.get("repo_id"):
            entry["source"] = " + ".join(_last(part) for part in str(entry["source"]).split(" + "))
    anchor, merge = state.get("anchor"), state.get("merge")
    if anchor and not anchor.get("revision"):
        anchor["id"] = _last(anchor["id"])
    while merge:
        for entry, key in ((merge["base"], "id"), (merge["adapted"], "id"), (merge.get("fisher") or {}, "source")):
            if entry.get(key) and not entry.get("revision"):
                entry[key] = " + ".join(_last(part) for part in str(entry[key]).split(" + "))
        merge = merge["adapted"].get("merge")
    return state


def _last(name: str) -> str:
    return Path(name).name if Path(name).is_absolute() or Path(name).is_dir() else name


def _message(state: Mapping[str, Any]) -> str:
    return f"Model after {state.get('global_step')} steps, EWC λ = {state.get('ewc_lambda')} ({state.get('ewc_mode')})"

"""What must hold before a merge begins: settings, the place, and that two models and a Fisher belong together."""

from __future__ import annotations

import json
import logging
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..artifact import BaseModel, FisherInformation, fit
from ..config import DTYPES
from ..errors import ConfigError, DataError, EWCError, FisherMismatchError
from ..files import BESIDE_WEIGHTS, STATE_FILE
from .shards import INDEX

logger = logging.getLogger(__name__)

OURS = ("model*.safetensors", INDEX, "config.json", "README.md", STATE_FILE, *BESIDE_WEIGHTS)


def setting_problems(merge_lambda: float | None, interpolate: float | None, ewc_missing: str, dtype: str | None) -> list[str]:
    """Settings that are out of range or contradict each other, in words."""
    problems = []
    if (merge_lambda is None) == (interpolate is None):
        both = "both are given" if interpolate is not None else "neither is given"
        problems.append(f"Set either `merge_lambda` (each weight by its Fisher) or `interpolate` (all alike); {both}.")
    if merge_lambda is not None and not merge_lambda >= 0:
        problems.append(f"`merge_lambda: {merge_lambda}` must be 0 (stay adapted), above, or `inf` (the base where F > 0).")
    if interpolate is not None and not 0 <= interpolate <= 1:
        problems.append(f"`interpolate: {interpolate}` must lie between 0 (stay adapted) and 1 (the base).")
    if ewc_missing not in ("error", "ignore"):
        problems.append(f"`ewc_missing: {ewc_missing}` is not one of error, ignore.")
    if dtype not in (None, *DTYPES):
        problems.append(f"`dtype: {dtype}` is not one of {', '.join(DTYPES)}. Leave it out to keep the adapted model's.")
    return problems


def check_target(folder: Path, overwrite: bool, inputs: list[str | Path]) -> None:
    """A merge goes to a new or empty folder, or, with `overwrite`, replaces an earlier merge and nothing else."""
    for each in inputs:
        if Path(each).expanduser().resolve() == folder.resolve():
            raise ConfigError(
                f"the merge would replace what it is made from, '{each}'. Name another `output_dir`. Nothing was written."
            )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"`output_dir: {folder}` is a file. Name a folder. Nothing was written.")
    present = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    if not present:
        return
    if not overwrite:
        raise ConfigError(
            f"`output_dir: {folder}` is not empty. Set `overwrite` to replace an earlier merge there, or name another folder. "
            "Nothing was written."
        )
    foreign = [name for name in present if not any(_matches(name, pattern) for pattern in OURS)]
    if foreign or "merge" not in _json(folder / STATE_FILE):
        raise ConfigError(
            f"`overwrite` only replaces an earlier merge, and `output_dir: {folder}` holds something else "
            f"({', '.join((foreign or present)[:5])}). Name another folder. Nothing was written."
        )


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def resolve(role: str, name: str | Path, revision: str | None) -> BaseModel:
    """[`BaseModel.resolve`], with messages that say which of the two models it is."""
    try:
        return BaseModel.resolve(name, revision)
    except DataError as error:
        raise DataError(f"{str(error).replace('the base model', f'the {role} model', 1)} Nothing was written.") from None


def state_of(adapted: BaseModel) -> dict[str, Any]:
    """`ewc_state.json` of the adapted model; empty for one that was not trained by this library."""
    assert adapted.folder is not None
    return _json(adapted.folder / STATE_FILE)


def base_of(base: str | Path | None, revision: str | None, adapted: BaseModel, state: dict[str, Any]) -> BaseModel:
    """The base model that is named, or the one that the adapted model was trained against."""
    recorded = state.get("anchor") or {}
    if base is not None:
        found = resolve("base", base, revision)
        if recorded and recorded.get("fingerprint") != found.fingerprint:
            logger.warning(
                "'%s' was trained against '%s' (sha256 %.12s), and is merged with '%s' (sha256 %.12s).",
                adapted.label,
                recorded.get("id"),
                recorded.get("fingerprint"),
                found.label,
                found.fingerprint,
            )
        return found
    if not recorded:
        raise ConfigError(_nothing_names("base", "the model that it was trained from", adapted))
    try:
        found = resolve("base", recorded["id"], revision or recorded.get("revision"))
    except DataError as error:
        raise DataError(f"{error}\n{_recorded_in('base', adapted)}") from None
    if found.fingerprint != recorded.get("fingerprint"):
        raise DataError(
            f"the weights of the base model '{found.label}' are not the ones that '{adapted.label}' was trained against.\n"
            f"    recorded sha256 {recorded.get('fingerprint')}\n    found    sha256 {found.fingerprint}\n"
            f"{_recorded_in('base', adapted)} Nothing was written."
        )
    return found


def fisher_of(
    fisher: FisherInformation | str | Path | None,
    revision: str | None,
    base: BaseModel,
    adapted: BaseModel,
    state: dict[str, Any],
) -> FisherInformation:
    """The Fisher that is named, or the one that the adapted model was trained with; measured at this base, or refused."""
    if fisher is None:
        found = _recorded_fisher(revision, adapted, state.get("fisher") or {})
    else:
        found = fisher if isinstance(fisher, FisherInformation) else FisherInformation.from_pretrained(fisher, revision)
    try:
        found.check_base(base)
    except FisherMismatchError as error:
        text = str(error).replace("Train from", "Merge with").replace("name it as the anchor", "name it as `base`")
        raise FisherMismatchError(text.replace("Nothing was trained", "Nothing was written")) from None
    return found


def _recorded_fisher(revision: str | None, adapted: BaseModel, recorded: dict[str, Any]) -> FisherInformation:
    if not recorded:
        raise ConfigError(_nothing_names("fisher", "one that was measured at the base", adapted))
    if len(recorded.get("fold", [])) > 1:
        names = " ".join(part["source"] for part in recorded["fold"])
        raise ConfigError(
            f"`fisher` is missing, and '{adapted.label}' was trained with {len(recorded['fold'])} Fishers, folded for that run "
            f"only. Store that fold and name it: `hf-ewc fisher fold {names} --output_dir FOLD`. Nothing was written."
        )
    try:
        source = recorded.get("repo_id") or recorded["source"]
        found = FisherInformation.from_pretrained(source, revision or recorded.get("revision"))
    except EWCError as error:
        raise type(error)(f"{error}\n{_recorded_in('fisher', adapted)}") from None
    if found.sha256 != recorded.get("sha256"):
        raise FisherMismatchError(
            f"the Fisher '{found.source}' is not the one that '{adapted.label}' was trained with.\n"
            f"    recorded sha256 {recorded.get('sha256')}\n    found    sha256 {found.sha256}\n"
            f"{_recorded_in('fisher', adapted)} Nothing was written."
        )
    return found


def compare(base: BaseModel, adapted: BaseModel) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """
    Refuse models of different architecture or shapes; the values of their weights are not looked at.

    Returns:
        `tuple`: shapes by `named_parameters()` name; and for each key that a file may have, tied copies included, which of
        these parameters it is.
    """
    (ours, _), (theirs, owners) = _parameters(base), _parameters(adapted)
    rows = [] if base.architecture == adapted.architecture else [("architecture", base.architecture, adapted.architecture)]
    rows += fit.parameter_rows(ours, theirs)
    if rows:
        resized = base.vocab_size != adapted.vocab_size and all(
            name in ours and name in theirs and ours[name][1:] == theirs[name][1:] for name, _, _ in rows
        )
        way_out = (
            f"The vocabulary was resized from {base.vocab_size} to {adapted.vocab_size} in training, and a row that only one "
            "model has cannot be pulled back to the other. Cut the adapted model's table to the base's if it does not need the "
            f"new tokens (`model.resize_token_embeddings({base.vocab_size})`, `model.save_pretrained(FOLDER)`, with the base's "
            "tokenizer), and merge that; or train without resizing."
            if resized
            else "A merge needs a model and another one that was trained from it. Name the base that it was trained from."
        )
        raise DataError(
            f"the models '{base.label}' and '{adapted.label}' cannot be merged.\n{fit.table(rows, 'base', 'adapted')}\n"
            f"{way_out} Nothing was written."
        )
    if base.tokenizer_sha256 and adapted.tokenizer_sha256 and base.tokenizer_sha256 != adapted.tokenizer_sha256:
        logger.warning(
            "'%s' and '%s' have different tokenizers. The merge gets the second; where an id is another token in "
            "the base, its row is pulled back to that token's.",
            base.label,
            adapted.label,
        )
    return theirs, owners


def _parameters(model: BaseModel) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    assert model.folder is not None
    try:
        with torch.device("meta"):  # shapes and ties without weights
            skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model.folder))
    except (ValueError, ImportError) as error:
        raise DataError(f"'{model.label}' is no language model that transformers can build: {error}") from None
    first: dict[int, str] = {}
    every = skeleton.named_parameters(remove_duplicate=False)
    owners = {name: first.setdefault(id(param), name) for name, param in every}
    return {name: tuple(param.shape) for name, param in skeleton.named_parameters()}, owners


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"'{path}' is damaged ({error}). Copy the model again. Nothing was written.") from None
    if not isinstance(content, dict) or content.get("schema") != 1:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise DataError(f"'{path}' has schema {found!r}, and this version reads 1. Upgrade hf_ewc. Nothing was written.")
    return content


def _nothing_names(setting: str, what: str, adapted: BaseModel) -> str:
    return (
        f"`{setting}` is missing, and '{adapted.label}' holds no {STATE_FILE} that names it. Name {what}: a folder, or an id "
        "on the Hub. Nothing was written."
    )


def _recorded_in(setting: str, adapted: BaseModel) -> str:
    return f"That is what {STATE_FILE} of '{adapted.label}' names. Set `{setting}` to take another, or say where it is."
